"""Layer kinds: for each type of module, how what its hooks saw becomes a form of its Jacobian."""

from . import affine, attention, experts, generic, norm
from .kind import GENERIC, Kind, Packing, declared_whole, is_ours, kind, kind_of, own_parameters, serving, whole

__all__ = [
    "GENERIC",
    "Kind",
    "Packing",
    "affine",
    "attention",
    "declared_whole",
    "experts",
    "generic",
    "is_ours",
    "kind",
    "kind_of",
    "norm",
    "own_parameters",
    "serving",
    "whole",
]
