"""What a net may do next, as lines of code: layers with their options, and operations between them.

A step is a function of the decisions and of the shape of one example. It returns the lines of the constructor and of
the forward pass, where ``{m}`` is a name of its own and ``x`` what is passed on, or None where it does not apply.
Whether the lines run is found out by running them.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from .choices import Choices


@dataclass(frozen=True)
class Lines:
    """Lines of the constructor, and of the forward pass. plain: the latter only call the module ``{m}`` on x."""

    init: tuple[str, ...]
    forward: tuple[str, ...]
    plain: bool = False


@dataclass(frozen=True)
class Now:
    """What is known where a step is taken: the shape of one example, whether x are indices, the parameters so far."""

    shape: tuple[int, ...]
    indices: bool
    named: tuple[tuple[str, tuple[int, ...]], ...]
    modules: tuple[str, ...]
    second: bool


Step = Callable[[Choices, Now], Lines | None]
STEPS: list[Step] = []
TAGS: dict[str, list[int]] = {}


def step(*tags: str, times: int = 1) -> Callable[[Step], Step]:
    def register(one: Step) -> Step:
        for _ in range(times):
            for tag in (one.__name__, *tags):
                TAGS.setdefault(tag, []).append(len(STEPS))
            STEPS.append(one)
        return one

    return register


def module(made: str, *more: str) -> Lines:
    return Lines((f"self.{{m}} = {made}", *more), ("x = self.{m}(x)",), plain=True)


def does(*forward: str, init: tuple[str, ...] = ()) -> Lines:
    return Lines(init, forward)


def options(**given: Any) -> str:
    """``, name=value`` for all that are not None."""
    return "".join(f", {name}={value!r}" for name, value in given.items() if value is not None)


def default(c: Choices, value: Any) -> Any:
    """None, or else the value."""
    return c.of([None, value])
