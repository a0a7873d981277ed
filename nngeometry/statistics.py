"""Statistics of a loss over minibatches: of its value, its gradient and its curvature."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from . import arguments
from .changes import Borrowed, modes_kept, no_grad, recording, uncast
from .hessian import Hessian
from .layercollection import LayerCollection
from .linalg import Estimate
from .losses import Loss
from .losses.targets import Targets
from .metrics import Representation
from .minibatches import POWER, Moments, block_statistics, estimated, exact
from .model import data
from .model.evaluator import check_mode
from .object import PMat, PMatImplicit, PVector
from .objective import Measured, Objective, as_found, in_eval_mode
from .tables import as_html, number

#: Errors from fewer random vectors are too small: with 6, one in eight intervals of 95 % misses, of some layers one in
#: four.
_FEWEST = 12


@dataclass(frozen=True)
class BlockStatistics:
    """Of the gradient and the curvature of some parameters: P of them, over B minibatches.

    All are :class:`~nngeometry.linalg.Estimate`, with error zero where they are exact. Errors are those of random
    vectors: the minibatches are taken as they are.

    Attributes:
        size: P.
        minibatches: B.
        gradient_norm2: ``|mean g|^2``.
        gradient_variance: ``mean |g_b|^2 - |mean g|^2``.
        trace: ``tr M``, with M the mean of the matrices M_b of minibatches.
        norm2: ``|M|_F^2``.
        curvature_variance: ``mean |M_b - M|_F^2``.
        spectral_mean: ``mu = tr M / P``, the mean eigenvalue.
        spectral_variance: ``delta = |M - mu|_F^2 / P``, the variance of the eigenvalues.
        shrinkage: ``max(0, 1 - curvature_variance / (B P delta))``: how much of the spread of the eigenvalues of M is
            not due to the randomness of minibatches (Ledoit and Wolf). NaN if all eigenvalues are the same.
        l2: ``|w|``, of the parameters.
        linf: The largest ``|w_i|``.
    """

    size: int
    minibatches: int
    gradient_norm2: Estimate
    gradient_variance: Estimate
    trace: Estimate
    norm2: Estimate
    curvature_variance: Estimate
    spectral_mean: Estimate
    spectral_variance: Estimate
    shrinkage: Estimate
    l2: float
    linf: float

    @property
    def exact(self) -> bool:
        """Whether the curvature is exact."""
        return float(self.trace.error) == 0

    def columns(self) -> dict[str, Estimate]:
        """All numbers by name: absolute ones and, with "per parameter" in the name, divided by P."""
        absolute = {
            "|gradient|^2": self.gradient_norm2,
            "gradient variance": self.gradient_variance,
            "trace": self.trace,
            "|curvature|^2": self.norm2,
            "curvature variance": self.curvature_variance,
        }
        out: dict[str, Estimate] = {}
        for name, e in absolute.items():
            out[name] = e
            out[f"{name} per parameter"] = Estimate(e.value / self.size, e.error / self.size, e.products)
        out["spectral variance"] = self.spectral_variance
        out["shrinkage"] = self.shrinkage
        out["|weights|"] = _exactly(self.l2)
        out["max |weight|"] = _exactly(self.linf)
        return out


@dataclass(frozen=True)
class LossStatistics(BlockStatistics):
    """Of all parameters, with the loss itself.

    Attributes:
        loss: The mean of the losses of minibatches.
        loss_variance: Their variance, ``mean L_b^2 - (mean L_b)^2``.
        train: Loss and accuracy of all examples together.
        test: The same of other data, None if there are none.
        layers: The same statistics of the diagonal block of each layer, by its name; empty unless asked for.
    """

    loss: float
    loss_variance: float
    train: Measured
    test: Measured | None
    layers: Mapping[str, BlockStatistics] = field(default_factory=dict)

    def columns(self) -> dict[str, Estimate]:
        first = {"loss": self.loss, "loss variance": self.loss_variance}
        for name, of in (("train", self.train), ("test", self.test)):
            if of is not None:
                first[f"{name} loss"] = of.loss
                if of.accuracy is not None:
                    first[f"{name} accuracy"] = of.accuracy
        return {**{name: _exactly(value) for name, value in first.items()}, **super().columns()}

    def __str__(self) -> str:
        return _as_text(self._titled())

    def _repr_html_(self) -> str:
        return _as_html(self._titled())

    def _titled(self) -> list[tuple[str, BlockStatistics]]:
        return [("all", self), *((name or "(root)", of) for name, of in self.layers.items())]


@dataclass(frozen=True)
class Trajectory:
    """Statistics at several checkpoints of a training, in order.

    Attributes:
        at: From the epoch, or whatever names a checkpoint, to its statistics.
    """

    at: Mapping[Any, LossStatistics]

    def columns(self) -> dict[str, list[Estimate]]:
        """For each statistic its values at all points; those that some points lack are left out."""
        rows = [statistics.columns() for statistics in self.at.values()]
        first = rows[0] if rows else {}
        return {name: [row[name] for row in rows] for name in first if all(name in row for row in rows)}

    def __str__(self) -> str:
        return _as_text(self._titled())

    def _repr_html_(self) -> str:
        return _as_html(self._titled())

    def _titled(self) -> list[tuple[str, BlockStatistics]]:
        return [(str(at), of) for at, of in self.at.items()]


@uncast
@arguments.called_as
def loss_statistics(
    model: nn.Module,
    loader: Any,
    loss: Loss | None = None,
    matrix: Callable[..., Any] = Hessian,
    *,
    representation: Representation = PMatImplicit,
    probes: int = 30,
    per_layer: bool = False,
    test_loader: Any = None,
    generator: torch.Generator | None = None,
    targets: Targets = None,
    function: Callable[..., Any] | None = None,
    layer_collection: LayerCollection | None = None,
    device: torch.device | str | None = None,
    verbose: bool = False,
    **options: Any,
) -> LossStatistics:
    """Means and variances of loss, gradient and curvature over the minibatches of a loader: :class:`LossStatistics`.

    Every minibatch counts the same, also a last one that has fewer examples: let the loader drop it.

    With a representation that holds its entries (PMatDense, PMatBlockDiag, PMatDiag, ...) all numbers are exact, those
    of the matrix in that representation. With PMatImplicit the curvature is estimated: a third of the random vectors
    find the directions in which M is large, there all is computed exactly, and the rest is sampled orthogonally to
    them. That takes 5/3 ``probes`` products for each minibatch, in three passes, and is exact where there are no more
    parameters than probes.

    Args:
        model: In eval mode, as for the matrix.
        loader: A DataLoader, or an iterable of minibatches that can be read twice.
        loss: As in :func:`~nngeometry.Hessian`, by default ``nn.CrossEntropyLoss()``.
        matrix: Whose statistics are those of the curvature: Hessian, GGN, EmpiricalFisher, FIM, ...
        representation: A PMat class or a partial of one.
        probes: Random vectors, at least 12; with 30 the standard error of a trace is a few per cent. Of few the errors
            are uncertain themselves: where 5 % should be further away than two of them, 8 % are with 12, 6 % with 30.
        per_layer: Whether the diagonal block of each layer is looked at too: as many products again for each layer.
        test_loader: Data on which loss and accuracy are computed too.
        generator: Of the random vectors, by default torch's global one.
        targets: What the loss receives beside the outputs, as in :func:`~nngeometry.Hessian`.
        function: As in :func:`~nngeometry.FIM`.
        layer_collection: The parameters, by default all that are trainable.
        device: Where minibatches go, by default to the model.
        verbose: Show a progress bar.
        **options: Of the matrix, e.g. ``variant=`` of FIM.

    Raises:
        ValueError: For a loader that cannot be read twice or has no labels, a model in train mode.

    Example:
        >>> from nngeometry import GGN, PMatDense
        >>> model = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3))
        >>> loader = [(torch.randn(20, 4), torch.randint(3, (20,))) for _ in range(4)]
        >>> found = loss_statistics(model, loader, matrix=GGN, representation=PMatDense)
        >>> found.size, found.minibatches, found.exact, bool(found.trace.value > 0)
        (43, 4, True, True)
        >>> bool(found.columns()["trace per parameter"].value == found.trace.value / 43)
        True

    Source: Ledoit and Wolf (2004), J. Multivariate Anal. 88, for the shrinkage; Meyer et al. (2020), 2010.09649, for
    the estimates.
    """
    _check(model, loader, function, layer_collection, device, matrix, probes, per_layer, generator)
    lc = LayerCollection.from_model(model) if layer_collection is None else layer_collection
    shared: dict[str, Any] = {"targets": targets, "function": function, "device": device}
    objective = Objective(model, loss, layer_collection=lc, **shared)
    known = inspect.signature(matrix).parameters
    given = {"layer_collection": lc, **{k: v for k, v in shared.items() if k in known}, **options}
    if "loss" in known:
        given["loss"] = loss

    def of(batch: data.Batch) -> PMat:
        made: PMat = matrix(model, [data.content(batch)], representation, **given)
        return made

    if data.is_minibatch(loader):
        loader = data.Minibatches([loader])
    slices = lc.slices()
    names: list[str | None] = [None, *(lc if per_layer else ())]
    first = of(next(iter(objective.minibatches(loader))))
    implicit = first.root.matrix_free
    passes = 2 + POWER if implicit else 2
    steps = iter(data.progress(range(passes * _length(loader, objective)), verbose, "statistics"))

    def minibatches() -> Iterator[data.Batch]:
        for batch in objective.minibatches(loader):
            next(steps, None)
            yield batch

    losses, gradient = _gradients(objective, minibatches())
    if implicit:
        curvature = estimated(of, minibatches, names, first, probes, generator)
    else:
        curvature = exact(of, minibatches, names)
    w = PVector.from_model(model, lc).to_torch().detach()
    with in_eval_mode(model):
        train = objective.measure(loader)
        test = None if test_loader is None else objective.measure(test_loader)
    blocks: dict[str | None, dict[str, Any]] = {}
    for name in names:
        where = slice(None) if name is None else slices[name]
        mean, spread = gradient.mean[where], gradient.spread[where]
        blocks[name] = {
            "size": len(mean),
            "minibatches": len(losses),
            "gradient_norm2": _exactly(mean.square().sum()),
            "gradient_variance": _exactly(spread.sum() / len(losses)),
            **block_statistics(curvature[name], len(mean), len(losses)),
            "l2": float(w[where].double().norm()),
            "linf": float(w[where].abs().max()),
        }
    layers = {name: BlockStatistics(**block) for name, block in blocks.items() if name is not None}
    return LossStatistics(
        **blocks[None],
        loss=float(losses.mean()),
        loss_variance=float(losses.var(correction=0)),
        train=train,
        test=test,
        layers=layers,
    )


@uncast
@arguments.called_as
def loss_trajectory(
    model: nn.Module, checkpoints: Mapping[Any, Mapping[str, Tensor]], loader: Any, *args: Any, **options: Any
) -> Trajectory:
    """:func:`loss_statistics` at several weights of a model, which has its own again afterwards.

    Args:
        model: The model that the weights belong to.
        checkpoints: From names (epochs) to state dicts of the model, e.g. ``training.weights(folder)``.
        loader: And all that follows: as in :func:`loss_statistics`.

    Raises:
        ValueError: If there are none, or they belong to another model.

    Example:
        >>> model = nn.Linear(2, 3).eval()
        >>> begin = {k: v.clone() for k, v in model.state_dict().items()}
        >>> end = {k: 2 * v for k, v in begin.items()}
        >>> path = loss_trajectory(model, {0: begin, 10: end}, [(torch.randn(9, 2), torch.randint(3, (9,)))] * 2)
        >>> weights = path.columns()["|weights|"]
        >>> round(float(weights[1].value / weights[0].value), 6), torch.equal(model.weight, begin["weight"])
        (2.0, True)
    """
    arguments.model(model)
    arguments.instance(
        "checkpoints", checkpoints, Mapping, "pass {epoch: state_dict, ...}, e.g. training.weights(folder)"
    )
    if not checkpoints:
        raise ValueError("checkpoints: there is none")
    found = {}
    with at_checkpoints(model) as load:
        for name in checkpoints:
            load(checkpoints[name], f"checkpoint {name!r}")
            found[name] = loss_statistics(model, loader, *args, **options)
    return Trajectory(found)


class at_checkpoints:
    """Hold a model at one checkpoint after another: ``with at_checkpoints(model) as load: load(state_dict)``. It has
    its own parameters and buffers again afterwards.
    """

    def __init__(self, model: nn.Module) -> None:
        self._model = model
        self._context = Borrowed(self._kept, as_found(model))

    def _kept(self) -> Callable[[], Any]:
        before = [(p, p.detach().clone()) for p in self._model.parameters()]

        def undo() -> None:
            with torch.no_grad():
                for p, value in before:
                    p.copy_(value)

        return undo

    def __enter__(self) -> Callable[..., None]:
        self._context.__enter__()
        return self._load

    def __exit__(self, *exception: Any) -> None:
        self._context.__exit__(*exception)

    def _load(self, state: Mapping[str, Tensor], name: str = "checkpoint") -> None:
        load_weights(self._model, state, name)


def load_weights(model: nn.Module, state: Mapping[str, Tensor], name: str = "checkpoint") -> None:
    """Load a state dict. Raises ``ValueError`` if it is of another model."""
    arguments.instance(name, state, Mapping, "pass a state dict of the model")
    try:
        model.load_state_dict(state)
    except RuntimeError as error:
        first = str(error).strip().splitlines()[1:2] or [str(error)]
        raise ValueError(f"{name} is of another model than this {type(model).__name__}: {first[0].strip()}") from error


# What is summed up over minibatches


def _gradients(objective: Objective, minibatches: Iterator[data.Batch]) -> tuple[Tensor, Moments]:
    """The losses of minibatches in float64, and their gradients summed up."""
    losses, moments = [], Moments()
    check_mode(objective.model)
    for batch in minibatches:
        with Borrowed(modes_kept, recording(True)):
            value, gradient = objective.gradient(batch)
        if not bool(gradient.isfinite().all()):
            raise ValueError("loss: its gradient has NaN or infinite entries: check the targets of this minibatch")
        losses.append(value.double().cpu())
        moments.add(gradient.double())
    return torch.stack(losses), moments


def _exactly(value: Any) -> Estimate:
    value = torch.as_tensor(value, dtype=torch.float64).cpu()
    return Estimate(value, torch.zeros_like(value), 0)


# What is given


def _check(
    model: Any,
    loader: Any,
    function: Any,
    layer_collection: Any,
    device: Any,
    matrix: Any,
    probes: Any,
    per_layer: Any,
    generator: Any,
) -> None:
    arguments.call(model, loader, function, layer_collection, LayerCollection, device)
    if not callable(matrix) or isinstance(matrix, type | nn.Module):
        raise TypeError(f"matrix: expected a constructor such as Hessian or GGN, got {arguments.described(matrix)}")
    arguments.integer("loss_statistics: probes", probes, least=_FEWEST)
    arguments.flag("per_layer", per_layer)
    arguments.generator(generator)
    data.require_repeatable(loader, "loss_statistics")


def _length(loader: Any, objective: Objective) -> int:
    """How many minibatches there are, as far as that is known without reading them."""
    try:
        return len(loader)
    except TypeError:
        with no_grad():
            return sum(1 for _ in objective.minibatches(loader))


# Tables


def _table(of: Sequence[tuple[str, BlockStatistics]]) -> list[list[str]]:
    """A row for each statistic after the titles of columns."""
    columns = [found.columns() for _, found in of]
    names = list(dict.fromkeys(n for column in columns for n in column))
    rows = [[name, *(_number(column.get(name)) for column in columns)] for name in names]
    return [["", *(title for title, _ in of)], *rows]


def _as_text(of: Sequence[tuple[str, BlockStatistics]]) -> str:
    table = _table(of)
    widths = [max(len(row[k]) for row in table) for k in range(len(table[0]))]
    lines = []
    for first, *others in table:
        lines.append(
            "  ".join([first.ljust(widths[0]), *(c.rjust(w) for c, w in zip(others, widths[1:], strict=True))])
        )
    return "\n".join(line.rstrip() for line in lines)


def _as_html(of: Sequence[tuple[str, BlockStatistics]]) -> str:
    header, *rows = _table(of)
    return as_html("", header, rows)


def _number(of: Estimate | None) -> str:
    return "" if of is None else number(float(of.value), float(of.error))


#: The examples of functions that stand wrapped above, for doctest to find.
__test__ = {f.__name__: f.__doc__ or "" for f in (loss_statistics, loss_trajectory)}
