"""The names of NNGeometry (0.2, 0.3, 0.4 and main) that this library spells otherwise: its programs run unchanged.

:func:`install` attaches them to the classes and modules of the library. Nothing else imports this package, apart from
the import paths ``maths``, ``utils``, ``backend`` and ``solve``, which hold nothing of their own.
"""

from __future__ import annotations

import functools
import sys

import torch  # noqa: F401  (the examples below use it)
from torch import nn  # noqa: F401

from .. import gram, hessian, jacobian, metrics
from . import coordinates, function_space, layout, matrices, mixed, sources
from .names import attach, warn
from .sources import DummyGenerator, TorchFuncHessianBackend, TorchFuncJacobianBackend, TorchHooksJacobianBackend
from .tools import cg, display_correl, get_n_parameters, grad, kronecker

__all__ = [
    "DummyGenerator",
    "TorchFuncHessianBackend",
    "TorchFuncJacobianBackend",
    "TorchHooksJacobianBackend",
    "cg",
    "display_correl",
    "get_n_parameters",
    "grad",
    "install",
    "kronecker",
    "warn",
]

#: Modules inside of what are modules here; all of them hold the names of backends.
_DEEP_PATHS = (
    "generator.jacobian",
    "generator.jacobian.grads_conv",
    "generator.dummy",
    "backend.dummy",
    "backend.torch_hooks",
    "backend.torch_hooks.torch_hooks",
    "backend.torch_hooks.grads_conv",
    "backend.torch_func_hessian",
    "backend.torch_func_jacobian",
)
#: The examples of functions that stand wrapped in their modules, for doctest to find.
__test__ = {
    "FIM": metrics.FIM.__doc__ or "",
    "FIM_MonteCarlo": metrics.FIM_MonteCarlo.__doc__ or "",
    "Hessian": hessian.Hessian.__doc__ or "",
    "GramMatrix": gram.GramMatrix.__doc__ or "",
    **{f.__name__: f.__doc__ or "" for f in (metrics.EmpiricalFisher, metrics.GradientCovariance, hessian.GGN)},
    "Jacobian": jacobian.Jacobian.__doc__ or "",
}


@functools.cache
def install() -> None:
    """Attach the old names. It is done once, by ``import nngeometry``."""
    for part in (coordinates, layout, sources, matrices, mixed, function_space):
        part.install()
    package = sys.modules[__package__.rpartition(".")[0]]
    attach(
        package,
        FIM=metrics.FIM,
        FIM_MonteCarlo=metrics.FIM_MonteCarlo,
        GradientSecondMoment=sources.GradientSecondMoment,
        Hessian=hessian.Hessian,
        GramMatrix=gram.GramMatrix,
    )
    attach(sys.modules[f"{package.__name__}.generator"], jacobian=sources)
    for path in _DEEP_PATHS:
        sys.modules[f"{package.__name__}.{path}"] = sources
