"""Jacobians of a weight that is used in several ways: as its transpose too, or to look up rows and to multiply."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager

import torch
from torch import Tensor

from .base import Dense, LayerJacobian, Map
from .gather import Gather
from .moments import total_of
from .outer import Outer


class Transposed(LayerJacobian):
    """A Jacobian whose rows are the columns of another one: of ``F.linear(x, weight)`` where the layer packs the
    transpose of its weight, as a table of embeddings does.

    Args:
        of: The other one, whose packed shape is ``(groups, rows, cols)``.
    """

    def __init__(self, of: LayerJacobian) -> None:
        groups, rows, cols = of.shape
        super().__init__(of.cotangents, of.examples, (groups, cols, rows), of.dtype, of.device)
        self.of = of

    def dense(self) -> Tensor:
        return self.of.dense().mT

    def narrow(self, start: int, stop: int, first: int = 0, last: int | None = None) -> Transposed:
        return Transposed(self.of.narrow(start, stop, first, last))

    def fold(self, ratio: int) -> Transposed:
        return Transposed(self.of.fold(ratio))

    def square(self) -> Tensor:
        return self.of.square().mT

    def total(self) -> Tensor:
        return self.of.total().mT

    def sqnorm(self) -> Tensor:
        return self.of.sqnorm()

    def dot(self, V: Tensor) -> Tensor:
        return self.of.dot(V.mT)

    def pull(self, u: Tensor) -> Tensor:
        return self.of.pull(u).mT

    @property
    def rotates(self) -> bool:
        return self.of.rotates

    def rotate(self, left: Map | None, right: Map | None) -> Transposed:
        return Transposed(self.of.rotate(right, left))

    def weighted(self, w: Tensor) -> Transposed:
        return Transposed(self.of.weighted(w.mT))

    def to(self, device: torch.device | str | None = None, dtype: torch.dtype | None = None) -> Transposed:
        return Transposed(self.of.to(device, dtype))

    def map_cotangents(self, fn: Map) -> Transposed:
        return Transposed(self.of.map_cotangents(fn))

    def within(self, context: Callable[[], AbstractContextManager[None]]) -> Transposed:
        return Transposed(self.of.within(context))

    @property
    def on_demand(self) -> bool:
        return self.of.on_demand

    def columns(self, ids: Tensor) -> Tensor:
        if isinstance(self.of, Outer):
            return torch.einsum("btr,cbtn->cbrn", self.of.a[:, :, 0], self.of.g[:, :, :, 0][..., ids])
        if isinstance(self.of, Dense):
            return self.of.j[:, :, 0, ids].mT
        return super().columns(ids)

    def nbytes(self) -> int:
        return self.of.nbytes()

    def dense_is_cheaper(self, examples: int) -> bool:
        return self.of.dense_is_cheaper(examples)

    def add_inner(self, other: LayerJacobian, out: Tensor) -> None:
        if not isinstance(other, Transposed):
            return super().add_inner(other, out)
        return self.of.add_inner(other.of, out)

    def add_traced(self, other: LayerJacobian, out: Tensor) -> None:
        if not isinstance(other, Transposed):
            return super().add_traced(other, out)
        return self.of.add_traced(other.of, out)

    def columns_factor(self, reduce: bool) -> Tensor:
        """The diagonal of the sum of what is multiplied from the right, ``(G, cols)``, over cotangents, examples and
        positions (or of the sum over positions).
        """
        assert isinstance(self.of, Outer)
        g = self.of.g.sum(2, keepdim=True) if reduce else self.of.g
        return g.square().sum((0, 1, 2))


class Sum(LayerJacobian):
    """The sum of Jacobians of one packed shape, each in its own form.

    Args:
        parts: Those.
    """

    def __init__(self, parts: Sequence[LayerJacobian]) -> None:
        one = parts[0]
        super().__init__(one.cotangents, one.examples, one.shape, one.dtype, one.device)
        self.parts = tuple(parts)

    def _each(self, change: Callable[[LayerJacobian], LayerJacobian]) -> Sum:
        return Sum([change(part) for part in self.parts])

    def dense(self) -> Tensor:
        return total_of(part.dense() for part in self.parts)

    def narrow(self, start: int, stop: int, first: int = 0, last: int | None = None) -> Sum:
        return self._each(lambda part: part.narrow(start, stop, first, last))

    def fold(self, ratio: int) -> Sum:
        return self._each(lambda part: part.fold(ratio))

    def total(self) -> Tensor:
        return total_of(part.total() for part in self.parts)

    def dot(self, V: Tensor) -> Tensor:
        return total_of(part.dot(V) for part in self.parts)

    def pull(self, u: Tensor) -> Tensor:
        return total_of(part.pull(u) for part in self.parts)

    @property
    def rotates(self) -> bool:
        return all(part.rotates for part in self.parts)

    def rotate(self, left: Map | None, right: Map | None) -> Sum:
        return self._each(lambda part: part.rotate(left, right))

    def weighted(self, w: Tensor) -> Sum:
        return self._each(lambda part: part.weighted(w))

    def to(self, device: torch.device | str | None = None, dtype: torch.dtype | None = None) -> Sum:
        return self._each(lambda part: part.to(device, dtype))

    def map_cotangents(self, fn: Map) -> Sum:
        return self._each(lambda part: part.map_cotangents(fn))

    def within(self, context: Callable[[], AbstractContextManager[None]]) -> Sum:
        return self._each(lambda part: part.within(context))

    @property
    def on_demand(self) -> bool:
        return any(part.on_demand for part in self.parts)

    def columns(self, ids: Tensor) -> Tensor:
        return total_of(part.columns(ids) for part in self.parts)

    def nbytes(self) -> int:
        return sum(part.nbytes() for part in self.parts)

    def dense_is_cheaper(self, examples: int) -> bool:
        return any(part.dense_is_cheaper(examples) for part in self.parts)

    def add_inner(self, other: LayerJacobian, out: Tensor) -> None:
        for part in self.parts:
            for another in other.parts if isinstance(other, Sum) else (other,):
                if isinstance(another, Gather) and not isinstance(part, Gather):  # which knows what it looks up
                    turned = torch.zeros_like(out.permute(2, 3, 0, 1))
                    another.add_inner(part, turned)
                    out += turned.permute(2, 3, 0, 1)
                else:
                    part.add_inner(another, out)
