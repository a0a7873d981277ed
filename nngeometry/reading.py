"""Where and how the minibatches of one call are read: by which processes, and from where on after it was stopped."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import wraps
from pathlib import Path
from typing import Any, ParamSpec, TypeVar

import torch

from . import arguments
from .distributed import Placed, Share, peek, require_apart, share_of
from .identity import in_training, of_model, short, told, told_of_options
from .model import data
from .team import Team

P = ParamSpec("P")
R = TypeVar("R")
#: After how many minibatches the state is written, unless it is said.
EVERY = 100


@dataclass(frozen=True)
class Checkpoint:
    """Where what was seen so far is written. every: after how many minibatches of a process. keep: also when done."""

    path: Path
    every: int = EVERY
    keep: bool = False


@dataclass(frozen=True)
class Reading:
    """A loader, with who reads it and what is written on the way. what: the call, in words and in a number."""

    loader: Any
    team: Team
    checkpoint: Checkpoint | None = None
    what: tuple[str, ...] = ()

    def __iter__(self) -> Iterator[data.Batch]:
        raise NotImplementedError(
            "process_group, checkpoint: this representation reads its examples itself, and would not add up what other "
            "processes have seen: hand generator and examples to a representation of nngeometry"
        )

    def begin(self, source: Any, seen: float = 0.0) -> Share:
        """The minibatches of this rank, after a look at whether all ranks are about to do the same. All ranks together.

        source: of the matrix, with a model. seen: how many examples went before.

        Raises:
            RuntimeError: If it fails on another rank.
            ValueError: If the ranks have other models, options or data that do not go together.
        """
        told = self.team.attempt(lambda: (self.identity(source, seen), self._own()), lambda found: found)[1]
        for rank, (other, _) in enumerate(told):
            differ = differences(told[0][0], other)
            if differ:
                raise ValueError(
                    f"process_group: the ranks 0 and {rank} are about to do different things, which must be the same: "
                    f"{differ}"
                )
        require_apart([note for _, note in told])
        share = self.team.attempt(lambda: share_of(self.loader, self.team))[0]
        notes = self.team.attempt(lambda: share.note() if self.team.size > 1 else None, lambda note: note)[1]
        if share.strided and any(note != notes[0] for note in notes):
            raise ValueError(
                "loader: it does not give the same minibatches on all ranks, so shard() cannot share it out: pass the "
                "same loader on every rank, or each rank's own minibatches without shard()"
            )
        return share

    def _own(self) -> Any:
        """What tells whether two ranks have the same data where each should have its own."""
        if self.team.size == 1:
            return None
        if data.is_minibatch(self.loader):
            return Share.note_of([self.loader])
        return Share.note_of(self.loader) if isinstance(self.loader, list | tuple) else peek(self.loader)

    def identity(self, source: Any, seen: float = 0.0) -> dict[str, Any]:
        """What must be the same on all ranks, and when a work goes on that was stopped."""
        layers = source.layer_collection.layers.values()
        running = not getattr(source, "batch_statistics", False)
        return {
            "matrix and options": list(self.what),
            "layers": [[layer.name, [[name, list(shape)] for name, shape in layer.params]] for layer in layers],
            "dtype": str(source.dtype),
            "parameters and buffers of the model": of_model(source.model, running),
            "modules in training mode": in_training(source.model),
            "examples seen before": seen,
            "checkpoint": None if self.checkpoint is None else [str(self.checkpoint.path), self.checkpoint.every],
        }


def differences(one: dict[str, Any], other: dict[str, Any]) -> str:
    """In what two identities differ, in words; empty if in nothing."""
    pairs = {name: _narrowed(value, other.get(name)) for name, value in one.items() if value != other.get(name)}
    return "; ".join(f"{name} ({short(here)} and {short(there)})" for name, (here, there) in pairs.items())


def _narrowed(one: Any, other: Any) -> tuple[Any, Any]:
    """Of two values that differ their entries that do, if they have as many."""
    if not isinstance(one, list) or not isinstance(other, list) or len(one) != len(other):
        return one, other
    pairs = [_narrowed(a, b) for a, b in zip(one, other, strict=True) if a != b]
    return pairs[0] if len(pairs) == 1 else ([a for a, _ in pairs], [b for _, b in pairs])


class Assigned:
    """Minibatches with their positions, which sources read as they read a loader. There may be none.

    team: whose ranks are to add up what is made of them, if any.
    """

    def __init__(self, share: Share, team: Team | None) -> None:
        self.share = share
        self.team = team

    def __iter__(self) -> Iterator[data.Batch]:
        return (batch for _, batch in self.placed())

    def placed(self) -> Iterator[Placed]:
        """Minibatches with their positions."""
        return self.share.read(0)

    def read(
        self, reader: Callable[[data.Batch], data.Batch], device: torch.device, verbose: bool, what: str
    ) -> Iterator[data.Batch]:
        """The minibatches on a device, as a function receives them."""
        for position, batch in self._shown(verbose, what):
            yield data.placed(reader(data.checked(batch, device)), position)

    def _shown(self, verbose: bool, what: str) -> Iterable[Placed]:
        return data.progress(self.placed(), verbose, what)


class Segment(Assigned):
    """Some minibatches in a row, of which who reads them shows the progress."""

    def __init__(self, some: Iterable[Placed], team: Team | None = None) -> None:
        self.some = some
        self.team = team

    def placed(self) -> Iterator[Placed]:
        return iter(self.some)

    def _shown(self, verbose: bool, what: str) -> Iterable[Placed]:
        return self.placed()


class Placing(Assigned):
    """What one process has of a loader, with the positions of those that were read last."""

    def __init__(self, share: Share) -> None:
        super().__init__(share, None)
        self.positions: list[int] = []

    def placed(self) -> Iterator[Placed]:
        self.positions = []
        for position, batch in self.share.read(0):
            self.positions.append(position)
            yield position, batch


def positions_of(examples: Any) -> list[int]:
    """The positions of the minibatches that were read, of a loader none."""
    return examples.positions if isinstance(examples, Placing) else []


#: This process alone.
ALONE = Team()


def team_of(examples: Any) -> Team:
    """The ranks that add up what is made of some minibatches."""
    found = examples.team if isinstance(examples, Assigned) else None
    return ALONE if found is None else found


def reading(
    loader: Any,
    process_group: Any = None,
    checkpoint: Any = None,
    every: int | None = None,
    keep_checkpoint: bool = False,
    what: tuple[str, ...] = (),
) -> Any:
    """A loader as a :class:`Reading`, or as it is, if one process reads it and nothing is written."""
    arguments.flag("keep_checkpoint", keep_checkpoint)
    if checkpoint is None and (every is not None or keep_checkpoint):
        name = "every" if every is not None else "keep_checkpoint"
        raise ValueError(f"{name}: it is for checkpoint=, the file in which work is kept: give that too")
    if checkpoint is not None and not isinstance(checkpoint, str | Path):
        raise TypeError(f"checkpoint: expected the path of a file, got {arguments.described(checkpoint)}")
    if process_group is None:
        arguments.loader(loader)
    if process_group is None and checkpoint is None:
        return loader
    place = None
    if checkpoint is not None:
        after = EVERY if every is None else arguments.integer("every", every, least=1)
        place = Checkpoint(Path(checkpoint), after, keep_checkpoint)
    return Reading(loader, Team(process_group), place, what)


def together(matrix: Callable[P, R]) -> Callable[P, R]:
    """Of a constructor: have its loader read as its ``process_group=``, ``checkpoint=``, ``every=`` and
    ``keep_checkpoint=`` say.
    """
    signature = inspect.signature(matrix)

    @wraps(matrix)
    def made(*args: P.args, **kwargs: P.kwargs) -> R:
        if _NAMES.isdisjoint(kwargs):
            return matrix(*args, **kwargs)
        try:
            bound = signature.bind(*args, **kwargs)
        except TypeError:
            return matrix(*args, **kwargs)  # which says what is wrong
        given = bound.arguments
        options = {k: v for k, v in given.items() if k not in ("model", "loader", *_NAMES)}
        options.update(options.pop("options", {}))
        what = (told(matrix, options), told_of_options(options))
        given["loader"] = reading(given["loader"], **{k: given[k] for k in _NAMES & given.keys()}, what=what)
        return matrix(*bound.args, **bound.kwargs)

    return made


_NAMES = frozenset(("process_group", "checkpoint", "every", "keep_checkpoint"))
