"""Blocks that are diagonal in a basis at hand: an eigendecomposition, a multiple of the identity, a diagonal."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from .base import Block, Map, check_held, check_invertible

#: Entries of vectors that are rotated at a time, so that what comes between two bases stays in the cache.
_PIECE = 2**20


@dataclass(frozen=True, eq=False)
class Spectral(Block):
    """An eigendecomposition, possibly of a part of the space: ``Q diag(l) Q^T + rest (1 - Q Q^T)`` with orthonormal
    columns Q.

    EKFAC is one with Q a Kronecker product.

    Args:
        basis: Q, a block from vectors of the shape of l.
        l: The eigenvalues.
        rest: The eigenvalue outside of the span of Q.
    """

    basis: Block
    l: Tensor
    rest: Tensor

    @property
    def shape(self) -> tuple[int, ...]:
        return self.basis.shape

    @property
    def _missing(self) -> int:
        return self.numel - self.l.numel()

    def describe(self) -> str:
        return f"Spectral({self.basis.describe()})"

    def mv(self, V: Tensor) -> Tensor:
        if V.requires_grad or V.numel() <= max(_PIECE, self.numel):
            return self._mv(V)
        rows = V.reshape(-1, *self.shape)
        out = torch.empty_like(rows)
        step = max(1, _PIECE // self.numel)
        for piece, into in zip(rows.split(step), out.split(step), strict=True):
            into.copy_(self._mv(piece))
        return out.view(V.shape)

    def _mv(self, V: Tensor) -> Tensor:
        transpose = self.basis.transpose()
        inside = transpose.mv(V)
        if not self._missing:
            return self.basis.mv(self.l * inside)
        outside = V - self.basis.mv(inside)
        outside = outside - self.basis.mv(transpose.mv(outside))  # twice: rest may be far larger than l
        return self.basis.mv(self.l * inside) + self.rest * outside

    def to_dense(self) -> Tensor:
        q = self.basis.to_dense()
        dense = (q * (self.l - self.rest).flatten()) @ q.T if self._missing else (q * self.l.flatten()) @ q.T
        if self._missing:
            dense.diagonal().add_(self.rest)
        return dense

    def diag(self) -> Tensor:
        squares = self.basis.map_square()
        if not self._missing:
            return squares.mv(self.l)
        return squares.mv(self.l - self.rest) + self.rest

    def eig(self) -> Spectral:
        return self

    def eigenvalues(self) -> Tensor:
        return torch.cat([self.l.flatten(), self.rest.expand(self._missing)])

    def top(self, k: int | None) -> tuple[Tensor, Tensor]:
        l, index = self.l.flatten().sort(descending=True)
        check_held(l, k, self.rest.expand(min(1, self._missing)))
        return l[:k], self.columns(index[:k])

    def columns(self, index: Tensor) -> Tensor:
        """Some of the eigenvectors, ``(k, *shape)``.

        Args:
            index: Flat indices of l.
        """
        one_hot = self.l.new_zeros(len(index), self.l.numel())
        one_hot[torch.arange(len(index), device=index.device), index] = 1.0
        return self.basis.mv(one_hot.view(-1, *self.l.shape))

    def trace(self) -> Tensor:
        return self.l.sum() + self._missing * self.rest

    def _frobenius(self) -> Tensor:
        return (self.l.square().sum() + self._missing * self.rest.square()).sqrt()

    def apply(self, f: Map) -> Spectral:
        return Spectral(self.basis, f(self.l), f(self.rest) if self._missing else self.rest)

    def solve(self, V: Tensor, regul: float = 0.0) -> Tensor:
        return self.solver(regul)(V)

    def solver(self, regul: float = 0.0) -> Map:
        return self.inv(regul).mv

    def inv(self, regul: float = 0.0) -> Spectral:
        check_invertible(self.eigenvalues(), regul)
        return self.apply(lambda l: (l + regul).reciprocal())

    def sample(self, noise: Tensor) -> Tensor:
        return self.pow(0.5).mv(noise)

    def scale(self, c: float) -> Spectral:
        return self.apply(lambda l: c * l)

    def plus(self, other: Block) -> Block | None:
        if isinstance(other, Eye):
            return Spectral(self.basis, self.l + other.c, self.rest + other.c)
        if isinstance(other, Spectral) and other.basis is self.basis:
            return Spectral(self.basis, self.l + other.l, self.rest + other.rest)
        return None


@dataclass(frozen=True, eq=False)
class Eye(Block):
    """``c`` times the identity.

    Args:
        c: The multiple, a scalar tensor.
        size: The shape of the vectors.
    """

    c: Tensor
    size: tuple[int, ...]

    @classmethod
    def like(cls, t: Tensor, size: tuple[int, ...]) -> Eye:
        return cls(t.new_ones(()), size)

    @property
    def shape(self) -> tuple[int, ...]:
        return self.size

    def mv(self, V: Tensor) -> Tensor:
        return self.c * V

    on_columns = on_rows = mv

    def to_dense(self) -> Tensor:
        return self.c * torch.eye(self.numel, dtype=self.c.dtype, device=self.c.device)

    def diag(self) -> Tensor:
        return self.c.expand(self.size)

    def eig(self) -> Spectral:
        return Spectral(Eye.like(self.c, self.size), self.c.expand(self.size).clone(), self.c * 0)

    def eigenvalues(self) -> Tensor:
        return self.c.expand(self.numel)

    def _frobenius(self) -> Tensor:
        return self.c.abs() * self.numel**0.5

    def apply(self, f: Map) -> Eye:
        return Eye(f(self.c), self.size)

    def in_basis(self, basis: Block | None, tolerance: float) -> tuple[Block, float]:
        return self, 0.0

    def absolute(self) -> Eye:
        return self.apply(torch.abs)

    def solve(self, V: Tensor, regul: float = 0.0) -> Tensor:
        return self.solver(regul)(V)

    def solver(self, regul: float = 0.0) -> Map:
        return self.inv(regul).mv

    def inv(self, regul: float = 0.0) -> Eye:
        check_invertible(self.c.reshape(1), regul)
        return self.apply(lambda c: (c + regul).reciprocal())

    def congruence(self, s: Tensor) -> Block:
        return Diag(self.c * s.square())

    def restrict(self, s: slice) -> Eye:
        return Eye(self.c, (s.stop - s.start,))

    def scale(self, c: float) -> Eye:
        return Eye(c * self.c, self.size)

    def plus(self, other: Block) -> Block | None:
        return Eye(self.c + other.c, self.size) if isinstance(other, Eye) else other.plus(self)

    def times(self, other: Block) -> Block | None:
        return other.scale(float(self.c))

    def map_square(self) -> Eye:
        return Eye(self.c.square(), self.size)


@dataclass(frozen=True, eq=False)
class Diag(Block):
    """A diagonal matrix.

    Args:
        d: The diagonal, in the shape of a vector.
    """

    d: Tensor

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(self.d.shape)

    def mv(self, V: Tensor) -> Tensor:
        return self.d * V

    def to_dense(self) -> Tensor:
        return torch.diag(self.d.flatten())

    def diag(self) -> Tensor:
        return self.d

    def eig(self) -> Spectral:
        return Spectral(Eye.like(self.d, self.shape), self.d, self.d.new_zeros(()))

    def eigenvalues(self) -> Tensor:
        return self.d.flatten()

    def _frobenius(self) -> Tensor:
        return torch.linalg.vector_norm(self.d)

    def apply(self, f: Map) -> Diag:
        return Diag(f(self.d))

    def in_basis(self, basis: Block | None, tolerance: float) -> tuple[Block, float]:
        return self, 0.0

    def shows_semidefinite(self) -> bool:
        return bool((self.d >= 0).all())

    def absolute(self) -> Diag:
        return Diag(self.d.abs())

    def pow(self, exponent: float) -> Block:
        return _unrotated(super().pow(exponent))

    def solve(self, V: Tensor, regul: float = 0.0) -> Tensor:
        return self.solver(regul)(V)

    def solver(self, regul: float = 0.0) -> Map:
        check_invertible(self.d, regul)
        shifted = self.d + regul
        return lambda V: V / shifted

    def inv(self, regul: float = 0.0) -> Diag:
        check_invertible(self.d, regul)
        return Diag((self.d + regul).reciprocal())

    def congruence(self, s: Tensor) -> Diag:
        return Diag(s * self.d * s)

    def restrict(self, s: slice) -> Diag:
        return Diag(self.d[s])

    def scale(self, c: float) -> Diag:
        return Diag(c * self.d)

    def plus(self, other: Block) -> Block | None:
        return Diag(self.d + other.diag()) if isinstance(other, Diag | Eye) else None

    def times(self, other: Block) -> Block | None:
        return Diag(self.d * other.d) if isinstance(other, Diag) else None


def _unrotated(block: Block) -> Block:
    """A spectral block in the trivial basis as the diagonal matrix that it is."""
    if isinstance(block, Spectral) and isinstance(block.basis, Eye):
        return Diag(block.l)
    return block
