"""Vectors, maps and matrices in parameter space and in function space."""

from . import estimators
from .fspace import FMat, FMatDense, FMatImplicit
from .implicit import PMatImplicit
from .kernel_storage import FMatMemmap
from .map import PFMap, PFMapDense, PFMapFactored, PFMapImplicit
from .moving import at
from .pmat import PMat
from .regul import Relative
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
    "FMat",
    "FMatDense",
    "FMatImplicit",
    "FMatMemmap",
    "FVector",
    "PFMap",
    "PFMapDense",
    "PFMapFactored",
    "PFMapImplicit",
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
    "at",
    "estimators",
    "random_pvector",
]
