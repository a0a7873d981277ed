"""Every test and every example in a docstring starts from the same seed, on one thread."""

from importlib.util import find_spec

import pytest
import torch

#: Modules that need a library which is not installed have no examples to run.
collect_ignore_glob = [] if find_spec("laplace") else ["nngeometry/integrations/laplace.py"]

torch.set_num_threads(1)


def pytest_addoption(parser):
    parser.addoption("--device", help="where the tests make their models and tensors, e.g. cuda")
    parser.addoption(
        "--moments", type=int, default=6, help="at how many moments tests of the state interrupt each call, at most"
    )


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)
