"""Eigenvalues, trace and density of the Hessian as hessian-eigenthings 1.0.0a5 does them."""

from __future__ import annotations

from collections.abc import Callable
from importlib import metadata
from typing import Any

from hessian_eigenthings import HessianOperator, lanczos, spectral_density, supervised_loss, trace
from settings import PROBES, STEPS, TOP, TRACE_PROBES, Task
from torch import Tensor
from torch.nn import functional as F

from contenders._accuracy import cheapest

VERSION = metadata.version("hessian-eigenthings")
NOTES = {"hessian_trace": "other random vectors", "hessian_density": "other random vectors"}
LACKS: dict[str, set[str]] = {}


def _operator(task: Task) -> Any:
    """It takes the mean over minibatches, of which the last one has fewer examples: so each gets its share."""
    share = len(task.batches) / task.examples

    def loss(f: Tensor, y: Tensor) -> Tensor:
        return share * F.cross_entropy(f, y, reduction="sum")

    return HessianOperator(task.model, task.batches, supervised_loss(loss))


def _trace(task: Task) -> Callable[[], float]:
    options: dict[str, Any] = {"num_matvecs": TRACE_PROBES, "method": "hutchinson", "seed": 0}
    return lambda: float(trace(_operator(task), **options).estimate)


def _top(task: Task) -> Callable[[], float]:
    """By Lanczos, whose number of steps it is told."""

    def eigenvalues(steps: int) -> Tensor:
        size = sum(p.numel() for p in task.parameters)
        return lanczos(_operator(task), k=TOP, max_iter=min(steps, size), reorthogonalize=True, seed=0).eigenvalues

    return cheapest(task, eigenvalues, [6, 8, 10, 12, 14, 16, 20, 24, 28, 32, 40, 48, 64, 96, 128])


def _density(task: Task) -> Callable[[], float]:
    """The mean of it, from its nodes and weights."""

    def run() -> float:
        found = spectral_density(_operator(task), num_runs=PROBES, lanczos_steps=STEPS, seed=0)
        nodes, weights = found.raw_eigenvalues.nan_to_num(), found.raw_weights
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
