"""The sentence about a layer whose Jacobian cannot be had: which one, why, and what to do."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any


class Refused(NotImplementedError, ValueError):
    """The Jacobian of some layers cannot be had as the collection has them.

    layers: their names. problem: why. remedies: what to do, one or the other.

    >>> print(Refused(["0.a"], "layer '0.a' (Odd) was never called", "leave it out"))
    layer '0.a' (Odd) was never called: leave it out
    """

    def __init__(self, layers: Sequence[str], problem: str, *remedies: str) -> None:
        super().__init__(layers, problem, *remedies)
        self.layers = tuple(layers)
        self.problem = problem
        self.remedies = remedies

    def __str__(self) -> str:
        return f"{self.problem}: {', or '.join(self.remedies)}"


class Unclear(Refused):
    """Where the examples are in a tensor cannot be told from how its shape changes with their number: other examples
    may be longer, too.
    """


def named(name: str, module: Any, more: int = 0) -> str:
    """How messages name a layer. more: how many others it stands for.

    >>> named("0", "abc"), named("", "abc", more=2)
    ("layer '0' (str)", "layer '' (str, the model itself, and 2 more)")
    """
    of = [type(module).__name__, *([] if name else ["the model itself"]), *([f"and {more} more"] if more else [])]
    return f"layer {name!r} ({', '.join(of)})"


#: What may be done about a layer of any kind, where nothing better is known.
EXCLUDE = "leave it out with LayerCollection.exclude"
