"""Fisher information and gradient covariance matrices: the same fit, with different cotangents."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from . import arguments
from .changes import uncast
from .generator import CotangentFunction, Curvature, Generator, OfSeveral, rowwise
from .layercollection import LayerCollection
from .likelihood import VARIANTS, Cotangents, Likelihood, likelihood_of, of_covariance
from .losses import Loss, OwnLoss, example_loss, loss_gradient
from .losses.targets import Targets, selected
from .model import data
from .object.pmat import PMat
from .reading import together
from .spelling import ORDER, positions
from .team import drawn_seed
from .undivided import Undivided, UndividedLoss, all_rows, curvature_of_rows, each_row, of_rows

#: A PMat class, a functools.partial of one, or PMatMixed.of(...).
Representation = Callable[..., Any]


@uncast
@together
@arguments.called_as
def FIM(
    model: nn.Module,
    loader: Any,
    representation: Representation,
    variant: str | Likelihood = "classif_logits",
    *old: Any,
    n_output: int | None = None,
    function: Callable[..., Any] | None = None,
    layer_collection: LayerCollection | None = None,
    batch_statistics: bool = False,
    unit: str = "example",
    device: torch.device | str | None = None,
    verbose: bool = False,
    process_group: Any = None,
    checkpoint: str | Path | None = None,
    every: int | None = None,
    keep_checkpoint: bool = False,
    **options: Any,
) -> Any:
    """The Fisher information matrix ``F = 1/n sum_x E_{y ~ p(y|x)} [grad log p (grad log p)^T]``, with the expectation
    over y exact.

    The log-likelihood of an example is the sum over its positions (pixels, tokens), so an example is one row of the
    output.

    Args:
        model: The model, in eval mode; or in train mode with ``batch_statistics`` or ``unit``.
        loader: A DataLoader, an iterable of minibatches (tuple, list, dict), or one minibatch.
        representation: A PMat class, a partial of one, or ``PMatMixed.of(...)``.
        variant: What the output means: "classif_logits" (the default), "classif_binary_logits", "regression",
            "segmentation_logits" or a :class:`~nngeometry.likelihood.Likelihood`.
        *old: Of device, function, layer_collection and verbose, by position in NNGeometry's order.
        n_output: How many outputs the model should have, if that is to be checked.
        function: ``function(*minibatch) -> outputs``, by default ``model(minibatch[0])``; of a mapping or an object
            ``function(minibatch)``, as of a named tuple or a list of examples if it takes one argument.
        layer_collection: The coordinates, by default all trainable parameters.
        batch_statistics: Whether BatchNorm uses the statistics of the minibatch at hand, held constant, dropout is off,
            and running statistics are left alone. By default not.
        unit: What counts as an example: "example" (the default), a row of the output; or "minibatch", of which nothing
            is taken apart or looked at. Its likelihood is the product of those of the rows of its output, and n counts
            minibatches.
        device: Where minibatches go, by default to the model.
        verbose: Whether to show a progress bar; by default not.
        process_group: Of ``torch.distributed``: its ranks call this together, each with its own minibatches
            (:func:`nngeometry.distributed.shard`), and all get the matrix of all.
        checkpoint: A file in which what was seen is written now and then, so that the same call goes on from there when
            the program was stopped, on any number of ranks.
        every: After how many minibatches of a rank it is written, by default 100.
        keep_checkpoint: Whether the file stays when the matrix is done; by default it goes.
        **options: Those of the representation.

    Returns:
        The matrix, a PMat of the representation.

    Raises:
        ValueError: For a model whose per-example derivatives are undefined (train-mode BatchNorm, dropout, ...), with
            the remedy.

    Example:
        >>> from nngeometry import FIM, PMatDense, PMatKFAC
        >>> model = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3))
        >>> x = torch.randn(20, 4)
        >>> FIM(model, (x,), PMatKFAC, n_output=3).size()
        (43, 43)

    Source: Pascanu and Bengio (2013), 1301.3584; Kunstner, Balles, Hennig (2019), 1905.12558.
    """
    if old or isinstance(variant, int):
        options |= {"n_output": n_output, "function": function, "layer_collection": layer_collection}
        options |= {"device": device, "verbose": verbose}
        return FIM(model, loader, representation, **positions("FIM", ("variant", *ORDER), (variant, *old), options))
    arguments.variant(variant, Likelihood, list(VARIANTS))
    likelihood = likelihood_of(variant)

    def curvature(f: Tensor, u: Tensor, batch: data.Batch, position: int) -> Tensor:
        return likelihood.hvp(f, u)

    return _matrix(
        rowwise(lambda f, batch, position: likelihood.sqrt(f)),
        model,
        loader,
        representation,
        n_output,
        layer_collection,
        _how(function, device, verbose, batch_statistics, unit),
        options,
        each_row,
        curvature=curvature,
        likelihood=likelihood,
    )


@uncast
@together
@arguments.called_as
def FIM_MonteCarlo(
    model: nn.Module,
    loader: Any,
    representation: Representation,
    variant: str | Likelihood = "classif_logits",
    *old: Any,
    trials: int = 1,
    generator: torch.Generator | None = None,
    covariance: Any = None,
    n_output: int | None = None,
    function: Callable[..., Any] | None = None,
    layer_collection: LayerCollection | None = None,
    batch_statistics: bool = False,
    unit: str = "example",
    device: torch.device | str | None = None,
    verbose: bool = False,
    process_group: Any = None,
    checkpoint: str | Path | None = None,
    every: int | None = None,
    keep_checkpoint: bool = False,
    **options: Any,
) -> Any:
    """An unbiased estimate of the Fisher information matrix, from draws of y from p(y|x) for each example.

    The draws are a function of ``generator`` and of the position of a minibatch in the loader, so every pass over the
    same data sees the same ones.

    Args:
        model: As in :func:`~nngeometry.FIM`.
        loader: As in :func:`~nngeometry.FIM`.
        representation: As in :func:`~nngeometry.FIM`.
        variant: As in :func:`~nngeometry.FIM`.
        *old: Of trials, device, function, layer_collection and verbose, by position in NNGeometry's order.
        trials: How many draws for each example, by default one.
        generator: The source of randomness, by default torch's global one, of which one number is drawn.
        covariance: NNGeometry's c for ``variant=Gaussian(1 / c)``.
        n_output: As in :func:`~nngeometry.FIM`.
        function: As in :func:`~nngeometry.FIM`.
        layer_collection: As in :func:`~nngeometry.FIM`.
        batch_statistics: As in :func:`~nngeometry.FIM`.
        unit: As in :func:`~nngeometry.FIM`.
        device: As in :func:`~nngeometry.FIM`.
        verbose: As in :func:`~nngeometry.FIM`.
        process_group: As in :func:`~nngeometry.FIM`.
        checkpoint: As in :func:`~nngeometry.FIM`.
        every: As in :func:`~nngeometry.FIM`.
        keep_checkpoint: As in :func:`~nngeometry.FIM`.
        **options: As in :func:`~nngeometry.FIM`.

    Returns:
        The matrix, a PMat of the representation.

    Raises:
        ValueError: As :func:`~nngeometry.FIM`, and for fewer than one draw.

    Example:
        >>> from nngeometry import FIM_MonteCarlo, PMatDiag
        >>> model = nn.Linear(4, 3)
        >>> g = torch.Generator().manual_seed(0)
        >>> F = FIM_MonteCarlo(model, (torch.randn(20, 4),), PMatDiag, trials=2, generator=g)
    """
    if old or isinstance(variant, int):
        options |= {"n_output": n_output, "function": function, "layer_collection": layer_collection, "trials": trials}
        options |= {"device": device, "verbose": verbose, "generator": generator, "covariance": covariance}
        options = positions("FIM_MonteCarlo", ("variant", "trials", *ORDER), (variant, *old), options)
        return FIM_MonteCarlo(model, loader, representation, **options)
    if covariance is not None:
        variant = of_covariance(variant, covariance)
    arguments.integer("trials", trials, least=1)
    arguments.variant(variant, Likelihood, list(VARIANTS))
    arguments.generator(generator)
    likelihood = likelihood_of(variant)
    seed = drawn_seed(generator, process_group)

    def cotangents(f: Tensor, batches: Sequence[data.Batch], position: int) -> Cotangents:
        draws = [torch.Generator(f.device).manual_seed(position + k) for k in data.offsets(batches)]
        return likelihood.samples(data.split(f, batches), trials, draws)

    return _matrix(
        OfSeveral(cotangents),
        model,
        loader,
        representation,
        n_output,
        layer_collection,
        _how(function, device, verbose, batch_statistics, unit),
        options,
        all_rows,
        seed=seed,
        likelihood=likelihood,
    )


@uncast
@together
@arguments.called_as
def EmpiricalFisher(
    model: nn.Module,
    loader: Any,
    representation: Representation,
    loss: Loss | None = None,
    *,
    targets: Targets = None,
    n_output: int | None = None,
    function: Callable[..., Any] | None = None,
    layer_collection: LayerCollection | None = None,
    batch_statistics: bool = False,
    unit: str = "example",
    device: torch.device | str | None = None,
    verbose: bool = False,
    process_group: Any = None,
    checkpoint: str | Path | None = None,
    every: int | None = None,
    keep_checkpoint: bool = False,
    **options: Any,
) -> Any:
    """The second moment of per-example loss gradients, ``1/n sum_x g_x g_x^T`` (often called empirical Fisher).

    Outputs and targets of the shapes (n, 1) and (n,) are the same to a loss of ``torch.nn``.

    Args:
        model: As in :func:`~nngeometry.FIM`.
        loader: As in :func:`~nngeometry.FIM`.
        representation: As in :func:`~nngeometry.FIM`.
        loss: ``loss(outputs, *minibatch[1:])`` (``loss(outputs, minibatch)`` for a mapping): a loss of ``torch.nn``,
            :class:`~nngeometry.TokenCrossEntropy` or any callable that returns one value, or several to be summed, for
            each example; by default ``nn.CrossEntropyLoss()``. Its ``reduction`` does not matter: a gradient is that of
            one example's loss, summed over its positions. :class:`~nngeometry.OwnLoss` is the loss that the model
            computes, for minibatches of one example.
        targets: What the loss receives beside the outputs: a key of the minibatch (or a position in the tuple),
            several, or a function of the minibatch that returns one target or a tuple of them. By default all but the
            first element of a tuple, or a whole mapping.
        unit: As in :func:`~nngeometry.FIM`; with "minibatch", the gradient is that of the loss of a minibatch, with its
            own reduction (summed if that leaves several values), and examples may depend on each other.
        n_output: As in :func:`~nngeometry.FIM`.
        function: As in :func:`~nngeometry.FIM`.
        layer_collection: As in :func:`~nngeometry.FIM`.
        batch_statistics: As in :func:`~nngeometry.FIM`.
        device: As in :func:`~nngeometry.FIM`.
        verbose: As in :func:`~nngeometry.FIM`.
        process_group: As in :func:`~nngeometry.FIM`.
        checkpoint: As in :func:`~nngeometry.FIM`.
        every: As in :func:`~nngeometry.FIM`.
        keep_checkpoint: As in :func:`~nngeometry.FIM`.
        **options: As in :func:`~nngeometry.FIM`.

    Returns:
        The matrix, a PMat of the representation.

    Raises:
        ValueError: As :func:`~nngeometry.FIM`, for shapes of outputs and targets that would be broadcast, and for a
            loss whose value for an example depends on other examples.

    Example:
        >>> from nngeometry import EmpiricalFisher, PMatDiag
        >>> model = nn.Linear(4, 3)
        >>> F = EmpiricalFisher(model, (torch.randn(20, 4), torch.randint(3, (20,))), PMatDiag)
    """
    how = _how(function, device, verbose, batch_statistics, unit)
    return _of_gradients(loss, targets, model, loader, representation, n_output, layer_collection, how, options)


@uncast
@together
@arguments.called_as
def GradientCovariance(
    model: nn.Module,
    loader: Any,
    representation: Representation,
    loss: Loss | None = None,
    *,
    targets: Targets = None,
    n_output: int | None = None,
    function: Callable[..., Any] | None = None,
    layer_collection: LayerCollection | None = None,
    batch_statistics: bool = False,
    unit: str = "example",
    device: torch.device | str | None = None,
    verbose: bool = False,
    process_group: Any = None,
    checkpoint: str | Path | None = None,
    every: int | None = None,
    keep_checkpoint: bool = False,
    **options: Any,
) -> Any:
    """The covariance of per-example loss gradients, ``1/n sum_x (g_x - g)(g_x - g)^T`` with g their mean.

    Args:
        model: As in :func:`~nngeometry.FIM`.
        loader: As in :func:`~nngeometry.FIM`.
        representation: As in :func:`~nngeometry.FIM`.
        loss: As in :func:`~nngeometry.EmpiricalFisher`, which is the same without centring.
        targets: As in :func:`~nngeometry.EmpiricalFisher`.
        unit: As in :func:`~nngeometry.EmpiricalFisher`.
        n_output: As in :func:`~nngeometry.FIM`.
        function: As in :func:`~nngeometry.FIM`.
        layer_collection: As in :func:`~nngeometry.FIM`.
        batch_statistics: As in :func:`~nngeometry.FIM`.
        device: As in :func:`~nngeometry.FIM`.
        verbose: As in :func:`~nngeometry.FIM`.
        process_group: As in :func:`~nngeometry.FIM`.
        checkpoint: As in :func:`~nngeometry.FIM`.
        every: As in :func:`~nngeometry.FIM`.
        keep_checkpoint: As in :func:`~nngeometry.FIM`.
        **options: As in :func:`~nngeometry.FIM`.

    Returns:
        The matrix, a PMat of the representation.

    Raises:
        NotImplementedError: For PMatKFAC, which has no centred form.

    Example:
        >>> from nngeometry import GradientCovariance, PMatDiag
        >>> model = nn.Linear(4, 3)
        >>> C = GradientCovariance(model, (torch.randn(20, 4), torch.randint(3, (20,))), PMatDiag)
    """
    how = {**_how(function, device, verbose, batch_statistics, unit), "centred": True}
    return _of_gradients(loss, targets, model, loader, representation, n_output, layer_collection, how, options)


def gradients_of(loss: Loss, targets: Targets = None, unit: str = "example") -> CotangentFunction:
    """The gradient of each example's loss, as the one cotangent."""
    arguments.loss(loss)
    loss = nn.CrossEntropyLoss() if loss is None else loss
    given = selected(targets)
    if unit == "minibatch":
        gradient = UndividedLoss(loss).gradient
    else:
        gradient = arguments.explaining(loss, partial(loss_gradient, example_loss(loss)))

    def cotangents(f: Tensor, batch: data.Batch, position: int) -> Cotangents:
        return Cotangents.of(gradient(f, *given(batch)).unsqueeze(0))

    return cotangents


class OwnGradients(Undivided):
    """The gradient of the loss that the model itself computes, which is the output. Arguments as in
    :class:`~nngeometry.Generator`.
    """

    def __init__(
        self,
        model: nn.Module,
        layer_collection: LayerCollection,
        loss: OwnLoss,
        *,
        function: Callable[..., Any] | None = None,
        unit: str = "example",
        **options: Any,
    ) -> None:
        def cotangents(f: Tensor, batch: data.Batch, position: int) -> Cotangents:
            return Cotangents.of(torch.ones_like(f).unsqueeze(0))

        loss.check_unit(unit)
        super().__init__(
            model, layer_collection, rowwise(cotangents), function=loss.function(model, function), unit=unit, **options
        )

    def outputs(self, batch: data.Batch) -> Tensor:
        """The loss ``(1,)`` of a minibatch that counts as one example."""
        n = data.count(batch)
        if n != 1:
            raise ValueError(
                f"loss=OwnLoss(): the loss of a minibatch of {n} examples is one number, which does not tell their "
                "gradients apart: use minibatches of one example, DataLoader(batch_size=1), or give the loss as a "
                'function of the output (e.g. TokenCrossEntropy), or pass unit="minibatch", by which a minibatch '
                "counts as one example"
            )
        return self.outputs_unchecked(batch).reshape(1)

    def joined(self, examples: Any, made_of_two: Callable[[data.Batch], int]) -> Iterator[tuple[int, list[data.Batch]]]:
        """The minibatches, each for itself."""
        return ((k, [batch]) for k, batch in enumerate(self.minibatches(examples)))


def gradient_source(
    model: nn.Module,
    layer_collection: LayerCollection,
    loss: Loss,
    targets: Targets,
    *,
    n_output: int | None = None,
    **how: Any,
) -> Generator:
    """The stream of the gradients of a loss at single examples."""
    if not isinstance(loss, OwnLoss):
        cotangents = rowwise(gradients_of(loss, targets, how["unit"]))
        return _source(model, layer_collection, cotangents, n_output, how)
    for name, given in (("targets", targets), ("n_output", n_output)):
        if given is not None:
            raise ValueError(f"{name}: a model with loss=OwnLoss() computes the loss itself, so leave {name} out")
    return OwnGradients(model, layer_collection, loss, **how)


def _how(
    function: Callable[..., Any] | None,
    device: torch.device | str | None,
    verbose: bool,
    batch_statistics: bool,
    unit: str,
) -> dict[str, Any]:
    """How the model is run, as options of a source."""
    return {
        "function": function,
        "device": device,
        "verbose": verbose,
        "batch_statistics": batch_statistics,
        "unit": unit,
    }


def _of_gradients(
    loss: Loss,
    targets: Targets,
    model: nn.Module,
    loader: Any,
    representation: Representation,
    n_output: int | None,
    layer_collection: LayerCollection | None,
    how: dict[str, Any],
    options: dict[str, Any],
) -> PMat:
    lc = _checked(model, loader, representation, n_output, layer_collection, how, options)
    arguments.loss(loss)
    source = gradient_source(model, lc, loss, targets, n_output=n_output, **how)
    return _represented(source, loader, representation, options)


def _checked(
    model: nn.Module,
    loader: Any,
    representation: Representation,
    n_output: int | None,
    layer_collection: LayerCollection | None,
    how: dict[str, Any],
    options: dict[str, Any],
) -> LayerCollection:
    """The layer collection, after a look at all that a matrix takes."""
    arguments.call(model, loader, how["function"], layer_collection, LayerCollection, how["device"])
    arguments.of_training(how["batch_statistics"], how["unit"])
    arguments.representation(representation, PMat, options, FIM, "plan")
    if n_output is not None:
        arguments.integer("n_output", n_output, least=1)
    return LayerCollection.from_model(model) if layer_collection is None else layer_collection


def _matrix(
    cotangents: OfSeveral,
    model: nn.Module,
    loader: Any,
    representation: Representation,
    n_output: int | None,
    layer_collection: LayerCollection | None,
    how: dict[str, Any],
    options: dict[str, Any],
    laid: Callable[[Cotangents, int], Cotangents],
    curvature: Curvature | None = None,
    seed: int = 0,
    likelihood: Likelihood | None = None,
) -> PMat:
    """laid: how the cotangents of rows become those of a minibatch that counts as one example."""
    lc = _checked(model, loader, representation, n_output, layer_collection, how, options)
    if how["unit"] == "minibatch":
        cotangents = of_rows(cotangents, laid)
        curvature = None if curvature is None else curvature_of_rows(curvature)
    source = _source(model, lc, cotangents, n_output, {**how, "curvature": curvature, "seed": seed})
    source.likelihood = likelihood
    return _represented(source, loader, representation, options)


def _source(
    model: nn.Module,
    layer_collection: LayerCollection,
    cotangents: OfSeveral,
    n_output: int | None,
    how: dict[str, Any],
) -> Generator:
    undivided = how["unit"] == "minibatch"

    def checked(f: Tensor, batches: Sequence[data.Batch], position: int) -> Cotangents | None:
        shape = f.shape[2:] if undivided else f.shape[1:]
        if n_output is not None and shape.numel() != n_output and shape[:1] != (n_output,):
            raise ValueError(
                f"n_output={n_output}, but the model returns outputs of shape {tuple(shape)} for each "
                f"{'row' if undivided else 'example'}: leave n_output out"
            )
        return cotangents(f, batches, position)

    return (Undivided if undivided else Generator)(model, layer_collection, OfSeveral(checked), **how)


def _represented(source: Generator, loader: Any, representation: Representation, options: dict[str, Any]) -> PMat:
    return representation(layer_collection=source.layer_collection, generator=source, examples=loader, **options)


__test__ = {f.__name__: f.__doc__ or "" for f in (FIM, FIM_MonteCarlo, EmpiricalFisher, GradientCovariance)}
