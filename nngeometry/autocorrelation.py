"""Second moments of the patches that a convolution sees, without making the patches."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import product
from math import prod

import torch
from torch import Tensor
from torch.nn import functional as F


def patch_moment(x: Tensor, kernel: Sequence[int], padding: Sequence[tuple[int, int]], bias: bool) -> Tensor:
    """The sum over examples and positions of a a^T, a being the patches of a convolution of stride and dilation one.

    x: ``(B, C, *in)``. padding: zeros before and after, for each axis. bias: whether a has a last entry of one. Returns
    ``(C prod(kernel) + bias,) * 2``, the kernel being the faster index.

    The products of pixels d and d' of a patch depend on the offset d' - d alone, up to borders: there is one product of
    images for each offset and, to move from one d to the next, one of the strip that enters and one of that which
    leaves.
    """
    n, channels = len(kernel), x.shape[1]
    image = F.pad(x, [p for pair in reversed(padding) for p in pair]).movedim(1, -1).contiguous()
    out = [m - k + 1 for m, k in zip(image.shape[1:-1], kernel, strict=True)]

    def window(start: Sequence[int], size: Sequence[int]) -> Tensor:
        where = tuple(slice(s, s + m) for s, m in zip(start, size, strict=True))
        return image[(slice(None), *where)].reshape(-1, channels)

    def products(start: Sequence[int], size: Sequence[int], offset: Sequence[int]) -> Tensor:
        moved = [s + o for s, o in zip(start, offset, strict=True)]
        return window(start, size).T @ window(moved, size)

    def is_zero(axis: int, position: int) -> bool:
        before = padding[axis][0]
        return not before <= position < before + x.shape[2 + axis]

    size = channels * prod(kernel)
    moment = x.new_zeros(size + bias, size + bias)
    blocks = moment[:size, :size].view(channels, prod(kernel), channels, prod(kernel))
    index = {d: k for k, d in enumerate(product(*map(range, kernel)))}
    for offset in product(*(range(1 - k, k) for k in kernel)):
        if offset < (0,) * n:
            continue  # by symmetry
        low = [max(0, -o) for o in offset]
        found: dict[tuple[int, ...], Tensor] = {}
        for d in product(*(range(a, k - max(0, o)) for a, k, o in zip(low, kernel, offset, strict=True))):
            axis = next((k for k in range(n) if d[k] > low[k]), None)
            if axis is None:
                found[d] = products(d, out, offset)
            else:
                before = tuple(s - (k == axis) for k, s in enumerate(d))
                value = found[before]
                strip = [1 if k == axis else m for k, m in enumerate(out)]
                for position, sign in ((before[axis] + out[axis], 1), (before[axis], -1)):
                    if not (is_zero(axis, position) or is_zero(axis, position + offset[axis])):
                        start = [position if k == axis else s for k, s in enumerate(before)]
                        value = value + sign * products(start, strip, offset)
                found[d] = value
            i, j = index[d], index[tuple(s + o for s, o in zip(d, offset, strict=True))]
            blocks[:, i, :, j] = found[d]
            blocks[:, j, :, i] = found[d].T
    if bias:
        sums = torch.stack([window(d, out).sum(0) for d in index], 1).flatten()
        moment[-1, :-1] = sums
        moment[:-1, -1] = sums
        moment[-1, -1] = len(x) * prod(out)
    return moment
