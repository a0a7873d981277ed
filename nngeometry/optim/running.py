"""The matrix that an optimiser uses: the running one, whose blocks are taken into use at different times."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Mapping
from copy import deepcopy
from typing import Any

import torch
from torch import Tensor, nn

from ..accumulator import Accumulator
from ..blocks import Block, DirectSum, Part, Regul, Solver
from ..blocks.base import Map
from ..changes import no_grad
from ..object.pmat import PMat, RegulLike
from ..owners import decompose
from .refresh import Memory, Refresh


class Running:
    """A running matrix, and the one in use, made of blocks of it that a policy of refreshing takes.

    What is observed counts from the next :meth:`commit` on, or is dropped.

    Args:
        matrix: As of :class:`~nngeometry.Accumulator`, and so are model, representation and options.
        decay: The weight of the running average when a minibatch is observed, 0.95 by default; 0 takes the last alone.
        refresh: When blocks are made anew.
        absolute: Whether the absolute values of their eigenvalues are used.
        factored: Whether what is added to the diagonal is shared among factors.
    """

    def __init__(
        self,
        matrix: Callable[..., Any],
        model: nn.Module,
        representation: Any,
        *,
        decay: float,
        refresh: Refresh,
        absolute: bool,
        factored: bool,
        **options: Any,
    ) -> None:
        self._running = Accumulator(matrix, model, representation, **options)
        if decay and not getattr(self._running.estimation.source, "mean", True):
            raise ValueError(
                "loss: it is a sum over examples, whose running matrix grows with all that was observed while its "
                'gradient does not: use a mean (reduction="mean"), for the step as well, or decay=0'
            )
        self._ahead: Accumulator | None = None
        self._decay, self._refresh = decay, refresh
        self._absolute, self._factored = absolute, factored
        self._parts: list[Part] = []
        self._memories: list[Memory] = []
        #: Of each block, whether something was observed since it was looked at.
        self._new: list[bool] = []
        self._matrix: PMat | None = None
        self._solver: tuple[PMat, Any, Solver] | None = None
        self._told = False
        #: How often a block was used in a step, and how often one was decomposed.
        self.steps, self.decomposed = 0, 0.0

    @property
    def accumulator(self) -> Accumulator:
        """The running matrix, with what was observed and not committed."""
        if self._ahead is None:
            return self._running
        return deepcopy(self._running).decay(self._decay).take(deepcopy(self._ahead))

    @property
    def matrix(self) -> PMat | None:
        """The matrix in use, None before the first."""
        return self._matrix

    @property
    def groups(self) -> list[tuple[str, ...]]:
        """The layers of each block, once there are blocks."""
        return self._running.estimation.groups if self._parts else []

    @property
    def memories(self) -> list[Memory]:
        """What the policy of refreshing remembers of each block."""
        return self._memories

    def observe(self, examples: Any) -> None:
        """Fold in a minibatch, or another one of the same step."""
        ahead = self._running.ahead() if self._ahead is None else self._ahead
        self._ahead = ahead.update(examples)

    def drop(self) -> None:
        """Forget what was observed and not committed."""
        self._ahead = None

    def commit(self) -> None:
        """Have what was observed count."""
        if self._ahead is not None:
            self._running.decay(self._decay).take(self._ahead)
            self._ahead = None
            self._new = [True] * len(self._parts)

    def renew(self, step: int) -> None:
        """Take into use the blocks that are due in a step."""
        if not self._parts:
            if self._running.n == 0:
                return
            count = len(self._running.estimation.groups)
            self._memories, self._new = [{} for _ in range(count)], [True] * count
        parts = list(self._parts)
        due = [
            k
            for k, memory in enumerate(self._memories)
            if self._new[k] and (not self._parts or self._refresh.due(step, memory))
        ]
        for k, statistic in zip(due, self._statistics(due), strict=True):
            part, decomposed = self._renewed(k, statistic, step, self._memories[k])
            parts[k : k + 1] = [part]
            self._new[k] = False
            self.decomposed += decomposed
        self.steps += len(parts)
        if not self._parts or any(a is not b for a, b in zip(parts, self._parts, strict=True)):
            self._take(parts)

    def _take(self, parts: list[Part]) -> None:
        self._parts = parts
        self._matrix = self._running.made_of(DirectSum(tuple(parts)))

    def _statistics(self, due: list[int]) -> Iterator[Block]:
        """What decompositions of blocks are of. Of several processes each makes some of the decompositions, unless they
        are not made from scratch.
        """
        group, estimation = self._running.process_group, self._running.estimation
        if group is None or self._factored or (self._refresh.spectral and self._parts):
            return map(estimation.statistic, due)
        with no_grad():
            return iter(decompose([estimation.statistic(k) for k in due], group))

    def _renewed(self, k: int, statistic: Block, step: int, memory: Memory) -> tuple[Part, float]:
        """One block as it is to be used from now on, and the share of it that was decomposed anew."""
        estimation = self._running.estimation
        basis = getattr(self._parts[k].block, "basis", None) if self._parts else None
        with no_grad():
            if not estimation.refines(k):
                part = estimation.part(k)
                block, decomposed = self._refresh.renew(statistic, basis, step, memory)
            else:
                found, decomposed = self._refresh.renew(statistic, basis, step, memory)
                turned = found.eig().basis  # type: ignore[attr-defined]
                if self._parts and turned is not basis:  # at first the basis is that of what was seen
                    estimation.refine(k, turned)
                part = estimation.part(k)
                block = part.block
            block = block.absolute() if self._absolute else block
            return part.with_block(block if self._factored else block.decomposed()), decomposed

    def solve(self, g: Tensor, regul: RegulLike) -> Tensor:
        """``(M + regul)^-1 g`` for the flat gradient, as :meth:`PMat.solve` gives it."""
        assert self._matrix is not None
        if self._solver is None or self._solver[0] is not self._matrix or self._solver[1] != regul:
            before = None if self._solver is None else self._solver[2]
            made = self._matrix.solver(regul, before=before, make_ready=self._ready)
            self._solver = self._matrix, regul, made
        return self._solver[2](g)

    def _ready(self, k: int, block: Block, regul: Regul) -> Map:
        names = ", ".join(map(repr, self._running.estimation.groups[k]))
        try:
            regul.check_positive(block)
        except ValueError as error:
            raise ValueError(
                f"step: the matrix of layer {names} is indefinite: {error}: use more damping, absolute=True, GGN "
                "instead of a Hessian, or PMatDiag instead of PMatQuasiDiag"
            ) from error
        try:
            return regul.solver_by_factors(block) if self._factored else regul.solver(block)
        except ValueError as error:
            if not bool(torch.as_tensor(regul.shift > 0).all()):
                raise ValueError(f"step: the matrix of layer {names} is singular: {error}: use some damping") from error
        if not self._told:
            self._told = True
            warnings.warn(
                f"the damping is below what {block.dtype} resolves of the matrix of layer {names}: eigenvalues that "
                "are lost in rounding count as large as that; use more damping, or float64",
                stacklevel=2,
            )
        return regul.solver(block.lifted())

    def state_dict(self) -> dict[str, Any]:
        """All of it, as tensors and plain values."""
        return {
            "running": self._running.state_dict(),
            "ahead": None if self._ahead is None else self._ahead.state_dict(),
            "used": DirectSum(tuple(self._parts)).state() if self._parts else None,
            "memories": [{name: _plain(value) for name, value in memory.items()} for memory in self._memories],
            "new": list(self._new),
            "steps": self.steps,
            "decomposed": self.decomposed,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Be what :meth:`state_dict` says."""
        self._running.load_state_dict(state["running"])
        ahead = state["ahead"]
        self._ahead = None if ahead is None else self._running.ahead().load_state_dict(ahead)
        self._memories = [{name: self._of_plain(v) for name, v in memory.items()} for memory in state["memories"]]
        self._new, self.steps, self.decomposed = list(state["new"]), state["steps"], state["decomposed"]
        self._parts, self._matrix, self._solver = [], None, None
        if state["used"] is not None:
            self._take(list(self._block(state["used"]).parts))  # type: ignore[attr-defined]

    def _of_plain(self, value: Any) -> Any:
        return [self._block(b) if isinstance(b, dict) else b for b in value] if isinstance(value, list) else value

    def _block(self, state: dict[str, Any]) -> Block:
        device = self._running.estimation.source.device
        return Block.from_state(state).map(lambda t: t.to(device, copy=True))


def _plain(value: Any) -> Any:
    return [b.state() if isinstance(b, Block) else b for b in value] if isinstance(value, list) else value
