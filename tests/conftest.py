"""Every test runs in float64, on the device that is asked for."""

import sys
from functools import partial
from pathlib import Path

import pytest
import torch
from torch.overrides import TorchFunctionMode
from torch.utils._device import _device_constructors

from nngeometry import memory

TESTS = Path(__file__).resolve().parent
LIBRARY = TESTS.parent / "nngeometry"
#: Of the library, but called by tests to make something from nothing.
MAKERS = {"random_pvector", "random_pvector_dict", "random_fvector"}
LAYERS = LIBRARY / "layers.py"
#: Functions of random numbers.
RANDOM = {torch.randn, torch.rand, torch.randint, torch.randperm, torch.normal}
RANDOM_IN_PLACE = {torch.Tensor.uniform_, torch.Tensor.normal_}


class On(TorchFunctionMode):
    """Tensors that tests make without saying where are on a device, with the same random numbers (those of RANDOM) on
    all of them. Those that the library makes are not: what it forgets to put where the model is stays where torch puts
    it.
    """

    def __init__(self, device):
        super().__init__()
        self.device = torch.device(device)

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if func in RANDOM_IN_PLACE and _in_tests():
            return args[0].copy_(func(args[0].detach().cpu(), *args[1:], **kwargs))
        if func not in _device_constructors() or kwargs.get("device") is not None or not _in_tests():
            return func(*args, **kwargs)
        if func in RANDOM:
            grad = kwargs.pop("requires_grad", False)
            return func(*args, **kwargs).to(self.device).requires_grad_(grad)
        return func(*args, **{**kwargs, "device": self.device})


def _in_tests():
    """Whether the innermost call that is ours is that of a test."""
    frame = sys._getframe(2)
    while frame is not None:
        where = Path(frame.f_code.co_filename)
        passed_on = frame.f_code.co_name in MAKERS or frame.f_code.co_name == "__torch_function__" or where == LAYERS
        if LIBRARY in where.parents and not passed_on:
            return False
        if where.parent == TESTS:
            return True
        frame = frame.f_back
    return False


def pytest_configure(config):
    if config.getoption("--device"):
        On(config.getoption("--device")).__enter__()  # for the whole run, that of the modules included
        config.addinivalue_line("filterwarnings", "ignore:Attempting to run cuBLAS")  # as threads do that are the first


@pytest.fixture
def cut(monkeypatch):
    """``cut(grain)``: have the work of a test cut into other pieces than those of its device."""
    return partial(monkeypatch.setitem, memory._GRAINS, torch.empty(0).device.type)


@pytest.fixture(autouse=True)
def _float64():
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(before)


#: What is a part of the name of tests that a release of torch before 2.7 cannot pass, and why.
BEFORE_2_7 = {
    "instancenorm2d": "instance norm in eval mode writes its running statistics back, and is refused as a model that "
    "changes its buffers",
    "test_pooling_minibatches_and_several_vectors": "grid_sample has no second derivative",
    "test_a_module_raises[checkpoints": "an exception in a checkpoint that runs again is replaced by torch's own",
}


def pytest_collection_modifyitems(items):
    if tuple(map(int, torch.__version__.split(".")[:2])) < (2, 7):
        for item in items:
            for name, reason in BEFORE_2_7.items():
                if name in item.name:
                    item.add_marker(pytest.mark.skip(reason=f"torch before 2.7: {reason}"))
