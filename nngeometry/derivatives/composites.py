"""Operations of torch that are put together of others, which have the derivatives that theirs lack or get wrong."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from .lstm import lstm

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


def cdist(x1: Tensor, x2: Tensor, p: float = 2.0, compute_mode: str | None = None) -> Tensor:
    """Of torch's own the backward has no derivative. Where two points are the same the derivative is zero, as there."""
    if not (x1.requires_grad or x2.requires_grad):
        return torch.cdist(x1, x2, p)
    return _length(x1.unsqueeze(-2) - x2.unsqueeze(-3), p)


def pdist(input: Tensor, p: float = 2.0) -> Tensor:
    """Of torch's own the backward has no derivative."""
    i, j = torch.triu_indices(len(input), len(input), 1, device=input.device)
    return _length(input[i] - input[j], p)


def _length(d: Tensor, p: float) -> Tensor:
    """The p-norms along the last axis, with derivative zero at zero."""
    size = d.abs()
    if p == 0:
        return (d != 0).to(d.dtype).sum(-1)
    if p == torch.inf:
        return size.amax(-1)
    if p == 1:
        return size.sum(-1)
    there = d != 0
    powers = torch.where(there, size, 1.0).pow(p).mul(there).sum(-1)
    some = there.any(-1)
    return torch.where(some, powers, 1.0).pow(1 / p).mul(some)


#: Stands for the logarithm of zero, such that differences are numbers.
_LOG_OF_NOTHING = -1e30


def ctc_loss(
    log_probs: Tensor,
    targets: Tensor,
    input_lengths: Any,
    target_lengths: Any,
    blank: int = 0,
    reduction: str = "mean",
    zero_infinity: bool = False,
) -> Tensor:
    """Of torch's own the backward has no derivative: the recursion over time over the positions in a target with a
    blank around each of its entries, as operations that have one.

    Source: Graves et al. (2006), ICML.
    """
    lengths, sizes = (
        torch.as_tensor(given, dtype=torch.long, device=log_probs.device).reshape(-1)
        for given in (input_lengths, target_lengths)
    )
    if not log_probs.requires_grad or bool((lengths < 1).any()):
        return F.ctc_loss(log_probs, targets, input_lengths, target_lengths, blank, reduction, zero_infinity)
    alone = log_probs.ndim == 2
    scores = log_probs.unsqueeze(1) if alone else log_probs
    labels = targets.to(log_probs.device, torch.long)
    if alone:
        labels = labels.reshape(1, -1)
    elif labels.ndim == 1:  # of all examples, one after the other
        labels = nn.utils.rnn.pad_sequence(labels[: int(sizes.sum())].split(sizes.tolist()), batch_first=True)
    n, most = labels.shape
    at = torch.full((n, 2 * most + 1), blank, device=log_probs.device)
    at[:, 1::2] = labels.clamp(0, log_probs.shape[-1] - 1)
    place = torch.arange(at.shape[1], device=log_probs.device)
    jump = F.pad(at[:, 2:] != at[:, :-2], (2, 0)) & (at != blank)
    nothing = scores.new_full((n, at.shape[1]), _LOG_OF_NOTHING)
    each = scores.gather(2, at.expand(len(scores), -1, -1))
    alpha = torch.where(place < 2, each[0], nothing)
    for t in range(1, len(scores)):
        one, two = (F.pad(alpha, (k, 0), value=_LOG_OF_NOTHING)[:, : at.shape[1]] for k in (1, 2))
        ways = torch.stack([alpha, one, torch.where(jump, two, nothing)])
        alpha = torch.where(t < lengths.unsqueeze(1), ways.logsumexp(0) + each[t], alpha)
    last = 2 * sizes.unsqueeze(1)
    loss = -torch.where((place == last) | (place == last - 1), alpha, nothing).logsumexp(1)
    impossible = loss > -_LOG_OF_NOTHING / 10
    loss = torch.where(impossible, 0.0 if zero_infinity else torch.inf, loss)
    if reduction == "mean":
        return (loss / sizes.clamp(min=1)).mean()
    return loss.sum() if reduction == "sum" else loss[0] if alone else loss


def normalize(input: Tensor, p: float = 2.0, dim: Any = 1, eps: float = 1e-12, out: Tensor | None = None) -> Tensor:
    """Of a vector shorter than eps, zero above all, torch's second derivative is not a number, though all that is done
    is a division by eps.
    """
    if p != 2 or out is not None or not input.requires_grad:
        return F.normalize(input, p, dim, eps, out)
    short = torch.linalg.vector_norm(input.detach(), 2, dim, keepdim=True) < eps
    size = torch.linalg.vector_norm(torch.where(short, 1.0, input), 2, dim, keepdim=True)
    return input / torch.where(short, eps, size)


#: From a function of torch to what is used in its place where derivatives of derivatives are wanted.
COMPOSITES: dict[Any, Callable[..., Any]] = {
    F.hardsigmoid: hardsigmoid,
    F.embedding: embedding,
    F.embedding_bag: embedding_bag,
    F.ctc_loss: ctc_loss,
    F.normalize: normalize,
    torch.cdist: cdist,
    F.pdist: pdist,
    torch.pdist: pdist,
    torch.lstm: lstm,
}


class DifferentiableTwice(TorchFunctionMode):
    """Inside of it, operations whose backward has no derivative in torch are put together of others."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return COMPOSITES.get(func, func)(*args, **(kwargs or {}))


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
