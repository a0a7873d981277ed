"""Decompositions are right where LAPACK fails: by an error, or by numbers that are none."""

import pytest
import torch
from torch import nn

from nngeometry import FIM, PMatBlockDiag, PMatDense, PMatEKFAC, PMatKFAC, PMatLowRank
from nngeometry.blocks.dense import eigh
from nngeometry.optim import SecondOrderOptimizer

single, double = torch.float32, torch.float64
plain = torch.linalg.eigh


def failing(how, of=(single,)):
    def found(m, *args, **options):
        l, q = plain(m, *args, **options)
        if m.dtype not in of:
            return l, q
        if how == "error":
            raise torch.linalg.LinAlgError("no convergence")
        l, q = l.clone(), q.clone()
        if how != "vectors":
            l[..., 0] = float("nan")
        q[..., :, 0] = float("nan")
        return l, q

    return found


def problem():
    """A net with units that are never active, and columns of data that are zero."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 3)).float()
    with torch.no_grad():
        model[0].bias[::2] = -100.0
    x = torch.randn(20, 6, dtype=single) * torch.tensor([1.0, 0, 1, 0, 1, 1], dtype=single)
    return model, x, torch.randint(3, (20,))


@pytest.mark.parametrize("how", ["error", "values", "vectors"])
def test_single_precision_that_fails_is_double(monkeypatch, how):
    a = torch.randn(2, 5, 5, dtype=single)
    a = a @ a.mT
    monkeypatch.setattr(torch.linalg, "eigh", failing(how))
    l, q = eigh(a)
    assert (l.dtype, q.dtype) == (single, single)
    torch.testing.assert_close((q * l.unsqueeze(-2)) @ q.mT, a, rtol=1e-5, atol=1e-5)


def stepped(representation):
    """The parameters after a step that takes eigenvalues by their absolute values, and so decomposes."""
    model, x, y = problem()
    opt = SecondOrderOptimizer(model, representation, FIM, lr=0.1, damping=0.1, absolute=True)
    nn.functional.cross_entropy(model(x), y).backward()
    opt.observe((x, y))
    opt.step()
    return nn.utils.parameters_to_vector(model.parameters()).detach()


@pytest.mark.parametrize("how", ["error", "values"])
@pytest.mark.parametrize("representation", [PMatDense, PMatBlockDiag, PMatKFAC, PMatEKFAC, PMatLowRank])
def test_a_step_is_what_it_would_be(monkeypatch, representation, how):
    right = stepped(representation)
    monkeypatch.setattr(torch.linalg, "eigh", failing(how))
    torch.testing.assert_close(stepped(representation), right, rtol=1e-4, atol=1e-5)


def test_what_double_precision_cannot_do_is_said(monkeypatch):
    monkeypatch.setattr(torch.linalg, "eigh", failing("values", of=(single, double)))
    with pytest.raises(torch.linalg.LinAlgError, match=r"no finite eigenvalues of a finite matrix \(3, 3\)"):
        eigh(torch.eye(3, dtype=double))
