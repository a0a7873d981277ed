"""In-place operations on what layers return, in every path by which a derivative is made."""

from math import prod

import oracle
import pytest
import torch
from oracle import randomise
from torch import nn
from torch.nn import functional as F

from nngeometry import (
    FIM,
    GramMatrix,
    Hessian,
    Jacobian,
    PFMapFactored,
    PFMapImplicit,
    PMatBlockDiag,
    PMatDense,
    PMatDiag,
    PMatEKFAC,
    PMatImplicit,
    PMatKFAC,
    PMatLowRank,
    PMatQuasiDiag,
    PVector,
    random_pvector,
)


class Then(nn.Module):
    """A function of a tensor, as a module that is looked at."""

    def __init__(self, function):
        super().__init__()
        self.function = function

    def forward(self, x):
        return self.function(x)


def _index(y):
    y[..., 0] = y[..., 1] * 2
    return y


def _half(y):
    y[..., ::2].mul_(3)
    return torch.tanh(y)


def _view_then_write(y):
    y.view(-1).mul_(0.7)
    return torch.tanh(y)


def _chunk_then_write(y):
    a = y[..., : y.shape[-1] // 2]
    a += 1.0
    return torch.tanh(y)


def _add_(y):
    y += torch.linspace(-1, 1, y.shape[-1])
    return torch.tanh(y)


def _twice(y):
    z = 2 * y
    y.mul_(0.5)
    return z + y


OPERATIONS = {
    "relu_": lambda y: y.relu_(),
    "silu": lambda y: F.silu(y, inplace=True),
    "div_": lambda y: torch.tanh(y.div_(2.0)),
    "+=": _add_,
    "masked_fill_": lambda y: torch.tanh(y.masked_fill_(torch.arange(y.shape[-1]) % 2 == 0, 0.3)),
    "clamp_": lambda y: y.clamp_(-0.5, 0.5),
    "index": _index,
    "strided": _half,
    "view": _view_then_write,
    "chunk": _chunk_then_write,
    "used before": _twice,
    "copy_": lambda y: torch.tanh(y.copy_(y * 2)),
    "unsqueeze": lambda y: torch.tanh(y.unsqueeze(1).mul_(2).squeeze(1)),
}


class Pair(nn.Module):
    """A layer of several outputs, of which one is written into."""

    def __init__(self):
        super().__init__()
        self.w = nn.Parameter(torch.ones(4))

    def forward(self, x):
        y = torch.tanh(x * self.w)
        return y, y * 2


class OfPair(nn.Module):
    def __init__(self):
        super().__init__()
        self.pair = Pair()

    def forward(self, x):
        a, b = self.pair(x)
        b += 1.0
        return a * b


#: Layers whose output is or may be a view, with the shape of one example.
LAYERS = {
    "linear": (lambda: nn.Linear(4, 4), (4,)),
    "linear-tokens": (lambda: nn.Linear(4, 4), (3, 4)),
    "linear-tokens-no-bias": (lambda: nn.Linear(4, 4, bias=False), (3, 4)),
    "linear-grid": (lambda: nn.Linear(4, 4), (2, 2, 4)),
    "instance-norm": (lambda: nn.InstanceNorm1d(3, affine=True), (3, 4)),
    "instance-norm-2d": (lambda: nn.InstanceNorm2d(2, affine=True), (2, 3, 4)),
    "group-norm": (lambda: nn.GroupNorm(1, 3), (3, 4)),
    "layer-norm": (lambda: nn.LayerNorm(4), (3, 4)),
    "batch-norm": (lambda: nn.BatchNorm1d(3), (3, 4)),
    "convolution": (lambda: nn.Conv1d(3, 3, 1), (3, 4)),
    "parametrised": (lambda: nn.utils.parametrizations.spectral_norm(nn.Linear(4, 4)), (3, 4)),
}


def _oracle(model, x):
    J = oracle.jacobian(model, (x,))  # (C, n, P)
    return J, torch.einsum("cnp,cnq->pq", J, J) / len(x)


def _check(model, x, tolerance=1e-9):
    J, M = _oracle(model, x)
    v = random_pvector(PVector.from_model(model).layer_collection)
    for representation in (PMatDense, PMatImplicit, PMatLowRank):
        found = FIM(model, (x,), representation, "regression").mv(v).to_torch()
        assert oracle.relative(found, M @ v.to_torch()) < tolerance, representation
    for representation in (PMatDiag, PMatQuasiDiag):
        found = FIM(model, (x,), representation, "regression").get_diag()
        assert oracle.relative(found, M.diagonal()) < tolerance, representation
    for representation in (PMatEKFAC, PMatBlockDiag):
        assert oracle.relative(FIM(model, (x,), representation, "regression").trace(), M.trace()) < tolerance
    K = torch.einsum("cnp,dmp->cndm", J, J)
    assert oracle.relative(GramMatrix(model, (x,)).to_torch(), K) < tolerance
    for kind in (PFMapFactored, PFMapImplicit):
        assert (
            oracle.relative((Jacobian(model, (x,), representation=kind) @ v).to_torch(), J @ v.to_torch()) < tolerance
        )


@pytest.mark.parametrize("examples", [3, 1])
@pytest.mark.parametrize("operation", OPERATIONS)
@pytest.mark.parametrize("layer", LAYERS)
def test_of_layers_that_are_looked_at(layer, operation, examples):
    make, shape = LAYERS[layer]
    model = randomise(nn.Sequential(make(), Then(OPERATIONS[operation]), nn.Flatten(), nn.Linear(prod(shape), 2)))
    _check(model, torch.randn(examples, *shape))


ACTIVATIONS = [nn.ReLU, nn.ReLU6, nn.LeakyReLU, nn.ELU, nn.SiLU, nn.Hardtanh, nn.Hardswish, nn.Hardsigmoid, nn.Mish]


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("layer", LAYERS)
def test_of_layers_that_are_not(layer, activation):
    make, shape = LAYERS[layer]
    model = randomise(nn.Sequential(make(), activation(inplace=True), nn.Flatten(), nn.Linear(prod(shape), 2)))
    # In torch's own backward of hardsigmoid one sixth is in single precision.
    _check(model, torch.randn(2, *shape), 1e-6 if activation is nn.Hardsigmoid else 1e-9)


def test_of_several_outputs():
    model = randomise(nn.Sequential(nn.Linear(4, 4), OfPair(), nn.Linear(4, 2)))
    _check(model, torch.randn(3, 4))


@pytest.mark.parametrize("operation", ["relu_", "+=", "view", "used before"])
def test_hessians(operation):
    model = randomise(nn.Sequential(nn.Linear(4, 4), Then(OPERATIONS[operation]), nn.Flatten(), nn.Linear(12, 3)))
    x, y = torch.randn(4, 3, 4), torch.randint(3, (4,))
    ps = list(model.parameters())
    g = torch.cat([d.flatten() for d in torch.autograd.grad(F.cross_entropy(model(x), y), ps, create_graph=True)])
    rows = [torch.autograd.grad(e, ps, retain_graph=True, materialize_grads=True, allow_unused=True) for e in g]
    H = torch.stack([torch.cat([d.flatten() for d in row]) for row in rows])
    v = random_pvector(PVector.from_model(model).layer_collection)
    assert oracle.relative(Hessian(model, (x, y), PMatImplicit).mv(v).to_torch(), H @ v.to_torch()) < 1e-9


class ViewOfOne(nn.Module):
    """What it returns is a tensor of its own for several examples, and a view for one."""

    def __init__(self):
        super().__init__()
        self.w = nn.Parameter(torch.ones(4))

    def forward(self, x):
        y = x * self.w
        return y.view(1, 4) if len(x) == 1 else y + 0.0


class Written(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer, self.head = ViewOfOne(), nn.Linear(4, 2)

    def forward(self, x):
        y = self.layer(x)
        y *= 2
        return self.head(y)


@pytest.mark.parametrize("sizes", [[3, 2], [3, 1], [1, 1], [1]])
def test_a_last_minibatch_of_one(sizes):
    model = randomise(Written())
    batches = [(torch.randn(n, 4),) for n in sizes]
    M = sum(_oracle(model, x)[1] * len(x) for (x,) in batches) / sum(sizes)
    for representation in (PMatDense, PMatDiag, PMatImplicit):
        found = FIM(model, batches, representation, "regression").get_diag()
        assert oracle.relative(found, M.diagonal()) < 1e-9


class SqueezesOne(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(4, 4), nn.Linear(4, 2)

    def forward(self, x):
        return torch.atleast_2d(self.b(torch.tanh(self.a(x).squeeze(0))))


@pytest.mark.parametrize("representation", [PMatDense, PMatDiag, PMatKFAC])
def test_a_minibatch_of_one_whose_axis_is_squeezed(representation):
    """Where the examples are is told by two of them."""
    model = randomise(SqueezesOne())
    x = torch.randn(1, 4)
    try:
        found = FIM(model, (x,), representation, "regression").get_diag()
    except ValueError as error:
        message = str(error)
        assert "squeeze" in message
    else:
        assert oracle.relative(found, _oracle(model, x)[1].diagonal()) < 1e-9
