"""Kinds of elementwise scalings: normalisation layers, affine layers, PReLU. Their Jacobian is as small as their
output.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..forms import Dense
from ..layers import Affine1d
from .kind import Packing, built_in


def _pairs(module: Any, bias: bool) -> Packing:
    """``(d, 1)``, or ``(d, 2)`` with each weight beside its bias."""
    d = module.weight.numel()
    return Packing.matrix((d, 1), (0, 1), (d,), bias)


def _scaling(module: Any, gy: Tensor, x: Tensor) -> Dense:
    """y = weight * x + bias with gy ``(C, B, T, d)`` and x ``(B, T, d)``."""
    weight = torch.einsum("cbtd,btd->cbd", gy, x)
    if module.bias is None:
        return Dense(weight.unsqueeze(-1))
    return Dense(torch.stack([weight, gy.sum(2)], -1))


def _channels_last(t: Tensor, lead: int) -> Tensor:
    """``(*lead, d, *positions) -> (*lead, T, d)``."""
    return t.flatten(lead + 1).transpose(lead, lead + 1) if t.ndim > lead + 1 else t.unsqueeze(lead)


@built_in(nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, packing=_pairs)
def batch_norm(module: Any, gy: Tensor, x: Tensor) -> Dense:
    y = F.batch_norm(x, module.running_mean.to(x), module.running_var.to(x), eps=module.eps)
    return _scaling(module, _channels_last(gy, 2), _channels_last(y, 1))


@built_in(nn.InstanceNorm1d, nn.InstanceNorm2d, nn.InstanceNorm3d, packing=_pairs)
def instance_norm(module: Any, gy: Tensor, x: Tensor) -> Dense:
    if module.training or not module.track_running_stats:
        y = F.instance_norm(x, eps=module.eps)
    else:
        y = F.batch_norm(x, module.running_mean.to(x), module.running_var.to(x), eps=module.eps)
    return _scaling(module, _channels_last(gy, 2), _channels_last(y, 1))


@built_in(nn.GroupNorm, packing=_pairs)
def group_norm(module: Any, gy: Tensor, x: Tensor) -> Dense:
    y = F.group_norm(x, module.num_groups, eps=module.eps)
    return _scaling(module, _channels_last(gy, 2), _channels_last(y, 1))


@built_in(nn.LayerNorm, packing=_pairs, features_last=True)
def layer_norm(module: Any, gy: Tensor, x: Tensor) -> Dense:
    y = F.layer_norm(x, module.normalized_shape, eps=module.eps)
    d = module.weight.numel()
    return _scaling(module, gy.reshape(*gy.shape[:2], -1, d), y.reshape(y.shape[0], -1, d))


def _single(module: Any, bias: bool) -> Packing:
    return Packing.flat(module.weight.numel())


@built_in(nn.RMSNorm, packing=_single, features_last=True)
def rms_norm(module: Any, gy: Tensor, x: Tensor) -> Dense:
    y = F.rms_norm(x, module.normalized_shape, eps=module.eps)
    d = module.weight.numel()
    return Dense(torch.einsum("cbtd,btd->cbd", gy.reshape(*gy.shape[:2], -1, d), y.reshape(y.shape[0], -1, d)))


@built_in(Affine1d, packing=_pairs, features_last=True)
def affine(module: Any, gy: Tensor, x: Tensor) -> Dense:
    d = module.num_features
    return _scaling(module, gy.reshape(*gy.shape[:2], -1, d), x.reshape(x.shape[0], -1, d))


@built_in(nn.PReLU, packing=_single)
def prelu(module: Any, gy: Tensor, x: Tensor) -> Dense:
    j = (_channels_last(gy, 2) * _channels_last(x.clamp(max=0), 1)).sum(2)  # (C, B, d)
    return Dense(j if module.num_parameters > 1 else j.sum(2, keepdim=True))
