"""Landscapes: lines, contours and surfaces."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from .. import arguments
from ..landscape import Landscape
from .style import (
    COLOURS,
    FONT,
    PANEL,
    Figure,
    colour_map,
    dressed,
    finished,
    grid_of,
    legend,
    new_figure,
    require_matplotlib,
)

#: From which ratio of the largest loss to the smallest on an axis is logarithmic.
_LOG = 30


def plot_landscape(
    landscapes: Landscape | Mapping[Any, Landscape],
    path: str | Path | None = None,
    *,
    surface: bool = False,
    ncols: int = 2,
) -> Figure:
    """Lines in one picture, the loss and beside it the accuracy, with the eigenvalues in the legend, dashed for test
    data; or a surface as contours.

    Args:
        landscapes: One, or several lines, e.g. from :func:`~nngeometry.landscape.along_eigenvectors`.
        path: Where to save the picture.
        surface: Draw the landscape of two directions in three dimensions instead of contours.
        ncols: How many panels are in a row.

    Returns:
        The figure, which pyplot does not know of.

    Raises:
        ValueError: If there is nothing to draw, or lines and surfaces are mixed.
        ImportError: Without matplotlib.

    Example:
        >>> from nngeometry.landscape import along_eigenvectors
        >>> model = torch.nn.Linear(2, 3).double()
        >>> batch = torch.randn(20, 2).double(), torch.randint(3, (20,))
        >>> figure = plot_landscape(along_eigenvectors(model, batch, ranks=(0, -1), points=5))
        >>> [ax.get_title() for ax in figure.axes]
        ['loss', 'accuracy']
    """
    require_matplotlib("plot_landscape")
    arguments.integer("ncols", ncols, least=1)
    named = {"": landscapes} if isinstance(landscapes, Landscape) else dict(landscapes)
    for found in named.values():
        arguments.instance("landscapes", found, Landscape, "from landscape(...) or along_eigenvectors(...)")
    ndims = {found.loss.ndim for found in named.values()}
    if len(ndims) != 1:
        raise ValueError(
            "plot_landscape: there is nothing to draw" if not ndims else "plot_landscape: draw lines and surfaces apart"
        )
    if ndims == {1}:
        if surface:
            raise ValueError("plot_landscape: surface=True is for landscapes of two directions")
        return finished(_lines(list(named.values()), ncols), path)
    if len(named) > 1:
        raise ValueError(f"plot_landscape: {len(named)} surfaces: draw one at a time")
    (found,) = named.values()
    return finished(_in_space(found) if surface else _contours(found, ncols), path)


def _lines(found: list[Landscape], ncols: int) -> Figure:
    right = any(f.accuracy is not None for f in found)
    panels = [("loss", "loss", "test_loss")] + ([("accuracy", "accuracy", "test_accuracy")] if right else [])
    rows, columns = grid_of(len(panels), ncols)
    figure = new_figure(columns * 1.5 * PANEL, rows * 1.15 * PANEL)
    for k, (title, name, test) in enumerate(panels):
        ax = dressed(figure.add_subplot(rows, columns, k + 1), title, "distance along the direction")
        for f, colour in zip(found, COLOURS * len(found), strict=False):
            x = f.positions[0].numpy()
            for attribute, style, label in ((name, "-", f.names[0]), (test, "--", None)):
                values = getattr(f, attribute)
                if values is not None:
                    ax.plot(x, values.numpy(), style, color=colour, linewidth=1.2, label=label)
        if k == 0:
            every = torch.cat([f.loss for f in found])
            if float(every.min()) > 0 and float(every.max()) > _LOG * float(every.min()):
                ax.set_yscale("log")
            if any(f.test_loss is not None for f in found):
                ax.plot([], [], "--", color="grey", linewidth=1.2, label="test data")
            legend(ax)
    return figure


def _levels(loss: torch.Tensor) -> tuple[Any, bool]:
    """The levels of contours, and whether they are logarithmic."""
    finite = loss[loss.isfinite()]
    if len(finite) == 0:
        raise ValueError("plot_landscape: there is no finite loss to draw")
    low, high = float(finite.min()), float(finite.max())
    log = low > 0 and high > _LOG * low
    if log:
        return torch.logspace(torch.tensor(low).log10(), torch.tensor(high).log10(), 15).numpy(), True
    return torch.linspace(low, high if high > low else low + 1, 15).numpy(), False


def _contours(f: Landscape, ncols: int) -> Figure:
    from matplotlib.colors import LogNorm
    from matplotlib.ticker import MaxNLocator

    test = f.test_loss is not None
    rows, columns = grid_of(2 if test else 1, ncols)
    figure = new_figure(columns * 1.65 * PANEL, rows * 1.35 * PANEL)
    levels, log = _levels(f.loss if f.test_loss is None else torch.cat([f.loss, f.test_loss]))
    for k, (title, values) in enumerate([("training loss", f.loss), ("test loss", f.test_loss)][: 2 if test else 1]):
        assert values is not None
        ax = dressed(figure.add_subplot(rows, columns, k + 1), title, f.names[0], f.names[1])
        x, y = (p.numpy() for p in f.positions)
        norm = LogNorm(levels[0], levels[-1]) if log else None
        filled = ax.contourf(x, y, values.T.numpy(), levels=levels, norm=norm, cmap=colour_map())
        ax.contour(x, y, values.T.numpy(), levels=levels, colors="white", linewidths=0.4)
        ax.plot([0], [0], "o", color=COLOURS[1], markeredgecolor="white", markersize=5)
        for axis in (ax.xaxis, ax.yaxis):
            axis.set_major_locator(MaxNLocator(5))
        bar = figure.colorbar(filled, ax=ax, format="%.3g")
        bar.ax.tick_params(labelsize=FONT)
    return figure


def _in_space(f: Landscape) -> Figure:
    from matplotlib.ticker import MaxNLocator

    figure = new_figure(1.9 * PANEL, 1.7 * PANEL)
    figure.set_layout_engine("none")
    ax: Any = figure.add_axes((0.0, 0.06, 0.88, 0.9), projection="3d")
    x, y = torch.meshgrid(*f.positions, indexing="ij")
    ax.plot_surface(x.numpy(), y.numpy(), f.loss.numpy(), cmap=colour_map(), linewidth=0, antialiased=True)
    dressed(ax, "", f.names[0], f.names[1])
    ax.set_zlabel("loss", fontsize=FONT + 1)
    for axis in (ax.xaxis, ax.yaxis, ax.zaxis):
        axis.set_major_locator(MaxNLocator(5))
    ax.view_init(elev=32, azim=-60)
    return figure
