"""An update of a running KFAC as asdfghjkl 0.1a5 (ASDL) does it, without the gradient of the loss that it can make on
the way; and steps of training, with it."""

from __future__ import annotations

from collections.abc import Callable
from importlib import metadata
from typing import Any

import torch
from asdl import FISHER_MC, KfacGradientMaker, PreconditioningConfig
from settings import CYCLE, DAMPING, DECAY, Task
from torch.nn import functional as F

if not torch.cuda.is_available():  # it marks what it does for NVIDIA's profiler, which other builds of torch lack
    torch.cuda.nvtx.range_push = lambda *args, **options: 0
    torch.cuda.nvtx.range_pop = lambda: 0

VERSION = metadata.version("asdfghjkl")
NOTES = {
    "accumulator_update": "other random labels; weight and bias together; statistics of norms as well, if there are"
}
LACKS: dict[str, set[str]] = {}


def _update(task: Task) -> Callable[[], Any]:
    x, y = task.batches[0]
    norms = [m for m in task.model.modules() if m not in task.layers.values()]
    config = PreconditioningConfig(data_size=len(x), ema_decay=1 - DECAY, ignore_modules=norms)
    maker = KfacGradientMaker(task.model, config, fisher_type=FISHER_MC)

    def update() -> Any:
        maker.setup_loss_call(F.cross_entropy, maker.setup_model_call(task.model, x), y)
        maker._scale_fisher(DECAY)
        maker.delegate_forward_and_backward(
            maker.fisher_maker, data_size=len(x), scale=1 - DECAY, accumulate=True, calc_loss_grad=False
        )
        return torch.stack([m.fisher.kron.A.sum() for m in task.layers.values()]).sum()

    update()
    return update


def _ten_steps(interval: int) -> Callable[[Task], Callable[[], Any]]:
    """interval: in how many steps there are statistics."""

    def prepare(task: Task) -> Callable[[], Any]:
        x, y = task.batches[0]
        norms = [m for m in task.model.modules() if m not in task.layers.values()]
        config = PreconditioningConfig(
            data_size=len(x),
            damping=DAMPING,
            ema_decay=1 - DECAY,
            curvature_upd_interval=interval,
            preconditioner_upd_interval=CYCLE,
            ignore_modules=norms,
        )
        maker = KfacGradientMaker(task.model, config, fisher_type=FISHER_MC)
        optimiser = torch.optim.SGD(task.model.parameters(), lr=0.0, momentum=0.9)

        def steps() -> Any:
            for _ in range(CYCLE):
                optimiser.zero_grad()
                maker.setup_loss_call(F.cross_entropy, maker.setup_model_call(task.model, x), y)
                _, loss = maker.forward_and_backward()
                optimiser.step()
            return loss.detach()

        return steps

    return prepare


JOBS: dict[str, Callable[[Task], Callable[[], Any]]] = {
    "accumulator_update": _update,
    "ten_steps": _ten_steps(1),
    "ten_steps_seldom": _ten_steps(CYCLE),
}


def fingerprint(task: Task, result: Any) -> float:
    """One number that tells a result from a wrong one."""
    return float(result)
