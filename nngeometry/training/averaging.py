"""Averages of the weights that a training goes through."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from .. import arguments
from ..layercollection import LayerCollection
from ..linalg import gaussian
from ..object import PVector


class SWA:
    """Stochastic weight averaging: the mean of the weights at the ends of epochs ``start``, ``start + every``, ...

    :func:`~nngeometry.training.train` updates it. To look at a model at the average, with its BatchNorm statistics::

        with at(model, average.mean()):
            recompute_batch_norm(model, loader)
            evaluate(model, test_loader)

    Args:
        start: The first epoch that counts.
        every: The number of epochs between two of them.

    Example:
        >>> from nngeometry import at
        >>> model, average = nn.Linear(2, 1), SWA(start=1)
        >>> w = PVector.from_model(model)
        >>> for _ in range(2):
        ...     average.update(model)
        ...     (w.clone().detach() * 3).copy_to_model(model)
        >>> bool(torch.isclose(average.mean().norm(), 2 * w.norm() / 9))
        True

    Source: Izmailov et al. (2018), 1803.05407.
    """

    def __init__(self, start: int, every: int = 1) -> None:
        self.start = arguments.integer(f"{type(self).__name__}: start", start, least=0)
        self.every = arguments.integer(f"{type(self).__name__}: every", every, least=1)
        self.count = 0
        self._mean: Tensor | None = None
        self._layers: LayerCollection | None = None

    def due(self, epoch: int) -> bool:
        """Whether the weights after an epoch count."""
        return epoch >= self.start and (epoch - self.start) % self.every == 0

    def update(self, model: nn.Module) -> None:
        """Add the present weights of the model to the average."""
        lc = LayerCollection.from_model(model, frozen=True)
        w = PVector.from_model(model, lc).to_torch().detach()
        if self._mean is not None and len(self._mean) != len(w):
            raise ValueError(f"{type(self).__name__}: the average is of {len(self._mean)} parameters, not of {len(w)}")
        self._layers = lc
        self.count += 1
        self._take(w)

    def _take(self, w: Tensor) -> None:
        self._mean = w.clone() if self._mean is None else self._mean + (w - self._mean) / self.count

    def mean(self) -> PVector:
        """The average. Raises ``ValueError`` if there is none yet."""
        if self._mean is None or self._layers is None:
            raise ValueError(
                f"{type(self).__name__}: nothing was averaged yet: it begins after epoch {self.start}"
                + ("" if self._mean is None else ", and restore(model) makes a loaded one ready")
            )
        return PVector(self._layers, self._mean)

    def restore(self, model: nn.Module, state: Mapping[str, Any]) -> None:
        """Go on from what :meth:`state_dict` gave, for a model of the same parameters."""
        mine = self._options()
        theirs = {name: state[name] for name in ("start", "every", "rank") if name in state}
        if (state["kind"], theirs) != (type(self).__name__, mine):
            asked, had = (", ".join(f"{k}={v}" for k, v in of.items()) for of in (mine, theirs))
            raise ValueError(
                f"average: the checkpoint has {state['kind']}({had}), not {type(self).__name__}({asked}): take the "
                "same, or train into another folder"
            )
        self._layers = LayerCollection.from_model(model, frozen=True)
        like = next(model.parameters())
        self.count = int(state["count"])
        for name in self._tensors():
            value = state[name]
            setattr(self, name, None if value is None else value.to(like.device, copy=True))

    def state_dict(self) -> dict[str, Any]:
        """As tensors and plain values."""
        state = {"kind": type(self).__name__, **self._options(), "count": self.count}
        return {**state, **{name: getattr(self, name) for name in self._tensors()}}

    def _options(self) -> dict[str, int]:
        return {"start": self.start, "every": self.every}

    def _tensors(self) -> tuple[str, ...]:
        return ("_mean",)


class SWAG(SWA):
    """SWA-Gaussian: with the mean, the variance of each weight and the last ``rank`` deviations from the mean.

    A normal distribution of weights, whose covariance is ``scale (D^T D + diag(var))``, with var the variance over what
    was averaged and D the deviations, each over ``sqrt(rank - 1)``; of :meth:`sample` the default scale is that of the
    publication.

    Args:
        start: The first epoch that counts.
        every: The number of epochs between two of them.
        rank: How many deviations are kept.

    Example:
        >>> model, average = nn.Linear(2, 1), SWAG(start=1, rank=3)
        >>> for _ in range(4):
        ...     nn.init.normal_(model.weight) is None
        ...     average.update(model)
        False
        False
        False
        False
        >>> average.sample(torch.Generator().manual_seed(0)).size(), average.variance().size()
        (torch.Size([3]), torch.Size([3]))

    Source: Maddox et al. (2019), 1902.02476.
    """

    def __init__(self, start: int, every: int = 1, rank: int = 20) -> None:
        super().__init__(start, every)
        self.rank = arguments.integer("SWAG: rank", rank, least=2)
        self._spread: Tensor | None = None
        self._deviations: Tensor | None = None

    def _take(self, w: Tensor) -> None:
        before = w if self._mean is None else self._mean
        super()._take(w)
        assert self._mean is not None
        added = (w - before) * (w - self._mean)  # without the cancellation of a mean of squares
        self._spread = added if self._spread is None else self._spread + added
        new = (w - self._mean).unsqueeze(0)
        old = new[:0] if self._deviations is None else self._deviations
        self._deviations = torch.cat([old, new])[-self.rank :]

    def variance(self) -> PVector:
        """Of each weight, over all that was averaged."""
        mean = self.mean()
        assert self._spread is not None
        return PVector(mean.layer_collection, self._spread / self.count)

    def deviations(self) -> Tensor:
        """D ``(rank, P)``: ``D^T D`` is the covariance of low rank."""
        self.mean()
        assert self._deviations is not None
        return self._deviations / max(1, len(self._deviations) - 1) ** 0.5

    def sample(self, generator: torch.Generator | None = None, scale: float = 0.5) -> PVector:
        """``mean + sqrt(scale) (D^T e1 + sqrt(var) e2)``, e1 and e2 standard normal.

        Args:
            generator: Of e1 and e2, by default torch's global one.
            scale: Of the covariance.
        """
        arguments.generator(generator)
        factor = arguments.number("sample: scale", scale, least=0.0) ** 0.5
        mean, var, d = self.mean(), self.variance().to_torch(), self.deviations()
        e1, e2 = (gaussian(1, n, like=var, generator=generator)[0] for n in (len(d), len(var)))
        return PVector(mean.layer_collection, mean.to_torch() + factor * (e1 @ d + var.sqrt() * e2))

    def _options(self) -> dict[str, int]:
        return {**super()._options(), "rank": self.rank}

    def _tensors(self) -> tuple[str, ...]:
        return ("_mean", "_spread", "_deviations")
