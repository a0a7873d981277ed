"""The names of NNGeometry (0.2, 0.3, 0.4 and main) that this library spells otherwise: its programs run unchanged.

:func:`install` adds them to the classes and modules of the library, where it replaces nothing: arguments that are spelt
otherwise are taken by the signatures themselves. Nothing else imports this package, apart from the import paths
``maths``, ``utils``, ``backend`` and ``solve``, which hold nothing of their own.
"""

from __future__ import annotations

import functools
import sys

from ..spelling import warn
from . import coordinates, function_space, matrices, sources
from .names import attach
from .sources import (
    DummyGenerator,
    TorchFuncHessianBackend,
    TorchFuncJacobianBackend,
    TorchHooksJacobianBackend,
)
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


@functools.cache
def install() -> None:
    """Attach the old names. It is done once, by ``import nngeometry``."""
    for part in (coordinates, sources, matrices, function_space):
        part.install()
    package = sys.modules[__package__.rpartition(".")[0]]
    attach(package, GradientSecondMoment=sources.GradientSecondMoment)
    attach(sys.modules[f"{package.__name__}.generator"], jacobian=sources)
    for path in _DEEP_PATHS:
        sys.modules[f"{package.__name__}.{path}"] = sources
