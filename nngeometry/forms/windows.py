"""Second moments of the windows that a convolution sees, made with the channels last in memory."""

from __future__ import annotations

from collections.abc import Sequence
from math import prod

from torch import Tensor

from ..memory import slices
from .moments import few_examples, mirror, moment_with_one, second_moment, total_of


def window_moment(
    x: Tensor, kernel: Sequence[int], stride: Sequence[int], dilation: Sequence[int], positions: int, bias: bool
) -> Tensor:
    """The sum over examples and positions of a a^T, a being the windows of the padded input x ``(B, C, *in)``.

    Channels last, a window is copied in runs of all channels of a row of pixels, several times as fast as pixel by
    pixel; the moment is put into the order of the weight at the end. positions: how many windows an example has. bias:
    whether a has a last entry of one.

    Returns:
        ``(1, cols + bias, cols + bias)`` with ``cols = C prod(kernel)``, the kernel being the faster index.
    """
    n, channels, pixels = len(kernel), x.shape[1], prod(kernel)
    cols = channels * pixels
    size = positions * cols * x.element_size()
    few = few_examples(size, len(x), cols, len(x) * positions, x.device)

    def of(b: slice) -> Tensor:
        a = x[b].permute(0, *range(2, 2 + n), 1).contiguous()
        for axis, (k, s, d) in enumerate(zip(kernel, stride, dilation, strict=True)):
            a = a.unfold(1 + axis, d * (k - 1) + 1, s)[..., ::d]
        a = a.permute(*range(1 + n), *range(2 + n, 2 + 2 * n), 1 + n).reshape(-1, 1, cols)
        return moment_with_one(a.unsqueeze(0)) if bias else second_moment(a)

    total = mirror(total_of(map(of, slices(len(x), few))))
    moment = total.clone() if bias else total.new_empty(total.shape)
    moment[0, :cols, :cols].unflatten(1, (channels, pixels)).unflatten(0, (channels, pixels)).copy_(
        total[0, :cols, :cols].unflatten(1, (pixels, channels)).unflatten(0, (pixels, channels)).permute(1, 0, 3, 2)
    )
    if bias:
        moment[0, -1, :cols] = total[0, -1, :cols].view(pixels, channels).T.flatten()
        moment[0, :cols, -1] = moment[0, -1, :cols]
    return moment
