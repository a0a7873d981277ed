"""The loss of a model on data, with nothing differentiated twice: its value, its gradient, the share that is right."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from . import arguments
from .changes import Borrowed, Change, modes_kept, recording
from .layercollection import LayerCollection
from .losses import Loss, OutputLoss, OwnLoss, output_loss
from .losses.targets import Targets, selected
from .model import data
from .model.evaluator import Evaluator, counted


@dataclass(frozen=True)
class Measured:
    """Loss and accuracy of a model on data.

    Attributes:
        loss: Of all examples together, a mean or a sum as the loss has it.
        accuracy: The share of examples (or positions) whose class has the largest output; None for a loss that is not
            of classes.
        top5: The share whose class is among the five largest outputs; None where there are no more than five classes.
        n: How many examples there are.
    """

    loss: float
    accuracy: float | None
    top5: float | None
    n: int


class Objective(Evaluator):
    """A model with its loss.

    Args:
        model: Any module.
        loss: A loss of ``torch.nn``, ``loss(outputs, *targets)`` with one value for each example, or
            :class:`~nngeometry.OwnLoss`; by default ``nn.CrossEntropyLoss()``.
        targets: What the loss receives beside the outputs, as in :func:`~nngeometry.EmpiricalFisher`.
        layer_collection: The parameters of gradients, by default all that are trainable.
        **options: function, device and verbose, as in :func:`~nngeometry.FIM`.
    """

    def __init__(
        self,
        model: nn.Module,
        loss: Loss | None = None,
        *,
        targets: Targets = None,
        function: Callable[..., Any] | None = None,
        layer_collection: LayerCollection | None = None,
        **options: Any,
    ) -> None:
        arguments.model(model)
        arguments.loss(loss)
        lc = LayerCollection.from_model(model) if layer_collection is None else layer_collection
        self._own = loss if isinstance(loss, OwnLoss) else None
        if self._own is not None:
            if targets is not None:
                raise ValueError("targets: a model with loss=OwnLoss() computes the loss itself, so leave targets out")
            function = self._own.function(model, function)
        super().__init__(model, lc, function=function, **options)
        self._of_classes = self._own is None and not isinstance(loss, OutputLoss)
        self._loss = output_loss(nn.CrossEntropyLoss() if loss is None or self._own is not None else loss)
        self._select = selected(targets)
        self._total = arguments.explaining(loss, self._loss.total)
        self._weight = arguments.explaining(loss, self._loss.weight)
        #: Whether the loss of all data is the mean of those of minibatches, by what they count.
        self.mean = self._own is not None or self._loss.mean

    def of_one(self, batch: Any) -> data.Batch:
        """A minibatch as the loader yielded it, on the device."""
        return next(iter(self.minibatches(data.Minibatches([batch]))))

    def total(self, batch: data.Batch) -> tuple[Tensor, float, Hits | None]:
        """The sum of the losses of a minibatch, what it counts, and how often the class is right."""
        if self._own is not None:
            weight = self._own.weight(batch)
            return self.outputs_unchecked(batch) * weight, weight, None
        targets = self._targets(batch)
        f = self.outputs(batch)
        hits = _hits(f.detach(), targets) if self._of_classes else None
        return self._total(f, *targets), self._weight(f.detach(), *targets), hits

    def _targets(self, batch: data.Batch) -> tuple[Any, ...]:
        targets = self._select(batch)
        if not targets:
            raise ValueError(
                "loader: a minibatch has no labels, only inputs: let it yield (inputs, labels), or say with targets= "
                "where they are"
            )
        return targets

    def targets_of(self, batch: data.Batch) -> Any:
        """The one target of a minibatch, None if there are several or none."""
        if self._own is not None:
            return None
        targets = self._targets(batch)
        return targets[0] if len(targets) == 1 else None

    def value(self, batch: data.Batch) -> Tensor:
        """The loss of a minibatch, a scalar."""
        total, weight, _ = self.total(batch)
        return total / counted(weight) if self.mean else total

    def gradient(self, batch: data.Batch) -> tuple[Tensor, Tensor]:
        """The loss of a minibatch, and its gradient ``(P,)``."""
        parameters = self.layer_collection.parameters(self.model)
        value = self.value(batch)
        grads = torch.autograd.grad(value, parameters, allow_unused=True, materialize_grads=True)
        return value.detach(), torch.cat([(g.to_dense() if g.is_sparse else g).flatten() for g in grads])

    def measure(self, loader: Any) -> Measured:
        """Loss and accuracy on a loader, with the model as it is."""
        loss, weight, n = 0.0, 0.0, 0
        found: list[Hits | None] = []
        with Borrowed(modes_kept, recording(False)):
            for batch in self.minibatches(loader):
                total, w, hits = self.total(batch)
                loss, weight, n = loss + float(total), weight + w, n + data.count(batch)
                found.append(hits)
        return measured(loss / counted(weight) if self.mean else loss, found, n)


def measured(loss: float, found: Sequence[Hits | None], n: int) -> Measured:
    """A loss, with the accuracy over minibatches."""
    known = [hits for hits in found if hits is not None]
    there = sum(hits.there for hits in known)
    if len(known) < len(found) or there == 0:
        return Measured(loss, None, None, n)
    top5 = sum(hits.five for hits in known) / there if known[0].outputs > 5 else None
    return Measured(loss, sum(hits.first for hits in known) / there, top5, n)


class Hits(NamedTuple):
    """How many classes have the largest output, how many are among the five largest, how many there are; and how many
    outputs, None if targets are no classes.
    """

    first: int
    five: int
    there: int
    outputs: int


def _hits(f: Tensor, targets: tuple[Any, ...]) -> Hits | None:
    y = targets[0] if len(targets) == 1 else None
    if not isinstance(y, Tensor) or y.is_floating_point() or y.is_complex() or f.ndim < 2 or f.shape[1] < 2:
        return None
    if y.shape != (len(f), *f.shape[2:]):
        return None
    there = y >= 0
    best = f.topk(min(5, f.shape[1]), 1).indices == y.unsqueeze(1)
    first, five = (int((best[:, :k].any(1) & there).sum()) for k in (1, 5))
    return Hits(first, five, int(there.sum()), f.shape[1])


# Of modes and of batch normalisation


def _normalisers(model: nn.Module) -> list[Any]:
    return [
        m
        for m in model.modules()
        if isinstance(m, nn.modules.batchnorm._BatchNorm) and m.running_mean is not None and m.running_var is not None
    ]


def as_found(model: nn.Module) -> Change:
    """A change that makes none: modes and buffers that are written meanwhile are put back."""

    def change() -> Callable[[], Any]:
        modes = [(m, m.training) for m in model.modules()]
        buffers = [(b, b.detach().clone()) for b in model.buffers()]
        momenta = [(m, m.momentum) for m in _normalisers(model)]

        def undo() -> None:
            with torch.no_grad():
                for b, before in buffers:
                    if not torch.equal(b, before):
                        b.copy_(before)
            for m, momentum in momenta:
                m.momentum = momentum
            for module, training in modes:
                module.training = training

        return undo

    return change


def in_eval_mode(model: nn.Module) -> Borrowed:
    """Hold a model in eval mode, with nothing recorded; its modes and buffers are put back."""

    def change() -> Callable[[], Any]:
        model.eval()
        return lambda: None

    return Borrowed(modes_kept, recording(False), as_found(model), change)


def recompute_batch_norm(model: nn.Module, loader: Any, function: Callable[..., Any] | None = None) -> None:
    """Set the running statistics of BatchNorm to those of the data at the parameters that the model has now: the mean
    over minibatches of their means and variances. Without BatchNorm nothing is done, and no data are read.

    Averages of weights and points of a landscape need this: the running statistics of a model belong to the weights of
    the last steps of its training.

    Args:
        model: Any module; its modes are as before afterwards, and so are its statistics after an exception.
        loader: As in :func:`~nngeometry.FIM`; labels are not looked at.
        function: As in :func:`~nngeometry.FIM`.

    Raises:
        ValueError: For a minibatch with a single value for each channel.

    Example:
        >>> model = nn.Sequential(nn.Linear(2, 3), nn.BatchNorm1d(3)).eval()
        >>> x = torch.randn(50, 2)
        >>> recompute_batch_norm(model, (x,))
        >>> torch.allclose(model[1].running_mean, model[0](x).mean(0))
        True

    Source: Izmailov et al. (2018), 1803.05407, section 3.2.
    """
    arguments.model(model)
    arguments.loader(loader)
    found = _normalisers(model)
    if not found:
        return
    evaluator = Evaluator(model, LayerCollection.from_model(model, frozen=True), function=function)
    modes = [(m, m.training) for m in model.modules()]
    momenta = [(m, m.momentum) for m in found]

    def change() -> Callable[[], Any]:
        model.eval()
        for m in found:
            m.train()
            m.momentum = None  # a plain mean

        def undo() -> None:
            for m, momentum in momenta:
                m.momentum = momentum
            for module, training in modes:
                module.training = training

        return undo

    def kept() -> Callable[[], Any]:
        held = [(b, b.clone()) for m in found for b in m.buffers()]

        def undo() -> None:
            if block.failed:  # statistics of a part of the data are those of nothing
                for b, before in held:
                    b.copy_(before)

        return undo

    block = Borrowed(modes_kept, recording(False), kept, change)
    with block:
        for m in found:
            m.reset_running_stats()
        for batch in evaluator.minibatches(loader):
            _let_pass(evaluator, batch)


def _let_pass(evaluator: Evaluator, batch: data.Batch) -> None:
    try:
        evaluator.outputs_unchecked(batch)
    except ValueError as error:
        if not str(error).startswith("Expected more than 1 value per channel"):  # torch's
            raise
        raise ValueError(
            "loader: a minibatch has a single value for each channel of a BatchNorm, which has no variance: let the "
            "loader drop it (drop_last=True), or leave the statistics as they are (recompute_batch_norm=False)"
        ) from error
