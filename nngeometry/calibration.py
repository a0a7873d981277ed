"""Whether predicted probabilities are what they say: confidence against accuracy."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from . import arguments


class Calibration(NamedTuple):
    """Predictions by their confidence, the probability of the class that is predicted.

    edges: of the bins ``(bins + 1,)``. confidence, accuracy: the means in each bin, NaN where it is empty. counts: how
    many predictions each has. error: the expected calibration error, the mean over predictions of ``|accuracy -
    confidence|`` of their bin.
    """

    edges: Tensor
    confidence: Tensor
    accuracy: Tensor
    counts: Tensor
    error: float

    @property
    def shares(self) -> Tensor:
        """Which share of all predictions each bin has."""
        return self.counts / self.counts.sum()


@arguments.called_as
def calibration(probabilities: Tensor, labels: Tensor, bins: int = 15) -> Calibration:
    """How often predictions are right, by how sure they are.

    Of several draws of weights the probabilities are averaged, not the logits, before they come here.

    Args:
        probabilities: ``(n, C)``, rows that sum to one.
        labels: The classes ``(n,)``.
        bins: Of the same width, from zero to one.

    Returns:
        The bins and the expected calibration error.

    Raises:
        ValueError: If the rows do not sum to one, as those of logits or of sums over draws do not, or shapes do not
            fit.

    Example:
        >>> p = torch.tensor([[0.9, 0.1], [0.9, 0.1], [0.4, 0.6], [0.4, 0.6]])
        >>> round(calibration(p, torch.tensor([0, 1, 1, 1])).error, 2)
        0.4

    Source: Guo et al. (2017), 1706.04599.
    """
    arguments.instance("probabilities", probabilities, Tensor, "a tensor (n, C), e.g. outputs.softmax(1)")
    arguments.instance("labels", labels, Tensor, "a tensor (n,) of classes")
    bins = arguments.integer("bins", bins, least=1)
    p = probabilities.detach().double().cpu()
    if p.ndim != 2 or len(p) == 0 or labels.shape != p.shape[:1]:
        raise ValueError(
            f"calibration: expected probabilities (n, C) and labels (n,), got {tuple(p.shape)} and "
            f"{tuple(labels.shape)}"
        )
    if labels.is_floating_point() or labels.is_complex():
        raise ValueError(f"calibration: labels are classes, whole numbers, got {labels.dtype}")
    if bool(((labels < 0) | (labels >= p.shape[1])).any()):
        raise ValueError(
            f"calibration: labels are {int(labels.min())} to {int(labels.max())}, and there are {p.shape[1]} classes, "
            f"0 to {p.shape[1] - 1}: leave out examples without a label"
        )
    if not bool(((p.sum(1) - 1).abs() < 1e-2).all()) or bool((p < 0).any()):  # NaN too
        raise ValueError(
            "calibration: the rows of probabilities do not sum to one: give outputs.softmax(1), averaged over draws"
        )
    confidence, predicted = p.max(1)
    right = (predicted == labels.cpu()).double()
    place = (confidence * bins).long().clamp(max=bins - 1)
    counts = torch.bincount(place, minlength=bins)
    sums = [torch.bincount(place, weights=values, minlength=bins) for values in (confidence, right)]
    mean_confidence, accuracy = (s / counts for s in sums)
    error = float((sums[1] - sums[0]).abs().sum() / len(p))
    edges = torch.linspace(0, 1, bins + 1, dtype=torch.float64)
    return Calibration(edges, mean_confidence, accuracy, counts, error)
