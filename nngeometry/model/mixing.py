"""Whether what is a gradient of one example is one of no other.

Where examples are apart, a weight on an example's cotangent is one on its gradients, and on nothing else.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ..changes import unrecorded
from .evaluator import APART, MIXED, tolerance
from .recording import Call, Layout
from .refused import Refused


def powers(f: Tensor) -> Tensor:
    """A weight for each row, other ones for its neighbours: powers of two, which change no rounding.

    >>> powers(torch.zeros(5, 2))
    tensor([1.0000, 0.5000, 0.1250, 0.0156, 0.2500])
    """
    k = torch.arange(len(f), device=f.device)
    return torch.exp2(-((k * (k + 1) // 2 + k // 16) % 8).to(f.dtype))


def every_other(f: Tensor) -> Tensor:
    """The weight one for every other row, beginning with the second, and zero for the rest."""
    return (torch.arange(len(f), device=f.device) % 2).to(f.dtype)


def weighted(t: Tensor, weights: Tensor) -> Tensor:
    """With weights along the first axis.

    >>> weighted(torch.ones(2, 3), torch.tensor([0.0, 2.0]))
    tensor([[0., 0., 0.],
            [2., 2., 2.]])
    """
    return t * weights.view(-1, *[1] * (t.ndim - 1)).to(t.dtype)


@unrecorded
def check_apart(
    calls: Sequence[Call],
    layouts: Sequence[Layout | None],
    grads: Sequence[Tensor | None],
    of_weighted: Sequence[Tensor | None],
    weights: Tensor,
) -> None:
    """Raise, naming the layer, unless examples are apart.

    grads, of_weighted: the gradients in all outputs of all calls of some cotangent, and of the same with weights for
    the examples.
    """
    pairs = iter(zip(grads, of_weighted, strict=True))
    for call, layout in zip(calls, layouts, strict=True):
        for k, y in enumerate(call.outputs):
            g, other = next(pairs)
            if g is None or other is None or layout is None or layout.each or not layout.used[k] or g.numel() == 0:
                continue
            axis = layout.outputs[k] or 0
            g, other = (t.reshape(y.shape).movedim(axis, 0) for t in (g, other))
            if not _is_weighted(g, other, weights):
                raise Refused(
                    [call.site.name],
                    f"{call.what}: the output for one example depends on the others, so per-example derivatives are "
                    f"undefined. {MIXED}",
                    APART,
                )


def _is_weighted(t: Tensor, other: Tensor, weights: Tensor) -> bool:
    """Whether ``other`` is t with weights, each for as many rows: nothing where they are zero, and elsewhere up to
    rounding. What is not a number says nothing.
    """
    if len(t) % len(weights):
        return False
    t, other = (x.unflatten(0, (len(weights), -1)) for x in (t, other))
    if other[weights == 0].any():
        return False
    wrong = weighted(t, weights).sub_(other).abs_()
    return not bool(wrong.max() > tolerance(t.dtype) * t.abs().max())
