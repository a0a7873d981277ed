"""Operations whose derivative is as cheap to differentiate as it is linear, which torch's own is not."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

#: Tensors, or None for what is not there: a bias, or a derivative that nobody wants.
Maybe = Tensor | None


class CheapDerivatives(TorchFunctionMode):
    """Inside of it, convolutions, linear layers, batch normalisations with fixed statistics and ReLUs are recorded such
    that the map from a cotangent u to ``J^T u`` can be recorded for nothing, and differentiated at the cost of a
    product with J. torch's second derivatives compute twice as many convolutions. A gradient can be recorded too, of
    which the values in parameters, a third of its cost, are not computed.

    Use :meth:`at_zero` or :meth:`without_values` while that is recorded.
    """

    def __init__(self) -> None:
        super().__init__()
        self.record: Record | None = None

    def at_zero(self) -> AbstractContextManager[None]:
        """While ``J^T u`` is recorded for u = 0: values (zeros) are not computed."""
        return self._recording(_record_at_zero)

    def without_values(self) -> AbstractContextManager[None]:
        """While a gradient in leaves of autograd is recorded of which only the derivative is wanted: it is zeros."""
        return self._recording(_record_without_values)

    @contextmanager
    def _recording(self, record: Record) -> Iterator[None]:
        self.record = record
        try:
            yield
        finally:
            self.record = None

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        recognise = _OPERATIONS.get(func)
        if recognise is not None and not _hooked() and not torch.is_autocast_enabled(_device(args, kwargs)):
            operation = recognise(*args, **kwargs)
            if operation is not None:
                return Value.apply(self, *operation)
        return func(*args, **kwargs)


def _hooked() -> bool:
    """Whether what is saved for backward goes through hooks, as inside of activation checkpoints: they run operations
    again, outside of any mode, and want the same tensors saved.
    """
    return torch._C._autograd._top_saved_tensors_default_hooks(False) is not None


def _device(args: Sequence[Any], kwargs: dict[str, Any]) -> str:
    one: Tensor = args[0] if args else kwargs["input"]
    return one.device.type


@dataclass(frozen=True)
class Operation(ABC):
    """An operation on tensors, its derivative, and the transpose of that."""

    @abstractmethod
    def value(self, *inputs: Any) -> Tensor:
        """The operation itself."""

    def saved(self, inputs: Sequence[Any], output: Tensor) -> Sequence[Any]:
        """What its derivative is known from: for each input a tensor of its shape."""
        return inputs

    @abstractmethod
    def push(self, tangents: Sequence[Maybe], saved: Sequence[Any], shape: torch.Size) -> Tensor:
        """Its derivative along tangents of its inputs, at least one of them; shape: that of the output."""

    @abstractmethod
    def pull(self, cotangent: Tensor, saved: Sequence[Any], wanted: Sequence[bool]) -> Sequence[Maybe]:
        """The transpose: what a cotangent of the output gives for the wanted inputs."""

    def bend(
        self, tangents: Sequence[Maybe], cotangent: Tensor, saved: Sequence[Any], wanted: Sequence[bool]
    ) -> Sequence[Maybe]:
        """The derivative of ``sum tangents * pull(cotangent, saved)`` in what is saved: here of an operation that is
        linear in its first and in its second input, plus a third.
        """
        (dx, dw, _), (x, w, b) = tangents, saved
        return (
            self.pull(cotangent, (x, dw, b), (True, False, False))[0] if wanted[0] and dw is not None else None,
            self.pull(cotangent, (dx, w, b), (False, True, False))[1] if wanted[1] and dx is not None else None,
            None,
        )


#: From an operation, what it saved, which inputs are wanted and a cotangent to what :meth:`Operation.pull` gives for
#: them, recorded.
Record = Callable[[Operation, Sequence[Any], Sequence[bool], Tensor], Sequence[Maybe]]


class Value(torch.autograd.Function):
    """The value of an operation; its backward is :meth:`Operation.pull`."""

    generate_vmap_rule = True

    @staticmethod
    def forward(mode: CheapDerivatives, operation: Operation, *inputs: Any) -> Tensor:
        return operation.value(*inputs)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        ctx.mode, ctx.operation, *tensors = inputs
        ctx.save_for_backward(*ctx.operation.saved(tensors, output))

    @staticmethod
    def backward(ctx: Any, cotangent: Tensor) -> tuple[Maybe, ...]:
        saved, wanted = ctx.saved_tensors, ctx.needs_input_grad[2:]
        if ctx.mode.record is not None:
            return None, None, *ctx.mode.record(ctx.operation, saved, wanted, cotangent)
        return None, None, *ctx.operation.pull(cotangent, saved, wanted)


class Pulled(torch.autograd.Function):
    """``J^T u`` of an operation at u = 0, where only its derivative matters: ``J v``."""

    @staticmethod
    def forward(
        ctx: Any, operation: Operation, at: Sequence[Any], wanted: Sequence[bool], cotangent: Tensor
    ) -> tuple[Maybe, ...]:
        ctx.operation, ctx.at, ctx.shape = operation, at, cotangent.shape
        ctx.set_materialize_grads(False)
        zero = cotangent.new_zeros(())
        return tuple(zero.expand(t.shape) if w else None for w, t in zip(wanted, at, strict=True))

    @staticmethod
    def backward(ctx: Any, *tangents: Maybe) -> tuple[None, None, None, Maybe]:
        if all(t is None for t in tangents):
            return None, None, None, None
        return None, None, None, ctx.operation.push(tangents, ctx.at, ctx.shape)


def _record_at_zero(
    operation: Operation, saved: Sequence[Any], wanted: Sequence[bool], cotangent: Tensor
) -> Sequence[Maybe]:
    at = [None if t is None else t.detach() for t in saved]
    found: Sequence[Maybe] = Pulled.apply(operation, at, wanted, cotangent)
    return found


class Bent(torch.autograd.Function):
    """``J^T u`` of an operation, with zeros for the inputs whose values are not needed, and its derivative."""

    @staticmethod
    def forward(
        ctx: Any, operation: Operation, wanted: Sequence[bool], needed: Sequence[bool], cotangent: Tensor, *saved: Any
    ) -> tuple[Maybe, ...]:
        ctx.operation = operation
        ctx.save_for_backward(cotangent, *saved)
        ctx.set_materialize_grads(False)
        found = operation.pull(cotangent, saved, needed) if any(needed) else [None] * len(saved)
        zero = cotangent.new_zeros(())
        every = zip(found, saved, wanted, needed, strict=True)
        return tuple(value if n else zero.expand(t.shape) if w else None for value, t, w, n in every)

    @staticmethod
    def backward(ctx: Any, *tangents: Maybe) -> tuple[Maybe, ...]:
        cotangent, *saved = ctx.saved_tensors
        _, _, _, upstream, *wanted = ctx.needs_input_grad
        if all(t is None for t in tangents):
            return None, None, None, None, *[None] * len(saved)
        pushed = ctx.operation.push(tangents, saved, cotangent.shape) if upstream else None
        return None, None, None, pushed, *ctx.operation.bend(tangents, cotangent, saved, wanted)


def _record_without_values(
    operation: Operation, saved: Sequence[Any], wanted: Sequence[bool], cotangent: Tensor
) -> Sequence[Maybe]:
    needed = [w and not t.is_leaf for t, w in zip(saved, wanted, strict=True)]
    found: Sequence[Maybe] = Bent.apply(operation, wanted, needed, cotangent, *saved)
    return found


def _sum(terms: Sequence[Maybe]) -> Tensor:
    total: Maybe = None
    for term in terms:
        if term is not None:
            total = term if total is None else total + term
    assert total is not None
    return total


def _over_channels(t: Tensor, ndim: int) -> Tensor:
    """``(C,)`` as it goes with ``(B, C, ...)``."""
    return t.view(-1, *[1] * (ndim - 2))


# Convolutions: of an input, a weight and a bias

_KINDS: dict[Any, tuple[int, bool]] = {
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
_DEFAULTS = {"bias": None, "stride": 1, "padding": 0, "dilation": 1, "output_padding": 0, "groups": 1}


def _convolution(axes: int, transposed: bool) -> Callable[..., tuple[Any, ...] | None]:
    def recognise(*args: Any, **kwargs: Any) -> tuple[Any, ...] | None:
        given = {**_DEFAULTS, **dict(zip(_ARGUMENTS[transposed], args, strict=False)), **kwargs}
        x, weight, bias = given["input"], given["weight"], given["bias"]
        if isinstance(given["padding"], str) or x.ndim != axes + 2:  # torch sorts these out before it convolves
            return None
        stride, padding, dilation, extra = (_each(given[k], axes) for k in _PER_AXIS)
        return Convolution((stride, padding, dilation, transposed, extra, given["groups"])), x, weight, bias

    return recognise


def _each(value: Any, n: int) -> list[int]:
    """One number for each of n axes."""
    return [value] * n if isinstance(value, int) else list(value) * (n // len(value))


@dataclass(frozen=True)
class Convolution(Operation):
    """Any convolution. options: those of ``aten::convolution`` that come after the bias."""

    options: tuple[Any, ...]

    def value(self, x: Tensor, w: Tensor, b: Maybe) -> Tensor:
        return torch.ops.aten.convolution(x, w, b, *self.options)

    def push(self, tangents: Sequence[Maybe], saved: Sequence[Any], shape: torch.Size) -> Tensor:
        (dx, dw, db), (x, w, _) = tangents, saved
        return _sum(
            [
                None if dx is None else self.value(dx, w, None),
                None if dw is None else self.value(x, dw, None),
                None if db is None else _over_channels(db, len(shape)).expand(shape),
            ]
        )

    def pull(self, cotangent: Tensor, saved: Sequence[Any], wanted: Sequence[bool]) -> Sequence[Maybe]:
        x, w, _ = saved
        sizes = [cotangent.shape[1]] if wanted[2] else None
        return torch.ops.aten.convolution_backward(cotangent, x, w, sizes, *self.options, list(wanted))


# Linear layers: of an input, a weight and a bias


def _linear(input: Tensor, weight: Tensor, bias: Maybe = None) -> tuple[Any, ...] | None:
    return (Affine(), input, weight, bias) if weight.ndim == 2 and input.ndim > 1 else None


@dataclass(frozen=True)
class Affine(Operation):
    """``x w^T + b`` over the last axis of x."""

    def value(self, x: Tensor, w: Tensor, b: Maybe) -> Tensor:
        return F.linear(x, w, b)

    def push(self, tangents: Sequence[Maybe], saved: Sequence[Any], shape: torch.Size) -> Tensor:
        (dx, dw, db), (x, w, _) = tangents, saved
        return _sum(
            [
                None if dx is None else F.linear(dx, w),
                None if dw is None else F.linear(x, dw),
                None if db is None else db.expand(shape),
            ]
        )

    def pull(self, cotangent: Tensor, saved: Sequence[Any], wanted: Sequence[bool]) -> Sequence[Maybe]:
        x, w, _ = saved
        rows = cotangent.reshape(-1, cotangent.shape[-1])
        return (
            cotangent @ w if wanted[0] else None,
            rows.mT @ x.reshape(-1, x.shape[-1]) if wanted[1] else None,
            rows.sum(0) if wanted[2] else None,
        )


# Batch normalisation with fixed statistics: of an input, a weight and a bias


def _batch_norm(
    input: Tensor,
    running_mean: Maybe,
    running_var: Maybe,
    weight: Maybe = None,
    bias: Maybe = None,
    training: bool = False,
    momentum: float = 0.1,
    eps: float = 1e-5,
) -> tuple[Any, ...] | None:
    if training or running_mean is None or running_var is None or input.ndim < 2:
        return None
    if running_mean.requires_grad or running_var.requires_grad:
        return None
    return FixedNorm(running_mean.clone(), running_var.clone(), eps), input, weight, bias


@dataclass(frozen=True)
class FixedNorm(Operation):
    """``(x - mean) / sqrt(var + eps) * w + b``, channel by channel."""

    mean: Tensor
    var: Tensor
    eps: float

    def value(self, x: Tensor, w: Maybe, b: Maybe) -> Tensor:
        return torch.batch_norm(x, w, b, self.mean, self.var, False, 0.0, self.eps, torch.backends.cudnn.enabled)

    def push(self, tangents: Sequence[Maybe], saved: Sequence[Any], shape: torch.Size) -> Tensor:
        (dx, dw, db), (x, w, _) = tangents, saved
        slope = (self.var + self.eps).rsqrt()
        return _sum(
            [
                None if dw is None else self.value(x, dw, None),
                None if dx is None else dx * _over_channels((slope if w is None else slope * w).to(x.dtype), x.ndim),
                None if db is None else _over_channels(db, len(shape)).expand(shape),
            ]
        )

    def pull(self, cotangent: Tensor, saved: Sequence[Any], wanted: Sequence[bool]) -> Sequence[Maybe]:
        x, w, _ = saved
        return torch.ops.aten.native_batch_norm_backward(
            cotangent, x, w, self.mean, self.var, None, None, False, self.eps, list(wanted)
        )

    def bend(
        self, tangents: Sequence[Maybe], cotangent: Tensor, saved: Sequence[Any], wanted: Sequence[bool]
    ) -> Sequence[Maybe]:
        dx, *others = tangents
        centred = None if dx is None else dx + _over_channels(self.mean.to(dx.dtype), dx.ndim)  # which pull subtracts
        return super().bend((centred, *others), cotangent, saved, wanted)


# Rectification


def _relu(input: Tensor, inplace: bool = False) -> tuple[Any, ...] | None:
    return None if inplace else (Rectify(), input)


@dataclass(frozen=True)
class Rectify(Operation):
    """``max(x, 0)``, with derivative zero at zero."""

    def value(self, x: Tensor) -> Tensor:
        return torch.relu(x)

    def saved(self, inputs: Sequence[Any], output: Tensor) -> Sequence[Any]:
        return (output,)  # which the next operation holds as well

    def push(self, tangents: Sequence[Maybe], saved: Sequence[Any], shape: torch.Size) -> Tensor:
        (dx,) = tangents
        assert dx is not None
        return torch.ops.aten.threshold_backward(dx, saved[0], 0)

    def pull(self, cotangent: Tensor, saved: Sequence[Any], wanted: Sequence[bool]) -> Sequence[Maybe]:
        return (torch.ops.aten.threshold_backward(cotangent, saved[0], 0),)

    def bend(
        self, tangents: Sequence[Maybe], cotangent: Tensor, saved: Sequence[Any], wanted: Sequence[bool]
    ) -> Sequence[Maybe]:
        return (None,)


#: From a function of torch to what makes of its arguments an operation and its inputs, or None if it is not one.
_OPERATIONS: dict[Any, Callable[..., tuple[Any, ...] | None]] = {
    **{function: _convolution(*kind) for function, kind in _KINDS.items()},
    F.linear: _linear,
    F.batch_norm: _batch_norm,
    F.relu: _relu,
    torch.relu: _relu,
    Tensor.relu: _relu,
}
