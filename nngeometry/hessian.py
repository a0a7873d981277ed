"""Second derivatives of a loss: its Hessian, and the generalised Gauss-Newton matrix."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from . import arguments
from .blocks import Operator
from .changes import uncast
from .generator import Generator, one_by_one, rowwise
from .layercollection import LayerCollection
from .likelihood import Cotangents
from .linearisation import Products, Total, hessian
from .losses import Loss, OwnLoss, output_loss
from .losses.targets import Targets, selected
from .memory import work_array
from .metrics import Representation
from .minibatchloss import settle
from .model import data
from .model.evaluator import Evaluator, same_up_to_rounding
from .object import PMat
from .object.finite_difference import Differences
from .reading import together
from .spelling import positions
from .team import drawn_seed
from .undivided import Undivided, UndividedLoss


@dataclass(frozen=True)
class FiniteDifference:
    """Hessian products by central differences of the gradient, for models without a second derivative.

    Away from kinks (of ReLU, max-pooling, abs) the Hessian is that of the smooth piece around the parameters. Each
    product takes four gradients, at two steps on either side, which together with the gradient at the parameters also
    tell its error; two more if the loss is strongly curved. Where a kink is nearer than the step, or rounding too
    large, other steps are tried at four gradients each, if need be for some of the examples alone. All is computed in
    float64 if the model runs in it, whatever its own precision. A product raises ``RuntimeError`` if its estimated
    error is larger than rtol.

    Args:
        step: How far parameters are moved at first, for a vector whose largest entry is one; by default 6e-6, and 5e-3
            for a model that does not run in float64.
        rtol: The error that is allowed, relative to the length of H v (or, for a vector that H nearly takes away, of H
            times a typical vector of its length), by default 1e-9 for models in float64 and 1e-3 for others.

    Raises:
        ValueError: For a step or rtol that is not positive.

    Example:
        >>> from nngeometry import Hessian, PMatImplicit, PVector
        >>> model = nn.Sequential(nn.Linear(4, 5), nn.ReLU(), nn.Linear(5, 3)).double()
        >>> batch = torch.randn(20, 4).double(), torch.randint(3, (20,))
        >>> v = PVector.from_model(model).detach()
        >>> one = Hessian(model, batch, PMatImplicit).mv(v)
        >>> other = Hessian(model, batch, PMatImplicit, products=FiniteDifference()).mv(v)
        >>> torch.allclose(one.to_torch(), other.to_torch(), rtol=1e-7)
        True
    """

    step: float | None = None
    rtol: float | None = None

    def __post_init__(self) -> None:
        for name, value in (("step", self.step), ("rtol", self.rtol)):
            if value is not None:
                arguments.number(f"FiniteDifference: {name}", value, above=0.0)


@uncast
@together
@arguments.called_as
def GGN(
    model: nn.Module,
    loader: Any,
    representation: Representation,
    loss: Loss | None = None,
    *,
    targets: Targets = None,
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
    """The generalised Gauss-Newton matrix of a loss, ``sum_x J^T H J`` with H the Hessian of the loss in the output.

    Args:
        model: As in :func:`~nngeometry.FIM`.
        loader: As in :func:`~nngeometry.FIM`.
        representation: As in :func:`~nngeometry.FIM`.
        loss: ``loss(outputs, *minibatch[1:])`` (``loss(outputs, minibatch)`` for a mapping), by default
            ``nn.CrossEntropyLoss()``. Either CrossEntropyLoss (with class weights, ignore_index, label_smoothing, class
            probabilities, extra axes), :class:`~nngeometry.TokenCrossEntropy`, BCEWithLogitsLoss, MSELoss,
            PoissonNLLLoss, GaussianNLLLoss, HuberLoss, SmoothL1Loss and others that compare element by element with
            reduction "mean" or "sum", whose loss over all minibatches is that of the data set as one minibatch, however
            it is split. Or any callable with one value for each example, of which the mean over examples is taken, and
            whose Hessian must be positive semidefinite; products are checked for that by a few of them, and
            representations made of Jacobians exactly.
        targets: As in :func:`~nngeometry.EmpiricalFisher`, and so are the shapes that are refused.
        unit: As in :func:`~nngeometry.FIM`; with "minibatch", the mean over minibatches of ``J^T H J`` with H that of
            the loss of a minibatch, which may couple its examples, and J the derivative of all of its output.
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
        ValueError: As :func:`~nngeometry.FIM`, and for a loss that is not convex in the output.

    Example:
        >>> from nngeometry import GGN, PMatKFAC
        >>> model = nn.Linear(4, 3)
        >>> batch = torch.randn(20, 4), torch.randint(3, (20,))
        >>> G = GGN(model, batch, PMatKFAC, nn.CrossEntropyLoss(label_smoothing=0.1))

    Source: Schraudolph (2002), Neural Computation 14; Martens (2014), 1412.1193.
    """
    arguments.call(model, loader, function, layer_collection, LayerCollection, device)
    arguments.of_training(batch_statistics, unit)
    arguments.representation(representation, PMat, options, GGN, "plan")
    arguments.loss(loss)
    lc = LayerCollection.from_model(model) if layer_collection is None else layer_collection
    loss = nn.CrossEntropyLoss() if loss is None else loss
    undivided = unit == "minibatch"
    known, given = UndividedLoss(loss) if undivided else output_loss(loss), selected(targets)
    sqrt, weight = arguments.explaining(loss, known.sqrt), arguments.explaining(loss, known.weight)

    def cotangents(f: Tensor, batch: data.Batch, position: int) -> Cotangents:
        return sqrt(f, *given(batch))

    def curvature(f: Tensor, u: Tensor, batch: data.Batch, position: int) -> Tensor:
        return known.hvp(f, u, *given(batch))

    generator = (Undivided if undivided else Generator)(
        model,
        lc,
        rowwise(cotangents),
        function=function,
        device=device,
        verbose=verbose,
        batch_statistics=batch_statistics,
        unit=unit,
        curvature=curvature,
        weigh=lambda f, batch: weight(f, *given(batch)),
        mean=known.mean,
    )
    return representation(layer_collection=lc, generator=generator, examples=loader, **options)


@uncast
@together
@arguments.called_as
def GGN_MonteCarlo(
    model: nn.Module,
    loader: Any,
    representation: Representation,
    loss: Loss | None = None,
    *,
    targets: Targets = None,
    trials: int = 1,
    generator: torch.Generator | None = None,
    function: Callable[..., Any] | None = None,
    layer_collection: LayerCollection | None = None,
    batch_statistics: bool = False,
    device: torch.device | str | None = None,
    verbose: bool = False,
    process_group: Any = None,
    checkpoint: str | Path | None = None,
    every: int | None = None,
    keep_checkpoint: bool = False,
    **options: Any,
) -> Any:
    """An estimate of the Gauss-Newton matrix from random vectors u, ``sum_x J^T u u^T J`` with E[u u^T] = H.

    It costs as many backward passes as there are draws, whatever the number of outputs. For the cross entropy, u is the
    gradient of the loss of labels that are drawn from the model, so that without padding, class weights and the like it
    is :func:`~nngeometry.FIM_MonteCarlo`; for losses that compare element by element, random signs times the root of H.
    Unlike that, it is in the units of the loss: a mean over tokens stays one, and tokens that are ignored do not count.

    Args:
        model: As in :func:`~nngeometry.GGN`.
        loader: As in :func:`~nngeometry.GGN`.
        representation: As in :func:`~nngeometry.GGN`.
        loss: As in :func:`~nngeometry.GGN`.
        targets: As in :func:`~nngeometry.GGN`.
        trials: How many draws for each example, by default one.
        generator: The source of randomness, by default torch's global one, of which one number is drawn.
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
        ValueError: As :func:`~nngeometry.GGN`, and for fewer than one draw.

    Example:
        >>> from nngeometry import GGN_MonteCarlo, PMatDiag, TokenCrossEntropy
        >>> model = nn.Embedding(10, 10)  # a bigram model
        >>> tokens = torch.randint(10, (4, 6))
        >>> g = torch.Generator().manual_seed(0)
        >>> G = GGN_MonteCarlo(model, (tokens,), PMatDiag, TokenCrossEntropy(shift=True), targets=0, generator=g)

    Source: Martens (2014), 1412.1193; Dangel, Kunstner and Hennig (2020), 1912.10985.
    """
    arguments.call(model, loader, function, layer_collection, LayerCollection, device)
    arguments.flag("batch_statistics", batch_statistics)
    arguments.representation(representation, PMat, options, GGN_MonteCarlo, "plan")
    arguments.loss(loss)
    arguments.integer("trials", trials, least=1)
    arguments.generator(generator)
    lc = LayerCollection.from_model(model) if layer_collection is None else layer_collection
    loss = nn.CrossEntropyLoss() if loss is None else loss
    known, given = output_loss(loss), selected(targets)
    weight = arguments.explaining(loss, known.weight)

    def cotangents(f: Tensor, batch: data.Batch, position: int) -> Cotangents:
        draws = torch.Generator(f.device).manual_seed(position)
        sample = partial(known.sample, trials=trials, generator=draws)
        return arguments.explaining(loss, sample)(f, *given(batch))

    source = Generator(
        model,
        lc,
        one_by_one(cotangents),
        function=function,
        device=device,
        verbose=verbose,
        batch_statistics=batch_statistics,
        weigh=lambda f, batch: weight(f, *given(batch)),
        mean=known.mean,
        seed=drawn_seed(generator, process_group),
    )
    return representation(layer_collection=lc, generator=source, examples=loader, **options)


@uncast
@together
@arguments.called_as
def Hessian(
    model: nn.Module,
    loader: Any,
    representation: Representation,
    loss: Loss | None = None,
    *old: Any,
    targets: Targets = None,
    function: Callable[..., Any] | None = None,
    products: FiniteDifference | None = None,
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
    """The Hessian of a loss with respect to the parameters, by products: exact, indefinite in general.

    A loss that gives one number for a minibatch is the mean over its examples or their sum, whichever it is.

    Args:
        model: As in :func:`~nngeometry.FIM`.
        loader: As in :func:`~nngeometry.FIM`.
        representation: PMatImplicit, PMatDense, PMatBlockDiag, PMatDiag (P products) or PMatLowRank (``rank=``, the
            eigenvalues of largest magnitude).
        loss: As in :func:`~nngeometry.GGN`, any callable, convex or not, by default ``nn.CrossEntropyLoss()``; or
            :class:`~nngeometry.OwnLoss`, the loss that the model computes itself.
        *old: Of layer_collection and verbose, by position.
        targets: As in :func:`~nngeometry.EmpiricalFisher`.
        function: As in :func:`~nngeometry.FIM`; it may also be the loss itself, as in NNGeometry.
        products: ``FiniteDifference()`` for models that cannot be differentiated twice; by default, they are exact.
        unit: As in :func:`~nngeometry.FIM`; with "minibatch", the Hessian of the mean over minibatches of any loss of a
            minibatch, with the loss's own reduction: BatchNorm in train mode (whose derivative goes through its
            statistics), contrastive losses, graphs, packed sequences.
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
        NotImplementedError: Where torch's second derivative is known to be wrong (weight_norm).

    Example:
        >>> from nngeometry import Hessian, PMatImplicit, PVector
        >>> model = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3))
        >>> batch = torch.randn(20, 4), torch.randint(3, (20,))
        >>> H = Hessian(model, batch, PMatImplicit)
        >>> H.mv(PVector.from_model(model).detach()).size()
        torch.Size([43])

    Source: Pearlmutter (1994), Neural Computation 6.
    """
    if old:
        given = {"layer_collection": layer_collection, "verbose": verbose}
        layer_collection, verbose = positions("Hessian", tuple(given), old, given).values()
    arguments.call(model, loader, function, layer_collection, LayerCollection, device)
    arguments.of_training(batch_statistics, unit)
    arguments.representation(representation, PMat, options, Hessian, "project")
    arguments.loss(loss)
    if products is not None:
        arguments.instance("products", products, FiniteDifference, "pass FiniteDifference()")
    lc = LayerCollection.from_model(model) if layer_collection is None else layer_collection
    shared: dict[str, Any] = {
        "function": function,
        "device": device,
        "verbose": verbose,
        "batch_statistics": batch_statistics,
        "unit": unit,
        "products": products,
    }
    source: LossCurvature | OwnCurvature
    if isinstance(loss, OwnLoss):
        if targets is not None:
            raise ValueError("targets: a model with loss=OwnLoss() computes the loss itself, so leave targets out")
        source = OwnCurvature(model, lc, loss, **shared)
    else:
        source = LossCurvature(model, lc, nn.CrossEntropyLoss() if loss is None else loss, targets=targets, **shared)
    return representation(layer_collection=lc, generator=source, examples=loader, **options)


class LossCurvature(Evaluator):
    """A model with a loss: the source of Hessian products. Arguments as in :func:`Hessian`."""

    jacobians = centred = False
    seed = 0
    function_is_loss = False  # whether that is known of ``function``

    def __init__(
        self,
        model: nn.Module,
        layer_collection: LayerCollection,
        loss: Loss,
        *,
        targets: Targets = None,
        products: FiniteDifference | None = None,
        **options: Any,
    ) -> None:
        super().__init__(model, layer_collection, **options)
        self.loss = UndividedLoss(loss) if self.undivided else output_loss(loss)
        self.mean = self.loss.mean
        self._total = arguments.explaining(loss, self.loss.total)
        self._weight = arguments.explaining(loss, self.loss.weight)
        self.targets = selected(targets)
        self.products = products

    def joined(self, examples: Any, made_of_two: Callable[[data.Batch], int]) -> Iterator[tuple[int, list[data.Batch]]]:
        """The minibatches, each for itself if the model mixes examples."""

        def of_two(batch: data.Batch) -> int:
            some = [data.count(batch) // 2, 0]  # in another order: examples may depend on those before
            return made_of_two(batch) if self.keeps_apart(batch, some) else 2 * work_array(self.device)

        same: set[int] = set()  # how many examples groups had of which the model computes the same as of their parts
        for position, batches in super().joined(examples, of_two):
            n = sum(map(data.count, batches))
            if n not in same and len(batches) > 1 and not self._joined_alike(batches):
                yield from ((position + k, [batch]) for k, batch in enumerate(batches))
                continue
            same.add(n)
            yield position, batches

    def _joined_alike(self, batches: Sequence[data.Batch]) -> bool:
        """Whether the model returns the same for minibatches laid end to end as for the first and the last of them."""
        if self.called_apart(batches[0]) is not None:
            return True

        def alike() -> bool:
            f = self.outputs_of(data.join(batches)).detach()
            rows = data.split(f, batches)
            return all(same_up_to_rounding(self.outputs_of(batches[k]).detach(), rows[k], f) for k in (0, -1))

        return self.looked(alike)

    def operator(self, examples: Any) -> Operator:
        """The Hessian as an operator."""
        if not self.undivided:
            settle(self, examples)

        def total(batch: data.Batch) -> tuple[Tensor, float]:
            f = self.outputs_of(batch)
            targets = self.targets(batch)
            value = self._total(f, *targets)
            if f.requires_grad and not value.requires_grad:
                raise ValueError("loss: its value does not depend on the outputs (detached, or not differentiable)")
            return value, self._weight(f.detach(), *targets)

        loss = getattr(self.loss, "loss", self.loss)
        others = [loss] if isinstance(loss, nn.Module) else []
        return _operator(self, examples, total, others, self.loss.mean, self.products)


class OwnCurvature(Evaluator):
    """A model that computes its loss itself: the source of Hessian products. Arguments as in :func:`Hessian`."""

    jacobians = centred = False
    mean = True
    seed = 0

    def __init__(
        self,
        model: nn.Module,
        layer_collection: LayerCollection,
        loss: OwnLoss,
        *,
        function: Callable[..., Any] | None = None,
        products: FiniteDifference | None = None,
        **options: Any,
    ) -> None:
        super().__init__(model, layer_collection, function=loss.function(model, function), **options)
        loss.check_unit("minibatch" if self.undivided else "example")
        self.loss = loss
        self.products = products

    def joined(self, examples: Any, made_of_two: Callable[[data.Batch], int]) -> Iterator[tuple[int, list[data.Batch]]]:
        """The minibatches, each for itself."""
        return ((k, [batch]) for k, batch in enumerate(self.minibatches(examples)))

    def operator(self, examples: Any) -> Operator:
        """The Hessian as an operator."""

        def total(batch: data.Batch) -> tuple[Tensor, float]:
            weight = self.loss.weight(batch)
            return self.outputs_unchecked(batch) * weight, weight

        return _operator(self, examples, total, [], True, self.products)


def _operator(
    source: Evaluator,
    examples: Any,
    total: Total,
    others: Sequence[nn.Module],
    mean: bool,
    products: FiniteDifference | None,
) -> Operator:
    """The Hessian of a summed loss as an operator. others: what has parameters and buffers beside the model."""
    matvec: Products | Differences
    single: Callable[[Tensor], Tensor] | None = None
    if products is None:
        matvec = exact = hessian(source, examples, total, mean)
        single = exact.once
    else:
        matvec = Differences(source, examples, total, others, mean, products.step, products.rtol)
    like = torch.empty(0, dtype=source.dtype, device=source.device)
    size = source.layer_collection.numel()
    return Operator(
        matvec, size, None, None, like, psd=False, single=single, weight_of=lambda: matvec.weight, team=matvec.team
    )


__test__ = {f.__name__: f.__doc__ or "" for f in (GGN, Hessian)}
