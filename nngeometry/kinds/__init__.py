"""Layer kinds: for each type of module, how what its hooks saw becomes a form of its Jacobian."""

from . import affine, generic, norm
from .kind import GENERIC, Kind, Packing, kind, kind_of, whole

__all__ = ["GENERIC", "Kind", "Packing", "affine", "generic", "kind", "kind_of", "norm", "whole"]
