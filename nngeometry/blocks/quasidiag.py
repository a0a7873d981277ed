"""Quasi-diagonal blocks: a diagonal, and in each row the products with its last column, which is the bias."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ..memory import require
from .base import Block, check_invertible
from .dense import Dense
from .spectral import Diag, Eye, Spectral


@dataclass(frozen=True, eq=False)
class QuasiDiag(Block):
    """For each row an arrowhead matrix, ``[[diag(d[:-1]), cross], [cross^T, d[-1]]]``. It may be indefinite although
    the whole matrix is not.

    Args:
        d: The diagonal ``(..., cols)``.
        cross: The products with the last column, ``(..., cols - 1)``.

    Source:
        Ollivier (2015), 1303.0818.
    """

    d: Tensor
    cross: Tensor

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(self.d.shape)

    def mv(self, V: Tensor) -> Tensor:
        tip = V[..., -1:]
        body = self.d[..., :-1] * V[..., :-1] + self.cross * tip
        return torch.cat([body, self.d[..., -1:] * tip + (self.cross * V[..., :-1]).sum(-1, keepdim=True)], -1)

    def _rows(self) -> Tensor:
        """The arrowheads as dense matrices: ``(..., cols, cols)``."""
        require(
            self.numel * self.shape[-1] * self.dtype.itemsize,
            f"the arrowhead matrices of a quasi-diagonal block with rows of {self.shape[-1]}",
            "use solve, which needs none of them, or PMatDiag",
            self.device,
        )
        rows = torch.diag_embed(self.d)
        rows[..., :-1, -1] = self.cross
        rows[..., -1, :-1] = self.cross
        return rows

    def to_dense(self) -> Tensor:
        return torch.block_diag(*self._rows().flatten(0, -3))

    def diag(self) -> Tensor:
        return self.d

    def eig(self) -> Spectral:
        return Dense(self._rows()).eig()

    def eigenvalues(self) -> Tensor:
        return torch.linalg.eigvalsh(self._rows()).flatten()

    def _frobenius(self) -> Tensor:
        return (self.d.square().sum() + 2 * self.cross.square().sum()).sqrt()

    def _eliminated(self, regul: float) -> tuple[Tensor, Tensor]:
        """The body ``d + regul`` and the Schur complement of the tip."""
        body = self.d[..., :-1] + regul
        check_invertible(self.d[..., :-1], regul)
        tip = self.d[..., -1:] + regul - (self.cross.square() / body).sum(-1, keepdim=True)
        check_invertible(torch.cat([self.d[..., -1:] + regul, tip], -1), 0.0)
        return body, tip

    def solve(self, V: Tensor, regul: float = 0.0) -> Tensor:
        body, schur = self._eliminated(regul)
        tip = (V[..., -1:] - (self.cross / body * V[..., :-1]).sum(-1, keepdim=True)) / schur
        return torch.cat([(V[..., :-1] - self.cross * tip) / body, tip], -1)

    def logdet(self, regul: float = 0.0) -> Tensor:
        body, schur = self._eliminated(regul)
        if bool((body < 0).any()) or bool((schur < 0).any()):
            raise ValueError(f"logdet: the matrix plus regul={regul} has negative eigenvalues: use a larger regul")
        return body.log().sum() + schur.log().sum()

    def inv(self, regul: float = 0.0) -> Block:
        return self.eig().inv(regul)

    def congruence(self, s: Tensor) -> QuasiDiag:
        return QuasiDiag(s * self.d * s, s[..., :-1] * self.cross * s[..., -1:])

    def scale(self, c: float) -> QuasiDiag:
        return QuasiDiag(c * self.d, c * self.cross)

    def plus(self, other: Block) -> Block | None:
        if isinstance(other, QuasiDiag):
            return QuasiDiag(self.d + other.d, self.cross + other.cross)
        if isinstance(other, Diag | Eye):
            return QuasiDiag(self.d + other.diag(), self.cross)
        return None
