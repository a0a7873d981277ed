"""The geometry of neural networks: Fisher information and gradient covariance matrices under one linear algebra."""

from .accumulator import Accumulator
from .generator import Generator, rowwise
from .gram import GramMatrix
from .hessian import GGN, FiniteDifference, GGN_MonteCarlo, Hessian
from .influence import Influence
from .jacobian import Jacobian
from .kinds import kind, whole
from .layercollection import Layer, LayerCollection
from .legacy import install as _install
from .likelihood import Bernoulli, Categorical, Gaussian, Likelihood, Poisson
from .losses import OutputLoss, OwnLoss, TokenCrossEntropy
from .memory import memory_budget
from .metrics import FIM, EmpiricalFisher, FIM_MonteCarlo, GradientCovariance
from .object import (
    FMat,
    FMatDense,
    FMatImplicit,
    FMatMemmap,
    FVector,
    PFMap,
    PFMapDense,
    PFMapFactored,
    PFMapImplicit,
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
    at,
    estimators,
    random_pvector,
)
from .posterior import Posterior

__version__ = "0.1.0"

__all__ = [
    "FIM",
    "GGN",
    "Accumulator",
    "Bernoulli",
    "Categorical",
    "EmpiricalFisher",
    "FIM_MonteCarlo",
    "FMat",
    "FMatDense",
    "FMatImplicit",
    "FMatMemmap",
    "FVector",
    "FiniteDifference",
    "GGN_MonteCarlo",
    "Gaussian",
    "Generator",
    "GradientCovariance",
    "GramMatrix",
    "Hessian",
    "Influence",
    "Jacobian",
    "Layer",
    "LayerCollection",
    "Likelihood",
    "OutputLoss",
    "OwnLoss",
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
    "Poisson",
    "Posterior",
    "Relative",
    "TokenCrossEntropy",
    "at",
    "estimators",
    "kind",
    "memory_budget",
    "random_pvector",
    "rowwise",
    "whole",
]

_install()
