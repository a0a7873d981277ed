"""An update of singd 0.0.5 (dense structures): the gradient of the loss with its hooks, the update of the inverse
factors, which are what it keeps, and a step of length zero with them. Statistics and inverses are one there, so that it
has both in each of ten steps, or in the first alone."""

from __future__ import annotations

from collections.abc import Callable
from copy import deepcopy
from importlib import metadata
from typing import Any

from settings import CYCLE, DAMPING, DECAY, Task
from singd.optim.optimizer import SINGD
from torch.nn import functional as F

from contenders._training import ten_steps

VERSION = metadata.version("singd")
NOTES = {"accumulator_update": "the empirical Fisher matrix, on the way of the gradient; it and a step are in the cost"}
LACKS: dict[str, set[str]] = {}


def _update(task: Task) -> Callable[[], Any]:
    x, y = task.batches[0]
    model = deepcopy(task.model)  # whose hooks are not to be in the gradients that are the unit
    optimiser = SINGD(model, lr=0.0, momentum=0.0, T=1, warn_unsupported=False)

    def update() -> Any:
        optimiser.zero_grad()
        loss = F.cross_entropy(model(x), y)
        loss.backward()
        optimiser.step()
        return loss.detach()

    update()
    return update


def _ten_steps(interval: int) -> Callable[[Task], Callable[[], Any]]:
    """interval: in how many steps there are statistics, and inverses with them."""

    def prepare(task: Task) -> Callable[[], Any]:
        model = deepcopy(task.model)
        optimiser = SINGD(
            model,
            lr=0.0,
            momentum=0.9,
            damping=DAMPING,
            lr_cov=1 - DECAY,
            T=interval,
            warn_unsupported=False,
        )

        return ten_steps(model, task.batches[0], optimiser)

    return prepare


JOBS: dict[str, Callable[[Task], Callable[[], Any]]] = {
    "accumulator_update": _update,
    "ten_steps": _ten_steps(1),
    "ten_steps_seldom": _ten_steps(CYCLE),
}


def fingerprint(task: Task, result: Any) -> float:
    """One number that tells a result from a wrong one."""
    return float(result)
