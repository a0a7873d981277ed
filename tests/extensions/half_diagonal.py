"""A block, Kronecker with a diagonal left factor, and its representation, made of KFAC's factors."""

from dataclasses import dataclass, replace

from torch import Tensor

from nngeometry import PMat, estimators
from nngeometry.blocks import Block


@dataclass(frozen=True, eq=False)
class HalfDiagonal(Block):
    """``diag(left) (x) right`` on vectors ``(G, rows, cols)``: left ``(G, rows)``, right a block on ``(G, cols)``."""

    left: Tensor
    right: Block

    @property
    def shape(self):
        return (*self.left.shape, self.right.shape[-1])

    def mv(self, V):
        return self.left.unsqueeze(-1) * self.right.on_columns(V)

    def scale(self, c):
        return replace(self, left=c * self.left)


class PMatHalfDiagonal(PMat):
    """KFAC with output gradients taken for uncorrelated; the diagonal for layers without Kronecker form."""

    @classmethod
    def plan(cls, layers):
        return [_factored(estimators.kron(layer)) if layer.kronecker else estimators.diag(layer) for layer in layers]


def _factored(kfac):
    def finish(state, n):
        kron = kfac.finish(state, n)
        return HalfDiagonal(kron.left.diag(), kron.right)

    return replace(kfac, finish=finish)
