"""Regularisation in units of the matrix itself."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from .. import arguments


@dataclass(frozen=True)
class Relative:
    """A regularisation of ``factor`` times the mean eigenvalue (of the matrix, or of a layer's block when given for
    a layer).

    >>> Relative(1e-3)
    Relative(factor=0.001)
    """

    factor: float


def regul_number(what: str, regul: Any, mean: float) -> float:
    """What a regularisation is as a number; mean: the mean eigenvalue, which ``Relative`` is in units of.

    Raises ``TypeError`` or ``ValueError``, naming what it is, if that is no finite number.
    """
    if isinstance(regul, type):
        raise TypeError(f"{what}: expected a number or Relative(factor), got {arguments.described(regul)}")
    if isinstance(regul, Relative):
        return arguments.number(f"{what}: the factor of Relative", regul.factor) * mean
    return arguments.number(what, regul)
