"""How much a normal prior explains: the evidence of a Laplace approximation as a function of the prior's precision."""

from __future__ import annotations

import math
from collections.abc import Mapping
from functools import cached_property
from typing import Any, NoReturn

import torch
from torch import Tensor

from . import arguments
from .object import PMat, PVector

#: A prior: one precision, or one for each layer by name.
Prior = float | Tensor | Mapping[str, "float | Tensor"]


def checked_prior(prior: Any, matrix: PMat) -> Any:
    """A prior as a number or tensor, or a dict of these in the order of the layers; raises unless it is one."""
    if not isinstance(prior, Mapping):
        _check_number("prior_precision", prior)
        return prior.reshape(()) if isinstance(prior, Tensor) else float(prior)
    differ = set(prior) ^ set(matrix.layer_collection)
    if differ:
        raise ValueError(
            f"prior_precision: give one value for each layer; {', '.join(sorted(map(str, differ)))} do not match "
            "those of the matrix"
        )
    for name, value in prior.items():
        _check_number(f"prior_precision of layer {name!r}", value)
    return {name: prior[name] for name in matrix.layer_collection}


def _check_number(name: str, value: Any) -> None:
    arguments.number(name, value.detach() if isinstance(value, Tensor) else value, least=0.0)


def plain_prior(prior: Any) -> Any:
    """A prior as numbers."""
    if isinstance(prior, Mapping):
        return {name: plain_prior(d) for name, d in prior.items()}
    return float(prior.detach()) if isinstance(prior, Tensor) else float(prior)


class Evidence:
    """What the evidence takes of a matrix F and a mean w, its eigenvalues being computed once.

    The sum of N F and a prior d has the determinant ``prod (N l + d)``, with l the eigenvalues: of the whole for one d;
    of each layer for one d for each, unless F couples layers.

    Args:
        matrix: F.
        mean: w.
    """

    def __init__(self, matrix: PMat, mean: PVector) -> None:
        self.matrix = matrix
        self.mean = mean

    @cached_property
    def eigenvalues(self) -> Tensor:
        """Those of F."""
        found: Tensor = self.matrix.eigenvalues()
        return found

    @cached_property
    def of_layers(self) -> dict[str, Tensor]:
        """Those of the layers of F, which it does not couple."""
        found: dict[str, Tensor] = self.matrix.eigenvalues(per_layer=True)
        return found

    def complexity(self, prior: Any, scale: Any) -> Tensor:
        """``w . d w + log det(scale F + d) - log det d``, differentiable in d and in the scale."""
        self._check_entries()
        lc, w = self.matrix.layer_collection, self.mean.to_dict()
        each = {name: self._tensor(prior[name] if isinstance(prior, Mapping) else prior) for name in lc}
        total = self._tensor(0.0)
        for name, d in each.items():
            if float(d.detach()) <= 0:
                raise ValueError(
                    f"prior_precision: a prior of {float(d.detach()):g} has no evidence: give a positive one"
                )
            squares = torch.stack([t.square().sum() for t in w[name]]).sum()
            total = total + d * squares - lc[name].numel() * d.log()
        s = self._tensor(scale)
        if not isinstance(prior, Mapping):
            return total + _logdet(s * self.eigenvalues + self._tensor(prior), "prior_precision")
        if self.matrix.couples_layers:
            found: Tensor = _LogDet.apply(self.matrix, s, torch.stack(list(each.values())))
            return total + found
        for name, l in self.of_layers.items():
            total = total + _logdet(s * l + each[name], f"prior_precision of layer {name!r}")
        return total

    def best(self, num_data: float, per_layer: bool) -> Any:
        """The prior of largest evidence.

        For one d that is the only root of ``sum_i N l_i / (N l_i + d) = d |w|^2``.
        """
        self._check_entries()
        squares = {name: float(sum(t.square().sum() for t in ts)) for name, ts in self.mean.to_dict().items()}
        if not per_layer:
            return _root("the matrix", num_data * self.eigenvalues, sum(squares.values()))
        if not self.matrix.couples_layers:
            return {name: _root(f"layer {name!r}", num_data * l, squares[name]) for name, l in self.of_layers.items()}
        for name, square in squares.items():
            if square == 0:
                raise ValueError(_no_prior(f"layer {name!r}", "has parameters of zero"))
        return self._climbed(num_data)

    def _climbed(self, num_data: float) -> dict[str, float]:
        """A precision for each layer of a matrix that couples them, by a quasi-Newton method in their logarithms."""
        names = list(self.matrix.layer_collection)
        start = math.log(self.best(num_data, False))
        log_d = torch.full((len(names),), start, dtype=self.matrix.dtype, device=self.matrix.device).requires_grad_()
        optimizer = torch.optim.LBFGS(
            [log_d], max_iter=500, tolerance_grad=1e-9, tolerance_change=0.0, line_search_fn="strong_wolfe"
        )

        def closure() -> float:
            optimizer.zero_grad()
            loss = self.complexity(dict(zip(names, log_d.exp(), strict=True)), num_data)
            loss.backward()
            return float(loss.detach())

        with torch.enable_grad():
            optimizer.step(closure)
        slope = float(log_d.grad.abs().max()) if log_d.grad is not None else math.nan
        most = 1e-4 if self.matrix.dtype == torch.float64 else 1e-1
        if not slope < most * self.matrix.size(0):
            raise ValueError(
                f"fit_prior: the evidence has no maximum that can be found (its slope is {slope:.2g}): a layer without "
                "curvature has none; choose a prior_precision, or leave the layer out of the collection"
            )
        return dict(zip(names, log_d.detach().exp().tolist(), strict=True))

    def smallest(self, prior: Any, num_data: float) -> tuple[float, float, float]:
        """The smallest eigenvalue of N F + d, the smallest of N F, and the largest in magnitude."""
        l = num_data * self.eigenvalues
        of_matrix, largest = float(l.min()), float(l.abs().max())
        if not isinstance(prior, Mapping):
            return of_matrix + prior, of_matrix, largest
        bound = of_matrix + min(prior.values())
        if bound > 4 * torch.finfo(l.dtype).eps * largest:
            return bound, of_matrix, largest
        if not self.matrix.couples_layers:
            least = min(num_data * float(l.min()) + prior[name] for name, l in self.of_layers.items())
            return least, of_matrix, largest
        layers = self.matrix.layer_collection.layers.items()
        d = torch.cat([l.new_full((layer.numel(),), prior[name]) for name, layer in layers])
        whole = num_data * self.matrix.to_torch() + torch.diag(d)
        return float(torch.linalg.eigvalsh(whole).min()), of_matrix, largest

    def check_definite(self, prior: Any, num_data: float) -> None:
        """Raise ``ValueError`` unless N F + d is positive definite, in the words of a prior."""
        if isinstance(prior, Mapping) and min(prior.values()) == 0 and self.matrix.couples_layers:
            name, of = min(prior, key=prior.__getitem__), type(self.matrix).__name__
            raise ValueError(
                f"prior_precision: it is zero for layer {name!r}, and {of} couples layers: give each a positive one, "
                "or one number for all, which may be zero"
            )
        if self.matrix.matrix_free:
            return
        if not bool(self.matrix.trace().isfinite()):
            raise ValueError("matrix: it has NaN or infinite entries: look at the parameters and the data")
        least, smallest, largest = self.smallest(prior, num_data)
        d = min(prior.values()) if isinstance(prior, Mapping) else prior
        eps = torch.finfo(self.matrix.dtype).eps
        noise = self.matrix.size(0) * eps * largest
        if least > (noise if d == 0 else 4 * eps * largest):
            return
        if smallest >= -noise:
            raise ValueError(
                f"prior_precision: with {d:g} the precision is singular to working precision (N F has eigenvalues from "
                f"{smallest:.3g} to {largest:.3g}): give a larger one, e.g. {max(1e3 * noise, 1e-8):.1g}"
            )
        raise ValueError(
            f"matrix: N F has the eigenvalue {smallest:.3g}, so with prior_precision={d:g} there is no posterior: use "
            "GGN or FIM, which have none below zero (in every representation but PMatQuasiDiag), or a larger prior"
        )

    def _check_entries(self) -> None:
        if self.matrix.matrix_free:
            raise NotImplementedError(
                f"{type(self.matrix).__name__}: the evidence and the best prior need all eigenvalues, which a matrix "
                "that is known by its products does not have: use another representation (PMatLowRank, PMatKFAC, ...), "
                "or nngeometry.spectrum.spectral_density(F).logdet(regul) for an estimate"
            )

    def _tensor(self, value: Any) -> Tensor:
        return torch.as_tensor(value, dtype=self.matrix.dtype, device=self.matrix.device).reshape(())


class _LogDet(torch.autograd.Function):
    """``log det(s F + d)`` with a number d for each layer, of a matrix that couples layers."""

    @staticmethod
    def forward(ctx: Any, matrix: PMat, s: Tensor, d: Tensor) -> Tensor:
        ctx.of = matrix * float(s), dict(zip(matrix.layer_collection, d.tolist(), strict=True))
        ctx.save_for_backward(s, d)
        scaled, regul = ctx.of
        found: Tensor = scaled.logdet(regul)
        return found

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[None, Tensor, Tensor]:
        scaled, regul = ctx.of
        s, d = ctx.saved_tensors
        traces = torch.stack(list(scaled.inv(regul).trace(per_layer=True).values()))
        of_s, of_d = _Once.apply((scaled.size(0) - d.detach() @ traces) / s.detach(), s, d), _Once.apply(traces, s, d)
        return None, grad * of_s, grad * of_d


class _Once(torch.autograd.Function):
    """A value that depends on others, by which it is not differentiated: it says so, rather than seem constant."""

    @staticmethod
    def forward(ctx: Any, value: Tensor, *of: Tensor) -> Tensor:
        return value.clone()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> NoReturn:
        raise NotImplementedError(
            "log_marginal_likelihood: with a prior for each layer, of a matrix that couples layers, it has no second "
            "derivative: use a matrix with a block for each layer (PMatBlockDiag, PMatKFAC, ...), or differences of "
            "first ones"
        )


def _logdet(l: Tensor, what: str) -> Tensor:
    if not bool((l > 0).all()):
        raise ValueError(
            f"{what}: the precision has the eigenvalue {float(l.detach().min()):.3g}, so there is no evidence: give a "
            "larger one"
        )
    return l.log().sum()


def _root(where: str, l: Tensor, square: float) -> float:
    """The root of ``sum_i l_i / (l_i + d) - d square``, which falls in log d, by bisection."""
    if square == 0:
        raise ValueError(_no_prior(where, "has parameters of zero"))
    largest = float(l.max())
    noise = l.numel() * torch.finfo(l.dtype).eps * abs(largest)
    if float(l.min()) < -noise:
        raise ValueError(
            f"fit_prior: {where} has negative eigenvalues (N F has {float(l.min()):.3g}), so the evidence may have no "
            "maximum: use GGN or FIM, in another representation than PMatQuasiDiag, or choose a precision"
        )
    if largest <= 0:
        raise ValueError(_no_prior(where, "has no curvature"))
    positive = l.double().clamp(min=0)

    def slope(log_d: float) -> float:
        d = math.exp(log_d)
        return float((positive / (positive + d)).sum()) - d * square

    high = math.log(l.numel() / square)
    low = high - 1.0
    while slope(low) < 0:
        low -= 2 * (high - low)
        if low < -600:
            raise ValueError(_no_prior(where, "has next to no curvature"))
    for _ in range(200):
        middle = (low + high) / 2
        if middle in (low, high):
            break
        low, high = (middle, high) if slope(middle) > 0 else (low, middle)
    return math.exp((low + high) / 2)


def _no_prior(where: str, why: str) -> str:
    return (
        f"fit_prior: {where} {why}, so there is no precision with the largest evidence: choose one, or leave the layer "
        "out of the collection"
    )
