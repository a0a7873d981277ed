"""Spectral densities, with what is known of their errors."""

from __future__ import annotations

from collections.abc import Mapping
from math import ceil, isnan, pi
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..linalg import Density, Estimate
from ..spectrum import LOG_WIDTH, Spectrum
from .style import FONT, NEGATIVE, PANEL, POSITIVE, Figure, finished, new_figure, require_matplotlib

#: A density is drawn down to this fraction of what one eigenvalue gives.
_LOWEST = 0.05


def plot_density(
    spectra: Spectrum | Mapping[str, Spectrum],
    path: str | Path | None = None,
    log: bool = False,
    *,
    stems: bool = False,
    width: float | None = None,
    ncols: int | None = None,
) -> Figure:
    """Spectral densities side by side, on a common logarithmic scale; a band shows plus or minus two standard errors.

    Outliers, whose values are exact, are marked with triangles. The lower end of the scale is below what one eigenvalue
    gives.

    Args:
        spectra: From :func:`~nngeometry.spectrum.spectral_density`, one or several with titles.
        path: Where to save the picture, in the format that its ending names; by default it is not saved.
        log: Whether the axis is logarithmic, for the magnitude of the positive and of the negative eigenvalues; the
            legend says what share has which sign, and what is too small to be drawn.
        stems: Whether to draw each Ritz value too, as high as the density that its weight alone gives there.
        width: The width of the smoothing, as in :meth:`~nngeometry.spectrum.Spectrum.density` and ``log_density``.
        ncols: How many panels are in a row, by default up to four.

    Returns:
        The figure, which pyplot does not know of.

    Raises:
        ValueError: If there is nothing to draw.
        ImportError: Without matplotlib.

    Example:
        >>> from nngeometry import FIM, PMatImplicit
        >>> from nngeometry.spectrum import spectral_density
        >>> model = torch.nn.Sequential(torch.nn.Linear(4, 5), torch.nn.Tanh(), torch.nn.Linear(5, 3))
        >>> F = FIM(model, (torch.randn(20, 4),), PMatImplicit)
        >>> figure = plot_density({"Fisher": spectral_density(F, outliers=2)}, log=True)
        >>> [ax.get_title() for ax in figure.axes]
        ['Fisher']
    """
    require_matplotlib("plot_density")
    named = {"": spectra} if isinstance(spectra, Spectrum) else dict(spectra)
    if not named:
        raise ValueError("plot_density: there is no spectrum to draw")
    if ncols is not None and ncols < 1:
        raise ValueError(f"plot_density: ncols must be at least 1, got {ncols}")
    n = len(named)
    columns = min(n, ncols) if ncols is not None else ceil(n / ceil(n / 4))
    rows = ceil(n / columns)
    figure = new_figure(columns * 1.35 * PANEL + 0.6, rows * PANEL + 0.4)
    axes: list[Any] = []
    low, high = float("inf"), 0.0
    for k, (title, spectrum) in enumerate(named.items()):
        ax = figure.add_subplot(rows, columns, k + 1, sharey=axes[0] if axes else None)
        axes.append(ax)
        ax.set_title(title, fontsize=FONT + 2)
        ax.tick_params(which="both", labelsize=FONT)
        used = width
        if used is None:
            used = LOG_WIDTH if log else spectrum.width()
        density = spectrum.log_density(width=used) if log else spectrum.density(width=used)
        one = 1 / (spectrum.size * used * (2 * pi) ** 0.5)
        draw = _draw_log_density if log else _draw_density
        draw(ax, spectrum, density, one, stems)
        low, high = min(low, _LOWEST * one), max(high, float((density.value + 2 * density.error).max()))
        if k % columns == 0:
            ax.set_ylabel("density per decade" if log else "density", fontsize=FONT + 1)
        else:
            ax.tick_params(labelleft=False)
        if k >= n - columns:
            ax.set_xlabel("|eigenvalue|" if log else "eigenvalue", fontsize=FONT + 1)
    axes[0].set_yscale("log")
    axes[0].set_ylim(low, max(2 * high, 10 * low))
    return finished(figure, path)


def _draw_density(ax: Any, spectrum: Spectrum, density: Density, one: float, stems: bool) -> None:
    _draw_curve(ax, density.grid, density.value, density.error, POSITIVE, None)
    if stems:
        _draw_stems(ax, spectrum.nodes, spectrum.weights, one, POSITIVE)
    _draw_outliers(ax, spectrum.outliers, one, NEGATIVE)
    ax.axvline(0, color="grey", linewidth=0.4, zorder=0)


def _draw_log_density(ax: Any, spectrum: Spectrum, density: Density, one: float, stems: bool) -> None:
    floor = spectrum.floor()
    signs = (
        (1.0, "positive", POSITIVE, spectrum.count(low=floor)),
        (
            -1.0,
            "negative",
            NEGATIVE,
            spectrum.count(high=-floor),
        ),
    )
    for (sign, name, colour, count), value, error in zip(signs, density.value, density.error, strict=True):
        if not bool(value.any()):
            continue
        _draw_curve(ax, density.grid, value, error, colour, f"{name}, {_share(count, spectrum.size)}")
        if stems:
            inside = sign * spectrum.nodes >= floor
            _draw_stems(ax, sign * spectrum.nodes[inside], spectrum.weights[inside], one, colour, len(spectrum.nodes))
        _draw_outliers(ax, sign * spectrum.outliers[sign * spectrum.outliers >= floor], one, colour)
    zero = spectrum.count(low=-floor, high=floor)
    if zero.value > 0.5:
        ax.plot([], [], " ", label=f"below {floor:.0e}, {_share(zero, spectrum.size)}")
    ax.set_xscale("log")
    ax.legend(fontsize=FONT - 1, frameon=False, loc="upper right", handlelength=1)


def _share(count: Estimate, size: int) -> str:
    """In per cent, with the error if that can be seen, and is known: of one vector it is not."""
    share, error = (100 * float(part) / size for part in (count.value, count.error))
    if isnan(error):
        return f"{share:.0f} ± ? %"
    return f"{share:.0f} %" if error < 0.5 else f"{share:.0f} ± {min(error, 100.0):.0f} %"


def _draw_curve(ax: Any, grid: Tensor, value: Tensor, error: Tensor, colour: str, label: str | None) -> None:
    tiny = 1e-300  # a logarithmic axis has no zero
    ax.fill_between(
        grid.numpy(),
        (value - 2 * error).clamp(min=tiny).numpy(),
        (value + 2 * error).clamp(min=tiny).numpy(),
        color=colour,
        alpha=0.25,
        linewidth=0,
    )
    ax.plot(grid.numpy(), value.clamp(min=tiny).numpy(), color=colour, linewidth=0.9, label=label)


def _draw_stems(ax: Any, nodes: Tensor, weights: Tensor, one: float, colour: str, probes: int | None = None) -> None:
    heights = weights * (one / (len(nodes) if probes is None else probes))
    used = heights > 0
    ax.vlines(nodes[used].numpy(), 1e-300, heights[used].numpy(), color=colour, linewidth=0.3, alpha=0.5)


def _draw_outliers(ax: Any, outliers: Tensor, one: float, colour: str) -> None:
    """Triangles at the height of the density of one eigenvalue."""
    ax.plot(outliers.numpy(), torch.full_like(outliers, one).numpy(), "v", color=colour, markersize=3, linewidth=0)
