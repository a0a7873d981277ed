"""Where Jacobians and Hessians come from: backends and generators, and the old arguments of what makes matrices."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from enum import StrEnum
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader

from .. import arguments, blocks, generator, gram, hessian, likelihood, metrics
from ..blocks import Block
from ..changes import Borrowed
from ..generator import Generator
from ..hessian import LossCurvature
from ..layercollection import LayerCollection
from ..losses import output_loss
from ..losses.output import ByExample
from ..model import data
from ..model.evaluator import State
from ..model.weights import Weights
from ..object import (
    FMatDense,
    FVector,
    PFMapDense,
    PFMapFactored,
    PFMapImplicit,
    PMat,
    PMatBlockDiag,
    PMatDense,
    PMatDiag,
    PMatEKFAC,
    PMatImplicit,
    PMatKFAC,
    PMatLowRank,
    PMatQuasiDiag,
    PVector,
)
from .layout import make_lowrank
from .names import attach, warn


class TorchHooksJacobianBackend(Generator):
    """The Jacobian of all outputs of ``function(*minibatch)``, by default ``model(minibatch[0])``: for ``PMat*`` the
    second moment ``1/n sum_x J^T J``.

    centering: of ``J`` less its mean over examples; for PMatDense, PMatLowRank and PMatImplicit.
    """

    examples: Any = None

    def __init__(
        self,
        model: nn.Module,
        function: Callable[..., Any] | None = None,
        centering: bool = False,
        layer_collection: LayerCollection | None = None,
        verbose: bool = False,
    ) -> None:
        lc = LayerCollection.from_model(model) if layer_collection is None else layer_collection
        lc = LayerCollection(lc.layers, ignore_uncalled=True)
        super().__init__(model, lc, self._all, function=function, verbose=verbose, curvature=lambda f, u, *_: u)
        self.centering = centering
        self.n_output: int | None = None

    def _all(self, f: Tensor, batch: data.Batch, position: int) -> likelihood.Cotangents:
        if self.n_output is not None and f[0].numel() != self.n_output:
            raise ValueError(f"n_output={self.n_output}, but the function returns {f[0].numel()} for each example")
        return likelihood.diagonal_cotangents(torch.ones_like(f))

    def on(self, lc: LayerCollection) -> TorchHooksJacobianBackend:
        """The same function, with the parameters of another layer collection."""
        if lc == self.layer_collection:
            return self
        other = TorchHooksJacobianBackend(self.model, self.function, self.centering, lc, self.verbose)
        other.n_output, other.examples = self.n_output, self.examples
        return other

    def get_jacobian(self, examples: Any = None, layer_collection: LayerCollection | None = None) -> Tensor:
        """``(C, n, P)``."""
        return self.on_layers(layer_collection).map(PFMapDense, self._given(examples)).to_torch()

    def get_gram_matrix(self, examples: Any = None, layer_collection: LayerCollection | None = None) -> Tensor:
        """``(C, n, C, n)``."""
        return self.on_layers(layer_collection).kernel(self._given(examples)).to_torch()

    def implicit_mv(self, v: PVector, examples: Any = None, layer_collection: LayerCollection | None = None) -> PVector:
        """``M v`` by products."""
        return self._matrix(PMatImplicit, examples, layer_collection).mv(v)

    def implicit_vTMv(
        self, v: PVector, examples: Any = None, layer_collection: LayerCollection | None = None
    ) -> Tensor:
        """``v^T M v`` by products."""
        return self._matrix(PMatImplicit, examples, layer_collection).vTMv(v)

    def implicit_trace(self, examples: Any = None, layer_collection: LayerCollection | None = None) -> Tensor:
        """The trace."""
        return self._matrix(PMatImplicit, examples, layer_collection).trace()

    def implicit_Jv(self, v: PVector, examples: Any = None, layer_collection: LayerCollection | None = None) -> FVector:
        """``J v``."""
        return self.on_layers(layer_collection).map(PFMapImplicit, self._given(examples)).jvp(v)

    def on_layers(self, layer_collection: LayerCollection | None) -> TorchHooksJacobianBackend:
        """:meth:`on`, of the layers of this one by default."""
        return self if layer_collection is None else self.on(layer_collection)

    def _given(self, examples: Any) -> Any:
        return self.examples if examples is None else examples

    def _matrix(self, kind: type[PMat], examples: Any, lc: LayerCollection | None) -> PMat:
        lc = self.layer_collection if lc is None else lc
        return kind(layer_collection=lc, generator=self, examples=self._given(examples))

    def map(self, kind: Any, examples: Any) -> Any:
        """The Jacobian in a representation."""
        if self.centering and kind is PFMapFactored:
            raise NotImplementedError("centering: PFMapFactored has no centred form; use PFMapDense or PFMapImplicit")
        found = kind.of(self, examples)
        return found.centred() if self.centering else found

    def kernel(self, examples: Any) -> FMatDense:
        """The tangent kernel."""
        return gram.GramMatrix(
            self.model,
            examples,
            function=self.function,
            layer_collection=self.layer_collection,
            centering=self.centering,
            verbose=self.verbose,
        )

    def without_mean(self, root: Block, examples: Any, kind: type[PMat]) -> Block:
        """``root`` less the outer products of the mean Jacobian of each output."""
        if kind not in (PMatDense, PMatLowRank, PMatImplicit):
            raise NotImplementedError(
                f"centering: {kind.__name__} has no centred form; use PMatDense, PMatLowRank or PMatImplicit, or "
                "GradientCovariance for the gradients of a loss"
            )
        jacobian = PFMapImplicit.of(self, examples)
        c, n, _ = jacobian.shape
        each = torch.eye(c, dtype=jacobian.dtype, device=jacobian.device).unsqueeze(2).expand(c, c, n) / n
        means = torch.stack([jacobian.vjp(FVector(u)).to_torch() for u in each])
        return blocks.add(root, make_lowrank(self.layer_collection, means), -1.0)


def _get_kfe_diag(
    self: TorchHooksJacobianBackend, kfe: Any, examples: Any = None, layer_collection: LayerCollection | None = None
) -> dict[str, Tensor]:
    """The second moments in the eigenvectors that ``PMatEKFAC.data[0]`` holds."""
    lc = self.layer_collection if layer_collection is None else layer_collection
    like = torch.ones((), dtype=self.dtype, device=self.device)
    ones = {name: like.expand(layer.numel()) for name, layer in lc.layers.items()}
    diags: Any = {name: one if kfe[name] is not None else one.diag() for name, one in ones.items()}
    kind: Any = PMatEKFAC
    M = kind(lc, data=(kfe, diags))
    M.generator = self.on(lc)
    return dict(M.update_diag(self._given(examples)).data[1])


#: What a backend gave the tensors of.
_GIVES: dict[str, type[PMat]] = {
    "get_covariance_matrix": PMatDense,
    "get_covariance_diag": PMatDiag,
    "get_covariance_quasidiag": PMatQuasiDiag,
    "get_covariance_layer_blocks": PMatBlockDiag,
    "get_kfac_blocks": PMatKFAC,
}


def _gives(kind: type[PMat]) -> Callable[..., Any]:
    def data_of(
        self: TorchHooksJacobianBackend, examples: Any = None, layer_collection: LayerCollection | None = None
    ) -> Any:
        return self._matrix(kind, examples, layer_collection).data  # type: ignore[attr-defined]

    return data_of


class TorchFuncJacobianBackend(TorchHooksJacobianBackend):
    """The Jacobian of ``function(prediction, target)``, with the prediction that of ``model(minibatch[0])``."""

    def __init__(
        self,
        model: nn.Module,
        function: Callable[..., Any],
        verbose: bool = False,
        layer_collection: LayerCollection | None = None,
    ) -> None:
        def of_prediction(*batch: Any) -> Any:
            return function(model(batch[0]), *batch[1:])

        super().__init__(model, of_prediction, False, layer_collection, verbose)


class DummyGenerator:
    """Stands for the generator of a matrix that has none."""

    def __init__(self, *args: Any, layer_collection: LayerCollection | None = None, device: Any = None) -> None:
        for value in args:
            if isinstance(value, LayerCollection):
                layer_collection = value
            else:
                device = value
        self.layer_collection, self.device = layer_collection, device

    def get_device(self) -> Any:
        """The device that it was made with."""
        return self.device


@contextmanager
def use_unfold_impl_for_convs() -> Iterator[None]:
    """Nothing: there is one implementation of convolutions."""
    warn("use_unfold_impl_for_convs()", "nothing: there is one implementation of convolutions")
    yield


@contextmanager
def use_conv_impl_for_convs() -> Iterator[None]:
    """Nothing: there is one implementation of convolutions."""
    warn("use_conv_impl_for_convs()", "nothing: there is one implementation of convolutions")
    yield


class FIM_Types(StrEnum):
    """The variants of FIM by name."""

    CLASSIF_LOGITS = "classif_logits"
    CLASSIF_BINARY_LOGITS = "classif_binary_logits"
    REGRESSION = "regression"


class Jacobian(TorchHooksJacobianBackend):
    """The generator of 0.2 and 0.3, with the loader in it or not; n_output is checked and not needed."""

    def __init__(
        self,
        model: nn.Module,
        *args: Any,
        loader: Any = None,
        function: Callable[..., Any] | None = None,
        n_output: int | None = None,
        centering: bool = False,
        layer_collection: LayerCollection | None = None,
    ) -> None:
        warn("nngeometry.generator.Jacobian", "nngeometry.Jacobian, GramMatrix, FIM or GradientSecondMoment")
        given = list(args)
        if given and given[0] is not None and not callable(given[0]):
            loader = given.pop(0)
        defaults = [function, n_output, centering, layer_collection]
        function, n_output, centering, layer_collection = given + defaults[len(given) :]
        super().__init__(model, function, centering, layer_collection)
        self.n_output, self.examples = n_output, loader


def GradientSecondMoment(
    model: nn.Module,
    loader: Any,
    representation: Callable[..., Any],
    function: Callable[..., Any] | None = None,
    layer_collection: LayerCollection | None = None,
    verbose: bool = False,
    **options: Any,
) -> Any:
    """``1/n sum_x J^T J`` with J the Jacobian of all outputs of ``function(*minibatch)``."""
    source = TorchHooksJacobianBackend(model, function, False, layer_collection, verbose)
    return representation(layer_collection=source.layer_collection, generator=source, examples=loader, **options)


class TorchFuncHessianBackend(LossCurvature):
    """The Hessian of ``function(prediction, target)``, a loss."""

    def __init__(
        self,
        model: nn.Module,
        function: Callable[..., Any],
        layer_collection: LayerCollection | None = None,
        verbose: bool = False,
        compiled: bool = False,
    ) -> None:
        lc = LayerCollection.from_model(model) if layer_collection is None else layer_collection
        self._loss = function
        super().__init__(model, lc, nn.CrossEntropyLoss(), function=function, verbose=verbose)

    def get_covariance_matrix(self, examples: Any, layer_collection: LayerCollection | None = None) -> Tensor:
        """The Hessian."""
        lc = self.layer_collection if layer_collection is None else layer_collection
        source = TorchFuncHessianBackend(self.model, self._loss, lc, self.verbose)
        return PMatDense(lc, source, examples=examples).to_torch()

    def implicit_mv(self, v: PVector, examples: Any, layer_collection: LayerCollection | None = None) -> PVector:
        """A product with the Hessian."""
        lc = self.layer_collection if layer_collection is None else layer_collection
        source = TorchFuncHessianBackend(self.model, self._loss, lc, self.verbose)
        return PMatImplicit(lc, source, examples=examples).mv(v)


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


def _operator(operator: Callable[..., Any]) -> Callable[..., Any]:
    """``Hessian(model, loader, representation, function)`` with a loss of one number for a minibatch, as the fourth
    argument or as ``function=``.
    """

    @functools.wraps(operator)
    def with_function(self: LossCurvature, examples: Any) -> Any:
        if not isinstance(examples, Iterator):
            if self.function is not None:
                reduced = _reduced(self, examples)
                if reduced is not None:
                    if not isinstance(self, TorchFuncHessianBackend):
                        warn("Hessian(..., function=loss)", "Hessian(..., loss=loss); function= is the model to call")
                    _use(self, reduced)
                    self.function = None
            elif isinstance(self.loss, ByExample):
                reduced = _of_a_minibatch(self, examples)
                if reduced is not None:
                    _use(self, reduced)
        return operator(self, examples)

    return with_function


def _use(source: LossCurvature, loss: Any) -> None:
    source.loss, source._total, source._weight = loss, loss.total, loss.weight


def _reduced(source: LossCurvature, examples: Any) -> Any:
    """The function of a source as a loss, None if it is none: called as one, it gives no scalar."""
    batch = _first(source, examples)
    function: Any = source.function
    certain = isinstance(source, TorchFuncHessianBackend)
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


def _is_of_minibatches(source: LossCurvature, function: Any, batch: data.Batch) -> bool:
    """Whether a function of the elements of a minibatch gives a row for each example, as one of a model does."""
    try:
        with _trying(source):
            rows = function(*data.arguments(data.map_tensors(Tensor.clone, batch)))
    except Exception:
        return False
    return isinstance(rows, Tensor) and rows.ndim > 0 and len(rows) == data.count(batch)


def _trying(source: LossCurvature) -> Borrowed:
    """The model at copies of all its tensors, for a look."""
    weights = Weights([source.model], source.layer_collection.parameters(source.model))
    return source.running(weights.in_place, State(source.model, values=True), record=False)


def _first(source: LossCurvature, examples: Any) -> Any:
    """The first minibatch, with the random state as it was: a shuffling loader draws from it."""
    with torch.random.fork_rng(devices=[]):
        return next(data.minibatches(examples, source.device))


def _of_a_minibatch(source: LossCurvature, examples: Any) -> Any:
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


def _positional(matrix: Callable[..., Any], names: tuple[str, ...]) -> Callable[..., Any]:
    """A metric whose options may be positional, in NNGeometry's order; in 0.2 and 0.3 n_output came first."""

    @arguments.called_as
    @functools.wraps(matrix)
    def with_positions(model: nn.Module, loader: Any, representation: Any, *args: Any, **kwargs: Any) -> Any:
        if len(args) > 1 or (args and isinstance(args[0], int)):
            order = ("n_output", *names) if isinstance(args[0], int) else names
            warn(f"{matrix.__name__} with positional options", ", ".join(f"{name}=" for name in order))
            kwargs.update(zip(order, args, strict=False))
            args = ()
        if "covariance" in kwargs:
            kwargs["variant"] = _with_covariance(*args, **kwargs)
            kwargs.pop("covariance")
            args = ()
        return matrix(model, loader, representation, *args, **kwargs)

    return with_positions


def _with_covariance(variant: Any = "classif_logits", covariance: Any = 1.0, **options: Any) -> likelihood.Gaussian:
    """``FIM_MonteCarlo(variant="regression", covariance=c)``: c times the matrix, as of targets of variance 1 / c."""
    warn("covariance=c", "variant=Gaussian(1 / c)")
    if variant != "regression":
        raise ValueError(f"covariance= is for variant='regression', got variant={variant!r}: leave it out")
    values = torch.as_tensor(covariance)
    if values.numel() != 1 or float(values) <= 0:
        raise ValueError(f"covariance={covariance!r}: expected one positive number, the same for all outputs")
    return likelihood.Gaussian(1 / float(values))


def _get_device(self: Generator) -> torch.device:
    return self.device


def remember(source: Any, examples: Any) -> None:
    """Keep the loader of a matrix for the matrices that are made of its generator alone, ``PMatDiag(F.generator)``."""
    if isinstance(source, Generator) and isinstance(examples, DataLoader):
        source.examples = examples  # type: ignore[attr-defined]


def install() -> None:
    """Attach the old names and arguments of what makes matrices."""
    attach(Generator, get_device=_get_device)
    attach(
        TorchHooksJacobianBackend, **{name: _gives(kind) for name, kind in _GIVES.items()}, get_kfe_diag=_get_kfe_diag
    )
    attach(LossCurvature, operator=_operator(LossCurvature.operator))
    attach(generator, Jacobian=Jacobian)
    likelihood.VARIANTS["classif_logsoftmax"] = likelihood.VARIANTS["classif_logits"]
    order = ("device", "function", "layer_collection", "verbose")
    attach(
        metrics,
        FIM=_positional(metrics.FIM, ("variant", *order)),
        FIM_MonteCarlo=_positional(metrics.FIM_MonteCarlo, ("variant", "trials", *order)),
        GradientSecondMoment=GradientSecondMoment,
        FIM_Types=FIM_Types,
    )
    attach(hessian, Hessian=_positional(hessian.Hessian, ("function", "layer_collection", "verbose")))
