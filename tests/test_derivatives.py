"""Operations with a cheap second derivative are the operations that they replace."""

import pytest
import torch
from torch import nn

from nngeometry.derivatives.cheap import CheapDerivatives


def normalised(module):
    module.running_mean.normal_()
    module.running_var.uniform_(0.5, 2)
    return module.eval()


class Applied(nn.Module):
    """A function of its input, after a linear map."""

    def __init__(self, function):
        super().__init__()
        self.linear = nn.Linear(5, 4)
        self.function = function

    def forward(self, x):
        return self.function(self.linear(x))


class Recurrent(nn.Module):
    """The outputs of an LSTM with its last states and cells; its first ones are learnt, or zero."""

    def __init__(self, learnt=True, **options):
        super().__init__()
        self.lstm = nn.LSTM(3, 2, **options)
        count = self.lstm.num_layers * (1 + self.lstm.bidirectional)
        self.first = nn.Parameter(torch.randn(2, count, 1, 2)) if learnt else None

    def forward(self, x):
        n = x.shape[0 if self.lstm.batch_first else 1]
        y, (h, c) = self.lstm(x, None if self.first is None else tuple(self.first.expand(-1, -1, n, -1)))
        return torch.cat([t.flatten() for t in (y, h, c)])


class Written(Recurrent):
    """An LSTM whose outputs are written into while others are still needed as they were."""

    def forward(self, x):
        y, (h, c) = self.lstm(x)
        both = c * y[-1].clone()
        return both * h.add_(c).square() + y.mul_(2).sum(0)


def scaled(norm):
    for p in norm.parameters():
        nn.init.normal_(p)
    return norm


KINDS = {
    "plain": (nn.Conv2d(2, 4, 3), (3, 2, 6, 5)),
    "strided": (nn.Conv2d(2, 4, (3, 2), stride=(2, 1), padding=(1, 0), dilation=(1, 2)), (3, 2, 7, 6)),
    "grouped": (nn.Conv2d(4, 6, 3, groups=2, padding=1, bias=False), (2, 4, 5, 5)),
    "same": (nn.Conv2d(2, 3, 3, padding="same"), (2, 2, 4, 4)),
    "circular": (nn.Conv2d(2, 3, 3, padding=1, padding_mode="circular"), (2, 2, 4, 4)),
    "one": (nn.Conv1d(2, 3, 3, stride=2), (2, 2, 8)),
    "three": (nn.Conv3d(1, 2, 2), (2, 1, 3, 3, 4)),
    "transposed one": (nn.ConvTranspose1d(2, 3, 3, stride=2), (2, 2, 4)),
    "transposed": (nn.ConvTranspose2d(4, 2, 3, stride=2, padding=1, output_padding=1, groups=2), (2, 4, 3, 3)),
    "one image": (nn.Conv2d(2, 4, 3), (2, 6, 5)),
    "linear": (nn.Linear(5, 3), (2, 5)),
    "linear over positions": (nn.Linear(5, 3, bias=False), (2, 4, 5)),
    "linear of one": (nn.Linear(5, 3), (5,)),
    "norm": (normalised(nn.BatchNorm2d(4)), (3, 4, 5, 2)),
    "norm without axes": (normalised(nn.BatchNorm1d(4)), (3, 4)),
    "norm without parameters": (
        nn.Sequential(nn.Conv2d(2, 4, 3), normalised(nn.BatchNorm2d(4, affine=False))),
        (2, 2, 4, 4),
    ),
    "norm of the batch": (nn.BatchNorm1d(4), (3, 4)),
    "rectifier": (nn.Sequential(nn.Linear(5, 6), nn.ReLU(), nn.Linear(6, 2)), (3, 5)),
    "rectifier in place": (nn.Sequential(nn.Linear(5, 6), nn.ReLU(inplace=True), nn.Linear(6, 2)), (3, 5)),
    "layer norm": (scaled(nn.LayerNorm(5)), (2, 3, 5)),
    "layer norm without bias": (scaled(nn.LayerNorm(5, bias=False)), (3, 5)),
    "layer norm without parameters": (Applied(nn.LayerNorm(4, elementwise_affine=False)), (3, 5)),
    "layer norm of several axes": (scaled(nn.LayerNorm((2, 3), eps=0.1)), (3, 2, 3)),
    "gelu": (Applied(nn.GELU()), (3, 5)),
    "approximate gelu": (Applied(nn.GELU("tanh")), (3, 5)),
    "softmax": (Applied(nn.Softmax(-1)), (3, 5)),
    "softmax along the middle": (Applied(lambda x: x.softmax(1)), (2, 3, 5)),
    "softmax in another type": (Applied(lambda x: x.softmax(1, dtype=torch.float64)), (2, 3, 5)),
    "softmax with minus infinity": (
        Applied(lambda x: x.masked_fill(torch.eye(5, 4).bool(), -torch.inf).softmax(0)),
        (5, 5),
    ),
    "vectorised": (Applied(torch.func.vmap(lambda row: (row.view(2, 2) @ row.view(2, 2)).relu().softmax(-1))), (3, 5)),
    "product of matrices": (Applied(lambda x: torch.bmm(x, x.mT.cos())), (2, 3, 5)),
    "product with a constant": (Applied(lambda x: torch.linspace(0, 1, 18).double().view(2, 3, 3) @ x), (2, 3, 5)),
    "product of stacks of matrices": (Applied(lambda x: x.view(2, 3, 2, 2).matmul(x.view(2, 3, 2, 2))), (2, 3, 5)),
    "product with one matrix": (Applied(lambda x: x @ x[0].mT), (2, 3, 5)),
    "lstm": (Recurrent(), (4, 3, 3)),
    "lstm from zero": (Recurrent(learnt=False, batch_first=True, bias=False), (2, 4, 3)),
    "lstm of layers": (Recurrent(learnt=False, num_layers=2), (3, 2, 3)),
    "lstm that is written into": (Written(learnt=False), (3, 2, 3)),
    "lstm in both directions": (Recurrent(bidirectional=True, batch_first=True), (2, 2, 3)),
    "attention": (Applied(lambda x: (x @ x.mT / 2).softmax(-1) @ x), (2, 3, 5)),
}


@pytest.mark.parametrize("name", KINDS)
@pytest.mark.parametrize("batched", [False, True])
def test_products_equal_those_of_torch(name, batched):
    module, shape = KINDS[name]
    module = module.double()
    parameters = list(module.parameters())
    first = torch.randn(shape[-len(shape) :], dtype=torch.float64)
    scale = torch.tensor(1.3, dtype=torch.float64, requires_grad=True)
    leaves = [scale, *parameters]
    vs = [torch.randn(4, *p.shape, dtype=torch.float64) for p in leaves]

    def jv(convolutions):
        with convolutions:
            f = (module(torch.tanh(scale * first))).square()  # the scale is upstream, the square downstream
        u = torch.zeros_like(f, requires_grad=True)
        with convolutions.at_zero():
            pulled = torch.autograd.grad(f, leaves, u, create_graph=True)
        if batched:
            (out,) = torch.autograd.grad(pulled, u, vs, is_grads_batched=True, retain_graph=True)
        else:
            rows = [torch.autograd.grad(pulled, u, [v[k] for v in vs], retain_graph=True)[0] for k in range(4)]
            out = torch.stack(rows)
        return out, torch.autograd.grad(f, leaves, torch.cos(f).detach())

    class Torch(torch.overrides.TorchFunctionMode):
        def __torch_function__(self, func, types, args=(), kwargs=None):
            return func(*args, **(kwargs or {}))

        def at_zero(self):
            return torch.enable_grad()

    (ours, gradient), (theirs, expected) = jv(CheapDerivatives()), jv(Torch())
    torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-12)
    for a, b in zip(gradient, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("name", KINDS)
@pytest.mark.parametrize("batched", [False, True])
def test_hessians_equal_those_of_torch(name, batched):
    module, shape = KINDS[name]
    module = module.double()
    first = torch.randn(shape, dtype=torch.float64)
    scale = torch.tensor(1.3, dtype=torch.float64, requires_grad=True)
    leaves = [scale, *module.parameters()]
    vs = [torch.randn(4, *p.shape, dtype=torch.float64) for p in leaves]

    def products(operations, recording):
        with operations:
            h = torch.tanh(scale * first)
            f = module(h).square().sum() + module(h.cos()).sin().sum() + sum((p**3).sum() for p in leaves)
        with recording:
            gradient = torch.autograd.grad(f, leaves, create_graph=True)
        if batched:
            return torch.autograd.grad(gradient, leaves, vs, is_grads_batched=True, retain_graph=True)
        rows = [torch.autograd.grad(gradient, leaves, [v[k] for v in vs], retain_graph=True) for k in range(4)]
        return [torch.stack(column) for column in zip(*rows, strict=True)]

    operations = CheapDerivatives()
    ours = products(operations, operations.without_values())
    theirs = products(torch.enable_grad(), torch.enable_grad())
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("name", KINDS)
def test_second_derivatives_outside_of_recording(name):
    module, shape = KINDS[name]
    module = module.double()
    x = torch.randn(shape, dtype=torch.float64, requires_grad=True)
    with CheapDerivatives():
        assert torch.autograd.gradgradcheck(lambda x, *ps: module(x).sin(), (x, *module.parameters()), nondet_tol=1e-10)
