"""Training with the matrices of this library."""

from .damping import LevenbergMarquardt
from .ivon import IVON
from .refresh import Every, Refresh, Rotated, Scheduled, Stale, Turned
from .second_order import SecondOrderOptimizer
from .swats import SWATS
from .variational import VIOptimizer

__all__ = [
    "IVON",
    "SWATS",
    "Every",
    "LevenbergMarquardt",
    "Refresh",
    "Rotated",
    "Scheduled",
    "SecondOrderOptimizer",
    "Stale",
    "Turned",
    "VIOptimizer",
]
