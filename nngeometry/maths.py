"""Import path of NNGeometry."""

from .legacy import kronecker

__all__ = ["kronecker"]
