"""Kronecker products of two blocks."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import torch
from torch import Tensor

from .base import Block, Map
from .composite import add
from .dense import Dense
from .lowrank import LowRank
from .spectral import Diag, Eye, Spectral


@dataclass(frozen=True, eq=False)
class Kron(Block):
    """The Kronecker product ``left (x) right`` on vectors ``(G, rows, cols)``: left acts on the rows, right on the
    columns, for each of G groups.

    The factors may be of any structure: with a diagonal right factor this is KFAC of an embedding, with two bases it is
    the eigenbasis of EKFAC.

    Args:
        left: A block on ``(G, rows)``.
        right: A block on ``(G, cols)``.
    """

    left: Block
    right: Block

    @property
    def shape(self) -> tuple[int, ...]:
        return (*self.left.shape, self.right.shape[-1])

    @property
    def symmetric(self) -> bool:
        return self.left.symmetric and self.right.symmetric

    def describe(self) -> str:
        groups = "" if self.shape[0] == 1 else f"{self.shape[0]} x "
        return f"{groups}Kron({self.left.describe()}, {self.right.describe()})"

    def mv(self, V: Tensor) -> Tensor:
        return self.left.on_rows(self.right.on_columns(V))

    def to_dense(self) -> Tensor:
        groups = self.shape[0]
        left, right = self.left.to_dense(), self.right.to_dense()
        o, i = left.shape[0] // groups, right.shape[0] // groups
        lefts = left.view(groups, o, groups, -1).diagonal(dim1=0, dim2=2).unbind(-1)
        rights = right.view(groups, i, groups, -1).diagonal(dim1=0, dim2=2).unbind(-1)
        return torch.block_diag(
            *(torch.kron(a.contiguous(), b.contiguous()) for a, b in zip(lefts, rights, strict=True))
        )

    def diag(self) -> Tensor:
        return _outer(self.left.diag(), self.right.diag())

    @cached_property
    def _eig(self) -> Spectral:
        left, right = _spectral(self.left), _spectral(self.right)
        return Spectral(Kron(left.basis, right.basis), _outer(left.l, right.l), left.l.new_zeros(()))

    def eig(self) -> Spectral:
        return self._eig

    def solve(self, V: Tensor, regul: float = 0.0) -> Tensor:
        return self.solver(regul)(V)

    def solver(self, regul: float = 0.0) -> Map:
        return self._eig.solver(regul)

    def decomposed(self) -> Spectral:
        return self._eig

    def in_basis(self, basis: Block | None, tolerance: float) -> tuple[Block, float]:
        of_left, of_right = _factors(basis)
        left, one = self.left.in_basis(of_left, tolerance)
        right, other = self.right.in_basis(of_right, tolerance)
        found, share = Kron(left, right).eig(), (one + other) / 2
        return (found, share) if share or basis is None else (Spectral(basis, found.l, found.rest), 0.0)

    def turned(self, basis: Block | None) -> Block:
        of_left, of_right = _factors(basis)
        return Kron(self.left.turned(of_left), self.right.turned(of_right)).eig()

    def solver_by_factors(self, regul: float) -> Map:
        groups = self.shape[0]
        left, right = (f.diag().reshape(groups, -1).mean(1) for f in (self.left, self.right))
        pi = torch.where((left > 0) & (right > 0), (right / left).sqrt(), 1.0)
        shifted = Kron(_shifted(self.left, regul**0.5 / pi), _shifted(self.right, regul**0.5 * pi))
        return shifted.inv().mv

    def shows_semidefinite(self) -> bool:
        return self.left.shows_semidefinite() and self.right.shows_semidefinite()

    def statistics(self) -> tuple[Block, ...]:
        return (*self.left.statistics(), *self.right.statistics())

    def with_statistics(self, statistics: Sequence[Block]) -> Kron:
        k = len(self.left.statistics())
        return Kron(self.left.with_statistics(statistics[:k]), self.right.with_statistics(statistics[k:]))

    def eigenvalues(self) -> Tensor:
        groups = self.shape[0]
        left = self.left.eigenvalues().view(groups, -1)
        return _outer(left, self.right.eigenvalues().view(groups, -1)).flatten()

    def trace(self) -> Tensor:
        groups = self.shape[0]
        left, right = self.left.diag().reshape(groups, -1), self.right.diag().reshape(groups, -1)
        return (left.sum(1) * right.sum(1)).sum()

    def _frobenius(self) -> Tensor:
        if self.shape[0] == 1:
            return self.left.norm() * self.right.norm()
        return super()._frobenius()

    def inv(self, regul: float = 0.0) -> Block:
        if regul == 0:
            return Kron(self.left.inv(0.0), self.right.inv(0.0))
        return self._eig.inv(regul)

    def transpose(self) -> Kron:
        return Kron(self.left.transpose(), self.right.transpose())

    def scale(self, c: float) -> Kron:
        return replace(self, left=self.left.scale(c))  # what it stands for is scaled alike

    def plus(self, other: Block) -> Block | None:
        return self.eig().plus(other) if isinstance(other, Eye) else None

    def times(self, other: Block) -> Block | None:
        if not isinstance(other, Kron):
            return None
        left, right = self.left.times(other.left), _times(self.right, other.right)
        return None if left is None or right is None else Kron(left, right)

    def map_square(self) -> Kron:
        return Kron(self.left.map_square(), self.right.map_square())


def _times(one: Block, other: Block) -> Block | None:
    """The product of two factors, which are small enough to be made dense."""
    found = one.times(other)
    if found is None and (isinstance(one, LowRank) or isinstance(other, LowRank)):
        return Dense(one.to_dense().unsqueeze(0)).times(Dense(other.to_dense().unsqueeze(0)))
    return found


def _factors(basis: Block | None) -> tuple[Block | None, Block | None]:
    """The factors of a basis, if it is a product."""
    return (basis.left, basis.right) if isinstance(basis, Kron) else (None, None)


def _shifted(factor: Block, shift: Tensor) -> Block:
    """A factor on ``(G, p)`` plus a multiple of the identity for each group."""
    if len(shift) == 1:
        return add(factor, Eye(shift[0], factor.shape))
    return add(factor, Diag(shift.unsqueeze(1).expand(factor.shape)))


def _outer(left: Tensor, right: Tensor) -> Tensor:
    return left.unsqueeze(-1) * right.unsqueeze(-2)


def _spectral(block: Block) -> Spectral:
    found = block.eig()
    assert isinstance(found, Spectral), type(block)
    return found


@dataclass(frozen=True, eq=False)
class AxisKron(Kron):
    """A Kronecker product that stands for a matrix of which only the moments along each axis are known, and says so."""

    def describe(self) -> str:
        return f"{super().describe()}, approximate: axes"


@dataclass(frozen=True, eq=False)
class NearestKron(Kron):
    """A Kronecker product that stands for a sum of several, to which it is the nearest one, and says so.

    Args:
        left: As of :class:`Kron`.
        right: As of :class:`Kron`.
        count: Of how many.
    """

    count: int = 2

    def describe(self) -> str:
        return f"{super().describe()}, approximate: nearest to the sum of {self.count}"


def nearest_product(products: Sequence[Kron]) -> NearestKron:
    """The Kronecker product that is nearest, in the Frobenius norm, to the sum of some with positive semidefinite
    factors, each of one group, the right ones all diagonal or all dense.

    Its factors are sums of theirs with weights x and y: to the leading singular vectors of ``sum_u vec(L_u)
    vec(R_u)^T``. As all inner products of the factors are positive, so are the weights, and the factors are
    semidefinite.

    Args:
        products: Those.

    Source:
        Van Loan and Pitsianis (1993), Approximation with Kronecker products.
    """
    lefts = [p.left.to_dense() for p in products]
    rights = [p.right.diag() if isinstance(p.right, Diag) else p.right.to_dense() for p in products]
    of_left, of_right = _inner(lefts), _inner(rights)
    values, vectors = torch.linalg.eig(of_right @ of_left)
    x = vectors[:, values.real.argmax()].real.abs()
    y = of_left @ x
    norm = x @ y  # the squared norm of the left factor
    y = torch.where(norm > 0, y / norm, 1.0)
    left = torch.stack([float(c) * factor for c, factor in zip(x, lefts, strict=True)]).sum(0)
    right = torch.stack([float(c) * factor for c, factor in zip(y, rights, strict=True)]).sum(0)
    diagonal = isinstance(products[0].right, Diag)
    return NearestKron(Dense(left.unsqueeze(0)), Diag(right) if diagonal else Dense(right.unsqueeze(0)), len(products))


def _inner(tensors: Sequence[Tensor]) -> Tensor:
    """Their inner products, in float64."""
    return torch.stack([torch.stack([(a.double() * b.double()).sum() for b in tensors]) for a in tensors])
