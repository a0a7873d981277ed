"""Vector-Jacobian products of torch's autograd, one or several at a time."""

from __future__ import annotations

import re
from collections.abc import Container, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import GradientEdge

from ..changes import Borrowed, uninterrupted, warnings_ignored
from ..memory import tuning


class BatchedVJP:
    """Gradients of ``sum_j weights_j[k] . outputs_j`` with respect to every input, for each k.

    All k at once, until an operation turns out to have no batching rule, and one by one from then on.

    >>> x = torch.ones(3, requires_grad=True)
    >>> BatchedVJP()([2 * x], [x], [torch.eye(3)])
    [tensor([[2., 0., 0.],
            [0., 2., 0.],
            [0., 0., 2.]])]
    """

    def __init__(self) -> None:
        self._at_once = True

    def __call__(
        self, outputs: Sequence[Tensor], inputs: Sequence[Any], weights: Sequence[Tensor], last: bool = False
    ) -> list[Tensor | None]:
        """inputs: tensors or gradient edges. weights: ``(K, *output)`` each. last: whether the graph is not needed
        again, so that what it holds can be let go of on the way; it is retained otherwise.

        Returns ``(K, *input)`` each, None for an input that the outputs do not depend on.
        """
        if len(weights[0]) == 1 or not self._at_once:
            return _one_by_one(outputs, inputs, weights, last)
        try:
            return _at_once(outputs, inputs, weights)
        except torch.OutOfMemoryError:
            raise
        except RuntimeError:
            grads = _one_by_one(outputs, inputs, weights, last)
        self._at_once = False
        return grads


def accumulate(
    outputs: Sequence[Tensor], edges: Sequence[GradientEdge], weights: Sequence[Tensor], into: Sequence[Tensor]
) -> None:
    """Add the gradients of ``sum_j weights_j . outputs_j`` in leaves, of which the edges are given, to ``into`` in
    place, one at a time. The graph is retained.

    >>> x, total = torch.ones(3, requires_grad=True), torch.ones(3)
    >>> accumulate([2 * x], [torch.autograd.graph.get_gradient_edge(x)], [torch.arange(3.0)], [total])
    >>> total, x.grad
    (tensor([1., 3., 5.]), None)
    """
    leaves: list[Tensor] = [edge.node.variable for edge in edges]  # type: ignore[attr-defined]
    before = [x.grad for x in leaves]
    try:
        for x, total in zip(leaves, into, strict=True):
            x.grad = total
        torch.autograd.backward(list(outputs), list(weights), retain_graph=True, inputs=leaves)
    finally:
        for x, grad in zip(leaves, before, strict=True):
            x.grad = grad


def _at_once(outputs: Sequence[Tensor], inputs: Sequence[Any], weights: Sequence[Tensor]) -> list[Tensor | None]:
    if tuning(outputs[0].device).few_operations:
        with Borrowed(warnings_ignored(NO_BATCHING_RULE)):
            return uninterrupted(_in_few_operations, outputs, inputs, weights)
    return uninterrupted(_batched, outputs, inputs, weights)


#: What torch says of operations that it takes one by one.
NO_BATCHING_RULE = "There is a performance drop"


def _batched(outputs: Sequence[Tensor], inputs: Sequence[Any], weights: Sequence[Tensor]) -> list[Tensor | None]:
    return list(
        torch.autograd.grad(outputs, inputs, list(weights), retain_graph=True, allow_unused=True, is_grads_batched=True)
    )


def _in_few_operations(
    outputs: Sequence[Tensor], inputs: Sequence[Any], weights: Sequence[Tensor]
) -> list[Tensor | None]:
    """Of all k together also where ``is_grads_batched`` takes one k after the other: convolutions, normalisations.
    Where operations start at once that is slower.
    """
    reached: list[bool] = []

    def pull(*rows: Tensor) -> tuple[Tensor, ...]:
        grads = torch.autograd.grad(outputs, inputs, rows, retain_graph=True, allow_unused=True)
        reached[:] = [g is not None for g in grads]
        return tuple(g for g in grads if g is not None)

    found = iter(torch.func.vmap(pull)(*weights))
    return [next(found) if there else None for there in reached]


def _one_by_one(
    outputs: Sequence[Tensor], inputs: Sequence[Any], weights: Sequence[Tensor], last: bool
) -> list[Tensor | None]:
    rows = list(zip(*weights, strict=True))
    each = [
        torch.autograd.grad(outputs, inputs, one, retain_graph=not last or k + 1 < len(rows), allow_unused=True)
        for k, one in enumerate(rows)
    ]
    if len(each) == 1:
        return [None if g is None else g.unsqueeze(0) for g in each[0]]
    return [None if gs[0] is None else torch.stack(gs) for gs in zip(*each, strict=True)]


def nodes(roots: Sequence[Tensor], ends: Container[Any] = ()) -> Iterator[Any]:
    """Every node of the autograd graphs of some tensors, once, up to where these end."""
    seen: set[Any] = set()
    stack = [t.grad_fn for t in roots]
    while stack:
        node = stack.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        if node not in ends:
            stack.extend(following for following, _ in node.next_functions)
        yield node


def coarsest(roots: Sequence[Tensor], dtype: torch.dtype) -> torch.dtype:
    """The least precise of a dtype and those that some tensors were computed in, as far as it was recorded.

    >>> coarsest([torch.ones(2, requires_grad=True).double().float().double()], torch.float64)
    torch.float32
    """
    found = (of.dtype for node in nodes(roots) for of in getattr(node, "_input_metadata", ()))
    return max([dtype, *(d for d in found if d.is_floating_point)], key=lambda d: torch.finfo(d).eps)


#: What torch says of an operation that it cannot differentiate twice.
_NO_SECOND = re.compile(
    r"derivative for (?:aten::|')_?(\w+?)(?:_backward\w*)?'? is not implemented|@?(once_differentiable)"
)


_CANNOT = "has a backward that cannot be differentiated"
_ONCE = "custom autograd function of the model (once_differentiable)"
_OF_A_MODEL = (
    "use a representation that is made of Jacobians instead of products (PMatDense, PMatKFAC, PMatLowRank, ...), and "
    "GGN or products=FiniteDifference() instead of Hessian"
)


@contextmanager
def operations_named(where: str = "", remedy: str = _OF_A_MODEL) -> Iterator[None]:
    """Say which operation torch cannot differentiate, or not twice, where, and what can be done."""
    try:
        yield
    except RuntimeError as error:
        if "use_reentrant" in str(error):
            raise NotImplementedError(
                "activation checkpoints with use_reentrant=True can be differentiated by loss.backward() alone: pass "
                "use_reentrant=False to torch.utils.checkpoint"
            ) from error
        found = _NO_SECOND.search(str(error))
        if found is None or _CANNOT in str(error):  # it was named further inside
            raise
        what = f"operation {found[1]}" if found[1] else _ONCE
        raise NotImplementedError(f"{where}the {what} {_CANNOT}: {remedy}") from error


def check_twice(gradient: Sequence[Tensor], where: str = "", remedy: str = _OF_A_MODEL) -> None:
    """Raise if a function that is once differentiable is in a gradient that was made with a cotangent that requires
    one. It ends the graph there, so that what comes before would count as constant without a word.
    """
    if any(node.name().endswith("::Error") for node in nodes(gradient)):
        raise NotImplementedError(f"{where}the {_ONCE} {_CANNOT}: {remedy}")
