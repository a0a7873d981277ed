"""Steps of training, the same for all optimisers of torch."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from settings import CYCLE, Batch
from torch import Tensor, nn
from torch.nn import functional as F


def ten_steps(
    model: nn.Module, batch: Batch, optimiser: torch.optim.Optimizer, observe: Callable[[Batch], Any] | None = None
) -> Callable[[], Tensor]:
    """On one minibatch. observe: what the optimiser is shown before each."""
    x, y = batch

    def steps() -> Tensor:
        for _ in range(CYCLE):
            optimiser.zero_grad()
            loss = F.cross_entropy(model(x), y)
            loss.backward()
            if observe is not None:
                observe(batch)
            optimiser.step()
        return loss.detach()

    return steps
