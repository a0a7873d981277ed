"""Elastic weight consolidation as Avalanche writes it: the squared gradient of the mean loss of each minibatch, and a
sum over parameters.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from settings import Task
from torch import Tensor
from torch.nn import functional as F

VERSION = torch.__version__
NOTES = {
    "ewc_consolidate": "the squared gradient of minibatches, not of examples",
    "ewc_penalty": "by the squared gradient of minibatches, not of examples",
}
LACKS: dict[str, set[str]] = {}


def _importances(task: Task) -> list[Tensor]:
    found = [torch.zeros_like(p) for p in task.parameters]
    for x, y in task.batches:
        loss = F.cross_entropy(task.model(x), y)
        for total, g in zip(found, torch.autograd.grad(loss, task.parameters), strict=True):
            total += g.square()
    return [total / len(task.batches) for total in found]


def _consolidate(task: Task) -> Callable[[], float]:
    def consolidate() -> float:
        held = _importances(task), [w.detach().clone() for w in task.parameters]
        return float(len(held[0]) == len(held[1]))

    return consolidate


def _penalty(task: Task) -> Callable[[], float]:
    importances, before = _importances(task), [p.detach().clone() for p in task.parameters]
    with torch.no_grad():
        for p in task.parameters:
            p += 0.01

    def step() -> float:
        every = zip(importances, task.parameters, before, strict=True)
        penalty = sum((f * (p - w).square()).sum() for f, p, w in every) / 2
        torch.autograd.grad(penalty, task.parameters)
        return float(penalty)

    return step


JOBS: dict[str, Callable[[Task], Callable[[], Any]]] = {"ewc_consolidate": _consolidate, "ewc_penalty": _penalty}


def fingerprint(task: Task, result: Any) -> float:
    """One number that tells a result from a wrong one."""
    return float(result)
