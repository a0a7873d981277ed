"""Structures of a matrix on one set of coordinates, and their common linear algebra."""

from .base import Block
from .composite import Compression, Product, Sum, add, matmul
from .dense import Dense
from .direct import DirectSum, Part
from .kron import AxisKron, Kron, NearestKron, nearest_product
from .lowrank import LowRank
from .operator import Operator, Rectangular
from .quasidiag import QuasiDiag
from .regul import Regul, Uniform, Varying
from .solver import Solver
from .spectral import Diag, Eye, Spectral

__all__ = [
    "AxisKron",
    "Block",
    "Compression",
    "Dense",
    "Diag",
    "DirectSum",
    "Eye",
    "Kron",
    "LowRank",
    "NearestKron",
    "Operator",
    "Part",
    "Product",
    "QuasiDiag",
    "Rectangular",
    "Regul",
    "Solver",
    "Spectral",
    "Sum",
    "Uniform",
    "Varying",
    "add",
    "matmul",
    "nearest_product",
]
