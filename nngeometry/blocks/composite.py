"""Blocks made of other blocks: their sums, products, sub-blocks, and functions of those known by products."""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..changes import no_grad
from ..linalg import funm
from .base import Block, Derived, Map
from .spectral import Eye


@dataclass(frozen=True, eq=False)
class Compression(Block):
    """The diagonal sub-block ``start:stop`` of the flat coordinates of another block, by products with it.

    Args:
        inner: The other block.
        start: The first of the coordinates.
        stop: The end of them.
    """

    inner: Block
    start: int
    stop: int

    @property
    def shape(self) -> tuple[int, ...]:
        return (self.stop - self.start,)

    def mv(self, V: Tensor) -> Tensor:
        return self._by(self.inner.mv, V)

    def once(self, V: Tensor) -> Tensor:
        return self._by(self.inner.once, V)

    def _by(self, product: Map, V: Tensor) -> Tensor:
        padded = torch.nn.functional.pad(V, (self.start, self.inner.numel - self.stop))
        out = product(padded.reshape(*V.shape[:-1], *self.inner.shape))
        return out.reshape(*V.shape[:-1], self.inner.numel)[..., self.start : self.stop]

    def diag(self) -> Tensor:
        return self.inner.diag().flatten()[self.start : self.stop]

    @property
    def symmetric(self) -> bool:
        return self.inner.symmetric

    @property
    def matrix_free(self) -> bool:
        return self.inner.matrix_free

    @property
    def definite(self) -> bool:
        return self.inner.definite


@dataclass(frozen=True, eq=False)
class Congruence(Block):
    """``diag(s) M diag(s)`` of a block known by its products."""

    inner: Block
    s: Tensor

    @property
    def shape(self) -> tuple[int, ...]:
        return self.inner.shape

    def mv(self, V: Tensor) -> Tensor:
        return self.s * self.inner.mv(self.s * V)

    def once(self, V: Tensor) -> Tensor:
        return self.s * self.inner.once(self.s * V)

    def diag(self) -> Tensor:
        return self.s.square() * self.inner.diag()

    @property
    def symmetric(self) -> bool:
        return self.inner.symmetric

    @property
    def matrix_free(self) -> bool:
        return self.inner.matrix_free

    @property
    def definite(self) -> bool:
        return self.inner.definite

    def congruence(self, s: Tensor) -> Congruence:
        return Congruence(self.inner, s * self.s)

    def sample(self, noise: Tensor) -> Tensor:
        return self.s * self.inner.sample(noise)


@dataclass(frozen=True, eq=False)
class Iterated(Block):
    """A function of a symmetric matrix known by its products, by an iteration for each product with it."""

    inner: Block

    @property
    def shape(self) -> tuple[int, ...]:
        return self.inner.shape

    @property
    def matrix_free(self) -> bool:
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

    def iterate(
        self, V: Tensor, shift: float | Tensor, rtol: float | None = None, precondition: Map | None = None
    ) -> Tensor:
        if isinstance(shift, Tensor) or precondition is not None:
            return super().iterate(V, shift, rtol, precondition)
        with no_grad():  # one iteration, rather than one inside of another
            x = funm(self.inner._product, V.reshape(-1, self.numel), lambda l: 1 / (self.f(l) + shift), tol=rtol)
        return x.view(V.shape)


@dataclass(frozen=True, eq=False)
class Inverse(Iterated):
    """``(M + regul)^-1``, by one solve for each product."""

    regul: float

    @property
    def definite(self) -> bool:
        return self.inner.definite

    def _rows(self, V: Tensor) -> Tensor:
        return self.inner.iterate(V, self.regul)

    def solve(self, V: Tensor, regul: float = 0.0) -> Tensor:
        if regul == 0:
            return self.inner.mv(V) + self.regul * V
        return super().solve(V, regul)

    def apply(self, f: Map) -> Block:
        # Of the matrix itself: the products of Lanczos' method are not solves with an error of their own.
        return Function(self.inner, lambda l: f((l + self.regul).reciprocal()))


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


@dataclass(frozen=True, eq=False)
class Sum(Block):
    """A linear combination of unlike blocks.

    Args:
        terms: The blocks.
        weights: The weight of each.
    """

    terms: tuple[Block, ...]
    weights: tuple[float, ...]

    @property
    def shape(self) -> tuple[int, ...]:
        return self.terms[0].shape

    @property
    def matrix_free(self) -> bool:
        return any(t.matrix_free for t in self.terms)

    def describe(self) -> str:
        return " + ".join(t.describe() for t in self.terms)

    def mv(self, V: Tensor) -> Tensor:
        return sum(w * t.mv(V) for w, t in zip(self.weights, self.terms, strict=True))  # type: ignore[return-value]

    def once(self, V: Tensor) -> Tensor:
        return sum(w * t.once(V) for w, t in zip(self.weights, self.terms, strict=True))  # type: ignore[return-value]

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

    def apply(self, f: Map) -> Block:
        if len(self.terms) > 1:
            return super().apply(f)
        return self.terms[0].apply(lambda l: f(self.weights[0] * l))

    def sample(self, noise: Tensor) -> Tensor:
        if len(self.terms) > 1 or self.weights[0] < 0:
            return super().sample(noise)
        return self.weights[0] ** 0.5 * self.terms[0].sample(noise)


@dataclass(frozen=True, eq=False)
class Product(Block):
    """The product ``left right``: in general it is not symmetric, so it has no eigendecomposition here.

    Args:
        left: The one block.
        right: The other one, which acts first.
    """

    left: Block
    right: Block

    @property
    def symmetric(self) -> bool:
        return False

    @property
    def matrix_free(self) -> bool:
        return self.left.matrix_free or self.right.matrix_free

    @property
    def shape(self) -> tuple[int, ...]:
        return self.left.shape

    def mv(self, V: Tensor) -> Tensor:
        return self.left.mv(self.right.mv(V))

    def once(self, V: Tensor) -> Tensor:
        return self.left.once(self.right.once(V))

    def to_dense(self) -> Tensor:
        return self.left.mv(self.right.to_dense().T.reshape(-1, *self.shape)).reshape(-1, self.numel).T

    def eig(self) -> Block:
        raise NotImplementedError(
            "a product of two matrices is not symmetric, so it has no eigendecomposition, and nothing that needs one: "
            "use to_torch(), or work with the factors"
        )

    def solve(self, V: Tensor, regul: float = 0.0) -> Tensor:
        if regul == 0:
            return self.right.solve(self.left.solve(V, 0.0), 0.0)
        return super().solve(V, regul)

    def transpose(self) -> Block:
        return Product(self.right.transpose(), self.left.transpose())


Derived.function, Derived.inverse, Derived.compression, Derived.sum = Function, Inverse, Compression, Sum
Derived.congruence = Congruence


def add(one: Block, other: Block, weight: float = 1.0) -> Block:
    """The sum ``one + weight other``, in closed form where there is one.

    Args:
        one: A block.
        other: A block on the same vectors.
        weight: A number, by default 1.

    Raises:
        ValueError: If they act on different vectors.
    """
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
    """The product ``one other``, in closed form where there is one.

    Args:
        one: A block.
        other: A block on the same vectors, which acts first.
    """
    closed = one.times(other)
    if closed is None and isinstance(other, Eye):
        closed = one.scale(float(other.c))
    return Product(one, other) if closed is None else closed
