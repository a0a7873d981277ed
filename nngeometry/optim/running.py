"""The matrix that an optimiser uses: the running one, taken into use when a policy of refreshing says so."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from copy import deepcopy
from typing import Any

from torch import nn

from ..accumulator import Accumulator
from ..object import PMat
from .refresh import Memory, Refresh


class Running:
    """A running matrix, and the one in use, which a policy of refreshing takes.

    What is observed counts from the next :meth:`commit` on, or is dropped.

    Args:
        matrix: As of :class:`~nngeometry.Accumulator`, and so are model, representation and options.
        decay: What the past counts when something is observed.
        refresh: When the matrix in use is made anew.
    """

    def __init__(
        self,
        matrix: Callable[..., Any],
        model: nn.Module,
        representation: Any,
        *,
        decay: float,
        refresh: Refresh,
        absolute: bool = False,
        factored: bool = False,
        **options: Any,
    ) -> None:
        assert not absolute
        assert not factored
        self._running = Accumulator(matrix, model, representation, **options)
        self._ahead: Accumulator | None = None
        self._decay, self._refresh = decay, refresh
        self._memory: Memory = {}
        self._new = False
        self._matrix: PMat | None = None
        self._used: dict[str, Any] | None = None

    @property
    def accumulator(self) -> Accumulator:
        """The running matrix, with what was observed and not committed."""
        return self._running if self._ahead is None else self._ahead

    @property
    def matrix(self) -> PMat | None:
        """The matrix in use, None before the first."""
        return self._matrix

    def observe(self, examples: Any) -> None:
        """Fold in a minibatch, or another one of the same step."""
        ahead = deepcopy(self._running).decay(self._decay) if self._ahead is None else self._ahead
        self._ahead = ahead.update(examples)

    def drop(self) -> None:
        """Forget what was observed and not committed."""
        self._ahead = None

    def commit(self) -> None:
        """Have what was observed count."""
        if self._ahead is not None:
            self._running, self._ahead, self._new = self._ahead, None, True

    def renew(self, step: int) -> None:
        """Take the running matrix into use, if that is due in a step."""
        if self._new and (self._matrix is None or self._refresh.due(step, self._memory)):
            self._memory["last"], self._new = step, False
            self._use(self._running.state_dict())

    def _use(self, state: dict[str, Any]) -> None:
        self._used = state
        self._matrix = deepcopy(self._running).load_state_dict(state).matrix()

    def state_dict(self) -> dict[str, Any]:
        """All of it, as tensors and plain values."""
        return {
            "running": self._running.state_dict(),
            "ahead": None if self._ahead is None else self._ahead.state_dict(),
            "used": self._used,
            "memory": dict(self._memory),
            "new": self._new,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Be what :meth:`state_dict` says."""
        self._running.load_state_dict(state["running"])
        self._ahead = None if state["ahead"] is None else deepcopy(self._running).load_state_dict(state["ahead"])
        self._memory, self._new, self._used, self._matrix = dict(state["memory"]), state["new"], None, None
        if state["used"] is not None:
            self._use(state["used"])
