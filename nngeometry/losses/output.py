"""A loss as a function of the output: what it has to tell, and any callable looked at before it is believed."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import replace
from functools import cache
from typing import Any

import torch
from torch import Tensor

from ..changes import Changed, no_grad, recording
from ..likelihood import Cotangents
from ..memory import budget, slices
from ..model import data
from ..model.batch import columns
from .convex import OutputHessian
from .targets import shape_of


class OutputLoss(ABC):
    """A loss of the output f ``(n, *out)`` of a minibatch: a sum over examples, each of its own output and targets.

    A subclass gives :meth:`total`, and :meth:`weight` if it is not a mean over examples. In place of differentiating
    it, it may have closed forms of the gradient, of products with its Hessian (:meth:`hvp`) and of a square root of
    that (:meth:`sqrt`). ``mean`` says whether the loss of the whole data set is a mean, i.e. divided by the sum of
    :meth:`weight` over minibatches.

    Example:
        >>> class Quartic(OutputLoss):
        ...     def total(self, f, y):
        ...         return (f - y).pow(4).sum()
        >>> Quartic()(torch.zeros(2, 1), torch.ones(2, 1))
        tensor(1.)
    """

    mean: bool = True

    @abstractmethod
    def total(self, f: Tensor, *targets: Any) -> Tensor:
        """The sum of the losses in a minibatch.

        Args:
            f: Outputs ``(n, *out)``.
            *targets: What the loss receives beside them.

        Returns:
            A scalar, differentiable in f.
        """

    def weight(self, f: Tensor, *targets: Any) -> float:
        """What the mean over this minibatch would divide the sum by, by default its number of examples.

        Args:
            f: Outputs ``(n, *out)``.
            *targets: What the loss receives beside them.
        """
        return f.shape[0]

    def gradient(self, f: Tensor, *targets: Any) -> Tensor:
        """The gradient of each example's loss in its output.

        Args:
            f: Outputs ``(n, *out)``.
            *targets: What the loss receives beside them.

        Returns:
            A tensor in the shape of f.
        """
        leaf = f.detach().requires_grad_()
        with Changed(recording(True)):
            return torch.autograd.grad(self.total(leaf, *targets), leaf)[0]

    def hvp(self, f: Tensor, u: Tensor, *targets: Any) -> Tensor:
        """The Hessian of the sum times u.

        Args:
            f: Outputs ``(n, *out)``.
            u: One vector for each example, in the shape of f.
            *targets: What the loss receives beside them.

        Returns:
            A tensor in the shape of f.
        """
        return OutputHessian(lambda leaf: self.total(leaf, *targets), f).mv(u)

    def sqrt(self, f: Tensor, *targets: Any) -> Cotangents:
        """Columns of a square root of the Hessian of the sum, which is made when they are taken.

        It is held if it fits the memory budget, and made again for every slice of columns otherwise.

        Args:
            f: Outputs ``(n, *out)``.
            *targets: What the loss receives beside them.

        Returns:
            The columns, each in the shape of f.

        Raises:
            ValueError: When they are taken, if the Hessian has a negative eigenvalue.
        """
        n, k = len(f), f[0].numel()
        hessian = OutputHessian(lambda leaf: self.total(leaf, *targets), f)
        fitting = max(1, budget(f.device) // (2 * k * k * f.element_size()))
        if n <= fitting:
            held = cache(lambda: hessian.root(slice(0, n)))
            return Cotangents(k, lambda start, stop: held()[start:stop])
        return Cotangents(
            k, lambda start, stop: torch.cat([hessian.root(part)[start:stop] for part in slices(n, fitting)], 1)
        )

    def sample(self, f: Tensor, *targets: Any, trials: int, generator: torch.Generator) -> Cotangents:
        """Random vectors u with E[u u^T] the Hessian of the sum, by default random signs on the columns of its root.

        Args:
            f: Outputs ``(n, *out)``.
            *targets: What the loss receives beside them.
            trials: How many for each example, which together count as one.
            generator: The source of randomness, on the device of f.

        Returns:
            The vectors, each in the shape of f.
        """
        root, found = self.sqrt(f, *targets), f.new_zeros(trials, *f.shape)
        for part in slices(root.count, max(1, budget(f.device) // (4 * f.numel() * f.element_size()))):
            columns = root.take(part.start, part.stop).flatten(2)
            signs = random_signs((trials, *columns.shape[:2]), f, generator)
            found += torch.einsum("tcn,cnk->tnk", signs, columns).view_as(found)
        return Cotangents.of(found / trials**0.5)

    def __call__(self, f: Tensor, *targets: Any) -> Tensor:
        """The loss of this minibatch."""
        total = self.total(f, *targets)
        return total / self.weight(f.detach(), *targets) if self.mean else total


def random_signs(shape: tuple[int, ...], like: Tensor, generator: torch.Generator) -> Tensor:
    """Ones and minus ones."""
    return torch.randint(2, shape, generator=generator, device=like.device).mul_(2).sub_(1).to(like.dtype)


class ByExample(OutputLoss):
    """Any loss with one value for each example (or several, which are summed), looked at before it is believed."""

    def __init__(self, loss: Callable[..., Tensor]) -> None:
        self.loss = loss
        self._seen: set[torch.Size] = set()
        self._positive: set[torch.Size] = set()

    def values(self, f: Tensor, *targets: Any) -> Tensor:
        """The losses of the examples, ``(n, ...)``, checked to be one (or several) for each."""
        values = self.loss(f, *targets)
        if not isinstance(values, Tensor):
            raise TypeError(
                f"loss: expected a tensor with one value for each of the {f.shape[0]} examples, got a "
                f"{type(values).__name__}"
            )
        if values.ndim == 0 or values.shape[0] != f.shape[0]:
            raise ValueError(
                f"loss: expected one value for each of the {f.shape[0]} examples, got shape {tuple(values.shape)}; "
                'return the unreduced loss (reduction="none"), or pass unit="minibatch" if it is one of the whole '
                "minibatch"
            )
        if not values.is_floating_point() and values.requires_grad:
            raise TypeError(f"loss: expected real numbers, got {values.dtype}: return e.g. its absolute value")
        if f.requires_grad and not values.requires_grad:
            raise ValueError(
                "loss: its values do not depend on the outputs as far as autograd knows (detached, counted or rounded "
                "numbers), so there is nothing to differentiate"
            )
        if f.shape not in self._seen:
            with no_grad():
                self._look(data.Minibatch((f.detach(), *targets), len(f)), values.detach())
            self._seen.add(f.shape)
        return values

    def total(self, f: Tensor, *targets: Any) -> Tensor:
        values = self.values(f, *targets)
        if f.requires_grad:
            _separate(values, f, targets)
        return values.sum()

    def gradient(self, f: Tensor, *targets: Any) -> Tensor:
        leaf = f.detach().requires_grad_()
        with Changed(recording(True)):
            return _separate(self.values(leaf, *targets), leaf, targets)

    def hvp(self, f: Tensor, u: Tensor, *targets: Any) -> Tensor:
        hessian = OutputHessian(lambda leaf: self.total(leaf, *targets), f)
        if f.shape not in self._positive:  # of square roots it is known without asking
            hessian.check_positive()
            self._positive.add(f.shape)
        return hessian.mv(u)

    def _look(self, batch: data.Minibatch, values: Tensor) -> None:
        """Raise if examples are not apart. One of several targets that is as long as the minibatch and has as many
        entries as there are classes may be of classes.
        """
        try:
            self._look_at(batch, values)
        except ValueError:
            f = batch.content[0]
            alike = [path for path, length in columns(batch.content) if length == len(f) and path[0] > 0]
            if len(alike) < 2 or f.shape[1:2] != f.shape[:1]:
                raise
            if not any(self._passes(replace(batch, whole=frozenset([path])), values) for path in alike):
                raise

    def _passes(self, batch: data.Minibatch, values: Tensor) -> bool:
        try:
            self._look_at(batch, values)
        except ValueError:
            return False
        return True

    def _look_at(self, batch: data.Minibatch, values: Tensor) -> None:
        """Raise if the value of an example changes, or its shape, where half of the examples are left out, and the
        other half; a single example is looked at next to itself.
        """
        f, *rest = batch.content
        n, targets = len(f), tuple(rest)
        if n == 1:
            parts = [torch.zeros(2, dtype=torch.long)]
        else:
            odd = _odd(n)
            parts = [odd.nonzero()[:, 0], (~odd).nonzero()[:, 0]]
        for part in parts:
            found = self._of(batch, part)
            if found is None:  # made for as many examples, e.g. with weights: the others are replaced by these
                lengths = {len(t) if t.ndim else 0 for t in data.tensors_of(targets)}
                if n == 1 or lengths - {n}:
                    return
                place = part[torch.arange(n) % len(part)]
                place[part] = part
                found = self._of(batch, place)
                if found is None:
                    return
                found = found[part]
            expected = values[part]
            if found.shape[1:] != expected.shape[1:]:
                raise ValueError(
                    f"loss: it gives values {shape_of(values)} for outputs {shape_of(f)} and targets "
                    f"{_shapes(targets)}, which are broadcast against each other: give them the same shape, and return "
                    "one value for each example, of its own output and targets"
                )
            scale = max(float(values.abs().nan_to_num(0, 0).max()), float(f.abs().max()))
            if bool(((found - expected).abs() > _tolerance(values.dtype) * scale).any()):
                raise _mixing(f, targets)

    def _of(self, batch: data.Minibatch, index: Tensor) -> Tensor | None:
        """The values of some examples by themselves, None if there are none."""
        try:
            values = self.loss(*data.content(data.take(batch, index)))
        except Exception:
            return None
        return values if isinstance(values, Tensor) and values.ndim > 0 and len(values) == len(index) else None


def _odd(n: int) -> Tensor:
    """One half of several examples, in which the last is without the first."""
    odd = torch.arange(n) % 2 == 1
    odd[-1] = True
    return odd


def _separate(values: Tensor, f: Tensor, targets: tuple[Any, ...]) -> Tensor:
    """The gradients of values ``(n, ...)`` in the outputs f ``(n, ...)`` of their own; raises for those of others."""
    if len(f) == 1:
        return torch.autograd.grad(values.sum(), f, retain_graph=True)[0]
    odd = _odd(len(f)).to(f.device)
    masks = [mask.view(-1, *[1] * (values.ndim - 1)).expand_as(values).to(values.dtype) for mask in (odd, ~odd)]
    of_odd, of_even = (torch.autograd.grad(values, f, mask, retain_graph=True)[0] for mask in masks)
    rows = odd.view(-1, *[1] * (f.ndim - 1))
    if bool(torch.where(rows, of_even, of_odd).nan_to_num().count_nonzero()):
        raise _mixing(f, targets)
    return torch.where(rows, of_odd, of_even)


def _mixing(f: Tensor, targets: tuple[Any, ...]) -> ValueError:
    return ValueError(
        "loss: the value of an example depends on the outputs of others, or on their targets (an average over the "
        f"minibatch, ranks, or outputs {shape_of(f)} broadcast against targets {_shapes(targets)}), or is random: "
        "return one value for each example, of its own output and targets"
    )


def _shapes(targets: tuple[Any, ...]) -> str:
    return ", ".join(shape_of(t) for t in data.tensors_of(targets)) or "of no tensor"


def _tolerance(dtype: torch.dtype) -> float:
    """What counts as equal up to rounding."""
    return {torch.float64: 1e-9, torch.float32: 1e-4}.get(dtype, 0.1)
