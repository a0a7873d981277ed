"""Regularisation in units of the matrix itself."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Relative:
    """A regularisation of ``factor`` times the mean eigenvalue (of the matrix, or of a layer's block when given for
    a layer).

    >>> Relative(1e-3)
    Relative(factor=0.001)
    """

    factor: float
