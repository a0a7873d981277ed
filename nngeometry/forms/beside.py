"""Several linear maps of one layer side by side."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from math import prod

import torch
from torch import Tensor

from .base import LayerJacobian, Map
from .outer import Outer


@dataclass(frozen=True)
class LinearMap:
    """One of them: its form, and where its weight and its bias start in the flat parameters. It may have several groups
    if it has no bias, whose weights follow one another.
    """

    form: Outer
    weight: int
    bias: int | None

    def put(self, m: Tensor, out: Tensor) -> None:
        """From its packed shape ``(..., groups, rows, cols)`` into flat parameters ``(..., p)``."""
        if self.bias is not None:
            out[..., self.bias : self.bias + m.shape[-2]] = m[..., 0, :, -1]
            m = m[..., :-1]
        out[..., self.weight : self.weight + prod(m.shape[-3:])] = m.flatten(-3)

    def take(self, v: Tensor) -> Tensor:
        """The inverse of :meth:`put`."""
        groups, rows, cols = self.form.shape
        size = groups * rows * (cols - (self.bias is not None))
        m = v[..., self.weight : self.weight + size].unflatten(-1, (groups, rows, -1))
        if self.bias is None:
            return m
        return torch.cat([m, v[..., self.bias : self.bias + rows].view(*m.shape[:-1], 1)], -1)


class Beside(LayerJacobian):
    """The Jacobians of several linear maps, in the flat parameters of one layer, all of which they have between them.

    Args:
        maps: The maps.
        numel: How many parameters the layer has.
    """

    def __init__(self, maps: Sequence[LinearMap], numel: int) -> None:
        one = maps[0].form
        super().__init__(one.cotangents, one.examples, (numel,), one.dtype, one.device)
        self.maps = tuple(maps)

    def _each(self, change: Callable[[Outer], Outer]) -> Beside:
        return Beside([replace(m, form=change(m.form)) for m in self.maps], self.shape[0])

    def _flat(self, lead: Sequence[int], of: Callable[[LinearMap], Tensor]) -> Tensor:
        out = torch.empty(*lead, *self.shape, dtype=self.dtype, device=self.device)
        for m in self.maps:
            m.put(of(m), out)
        return out

    def dense(self) -> Tensor:
        return self._flat((self.cotangents, self.examples), lambda m: m.form.dense())

    def narrow(self, start: int, stop: int, first: int = 0, last: int | None = None) -> Beside:
        return self._each(lambda f: f.narrow(start, stop, first, last))

    def fold(self, ratio: int) -> Beside:
        return self._each(lambda f: f.fold(ratio))

    def square(self) -> Tensor:
        return self._flat((), lambda m: m.form.square())

    def total(self) -> Tensor:
        return self._flat((), lambda m: m.form.total())

    def sqnorm(self) -> Tensor:
        return torch.stack([m.form.sqnorm() for m in self.maps]).sum(0)

    def dot(self, V: Tensor) -> Tensor:
        return torch.stack([m.form.dot(m.take(V)) for m in self.maps]).sum(0)

    def pull(self, u: Tensor) -> Tensor:
        return self._flat((len(u),), lambda m: m.form.pull(u))

    def map_cotangents(self, fn: Map) -> Beside:
        return self._each(lambda f: f.map_cotangents(fn))

    def to(self, device: torch.device | str | None = None, dtype: torch.dtype | None = None) -> Beside:
        return self._each(lambda f: f.to(device, dtype))

    def nbytes(self) -> int:
        return sum(m.form.nbytes() for m in self.maps)

    def dense_is_cheaper(self, examples: int) -> bool:
        return any(m.form.dense_is_cheaper(examples) for m in self.maps)

    def add_inner(self, other: LayerJacobian, out: Tensor) -> None:
        if not isinstance(other, Beside):
            return super().add_inner(other, out)
        for one, two in zip(self.maps, other.maps, strict=True):
            one.form.add_inner(two.form, out)
        return None

    def add_traced(self, other: LayerJacobian, out: Tensor) -> None:
        if not isinstance(other, Beside):
            return super().add_traced(other, out)
        for one, two in zip(self.maps, other.maps, strict=True):
            one.form.add_traced(two.form, out)
        return None


@dataclass(frozen=True)
class RoutedMap:
    """A linear map of several experts, each with the tokens that are routed to it.

    tokens: for each expert which ones, ascending. a: their inputs ``(n, cols)``. g: their cotangents ``(C, n, rows)``.
    weight: where the weights of the experts, one after the other, start in the flat parameters.
    """

    tokens: Sequence[Tensor]
    a: Sequence[Tensor]
    g: Sequence[Tensor]
    weight: int

    def maps(self, examples: int, ratio: int) -> list[LinearMap]:
        """One for each expert, of examples that are ``ratio`` consecutive tokens: its positions are those of the
        example that has most tokens there.
        """
        found, start = [], self.weight
        for tokens, a, g in zip(self.tokens, self.a, self.g, strict=True):
            example = tokens // ratio
            counts = torch.bincount(example, minlength=examples)
            position = torch.arange(len(tokens), device=tokens.device) - (counts.cumsum(0) - counts)[example]
            most = max(1, int(counts.max()))
            inputs = a.new_zeros(examples, most, 1, a.shape[-1])
            inputs[example, position, 0] = a
            outputs = g.new_zeros(len(g), examples, most, 1, g.shape[-1])
            outputs[:, example, position, 0] = g
            share = len(tokens) / (examples * most) or 1.0
            found.append(LinearMap(Outer(inputs, outputs, filled=(share,)), start, None))
            start += a.shape[-1] * g.shape[-1]
        return found


class Routed(LayerJacobian):
    """The Jacobian of experts whose examples are tokens, until it is known which of these are of one example: then it
    is that of linear maps :class:`Beside` each other.

    Args:
        maps: The linear maps.
        tokens: How many tokens there are.
        numel: How many parameters the layer has.
    """

    def __init__(self, maps: Sequence[RoutedMap], tokens: int, numel: int) -> None:
        one = maps[0].g[0]
        super().__init__(len(one), tokens, (numel,), one.dtype, one.device)
        self.maps = tuple(maps)

    def fold(self, ratio: int) -> Beside:
        examples = self.examples // ratio
        return Beside([m for one in self.maps for m in one.maps(examples, ratio)], self.shape[0])

    def dense(self) -> Tensor:
        return self.fold(1).dense()

    def narrow(self, start: int, stop: int, first: int = 0, last: int | None = None) -> Beside:
        return self.fold(1).narrow(start, stop, first, last)
