"""A layer kind: a low-rank adapter of a frozen linear map."""

import torch
from torch import nn

from nngeometry import kind
from nngeometry.forms import Dense


class Adapter(nn.Module):
    """y = W0 x + B A x, with W0 frozen."""

    def __init__(self, inputs, outputs, rank):
        super().__init__()
        self.W0 = nn.Parameter(torch.randn(outputs, inputs), requires_grad=False)
        self.A = nn.Parameter(torch.randn(rank, inputs))
        self.B = nn.Parameter(torch.randn(outputs, rank))

    def forward(self, x):
        return x @ self.W0.T + x @ self.A.T @ self.B.T


@kind(Adapter, parameters=["A", "B"])
def adapter(module, gy, x):
    a = torch.einsum("cb...o,or,b...i->cbri", gy, module.B, x)
    b = torch.einsum("cb...o,b...r->cbor", gy, x @ module.A.T)
    return Dense(torch.cat([a.flatten(2), b.flatten(2)], 2))
