"""Vector-Jacobian products of torch's autograd, one or several at a time."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor


def pull(
    outputs: Sequence[Tensor], inputs: Sequence[Any], weights: Sequence[Tensor], batched: bool
) -> list[Tensor | None]:
    """Gradients of ``sum_j weights_j[k] . outputs_j`` with respect to every input, for each k, with the graph retained.

    inputs: tensors or gradient edges. weights: ``(K, *output)`` each. batched: all k at once. Returns ``(K, *input)``
    each, None for an input that the outputs do not depend on. Raises ``RuntimeError`` from an operation that has no
    batching rule.
    """
    k = len(weights[0])
    options: dict[str, Any] = {"retain_graph": True, "allow_unused": True}
    if k == 1:
        one = torch.autograd.grad(outputs, inputs, [w[0] for w in weights], **options)
        return [None if g is None else g.unsqueeze(0) for g in one]
    if not batched:
        each = [torch.autograd.grad(outputs, inputs, list(one), **options) for one in zip(*weights, strict=True)]
        return [None if gs[0] is None else torch.stack(gs) for gs in zip(*each, strict=True)]
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="There is a performance drop")
        return list(torch.autograd.grad(outputs, inputs, list(weights), is_grads_batched=True, **options))
