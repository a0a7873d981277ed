"""An estimate from examples that several processes read, or whose reading may be stopped and go on."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from . import checkpoint as file
from .blocks import Block
from .changes import no_grad, uninterrupted
from .distributed import Placed, Share
from .estimation import Estimation, Estimator, OfJacobians, OfProducts, Refinement, Source
from .identity import checksum
from .model import data
from .owners import owners_of
from .pooling import joined, merged, outline
from .reading import Assigned, Reading, Segment
from .sums import Sums
from .team import Team

#: What is estimated in a pass, by the number of the block.
Estimators = Mapping[int, Estimator]


def update(estimation: Estimation, examples: Any, last: bool = False) -> None:
    """Fold in a loader or one minibatch, or a :class:`~nngeometry.reading.Reading`, which all ranks do together and
    after which all have the same estimate. After an exception nothing has changed.

    last: as in :meth:`Estimation.update`.
    """
    if not isinstance(examples, Reading):
        estimation.update(examples, last)
    elif isinstance(estimation, OfJacobians):
        _Passes(estimation, examples, last).run()
    else:
        assert isinstance(estimation, OfProducts)
        _of_products(estimation, examples)


def assigned(examples: Any, source: Source) -> Any:
    """The minibatches of this rank where they are read again for every product, whose results all ranks add up; a
    loader as it is.
    """
    if not isinstance(examples, Reading):
        return examples
    if examples.checkpoint is not None:
        raise ValueError(
            "checkpoint: a matrix or map that is known by its products holds nothing that could be kept: leave "
            "checkpoint out, or use a representation that holds entries"
        )
    data.require_repeatable(examples.loader, "a matrix or map known by its products")
    share = examples.begin(source)
    if not any(examples.team.exchange(share.length() != 0)):
        raise ValueError("the loader yielded no minibatch on any rank: it is empty")
    return Assigned(share, examples.team)


def reduce(estimation: Estimation, team: Team) -> None:
    """Have the estimate of every rank be that of what all ranks have seen."""
    if isinstance(estimation, OfProducts):
        made = estimation.fresh()
        for rank, seen in enumerate(team.exchange(estimation.seen)):
            one = estimation.fresh()
            one.load(team.share(estimation.plain(), rank, estimation.source.device))
            if seen:
                made.absorb(one)
        uninterrupted(estimation.load, made.plain())
        return
    assert isinstance(estimation, OfJacobians)
    bases = {k: refinement.basis for k, refinement in estimation.refinements.items()}
    notes = [(k, checksum(basis.tensors())) for k, basis in bases.items()]
    told = team.exchange((notes, estimation.seen, estimation.position))
    with_data = [(rank, of) for rank, (of, seen, _) in enumerate(told) if seen]
    if not with_data:
        return
    if any(of != with_data[0][1] for _, of in with_data):
        raise ValueError(
            "reduce: the ranks have second moments in different bases, so they have no exact sum: give the accumulator "
            "its process_group when it is made, by which all ranks have one basis"
        )
    owner, those = with_data[0]
    refinements = dict(estimation.refinements)
    for k, _ in those:
        state = team.share(bases[k].state() if team.rank == owner else None, owner, estimation.source.device)
        if k not in refinements:
            refinements[k] = _refinement(estimation.estimators[k], Block.from_state(state))
    every = dict(enumerate(estimation.estimators))
    later = {k: refinement.later for k, refinement in refinements.items()}
    own = estimation.sums.mapped(Tensor.clone).settled()
    outlines = team.exchange(outline(own))
    new = merged(team, own, estimation, every, later, outlines)
    uninterrupted(estimation.replace, new, refinements, max(position for *_, position in told))


def _refinement(estimator: Estimator, basis: Block) -> Refinement:
    assert estimator.refine is not None
    return estimator.refine(basis)


class _Ahead:
    """Minibatches with their positions, and whether there are more. left: how many, if that is known; otherwise one is
    read ahead.
    """

    def __init__(self, items: Iterator[Placed], left: int | None) -> None:
        self._items = items
        self._left = left
        self._next: list[Placed] | None = None
        #: Behind the last one.
        self.end = 0

    def more(self) -> bool:
        """Whether there are more."""
        if self._left is None:
            return self._another()
        if self._left == 0:
            next(self._items, None)  # it ends
        return self._left > 0

    def _another(self) -> bool:
        if self._next is None:
            self._next = [item] if (item := next(self._items, None)) is not None else []
        return bool(self._next)

    def take(self, most: int | None) -> Iterator[Placed]:
        """The next ones, as many as there are."""
        taken = 0
        while (most is None or taken < most) and self._another():
            assert self._next is not None
            self._left = None if self._left is None else self._left - 1
            (item,), self._next = self._next, None
            self.end = item[0] + 1
            taken += 1
            yield item


class _Work:
    """How far a reading has come, which is written to its file after every few minibatches.

    stage: which pass. done: how many minibatches were seen in it by all ranks. share: the minibatches. saved: what
    there was in the file.
    """

    def __init__(self, reading: Reading, source: Source, seen: float) -> None:
        self.reading = reading
        self.team = reading.team
        self.source = source
        self.share: Share = reading.begin(source, seen)
        self.stage = self.done = 0
        self._mark: int | None = None
        self.saved: dict[str, Any] | None = None
        if reading.checkpoint is None:
            return
        notes = self.team.exchange(self.share.note())
        self.identity = {k: v for k, v in reading.identity(source, seen).items() if k != "checkpoint"}
        self.identity["data"] = notes[0] if self.share.strided else [self.team.size, *notes]
        path = reading.checkpoint.path
        found = self.team.attempt(lambda: file.read(path, self.identity) if self.team.rank == 0 else None)[0]
        self.saved = self.team.share(found, 0, torch.device("cpu"))
        if self.saved is not None:
            self.stage, self.done, self._mark = (self.saved[name] for name in ("stage", "done", "mark"))
            self.share = self.share.reordered(self.saved["order"])

    def segments(self, of: Callable[[Segment], Any], merge: Callable[[list[Any]], None]) -> int:
        """All minibatches that are left, so many at a time that the file is written after, and the position behind the
        last one.

        of: what is done with those of this rank, and what it says of that. merge: what all ranks said, after which all
        have the same.
        """
        team, place = self.team, self.reading.checkpoint
        every = None if place is None else place.every
        ahead = _Ahead(self._shown(), self.share.left(self.done))

        def work(again: bool) -> Any:
            begun = ahead.more()
            if not again and self._mark is not None and self.share.mark(self.done) != self._mark:
                raise ValueError(
                    "checkpoint: the loader gives other minibatches than when the file was written, so it cannot go on "
                    "from there: give the same data, or delete the file to begin anew"
                )
            noted = of(Segment(ahead.take(every), team)) if begun or self.team.size > 1 else None
            return noted, ahead.more(), ahead.end, self.share.mark(2**62)

        again = False
        while True:
            told = team.attempt(lambda again=again: work(again), lambda found: found)[1]  # type: ignore[misc]
            merge([noted for noted, *_ in told])
            end = max(there for _, _, there, _ in told)
            if not any(more for _, more, *_ in told):
                break
            assert every is not None
            self.done += every * team.size
            self.write(self.share.mark(self.done))
            again = True
        if len({mark for *_, mark in told}) > 1:
            raise ValueError(
                "loader: it does not give the same minibatches on all ranks, so shard() cannot share it out: pass the "
                "same loader on every rank, or each rank's own minibatches without shard()"
            )
        if end == 0 and self.done == 0:
            raise ValueError("the loader yielded no minibatch on any rank: it is empty")
        return end

    def _shown(self) -> Iterator[Placed]:
        count, size = self.share.count(), self.team.size
        verbose = bool(getattr(self.source, "verbose", False)) and self.team.rank == 0
        name = type(getattr(self.source, "model", self)).__name__
        total = None if count is None else -(-count // size)
        return iter(data.progress(self.share.read(self.done), verbose, name, total, self.done // size))

    def state(self) -> dict[str, Any]:
        """What else is written: of a subclass."""
        raise NotImplementedError

    def write(self, mark: int | None = None) -> None:
        """Write the file: by rank 0."""
        if (place := self.reading.checkpoint) is None:
            return
        self._mark = mark
        plain = {
            "stage": self.stage,
            "done": self.done,
            "mark": mark,
            "order": self.share.order(),
            **self.state(),
        }
        self.team.attempt(lambda: file.write(place.path, self.identity, plain) if self.team.rank == 0 else None)

    def finish(self) -> None:
        """Remove the file, or write it for the last time."""
        if (place := self.reading.checkpoint) is None:
            return
        if place.keep:
            self.write()
        elif self.team.rank == 0:
            file.remove(place.path)


class _Passes(_Work):
    """One or two passes over the examples for blocks that are made of Jacobians."""

    def __init__(self, estimation: OfJacobians, reading: Reading, last: bool) -> None:
        self.estimation = estimation
        self.last = last
        self.first_time = estimation.seen == 0 and not estimation.refinements
        every = enumerate(estimation.estimators)
        self.again = [k for k, e in every if e.refine is not None] if self.first_time else []
        if self.again:
            data.require_repeatable(reading.loader, "this representation")
        super().__init__(reading, estimation.source, estimation.seen)
        self.refinements = dict(estimation.refinements)
        self.sums = Sums.nothing(len(estimation.estimators))
        #: The position of the first minibatch, and behind the last one, in the random draws.
        self.first = self.team.exchange(estimation.position)[0]
        self.end = 0
        if self.saved is not None:
            self._restore(self.saved)

    def _restore(self, saved: dict[str, Any]) -> None:
        device = self.estimation.source.device
        self.first, self.end = saved["first"], saved["end"]
        self.sums = Sums.of_plain(saved["sums"]).mapped(lambda t: t.to(device, copy=True))
        for k, state in saved["bases"].items():
            basis = Block.from_state(state).map(lambda t: t.to(device))
            self.refinements[k] = _refinement(self.estimation.estimators[k], basis)

    def state(self) -> dict[str, Any]:
        bases = {k: r.basis.state() for k, r in self.refinements.items()} if self.again else {}
        return {"first": self.first, "end": self.end, "bases": bases, "sums": self.sums.plain()}

    def run(self) -> None:
        """All that is left of it."""
        every: Estimators = dict(enumerate(self.estimation.estimators))
        if self.stage == 0:
            self._pass(every, {} if self.again else {k: r.later for k, r in self.refinements.items()})
            self.stage, self.done = (1 if self.again else 2), 0
            if self.again:
                self._refine()
                self.write()
        if self.stage == 1:
            self._pass({}, {k: self.refinements[k].first for k in self.again}, count=False)
            self.stage = 2
        uninterrupted(self.estimation.include, self.sums, self.refinements, self.first + self.end)
        self.finish()

    def _pass(self, estimators: Estimators, refining: Estimators, count: bool = True) -> None:
        alone = self.team.size == 1

        def of(segment: Segment) -> Any:
            self._part = self.sums if alone else Sums.nothing(len(self.estimation.estimators))
            self.estimation.observe(segment, self._part, estimators, refining, count, self.first)
            return None if alone else outline(self._part)

        def merge(outlines: list[Any]) -> None:
            if not alone:
                new = merged(self.team, self._part, self.estimation, estimators, refining, outlines)
                self.sums = joined(self.sums, new, estimators, refining)

        end = self.segments(of, merge)
        self.end = end if count else self.end

    def _refine(self) -> None:
        """The eigenbases, each found by one rank, which tells the others."""
        e, team = self.estimation, self.team
        owners = owners_of([_cost(e.estimators[k]) for k in self.again], team.size)
        mine = [k for k, owner in zip(self.again, owners, strict=True) if owner == team.rank]
        found = team.attempt(lambda: {k: e.refined(k, self.sums, self.last) for k in mine})[0]
        with no_grad():
            for k, owner in zip(self.again, owners, strict=True):
                if team.size == 1:
                    self.refinements[k] = found[k]
                    continue
                state = team.share(found[k].basis.state() if k in found else None, owner, e.source.device)
                self.refinements[k] = _refinement(e.estimators[k], Block.from_state(state))
        if self.last:
            for k in self.again:
                self.sums.states[k] = None


def _cost(estimator: Estimator) -> float:
    """Of a decomposition, the third power of its size."""
    groups, rows, cols = estimator.packing.shape
    return groups * (float(rows) ** 3 + float(cols) ** 3)


class _Products(_Work):
    """The entries of a matrix that is known by its products, a few minibatches at a time."""

    def __init__(self, estimation: OfProducts, reading: Reading) -> None:
        super().__init__(reading, estimation.source, estimation.seen)
        self.estimation = estimation
        self.made = estimation.fresh()
        if self.saved is not None:
            self.made.load(self.saved["seen"])

    def state(self) -> dict[str, Any]:
        return {"seen": self.made.plain()}

    def run(self) -> None:
        """All that is left of it."""
        if self.stage == 0:
            self.segments(self._hold, lambda told: self.made.update(self._held))
            self.stage = 2
        uninterrupted(self.estimation.absorb, self.made)
        self.finish()

    def _hold(self, segment: Segment) -> None:
        self._held = Segment(list(segment.some), self.team)


def _of_products(estimation: OfProducts, reading: Reading) -> None:
    if reading.checkpoint is not None:
        _Products(estimation, reading).run()
        return
    data.require_repeatable(reading.loader, "a matrix known by its products")
    estimation.update(Assigned(reading.begin(estimation.source, estimation.seen), reading.team))
