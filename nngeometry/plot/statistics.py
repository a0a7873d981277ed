"""Statistics of a loss over checkpoints."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from .. import arguments
from ..statistics import Trajectory
from .style import COLOURS, PANEL, Figure, dressed, finished, grid_of, new_figure, require_matplotlib

#: What is drawn unless it is said otherwise.
_DRAWN = (
    "train loss",
    "|gradient|^2",
    "gradient variance",
    "trace",
    "|curvature|^2",
    "curvature variance",
    "shrinkage",
    "|weights|",
)


def plot_statistics(
    trajectory: Trajectory,
    path: str | Path | None = None,
    names: Sequence[str] = _DRAWN,
    ncols: int | None = None,
) -> Figure:
    """Statistics against checkpoints, a panel for each; bars show plus or minus two standard errors.

    Args:
        trajectory: From :func:`~nngeometry.statistics.loss_trajectory`.
        path: Where to save the picture.
        names: Which of its columns.
        ncols: Panels in a row, by default up to four.

    Returns:
        The figure, which pyplot does not know of.

    Raises:
        ValueError: For a name that is no column.
        ImportError: Without matplotlib.

    Example:
        >>> import torch
        >>> from nngeometry.statistics import loss_trajectory
        >>> model = torch.nn.Linear(2, 3).eval()
        >>> states = {0: model.state_dict(), 5: model.state_dict()}
        >>> found = loss_trajectory(model, states, [(torch.randn(9, 2), torch.randint(3, (9,)))] * 2)
        >>> [ax.get_title() for ax in plot_statistics(found, names=["trace", "loss"]).axes]
        ['trace', 'loss']
    """
    require_matplotlib("plot_statistics")
    arguments.instance("trajectory", trajectory, Trajectory, "from loss_trajectory(model, checkpoints, loader)")
    columns = trajectory.columns()
    for name in names:
        if name not in columns:
            raise ValueError(f"plot_statistics: there is no column {name!r}{arguments.near(name, columns)}")
    where = list(trajectory.at)
    numbers = all(isinstance(k, int | float) for k in where)
    x = where if numbers else list(range(len(where)))
    rows, per_row = grid_of(len(names), ncols)
    figure = new_figure(1.15 * PANEL * per_row, 0.85 * PANEL * rows)
    for k, name in enumerate(names):
        last = k >= len(names) - per_row
        title = name.replace("^2", "²")
        ax = dressed(figure.add_subplot(rows, per_row, k + 1), title, "epoch" if numbers and last else "")
        values = [float(e.value) for e in columns[name]]
        errors = [2 * float(e.error) for e in columns[name]]
        ax.errorbar(x, values, errors, color=COLOURS[0], linewidth=1.2, marker="o", markersize=3, capsize=2)
        if not numbers:
            ax.set_xticks(x, [str(w) for w in where], rotation=30)
        if min(values) > 0 and max(values) > 10 * min(values):
            ax.set_yscale("log")
    return finished(figure, path)
