"""Vectors, maps and matrices in parameter space."""

from .implicit import PMatImplicit
from .map import PFMapDense
from .pmat import PMat, Relative
from .representations import (
    PMatBlockDiag,
    PMatDense,
    PMatDiag,
    PMatEKFAC,
    PMatEye,
    PMatKFAC,
    PMatLowRank,
    PMatMixed,
    PMatQuasiDiag,
)
from .vector import FVector, PVector, random_pvector

__all__ = [
    "FVector",
    "PFMapDense",
    "PMat",
    "PMatBlockDiag",
    "PMatDense",
    "PMatDiag",
    "PMatEKFAC",
    "PMatEye",
    "PMatImplicit",
    "PMatKFAC",
    "PMatLowRank",
    "PMatMixed",
    "PMatQuasiDiag",
    "PVector",
    "Relative",
    "random_pvector",
]
