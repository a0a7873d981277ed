"""Decompositions of a matrix, each made by one of several processes, which tells the others."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, TypeVar

from .changes import no_grad
from .identity import checksum
from .team import Team

#: A PMat or a list of blocks, which are upstairs.
M = TypeVar("M", bound=Any)


def decompose(matrix: M, process_group: Any) -> M:
    """The same matrix with the eigendecompositions at hand by which ``solve``, ``inv``, ``eig``, ``pow``,
    ``logdet`` and ``sample`` work. Each rank makes some of them, and has the others from those who made them.

    A dense block, or a factor of a Kronecker product, of size d takes d^3 operations: the largest come first, each goes
    to the rank that has the least to do. What one rank has found is sent by one broadcast. Blocks that need no
    decomposition, and matrices known by their products, are as they are. All ranks call this together.

    Args:
        matrix: A PMat that all ranks have, or a list of blocks.
        process_group: A process group of ``torch.distributed``; None for this process alone.

    Returns:
        Of a PMat the same representation with the same entries, of blocks a list of the same blocks.

    Raises:
        ValueError: If the ranks have different matrices.
        RuntimeError: If a decomposition fails on another rank.

    Example:
        >>> import torch, torch.distributed as dist
        >>> from nngeometry import FIM, PMatKFAC, PVector
        >>> dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
        >>> model = torch.nn.Linear(4, 3)
        >>> F = FIM(model, [(torch.randn(8, 4),)], PMatKFAC, variant="classif_logits")
        >>> F = decompose(F, dist.group.WORLD)
        >>> F.solve(PVector.from_model(model), regul=0.1).to_torch().shape
        torch.Size([15])
        >>> dist.destroy_process_group()
    """
    team = Team(process_group)
    if isinstance(matrix, list):
        return _decomposed(matrix, team)  # type: ignore[return-value]
    (root,) = _decomposed([matrix.root], team)
    made: M = matrix._rebuild(root)
    return made


def _decomposed(blocks: list[Any], team: Team) -> list[Any]:
    statistics = [block.statistics() for block in blocks]
    those = [one for of_one in statistics for one in of_one]
    todo = [k for k, one in enumerate(those) if one.work]
    owners = owners_of([those[k].work for k in todo], team.size)

    def work() -> dict[int, Any]:
        return {k: those[k].eig() for k, owner in zip(todo, owners, strict=True) if owner == team.rank}

    with no_grad():
        marks = team.exchange(checksum(t for k in todo for t in those[k].tensors())) if team.size > 1 else [0]
        if any(mark != marks[0] for mark in marks):
            raise ValueError(
                "decompose: the ranks have different matrices: make it on all of them with the same process_group=, by "
                "which they have the same"
            )
        mine = team.attempt(work)[0]
        for rank in range(team.size):
            own = [k for k, owner in zip(todo, owners, strict=True) if owner == rank]
            if not own:
                continue
            if rank == team.rank:
                team.share([mine[k].state() for k in own], rank, those[own[0]].device)
                found = [mine[k] for k in own]
            else:
                states = team.share(None, rank, those[own[0]].device)
                found = [those[k].from_state(state) for k, state in zip(own, states, strict=True)]
            for k, eig in zip(own, found, strict=True):
                those[k] = those[k].with_eig(eig)
    remaining = iter(those)
    return [
        block.with_statistics([next(remaining) for _ in of_one])
        for block, of_one in zip(blocks, statistics, strict=True)
    ]


def owners_of(costs: Sequence[float], size: int) -> list[int]:
    """Who does which of some works: the largest first, each by who has least to do."""
    load = [0.0] * size
    owners = [0] * len(costs)
    for k in sorted(range(len(costs)), key=lambda k: -costs[k]):
        owners[k] = load.index(min(load))
        load[owners[k]] += costs[k]
    return owners
