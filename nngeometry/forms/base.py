"""What a form of a Jacobian is, and the form that is the Jacobian itself."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from math import prod

import torch
from torch import Tensor

from ..memory import chunk_length, nbytes_of, slices
from .inner import examples_together
from .moments import total_of

Map = Callable[[Tensor], Tensor]


#: Parts of a packed Jacobian, by a slice of each packed axis, each with the view of flat parameters where it goes.
Places = Sequence[tuple[tuple[slice, ...], Tensor]]


#: From flat parameters of a layer ``(..., p)`` to where the columns of its form go.
ColumnViews = Callable[[Tensor], Places]


class LayerJacobian(ABC):
    """``J[c, b]`` for several cotangents and examples, each of a packed shape.

    Args:
        cotangents: How many cotangents, C.
        examples: How many examples, B.
        shape: The packed shape.
        dtype: The dtype of its entries.
        device: Where they are.
    """

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
        for index, place in places:
            place.copy_(j[(..., *index)].reshape(place.shape))  # type: ignore[index]

    def tiles(self) -> Iterator[tuple[slice, slice, LayerJacobian]]:
        """Pieces over cotangents and examples whose dense Jacobian fits a work array, with where they are."""
        for c, b in tiling(prod(self.shape) * self.dtype.itemsize, self.cotangents, self.examples, self.device):
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

    @property
    def rotates(self) -> bool:
        """Whether :meth:`rotate` leaves what it is made of, instead of the Jacobian itself."""
        return False

    def rotate(self, left: Map | None, right: Map | None) -> LayerJacobian:
        """J in another pair of bases: ``left`` acts on the rows axis, ``right`` on the columns (None: identity)."""
        raise NotImplementedError(f"{type(self).__name__} has no rows and columns to rotate")

    def weighted(self, w: Tensor) -> LayerJacobian:
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

    def within(self, context: Callable[[], AbstractContextManager[None]]) -> LayerJacobian:
        """The same, whatever of it is computed later inside of a context."""
        return self

    @property
    def on_demand(self) -> bool:
        """Whether something of it is computed later, by the module, from the parameters as they are then."""
        return False

    def columns(self, ids: Tensor) -> Tensor:
        """Some columns of J, of one group: ``(C, B, rows, n)`` for ids ``(n,)``."""
        return self.dense()[:, :, 0][..., ids]

    def nbytes(self) -> int:
        """Bytes held."""
        return 0

    def dense_is_cheaper(self, examples: int) -> bool:
        """Whether inner products with as many examples as that want the Jacobian itself."""
        return True

    def prepared(self, examples: int) -> LayerJacobian:
        """The same Jacobian as it is best kept for inner products with the Jacobians of many examples."""
        if not self.dense_is_cheaper(examples):
            return self
        return Dense(examples_together(self.dense()))

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

    def own(self, other: LayerJacobian, weight: Tensor | None = None, full: bool = True) -> Tensor:
        """``J[c, b] . (w J'[d, b])``, the outputs of each example with each other: ``(C, C', B)``; unless full, each
        with itself: ``(C, B)``. weight: w ``(*shape)``, one by default.
        """
        if not full:
            return (self if weight is None else self.weighted(weight)).paired(other)
        out = torch.empty(self.cotangents, other.cotangents, self.examples, dtype=self.dtype, device=self.device)
        step = chunk_length(prod(self.shape) * self.dtype.itemsize * self.cotangents, self.examples, self.device)
        for b in slices(self.examples, step):
            j = self.narrow(b.start, b.stop).dense()
            j = j if weight is None else j * weight
            k = j if other is self and weight is None else other.narrow(b.start, b.stop).dense()
            out[..., b] = torch.einsum("cbp,dbp->cdb", j.flatten(2), k.flatten(2))
        return out

    def of_cotangent(self, c: int) -> LayerJacobian:
        """The part of one cotangent."""
        return self.narrow(0, self.examples, c, c + 1)

    def _denses(self) -> Iterator[Tensor]:
        return (piece.dense() for _, _, piece in self.tiles())


def tiling(size: int, cotangents: int, examples: int, device: torch.device) -> Iterator[tuple[slice, slice]]:
    """Some cotangents and some examples at a time, such that as many things of ``size`` bytes fit a work array."""
    c = chunk_length(size, cotangents, device)
    b = chunk_length(size * c, examples, device) if c == cotangents else 1
    return ((some, others) for some in slices(cotangents, c) for others in slices(examples, b))


class Dense(LayerJacobian):
    """The Jacobian itself, for layers with few parameters.

    Args:
        j: The entries ``(C, B, *shape)``.
    """

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

    def prepared(self, examples: int) -> Dense:
        return self

    def add_inner(self, other: LayerJacobian, out: Tensor) -> None:
        if not isinstance(other, Dense):
            for d, e, two in other.tiles():  # each is made once
                out[:, :, e, d] += torch.einsum("cbp,dep->bced", self.j.flatten(2), two.dense().flatten(2))
            return
        x, y = (j.transpose(0, 1).flatten(2) for j in (self.j, other.j))
        out.view(len(x) * x.shape[1], -1).addmm_(x.flatten(0, 1), y.flatten(0, 1).T)
        return

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
