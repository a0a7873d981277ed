"""Parts of parameters as views of them have these, and the Jacobians of what is done with them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from math import prod
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from ..forms import LayerJacobian, Lazy, Outer, Placed, Transposed
from ..layercollection import Layer, Site


class Home(NamedTuple):
    """Where a collected parameter belongs: the module of its layer, and its position there."""

    site: Site
    layer: Layer
    position: int

    @property
    def shape(self) -> tuple[int, ...]:
        return self.layer.params[self.position][1]

    @property
    def start(self) -> int:
        """Where it is in the flat parameters of the layer."""
        return sum(prod(shape) for _, shape in self.layer.params[: self.position])

    def flat(self, j: Tensor, first: int) -> Tensor:
        """Derivatives in some entries of it ``(C, B, n)``, of which the first is given, in the packing of the layer."""
        out = j.new_zeros(*j.shape[:2], self.layer.numel())
        start = self.start + first
        out[..., start : start + j.shape[-1]] = j
        return self.layer.packing.pack(out)


@dataclass(frozen=True)
class Matrix:
    """A matrix ``(out, in)`` that is part of a parameter, whose first axis is its rows and all others are its columns.

    start: the first row and column. size: how many. crossed: whether the outputs are along the columns.
    """

    home: Home
    start: tuple[int, int]
    size: tuple[int, int]
    crossed: bool

    @classmethod
    def of(cls, t: Tensor, base: Tensor, home: Home) -> Matrix | None:
        """From a view of a parameter; None if it is no such part."""
        if t.ndim != 2 or base.ndim < 2 or not base.is_contiguous() or t.dtype != base.dtype or 0 in t.shape:
            return None
        rows, cols = base.shape[0], base[0].numel()
        start = divmod(_offset(t, base), cols)
        for crossed in (False, True):
            size = (t.shape[1], t.shape[0]) if crossed else (t.shape[0], t.shape[1])
            strides = (t.stride(1), t.stride(0)) if crossed else (t.stride(0), t.stride(1))
            fits = start[0] + size[0] <= rows and start[1] + size[1] <= cols
            if fits and all(n == 1 or a == b for n, a, b in zip(size, strides, (cols, 1), strict=True)):
                return cls(home, start, size, crossed)
        return None

    @property
    def turned(self) -> bool | None:
        """Whether the outputs are along the columns of the packing of its layer, instead of its rows; None if it is no
        part of that matrix.
        """
        crossed = self.home.layer.packing.crossed
        return None if self.home.position or crossed is None else crossed != self.crossed

    def form(self, gy: Tensor, x: Tensor, bias: bool) -> LayerJacobian:
        """From cotangents ``(C, B, ..., out)`` and inputs ``(B, ..., in)``. bias: whether one is added, in the same
        rows of the layer.
        """
        inputs = x.reshape(x.shape[0], -1, x.shape[-1])
        g = gy.reshape(*gy.shape[:2], -1, gy.shape[-1])
        if self.turned is None:
            return late(lambda g, x: self._entries(g, x), g, inputs, self.home.layer)
        (_, rows, cols), packing = self.home.layer.packing.shape, self.home.layer.packing
        row, col = reversed(self.start) if packing.crossed else self.start
        if self.turned:
            return Transposed(Outer(_among(inputs, row, rows).unsqueeze(2), _among(g, col, cols).unsqueeze(3)))
        inputs = _among(inputs, col, cols - packing.bias)
        if packing.bias:
            inputs = F.pad(inputs, (0, 1), value=float(bias))
        return Outer(inputs.unsqueeze(2), _among(g, row, rows).unsqueeze(3))

    def _entries(self, g: Tensor, x: Tensor) -> Tensor:
        return self.placed(torch.einsum("cbto,bti->cbio" if self.crossed else "cbto,bti->cboi", g, x))

    def placed(self, found: Tensor) -> Tensor:
        """Derivatives ``(C, B, rows, cols)`` of this part, in the packing of the layer."""
        shape = self.home.shape
        whole = found.new_zeros(*found.shape[:2], shape[0], prod(shape[1:]))
        (i, j), (m, n) = self.start, self.size
        whole[..., i : i + m, j : j + n] = found
        return self.home.flat(whole.flatten(2), 0)


@dataclass(frozen=True)
class Vector:
    """Consecutive entries of a parameter with one axis."""

    home: Home
    start: int
    size: int

    @classmethod
    def of(cls, t: Tensor, base: Tensor, home: Home) -> Vector | None:
        if t.ndim != 1 or base.ndim != 1 or t.stride(0) != 1 or base.stride(0) != 1 or t.dtype != base.dtype:
            return None
        return cls(home, _offset(t, base), len(t))

    @property
    def in_last_column(self) -> bool:
        """Whether it is the bias in the packing of a layer with one group."""
        packing, last = self.home.layer.packing, len(self.home.layer.params) - 1
        return packing.bias and packing.shape[0] == 1 and self.home.position == last > 0

    def form(self, gy: Tensor, x: Tensor) -> LayerJacobian:
        """The derivative of adding it, from cotangents ``(C, B, ..., size)``."""
        g = gy.reshape(*gy.shape[:2], -1, gy.shape[-1])
        if not self.in_last_column:
            return late(lambda g, _: self.home.flat(g.sum(2), self.start), g, g[0], self.home.layer)
        _, rows, cols = self.home.layer.packing.shape
        one = F.pad(g.new_zeros(cols - 1), (0, 1), value=1.0)
        return Outer(one.expand(g.shape[1], g.shape[2], 1, cols), _among(g, self.start, rows).unsqueeze(3))

    def belongs_to(self, matrix: Matrix) -> bool:
        """Whether it is the bias of the rows that a matrix is in."""
        row = matrix.start[1 if matrix.crossed else 0]
        return (
            self.home.layer is matrix.home.layer
            and self.in_last_column
            and matrix.turned is False
            and self.start == row
        )


@dataclass(frozen=True)
class Part:
    """Any entries of a parameter, as a view of it has them, that are combined entry by entry with what has examples.

    index: for each entry of the view which one of the parameter it is.
    """

    home: Home
    index: Tensor

    @classmethod
    def of(cls, t: Tensor, base: Tensor, home: Home) -> Part | None:
        if not base.is_contiguous() or t.dtype != base.dtype or 0 in t.shape:
            return None
        every = torch.arange(base.numel(), device=t.device)
        return cls(home, every.as_strided(t.shape, t.stride(), _offset(t, base)))

    def form(self, gy: Tensor, x: Tensor, times: bool = False) -> LayerJacobian:
        """From cotangents ``(C, B, ...)`` to the derivative of adding it to x ``(B, ...)``, or of multiplying it."""

        def entries(g: Tensor, x: Tensor) -> Tensor:
            g = g * x if times else g
            axes = g.ndim - 2
            shape = (1,) * (axes + 1 - self.index.ndim) + tuple(self.index.shape)
            summed = [k + 2 for k, size in enumerate(shape[1:]) if size == 1 and g.shape[k + 2] != 1]
            g = g.sum(summed, keepdim=True) if summed else g
            flat = g.new_zeros(*g.shape[:2], prod(self.home.shape))
            flat.index_add_(2, self.index.flatten(), g.flatten(2))
            return self.home.flat(flat, 0)

        return late(entries, gy, x, self.home.layer)

    def matrices(self, gy: Tensor, x: Tensor) -> LayerJacobian:
        """The same of matrices ``(groups, in, out)``, from cotangents ``(C, B, ..., groups, out)`` and inputs
        ``(B, ..., groups, in)``.
        """

        def placed(found: Tensor) -> Tensor:
            flat = found.new_zeros(*found.shape[:2], prod(self.home.shape))
            flat.index_add_(2, self.index.flatten(), found.mT.flatten(2))
            return self.home.flat(flat, 0)

        a, g = x.reshape(len(x), -1, *x.shape[-2:]), gy.reshape(*gy.shape[:2], -1, *gy.shape[-2:])
        return Placed(Outer(a, g), placed, self.home.layer.packing.shape)


def _offset(t: Tensor, base: Tensor) -> int:
    """Where a view begins in what it is a view of."""
    return int(t.storage_offset()) - int(base.storage_offset())


def _among(t: Tensor, first: int, size: int) -> Tensor:
    """Some entries along the last axis as all of them, of which the others are zero."""
    after = size - first - t.shape[-1]
    return F.pad(t, (first, after)) if first or after else t


def late(entries: Callable[[Tensor, Tensor], Tensor], g: Tensor, x: Tensor, layer: Layer) -> Lazy:
    """A Jacobian from cotangents ``(C, B, ...)`` and inputs ``(B, ...)``, made when it is asked for."""

    def compute(start: int, stop: int, first: int, last: int) -> Tensor:
        return entries(g[first:last, start:stop], x[start:stop])

    return Lazy(compute, g.shape[0], g.shape[1], layer.packing.shape, g.dtype, g.device)
