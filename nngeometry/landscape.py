"""Landscapes: the loss along one direction or over the plane of two, around the weights of a model."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from itertools import product
from typing import Any

import torch
from torch import Tensor, nn

from . import arguments
from .changes import uncast
from .hessian import Hessian
from .layercollection import LayerCollection
from .losses import Loss
from .losses.targets import Targets
from .model import data
from .object import PMatImplicit, PVector, at
from .objective import Measured, Objective, in_eval_mode, recompute_batch_norm
from .spectrum import extreme_eigenpairs


@dataclass(frozen=True, eq=False)
class Landscape:
    """Loss and accuracy on a grid, in float64.

    Attributes:
        positions: For one or two directions, where the points are on it, ascending; the middle one is zero.
        loss: At each point, ``(points,)`` or ``(points, points)``, the first direction first.
        accuracy: In the same shape, None for a loss that is not of classes.
        test_loss: Of other data, None if there are none.
        test_accuracy: Of other data.
        names: What the directions are called.
        eigenvalues: Those of the directions, if they are eigenvectors, otherwise None.
    """

    positions: tuple[Tensor, ...]
    loss: Tensor
    accuracy: Tensor | None
    test_loss: Tensor | None
    test_accuracy: Tensor | None
    names: tuple[str, ...]
    eigenvalues: tuple[float, ...] | None = None

    def second_difference(self, direction: int = 0) -> float:
        """``(L(h) - 2 L(0) + L(-h)) / h^2`` at the middle, h the distance of neighbours: for a small h the second
        derivative of the loss along a direction, of an eigenvector its eigenvalue.

        Args:
            direction: Which of two.
        """
        if not 0 <= direction < len(self.positions):
            raise ValueError(f"second_difference: direction={direction}, but there are {len(self.positions)}")
        line = self.loss if self.loss.ndim == 1 else self.loss.movedim(direction, 0)[:, len(self.positions[0]) // 2]
        middle = len(line) // 2
        h = self.positions[direction][middle + 1]
        return float((line[middle + 1] - 2 * line[middle] + line[middle - 1]) / h.square())


@uncast
@arguments.called_as
def landscape(
    model: nn.Module,
    loader: Any,
    directions: PVector | Sequence[PVector],
    *,
    distance: float | Sequence[float] = 1.0,
    points: int = 21,
    test_loader: Any = None,
    loss: Loss | None = None,
    recompute_batch_norm: bool = True,
    filter_normalise: bool = False,
    names: Sequence[str] | None = None,
    targets: Targets = None,
    function: Callable[..., Any] | None = None,
    device: torch.device | str | None = None,
    verbose: bool = False,
) -> Landscape:
    """The loss at ``w + t d`` for a direction d, or at ``w + s d + t e`` for two, in eval mode.

    The model has its own weights, modes and buffers again afterwards, after an exception too.

    Args:
        model: At w.
        loader: As in :func:`~nngeometry.FIM`; it is read once for each point, and once more for BatchNorm.
        directions: One PVector or two, on all or some of the layers. They are taken as long as they are.
        distance: The largest absolute value of t, for each direction or for both.
        points: On each direction, an odd number, so that w is among them.
        test_loader: Other data, for loss and accuracy there.
        loss: As in :func:`~nngeometry.Hessian`, by default ``nn.CrossEntropyLoss()``.
        recompute_batch_norm: Whether BatchNorm gets, at each point, the statistics of the data there. Without it they
            are those at w, which is the function that matrices in eval mode are the derivatives of.
        filter_normalise: Whether each filter of a direction (row of a weight) is made as long as that of the model, and
            biases and the like stay where they are, so that landscapes of different nets can be compared.
        names: What the directions are called in pictures.
        targets: What the loss receives beside the outputs, as in :func:`~nngeometry.Hessian`.
        function: As in :func:`~nngeometry.FIM`.
        device: Where minibatches go, by default to the model.
        verbose: Show a progress bar.

    Raises:
        ValueError: For directions of another model, an even number of points, a loader that cannot be read again.

    Example:
        >>> model = nn.Linear(2, 3)
        >>> batch = torch.randn(20, 2), torch.randint(3, (20,))
        >>> d = PVector.from_model(model).clone().detach()
        >>> line = landscape(model, batch, d, points=5)
        >>> line.positions[0].tolist(), line.loss.shape
        ([-1.0, -0.5, 0.0, 0.5, 1.0], torch.Size([5]))

    Source: Li et al. (2018), 1712.09913, for the normalisation of filters.
    """
    arguments.call(model, loader, function, None, LayerCollection, device)
    given = [directions] if isinstance(directions, PVector) else list(directions)
    if not 1 <= len(given) <= 2:
        raise ValueError(f"directions: expected one PVector, for a line, or two, for a surface, got {len(given)}")
    for d in given:
        arguments.instance("directions", d, PVector, "make one with PVector(layer_collection, tensor)")
        if not bool(d.to_torch().isfinite().all()):
            raise ValueError("directions: one has NaN or infinite entries")
    if arguments.integer("points", points, least=3) % 2 == 0:
        raise ValueError(f"points={points}: an odd number, so that the weights of the model are among the points")
    one = arguments.scalar(distance)
    distances = list(distance) if one is None else [one] * len(given)  # type: ignore[arg-type]
    if len(distances) != len(given):
        raise ValueError(f"distance: {len(distances)} numbers for {len(given)} directions")
    reach = [arguments.number("distance", r, above=0.0) for r in distances]
    data.require_repeatable(loader, "landscape")
    called = [f"direction {k + 1}" for k in range(len(given))] if names is None else list(names)
    if isinstance(names, str) or len(called) != len(given):
        raise ValueError(f"names: expected one for each of {len(given)} directions, got {names!r}")

    whole = LayerCollection.from_model(model, frozen=True)
    shared: dict[str, Any] = {"targets": targets, "function": function, "device": device}
    objective = Objective(model, loss, layer_collection=whole, **shared)
    w = PVector.from_model(model, whole).clone().detach()
    moves = [_whole(d, whole, w) for d in given]
    if filter_normalise:
        moves = [_as_long_as(d, w) for d in moves]
    steps = torch.linspace(-1, 1, points, dtype=torch.float64)
    steps[points // 2] = 0
    grid = [steps * r for r in reach]
    found: list[tuple[Measured, Measured | None]] = []
    with in_eval_mode(model):
        for ts in data.progress(list(product(*(g.tolist() for g in grid))), verbose, "landscape"):
            here = w
            for t, d in zip(ts, moves, strict=True):
                here = here + t * d
            with at(model, here):
                try:
                    if recompute_batch_norm:
                        _recompute(model, loader, function)
                    train = objective.measure(loader)
                    found.append((train, None if test_loader is None else objective.measure(test_loader)))
                except ValueError as error:
                    if "NaN or infinite" not in str(error) or not any(ts):
                        raise
                    where = ", ".join(f"{t:.4g}" for t in ts)
                    raise ValueError(
                        f"landscape: {where} along the directions {error.args[0].partition(':')[0]}: take a smaller "
                        "distance or shorter directions"
                    ) from error
    shape = (points,) * len(given)

    def laid_out(values: Sequence[float | None]) -> Tensor | None:
        return None if any(v is None for v in values) else torch.tensor(values, dtype=torch.float64).view(shape)

    of_loss = laid_out([a.loss for a, _ in found])
    assert of_loss is not None
    return Landscape(
        tuple(grid),
        of_loss,
        laid_out([a.accuracy for a, _ in found]),
        laid_out([None if b is None else b.loss for _, b in found]),
        laid_out([None if b is None else b.accuracy for _, b in found]),
        tuple(called),
    )


@uncast
@arguments.called_as
def along_eigenvectors(
    model: nn.Module,
    loader: Any,
    loss: Loss | None = None,
    ranks: int | Sequence[int | tuple[int, int]] = (0, 1, 2, -1),
    matrix: Callable[..., Any] = Hessian,
    *,
    targets: Targets = None,
    function: Callable[..., Any] | None = None,
    layer_collection: LayerCollection | None = None,
    device: torch.device | str | None = None,
    verbose: bool = False,
    eigen: dict[str, Any] | None = None,
    **options: Any,
) -> dict[int | tuple[int, int], Landscape]:
    """Landscapes along eigenvectors of the curvature, which have length one.

    Args:
        model: In eval mode.
        loader: As in :func:`~nngeometry.FIM`.
        loss: As in :func:`~nngeometry.Hessian`.
        ranks: Which eigenvectors: 0 is of the largest eigenvalue, 1 the second, -1 the smallest. A pair of ranks
            stands for the surface of the two.
        matrix: Whose eigenvectors: Hessian, GGN, ...
        targets: What the loss receives beside the outputs.
        function: As in :func:`~nngeometry.FIM`.
        layer_collection: The parameters, by default all that are trainable.
        device: Where minibatches go.
        verbose: Show progress bars.
        eigen: Options of :func:`~nngeometry.spectrum.extreme_eigenpairs`, e.g. ``{"tol": 1e-6}``.
        **options: Of :func:`landscape`.

    Returns:
        From each rank, or pair, to its landscape, with the eigenvalues.

    Example:
        >>> model = nn.Linear(2, 3).double()
        >>> batch = torch.randn(20, 2).double(), torch.randint(3, (20,))
        >>> found = along_eigenvectors(model, batch, ranks=(0, (0, 1)), distance=0.01, points=3)
        >>> line = found[0]
        >>> abs(line.second_difference() / line.eigenvalues[0] - 1) < 1e-4, found[0, 1].loss.shape
        (True, torch.Size([3, 3]))
    """
    wanted = [ranks] if isinstance(ranks, int) else list(ranks)
    every = [k for rank in wanted for k in (rank if isinstance(rank, tuple) else (rank,))]
    if not every or not all(isinstance(k, int) and not isinstance(k, bool) for k in every):
        raise TypeError(f"ranks: expected whole numbers or pairs of them, got {ranks!r}")
    arguments.keywords("along_eigenvectors", landscape, options, given=("model", "loader", "directions", "loss"))
    known = inspect.signature(matrix).parameters
    shared: dict[str, Any] = {"targets": targets, "function": function, "device": device}
    given = {"loss": loss, "layer_collection": layer_collection, **shared}
    F = matrix(model, loader, PMatImplicit, **{name: v for name, v in given.items() if name in known})
    ends: dict[int, tuple[float, PVector]] = {}
    for which, count in (("largest", 1 + max(every)), ("smallest", -min(every))):
        if count > 0:
            pairs = extreme_eigenpairs(F, count, which, verbose=verbose, **(eigen or {}))  # type: ignore[arg-type]
            for k, (value, vector) in enumerate(zip(pairs.values.tolist(), pairs.vectors, strict=True)):
                ends[k if which == "largest" else -1 - k] = value, vector
    found = {}
    for rank in wanted:
        parts = [ends[k] for k in (rank if isinstance(rank, tuple) else (rank,))]
        made = landscape(
            model,
            loader,
            [vector for _, vector in parts],
            loss=loss,
            **{"names": [f"eigenvalue {value:.4g}" for value, _ in parts], **shared, "verbose": verbose, **options},
        )
        found[rank] = replace(made, eigenvalues=tuple(value for value, _ in parts))
    return found


#: Under the name of which :func:`landscape` has an argument.
_recompute = recompute_batch_norm


def _whole(d: PVector, whole: LayerCollection, w: PVector) -> PVector:
    """A direction on all parameters, zero where it has none. Raises ``ValueError`` if it is of another model."""
    mine, slices = d.layer_collection, whole.slices()
    flat = torch.zeros_like(w.to_torch())
    for name, layer in mine.layers.items():
        theirs = whole.layers.get(name)
        if theirs is None or not set(layer.params) <= set(theirs.params):
            raise ValueError(
                f"directions: the model has no layer {name!r} with parameters "
                f"{', '.join(f'{k} {shape}' for k, shape in layer.params)}: they are of another model"
            )
        of, start = dict(zip([k for k, _ in layer.params], d.to_dict()[name], strict=True)), slices[name].start
        for k, shape in theirs.params:
            length = torch.Size(shape).numel()
            if k in of:
                flat[start : start + length] = of[k].detach().flatten().to(flat)
            start += length
    return PVector(whole, flat)


def _as_long_as(d: PVector, w: PVector) -> PVector:
    """Each filter as long as that of the weights; what has one axis is zero."""
    made = {}
    for name, parts in d.to_dict().items():
        scaled = []
        for part, like in zip(parts, w.to_dict()[name], strict=True):
            if part.ndim < 2:
                scaled.append(torch.zeros_like(part))
                continue
            length = part.flatten(1).norm(dim=1)
            factor = torch.where(length > 0, like.flatten(1).norm(dim=1) / length, 0.0)
            scaled.append(part * factor.view(-1, *[1] * (part.ndim - 1)))
        made[name] = tuple(scaled)
    return PVector(d.layer_collection, dict_repr=made)


#: The examples of functions that stand wrapped above, for doctest to find.
__test__ = {f.__name__: f.__doc__ or "" for f in (landscape, along_eigenvectors)}
