"""A representation with an estimator of its own: the cross terms of neighbouring layers."""

from itertools import pairwise

import torch

from nngeometry import PMat
from nngeometry.estimation import Estimator
from nngeometry.kinds import Packing

from .tridiagonal import BlockTridiagonal


class PMatTridiagonal(PMat):
    """A dense block for each layer, and its cross terms with the next layer."""

    @classmethod
    def plan(cls, layers):
        def observe(forms, n):
            pairs = zip(layers, forms, strict=True)
            rows = [layer.packing.unpack(form.dense()).flatten(0, 1) for layer, form in pairs]
            return (*(r.T @ r for r in rows), *(b.T @ a for a, b in pairwise(rows)))

        def finish(state, n):
            means = [total / n for total in state]
            return BlockTridiagonal(tuple(means[: len(layers)]), tuple(means[len(layers) :]))

        def centre(block, mean):
            m = mean.split([len(d) for d in block.diagonal])
            diagonal = tuple(d - torch.outer(a, a) for d, a in zip(block.diagonal, m, strict=True))
            below = tuple(b - torch.outer(m[k + 1], m[k]) for k, b in enumerate(block.below))
            return BlockTridiagonal(diagonal, below)

        flat = Packing.flat(sum(layer.numel() for layer in layers))
        return [Estimator(tuple(layers), flat, observe, finish, centre)]
