"""Sums and multiples, the same for all linear maps."""

from __future__ import annotations

from typing import Any, Self

from torch import Tensor


class VectorSpace:
    """``+``, ``-``, and ``*``, ``/`` with a number, of objects that know their linear combinations."""

    def _combined(self, other: Any, weight: float) -> Any:
        """``self + weight other``, or NotImplemented if other is of another kind."""
        raise NotImplementedError

    def _scaled(self, c: float) -> Any:
        """``c self``."""
        raise NotImplementedError

    def __add__(self, other: Any) -> Any:
        return self._combined(other, 1.0)

    def __radd__(self, other: Any) -> Any:
        return self if isinstance(other, int) and other == 0 else self._combined(other, 1.0)  # sum() starts from 0

    def __sub__(self, other: Any) -> Any:
        return self._combined(other, -1.0)

    def __rsub__(self, other: Any) -> Any:
        return (-self)._combined(other, 1.0)

    def __mul__(self, c: Any) -> Any:
        if isinstance(c, int | float) or (isinstance(c, Tensor) and c.ndim == 0):
            return self._scaled(float(c))
        return NotImplemented

    __rmul__ = __mul__

    def __truediv__(self, c: Any) -> Any:
        return self * (1 / c)

    def __neg__(self) -> Self:
        negative: Self = self * -1.0
        return negative
