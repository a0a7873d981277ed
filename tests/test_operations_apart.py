"""What is said to keep examples apart by its operations does so; what mixes them is never said to."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.autograd.graph import GradientEdge
from torch.nn import functional as F

from nngeometry.model.operations_apart import recorded_apart

W = torch.randn(4, 4, dtype=torch.float64, requires_grad=True)
POSITIONS = torch.randn(1, 3, 4, dtype=torch.float64, requires_grad=True)
TOKEN = torch.randn(1, 1, 4, dtype=torch.float64, requires_grad=True)

WEIGHTS = torch.randn(3, 4, 4, dtype=torch.float64, requires_grad=True)
_ATTENTION = nn.MultiheadAttention(4, 2, batch_first=True, dtype=torch.float64)
_TIME_FIRST = nn.MultiheadAttention(4, 2, bias=False, add_bias_kv=True, dtype=torch.float64)
_LSTM = nn.LSTM(4, 4, bidirectional=True, batch_first=True, dtype=torch.float64)
_LSTM_TIME_FIRST = nn.LSTM(4, 3, 2, dtype=torch.float64)
_GRU = nn.GRU(4, 3, batch_first=True, dtype=torch.float64)

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
    "time first": lambda x: F.linear(x.transpose(0, 1), W).add(x.mT.unsqueeze(2).select(2, 0).permute(2, 0, 1))[0],
    "heads beside examples": lambda x: (
        F.scaled_dot_product_attention(*(x.transpose(0, 1).reshape(3, -1, 2).transpose(0, 1),) * 3)
        .transpose(0, 1)
        .reshape(3, -1, 4)
        .transpose(0, 1)
    ),
    "multi-head attention": lambda x: _ATTENTION(x, x, x, need_weights=False)[0],
    "cross-attention": lambda x: _TIME_FIRST(x.transpose(0, 1), *(x[:, :2].transpose(0, 1),) * 2)[0].mean(0),
    "lstm": lambda x: _LSTM(x)[0][:, -1],
    "lstm from states": lambda x: torch.cat(_LSTM(x, (x[:, :2].transpose(0, 1).contiguous(),) * 2)[1], 0).mT.mT[0],
    "lstm, time first": lambda x: _LSTM_TIME_FIRST(x.transpose(0, 1))[0].sum(0),
    "gru": lambda x: _GRU(x)[0].amin(1),
    "masked": lambda x: (x @ x.mT).masked_fill(torch.eye(3).bool(), -1.0).topk(2).values,
    "broadcast": lambda x: x.unsqueeze(1) + x.sum(1)[:, None, None].expand(-1, 2, -1, -1) * POSITIONS,
    "last": lambda x: (x.permute(1, 2, 0) / x.permute(1, 2, 0).norm(dim=1, keepdim=True)).cumsum(0).permute(2, 0, 1),
    "matrices with examples in rows": lambda x: (x.transpose(0, 1) @ WEIGHTS).transpose(0, 1),
    "matrices with examples in columns": lambda x: (WEIGHTS @ x.permute(1, 2, 0)).permute(2, 0, 1),
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
    "weights of all": lambda x: x @ x.mean(0).T.expand(len(x), -1, -1),
    "square": lambda x: _square(x) + _square(x).T,
    "square product": lambda x: _square(x) @ _square(x),
    "product with itself": lambda x: (lambda y: y @ y)(F.linear(x[:, 0], torch.ones(len(x), 4))),
    "products with themselves": lambda x: (lambda y: y @ y)(F.linear(x, torch.ones(len(x), 4)).mT.permute(2, 1, 0)).mT,
    "convolved with itself": lambda x: F.conv1d(x, x),
    "heads of several": lambda x: F.scaled_dot_product_attention(*(x.reshape(2, -1, 3, 4),) * 3).reshape(x.shape),
    "lstm over examples": lambda x: _LSTM_TIME_FIRST(x)[0],
    "time in the place of examples": lambda x: x.reshape(3, len(x), 4).transpose(0, 1) * x,
    "sum of halves": lambda x: torch.cat([x[:3] + x[3:]] * 2),
    "summed with the transpose of blocks": lambda x: (
        F.linear(x.transpose(0, 1), W).reshape(-1, 4) + F.linear(x, W).reshape(-1, 4)
    ).view(len(x), 3, 4),
}


def _square(x):
    return x.flatten(1)[:, : len(x)]


def _of(function):
    x = torch.randn(6, 3, 4) @ torch.randn(4, 4, requires_grad=True)
    return function(x)


@pytest.mark.parametrize("name", APART)
def test_apart(name):
    f = _of(APART[name])
    found = recorded_apart(f, 6)
    assert found
    s, weights = torch.randn_like(f), torch.arange(1.0, 7)
    edges = [GradientEdge(node, k, ()) for node, k in found.blocks]
    of_all = torch.autograd.grad(f, edges, s, retain_graph=True, allow_unused=True)
    of_weighted = torch.autograd.grad(f, edges, s * weights.view(-1, *[1] * (s.ndim - 1)), allow_unused=True)
    for blocks, g, other in zip(found.blocks.values(), of_all, of_weighted, strict=True):
        if g is not None:
            expected = g.reshape(blocks, 6, -1) * weights[:, None]
            assert torch.allclose(other.reshape(blocks, 6, -1), expected, atol=1e-5)


@pytest.mark.parametrize("name", MIXED)
@pytest.mark.parametrize("after", ["nothing", "mean"])
def test_mixed(name, after):
    f = _of(MIXED[name])
    assert not recorded_apart(f.mean(-1) if after == "mean" else f.relu(), 6)


@pytest.mark.parametrize("again", [lambda t, x: x * t.mean(0), lambda t, x: x * t.clone()[0], lambda t, x: x])
def test_copies_of_a_parameter(again):
    """Rows of copies are of one example each where nothing else is done with them."""
    copies = TOKEN.expand(6, -1, -1).clone()
    f = again(copies, torch.cat([copies, _of(lambda x: x)], 1))
    found = recorded_apart(f, 6)
    apart = found is not None and (copies.grad_fn, 0) in found.blocks
    s, weights = torch.randn_like(f), torch.arange(6.0)
    g, other = (torch.autograd.grad(f, copies, t, retain_graph=True)[0] for t in (s, s * weights.view(-1, 1, 1)))
    assert apart == torch.allclose(other, g * weights.view(-1, 1, 1))


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
