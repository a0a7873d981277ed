"""A block of a structure of its own: block tridiagonal."""

from dataclasses import dataclass

import torch
from torch import Tensor

from nngeometry.blocks import Block


@dataclass(frozen=True, eq=False)
class BlockTridiagonal(Block):
    """A symmetric matrix of blocks: diagonal ``(p_k, p_k)``, and below it ``(p_k+1, p_k)``."""

    diagonal: tuple[Tensor, ...]
    below: tuple[Tensor, ...]

    @property
    def shape(self):
        return (sum(map(len, self.diagonal)),)

    def mv(self, V):
        v = V.split([len(d) for d in self.diagonal], -1)
        out = [x @ d.T for x, d in zip(v, self.diagonal, strict=True)]
        for k, b in enumerate(self.below):
            out[k], out[k + 1] = out[k] + v[k + 1] @ b, out[k + 1] + v[k] @ b.T
        return torch.cat(out, -1)

    def scale(self, c):
        return self.map(lambda t: c * t)
