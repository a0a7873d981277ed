"""When the matrix in use is made anew of the running one: for each of its blocks by itself."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from .. import arguments

#: What a policy remembers of one block: plain values, and lists of blocks.
Memory = dict[str, Any]


class Refresh(ABC):
    """A policy of refreshing, the same for all blocks. It is a value; what it remembers of a block is in ``memory``."""

    @abstractmethod
    def due(self, step: int, memory: Memory) -> bool:
        """Whether a block is looked at in a step, if something was observed since it was made."""


@dataclass(frozen=True)
class Every(Refresh):
    """A refresh in every so many steps, which an integer stands for.

    Args:
        interval: In steps.
    """

    interval: int

    def __post_init__(self) -> None:
        arguments.integer("refresh", self.interval, least=1)

    def due(self, step: int, memory: Memory) -> bool:
        return step % self.interval == 0


@dataclass(frozen=True)
class Scheduled(Refresh):
    """A refresh as a function says, which it stands for itself.

    Args:
        schedule: From the number of steps that were made to the interval that holds then, an integer, or to whether to
            refresh now, a boolean.
    """

    schedule: Callable[[int], int | bool]

    def due(self, step: int, memory: Memory) -> bool:
        said = self.schedule(step)
        if isinstance(said, bool):
            return said
        return step - memory["last"] >= arguments.integer(f"refresh({step})", said, least=1)


def policy(refresh: Any) -> Refresh:
    """What ``refresh=`` stands for.

    Raises:
        TypeError: If that is nothing.
    """
    if isinstance(refresh, Refresh):
        return refresh
    if isinstance(refresh, type | bool):
        raise TypeError(
            f"refresh: expected a number of steps or a function of the step, got {arguments.described(refresh)}"
        )
    return Scheduled(refresh) if callable(refresh) else Every(refresh)
