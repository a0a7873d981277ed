"""An update of a running KFAC as asdfghjkl 0.1a5 (ASDL) does it, without the gradient of the loss that it can make on
the way."""

from __future__ import annotations

from collections.abc import Callable
from importlib import metadata
from typing import Any

import torch
from asdl import FISHER_MC, KfacGradientMaker, PreconditioningConfig
from settings import DECAY, Task
from torch.nn import functional as F

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


JOBS: dict[str, Callable[[Task], Callable[[], Any]]] = {"accumulator_update": _update}


def fingerprint(task: Task, result: Any) -> float:
    """One number that tells a result from a wrong one."""
    return float(result)
