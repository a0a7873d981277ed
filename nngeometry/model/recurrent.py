"""Recurrent layers by kernels that have derivatives."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.utils.hooks import RemovableHandle

from ..changes import Borrowed


def recurrent_without_cudnn(model: nn.Module) -> Borrowed:
    """A context in which the recurrent layers of a model run by torch's own kernels: those of cuDNN have no derivative
    in eval mode, and no second one at all.
    """

    def change() -> Callable[[], Any]:
        found, before = torch.backends.cudnn.enabled, []

        def enter(module: nn.Module, args: Any) -> None:
            before.append(torch.backends.cudnn.enabled)
            torch.backends.cudnn.enabled = False

        def leave(module: nn.Module, args: Any, output: Any) -> None:
            torch.backends.cudnn.enabled = before.pop()

        hooks: list[RemovableHandle] = []

        def undo() -> None:
            while hooks:
                hooks.pop().remove()
            torch.backends.cudnn.enabled = found  # a layer may have raised in between

        try:
            for layer in (m for m in model.modules() if isinstance(m, nn.RNNBase)):
                hooks.append(layer.register_forward_pre_hook(enter))
                hooks.append(layer.register_forward_hook(leave))
        except BaseException:
            undo()
            raise
        return undo

    return Borrowed(change)
