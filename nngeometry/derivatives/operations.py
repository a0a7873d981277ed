"""The operations of which :mod:`nngeometry.derivatives.cheap` has the derivative, its transpose and what bends it."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from math import pi, prod, sqrt
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

#: Tensors, or None for what is not there: a bias, or a derivative that nobody wants.
Maybe = Tensor | None


@dataclass(frozen=True)
class Operation(ABC):
    """An operation on tensors, its derivative, and the transpose of that."""

    @abstractmethod
    def value(self, *inputs: Any) -> Tensor:
        """The operation itself."""

    def saved(self, inputs: Sequence[Any], output: Tensor) -> Sequence[Any]:
        """What its derivative is known from: for each input a tensor of its shape, and what else there is."""
        return inputs

    def value_and_saved(self, inputs: Sequence[Any]) -> tuple[Tensor, Sequence[Any]]:
        """Both, of which the second may be what the first was made of."""
        output = owned(self.value(*inputs))
        return output, self.saved(inputs, output)

    @abstractmethod
    def push(self, tangents: Sequence[Maybe], saved: Sequence[Any], shape: torch.Size) -> Tensor:
        """Its derivative along tangents of its inputs, at least one of them; shape: that of the output."""

    @abstractmethod
    def pull(self, cotangent: Tensor, saved: Sequence[Any], wanted: Sequence[bool]) -> Sequence[Maybe]:
        """The transpose: what a cotangent of the output gives for the wanted inputs."""

    def second_pull(
        self, tangents: Sequence[Maybe], cotangent: Tensor, saved: Sequence[Any], wanted: Sequence[bool]
    ) -> Sequence[Maybe]:
        """The derivative of ``sum tangents * pull(cotangent, saved)`` in what is saved for each input: here of an
        operation that is linear in its first and in its second one, plus a third.
        """
        (dx, dw, *_), (x, w, *others) = tangents, saved
        neither = [False] * len(others)
        return (
            self.pull(cotangent, (x, dw, *others), (True, False, *neither))[0]
            if wanted[0] and dw is not None
            else None,
            self.pull(cotangent, (dx, w, *others), (False, True, *neither))[1]
            if wanted[1] and dx is not None
            else None,
        )

    def push_with_second_pull(
        self, tangents: Sequence[Maybe], cotangent: Tensor, saved: Sequence[Any], upstream: bool, wanted: Sequence[bool]
    ) -> tuple[Maybe, Sequence[Maybe]]:
        """:meth:`push`, None unless upstream, and :meth:`second_pull`, which may have much in common."""
        pushed = self.push(tangents, saved, cotangent.shape) if upstream else None
        return pushed, self.second_pull(tangents, cotangent, saved, wanted)


class Symmetric(Operation):
    """An operation of one input whose derivative is its own transpose, known from one tensor."""

    @abstractmethod
    def along(self, d: Tensor, at: Tensor) -> Tensor:
        """The derivative along d; at: what is saved."""

    @abstractmethod
    def curve(self, d: Tensor, cotangent: Tensor, at: Tensor) -> Maybe:
        """The derivative of ``sum d * along(cotangent, at)`` in what is saved."""

    def push(self, tangents: Sequence[Maybe], saved: Sequence[Any], shape: torch.Size) -> Tensor:
        (d,) = tangents
        assert d is not None
        return self.along(d, saved[0])

    def pull(self, cotangent: Tensor, saved: Sequence[Any], wanted: Sequence[bool]) -> Sequence[Maybe]:
        return (self.along(cotangent, saved[0]),)

    def second_pull(
        self, tangents: Sequence[Maybe], cotangent: Tensor, saved: Sequence[Any], wanted: Sequence[bool]
    ) -> Sequence[Maybe]:
        (d,) = tangents
        assert d is not None
        return (self.curve(d, cotangent, saved[0]),)


def owned(output: Tensor) -> Tensor:
    """A value that is a view of nothing else as no view, since users may write into it."""
    return torch.ops.aten._unsafe_view(output, output.shape) if output._is_view() else output


def _sum(terms: Sequence[Maybe]) -> Tensor:
    total: Maybe = None
    for term in terms:
        if term is not None:
            total = term if total is None else total + term
    assert total is not None
    return total


def _over_channels(t: Tensor, ndim: int) -> Tensor:
    """``(C,)`` as it goes with ``(B, C, ...)``."""
    return t.view(-1, *[1] * (ndim - 2))


# Convolutions: of an input, a weight and a bias

_KINDS: dict[Any, tuple[int, bool]] = {
    torch.conv1d: (1, False),
    torch.conv2d: (2, False),
    torch.conv3d: (3, False),
    torch.conv_transpose1d: (1, True),
    torch.conv_transpose2d: (2, True),
    torch.conv_transpose3d: (3, True),
}
#: Arguments in their order, of plain and of transposed convolutions.
_ARGUMENTS = {
    False: ("input", "weight", "bias", "stride", "padding", "dilation", "groups"),
    True: ("input", "weight", "bias", "stride", "padding", "output_padding", "groups", "dilation"),
}
_PER_AXIS = ("stride", "padding", "dilation", "output_padding")
_DEFAULTS = {"bias": None, "stride": 1, "padding": 0, "dilation": 1, "output_padding": 0, "groups": 1}


def _convolution(axes: int, transposed: bool) -> Callable[..., tuple[Any, ...] | None]:
    def recognise(*args: Any, **kwargs: Any) -> tuple[Any, ...] | None:
        given = {**_DEFAULTS, **dict(zip(_ARGUMENTS[transposed], args, strict=False)), **kwargs}
        x, weight, bias = given["input"], given["weight"], given["bias"]
        if isinstance(given["padding"], str) or x.ndim != axes + 2:  # torch sorts these out before it convolves
            return None
        stride, padding, dilation, extra = (_each(given[k], axes) for k in _PER_AXIS)
        return Convolution((stride, padding, dilation, transposed, extra, given["groups"])), x, weight, bias

    return recognise


def _each(value: Any, n: int) -> list[int]:
    """One number for each of n axes."""
    return [value] * n if isinstance(value, int) else list(value) * (n // len(value))


@dataclass(frozen=True)
class Convolution(Operation):
    """Any convolution. options: those of ``aten::convolution`` that come after the bias."""

    options: tuple[Any, ...]

    def value(self, x: Tensor, w: Tensor, b: Maybe) -> Tensor:
        return torch.ops.aten.convolution(x, w, b, *self.options)

    def push(self, tangents: Sequence[Maybe], saved: Sequence[Any], shape: torch.Size) -> Tensor:
        (dx, dw, db), (x, w, _) = tangents, saved
        return _sum(
            [
                None if dx is None else self.value(dx, w, None),
                None if dw is None else self.value(x, dw, None),
                None if db is None else _over_channels(db, len(shape)).expand(shape),
            ]
        )

    def pull(self, cotangent: Tensor, saved: Sequence[Any], wanted: Sequence[bool]) -> Sequence[Maybe]:
        x, w, _ = saved
        sizes = [cotangent.shape[1]] if wanted[2] else None
        return torch.ops.aten.convolution_backward(cotangent, x, w, sizes, *self.options, list(wanted))


# Linear layers: of an input, a weight and a bias


def _linear(input: Tensor, weight: Tensor, bias: Maybe = None) -> tuple[Any, ...] | None:
    return (Affine(), input, weight, bias) if weight.ndim == 2 and input.ndim > 1 else None


@dataclass(frozen=True)
class Affine(Operation):
    """``x w^T + b`` over the last axis of x."""

    def value(self, x: Tensor, w: Tensor, b: Maybe) -> Tensor:
        return F.linear(x, w, b)

    def push(self, tangents: Sequence[Maybe], saved: Sequence[Any], shape: torch.Size) -> Tensor:
        (dx, dw, db), (x, w, _) = tangents, saved
        return _sum(
            [
                None if dx is None else F.linear(dx, w),
                None if dw is None else F.linear(x, dw),
                None if db is None else db.expand(shape),
            ]
        )

    def pull(self, cotangent: Tensor, saved: Sequence[Any], wanted: Sequence[bool]) -> Sequence[Maybe]:
        x, w, _ = saved
        rows = cotangent.reshape(-1, cotangent.shape[-1])
        return (
            cotangent @ w if wanted[0] else None,
            rows.mT @ x.reshape(-1, x.shape[-1]) if wanted[1] else None,
            rows.sum(0) if wanted[2] else None,
        )


# Products of matrices: of two stacks of them


def _matmul(input: Tensor, other: Tensor) -> tuple[Any, ...] | None:
    same = input.ndim > 2 and input.shape[:-2] == other.shape[:-2] and input.dtype == other.dtype
    return (MatMul(), input, other) if same else None


@dataclass(frozen=True)
class MatMul(Operation):
    """``x y``, matrix by matrix."""

    def value(self, x: Tensor, y: Tensor) -> Tensor:
        return x @ y

    def push(self, tangents: Sequence[Maybe], saved: Sequence[Any], shape: torch.Size) -> Tensor:
        (dx, dy), (x, y) = tangents, saved
        return _sum([None if dx is None else dx @ y, None if dy is None else x @ dy])

    def pull(self, cotangent: Tensor, saved: Sequence[Any], wanted: Sequence[bool]) -> Sequence[Maybe]:
        x, y = saved
        return cotangent @ y.mT if wanted[0] else None, x.mT @ cotangent if wanted[1] else None


# Batch normalisation with fixed statistics: of an input, a weight and a bias


def _batch_norm(
    input: Tensor,
    running_mean: Maybe,
    running_var: Maybe,
    weight: Maybe = None,
    bias: Maybe = None,
    training: bool = False,
    momentum: float = 0.1,
    eps: float = 1e-5,
) -> tuple[Any, ...] | None:
    if training or running_mean is None or running_var is None or input.ndim < 2:
        return None
    if running_mean.requires_grad or running_var.requires_grad:
        return None
    return FixedNorm(running_mean.clone(), running_var.clone(), eps), input, weight, bias


@dataclass(frozen=True)
class FixedNorm(Operation):
    """``(x - mean) / sqrt(var + eps) * w + b``, channel by channel."""

    mean: Tensor
    var: Tensor
    eps: float

    def value(self, x: Tensor, w: Maybe, b: Maybe) -> Tensor:
        return torch.batch_norm(x, w, b, self.mean, self.var, False, 0.0, self.eps, torch.backends.cudnn.enabled)

    def push(self, tangents: Sequence[Maybe], saved: Sequence[Any], shape: torch.Size) -> Tensor:
        (dx, dw, db), (x, w, _) = tangents, saved
        slope = (self.var + self.eps).rsqrt()
        return _sum(
            [
                None if dw is None else self.value(x, dw, None),
                None if dx is None else dx * _over_channels((slope if w is None else slope * w).to(x.dtype), x.ndim),
                None if db is None else _over_channels(db, len(shape)).expand(shape),
            ]
        )

    def pull(self, cotangent: Tensor, saved: Sequence[Any], wanted: Sequence[bool]) -> Sequence[Maybe]:
        x, w, _ = saved
        if len(x) == 1:  # whose order in memory torch gets wrong: composites.normalised
            x, cotangent = x.contiguous(), cotangent.contiguous()
        w = None if w is None else w.contiguous()  # or a kernel of torch reads beside it, in channels_last
        # Statistics of the batch there are none of, which elsewhere than on a CPU must be there and empty.
        at_least_single = torch.promote_types(x.dtype, torch.float32)
        none = None if x.device.type == "cpu" else x.new_empty(0, dtype=at_least_single)
        return torch.ops.aten.native_batch_norm_backward(
            cotangent, x, w, self.mean, self.var, none, none, False, self.eps, list(wanted)
        )

    def second_pull(
        self, tangents: Sequence[Maybe], cotangent: Tensor, saved: Sequence[Any], wanted: Sequence[bool]
    ) -> Sequence[Maybe]:
        dx, *others = tangents
        centred = None if dx is None else dx + _over_channels(self.mean.to(dx.dtype), dx.ndim)  # which pull subtracts
        return super().second_pull((centred, *others), cotangent, saved, wanted)


# Normalisation of each example or position: of an input, a weight and a bias


def _layer_norm(
    input: Tensor,
    normalized_shape: Sequence[int],
    weight: Maybe = None,
    bias: Maybe = None,
    eps: float = 1e-5,
    cudnn_enable: bool = True,
) -> tuple[Any, ...] | None:
    if input.dtype.itemsize < 4 or any(p is not None and p.dtype != input.dtype for p in (weight, bias)):
        return None  # statistics in a precision of their own
    return LayerNorm(tuple(normalized_shape), eps), input, weight, bias


@dataclass(frozen=True)
class LayerNorm(Operation):
    """``z w + b`` with ``z = (x - mean) / sqrt(var + eps)``, the statistics being those of the last axes of x.

    The derivative of z in x is ``P = (I - 1 1^T / d - z z^T / d) / sqrt(var + eps)``, which is symmetric.
    """

    shape: tuple[int, ...]
    eps: float

    def value(self, x: Tensor, w: Maybe, b: Maybe) -> Tensor:
        return torch.layer_norm(x, self.shape, w, b, self.eps)

    def saved(self, inputs: Sequence[Any], output: Tensor) -> Sequence[Any]:
        _, mean, slope = torch.native_layer_norm(inputs[0].detach(), self.shape, None, None, self.eps)
        return *inputs, mean, slope

    @property
    def _axes(self) -> list[int]:
        return list(range(-len(self.shape), 0))

    def push(self, tangents: Sequence[Maybe], saved: Sequence[Any], shape: torch.Size) -> Tensor:
        (dx, dw, db), (x, w, _, mean, slope) = tangents, saved
        dz = None if dx is None else self._project(dx, x, mean, slope)
        return _sum(
            [
                dz if dz is None or w is None else dz * w,
                None if dw is None else (x - mean) * slope * dw,
                None if db is None else db.expand(shape),
            ]
        )

    def pull(self, cotangent: Tensor, saved: Sequence[Any], wanted: Sequence[bool]) -> Sequence[Maybe]:
        x, w, b, mean, slope = saved
        return torch.ops.aten.native_layer_norm_backward(
            cotangent, x, list(self.shape), mean, slope, w, b, list(wanted[:3])
        )

    def second_pull(
        self, tangents: Sequence[Maybe], cotangent: Tensor, saved: Sequence[Any], wanted: Sequence[bool]
    ) -> Sequence[Maybe]:
        (dx, dw, _), (x, w, _, mean, slope) = tangents, saved
        axes = self._axes
        into_x = into_w = None
        along = [] if dw is None else [cotangent * dw]  # what is projected, for x
        curved = None
        if dx is not None:
            dz = self._project(dx, x, mean, slope)
            if wanted[1]:
                into_w = (cotangent * dz).sum_to_size(self.shape)
            if wanted[0]:
                h = cotangent if w is None else cotangent * w
                z, step = (x - mean) * slope, -slope / prod(self.shape)
                along.append(step * ((z * dx).sum(axes, keepdim=True) * h + (h * z).sum(axes, keepdim=True) * dx))
                curved = step * (h * dz).sum(axes, keepdim=True) * z
        if wanted[0] and along:
            into_x = _sum([self._project(_sum(along), x, mean, slope), curved])
        return into_x, into_w

    def _project(self, d: Tensor, x: Tensor, mean: Tensor, slope: Tensor) -> Tensor:
        """``P d``."""
        only = [True, False, False]
        return torch.ops.aten.native_layer_norm_backward(d, x, list(self.shape), mean, slope, None, None, only)[0]


# Rectification and its kin


def _relu(input: Tensor, inplace: bool = False) -> tuple[Any, ...] | None:
    return None if inplace else (Rectify(), input)


@dataclass(frozen=True)
class Rectify(Symmetric):
    """``max(x, 0)``, with derivative zero at zero."""

    def value(self, x: Tensor) -> Tensor:
        return torch.relu(x)

    def saved(self, inputs: Sequence[Any], output: Tensor) -> Sequence[Any]:
        return (output,)  # which the next operation holds as well

    def along(self, d: Tensor, at: Tensor) -> Tensor:
        return torch.ops.aten.threshold_backward(d, at, 0)

    def curve(self, d: Tensor, cotangent: Tensor, at: Tensor) -> Maybe:
        return None


def _gelu(input: Tensor, approximate: str = "none") -> tuple[Any, ...]:
    return Gelu(approximate), input


@dataclass(frozen=True)
class Gelu(Symmetric):
    """``x P(z < x)`` for a standard normal z, or its approximation by a hyperbolic tangent."""

    approximate: str

    def value(self, x: Tensor) -> Tensor:
        return F.gelu(x, approximate=self.approximate)

    def along(self, d: Tensor, at: Tensor) -> Tensor:
        return torch.ops.aten.gelu_backward(d, at, approximate=self.approximate)

    def curve(self, d: Tensor, cotangent: Tensor, at: Tensor) -> Maybe:
        return d * cotangent * self._second(at)

    def _second(self, x: Tensor) -> Tensor:
        """The second derivative."""
        square = x.square()
        if self.approximate == "none":
            return torch.exp(square / -2).mul_(2 - square).div_(sqrt(2 * pi))
        # x (1 + tanh s) / 2 with s = k (x + c x^3)
        k, c = sqrt(2 / pi), 0.044715
        t = torch.tanh((1 + c * square).mul_(x).mul_(k))
        slope = (1 + 3 * c * square).mul_(k)
        return (t.square().neg_().add_(1)).mul_(slope + 3 * c * k * square - x * t * slope.square())


# Softmax


def _softmax(input: Tensor, dim: Any = None, _stacklevel: int = 3, dtype: Any = None) -> tuple[Any, ...] | None:
    return (Softmax(dim), input) if isinstance(dim, int) and dtype is None else None


@dataclass(frozen=True)
class Softmax(Symmetric):
    """``y = exp(x) / sum exp(x)`` along an axis; its derivative ``diag(y) - y y^T`` is symmetric."""

    dim: int

    def value(self, x: Tensor) -> Tensor:
        return torch.softmax(x, self.dim)

    def saved(self, inputs: Sequence[Any], output: Tensor) -> Sequence[Any]:
        return (output,)

    def along(self, d: Tensor, at: Tensor) -> Tensor:
        return torch.ops.aten._softmax_backward_data(d, at, self.dim, at.dtype)

    def curve(self, d: Tensor, cotangent: Tensor, at: Tensor) -> Maybe:
        mean, slope = ((at * one).sum(self.dim, keepdim=True) for one in (d, cotangent))
        return cotangent * (d - mean) - slope * d


# Sums of exponentials, one after the other


def _logcumsumexp(input: Tensor, dim: Any) -> tuple[Any, ...] | None:
    return (LogCumSumExp(dim), input) if isinstance(dim, int) and input.ndim else None


@dataclass(frozen=True)
class LogCumSumExp(Operation):
    """``y_i = log sum_{j <= i} exp(x_j)`` along an axis, with derivative ``W_ij = exp(x_j - y_i)`` for ``j <= i``.

    Of torch's own the backward has no derivative at a cotangent of zero.
    """

    dim: int

    def value(self, x: Tensor) -> Tensor:
        return torch.logcumsumexp(x, self.dim)

    def saved(self, inputs: Sequence[Any], output: Tensor) -> Sequence[Any]:
        return inputs[0], output

    def push(self, tangents: Sequence[Maybe], saved: Sequence[Any], shape: torch.Size) -> Tensor:
        (d,), (x, y) = tangents, saved
        assert d is not None
        return self._of_signs(d, lambda log: torch.logcumsumexp(log + x, self.dim) - y)

    def pull(self, cotangent: Tensor, saved: Sequence[Any], wanted: Sequence[bool]) -> Sequence[Maybe]:
        x, y = saved
        return (
            self._of_signs(
                cotangent, lambda log: torch.logcumsumexp((log - y).flip(self.dim), self.dim).flip(self.dim) + x
            ),
        )

    def second_pull(
        self, tangents: Sequence[Maybe], cotangent: Tensor, saved: Sequence[Any], wanted: Sequence[bool]
    ) -> Sequence[Maybe]:
        (d,) = tangents
        assert d is not None
        along = self.push(tangents, saved, cotangent.shape)
        (of_all,), (less,) = (self.pull(u, saved, wanted) for u in (cotangent, cotangent * along))
        assert of_all is not None
        assert less is not None
        return (d * of_all - less,)

    @staticmethod
    def _of_signs(d: Tensor, log_of: Callable[[Tensor], Tensor]) -> Tensor:
        """What is linear and positive, from the logarithm of what it is of to that of what it is."""
        return log_of(d.clamp(min=0).log()).exp() - log_of((-d).clamp(min=0).log()).exp()


#: From a function of torch to what makes of its arguments an operation and its inputs, or None if it is not one.
OPERATIONS: dict[Any, Callable[..., tuple[Any, ...] | None]] = {
    **{function: _convolution(*kind) for function, kind in _KINDS.items()},
    F.linear: _linear,
    F.batch_norm: _batch_norm,
    F.relu: _relu,
    torch.relu: _relu,
    Tensor.relu: _relu,
    F.gelu: _gelu,
    F.layer_norm: _layer_norm,
    torch.layer_norm: _layer_norm,
    **dict.fromkeys((F.softmax, torch.softmax, Tensor.softmax), _softmax),
    **dict.fromkeys((torch.logcumsumexp, Tensor.logcumsumexp), _logcumsumexp),
    **dict.fromkeys((torch.matmul, Tensor.matmul, Tensor.__matmul__, torch.bmm, Tensor.bmm), _matmul),
}
