"""Operations of torch that are put together of others, which have the derivatives that theirs lack or get wrong."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

#: A sixth in single precision, with which torch's own backward of hardsigmoid multiplies in any.
_SIXTH = float(torch.tensor(1 / 6, dtype=torch.float32))


def hardsigmoid(input: Tensor, inplace: bool = False) -> Tensor:
    """Of torch's own the backward has no derivative. The first derivative is torch's to the bit."""
    clipped = F.relu6(input + 3)
    found = clipped / 6
    if found.requires_grad:
        found = found + (clipped - clipped.detach()) * (_SIXTH - 1 / 6)
    return input.copy_(found) if inplace else found


def embedding(
    input: Tensor,
    weight: Tensor,
    padding_idx: int | None = None,
    max_norm: float | None = None,
    norm_type: float = 2.0,
    scale_grad_by_freq: bool = False,
    sparse: bool = False,
) -> Tensor:
    """With a dense gradient."""
    _require_derivative("nn.Embedding", weight, max_norm, scale_grad_by_freq)
    return F.embedding(input, weight, padding_idx, max_norm, norm_type, scale_grad_by_freq, False)


def _require_derivative(what: str, weight: Tensor, max_norm: float | None, scale_grad_by_freq: bool) -> None:
    """Raise for an option with which the backward is not the derivative of the forward."""
    if weight.requires_grad and (max_norm is not None or scale_grad_by_freq):
        option = "max_norm" if max_norm is not None else "scale_grad_by_freq"
        raise NotImplementedError(
            f"{what} with {option} has no Jacobian (its backward is not the derivative of its forward): set {option} "
            "off on the module"
        )


def require_derivative(module: nn.Module) -> None:
    """Raise for a module whose backward is not the derivative of its forward."""
    if isinstance(module, nn.Embedding | nn.EmbeddingBag):
        what = f"nn.{type(module).__name__}"
        _require_derivative(what, module.weight, module.max_norm, module.scale_grad_by_freq)


def embedding_bag(
    input: Tensor,
    weight: Tensor,
    offsets: Tensor | None = None,
    max_norm: float | None = None,
    norm_type: float = 2,
    scale_grad_by_freq: bool = False,
    mode: str = "mean",
    sparse: bool = False,
    per_sample_weights: Tensor | None = None,
    include_last_offset: bool = False,
    padding_idx: int | None = None,
) -> Tensor:
    """Of torch's own the backward has no derivative. Bags are filled up to the longest."""
    _require_derivative("nn.EmbeddingBag", weight, max_norm, scale_grad_by_freq)
    if max_norm is not None or scale_grad_by_freq:
        options = (max_norm, norm_type, scale_grad_by_freq, mode, sparse, per_sample_weights, include_last_offset)
        return F.embedding_bag(input, weight, offsets, *options, padding_idx)
    ids, factors, there = input, per_sample_weights, torch.ones_like(input, dtype=torch.bool)
    if input.ndim == 1:
        assert offsets is not None
        starts = offsets[:-1] if include_last_offset else offsets
        ends = offsets[1:] if include_last_offset else torch.cat([offsets[1:], offsets.new_tensor([len(input)])])
        longest = max(1, int((ends - starts).amax()) if len(starts) else 1)
        index = starts.unsqueeze(1) + torch.arange(longest, device=input.device)
        there = index < ends.unsqueeze(1)
        index = index.clamp(max=max(0, len(input) - 1))
        ids = input[index] if len(input) else input.new_zeros(index.shape)
        factors = None if factors is None else factors[index]
    if padding_idx is not None:
        there = there & (ids != padding_idx % len(weight))
    rows = F.embedding(ids, weight)
    if mode == "max":
        largest = rows.masked_fill(~there.unsqueeze(2), -torch.inf).max(1).values
        return largest.masked_fill(~there.any(1, keepdim=True), 0.0)
    factors = there.to(rows.dtype) if factors is None else factors * there
    total = (rows * factors.unsqueeze(2)).sum(1)
    return total if mode == "sum" else total / there.sum(1, keepdim=True).clamp(min=1)


#: From a function of torch to what is used in its place where derivatives of derivatives are wanted.
COMPOSITES: dict[Any, Callable[..., Tensor]] = {
    F.hardsigmoid: hardsigmoid,
    F.embedding: embedding,
    F.embedding_bag: embedding_bag,
}


def prelu(input: Tensor, weight: Tensor) -> Tensor:
    """Torch's own gets the shape of its derivative wrong where ``vmap`` has hidden an axis."""
    slope = weight.view(-1, *[1] * (input.ndim - 2)) if weight.numel() > 1 and input.ndim > 1 else weight
    return torch.where(input > 0, input, slope * input)


_BATCH_NORMS = {F.batch_norm, torch.batch_norm}
_INSTANCE_NORMS = {F.instance_norm, torch.instance_norm}
_GROUP_NORMS = {F.group_norm, torch.group_norm}


def normalised(function: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
    """``function(*args, **kwargs)``, of a normalisation such that its derivative is right.

    On a CPU torch (2.13, 2.14) takes one of input and cotangent for the other's order in memory where there is one
    example, whose stride says nothing: strides (C, 1, W C, C) beside contiguous ones give values wrong by their size.
    So the cotangent gets the strides of the input, or those of the copy that instance_norm makes of it. The input stays
    as it is: activation checkpoints are run again outside of any mode, and give the backward theirs.
    """
    if function in _GROUP_NORMS:
        return _group_norm(function, *args, **kwargs)
    y = function(*args, **kwargs)
    if function not in _BATCH_NORMS and function not in _INSTANCE_NORMS:
        return y
    x = args[0] if args else kwargs["input"]
    if y.requires_grad and x.ndim > 2 and x.shape[0] == 1:
        y.register_hook(_laid_like(x) if function in _BATCH_NORMS else Tensor.contiguous)
    return y


def _laid_like(x: Tensor) -> Callable[[Tensor], Tensor]:
    """From a tensor to the same in the order of memory that x has, without holes and repetitions."""
    shape, strides = x.shape, torch.empty_like(x, device="meta").stride()
    return lambda g: g.new_empty_strided(shape, strides).copy_(g)


def _group_norm(
    function: Any, input: Tensor, num_groups: int, weight: Tensor | None = None, *args: Any, **kwargs: Any
) -> Any:
    """Torch's backward for the weight alone reads where there is nothing if the input is in the order channels_last. So
    the input is made to depend on the weight, by adding nothing, which is not saved for the way back.
    """
    if weight is not None and weight.requires_grad and not input.requires_grad and not input.is_contiguous():
        input = input + weight[:0].sum()
    return function(input, num_groups, weight, *args, **kwargs)


class OneExample(TorchFunctionMode):
    """Inside of it, normalisations are as :func:`normalised` says, and PReLU as :func:`prelu`."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is F.prelu and torch._C._are_functorch_transforms_active():  # elsewhere torch's own is right
            return prelu(*args, **kwargs)
        return normalised(func, args, kwargs)


def normalises_one(node: Any) -> bool:
    """Whether a node of autograd's graph is that of a normalisation of one example, or may be."""
    if "BatchNorm" not in type(node).__name__:
        return False
    try:
        return len(node._saved_input) == 1
    except Exception:  # it is made again on the way back
        return True
