"""Blocks: the linear algebra of one matrix on one set of coordinates, written once for all structures.

A block is a linear map on tensors of shape ``(..., *shape)``, symmetric unless it says otherwise. A structure gives
``mv`` and, where it has something better than the defaults, ``diag``, ``to_dense``, ``eigenvalues`` and ``eig``.
Everything else is here: matrix functions are spectral, f(M) = Q f(l) Q^T.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass, fields
from math import prod
from typing import Any, ClassVar

import torch
from torch import Tensor

from ..linalg import cg, eigsh, funm, minres
from ..memory import require

Map = Callable[[Tensor], Tensor]
#: Entries of vectors that are rotated at a time, so that what comes between two bases stays in the cache.
_PIECE = 2**20
#: One number, or a positive one for each coordinate.
Regul = float | Tensor


@dataclass(frozen=True, eq=False)
class Block(ABC):
    """A linear map on tensors of shape ``(..., *shape)``."""

    kinds: ClassVar[dict[str, type[Block]]] = {}

    def __init_subclass__(cls) -> None:
        Block.kinds[cls.__name__] = cls

    # What a structure is: these four, of which the first two are due.

    @property
    @abstractmethod
    def shape(self) -> tuple[int, ...]:
        """Shape of the vectors it returns (and takes, unless it is a basis)."""

    @abstractmethod
    def mv(self, V: Tensor) -> Tensor:
        """``M V`` for V of shape ``(..., *shape)``. Differentiable in V."""

    def on_columns(self, V: Tensor) -> Tensor:
        """A block on ``(G, cols)`` along the last axis of V ``(..., G, rows, cols)``."""
        return self.mv(V.transpose(-3, -2)).transpose(-3, -2)

    def on_rows(self, V: Tensor) -> Tensor:
        """A block on ``(G, rows)`` along the second last axis of V ``(..., G, rows, cols)``."""
        return self.mv(V.movedim(-1, 0)).movedim(0, -1)

    def to_dense(self) -> Tensor:
        """The matrix ``(p, p)`` on flattened coordinates."""
        eye = torch.eye(self.numel, dtype=self.dtype, device=self.device)
        return self.mv(eye.view(-1, *self.shape)).reshape(self.numel, self.numel).T

    def eig(self) -> Block:
        """The same block with its eigendecomposition at hand, as a :class:`Spectral` (or several, side by side)."""
        return self._as_dense("eigendecomposition").eig()

    @property
    def symmetric(self) -> bool:
        """Whether it equals its transpose; sums and direct sums of symmetric blocks do, products do not."""
        return True

    @property
    def by_products(self) -> bool:
        """Whether entries are known by products alone: then verbs that need the whole matrix are iterative, or
        raise.
        """
        return False

    @property
    def definite(self) -> bool:
        """Whether it is known to be positive semidefinite."""
        return False

    # Derived, and overridden where the structure makes it cheaper.

    @property
    def numel(self) -> int:
        """Number of coordinates."""
        return prod(self.shape)

    def diag(self) -> Tensor:
        """The diagonal, in the shape of a vector."""
        return self._as_dense("diagonal").data.diagonal().reshape(self.shape)

    def eigenvalues(self) -> Tensor:
        """All eigenvalues ``(p,)``, in no particular order."""
        return self.eig().eigenvalues()

    def top(self, k: int | None) -> tuple[Tensor, Tensor]:
        """The k largest eigenvalues (None: all that it holds), descending, and their eigenvectors: ``(k,)``, ``(k,
        *shape)``.
        """
        if not self.by_products:
            return self.eig().top(k)
        if k is None:
            raise ValueError("eig: say how many, eig(k): a matrix known by its products has them by Lanczos")
        if k == 0:
            return self._empty().new_zeros(0), self._empty().new_zeros(0, self.numel)
        pairs = eigsh(self._product, self.numel, k, like=self._empty())
        return pairs.values, pairs.vectors

    def trace(self) -> Tensor:
        return self.diag().sum()

    def norm(self, ord: int | float | str | None = None) -> Tensor:
        """Frobenius (None, "fro"), spectral (2), smallest singular value (-2), or nuclear norm ("nuc")."""
        if ord is None or ord == "fro":
            return self._frobenius()
        if ord == 2 and self.by_products:
            return eigsh(self._product, self.numel, 1, which="magnitude", like=self._empty()).values.abs()[0]
        if ord == 2:
            return self.eigenvalues().abs().max()
        if ord == -2:
            return self.eigenvalues().abs().min()
        if ord == "nuc":
            return self.eigenvalues().abs().sum()
        raise ValueError(f"norm: ord={ord!r} is not one of None, 'fro', 2, -2, 'nuc'")

    def _frobenius(self) -> Tensor:
        return torch.linalg.vector_norm(self._as_dense("norm").data)

    def apply(self, f: Map) -> Block:
        """f(M), with f applied to the eigenvalues."""
        return Function(self, f) if self.by_products else self.eig().apply(f)

    def solve(self, V: Tensor, regul: Regul = 0.0) -> Tensor:
        """``(M + regul)^-1 V``. Raises ``ValueError`` if that is singular to working precision."""
        if isinstance(regul, Tensor):
            s = self._inverse_root(regul)
            return s * self.congruence(s)._solve(s * V, 1.0)
        return self._solve(V, regul)

    def _inverse_root(self, regul: Tensor) -> Tensor:
        if not bool((regul > 0).all()):
            raise ValueError("regul: layers that share a block need a positive value each")
        return regul.rsqrt().reshape(self.shape)

    def _solve(self, V: Tensor, regul: float) -> Tensor:
        return self.iterate(V, regul) if self.by_products else self._as_dense("solve")._solve(V, regul)

    def iterate(self, V: Tensor, regul: Regul, rtol: float | None = None, precondition: Map | None = None) -> Tensor:
        """``(M + regul)^-1 V`` by conjugate gradients, or by MINRES where M may be indefinite.

        rtol: of the true residual, by default 1e-6 (100 eps if that is more). precondition: approximates
        ``(M + regul)^-1`` on ``(k, p)``; for conjugate gradients.
        """
        if not self.symmetric:
            raise NotImplementedError(
                f"solve: {self.describe()} is not symmetric and known by its products alone, which conjugate gradients "
                "and MINRES do not solve: use a representation that holds its entries, or nngeometry.linalg.lsmr"
            )
        with torch.no_grad():
            b = V.reshape(-1, self.numel)
            shift = regul.reshape(-1) if isinstance(regul, Tensor) else regul
            tolerance = max(1e-6, 100 * torch.finfo(self.dtype).eps) if rtol is None else rtol

            def shifted(rows: Tensor) -> Tensor:
                return self._product(rows) + shift * rows

            if self.definite or precondition is not None:
                x = cg(shifted, b, rtol=tolerance, preconditioner=precondition).x
            else:
                x = minres(shifted, b, rtol=tolerance).x
            return x.view(V.shape)

    def _product(self, rows: Tensor) -> Tensor:
        """``(k, p) -> (k, p)``, outside of autograd."""
        with torch.no_grad():
            return self.mv(rows.reshape(-1, *self.shape)).reshape(-1, self.numel)

    def _empty(self) -> Tensor:
        return torch.empty(0, dtype=self.dtype, device=self.device)

    def inv(self, regul: Regul = 0.0) -> Block:
        """``(M + regul)^-1``. Raises ``ValueError`` if that is singular to working precision."""
        if isinstance(regul, Tensor):
            s = self._inverse_root(regul)
            return self.congruence(s)._inv(1.0).congruence(s)
        return self._inv(regul)

    def _inv(self, regul: float) -> Block:
        return Inverse(self, regul) if self.by_products else self._as_dense("inverse")._inv(regul)

    def logdet(self, regul: Regul = 0.0) -> Tensor:
        """``log det(M + regul)``. Raises ``ValueError`` if that is not positive definite."""
        if isinstance(regul, Tensor):
            return self.congruence(self._inverse_root(regul)).logdet(1.0) + regul.log().sum()
        l = self.eigenvalues()
        check_invertible(l, regul)
        if bool((l + regul < 0).any()):
            raise ValueError(
                f"logdet: the matrix has negative eigenvalues (smallest {float(l.min()):.3g}), regul={regul} is "
                "too small"
            )
        return (l + regul).log().sum()

    def pinv(self, rtol: float | None = None) -> Block:
        """Pseudo-inverse: eigenvalues below ``rtol`` (by default p eps) times the largest are dropped."""
        largest = self.norm(2)
        eps = torch.finfo(self.dtype).eps
        cut = (self.numel * eps if rtol is None else rtol) * largest
        return self.apply(lambda l: torch.where(l.abs() > cut, l.abs().clamp(min=cut).reciprocal() * l.sign(), 0.0))

    def pow(self, exponent: float) -> Block:
        """M**exponent. Raises ``ValueError`` where an eigenvalue makes it undefined."""
        if exponent == 1:
            return self
        if self.by_products:
            return self.apply(_power(exponent))
        spectral = self.eig()
        l = spectral.eigenvalues()
        if exponent < 0:
            check_invertible(l, 0.0)
        if exponent == int(exponent):
            return spectral.apply(lambda l: l**exponent)
        noise = self.numel * torch.finfo(l.dtype).eps * l.abs().max()
        if bool((l < -noise).any()):
            raise ValueError(f"pow({exponent}): the matrix has negative eigenvalues (smallest {float(l.min()):.3g})")
        return spectral.apply(lambda l: l.clamp(min=0) ** exponent)

    def sample(self, noise: Tensor) -> Tensor:
        """Vectors with covariance M from white noise of shape ``(..., *shape)``."""
        return self.pow(0.5).mv(noise)

    def congruence(self, s: Tensor) -> Block:
        """``diag(s) M diag(s)``."""
        return self._as_dense("rescaling").congruence(s)

    def restrict(self, s: slice) -> Block:
        """The diagonal sub-block of the flat coordinates s."""
        return Compression(self, s.start, s.stop)

    def transpose(self) -> Block:
        return self

    def map_square(self) -> Block:
        """The matrix of squared entries, for the bases that need it."""
        return Block.kinds["Dense"](self.to_dense().square(), self.shape)  # type: ignore[call-arg]

    def scale(self, c: float) -> Block:
        """c M."""
        return Sum((self,), (c,))

    def plus(self, other: Block) -> Block | None:
        """M + other if the sum has a closed form here, otherwise None."""
        return None

    def times(self, other: Block) -> Block | None:
        """M other if the product has a closed form here, otherwise None."""
        return None

    # What every block can do because its fields are tensors, blocks and plain values.

    @property
    def dtype(self) -> torch.dtype:
        return self.tensors()[0].dtype

    @property
    def device(self) -> torch.device:
        return self.tensors()[0].device

    def tensors(self) -> list[Tensor]:
        """Its tensors, depth first."""
        found: list[Tensor] = []

        def note(t: Tensor) -> Tensor:
            found.append(t)
            return t

        self.map(note)
        return found

    def nbytes(self) -> int:
        """Bytes held, each tensor counted once."""
        return sum({t.data_ptr(): t.numel() * t.element_size() for t in self.tensors()}.values())

    def describe(self) -> str:
        """What it is, in a word or two, for tables."""
        return type(self).__name__

    def map(self, fn: Map) -> Block:
        """The same block with ``fn`` applied to every tensor."""
        return type(self)(**{f.name: _map(fn, getattr(self, f.name)) for f in fields(self)})

    def state(self) -> dict[str, Any]:
        """Plain dict of tensors, numbers and strings, from which :meth:`from_state` makes the block again."""
        return {"block": type(self).__name__, **{f.name: _state(getattr(self, f.name)) for f in fields(self)}}

    @staticmethod
    def from_state(state: dict[str, Any]) -> Block:
        return Block.kinds[state["block"]]._rebuild({k: v for k, v in state.items() if k != "block"})

    @classmethod
    def _rebuild(cls, state: dict[str, Any]) -> Block:
        return cls(**{k: _from_state(v) for k, v in state.items()})

    def __getstate__(self) -> dict[str, Any]:
        return {f.name: getattr(self, f.name) for f in fields(self)}  # without caches

    def _as_dense(self, operation: str) -> Any:
        """As a dense matrix, if it fits the memory budget and takes no products."""
        if self.by_products:
            raise NotImplementedError(
                f"{operation}: a matrix known by its products alone would take {self.numel} of them. Use an "
                "estimator of "
                "nngeometry.linalg or nngeometry.spectrum, a representation that holds its entries, or to_torch()"
            )
        from_ = type(self).__name__
        require(
            self.numel**2 * self.dtype.itemsize,
            f"{operation}: the dense form of a {from_} of {self.numel} parameters",
            "work on fewer layers, use a representation with a closed form",
        )
        return Block.kinds["Dense"](self.to_dense(), self.shape, self.symmetric)  # type: ignore[call-arg]


def check_invertible(l: Tensor, regul: float) -> None:
    """Raise ``ValueError`` unless ``l + regul`` stays away from zero by more than rounding."""
    if l.numel() == 0:
        return
    largest = float(l.abs().max())
    smallest = float((l + regul).abs().min())
    tolerance = (l.numel() if regul == 0 else 4) * torch.finfo(l.dtype).eps * largest
    if smallest <= tolerance:
        raise ValueError(
            f"the matrix plus regul={regul:.3g} is singular to working precision ({l.dtype}: eigenvalues reach "
            f"{largest:.3g}, and one of the "
            f"regularised ones is {smallest:.3g}): use regul of at least {max(10 * tolerance, 1e-30):.1g}, or pinv"
        )


def check_held(l: Tensor, k: int | None, rest: Tensor) -> None:
    """Raise ``ValueError`` unless the k largest eigenvalues are among the descending l, rather than those outside
    of its eigenvectors.
    """
    if k is None:
        return
    noise = l.numel() * torch.finfo(l.dtype).eps * l.abs().max() if len(l) else 0.0
    if k > len(l) or (k and len(rest) and bool(l[k - 1] < rest.max() - noise)):
        raise ValueError(
            f"eig(k={k}): the representation holds {len(l)} eigenvectors; outside of their span eigenvalues reach "
            f"{float(rest.max()) if len(rest) else 0.0:.3g}, which is more than the smallest asked for: ask for "
            "fewer, or for all with k=None"
        )


def _map(fn: Map, value: Any) -> Any:
    if isinstance(value, Tensor):
        return fn(value)
    if isinstance(value, Block):
        return value.map(fn)
    if isinstance(value, tuple):
        return tuple(_map(fn, v) for v in value)
    return value


def _state(value: Any) -> Any:
    if isinstance(value, Block):
        return value.state()
    if isinstance(value, tuple):
        return [_state(v) for v in value]
    return value


def _from_state(value: Any) -> Any:
    if isinstance(value, dict):
        return Block.from_state(value)
    if isinstance(value, list):
        return tuple(_from_state(v) for v in value)
    return value


@dataclass(frozen=True, eq=False)
class Spectral(Block):
    """``Q diag(l) Q^T + rest (1 - Q Q^T)`` with orthonormal columns Q: an eigendecomposition, possibly of a part of
    the space.

    EKFAC is one with Q a Kronecker product. basis: Q, a block from vectors of the shape of l; rest: the eigenvalue
    outside its span.
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
        """The eigenvectors of the flat indices of l: ``(k, *shape)``."""
        one_hot = self.l.new_zeros(len(index), self.l.numel())
        one_hot[torch.arange(len(index), device=index.device), index] = 1.0
        return self.basis.mv(one_hot.view(-1, *self.l.shape))

    def trace(self) -> Tensor:
        return self.l.sum() + self._missing * self.rest

    def _frobenius(self) -> Tensor:
        return (self.l.square().sum() + self._missing * self.rest.square()).sqrt()

    def apply(self, f: Map) -> Spectral:
        return Spectral(self.basis, f(self.l), f(self.rest) if self._missing else self.rest)

    def _solve(self, V: Tensor, regul: float) -> Tensor:
        return self._inv(regul).mv(V)

    def _inv(self, regul: float) -> Spectral:
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
    """``c`` times the identity."""

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

    def _solve(self, V: Tensor, regul: float) -> Tensor:
        return self._inv(regul).mv(V)

    def _inv(self, regul: float) -> Eye:
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
    """A diagonal matrix: d, in the shape of a vector."""

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

    def pow(self, exponent: float) -> Block:
        return _unrotated(super().pow(exponent))

    def _solve(self, V: Tensor, regul: float) -> Tensor:
        check_invertible(self.d, regul)
        return V / (self.d + regul)

    def _inv(self, regul: float) -> Diag:
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


@dataclass(frozen=True, eq=False)
class Compression(Block):
    """The diagonal sub-block ``start:stop`` of the flat coordinates of another block, by products with it."""

    inner: Block
    start: int
    stop: int

    @property
    def shape(self) -> tuple[int, ...]:
        return (self.stop - self.start,)

    def mv(self, V: Tensor) -> Tensor:
        padded = torch.nn.functional.pad(V, (self.start, self.inner.numel - self.stop))
        out = self.inner.mv(padded.reshape(*V.shape[:-1], *self.inner.shape))
        return out.reshape(*V.shape[:-1], self.inner.numel)[..., self.start : self.stop]

    def diag(self) -> Tensor:
        return self.inner.diag().flatten()[self.start : self.stop]

    @property
    def symmetric(self) -> bool:
        return self.inner.symmetric

    @property
    def by_products(self) -> bool:
        return self.inner.by_products

    @property
    def definite(self) -> bool:
        return self.inner.definite


@dataclass(frozen=True, eq=False)
class Iterated(Block):
    """A function of a symmetric matrix known by its products, by an iteration for each product with it."""

    inner: Block

    @property
    def shape(self) -> tuple[int, ...]:
        return self.inner.shape

    @property
    def by_products(self) -> bool:
        return True

    @abstractmethod
    def _rows(self, V: Tensor) -> Tensor:
        """``(k, p) -> (k, p)``."""

    def mv(self, V: Tensor) -> Tensor:
        return Adjointed.apply(self._rows, self._rows, V.reshape(-1, self.numel)).view(V.shape)


@dataclass(frozen=True, eq=False)
class Function(Iterated):
    """f(M), by Lanczos."""

    f: Map

    def _rows(self, V: Tensor) -> Tensor:
        return funm(self.inner._product, V, self.f)


@dataclass(frozen=True, eq=False)
class Inverse(Iterated):
    """``(M + regul)^-1``, by one solve for each product."""

    regul: float

    @property
    def definite(self) -> bool:
        return self.inner.definite

    def _rows(self, V: Tensor) -> Tensor:
        return self.inner.iterate(V, self.regul)

    def solve(self, V: Tensor, regul: Regul = 0.0) -> Tensor:
        if not isinstance(regul, Tensor) and regul == 0:
            return self.inner.mv(V) + self.regul * V
        return super().solve(V, regul)


class Adjointed(torch.autograd.Function):
    """``A V`` for a linear map given as a function, differentiable by its transpose, since A does not depend on V."""

    @staticmethod
    def forward(ctx: Any, forward: Map, backward: Map, V: Tensor) -> Tensor:
        ctx.pair = forward, backward
        return forward(V.detach())

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[None, None, Tensor]:
        forward, backward = ctx.pair
        return None, None, Adjointed.apply(backward, forward, grad)


def _power(exponent: float) -> Map:
    """Lambda**exponent, NaN where it is undefined; rounding below zero counts as zero."""

    def f(l: Tensor) -> Tensor:
        noise = l.numel() * torch.finfo(l.dtype).eps * l.abs().max()
        if exponent == int(exponent):
            return l**exponent
        return torch.where(l < -100 * noise, torch.nan, l.clamp(min=0) ** exponent)

    return f


@dataclass(frozen=True, eq=False)
class Sum(Block):
    """A linear combination of unlike blocks."""

    terms: tuple[Block, ...]
    weights: tuple[float, ...]

    @property
    def shape(self) -> tuple[int, ...]:
        return self.terms[0].shape

    @property
    def by_products(self) -> bool:
        return any(t.by_products for t in self.terms)

    def describe(self) -> str:
        return " + ".join(t.describe() for t in self.terms)

    def mv(self, V: Tensor) -> Tensor:
        return sum(w * t.mv(V) for w, t in zip(self.weights, self.terms, strict=True))  # type: ignore[return-value]

    def to_dense(self) -> Tensor:
        return sum(w * t.to_dense() for w, t in zip(self.weights, self.terms, strict=True))  # type: ignore[return-value]

    def diag(self) -> Tensor:
        return sum(w * t.diag() for w, t in zip(self.weights, self.terms, strict=True))  # type: ignore[return-value]

    def trace(self) -> Tensor:
        return sum(w * t.trace() for w, t in zip(self.weights, self.terms, strict=True))  # type: ignore[return-value]

    @property
    def symmetric(self) -> bool:
        return all(t.symmetric for t in self.terms)

    def transpose(self) -> Block:
        return Sum(tuple(t.transpose() for t in self.terms), self.weights)

    def congruence(self, s: Tensor) -> Sum:
        return Sum(tuple(t.congruence(s) for t in self.terms), self.weights)

    def restrict(self, s: slice) -> Sum:
        return Sum(tuple(t.restrict(s) for t in self.terms), self.weights)

    def scale(self, c: float) -> Sum:
        return Sum(self.terms, tuple(c * w for w in self.weights))


@dataclass(frozen=True, eq=False)
class Product(Block):
    """``left right``: in general not symmetric, so it has no eigendecomposition here."""

    left: Block
    right: Block

    @property
    def symmetric(self) -> bool:
        return False

    @property
    def by_products(self) -> bool:
        return self.left.by_products or self.right.by_products

    @property
    def shape(self) -> tuple[int, ...]:
        return self.left.shape

    def mv(self, V: Tensor) -> Tensor:
        return self.left.mv(self.right.mv(V))

    def to_dense(self) -> Tensor:
        return self.left.mv(self.right.to_dense().T.reshape(-1, *self.shape)).reshape(-1, self.numel).T

    def eig(self) -> Block:
        raise NotImplementedError(
            "a product of two matrices is not symmetric, so it has no eigendecomposition, and nothing that needs one: "
            "use to_torch(), or work with the factors"
        )

    def _solve(self, V: Tensor, regul: float) -> Tensor:
        if regul == 0:
            return self.right._solve(self.left._solve(V, 0.0), 0.0)
        return super()._solve(V, regul)

    def transpose(self) -> Block:
        return Product(self.right.transpose(), self.left.transpose())


def add(one: Block, other: Block, weight: float = 1.0) -> Block:
    """``one + weight other``, in closed form where there is one."""
    if one.shape != other.shape:
        raise ValueError(f"cannot add blocks of shapes {one.shape} and {other.shape}")
    scaled = other if weight == 1 else other.scale(weight)
    closed = one.plus(scaled)
    if closed is None:
        closed = scaled.plus(one)
    if closed is not None:
        return closed
    return Sum((*_terms(one)[0], *_terms(scaled)[0]), (*_terms(one)[1], *_terms(scaled)[1]))


def _terms(block: Block) -> tuple[tuple[Block, ...], tuple[float, ...]]:
    return (block.terms, block.weights) if isinstance(block, Sum) else ((block,), (1.0,))


def matmul(one: Block, other: Block) -> Block:
    """``one other``, in closed form where there is one."""
    closed = one.times(other)
    if closed is None and isinstance(other, Eye):
        closed = one.scale(float(other.c))
    return Product(one, other) if closed is None else closed
