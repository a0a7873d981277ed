"""Matrices side by side, on one colour scale."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from math import ceil
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..layercollection import LayerCollection
from ..object.pmat import PMat
from .style import FONT, PANEL, Figure, colour_map, finished, new_figure, require_matplotlib

#: The largest matrix that is made dense, in parameters.
_LARGEST = 20_000
#: At most this many cells on a side: fewer than a panel has pixels, so that a thin diagonal stays visible.
_CELLS = 320
#: How far the colour scale reaches below the largest entry, in powers of ten.
_DECADES = 6.0


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
    require_matplotlib("plot_matrices")
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
    names_width = 0.3 + 0.6 * FONT / 72 * longest
    width, height = columns * (PANEL + 0.15) + names_width + 0.9, rows * (PANEL + 0.4)
    figure = new_figure(width, height, layout="compressed")
    colours = colour_map().with_extremes(bad="red")
    axes: list[Any] = []
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
        ax.set_title(title, fontsize=FONT + 2)
        _draw_boundaries(ax, matrix.layer_collection)
        if k % columns == 0:
            _draw_names(ax, matrix.layer_collection)
    bar = figure.colorbar(image, ax=axes, extend="min", aspect=15 * rows, pad=0.02)
    bar.set_label(r"$\log_{10}$ |entry|", fontsize=FONT + 1)
    bar.ax.tick_params(labelsize=FONT)
    return finished(figure, path)


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
    gap = 1.25 * FONT / (72 * PANEL)
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
            fontsize=FONT,
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
