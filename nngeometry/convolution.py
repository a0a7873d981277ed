"""Convolutions whose derivative is as cheap to differentiate as it is linear, which torch's own is not."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

_FUNCTIONS: dict[Any, tuple[int, bool]] = {
    torch.conv1d: (1, False),
    torch.conv2d: (2, False),
    torch.conv3d: (3, False),
    torch.conv_transpose1d: (1, True),
    torch.conv_transpose2d: (2, True),
    torch.conv_transpose3d: (3, True),
}


#: Arguments in their order, of plain and of transposed convolutions.
_ARGUMENTS = {
    False: ("input", "weight", "bias", "stride", "padding", "dilation", "groups"),
    True: ("input", "weight", "bias", "stride", "padding", "output_padding", "groups", "dilation"),
}
_PER_AXIS = ("stride", "padding", "dilation", "output_padding")
_DEFAULTS = {"stride": 1, "padding": 0, "dilation": 1, "output_padding": 0, "groups": 1}


class LinearConvolutions(TorchFunctionMode):
    """Inside of it, convolutions are recorded such that the map from a cotangent u to ``J^T u`` can be differentiated
    at the cost of two convolutions for each, where torch's second derivative always computes four.

    Use :meth:`at_zero` while that map is recorded.
    """

    def __init__(self) -> None:
        super().__init__()
        self.recording = False

    @contextmanager
    def at_zero(self) -> Iterator[None]:
        """While ``J^T u`` is recorded for u = 0: what was saved counts as constant, and values (zeros) are not
        computed.
        """
        self.recording = True
        try:
            yield
        finally:
            self.recording = False

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func not in _FUNCTIONS:
            return func(*args, **kwargs)
        n, transposed = _FUNCTIONS[func]
        given = {"bias": None, **_DEFAULTS, **dict(zip(_ARGUMENTS[transposed], args, strict=False)), **kwargs}
        x, weight, bias = given["input"], given["weight"], given["bias"]
        if isinstance(given["padding"], str) or x.ndim != n + 2:  # torch sorts these out before it convolves
            return func(*args, **kwargs)
        stride, padding, dilation, extra = (_each(given[k], n) for k in _PER_AXIS)
        form = _Trilinear(x.shape, weight.shape, (stride, padding, dilation, transposed, extra, given["groups"]), self)
        y = Partial.apply(form, 0, x, weight)
        return y if bias is None else y + bias.view(-1, *[1] * n)


def _each(value: Any, n: int) -> list[int]:
    """One number for each of n axes."""
    return [value] * n if isinstance(value, int) else list(value) * (n // len(value))


@dataclass(frozen=True)
class _Trilinear:
    """The number ``<g, w * x>`` as a form in three slots: 0 the cotangent g, 1 the input x, 2 the weight w."""

    input: torch.Size
    weight: torch.Size
    options: tuple[Any, ...]
    mode: LinearConvolutions

    def partial(self, slot: int, one: Tensor, other: Tensor) -> Tensor:
        """The derivative in one slot, given what is in the two others, in order."""
        if slot == 0:
            return torch.ops.aten.convolution(one, other, None, *self.options)
        shape = self.input if slot == 1 else self.weight
        missing = one.new_zeros(()).expand(shape)  # of which only the shape is looked at
        if self.mode.recording:
            return missing
        x, w = (missing, other) if slot == 1 else (other, missing)
        mask = [slot == 1, slot == 2, False]
        return torch.ops.aten.convolution_backward(one, x, w, None, *self.options, mask)[slot - 1]


class Partial(torch.autograd.Function):
    """A partial derivative of a trilinear form, whose own derivatives are partial derivatives of the same form."""

    generate_vmap_rule = True

    @staticmethod
    def forward(form: _Trilinear, slot: int, one: Tensor, other: Tensor) -> Tensor:
        return form.partial(slot, one, other)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        ctx.form, ctx.slot, one, other = inputs
        ctx.save_for_backward(one, other)

    @staticmethod
    def backward(ctx: Any, cotangent: Tensor) -> tuple[None, None, Tensor | None, Tensor | None]:
        saved = ctx.saved_tensors
        if ctx.form.mode.recording:
            saved = [t.detach() for t in saved]
        slots = [k for k in range(3) if k != ctx.slot]
        given = {ctx.slot: cotangent, **dict(zip(slots, saved, strict=True))}

        def derivative(slot: int, needed: bool) -> Tensor | None:
            return Partial.apply(ctx.form, slot, *(given[k] for k in range(3) if k != slot)) if needed else None

        one, other = (derivative(k, needed) for k, needed in zip(slots, ctx.needs_input_grad[2:], strict=True))
        return None, None, one, other
