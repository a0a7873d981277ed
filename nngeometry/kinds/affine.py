"""Kinds of affine layers with shared weights: linear, convolution, transposed convolution, embedding, bilinear."""

from __future__ import annotations

import sys
from collections.abc import Callable
from math import prod
from typing import Any

from torch import Tensor, nn
from torch.nn import functional as F

from ..forms import Gather, LayerJacobian, Outer, moment_with_one
from ..forms.autocorrelation import patch_moment
from ..forms.windows import window_moment
from ..memory import tuning
from .kind import Packing, built_in, when_imported


def _with_one(a: Tensor) -> Tensor:
    """The input with a last column of ones, for the bias."""
    return F.pad(a, (0, 1), value=1.0)


def _rows_packing(module: Any, bias: bool) -> Packing:
    """Weight ``(rows, *cols)``."""
    weight = module.weight
    view = (1, weight.shape[0], weight[0].numel())
    return Packing.matrix(view, (0, 1, 2), view[:2], bias)


@built_in(
    nn.Linear,
    nn.modules.linear.NonDynamicallyQuantizableLinear,
    packing=_rows_packing,
    kronecker=True,
    features_last=True,
)
def linear(module: Any, gy: Tensor, x: Tensor) -> Outer:
    inputs = x.reshape(x.shape[0], -1, 1, x.shape[-1])
    g = gy.reshape(*gy.shape[:2], -1, 1, gy.shape[-1])
    return Outer(inputs, g) if module.bias is None else Outer(inputs, g, _with_one, x.shape[-1] + 1, moment_with_one)


@built_in(nn.Bilinear, packing=_rows_packing, kronecker=True, features_last=True)
def bilinear(module: nn.Bilinear, gy: Tensor, x1: Tensor, x2: Tensor) -> LayerJacobian:
    product = (x1.unsqueeze(-1) * x2.unsqueeze(-2)).flatten(-2)
    return linear(module, gy, product)


def _conv_packing(module: Any, bias: bool) -> Packing:
    """Weight ``(groups * rows, cols, *kernel)``."""
    weight, groups = module.weight, module.groups
    rows = weight.shape[0] // groups
    return Packing.matrix((groups, rows, weight[0].numel()), (0, 1, 2), (groups, rows), bias)


@built_in(nn.Conv1d, nn.Conv2d, nn.Conv3d, packing=_conv_packing, kronecker=True)
def conv(module: nn.Conv2d, gy: Tensor, x: Tensor) -> Outer:
    pads = _pads(module)
    mode = "constant" if module.padding_mode == "zeros" else module.padding_mode

    def expand(x: Tensor) -> Tensor:
        return _patches(F.pad(x, pads, mode=mode) if any(pads) else x, module, module.stride)

    cols = module.weight[0].numel() + (module.bias is not None)
    return Outer(x, _positions(gy, module.groups), expand, cols, _moment(module, x, pads, mode))


def _pads(module: Any) -> list[int]:
    """What is put before and after each axis, the last axis first, as the forward of a convolution takes it."""
    if module.padding_mode != "zeros" or isinstance(module.padding, str):
        return list(module._reversed_padding_repeated_twice)
    padding = (module.padding,) * len(module.kernel_size) if isinstance(module.padding, int) else module.padding
    return [p for p in reversed(padding) for _ in range(2)]


def _moment(module: Any, x: Tensor, pads: list[int], mode: str) -> Callable[[Tensor], Tensor] | None:
    """The second moment of patches, by a way that is faster than making them as they are: by autocorrelation, where it
    is that and that saves work, otherwise from windows with channels last, where these are many.
    """
    if module.groups > 1 or max(module.kernel_size) == 1:
        return None
    n, kernel, bias = x.ndim - 2, module.kernel_size, module.bias is not None
    padding = [(pads[2 * k], pads[2 * k + 1]) for k in reversed(range(n))]
    each = zip(x.shape[2:], padding, kernel, module.stride, module.dilation, strict=True)
    sizes = [(m + a + b - d * (k - 1) - 1) // s + 1 for m, (a, b), k, s, d in each]
    cols, positions = x.shape[1] * prod(kernel), prod(sizes)
    if _correlates(module, x, sizes) and len(x) * positions * cols**2 >= tuning(x.device).large_product:
        return lambda inputs: patch_moment(inputs, kernel, padding, bias).unsqueeze(0)
    few = x.shape[1] == 1 or len(x) * positions < _MANY_WINDOWS * cols
    if few or not tuning(x.device).has_cache:
        return None
    return lambda inputs: window_moment(
        F.pad(inputs, pads, mode=mode), kernel, module.stride, module.dilation, positions, bias
    )


#: From how many windows for each entry of one on their moment, which is put in order at the end, is not what costs.
_MANY_WINDOWS = 2


def _correlates(module: Any, x: Tensor, sizes: list[int]) -> bool:
    """Whether the second moment of patches is an autocorrelation of the input."""
    plain = (1,) * len(sizes)
    if (module.stride, module.dilation, module.padding_mode) != (plain, plain, "zeros") or min(sizes) < 2:
        return False
    # The first axis is the one along which it would be done.
    return module.kernel_size[0] > 1 or not tuning(x.device).few_operations


def _conv_transpose_packing(module: Any, bias: bool) -> Packing:
    """Weight ``(groups * cols, rows, *kernel)``."""
    weight, groups = module.weight, module.groups
    view = (groups, weight.shape[0] // groups, weight.shape[1], prod(weight.shape[2:]))
    return Packing.matrix(view, (0, 2, 1, 3), (groups, weight.shape[1]), bias)


@built_in(nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d, packing=_conv_transpose_packing, kronecker=True)
def conv_transpose(module: Any, gy: Tensor, x: Tensor) -> Outer:
    out = gy.shape[3:]

    def expand(x: Tensor) -> Tensor:
        # A transposed convolution is a plain one of the input spread out with stride - 1 zeros, the kernel flipped.
        sizes = [(n - 1) * s + 1 for n, s in zip(x.shape[2:], module.stride, strict=True)]
        spread = x.new_zeros(*x.shape[:2], *sizes)
        every = [slice(None, None, s) for s in module.stride]
        spread[(..., *every)] = x  # type: ignore[index]
        pads: list[int] = []
        for size, target, k, d, p in zip(sizes, out, module.kernel_size, module.dilation, module.padding, strict=True):
            before = d * (k - 1) - p
            pads = [before, target + d * (k - 1) - size - before, *pads]
        return _patches(F.pad(spread, pads), module, (1,) * len(sizes), flip=True)

    cols = module.weight[:, 0].numel() // module.groups + (module.bias is not None)
    return Outer(x, _positions(gy, module.groups), expand, cols)


def _patches(x: Tensor, module: Any, stride: tuple[int, ...], flip: bool = False) -> Tensor:
    """The windows that a convolution sees and a one for its bias: ``(B, C, *in) -> (B, T, G, cols)``.

    They lie positions last in memory, as they do in the input, so that whole rows of it are copied.
    """
    d, groups = len(stride), module.groups
    for axis, (k, s, dil) in enumerate(zip(module.kernel_size, stride, module.dilation, strict=True)):
        x = x.unfold(2 + axis, dil * (k - 1) + 1, s)[..., ::dil]
    if flip:
        x = x.flip(tuple(range(2 + d, 2 + 2 * d)))
    x = x.permute(0, 1, *range(2 + d, 2 + 2 * d), *range(2, 2 + d)).unflatten(1, (groups, -1))
    sizes, out = x.shape[2 : 3 + d], x.shape[3 + d :]  # (B, G, C / G, *kernel, *out)
    if module.bias is None and prod(module.kernel_size) == 1:  # the windows are the entries
        return x.flatten(2, 2 + d).flatten(3).permute(0, 3, 1, 2)
    cols = prod(sizes)
    patches = x.new_empty(len(x), groups, cols + (module.bias is not None), *out)
    patches[:, :, :cols].unflatten(2, sizes).copy_(x)
    patches[:, :, cols:] = 1.0
    return patches.flatten(3).permute(0, 3, 1, 2)


def _positions(gy: Tensor, groups: int) -> Tensor:
    """``(C, B, G * rows, *out) -> (C, B, T, G, rows)``."""
    return gy.flatten(3).transpose(2, 3).unflatten(3, (groups, -1))


def _columns_packing(module: Any, bias: bool) -> Packing:
    """Weight ``(cols, rows)``."""
    cols, rows = module.weight.shape
    return Packing.matrix((cols, 1, rows), (1, 2, 0), (1, rows), bias)


@built_in(nn.Embedding, packing=_columns_packing, kronecker=True, features_last=True)
def embedding(module: nn.Embedding, gy: Tensor, ids: Tensor) -> Gather:
    if module.max_norm is not None or module.scale_grad_by_freq:
        option = "max_norm" if module.max_norm is not None else "scale_grad_by_freq"
        raise NotImplementedError(
            f"nn.Embedding with {option} has no Jacobian (its backward is not the derivative of its forward): "
            f"set {option} off on the module"
        )
    ids = ids.reshape(ids.shape[0], -1)
    g = gy.reshape(*gy.shape[:2], -1, gy.shape[-1])
    if module.padding_idx is not None:
        padding = ids == module.padding_idx
        ids = ids.masked_fill(padding, -1)
        g = g.masked_fill(padding[..., None], 0.0)
    return Gather(ids, g, module.num_embeddings)


@when_imported("transformers.pytorch_utils")
def _huggingface() -> None:
    conv1d = sys.modules["transformers.pytorch_utils"].Conv1D  # a Linear whose weight is stored transposed
    built_in(conv1d, packing=_columns_packing, kronecker=True, features_last=True)(linear)
