"""Look-ups: embeddings."""

from __future__ import annotations

import torch
from torch import Tensor

from ..memory import chunk_length, nbytes_of, require, slices
from .base import Dense, LayerJacobian, Map
from .inner import add_inner, add_traced
from .moments import second_moment


class Gather(LayerJacobian):
    """An :class:`Outer` whose ``a`` is one-hot and is never built: the rows of an embedding table. The packed shape is
    ``(1, rows, size)``.

    Args:
        ids: Which row, ``(B, T)``, negative where the look-up has no derivative (padding).
        g: Output gradients ``(C, B, T, rows)``, zero there.
        size: The number of rows of the table.
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

    @property
    def rotates(self) -> bool:
        return True

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

    def right_squares(self, reduce: bool) -> tuple[Tensor, int]:
        """The diagonal of :meth:`right_factor`, ``(1, size)``."""
        if not reduce:
            return self.right_factor(reduce)
        examples = torch.arange(self.examples, device=self.ids.device).unsqueeze(1)
        keys, counts = (examples * self.size + self.ids)[self.ids >= 0].unique(return_counts=True)
        shares = (counts / self.ids.shape[1]).to(self.g.dtype)
        return self.g.new_zeros(1, self.size).index_add_(
            1, keys % self.size, shares.square().unsqueeze(0)
        ), self.examples

    def weighted(self, w: Tensor) -> Gather:
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
        if not isinstance(other, Gather):  # of which only the columns that are looked up are needed
            size = self.ids.shape[1] * other.cotangents * other.examples * self.shape[1] * self.dtype.itemsize
            for b in slices(self.examples, chunk_length(size, self.examples, self.device)):
                ids = self.ids[b]
                columns = other.columns(ids.flatten().clamp(min=0)).unflatten(-1, ids.shape)
                out[b] += torch.einsum("cbto,deobt->bced", self.g[:, b], columns)
            return
        add_inner(lambda k: self._same(other, k), self.g, other.g, out)
        return

    def add_traced(self, other: LayerJacobian, out: Tensor) -> None:
        if not isinstance(other, Gather):
            return super().add_traced(other, out)
        add_traced(lambda k: self._same(other, k), self.g, other.g, out)
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
