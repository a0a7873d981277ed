"""Low-rank blocks: weighted sums of outer products of few vectors."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from .base import Block, Map
from .dense import Dense, eigh
from .spectral import Spectral


@dataclass(frozen=True, eq=False)
class LowRank(Block):
    """A weighted sum of outer products, ``sum_k w_k r_k r_k^T``.

    Args:
        rows: The vectors ``(k, p)``.
        weights: Their weights ``(k,)``, of any sign.
    """

    rows: Tensor
    weights: Tensor

    @property
    def shape(self) -> tuple[int, ...]:
        return (self.rows.shape[1],)

    def mv(self, V: Tensor) -> Tensor:
        return ((V @ self.rows.T) * self.weights) @ self.rows

    def to_dense(self) -> Tensor:
        return self.rows.T @ (self.weights.unsqueeze(1) * self.rows)

    def diag(self) -> Tensor:
        return torch.einsum("kp,kp,k->p", self.rows, self.rows, self.weights)

    def trace(self) -> Tensor:
        return self.rows.square().sum(1) @ self.weights

    def _frobenius(self) -> Tensor:
        if bool((self.weights < 0).any()):  # the sum below would cancel
            return torch.linalg.vector_norm(self._eig.l)
        gram = self.rows @ self.rows.T
        return torch.linalg.vector_norm(self.weights.sqrt().unsqueeze(1) * gram * self.weights.sqrt())

    @cached_property
    def _eig(self) -> Spectral:
        k, p = self.rows.shape
        if k >= p:
            return Dense(self.to_dense()).eig()
        q, r = torch.linalg.qr(self.rows.T)  # M = Q (R W R^T) Q^T
        l, u = eigh((r * self.weights) @ r.T)
        return Spectral(Dense(q @ u, (p,), into=tuple(l.shape)), l, l.new_zeros(()))

    def eig(self) -> Spectral:
        return self._eig

    @property
    def work(self) -> float:
        k, p = self.rows.shape
        return float(p) * min(k, p) ** 2

    def shows_semidefinite(self) -> bool:
        return bool((self.weights >= 0).all())

    def solve(self, V: Tensor, regul: float = 0.0) -> Tensor:
        return self.solver(regul)(V)

    def solver(self, regul: float = 0.0) -> Map:
        return self._eig.solver(regul)

    def decomposed(self) -> Spectral:
        return self._eig

    def inv(self, regul: float = 0.0) -> Block:
        return self._eig.inv(regul)

    def congruence(self, s: Tensor) -> LowRank:
        return LowRank(self.rows * s, self.weights)

    def restrict(self, s: slice) -> LowRank:
        return LowRank(self.rows[:, s].clone(), self.weights)

    def scale(self, c: float) -> LowRank:
        return LowRank(self.rows, c * self.weights)

    def plus(self, other: Block) -> Block | None:
        if isinstance(other, LowRank):
            return LowRank(torch.cat([self.rows, other.rows]), torch.cat([self.weights, other.weights]))
        return self._eig.plus(other)
