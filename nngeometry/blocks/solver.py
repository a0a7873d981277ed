"""Linear systems with a matrix that stays while vectors come, of which some blocks are replaced now and then."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from .base import Block, Map
from .direct import DirectSum, Part
from .regul import Regul, Uniform

#: Makes a block ready: from its position, itself and what is added to it to the map that solves.
MakeReady = Callable[[int, Block, Regul], Map]


def _ready(k: int, block: Block, regul: Regul) -> Map:
    return regul.solver(block)


@dataclass(frozen=True)
class _Ready:
    """One block made ready."""

    part: Part
    regul: Regul
    solved: Map

    def is_of(self, part: Part, regul: Regul) -> bool:
        if part.block is not self.part.block or type(regul) is not type(self.regul):
            return False
        mine = self.regul
        if isinstance(mine, Uniform):
            return mine == regul
        return torch.equal(mine.d, regul.d)  # type: ignore[union-attr]


class Solver:
    """``V -> (M + R)^-1 V`` for blocks side by side, with all of the work done that takes no V.

    before: one whose blocks are taken over where they and what is added to them are the same. make_ready: is called for
    all others.
    """

    def __init__(
        self, M: DirectSum, regul: Regul, before: Solver | None = None, make_ready: MakeReady = _ready
    ) -> None:
        old = before._ready if before is not None and len(before._ready) == len(M.parts) else [None] * len(M.parts)
        self._ready: list[_Ready] = []
        for k, (part, had) in enumerate(zip(M.parts, old, strict=True)):
            r = regul.on(part)
            same = had is not None and had.is_of(part, r)
            self._ready.append(had if same else _Ready(part, r, make_ready(k, part.block, r)))  # type: ignore[arg-type]
        self._matrix = M

    def __call__(self, V: Tensor) -> Tensor:
        ready = iter(self._ready)
        return self._matrix.join(lambda part: next(ready).solved(part.take(V)))
