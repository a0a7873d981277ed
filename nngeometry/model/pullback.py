"""The way back through a model, from its output to the outputs of the calls of its layers.

What a layer computes once for all examples, as a table of biases that is added to the attention of each, has one
gradient for each of them. Where it comes in by a sum or a product that is the gradient in the result, times a factor
and summed over the axes that are broadcast, without a sum over examples.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import GradientEdge

from .operations_apart import Shared, reached, recorded_apart
from .recording import Call, Layout

#: From edges and a cotangent for each example ``(C, B, *outputs)`` to the gradients in the edges, ``(C, *shape)``.
Pull = Callable[[Sequence[GradientEdge], Tensor], Sequence[Tensor | None]]

#: From a node and the number of an input to what a gradient in the result is times to be one in that input, entry by
#: entry, None if that is one.
_SLOPES: dict[str, Callable[[Any, int], Any]] = {
    "AddBackward0": lambda node, k: node._saved_alpha if k and node._saved_alpha != 1 else None,
    "SubBackward0": lambda node, k: -node._saved_alpha if k else None,
    "MulBackward0": lambda node, k: (node._saved_self if k else node._saved_other).detach().conj(),
    "ExpandBackward0": lambda node, k: None,
}


class Pullback:
    """From the output of a model to what was recorded of it.

    f: the output. calls: those. layouts: where the examples are in them, nothing as long as that is not known.
    """

    def __init__(self, f: Tensor, calls: Sequence[Call], layouts: Sequence[Layout | None] = ()) -> None:
        self._own = [e for c in calls for e in c.edges]
        alone = [layout is not None and layout.each for c, layout in zip(calls, layouts, strict=False) for _ in c.edges]
        #: Which edges are of what the examples have in common, and are to have the gradient of each.
        self._common = [k for k, each in enumerate(alone) if each]
        self._junctions: list[_Junction] | None = []
        if self._common:
            self._junctions = junctions(f, [self._own[k] for k in self._common])
        there = set(self._common) if self.once else set()
        self._kept = [k for k in range(len(self._own)) if k not in there]

    @property
    def once(self) -> bool:
        """Whether what is pulled to :attr:`edges` is enough."""
        return self._junctions is not None

    @property
    def edges(self) -> list[GradientEdge]:
        """What has to be pulled to."""
        return [*(self._own[k] for k in self._kept), *(j.result for j in self._junctions or ())]

    def gradients(self, pulled: Sequence[Tensor | None], s: Tensor, pull: Pull) -> list[Tensor | None]:
        """Gradients in all outputs of calls, ``(C, *shape)``; in those that the examples have in common of each,
        ``(C, B, *shape)``.

        pulled: the gradients in :attr:`edges`. s: the cotangents, ``(C, B, *outputs)``. pull: what else is needed.
        """
        found: list[Tensor | None] = [None] * len(self._own)
        for k, g in zip(self._kept, pulled[: len(self._kept)], strict=True):
            found[k] = g
        if self._common:
            common = [self._own[k] for k in self._common]
            each = (
                _one_by_one(common, s, pull)
                if self._junctions is None
                else _met(common, self._junctions, pulled[len(self._kept) :], s.shape[1])
            )
            for k, g in zip(self._common, each, strict=True):
                found[k] = g
        return found


def _one_by_one(common: Sequence[GradientEdge], s: Tensor, pull: Pull) -> list[Tensor | None]:
    """As many pulls as there are examples."""
    of_each: list[Sequence[Tensor | None]] = []
    for b in range(s.shape[1]):
        if not s[:, b].any():  # a look at one example among others
            of_each.append([None] * len(common))
            continue
        alone = torch.zeros_like(s)
        alone[:, b] = s[:, b]
        of_each.append(pull(common, alone))
    return [_stacked(several, 1) for several in zip(*of_each, strict=True)]


@dataclass(frozen=True)
class _Junction:
    """An operation that takes what is alike for all examples, its result, and the derivative of that."""

    shared: Shared
    result: GradientEdge
    slope: Any

    def of_each(self, g: Tensor, examples: int) -> Tensor:
        """From the gradient in the result, ``(C, *shape)``, to those of each example in what is taken,
        ``(C, B, *shape)``.
        """
        axis, runs, taken = self.shared.axis, self.shared.runs, _metadata(self.shared.taken)
        g = (g if self.slope is None else g * self.slope).unflatten(1 + axis, (runs, examples, -1))
        g = g.movedim(2 + axis, 1).flatten(2 + axis, 3 + axis)
        front = g.ndim - 2 - len(taken.shape)
        g = g.sum(tuple(range(2, 2 + front))) if front else g
        once = tuple(k for k, size in enumerate(taken.shape, 2) if size == 1 and g.shape[k] > 1)
        g = g.sum(once, keepdim=True) if once else g
        return (g.real if g.is_complex() and not taken.dtype.is_complex else g).to(taken.dtype)


def junctions(f: Tensor, common: Sequence[GradientEdge]) -> list[_Junction] | None:
    """Where what is computed of some edges, which is alike for all examples, is taken on the way to ``f``, whose rows
    these are; None if it is not known that it is alike, or taken by something else than sums and products.
    """
    apart, ends = recorded_apart(f, len(f)), {(e.node, e.output_nr) for e in common}
    if apart is None or not ends.isdisjoint(apart.met):
        return None
    found = []
    for shared in apart.shared:
        if ends.isdisjoint(reached([shared.taken])):
            continue
        slope = _SLOPES.get(shared.node.name())
        if slope is None:
            return None
        found.append(_Junction(shared, GradientEdge(shared.node, 0, None), slope(shared.node, shared.position)))
    return found


def _met(
    common: Sequence[GradientEdge], at: Sequence[_Junction], pulled: Sequence[Tensor | None], examples: int
) -> list[Tensor | None]:
    """The gradients of each example in what they have in common, from those in the results of what takes it."""
    there = [(j, g) for j, g in zip(at, pulled, strict=True) if g is not None]
    if not there:
        return [None] * len(common)
    ends = [GradientEdge(*j.shared.taken, None) for j, _ in there]
    each = [j.of_each(g, examples) for j, g in there]
    rows = [
        [
            torch.autograd.grad(ends, common, [g[c, b] for g in each], retain_graph=True, allow_unused=True)
            for b in range(examples)
        ]
        for c in range(len(each[0]))
    ]
    of_cotangents = [[_stacked(several, 0) for several in zip(*row, strict=True)] for row in rows]
    return [_stacked(several, 0) for several in zip(*of_cotangents, strict=True)]


def _stacked(several: Sequence[Tensor | None], axis: int) -> Tensor | None:
    """Along a new axis, with zeros for what is not there; None if nothing is."""
    one = next((g for g in several if g is not None), None)
    return None if one is None else torch.stack([torch.zeros_like(one) if g is None else g for g in several], axis)


def _metadata(one: tuple[Any, int]) -> Any:
    return one[0]._input_metadata[one[1]]
