"""One style for all pictures: sizes, colours that colour-blind people can tell apart, axes without ornament."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from matplotlib.figure import Figure
else:
    Figure = Any

#: Side of a panel in inches, and size of letters in points.
PANEL, FONT = 2.6, 8.0
#: The colours of Okabe and Ito (2008), which keep apart in every kind of colour blindness and in grey.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
POSITIVE, NEGATIVE = COLOURS[:2]


def require_matplotlib(name: str) -> None:
    """Raise ``ImportError`` with the remedy where there is no matplotlib."""
    try:
        import matplotlib.figure  # noqa: F401
    except ImportError as error:
        raise ImportError(f"{name} needs matplotlib: pip install matplotlib") from error


def new_figure(width: float, height: float, layout: Any = "constrained") -> Figure:
    """A figure that pyplot does not know of. width and height are in inches."""
    from matplotlib.figure import Figure

    return Figure(figsize=(width, height), layout=layout, dpi=200)


def colour_map() -> Any:
    """The colours of an axis of numbers: as bright as they are large."""
    from matplotlib import colormaps

    return colormaps["viridis"]


def dressed(ax: Any, title: str = "", x: str = "", y: str = "") -> Any:
    """An axis with its words, in the style of all others."""
    ax.set_title(title, fontsize=FONT + 2)
    ax.set_xlabel(x, fontsize=FONT + 1)
    ax.set_ylabel(y, fontsize=FONT + 1)
    ax.tick_params(which="both", labelsize=FONT)
    for side in ("top", "right"):
        if side in ax.spines:
            ax.spines[side].set_visible(False)
    return ax


def legend(ax: Any, **options: Any) -> None:
    """The legend, if there is something to say."""
    if ax.get_legend_handles_labels()[0]:
        ax.legend(fontsize=FONT - 1, frameon=False, **options)


def grid_of(n: int, ncols: int | None = None, most: int = 4) -> tuple[int, int]:
    """Rows and columns for n panels.

    >>> grid_of(5), grid_of(3)
    ((2, 3), (1, 3))
    """
    columns = min(n, ncols) if ncols is not None else -(-n // -(-n // most))
    return -(-n // columns), columns


def finished(figure: Figure, path: str | Path | None) -> Figure:
    """The figure, saved if there is a path."""
    if path is not None:
        figure.savefig(path)
    return figure
