"""How often a model is right where it says how sure it is."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch

from ..calibration import Calibration
from .style import COLOURS, PANEL, Figure, dressed, finished, legend, new_figure, require_matplotlib


def plot_calibration(calibrations: Calibration | Mapping[str, Calibration], path: str | Path | None = None) -> Figure:
    """Accuracy against confidence, points as large as there are predictions; below, how many these are. On the diagonal
    a model is as often right as it says.

    Args:
        calibrations: From :func:`~nngeometry.calibration.calibration`, one or several with titles.
        path: Where to save the picture.

    Returns:
        The figure, which pyplot does not know of.

    Raises:
        ValueError: If there is nothing to draw.
        ImportError: Without matplotlib.

    Example:
        >>> from nngeometry.calibration import calibration
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
        used = c.shares > 0
        label = f"{name}, error {c.error:.3f}" if name else f"error {c.error:.3f}"
        x, y, size = c.confidence[used].numpy(), c.accuracy[used].numpy(), c.shares[used].numpy()
        above.plot(x, y, color=colour, linewidth=0.8)
        above.scatter(x, y, 4 + 80 * size, color=colour, label=label, clip_on=False, zorder=3)
        width = 1 / len(c.shares)
        edges = torch.arange(len(c.shares) + 1) * width
        below.stairs(c.shares.numpy(), edges.numpy(), color=colour, linewidth=1.2)
    above.set(xlim=(0, 1), ylim=(0, 1))
    legend(above, loc="upper left")
    return finished(figure, path)
