"""Several processes at one matrix: what they tell each other, by the collectives of ``torch.distributed``."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor
from torch.utils import _pytree as pytree

T = TypeVar("T")
#: What is done to random rows before they are used, None for nothing: several processes take those of one of them.
SENT: ContextVar[Callable[[Tensor], Tensor] | None] = ContextVar("nngeometry_sent", default=None)


class Team:
    """The processes of a group, seen from one of them.

    group: of ``torch.distributed``, None for this process alone. rank: of this process in it. size: how many there are.
    """

    def __init__(self, group: Any = None) -> None:
        self.group = group
        self.rank, self.size = 0, 1
        if group is None:
            return
        if not dist.is_available() or not dist.is_initialized():
            raise ValueError(
                "process_group: torch.distributed is not initialised in this process: call "
                "torch.distributed.init_process_group() first, in a program started by torchrun"
            )
        if group == dist.GroupMember.NON_GROUP_MEMBER:
            raise ValueError(
                "process_group: this process is not in the group: call this on the ranks of the group alone"
            )
        if not isinstance(group, dist.ProcessGroup):
            raise TypeError(
                f"process_group: expected a torch.distributed.ProcessGroup, got a {type(group).__name__}: pass "
                "torch.distributed.group.WORLD, or what torch.distributed.new_group() returns"
            )
        try:
            self.rank, self.size = dist.get_rank(group), dist.get_world_size(group)
        except ValueError as error:  # what was destroyed
            raise ValueError(f"process_group: the group is not initialised ({error}): make it anew") from error

    def exchange(self, value: Any) -> list[Any]:
        """Something small of every rank, by rank."""
        if self.group is None:
            return [value]
        found: list[Any] = [None] * self.size
        dist.all_gather_object(found, value, group=self.group)
        return found

    def attempt(self, work: Callable[[], T], note: Callable[[T], Any] = lambda found: None) -> tuple[T, list[Any]]:
        """What a piece of work gives here, and what every rank notes of its own; where it fails on one rank, all raise.

        Raises:
            RuntimeError: If it failed on another rank, of which it says the first and what it raised.
        """
        if self.group is None:
            return (found := work()), [note(found)]
        error: Exception | None = None
        mine: Any = None
        try:
            done = work()
            mine = note(done)
        except Exception as raised:
            error = raised
        told = self.exchange((None if error is None else _said(error), mine))
        self._raise(error, [problem for problem, _ in told])
        return done, [noted for _, noted in told]

    def add(self, tensor: Tensor) -> Tensor:
        """The sum of a tensor over all ranks, in place: one collective."""
        if self.size > 1:
            sent = tensor.to(self.wire(tensor.device))
            dist.all_reduce(sent, group=self.group)
            if sent is not tensor:
                tensor.copy_(sent)
        return tensor

    def wire(self, device: torch.device) -> torch.device:
        """Where tensors are that the backend of the group can send: the device, or the rank's own one of those that it
        knows, since nccl sends nothing from the memory of the CPU.
        """
        kinds = [pair.split(":")[0] for pair in dist.get_backend_config(self.group).split(",")]
        return device if device.type in kinds else torch.device(kinds[0])

    def summed(self, like: Tensor, work: Callable[[Tensor], float], vectors: Tensor | None = None) -> float:
        """``work(out)`` adds to ``out``, which has the shape of ``like``, and returns a number. The sums of both over
        all ranks, by one collective, which also says whether a rank failed: they are written to ``like`` and returned.

        vectors: what it is a function of, which must be the same on all ranks.

        Raises:
            RuntimeError: If it failed on another rank, or if vectors differ.
        """
        if self.group is None:
            return work(like)
        error: Exception | None = None
        buffer = like.new_zeros(like.numel() + 4)
        mark = 0.0 if vectors is None else _mark(vectors)
        try:
            number = work(buffer[:-4].view(like.shape))
            buffer[-4:] = buffer.new_tensor([number, mark, mark * mark, 0.0])
        except Exception as raised:
            error = raised
            buffer[-1] = 1.0
        self.add(buffer)
        number, mean, square, failed = buffer[-4:].tolist()
        if failed:
            self._raise(error, self.exchange(None if error is None else _said(error)))
        mean, square = mean / self.size, square / self.size
        if square - mean * mean > _SAME:
            raise RuntimeError(
                "process_group: the ranks multiply different vectors with the matrix: give them the same ones (after "
                "torch.manual_seed of the same number, or with generator=torch.Generator().manual_seed(0))"
            )
        like.copy_(buffer[:-4].view(like.shape))
        return number

    def share(self, tree: Any, owner: int, device: torch.device) -> Any:
        """Tensors and plain values of one rank, on all: what there is, and one collective for the tensors.

        device: where they are on the others.
        """
        if self.size == 1:
            return tree
        source = dist.get_global_rank(self.group, owner)
        told = [_outline_of(tree) if self.rank == owner else None]
        dist.broadcast_object_list(told, src=source, group=self.group)
        known, spec = pytree.tree_flatten(told[0])
        leaves = pytree.tree_leaves(tree) if self.rank == owner else list(known)
        stand_ins = [k for k, x in enumerate(known) if isinstance(x, _Like)]
        for dtype in dict.fromkeys(known[k].dtype for k in stand_ins):
            those = [k for k in stand_ins if known[k].dtype == dtype]
            sizes = [known[k].shape.numel() for k in those]
            if self.rank == owner:
                flat = torch.cat([leaves[k].detach().reshape(-1) for k in those])
            else:
                flat = torch.empty(sum(sizes), dtype=dtype, device=device)
            sent = flat.to(self.wire(flat.device))
            dist.broadcast(sent, src=source, group=self.group)
            for k, piece in zip(those, sent.to(flat.device).split(sizes), strict=True):
                leaves[k] = piece.view(known[k].shape)
        return pytree.tree_unflatten(leaves, spec)  # also here, so that all lie in memory alike

    def _raise(self, error: Exception | None, problems: Sequence[str | None]) -> None:
        if error is not None:
            raise error
        for rank, problem in enumerate(problems):
            if problem is not None:
                raise RuntimeError(f"rank {rank} of the process group failed, so all stop: {problem}")


#: How far the mark of vectors may vary between ranks (squared): by rounding on different processors.
_SAME = 1e-5


class _Like:
    """Stands for a tensor."""

    def __init__(self, tensor: Tensor) -> None:
        self.shape, self.dtype = tensor.shape, tensor.dtype


def _outline_of(tree: Any) -> Any:
    return pytree.tree_map(lambda x: _Like(x) if isinstance(x, Tensor) else x, tree)


def _said(error: Exception) -> str:
    return f"{type(error).__name__}: {error}"


def _mark(vectors: Tensor) -> float:
    """A number between -1 and 1 or so that differs where vectors do."""
    v = vectors.detach().flatten()
    weights = torch.cos(torch.arange(1, v.numel() + 1, dtype=v.dtype, device=v.device))
    norm = float(torch.linalg.vector_norm(v))
    return float(weights @ v) / norm if norm else 0.0


def common(value: int, process_group: Any) -> int:
    """The number of rank 0, on all ranks."""
    return int(Team(process_group).exchange(value)[0])


def drawn_seed(generator: torch.Generator | None, process_group: Any) -> int:
    """A seed that a generator, by default torch's global one, has drawn, on rank 0 for all ranks."""
    drawn = torch.randint(2**62, (), generator=generator, device=None if generator is None else generator.device)
    return common(int(drawn), process_group)


@contextmanager
def in_common(team: Team | None) -> Iterator[None]:
    """Inside, random vectors of :mod:`nngeometry.linalg` are those of rank 0."""
    if team is None or team.size == 1:
        yield
        return

    def sent(rows: Tensor) -> Tensor:
        sent = rows.contiguous().to(team.wire(rows.device))
        dist.broadcast(sent, src=dist.get_global_rank(team.group, 0), group=team.group)
        return sent.to(rows.device)

    token = SENT.set(sent)
    try:
        yield
    finally:
        SENT.reset(token)
