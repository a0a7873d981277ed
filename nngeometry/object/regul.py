"""Regularisation in units of the matrix itself."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from .. import arguments


@dataclass(frozen=True)
class Relative:
    """A regularisation in units of the mean eigenvalue of the matrix, or of a layer's block when given for a layer.

    Args:
        factor: How many times the mean eigenvalue it is.

    Example:
        >>> Relative(1e-3)
        Relative(factor=0.001)
    """

    factor: float


def regul_number(what: str, regul: Any, mean: float) -> float:
    """What a regularisation is as a number.

    Args:
        what: What asks for it, for the message.
        regul: A number or :class:`Relative`.
        mean: The mean eigenvalue, which ``Relative`` is in units of.

    Raises:
        TypeError: If it is neither.
        ValueError: If it is not finite.
    """
    if isinstance(regul, type):
        raise TypeError(f"{what}: expected a number or Relative(factor), got {arguments.described(regul)}")
    if isinstance(regul, Relative):
        return arguments.number(f"{what}: the factor of Relative", regul.factor) * mean
    return arguments.number(what, regul)
