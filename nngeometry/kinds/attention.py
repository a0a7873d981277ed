"""The kind of nn.MultiheadAttention: four linear maps, of queries, keys, values and of what is read."""

from __future__ import annotations

from collections.abc import Mapping, Set
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..forms import Outer
from ..memory import chunk_length, slices
from .kind import Packing, built_in

_MAPS = 4


def _packing(module: nn.MultiheadAttention, bias: bool) -> Packing:
    """Four groups: the three of ``in_proj_weight``, and ``out_proj``."""
    e = module.embed_dim
    in_weight, in_bias, out_weight, out_bias = 3 * e * e, 3 * e * bias, e * e, e * bias
    runs = [(0, in_weight), (in_weight + in_bias, in_weight + in_bias + out_weight)]
    if bias:
        end = in_weight + in_bias + out_weight
        runs += [(in_weight, in_weight + in_bias), (end, end + out_bias)]
    return Packing.matrix((_MAPS, e, e), (0, 1, 2), (_MAPS, e), bias, tuple(runs))


@built_in(
    nn.MultiheadAttention,
    packing=_packing,
    parameters=("in_proj_weight", "in_proj_bias", "out_proj.weight", "out_proj.bias"),
    kronecker=True,
    whole=True,
    bound=True,
)
def multihead_attention(
    module: nn.MultiheadAttention, gy: Tensor, call: Mapping[str, Any], constant: Set[str]
) -> Outer | None:
    """From the softmax of its own arithmetic, made once more of what the hook saw.

    Sequences of other lengths are filled up with zeros.
    """
    query, key, value = (call[name] for name in ("query", "key", "value"))
    if query.ndim != 3 or gy.ndim != 4 or not constant.isdisjoint(("query", "key", "value", "key_padding_mask")):
        return None
    heads, weight = module.num_heads, module.in_proj_weight
    biases = [None] * 3 if module.in_proj_bias is None else module.in_proj_bias.to(query.dtype).chunk(3)
    q, k, v = (
        F.linear(x, w, b).unflatten(2, (heads, -1)).transpose(1, 2)  # (N, H, T, D)
        for x, w, b in zip((query, key, value), weight.to(query.dtype).chunk(3), biases, strict=True)
    )
    if module.add_zero_attn:
        k, v = (F.pad(t, (0, 0, 0, 1)) for t in (k, v))
    scale = q.shape[-1] ** -0.5
    scores = scale * q @ k.mT
    for mask in _masks(call, scores):
        scores = scores.masked_fill(mask, -torch.inf) if mask.dtype == torch.bool else scores + mask
    p = scores.softmax(-1)
    read = (p @ v).transpose(1, 2).flatten(2)
    out = module.out_proj.weight.to(query.dtype)
    g = gy.new_zeros(len(gy), len(query), max(query.shape[1], key.shape[1]), _MAPS, gy.shape[-1])
    g[:, :, : query.shape[1], 3] = gy
    for c in slices(len(gy), chunk_length(4 * p.numel() * p.element_size(), len(gy), gy.device)):
        of_read = (gy[c] @ out).unflatten(3, (heads, -1)).transpose(2, 3)  # (C, N, H, T, D)
        of_p = of_read @ v.mT
        of_scores = scale * p * (of_p - (of_p * p).sum(-1, keepdim=True))
        found = of_scores @ k, of_scores.mT @ q, p.mT @ of_read
        for group, (x, of_x) in enumerate(zip((query, key, value), found, strict=True)):
            length = x.shape[1]
            g[c, :, :length, group] = of_x.transpose(2, 3).flatten(3)[:, :, :length]
    a = torch.stack([_filled(x, g.shape[2], module.in_proj_bias is not None) for x in (query, key, value, read)], 2)
    lengths = [x.shape[1] for x in (query, key, value, query)]
    filled = tuple(length / g.shape[2] for length in lengths)
    return Outer(a, g, filled=None if min(filled) == 1 else filled)


def _filled(x: Tensor, length: int, bias: bool) -> Tensor:
    """The input of a map with a column of ones for its bias, and as many positions as the longest has."""
    x = F.pad(x, (0, 1), value=1.0) if bias else x
    return F.pad(x, (0, 0, 0, length - x.shape[1]))


def _masks(call: Mapping[str, Any], scores: Tensor) -> list[Tensor]:
    """What is added to the scores ``(N, H, T, S)``, or where they are left out."""
    n, heads, queries, keys = scores.shape
    if call["is_causal"] and call["key_padding_mask"] is None and not call["need_weights"]:
        return [scores.new_ones(queries, keys, dtype=torch.bool).triu(1)]  # which torch takes for the mask
    masks = []
    if call.get("attn_mask") is not None:
        mask = call["attn_mask"]
        masks.append(mask.reshape(-1, heads, *mask.shape[-2:]) if mask.ndim == 3 else mask)
    if call.get("key_padding_mask") is not None:
        masks.append(call["key_padding_mask"].view(n, 1, 1, -1))
    empty = [False if mask.dtype == torch.bool else 0.0 for mask in masks]
    return [F.pad(mask, (0, keys - mask.shape[-1]), value=e) for mask, e in zip(masks, empty, strict=True)]
