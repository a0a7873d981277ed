"""Spectra over checkpoints."""

from __future__ import annotations

from collections.abc import Mapping
from math import ceil, log10
from pathlib import Path
from typing import Any

import torch

from .. import arguments
from ..spectrum import Spectrum
from .style import COLOURS, FONT, PANEL, Figure, colour_map, dressed, finished, new_figure, require_matplotlib

#: How far the colour scale reaches below the largest density, in powers of ten.
_DECADES = 5.0
#: At most as many columns have their names beneath.
_NAMED = 14


def plot_spectra(spectra: Mapping[Any, Spectrum], path: str | Path | None = None) -> Figure:
    """How a spectrum changes over checkpoints: a column of colour for each, as dark as the density of eigenvalues is
    high, with the outliers as points.

    The axis of eigenvalues is linear near zero and logarithmic beyond.

    Args:
        spectra: From epochs (or names) to spectra, in order.
        path: Where to save the picture.

    Returns:
        The figure, which pyplot does not know of.

    Raises:
        ValueError: If there is nothing to draw, or all eigenvalues are zero.
        ImportError: Without matplotlib.

    Example:
        >>> from nngeometry import GGN, PMatDense
        >>> from nngeometry.spectrum import spectral_density
        >>> model = torch.nn.Linear(3, 4)
        >>> G = GGN(model, (torch.randn(20, 3), torch.randint(4, (20,))), PMatDense)
        >>> figure = plot_spectra({0: spectral_density(G, outliers=2), 5: spectral_density(2 * G, outliers=2)})
        >>> figure.axes[0].get_ylabel()
        'eigenvalue'
    """
    require_matplotlib("plot_spectra")
    if not spectra:
        raise ValueError("plot_spectra: there is no spectrum to draw")
    for found in spectra.values():
        arguments.instance("spectra", found, Spectrum, "from spectral_density(F)")
    figure = new_figure(min(4.0, max(1.6, 0.35 * len(spectra) + 0.9)) * PANEL, 1.5 * PANEL)
    ax = dressed(figure.add_subplot(), "", "epoch" if _numbers(spectra) else "", "eigenvalue")
    lows, highs = zip(*(s.range() for s in spectra.values()), strict=True)
    low, high = min(lows), max(highs)
    largest = max(abs(low), abs(high))
    if largest == 0:
        raise ValueError("plot_spectra: all eigenvalues are zero, of which there is no density to draw")
    linear = 1e-3 * largest
    grid = _symlog(low, high, linear)
    columns = []
    for s in spectra.values():
        middle = (grid[1:] + grid[:-1]) / 2
        width = torch.maximum(0.02 * middle.abs(), torch.tensor(linear / 5))
        nodes, weights = s.nodes.flatten(), s.weights.flatten() / len(s.nodes) / s.size
        z = (middle.unsqueeze(1) - nodes) / width.unsqueeze(1)
        density = (weights * torch.exp(-z.square() / 2)).sum(1) / (width * (2 * torch.pi) ** 0.5)
        columns.append(density * torch.maximum(middle.abs(), torch.tensor(linear)))  # on this axis
    image = torch.stack(columns, 1).clamp(min=1e-300).log10()
    top = float(image.max())
    image[image < top - _DECADES] = float("nan")  # white
    drawn = ax.pcolormesh(
        torch.arange(len(spectra) + 1).numpy() - 0.5,
        grid.numpy(),
        image.numpy(),
        cmap=colour_map().reversed(),
        rasterized=True,
    )
    for k, s in enumerate(spectra.values()):
        ax.plot([k] * len(s.outliers), s.outliers.numpy(), "v", color=COLOURS[1], markersize=3)
    ax.set_yscale("symlog", linthresh=linear)
    powers = [10.0**k for k in range(ceil(log10(linear)), 1 + ceil(log10(max(abs(low), abs(high), linear))))]
    ax.set_yticks([-p for p in reversed(powers) if p <= -float(grid[0])] + [0] + [p for p in powers if p <= grid[-1]])
    ax.set_ylim(float(grid[0]), float(grid[-1]))
    shown = range(0, len(spectra), -(-len(spectra) // _NAMED))
    ax.set_xticks(shown, [str(list(spectra)[k]) for k in shown], rotation=0 if _numbers(spectra) else 30)
    bar = figure.colorbar(drawn, ax=ax)
    bar.set_label(r"$\log_{10}$ density on this axis", fontsize=FONT)
    bar.ax.tick_params(labelsize=FONT)
    return finished(figure, path)


def _numbers(spectra: Mapping[Any, Spectrum]) -> bool:
    return all(isinstance(k, int | float) for k in spectra)


def _symlog(low: float, high: float, linear: float) -> torch.Tensor:
    """A grid from low to high, linear up to a magnitude and logarithmic beyond."""
    points = [torch.linspace(max(-linear, 1.3 * low), min(linear, 1.3 * high), 60, dtype=torch.float64)]
    for bound, sign in ((1.3 * high, 1), (-1.3 * low, -1)):
        if bound > linear:
            ends = torch.tensor([linear, bound], dtype=torch.float64).log10()
            points.append(sign * torch.logspace(float(ends[0]), float(ends[1]), 150, dtype=torch.float64))
    return torch.cat(points).unique()
