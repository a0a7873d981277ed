"""Training with checkpoints, averages of weights, and nets for small images."""

from ..objective import Measured, recompute_batch_norm
from . import zoo
from .averaging import SWA, SWAG
from .checkpoint import checkpoints, load_checkpoint, weights
from .history import History
from .loop import evaluate, train

__all__ = [
    "SWA",
    "SWAG",
    "History",
    "Measured",
    "checkpoints",
    "evaluate",
    "load_checkpoint",
    "recompute_batch_norm",
    "train",
    "weights",
    "zoo",
]
