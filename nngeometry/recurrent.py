"""Recurrent layers by kernels that have derivatives."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn


@contextmanager
def recurrent_without_cudnn(model: nn.Module) -> Iterator[None]:
    """Have the recurrent layers of a model run by torch's own kernels: those of cuDNN have no derivative in eval mode,
    and no second one at all.
    """
    found, before = torch.backends.cudnn.enabled, []

    def enter(module: nn.Module, args: Any) -> None:
        before.append(torch.backends.cudnn.enabled)
        torch.backends.cudnn.enabled = False

    def leave(module: nn.Module, args: Any, output: Any) -> None:
        torch.backends.cudnn.enabled = before.pop()

    layers = [m for m in model.modules() if isinstance(m, nn.RNNBase)]
    hooks = [h for m in layers for h in (m.register_forward_pre_hook(enter), m.register_forward_hook(leave))]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()
        if before:  # a layer has raised
            torch.backends.cudnn.enabled = found
