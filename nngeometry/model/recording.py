"""What the modules of a model are called with and return, and where the examples are in that."""

from __future__ import annotations

import inspect
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from math import prod
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.autograd.graph import GradientEdge, get_gradient_edge
from torch.utils import _pytree as pytree

from ..changes import Change, forward_hook, is_cast
from ..layercollection import Site
from .packed import arguments_padded, has_packed, outputs_padded
from .refused import EXCLUDE, Refused, Unclear, named


class Output(NamedTuple):
    """What is remembered of a leaf of the output of a call, without its entries."""

    leaf: int
    shape: torch.Size
    dtype: torch.dtype

    @property
    def nbytes(self) -> int:
        return prod(self.shape) * self.dtype.itemsize


@dataclass(frozen=True)
class Call:
    """One call of a module, as its forward hook saw it. cast: whether inside of ``torch.autocast``. parameters: the
    positions in its layer of those that are used, if it is a use of these instead.
    """

    site: Site
    inputs: Any  # (args, kwargs)
    versions: list[int]
    outputs: tuple[Output, ...]  # the differentiable ones
    edges: tuple[GradientEdge, ...]
    cast: bool = False
    parameters: tuple[int, ...] = ()

    @property
    def what(self) -> str:
        """How messages name its module."""
        return named(self.site.name, self.site.module)

    def tensors(self) -> list[Tensor]:
        """The tensors among its inputs, in the order of the module's signature, however they were passed."""
        args, kwargs = self.inputs
        if kwargs:
            bound = inspect.signature(self.site.module.forward).bind(*args, **kwargs)
            args = (*bound.args, *bound.kwargs.values())
        return [t for t in pytree.tree_leaves(args) if isinstance(t, Tensor)]

    def arguments(self) -> dict[str, Any]:
        """What it was called with, by the names of the module's signature, defaults included."""
        args, kwargs = self.inputs
        bound = inspect.signature(self.site.module.forward).bind(*args, **kwargs)
        bound.apply_defaults()
        return dict(bound.arguments)

    def check_inputs(self) -> None:
        """Raise if what it was called with has been modified since."""
        if self.versions != versions(self.inputs):
            raise ValueError(
                f"layer {self.site.name!r}: its input was modified in place after the call, so its derivative is "
                "lost: replace the in-place operation (+=, relu_, ...) by one that makes a new tensor"
            )


class Recorder:
    """Forward hooks that record every call of some modules in this thread.

    examples: how many there are. constant: for each call whether it has been found that its output, alike for all
    examples, has no axis of them, and how it gets one (:class:`Layout`); each example then has a copy of its own.
    """

    def __init__(self, examples: int, constant: Sequence[Expand | None] = ()) -> None:
        self.calls: list[Call] = []
        #: Whether a tensor got a hook, which may do anything to its gradient.
        self.hooked = False
        self._examples = examples
        self._constant = constant
        self._thread = threading.get_ident()
        self._copies: list[tuple[Site, Tensor]] = []

    def hooks(self, sites: Sequence[Site]) -> list[Change]:
        """They come before all other hooks, so that what a user's hook makes of an output is differentiated and not
        recorded.
        """
        return [forward_hook(site.module, self._hook(site), prepend=True, with_kwargs=True) for site in sites]

    def check(self) -> None:
        """Raise if what was recorded is no longer what the model computed with."""
        for call in self.calls:
            call.check_inputs()
        for site, copy in self._copies:
            if copy._version:
                raise ValueError(
                    f"layer {site.name!r}: it returns several tensors that share memory, one of which was modified in "
                    "place after the call: replace the in-place operation by one that makes a new tensor"
                )

    def _hook(self, site: Site) -> Callable[..., Any]:
        def hook(module: nn.Module, args: Any, kwargs: Any, output: Any) -> Any:
            if threading.get_ident() != self._thread:
                return None
            if not torch.is_grad_enabled():
                raise RuntimeError(
                    f"layer {site.name!r} ran under torch.no_grad (or activation checkpointing), where its "
                    "derivative is not recorded: leave it out of the layer collection, or switch checkpointing off"
                )
            found = self.add(site, args, kwargs, output)
            return None if found is output else found

        return hook

    def add(self, site: Site, args: Any, kwargs: Any, output: Any, parameters: tuple[int, ...] = ()) -> Any:
        """Record one call, and return the output that is passed on. parameters: as of :class:`Call`."""
        number = len(self.calls)
        expand = self._constant[number] if number < len(self._constant) else None
        if type(output) is not Tensor and has_packed((args, kwargs, output)):
            args, kwargs = arguments_padded((args, kwargs))
            output, again = outputs_padded(output)
            return again(self._added(site, args, kwargs, output, expand, parameters))
        return self._added(site, args, kwargs, output, expand, parameters)

    def _added(
        self, site: Site, args: Any, kwargs: Any, output: Any, expand: Expand | None, parameters: tuple[int, ...]
    ) -> Any:
        found = self._passed_on(site, output, expand)
        one = not kwargs and len(args) == 1 and isinstance(args[0], Tensor) and isinstance(found, Tensor)
        if one and found.requires_grad:  # as nearly all, which needs no machinery to take apart
            x, y = args[0], Output(0, found.shape, found.dtype)
            edge, before = _edge(found), [x._version]
            self.calls.append(Call(site, ((x.detach(),), {}), before, (y,), (edge,), is_cast(), parameters))
            return found
        inputs = _detached((args, kwargs))
        leaves = differentiable(found)
        outputs = tuple(Output(k, y.shape, y.dtype) for k, y in leaves)
        edges = tuple(_edge(y) for _, y in leaves)
        self.calls.append(Call(site, inputs, versions(inputs), outputs, edges, is_cast(), parameters))
        return found

    def _passed_on(self, site: Site, output: Any, expand: Expand | None) -> Any:
        """The output, or copies where its own edges would not do.

        An in-place operation on a view replaces its edge, so that what comes after does not reach it. Where the view is
        that of all of a tensor, the edge of that does; elsewhere a copy is passed on, which is no view.
        """
        if isinstance(output, Tensor) and expand is None:
            return output.clone() if output.requires_grad and _cut(output) else output
        copies: list[Tensor] = []
        places: set[int] = set()

        def copied(y: Tensor) -> Tensor:
            if not y.requires_grad:
                return y
            places.add(y.untyped_storage().data_ptr())
            copies.append(y.clone() if expand is None else expand(y, self._examples).clone())
            return copies[-1]

        # Outputs that depend on each other: only what passes through a copy is the derivative in it alone.
        several = len(differentiable(output)) > 1
        if not several and expand is None:
            return pytree.tree_map_only(Tensor, lambda y: y.clone() if y.requires_grad and _cut(y) else y, output)
        found = pytree.tree_map_only(Tensor, copied, output)
        if len(places) < len(copies):
            self._copies += [(site, y) for y in copies]
        return found


#: From an output that is alike for all examples, and their number, to one with a row for each.
Expand = Callable[[Tensor, int], Tensor]


def in_front(x: Tensor, examples: int) -> Tensor:
    """With an axis of examples in front."""
    return x.expand(examples, *x.shape)


def in_first(x: Tensor, examples: int) -> Tensor:
    """With examples along the first axis, which has length one."""
    return x.expand(examples, *x.shape[1:])


def _cut(y: Tensor) -> bool:
    """Whether an in-place operation on y would cut off its edge, and there is no other to take."""
    return y._is_view() and not _whole_view(y)


def _whole_view(y: Tensor) -> bool:
    """Whether y is the same entries in the same order as those of the tensor that it is a view of, another shape."""
    base = y._base
    return (
        base is not None
        and base.grad_fn is not None
        and base.numel() == y.numel()
        and base.is_contiguous()
        and y.is_contiguous()
    )


def _edge(y: Tensor) -> GradientEdge:
    """Where its gradient arrives, in its own shape or in that of the tensor that it is a view of."""
    if y._is_view():
        assert y._base is not None
        return get_gradient_edge(y._base)
    return get_gradient_edge(y)


def leaves_of(inputs: tuple[Any, dict[str, Any]]) -> list[Any]:
    """What the arguments of a call consist of, in order."""
    return list(inputs[0]) if _plain(inputs) else pytree.tree_leaves(inputs)


def _plain(inputs: tuple[Any, dict[str, Any]]) -> bool:
    """Whether arguments are tensors alone, as nearly all are, which needs no machinery to take apart."""
    args, kwargs = inputs
    return not kwargs and all(isinstance(t, Tensor) for t in args)


def versions(inputs: tuple[Any, dict[str, Any]]) -> list[int]:
    """How often each tensor has been modified in place."""
    return [t._version for t in leaves_of(inputs) if isinstance(t, Tensor)]


def _detached(inputs: tuple[Any, dict[str, Any]]) -> Any:
    if _plain(inputs):
        return tuple(t.detach() for t in inputs[0]), {}
    return pytree.tree_map_only(Tensor, Tensor.detach, inputs)


def differentiable(output: Any) -> list[tuple[int, Tensor]]:
    """The leaves of an output that a gradient can reach, with their positions."""
    leaves = [output] if isinstance(output, Tensor) else pytree.tree_leaves(output)
    return [(k, y) for k, y in enumerate(leaves) if isinstance(y, Tensor) and y.requires_grad]


@dataclass(frozen=True)
class Layout:
    """Where the examples are in the tensors of one call.

    inputs: the axis of examples (or of a multiple of them), None for a tensor without one. outputs: the same of the
    differentiable ones; None for one that is alike for all examples. used: which of them reach the output of the model.
    shapes: of the outputs, as they were found, () if they were not. expand: how outputs that are alike get their rows;
    each: whether instead the gradient of each example in them is taken by itself.
    """

    inputs: tuple[int | None, ...]
    outputs: tuple[int | None, ...]
    used: tuple[bool, ...] = (True,)
    shapes: tuple[torch.Size, ...] = ()
    expand: Expand | None = None
    each: bool = False

    @classmethod
    def of(cls, two: Call, three: Call, used: Sequence[bool]) -> Layout | None:
        """From how its shapes change between two and three examples; None where that cannot be told, for a call of
        which nothing is used.
        """
        if not any(used) and two.outputs:
            try:
                found = cls.of(two, three, [True] * len(used))
            except Refused:
                return None
            return None if found is None or None in found.outputs else found
        one, other = leaves_of(two.inputs), leaves_of(three.inputs)
        if len(one) != len(other) or len(two.outputs) != len(three.outputs):
            raise Refused(
                [two.site.name],
                f"{two.what} is called with another number of tensors, or returns another, for other numbers of "
                "examples, so they cannot be told apart",
                EXCLUDE,
            )
        outputs = tuple(
            _axis(two, a.shape, b.shape) if u else None
            for a, b, u in zip(two.outputs, three.outputs, used, strict=True)
        )
        if len(outputs) != 1 and any(u and axis is None for axis, u in zip(outputs, used, strict=True)):
            raise Refused([two.site.name], f"{two.what} has several outputs, some without an axis of examples", EXCLUDE)
        inputs = tuple(
            _axis(two, a.shape, b.shape) if isinstance(a, Tensor) and isinstance(b, Tensor) else None
            for a, b in zip(one, other, strict=True)
        )
        return cls(inputs, outputs, tuple(used), tuple(y.shape for y in three.outputs))

    @property
    def constant(self) -> bool:
        """Whether its output is alike for all examples."""
        return self.outputs == (None,)

    def ways(self) -> list[Expand]:
        """How a constant output may get an axis of examples: along a first axis of length one, or in front."""
        (shape,) = self.shapes
        return [in_first, in_front] if len(shape) > 0 and shape[0] == 1 else [in_front]

    def check(self, call: Call) -> None:
        """Raise unless the outputs of a call are as they were found."""
        if self.shapes and [len(y.shape) for y in call.outputs] != [
            len(shape) + (self.expand is in_front) for shape in self.shapes
        ]:
            raise ValueError(
                f"{call.what} returns tensors with other numbers of axes for some minibatches than for others, so it "
                "is not known where the examples are: keep an axis of length one for a single example (no squeeze())"
            )


def _axis(call: Call, two: torch.Size, three: torch.Size) -> int | None:
    if two == three:
        return None
    changed = [k for k, (m, n) in enumerate(zip(two, three, strict=False)) if m != n]
    if len(two) == len(three) and len(changed) == 1 and two[changed[0]] * 3 == three[changed[0]] * 2:
        return changed[0]
    raise Unclear(
        [call.site.name],
        f"{call.what}: a tensor of shape {tuple(two)} for two examples and {tuple(three)} for three has no axis that "
        "is that of examples",
        "switch off what it is given or returns beside (use_cache=False, output_attentions=False)",
        EXCLUDE,
    )
