"""Training with the matrices of this library."""

from .ivon import IVON
from .swats import SWATS
from .variational import VIOptimizer

__all__ = ["IVON", "SWATS", "VIOptimizer"]
