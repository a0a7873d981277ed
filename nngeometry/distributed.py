"""Who of several processes has which minibatches.

Every rank calls the same constructors with ``process_group=`` and its own minibatches, and has the same matrix:

    loader = shard(loader, group)  # or a loader with a DistributedSampler
    F = FIM(model, loader, PMatKFAC, process_group=group)
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Sequence
from itertools import islice
from typing import Any

import torch
from torch.utils.data import BatchSampler, DataLoader, DistributedSampler, IterableDataset

from .identity import of_batch
from .model import data
from .owners import decompose as decompose
from .team import Team

#: A minibatch with its position among those of all ranks.
Placed = tuple[int, data.Batch]


def shard(loader: Any, process_group: Any) -> Shard:
    """The minibatches of a loader that are one rank's: whole ones, i on the rank ``i mod world``, each with the
    position that it has in the loader, so that FIM_MonteCarlo draws what one process would draw.

    Of a DataLoader with a sampler, the order is that of rank 0 on all ranks, also of a shuffling one, and a rank reads
    its own minibatches alone. Of a list nothing is read. Everything else that can be iterated is read by every rank as
    a whole. A rank for which there is no minibatch left takes part with nothing.

    Args:
        loader: A DataLoader or a list of minibatches, or whatever can be iterated again: the same on every rank.
        process_group: A process group of ``torch.distributed``.

    Returns:
        What every argument for a loader takes, with the same ``process_group=``. It can be iterated too, by all ranks
        together.

    Raises:
        TypeError: For what is no loader.
        ValueError: For a one-pass iterator, a loader with a DistributedSampler, or a group that is not initialised.

    Example:
        >>> import torch.distributed as dist
        >>> store = dist.HashStore()
        >>> dist.init_process_group("gloo", store=store, rank=0, world_size=1)
        >>> batches = [(torch.randn(8, 4),), (torch.randn(5, 4),)]
        >>> [len(x) for (x,) in shard(batches, dist.group.WORLD)]
        [8, 5]
        >>> dist.destroy_process_group()
    """
    team = Team(process_group)
    if process_group is None:
        raise ValueError("shard: give a process_group: None is no group (is torch.distributed initialised?)")
    if isinstance(loader, Shard):
        raise ValueError("shard: these minibatches are those of one rank already: pass them as they are")
    if sampler_of(loader) is not None:
        raise ValueError(
            "shard: the loader has a DistributedSampler, by which its minibatches are those of one rank already: pass "
            "it as it is, or a loader without that sampler"
        )
    data.require_loader(loader)
    if isinstance(loader, Iterator):
        raise ValueError("shard: a one-pass iterator cannot be shared out: pass a DataLoader or a list of minibatches")
    return Shard([loader] if data.is_minibatch(loader) else loader, team)


class Shard:
    """The minibatches of one rank: see :func:`shard`."""

    def __init__(self, loader: Any, team: Team) -> None:
        self.loader = loader
        self.team = team

    def __iter__(self) -> Iterator[data.Batch]:
        return (batch for _, batch in share_of(self, self.team).read(0))

    def __len__(self) -> int:
        return len(range(self.team.rank, len(self.loader), self.team.size))


def sampler_of(loader: Any) -> DistributedSampler[Any] | None:
    """The DistributedSampler of a loader, if it has one that gives it but a part of the data."""
    batch_sampler = getattr(loader, "batch_sampler", None)
    for found in (getattr(loader, "sampler", None), batch_sampler, getattr(batch_sampler, "sampler", None)):
        if isinstance(found, DistributedSampler) and found.num_replicas > 1:
            return found
    return None


def require_whole(loader: Any, name: str = "loader") -> None:
    """Raise ``ValueError`` for one rank's minibatches, where nothing will add those of the others."""
    found = "comes from shard()" if isinstance(loader, Shard) and loader.team.size > 1 else None
    if sampler_of(loader) is not None:
        found = "has a DistributedSampler"
    if found:
        raise ValueError(
            f"{name}: it {found}, so it holds one rank's part of the data, and what is made of it would pass for that "
            "of all: pass process_group=torch.distributed.group.WORLD (the group), or a loader of all data"
        )


# The minibatches of a rank in the order in which they come


class Share(ABC):
    """The minibatches of one rank, in an order that stays the same however often they are read.

    team: the ranks. strided: whether every rank could read all of them, so that they can be shared out anew.
    """

    team: Team
    strided: bool = True

    @abstractmethod
    def read(self, start: int) -> Iterator[Placed]:
        """Those of this rank among the minibatches of all from position ``start`` on."""

    def count(self) -> int | None:
        """How many minibatches there are on all ranks, if that is known."""
        return None

    def left(self, start: int) -> int | None:
        """How many of these :meth:`read` gives, if that is known."""
        count = self.count()
        return None if count is None else len(range(start + self.team.rank, count, self.team.size))

    def length(self) -> int | None:
        """How many minibatches this rank has, if that is known."""
        return self.left(0)

    def note(self) -> Any:
        """What tells these data from others, as far as that is known before they are read."""
        return None

    def order(self) -> Any:
        """The order in which they come, where it is drawn: for :meth:`reordered`."""
        return None

    def reordered(self, order: Any) -> Share:
        """The same in the order of another time."""
        return self

    def mark(self, position: int) -> int | None:
        """A number that stands for the minibatches before a position, where they were read."""
        return None

    @staticmethod
    def note_of(batches: Sequence[data.Batch]) -> list[int]:
        """:meth:`note` of a list of minibatches."""
        total = 0
        for batch in batches:
            total = of_batch(batch, total)
        return [len(batches), total]


class _Listed(Share):
    """Of a list of minibatches that every rank has."""

    def __init__(self, loader: Sequence[data.Batch], team: Team) -> None:
        self.loader = loader
        self.team = team

    def read(self, start: int) -> Iterator[Placed]:
        for k in range(start + self.team.rank, len(self.loader), self.team.size):
            yield k, self.loader[k]

    def count(self) -> int:
        return len(self.loader)

    def note(self) -> Any:
        return self.note_of(self.loader)


class _Indexed(Share):
    """Of a DataLoader, by the indices of each minibatch.

    batches: those of all minibatches, in order.
    """

    def __init__(self, loader: DataLoader[Any], batches: list[Any], team: Team) -> None:
        self.loader = loader
        self.batches = batches
        self.team = team

    def read(self, start: int) -> Iterator[Placed]:
        those = range(start + self.team.rank, len(self.batches), self.team.size)
        return zip(those, data.drawn(loader_of(self.loader, [self.batches[k] for k in those])), strict=True)

    def count(self) -> int:
        return len(self.batches)

    def order(self) -> Any:
        return self.batches

    def reordered(self, order: Any) -> Share:
        return _Indexed(self.loader, order, self.team)

    def note(self) -> Any:
        first = [_first_of(self.loader, self.batches) for _ in range(2)]
        return [len(self.loader.dataset), len(self.batches), first[0] if first[0] == first[1] else None]  # type: ignore[arg-type]


class _Streamed(Share):
    """Of whatever can be iterated: every rank reads it as a whole."""

    def __init__(self, loader: Iterable[data.Batch], team: Team) -> None:
        self.loader = loader
        self.team = team
        #: Of all that was read up to each minibatch.
        self._checksums: list[int] = []

    def read(self, start: int) -> Iterator[Placed]:
        self._checksums = [0]
        for k, batch in enumerate(data.drawn(self.loader)):
            self._checksums.append(of_batch(batch, self._checksums[-1]))
            if k >= start and (k - start) % self.team.size == self.team.rank:
                yield k, batch

    def mark(self, position: int) -> int | None:
        return self._checksums[min(position, len(self._checksums) - 1)]

    def note(self) -> Any:
        return [of_batch(batch) for batch in islice(data.drawn(self.loader), 1)]


class _Own(Share):
    """What every rank has for itself: its k-th minibatch is at ``rank + k world``."""

    strided = False

    def __init__(self, loader: Iterable[data.Batch], team: Team) -> None:
        self.loader = loader
        self.team = team

    def read(self, start: int) -> Iterator[Placed]:
        for k, batch in enumerate(data.drawn(self.loader)):
            position = self.team.rank + k * self.team.size
            if position >= start:
                yield position, batch

    def length(self) -> int | None:
        return len(self.loader) if isinstance(self.loader, list | tuple) else None

    def note(self) -> Any:
        return self.note_of(self.loader) if isinstance(self.loader, list | tuple) else None


class _Cut(_Own):
    """Of a DataLoader with a DistributedSampler, without the copies that fill up its last round.

    batches: the indices of each minibatch of this rank.
    """

    def __init__(self, loader: DataLoader[Any], batches: list[Any], team: Team) -> None:
        super().__init__(loader, team)
        self.whole = loader
        self.batches = batches

    def read(self, start: int) -> Iterator[Placed]:
        positions = [self.team.rank + k * self.team.size for k in range(len(self.batches))]
        those = [k for k, position in enumerate(positions) if position >= start]
        found = data.drawn(loader_of(self.whole, [self.batches[k] for k in those]))
        return zip([positions[k] for k in those], found, strict=True)


def share_of(loader: Any, team: Team) -> Share:
    """The minibatches of this rank. It is called by all ranks together.

    Raises:
        ValueError: If the loader cannot be shared out, or holds another rank's part.
    """
    if isinstance(loader, Shard):
        if (loader.team.rank, loader.team.size) != (team.rank, team.size):
            raise ValueError(
                f"loader: it was shared out among {loader.team.size} ranks, as rank {loader.team.rank}, but the "
                f"process group has {team.size}, of which this is rank {team.rank}: give shard() the same group"
            )
        return _shared(loader.loader, team)
    if team.size == 1:
        return _shared([loader] if data.is_minibatch(loader) else loader, team)
    sampler = sampler_of(loader)
    if sampler is not None:
        if (sampler.rank, sampler.num_replicas) != (team.rank, team.size):
            raise ValueError(
                f"loader: its DistributedSampler is for rank {sampler.rank} of {sampler.num_replicas}, but this is "
                f"rank {team.rank} of the {team.size} of the process group: make it with num_replicas={team.size} and "
                f"rank={team.rank}"
            )
        return _without_copies(loader, sampler, team)
    return _Own([loader] if data.is_minibatch(loader) else loader, team)


def everything(loader: Any, team: Team, what: str) -> Any:
    """A loader that gives all minibatches on every rank, in one order, where each needs all of them.

    Raises:
        ValueError: If it holds one rank's part.
    """
    if isinstance(loader, Shard):
        loader = loader.loader
    if sampler_of(loader) is not None:
        raise ValueError(
            f"{what}: every rank needs all minibatches, but the loader has a DistributedSampler: pass one without it, "
            "the same on every rank, of which the work is shared out"
        )
    if team.size > 1 and _by_index(loader):
        return loader_of(loader, team.exchange(_indices(loader) if team.rank == 0 else None)[0])
    return loader


def require_same(team: Team, batches: Sequence[data.Batch], what: str) -> None:
    """Raise ``ValueError`` unless all ranks have the same minibatches."""
    notes = team.exchange(Share.note_of(batches) if team.size > 1 else None)
    for rank, note in enumerate(notes):
        if note != notes[0]:
            raise ValueError(
                f"{what}: rank {rank} has other minibatches than rank 0: pass the same loader on every rank, of which "
                "the work is shared out"
            )


def _shared(loader: Any, team: Team) -> Share:
    if isinstance(loader, list | tuple):
        return _Listed(loader, team)
    if _by_index(loader):
        own = _indices(loader) if team.rank == 0 else []
        return _Indexed(loader, team.exchange(own)[0], team)
    return _Streamed(loader, team)


def _by_index(loader: Any) -> bool:
    """Whether minibatches of a loader can be asked for by their indices."""
    return (
        isinstance(loader, DataLoader)
        and type(loader).__iter__ is DataLoader.__iter__
        and not isinstance(loader.dataset, IterableDataset)
    )


def _indices(loader: DataLoader[Any]) -> list[Any]:
    """The indices of all minibatches, drawn as the loader draws them."""

    def drawn() -> Iterator[Any]:
        torch.empty((), dtype=torch.int64).random_(generator=loader.generator)  # as it does for its workers
        yield from loader.sampler if loader.batch_sampler is None else loader.batch_sampler

    return list(data.drawn(drawn()))


def loader_of(loader: DataLoader[Any], batches: list[Any]) -> DataLoader[Any]:
    """A DataLoader of some minibatches of another one, by their indices."""
    options: dict[str, Any] = {"batch_sampler": batches}
    if loader.batch_sampler is None:
        options = {"sampler": batches, "batch_size": None}
    if loader.num_workers > 0:
        options["prefetch_factor"] = loader.prefetch_factor
    return DataLoader(
        loader.dataset,
        num_workers=loader.num_workers,
        collate_fn=loader.collate_fn,
        pin_memory=loader.pin_memory,
        timeout=loader.timeout,
        worker_init_fn=loader.worker_init_fn,
        multiprocessing_context=loader.multiprocessing_context if loader.num_workers > 0 else None,
        generator=loader.generator,
        **options,
    )


def _first_of(loader: DataLoader[Any], batches: list[Any]) -> int | None:
    """The checksum of the first minibatch in the order of the data set, drawn from one seed."""

    def made() -> Iterator[data.Batch]:
        torch.manual_seed(0)
        yield loader.collate_fn([loader.dataset[0]] if loader.batch_sampler is not None else loader.dataset[0])

    if not batches:
        return None
    try:
        return of_batch(next(iter(data.drawn(made()))))
    except Exception:  # a data set whose keys are not numbers
        return None


def _without_copies(loader: Any, sampler: DistributedSampler[Any], team: Team) -> Share:
    """A loader with a DistributedSampler, whose copies would count twice."""
    size = len(sampler.dataset)  # type: ignore[arg-type]
    if sampler.drop_last or size % team.size == 0:
        return _Own(loader, team)
    plain = type(sampler) is DistributedSampler and _by_index(loader)
    if not plain or type(loader.batch_sampler) not in (BatchSampler, type(None)):
        raise ValueError(
            f"loader: its DistributedSampler fills up {size} examples for {team.size} ranks with copies, which would "
            "count twice: make it with drop_last=True, which leaves some examples out, or use "
            "nngeometry.distributed.shard(loader, process_group) of a loader without it"
        )
    batches = _indices(loader)
    own = len(range(team.rank, size, team.size))
    cut: list[Any] = []
    for batch in batches:
        if loader.batch_sampler is None:
            cut += [batch] if len(cut) < own else []
        else:
            kept = batch[: max(0, own - sum(map(len, cut)))]
            cut += [kept] if kept else []
    return _Cut(loader, cut, team)


def require_apart(notes: Sequence[Any]) -> None:
    """Raise ``ValueError`` if two ranks have the same data. notes: of what every rank has for itself."""
    for k, note in enumerate(notes):
        if note is not None and note[0] and note in notes[:k]:
            raise ValueError(
                f"loader: the ranks {notes.index(note)} and {k} have the same minibatches, which would count twice: "
                "pass nngeometry.distributed.shard(loader, process_group), by which every rank has its own"
            )


def peek(loader: Any) -> Any:
    """What tells that a DataLoader gives all of its data set, so that two ranks with the same would count it twice."""
    if not _by_index(loader) or sampler_of(loader) is not None:
        return None
    everything = (torch.utils.data.SequentialSampler, torch.utils.data.RandomSampler)
    sampler = loader.sampler
    if type(sampler) not in everything or len(sampler) != len(loader.dataset):
        return None
    first = [_first_of(loader, [0]) for _ in range(2)]
    return [len(loader.dataset), first[0]] if first[0] is not None and first[0] == first[1] else None
