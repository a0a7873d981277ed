"""What a loss receives beside the output, and the rule by which it is compared with the output."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from ..model import data

#: What a loss receives of a minibatch: an entry, several, or a function of the minibatch that returns one target or a
#: tuple of them. None for all elements after the first, or the whole minibatch if it is not a tuple or list.
Targets = str | int | Sequence[str | int] | Callable[[data.Batch], Any] | None


def selected(targets: Targets) -> Callable[[data.Batch], tuple[Any, ...]]:
    """A function from a minibatch to what the loss receives of it.

    Args:
        targets: An entry of the minibatch, several, or a function of it; None for all after the first element.

    Example:
        >>> batch = {"input_ids": torch.zeros(2, 3), "labels": torch.ones(2)}
        >>> selected("labels")(batch)
        (tensor([1., 1.]),)
    """
    if targets is None:
        return data.targets
    if isinstance(targets, str | int):
        return lambda batch: (_entry(data.content(batch), targets),)
    if isinstance(targets, torch.nn.Module) or (callable(targets) and not data.accepts(targets, 1)):
        raise TypeError(
            f"targets: expected a key of the minibatch, or a function that takes it, got {type(targets).__name__}: "
            'write e.g. targets="labels" or targets=lambda batch: batch[1]'
        )
    if callable(targets):

        def given(batch: data.Batch) -> tuple[Any, ...]:
            found = targets(data.content(batch))
            return tuple(found) if type(found) in (tuple, list) else (found,)

        return given
    if isinstance(targets, Sequence) and all(isinstance(key, str | int) for key in targets):
        keys = tuple(targets)
        return lambda batch: tuple(_entry(data.content(batch), key) for key in keys)
    raise TypeError(
        f"targets: expected a key of the minibatch, several, or a function of it, got a {type(targets).__name__}"
    )


def _entry(batch: data.Batch, key: str | int) -> Any:
    keyed = isinstance(batch, Mapping) or hasattr(batch, "keys")
    try:
        return getattr(batch, key) if isinstance(key, str) and not keyed else batch[key]
    except (KeyError, IndexError, AttributeError, TypeError) as error:
        if keyed:
            has = f"has the keys {', '.join(map(repr, batch.keys()))}"
        else:
            has = f"has {len(batch)} elements" if isinstance(batch, tuple | list) else f"is a {type(batch).__name__}"
        raise ValueError(f"targets={key!r}: the minibatch {has}") from error


def shape_of(value: Any) -> str:
    """How a target is called in a message."""
    return str(tuple(value.shape)) if isinstance(value, Tensor) else f"a {type(value).__name__}"


def same_rows(one: Sequence[int], other: Sequence[int]) -> bool:
    """Whether two shapes are as many examples of the same, up to axes of length one: one can be laid out as the other.

    >>> same_rows((8, 1), (8,)), same_rows((8, 3), (8, 1)), same_rows((1, 3), (3,))
    (True, False, False)
    """
    a, b = [s for s in one[1:] if s != 1], [s for s in other[1:] if s != 1]
    return bool(one) and bool(other) and one[0] == other[0] and a == b


def check_count(given: Sequence[Any], expected: int, who: str) -> None:
    """Raise unless there are as many targets as a loss takes."""
    if len(given) == 1 and (isinstance(given[0], Mapping) or hasattr(given[0], "keys")):
        keys = ", ".join(map(repr, given[0].keys()))
        raise ValueError(f"loss: {who} was given the whole minibatch with the keys {keys}: pass targets=, a key of it")
    if len(given) != expected:
        raise ValueError(
            f"loss: {who} takes {expected} target{'s' if expected > 1 else ''} beside the output, the minibatch gives "
            f"{len(given)}: pass targets=, the keys (or positions in the tuple) of those it takes"
        )


def like_output(y: Any, f: Tensor, who: str) -> Tensor:
    """The targets of a loss that compares element by element, in the shape of the outputs.

    (n, 1) and (n,) are the same; whatever else would have to be broadcast raises ``ValueError``.
    """
    if not isinstance(y, Tensor):
        raise TypeError(
            f"loss: {who} compares the outputs {shape_of(f)} with a tensor of that shape, but was given {shape_of(y)}"
        )
    if y.shape != f.shape:
        if not same_rows(y.shape, f.shape):
            raise ValueError(
                f"loss: {who} compares outputs {shape_of(f)} and targets {shape_of(y)} element by element, and they "
                "would be broadcast: give one target for each element of the output"
            )
        y = y.reshape(f.shape)
    if y.dtype == f.dtype or (y.is_floating_point() and f.dtype in (torch.float16, torch.bfloat16)):
        return y
    return y.to(f.dtype)


def variance_like(var: Any, f: Tensor, who: str) -> Tensor:
    """A variance for each element, for each example or for all, such that it broadcasts against the outputs."""
    if not isinstance(var, Tensor):
        return torch.as_tensor(var, dtype=f.dtype, device=f.device)
    var = var.to(f.dtype)
    if var.shape == f.shape:
        return var
    if var.ndim < 2 and var.numel() == 1:
        return var.reshape(())
    if same_rows(var.shape, f.shape):
        return var.reshape(f.shape)
    if var.shape == f.shape[:-1]:
        return var.unsqueeze(-1)
    if var.shape == (*f.shape[:-1], 1):
        return var
    raise ValueError(
        f"loss: {who} was given outputs {shape_of(f)} and variances {shape_of(var)}, which would be broadcast: give "
        "one variance for each element of the output, or one for each example"
    )


def class_indices(y: Any, f: Tensor, axis: int, who: str) -> Tensor:
    """Indices of classes for logits with the classes along an axis: integers, one for each position.

    An axis of length one is no matter. Raises a ``ValueError`` for one-hot targets, for indices that are no integers
    and for wrong shapes; :func:`check_range` looks at the values.
    """
    if f.ndim < 2:
        raise ValueError(f"loss: {who} needs outputs (n, classes), got {shape_of(f)}")
    if not isinstance(y, Tensor):
        raise TypeError(f"loss: {who} needs a tensor of class indices, but was given {shape_of(y)}")
    axis %= f.ndim
    shape = f.shape[:axis] + f.shape[axis + 1 :]
    if y.shape == f.shape and f.shape[axis] > 1:
        raise ValueError(
            f"loss: {who} was given {_kind(y)} targets {shape_of(y)} for outputs {shape_of(f)}, which look one-hot: "
            f"pass indices, y.argmax({axis})" + ("" if axis != 1 or y.is_floating_point() else ", or y.float()")
        )
    if y.shape != shape:
        if not same_rows(y.shape, shape):
            last = ""
            if axis == 1 and f.ndim > 2 and y.shape == f.shape[:-1]:
                last = "; if the classes are the last axis of the output use nngeometry.TokenCrossEntropy()"
            raise ValueError(
                f"loss: {who} was given targets {shape_of(y)} for outputs {shape_of(f)}: it needs one class index for "
                f"each position, {tuple(shape)}{last}"
            )
        y = y.reshape(shape)
    if y.is_floating_point() or y.is_complex() or y.dtype == torch.bool:
        raise ValueError(
            f"loss: {who} was given {_kind(y)} targets {shape_of(y)} for outputs {shape_of(f)}: class indices are "
            "integers, y.long()"
        )
    return y if y.dtype == torch.int64 else y.long()


def check_range(y: Tensor, classes: int, ignored: int, who: str) -> None:
    """Raise unless indices are those of classes, or the one that is ignored."""
    wrong = ((y < 0) | (y >= classes)) & (y != ignored)
    if bool(wrong.any()):
        raise ValueError(
            f"loss: {who} was given the class {int(y[wrong][0])}, but the outputs have {classes} classes, 0 to "
            f"{classes - 1} (ignore_index={ignored})"
        )


def _kind(y: Tensor) -> str:
    return "floating point" if y.is_floating_point() else str(y.dtype).removeprefix("torch.")
