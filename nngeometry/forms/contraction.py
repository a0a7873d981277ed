"""The dense matrix of layers without positions, at a cost that does not grow with cotangents."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate
from math import prod

import torch
from torch import Tensor

from ..memory import chunk_length, slices
from .base import ColumnViews, LayerJacobian
from .outer import Outer


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

    def matrix(self, places: Sequence[ColumnViews]) -> Tensor:
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
            for index, of_rows in places[m](block):  # (P, h, p, columns)
                for others, place in places[k](of_rows.movedim(0, -1)):  # (h, p, columns, g, o, others)
                    place.copy_(packed[index][(..., *others)].reshape(place.shape))  # type: ignore[index]
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
