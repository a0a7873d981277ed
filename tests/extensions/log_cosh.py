"""A loss: the logarithm of the hyperbolic cosine."""

import torch
from torch.nn import functional as F

from nngeometry import OutputLoss


class LogCosh(OutputLoss):
    """``sum log cosh(f - y)``, of which the mean over examples is taken."""

    def total(self, f, y):
        d = (f - y).abs()
        return (d + F.softplus(-2 * d) - torch.log(torch.tensor(2.0))).sum()

    def hvp(self, f, u, y):
        return u / torch.cosh(f - y).square()
