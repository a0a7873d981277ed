"""What happened in a training, epoch by epoch."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from ..plot.history import Figure, plot_history


class History:
    """The numbers of a training, a row for each epoch.

    A row has epoch, lr, loss, accuracy and top5 (of the training data, at the weights of each step), grad_norm (mean
    over steps), weight_norm, seconds, and in epochs with an evaluation test_loss, test_accuracy and test_top5.

    Args:
        rows: One mapping from names to numbers for each epoch.

    Example:
        >>> history = History([{"epoch": 1, "loss": 0.5}, {"epoch": 2, "loss": 0.25, "test_loss": 0.3}])
        >>> history["loss"], history["test_loss"], history.last("test_loss")
        ([0.5, 0.25], [None, 0.3], 0.3)
    """

    def __init__(self, rows: Sequence[Mapping[str, Any]] = ()) -> None:
        self.rows: list[dict[str, Any]] = [dict(row) for row in rows]

    def __len__(self) -> int:
        return len(self.rows)

    def __iter__(self) -> Iterator[dict[str, Any]]:
        return iter(self.rows)

    @property
    def names(self) -> list[str]:
        """The columns that some row has."""
        return list(dict.fromkeys(name for row in self.rows for name in row))

    def __getitem__(self, name: str) -> list[Any]:
        """A column, None where an epoch lacks it."""
        if name not in self.names:
            raise KeyError(f"{name!r}: the history has {', '.join(self.names) or 'no epoch'}")
        return [row.get(name) for row in self.rows]

    def last(self, name: str) -> Any:
        """The last value of a column."""
        return next(value for value in reversed(self[name]) if value is not None)

    def columns(self) -> dict[str, list[Any]]:
        """All columns by name, as :func:`~nngeometry.plot.plot_history` takes them."""
        return {name: self[name] for name in self.names}

    def plot(self, path: str | Path | None = None) -> Figure:
        """Its picture, see :func:`~nngeometry.plot.plot_history`."""
        return plot_history(self.columns(), path)

    def __repr__(self) -> str:
        if not self.rows:
            return "History of 0 epochs"
        last = ", ".join(f"{k} {v:.4g}" for k, v in self.rows[-1].items() if isinstance(v, float))
        return f"History of {len(self)} epochs: {last}"
