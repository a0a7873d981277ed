"""Second moments of the patches that a convolution sees, without making the patches."""

from __future__ import annotations

from collections.abc import Sequence
from functools import reduce
from itertools import product
from math import prod

from torch import Tensor
from torch.nn import functional as F

from ..memory import chunk_length, panel_length, slices, tuning

#: Positions, of one axis: from the first to behind the last.
Interval = tuple[int, int]


def patch_moment(x: Tensor, kernel: Sequence[int], padding: Sequence[tuple[int, int]], bias: bool) -> Tensor:
    """The sum over examples and positions of a a^T, a being the patches of a convolution of stride and dilation one.

    x: ``(B, C, *in)``. padding: zeros before and after, for each axis. bias: whether a has a last entry of one. Returns
    ``(C prod(kernel) + bias,) * 2``, the kernel being the faster index.

    Pixels d and d' of a patch differ by an offset o = d' - d, and their products are those of all pixels of the image
    that differ by o, less those that d does not reach or d' does not, near borders. So there is one large product for
    each offset, and small ones at borders.

    Where few operations are faster, that is done along the first axis alone, on the patches along the others, of some
    examples at a time: that is twice as many multiplications for a kernel of 3 x 3, but in 3 large products instead of
    13, and hardly any small ones.
    """
    if not tuning(x.device).few_operations or len(kernel) == 1:
        return _moment(x, kernel, padding, bias, 1)
    others = prod(kernel[1:])
    along_first = (kernel[0], *[1] * len(kernel[1:])), [padding[0], *[(0, 0)] * len(kernel[1:])]
    held = 2 * others * x[0].numel() * x.element_size()
    moments = (
        _moment(_windows(x[some], kernel[1:], padding[1:]), *along_first, bias, others)
        for some in slices(len(x), chunk_length(held, len(x), x.device))
    )
    return reduce(Tensor.add_, moments)


def _moment(x: Tensor, kernel: Sequence[int], padding: Sequence[tuple[int, int]], bias: bool, inner: int) -> Tensor:
    """:func:`patch_moment`. inner: how many of the channels are pixels of a patch, the faster ones."""
    n, channels = len(kernel), x.shape[1]
    sizes = x.shape[2:]
    reach = [m + a + b - k + 1 for m, (a, b), k in zip(sizes, padding, kernel, strict=True)]
    pixels = list(product(*map(range, kernel)))
    number = {d: k for k, d in enumerate(pixels)}
    # Examples next to last, and zeros behind every row, so that an offset along it is one in memory.
    image = (F.pad(x, (0, kernel[-1] - 1)) if kernel[-1] > 1 else x).permute(*range(2, n + 1), 0, n + 1, 1).contiguous()

    def reached(d: Sequence[int]) -> list[Interval]:
        """What pixel d of a patch meets, which may be outside of the image."""
        return [(s - before, s - before + m) for s, (before, _), m in zip(d, padding, reach, strict=True)]

    found: dict[tuple[int, int], Tensor] = {}
    for offset in product(*(range(1 - k, k) for k in kernel)):
        if offset < (0,) * n:
            continue  # by symmetry
        products = _Products(image, offset, sizes)
        for d in product(*(range(max(0, -o), k - max(0, o)) for k, o in zip(kernel, offset, strict=True))):
            other = tuple(s + o for s, o in zip(d, offset, strict=True))
            found[number[d], number[other]] = products.inside(reached(d))
    size = channels * len(pixels)
    moment = x.new_empty(size + bias, size + bias)
    axes = channels // inner, len(pixels), inner
    _interleave(found, moment[:size, :size].view(*axes, *axes))
    if bias:
        for d in pixels:
            where = [slice(max(0, start), max(0, stop)) for start, stop in reached(d)]
            sums = x[(slice(None), slice(None), *where)].sum((0, *range(2, n + 2))).view(-1, inner)
            moment[-1, :size].view(axes)[:, number[d]] = sums
            moment[:size, -1].view(axes)[:, number[d]] = sums
        moment[-1, -1] = len(x) * prod(reach)
    return moment


def _windows(x: Tensor, kernel: Sequence[int], padding: Sequence[tuple[int, int]]) -> Tensor:
    """The patches along all axes but the first as channels, the kernel being the faster index: ``(B, C K, *in)``."""
    x = F.pad(x, [p for pair in reversed(padding) for p in pair])
    for axis, k in enumerate(kernel):
        x = x.unfold(3 + axis, k, 1)
    lead, n = 3 + len(kernel), len(kernel)
    return x.permute(0, 1, *range(lead, lead + n), *range(2, lead)).flatten(1, 1 + n)


def _interleave(found: dict[tuple[int, int], Tensor], out: Tensor) -> None:
    """Put the products of pixels i <= j into out ``(C, pixels, K, C, pixels, K)``, and their transposes."""
    channels, pixels, inner = out.shape[:3]
    step = panel_length(out[0].numel() * out.element_size(), channels, out.device)
    for some in slices(channels, step):  # which stay in the cache, where there is one
        for i, j in product(range(pixels), repeat=2):
            block = found[i, j] if i <= j else found[j, i].T
            out[some, i, :, :, j] = block.unflatten(1, (channels, inner)).unflatten(0, (channels, inner))[some]


class _Products:
    """Sums of ``x(q) x(q + offset)^T`` over pixels q of an image and over examples.

    image: ``(*in[:-1], B, in[-1] + zeros, C)``. sizes: in.
    """

    def __init__(self, image: Tensor, offset: tuple[int, ...], sizes: Sequence[int]) -> None:
        self.image = image
        self.offset = offset
        self.all: list[Interval] = [(max(0, -o), max(0, -o, min(m, m - o))) for m, o in zip(sizes, offset, strict=True)]
        self.known: dict[tuple[Interval, ...], Tensor] = {}

    def inside(self, reached: Sequence[Interval]) -> Tensor:
        """Over the pixels of a box, ``(C, C)``: those of all, less those outside along any axis."""
        choices: list[list[tuple[int, Interval]]] = []
        for (low, high), (start, stop) in zip(self.all, reached, strict=True):
            outside = ((low, min(high, start)), (max(low, stop), high))
            choices.append([(1, (low, high)), *((-1, (a, b)) for a, b in outside if a < b)])
        first, *others = product(*choices)
        total = self.over(tuple(where for _, where in first))
        for terms in others:
            total = total.add(self.over(tuple(where for _, where in terms)), alpha=prod(sign for sign, _ in terms))
        return total

    def over(self, box: tuple[Interval, ...]) -> Tensor:
        """Over the pixels of a box, all of which have a partner; each box once."""
        if box not in self.known:
            *lead, (a, b) = box
            *shifts, o = self.offset
            one = self.image[tuple(slice(*s) for s in lead)]
            other = self.image[tuple(slice(s + k, e + k) for (s, e), k in zip(lead, shifts, strict=True))]
            if (a, b) == self.all[-1]:  # whole rows, which need no copy: those who have no partner meet zeros
                one, other = one.flatten(0, -2), other.flatten(0, -2)
                one, other = (one[: len(one) - o], other[o:]) if o >= 0 else (one[-o:], other[:o])
            else:
                one, other = one[..., a:b, :].flatten(0, -2), other[..., a + o : b + o, :].flatten(0, -2)
            self.known[box] = one.T @ other
        return self.known[box]
