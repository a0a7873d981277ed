"""Ten steps of training with torch's Adam, the floor of what such steps cost."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from settings import Task

from contenders._training import ten_steps

VERSION = torch.__version__
NOTES: dict[str, str] = {}
LACKS: dict[str, set[str]] = {}


def _ten_steps(task: Task) -> Callable[[], Any]:
    optimiser = torch.optim.Adam(task.parameters, lr=0.0)
    return ten_steps(task.model, task.batches[0], optimiser)


JOBS: dict[str, Callable[[Task], Callable[[], Any]]] = {
    "ten_steps": _ten_steps,
    "ten_steps_seldom": _ten_steps,
}


def fingerprint(task: Task, result: Any) -> float:
    """One number that tells a result from a wrong one."""
    return float(result)
