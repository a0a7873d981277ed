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
    """Where a collected parameter belongs: the module of its layer, and its position there.

    slope: by what the derivative of what was made of it, entry by entry, is that in itself, in its flat order; None for
    the parameter.
    """

    site: Site
    layer: Layer
    position: int
    slope: Tensor | None = None

    @property
    def shape(self) -> tuple[int, ...]:
        return self.layer.params[self.position][1]

    @property
    def start(self) -> int:
        """Where it is in the flat parameters of the layer."""
        return sum(prod(shape) for _, shape in self.layer.params[: self.position])

    @property
    def number(self) -> float | None:
        """The slope, if it is the same everywhere."""
        if self.slope is None:
            return 1.0
        return float(self.slope[0]) if bool((self.slope == self.slope[0]).all()) else None

    def flat(self, j: Tensor, first: int = 0, step: int = 1) -> Tensor:
        """Derivatives in some entries of it ``(C, B, n)``, of which the first is given, in the packing of the layer."""
        out = j.new_zeros(*j.shape[:2], self.layer.numel())
        own = out[..., self.start : self.start + prod(self.shape)]
        own[..., _every(first, step, j.shape[-1])] = j
        if self.slope is not None:
            own *= self.slope
        return self.layer.packing.pack(out)


@dataclass(frozen=True)
class Matrix:
    """A matrix ``(out, in)`` that is part of a parameter, whose first axis is its rows and all others are its columns.

    start: the first row and column. size: how many. step: from one to the next. crossed: whether the outputs are along
    the columns.
    """

    home: Home
    start: tuple[int, int]
    size: tuple[int, int]
    step: tuple[int, int]
    crossed: bool

    @classmethod
    def of(cls, t: Tensor, base: Tensor, home: Home) -> Matrix | None:
        """From a view of a parameter; None if it is no such part."""
        if t.ndim != 2 or len(home.shape) < 2 or not base.is_contiguous() or t.dtype != base.dtype or 0 in t.shape:
            return None
        whole = home.shape[0], prod(home.shape[1:])
        first = divmod(_offset(t, base), whole[1])
        for crossed in (False, True):
            m, n = (t.shape[1], t.shape[0]) if crossed else (t.shape[0], t.shape[1])
            a, b = (t.stride(1), t.stride(0)) if crossed else (t.stride(0), t.stride(1))
            step, rest = divmod(a, whole[1]) if m > 1 else (1, 0)
            steps = step, b if n > 1 else 1
            each = zip(first, (m, n), steps, whole, strict=True)
            if not rest and all(s > 0 and k + s * (size - 1) < most for k, size, s, most in each):
                return cls(home, first, (m, n), steps, crossed)
        return None

    @property
    def turned(self) -> bool | None:
        """Whether the outputs are along the columns of the packing of its layer, instead of its rows; None if it is no
        part of that matrix.
        """
        crossed = self.home.layer.packing.crossed
        if self.home.position or crossed is None or self.home.number is None:
            return None
        return crossed != self.crossed

    def form(self, gy: Tensor, x: Tensor, bias: bool) -> LayerJacobian:
        """From cotangents ``(C, B, ..., out)`` and inputs ``(B, ..., in)``. bias: whether one is added, in the same
        rows of the layer.
        """
        inputs = x.reshape(x.shape[0], -1, x.shape[-1])
        g = gy.reshape(*gy.shape[:2], -1, gy.shape[-1])
        if self.turned is None:
            return late(lambda g, x: self._entries(g, x), g, inputs, self.home.layer)
        g = g if self.home.slope is None else g * (self.home.number or 0.0)
        (_, rows, cols), packing = self.home.layer.packing.shape, self.home.layer.packing
        row, col = list(zip(self.start, self.step, strict=True))[:: -1 if packing.crossed else 1]
        if self.turned:
            return Transposed(Outer(_among(inputs, *row, rows).unsqueeze(2), _among(g, *col, cols).unsqueeze(3)))
        inputs = _among(inputs, *col, cols - packing.bias)
        if packing.bias:
            inputs = F.pad(inputs, (0, 1), value=float(bias))
        return Outer(inputs.unsqueeze(2), _among(g, *row, rows).unsqueeze(3))

    def _entries(self, g: Tensor, x: Tensor) -> Tensor:
        return self.placed(torch.einsum("cbto,bti->cbio" if self.crossed else "cbto,bti->cboi", g, x))

    def placed(self, found: Tensor) -> Tensor:
        """Derivatives ``(C, B, rows, cols)`` of this part, in the packing of the layer."""
        shape = self.home.shape
        whole = found.new_zeros(*found.shape[:2], shape[0], prod(shape[1:]))
        rows, cols = (_every(*of) for of in zip(self.start, self.step, self.size, strict=True))
        whole[..., rows, cols] = found
        return self.home.flat(whole.flatten(2))


@dataclass(frozen=True)
class Vector:
    """Entries of a parameter with one axis, from a first one on, with a step."""

    home: Home
    start: int
    size: int
    step: int

    @classmethod
    def of(cls, t: Tensor, base: Tensor, home: Home) -> Vector | None:
        if t.ndim != 1 or len(home.shape) != 1 or not base.is_contiguous() or t.dtype != base.dtype:
            return None
        step = t.stride(0) if len(t) > 1 else 1
        return cls(home, _offset(t, base), len(t), step) if step > 0 else None

    @property
    def in_last_column(self) -> bool:
        """Whether it is the bias in the packing of a layer with one group."""
        packing, last = self.home.layer.packing, len(self.home.layer.params) - 1
        return packing.bias and packing.shape[0] == 1 and self.home.position == last > 0

    def form(self, gy: Tensor, x: Tensor, times: bool = False) -> LayerJacobian:
        """From cotangents ``(C, B, ..., size)`` to the derivative of adding it to x ``(B, ..., size)``, or of
        multiplying it.
        """
        if not self.in_last_column:

            def entries(g: Tensor, x: Tensor) -> Tensor:
                g = (g * x if times else g).reshape(*g.shape[:2], -1, self.size).sum(2)
                return self.home.flat(g, self.start, self.step)

            return late(entries, gy, x, self.home.layer)
        g = (gy * x if times else gy).reshape(*gy.shape[:2], -1, self.size)
        if self.home.slope is not None:
            g = g * self.home.slope[_every(self.start, self.step, self.size)]
        _, rows, cols = self.home.layer.packing.shape
        one = F.pad(g.new_zeros(cols - 1), (0, 1), value=1.0)
        g = _among(g, self.start, self.step, rows)
        return Outer(one.expand(g.shape[1], g.shape[2], 1, cols), g.unsqueeze(3))

    def belongs_to(self, matrix: Matrix) -> bool:
        """Whether it is the bias of the rows that a matrix is in."""
        axis = 1 if matrix.crossed else 0
        return (
            self.home.layer is matrix.home.layer
            and self.home.slope is matrix.home.slope is None
            and self.in_last_column
            and matrix.turned is False
            and (self.start, self.step) == (matrix.start[axis], matrix.step[axis])
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
            return self.home.flat(flat)

        return late(entries, gy, x, self.home.layer)

    def matrices(self, gy: Tensor, x: Tensor) -> LayerJacobian:
        """The same of matrices ``(groups, in, out)``, from cotangents ``(C, B, ..., groups, out)`` and inputs
        ``(B, ..., groups, in)``.
        """

        def placed(found: Tensor) -> Tensor:
            flat = found.new_zeros(*found.shape[:2], prod(self.home.shape))
            flat.index_add_(2, self.index.flatten(), found.mT.flatten(2))
            return self.home.flat(flat)

        a, g = x.reshape(len(x), -1, *x.shape[-2:]), gy.reshape(*gy.shape[:2], -1, *gy.shape[-2:])
        return Placed(Outer(a, g), placed, self.home.layer.packing.shape)


def _offset(t: Tensor, base: Tensor) -> int:
    """Where a view begins in what it is a view of."""
    return int(t.storage_offset()) - int(base.storage_offset())


def _every(first: int, step: int, count: int) -> slice:
    return slice(first, first + step * count, step)


def _among(t: Tensor, first: int, step: int, size: int) -> Tensor:
    """Some entries along the last axis as all of them, of which the others are zero."""
    if t.shape[-1] == size:
        return t
    out = t.new_zeros(*t.shape[:-1], size)
    out[..., _every(first, step, t.shape[-1])] = t
    return out


def late(entries: Callable[[Tensor, Tensor], Tensor], g: Tensor, x: Tensor, layer: Layer) -> Lazy:
    """A Jacobian from cotangents ``(C, B, ...)`` and inputs ``(B, ...)``, made when it is asked for."""

    def compute(start: int, stop: int, first: int, last: int) -> Tensor:
        return entries(g[first:last, start:stop], x[start:stop])

    return Lazy(compute, g.shape[0], g.shape[1], layer.packing.shape, g.dtype, g.device)
