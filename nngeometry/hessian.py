"""Second derivatives of a loss: its Hessian, and the generalised Gauss-Newton matrix."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from . import arguments
from .blocks import Operator
from .generator import Generator, rowwise
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
from .undivided import Undivided, UndividedLoss


@dataclass(frozen=True)
class FiniteDifference:
    """Hessian products by central differences of the gradient, for models without a second derivative.

    Away from kinks (of ReLU, max-pooling, abs) the Hessian is that of the smooth piece around the parameters. Each
    product takes four gradients, at two steps on either side, which together with the gradient at the parameters also
    tell its error; two more if the loss is strongly curved. Where a kink is nearer than the step, or rounding too
    large, other steps are tried at four gradients each, if need be for some of the examples alone. All is computed in
    float64 if the model runs in it, whatever its own precision.

    Args:
        step: How far parameters are moved at first, for a vector whose largest entry is one. By default 6e-6, and 5e-3
            for a model that does not run in float64.
        rtol: The error that is allowed, relative to the length of H v (or, for a vector that H nearly takes away, of H
            times a typical vector of its length). By default 1e-9 for models in float64 and 1e-3 for others.

    Raises:
        ValueError: For a step or rtol that is not positive.
        RuntimeError: From a product whose estimated error is larger than rtol.

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

    Arguments that are not listed are those of :func:`~nngeometry.FIM`, and so are the representations.

    Args:
        loss: ``loss(outputs, *minibatch[1:])``, or ``loss(outputs, minibatch)`` for a mapping. CrossEntropyLoss (with
            class weights, ignore_index, label_smoothing, class probabilities, extra axes),
            :class:`~nngeometry.TokenCrossEntropy`, BCEWithLogitsLoss, MSELoss, PoissonNLLLoss, GaussianNLLLoss,
            HuberLoss, SmoothL1Loss and others that compare element by element, with reduction "mean" or "sum": the loss
            of all minibatches is that of the data set as one minibatch, however it is split. Or any callable with one
            value for each example, of which the mean is taken, and whose Hessian must be positive semidefinite.
            Products check that for a few of them, representations made of Jacobians exactly. By default
            ``nn.CrossEntropyLoss()``.
        targets: As in :func:`~nngeometry.EmpiricalFisher`, and so are the shapes that are refused.
        unit: With "minibatch" it is the mean over minibatches of ``J^T H J``, with H that of the loss of a minibatch,
            which may couple its examples, and J the derivative of all of its output.

    Returns:
        The matrix, an instance of the representation.

    Raises:
        ValueError: If the Hessian of a callable is found not to be positive semidefinite, and as in
            :func:`~nngeometry.FIM`.

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

    Arguments that are not listed are those of :func:`~nngeometry.FIM`.

    Args:
        representation: PMatImplicit, PMatDense, PMatBlockDiag, PMatDiag (P products), or PMatLowRank (``rank=``, the
            eigenvalues of largest magnitude).
        loss: As in :func:`GGN`, convex or not, or :class:`~nngeometry.OwnLoss`, the loss that the model computes.
            A loss that gives one number for a minibatch is the mean over its examples or their sum, whichever it is. By
            default ``nn.CrossEntropyLoss()``.
        *old: layer_collection and verbose by position, in NNGeometry's order.
        targets: As in :func:`~nngeometry.EmpiricalFisher`.
        function: As in :func:`~nngeometry.FIM`; or the loss itself, as in NNGeometry.
        products: ``FiniteDifference()`` for models that cannot be differentiated twice.
        unit: With "minibatch" it is the Hessian of the mean over minibatches of any loss of a minibatch, with its own
            reduction: BatchNorm in train mode (whose derivative goes through its statistics), contrastive losses,
            graphs, packed sequences.

    Returns:
        The matrix, an instance of the representation.

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
            return made_of_two(batch) if self._keeps_apart(batch) else 2 * work_array(self.device)

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

    def _keeps_apart(self, batch: data.Batch) -> bool:
        if self.called_apart(batch) is not None:
            return True
        some = torch.tensor([data.count(batch) // 2, 0])  # in another order: examples may depend on those before

        def apart() -> bool:
            f = self.outputs_of(batch).detach()
            try:
                g = self.outputs_of(data.take(batch, some)).detach()
            except Exception:
                return False
            return same_up_to_rounding(g, f[some], f)

        return self.looked(apart)

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
