"""Losses as functions of the output: their sum over a minibatch, what a mean divides it by, and their Hessian."""

from __future__ import annotations

import copy
from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .likelihood import Categorical, Cotangents, Loss, diagonal_cotangents, per_example


class OutputLoss(ABC):
    """A convex loss of the output f ``(B, *out)`` of a minibatch, with its Hessian with respect to f in closed form.

    mean: whether the loss of the whole data set is a mean, i.e. divided by the sum of :meth:`weight` over minibatches.
    """

    def __init__(self, loss: Any) -> None:
        if loss.reduction not in ("mean", "sum"):
            raise ValueError(
                f"{type(loss).__name__}: reduction={loss.reduction!r} leaves no single loss to differentiate "
                "twice: use "
                '"mean" or "sum"'
            )
        self.loss = copy.copy(loss)
        self.loss.reduction = "sum"
        self.mean = loss.reduction == "mean"

    def total(self, f: Tensor, *targets: Any) -> Tensor:
        """The sum of the losses in a minibatch, a scalar."""
        return self.loss(f, *targets)

    @abstractmethod
    def weight(self, f: Tensor, *targets: Any) -> float:
        """What the mean over this minibatch would divide the sum by."""

    @abstractmethod
    def sqrt(self, f: Tensor, *targets: Any) -> Cotangents:
        """Columns of a square root of the Hessian of the sum."""

    @abstractmethod
    def hvp(self, f: Tensor, u: Tensor, *targets: Any) -> Tensor:
        """The Hessian of the sum times u, in the shape of f."""


class _Elementwise(OutputLoss):
    """A loss whose Hessian is diagonal: ``curvature(f, *targets)``, in the shape of f."""

    def __init__(self, loss: Any, curvature: Callable[..., Tensor]) -> None:
        super().__init__(loss)
        self._curvature = curvature

    def weight(self, f: Tensor, *targets: Any) -> float:
        return f.numel()

    def curvature(self, f: Tensor, *targets: Any) -> Tensor:
        return self._curvature(self.loss, f, *targets).expand_as(f)

    def sqrt(self, f: Tensor, *targets: Any) -> Cotangents:
        return diagonal_cotangents(self.curvature(f, *targets).sqrt())

    def hvp(self, f: Tensor, u: Tensor, *targets: Any) -> Tensor:
        return self.curvature(f, *targets) * u


def _bce(loss: nn.BCEWithLogitsLoss, f: Tensor, y: Tensor) -> Tensor:
    positive = y if loss.pos_weight is None else loss.pos_weight * y
    h = (positive + 1 - y) * torch.exp(F.logsigmoid(f) + F.logsigmoid(-f))
    return h if loss.weight is None else loss.weight * h


def _poisson(loss: nn.PoissonNLLLoss, f: Tensor, y: Tensor) -> Tensor:
    return f.exp() if loss.log_input else y / (f + loss.eps).square()


def _gaussian(loss: nn.GaussianNLLLoss, f: Tensor, y: Tensor, var: Tensor | float) -> Tensor:
    variance = torch.as_tensor(var, dtype=f.dtype, device=f.device).clamp(min=loss.eps)
    if variance.ndim == f.ndim - 1 and variance.ndim > 0:
        variance = variance.unsqueeze(-1)  # one variance for all outputs of an example
    return 1 / variance


def _huber(loss: nn.HuberLoss, f: Tensor, y: Tensor) -> Tensor:
    return ((f - y).abs() <= loss.delta).to(f.dtype)


def _smooth_l1(loss: nn.SmoothL1Loss, f: Tensor, y: Tensor) -> Tensor:
    return ((f - y).abs() < loss.beta).to(f.dtype) / max(loss.beta, 1e-300)


_ELEMENTWISE: dict[type, Callable[..., Tensor]] = {
    nn.BCEWithLogitsLoss: _bce,
    nn.MSELoss: lambda loss, f, y: torch.full_like(f, 2.0),
    nn.PoissonNLLLoss: _poisson,
    nn.GaussianNLLLoss: _gaussian,
    nn.HuberLoss: _huber,
    nn.SmoothL1Loss: _smooth_l1,
}


class _CrossEntropy(OutputLoss):
    """``nn.CrossEntropyLoss``: at each position a multiple of the Hessian of the log-partition function."""

    def _weights(self, f: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        """At each position ``(B, *positions)``: the factor of the Hessian, and what a mean counts it as."""
        loss, k = self.loss, f.shape[1]
        classes = f.new_ones(k) if loss.weight is None else loss.weight.to(f)
        smoothing = loss.label_smoothing
        if y.is_floating_point():  # class probabilities
            weighted = (y * classes.view(k, *[1] * (f.ndim - 2))).sum(1)
            return (1 - smoothing) * weighted + smoothing / k * classes.sum(), torch.ones_like(weighted)
        real = y != loss.ignore_index
        hard = torch.where(real, classes[y.where(real, 0)], 0.0)
        return (1 - smoothing) * hard + smoothing / k * classes.sum() * real, hard

    def weight(self, f: Tensor, *targets: Any) -> float:
        return float(self._weights(f, *targets)[1].sum())

    def sqrt(self, f: Tensor, *targets: Any) -> Cotangents:
        factor = self._weights(f, *targets)[0].sqrt().unsqueeze(1)
        plain = Categorical().sqrt(f)
        return Cotangents(plain.count, lambda start, stop: factor * plain.take(start, stop))

    def hvp(self, f: Tensor, u: Tensor, *targets: Any) -> Tensor:
        return self._weights(f, *targets)[0].unsqueeze(1) * Categorical().hvp(f, u)


class _Callable:
    """Any loss with one value for each example: its Hessians by differentiating it twice, one small matrix each."""

    mean = True

    def __init__(self, loss: Loss) -> None:
        self.loss = loss

    def total(self, f: Tensor, *targets: Any) -> Tensor:
        return per_example(self.loss, f, *targets).sum()

    def weight(self, f: Tensor, *targets: Any) -> float:
        return f.shape[0]

    def _hessians(self, f: Tensor, *targets: Any) -> Tensor:
        """``(B, K, K)``, by one product for each of the K outputs."""
        leaf = f.detach().requires_grad_()
        with torch.enable_grad():
            (g,) = torch.autograd.grad(self.total(leaf, *targets), leaf, create_graph=True)
            columns = [
                torch.autograd.grad(gk.sum(), leaf, retain_graph=True, allow_unused=True, materialize_grads=True)[0]
                if gk.requires_grad
                else torch.zeros_like(leaf)
                for gk in g.reshape(len(g), -1).unbind(1)
            ]
        return torch.stack([c.reshape(len(c), -1) for c in columns], 2)

    def sqrt(self, f: Tensor, *targets: Any) -> Cotangents:
        l, q = torch.linalg.eigh(self._hessians(f, *targets))
        noise = l.shape[1] * torch.finfo(l.dtype).eps * l.abs().amax()
        if bool((l < -10 * noise).any()):
            raise ValueError(
                f"loss: its Hessian with respect to the output has a negative eigenvalue ({float(l.min()):.3g}), so "
                "the Gauss-Newton matrix is not positive semidefinite: use Hessian, or a convex loss"
            )
        s = q * l.clamp(min=0).sqrt().unsqueeze(1)  # (B, K, c)
        return Cotangents.of(s.movedim(2, 0).reshape(-1, *f.shape))

    def hvp(self, f: Tensor, u: Tensor, *targets: Any) -> Tensor:
        return torch.einsum("bkl,bl->bk", self._hessians(f, *targets), u.reshape(len(u), -1)).view_as(f)


def output_loss(loss: Loss) -> OutputLoss | _Callable:
    """What is known of a loss: the closed forms of ``torch.nn``, or any callable with one value for each example."""
    if type(loss) is nn.CrossEntropyLoss:
        return _CrossEntropy(loss)
    if type(loss) in _ELEMENTWISE:
        return _Elementwise(loss, _ELEMENTWISE[type(loss)])
    if isinstance(loss, nn.Module) and getattr(loss, "reduction", "none") != "none":
        raise NotImplementedError(
            f"{type(loss).__name__} with reduction={loss.reduction!r} has no closed form here: pass it with "
            'reduction="none", so that it gives one value for each example; the library takes the mean'
        )
    return _Callable(loss)
