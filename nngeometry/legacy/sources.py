"""Where Jacobians and Hessians come from: backends and generators, and the old arguments of what makes matrices."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from enum import StrEnum
from typing import Any

import torch
from torch import Tensor, nn

from .. import blocks, generator, gram, likelihood, metrics
from ..blocks import Block
from ..generator import Generator
from ..hessian import LossCurvature
from ..layercollection import LayerCollection
from ..model import data
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
from ..object.tensors import make_lowrank
from ..spelling import warn
from .names import adopt, attach


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
        return self.on_layers(layer_collection).map(PFMapDense, self._data(examples)).to_torch()

    def get_gram_matrix(self, examples: Any = None, layer_collection: LayerCollection | None = None) -> Tensor:
        """``(C, n, C, n)``."""
        return self.on_layers(layer_collection).kernel(self._data(examples)).to_torch()

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
        return self.on_layers(layer_collection).map(PFMapImplicit, self._data(examples)).jvp(v)

    def on_layers(self, layer_collection: LayerCollection | None) -> TorchHooksJacobianBackend:
        """:meth:`on`, of the layers of this one by default."""
        return self if layer_collection is None else self.on(layer_collection)

    def _data(self, examples: Any) -> Any:
        return self.examples if examples is None else examples

    def _matrix(self, kind: type[PMat], examples: Any, lc: LayerCollection | None) -> PMat:
        lc = self.layer_collection if lc is None else lc
        return kind(layer_collection=lc, generator=self, examples=self._data(examples))

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
    M = PMatEKFAC(lc, data=(kfe, diags))
    M.generator = self.on(lc)
    return dict(M.update_diag(self._data(examples)).data[1])


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
        return self._matrix(kind, examples, layer_collection).data

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

    function_is_loss = True

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


class OfGenerators:
    """Old names of generators."""

    def get_device(self: Any) -> Any:
        """Old name of ``device``.

        :meta private:
        """
        return self.device


def install() -> None:
    """Attach the old names of what makes matrices."""
    adopt(Generator, OfGenerators)
    attach(
        TorchHooksJacobianBackend, **{name: _gives(kind) for name, kind in _GIVES.items()}, get_kfe_diag=_get_kfe_diag
    )
    attach(generator, Jacobian=Jacobian)
    attach(metrics, GradientSecondMoment=GradientSecondMoment, FIM_Types=FIM_Types)
