"""Import path of NNGeometry."""

from .legacy import display_correl, grad

__all__ = ["display_correl", "grad"]
