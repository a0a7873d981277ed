"""Copies of the tensors of a model, put in their places for whoever holds them."""

import oracle
import pytest
import torch
from oracle import randomise
from torch import nn
from torch.nn import functional as F

from nngeometry import (
    FIM,
    Hessian,
    Jacobian,
    LayerCollection,
    PFMapFactored,
    PFMapImplicit,
    PMatDense,
    PMatImplicit,
    random_pvector,
)
from nngeometry.changes import Borrowed
from nngeometry.model.weights import Weights


class Net(nn.Module):
    """Parameters held by modules, in a list and in a closure; a buffer."""

    def __init__(self):
        super().__init__()
        self.a, self.b, self.norm = nn.Linear(3, 4), nn.Linear(4, 2), nn.BatchNorm1d(4)
        self.held = [self.b.weight]
        bias = self.b.bias
        self.add = lambda y: y + bias

    def forward(self, x):
        return self.add(torch.tanh(self.norm(self.a(x))) @ self.held[0].T)


@pytest.fixture
def net():
    model = randomise(Net())
    model.norm.running_mean.normal_()
    return model


def test_all_that_hold_a_parameter_see_the_copy(net):
    x = torch.randn(5, 3)
    before = net(x)
    weights = Weights([net], list(net.parameters()))
    with torch.no_grad():
        for t in (*net.parameters(), *net.buffers()):
            t.add_(1) if t.is_floating_point() else None
    after = net(x)
    ids = [id(p) for p in net.parameters()]
    for _ in range(2):
        with Borrowed(weights.in_place), Borrowed(weights.in_place):
            torch.testing.assert_close(net(x), before)
            assert [id(p) for p in net.parameters()] == ids
        torch.testing.assert_close(net(x), after)


def test_a_graph_of_the_user_is_none_of_ours(net):
    x = torch.randn(5, 3)
    loss = net(x).sum()
    expected = torch.autograd.grad(net(x).sum(), list(net.parameters()))
    weights = Weights([net], list(net.parameters()))
    with Borrowed(weights.in_place):
        recorded = net(x).sum()
    loss.backward()
    for p, g in zip(net.parameters(), expected, strict=True):
        torch.testing.assert_close(p.grad, g)
    found = torch.autograd.grad(recorded, weights.edges)
    for g, e in zip(found, expected, strict=True):
        torch.testing.assert_close(g, e)


def test_parameters_that_were_replaced_since(net):
    x = torch.randn(5, 3)
    before = net(x)
    weights = Weights([net], list(net.parameters()))
    other = net.a.weight = nn.Parameter(torch.zeros(4, 3))
    with Borrowed(weights.in_place):
        torch.testing.assert_close(net(x), before)
    assert net.a.weight is other


@pytest.mark.parametrize("first", [True, False], ids=["after a product", "before the first"])
@pytest.mark.parametrize("moved", ["a.weight", "b.weight", "b.bias", "norm.weight", "norm.running_mean"])
@pytest.mark.parametrize("part", ["all", "a", "b"])
def test_matrices_by_products_stay(net, part, moved, first):
    lc = LayerCollection.from_model(net, ignore_uncalled=True)
    lc = lc if part == "all" else lc.select(part)
    x, y = torch.randn(6, 3), torch.randint(2, (6,))
    v = random_pvector(lc)
    J = oracle.jacobian(net, (x,), layer_collection=lc)
    ps = lc.parameters(net)
    g = torch.cat([d.flatten() for d in torch.autograd.grad(F.cross_entropy(net(x), y), ps, create_graph=True)])
    Hv = torch.cat([d.flatten() for d in torch.autograd.grad(g @ v.to_torch(), ps)])
    F_ = FIM(net, (x,), PMatImplicit, "regression", layer_collection=lc)
    H = Hessian(net, (x, y), PMatImplicit, layer_collection=lc)
    maps = Jacobian(net, (x,), representation=PFMapImplicit, layer_collection=lc)
    if first:
        F_.mv(v), H.mv(v), maps @ v
    tensor = dict([*net.named_parameters(), *net.named_buffers()])[moved]
    with torch.no_grad():
        tensor.add_(torch.randn_like(tensor))
    Jv = J @ v.to_torch()
    assert oracle.relative(F_.mv(v).to_torch(), torch.einsum("cnp,cn->p", J, Jv) / 6) < 1e-10
    assert oracle.relative(H.mv(v).to_torch(), Hv) < 1e-10
    assert oracle.relative((maps @ v).to_torch(), Jv) < 1e-10


class Bare(nn.Module):
    def __init__(self):
        super().__init__()
        self.scale, self.inner = nn.Parameter(torch.ones(3)), nn.Linear(3, 3)

    def forward(self, x):
        return torch.tanh(self.inner(x * self.scale))


def test_a_factored_map_of_layers_without_a_form_stays():
    model, x = randomise(nn.Sequential(Bare(), nn.Linear(3, 2))), torch.randn(4, 3)
    J = Jacobian(model, (x,), representation=PFMapFactored)
    rows = oracle.jacobian(model, (x,))
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.5)
    assert oracle.relative(J.to_dense().to_torch(), rows) < 1e-10


class Stored(nn.Module):
    """A tensor that was computed from a parameter before."""

    def __init__(self):
        super().__init__()
        self.a = nn.Linear(3, 3)
        self.transposed = self.a.weight.T

    def forward(self, x):
        return torch.tanh(self.a(x)) @ self.transposed


@pytest.mark.parametrize("matrix", [FIM, Hessian])
def test_what_was_computed_before_is_refused(matrix):
    model = randomise(Stored())
    batch = torch.randn(4, 3), torch.randint(3, (4,))
    for representation in (PMatDense, PMatImplicit):
        with pytest.raises(ValueError, match="act outside of its forward"):
            matrix(model, batch, representation).mv(random_pvector(LayerCollection.from_model(model)))
    with pytest.raises(ValueError, match="act outside of its forward"):
        FIM(model, batch, PMatImplicit).trace()
