"""Which entries of a kernel between outputs of examples are kept, and how they are laid out as matrices."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from .. import arguments
from ..forms import LayerJacobian


@dataclass(frozen=True)
class Layout(ABC):
    """A kernel of ``outputs[0]`` outputs of ``examples[0]`` examples with ``outputs[1]`` of ``examples[1]`` others.

    Its entries are a batch of matrices ``(G, r, c)``; a vector is ``(G, r)`` for what a user sees as ``(C, n)``.
    """

    outputs: tuple[int, int]
    examples: tuple[int, int]

    @property
    @abstractmethod
    def shape(self) -> tuple[int, int, int]:
        """``(G, r, c)``."""

    @property
    @abstractmethod
    def seen(self) -> tuple[int, ...]:
        """The shape that a user sees."""

    @abstractmethod
    def pack(self, u: Tensor) -> Tensor:
        """From ``(C, n)`` to ``(..., G, r)``, on either side."""

    @abstractmethod
    def unpack(self, U: Tensor) -> Tensor:
        """From ``(..., G, r)`` back to ``(C, n)``."""

    @abstractmethod
    def add(self, one: LayerJacobian, other: LayerJacobian, out: Tensor) -> None:
        """Add the inner products of two Jacobians to the matrices of their examples."""

    @abstractmethod
    def where(self, b: slice, e: slice) -> tuple[slice, slice, slice]:
        """Where the tile of some examples with others is in the matrices."""

    @abstractmethod
    def view(self, data: Tensor) -> Tensor:
        """The matrices ``(G, r, c)`` as a user sees them."""

    @abstractmethod
    def unview(self, entries: Tensor) -> Tensor:
        """The inverse of :meth:`view`."""

    #: The axes of examples in what a user sees.
    axes: tuple[int, int] = (0, 1)

    @abstractmethod
    def cotangents(self, U: Tensor) -> Tensor:
        """The cotangents ``(m, C, n)`` whose products with both Jacobians make those of vectors U ``(k, G, c)``."""

    @abstractmethod
    def collect(self, T: Tensor) -> Tensor:
        """From the products ``(m, C, n)`` of :meth:`cotangents` to ``(k, G, r)``."""

    @abstractmethod
    def of_squares(self, squares: Tensor) -> Tensor:
        """The diagonal ``(G, r)`` from the squared norms of Jacobians ``(C, n)``."""

    def transpose(self) -> Layout:
        return replace(self, outputs=self.outputs[::-1], examples=self.examples[::-1])

    def of_examples(self, n: int, m: int) -> Layout:
        """The same for other numbers of examples."""
        return replace(self, examples=(n, m))

    def empty(self, like: Any) -> Tensor:
        """New matrices ``(G, r, c)`` of the dtype and on the device of something that has both."""
        return torch.empty(self.shape, dtype=like.dtype, device=like.device)

    def check(self) -> None:
        """Raise unless this can be made of these outputs."""
        if self.outputs[0] != self.outputs[1]:
            raise ValueError(
                f"the two sides have {self.outputs[0]} and {self.outputs[1]} outputs, so there are no pairs of equal "
                'ones: use output="full" or output="sum"'
            )


@dataclass(frozen=True)
class Full(Layout):
    """Every output with every other: a user sees ``(C, n, C', n')``. Examples are the slower index inside."""

    axes: tuple[int, int] = (1, 3)

    @property
    def shape(self) -> tuple[int, int, int]:
        return 1, self.outputs[0] * self.examples[0], self.outputs[1] * self.examples[1]

    @property
    def seen(self) -> tuple[int, ...]:
        return self.outputs[0], self.examples[0], self.outputs[1], self.examples[1]

    def pack(self, u: Tensor) -> Tensor:
        return u.T.reshape(1, -1)

    def unpack(self, U: Tensor) -> Tensor:
        return U.reshape(-1, self.outputs[0]).T

    def add(self, one: LayerJacobian, other: LayerJacobian, out: Tensor) -> None:
        one.add_inner(other, out.view(one.examples, one.cotangents, other.examples, other.cotangents))

    def where(self, b: slice, e: slice) -> tuple[slice, slice, slice]:
        c, d = self.outputs
        return slice(0, 1), slice(b.start * c, b.stop * c), slice(e.start * d, e.stop * d)

    def view(self, data: Tensor) -> Tensor:
        (c, d), (n, m) = self.outputs, self.examples
        return data.view(n, c, m, d).permute(1, 0, 3, 2)

    def unview(self, entries: Tensor) -> Tensor:
        return entries.permute(1, 0, 3, 2).reshape(self.shape)

    def cotangents(self, U: Tensor) -> Tensor:
        return U.reshape(len(U), -1, self.outputs[1]).transpose(1, 2)

    def collect(self, T: Tensor) -> Tensor:
        return T.transpose(1, 2).reshape(len(T), 1, -1)

    def of_squares(self, squares: Tensor) -> Tensor:
        return self.pack(squares)

    def check(self) -> None:
        pass


@dataclass(frozen=True)
class Diagonal(Layout):
    """Every output with itself: a user sees ``(C, n, n')``, C matrices."""

    axes: tuple[int, int] = (1, 2)

    @property
    def shape(self) -> tuple[int, int, int]:
        return self.outputs[0], *self.examples

    @property
    def seen(self) -> tuple[int, ...]:
        return self.shape

    def pack(self, u: Tensor) -> Tensor:
        return u

    def unpack(self, U: Tensor) -> Tensor:
        return U.reshape(self.outputs[0], -1)

    def add(self, one: LayerJacobian, other: LayerJacobian, out: Tensor) -> None:
        for c in range(self.outputs[0]):
            one.of_cotangent(c).add_inner(other.of_cotangent(c), out[c][:, None, :, None])

    def where(self, b: slice, e: slice) -> tuple[slice, slice, slice]:
        return slice(0, self.outputs[0]), b, e

    def view(self, data: Tensor) -> Tensor:
        return data

    def unview(self, entries: Tensor) -> Tensor:
        return entries

    def cotangents(self, U: Tensor) -> Tensor:
        k, c, n = U.shape
        out = U.new_zeros(k, c, c, n)
        out.diagonal(dim1=1, dim2=2).copy_(U.transpose(1, 2))
        return out.flatten(0, 1)

    def collect(self, T: Tensor) -> Tensor:
        c = self.outputs[0]
        return T.unflatten(0, (-1, c)).diagonal(dim1=1, dim2=2).transpose(1, 2)

    def of_squares(self, squares: Tensor) -> Tensor:
        return squares


@dataclass(frozen=True)
class Traced(Layout):
    """The sum over outputs of every one with itself: a user sees ``(n, n')``, which acts on each output alike."""

    @property
    def shape(self) -> tuple[int, int, int]:
        return 1, *self.examples

    @property
    def seen(self) -> tuple[int, ...]:
        return self.examples

    def pack(self, u: Tensor) -> Tensor:
        return u.unsqueeze(1)

    def unpack(self, U: Tensor) -> Tensor:
        return U.reshape(-1, U.shape[-1])

    def add(self, one: LayerJacobian, other: LayerJacobian, out: Tensor) -> None:
        one.add_traced(other, out[0])

    def where(self, b: slice, e: slice) -> tuple[slice, slice, slice]:
        return slice(0, 1), b, e

    def view(self, data: Tensor) -> Tensor:
        return data[0]

    def unview(self, entries: Tensor) -> Tensor:
        return entries.unsqueeze(0)

    def cotangents(self, U: Tensor) -> Tensor:
        k, _, n = U.shape
        c = self.outputs[0]
        out = U.new_zeros(k, c, c, n)
        out.diagonal(dim1=1, dim2=2).copy_(U.transpose(1, 2).expand(k, n, c))
        return out.flatten(0, 1)

    def collect(self, T: Tensor) -> Tensor:
        c = self.outputs[0]
        return T.unflatten(0, (-1, c)).diagonal(dim1=1, dim2=2).sum(2).unsqueeze(1)

    def of_squares(self, squares: Tensor) -> Tensor:
        return squares.sum(0, keepdim=True)


def centre(entries: Tensor, axes: tuple[int, int]) -> Tensor:
    """Both Jacobians less their means over examples: the axes of examples centred."""
    for axis in axes:
        entries = entries - entries.mean(axis, keepdim=True)
    return entries


def positions(examples: Any, n: int, device: torch.device) -> Tensor:
    """The positions among n of some examples: a slice, an index, a sequence or tensor of indices, or a mask."""
    try:
        wanted = examples if isinstance(examples, slice | int) else torch.as_tensor(examples, device=device)
        return torch.arange(n, device=device)[wanted].reshape(-1)
    except (IndexError, TypeError, ValueError, RuntimeError) as error:
        raise IndexError(
            f"{arguments.described(examples)} selects no examples: expected positions below {n}, a slice, or a mask of "
            f"{n} entries ({str(error).splitlines()[0]})"
        ) from error


def take(entries: Tensor, axes: tuple[int, int], index: Tensor, other: Tensor) -> Tensor:
    """The entries of some examples on both sides."""
    return torch.index_select(torch.index_select(entries, axes[0], index), axes[1], other)
