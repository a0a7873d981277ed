"""How often a model is right where it says how sure it is."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from .. import arguments
from .style import COLOURS, PANEL, Figure, dressed, finished, legend, new_figure, require_matplotlib


class Calibration(NamedTuple):
    """Predictions sorted into bins by their confidence.

    Attributes:
        confidence: The mean probability of the predicted class in each bin, ``(bins,)``; NaN in an empty one.
        accuracy: How many of them are right, ``(bins,)``.
        share: Which share of all predictions is in the bin, ``(bins,)``.
        error: The expected calibration error, ``sum share |accuracy - confidence|``.
    """

    confidence: Tensor
    accuracy: Tensor
    share: Tensor
    error: float


def calibration(probabilities: Tensor, labels: Tensor, bins: int = 15) -> Calibration:
    """The calibration of predicted probabilities.

    Args:
        probabilities: ``(n, classes)``, each row sums to one.
        labels: ``(n,)``.
        bins: Of equal width in confidence.

    Raises:
        ValueError: If these are no probabilities, or shapes do not fit.

    Example:
        >>> p = torch.tensor([[0.8, 0.2], [0.8, 0.2], [0.8, 0.2], [0.8, 0.2], [0.8, 0.2]])
        >>> round(calibration(p, torch.tensor([0, 0, 0, 0, 1])).error, 6)
        0.0

    Source: Naeini, Cooper, Hauskrecht (2015), AAAI; Guo et al. (2017), 1706.04599.
    """
    arguments.instance("probabilities", probabilities, Tensor, "pass e.g. model(x).softmax(1)")
    arguments.instance("labels", labels, Tensor, "pass the classes (n,)")
    arguments.integer("bins", bins, least=1)
    if probabilities.ndim != 2 or labels.shape != probabilities.shape[:1] or len(labels) == 0:
        raise ValueError(
            f"calibration: expected probabilities (n, classes) and labels (n,), got {tuple(probabilities.shape)} and "
            f"{tuple(labels.shape)}"
        )
    p = probabilities.detach().double().cpu()
    if bool((p < 0).any()) or not torch.allclose(p.sum(1), torch.ones(len(p), dtype=p.dtype), atol=1e-3):
        raise ValueError("calibration: the rows are no probabilities: take a softmax of logits first")
    sure, guess = p.max(1)
    right = (guess == labels.detach().cpu()).double()
    place = (sure * bins).ceil().long().clamp(1, bins) - 1
    count, total, hits = (
        torch.zeros(bins, dtype=p.dtype).index_add_(0, place, v) for v in (torch.ones_like(sure), sure, right)
    )
    share = count / len(p)
    error = float((hits - total).abs().sum() / len(p))
    return Calibration(total / count, hits / count, share, error)


def plot_calibration(calibrations: Calibration | Mapping[str, Calibration], path: str | Path | None = None) -> Figure:
    """Accuracy against confidence, points as large as there are predictions; below, how many these are. On the diagonal
    a model is as often right as it says.

    Args:
        calibrations: From :func:`calibration`, one or several with titles.
        path: Where to save the picture.

    Returns:
        The figure, which pyplot does not know of.

    Raises:
        ValueError: If there is nothing to draw.
        ImportError: Without matplotlib.

    Example:
        >>> p = torch.rand(50, 3).softmax(1)
        >>> figure = plot_calibration({"untrained": calibration(p, torch.randint(3, (50,)))})
        >>> [ax.get_ylabel() for ax in figure.axes]
        ['accuracy', 'share']
    """
    require_matplotlib("plot_calibration")
    named = {"": calibrations} if isinstance(calibrations, Calibration) else dict(calibrations)
    if not named:
        raise ValueError("plot_calibration: there is nothing to draw")
    figure = new_figure(1.5 * PANEL, 1.7 * PANEL)
    above, below = figure.subplots(2, 1, sharex=True, height_ratios=(3, 1))
    dressed(above, "", "", "accuracy")
    dressed(below, "", "confidence", "share")
    above.plot([0, 1], [0, 1], color="grey", linewidth=0.8, linestyle=":")
    for (name, c), colour in zip(named.items(), COLOURS * len(named), strict=False):
        used = c.share > 0
        label = f"{name}, error {c.error:.3f}" if name else f"error {c.error:.3f}"
        x, y, size = c.confidence[used].numpy(), c.accuracy[used].numpy(), c.share[used].numpy()
        above.plot(x, y, color=colour, linewidth=0.8)
        above.scatter(x, y, 4 + 80 * size, color=colour, label=label, clip_on=False, zorder=3)
        width = 1 / len(c.share)
        edges = torch.arange(len(c.share) + 1) * width
        below.stairs(c.share.numpy(), edges.numpy(), color=colour, linewidth=1.2)
    above.set(xlim=(0, 1), ylim=(0, 1))
    legend(above, loc="upper left")
    return finished(figure, path)
