"""Blocks side by side: a block-diagonal matrix on the flat parameters of several layers."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..kinds import Packing
from .base import CLASSES, Block, Map, check_held
from .composite import add, matmul
from .spectral import Spectral


@dataclass(frozen=True)
class Part:
    """One block and the flat coordinates it acts on.

    Args:
        slices: (start, stop) of the coordinates, one pair for each run of neighbours.
        packing: How they become a vector of the block.
        block: The block.
    """

    slices: tuple[tuple[int, int], ...]
    packing: Packing
    block: Block

    def take(self, V: Tensor) -> Tensor:
        """The part's share of flat vectors, in the block's shape.

        Args:
            V: Flat vectors ``(..., p)``.
        """
        pieces = [V[..., a:b] for a, b in self.slices]
        flat = pieces[0] if len(pieces) == 1 else torch.cat(pieces, -1)
        return self.packing.pack(flat).reshape(*V.shape[:-1], *self.block.shape)

    def give(self, W: Tensor) -> list[tuple[int, Tensor]]:
        """From the block's shape back to flat pieces, each with where it starts.

        Args:
            W: Vectors of the block.
        """
        lead = W.shape[: W.ndim - len(self.block.shape)]
        flat = self.packing.unpack(W.reshape(*lead, *self.packing.shape))
        lengths = [b - a for a, b in self.slices]
        return [(a, piece) for (a, _), piece in zip(self.slices, flat.split(lengths, -1), strict=True)]

    def with_block(self, block: Block) -> Part:
        return Part(self.slices, self.packing, block)


@dataclass(frozen=True, eq=False)
class DirectSum(Block):
    """The direct sum of the blocks of its parts, which together cover the coordinates once.

    Args:
        parts: The parts.
    """

    parts: tuple[Part, ...]

    @property
    def shape(self) -> tuple[int, ...]:
        return (sum(b - a for part in self.parts for a, b in part.slices),)

    @property
    def symmetric(self) -> bool:
        return all(part.block.symmetric for part in self.parts)

    def _each(self, fn: Callable[[Block], Block]) -> DirectSum:
        return DirectSum(tuple(part.with_block(fn(part.block)) for part in self.parts))

    def flattened(self) -> tuple[Part, ...]:
        """The parts, with those of parts that are direct sums themselves in their place."""
        parts: list[Part] = []
        for part in self.parts:
            inner = part.block
            if not isinstance(inner, DirectSum) or part.packing.view is not None or len(part.slices) > 1:
                parts.append(part)
                continue
            ((first, _),) = part.slices
            for one in inner.flattened():
                slices = tuple((first + a, first + b) for a, b in one.slices)
                parts.append(Part(slices, one.packing, one.block))
        return tuple(parts)

    def join(self, fn: Callable[[Part], Tensor]) -> Tensor:
        """Flat vectors from one vector for each part.

        Args:
            fn: From a part to that vector.
        """
        pieces = [piece for part in self.parts for piece in part.give(fn(part))]
        return torch.cat([piece for _, piece in sorted(pieces, key=lambda pair: pair[0])], -1)

    def mv(self, V: Tensor) -> Tensor:
        return self.join(lambda part: part.block.mv(part.take(V)))

    def once(self, V: Tensor) -> Tensor:
        return self.join(lambda part: part.block.once(part.take(V)))

    def to_dense(self) -> Tensor:
        out = torch.zeros(self.numel, self.numel, dtype=self.dtype, device=self.device)
        for part in self.parts:
            block = part.block.to_dense().view(*part.packing.shape, *part.packing.shape)
            half = part.packing.unpack(block).movedim(-1, 0)
            flat = part.packing.unpack(half).T
            lengths = [b - a for a, b in part.slices]
            for (a, b), rows in zip(part.slices, flat.split(lengths), strict=True):
                for (c, d), piece in zip(part.slices, rows.split(lengths, 1), strict=True):
                    out[a:b, c:d] = piece
        return out

    def diag(self) -> Tensor:
        return self.join(lambda part: part.block.diag())

    def eig(self) -> DirectSum:
        return self._each(lambda block: block.eig())

    def eigenvalues(self) -> Tensor:
        return torch.cat([part.block.eigenvalues() for part in self.parts])

    def top(self, k: int | None) -> tuple[Tensor, Tensor]:
        spectral = [part.with_block(part.block.eig()) for part in self.flattened()]
        lengths = [_spectral(part.block).l.numel() for part in spectral]
        rest = [_spectral(p.block).rest.reshape(1) for p, n in zip(spectral, lengths, strict=True) if n < p.block.numel]
        l, order = torch.cat([_spectral(part.block).l.flatten() for part in spectral]).sort(descending=True)
        check_held(l, k, torch.cat(rest) if rest else l.new_zeros(0))
        k = len(l) if k is None else k
        order = order[:k]
        vectors = l.new_zeros(k, self.numel)
        start = 0
        for part, n in zip(spectral, lengths, strict=True):
            mine = ((order >= start) & (order < start + n)).nonzero().flatten()
            if len(mine):
                for a, piece in part.give(_spectral(part.block).columns(order[mine] - start)):
                    vectors[mine, a : a + piece.shape[-1]] = piece
            start += n
        return l[:k], vectors

    def statistics(self) -> tuple[Block, ...]:
        return tuple(one for part in self.parts for one in part.block.statistics())

    def with_statistics(self, statistics: Sequence[Block]) -> DirectSum:
        remaining = iter(statistics)
        return self._each(lambda b: b.with_statistics([next(remaining) for _ in b.statistics()]))

    def describe(self) -> str:
        return " (+) ".join(part.block.describe() for part in self.parts)

    def trace(self) -> Tensor:
        return torch.stack([part.block.trace() for part in self.parts]).sum()

    def _frobenius(self) -> Tensor:
        return torch.stack([part.block.norm() for part in self.parts]).square().sum().sqrt()

    def apply(self, f: Map) -> DirectSum:
        return self._each(lambda block: block.apply(f))

    def pow(self, exponent: float) -> DirectSum:
        return self._each(lambda block: block.pow(exponent))

    def solve(self, V: Tensor, regul: float = 0.0) -> Tensor:
        return self.join(lambda part: part.block.solve(part.take(V), regul))

    def inv(self, regul: float = 0.0) -> DirectSum:
        return self._each(lambda block: block.inv(regul))

    def logdet(self, regul: float = 0.0) -> Tensor:
        return torch.stack([part.block.logdet(regul) for part in self.parts]).sum()

    def check_positive(self, regul: float = 0.0) -> None:
        for part in self.parts:
            part.block.check_positive(regul)

    def sample(self, noise: Tensor) -> Tensor:
        return self.join(lambda part: part.block.sample(part.take(noise)))

    def congruence(self, s: Tensor) -> DirectSum:
        return DirectSum(tuple(part.with_block(part.block.congruence(part.take(s))) for part in self.parts))

    def restrict(self, s: slice) -> Block:
        for part in self.parts:
            start = 0
            for a, b in part.slices:
                if a <= s.start and s.stop <= b:
                    if part.packing.view is not None:
                        whole = DirectSum((Part(((0, b - a),), part.packing, part.block),))
                        return whole if s == slice(a, b) else super().restrict(s)
                    return part.block.restrict(slice(start + s.start - a, start + s.stop - a))
                start += b - a
        return super().restrict(s)

    def transpose(self) -> DirectSum:
        return self._each(lambda block: block.transpose())

    def scale(self, c: float) -> DirectSum:
        return self._each(lambda block: block.scale(c))

    def _matches(self, other: Block) -> bool:
        return isinstance(other, DirectSum) and [p.slices for p in self.parts] == [p.slices for p in other.parts]

    def plus(self, other: Block) -> Block | None:
        same = self._zip(other, add)
        if same is None and len(self.parts) == 1 and self.parts[0].packing.view is None:
            (part,) = self.parts
            closed = part.block.plus(other)
            return None if closed is None else DirectSum((part.with_block(closed),))
        return same

    def times(self, other: Block) -> Block | None:
        return self._zip(other, matmul)

    def _zip(self, other: Block, fn: Callable[[Block, Block], Block]) -> DirectSum | None:
        """Part by part, if the parts are the same."""
        if not isinstance(other, DirectSum) or not self._matches(other):
            return None
        pairs = [_aligned(p, q) for p, q in zip(self.parts, other.parts, strict=True)]
        return DirectSum(tuple(p.with_block(fn(p.block, q.block)) for p, q in pairs))

    def tensors(self) -> list[Tensor]:
        return [t for part in self.parts for t in part.block.tensors()]

    def map(self, fn: Map) -> DirectSum:
        return self._each(lambda block: block.map(fn))

    def state(self) -> dict[str, Any]:
        parts = []
        for part in self.parts:
            parts.append(
                {
                    "slices": [list(pair) for pair in part.slices],
                    "packing": part.packing.state(),
                    "block": part.block.state(),
                }
            )
        return {"block": CLASSES.name_of(type(self)), "parts": parts}

    @classmethod
    def _rebuild(cls, state: dict[str, Any]) -> DirectSum:
        parts = []
        for part in state["parts"]:
            slices = tuple((a, b) for a, b in part["slices"])
            parts.append(Part(slices, Packing.from_state(part["packing"]), Block.from_state(part["block"])))
        return cls(tuple(parts))


def _aligned(p: Part, q: Part) -> tuple[Part, Part]:
    """Two parts on the same coordinates, seen through the same packing."""
    if p.packing == q.packing and p.block.shape == q.block.shape:
        return p, q
    flat = Packing.flat(sum(b - a for a, b in p.slices))
    return _flat(p, flat), _flat(q, flat)


def _flat(part: Part, flat: Packing) -> Part:
    """The same part on flat coordinates."""
    if part.packing.view is None:
        return part
    inner = Part(((0, flat.shape[0]),), part.packing, part.block)
    return Part(part.slices, flat, DirectSum((inner,)))


def _spectral(block: Block) -> Spectral:
    if not isinstance(block, Spectral):
        raise NotImplementedError(f"{type(block).__name__} has no eigendecomposition of its own: use to_torch()")
    return block
