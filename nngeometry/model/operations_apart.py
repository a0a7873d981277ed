"""Models that keep examples apart by the operations that autograd has recorded: each treats them one by one."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from math import prod
from typing import Any, NamedTuple

import torch
from torch import Tensor

#: What a node was computed from: another node, None if nothing is differentiated, and which of its outputs.
_From = tuple[Any, int]
#: From a node, the shape of what it computed and the axis of examples in it to its inputs with those examples, in the
#: same order, each with the axis of them; the other inputs have none of an example. None if they need not be apart.
_Rule = Callable[[Any, torch.Size, int], Sequence[tuple[_From, int]] | None]

_RULES: dict[str, _Rule] = {}


class Shared(NamedTuple):
    """Where an operation takes what is alike for all examples beside what is of each.

    node: the operation. position: which of its inputs is alike. axis: along which axis the examples are in what it
    computes. runs: how many times all of them are along it, one after the other.
    """

    node: Any
    position: int
    axis: int
    runs: int

    @property
    def taken(self) -> _From:
        """What is alike."""
        one: _From = self.node.next_functions[self.position]
        return one


class Apart(NamedTuple):
    """What tells that examples are apart.

    blocks: where they are in what was computed of the parameters on the way to the output, by how many blocks of
    entries, in the order of :meth:`Tensor.flatten`, there are that have all examples one after the other: 1 where they
    are along the first axis. met: what was met with examples, also if it is taken as a whole elsewhere, and then none
    of these. shared: where what is alike for all comes in.
    """

    blocks: dict[_From, int]
    met: set[_From]
    shared: list[Shared]


def recorded_apart(f: Tensor, examples: int) -> Apart | None:
    """Where the examples are in what was computed of the parameters on the way to ``f``, whose rows they are, if every
    operation is known to treat them one by one: so that a cotangent of one pulls back to what is that example's. None
    if one is not.

    >>> net, x = torch.nn.Linear(3, 2), torch.randn(5, 3)
    >>> f = net(x)
    >>> list(recorded_apart(f.T.tanh().T, 5).blocks.values()), recorded_apart(f - f.mean(0), 5)
    ([1, 2, 2, 1], None)
    """
    if f.ndim == 0 or len(f) != examples:
        return None
    found: dict[_From, int] = {}
    followed: set[_From] = set()
    met: set[_From] = set()
    otherwise: set[_From] = set()  # what parameters are seen through, and is not only taken one example at a time
    shared: list[Shared] = []
    remaining: list[tuple[_From, int]] = [((f.grad_fn, f.output_nr), 1)]
    while remaining:
        one, blocks = remaining.pop()
        views = _views_of_parameter(one)
        same = found.setdefault(one, blocks) == blocks
        if views is not None:
            met.update(views)
            otherwise.update(views[1:] if same else views)
            continue
        if one in followed:
            if not same:
                return None
            continue
        followed.add(one)
        before = _before(one, blocks, examples)
        if before is None:
            return None
        shared += _shared(one, blocks, examples, [other for other, _ in before])
        remaining.extend(before)
    alike = reached([each.taken for each in shared])
    if not {node for node, _ in alike}.isdisjoint(node for node, _ in followed):
        return None
    otherwise |= alike
    return Apart({one: blocks for one, blocks in found.items() if one not in otherwise}, met | followed, shared)


def _shared(one: _From, blocks: int, examples: int, apart: Sequence[_From]) -> list[Shared]:
    """The inputs of a node but for those that have examples."""
    node, shape = one[0], _shape(one)
    as_whole = list(enumerate(node.next_functions))
    for other in apart:  # once for each: it may also be the other factor of a product with itself
        as_whole.remove(next(found for found in as_whole if found[1] == other))
    axis = _axis(shape, blocks, examples)
    if axis is None:  # of a reshape, which has no other inputs
        return []
    runs = blocks // prod(shape[:axis])
    return [Shared(node, k, axis, runs) for k, other in as_whole if other[0] is not None]


def reached(ends: Iterable[_From]) -> set[_From]:
    """What some things were computed from, themselves included."""
    found: set[_From] = set()
    remaining = list(ends)
    while remaining:
        one = remaining.pop()
        if one[0] is not None and one not in found:
            found.add(one)
            remaining.extend(one[0].next_functions)
    return found


def _before(one: _From, blocks: int, examples: int) -> Sequence[tuple[_From, int]] | None:
    """The inputs of a node with examples, and how many blocks of these each has; None if that is not known."""
    node, shape = one[0], _shape(one)
    if node.name() in _NAMES_OF_RESHAPES:  # which keep the order of entries, and with it that of examples
        return [(other, blocks) for other in node.next_functions]
    axis = _axis(shape, blocks, examples)
    rule = _RULES.get(node.name())
    inputs = None if rule is None or axis is None else rule(node, shape, axis)
    if inputs is None:
        return None
    assert axis is not None
    within = blocks // prod(shape[:axis])
    if any(o[0] is not None and _shape(o)[a : a + 1] != shape[axis : axis + 1] for o, a in inputs):
        return None
    return [(o, prod(_shape(o)[:a]) * within) for o, a in inputs if o[0] is not None]


def _axis(shape: torch.Size, blocks: int, examples: int) -> int | None:
    """The axis that the examples are along, possibly with several entries of each, and several times one after the
    other; None if they are along several.

    >>> _axis(torch.Size([3, 5, 2]), 3, 5), _axis(torch.Size([3, 10, 2]), 3, 5), _axis(torch.Size([15, 2]), 3, 5)
    (1, 1, 0)
    >>> _axis(torch.Size([3, 2, 5]), 3, 5)
    """
    before = 1
    for axis, size in enumerate(shape):
        if blocks < before * size:
            apart = blocks % before == 0 and size % (blocks // before * examples) == 0
            return axis if apart else None
        before *= size
    return None


def _is_leaf(node: Any) -> bool:
    return node is None or hasattr(node, "variable")


def _shape(one: _From) -> torch.Size:
    node, k = one
    shape: torch.Size = node.variable.shape if _is_leaf(node) else node._input_metadata[k].shape
    return shape


def _numbered(names: str) -> list[str]:
    return [f"{name}Backward0" for name in names.split()]


_NAMES_OF_RESHAPES = frozenset(_numbered("View UnsafeView ReshapeAlias"))
#: Of what has one input, and no other that is not differentiated.
_OF_ONE = _NAMES_OF_RESHAPES.union(
    _numbered("T Transpose Permute Unsqueeze Expand Clone Slice Select Split SplitWithSizes Unbind Repeat ToCopy Neg"),
    _numbered("Exp Sigmoid Tanh Softplus Relu"),
)


def _views_of_parameter(one: _From) -> list[_From] | None:
    """A leaf and what is computed of it alone, up to this; None if it may have been computed of examples."""
    views = [one]
    while not _is_leaf(views[-1][0]):
        if views[-1][0].name() not in _OF_ONE:
            return None
        views.append(views[-1][0].next_functions[0])
    return views


def _rule(*names: str) -> Callable[[_Rule], _Rule]:
    def register(rule: _Rule) -> _Rule:
        _RULES.update(dict.fromkeys(names, rule))
        return rule

    return register


def _on(axis: int, inputs: Iterable[_From]) -> list[tuple[_From, int]]:
    return [(one, axis) for one in inputs]


@_rule(
    *_numbered("Relu LeakyRelu Elu Celu Gelu Silu Mish Softplus Softshrink Hardshrink Hardtanh Hardswish Hardsigmoid"),
    *_numbered("LogSigmoid Sigmoid Tanh Threshold Exp Expm1 Log Log1P Sqrt Rsqrt Reciprocal Neg Abs Sign Sin Cos Tan"),
    *_numbered("Atan Erf Pow Clamp ClampMin ClampMax Clone Alias ToCopy Add Sub Rsub Mul Div Where Maximum Minimum"),
    *_numbered("MaskedFill Expand"),
    *("AddBackward1", "SubBackward1", "MulBackward1", "DivBackward1", "ClampBackward1", "PowBackward1"),
)
def _entry_by_entry(node: Any, shape: torch.Size, axis: int) -> Sequence[tuple[_From, int]]:
    """Axes are matched from the last one; an input that has one entry there, or no such axis, has no example."""
    found = []
    for one in node.next_functions:
        a = axis if one[0] is None else axis + len(_shape(one)) - len(shape)
        if one[0] is not None and a >= 0 and _shape(one)[a] == shape[axis]:
            found.append((one, a))
    return found


def _first(node: Any, shape: torch.Size, axis: int) -> Sequence[tuple[_From, int]] | None:
    """Of what has the same rows as its first input, and beside it parameters."""
    return _on(0, node.next_functions[:1]) if axis == 0 else None


_rule("ConvolutionBackward0", "NativeGroupNormBackward0", "MmBackward0")(_first)


_rule(
    *_numbered("AvgPool2D AvgPool3D AdaptiveAvgPool2D AdaptiveAvgPool3D MaxPool2DWithIndices MaxPool3DWithIndices"),
    *_numbered("AdaptiveMaxPool2D AdaptiveMaxPool3D UpsampleNearest2D UpsampleBilinear2D"),
)(lambda node, shape, axis: _first(node, shape, axis) if len(shape) > 3 else None)


@_rule("AsStridedBackward0", "AsStridedBackward1")
def _pooled_channels_last(node: Any, shape: torch.Size, axis: int) -> Sequence[tuple[_From, int]] | None:
    """How ``adaptive_avg_pool2d`` to one entry writes the strides of its mean, where channels are last in memory."""
    (one,), strides = node.next_functions, (*shape[1:2], 1) + (*shape[1:2],) * 2
    pooled = [*shape[2:]] == [1, 1] and tuple(node._saved_stride) == strides and one[0].name() == "MeanBackward1"
    return _first(node, shape, axis) if pooled and _shape(one) == shape else None


@_rule("NativeBatchNormBackward0")
def _held_statistics(node: Any, shape: torch.Size, axis: int) -> Sequence[tuple[_From, int]] | None:
    return None if node._saved_training else _first(node, shape, axis)


@_rule("NativeLayerNormBackward0")
def _normalised(node: Any, shape: torch.Size, axis: int) -> Sequence[tuple[_From, int]] | None:
    return _on(axis, node.next_functions[:1]) if axis < len(shape) - len(node._saved_normalized_shape) else None


@_rule("AddmmBackward0")
def _addmm(node: Any, shape: torch.Size, axis: int) -> Sequence[tuple[_From, int]] | None:
    return _on(0, node.next_functions[1:2]) if axis == 0 else None


@_rule("BmmBackward0")
def _matrix_by_matrix(node: Any, shape: torch.Size, axis: int) -> Sequence[tuple[_From, int]]:
    """Rows of the product are of those of the first factor, columns of those of the second."""
    one, other = node.next_functions
    return _on(axis, ([one, other], [one], [other])[axis])


@_rule("ScaledDotProductFlashAttentionForCpuBackward0")
def _attention(node: Any, shape: torch.Size, axis: int) -> Sequence[tuple[_From, int]] | None:
    """Each head of each example by itself."""
    return _on(axis, node.next_functions[:3]) if axis < 2 else None


@_rule("MkldnnRnnLayerBackward0")
def _recurrent(node: Any, shape: torch.Size, axis: int) -> Sequence[tuple[_From, int]] | None:
    """Outputs ``(T, B, H)`` and states ``(B, H)``, of inputs ``(T, B, I)``, weights and states; what its batch_first
    says was done before.
    """
    if node._saved_batch_sizes or axis != len(shape) - 2:
        return None
    x, *_, h, c = node.next_functions
    states = [s for s in (h, c) if s[0] is not None]
    return [(x, 1), *((s, len(_shape(s)) - 2) for s in states)]


@_rule("EmbeddingBackward0")
def _look_up(node: Any, shape: torch.Size, axis: int) -> Sequence[tuple[_From, int]]:
    return []


@_rule(*_numbered("Slice Split UnsafeSplit SplitWithSizes Cat Softmax LogSoftmax Glu Cumsum Flip Roll Topk"))
@_rule("SafeSoftmaxBackward0")
def _along_others(node: Any, shape: torch.Size, axis: int) -> Sequence[tuple[_From, int]] | None:
    """Of what changes, joins or cuts other axes."""
    axes = _axes(node, len(shape))
    return _on(axis, node.next_functions) if axes and axis not in axes else None


@_rule(*_numbered("Amax Amin Logsumexp Std Var LinalgVectorNorm Max Min Select Unbind"))
@_rule("SqueezeBackward1", "MeanBackward1", "SumBackward1")
def _over_others(node: Any, shape: torch.Size, axis: int) -> Sequence[tuple[_From, int]] | None:
    """Of what sums over other axes, or takes entries of them, and may leave them out."""
    (one,) = node.next_functions
    if one[0] is None:
        return []
    before = len(_shape(one))
    axes = sorted(set(_axes(node, before)))
    if before > len(shape):
        if before - len(shape) != len(axes):
            return None
        for a in axes:
            axis += a <= axis
    return _on(axis, [one]) if axes and axis not in axes else None


@_rule(*_numbered("Unsqueeze Stack"))
def _with_another(node: Any, shape: torch.Size, axis: int) -> Sequence[tuple[_From, int]] | None:
    """Of what has one axis more than its inputs."""
    (new,) = _axes(node, len(shape))
    return _on(axis - (new < axis), node.next_functions) if axis != new else None


@_rule(*_numbered("Transpose T"), "TransposeBackward1")
def _transpose(node: Any, shape: torch.Size, axis: int) -> Sequence[tuple[_From, int]] | None:
    one, other = _axes(node, len(shape)) or (0, 1)
    return _on({one: other, other: one}.get(axis, axis), node.next_functions)


@_rule("PermuteBackward0")
def _permute(node: Any, shape: torch.Size, axis: int) -> Sequence[tuple[_From, int]] | None:
    return _on(_signed(node._saved_dims[axis]) % len(shape), node.next_functions)


@_rule("ConstantPadNdBackward0")
def _pad(node: Any, shape: torch.Size, axis: int) -> Sequence[tuple[_From, int]] | None:
    """Pairs of numbers, those of the last axis first."""
    return _on(axis, node.next_functions) if axis < len(shape) - len(node._saved_pad) // 2 else None


def _axes(node: Any, of: int) -> list[int]:
    """The axes along which a node works, counted among so many; none if that is not known."""
    axes: list[int] = []
    for attribute in ("_saved_dim", "_saved_dim0", "_saved_dim1", "_saved_dims"):
        found = getattr(node, attribute, ())
        axes += found if isinstance(found, tuple) else [0 if found is None else found]
    return [_signed(a) % of for a in axes]


def _signed(axis: int) -> int:
    """Some nodes hold axes as unsigned numbers."""
    return axis - 2**64 if axis >= 2**63 else axis
