"""Inner products of the Jacobians of maps with shared weights."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from ..memory import chunk_length, panel_length, slices


def examples_together(g: Tensor) -> Tensor:
    """The same ``(C, B, ...)`` with all that is of one example together in memory."""
    return g.transpose(0, 1).contiguous().transpose(0, 1)


def add_inner(same: Callable[[slice], Tensor], g: Tensor, h: Tensor, out: Tensor) -> None:
    """Add ``sum_ts (x[b, t] . y[e, s]) (g[c, b, t] . h[d, e, s])`` to out ``(B, C, B', C')``.

    same: from a slice of the first examples to the products of inputs ``(b, T, B', T')``.
    """
    (c, examples, t, o), (d, others, s, _) = g.shape, h.shape
    if t == s == 1:
        outputs = matmul(g[:, :, 0].transpose(0, 1), h[:, :, 0].transpose(0, 1))
        inputs = same(slice(None)).view(examples, 1, others, 1).expand(examples, 1, others, d)
        out.view(examples, c, -1).addcmul_(outputs.view(examples, c, -1), inputs.reshape(examples, 1, -1))
        return
    step = panel_length(others * t * (s + d * o) * g.dtype.itemsize, examples, g.device)
    columns = h.permute(1, 2, 3, 0).reshape(others, s, o * d)
    for k in slices(examples, step):
        m = same(k)
        b = len(m)
        through = torch.bmm(m.permute(2, 0, 1, 3).reshape(others, b * t, s), columns)  # (E, b T, o D)
        left = g[:, k].transpose(0, 1).reshape(b, c, t * o)
        out[k] += torch.matmul(left, through.view(others, b, t * o, d)).permute(1, 2, 0, 3)


def add_traced(same: Callable[[slice], Tensor], g: Tensor, h: Tensor, out: Tensor) -> None:
    """:func:`add_inner` summed over equal cotangents: out ``(B, B')``."""
    (_, examples, t, _), (_, others, s, _) = g.shape, h.shape
    step = chunk_length(2 * others * t * s * g.dtype.itemsize, examples, g.device)
    columns = h.permute(1, 2, 0, 3).flatten(2).flatten(0, 1)  # (E S, C o)
    for k in slices(examples, step):
        m = same(k)
        outputs = g[:, k].permute(1, 2, 0, 3).flatten(2).flatten(0, 1) @ columns.T
        out[k] += (outputs.view(m.shape) * m).sum((1, 3))


def matmul(x: Tensor, y: Tensor) -> Tensor:
    """Inner products over the last axis: ``(a, b, i), (c, d, i) -> (a, b, c, d)``."""
    product = x.reshape(-1, x.shape[-1]) @ y.reshape(-1, y.shape[-1]).T
    return product.view(*x.shape[:-1], *y.shape[:-1])
