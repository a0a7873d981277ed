"""The library's own modules: weight-normalised, cosine and affine layers."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class Cosine1d(nn.Linear):
    """Cosine similarity between the input and each row of the weight (no bias): ``(n, in) -> (n, out)``.

    Args:
        in_features: The length of an input.
        out_features: The number of rows of the weight.
        eps: It is added to the squared norms, by default 1e-5.

    Example:
        >>> Cosine1d(3, 2)(torch.ones(5, 3)).shape
        torch.Size([5, 2])
    """

    def __init__(self, in_features: int, out_features: int, eps: float = 1e-05) -> None:
        super().__init__(in_features, out_features, bias=False)
        self.eps = eps

    def forward(self, input: Tensor) -> Tensor:
        x = input / (input.square().sum(-1, keepdim=True) + self.eps).sqrt()
        return F.linear(x, _unit_rows(self.weight, self.eps))


class WeightNorm1d(nn.Linear):
    """A linear map whose weight has rows of norm 1 (no bias): ``(n, in) -> (n, out)``.

    Args:
        in_features: The length of an input.
        out_features: The number of rows of the weight.
        eps: It is added to the squared norms, by default 1e-5.

    Example:
        >>> WeightNorm1d(3, 2)(torch.ones(5, 3)).shape
        torch.Size([5, 2])
    """

    def __init__(self, in_features: int, out_features: int, eps: float = 1e-05) -> None:
        super().__init__(in_features, out_features, bias=False)
        self.eps = eps

    def forward(self, input: Tensor) -> Tensor:
        return F.linear(input, _unit_rows(self.weight, self.eps))


class WeightNorm2d(nn.Conv2d):
    """A 2d convolution whose kernels have norm 1 (no bias).

    Args:
        *args: As of ``nn.Conv2d``.
        eps: It is added to the squared norms, by default 1e-5.
        **kwargs: As of ``nn.Conv2d``.

    Raises:
        ValueError: For ``bias=True``.

    Example:
        >>> WeightNorm2d(3, 2, 3)(torch.ones(5, 3, 4, 4)).shape
        torch.Size([5, 2, 2, 2])
    """

    def __init__(self, *args: Any, eps: float = 1e-05, **kwargs: Any) -> None:
        if kwargs.pop("bias", False):
            raise ValueError("WeightNorm2d has no bias: follow it by an Affine layer instead")
        super().__init__(*args, **{**kwargs, "bias": False})
        self.eps = eps

    def forward(self, input: Tensor) -> Tensor:
        return self._conv_forward(input, _unit_rows(self.weight, self.eps), None)


class Affine1d(nn.Module):
    """Elementwise ``weight * x + bias`` on the last axis: the scaling and shift of a normalisation layer alone.

    Args:
        num_features: The length of the last axis.
        bias: Whether there is a shift, by default True.
        device: Where the parameters are made.
        dtype: In which dtype they are made.

    Example:
        >>> Affine1d(3)(torch.ones(5, 3)).shape
        torch.Size([5, 3])
    """

    def __init__(self, num_features: int, bias: bool = True, device: Any = None, dtype: Any = None) -> None:
        super().__init__()
        self.num_features = num_features
        self.weight = nn.Parameter(torch.ones(num_features, device=device, dtype=dtype))
        self.bias = nn.Parameter(torch.zeros(num_features, device=device, dtype=dtype)) if bias else None

    def reset_parameters(self) -> None:
        """Make it the identity."""
        nn.init.ones_(self.weight)
        if self.bias is not None:
            nn.init.zeros_(self.bias)

    def forward(self, input: Tensor) -> Tensor:
        scaled = input * self.weight
        return scaled if self.bias is None else scaled + self.bias

    def extra_repr(self) -> str:
        return f"num_features={self.num_features}, bias={self.bias is not None}"


def _unit_rows(weight: Tensor, eps: float) -> Tensor:
    """Each ``weight[k]`` divided by ``sqrt(|weight[k]|^2 + eps)``."""
    axes = tuple(range(1, weight.ndim))
    return weight / (weight.square().sum(axes, keepdim=True) + eps).sqrt()
