"""Decisions: drawn at random once, written down, and played again from what was written."""

from __future__ import annotations

import random
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any, TypeVar

T = TypeVar("T")


class Choices:
    """A sequence of small numbers, each of which decides something; zero decides for what is plainest.

    drawn: numbers that are known already. rng: where further ones come from; without it they are zero.

    >>> c = Choices([1, 5])
    >>> c.of("abc"), c.below(4), c.below(9)
    ('b', 1, 0)
    """

    def __init__(self, drawn: Iterable[int] = (), rng: random.Random | None = None) -> None:
        self.drawn = list(drawn)
        self.rng = rng
        self._next = 0

    def below(self, n: int) -> int:
        """One of ``0 ... n - 1``."""
        if self._next == len(self.drawn) and self.rng is not None:
            self.drawn.append(self.rng.randrange(n))
        k = self.drawn[self._next] % n if self._next < len(self.drawn) else 0
        self._next = min(self._next + 1, len(self.drawn))
        return k

    def of(self, options: Sequence[T]) -> T:
        """One of the options, the first of which is the plainest."""
        return options[self.below(len(options))]

    def once_in(self, n: int) -> bool:
        """True once in n times."""
        return self.below(n) == n - 1


@dataclass(frozen=True)
class Case:
    """All decisions about one net, its data and the questions about it.

    net: the input and the frame. steps: one sequence for each step of the forward pass. problem: data, targets and
    loss. queries: one sequence for each question. Whatever the numbers are, they are a valid case.
    """

    net: tuple[int, ...]
    steps: tuple[tuple[int, ...], ...]
    problem: tuple[int, ...]
    queries: tuple[tuple[int, ...], ...]

    def asking(self, *queries: tuple[int, ...]) -> Case:
        """The same net and data, other questions."""
        return replace(self, queries=queries)

    @property
    def size(self) -> tuple[int, int, int]:
        """Smaller is plainer: the number of steps, of decisions that are not zero, and their sum."""
        every = [*self.net, *self.problem, *(k for s in (*self.steps, *self.queries) for k in s)]
        return len(self.steps), sum(k != 0 for k in every), sum(every)

    def to_json(self) -> dict[str, Any]:
        return {"net": self.net, "steps": self.steps, "problem": self.problem, "queries": self.queries}

    @classmethod
    def from_json(cls, found: dict[str, Any]) -> Case:
        def tuples(rows: Any) -> tuple[tuple[int, ...], ...]:
            return tuple(tuple(row) for row in rows)

        return cls(tuple(found["net"]), tuples(found["steps"]), tuple(found["problem"]), tuples(found["queries"]))
