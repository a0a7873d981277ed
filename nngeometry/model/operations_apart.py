"""Models that keep examples apart by the operations that autograd has recorded: each treats rows one by one."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

#: What a node was computed from: another node, None if nothing is differentiated, and which of its outputs.
_From = tuple[Any, int]
#: From a node and the shape of what it computed to those of its inputs that have the same rows, the examples' one after
#: the other; the others have none of an example. None if rows need not be apart.
_Rule = Callable[[Any, torch.Size], Sequence[_From] | None]

_RULES: dict[str, _Rule] = {}


def recorded_apart(f: Tensor, examples: int) -> bool:
    """Whether every operation between the parameters and ``f``, whose rows are the examples, is known to treat rows one
    by one, so that a cotangent of one example pulls back to that example's rows of all that was computed on the way.

    >>> net, x = torch.nn.Linear(3, 2), torch.randn(5, 3)
    >>> recorded_apart(net(x).tanh(), 5), recorded_apart(net(x) - net(x).mean(0), 5)
    (True, False)
    """
    if f.ndim == 0 or len(f) != examples:
        return False
    seen: set[_From] = set()
    remaining: list[_From] = [(f.grad_fn, f.output_nr)]
    while remaining:
        one = remaining.pop()
        if _of_parameters(one) or one in seen:
            continue
        seen.add(one)
        node, shape = one[0], _shape(one)
        if not shape or shape[0] % examples:
            return False
        rule = _RULES.get(node.name())
        rowwise = None if rule is None else rule(node, shape)
        if rowwise is None:
            return False
        if not all(other in rowwise or _of_parameters(other) for other in node.next_functions):
            return False
        remaining.extend(rowwise)
    return True


def _is_leaf(node: Any) -> bool:
    return node is None or hasattr(node, "variable")


def _shape(one: _From) -> torch.Size:
    node, k = one
    shape: torch.Size = node.variable.shape if _is_leaf(node) else node._input_metadata[k].shape
    return shape


#: How parameters may be seen.
_VIEWS = "T Transpose Permute View UnsafeView ReshapeAlias Unsqueeze Expand Clone Slice Select Split Unbind"
_NAMES_OF_VIEWS = frozenset(f"{name}Backward0" for name in _VIEWS.split())


def _of_parameters(one: _From) -> bool:
    """Whether it is a leaf, or a view of one: nothing that was computed of examples."""
    node, _ = one
    while not _is_leaf(node):
        if node.name() not in _NAMES_OF_VIEWS:
            return False
        node, _ = node.next_functions[0]
    return True


def _rule(*names: str) -> Callable[[_Rule], _Rule]:
    def register(rule: _Rule) -> _Rule:
        _RULES.update(dict.fromkeys(names, rule))
        return rule

    return register


def _rows_of(shape: torch.Size) -> Callable[[_From], bool]:
    """Whether inputs have the rows, and as many axes, of an output."""

    def alike(one: _From) -> bool:
        if one[0] is None:
            return True
        found = _shape(one)
        return len(found) == len(shape) and found[0] == shape[0]

    return alike


def _numbered(names: str) -> list[str]:
    return [f"{name}Backward0" for name in names.split()]


@_rule(
    *_numbered("Relu LeakyRelu Elu Celu Gelu Silu Mish Softplus Softshrink Hardshrink Hardtanh Hardswish Hardsigmoid"),
    *_numbered("LogSigmoid Sigmoid Tanh Threshold Exp Expm1 Log Log1P Sqrt Rsqrt Reciprocal Neg Abs Sign Sin Cos Tan"),
    *_numbered("Atan Erf Pow Clamp ClampMin ClampMax Clone Alias ToCopy Add Sub Rsub Mul Div Where Maximum Minimum"),
    *("AddBackward1", "ClampBackward1", "PowBackward1"),
)
def _entry_by_entry(node: Any, shape: torch.Size) -> Sequence[_From]:
    return list(filter(_rows_of(shape), node.next_functions))


def _first(node: Any, shape: torch.Size) -> Sequence[_From] | None:
    """Of what has the same rows as its first input, and beside it parameters."""
    x = node.next_functions[0]
    return [x] if _rows_of(shape)(x) else None


_rule(
    *_numbered("AvgPool2D AvgPool3D AdaptiveAvgPool2D AdaptiveAvgPool3D MaxPool2DWithIndices MaxPool3DWithIndices"),
    *_numbered("AdaptiveMaxPool2D AdaptiveMaxPool3D UpsampleNearest2D UpsampleBilinear2D"),
)(lambda node, shape: _first(node, shape) if len(shape) > 3 else None)


@_rule("NativeBatchNormBackward0")
def _held_statistics(node: Any, shape: torch.Size) -> Sequence[_From] | None:
    return None if node._saved_training else _first(node, shape)


@_rule("NativeLayerNormBackward0")
def _last_axes(node: Any, shape: torch.Size) -> Sequence[_From] | None:
    return _first(node, shape) if len(node._saved_normalized_shape) < len(shape) else None


@_rule("AddmmBackward0")
def _addmm(node: Any, shape: torch.Size) -> Sequence[_From] | None:
    return [node.next_functions[1]] if _rows_of(shape)(node.next_functions[1]) else None


_rule("ConvolutionBackward0", "NativeGroupNormBackward0", "MmBackward0", "ExpandBackward0")(_first)


@_rule("BmmBackward0", "ScaledDotProductFlashAttentionForCpuBackward0")
def _matrix_by_matrix(node: Any, shape: torch.Size) -> Sequence[_From] | None:
    return node.next_functions if all(map(_rows_of(shape), node.next_functions)) else None


@_rule("EmbeddingBackward0")
def _look_up(node: Any, shape: torch.Size) -> Sequence[_From]:
    return []


@_rule("ViewBackward0", "UnsafeViewBackward0", "ReshapeAliasBackward0")
def _view(node: Any, shape: torch.Size) -> Sequence[_From]:
    """The order of entries stays, and with it that of examples; whether rows are of one example each is seen by how
    many there are.
    """
    return node.next_functions


@_rule(*_numbered("Slice Select Split SplitWithSizes Unbind Unsqueeze Cat Stack Softmax LogSoftmax Transpose Glu"))
@_rule(*_numbered("Amax Logsumexp Std Var LinalgVectorNorm Max Min Cumsum Flip Roll"))
@_rule("SqueezeBackward1", "MeanBackward1", "SumBackward1")
def _along_other_axes(node: Any, shape: torch.Size) -> Sequence[_From] | None:
    """Of what changes, joins or sums axes, if the first is none of them."""
    axes = _axes(node, len(shape))
    return _with_rows(node, shape) if axes and 0 not in axes else None


@_rule("PermuteBackward0")
def _permute(node: Any, shape: torch.Size) -> Sequence[_From] | None:
    return node.next_functions if _signed(node._saved_dims[0]) % len(shape) == 0 else None


@_rule("ConstantPadNdBackward0")
def _pad(node: Any, shape: torch.Size) -> Sequence[_From] | None:
    return _first(node, shape) if len(node._saved_pad) < 2 * len(shape) else None


def _with_rows(node: Any, shape: torch.Size) -> Sequence[_From]:
    return [one for one in node.next_functions if one[0] is None or _shape(one)[:1] == shape[:1]]


def _axes(node: Any, made: int) -> list[int]:
    """The axes along which a node works, none if that is not known. made: how many its output has."""
    counted = [made] if node.name() in ("UnsqueezeBackward0", "StackBackward0") else []
    counted += [len(_shape(one)) for one in node.next_functions if one[0] is not None]
    axes: list[int] = []
    for attribute in ("_saved_dim", "_saved_dim0", "_saved_dim1", "_saved_dims"):
        found = getattr(node, attribute, ())
        axes += found if isinstance(found, tuple) else [0 if found is None else found]
    return [_signed(a) % counted[0] for a in axes]


def _signed(axis: int) -> int:
    """Some nodes hold axes as unsigned numbers."""
    return axis - 2**64 if axis >= 2**63 else axis
