"""Import path of NNGeometry."""

from .legacy import cg

__all__ = ["cg"]
