"""Sums of products over examples and positions, in panels that stay in the cache."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from ..memory import chunk_length, panel_length, slices, tuning


def second_moment(x: Tensor) -> Tensor:
    """``(N, G, d) -> (G, d, d)``: the sum over N of x x^T, for each group, of which only the lower triangle counts."""
    _, groups, d = x.shape
    if groups > 1:
        return torch.einsum("ngi,ngj->gij", x, x)
    x = x.squeeze(1)
    return (x.T @ x if _whole(x) else add_gram(x.new_empty(d, d), x, beta=0)).unsqueeze(0)


#: Up to so many vectors, of no more entries, the whole product is as fast as its lower triangle.
_FEW = 512


def _whole(x: Tensor) -> bool:
    """Whether all of ``x^T x`` is as fast as its lower triangle."""
    return max(x.shape) <= _FEW


def moment_with_one(a: Tensor) -> Tensor:
    """``(B, T, 1, d) -> (1, d + 1, d + 1)``: :func:`second_moment` with a last entry of one, which needs no copy."""
    x = a.flatten(0, 2)
    n, d = x.shape
    total = x.new_empty(d + 1, d + 1)
    for rows in [slice(d)] if _whole(x) else panels(d + 1, x.device):
        stop = min(rows.stop, d)
        torch.mm(x[:, rows.start : stop].T, x[:, :stop], out=total[rows.start : stop, :stop])
    total[-1, :d] = total[:d, -1] = x.sum(0)
    total[-1, -1] = n
    return total.unsqueeze(0)


def moment_of_columns(x: Tensor) -> Tensor:
    """``(N, G, d, t) -> (G, d, d)``: the sum over N and t of x x^T, for each group."""
    _, groups, d, _ = x.shape
    total = x.new_zeros(groups, d, d)
    for some in slices(len(x), panel_length(groups * d * d * x.dtype.itemsize, len(x), x.device)):
        total += (x[some] @ x[some].mT).sum(0)
    return total


def few_examples(size: int, examples: int, cols: int, count: int, device: torch.device) -> int:
    """Of how many examples at a time a moment of ``cols`` columns is made: as few as stay in the cache, but not so few
    that the moment is larger than what it is of. size: bytes of one. count: how many vectors there are of all.
    """
    least = -(-cols * examples // max(1, count))
    return max(panel_length(size, examples, device), min(chunk_length(size, examples, device), least))


def panels(d: int, device: torch.device) -> Iterator[slice]:
    """Cover ``0:d`` by slices of about the same length, a multiple of 16."""
    count = -(-d // tuning(device).columns)
    return slices(d, -(-d // (16 * count)) * 16)


def add_gram(total: Tensor, x: Tensor, beta: int = 1) -> Tensor:
    """Make the lower triangle of ``total`` beta times what it is plus ``x^T x``: half the work of the whole product."""
    for rows in panels(x.shape[1], x.device):
        total[rows, : rows.stop].addmm_(x[:, rows].T, x[:, : rows.stop], beta=beta)
    return total


def mirror(total: Tensor) -> Tensor:
    """Copy the lower triangles of ``(..., d, d)`` to the upper ones in place; blocks on the diagonal are whole."""
    _, *others = panels(total.shape[-1], total.device)
    for rows in others:
        total[..., : rows.start, rows] = total[..., rows, : rows.start].mT
    return total


def copy_transposed(x: Tensor, out: Tensor) -> None:
    """Copy matrices ``(..., r, c)`` to out ``(..., c, r)``, in panels of rows that stay in the cache."""
    for rows in slices(x.shape[-2], 256):
        out[..., rows] = x[..., rows, :].mT


def sum_of_squares(x: Tensor, axes: tuple[int, ...]) -> Tensor:
    """Of what is not needed again."""
    if tuning(x.device).has_cache:
        return x.square_().sum(axes)
    return torch.linalg.vector_norm(x, dim=axes).square_()  # which reads it once, and writes nothing


def outer_sum(g: Tensor, a: Tensor) -> Tensor:
    """``(N, G, o), (N, G, i) -> (G, o, i)``: the sum over N of g a^T, for each group."""
    return torch.bmm(g.permute(1, 2, 0), a.transpose(0, 1))


def total_of(pieces: Iterator[Tensor]) -> Tensor:
    """The sum of tensors of one shape."""
    total = next(pieces)
    for piece in pieces:
        total = total + piece
    return total
