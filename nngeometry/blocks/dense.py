"""Dense blocks, and batches of them."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property
from math import prod

import torch
from torch import Tensor

from .base import Block, Derived, Map, check_invertible
from .spectral import Diag, Eye, Spectral


@dataclass(frozen=True, eq=False)
class Dense(Block):
    """A dense matrix, or a batch of them along leading axes of the vectors.

    A basis has data ``(*batch, p, k)`` and takes vectors of shape ``into``.

    Args:
        data: The entries ``(*batch, p, p)``.
        out: The shape of the vectors, ``(*batch, ...)`` with p elements after the batch; by default ``(*batch, p)``.
        is_symmetric: Whether it equals its transpose, by default True.
        into: The shape of the vectors that it takes, by default that of those that it returns.
    """

    data: Tensor
    out: tuple[int, ...] | None = None
    is_symmetric: bool = True
    into: tuple[int, ...] | None = None

    @property
    def symmetric(self) -> bool:
        return self.is_symmetric

    @property
    def shape(self) -> tuple[int, ...]:
        return self.out or tuple(self.data.shape[:-1])

    @property
    def _into(self) -> tuple[int, ...]:
        return self.into or self.shape

    def mv(self, V: Tensor) -> Tensor:
        batch = self.data.shape[:-2]
        lead = V.shape[: V.ndim - len(self._into)]
        if prod(batch) == 1:  # one large product, however V lies in memory
            out = V.reshape(-1, self.data.shape[-1]) @ self.data.view(self.data.shape[-2:]).T
        else:
            V = V.reshape(*lead, *batch, self.data.shape[-1])
            n = len(batch)
            axes = list(range(n))
            free = list(range(n + 2, n + 2 + len(lead)))
            out = torch.einsum(self.data, [*axes, n, n + 1], V, [*free, *axes, n + 1], [*free, *axes, n])
        return out.reshape(*lead, *self.shape)

    @property
    def _factor(self) -> Tensor:
        """The matrices, or the only one of a batch, which multiplies faster. (One row is no batch of one.)"""
        return self.data[0] if self.data.ndim > 2 and len(self.data) == 1 else self.data

    def on_columns(self, V: Tensor) -> Tensor:
        return V @ self._factor.mT

    def on_rows(self, V: Tensor) -> Tensor:
        return self._factor @ V

    def to_dense(self) -> Tensor:
        batch = self.data.shape[:-2]
        if prod(batch) == 1:
            return self.data.reshape(self.data.shape[-2:])
        return torch.block_diag(*self.data.flatten(0, -3))

    def diag(self) -> Tensor:
        return self.data.diagonal(dim1=-2, dim2=-1).reshape(self.shape)

    @cached_property
    def _eig(self) -> Spectral:
        if not self.symmetric:
            raise NotImplementedError(
                "the matrix is a product and not symmetric, so it has no eigendecomposition here: use to_torch()"
            )
        l, q = eigh(self.data)
        return Spectral(Dense(q, self.shape, into=tuple(l.shape)), l, l.new_zeros(()))

    def eig(self) -> Spectral:
        return self._eig

    @property
    def work(self) -> float:
        return float(prod(self.data.shape[:-1])) * self.data.shape[-1] ** 2 if self.symmetric else 0.0

    def eigenvalues(self) -> Tensor:
        if "_eig" in vars(self) or not self.symmetric:
            return self.eig().eigenvalues()
        return torch.linalg.eigvalsh(self.data).flatten()

    def _frobenius(self) -> Tensor:
        return torch.linalg.vector_norm(self.data)

    def _cholesky(self, regul: float = 0.0) -> Tensor | None:
        """Factor of M + regul, None if it is not safely positive definite."""
        if not self.symmetric:
            return None
        shifted = self.data.clone()
        shifted.diagonal(dim1=-2, dim2=-1).add_(regul)
        factor, info = torch.linalg.cholesky_ex(shifted)
        if bool(info.any()):
            return None
        pivots = factor.diagonal(dim1=-2, dim2=-1).square()
        safe = self.numel * torch.finfo(self.dtype).eps * shifted.diagonal(dim1=-2, dim2=-1).max()
        return factor if bool(pivots.min() > safe) else None

    def _shifted(self, regul: float = 0.0) -> Tensor:
        """M + regul of a matrix that is not symmetric, checked to be invertible."""
        shifted = self.data + regul * torch.eye(self.data.shape[-1], dtype=self.dtype, device=self.device)
        check_invertible(torch.linalg.svdvals(shifted).flatten(), 0.0)
        return shifted

    def solve(self, V: Tensor, regul: float = 0.0) -> Tensor:
        return self.solver(regul)(V)

    def solver(self, regul: float = 0.0) -> Map:
        factor = None if "_eig" in vars(self) else self._cholesky(regul)
        if factor is None and self.symmetric:
            return self.eig().solver(regul)
        shifted = self._shifted(regul) if factor is None else None

        def solved(V: Tensor) -> Tensor:
            lead = V.shape[: V.ndim - len(self.shape)]
            columns = V.reshape(-1, *self.data.shape[:-1]).movedim(0, -1)
            x = torch.linalg.solve(shifted, columns) if factor is None else torch.cholesky_solve(columns, factor)
            return x.movedim(-1, 0).reshape(*lead, *self.shape)

        return solved

    def shows_semidefinite(self) -> bool:
        noise = self.numel * torch.finfo(self.dtype).eps * self.data.diagonal(dim1=-2, dim2=-1).max()
        return self._cholesky(3 * float(noise)) is not None

    def check_positive(self, regul: float = 0.0) -> None:
        if self._cholesky(regul) is None:
            super().check_positive(regul)

    def in_basis(self, basis: Block | None, tolerance: float) -> tuple[Spectral, float]:
        if not self._spans(basis):
            return self.eig(), 1.0
        q = basis.data  # type: ignore[union-attr]
        rotated = q.mT @ self.data @ q
        l = rotated.diagonal(dim1=-2, dim2=-1).clone()
        rotated.diagonal(dim1=-2, dim2=-1).zero_()
        if torch.linalg.vector_norm(rotated) > tolerance * torch.linalg.vector_norm(self.data):
            return self.eig(), 1.0
        return Spectral(basis, l, l.new_zeros(())), 0.0  # type: ignore[arg-type]

    def turned(self, basis: Block | None) -> Block:
        if not self._spans(basis):
            return self.decomposed()
        columns = self.data @ basis.data  # type: ignore[union-attr]
        # the largest come first: those of small eigenvalues are rounding, which must not be what others are made
        # orthogonal to
        order = (basis.data * columns).sum(-2).argsort(dim=-1, descending=True)  # type: ignore[union-attr]
        q = torch.linalg.qr(columns.take_along_dim(order.unsqueeze(-2), -1)).Q
        l = (q * (self.data @ q)).sum(-2)
        return Spectral(Dense(q, self.shape, into=tuple(l.shape)), l, l.new_zeros(()))

    def _spans(self, basis: Block | None) -> bool:
        """Whether it is a whole basis of the space."""
        return isinstance(basis, Dense) and basis.data.shape == self.data.shape

    def inv(self, regul: float = 0.0) -> Block:
        if not self.symmetric:
            return Dense(torch.linalg.inv(self._shifted(regul)), self.out, is_symmetric=False)
        factor = self._cholesky(regul)
        if factor is not None:
            return Dense(torch.cholesky_inverse(factor), self.out)
        inverse = self.eig().inv(regul)
        return Dense(_dense_batch(inverse), self.out)

    def apply(self, f: Map) -> Dense:
        return Dense(_dense_batch(self.eig().apply(f)), self.out)

    def pow(self, exponent: float) -> Block:
        power = super().pow(exponent)
        return Dense(_dense_batch(power), self.out) if isinstance(power, Spectral) else power

    def sample(self, noise: Tensor) -> Tensor:
        return self.eig().sample(noise)  # with the decomposition that is kept

    def congruence(self, s: Tensor) -> Dense:
        s = s.reshape(self.data.shape[:-1])
        return Dense(s.unsqueeze(-1) * self.data * s.unsqueeze(-2), self.out, self.symmetric)

    def restrict(self, s: slice) -> Block:
        # A copy: a view would keep, and save, the whole matrix.
        return Dense(self.data[s, s].clone(), None, self.symmetric) if self.data.ndim == 2 else super().restrict(s)

    def transpose(self) -> Dense:
        return Dense(self.data.mT, self._into, self.symmetric, self.shape)

    def scale(self, c: float) -> Dense:
        return replace(self, data=c * self.data)

    def plus(self, other: Block) -> Block | None:
        if isinstance(other, Dense) and other.data.shape == self.data.shape:
            return replace(self, data=self.data + other.data, is_symmetric=self.symmetric and other.symmetric)
        if isinstance(other, Diag | Eye):
            data = self.data.clone()
            data.diagonal(dim1=-2, dim2=-1).add_(other.diag().reshape(data.shape[:-1]))
            return Dense(data, self.out, self.symmetric)
        if self.data.ndim == 2:
            return Dense(self.data + other.to_dense(), self.out, self.symmetric and other.symmetric)
        return None

    def times(self, other: Block) -> Block | None:
        if isinstance(other, Dense) and other.data.shape == self.data.shape:
            return Dense(self.data @ other.data, self.out, is_symmetric=False)
        if isinstance(other, Diag):
            return Dense(self.data * other.d.reshape(self.data.shape[:-1]).unsqueeze(-2), self.out, is_symmetric=False)
        return None

    def map_square(self) -> Dense:
        return Dense(self.data.square(), self.out)


Derived.dense = Dense


def eigh(m: Tensor) -> tuple[Tensor, Tensor]:
    """The eigendecomposition of symmetric matrices; in double precision where single precision does not converge.

    LAPACK says so by an error, or, of some matrices in single precision with many rows of zeros, as units that are
    never active give, by eigenvalues that are not a number.
    """
    try:
        l, q = torch.linalg.eigh(m)
        failed = not bool((l.sum() + q.sum()).isfinite())
    except torch.linalg.LinAlgError:
        failed = True
    if failed:
        l, q = (t.to(m.dtype) for t in torch.linalg.eigh(m.double()))
        if bool(m.isfinite().all()) and not bool((l.sum() + q.sum()).isfinite()):
            raise torch.linalg.LinAlgError(
                f"eigh: LAPACK gives no finite eigenvalues of a finite matrix {tuple(m.shape)}, nor in float64: use a "
                "representation without decompositions, such as PMatDiag"
            )
    return l, q


def _dense_batch(spectral: Spectral) -> Tensor:
    q = spectral.basis.data  # type: ignore[attr-defined]
    return (q * spectral.l.unsqueeze(-2)) @ q.mT
