"""One run of a model as the Jacobian of each of its layers, in the form that the layer has."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from math import prod
from typing import Any

import torch
from torch import Tensor, nn

from .. import forms
from ..changes import Borrowed, Change, entered, no_grad, trainable
from ..derivatives.composites import OneExample
from ..forms import Gather, LayerJacobian, Outer, Routed, Transposed
from ..kinds import Packing, is_ours
from ..kinds.generic import generic
from ..layercollection import Layer, LayerCollection, Site
from . import data
from .evaluator import (
    DryRun,
    Evaluator,
    State,
)
from .functional import Uses
from .recording import Call, Layout, Recorder, in_first, in_front, leaves_of
from .refused import EXCLUDE, Refused


@dataclass(frozen=True)
class Plan:
    """What the types of the modules, or a probe of the model on a few examples, told.

    layouts: of every call, None for one that nothing comes of. names: the layers in the order of calls. aligned:
    whether all tensors of a minibatch have a row for each example, so that it can be taken apart. axes: how many each
    tensor of the minibatch had; a model may do something else with more or fewer. whole: where there are tensors as
    long as the minibatch that are none of examples. trial: of two examples, if what is made of them was counted.
    looked: whether it was found by running the model. one: whether with one example, too. normalises_one: whether
    something is normalised as one example however many there are. repeated: whether it saw one example several times,
    by which one cannot tell whether a model mixes examples. uses: whether weights are used without a call of their
    module. opened: the containers whose own parameters are seen by their uses, and not by calls of the container.
    hooked: whether the model hooks tensors, so that operations do not tell all of what becomes of a gradient.
    """

    layouts: tuple[Layout | None, ...]
    names: tuple[str, ...]
    aligned: bool
    axes: tuple[int, ...]
    whole: frozenset[data.Path] = frozenset()
    trial: DryRun | None = None
    looked: bool = True
    one: bool = False
    normalises_one: bool = False
    repeated: bool = False
    uses: bool = False
    opened: frozenset[str] = frozenset()
    hooked: bool = False

    def read(self, batch: data.Batch) -> data.Batch:
        """A minibatch, with what was found about those like it."""
        return data.reread(batch, self.whole) if self.whole else batch

    def fits(self, batch: data.Batch) -> bool:
        """Whether it is for minibatches like this one."""
        return self.axes == data.axes(batch) and not (self.repeated and data.count(batch) > 1)


class Recorded(Evaluator):
    """A model whose layers are recorded while it runs: every call, with what goes in and the gradients that come back,
    becomes the Jacobian of a layer. Arguments as of :class:`Evaluator`.
    """

    def __init__(self, model: nn.Module, layer_collection: LayerCollection, **options: Any) -> None:
        super().__init__(model, layer_collection, **options)
        self.ignore_uncalled = layer_collection.ignore_uncalled
        #: Whether the model hooked tensors when it was looked at last.
        self._hooked = False

    def _forward(
        self, sites: Sequence[Site], batch: data.Batch, plan: Plan | None, opened: frozenset[str] = frozenset()
    ) -> tuple[Tensor, list[Call]]:
        """Run the model once and record every call of the sites, but for those that are opened."""
        opened = opened if plan is None else plan.opened
        n = data.count(batch)
        recorder = Recorder(n, () if plan is None else [None if x is None else x.expand for x in plan.layouts])
        changes: list[Change] = [
            *recorder.hooks([s for s in sites if s.name not in opened]),
            trainable(_collected(sites)),
        ]
        state = None if plan is None or not plan.looked else State(self.model)  # a probe has one of its own
        if state is not None:
            changes.append(state)
        if n == 1 or plan is None or plan.normalises_one:
            changes.append(entered(OneExample()))
        if plan is None or plan.uses:
            changes += Uses(recorder, sites, opened).changes()
        self.within(batch)  # what is looked for there is none of the calls
        with self.running(*changes):
            f = self.outputs_of(batch)
            calls = list(recorder.calls)
            self._hooked = recorder.hooked or (plan is not None and plan.hooked)
            if state is not None:
                state.check(lambda: self.outputs_of(batch))
        recorder.check()
        if plan is not None:
            if [c.site.name for c in calls] != list(plan.names):
                raise ValueError(
                    "the model calls its layers differently for different minibatches, which is not supported"
                )
            for call, layout in zip(calls, plan.layouts, strict=True):
                if layout is not None:
                    layout.check(call)
        return f, calls

    def _back(self, calls: Sequence[Call], within: Sequence[Change]) -> Borrowed:
        """What is in force on the way back, where activation checkpoints run modules again."""
        frozen = [p for p in _collected([call.site for call in calls]) if not p.requires_grad]
        if frozen or self.device.type == "cuda":
            return self.running(trainable(frozen), *within, record=False)
        return Borrowed(*within)

    def _forms(
        self,
        calls: Sequence[Call],
        layouts: Sequence[Layout | None],
        grads: Sequence[Tensor | None],
        cotangents: int,
        examples: int,
    ) -> dict[str, LayerJacobian]:
        """One form for each layer, of all calls and all modules through which its parameters act."""
        of_site: dict[int, list[LayerJacobian]] = {}
        sites = {id(call.site): call.site for call in calls}
        remaining = iter(grads)
        for call, layout in zip(calls, layouts, strict=True):
            gys = [next(remaining) for _ in call.edges]
            used = [False] * len(gys) if layout is None else layout.used
            if any(g is not None and not u for g, u in zip(gys, used, strict=False)):
                raise ValueError(
                    f"{call.what}: what it returns reaches the output of the model for some minibatches only, which is "
                    "not supported: leave it out with LayerCollection.exclude"
                )
            if layout is not None:
                of_site.setdefault(id(call.site), []).append(self._form(call, layout, gys, cotangents, examples))
        of_layer: dict[str, list[LayerJacobian]] = {name: [] for name in self.layer_collection}
        for key, of_calls in of_site.items():
            form = forms.add(of_calls)
            for layer, names in sites[key].routes:
                of_layer[layer.name].append(_routed(form, sites[key], layer, names))
        return {
            name: forms.add(of_sites) if of_sites else self._nothing(self.layer_collection[name], cotangents, examples)
            for name, of_sites in of_layer.items()
        }

    def _nothing(self, layer: Layer, cotangents: int, examples: int) -> LayerJacobian:
        """The Jacobian of a layer of which nothing comes."""
        zero = torch.zeros((), dtype=self.dtype, device=self.device)
        shape = layer.packing.shape
        if not layer.kronecker:
            return forms.Dense(zero.expand(cotangents, examples, *shape))
        groups, rows, cols = shape
        if groups == 1:
            nowhere = torch.full((examples, 1), -1, device=self.device)
            return Gather(nowhere, zero.expand(cotangents, examples, 1, rows), cols)
        return Outer(zero.expand(examples, 1, groups, cols), zero.expand(cotangents, examples, 1, groups, rows))

    def _form(
        self, call: Call, layout: Layout, gys: Sequence[Tensor | None], cotangents: int, examples: int
    ) -> LayerJacobian:
        """The Jacobian of one call of a module with respect to all of its parameters."""
        site = call.site
        if not call.outputs:
            raise Refused(
                [site.name],
                f"{call.what} returned no tensor that can be differentiated (a {type(site.module).__name__} that "
                "returns its own class of output, or a detached one)",
                EXCLUDE,
            )
        leaves = leaves_of(call.inputs)
        outputs = [(y, axis) for y, axis, used in zip(call.outputs, layout.outputs, layout.used, strict=True) if used]
        inputs = [(t, axis) for t, axis in zip(leaves, layout.inputs, strict=True) if axis is not None]
        axes = [(t.shape, axis) for t, axis in (*inputs, *outputs) if axis is not None]
        lengths = {shape[axis] for shape, axis in axes}
        length = min(lengths, default=examples)
        flattened = site.kind.function is None and all(t.shape[axis] == length for t, axis in inputs)  # by a router
        several = site.kind.bound or flattened  # e.g. a mask for each head
        several = several and all(other % length == 0 for other in lengths)
        if (len(lengths) > 1 and not several) or length % examples:
            raise Refused(
                [site.name], f"{call.what}: its inputs and outputs split {examples} examples differently", EXCLUDE
            )
        fronts = []
        used_gys = [gy for gy, used in zip(gys, layout.used, strict=True) if used]
        for (y, axis), gy in zip(outputs, used_gys, strict=True):
            if gy is None:
                zero = next(iter(site.params.values())).new_zeros(1, dtype=y.dtype)
                gy = zero.expand(cotangents, *([length] if layout.each else []), *y.shape)
            shape = (length, *y.shape) if layout.each else y.shape
            front = _to_front(gy.reshape(cotangents, *shape), axis or 0, 1)
            fronts.append(front.unflatten(1, (length, -1)) if flattened and front.shape[1] > length else front)
        form = self._known(call, layout, fronts, [axis for _, axis in axes], length)
        if form is None:
            of_leaves = [(y.leaf, g) for (y, _), g in zip(outputs, fronts, strict=True)]
            flat = generic(site.module, site.params, call.inputs, layout.inputs, of_leaves, site.name, self.dtype)
            form = flat if site.kind.function is None else _packed(flat, site.packing)
        return form if length == examples and not isinstance(form, Routed) else form.fold(length // examples)

    def _known(
        self, call: Call, layout: Layout, gys: Sequence[Tensor], axes: Sequence[int], length: int
    ) -> LayerJacobian | None:
        """What the kind of a module says of one call; None if it has none that knows this call."""
        site, kind = call.site, call.site.kind
        if kind.function is None or (kind.whole and len(gys) > 1):
            return None
        (gy,) = gys
        where = {id(x): axis for x, axis in zip(leaves_of(call.inputs), layout.inputs, strict=True)}
        if kind.bound:
            given = call.arguments()
            if given.keys() != _arguments(type(site.module).forward):  # the forward of this one was replaced
                return None
            constant = {k for k, x in given.items() if isinstance(x, Tensor) and where[id(x)] is None}
            moved = {
                k: self._cast(x if k in constant else _to_front(x, where[id(x)] or 0, 0))
                for k, x in given.items()
                if isinstance(x, Tensor)
            }
            with no_grad():
                found: LayerJacobian | None = kind.function(site.module, self._cast(gy), {**given, **moved}, constant)
            return found
        if any(axes) and not kind.features_last:
            axis = next(filter(None, axes))
            raise Refused([site.name], f"{call.what}: its examples are along axis {axis}, expected axis 0", EXCLUDE)
        tensors = [self._cast(_examples_first(x, where[id(x)], length)) for x in call.tensors()]
        with no_grad():
            form = kind.function(site.module, self._cast(gy), *tensors)
        if not is_ours(kind) and form.shape != site.packing.shape:
            raise ValueError(
                f"{call.what}: its registered kind {kind.name!r} returned a Jacobian in the shape {form.shape}, but "
                f"its parameters {', '.join(site.params)} are packed in {site.packing.shape}"
            )
        return form

    def _cast(self, t: Tensor) -> Tensor:
        return t.to(self.dtype) if t.is_floating_point() else t


@cache
def _arguments(forward: Callable[..., Any]) -> frozenset[str]:
    """The names of the arguments of the forward of a type."""
    return frozenset([*inspect.signature(forward).parameters][1:])


def _collected(sites: Sequence[Site]) -> list[nn.Parameter]:
    return [s.params[k] for s in sites for _, names in s.routes for k in names]


def _to_front(t: Tensor, axis: int, lead: int) -> Tensor:
    """Move an axis, counted after ``lead`` leading axes, to just behind them."""
    return t if axis == 0 else t.movedim(lead + axis, lead)


def _packed(form: LayerJacobian, packing: Packing) -> forms.Lazy:
    """A Jacobian in flat parameters as one of a packed shape."""

    def compute(start: int, stop: int, first: int, last: int) -> Tensor:
        return packing.pack(form.narrow(start, stop, first, last).dense())

    return forms.Lazy(compute, form.cotangents, form.examples, packing.shape, form.dtype, form.device)


def _examples_first(x: Tensor, axis: int | None, examples: int) -> Tensor:
    """An input with a row for each example, of which one without an axis of examples has copies."""
    if axis is not None:
        return _to_front(x, axis, 0)
    return in_first(x, examples) if x.ndim > 0 and x.shape[0] == 1 else in_front(x, examples)


def _of_weight(form: LayerJacobian, packing: Packing, into: Packing) -> LayerJacobian | None:
    """The Jacobian of a weight without that of its bias, in the packing of a layer that other modules share; None if it
    has no such form.
    """
    if packing.bias and not isinstance(form, Outer):
        return None
    weight = form.without_last_column() if isinstance(form, Outer) and packing.bias else form
    if packing.crossed != into.crossed:
        return None if into.bias else Transposed(weight)
    if into.bias:
        return weight.with_column_of_zeros() if isinstance(weight, Outer) else None
    return weight


def _routed(form: LayerJacobian, site: Site, layer: Layer, names: dict[str, int]) -> LayerJacobian:
    """The part of a module's Jacobian that belongs to one layer, in that layer's packing."""
    positions = list(names.values())
    packing = site.packing
    if (
        list(names) == list(site.params)
        and positions == list(range(len(layer.params)))
        and (site.kind.packing is None or packing.crossed == layer.packing.crossed)
        and form.shape == layer.packing.shape
    ):
        return form
    if layer.kronecker and [*names] == [*site.params][:1] and positions == [0]:
        found = _of_weight(form, packing, layer.packing)
        if found is not None:
            return found
    if layer.kronecker:
        raise NotImplementedError(
            f"layer {layer.name!r} ({layer.kind_name}): the factors of a {type(form).__name__} cannot be cut to "
            f"{', '.join(names)}: collect all of {', '.join(site.params)}, or register the kind without kronecker=True"
        )
    numel = [p.numel() for p in site.params.values()]
    sizes = [prod(shape) for _, shape in layer.params]
    bias_alone = isinstance(form, Outer) and packing.bias and [*names] == [*site.params][1:] and positions == [0]

    def compute(start: int, stop: int, first: int, last: int) -> Tensor:
        piece = form.narrow(start, stop, first, last)
        if bias_alone:  # the weight, of which it is the last column, is never made
            return layer.packing.pack(piece.last_column().flatten(2))  # type: ignore[attr-defined]
        flat = packing.unpack(piece.dense())
        whole = dict(zip(site.params, flat.split(numel, -1), strict=True))
        mine: dict[int, Tensor] = {}
        for name, k in names.items():  # a parameter may have several names
            mine[k] = mine[k] + whole[name] if k in mine else whole[name]
        zero = flat.new_zeros(1)
        pieces = [mine.get(k, zero.expand(*flat.shape[:-1], size)) for k, size in enumerate(sizes)]
        return layer.packing.pack(torch.cat(pieces, -1))

    return forms.Lazy(compute, form.cotangents, form.examples, layer.packing.shape, form.dtype, form.device)
