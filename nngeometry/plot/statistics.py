"""Statistics of a loss over checkpoints."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from .. import arguments
from ..statistics import Trajectory
from .style import COLOURS, PANEL, Figure, dressed, finished, grid_of, legend, new_figure, require_matplotlib

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
    trajectory: Trajectory | Mapping[str, Trajectory],
    path: str | Path | None = None,
    names: Sequence[str] = _DRAWN,
    ncols: int | None = None,
) -> Figure:
    """Statistics against checkpoints, a panel for each; bars show plus or minus two standard errors.

    Args:
        trajectory: From :func:`~nngeometry.statistics.loss_trajectory`, one or several with the names of trainings.
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
    runs = dict(trajectory) if isinstance(trajectory, Mapping) else {"": trajectory}
    if ncols is not None:
        arguments.integer("ncols", ncols, least=1)
    for of in runs.values():
        arguments.instance("trajectory", of, Trajectory, "from loss_trajectory(model, checkpoints, loader)")
    if not names or not any(of.at for of in runs.values()):
        raise ValueError("plot_statistics: there is nothing to draw")
    columns = {run: of.columns() for run, of in runs.items()}
    for name in names:
        for run, of_run in columns.items():
            if name not in of_run:
                where = f" of {run}" if run else ""
                raise ValueError(f"plot_statistics: there is no column {name!r}{where}{arguments.near(name, of_run)}")
    points = list(dict.fromkeys(at for of in runs.values() for at in of.at))
    numbers = all(isinstance(at, int | float) for at in points)
    x: dict[Any, float] = {at: at if numbers else k for k, at in enumerate(points)}
    rows, per_row = grid_of(len(names), ncols)
    figure = new_figure(1.15 * PANEL * per_row, 0.85 * PANEL * rows)
    for k, name in enumerate(names):
        last = k >= len(names) - per_row
        title = name.replace("^2", "²")
        ax = dressed(figure.add_subplot(rows, per_row, k + 1), title, "epoch" if numbers and last else "")
        every: list[float] = []
        for (run, of), colour in zip(runs.items(), COLOURS * len(runs), strict=False):
            values = [float(e.value) for e in columns[run][name]]
            errors = [2 * float(e.error) for e in columns[run][name]]
            places = [x[at] for at in of.at]
            style = {"color": colour, "linewidth": 1.2, "marker": "o", "markersize": 3, "capsize": 2}
            ax.errorbar(places, values, errors, label=run or None, **style)
            every += values
        if not numbers:
            ax.set_xticks(list(x.values()), [str(at) for at in points], rotation=30)
        if min(every) > 0 and max(every) > 10 * min(every):
            ax.set_yscale("log")
        if k == 0:
            legend(ax)
    return finished(figure, path)
