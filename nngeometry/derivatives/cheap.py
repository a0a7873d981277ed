"""Operations whose derivative is as cheap to differentiate as it is linear, which torch's own is not."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from ..changes import hooks_on_saved
from .composites import COMPOSITES, normalised
from .lstm import lstm_of_operations
from .operations import OPERATIONS, Maybe, Operation


class CheapDerivatives(TorchFunctionMode):
    """Inside of it, the operations of :mod:`nngeometry.derivatives.operations` (convolutions, linear layers, products
    of matrices, normalisations, activations, softmax) are recorded such that the map from a cotangent u to ``J^T u``
    can be recorded for nothing, and differentiated at the cost of a product with J. torch's second derivatives compute
    twice as many convolutions. A gradient can be recorded too, of which the values in parameters, a third of its cost,
    are not computed.

    Use :meth:`at_zero` or :meth:`without_values` while that is recorded.
    """

    def __init__(self) -> None:
        super().__init__()
        self.record: Record | None = None
        #: Whether something will be run again on the way back: inside of activation checkpoints.
        self.replayed = False

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

    def _value(self, operation: Operation, *inputs: Any) -> Tensor:
        found: Tensor = Value.apply(self, operation, *inputs)
        return found

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        hooked = _hooked()
        self.replayed = self.replayed or hooked
        if not hooked:
            recognise = OPERATIONS.get(func)
            if recognise is not None and _plain(args[0] if args else kwargs["input"]):
                operation = recognise(*args, **kwargs)
                if operation is not None:
                    return self._value(*operation)
            of_parts = _OF_PARTS.get(func)
            if of_parts is not None and _plain(args[0] if args else kwargs["input"]):
                return of_parts(self._value, *args, **kwargs)
            composite = COMPOSITES.get(func)
            if composite is not None:
                return composite(*args, **kwargs)
        return normalised(func, args, kwargs)


#: From a function of torch to what makes it of several operations, given how the value of one is recorded.
_OF_PARTS: dict[Any, Callable[..., Any]] = {torch.lstm: lstm_of_operations}


def _hooked() -> bool:
    """Whether what is saved for backward goes through hooks, as inside of activation checkpoints: they run operations
    again, outside of any mode, and want the same tensors saved.
    """
    return hooks_on_saved() is not None


def _plain(one: Tensor) -> bool:
    """Whether operations on a tensor are what they seem: of real numbers, in their own precision, of one example or
    model at a time.
    """
    transformed = torch._C._are_functorch_transforms_active()
    return one.is_floating_point() and not transformed and not torch.is_autocast_enabled(one.device.type)


#: From an operation, what it saved, which inputs are wanted and a cotangent to what :meth:`Operation.pull` gives for
#: them, recorded.
Record = Callable[[Operation, Sequence[Any], Sequence[bool], Tensor], Sequence[Maybe]]


class Value(torch.autograd.Function):
    """The value of an operation; its backward is :meth:`Operation.pull`."""

    @staticmethod
    def forward(ctx: Any, mode: CheapDerivatives, operation: Operation, *inputs: Any) -> Tensor:
        output, saved = operation.value_and_saved(inputs)
        ctx.mode, ctx.operation = mode, operation
        ctx.save_for_backward(*saved)
        return output

    @staticmethod
    def backward(ctx: Any, cotangent: Tensor) -> tuple[Maybe, ...]:
        saved, wanted = ctx.saved_tensors, ctx.needs_input_grad[2:]
        if ctx.mode.record is not None:
            return None, None, *ctx.mode.record(ctx.operation, saved, wanted, cotangent)
        return None, None, *ctx.operation.pull(cotangent, saved, wanted)


def _zeros(saved: Sequence[Any], wanted: Sequence[bool], cotangent: Tensor) -> list[Maybe]:
    """For each wanted input zeros of its shape, without memory."""
    zero = cotangent.new_zeros(())
    return [zero.expand(t.shape) if w else None for w, t in zip(wanted, saved, strict=False)]


class Pulled(torch.autograd.Function):
    """``J^T u`` of an operation at u = 0, where only its derivative matters: ``J v``."""

    @staticmethod
    def forward(
        ctx: Any, operation: Operation, at: Sequence[Any], wanted: Sequence[bool], cotangent: Tensor
    ) -> tuple[Maybe, ...]:
        ctx.operation, ctx.at, ctx.shape = operation, at, cotangent.shape
        ctx.set_materialize_grads(False)
        return tuple(_zeros(at, wanted, cotangent))

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


class SecondPull(torch.autograd.Function):
    """``J^T u`` of an operation, with zeros for the inputs whose values are not needed, and its derivative."""

    @staticmethod
    def forward(
        ctx: Any, operation: Operation, wanted: Sequence[bool], needed: Sequence[bool], cotangent: Tensor, *saved: Any
    ) -> tuple[Maybe, ...]:
        ctx.operation = operation
        ctx.save_for_backward(cotangent, *saved)
        ctx.set_materialize_grads(False)
        zeros = _zeros(saved, wanted, cotangent)
        if not any(needed):
            return tuple(zeros)
        found = operation.pull(cotangent, saved, needed)
        return tuple(value if n else zero for value, zero, n in zip(found, zeros, needed, strict=False))

    @staticmethod
    def backward(ctx: Any, *tangents: Maybe) -> tuple[Maybe, ...]:
        cotangent, *saved = ctx.saved_tensors
        _, _, _, upstream, *wanted = ctx.needs_input_grad
        if all(t is None for t in tangents):
            return None, None, None, None, *[None] * len(saved)
        pushed, bent = ctx.operation.push_with_second_pull(tangents, cotangent, saved, upstream, wanted)
        return None, None, None, pushed, *bent, *[None] * (len(saved) - len(bent))


def _record_without_values(
    operation: Operation, saved: Sequence[Any], wanted: Sequence[bool], cotangent: Tensor
) -> Sequence[Maybe]:
    needed = [w and not t.is_leaf for t, w in zip(saved, wanted, strict=False)]
    found: Sequence[Maybe] = SecondPull.apply(operation, wanted, needed, cotangent, *saved)
    return found
