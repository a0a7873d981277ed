"""What is said to keep examples apart by its operations does so; what mixes them is never said to."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F

from nngeometry.model.operations_apart import recorded_apart

W = torch.randn(4, 4, dtype=torch.float64, requires_grad=True)
POSITIONS = torch.randn(1, 3, 4, dtype=torch.float64, requires_grad=True)
TOKEN = torch.randn(1, 1, 4, dtype=torch.float64, requires_grad=True)

#: Of x (B, 3, 4), which is computed of parameters.
APART = {
    "linear": lambda x: F.linear(x, W, W[0]),
    "matmul": lambda x: x @ W,
    "addition of positions": lambda x: x + POSITIONS,
    "token in front": lambda x: torch.cat([TOKEN.expand(len(x), -1, -1), x], 1),
    "attention": lambda x: F.scaled_dot_product_attention(*(x.unflatten(-1, (2, 2)).transpose(1, 2),) * 3),
    "written attention": lambda x: (x @ x.transpose(-1, -2)).softmax(-1) @ x,
    "layer norm": lambda x: F.layer_norm(x, (4,)),
    "rms norm": lambda x: F.rms_norm(x, (4,)),
    "group norm": lambda x: F.group_norm(x.transpose(1, 2), 2),
    "batch norm": lambda x: F.batch_norm(x, torch.zeros(3), torch.ones(3)),
    "convolution": lambda x: F.conv1d(x, torch.ones(2, 3, 2, requires_grad=True)),
    "pooling": lambda x: F.max_pool2d(F.avg_pool2d(x.unsqueeze(1), 2, 1), 2),
    "mean": lambda x: x.mean(-1).mean(-1),
    "maximum": lambda x: x.amax(1) + x.max(1).values,
    "flatten": lambda x: x.flatten(1).flatten(0).view(len(x), -1),
    "pieces": lambda x: (
        sum(x.chunk(2, -1)) + torch.stack(x.unbind(1)[:2], 2).unsqueeze(1).select(2, 0).narrow(-1, 0, 1)
    ),
    "permuted": lambda x: x.permute(0, 2, 1).squeeze(1).flip(1).cumsum(-1).roll(1, 2),
    "padded": lambda x: F.pad(x, (1, 1, 0, 2)),
    "gated": lambda x: F.glu(F.gelu(x) * torch.sigmoid(x), -1),
    "data": lambda x: torch.where(x > 0, x * torch.rand(len(x), 3, 4), 0.1 * x),
}
MIXED = {
    "mean": lambda x: x - x.mean(0),
    "mean of one": lambda x: x - x.mean(),
    "kept mean": lambda x: x * x.mean(0, keepdim=True),
    "rolled": lambda x: x.roll(1, 0),
    "flipped": lambda x: x.flip(0),
    "shuffled": lambda x: x[torch.arange(len(x) - 1, -1, -1)],
    "softmax": lambda x: x.softmax(0),
    "cumulated": lambda x: x.cumsum(-3),
    "gram": lambda x: x.flatten(1) @ x.flatten(1).T,
    "transposed": lambda x: x.transpose(0, 1).reshape(x.shape) + x,
    "attention": lambda x: F.scaled_dot_product_attention(*(x.transpose(0, 1),) * 3).transpose(0, 1),
    "batch norm": lambda x: F.batch_norm(x, None, None, training=True),
    "matrix of all": lambda x: x @ x.mean(0).T,
    "added weight of all": lambda x: F.linear(x, W, x.mean((0, 1))),
    "standardised": lambda x: x / x.std(0),
    "across": lambda x: torch.stack([x, x], 0).flatten(0, 1)[: len(x)] + x.view(3, len(x), 4).permute(1, 0, 2),
    "largest": lambda x: x - x.max(0).values,
    "own weights": lambda x: torch.einsum("btk,sk->bts", x, x.mean(1)),
}


def _of(function):
    x = torch.randn(6, 3, 4) @ torch.randn(4, 4, requires_grad=True)
    return function(x)


@pytest.mark.parametrize("name", APART)
def test_apart(name):
    f = _of(APART[name])
    assert recorded_apart(f, 6)


@pytest.mark.parametrize("name", MIXED)
@pytest.mark.parametrize("after", ["nothing", "mean"])
def test_mixed(name, after):
    f = _of(MIXED[name])
    assert not recorded_apart(f.mean(-1) if after == "mean" else f.relu(), 6)


def test_what_is_not_known_is_not_believed():
    class Double(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return 2 * x

        @staticmethod
        def backward(ctx, g):
            return 2 * g

    assert not recorded_apart(_of(Double.apply), 6)
    assert not recorded_apart(_of(lambda x: x), 5)
