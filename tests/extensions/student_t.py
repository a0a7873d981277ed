"""A likelihood: regression with heavy tails."""

from dataclasses import dataclass
from math import pi

import torch

from nngeometry.likelihood import Elementwise


@dataclass(frozen=True)
class StudentT(Elementwise):
    """Real targets ``f + sigma t``, with t of Student's distribution with ``nu`` degrees of freedom."""

    nu: float
    sigma: float = 1.0

    def scale(self, f):
        return torch.full_like(f, ((self.nu + 1) / (self.nu + 3)) ** 0.5 / self.sigma)

    def score(self, f, generator):
        u, v = torch.rand(2, *f.shape, dtype=f.dtype, device=f.device, generator=generator)
        t = (self.nu * ((1 - u) ** (-2 / self.nu) - 1)).sqrt() * torch.cos(2 * pi * v)  # Bailey (1994)
        return (self.nu + 1) * t / (self.nu + t.square()) / self.sigma
