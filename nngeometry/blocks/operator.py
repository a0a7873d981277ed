"""A block known by its products alone."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..linalg import cg
from .base import Block, Function

_UNKNOWN = "the {} of a matrix known by its products alone takes {} products"


@dataclass(frozen=True, eq=False)
class Operator(Block):
    """A symmetric matrix given as functions.

    matvec: ``(k, p) -> (k, p)``; trace_of and diag_of compute the exact trace and diagonal, None if there is no way
    but p products; like: an empty tensor of its dtype and device.
    """

    matvec: Callable[[Tensor], Tensor]
    size: int
    trace_of: Callable[[], Tensor] | None
    diag_of: Callable[[], Tensor] | None
    like: Tensor

    @property
    def shape(self) -> tuple[int, ...]:
        return (self.size,)

    def mv(self, V: Tensor) -> Tensor:
        return _Symmetric.apply(self, V)

    def product(self, V: Tensor) -> Tensor:
        return self.matvec(V.reshape(-1, self.size)).view(V.shape)

    def diag(self) -> Tensor:
        if self.diag_of is None:
            raise NotImplementedError(f"{_UNKNOWN.format('diagonal', self.size)}: use PMatDiag, or an estimator")
        return self.diag_of()

    def trace(self) -> Tensor:
        if self.trace_of is None:
            raise NotImplementedError(f"{_UNKNOWN.format('trace', self.size)}: use trace(estimator=...) or PMatDiag")
        return self.trace_of()

    def eig(self) -> Block:
        raise NotImplementedError(
            "a matrix known by its products has no eigendecomposition, and nothing that needs one (logdet, inv, "
            "pow, spectral norms, sample): "
            "use PMatLowRank or PMatDense, or to_torch() for a small one"
        )

    def _inv(self, regul: float) -> Block:
        return self.eig()

    def _solve(self, V: Tensor, regul: float) -> Tensor:
        rtol = max(1e-6, 100 * torch.finfo(self.dtype).eps)
        with torch.no_grad():
            b = V.reshape(-1, self.size)
            return cg(lambda v: self.product(v) + regul * v, b, rtol=rtol).x.view(V.shape)

    def _frobenius(self) -> Tensor:
        return torch.linalg.vector_norm(self._as_dense("norm").data)

    def congruence(self, s: Tensor) -> Block:
        return Operator(
            lambda V: s * self.product(s * V),
            self.size,
            lambda: (s.square() * self.diag()).sum(),
            lambda: s.square() * self.diag(),
            self.like,
        )

    def map(self, fn: Function) -> Block:
        fn(self.like)
        return self

    def state(self) -> dict[str, Any]:
        raise TypeError("a matrix known by its products alone cannot be saved: it holds the model and the data")


class _Symmetric(torch.autograd.Function):
    """``M V`` with the derivative ``M``, since M does not depend on V."""

    @staticmethod
    def forward(ctx: Any, block: Operator, V: Tensor) -> Tensor:
        ctx.block = block
        return block.product(V.detach())

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[None, Tensor]:
        return None, ctx.block.product(grad)
