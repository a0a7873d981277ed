"""Hessian products by differences: as exact as promised, or refused, on smooth nets and on nets with kinks."""

import copy

import oracle
import pytest
import torch
from torch import nn
from torch.nn import functional as F

from nngeometry import FiniteDifference, Hessian, LayerCollection, PMatDense, PMatImplicit, PVector
from nngeometry.object.finite_difference import Gradient

ACTIVATIONS = {
    "tanh": torch.tanh,
    "relu": F.relu,
    "leaky": F.leaky_relu,
    "elu": F.elu,
    "hardswish": F.hardswish,
    "abs": torch.abs,
    "hardtanh": F.hardtanh,
    "softshrink": F.softshrink,
    "cube": lambda x: x.relu() ** 3,
}


class Mlp(nn.Module):
    def __init__(self, width, activation):
        super().__init__()
        self.a, self.b, self.c = nn.Linear(5, width), nn.Linear(width, width), nn.Linear(width, 3)
        self.activation = activation

    def forward(self, x):
        return self.c(self.activation(self.b(self.activation(self.a(x)))))


class Pooled(nn.Module):
    """Max-pooling, and a grid_sample at places that depend on parameters, which has kinks at every pixel."""

    def __init__(self):
        super().__init__()
        self.conv, self.where, self.head = nn.Conv2d(1, 4, 3), nn.Linear(4, 8), nn.Linear(20, 3)

    def forward(self, x):
        h = F.max_pool2d(self.conv(x), 2)
        places = torch.tanh(self.where(h.mean((2, 3)))).view(-1, 4, 1, 2)
        seen = F.grid_sample(h, places, align_corners=False)
        return self.head(torch.cat([seen.flatten(1), h.amax((2, 3))], 1))


def data_for(model, n):
    x = torch.randn(n, 1, 8, 8) if isinstance(model, Pooled) else torch.randn(n, 5)
    return x, torch.randint(3, (n,))


def product_by_loops(model, batches, v, reduction="mean", lc=None):
    """H v by two backward passes through the whole model in float64, one minibatch at a time."""
    model = copy.deepcopy(model).double()
    params = (lc or LayerCollection.from_model(model)).parameters(model)
    total, n = 0, 0
    for x, y in batches:
        value = F.cross_entropy(model(x.double()), y, reduction="sum")
        grads = torch.autograd.grad(value, params, create_graph=True)
        dot = (torch.cat([g.flatten() for g in grads]) * v.double()).sum()
        seconds = torch.autograd.grad(dot, params, allow_unused=True, materialize_grads=True)
        total, n = total + torch.cat([s.flatten() for s in seconds]), n + len(x)
    return total / n if reduction == "mean" else total


@pytest.mark.parametrize("step", [None, 1e-2, 1e-4, 1e-6, 1e-9])
@pytest.mark.parametrize("width", [4, 32])
@pytest.mark.parametrize("name", ACTIVATIONS)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_right_or_refused(name, width, step, dtype):
    model = oracle.randomise(Mlp(width, ACTIVATIONS[name])).to(dtype)
    x, y = data_for(model, 3 * width)
    batch = x.to(dtype), y
    lc = LayerCollection.from_model(model)
    v = torch.randn(lc.numel(), dtype=dtype)
    H = Hessian(model, batch, PMatImplicit, products=FiniteDifference(step))
    try:
        found = H.mv(PVector(lc, v)).to_torch()
    except RuntimeError:
        assert (step, dtype) == (1e-9, torch.float64)  # much too short
        return
    tolerance = 1e-9 if dtype == torch.float64 else 1e-3
    assert oracle.relative(found.double(), product_by_loops(model, [batch], v)) < tolerance


@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_pooling_minibatches_and_several_vectors(dtype, reduction):
    model = oracle.randomise(Pooled()).to(dtype)
    batches = [data_for(model, n) for n in (9, 4, 1)]
    batches = [(x.to(dtype), y) for x, y in batches]
    lc = LayerCollection.from_model(model)
    H = Hessian(model, batches, PMatImplicit, nn.CrossEntropyLoss(reduction=reduction), products=FiniteDifference())
    V = torch.randn(3, lc.numel(), dtype=dtype)
    V[1] = 0.0
    found = H.root.mv(V)
    assert not found[1].any()
    for k in (0, 2):
        expected = product_by_loops(model, batches, V[k], reduction)
        assert oracle.relative(found[k].double(), expected) < (1e-9 if dtype == torch.float64 else 1e-3)


def test_only_some_examples_are_near_a_kink():
    """The minibatch is taken apart, so that only these pay with a step in which rounding is large."""
    model = oracle.randomise(Mlp(4, F.relu))
    x, y = data_for(model, 64)
    with torch.no_grad():  # a hidden unit of one example 3e-7 from zero
        row, bias = model.a.weight[0], model.a.bias[0]
        x[5] -= (x[5] @ row + bias - 3e-7) / row.square().sum() * row
    lc = LayerCollection.from_model(model)
    v = torch.randn(lc.numel())
    found = Hessian(model, (x, y), PMatImplicit, products=FiniteDifference()).mv(PVector(lc, v)).to_torch()
    assert oracle.relative(found, product_by_loops(model, [(x, y)], v)) < 1e-9


@pytest.mark.parametrize("activation", [F.relu, F.elu, torch.abs, lambda x: x * x.abs()])
def test_a_kink_at_the_parameters_is_refused(activation):
    """A unit that is zero exactly, as with inputs and biases of zero: there is no derivative of the gradient."""
    model = oracle.randomise(Mlp(4, activation))
    x, y = data_for(model, 6)
    x[0] = 0.0
    with torch.no_grad():
        model.a.bias.zero_()
    lc = LayerCollection.from_model(model)
    H = Hessian(model, (x, y), PMatImplicit, products=FiniteDifference())
    with pytest.raises(RuntimeError, match=r"estimated relative error .* above rtol=1e-09.*rtol=.*GGN"):
        H.mv(PVector(lc, torch.randn(lc.numel())))


def test_more_is_allowed_when_asked():
    model = oracle.randomise(Mlp(8, torch.tanh)).float()
    x, y = data_for(model, 6)

    def function(x, y):  # the output is rounded to single precision, whatever the model is in
        return model(x).float().to(x.dtype)

    lc = LayerCollection.from_model(model)
    v = PVector(lc, torch.randn(lc.numel()).float())
    batch = x.float(), y

    def product(**options):
        return (
            Hessian(model, batch, PMatImplicit, function=function, products=FiniteDifference(**options))
            .mv(v)
            .to_torch()
        )

    with pytest.raises(RuntimeError, match="rtol=1e-09"):
        product(rtol=1e-9)
    exact = Hessian(model, batch, PMatImplicit, function=function).mv(v).to_torch()
    assert oracle.relative(product(rtol=1e-2), exact) < 1e-2


def test_a_model_that_runs_in_its_own_precision_only():
    table = torch.randn(5, 4).float()
    model = oracle.randomise(nn.Linear(4, 3)).float()
    x, y = torch.randn(6, 5).float(), torch.randint(3, (6,))

    def function(x, y):
        return model(torch.tanh(x @ table))

    lc = LayerCollection.from_model(model)
    v = PVector(lc, torch.randn(lc.numel()).float())
    exact = Hessian(model, (x, y), PMatImplicit, function=function).mv(v).to_torch()
    found = Hessian(model, (x, y), PMatImplicit, function=function, products=FiniteDifference()).mv(v).to_torch()
    assert oracle.relative(found, exact) < 1e-3


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_the_dense_matrix_of_a_net_with_dead_and_flat_directions(dtype):
    """Columns that are zero, or that are small next to rounding: as exact as the whole is."""
    model = oracle.randomise(Mlp(4, F.relu))
    with torch.no_grad():
        model.a.bias[0] = -100.0  # a dead unit
        model.b.weight[1] *= 1e-7
    model = model.to(dtype)
    x, y = data_for(model, 7)
    batch = x.to(dtype), y
    found = Hessian(model, batch, PMatDense, products=FiniteDifference()).to_torch()
    lc = LayerCollection.from_model(model)
    H = torch.stack([product_by_loops(model, [batch], e) for e in torch.eye(lc.numel())])
    assert oracle.relative(found.double(), H) < (1e-8 if dtype == torch.float64 else 1e-3)
    shift = torch.zeros(lc.numel(), dtype=dtype)
    shift[-3:] = 1.0  # of all logits: H v is zero, up to rounding
    H = Hessian(model, batch, PMatImplicit, products=FiniteDifference())
    assert H.mv(PVector(lc, shift)).to_torch().norm() < 1e-7


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_vector_that_is_not_finite(value):
    model = oracle.randomise(nn.Linear(3, 2))
    H = Hessian(model, (torch.randn(4, 3), torch.zeros(4).long()), PMatImplicit, products=FiniteDifference())
    v = torch.randn(2, 8)
    v[0, 3] = value
    found = H.root.mv(v)
    assert found[0].isnan().all()
    assert oracle.relative(found[1], product_by_loops(model, [H.root.matvec.examples], v[1])) < 1e-9


@pytest.mark.parametrize("scale", [1e-300, 1e-20, 1e20, 1e250])
def test_the_length_of_a_vector_is_no_matter(scale):
    model = oracle.randomise(Mlp(3, torch.tanh))
    batch = data_for(model, 5)
    lc = LayerCollection.from_model(model)
    v = torch.randn(lc.numel())
    H = Hessian(model, batch, PMatImplicit, products=FiniteDifference())
    found = H.mv(PVector(lc, scale * v)).to_torch() / scale
    assert oracle.relative(found, product_by_loops(model, [batch], v)) < 1e-9


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_parameters_read_elsewhere_and_frozen_ones(dtype):
    """Weights in a list, buffers, a frozen layer: what the model reads is what is moved."""
    base = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4), nn.Tanh()).to(dtype)
    model = nn.Sequential(base, nn.Linear(4, 3)).to(dtype)
    oracle.randomise(model)
    model.to(dtype).requires_grad_(False)
    model[1].requires_grad_(True)
    model[0][0].bias.requires_grad_(True)
    weights = [model[1].weight, model[1].bias]

    def function(x, *rest):
        return F.linear(base(x), *weights)

    batch = torch.randn(6, 4).to(dtype), torch.randint(3, (6,))
    lc = LayerCollection.from_model(model)
    assert lc.numel() == 19
    v = torch.randn(19, dtype=dtype)
    before = copy.deepcopy(model.state_dict())
    flags = [p.requires_grad for p in model.parameters()]
    H = Hessian(model, batch, PMatImplicit, function=function, products=FiniteDifference())
    found = H.mv(PVector(lc, v)).to_torch()
    same = copy.deepcopy(model).requires_grad_(True)
    assert oracle.relative(found.double(), product_by_loops(same, [batch], v, lc=lc)) < (
        1e-9 if dtype == torch.float64 else 1e-3
    )
    for name, t in model.state_dict().items():
        assert t.dtype == before[name].dtype
        assert torch.equal(t, before[name])
    assert [p.requires_grad for p in model.parameters()] == flags


def test_the_model_is_put_back_after_an_exception():
    class Failing(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer, self.calls = nn.Linear(3, 2), 0

        def forward(self, x):
            self.calls += 1
            if self.calls > 4:
                raise KeyError("in the middle")
            return torch.tanh(self.layer(x))

    model = Failing().float()
    before = copy.deepcopy(model.state_dict())
    lc = LayerCollection.from_model(model)
    batch = torch.randn(4, 3).float(), torch.randint(2, (4,))
    H = Hessian(model, batch, PMatImplicit, products=FiniteDifference())
    with pytest.raises(KeyError):
        H.mv(PVector(lc, torch.randn(8).float()))
    assert all(torch.equal(t, before[k]) and t.dtype == before[k].dtype for k, t in model.state_dict().items())


def test_the_matrix_stays_at_the_parameters_as_they_were():
    model = oracle.randomise(Mlp(4, F.relu))
    batch = data_for(model, 5)
    lc = LayerCollection.from_model(model)
    v = torch.randn(lc.numel())
    expected = product_by_loops(model, [batch], v)
    H = Hessian(model, batch, PMatImplicit, products=FiniteDifference())
    oracle.randomise(model)
    assert oracle.relative(H.mv(PVector(lc, v)).to_torch(), expected) < 1e-9


def test_the_domain_of_the_model():
    """Steps that leave it are not taken."""

    class Root(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = nn.Parameter(torch.tensor([1e-3, 2.0, 1e-6]))

        def forward(self, x):
            return x * self.weight.sqrt()

    model = Root()
    batch = torch.randn(5, 3), torch.randint(3, (5,))
    lc = LayerCollection.from_model(model)
    v = torch.tensor([1.0, -1.0, 1.0])
    H = Hessian(model, batch, PMatImplicit, products=FiniteDifference(rtol=1e-6))
    assert oracle.relative(H.mv(PVector(lc, v)).to_torch(), product_by_loops(model, [batch], v)) < 1e-6


@pytest.mark.parametrize("rows", [1, 2])
def test_a_smooth_product_costs_four_gradients(rows, monkeypatch):
    calls = []
    moved = Gradient._moved
    monkeypatch.setattr(Gradient, "_moved", lambda self, shift: (calls.append(1), moved(self, shift))[1])
    model = oracle.randomise(Mlp(4, torch.tanh))
    H = Hessian(model, data_for(model, 5), PMatImplicit, products=FiniteDifference())
    V = torch.randn(rows, H.layer_collection.numel())
    H.root.mv(V)
    first = len(calls)
    H.root.mv(V)
    assert (first, len(calls) - first) == (4 * rows + 1, 4 * rows)


@pytest.mark.parametrize("options", [{"step": 0.0}, {"step": float("nan")}, {"rtol": -1.0}])
def test_options_are_positive(options):
    with pytest.raises(ValueError, match="expected a finite number above 0"):
        FiniteDifference(**options)


def test_a_loss_that_does_not_depend_on_the_parameters():
    model = oracle.randomise(nn.Linear(3, 2))
    batch = torch.randn(4, 3), torch.randint(2, (4,))
    H = Hessian(model, batch, PMatImplicit, function=lambda x, y: x[:, :2], products=FiniteDifference())
    with pytest.raises(ValueError, match="does not depend on the collected parameters"):
        H.mv(PVector(H.layer_collection, torch.randn(8)))
