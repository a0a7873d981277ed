"""Import path of NNGeometry."""

from .legacy import DummyGenerator, TorchFuncHessianBackend, TorchFuncJacobianBackend, TorchHooksJacobianBackend

__all__ = ["DummyGenerator", "TorchFuncHessianBackend", "TorchFuncJacobianBackend", "TorchHooksJacobianBackend"]
