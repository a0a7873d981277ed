"""Fisher information and gradient covariance matrices: the same fit, with different cotangents."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from . import arguments
from .changes import trainable
from .generator import CotangentFunction, Curvature, Generator, Observation, OfSeveral, Plan, rowwise
from .layercollection import LayerCollection
from .likelihood import VARIANTS, Cotangents, Likelihood, likelihood_of, of_covariance
from .losses import Loss, OwnLoss, example_loss, loss_gradient
from .losses.targets import Targets, selected
from .model import data
from .model.evaluator import State, check_mode
from .object.kernel import dense_forms
from .object.pmat import PMat
from .spelling import ORDER, positions

#: A PMat class, a functools.partial of one, or PMatMixed.of(...).
Representation = Callable[..., Any]


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
    device: torch.device | str | None = None,
    verbose: bool = False,
    **options: Any,
) -> Any:
    """The Fisher information matrix ``F = 1/n sum_x E_{y ~ p(y|x)} [grad log p (grad log p)^T]``, with the
    expectation over y exact.

    model: in eval mode. loader: a DataLoader, an iterable of minibatches (tuple, list, dict), or one minibatch.
    representation: a PMat class, a partial of one, or ``PMatMixed.of(...)``; options go to it. variant: what the
    output means, "classif_logits", "classif_binary_logits", "regression", "segmentation_logits" or a
    :class:`~nngeometry.likelihood.Likelihood`. n_output: checked against the model if given. function:
    ``function(*minibatch) -> outputs``, by default ``model(minibatch[0])``; of a mapping or an object
    ``function(minibatch)``, as of a named tuple or a list of examples if it takes one argument. layer_collection: by
    default all trainable parameters. device: where minibatches go, by default to the model. verbose: show a progress
    bar. old: of the last five, by position in NNGeometry's order.

    The log-likelihood of an example is the sum over its positions (pixels, tokens), so an example is one row of the
    output. Raises ``ValueError`` for a model whose per-example derivatives are undefined (train-mode BatchNorm,
    dropout, ...), with the remedy.

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
        function,
        layer_collection,
        device,
        verbose,
        options,
        curvature=curvature,
    )


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
    device: torch.device | str | None = None,
    verbose: bool = False,
    **options: Any,
) -> Any:
    """An unbiased estimate of the Fisher information matrix from ``trials`` draws of y from p(y|x) for each example.

    generator: the source of randomness, by default torch's global one, of which one number is drawn. The draws are
    a function of it and of the position of a minibatch in the loader, so every pass over the same data sees the
    same ones. covariance: NNGeometry's c for ``variant=Gaussian(1 / c)``. The rest is as in :func:`FIM`.

    >>> from nngeometry import FIM_MonteCarlo, PMatDiag
    >>> model = nn.Linear(4, 3)
    >>> F = FIM_MonteCarlo(model, (torch.randn(20, 4),), PMatDiag, trials=2, generator=torch.Generator().manual_seed(0))
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
    seed = int(torch.randint(2**62, (), generator=generator, device=None if generator is None else generator.device))

    def cotangents(f: Tensor, batches: Sequence[data.Batch], position: int) -> Cotangents:
        draws = [torch.Generator(f.device).manual_seed(position + k) for k in range(len(batches))]
        return likelihood.samples(data.split(f, batches), trials, draws)

    return _matrix(
        OfSeveral(cotangents),
        model,
        loader,
        representation,
        n_output,
        function,
        layer_collection,
        device,
        verbose,
        options,
        seed=seed,
    )


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
    device: torch.device | str | None = None,
    verbose: bool = False,
    **options: Any,
) -> Any:
    """The second moment of per-example loss gradients, ``1/n sum_x g_x g_x^T`` (often called empirical Fisher).

    loss: ``loss(outputs, *minibatch[1:])`` (``loss(outputs, minibatch)`` for a mapping), a loss of ``torch.nn``,
    :class:`~nngeometry.TokenCrossEntropy` or any callable that returns one value, or several to be summed, for each
    example; by default ``nn.CrossEntropyLoss()``. Its ``reduction`` does not matter: a gradient is that of one
    example's loss, summed over its positions. :class:`~nngeometry.OwnLoss` is the loss that the model computes, for
    minibatches of one example. targets: what the loss receives beside the outputs, a key of the minibatch (or a
    position in the tuple), several, or a function of the minibatch that returns one target or a tuple of them. The
    rest is as in :func:`FIM`.

    Outputs and targets of the shapes (n, 1) and (n,) are the same to a loss of ``torch.nn``. Raises ``ValueError``
    for whatever else would be broadcast, and for a loss whose value for an example depends on other examples.

    >>> from nngeometry import EmpiricalFisher, PMatDiag
    >>> model = nn.Linear(4, 3)
    >>> F = EmpiricalFisher(model, (torch.randn(20, 4), torch.randint(3, (20,))), PMatDiag)
    """
    return _of_gradients(
        loss, targets, model, loader, representation, n_output, function, layer_collection, device, verbose, options
    )


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
    device: torch.device | str | None = None,
    verbose: bool = False,
    **options: Any,
) -> Any:
    """The covariance of per-example loss gradients, ``1/n sum_x (g_x - g)(g_x - g)^T`` with g their mean.

    Arguments as in :func:`EmpiricalFisher`, which is the same without centring. PMatKFAC has no centred form and
    raises.

    >>> from nngeometry import GradientCovariance, PMatDiag
    >>> model = nn.Linear(4, 3)
    >>> C = GradientCovariance(model, (torch.randn(20, 4), torch.randint(3, (20,))), PMatDiag)
    """
    return _of_gradients(
        loss,
        targets,
        model,
        loader,
        representation,
        n_output,
        function,
        layer_collection,
        device,
        verbose,
        options,
        True,
    )


def gradients_of(loss: Loss, targets: Targets = None) -> CotangentFunction:
    """The gradient of each example's loss, as the one cotangent."""
    arguments.loss(loss)
    loss = nn.CrossEntropyLoss() if loss is None else loss
    gradient, given = arguments.explaining(loss, partial(loss_gradient, example_loss(loss))), selected(targets)

    def cotangents(f: Tensor, batch: data.Batch, position: int) -> Cotangents:
        return Cotangents.of(gradient(f, *given(batch)).unsqueeze(0))

    return cotangents


class OwnGradients(Generator):
    """The gradient of the loss that the model itself computes, for minibatches of one example, whose output is that
    loss. Nothing is looked at but the loss. Arguments as in :class:`~nngeometry.Generator`.
    """

    def __init__(
        self,
        model: nn.Module,
        layer_collection: LayerCollection,
        loss: OwnLoss,
        *,
        function: Callable[..., Any] | None = None,
        **options: Any,
    ) -> None:
        def cotangents(f: Tensor, batch: data.Batch, position: int) -> Cotangents:
            return Cotangents.of(torch.ones_like(f).unsqueeze(0))

        super().__init__(
            model, layer_collection, rowwise(cotangents), function=loss.function(model, function), **options
        )

    def outputs(self, batch: data.Batch) -> Tensor:
        """The loss ``(1,)`` of a minibatch of one example."""
        n = data.count(batch)
        if n != 1:
            raise ValueError(
                f"loss=OwnLoss(): the loss of a minibatch of {n} examples is one number, which does not tell their "
                "gradients apart: use minibatches of one example, DataLoader(batch_size=1), or give the loss as a "
                "function of the output (e.g. TokenCrossEntropy)"
            )
        return self.outputs_unchecked(batch).reshape(1)

    def joined(self, examples: Any, made_of_two: Callable[[data.Batch], int]) -> Iterator[tuple[int, list[data.Batch]]]:
        """The minibatches, each for itself."""
        return ((k, [batch]) for k, batch in enumerate(self.minibatches(examples)))

    def stream(
        self,
        examples: Any,
        plan: Plan | None = None,
        by_example: bool = False,
        join: bool = False,
        first: int | None = None,
    ) -> Iterator[Observation]:
        check_mode(self.model)
        parameters = self.layer_collection.parameters(self.model)
        for batch in self.minibatches(examples):
            state = State(self.model)
            with self.running(trainable(parameters), state):
                f = self.outputs_of(batch)
                state.check(partial(self.outputs_of, batch))
                grads = torch.autograd.grad(f, parameters, allow_unused=True, materialize_grads=True)
            flat = torch.cat([(g.to_dense() if g.is_sparse else g).flatten() for g in grads]).to(self.dtype)
            forms = dict(dense_forms(flat.view(1, 1, -1), self.layer_collection.layers))
            yield Observation(1, 1.0, forms, f.detach(), batch, 1)


def gradient_source(
    model: nn.Module,
    layer_collection: LayerCollection,
    loss: Loss,
    targets: Targets,
    *,
    n_output: int | None = None,
    **options: Any,
) -> Generator:
    """The stream of the gradients of a loss at single examples."""
    if not isinstance(loss, OwnLoss):
        return _source(model, layer_collection, rowwise(gradients_of(loss, targets)), n_output, **options)
    for name, given in (("targets", targets), ("n_output", n_output)):
        if given is not None:
            raise ValueError(f"{name}: a model with loss=OwnLoss() computes the loss itself, so leave {name} out")
    return OwnGradients(model, layer_collection, loss, **options)


def _of_gradients(
    loss: Loss,
    targets: Targets,
    model: nn.Module,
    loader: Any,
    representation: Representation,
    n_output: int | None,
    function: Callable[..., Any] | None,
    layer_collection: LayerCollection | None,
    device: torch.device | str | None,
    verbose: bool,
    options: dict[str, Any],
    centred: bool = False,
) -> PMat:
    lc = _checked(model, loader, representation, n_output, function, layer_collection, device, options)
    arguments.loss(loss)
    source = gradient_source(
        model,
        lc,
        loss,
        targets,
        n_output=n_output,
        function=function,
        device=device,
        verbose=verbose,
        centred=centred,
    )
    return _represented(source, loader, representation, options)


def _checked(
    model: nn.Module,
    loader: Any,
    representation: Representation,
    n_output: int | None,
    function: Callable[..., Any] | None,
    layer_collection: LayerCollection | None,
    device: torch.device | str | None,
    options: dict[str, Any],
) -> LayerCollection:
    """The layer collection, after a look at all that a matrix takes."""
    arguments.call(model, loader, function, layer_collection, LayerCollection, device)
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
    function: Callable[..., Any] | None,
    layer_collection: LayerCollection | None,
    device: torch.device | str | None,
    verbose: bool,
    options: dict[str, Any],
    curvature: Curvature | None = None,
    seed: int = 0,
) -> PMat:
    lc = _checked(model, loader, representation, n_output, function, layer_collection, device, options)
    source = _source(
        model,
        lc,
        cotangents,
        n_output,
        function=function,
        device=device,
        verbose=verbose,
        curvature=curvature,
        seed=seed,
    )
    return _represented(source, loader, representation, options)


def _source(
    model: nn.Module,
    layer_collection: LayerCollection,
    cotangents: OfSeveral,
    n_output: int | None,
    **options: Any,
) -> Generator:
    def checked(f: Tensor, batches: Sequence[data.Batch], position: int) -> Cotangents | None:
        if n_output is not None and f[0].numel() != n_output and f.shape[1:2] != (n_output,):
            raise ValueError(
                f"n_output={n_output}, but the model returns outputs of shape {tuple(f.shape[1:])} for each "
                "example: leave n_output out"
            )
        return cotangents(f, batches, position)

    return Generator(model, layer_collection, OfSeveral(checked), **options)


def _represented(source: Generator, loader: Any, representation: Representation, options: dict[str, Any]) -> PMat:
    return representation(layer_collection=source.layer_collection, generator=source, examples=loader, **options)


__test__ = {f.__name__: f.__doc__ or "" for f in (FIM, FIM_MonteCarlo, EmpiricalFisher, GradientCovariance)}
