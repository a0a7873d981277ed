"""A plain training loop, which can be stopped anywhere and goes on as if it had not been."""

from __future__ import annotations

import copy
import inspect
import math
import os
import random
import time
import warnings
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.optim.lr_scheduler import ReduceLROnPlateau

from .. import arguments
from ..layercollection import LayerCollection
from ..losses import Loss
from ..losses.targets import Targets
from ..model import data
from ..objective import Hits, Measured, Objective, in_eval_mode, measured
from .averaging import SWA
from .checkpoint import _in, generators, load_checkpoint, random_states, save_checkpoint, set_random_states
from .history import History


@arguments.called_as
def evaluate(
    model: nn.Module,
    loader: Any,
    loss: Loss | None = None,
    *,
    targets: Targets = None,
    function: Callable[..., Any] | None = None,
    device: torch.device | str | None = None,
    verbose: bool = False,
) -> Measured:
    """Loss and accuracy of a model in eval mode. Its modes are the same before and after.

    Args:
        model: Any module.
        loader: As in :func:`~nngeometry.FIM`.
        loss: As in :func:`~nngeometry.Hessian`, by default ``nn.CrossEntropyLoss()``.
        targets: What the loss receives beside the outputs.
        function: As in :func:`~nngeometry.FIM`.
        device: Where minibatches go, by default to the model.
        verbose: Show a progress bar.

    Returns:
        The loss of all examples together, the accuracy, that among the first five, and how many examples there are.

    Example:
        >>> model = nn.Linear(2, 3)
        >>> found = evaluate(model, (torch.zeros(20, 2), torch.full((20,), int(model.bias.argmax()))))
        >>> found.accuracy, found.n
        (1.0, 20)
    """
    arguments.call(model, loader, function, None, LayerCollection, device)
    given: dict[str, Any] = {"layer_collection": LayerCollection.from_model(model, frozen=True), "verbose": verbose}
    objective = Objective(model, loss, targets=targets, function=function, device=device, **given)
    with in_eval_mode(model):
        return objective.measure(loader)


@arguments.called_as
def train(
    model: nn.Module,
    loader: Any,
    optimizer: torch.optim.Optimizer,
    loss: Loss | None = None,
    *,
    epochs: int,
    test_loader: Any = None,
    scheduler: Any = None,
    average: SWA | None = None,
    checkpoints: str | Path | None = None,
    save_every: int = 25,
    evaluate_every: int = 5,
    resume: bool = True,
    targets: Targets = None,
    function: Callable[..., Any] | None = None,
    device: torch.device | str | None = None,
    verbose: bool = True,
    seed: int | None = None,
) -> History:
    """Train a model, in place.

    With ``checkpoints=`` the same call again goes on from the last checkpoint in the folder: the model, the optimiser,
    the scheduler, the average, the history and the random states of torch, numpy, Python and the loader (its
    generators, those of its samplers and those that its datasets hold as attributes) are those that were saved, and
    what comes out is what would have come out without the stop, to the bit on the same machine; the states of workers
    that persist cannot be had, of which a warning tells. Files are written beside their place and renamed, so that one
    is whole or not there, and hold tensors and plain values only.

    An optimiser with ``observe(minibatch)``, as those of ``nngeometry.optim``, is shown each minibatch before its
    step; one whose step needs a closure gets it.

    Args:
        model: Any module. It is trained in train mode, evaluated in eval mode, and left in the mode that it had.
        loader: A DataLoader or a list of minibatches, which is read once an epoch.
        optimizer: Of torch, on the parameters of the model.
        loss: As in :func:`~nngeometry.Hessian`, by default ``nn.CrossEntropyLoss()``.
        epochs: The number of epochs, those before a stop included.
        test_loader: Other data, on which it is evaluated.
        scheduler: Of torch; stepped once an epoch, with the training loss if it takes one.
        average: :class:`SWA` or :class:`SWAG`, updated after each epoch in which it is due.
        checkpoints: A folder.
        save_every: How many epochs there are between checkpoints; there is one before the first and one after the last.
        evaluate_every: How many epochs there are between evaluations on test_loader; there is one after the last.
        resume: Whether to go on from the last checkpoint; otherwise a folder with checkpoints is an error.
        targets: What the loss receives beside the outputs.
        function: As in :func:`~nngeometry.FIM`.
        device: Where minibatches go, by default to the model.
        verbose: Show a progress bar with loss and accuracy.
        seed: The seed of all random numbers, set before the first epoch.

    Returns:
        The history, a row for each epoch.

    Raises:
        ValueError: If the loss is not finite, an epoch has no minibatch, the optimiser is of another model, or a
            checkpoint is.

    Example:
        >>> from nngeometry.training import zoo
        >>> model = zoo.mlp(4, (8,), classes=3)
        >>> loader = [(torch.randn(20, 4), torch.randint(3, (20,))) for _ in range(3)]
        >>> history = train(model, loader, torch.optim.SGD(model.parameters(), lr=0.1), epochs=20, verbose=False)
        >>> len(history), history["loss"][-1] < history["loss"][0]
        (20, True)
    """
    arguments.call(model, loader, function, None, LayerCollection, device)
    arguments.instance("optimizer", optimizer, torch.optim.Optimizer, "pass e.g. torch.optim.SGD(model.parameters())")
    arguments.integer("epochs", epochs, least=0)
    arguments.integer("save_every", save_every, least=1)
    arguments.integer("evaluate_every", evaluate_every, least=1)
    if average is not None:
        arguments.instance("average", average, SWA, "pass SWA(start=...) or SWAG(start=...)")
    if epochs > 1:
        data.require_repeatable(loader, "train")
    mine = {id(p) for p in model.parameters()}
    if not any(id(p) in mine for group in optimizer.param_groups for p in group["params"]):
        raise ValueError("optimizer: it has no parameter of the model: make it from model.parameters()")
    objective = Objective(model, loss, targets=targets, function=function, device=device)
    objects = {"model": model, "optimizer": optimizer, "scheduler": scheduler, "average": average}
    folder = None
    if checkpoints is not None:
        arguments.path("checkpoints", checkpoints, "pass a folder")
        folder = Path(os.fsdecode(checkpoints))
        if folder.exists() and not folder.is_dir():
            raise ValueError(f"checkpoints: {folder} is a file: pass a folder")
        if getattr(loader, "persistent_workers", False):
            warnings.warn(
                "train: workers that persist hold random states that no checkpoint has, so that a training that is "
                "resumed is not, to the bit, what it would have been: make the loader with persistent_workers=False "
                "for that",
                stacklevel=3,
            )
    history, first = History(), 1
    saved = _in(folder) if folder is not None else {}
    if saved and not resume:
        raise ValueError(f"checkpoints: {folder} has some already: pass another folder, remove them, or resume=True")
    if saved:
        epoch, path = list(saved.items())[-1]
        if epoch > epochs:
            raise ValueError(
                f"epochs={epochs}: {folder} has a checkpoint of epoch {epoch} already: train for at least as many, or "
                f"into another folder; training.weights(folder) has the weights of all of them"
            )
        history = _resumed(path, objects, loader, objective.device)
        first = epoch + 1
    elif seed is not None:
        _seed(arguments.integer("seed", seed, least=0), loader)
    if folder is not None and not saved:
        save_checkpoint(folder, 0, _state(objects, loader, history))
    modes = [(m, m.training) for m in model.modules()]
    bar = data.progress(range(first, epochs + 1), verbose, type(model).__name__)
    try:
        for epoch in bar:
            began = time.perf_counter()
            model.train()
            row: dict[str, Any] = {"epoch": epoch, "lr": float(optimizer.param_groups[0]["lr"])}
            row.update(_epoch(objective, optimizer, loader, epoch))
            if scheduler is not None:
                scheduler.step(*((row["loss"],) if isinstance(scheduler, ReduceLROnPlateau) else ()))
            if average is not None and average.due(epoch):
                average.update(model)
            if test_loader is not None and (epoch % evaluate_every == 0 or epoch == epochs):
                with in_eval_mode(model):
                    row.update(_named("test_", objective.measure(test_loader)))
            row["seconds"] = time.perf_counter() - began
            history.rows.append(row)
            if hasattr(bar, "set_postfix"):
                shown = ("loss", "accuracy", "test_loss", "test_accuracy")
                bar.set_postfix({k: f"{row[k]:.4g}" for k in shown if row.get(k) is not None})
            if folder is not None and (epoch % save_every == 0 or epoch == epochs):
                save_checkpoint(folder, epoch, _state(objects, loader, history))
    finally:
        for module, training in modes:
            module.training = training
    return history


def _epoch(objective: Objective, optimizer: Any, loader: Any, epoch: int) -> dict[str, Any]:
    """One pass over the data, a step for each minibatch."""
    loss, weight, n, norms = 0.0, 0.0, 0, 0.0
    found: list[Hits | None] = []
    steps = 0
    minibatches: Iterable[Any] = [loader] if data.is_minibatch(loader) else loader
    for raw in minibatches:
        batch = objective.of_one(raw)
        try:
            total, w, hits, norm = _step(objective, optimizer, batch)
        except ValueError as error:
            if "NaN or infinite" not in str(error) or (epoch, steps) == (1, 0):
                raise
            raise _diverged(epoch, steps) from error
        if not math.isfinite(total) or not math.isfinite(norm):
            raise _diverged(epoch, steps)
        loss, weight, n, norms, steps = loss + total, weight + w, n + data.count(batch), norms + norm, steps + 1
        found.append(hits)
    if steps == 0:
        raise ValueError(f"loader: it yielded no minibatch in epoch {epoch}")
    with torch.no_grad():
        weights = float(nn.utils.get_total_norm(list(objective.model.parameters())))
    of = measured(loss / weight if objective.mean else loss, found, n)
    return {**_named("", of), "grad_norm": norms / steps, "weight_norm": weights}


def _diverged(epoch: int, steps: int) -> ValueError:
    return ValueError(
        f"weights, loss or gradient are not finite any more in epoch {epoch}, step {steps + 1}: take a smaller "
        "learning rate, or clip gradients in a hook of the optimiser"
    )


def _step(objective: Objective, optimizer: Any, batch: data.Batch) -> tuple[float, float, Hits | None, float]:
    """One step of the optimiser: the sum of losses, what it counts, what is right, and the norm of the gradient."""
    seen: list[tuple[float, float, Hits | None]] = []

    def closure() -> torch.Tensor:
        optimizer.zero_grad()
        total, w, hits = objective.total(batch)
        value = total / w if objective.mean else total
        value.backward()
        seen.append((float(total.detach()), w, hits))
        return value.detach()

    if hasattr(optimizer, "sampled"):
        for k in range(optimizer.samples):
            with optimizer.sampled():
                total, w, hits = objective.total(batch)
                (total / w if objective.mean else total).backward()
                _observe(optimizer, batch)
            if k == 0:
                seen.append((float(total.detach()), w, hits))
        norm = _grad_norm(objective.model)
        optimizer.step()
        optimizer.zero_grad()
    elif _needs_closure(optimizer):
        if hasattr(optimizer, "observe"):
            closure()
            _observe(optimizer, batch)
        optimizer.step(closure)
        norm = _grad_norm(objective.model)
    else:
        closure()
        _observe(optimizer, batch)
        norm = _grad_norm(objective.model)
        optimizer.step()
    return *seen[0], norm


def _observe(optimizer: Any, batch: data.Batch) -> None:
    if hasattr(optimizer, "observe"):
        optimizer.observe(data.content(batch))


def _needs_closure(optimizer: Any) -> bool:
    """Whether a step takes a closure: as the optimiser says, or as its signature does."""
    said = getattr(optimizer, "needs_closure", None)
    if said is not None:
        return bool(said)
    closure = inspect.signature(optimizer.step).parameters.get("closure")
    return closure is not None and closure.default is closure.empty


def _grad_norm(model: nn.Module) -> float:
    grads = [p.grad for p in model.parameters() if p.grad is not None]
    return float(nn.utils.get_total_norm(grads)) if grads else 0.0


def _named(prefix: str, of: Measured) -> dict[str, float | None]:
    named = {"loss": of.loss, "accuracy": of.accuracy, "top5": of.top5}
    return {prefix + name: value for name, value in named.items() if value is not None}


def _seed(seed: int, loader: Any) -> None:
    torch.manual_seed(seed)
    random.seed(seed)
    np.random.seed(seed % 2**32)  # noqa: NPY002 (datasets draw from the global one)
    for generator in generators(loader):
        if isinstance(generator, torch.Generator):
            generator.manual_seed(seed)
        else:
            generator.bit_generator.state = type(generator.bit_generator)(seed).state


def _state(objects: dict[str, Any], loader: Any, history: History) -> dict[str, Any]:
    states = {name: None if one is None else one.state_dict() for name, one in objects.items()}
    return {**states, "kinds": _kinds(objects), "random": random_states(loader), "history": history.rows}


def _kinds(objects: dict[str, Any]) -> dict[str, str]:
    """What wrote the states that others take for theirs."""
    return {name: type(objects[name]).__name__ for name in ("optimizer", "scheduler") if objects[name] is not None}


def _resumed(path: Path, objects: dict[str, Any], loader: Any, device: torch.device) -> History:
    """All as a checkpoint has it, or as it was where that cannot be."""
    state = load_checkpoint(path, device)
    for name in ("scheduler", "average"):
        if (state[name] is None) != (objects[name] is None):
            raise ValueError(
                f"{name}: the checkpoint {path} was written {'without' if state[name] is None else 'with'} one: train "
                "with the same arguments, or into another folder"
            )
    kinds = _kinds(objects)
    for name, kind in state.get("kinds", kinds).items():
        if kind != kinds[name]:
            raise ValueError(
                f"{name}: the checkpoint {path} is of {kind}, not of {kinds[name]}: train with the same arguments, or "
                "into another folder"
            )
    given = {name: one for name, one in objects.items() if one is not None and name != "average"}
    before = {name: copy.deepcopy(one.state_dict()) for name, one in given.items()}
    try:
        try:
            for name, one in given.items():
                one.load_state_dict(state[name])
        except (RuntimeError, ValueError, KeyError) as error:
            lines = str(error).strip().splitlines()
            raise ValueError(
                f"checkpoints: {path} is of another model or optimiser ({lines[min(1, len(lines) - 1)].strip()}): "
                "train into another folder"
            ) from error
        if objects["average"] is not None:
            objects["average"].restore(objects["model"], state["average"])
        set_random_states(loader, state["random"])
    except BaseException:
        for name, one in given.items():  # torch has copied what fits
            one.load_state_dict(before[name])
        raise
    return History(state["history"])


#: The examples of functions that stand wrapped above, for doctest to find.
__test__ = {f.__name__: f.__doc__ or "" for f in (evaluate, train)}
