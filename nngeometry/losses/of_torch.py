"""The losses of ``torch.nn``: the shapes of their targets, and their Hessians in closed form."""

from __future__ import annotations

import copy
from abc import abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..likelihood import Categorical, Cotangents, diagonal_cotangents
from ..model.independence import altered
from .output import OutputLoss, random_signs
from .targets import check_count, check_range, class_indices, like_output, shape_of, variance_like


class OfTorch(OutputLoss):
    """A loss of ``torch.nn``, whose reduction is set to "sum" on a copy."""

    def __init__(self, loss: Any) -> None:
        self.name = type(loss).__name__
        self.loss = copy.copy(loss)
        self.loss.reduction = "sum"
        self.mean = loss.reduction != "sum"

    @abstractmethod
    def aligned(self, f: Tensor, *targets: Any) -> tuple[Any, ...]:
        """The targets in shapes in which nothing is broadcast."""

    def total(self, f: Tensor, *targets: Any) -> Tensor:
        return self.loss(f, *self.aligned(f, *targets))


@dataclass(frozen=True)
class _Family:
    """What is known of a loss that compares the output with its targets element by element.

    curvature: the second derivative of each element, by default by differentiating twice. targets: how many it takes.
    twice: whether its mean over elements is differentiated twice here.
    """

    curvature: Callable[..., Tensor] | None = None
    targets: int = 1
    twice: bool = True


class _Elementwise(OfTorch):
    """A loss whose Hessian is diagonal."""

    def __init__(self, loss: Any, family: _Family) -> None:
        super().__init__(loss)
        self._family = family
        self._by_example = loss.reduction in ("batchmean", "none")
        buffers = vars(loss)["_buffers"]
        self._weights = {name: w for name in ("weight", "pos_weight") if (w := buffers.get(name)) is not None}

    def aligned(self, f: Tensor, *targets: Any) -> tuple[Any, ...]:
        check_count(targets, self._family.targets, self.name)
        for name, w in self._weights.items():
            if not _fits(w.shape, f.shape):
                raise ValueError(
                    f"loss: the {name} of {self.name}, {shape_of(w)}, and the outputs {shape_of(f)} would be "
                    "broadcast: give a weight for each element of an example's output"
                )
        return tuple(like_output(y, f, self.name) for y in targets)

    def weight(self, f: Tensor, *targets: Any) -> float:
        return f.shape[0] if self._by_example else f.numel()

    def curvature(self, f: Tensor, *targets: Any) -> Tensor:
        if self._family.curvature is None:
            return super().hvp(f, torch.ones_like(f), *targets)
        return self._family.curvature(self.loss, f, *self.aligned(f, *targets)).expand_as(f)

    def sqrt(self, f: Tensor, *targets: Any) -> Cotangents:
        return diagonal_cotangents(self._root(f, *targets))

    def sample(self, f: Tensor, *targets: Any, trials: int, generator: torch.Generator) -> Cotangents:
        signs = random_signs((trials, *f.shape), f, generator)
        return Cotangents.of(signs.mul_(self._root(f, *targets) / trials**0.5))

    def _root(self, f: Tensor, *targets: Any) -> Tensor:
        h = self.curvature(f, *targets)
        if bool((h < 0).any()):
            raise ValueError(
                f"loss: {self.name} has a negative second derivative in the output ({float(h.min()):.3g}) for targets "
                "or weights out of its range, so the Gauss-Newton matrix is not positive semidefinite: use Hessian"
            )
        return h.sqrt()

    def hvp(self, f: Tensor, u: Tensor, *targets: Any) -> Tensor:
        return self.curvature(f, *targets) * u


class _Gaussian(_Elementwise):
    """``nn.GaussianNLLLoss``, whose second target is the variance."""

    def aligned(self, f: Tensor, *targets: Any) -> tuple[Any, ...]:
        check_count(targets, 2, self.name)
        return like_output(targets[0], f, self.name), variance_like(targets[1], f, self.name).expand_as(f)


def _fits(w: torch.Size, f: torch.Size) -> bool:
    """Whether w broadcasts against f without making it larger."""
    return len(w) <= len(f) and all(a in (1, b) for a, b in zip(reversed(w), reversed(f), strict=False))


def _bce(loss: nn.BCEWithLogitsLoss, f: Tensor, y: Tensor) -> Tensor:
    positive = y if loss.pos_weight is None else loss.pos_weight * y
    h = (positive + 1 - y) * torch.exp(F.logsigmoid(f) + F.logsigmoid(-f))
    return h if loss.weight is None else loss.weight * h


def _poisson(loss: nn.PoissonNLLLoss, f: Tensor, y: Tensor) -> Tensor:
    return f.exp() if loss.log_input else y / (f + loss.eps).square()


def _huber(loss: nn.HuberLoss, f: Tensor, y: Tensor) -> Tensor:
    return ((f - y).abs() <= loss.delta).to(f.dtype)


def _smooth_l1(loss: nn.SmoothL1Loss, f: Tensor, y: Tensor) -> Tensor:
    return ((f - y).abs() < loss.beta).to(f.dtype) / max(loss.beta, 1e-300)


_ELEMENTWISE: dict[type[nn.Module], _Family] = {
    nn.BCEWithLogitsLoss: _Family(_bce),
    nn.MSELoss: _Family(lambda loss, f, y: torch.full_like(f, 2.0)),
    nn.PoissonNLLLoss: _Family(_poisson),
    nn.GaussianNLLLoss: _Family(lambda loss, f, y, var: 1 / var.clamp(min=loss.eps), targets=2),
    nn.HuberLoss: _Family(_huber),
    nn.SmoothL1Loss: _Family(_smooth_l1),
    nn.L1Loss: _Family(),
    nn.BCELoss: _Family(),
    nn.KLDivLoss: _Family(),
    nn.SoftMarginLoss: _Family(),
    nn.HingeEmbeddingLoss: _Family(),
    nn.MarginRankingLoss: _Family(targets=2),
    nn.MultiLabelSoftMarginLoss: _Family(twice=False),
}
#: For which a loss without reduction is taken for one with a value for each example, as any callable is.
_ANY_REDUCTION = (nn.L1Loss, nn.BCELoss, nn.KLDivLoss, nn.SoftMarginLoss, nn.HingeEmbeddingLoss, nn.MarginRankingLoss)


class _Classes(OfTorch):
    """``nn.CrossEntropyLoss`` and ``nn.NLLLoss``: one class for each position."""

    def aligned(self, f: Tensor, *targets: Any) -> tuple[Any, ...]:
        check_count(targets, 1, self.name)
        (y,) = targets
        if isinstance(self.loss, nn.CrossEntropyLoss) and isinstance(y, Tensor) and y.is_floating_point():
            if y.shape == f.shape and f.ndim > 1:
                return (y.to(f.dtype),)  # class probabilities
            if y.ndim == f.ndim and y.shape[1:2] != (1,):
                raise ValueError(
                    f"loss: {self.name} was given targets {shape_of(y)} for outputs {shape_of(f)}: class probabilities "
                    "have the shape of the outputs"
                )
        y = class_indices(y, f, 1, self.name)
        if f.is_cuda:  # where torch's own check ends the process
            self._check_range(f, y)
        return (y,)

    def total(self, f: Tensor, *targets: Any) -> Tensor:
        (y,) = self.aligned(f, *targets)
        loss, weight = self.loss, self._class_weights(f)
        if weight is not loss.weight:
            loss = copy.copy(loss)
            loss._buffers = {**loss._buffers, "weight": weight}
        try:
            return loss(f, y)
        except IndexError:
            self._check_range(f, y)
            raise

    def _class_weights(self, f: Tensor) -> Tensor | None:
        weight = self.loss.weight
        if weight is None:
            return None
        if weight.shape != f.shape[1:2]:
            raise ValueError(
                f"loss: {self.name} has class weights {shape_of(weight)} for outputs {shape_of(f)}: give one for each "
                "class"
            )
        return weight.to(f)

    def _check_range(self, f: Tensor, y: Tensor) -> None:
        check_range(y, f.shape[1], self.loss.ignore_index, self.name)


class _CrossEntropy(_Classes):
    """At each position a multiple of the Hessian of the log-partition function."""

    def _weights(self, f: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        """At each position ``(B, *positions)``: the factor of the Hessian, and what a mean counts it as."""
        loss, k = self.loss, f.shape[1]
        weight = self._class_weights(f)
        classes = f.new_ones(k) if weight is None else weight
        smoothing = loss.label_smoothing
        if y.is_floating_point():  # class probabilities
            weighted = (y * classes.view(k, *[1] * (f.ndim - 2))).sum(1)
            return (1 - smoothing) * weighted + smoothing / k * classes.sum(), torch.ones_like(weighted)
        real = y != loss.ignore_index
        try:
            each = classes.index_select(0, y.where(real, 0).flatten()).view(y.shape)
        except (IndexError, RuntimeError):
            self._check_range(f, y)
            raise
        hard = torch.where(real, each, 0.0)
        return (1 - smoothing) * hard + smoothing / k * classes.sum() * real, hard

    def weight(self, f: Tensor, *targets: Any) -> float:
        return float(self._weights(f, *self.aligned(f, *targets))[1].sum())

    def sqrt(self, f: Tensor, *targets: Any) -> Cotangents:
        factor = self._weights(f, *self.aligned(f, *targets))[0].sqrt().unsqueeze(1)
        plain = Categorical().sqrt(f)
        return Cotangents(plain.count, lambda start, stop: factor * plain.take(start, stop))

    def sample(self, f: Tensor, *targets: Any, trials: int, generator: torch.Generator) -> Cotangents:
        factor = self._weights(f, *self.aligned(f, *targets))[0].sqrt().unsqueeze(1)
        return Cotangents.of(factor * Categorical().sample(f, trials, generator).take(0, trials))

    def hvp(self, f: Tensor, u: Tensor, *targets: Any) -> Tensor:
        return self._weights(f, *self.aligned(f, *targets))[0].unsqueeze(1) * Categorical().hvp(f, u)


def check_reduction(name: str, reduction: Any) -> None:
    """Raise unless a loss has a reduction that leaves one number for a minibatch."""
    if reduction not in ("mean", "sum"):
        raise ValueError(
            f'{name}: reduction={reduction!r} leaves no single loss to differentiate twice: use "mean" or "sum"'
        )


def of_torch(loss: Any) -> OutputLoss | None:
    """A loss of ``torch.nn`` whose gradients at single examples are wanted, so that its reduction has no say; None for
    anything else.
    """
    known = _class_of(loss)
    if known is nn.CrossEntropyLoss:
        return _CrossEntropy(loss)
    if known is nn.NLLLoss:
        return _Classes(loss)
    if known is nn.GaussianNLLLoss:
        return _Gaussian(loss, _ELEMENTWISE[known])
    return None if known is None else _Elementwise(loss, _ELEMENTWISE[known])


def check_twice(loss: Any) -> None:
    """Raise unless the reduction of a loss is one that is differentiated twice here."""
    known, reduction, name = _class_of(loss), loss.reduction, type(loss).__name__
    if known is nn.CrossEntropyLoss or (known in _ELEMENTWISE and _ELEMENTWISE[known].twice):
        if known not in _ANY_REDUCTION or reduction not in ("none", "batchmean"):
            check_reduction(name, reduction)
    elif reduction != "none":
        raise NotImplementedError(
            f"{name} with reduction={reduction!r} has no closed form here: pass it with "
            'reduction="none", so that it gives one value for each example; the library takes the mean'
        )


def _class_of(loss: Any) -> Any:
    """The class of ``torch.nn`` that a loss computes, whose forward it has and nothing else."""
    classes: tuple[Any, ...] = (*_ELEMENTWISE, nn.CrossEntropyLoss, nn.NLLLoss)
    for known in classes:
        if isinstance(loss, known):
            return known if type(loss).forward is known.forward and not altered(loss) else None
    return None
