"""The outputs of a last layer under all cotangents: one Jacobian for all examples, held once."""

import pytest
import torch
from torch import nn

from nngeometry import (
    FIM,
    Jacobian,
    LayerCollection,
    PFMapFactored,
    PMatBlockDiag,
    PMatDense,
    PMatDiag,
    PMatEKFAC,
    PMatKFAC,
    PMatLowRank,
    PMatMixed,
    Posterior,
    memory_budget,
)
from nngeometry.gram import example_kernels
from nngeometry.jacobian import of_outputs
from nngeometry.likelihood import Categorical
from nngeometry.memory import BytesMade


def net(outputs, bias=True):
    torch.manual_seed(0)
    layers = nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, outputs, bias=bias)
    return nn.Sequential(*layers).double().eval(), torch.randn(7, 3, dtype=torch.float64)


def rows(model, x, parameters):
    """The Jacobian of each output of each example, ``(n, C, P)``, by plain autograd."""
    f = model(x)
    each = [[torch.autograd.grad(v, parameters, retain_graph=True) for v in row] for row in f]
    return torch.stack([torch.stack([torch.cat([g.flatten() for g in gs]) for gs in row]) for row in each])


@pytest.mark.parametrize("whole", [False, True], ids=["last", "whole"])
@pytest.mark.parametrize("bias", [True, False], ids=["bias", "plain"])
@pytest.mark.parametrize(
    "representation",
    [
        *(PMatDense, PMatBlockDiag, PMatDiag, PMatKFAC, PMatEKFAC, PMatLowRank),
        PMatMixed.of(PMatKFAC, {"2": PMatBlockDiag}),
    ],
    ids=lambda r: getattr(r, "__name__", "PMatMixed"),
)
def test_variances_are_those_of_dense_jacobians(representation, bias, whole):
    model, x = net(5, bias)
    lc = LayerCollection.from_model(model) if whole else LayerCollection.from_model(model, "2")
    F = FIM(model, (x,), representation, layer_collection=lc)
    J = rows(model, x, lc.parameters(model))
    expected = J @ torch.linalg.inv(7 * F.to_torch() + 0.3 * torch.eye(F.size(0), dtype=x.dtype)) @ J.mT
    posterior = Posterior(model, F, num_data=7, prior_precision=0.3)
    for part in (x, x[:1]):
        n = len(part)
        torch.testing.assert_close(posterior.variance(part, "full"), expected[:n], rtol=0, atol=1e-10)
        diagonal = expected[:n].diagonal(dim1=1, dim2=2)
        torch.testing.assert_close(posterior.variance(part), diagonal, rtol=0, atol=1e-10)
    torch.testing.assert_close(example_kernels(model, (x,), layer_collection=lc), J.square().sum(2))


def test_one_gradient_of_all_examples_is_held_once():
    model, x = net(5)
    lc = LayerCollection.from_model(model)
    J = Jacobian(model, (x,), layer_collection=lc, representation=PFMapFactored)
    (observation,) = of_outputs(model, None, lc).stream((x,))
    assert observation.forms["2"].shared
    assert not observation.forms["0"].shared
    assert observation.forms["2"].nbytes() < observation.forms["0"].nbytes()
    for moved in (observation.forms["2"].to(dtype=torch.float32), observation.forms["2"].scale(2.0)):
        assert moved.shared
    torch.testing.assert_close(J.to_torch().movedim(0, 1), rows(model, x, lc.parameters(model)))


@pytest.mark.parametrize("representation", [PMatKFAC, PMatEKFAC, PMatDiag], ids=lambda r: r.__name__)
def test_variances_of_many_classes_make_nothing_for_pairs_of_them(representation):
    model, x = net(300)
    lc = LayerCollection.from_model(model, "2")
    x = x.repeat(20, 1)
    posterior = Posterior(model, FIM(model, (x[:4],), representation, layer_collection=lc), num_data=4)
    posterior.predict(x)
    with BytesMade() as made:
        posterior.predict(x)
    assert made.nbytes < len(x) * 300 * 300 * 8 / 4


@pytest.mark.parametrize("how", ["bridge", "mc"])
def test_covariances_are_made_a_few_at_a_time(how):
    model, x = net(6)
    posterior = Posterior(model, FIM(model, (x,), PMatKFAC), num_data=7)
    expected, information = posterior.predict(x, how, samples=20000), posterior.information(x)
    with memory_budget(4 * 36 * 8 * 32 * 3):  # of three examples
        few = posterior.predict(x, how, samples=20000)
        torch.testing.assert_close(posterior.information(x), information)
        torch.testing.assert_close(posterior.information([(x[:5],), (x[5:],)]), information)
    torch.testing.assert_close(few, expected, rtol=0, atol=2e-2 if how == "mc" else 1e-12)


@pytest.mark.parametrize("shape", [(4, 6), (4, 6, 3)], ids=str)
def test_root_of_the_information_of_classes_can_be_differentiated(shape):
    f = torch.randn(shape, dtype=torch.float64, requires_grad=True)
    u = torch.randn(shape, dtype=torch.float64)
    cotangents = Categorical().sqrt(f)
    s = cotangents.take(0, cotangents.count)
    squares = torch.einsum("cb,cb->b", *[(s * u).flatten(2).sum(2)] * 2)
    expected = (Categorical().hvp(f, u) * u).flatten(1).sum(1)
    torch.testing.assert_close(squares, expected)
    one, other = (torch.autograd.grad(v.sum(), f, retain_graph=True)[0] for v in (squares, expected))
    torch.testing.assert_close(one, other)


def test_gradients_of_another_layer_than_the_last_are_those_of_each_example():
    model, x = net(3)
    model.append(nn.Softplus())
    (observation,) = of_outputs(model, None, LayerCollection.from_model(model, "2")).stream((x,))
    assert not observation.forms["2"].shared
