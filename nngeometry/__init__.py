"""The geometry of neural networks: Fisher information and gradient covariance matrices under one linear algebra."""

from .generator import Generator
from .hessian import GGN, FiniteDifference, Hessian
from .kinds import kind, whole
from .layercollection import Layer, LayerCollection
from .likelihood import Bernoulli, Categorical, Gaussian, Likelihood, Poisson
from .memory import memory_budget
from .metrics import FIM, EmpiricalFisher, FIM_MonteCarlo, GradientCovariance
from .object import (
    FVector,
    PFMapDense,
    PMat,
    PMatBlockDiag,
    PMatDense,
    PMatDiag,
    PMatEKFAC,
    PMatEye,
    PMatImplicit,
    PMatKFAC,
    PMatLowRank,
    PMatMixed,
    PMatQuasiDiag,
    PVector,
    Relative,
    random_pvector,
)

__version__ = "0.1.0"

__all__ = [
    "FIM",
    "GGN",
    "Bernoulli",
    "Categorical",
    "EmpiricalFisher",
    "FIM_MonteCarlo",
    "FVector",
    "FiniteDifference",
    "Gaussian",
    "Generator",
    "GradientCovariance",
    "Hessian",
    "Layer",
    "LayerCollection",
    "Likelihood",
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
    "Poisson",
    "Relative",
    "kind",
    "memory_budget",
    "random_pvector",
    "whole",
]
