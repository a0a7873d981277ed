"""Jacobians that are computed when they are asked for."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor

from ..changes import unrecorded
from .base import LayerJacobian, Map


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
        def compute(start: int, stop: int, first: int, last: int) -> Tensor:
            with context():
                return self.compute(start, stop, first, last)

        return Lazy(compute, self.cotangents, self.examples, self.shape, self.dtype, self.device, self.origin)

    @property
    def on_demand(self) -> bool:
        return True

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


class Placed(Lazy):
    """Another Jacobian, whose entries are put elsewhere when they are asked for.

    Args:
        of: The other one.
        place: From its entries ``(C, B, *of.shape)`` to ``(C, B, *shape)``.
        shape: Of one of its rows.
    """

    def __init__(self, of: LayerJacobian, place: Map, shape: tuple[int, ...]) -> None:
        def compute(start: int, stop: int, first: int, last: int) -> Tensor:
            return place(of.narrow(start, stop, first, last).dense())

        super().__init__(compute, of.cotangents, of.examples, shape, of.dtype, of.device)
        self.of = of
        self.place = place

    def fold(self, ratio: int) -> Placed:
        return Placed(self.of.fold(ratio), self.place, self.shape)
