"""Losses that the library takes: those of ``torch.nn``, of tokens, any callable, and the one of the model itself."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .. import arguments
from ..likelihood import Categorical, Cotangents
from ..model import data
from .of_torch import check_reduction, check_twice, of_torch
from .output import ByExample, OutputLoss
from .targets import check_count, check_range, class_indices, shape_of

__all__ = ["Loss", "OutputLoss", "OwnLoss", "TokenCrossEntropy", "example_loss", "loss_gradient", "output_loss"]

#: ``loss(f, *targets) -> (n, ...)``, a loss of ``torch.nn``, an :class:`OutputLoss` or an :class:`OwnLoss`.
Loss = Any


class TokenCrossEntropy(OutputLoss):
    """The cross entropy of tokens, ``-sum_t log softmax(f_t)[y_t]``, for logits f ``(n, T, V)`` with the classes last.

    Labels are ``(n, T)``; any number of axes of positions will do where nothing is shifted. Nothing of more than a few
    times the size of the logits is made, and in the square root for representations that are made of Jacobians nothing
    larger than the chunk of its T (V - 1) columns that is asked for.

    Args:
        shift: Whether token t + 1 is predicted from position t, as in causal language models, whose labels are their
            inputs; by default not.
        ignore_index: The label of tokens that do not count (padding), by default -100.
        reduction: "mean", the default, is over all tokens of the data set that count, as ``nn.CrossEntropyLoss`` has it
            for one minibatch with all of them; "sum" is over all. It has no say in gradients of single examples
            (EmpiricalFisher, GradientCovariance, Influence), whose loss is the sum over their tokens.

    Raises:
        ValueError: For labels that are out of range or do not fit the logits.

    Example:
        >>> from nngeometry import EmpiricalFisher, PMatDiag
        >>> model = nn.Embedding(10, 10)  # a bigram model
        >>> tokens = torch.randint(10, (4, 6))
        >>> loss = TokenCrossEntropy(shift=True)
        >>> f = model(tokens)
        >>> bool(torch.isclose(loss(f, tokens), F.cross_entropy(f[:, :-1].flatten(0, 1), tokens[:, 1:].flatten())))
        True
        >>> M = EmpiricalFisher(model, (tokens,), PMatDiag, loss, targets=0)
    """

    def __init__(self, shift: bool = False, ignore_index: int = -100, reduction: str = "mean") -> None:
        check_reduction("TokenCrossEntropy", reduction)
        self.shift = shift
        self.ignore_index = ignore_index
        self.mean = reduction == "mean"

    def _labels(self, f: Tensor, *targets: Any) -> Tensor:
        """The class of every position, with those in their places that are predicted there."""
        name = type(self).__name__
        check_count(targets, 1, name)
        y = class_indices(targets[0], f, -1, name)
        if not self.shift:
            return y
        if f.ndim != 3 or f.shape[1] < 2:
            raise ValueError(f"loss: {name}(shift=True) needs outputs (n, tokens, classes), got {shape_of(f)}")
        return torch.cat([y[:, 1:], torch.full_like(y[:, :1], self.ignore_index)], 1)

    def _checked(self, f: Tensor, *targets: Any) -> tuple[Tensor, Tensor]:
        """The class of every position, and whether it counts."""
        y = self._labels(f, *targets)
        check_range(y, f.shape[-1], self.ignore_index, type(self).__name__)
        real = y != self.ignore_index
        return y.where(real, 0), real

    def total(self, f: Tensor, *targets: Any) -> Tensor:
        y, real = self._checked(f, *targets)
        y = y.where(real, -100)
        return F.cross_entropy(f.flatten(0, -2), y.flatten(), reduction="sum")

    def weight(self, f: Tensor, *targets: Any) -> float:
        return float(self._checked(f, *targets)[1].sum())

    def gradient(self, f: Tensor, *targets: Any) -> Tensor:
        y, real = self._checked(f, *targets)
        p = f.detach().softmax(-1)
        p.scatter_add_(-1, y.unsqueeze(-1), p.new_full((), -1.0).expand(*y.shape, 1))
        return p.mul_(real.unsqueeze(-1))

    def sqrt(self, f: Tensor, *targets: Any) -> Cotangents:
        factor = self._checked(f, *targets)[1].unsqueeze(-1).to(f.dtype)
        plain = Categorical(dim=-1).sqrt(f)
        return Cotangents(plain.count, lambda start, stop: plain.take(start, stop).mul_(factor))

    def sample(self, f: Tensor, *targets: Any, trials: int, generator: torch.Generator) -> Cotangents:
        factor = self._checked(f, *targets)[1].unsqueeze(-1).to(f.dtype)
        return Cotangents.of(Categorical(dim=-1).sample(f, trials, generator).take(0, trials).mul_(factor))

    def hvp(self, f: Tensor, u: Tensor, *targets: Any) -> Tensor:
        real = self._labels(f, *targets) != self.ignore_index
        return Categorical(dim=-1).hvp(f, u).mul_(real.unsqueeze(-1))


class OwnLoss:
    """The loss that the model computes itself, one number for a minibatch: ``model(**minibatch).loss``.

    ``function(*minibatch)`` (``function(minibatch)`` for a mapping) returns it, or something with an entry ``loss``;
    the default is the model called with a mapping's entries as keywords. Minibatches are never put together or taken
    apart.

    What can be had of it is the :func:`~nngeometry.Hessian` with any minibatches, and of matrices of gradients
    (EmpiricalFisher, GradientCovariance) and :class:`~nngeometry.Influence` those of minibatches of one example, or
    with ``unit="minibatch"`` of any, the gradient of whose loss is taken as it is: a mean over tokens stays one.
    ``GGN`` needs the loss as a function of the output.

    Args:
        count: From a minibatch to what its loss counts in the mean over minibatches, e.g. its number of labelled
            tokens; by default its number of examples.

    Example:
        >>> from nngeometry import Hessian, PMatDense
        >>> model = nn.Linear(2, 1)
        >>> def mean_square(x, y):
        ...     return (model(x) - y).square().mean()
        >>> batch = torch.randn(5, 2), torch.randn(5, 1)
        >>> Hessian(model, batch, PMatDense, OwnLoss(), function=mean_square).size()
        (3, 3)
    """

    def __init__(self, count: Callable[[data.Batch], Any] | None = None) -> None:
        if count is not None and not callable(count):
            raise TypeError(f"OwnLoss: count: expected a function of the minibatch, got {arguments.described(count)}")
        self.count = count

    def function(self, model: nn.Module, function: Callable[..., Any] | None) -> Callable[..., Tensor]:
        """A function from the arguments of ``function`` to the loss of the model, a scalar that is finite.

        Args:
            model: The model that computes it.
            function: What the user calls it by, None for ``model(**minibatch)``.
        """

        def value(*arguments: Any) -> Tensor:
            if function is not None:
                found = function(*arguments)
            elif hasattr(arguments[0], "keys"):
                found = model(**arguments[0])
            else:
                raise TypeError(
                    f"loss=OwnLoss(): minibatches of type {type(arguments[0]).__name__} need function=, which returns "
                    "the loss, e.g. function=lambda x, y: model(x, labels=y).loss"
                )
            return self(found)

        return value

    def __call__(self, returned: Any) -> Tensor:
        """The loss in what the model returned for a minibatch: a number, or the entry ``loss`` of something."""
        found = returned
        if not isinstance(found, Tensor):
            found = found.get("loss") if hasattr(found, "get") else getattr(found, "loss", None)
        if not isinstance(found, Tensor) or found.numel() != 1:
            raise ValueError(
                "loss=OwnLoss(): the model returned no loss of the minibatch, one number (are the labels in the "
                "minibatch?): pass function=, which returns it"
            )
        if torch.is_grad_enabled() and not found.requires_grad:
            raise ValueError("loss=OwnLoss(): the loss does not depend on the parameters, or is detached")
        if not bool(torch.isfinite(found.detach())):
            raise ValueError("loss=OwnLoss(): the loss of a minibatch is NaN or infinite: check its labels")
        return found.reshape(())

    def check_unit(self, unit: str) -> None:
        """Raise if minibatches count as one each and otherwise at the same time.

        Args:
            unit: What counts as an example, "example" or "minibatch".

        Raises:
            ValueError: For "minibatch" where there is a ``count``.
        """
        if unit == "minibatch" and self.count is not None:
            raise ValueError(
                'loss=OwnLoss(count=...): with unit="minibatch" every minibatch counts as one: leave count or unit out'
            )

    def weight(self, batch: data.Batch) -> float:
        """What the loss of a minibatch counts in the mean.

        Args:
            batch: The minibatch.
        """
        if self.count is None:
            return float(data.count(batch))
        return arguments.number("OwnLoss: what count returns", self.count(data.content(batch)))


def example_loss(loss: Loss) -> OutputLoss:
    """A loss whose gradients at single examples are wanted, so that its reduction has no say.

    Args:
        loss: A loss of ``torch.nn``, an :class:`OutputLoss`, or a callable with one value for each example.

    Raises:
        TypeError: For what is none of these.
        NotImplementedError: For :class:`OwnLoss`.
    """
    if isinstance(loss, OutputLoss):
        return loss
    if isinstance(loss, OwnLoss):
        raise NotImplementedError(
            "loss=OwnLoss(): this needs the loss as a function of the output, e.g. nngeometry.TokenCrossEntropy"
        )
    if isinstance(loss, type) or not callable(loss):
        what = f"the class {loss.__name__}: pass an instance" if isinstance(loss, type) else f"{loss!r}"
        raise TypeError(f"loss: expected a loss of torch.nn or a function loss(outputs, *targets), got {what}")
    known = of_torch(loss)
    if known is not None:
        return known
    if isinstance(loss, nn.Module) and hasattr(loss, "reduction"):
        loss = copy.copy(loss)
        loss.reduction = "none"
    return ByExample(loss)


def output_loss(loss: Loss) -> OutputLoss:
    """A loss that is differentiated twice: the closed forms of ``torch.nn``, or any callable with one value for each
    example.

    Args:
        loss: As of :func:`example_loss`.
    """
    if isinstance(loss, nn.Module) and hasattr(loss, "reduction"):
        check_twice(loss)
    return example_loss(loss)


def loss_gradient(loss: Loss, f: Tensor, *targets: object) -> Tensor:
    """The gradient of each example's loss with respect to its output.

    Args:
        loss: ``loss(f, *targets) -> (n, ...)``, one value (or several, which are summed) for each example. The
            ``reduction`` of the losses of ``torch.nn`` has no say.
        f: Outputs ``(n, *out)``.
        *targets: What the loss receives beside them.

    Returns:
        A tensor in the shape of f.

    Raises:
        ValueError: If an entry is NaN or infinite.

    Example:
        >>> loss_gradient(nn.MSELoss(), torch.zeros(2, 1), torch.ones(2, 1))
        tensor([[-2.],
                [-2.]])
    """
    gradient = example_loss(loss).gradient(f, *targets)
    if not bool(torch.isfinite(gradient).all()):
        raise ValueError("loss: its gradient has NaN or infinite entries: check the targets of this minibatch")
    return gradient
