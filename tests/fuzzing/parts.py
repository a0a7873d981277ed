"""Small modules and helpers of which nets are made, beside those of torch. Scripts copy what they use."""

from __future__ import annotations

import torch
from torch import nn


class Gain(nn.Module):
    """A user's own layer, with parameters of odd names."""

    def __init__(self, d):
        super().__init__()
        self.gain = nn.Parameter(torch.ones(d))
        self.shift = nn.Parameter(torch.zeros(()))

    def forward(self, x, power=1):
        return torch.sin(x) ** power * self.gain + self.shift


class Several(nn.Module):
    """A layer that returns several tensors, of which one is used."""

    def __init__(self, d):
        super().__init__()
        self.inner = nn.Linear(d, d)
        self.scale = nn.Parameter(torch.ones(d))

    def forward(self, x):
        y = self.inner(x)
        return y * self.scale, {"again": y}


class First(nn.Module):
    """The first of what a module returns."""

    def __init__(self, inner):
        super().__init__()
        self.inner = inner

    def forward(self, x):
        return self.inner(x)[0]


class Flipped(nn.Linear):
    """A linear layer that is something else."""

    def forward(self, x):
        return super().forward(x.flip(-1)) + x.mean(-1, keepdim=True)


class Centre(nn.Module):
    """As a parametrisation: less the mean."""

    def forward(self, w):
        return w - w.mean()


def randomise(net, seed=0):
    """Give every parameter and statistic a generic value."""
    g = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in net.parameters():
            p.add_(0.3 * torch.randn(p.shape, generator=g, dtype=torch.float64))
        for name, b in net.named_buffers():
            if name.endswith("running_mean"):
                b.copy_(0.3 * torch.randn(b.shape, generator=g, dtype=torch.float64))
            if name.endswith("running_var"):
                b.copy_(0.5 + torch.rand(b.shape, generator=g, dtype=torch.float64))
    return net.eval()
