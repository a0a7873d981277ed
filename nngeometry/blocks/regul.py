"""What is added to the diagonal of a matrix before it is inverted: one number, or one for each coordinate."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from .base import Block, Map
from .direct import DirectSum, Part


@dataclass(frozen=True)
class Uniform:
    """A multiple of the identity.

    Args:
        number: The multiple.
    """

    number: float

    def on(self, part: Part) -> Uniform:
        """What it is for a part of a direct sum."""
        return self

    @property
    def shift(self) -> float:
        """What products with the identity are multiplied by."""
        return self.number

    def solve(self, M: Block, V: Tensor) -> Tensor:
        """``(M + R)^-1 V``."""
        return M.solve(V, self.number)

    def solver(self, M: Block) -> Map:
        """The map ``V -> (M + R)^-1 V``, with all of the work done that takes no V."""
        return M.solver(self.number)

    def check_positive(self, M: Block) -> None:
        """Raise ``ValueError`` if ``M + R`` has a negative eigenvalue, as far as entries are known."""
        M.check_positive(self.number)

    def solver_by_factors(self, M: Block) -> Map:
        """As :meth:`solver`, R being shared among factors."""
        return M.solver_by_factors(self.number)

    def inv(self, M: Block) -> Block:
        """``(M + R)^-1``."""
        return M.inv(self.number)

    def logdet(self, M: Block) -> Tensor:
        """``log det(M + R)``."""
        return M.logdet(self.number)


@dataclass(frozen=True, eq=False)
class Varying:
    """A diagonal matrix.

    A direct sum takes it part by part, so that a block on which it is constant is inverted as it is. For others,
    ``M + R = R^1/2 (R^-1/2 M R^-1/2 + 1) R^1/2``, which takes a positive R.

    Args:
        d: The diagonal, in the shape of a vector.
    """

    d: Tensor

    @property
    def shift(self) -> Tensor:
        """What products with the identity are multiplied by."""
        return self.d.flatten()

    def on(self, part: Part) -> Uniform | Varying:
        """What it is for a part of a direct sum."""
        d = part.take(self.d)
        first = d.flatten()[0]
        return Uniform(float(first)) if bool((d == first).all()) else Varying(d)

    def _inverse_root(self) -> Tensor:
        if not bool((self.d > 0).all()):
            raise ValueError("regul: layers that share a block need a positive value each")
        return self.d.rsqrt()

    def solve(self, M: Block, V: Tensor) -> Tensor:
        """``(M + R)^-1 V``."""
        if isinstance(M, DirectSum):
            return M.join(lambda part: self.on(part).solve(part.block, part.take(V)))
        s = self._inverse_root()
        return s * M.congruence(s).solve(s * V, 1.0)

    def solver(self, M: Block) -> Map:
        """The map ``V -> (M + R)^-1 V``, with all of the work done that takes no V."""
        s = self._inverse_root()
        inner = M.congruence(s).solver(1.0)
        return lambda V: s * inner(s * V)

    def check_positive(self, M: Block) -> None:
        """Raise ``ValueError`` if ``M + R`` has a negative eigenvalue, as far as entries are known."""
        if isinstance(M, DirectSum):
            for part in M.parts:
                self.on(part).check_positive(part.block)
            return
        M.congruence(self._inverse_root()).check_positive(1.0)

    def solver_by_factors(self, M: Block) -> Map:
        """As :meth:`solver`: what R varies on has no factors."""
        return self.solver(M)

    def inv(self, M: Block) -> Block:
        """``(M + R)^-1``."""
        if isinstance(M, DirectSum):
            return DirectSum(tuple(part.with_block(self.on(part).inv(part.block)) for part in M.parts))
        s = self._inverse_root()
        return M.congruence(s).inv(1.0).congruence(s)

    def logdet(self, M: Block) -> Tensor:
        """``log det(M + R)``."""
        if isinstance(M, DirectSum):
            return torch.stack([self.on(part).logdet(part.block) for part in M.parts]).sum()
        return M.congruence(self._inverse_root()).logdet(1.0) + self.d.log().sum()


Regul = Uniform | Varying
