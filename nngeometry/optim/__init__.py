"""Training with the matrices of this library."""

from .damping import LevenbergMarquardt
from .refresh import Every, Refresh, Rotated, Scheduled, Stale, Turned
from .second_order import SecondOrderOptimizer

__all__ = [
    "Every",
    "LevenbergMarquardt",
    "Refresh",
    "Rotated",
    "Scheduled",
    "SecondOrderOptimizer",
    "Stale",
    "Turned",
]
