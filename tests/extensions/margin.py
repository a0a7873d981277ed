"""A matrix with cotangents of its own."""

import torch

from nngeometry import Generator, LayerCollection, rowwise
from nngeometry.likelihood import Cotangents


def MarginMoment(model, loader, representation, *, function=None, layer_collection=None, **options):
    """``1/n sum_x g g^T`` with g the gradient of the margin between the two largest outputs ``(n, C)``."""

    def cotangents(f, minibatch, position):
        first, second = f.topk(2, 1).indices.T.unsqueeze(2)
        return Cotangents.of(torch.zeros_like(f).scatter(1, first, 1.0).scatter(1, second, -1.0).unsqueeze(0))

    lc = LayerCollection.from_model(model) if layer_collection is None else layer_collection
    source = Generator(model, lc, rowwise(cotangents), function=function)
    return representation(layer_collection=lc, generator=source, examples=loader, **options)
