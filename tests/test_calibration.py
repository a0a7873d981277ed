"""Calibration by a plain loop, and its diagram."""

import pytest
import torch

from nngeometry.calibration import calibration
from nngeometry.plot import plot_calibration


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("bins", [1, 4, 15])
def test_by_a_loop(bins, dtype):
    torch.manual_seed(0)
    p, y = (2 * torch.randn(200, 5, dtype=dtype)).softmax(1), torch.randint(5, (200,))
    found, error = calibration(p, y, bins), 0.0
    for k in range(bins):
        inside = [i for i in range(200) if k / bins <= float(p[i].max()) < (k + 1) / bins]
        assert int(found.counts[k]) == len(inside)
        if inside:
            right = sum(bool(p[i].argmax() == y[i]) for i in inside) / len(inside)
            sure = sum(float(p[i].max()) for i in inside) / len(inside)
            assert abs(float(found.accuracy[k]) - right) < 1e-6
            assert abs(float(found.confidence[k]) - sure) < 1e-6
            error += abs(right - sure) * len(inside) / 200
    assert abs(found.error - error) < 1e-6
    assert int(found.counts.sum()) == 200


def test_certain_predictions_are_in_the_last_bin():
    found = calibration(torch.eye(3), torch.tensor([0, 1, 0]))
    assert int(found.counts[-1]) == 3
    assert abs(found.error - 1 / 3) < 1e-12


@pytest.mark.parametrize(
    ("p", "y", "error", "text"),
    [
        (torch.randn(4, 3), torch.zeros(4, dtype=torch.long), ValueError, "do not sum to one: give outputs"),
        (torch.full((4, 3), 2 / 3), torch.zeros(4, dtype=torch.long), ValueError, "averaged over draws"),
        (torch.full((4, 3), torch.nan), torch.zeros(4, dtype=torch.long), ValueError, "do not sum to one"),
        (torch.eye(3), torch.zeros(4, dtype=torch.long), ValueError, r"\(n, C\) and labels \(n,\)"),
        (torch.eye(3), torch.zeros(3), ValueError, "labels are classes"),
        (torch.eye(3)[:0], torch.zeros(0, dtype=torch.long), ValueError, r"expected probabilities \(n, C\)"),
        (torch.eye(3), torch.tensor([0, 1, -100]), ValueError, "labels are -100 to 1, and there are 3 classes"),
        (torch.eye(3), torch.tensor([0, 1, 3]), ValueError, "leave out examples without a label"),
        ([[1.0]], torch.zeros(1, dtype=torch.long), TypeError, "probabilities: expected a Tensor"),
    ],
)
def test_misuse(p, y, error, text):
    with pytest.raises(error, match=text):
        calibration(p, y)


def test_the_diagram(tmp_path):
    torch.manual_seed(0)
    p, y = torch.randn(200, 5).softmax(1), torch.randint(5, (200,))
    found = calibration(p, y, 5)
    figure = plot_calibration({"one": found, "other": calibration(p, p.argmax(1), 5)}, tmp_path / "picture.png")
    assert (tmp_path / "picture.png").stat().st_size > 1000
    above = figure.axes[0]
    assert torch.equal(torch.tensor(above.lines[1].get_ydata()), found.accuracy[found.counts > 0])
    with pytest.raises(ValueError, match="nothing to draw"):
        plot_calibration({})
