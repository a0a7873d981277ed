"""What is held of what was seen: statistics that add up over chunks, minibatches and machines."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from . import forms

#: What a statistic consists of: tensors, numbers and :class:`Deferred`, merged entry by entry.
State = tuple[Any, ...]


class Deferred(ABC):
    """A statistic that is held by what it is made of, because that is smaller. A subclass is merged with ``+``, and
    has tensors in plain containers.
    """

    @abstractmethod
    def mapped(self, fn: Callable[[Tensor], Tensor]) -> Deferred:
        """The same with a function applied to every tensor."""

    @abstractmethod
    def scaled(self, c: float) -> Deferred:
        """c times the statistic, which may be written into."""

    @abstractmethod
    def plain(self) -> Any:
        """As tensors and plain values, from which :meth:`of_plain` makes it again."""

    @classmethod
    @abstractmethod
    def of_plain(cls, value: Any) -> Deferred:
        """What :meth:`plain` was given."""


class Samples(Deferred):
    """Few vectors ``(N, d)`` whose second moment is a statistic: the moment itself would be larger, and of low rank."""

    def __init__(self, rows: Tensor) -> None:
        self.rows = rows

    def __add__(self, other: Samples | Tensor) -> Samples | Tensor:
        if isinstance(other, Samples) and 2 * (len(self.rows) + len(other.rows)) <= self.rows.shape[1]:
            return Samples(torch.cat([self.rows, other.rows]))
        return self.moment().add_(other.moment() if isinstance(other, Samples) else other)

    def moment(self) -> Tensor:
        """The lower triangle of ``(1, d, d)``."""
        return forms.second_moment(self.rows.unsqueeze(1))

    def mapped(self, fn: Callable[[Tensor], Tensor]) -> Samples:
        return Samples(fn(self.rows))

    def scaled(self, c: float) -> Samples:
        return Samples(self.rows * c**0.5)

    def plain(self) -> Any:
        return self.rows

    @classmethod
    def of_plain(cls, value: Any) -> Samples:
        return cls(value)


class Rows(Deferred):
    """All vectors ``(N, d)`` whose second moment is a statistic.

    Args:
        pieces: The vectors.
        most: How many are kept at least; twice as many are replaced by the ``most`` that are best in the sense of least
            squares, by a singular value decomposition. None keeps all.
    """

    def __init__(self, pieces: list[Tensor], most: int | None = None) -> None:
        self.pieces = pieces
        self.most = most

    def __add__(self, other: Rows) -> Rows:
        pieces = self.pieces + other.pieces
        if self.most is None or sum(map(len, pieces)) <= 2 * self.most:
            return Rows(pieces, self.most)
        _, s, vh = torch.linalg.svd(torch.cat(pieces), full_matrices=False)
        return Rows([s[: self.most, None] * vh[: self.most]], self.most)

    def mapped(self, fn: Callable[[Tensor], Tensor]) -> Rows:
        return Rows(list(map(fn, self.pieces)), self.most)

    def scaled(self, c: float) -> Rows:
        return Rows([piece.mul_(c**0.5) for piece in self.pieces], self.most)

    def plain(self) -> Any:
        return [self.most, *self.pieces]

    @classmethod
    def of_plain(cls, value: Any) -> Rows:
        return cls(list(value[1:]), value[0])


class Contracted(Deferred):
    """A :class:`~nngeometry.forms.Contraction`."""

    def __init__(self, contraction: forms.Contraction) -> None:
        self.contraction = contraction

    def __add__(self, other: Contracted) -> Contracted:
        return Contracted(self.contraction + other.contraction)

    def mapped(self, fn: Callable[[Tensor], Tensor]) -> Contracted:
        pairs = {key: fn(pair) for key, pair in self.contraction.pairs.items()}
        return Contracted(forms.Contraction(self.contraction.shapes, pairs))

    def scaled(self, c: float) -> Contracted:
        for pair in self.contraction.pairs.values():
            pair.mul_(c)
        return self

    def plain(self) -> Any:
        return [[list(shape) for shape in self.contraction.shapes], dict(self.contraction.pairs)]

    @classmethod
    def of_plain(cls, value: Any) -> Contracted:
        shapes, pairs = value
        return cls(forms.Contraction([tuple(shape) for shape in shapes], dict(pairs)))


def merge(a: State, b: State) -> State:
    """The statistic of the union of what two have seen, entry by entry.

    Args:
        a: The one, which is written into.
        b: The other one.
    """
    return tuple(_add(x, y) for x, y in zip(a, b, strict=True))


def same_shapes(a: State, b: State) -> bool:
    """Whether two statistics are of the same structure, so that they can be merged."""
    pairs = zip(a, b, strict=False)
    both = ((x, y) for x, y in pairs if isinstance(x, Tensor) and isinstance(y, Tensor))
    return len(a) == len(b) and all(x.shape == y.shape for x, y in both)


#: Why they may not be, and what to do.
OTHER_STATISTICS = (
    "the two hold other statistics of it, as they do under other memory budgets: estimate both under the same "
    "nngeometry.memory_budget"
)


def _add(x: Any, y: Any) -> Any:
    if isinstance(x, Tensor) and isinstance(y, Tensor):
        if x.shape != y.shape:
            raise ValueError(f"a block: {OTHER_STATISTICS}")
        return x.add_(y)  # x is the accumulator: nobody else holds it
    if isinstance(x, Tensor) and isinstance(y, Samples):
        return x.add_(y.moment())
    return x if isinstance(y, int) and y == 0 else x + y


def scaled(state: State, c: float) -> State:
    """c times a statistic, which is written into."""
    return tuple(
        x.mul_(c) if isinstance(x, Tensor) else x.scaled(c) if isinstance(x, Deferred) else c * x for x in state
    )


def mapped(state: State, fn: Callable[[Tensor], Tensor]) -> State:
    """A statistic with a function applied to every tensor."""
    return tuple(fn(x) if isinstance(x, Tensor) else x.mapped(fn) if isinstance(x, Deferred) else x for x in state)


#: How statistics are called in what is saved.
_NAMES: dict[str, type[Deferred]] = {"samples": Samples, "rows": Rows, "contracted": Contracted}


def _plain(state: State | None) -> Any:
    """A statistic as tensors and plain values."""
    if state is None:
        return None
    names = {kind: name for name, kind in _NAMES.items()}
    return [{"kind": names[type(x)], "value": x.plain()} if isinstance(x, Deferred) else x for x in state]


def _of_plain(value: Any) -> State | None:
    """What :func:`_plain` was given."""
    if value is None:
        return None
    return tuple(_NAMES[x["kind"]].of_plain(x["value"]) if isinstance(x, dict) else x for x in value)


@dataclass
class Sums:
    """What was seen: the statistics of the blocks, those in a basis, the sum of the Jacobians of each layer where the
    matrix is centred, what divides them and the number of examples. All of it counts ``scale`` times, which is kept
    apart so that a mean stays what it is, in any precision, however often it is decayed.
    """

    states: list[State | None]
    refined: dict[int, State]
    means: dict[str, Tensor]
    weight: float
    seen: float
    scale: float = 1.0

    @classmethod
    def nothing(cls, blocks: int) -> Sums:
        return cls([None] * blocks, {}, {}, 0.0, 0.0)

    @property
    def like(self) -> Tensor:
        """One of the tensors."""
        found: list[Tensor] = []
        self.mapped(lambda t: found.append(t) or t)  # type: ignore[func-returns-value]
        return next(t for t in found if t.is_floating_point())

    def mapped(self, fn: Callable[[Tensor], Tensor]) -> Sums:
        return Sums(
            [None if state is None else mapped(state, fn) for state in self.states],
            {k: mapped(state, fn) for k, state in self.refined.items()},
            {name: fn(mean) for name, mean in self.means.items()},
            self.weight,
            self.seen,
            self.scale,
        )

    @property
    def count(self) -> float:
        """How many examples were seen, those of the past for less."""
        return self.scale * self.seen

    def decay(self, c: float) -> None:
        self.scale *= c

    def settled(self) -> Sums:
        """The same with a scale of one; this one is given up."""
        if (c := self.scale) == 1.0:
            return self
        return Sums(
            [None if state is None else scaled(state, c) for state in self.states],
            {k: scaled(state, c) for k, state in self.refined.items()},
            {name: mean.mul_(c) for name, mean in self.means.items()},
            c * self.weight,
            c * self.seen,
        )

    def plain(self) -> dict[str, Any]:
        return {
            "states": [_plain(state) for state in self.states],
            "refined": {k: _plain(state) for k, state in self.refined.items()},
            "means": self.means,
            "weight": self.weight,
            "seen": self.seen,
            "scale": self.scale,
        }

    @classmethod
    def of_plain(cls, saved: Mapping[str, Any]) -> Sums:
        refined = {k: _of_plain(state) for k, state in saved["refined"].items()}
        states = [_of_plain(state) for state in saved["states"]]
        return cls(states, refined, *(saved[name] for name in ("means", "weight", "seen", "scale")))  # type: ignore[arg-type]
