"""Import path of NNGeometry."""

from .legacy import display_correl, get_n_parameters, grad

__all__ = ["display_correl", "get_n_parameters", "grad"]
