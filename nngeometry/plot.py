"""Pictures of matrices and of their spectra. Needs matplotlib."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from math import ceil, pi
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from .layercollection import LayerCollection
from .linalg import Density, Estimate
from .object.pmat import PMat
from .spectrum import LOG_WIDTH, Spectrum

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

#: The largest matrix that is made dense, in parameters.
_LARGEST = 20_000
#: At most this many cells on a side: fewer than a panel has pixels, so that a thin diagonal stays visible.
_CELLS = 320
#: How far the colour scale reaches below the largest entry, in powers of ten.
_DECADES = 6.0
#: Side of a panel in inches, and size of the layer names in points.
_PANEL, _FONT = 2.6, 8.0
#: A density is drawn down to this fraction of what one eigenvalue gives.
_LOWEST = 0.05
_POSITIVE, _NEGATIVE = "C0", "C3"


def plot_matrices(matrices: Mapping[str, PMat], path: str | Path | None = None, ncols: int | None = None) -> Figure:
    """Matrices side by side: ``log10 |entry|`` on one colour scale, which ends six decades below the largest entry.

    Zeros have the lowest colour, NaN and infinity are red. Thin lines separate layers; their names are on the left of
    each row. In a large matrix a pixel is the largest of the entries that it covers.

    Args:
        matrices: From titles to matrices.
        path: Where to save the picture, in the format that its ending names; by default it is not saved.
        ncols: How many matrices are in a row, by default up to five.

    Returns:
        The figure, which pyplot does not know of.

    Raises:
        ValueError: If there is nothing to draw, or a matrix has more than 20000 parameters, since it has to be made
            dense.
        ImportError: Without matplotlib.

    Example:
        >>> from nngeometry import FIM, PMatDiag, PMatKFAC
        >>> model = torch.nn.Sequential(torch.nn.Linear(4, 5), torch.nn.Tanh(), torch.nn.Linear(5, 3))
        >>> x = torch.randn(20, 4)
        >>> figure = plot_matrices({"KFAC": FIM(model, (x,), PMatKFAC), "diagonal": FIM(model, (x,), PMatDiag)})
        >>> [ax.get_title() for ax in figure.axes]
        ['KFAC', 'diagonal', '']
    """
    try:
        from matplotlib import colormaps
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError("plot_matrices needs matplotlib: pip install nngeometry[plot]") from error
    if not matrices:
        raise ValueError("plot_matrices: there is no matrix to draw")
    if ncols is not None and ncols < 1:
        raise ValueError(f"plot_matrices: ncols must be at least 1, got {ncols}")
    for title, matrix in matrices.items():
        if matrix.size(0) > _LARGEST:
            raise ValueError(
                f"plot_matrices: {title!r} has {matrix.size(0)} parameters, more than the {_LARGEST} that are drawn: "
                "draw one layer, F.block(name), or build the matrix for a part of the model with "
                "layer_collection=LayerCollection.from_model(model, name)"
            )
    levels = [_reduced(matrix).log10() for matrix in matrices.values()]
    vmax = _largest(levels)
    vmin = vmax - _DECADES

    n = len(matrices)
    columns = min(n, ncols) if ncols is not None else ceil(n / ceil(n / 5))
    rows = ceil(n / columns)
    longest = max(len(name) for matrix in matrices.values() for name in _names(matrix.layer_collection))
    names_width = 0.3 + 0.6 * _FONT / 72 * longest
    figure = Figure(
        figsize=(columns * (_PANEL + 0.15) + names_width + 0.9, rows * (_PANEL + 0.4)), layout="compressed", dpi=200
    )
    colours = colormaps["viridis"].with_extremes(bad="red")
    axes: list[Axes] = []
    for k, ((title, matrix), level) in enumerate(zip(matrices.items(), levels, strict=True)):
        ax = figure.add_subplot(rows, columns, k + 1)
        axes.append(ax)
        p, side = matrix.size(0), _step(matrix.size(0)) * len(level)
        image = ax.imshow(
            level.clamp(min=vmin).numpy(),  # NaN stays
            cmap=colours,
            vmin=vmin,
            vmax=vmax,
            interpolation="nearest",
            extent=(0, side, side, 0),
        )
        ax.set(xlim=(0, p), ylim=(p, 0), xticks=[], yticks=[])
        ax.set_title(title, fontsize=_FONT + 2)
        _draw_boundaries(ax, matrix.layer_collection)
        if k % columns == 0:
            _draw_names(ax, matrix.layer_collection)
    bar = figure.colorbar(image, ax=axes, extend="min", aspect=15 * rows, pad=0.02)
    bar.set_label(r"$\log_{10}$ |entry|", fontsize=_FONT + 1)
    bar.ax.tick_params(labelsize=_FONT)
    if path is not None:
        figure.savefig(path)
    return figure


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
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError("plot_density needs matplotlib: pip install nngeometry[plot]") from error
    named = {"": spectra} if isinstance(spectra, Spectrum) else dict(spectra)
    if not named:
        raise ValueError("plot_density: there is no spectrum to draw")
    if ncols is not None and ncols < 1:
        raise ValueError(f"plot_density: ncols must be at least 1, got {ncols}")
    n = len(named)
    columns = min(n, ncols) if ncols is not None else ceil(n / ceil(n / 4))
    rows = ceil(n / columns)
    figure = Figure(figsize=(columns * 1.35 * _PANEL + 0.6, rows * _PANEL + 0.4), layout="constrained", dpi=200)
    axes: list[Axes] = []
    low, high = float("inf"), 0.0
    for k, (title, spectrum) in enumerate(named.items()):
        ax = figure.add_subplot(rows, columns, k + 1, sharey=axes[0] if axes else None)
        axes.append(ax)
        ax.set_title(title, fontsize=_FONT + 2)
        ax.tick_params(labelsize=_FONT)
        used = width
        if used is None:
            used = LOG_WIDTH if log else spectrum.width()
        density = spectrum.log_density(width=used) if log else spectrum.density(width=used)
        one = 1 / (spectrum.size * used * (2 * pi) ** 0.5)
        draw = _draw_log_density if log else _draw_density
        draw(ax, spectrum, density, one, stems)
        low, high = min(low, _LOWEST * one), max(high, float((density.value + 2 * density.error).max()))
        if k % columns == 0:
            ax.set_ylabel("density per decade" if log else "density", fontsize=_FONT + 1)
        else:
            ax.tick_params(labelleft=False)
        if k >= n - columns:
            ax.set_xlabel("|eigenvalue|" if log else "eigenvalue", fontsize=_FONT + 1)
    axes[0].set_yscale("log")
    axes[0].set_ylim(low, max(2 * high, 10 * low))
    if path is not None:
        figure.savefig(path)
    return figure


def _draw_density(ax: Any, spectrum: Spectrum, density: Density, one: float, stems: bool) -> None:
    _draw_curve(ax, density.grid, density.value, density.error, _POSITIVE, None)
    if stems:
        _draw_stems(ax, spectrum.nodes, spectrum.weights, one, _POSITIVE)
    _draw_outliers(ax, spectrum.outliers, one, _NEGATIVE)
    ax.axvline(0, color="grey", linewidth=0.4, zorder=0)


def _draw_log_density(ax: Any, spectrum: Spectrum, density: Density, one: float, stems: bool) -> None:
    floor = spectrum.floor()
    signs = (
        (1.0, "positive", _POSITIVE, spectrum.count(low=floor)),
        (
            -1.0,
            "negative",
            _NEGATIVE,
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
    ax.legend(fontsize=_FONT - 1, frameon=False, loc="upper right", handlelength=1)


def _share(count: Estimate, size: int) -> str:
    """In per cent, with the error if that can be seen."""
    share, error = (f"{100 * float(part) / size:.0f}" for part in (count.value, count.error))
    return f"{share} %" if error == "0" else f"{share} ± {error} %"


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


def _step(p: int) -> int:
    """How many parameters one cell covers in each direction."""
    return ceil(p / _CELLS)


def _reduced(matrix: PMat) -> Tensor:
    """The largest absolute value of each cell, ``(cells, cells)``, in double precision on the CPU."""
    step = _step(matrix.size(0))
    rows = torch.stack([band.abs().amax(0) for band in matrix.to_torch().detach().split(step)])
    return torch.stack([band.amax(1) for band in rows.split(step, 1)], 1).double().cpu()


def _largest(levels: Sequence[Tensor]) -> float:
    """The largest finite value of all, 0 if there is none."""
    finite = [float(level[level.isfinite()].max()) for level in levels if bool(level.isfinite().any())]
    return max(finite, default=0.0)


def _names(collection: LayerCollection) -> list[str]:
    return [name or "(root)" for name in collection]


def _draw_boundaries(ax: Any, collection: LayerCollection) -> None:
    alpha = min(0.5, 8 / len(collection))  # many lines would hide what is between them
    for s in list(collection.slices().values())[:-1]:
        ax.axhline(s.stop, color="white", linewidth=0.4, alpha=alpha)
        ax.axvline(s.stop, color="white", linewidth=0.4, alpha=alpha)


def _draw_names(ax: Any, collection: LayerCollection) -> None:
    """Each name beside the middle of its layer, moved apart where layers are smaller than their names."""
    gap = 1.25 * _FONT / (72 * _PANEL)
    middles = [(s.start + s.stop) / (2 * collection.numel()) for s in collection.slices().values()]
    named = list(range(len(middles)))
    if (len(named) - 1) * gap > 1:
        named = _free([layer.numel() for layer in collection.layers.values()], middles, gap)
    names = _names(collection)
    for k, place in zip(named, _apart([middles[k] for k in named], gap), strict=True):
        ax.annotate(
            names[k],
            xy=(0, 1 - middles[k]),
            xytext=(-0.06, 1 - place),
            xycoords="axes fraction",
            textcoords="axes fraction",
            ha="right",
            va="center",
            fontsize=_FONT,
            arrowprops={"arrowstyle": "-", "linewidth": 0.4, "shrinkA": 1, "shrinkB": 0, "relpos": (1, 0.5)},
        )


def _free(sizes: Sequence[int], middles: Sequence[float], gap: float) -> list[int]:
    """Which layers to name where there is no room for all: the largest first, at least ``gap`` from each other.

    >>> _free([1, 1, 1, 5], [0.1, 0.2, 0.3, 0.6], 0.2)
    [0, 2, 3]
    """
    chosen: list[int] = []
    for k in sorted(range(len(sizes)), key=lambda k: -sizes[k]):
        if all(abs(middles[k] - middles[other]) >= gap - 1e-9 for other in chosen):
            chosen.append(k)
    return sorted(chosen)


def _apart(wanted: Sequence[float], gap: float) -> list[float]:
    """Ascending places in [0, 1], near the wanted ones and at least ``gap`` from each other; they must fit.

    >>> _apart([0.5, 0.5, 0.9], 0.25)
    [0.5, 0.75, 1.0]
    """
    places: list[float] = []
    for w in wanted:
        places.append(max(w, places[-1] + gap) if places else w)
    limit = 1.0
    for k in reversed(range(len(places))):
        places[k] = min(places[k], limit)
        limit = places[k] - gap
    return places
