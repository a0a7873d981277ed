"""Pictures of how optimisers went, and of what is no such thing."""

import pytest
import torch
from torch import nn

from nngeometry.optim import SecondOrderOptimizer, Stale
from nngeometry.plot import plot_damping, plot_intervals, plot_optimisation


def test_loss_against_steps_and_seconds(tmp_path):
    run = {"loss": [2.0, 1.0, 0.5], "seconds": [0.1, 0.3, 0.4]}
    path = tmp_path / "a.png"
    figure = plot_optimisation({"a": run, "b": run}, path)
    steps, seconds = figure.axes
    assert [line.get_label() for line in steps.lines] == ["a", "b"]
    assert list(seconds.lines[0].get_xdata()) == run["seconds"]
    assert steps.get_yscale() == "log"
    assert path.stat().st_size > 1000
    (alone,) = plot_optimisation({"a": run, "b": {"loss": [0.0, -1.0]}}).axes
    assert alone.get_yscale() == "linear"
    many = plot_optimisation({str(k): run for k in range(9)}).axes[0].lines
    assert len({(line.get_color(), line.get_linestyle()) for line in many}) == 9


def test_intervals_are_those_of_the_optimiser(tmp_path):
    model = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2))
    opt = SecondOrderOptimizer(model, lr=1e-3, damping=1.0, refresh=Stale(0.5))
    seen = []
    for _ in range(6):
        x, y = torch.randn(50, 3), torch.randint(2, (50,))
        nn.functional.cross_entropy(model(x), y).backward()
        opt.observe((x, y))
        opt.step()
        opt.zero_grad()
        seen.append(opt.intervals)
    lines = plot_intervals(seen, tmp_path / "a.png").axes[0].lines
    assert [line.get_label() for line in lines] == [f"{n}, {of}" for n in "02" for of in ("gradients", "inputs")]
    assert list(lines[0].get_ydata()) == [at["0"][0] for at in seen]


def test_layers_that_come_later_and_many_of_them():
    figure = plot_intervals([{"a": (1,)}, {"a": (2,), "b": (1, 2, 3)}])
    assert [line.get_label() for line in figure.axes[0].lines] == ["a", "b, 0", "b, 1", "b, 2"]
    assert plot_intervals([{str(k): (1,) for k in range(20)}]).axes[0].get_legend() is None


def test_damping():
    ax = plot_damping({"a": [1.0, 0.5], "b": [2.0]}).axes[0]
    assert [list(line.get_ydata()) for line in ax.lines] == [[1.0, 0.5], [2.0]]
    assert plot_damping({"a": [0.0, 0.5]}).axes[0].get_yscale() == "linear"


@pytest.mark.parametrize(
    ("draw", "message"),
    [
        (lambda: plot_optimisation({}), "there is no loss to draw"),
        (lambda: plot_optimisation({"a": {"loss": [1.0], "seconds": []}}), "run 'a' needs"),
        (lambda: plot_optimisation({"a": {"loss": [1.0]}, "b": {}}), "run 'b' needs"),
        (lambda: plot_intervals([{}, {}]), "those are of refresh=Stale"),
        (lambda: plot_damping({"a": []}), "there is no damping to draw"),
    ],
)
def test_nothing_to_draw_is_said(draw, message):
    with pytest.raises(ValueError, match=message):
        draw()
