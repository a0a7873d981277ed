"""Algorithms on a matrix that is known by its products alone."""

from .base import Estimate, Solution, gaussian, rademacher, sphere
from .cg import cg
from .krylov import lsmr, minres, neumann
from .lanczos import Eigenpairs, Krylov, eigsh, funm, lanczos
from .quadrature import Density, Quadrature, slq
from .sketch import LowRank, nystrom, nystrom_preconditioner, randomised_eigh
from .traces import hutchinson, hutchinson_diag, hutchpp, xdiag, xnystrace, xtrace

__all__ = [
    "Density",
    "Eigenpairs",
    "Estimate",
    "Krylov",
    "LowRank",
    "Quadrature",
    "Solution",
    "cg",
    "eigsh",
    "funm",
    "gaussian",
    "hutchinson",
    "hutchinson_diag",
    "hutchpp",
    "lanczos",
    "lsmr",
    "minres",
    "neumann",
    "nystrom",
    "nystrom_preconditioner",
    "rademacher",
    "randomised_eigh",
    "slq",
    "sphere",
    "xdiag",
    "xnystrace",
    "xtrace",
]
