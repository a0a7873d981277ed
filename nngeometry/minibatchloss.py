"""A loss that gives one number for a minibatch: which one of its examples it is made of, found by a look at it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from .changes import Borrowed
from .losses import output_loss
from .losses.output import ByExample
from .model import data
from .model.evaluator import State
from .model.weights import Weights
from .spelling import warn


def settle(source: Any, examples: Any) -> None:
    """Give a source of Hessian products the loss that it was meant to have, if what it was given is one of a minibatch;
    or is its ``function``, as ``Hessian(model, loader, representation, function=loss)`` says it in NNGeometry.
    """
    if isinstance(examples, Iterator):
        return
    if source.function is not None and not source.batch_statistics:
        loss = _reduced(source, examples)
        if loss is not None and not source.function_is_loss:
            warn("Hessian(..., function=loss)", "Hessian(..., loss=loss); function= is the model to call")
        source.function = source.function if loss is None else None
    else:
        loss = _of_a_minibatch(source, examples) if isinstance(source.loss, ByExample) and not source.function else None
    if loss is not None:
        source.loss, source._total, source._weight = loss, loss.total, loss.weight


class _Reduced:
    """A loss that gives one number for a minibatch: a mean over its examples or their sum, whichever it is."""

    def __init__(self, loss: Callable[..., Tensor], f: Tensor, *targets: Any) -> None:
        self.loss = loss
        n, first = len(f), max(1, len(f) // 2)
        noise = torch.cos(torch.arange(f.numel(), dtype=f.dtype, device=f.device)).view_as(f)
        found = set()
        for g in (f, f + noise, f - 2 * noise):  # at one of them it may be zero
            twice = torch.cat([torch.arange(n), torch.arange(n)])
            once, doubled = (_on_rows(loss, g, targets, index) for index in (torch.arange(n), twice))
            halves = (torch.arange(first), torch.arange(first, n)) if n > 1 else (torch.arange(n),)
            parts = [_on_rows(loss, g, targets, index) for index in halves]
            if max(map(abs, (once, doubled, *parts))) == 0:
                continue
            counted = sum(len(index) * part for index, part in zip(halves, parts, strict=True))
            mean = _same(doubled, once, f) and _same(counted, n * once, f)
            total = _same(doubled, 2 * once, f) and _same(sum(parts), once, f)
            found.add("mean" if mean else "sum" if total else "neither")
        if found not in ({"mean"}, {"sum"}):
            raise ValueError(
                "Hessian: the loss gives one number for a minibatch, which is put together from those of its examples "
                "but is neither their mean nor their sum: use one with one value for each example, or one of torch.nn"
            )
        self.mean = found == {"mean"}

    def total(self, f: Tensor, *targets: Any) -> Tensor:
        return self.loss(f, *targets) * (len(f) if self.mean else 1)

    def weight(self, f: Tensor, *targets: Any) -> float:
        return len(f)


def _on_rows(loss: Callable[..., Tensor], f: Tensor, targets: tuple[Any, ...], index: Tensor) -> float:
    """The loss of some examples."""
    rows = index.to(f.device)
    return float(
        loss(f[rows], *(t[rows] if isinstance(t, Tensor) and t.ndim > 0 and len(t) == len(f) else t for t in targets))
    )


def _same(a: float, b: float, like: Tensor) -> bool:
    """Equal up to rounding."""
    return abs(a - b) <= torch.finfo(like.dtype).eps ** 0.5 * max(abs(a), abs(b))


def _reduced(source: Any, examples: Any) -> Any:
    """The function of a source as a loss, None if it is none: called as one, it gives no scalar."""
    batch = _first(source, examples)
    function: Any = source.function
    certain = source.function_is_loss
    if not certain and _is_of_minibatches(source, function, batch):
        return None
    try:
        with _trying(source):
            own = data.map_tensors(Tensor.clone, batch)
            f = source.model(data.arguments(own)[0])
            value = function(f, *source.targets(own))
    except Exception:
        if certain:
            raise
        return None
    if not isinstance(value, Tensor):
        return None
    if value.ndim > 0:
        return output_loss(function) if certain else None
    return output_loss(function) if isinstance(function, nn.Module) else _Reduced(function, f, *source.targets(batch))


def _is_of_minibatches(source: Any, function: Any, batch: data.Batch) -> bool:
    """Whether a function of the elements of a minibatch gives a row for each example, as one of a model does."""
    try:
        with _trying(source):
            rows = function(*data.arguments(data.map_tensors(Tensor.clone, batch)))
    except Exception:
        return False
    return isinstance(rows, Tensor) and rows.ndim > 0 and len(rows) == data.count(batch)


def _trying(source: Any) -> Borrowed:
    """The model at copies of all its tensors, for a look."""
    weights = Weights([source.model], source.layer_collection.parameters(source.model))
    return source.running(weights.in_place, State(source.model, values=True), record=False)


def _first(source: Any, examples: Any) -> Any:
    """The first minibatch, with the random state as it was: a shuffling loader draws from it."""
    with torch.random.fork_rng(devices=[]):
        return next(data.minibatches(examples, source.device))


def _of_a_minibatch(source: Any, examples: Any) -> Any:
    """The loss of a source as one of a minibatch, None if it does not give one number for that."""
    loss: Any = getattr(source.loss, "loss", None)
    batch = _first(source, examples)
    try:
        with _trying(source):
            f = source.outputs_unchecked(batch)
            value = loss(f, *source.targets(batch))
    except Exception:
        return None  # it says what is wrong when it is used
    of_one = not isinstance(value, Tensor) or value.ndim > 0 or len(f) == 1
    return None if of_one else _Reduced(loss, f, *source.targets(batch))
