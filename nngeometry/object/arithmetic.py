"""Sums and multiples, the same for all linear maps."""

from __future__ import annotations

from typing import Any, Self

from .. import arguments


class VectorSpace:
    """``+``, ``-``, and ``*``, ``/`` with a number, of objects that know their linear combinations."""

    #: What to write instead of an operation that has no meaning.
    _remedy = "a linear map is added to one of its kind and multiplied with a number"
    __array_ufunc__ = None  # numpy leaves operators to this class, and does not take it for an entry of an array

    def _combined(self, other: Any, weight: float) -> Any:
        """``self + weight other``, or NotImplemented if other is of another kind."""
        raise NotImplementedError

    def _scaled(self, c: float) -> Any:
        """``c self``."""
        raise NotImplementedError

    def __add__(self, other: Any) -> Any:
        return self._unless_unfit(self._combined(other, 1.0), "+", other)

    def __radd__(self, other: Any) -> Any:
        if isinstance(other, int) and other == 0:  # sum() starts from 0
            return self
        found = self._combined(other, 1.0)
        return arguments.refuse("+", other, self, self._remedy) if found is NotImplemented else found

    def __sub__(self, other: Any) -> Any:
        return self._unless_unfit(self._combined(other, -1.0), "-", other)

    def __rsub__(self, other: Any) -> Any:
        found = (-self)._combined(other, 1.0)
        return arguments.refuse("-", other, self, self._remedy) if found is NotImplemented else found

    def __mul__(self, c: Any) -> Any:
        factor = arguments.scalar(c)
        return arguments.unfit("*", self, c, self._remedy) if factor is None else self._scaled(factor)

    def __rmul__(self, c: Any) -> Any:
        factor = arguments.scalar(c)
        return arguments.refuse("*", c, self, self._remedy) if factor is None else self._scaled(factor)

    def __truediv__(self, c: Any) -> Any:
        divisor = arguments.scalar(c)
        if divisor is None:
            return arguments.unfit("/", self, c, self._remedy)
        if divisor == 0:
            raise ZeroDivisionError(f"{arguments.described(self)} / 0: divide by another number")
        return self._scaled(1 / divisor)

    def __rtruediv__(self, other: Any) -> Any:
        arguments.refuse("/", other, self, self._remedy)

    def __pow__(self, other: Any) -> Any:
        return arguments.unfit("**", self, other, self._remedy)

    def __rpow__(self, other: Any) -> Any:
        arguments.refuse("**", other, self, self._remedy)

    def __rmatmul__(self, other: Any) -> Any:
        arguments.refuse("@", other, self, self._remedy)

    def _unless_unfit(self, found: Any, sign: str, other: Any) -> Any:
        """A result, unless there is none for the other side."""
        return arguments.unfit(sign, self, other, self._remedy) if found is NotImplemented else found

    def __neg__(self) -> Self:
        negative: Self = self * -1.0
        return negative
