"""Kernels of torch and transformers that have forward derivatives, for contenders that leave that to their user."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from settings import Task
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel

Job = Callable[[Task], Callable[[], Any]]


def with_forward_derivatives(job: Job) -> Job:
    """The job with such kernels. Gradients, which are timed beside it, have those that are fastest."""

    def prepare(task: Task) -> Callable[[], Any]:
        with _kernels(task.model):
            run = job(task)

        def inside() -> Any:
            with _kernels(task.model):
                return run()

        return inside

    return prepare


@contextmanager
def _kernels(model: nn.Module) -> Iterator[None]:
    """No fused attention, no LSTM of oneDNN, no grouped products of experts."""
    with ExitStack() as stack:
        if any(isinstance(m, nn.MultiheadAttention) for m in model.modules()):
            stack.enter_context(sdpa_kernel(SDPBackend.MATH))
            stack.callback(torch.backends.mha.set_fastpath_enabled, torch.backends.mha.get_fastpath_enabled())
            torch.backends.mha.set_fastpath_enabled(False)
        if any(isinstance(m, nn.RNNBase) for m in model.modules()):
            stack.enter_context(torch.backends.mkldnn.flags(enabled=False))
        for m in model.modules():
            if hasattr(m, "set_experts_implementation"):
                stack.callback(m.set_experts_implementation, m.get_experts_implementation())
                m.set_experts_implementation("eager")
        yield
