"""How optimisers went: loss against steps and seconds, intervals of refreshing by layer, damping over time."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from .style import COLOURS, PANEL, Figure, dressed, finished, legend, new_figure, require_matplotlib


def plot_optimisation(runs: Mapping[str, Mapping[str, Sequence[float]]], path: str | Path | None = None) -> Figure:
    """Loss against steps and, where there are times, against seconds: who needs fewer steps, and who is sooner there.

    Args:
        runs: From names of optimisers to columns: "loss" after each step, and if all runs have it "seconds", since the
            start, of the same length.
        path: Where to save the picture, in the format that its ending names.

    Returns:
        The figure, which pyplot does not know of.

    Raises:
        ValueError: If there is nothing to draw, or columns are not of one length.
        ImportError: Without matplotlib.

    Example:
        >>> run = {"loss": [2.0, 1.0, 0.5], "seconds": [0.1, 0.2, 0.3]}
        >>> [ax.get_xlabel() for ax in plot_optimisation({"K-FAC": run, "Adam": run}).axes]
        ['steps', 'seconds']
    """
    require_matplotlib("plot_optimisation")
    if not any(len(run.get("loss", ())) for run in runs.values()):
        raise ValueError("plot_optimisation: there is no loss to draw")
    for name, run in runs.items():
        if "loss" not in run or len(run.get("seconds", run["loss"])) != len(run["loss"]):
            raise ValueError(f'plot_optimisation: run {name!r} needs a "loss", and as many "seconds" if it has them')
    timed = all("seconds" in run for run in runs.values())
    figure = new_figure(1.5 * PANEL * (1 + timed), 1.2 * PANEL)
    axes = [dressed(figure.add_subplot(1, 1 + timed, k + 1), "", ("steps", "seconds")[k]) for k in range(1 + timed)]
    axes[0].set_ylabel("loss", fontsize=axes[0].xaxis.label.get_size())
    for k, (name, run) in enumerate(runs.items()):
        for ax, x in zip(axes, (range(1, len(run["loss"]) + 1), run.get("seconds", ())), strict=False):
            ax.plot(x, run["loss"], color=COLOURS[k % len(COLOURS)], linestyle=_dashes(k), label=name, linewidth=1.2)
    for ax in axes:
        _log_if_positive(ax, [value for run in runs.values() for value in run["loss"]])
    legend(axes[0])
    return finished(figure, path)


def plot_intervals(intervals: Sequence[Mapping[str, Sequence[int]]], path: str | Path | None = None) -> Figure:
    """How many steps there are between decompositions of each statistic of each layer, as a function of steps.

    Args:
        intervals: ``opt.intervals`` after each step, of a
            :class:`~nngeometry.optim.SecondOrderOptimizer` with ``refresh=Stale(...)``. Of Kronecker products, the
            first number is that of gradients, the second that of inputs.
        path: Where to save the picture, in the format that its ending names.

    Returns:
        The figure, which pyplot does not know of.

    Raises:
        ValueError: If there is nothing to draw.
        ImportError: Without matplotlib.

    Example:
        >>> figure = plot_intervals([{"fc": (1, 1)}, {"fc": (1, 2)}, {"fc": (2, 3)}])
        >>> [line.get_label() for line in figure.axes[0].lines]
        ['fc, gradients', 'fc, inputs']
    """
    require_matplotlib("plot_intervals")
    layers = list(dict.fromkeys(name for at in intervals for name in at))
    if not layers:
        raise ValueError("plot_intervals: there is no interval to draw: those are of refresh=Stale(...)")
    figure = new_figure(2.2 * PANEL, 1.2 * PANEL)
    ax = dressed(figure.add_subplot(), "", "steps", "steps between decompositions")
    for k, layer in enumerate(layers):
        steps = [step for step, at in enumerate(intervals, 1) if layer in at]
        count = max(len(intervals[step - 1][layer]) for step in steps)
        for i in range(count):
            points = [(s, intervals[s - 1][layer][i]) for s in steps if i < len(intervals[s - 1][layer])]
            ax.plot(
                *zip(*points, strict=True),
                color=COLOURS[k % len(COLOURS)],
                linestyle=("-", ":", "--", "-.")[i % 4],
                drawstyle="steps-post",
                label=layer if count == 1 else f"{layer}, {('gradients', 'inputs')[i] if count == 2 else i}",
                linewidth=1.2 + 2.4 * (1 - (k + 1) / len(layers)),  # equal lines show beneath each other
            )
    ax.set_ylim(bottom=0)
    ax.yaxis.get_major_locator().set_params(integer=True)
    if len(layers) <= 8:
        legend(ax, loc="center left", bbox_to_anchor=(1, 0.5))
    return finished(figure, path)


def plot_damping(damping: Mapping[str, Sequence[float]], path: str | Path | None = None) -> Figure:
    """The damping of each layer or run over time, as :class:`~nngeometry.optim.LevenbergMarquardt` sets it.

    Args:
        damping: From names to the damping after each step, e.g. of ``group["damping"]``.
        path: Where to save the picture, in the format that its ending names.

    Returns:
        The figure, which pyplot does not know of.

    Raises:
        ValueError: If there is nothing to draw.
        ImportError: Without matplotlib.

    Example:
        >>> plot_damping({"all layers": [1.0, 0.77, 0.6]}).axes[0].get_ylabel()
        'damping'
    """
    require_matplotlib("plot_damping")
    if not any(len(values) for values in damping.values()):
        raise ValueError("plot_damping: there is no damping to draw")
    figure = new_figure(1.6 * PANEL, 1.2 * PANEL)
    ax = dressed(figure.add_subplot(), "", "steps", "damping")
    for k, (name, values) in enumerate(damping.items()):
        ax.plot(
            range(1, len(values) + 1),
            values,
            color=COLOURS[k % len(COLOURS)],
            linestyle=_dashes(k),
            drawstyle="steps-post",
            label=name,
            linewidth=1.2,
        )
    _log_if_positive(ax, [value for values in damping.values() for value in values])
    legend(ax)
    return finished(figure, path)


def _log_if_positive(ax: Any, values: Sequence[float]) -> None:
    """A logarithmic axis of what is positive, with numbers between powers of ten where there are few of these."""
    if not all(value > 0 for value in values):
        return
    from matplotlib.ticker import LogFormatter

    ax.set_yscale("log")
    for axis in (ax.yaxis.set_major_formatter, ax.yaxis.set_minor_formatter):
        axis(LogFormatter(minor_thresholds=(2, 0.5)))


def _dashes(k: int) -> str:
    """Lines beyond the colours differ by their dashes."""
    return ("-", "--", ":", "-.")[k // len(COLOURS) % 4]
