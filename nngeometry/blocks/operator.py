"""Blocks known by their products alone."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass, fields, is_dataclass
from math import prod
from typing import Any, Self

from torch import Tensor

from ..team import Team, in_common
from .base import Block, Map
from .composite import Adjointed


class Functions:
    """What is given as functions: they hold a model and data, so it stays in the program that made it."""

    def __deepcopy__(self, memo: dict[int, Any]) -> Self:
        return self  # nothing of it changes

    def __reduce_ex__(self, protocol: Any) -> Any:
        raise TypeError(
            "a matrix known by its products alone cannot be pickled: it holds the model, the data and functions of "
            "yours. Make it again from these where it is needed, or pickle a representation that holds its entries"
        )


@dataclass(frozen=True, eq=False)
class Operator(Functions, Block):
    """A symmetric matrix given as functions.

    Args:
        matvec: The product with rows, ``(k, p) -> (k, p)``.
        size: The number of rows of the matrix, p.
        trace_of: Computes the exact trace; None if there is no way but p products.
        diag_of: Computes the exact diagonal; None if there is no way but p products.
        like: An empty tensor of its dtype and device.
        psd: Whether it is positive semidefinite.
        single: The same products, each as if it were the only one; None, the default, if there is no difference.
        weight_of: What the data that it is of count in a mean, which is known after a first product; None, the default,
            if it is not averaged.
        team: The processes that add up every product together; None, the default, for this one alone.

    Example:
        >>> import torch
        >>> A = Operator(lambda V: 2 * V, 3, None, None, like=torch.empty(0), psd=True)
        >>> A.solve(torch.ones(3), regul=2.0)
        tensor([0.2500, 0.2500, 0.2500])
    """

    matvec: Map
    size: int
    trace_of: Callable[[], Tensor] | None
    diag_of: Callable[[], Tensor] | None
    like: Tensor
    psd: bool
    single: Map | None = None
    weight_of: Callable[[], float] | None = None
    team: Team | None = None

    @property
    def shape(self) -> tuple[int, ...]:
        return (self.size,)

    @property
    def matrix_free(self) -> bool:
        return True

    @property
    def definite(self) -> bool:
        return self.psd

    def mv(self, V: Tensor) -> Tensor:
        return self._by(self.matvec, V)

    def once(self, V: Tensor) -> Tensor:
        return self._by(self.single or self.matvec, V)

    def _by(self, matvec: Map, V: Tensor) -> Tensor:
        if V.numel() == 0:
            return V.clone()
        return Adjointed.apply(matvec, self.matvec, V.reshape(-1, self.size)).view(V.shape)

    def diag(self) -> Tensor:
        return super().diag() if self.diag_of is None else self.diag_of()

    def trace(self) -> Tensor:
        if self.trace_of is not None:
            return self.trace_of()
        return super().trace() if self.diag_of is not None else self._as_dense("trace").trace()

    def weight(self) -> float:
        """What the data that it is of count, after a product with it.

        Raises:
            ValueError: If it was not told.
        """
        if self.weight_of is None:
            raise ValueError("an average of matrices known by their products needs what each counts: give weight_of=")
        return self.weight_of()

    def congruence(self, s: Tensor) -> Block:
        single = self.single
        return Operator(
            lambda V: s * self.matvec(s * V),
            self.size,
            lambda: (s.square() * self.diag()).sum(),
            lambda: s.square() * self.diag(),
            self.like,
            self.psd,
            None if single is None else lambda V: s * single(s * V),
            team=self.team,
        )

    def map(self, fn: Map) -> Block:
        moved = fn(self.like)
        if moved.dtype != self.like.dtype or moved.device != self.like.device:
            raise TypeError(
                "a matrix known by its products alone stays where its model is: move the model and build it again"
            )
        return self

    def state(self) -> dict[str, Any]:
        raise TypeError("a matrix known by its products alone cannot be saved: it holds the model and the data")


@dataclass(frozen=True, eq=False)
class Rectangular(Functions, Block):
    """Any linear map, given as functions.

    Args:
        matvec: The product with rows, ``(k, c) -> (k, r)``.
        rmatvec: That with its transpose, ``(k, r) -> (k, c)``.
        out: The shape of the vectors that it returns, of r elements.
        into: The shape of those that it takes, of c elements.
        like: An empty tensor of its dtype and device.
    """

    matvec: Map
    rmatvec: Map
    out: tuple[int, ...]
    into: tuple[int, ...]
    like: Tensor

    @property
    def shape(self) -> tuple[int, ...]:
        return self.out

    @property
    def symmetric(self) -> bool:
        return False

    @property
    def matrix_free(self) -> bool:
        return True

    def mv(self, V: Tensor) -> Tensor:
        lead = V.shape[: V.ndim - len(self.into)]
        return Adjointed.apply(self.matvec, self.rmatvec, V.reshape(-1, prod(self.into))).view(*lead, *self.out)

    def transpose(self) -> Rectangular:
        return Rectangular(self.rmatvec, self.matvec, self.into, self.out, self.like)

    def scale(self, c: float) -> Rectangular:
        return Rectangular(lambda V: c * self.matvec(V), lambda V: c * self.rmatvec(V), self.out, self.into, self.like)


def team_of(value: Any) -> Team | None:
    """The processes that add up products together in a matrix, or in one that it is made of."""
    if isinstance(value, Operator):
        return value.team
    if isinstance(value, tuple | list):
        parts: Any = value
    elif is_dataclass(value):
        parts = (getattr(value, f.name) for f in fields(value))
    else:
        return None
    return next((team for part in parts if (team := team_of(part)) is not None and team.size > 1), None)


def drawn_alike(block: Block) -> AbstractContextManager[None]:
    """Inside, random vectors that are multiplied with a matrix of several processes are the same on all of them."""
    return in_common(team_of(block))
