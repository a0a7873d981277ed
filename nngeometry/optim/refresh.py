"""When the matrix in use is made anew of the running one: for each of its blocks by itself."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from .. import arguments
from ..blocks import Block, add

#: What a policy remembers of one block: plain values, and lists of blocks.
Memory = dict[str, Any]


class Refresh(ABC):
    """A policy of refreshing, the same for all blocks. It is a value; what it remembers of a block is in ``memory``."""

    #: Whether it looks at eigenvectors, and so keeps blocks by these.
    spectral = False

    @abstractmethod
    def due(self, step: int, memory: Memory) -> bool:
        """Whether the policy looks at a block in a step, if something was observed since the block was made."""

    def renew(self, running: Block, basis: Block | None, step: int, memory: Memory) -> tuple[Block, float]:
        """The block to use from now on, and which share of it was decomposed. It is called at the first step, and
        whenever it is due.

        Args:
            running: The block of the running matrix. Where its second moments are held in an eigenbasis (PMatEKFAC),
                the one whose eigenbasis that is.
            basis: The eigenvectors of the block in use, None if it has none.
            step: The number of steps that were made.
            memory: What the policy remembers of the block, which it writes into.

        Returns:
            The block, and the share of it that is decomposed anew.
        """
        return running, 1.0


@dataclass(frozen=True)
class Every(Refresh):
    """A refresh every so many steps; ``refresh=10`` stands for ``Every(10)``.

    Args:
        interval: In steps.
        first: In so many of the first steps there is one in each, by default in none but the first of all. Curvature
            changes fastest there, and with what it was ten steps ago a training from random weights can diverge.
    """

    interval: int
    first: int = 0

    def __post_init__(self) -> None:
        arguments.integer("refresh", self.interval, least=1)
        arguments.integer("Every: first", self.first, least=0)

    def due(self, step: int, memory: Memory) -> bool:
        return step < self.first or step % self.interval == 0


@dataclass(frozen=True)
class Scheduled(Refresh):
    """A refresh whenever a function says so; ``refresh=function`` stands for ``Scheduled(function)``.

    Args:
        schedule: From the number of steps that were made to the interval that holds then, an integer, or to whether to
            refresh now, a boolean.
    """

    schedule: Callable[[int], int | bool]

    def due(self, step: int, memory: Memory) -> bool:
        said = self.schedule(step)
        if isinstance(said, bool):
            return said
        return step - memory["last"] >= arguments.integer(f"refresh({step})", said, least=1)

    def renew(self, running: Block, basis: Block | None, step: int, memory: Memory) -> tuple[Block, float]:
        memory["last"] = step
        return running, 1.0


@dataclass(frozen=True)
class Stale(Refresh):
    """Intervals between refreshes that grow while the running average of a block stays similar, and shrink when it
    changes.

    Each statistic X of a block, which are the factors of a Kronecker product, has intervals of its own. With X1 and X2
    its last two refreshed values, D1 and D2 the last two intervals, and ``similar(X, Y)`` where ``|X - Y|_F < alpha
    |Y|_F``, the next interval is ``max(1, D1 // 2)`` if X is not similar to X1, otherwise D1 if it is not similar to
    X2, otherwise ``D1 + D2``. Of statistics that do not change the intervals are 1, 2, 3, 5, 8, ...

    Args:
        alpha: Up to which relative change two values count as similar.
        most: The longest interval, in steps; without a bound by default.

    Example:
        >>> import torch
        >>> from nngeometry.optim import SecondOrderOptimizer, Stale
        >>> opt = SecondOrderOptimizer(torch.nn.Linear(4, 3), lr=0.1, refresh=Stale(alpha=0.1, most=100))

    Source: Osawa et al. (2020), 2002.06015, algorithm 2.
    """

    alpha: float = 0.1
    most: int | None = None

    def __post_init__(self) -> None:
        arguments.number("Stale: alpha", self.alpha, above=0.0)
        if self.most is not None:
            arguments.integer("Stale: most", self.most, least=1)

    def due(self, step: int, memory: Memory) -> bool:
        return step >= min(memory["next"])

    def renew(self, running: Block, basis: Block | None, step: int, memory: Memory) -> tuple[Block, float]:
        now = running.statistics()
        if not memory:
            ones = [1] * len(now)
            memory.update(next=[step + 1 for _ in now], d1=ones, d2=list(ones), x1=list(now), x2=list(now))
            return running, 1.0
        due = [k for k, at in enumerate(memory["next"]) if step >= at]
        for k in due:
            x, x1, x2, d1, d2 = now[k], *(memory[name][k] for name in ("x1", "x2", "d1", "d2"))
            longer = d1 + d2 if self._similar(x, x2) else d1
            interval = longer if self._similar(x, x1) else max(1, d1 // 2)
            interval = interval if self.most is None else min(interval, self.most)
            for name, value in zip(
                ("next", "d1", "d2", "x1", "x2"), (step + interval, interval, d1, x, x1), strict=True
            ):
                memory[name][k] = value
        return running.with_statistics(memory["x1"]), len(due) / len(now)

    def _similar(self, x: Block, y: Block) -> bool:
        size = y.norm()
        if x.shape == y.shape:
            difference = add(x, y, -1.0).norm()
        else:  # of few examples a factor is held by its rows, of more of them as a matrix
            difference = torch.linalg.vector_norm(x.to_dense() - y.to_dense())
        return bool(difference < self.alpha * size) or (not bool(size) and not bool(x.norm()))


@dataclass(frozen=True)
class Rotated(Refresh):
    """A decomposition when the old eigenvectors Q do not diagonalise the block A well any more,
    ``|Q^T A Q - diag|_F > tolerance |Q^T A Q|_F``. Otherwise the block becomes ``Q diag(Q^T A Q) Q^T``.

    Each factor of a Kronecker product is looked at by itself. What has no eigenvectors to turn, a diagonal, goes on as
    it is now.

    Args:
        tolerance: The norm of what is off the diagonal, relative to that of the block: the error that is accepted.
        every: How often it is looked at, in steps.

    Example:
        >>> import torch
        >>> from nngeometry.optim import Rotated, SecondOrderOptimizer
        >>> opt = SecondOrderOptimizer(torch.nn.Linear(4, 3), lr=0.1, refresh=Rotated(tolerance=0.1))

    Source: Eschenhagen et al. (2025), 2506.03595.
    """

    tolerance: float = 0.1
    every: int = 1
    spectral = True

    def __post_init__(self) -> None:
        arguments.number("Rotated: tolerance", self.tolerance, least=0.0)
        arguments.integer("Rotated: every", self.every, least=1)

    def due(self, step: int, memory: Memory) -> bool:
        return step % self.every == 0

    def renew(self, running: Block, basis: Block | None, step: int, memory: Memory) -> tuple[Block, float]:
        return running.in_basis(basis, self.tolerance)


@dataclass(frozen=True)
class Turned(Refresh):
    """One turn of orthogonal iteration instead of a decomposition: the old eigenvectors Q become ``qr(A Q)``, and the
    block goes on by its diagonal in them. That tends to the decomposition where A stays, and is some times cheaper.

    Blocks that are not decomposed into eigenvectors are made anew as they are: what is solved with a Cholesky
    decomposition, or a diagonal.

    Args:
        every: How often, in steps.

    Source: Vyas et al. (2024), 2409.11321, algorithm 4.
    """

    every: int = 10
    spectral = True

    def __post_init__(self) -> None:
        arguments.integer("Turned: every", self.every, least=1)

    def due(self, step: int, memory: Memory) -> bool:
        return step % self.every == 0

    def renew(self, running: Block, basis: Block | None, step: int, memory: Memory) -> tuple[Block, float]:
        return (running, 1.0) if basis is None else (running.turned(basis), 0.0)


def policy(refresh: Any) -> Refresh:
    """What ``refresh=`` stands for.

    Raises:
        TypeError: If that is nothing.
    """
    if isinstance(refresh, Refresh):
        return refresh
    if isinstance(refresh, type | bool):
        raise TypeError(
            f"refresh: expected a number of steps, a function of the step, Stale() or Rotated(), got "
            f"{arguments.described(refresh)}"
        )
    return Scheduled(refresh) if callable(refresh) else Every(refresh)
