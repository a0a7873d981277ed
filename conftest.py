"""Every test and every example in a docstring starts from the same seed, on one thread."""

import pytest
import torch

torch.set_num_threads(1)


def pytest_addoption(parser):
    parser.addoption("--device", help="where the tests make their models and tensors, e.g. cuda")
    parser.addoption(
        "--moments", type=int, default=6, help="at how many moments tests of the state interrupt each call, at most"
    )


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)
