"""Fisher information and gradient covariance matrices: the same fit, with different cotangents."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from . import arguments, data
from .generator import CotangentFunction, Curvature, Generator, SeveralCotangents, at_once
from .layercollection import LayerCollection
from .likelihood import VARIANTS, Cotangents, Likelihood, Loss, likelihood_of, loss_gradient
from .object.pmat import PMat

#: A PMat class, a functools.partial of one, or PMatMixed.of(...).
Representation = Callable[..., Any]


def FIM(
    model: nn.Module,
    loader: Any,
    representation: Representation,
    variant: str | Likelihood = "classif_logits",
    *,
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
    bar.

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
    arguments.variant(variant, Likelihood, list(VARIANTS))
    likelihood = likelihood_of(variant)

    def curvature(f: Tensor, u: Tensor, batch: data.Batch, position: int) -> Tensor:
        return likelihood.hvp(f, u)

    return _matrix(
        at_once(lambda f, batch, position: likelihood.sqrt(f)),
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


def FIM_MonteCarlo(
    model: nn.Module,
    loader: Any,
    representation: Representation,
    variant: str | Likelihood = "classif_logits",
    *,
    trials: int = 1,
    generator: torch.Generator | None = None,
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
    same ones. The rest is as in :func:`FIM`.

    >>> from nngeometry import FIM_MonteCarlo, PMatDiag
    >>> model = nn.Linear(4, 3)
    >>> F = FIM_MonteCarlo(model, (torch.randn(20, 4),), PMatDiag, trials=2, generator=torch.Generator().manual_seed(0))
    """
    arguments.integer("trials", trials, least=1)
    arguments.variant(variant, Likelihood, list(VARIANTS))
    arguments.generator(generator)
    likelihood = likelihood_of(variant)
    seed = int(torch.randint(2**62, (), generator=generator, device=None if generator is None else generator.device))

    def cotangents(f: Tensor, batches: Sequence[data.Batch], position: int) -> Cotangents:
        draws = [torch.Generator(f.device).manual_seed(seed + position + k) for k in range(len(batches))]
        return likelihood.samples(data.split(f, batches), trials, draws)

    return _matrix(
        cotangents, model, loader, representation, n_output, function, layer_collection, device, verbose, options
    )


def EmpiricalFisher(
    model: nn.Module,
    loader: Any,
    representation: Representation,
    loss: Loss | None = None,
    *,
    n_output: int | None = None,
    function: Callable[..., Any] | None = None,
    layer_collection: LayerCollection | None = None,
    device: torch.device | str | None = None,
    verbose: bool = False,
    **options: Any,
) -> Any:
    """The second moment of per-example loss gradients, ``1/n sum_x g_x g_x^T`` (often called empirical Fisher).

    loss: ``loss(outputs, *minibatch[1:])`` (``loss(outputs, minibatch)`` for a mapping), a loss of ``torch.nn`` or
    any callable that returns one value, or several to be summed, for each example; by default
    ``nn.CrossEntropyLoss()``. Its ``reduction`` does not matter: a gradient is that of one example's loss, summed
    over its positions. The rest is as in :func:`FIM`.

    >>> from nngeometry import EmpiricalFisher, PMatDiag
    >>> model = nn.Linear(4, 3)
    >>> F = EmpiricalFisher(model, (torch.randn(20, 4), torch.randint(3, (20,))), PMatDiag)
    """
    cotangents = at_once(gradients_of(nn.CrossEntropyLoss() if loss is None else loss))
    return _matrix(
        cotangents, model, loader, representation, n_output, function, layer_collection, device, verbose, options
    )


def GradientCovariance(
    model: nn.Module,
    loader: Any,
    representation: Representation,
    loss: Loss | None = None,
    *,
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
    cotangents = at_once(gradients_of(nn.CrossEntropyLoss() if loss is None else loss))
    return _matrix(
        cotangents,
        model,
        loader,
        representation,
        n_output,
        function,
        layer_collection,
        device,
        verbose,
        options,
        centred=True,
    )


def gradients_of(loss: Loss) -> CotangentFunction:
    """The gradient of each example's loss, as the one cotangent."""

    arguments.loss(loss)
    gradient = arguments.explaining(loss, partial(loss_gradient, loss))

    def cotangents(f: Tensor, batch: data.Batch, position: int) -> Cotangents:
        return Cotangents.of(gradient(f, *data.targets(batch)).unsqueeze(0))

    return cotangents


def _matrix(
    cotangents: SeveralCotangents,
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
    curvature: Curvature | None = None,
) -> PMat:
    arguments.call(model, loader, function, layer_collection, LayerCollection, device)
    arguments.representation(representation, PMat, options, FIM, "plan")
    if n_output is not None:
        arguments.integer("n_output", n_output, least=1)
    lc = LayerCollection.from_model(model) if layer_collection is None else layer_collection

    def checked(f: Tensor, batches: Sequence[data.Batch], position: int) -> Cotangents:
        if n_output is not None and f[0].numel() != n_output and f.shape[1:2] != (n_output,):
            raise ValueError(
                f"n_output={n_output}, but the model returns outputs of shape {tuple(f.shape[1:])} for each "
                "example: leave n_output out"
            )
        return cotangents(f, batches, position)

    generator = Generator(
        model,
        lc,
        lambda f, batch, position: checked(f, [batch], position),
        function=function,
        device=device,
        verbose=verbose,
        centred=centred,
        curvature=curvature,
        together=checked,
    )
    return representation(layer_collection=lc, generator=generator, examples=loader, **options)
