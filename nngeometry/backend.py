"""Import path of NNGeometry."""

from .legacy import TorchFuncHessianBackend, TorchHooksJacobianBackend

__all__ = ["TorchFuncHessianBackend", "TorchHooksJacobianBackend"]
