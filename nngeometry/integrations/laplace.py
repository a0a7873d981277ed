"""laplace-torch (0.3) with the matrices of this library: a backend, and Hessian structures that it does not have.

The backend is for ``Laplace(model, likelihood, "all" | "last_layer" | "subnetwork", "full" | "diag" | "kron",
backend=...)``. The structures "ekfac", "blockdiag" and "lowrank_ggn" of all weights are there once this module is
imported, need no backend, and never make Jacobians ``(B, C, P)``. laplace-torch's own "lowrank" and "gp" ask for
classes of its own backends, so that they do not take another one.
"""

from __future__ import annotations

from collections.abc import MutableMapping
from math import prod
from typing import Any

import torch
from laplace.baselaplace import ParametricLaplace
from laplace.curvature.curvature import CurvatureInterface, EFInterface, GGNInterface
from laplace.utils.matrix import Kron as LaplaceKron
from torch import Tensor, nn

from ..generator import Generator
from ..gram import joined, linearised
from ..jacobian import Jacobian, of_outputs
from ..layercollection import LayerCollection
from ..likelihood import Categorical, Gaussian, Likelihood
from ..metrics import FIM, EmpiricalFisher
from ..object import PMat, PMatBlockDiag, PMatDense, PMatDiag, PMatEKFAC, PMatKFAC, PMatLowRank, PVector


class _Curvature:
    """What the two backends have in common: matrices, summed over a minibatch, in laplace-torch's order."""

    model: Any
    lossfunc: Any
    factor: float
    likelihood: Any
    last_layer: bool
    subnetwork_indices: Any
    dict_key_y: str
    _model: nn.Module

    def _of(self, model: nn.Module, x: Any, y: Tensor, representation: Any, lc: LayerCollection) -> PMat:
        raise NotImplementedError

    def _matrix(self, x: Any, y: Tensor, representation: Any) -> tuple[Tensor, PMat, int]:
        """The loss, the mean matrix and of how many examples."""
        with torch.no_grad():
            if self.last_layer:
                f, x = self.model.forward_with_features(x)
                x = x.reshape(len(f), -1) if x.ndim < 2 else x  # of one example it drops the axis
                self._check_last(f, x)
            else:
                f = self.model(x)
            loss = self.factor * self.lossfunc(f, y)
        lc = LayerCollection.from_model(self._model)
        return loss.detach(), self._of(self._model, x, y, representation, lc), len(f)

    def _check_last(self, f: Tensor, features: Tensor) -> None:
        """Raise unless the last layer makes the outputs of the model from its features, as it is taken to do."""
        found = self._model(features)
        if found.shape != f.shape or not torch.allclose(found, f, rtol=torch.finfo(f.dtype).eps ** 0.5, atol=1e-6):
            raise NotImplementedError(
                f"the output of the model {tuple(f.shape)} is not that of its last layer "
                f"{self.model._last_layer_name!r} {tuple(found.shape)}, so its derivatives are not either: pass "
                'feature_reduction="average", "pick_first" or "pick_last" if that is what comes after it, or use '
                'subset_of_weights="subnetwork" with the indices of its weights'
            )

    def _order(self, lc: LayerCollection) -> Tensor:
        """Where each parameter of laplace-torch's flat vector is in ours."""
        start, where = 0, {}
        for p in lc.parameters(self._model):
            where[id(p)] = torch.arange(start, start + p.numel())
            start += p.numel()
        return torch.cat([where[id(p)] for p in self._model.parameters() if p.requires_grad])

    def _chosen(self, lc: LayerCollection, device: torch.device) -> Tensor:
        order = self._order(lc).to(device)
        return order if self.subnetwork_indices is None else order[self.subnetwork_indices.to(device)]

    def full(self, x: Any, y: Tensor, **options: Any) -> tuple[Tensor, Tensor]:
        """The loss and the dense matrix."""
        loss, F, n = self._matrix(x, y, PMatDense)
        index = self._chosen(F.layer_collection, F.device)
        return loss, n * F.to_torch()[index][:, index]

    def diag(self, x: Any, y: Tensor, **options: Any) -> tuple[Tensor, Tensor]:
        """The loss and the diagonal."""
        loss, F, n = self._matrix(x, y, PMatDiag)
        return loss, n * F.get_diag()[self._chosen(F.layer_collection, F.device)]

    def kron(self, x: Any, y: Tensor, N: int, **options: Any) -> tuple[Tensor, LaplaceKron]:
        """The loss and Kronecker factors, an entry for each parameter: weights have two, summed over the minibatch and
        a mean, times n / N; others one.
        """
        loss, F, n = self._matrix(x, y, PMatKFAC)
        found: dict[int, list[Tensor]] = {}
        parameters = iter(F.layer_collection.parameters(self._model))
        for name, layer in F.layer_collection.layers.items():
            factors, start = F.data[name], 0
            for kind, shape in layer.params:
                p, size = next(parameters), prod(shape)
                if isinstance(factors, tuple) and kind == "weight" and 2 <= len(shape) <= 4:
                    a, g = factors
                    columns = prod(shape[1:])
                    if a.ndim != 2 or g.ndim != 2 or len(g) != shape[0] or len(a) < columns:
                        raise NotImplementedError(_NO_FACTORS.format(name))
                    found[id(p)] = [n * g, a[:columns, :columns] * (n / N)]
                elif isinstance(factors, tuple) and kind == "bias":
                    a, g = factors
                    found[id(p)] = [n * g * a[-1, -1]]
                elif isinstance(factors, Tensor) and factors.ndim == 2 and len(shape) == 1:
                    found[id(p)] = [n * factors[start : start + size, start : start + size]]
                else:
                    raise NotImplementedError(_NO_FACTORS.format(name))
                start += size
        return loss, LaplaceKron([found[id(p)] for p in self._model.parameters() if p.requires_grad])

    def jacobians(self, x: Any, enable_backprop: bool = False) -> tuple[Tensor, Tensor]:
        """``(B, C, P)`` and the outputs."""
        if enable_backprop:
            found: tuple[Tensor, Tensor] = CurvatureInterface.jacobians(self, x, enable_backprop=True)
            return found
        lc = LayerCollection.from_model(self.model)
        J = Jacobian(self.model, _minibatch(x), _whole(self.model, x), layer_collection=lc).to_torch()
        with torch.no_grad():
            f = self.model(x)
        return J.movedim(0, 1)[..., self._chosen(lc, J.device)], f


_NO_FACTORS = (
    "layer {0!r} has no pair of Kronecker factors for each weight, which laplace-torch's kron needs: use "
    'hessian_structure="ekfac" or "blockdiag" of nngeometry.integrations.laplace, which take every layer'
)


class NNGeometryGGN(_Curvature, GGNInterface):
    """The Fisher matrix, which is the generalised Gauss-Newton matrix of laplace-torch's likelihoods.

    Example (with laplace-torch installed)::

        from laplace import Laplace
        from nngeometry.integrations.laplace import NNGeometryGGN

        la = Laplace(model, "classification", "all", "kron", backend=NNGeometryGGN)
    """

    def _of(self, model: nn.Module, x: Any, y: Tensor, representation: Any, lc: LayerCollection) -> PMat:
        F: PMat = FIM(
            model,
            _minibatch(x),
            representation,
            _likelihood(self.likelihood),
            layer_collection=lc,
            function=_whole(model, x),
        )
        return F


class NNGeometryEF(_Curvature, EFInterface):
    """The second moment of gradients of the log-likelihood."""

    def _of(self, model: nn.Module, x: Any, y: Tensor, representation: Any, lc: LayerCollection) -> PMat:
        regression = str(getattr(self.likelihood, "value", self.likelihood)) == "regression"

        def half_squares(f: Tensor, y: Tensor) -> Tensor:
            return (f - y).square().flatten(1).sum(1) / 2

        loss = half_squares if regression else nn.CrossEntropyLoss()
        function = (lambda batch, _: model(batch)) if isinstance(x, MutableMapping) else None
        F: PMat = EmpiricalFisher(model, [(x, y)], representation, loss, layer_collection=lc, function=function)
        return F


def _likelihood(name: Any) -> Likelihood:
    return Gaussian() if str(getattr(name, "value", name)) == "regression" else Categorical()


def _minibatch(x: Any) -> Any:
    return x if isinstance(x, MutableMapping) else (x,)


def _whole(model: nn.Module, x: Any) -> Any:
    return (lambda batch: model(batch)) if isinstance(x, MutableMapping) else None


class _Represented(ParametricLaplace):
    """A Laplace approximation of all weights by a matrix of this library, H = N F, with a scalar prior."""

    representation: Any

    def __init__(self, model: nn.Module, likelihood: Any, *args: Any, **options: Any) -> None:
        options.setdefault("backend", NNGeometryGGN)
        super().__init__(model, likelihood, *args, **options)

    def _init_H(self) -> None:
        self.H: PMat | None = None

    def fit(self, train_loader: Any, override: bool = True, progress_bar: bool = False) -> None:
        """Make the matrix of a loader; with ``override=False`` its examples are added."""
        self.model.eval()
        batches = [
            (batch, batch[self.dict_key_y]) if isinstance(batch, MutableMapping) else batch for batch in train_loader
        ]
        if not batches:
            raise ValueError(
                "fit: train_loader yielded no minibatch: it is empty, or an iterator that was consumed before"
            )
        if override or self.H is None:
            self.H, self.loss, self.n_data = None, 0.0, 0
        n = 0
        with torch.no_grad():
            for x, y in batches:
                x = x if isinstance(x, MutableMapping) else x.to(self._device)
                f = self.model(x)
                self.loss = self.loss + self.backend.factor * self.backend.lossfunc(f, y.to(self._device))
                n += len(f)
        self.n_outputs = f.shape[-1]
        self.model.output_size = self.n_outputs
        lc = LayerCollection.from_model(self.model)
        self.mean = PVector.from_model(self.model, lc).to_torch().detach()
        expected = torch.nn.utils.parameters_to_vector(self.params)
        if not torch.equal(self.mean, expected):
            raise NotImplementedError(
                "the layers of this model hold its parameters in another order than model.parameters(): use "
                "nngeometry.Posterior"
            )
        data = [x if isinstance(x, MutableMapping) else (x.to(self._device),) for x, _ in batches]
        F = n * FIM(
            self.model,
            data,
            self.representation,
            _likelihood(self.likelihood),
            layer_collection=lc,
            function=_whole(self.model, batches[0][0]),
        )
        self.H = F if self.H is None else self.H + F
        self.n_data += n

    def _check_H_init(self) -> None:
        if self.H is None:
            raise AttributeError("Laplace not fitted. Run fit() first.")

    def _prior(self) -> Tensor:
        """The prior precision as a number."""
        if self.prior_precision.numel() != 1:
            raise NotImplementedError(
                f"prior_precision: hessian_structure={self._key[1]!r} takes one number: use nngeometry.Posterior for "
                "one for each layer"
            )
        return self.prior_precision.reshape(())

    def _covariance(self) -> PMat:
        self._check_H_init()
        assert self.H is not None
        factor = float(self._H_factor)
        return self.H.inv(float(self._prior().detach()) / factor) * (1 / factor)

    @property
    def posterior_precision(self) -> PMat:
        """``H / (sigma^2 T) + prior``."""
        return self._covariance().inv(0.0)

    @property
    def log_det_posterior_precision(self) -> Tensor:
        self._check_H_init()
        if getattr(self, "_spectrum", (None,))[0] is not self.H:
            assert self.H is not None
            self._spectrum = self.H, self.H.eigenvalues()
        return (self._H_factor * self._spectrum[1] + self._prior()).log().sum()

    def square_norm(self, value: Tensor) -> Tensor:
        self._check_H_init()
        assert self.H is not None
        delta = value - self.mean
        return self._H_factor * (delta * self.H.matvec(delta)).sum(-1) + self._prior() * delta.square().sum(-1)

    def functional_variance(self, Js: Tensor) -> Tensor:
        return torch.einsum("ncp,nkp->nck", Js, self._covariance().matvec(Js))

    def functional_covariance(self, Js: Tensor) -> Tensor:
        rows = Js.flatten(0, 1)
        return rows @ self._covariance().matvec(rows).T

    def sample(self, n_samples: int = 100, generator: torch.Generator | None = None) -> Tensor:
        draws = self._covariance().sample(generator, n_samples)
        return torch.stack([self.mean + draw.to_torch() for draw in draws])

    def _glm_predictive_distribution(self, X: Any, joint: bool = False, diagonal_output: bool = False) -> Any:
        if joint or self.enable_backprop:
            return super()._glm_predictive_distribution(X, joint, diagonal_output)
        metric = self._covariance()  # raises before fit
        assert self.H is not None
        lc = self.H.layer_collection
        function, output = _whole(self.model, X), "diag" if diagonal_output else "full"
        source: Generator = of_outputs(self.model, function, lc)
        return joined(linearised(source, _minibatch(X), metric, output))


class EKFACLaplace(_Represented):
    """Eigenvalue-corrected Kronecker factors."""

    _key = ("all", "ekfac")
    representation = PMatEKFAC


class BlockDiagLaplace(_Represented):
    """The exact block of each layer."""

    _key = ("all", "blockdiag")
    representation = PMatBlockDiag


class LowRankGGNLaplace(_Represented):
    """The exact matrix by the Jacobian, for few examples."""

    _key = ("all", "lowrank_ggn")
    representation = PMatLowRank
