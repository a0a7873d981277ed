"""Eigenvalues, trace and density of the Hessian as PyHessian 0.1 does them."""

from __future__ import annotations

from collections.abc import Callable
from importlib import metadata
from math import inf
from typing import Any

import torch
from pyhessian import hessian
from settings import PROBES, STEPS, TOP, TRACE_PROBES, Task
from torch import Tensor, nn

from contenders._accuracy import cheapest

VERSION = metadata.version("pyhessian")
NOTES = {"hessian_trace": "other random vectors", "hessian_density": "other random vectors"}
LACKS: dict[str, set[str]] = {}


def _eig(matrix: Tensor, eigenvectors: bool) -> tuple[Tensor, Tensor]:
    """What torch had under this name, of a symmetric matrix: its density calls it."""
    values, vectors = torch.linalg.eigh(matrix)
    return torch.stack([values, torch.zeros_like(values)], 1), vectors


torch.eig = _eig  # type: ignore[assignment]


def _made(task: Task) -> Any:
    cuda = task.device.type == "cuda"
    if len(task.batches) == 1:  # whose graph it keeps
        return hessian(task.model, nn.CrossEntropyLoss(), data=task.batches[0], cuda=cuda)
    return hessian(task.model, nn.CrossEntropyLoss(), dataloader=task.batches, cuda=cuda)


def _trace(task: Task) -> Callable[[], float]:
    """Of all vectors: with a tolerance it stops when the mean happens to change little, or to be negative."""

    def run() -> float:
        found = _made(task).trace(maxIter=TRACE_PROBES, tol=-inf)
        return sum(found) / len(found)

    return run


def _top(task: Task) -> Callable[[], float]:
    """By power iteration with deflation."""

    def eigenvalues(setting: tuple[float, int]) -> Tensor:
        tol, most = setting
        return torch.tensor(_made(task).eigenvalues(maxIter=most, tol=tol, top_n=TOP)[0])

    tolerances = [3e-3, 1e-3, 3e-4, 1e-4, 3e-5, 1e-5, 3e-6, 1e-6]
    return cheapest(task, eigenvalues, [(tol, 2000) for tol in tolerances])


def _density(task: Task) -> Callable[[], float]:
    """The mean of it, from its nodes and weights."""

    def run() -> float:
        nodes, weights = (torch.tensor(part) for part in _made(task).density(iter=STEPS, n_v=PROBES))
        return float((nodes * weights).sum() / weights.sum())

    return run


JOBS: dict[str, Callable[[Task], Callable[[], Any]]] = {
    "hessian_trace": lambda task: _trace(task.trained()),
    "hessian_top": lambda task: _top(task.trained()),
    "hessian_density": lambda task: _density(task.trained()),
}


def fingerprint(task: Task, result: Any) -> float:
    """One number that tells a result from a wrong one."""
    return float(result)
