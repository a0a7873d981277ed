"""Several vector-Jacobian products at a time: on any device the same as one after the other."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from nngeometry import memory
from nngeometry.derivatives.pulling import BatchedVJP


@pytest.fixture(params=[memory.CPU, memory.ACCELERATOR], ids=["cpu", "accelerator"], autouse=True)
def _grain(request, cut):
    cut(request.param)


class Alone(torch.autograd.Function):
    """The sine, whose derivative cannot be taken of several at once."""

    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return x.sin()

    @staticmethod
    def backward(ctx, g):
        if g.count_nonzero() == 0:  # which asks for a number
            return g
        return g * ctx.saved_tensors[0].cos()


def convolutions():
    return nn.Sequential(
        nn.Conv2d(2, 3, 3, padding=1), nn.BatchNorm2d(3), nn.ReLU(), nn.MaxPool2d(2), nn.Conv2d(3, 2, 1), nn.Flatten()
    ).eval()


class Sine(nn.Module):
    def forward(self, x):
        return Alone.apply(x).flatten(1)


@pytest.mark.parametrize("make", [convolutions, Sine])
@pytest.mark.parametrize("count", [1, 4])
def test_several_are_each(make, count):
    torch.manual_seed(0)
    model = make()
    x, unused = torch.randn(3, 2, 4, 4, requires_grad=True), torch.ones(1, requires_grad=True)
    f = model(x)
    outputs = [f, x.square().sum((2, 3))]
    weights = [torch.randn(count, *y.shape) for y in outputs]
    expected = [torch.autograd.grad(outputs, x, [w[k] for w in weights], retain_graph=True)[0] for k in range(count)]
    pull = BatchedVJP()
    for last in (False, True):
        found, none = pull(outputs, [x, unused], weights, last)
        assert none is None
        torch.testing.assert_close(found, torch.stack(expected), rtol=1e-12, atol=1e-12)


def test_where_nothing_is_reached():
    x, unused = torch.ones(2, requires_grad=True), torch.ones(1, requires_grad=True)
    assert BatchedVJP()([x.sin()], [unused], [torch.randn(3, 2)]) == [None]
