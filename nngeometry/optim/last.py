"""The matrix of the last minibatch, by its products."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import nn

from ..model import data
from ..object import PMat, PMatImplicit


class Last:
    """The exact matrix of the minibatches of the last step that had some, at the parameters of then.

    Args:
        matrix, model: As of :class:`~nngeometry.Accumulator`.
        absolute: Whether the absolute values of its eigenvalues are used.
        **options: Of the matrix.
    """

    def __init__(self, matrix: Callable[..., Any], model: nn.Module, absolute: bool, **options: Any) -> None:
        self._make: Callable[[Any], PMat] = lambda batches: matrix(model, batches, PMatImplicit, **options)
        self._absolute = absolute
        self._observed = data.Minibatches()
        self.matrix: PMat | None = None

    def observe(self, minibatch: Any) -> None:
        """Note a minibatch, or another one of the same step."""
        self._observed.append(minibatch)

    def drop(self) -> None:
        """Forget what was observed and not committed."""
        self._observed = data.Minibatches()

    def restart(self) -> None:
        """Have no matrix."""
        self.drop()
        self.matrix = None

    def commit(self) -> bool:
        """Make the matrix of what was observed, at the parameters as they are now, and whether there was anything."""
        if not self._observed:
            return False
        made = self._make(self._observed)
        self.matrix = made.absolute() if self._absolute else made
        self._observed = data.Minibatches()
        return True
