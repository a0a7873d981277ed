"""The course of a training."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from .style import COLOURS, FONT, PANEL, Figure, dressed, finished, legend, new_figure, require_matplotlib

#: The panels: title, whether the axis is logarithmic, and what is drawn with which label.
_PANELS: tuple[tuple[str, bool, dict[str, str]], ...] = (
    ("loss", True, {"loss": "training", "test_loss": "test"}),
    ("accuracy", False, {"accuracy": "training", "test_accuracy": "test"}),
    ("norms", True, {"grad_norm": "gradient", "weight_norm": "weights"}),
    ("learning rate", True, {"lr": "learning rate"}),
)
#: Of the runs beyond the first, second ... time that the colours are used.
_MARKERS = ("", "s", "^", "x")


def plot_history(
    columns: Mapping[str, Sequence[Any]] | Mapping[str, Mapping[str, Sequence[Any]]], path: str | Path | None = None
) -> Figure:
    """Loss, accuracy, norms of gradients and weights, and learning rate against epochs.

    Of several trainings, each has its colour, and what is of test data, or of the weights, is dashed.

    Args:
        columns: From names to values, None where an epoch has none, as ``history.columns()`` of a
            :class:`~nngeometry.training.History` has them; "epoch" says where, other names are as there. Of several
            trainings from their names to such columns.
        path: Where to save the picture, in the format that its ending names.

    Returns:
        The figure, which pyplot does not know of.

    Raises:
        ValueError: If there is nothing to draw.
        ImportError: Without matplotlib.

    Example:
        >>> one = {"epoch": [1, 2], "loss": [1.0, 0.5], "test_loss": [None, 0.6]}
        >>> [ax.get_title() for ax in plot_history(one).axes]
        ['loss']
        >>> figure = plot_history({"SGD": one, "Adam": one})
        >>> [line.get_label() for line in figure.axes[0].lines if not line.get_label().startswith("_")]
        ['SGD', 'Adam', 'test']
    """
    require_matplotlib("plot_history")
    from matplotlib.ticker import MaxNLocator

    several = bool(columns) and all(isinstance(of, Mapping) for of in columns.values())
    runs: Mapping[str, Any] = columns if several else {"": columns}
    panels = [panel for panel in _PANELS if any(_points(of, name) for of in runs.values() for name in panel[2])]
    if not panels:
        raise ValueError("plot_history: there is no epoch to draw")
    figure = new_figure(1.2 * PANEL * len(panels), PANEL)
    first: dict[str, Any] = {}
    for k, (title, log, names) in enumerate(panels):
        ax = dressed(figure.add_subplot(1, len(panels), k + 1), title, "epoch")
        positive, second = True, ""
        for r, (run, of) in enumerate(runs.items()):
            for c, (name, label) in enumerate(names.items()):
                points = _points(of, name)
                if not points:
                    continue
                alone = len(points) == 1 or (len(points) < 30 and name.startswith("test"))
                beyond = _MARKERS[r // len(COLOURS) % len(_MARKERS)]  # colours
                (line,) = ax.plot(
                    *zip(*points, strict=True),
                    color=COLOURS[(r if several else c) % len(COLOURS)],
                    label=label if not several else run if c == 0 else None,
                    linewidth=1.2,
                    linestyle="--" if several and c else "-",
                    marker=beyond or ("o" if alone else None),
                    markevery=max(1, len(points) // 8) if beyond else None,
                    markersize=3,
                )
                first.setdefault(run, line)
                positive = positive and all(value > 0 for _, value in points)
                second = label if c else second
        ax.xaxis.set_major_locator(MaxNLocator(5, integer=True))
        if log and positive:
            ax.set_yscale("log")
        if several and second:
            (line,) = ax.plot([], [], "--", color="grey", linewidth=1.2, label=second)
            legend(ax, handles=[line])
        if not several and len(names) > 1:
            legend(ax)
    if several:  # beside all panels, whose lines they would hide
        figure.legend(list(first.values()), list(first), loc="outside right center", fontsize=FONT - 1, frameon=False)
    return finished(figure, path)


def _points(columns: Mapping[str, Sequence[Any]], name: str) -> list[tuple[float, float]]:
    values = columns.get(name, ())
    epochs = columns.get("epoch", range(1, len(values) + 1))
    return [(e, v) for e, v in zip(epochs, values, strict=False) if v is not None]
