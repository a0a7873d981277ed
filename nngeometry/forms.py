"""Per-example Jacobians of one layer, kept in the algebraic form in which the layer produces them.

A form represents ``J[c, b]``, the derivative of the c-th cotangent product of example b with respect to the
parameters of one layer, arranged in the layer's *packed* shape (see :class:`nngeometry.kinds.Packing`).
``dense()`` is the one obligation of a form; every other method is derived from it here, in chunks of the
memory budget, and a form overrides what its structure makes cheaper.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from functools import cached_property
from itertools import accumulate
from math import prod
from typing import Any

import torch
from torch import Tensor

from .changes import unrecorded
from .memory import chunk_length, grain, nbytes_of, panel_bytes, panel_length, require, slices

Map = Callable[[Tensor], Tensor]
#: Columns of a packed Jacobian, each with the view of flat ones where they go.
Places = Sequence[tuple[slice, Tensor]]
#: From flat parameters of a layer ``(..., p)`` to where the columns of its form go.
Placing = Callable[[Tensor], Places]


class LayerJacobian(ABC):
    """``J[c, b]`` for ``cotangents`` cotangents and ``examples`` examples, each of packed shape ``shape``."""

    def __init__(
        self, cotangents: int, examples: int, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device
    ) -> None:
        self.cotangents = cotangents
        self.examples = examples
        self.shape = shape
        self.dtype = dtype
        self.device = device

    @abstractmethod
    def dense(self) -> Tensor:
        """``(C, B, *shape)``."""

    @abstractmethod
    def narrow(self, start: int, stop: int, first: int = 0, last: int | None = None) -> LayerJacobian:
        """The same form for the examples ``start:stop`` and the cotangents ``first:last``."""

    @abstractmethod
    def fold(self, ratio: int) -> LayerJacobian:
        """Sum every ``ratio`` consecutive examples into one (windows of an image, beams, ...)."""

    def write(self, places: Places) -> None:
        """Put :meth:`dense` where it belongs in a larger array."""
        j = self.dense()
        for columns, place in places:
            place.copy_(j[..., columns].reshape(place.shape))

    def tiles(self) -> Iterator[tuple[slice, slice, LayerJacobian]]:
        """Pieces over cotangents and examples whose dense Jacobian fits a work array, with where they are."""
        for c, b in _tiling(prod(self.shape) * self.dtype.itemsize, self.cotangents, self.examples, self.device):
            yield c, b, self.narrow(b.start, b.stop, c.start, c.stop)

    def pieces(self) -> Iterator[LayerJacobian]:
        """Some examples at a time, such that what J is made of stays in the cache."""
        yield self

    def square(self) -> Tensor:
        """Sum of J**2 over cotangents and examples: ``(*shape)``."""
        return total_of(j.square().sum((0, 1)) for j in self._denses())

    def total(self) -> Tensor:
        """Sum of J over cotangents and examples: ``(*shape)``."""
        return total_of(j.sum((0, 1)) for j in self._denses())

    def arrow(self) -> Tensor:
        """Sum of J[..., :-1] * J[..., -1:], each row against its last column: ``(*shape[:-1], cols - 1)``."""
        return total_of((j[..., :-1] * j[..., -1:]).sum((0, 1)) for j in self._denses())

    def sqnorm(self) -> Tensor:
        """Squared norm of J[c, b]: ``(C, B)``."""
        out = torch.empty(self.cotangents, self.examples, dtype=self.dtype, device=self.device)
        for c, b, piece in self.tiles():
            out[c, b] = piece.dense().flatten(2).square().sum(2)
        return out

    def dot(self, V: Tensor) -> Tensor:
        """``J[c, b] . V[k]`` for V ``(K, *shape)``: ``(K, C, B)``."""
        flat = V.flatten(1)
        out = torch.empty(len(V), self.cotangents, self.examples, dtype=self.dtype, device=self.device)
        for c, b, piece in self.tiles():
            out[:, c, b] = torch.einsum("cbp,kp->kcb", piece.dense().flatten(2), flat)
        return out

    def pull(self, u: Tensor) -> Tensor:
        """``sum_cb u[k, c, b] J[c, b]`` for u ``(K, C, B)``: ``(K, *shape)``."""
        return total_of(
            torch.einsum("cbp,kcb->kp", piece.dense().flatten(2), u[:, c, b]).view(-1, *self.shape)
            for c, b, piece in self.tiles()
        )

    def rotate(self, left: Map | None, right: Map | None) -> LayerJacobian:
        """J in another pair of bases: ``left`` acts on the rows axis, ``right`` on the columns (None: identity)."""
        raise NotImplementedError(f"{type(self).__name__} has no rows and columns to rotate")

    def weigh(self, w: Tensor) -> LayerJacobian:
        """J times w ``(*shape)``, entry by entry."""
        return Dense(self.dense() * w)

    def scale(self, c: float) -> LayerJacobian:
        """c J."""
        return self.map_cotangents(lambda g: c * g)

    def to(self, device: torch.device | str | None = None, dtype: torch.dtype | None = None) -> LayerJacobian:
        """The same Jacobian on another device or in another dtype."""
        return self.map_cotangents(lambda g: g.to(device=device, dtype=dtype))

    def map_cotangents(self, fn: Map) -> LayerJacobian:
        """The same form with ``fn``, linear, applied to each entry of what it has for each cotangent."""
        return Dense(fn(self.dense()))

    def nbytes(self) -> int:
        """Bytes held."""
        return 0

    def dense_is_cheaper(self, examples: int) -> bool:
        """Whether inner products with as many examples as that want the Jacobian itself."""
        return True

    def tape(self, examples: int) -> LayerJacobian:
        """The same Jacobian as it is best kept for inner products with the Jacobians of many examples."""
        if not self.dense_is_cheaper(examples):
            return self
        return Dense(_examples_together(self.dense()))

    def add_inner(self, other: LayerJacobian, out: Tensor) -> None:
        """Add ``J[c, b] . J'[d, e]`` to out ``(B, C, B', C')``, which can be viewed as a matrix, in place."""
        for c, b, one in self.tiles():
            j = one.dense().flatten(2)
            for d, e, two in other.tiles():
                out[b, c, e, d] += torch.einsum("cbp,dep->bced", j, two.dense().flatten(2))

    def add_traced(self, other: LayerJacobian, out: Tensor) -> None:
        """Add ``sum_c J[c, b] . J'[c, e]`` to out ``(B, B')`` in place."""
        for c in range(self.cotangents):
            self.of_cotangent(c).add_inner(other.of_cotangent(c), out[:, None, :, None])

    def paired(self, other: LayerJacobian) -> Tensor:
        """``J[c, b] . J'[c, b]``: ``(C, B)``."""
        out = torch.empty(self.cotangents, self.examples, dtype=self.dtype, device=self.device)
        for c, b, one in self.tiles():
            two = other.narrow(b.start, b.stop, c.start, c.stop)
            out[c, b] = (one.dense() * two.dense()).flatten(2).sum(2)
        return out

    def of_cotangent(self, c: int) -> LayerJacobian:
        """The part of one cotangent."""
        return self.narrow(0, self.examples, c, c + 1)

    def _denses(self) -> Iterator[Tensor]:
        return (piece.dense() for _, _, piece in self.tiles())


def _tiling(size: int, cotangents: int, examples: int, device: torch.device) -> Iterator[tuple[slice, slice]]:
    """Some cotangents and some examples at a time, such that as many things of ``size`` bytes fit a work array."""
    c = chunk_length(size, cotangents, device)
    b = chunk_length(size * c, examples, device) if c == cotangents else 1
    return ((some, others) for some in slices(cotangents, c) for others in slices(examples, b))


class Outer(LayerJacobian):
    """Sums over positions of outer products, ``J[c, b] = sum_t g[c, b, t] a[b, t]^T``, one for each group.

    The form of linear maps with shared weights: ``nn.Linear`` (T: all axes between the first and the last),
    convolutions (T: pixels; a: patches) and bilinear maps. With a bias the last entry of ``a`` is one.

    inputs: ``(B, ...)``, from which ``expand`` makes a ``(B, T, G, cols)`` when it is needed (by default they are a);
    g: ``(C, B, T, G, rows)``; moment: from inputs to the sum of a a^T over examples and positions, ``(G, cols, cols)``,
    if there is a faster way than from a; packed shape ``(G, rows, cols)``.
    """

    def __init__(
        self, inputs: Tensor, g: Tensor, expand: Map | None = None, cols: int | None = None, moment: Map | None = None
    ) -> None:
        cols = inputs.shape[-1] if cols is None else cols
        super().__init__(g.shape[0], g.shape[1], (g.shape[3], g.shape[4], cols), g.dtype, g.device)
        self.inputs = inputs
        self.g = g
        self.expand = expand
        self.moment = moment

    @cached_property
    def a(self) -> Tensor:
        """``(B, T, G, cols)``. The patches of a convolution are many times its input, so they are made late."""
        return self.inputs if self.expand is None else self.expand(self.inputs)

    @property
    def positions(self) -> int:
        """T."""
        return self.g.shape[2]

    def dense(self) -> Tensor:
        return torch.einsum("cbtgo,btgi->cbgoi", self.g, self.a)

    def write(self, places: Places) -> None:
        lead = self.cotangents, self.examples, *self.shape[:-1]
        if self.positions > 1 or any(place.shape[:-1] != lead for _, place in places):
            return super().write(places)
        for columns, place in places:
            torch.mul(self.g[:, :, 0].unsqueeze(-1), self.a[:, 0, :, None, columns], out=place)
        return None

    def narrow(self, start: int, stop: int, first: int = 0, last: int | None = None) -> Outer:
        g = self.g[first:last, start:stop]
        if self.expand is None or "a" in vars(self):
            return Outer(self.a[start:stop], g)
        return Outer(self.inputs[start:stop], g, self.expand, self.shape[2], self.moment)

    def pieces(self) -> Iterator[LayerJacobian]:
        groups, rows, cols = self.shape
        size = self.positions * groups * (self.cotangents * rows + cols) * self.dtype.itemsize
        few = panel_length(size, self.examples, self.device) if self.positions > 1 else self.examples  # a is there
        for b in slices(self.examples, few):
            yield self.narrow(b.start, b.stop)

    def fold(self, ratio: int) -> Outer:
        a = self.a.reshape(-1, ratio * self.a.shape[1], *self.a.shape[2:])
        g = self.g.reshape(self.cotangents, -1, ratio * self.g.shape[2], *self.g.shape[3:])
        return Outer(a, g)

    def _panels(self) -> Iterator[tuple[slice, slice, slice, Tensor]]:
        """J in pieces that stay in the cache: of which examples, groups and rows, and ``(b, G', C, r, cols)``."""
        groups, rows, cols = self.shape
        fit = panel_bytes(self.device) // max(1, self.cotangents * cols * self.dtype.itemsize)  # rows of one example
        r, k = max(1, min(rows, fit)), max(1, min(groups, fit // max(1, rows)))
        patches = self.positions * groups * cols * self.dtype.itemsize
        b = max(1, min(fit // max(1, rows * groups), chunk_length(patches, self.examples, self.device)))
        for examples in slices(self.examples, b):
            a = self.narrow(examples.start, examples.stop, 0, 0).a.transpose(1, 2)
            g = self.g[:, examples].permute(1, 3, 0, 4, 2).contiguous()  # (b, G, C, rows, T)
            for some in slices(groups, k):
                right = a[:, some].flatten(0, 1)
                for part in slices(rows, r):
                    left = g[:, some, :, part]
                    j = torch.bmm(left.flatten(2, 3).flatten(0, 1), right)
                    yield examples, some, part, j.view(*left.shape[:4], cols)

    def square(self) -> Tensor:
        if self.positions == 1:
            return _outer_sum(self.g[:, :, 0].square().sum(0), self.a[:, 0].square())
        out = self.g.new_zeros(self.shape)
        for _, groups, rows, j in self._panels():
            out[groups, rows] += _sum_of_squares(j, (0, 2))
        return out

    def total(self) -> Tensor:
        g = self.g[0] if self.cotangents == 1 else self.g.sum(0)
        groups, rows, cols = self.shape
        if self.positions >= rows:  # the sum of each example takes less memory than a copy of its patches
            each = torch.bmm(g.permute(0, 2, 3, 1).flatten(0, 1), self.a.transpose(1, 2).flatten(0, 1))
            return each.view(-1, groups, rows, cols).sum(0)
        return _outer_sum(g.flatten(0, 1), self.a.flatten(0, 1))

    def dot(self, V: Tensor) -> Tensor:
        return torch.einsum("cbtgo,kbtgo->kcb", self.g, torch.einsum("kgoi,btgi->kbtgo", V, self.a))

    def pull(self, u: Tensor) -> Tensor:
        return torch.einsum("kbtgo,btgi->kgoi", torch.einsum("kcb,cbtgo->kbtgo", u, self.g), self.a)

    def arrow(self) -> Tensor:
        if self.positions == 1:
            a = self.a[:, 0]
            return _outer_sum(self.g[:, :, 0].square().sum(0), a[..., :-1] * a[..., -1:])
        groups, rows, cols = self.shape
        out = self.g.new_zeros(groups, rows, cols - 1)
        for _, k, r, j in self._panels():
            out[k, r] += (j[..., :-1] * j[..., -1:]).sum((0, 2))
        return out

    def sqnorm(self) -> Tensor:
        t = self.positions
        _, rows, cols = self.shape
        if t == 1:
            return torch.einsum("cbg,bg->cb", self.g[:, :, 0].square().sum(-1), self.a[:, 0].square().sum(-1))
        if t * (rows + cols) > rows * cols:
            norms = self.g.new_zeros(self.cotangents, self.examples)
            for b, _, _, j in self._panels():
                norms[:, b] += _sum_of_squares(j, (1, 3, 4)).T
            return norms
        # |sum_t g_t a_t^T|^2 = sum_ts (g_t . g_s) (a_t . a_s): cheaper than J itself for short sequences.
        size = (self.cotangents + 1) * self.shape[0] * t * t * self.dtype.itemsize
        step = chunk_length(size, self.examples, self.device)
        out = []
        for b in slices(self.examples, step):
            a, g = self.a[b], self.g[:, b]
            aa = torch.einsum("btgi,bsgi->bgts", a, a)
            gg = torch.einsum("cbtgo,cbsgo->cbgts", g, g)
            out.append((gg * aa).sum((2, 3, 4)))
        return torch.cat(out, 1)

    def rotate(self, left: Map | None, right: Map | None) -> Outer:
        a, g = self.a, self.g if left is None else left(self.g)
        if right is not None:
            # One large product, whatever the order of patches in memory.
            a = right(a.flatten(0, 1)).unflatten(0, a.shape[:2])
        return Outer(a, g)

    def to(self, device: torch.device | str | None = None, dtype: torch.dtype | None = None) -> Outer:
        inputs, g = (t.to(device=device, dtype=dtype) for t in (self.inputs, self.g))
        return Outer(inputs, g, self.expand, self.shape[2])

    def map_cotangents(self, fn: Map) -> Outer:
        made = Outer(self.inputs, fn(self.g), self.expand, self.shape[2])
        if "a" in vars(self):
            vars(made)["a"] = self.a
        return made

    def nbytes(self) -> int:
        a = self.a if self.expand is None or "a" in vars(self) else self.inputs
        return nbytes_of([a, self.g])

    def dense_is_cheaper(self, examples: int) -> bool:
        """By the multiplications for each pair of examples; the ones with positions run at a fifth of the speed."""
        c, t = self.cotangents, self.positions
        if t == 1:
            return False
        groups, rows, cols = self.shape
        by_positions = groups * (t * t * cols + c * t * t * rows + c * c * t * rows)
        dense = groups * (c * c * rows * cols + 2 * c * t * rows * cols / examples)
        return 5 * by_positions > dense

    def tape(self, examples: int) -> LayerJacobian:
        return super().tape(examples) if self.dense_is_cheaper(examples) else Outer(self.a, _examples_together(self.g))

    def add_inner(self, other: LayerJacobian, out: Tensor) -> None:
        if not isinstance(other, Outer):
            return super().add_inner(other, out)
        for group in range(self.shape[0]):
            a, b = self.a[:, :, group], other.a[:, :, group]
            _add_inner(lambda k, a=a, b=b: _matmul(a[k], b), self.g[..., group, :], other.g[..., group, :], out)  # type: ignore[misc]
        return None

    def add_traced(self, other: LayerJacobian, out: Tensor) -> None:
        if not isinstance(other, Outer):
            return super().add_traced(other, out)
        for group in range(self.shape[0]):
            a, b = self.a[:, :, group], other.a[:, :, group]
            _add_traced(lambda k, a=a, b=b: _matmul(a[k], b), self.g[..., group, :], other.g[..., group, :], out)  # type: ignore[misc]
        return None

    def paired(self, other: LayerJacobian) -> Tensor:
        if not isinstance(other, Outer) or self.positions > 1 or other.positions > 1:
            return super().paired(other)
        outputs = (self.g[:, :, 0] * other.g[:, :, 0]).sum(-1)
        return torch.einsum("cbg,bg->cb", outputs, (self.a[:, 0] * other.a[:, 0]).sum(-1))

    def without_last_column(self) -> Outer:
        """The same layer with its bias left out."""
        return Outer(self.a[..., :-1], self.g)

    def left_factor(self, reduce: bool) -> Tensor:
        """Sum of g g^T over cotangents and examples (and positions, or of their sum): the lower triangles of
        ``(G, rows, rows)``.
        """
        g = self.g.sum(2, keepdim=True) if reduce else self.g
        positions_last = g.stride(2) == 1 and g.shape[2] >= g.shape[4]  # in memory, as convolutions leave it
        if positions_last and grain(g.device).has_cache:
            return _moment_of_columns(g.permute(0, 1, 3, 4, 2).flatten(0, 1))
        return second_moment(g.flatten(0, 2))

    def right_samples(self, reduce: bool) -> Tensor | None:
        """The a of all examples and positions (or their means over positions), ``(N, cols)``, if there is one group and
        they are fewer than half of the columns.
        """
        groups, _, cols = self.shape
        if groups > 1 or 2 * self.examples * (1 if reduce else self.positions) > cols:
            return None
        return (self.a.mean(1) if reduce else self.a.flatten(0, 1))[:, 0]

    def right_factor(self, reduce: bool) -> tuple[Tensor, int]:
        """Sum of a a^T over examples (and positions, or of their mean), the lower triangles of ``(G, cols, cols)``; how
        many were summed.
        """
        count = self.examples * (1 if reduce else self.positions)
        if self.moment is not None and not reduce:
            return self.moment(self.inputs), count
        groups, _, cols = self.shape
        size = self.positions * groups * cols * self.dtype.itemsize
        # As few as stay in the cache, but not so few that the moment is larger than what it is of.
        few = max(
            panel_length(size, self.examples, self.device),
            min(chunk_length(size, self.examples, self.device), -(-cols * self.examples // max(1, count))),
        )

        def of(b: slice) -> Tensor:
            a = self.narrow(b.start, b.stop).a  # what it expands goes with it
            return second_moment((a.mean(1, keepdim=True) if reduce else a).flatten(0, 1))

        return total_of(map(of, slices(self.examples, few))), count


class Gather(LayerJacobian):
    """An :class:`Outer` whose ``a`` is one-hot and is never built: the rows of an embedding table.

    ids: ``(B, T)``, negative where the look-up has no derivative (padding); g: ``(C, B, T, rows)``, zero there;
    packed shape ``(1, rows, size)``.
    """

    def __init__(self, ids: Tensor, g: Tensor, size: int) -> None:
        super().__init__(g.shape[0], g.shape[1], (1, g.shape[3], size), g.dtype, g.device)
        self.ids = ids
        self.g = g
        self.size = size

    def dense(self) -> Tensor:
        c, b, _, rows = self.g.shape
        out = self.g.new_zeros(c, b, self.size, rows)
        index = self.ids.clamp(min=0)[None, :, :, None].expand_as(self.g)
        return out.scatter_add_(2, index, self.g).transpose(2, 3).unsqueeze(2)

    def narrow(self, start: int, stop: int, first: int = 0, last: int | None = None) -> Gather:
        return Gather(self.ids[start:stop], self.g[first:last, start:stop], self.size)

    def fold(self, ratio: int) -> Gather:
        ids = self.ids.reshape(-1, ratio * self.ids.shape[1])
        return Gather(ids, self.g.reshape(self.cotangents, *ids.shape, self.g.shape[3]), self.size)

    def square(self) -> Tensor:
        _, ids, j = self._columns()
        return self._spread(ids, j.square().sum(0))

    def total(self) -> Tensor:
        return self._spread(self.ids.flatten().clamp(min=0), self.g.sum(0).flatten(0, 1))

    def dot(self, V: Tensor) -> Tensor:
        looked_up = V[:, 0].transpose(1, 2)[:, self.ids.clamp(min=0)]  # (K, B, T, rows)
        return torch.einsum("cbto,kbto->kcb", self.g, looked_up)

    def pull(self, u: Tensor) -> Tensor:
        g = torch.einsum("kcb,cbto->bkto", u, self.g).movedim(1, 2).flatten(0, 1)  # (B T, K, rows)
        out = g.new_zeros(self.size, *g.shape[1:])
        return out.index_add_(0, self.ids.flatten().clamp(min=0), g).permute(1, 2, 0).unsqueeze(1)

    def sqnorm(self) -> Tensor:
        examples, _, j = self._columns()
        out = j.new_zeros(self.cotangents, self.examples)
        return out.index_add_(1, examples, j.square().sum(2))

    def rotate(self, left: Map | None, right: Map | None) -> LayerJacobian:
        if right is not None:
            return Dense(self.dense()).rotate(left, right)
        g = self.g if left is None else left(self.g.unsqueeze(3)).squeeze(3)
        return Gather(self.ids, g, self.size)

    def left_factor(self, reduce: bool) -> Tensor:
        g = self.g.sum(2, keepdim=True) if reduce else self.g
        return second_moment(g.flatten(0, 2).unsqueeze(1))

    def right_factor(self, reduce: bool) -> tuple[Tensor, int]:
        """As in :class:`Outer`, but diagonal where it is: ``(1, size)`` for ``reduce=False``."""
        real = self.ids >= 0
        if not reduce or self.ids.shape[1] == 1:
            counts = torch.bincount(self.ids[real], minlength=self.size).to(self.g.dtype)
            return counts.unsqueeze(0), int(real.sum())
        require(
            self.size**2 * self.g.dtype.itemsize,
            f"the reduced input factor of an embedding of {self.size} rows",
            'use PMatMixed with another representation for the embedding, or PMatKFAC with sharing="expand"',
            self.device,
        )
        mean = self.g.new_zeros(self.examples, self.size)
        mean.scatter_add_(1, self.ids.clamp(min=0), real.to(self.g.dtype) / self.ids.shape[1])
        return second_moment(mean.unsqueeze(1)), self.examples

    def weigh(self, w: Tensor) -> Gather:
        return Gather(self.ids, self.g * w[0].T[self.ids.clamp(min=0)], self.size)

    def to(self, device: torch.device | str | None = None, dtype: torch.dtype | None = None) -> Gather:
        return Gather(self.ids.to(device), self.g.to(device=device, dtype=dtype), self.size)

    def map_cotangents(self, fn: Map) -> Gather:
        return Gather(self.ids, fn(self.g), self.size)

    def nbytes(self) -> int:
        return nbytes_of([self.ids, self.g])

    def dense_is_cheaper(self, examples: int) -> bool:
        return False

    def add_inner(self, other: LayerJacobian, out: Tensor) -> None:
        if not isinstance(other, Gather):
            return super().add_inner(other, out)
        _add_inner(lambda k: self._same(other, k), self.g, other.g, out)
        return None

    def add_traced(self, other: LayerJacobian, out: Tensor) -> None:
        if not isinstance(other, Gather):
            return super().add_traced(other, out)
        _add_traced(lambda k: self._same(other, k), self.g, other.g, out)
        return None

    def _same(self, other: Gather, examples: slice) -> Tensor:
        """One where two positions look up the same row: ``(b, T, B', T')``."""
        return (self.ids[examples, :, None, None] == other.ids).to(self.dtype)

    def _columns(self) -> tuple[Tensor, Tensor, Tensor]:
        """The distinct (example, id) pairs and the column of J at each: (U,), (U,), (C, U, rows)."""
        examples = torch.arange(self.examples, device=self.ids.device).unsqueeze(1)
        keys = examples * self.size + self.ids.clamp(min=0)
        keys, where = torch.unique(keys.flatten(), return_inverse=True)
        j = self.g.new_zeros(self.cotangents, len(keys), self.g.shape[3])
        j.index_add_(1, where, self.g.flatten(1, 2))
        return keys // self.size, keys % self.size, j

    def _spread(self, ids: Tensor, columns: Tensor) -> Tensor:
        out = columns.new_zeros(self.size, columns.shape[1])
        return out.index_add_(0, ids, columns).T.unsqueeze(0)


class Dense(LayerJacobian):
    """The Jacobian itself, for layers with few parameters: j ``(C, B, *shape)``."""

    def __init__(self, j: Tensor) -> None:
        super().__init__(j.shape[0], j.shape[1], tuple(j.shape[2:]), j.dtype, j.device)
        self.j = j

    def dense(self) -> Tensor:
        return self.j

    def narrow(self, start: int, stop: int, first: int = 0, last: int | None = None) -> Dense:
        return Dense(self.j[first:last, start:stop])

    def map_cotangents(self, fn: Map) -> Dense:
        return Dense(fn(self.j))

    def nbytes(self) -> int:
        return nbytes_of([self.j])

    def tape(self, examples: int) -> Dense:
        return self

    def add_inner(self, other: LayerJacobian, out: Tensor) -> None:
        if not isinstance(other, Dense):
            return super().add_inner(other, out)
        x, y = (j.transpose(0, 1).flatten(2) for j in (self.j, other.j))
        out.view(len(x) * x.shape[1], -1).addmm_(x.flatten(0, 1), y.flatten(0, 1).T)
        return None

    def add_traced(self, other: LayerJacobian, out: Tensor) -> None:
        if not isinstance(other, Dense):
            return super().add_traced(other, out)
        out.addmm_(self.j.transpose(0, 1).flatten(1), other.j.transpose(0, 1).flatten(1).T)
        return None

    def fold(self, ratio: int) -> Dense:
        return Dense(self.j.unflatten(1, (-1, ratio)).sum(2))

    def rotate(self, left: Map | None, right: Map | None) -> Dense:
        j = self.j  # (C, B, G, rows, cols)
        if right is not None:
            j = right(j.transpose(2, 3)).transpose(2, 3)
        if left is not None:
            j = left(j.movedim(4, 2)).movedim(2, 4)
        return Dense(j)


class Lazy(LayerJacobian):
    """A Jacobian computed on demand, a slice of examples at a time, so that it is never held whole.

    compute: ``(start, stop, first, last) -> (last - first, stop - start, *shape)``, of examples and of cotangents.
    """

    def __init__(
        self,
        compute: Callable[[int, int, int, int], Tensor],
        cotangents: int,
        examples: int,
        shape: tuple[int, ...],
        dtype: torch.dtype,
        device: torch.device,
        origin: tuple[int, int] = (0, 0),
    ) -> None:
        super().__init__(cotangents, examples, shape, dtype, device)
        self.compute = compute
        self.origin = origin

    def __deepcopy__(self, memo: dict[int, Any]) -> Lazy:
        return self  # nothing of it changes

    def __reduce_ex__(self, protocol: Any) -> Any:
        raise TypeError(
            "the Jacobian of a layer without a form of its own is computed by its module when it is asked for, so it "
            "cannot be pickled: pickle a dense one, to_dense() or representation=PFMapDense"
        )

    @unrecorded  # the module reads parameters that are not those of this layer
    def dense(self) -> Tensor:
        b, c = self.origin
        return self.compute(b, b + self.examples, c, c + self.cotangents)

    def narrow(self, start: int, stop: int, first: int = 0, last: int | None = None) -> Lazy:
        b, c = self.origin
        last = self.cotangents if last is None else last
        origin = (b + start, c + first)
        return Lazy(self.compute, last - first, stop - start, self.shape, self.dtype, self.device, origin)

    def within(self, context: Callable[[], AbstractContextManager[None]]) -> Lazy:
        """The same, computed inside of a context."""

        def compute(start: int, stop: int, first: int, last: int) -> Tensor:
            with context():
                return self.compute(start, stop, first, last)

        return Lazy(compute, self.cotangents, self.examples, self.shape, self.dtype, self.device, self.origin)

    def map_cotangents(self, fn: Map) -> Lazy:
        def compute(start: int, stop: int, first: int, last: int) -> Tensor:
            return fn(self.compute(start, stop, first, last))

        like = fn(torch.empty(0, dtype=self.dtype, device=self.device))
        return Lazy(compute, self.cotangents, self.examples, self.shape, like.dtype, like.device, self.origin)

    def fold(self, ratio: int) -> Lazy:
        def compute(start: int, stop: int, first: int, last: int) -> Tensor:
            whole = self.narrow(start * ratio, stop * ratio, first, last).dense()
            return whole.unflatten(1, (-1, ratio)).sum(2)

        return Lazy(compute, self.cotangents, self.examples // ratio, self.shape, self.dtype, self.device)


def add(forms: Sequence[LayerJacobian]) -> LayerJacobian:
    """The sum of Jacobians of the same parameters, e.g. of a module that is called several times."""
    first = forms[0]
    if len(forms) == 1:
        return first
    if all(isinstance(f, Outer) for f in forms):
        return Outer(torch.cat([f.a for f in forms], 1), torch.cat([f.g for f in forms], 2))  # type: ignore[attr-defined]
    if all(isinstance(f, Gather) for f in forms):
        ids = torch.cat([f.ids for f in forms], 1)  # type: ignore[attr-defined]
        return Gather(ids, torch.cat([f.g for f in forms], 2), first.size)  # type: ignore[attr-defined]

    def compute(start: int, stop: int, first: int, last: int) -> Tensor:
        return total_of(f.narrow(start, stop, first, last).dense() for f in forms)

    return Lazy(compute, first.cotangents, first.examples, first.shape, first.dtype, first.device)


def stack(forms: Sequence[LayerJacobian]) -> LayerJacobian:
    """The same examples under the cotangents of each in turn."""
    first = forms[0]
    if len(forms) == 1:
        return first
    if all(isinstance(f, Outer) for f in forms):
        g = torch.cat([f.g for f in forms])  # type: ignore[attr-defined]
        return Outer(first.inputs, g, first.expand, first.shape[2])  # type: ignore[attr-defined]
    if all(isinstance(f, Gather) for f in forms):
        return Gather(first.ids, torch.cat([f.g for f in forms]), first.size)  # type: ignore[attr-defined]
    return Dense(torch.cat([f.dense() for f in forms]))


def write_rows(forms: Sequence[LayerJacobian], places: Sequence[Placing], out: Tensor) -> None:
    """The Jacobian of several layers side by side, into ``(C, B, P)``, in pieces that stay in the cache."""
    sizes = [prod(f.shape) for f in forms]
    for form, of, own in zip(forms, places, out.split(sizes, -1), strict=True):
        size = form.cotangents * prod(form.shape) * form.dtype.itemsize
        for b in slices(form.examples, panel_length(size, form.examples, form.device)):
            form.narrow(b.start, b.stop).write(of(own[:, b]))


def dense_rows(forms: Sequence[LayerJacobian], places: Sequence[Placing]) -> Tensor:
    """:func:`write_rows` into a new array."""
    one = forms[0]
    p = sum(prod(f.shape) for f in forms)
    out = torch.empty(one.cotangents, one.examples, p, dtype=one.dtype, device=one.device)
    write_rows(forms, places, out)
    return out


def rows(forms: Sequence[LayerJacobian], places: Sequence[Placing]) -> Iterator[Tensor]:
    """:func:`dense_rows`, ``(c, b, P)``, of some cotangents and examples at a time such that each fits a work array."""
    one = forms[0]
    size = 2 * sum(prod(f.shape) for f in forms) * one.dtype.itemsize
    for c, b in _tiling(size, one.cotangents, one.examples, one.device):
        yield dense_rows([f.narrow(b.start, b.stop, c.start, c.stop) for f in forms], places)


def gram(forms: Sequence[LayerJacobian], places: Sequence[Placing], total: Tensor | None = None) -> Tensor:
    """``sum_cb J[c, b] J[c, b]^T`` over the parameters of several layers: the lower triangle of ``(P, P)`` in flat
    parameter order. total: what it is added to, in place.
    """
    if total is None:
        p = sum(prod(f.shape) for f in forms)
        total = torch.zeros(p, p, dtype=forms[0].dtype, device=forms[0].device)
    for piece in rows(forms, places):
        add_gram(total, piece.flatten(0, 1))
    return total


class Contraction:
    """``sum_cb J[c, b] J[c, b]^T`` of layers without positions, the cotangents contracted first, so that the cost does
    not grow with them: ``sum_b (sum_c g g'^T) (x) (a a'^T)`` for each pair of layers, one GEMM over the examples.

    pairs: ``(g g', o o', i i')`` for each pair; of a layer with itself, and one group, o o' is o <= o' alone.
    """

    def __init__(self, shapes: Sequence[tuple[int, ...]], pairs: dict[tuple[int, int], Tensor]) -> None:
        self.shapes = shapes
        self.pairs = pairs

    @classmethod
    def of(cls, forms: Sequence[LayerJacobian], total: Contraction | None = None) -> Contraction | None:
        """None if there are other forms. total: what it is added to, in place."""
        outers = [f for f in forms if isinstance(f, Outer) and f.positions == 1]
        if len(outers) < len(forms):
            return None
        before = {} if total is None else total.pairs
        every = [(k, m) for k in range(len(outers)) for m in range(k + 1)]
        pairs = {(k, m): _pair(outers[k], outers[m], k == m, before.get((k, m))) for k, m in every}
        return cls([f.shape for f in outers], pairs)

    def __add__(self, other: Contraction) -> Contraction:
        return Contraction(self.shapes, {key: pair.add_(other.pairs[key]) for key, pair in self.pairs.items()})

    def matrix(self, places: Sequence[Placing]) -> Tensor:
        """As :func:`gram`, whole."""
        ends = list(accumulate(prod(shape) for shape in self.shapes))
        where = [slice(end - prod(shape), end) for end, shape in zip(ends, self.shapes, strict=True)]
        out = next(iter(self.pairs.values())).new_empty(ends[-1], ends[-1])
        for (k, m), pair in self.pairs.items():
            (g, o, i), (h, p, j) = self.shapes[k], self.shapes[m]
            if pair.shape[1] < o * p:
                first, second = torch.triu_indices(o, o, device=pair.device)
                whole = pair.new_empty(len(pair), o, o, pair.shape[-1])
                whole[:, first, second] = pair
                whole[:, second, first] = pair
                pair = whole
            packed = pair.view(g, h, o, p, i, j).permute(1, 3, 5, 0, 2, 4)
            block = out[where[k], where[m]]
            for columns, of_rows in places[m](block):  # (P, h, p, columns)
                for others, place in places[k](of_rows.movedim(0, -1)):  # (h, p, columns, g, o, others)
                    place.copy_(packed[:, :, columns][..., others].reshape(place.shape))
            if k != m:
                out[where[m], where[k]] = block.T
        return out


def _pair(one: Outer, other: Outer, same: bool, total: Tensor | None) -> Tensor:
    """An entry of :class:`Contraction`, added to ``total`` if there is one."""
    (g1, o1, i1), (g2, o2, i2) = one.shape, other.shape
    size = (g1 * o1 * g2 * o2 + g1 * i1 * g2 * i2) * one.dtype.itemsize
    step = chunk_length(size, one.examples, one.device)
    upper = torch.triu_indices(o1, o1, device=one.device).unbind() if same and g1 == 1 else None
    out = one.g.new_zeros(g1 * g2, o1 * o2 if upper is None else len(upper[0]), i1 * i2) if total is None else total
    a1, a2 = one.a[:, 0], other.a[:, 0]
    for b in slices(one.examples, step):
        s = torch.einsum("cbgo,cbhp->ghbop", one.g[:, b, 0], other.g[:, b, 0])
        s = s.reshape(g1 * g2, -1, o1 * o2) if upper is None else s[..., upper[0], upper[1]].flatten(0, 1)
        x = torch.einsum("bgi,bhj->ghbij", a1[b], a2[b])
        out.baddbmm_(s.mT, x.reshape(g1 * g2, -1, i1 * i2))
    return out


def _examples_together(g: Tensor) -> Tensor:
    """The same ``(C, B, ...)`` with all that is of one example together in memory."""
    return g.transpose(0, 1).contiguous().transpose(0, 1)


def _add_inner(same: Callable[[slice], Tensor], g: Tensor, h: Tensor, out: Tensor) -> None:
    """Add ``sum_ts (x[b, t] . y[e, s]) (g[c, b, t] . h[d, e, s])`` to out ``(B, C, B', C')``.

    same: from a slice of the first examples to the products of inputs ``(b, T, B', T')``.
    """
    (c, examples, t, o), (d, others, s, _) = g.shape, h.shape
    if t == s == 1:
        outputs = _matmul(g[:, :, 0].transpose(0, 1), h[:, :, 0].transpose(0, 1))
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


def _add_traced(same: Callable[[slice], Tensor], g: Tensor, h: Tensor, out: Tensor) -> None:
    """:func:`_add_inner` summed over equal cotangents: out ``(B, B')``."""
    (_, examples, t, _), (_, others, s, _) = g.shape, h.shape
    step = chunk_length(2 * others * t * s * g.dtype.itemsize, examples, g.device)
    columns = h.permute(1, 2, 0, 3).flatten(2).flatten(0, 1)  # (E S, C o)
    for k in slices(examples, step):
        m = same(k)
        outputs = g[:, k].permute(1, 2, 0, 3).flatten(2).flatten(0, 1) @ columns.T
        out[k] += (outputs.view(m.shape) * m).sum((1, 3))


def _matmul(x: Tensor, y: Tensor) -> Tensor:
    """Inner products over the last axis: ``(a, b, i), (c, d, i) -> (a, b, c, d)``."""
    product = x.reshape(-1, x.shape[-1]) @ y.reshape(-1, y.shape[-1]).T
    return product.view(*x.shape[:-1], *y.shape[:-1])


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
    for rows in [slice(d)] if _whole(x) else _panels(d + 1, x.device):
        stop = min(rows.stop, d)
        torch.mm(x[:, rows.start : stop].T, x[:, :stop], out=total[rows.start : stop, :stop])
    total[-1, :d] = total[:d, -1] = x.sum(0)
    total[-1, -1] = n
    return total.unsqueeze(0)


def _moment_of_columns(x: Tensor) -> Tensor:
    """``(N, G, d, t) -> (G, d, d)``: the sum over N and t of x x^T, for each group."""
    _, groups, d, _ = x.shape
    total = x.new_zeros(groups, d, d)
    for some in slices(len(x), panel_length(groups * d * d * x.dtype.itemsize, len(x), x.device)):
        total += (x[some] @ x[some].mT).sum(0)
    return total


def _panels(d: int, device: torch.device) -> Iterator[slice]:
    """Cover ``0:d`` by slices of about the same length, a multiple of 16."""
    count = -(-d // grain(device).columns)
    return slices(d, -(-d // (16 * count)) * 16)


def add_gram(total: Tensor, x: Tensor, beta: int = 1) -> Tensor:
    """Make the lower triangle of ``total`` beta times what it is plus ``x^T x``: half the work of the whole product."""
    for rows in _panels(x.shape[1], x.device):
        total[rows, : rows.stop].addmm_(x[:, rows].T, x[:, : rows.stop], beta=beta)
    return total


def mirror(total: Tensor) -> Tensor:
    """Copy the lower triangles of ``(..., d, d)`` to the upper ones in place; blocks on the diagonal are whole."""
    _, *others = _panels(total.shape[-1], total.device)
    for rows in others:
        total[..., : rows.start, rows] = total[..., rows, : rows.start].mT
    return total


def copy_transposed(x: Tensor, out: Tensor) -> None:
    """Copy matrices ``(..., r, c)`` to out ``(..., c, r)``, in panels of rows that stay in the cache."""
    for rows in slices(x.shape[-2], 256):
        out[..., rows] = x[..., rows, :].mT


def _sum_of_squares(x: Tensor, axes: tuple[int, ...]) -> Tensor:
    """Of what is not needed again."""
    if grain(x.device).has_cache:
        return x.square_().sum(axes)
    return torch.linalg.vector_norm(x, dim=axes).square_()  # which reads it once, and writes nothing


def _outer_sum(g: Tensor, a: Tensor) -> Tensor:
    """``(N, G, o), (N, G, i) -> (G, o, i)``: the sum over N of g a^T, for each group."""
    return torch.bmm(g.permute(1, 2, 0), a.transpose(0, 1))


def total_of(pieces: Iterator[Tensor]) -> Tensor:
    """The sum of tensors of one shape."""
    total = next(pieces)
    for piece in pieces:
        total = total + piece
    return total
