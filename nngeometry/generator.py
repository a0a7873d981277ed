"""From a model and data to a stream of per-example Jacobians, one small chunk of cotangents at a time."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from math import prod
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import GradientEdge, get_gradient_edge
from torch.utils import _pytree as pytree

from . import data, forms
from .autograd import pull
from .forms import LayerJacobian, Outer
from .kinds import Packing
from .kinds.generic import generic
from .layercollection import Layer, LayerCollection, Site
from .likelihood import Cotangents
from .memory import chunk_length

#: From the output of the model, the minibatch and its position in the loader to the cotangents whose products with
#: the Jacobian are streamed. It is a function: the same arguments give the same cotangents (random ones are drawn
#: from a seed and the position).
CotangentFunction = Callable[[Tensor, data.Batch, int], Cotangents]
#: From the output, a vector u in its shape, the minibatch and its position to ``sum_c s_c (s_c . u)`` for each example.
Curvature = Callable[[Tensor, Tensor, data.Batch, int], Tensor]


@dataclass(frozen=True)
class Observation:
    """The Jacobians of one chunk of cotangents of one minibatch.

    n: how many examples this chunk counts, which is those of the minibatch in its first chunk and zero afterwards,
    so that sums of n count every example once, and statistics of the inputs alone are taken where n > 0. weight: what
    it counts in the mean, likewise. forms: one for each layer, by name.
    """

    n: int
    weight: float
    forms: dict[str, LayerJacobian]


@dataclass(frozen=True)
class _Axis:
    """Where the examples of a tensor are: along ``axis``, which is ``ratio`` times as long as the batch."""

    axis: int
    ratio: int


@dataclass(frozen=True)
class _Call:
    """One call of a module, as its forward hook saw it."""

    site: Site
    inputs: Any
    versions: tuple[int, ...]
    outputs: tuple[tuple[int, Tensor], ...]  # (leaf of the output, that leaf detached), for the differentiable ones
    edges: tuple[GradientEdge, ...]


@dataclass(frozen=True)
class _Layout:
    """Where the examples are in the tensors of one call; None for a tensor without an axis of examples."""

    inputs: tuple[_Axis | None, ...]
    outputs: tuple[_Axis | None, ...]


@dataclass(frozen=True)
class _Plan:
    """What a probe of the model on a few examples told: the layout of every call, and whether backward can be
    vectorised.
    """

    layouts: tuple[_Layout, ...]
    batched: bool


class Evaluator:
    """A model on data: runs it on minibatches, with its outputs checked.

    model: the model, in the mode in which it is to be looked at. layer_collection: the parameters w. function:
    ``function(*minibatch) -> f`` (``function(minibatch)`` if it is a mapping), by default ``model(minibatch[0])``.
    device: where minibatches are moved, by default where the model is. verbose: show progress.
    """

    def __init__(
        self,
        model: nn.Module,
        layer_collection: LayerCollection,
        *,
        function: Callable[..., Any] | None = None,
        device: torch.device | str | None = None,
        verbose: bool = False,
    ) -> None:
        parameters = layer_collection.parameters(model)
        _check_one_of("device", {p.device for p in parameters}, "move the model to one device")
        _check_one_of("dtype", {p.dtype for p in parameters}, "cast the model, or use a LayerCollection for each dtype")
        self.model = model
        self.layer_collection = layer_collection
        self.function = function
        self.device = parameters[0].device if device is None else torch.device(device)
        self.verbose = verbose
        if self.device.type != parameters[0].device.type:
            raise ValueError(
                f"device={str(self.device)!r}, but the model is on {parameters[0].device}: move the model there"
            )
        #: Half precision is accumulated in single.
        self.dtype = torch.float32 if parameters[0].dtype in (torch.float16, torch.bfloat16) else parameters[0].dtype

    def minibatches(self, examples: Any) -> Iterator[data.Batch]:
        """The minibatches of a loader or the one that ``examples`` is, on the device, with a progress bar when
        verbose.
        """
        return data.minibatches(examples, self.device, self.verbose, type(self.model).__name__)

    def outputs(self, batch: data.Batch) -> Tensor:
        """The output of the model on a minibatch, checked: one row for each example, finite."""
        f = self.outputs_unchecked(batch)
        if not isinstance(f, Tensor):
            raise TypeError(
                f"the model returned a {type(f).__name__}, not a tensor: pass function=, "
                "e.g. function=lambda *batch: model(batch[0]).logits"
            )
        n = data.count(batch)
        if f.ndim == 0 or f.shape[0] != n:
            raise ValueError(
                f"the model returned shape {tuple(f.shape)} for a minibatch of {n} examples: it must return one "
                "row for each example"
            )
        if not bool(torch.isfinite(f).all()):
            raise ValueError(
                "the output of the model has NaN or infinite entries: check the parameters and the inputs of this "
                "minibatch"
            )
        return f

    def outputs_unchecked(self, batch: data.Batch) -> Any:
        """What the model or the user's function returns for a minibatch."""
        arguments = data.arguments(batch)
        if self.function is not None:
            return self.function(*arguments)
        if isinstance(arguments[0], Tensor):
            return self.model(arguments[0])
        raise TypeError(
            f"minibatches of type {type(arguments[0]).__name__} need function=, "
            "e.g. function=lambda batch: model(**batch).logits"
        )


class Generator(Evaluator):
    """Streams ``s_c^T df/dw`` for each example: the per-example Jacobian of a model seen through cotangents s_c.

    model, layer_collection, function, device, verbose: as in :class:`Evaluator`. cotangents: from the output f
    ``(B, *out)``, the minibatch and its position to the s_c. centred: matrices are of ``J - mean J`` instead of J.
    curvature: ``sum_c s_c (s_c . u)``, if there is a faster way than by the s_c. weigh: from f and the minibatch to
    what it counts in a mean, by default its number of examples. mean: whether matrices are divided by the sum of that.

    The user's model is found as it was after every minibatch: its mode, buffers, ``requires_grad``, ``grad``, hooks
    and the random state.

    >>> from nngeometry.likelihood import Gaussian
    >>> model = nn.Linear(3, 2)
    >>> g = Generator(model, LayerCollection.from_model(model), lambda f, batch, k: Gaussian().sqrt(f))
    >>> [observation] = g.stream((torch.randn(5, 3),))
    >>> observation.n, observation.forms[""].dense().shape
    (5, torch.Size([2, 5, 1, 2, 4]))
    """

    def __init__(
        self,
        model: nn.Module,
        layer_collection: LayerCollection,
        cotangents: CotangentFunction,
        *,
        function: Callable[..., Any] | None = None,
        device: torch.device | str | None = None,
        verbose: bool = False,
        centred: bool = False,
        curvature: Curvature | None = None,
        weigh: Callable[[Tensor, data.Batch], float] | None = None,
        mean: bool = True,
    ) -> None:
        super().__init__(model, layer_collection, function=function, device=device, verbose=verbose)
        self.cotangents = cotangents
        self.centred = centred
        self.curvature = self._curvature if curvature is None else curvature
        self.weigh = weigh if weigh is not None else lambda f, batch: f.shape[0]
        self.mean = mean

    def stream(self, examples: Any) -> Iterator[Observation]:
        """The observations of a loader or of one minibatch, in order."""
        sites = self.layer_collection.sites(self.model)
        check_mode(self.model)
        plan: _Plan | None = None
        for position, batch in enumerate(self.minibatches(examples)):
            if plan is None:
                plan = self._probe(sites, batch)
            yield from self._observe(sites, batch, position, plan)

    def _curvature(self, f: Tensor, u: Tensor, batch: data.Batch, position: int) -> Tensor:
        cotangents = self.cotangents(f, batch, position)
        step = chunk_length(f.numel() * f.element_size(), cotangents.count)
        out = torch.zeros_like(f)
        for start in range(0, cotangents.count, step):
            s = cotangents.take(start, min(start + step, cotangents.count)).flatten(2)
            out += torch.einsum("cbk,cb->bk", s, torch.einsum("cbk,bk->cb", s, u.flatten(1))).view_as(f)
        return out

    def _forward(
        self, sites: Sequence[Site], batch: data.Batch, layouts: Sequence[_Layout] | None
    ) -> tuple[Tensor, list[_Call]]:
        """Run the model once and record every call of the sites."""
        calls: list[_Call] = []
        n = data.count(batch)

        def record(site: Site) -> Callable[..., Any]:
            def hook(module: nn.Module, args: Any, kwargs: Any, output: Any) -> Any:
                if not torch.is_grad_enabled():
                    raise RuntimeError(
                        f"layer {site.name!r} ran under torch.no_grad (or activation checkpointing), where its "
                        "derivative is not "
                        "recorded: leave it out of the layer collection, or switch checkpointing off"
                    )
                if layouts is not None and len(calls) < len(layouts) and layouts[len(calls)].outputs == (None,):
                    # The same output for all examples (position embeddings): give each example its own copy.
                    output = _examples_first(output, None, n)
                leaves = [
                    (k, y)
                    for k, y in enumerate(pytree.tree_leaves(output))
                    if isinstance(y, Tensor) and y.requires_grad
                ]
                inputs = pytree.tree_map_only(Tensor, Tensor.detach, (args, kwargs))
                versions = tuple(t._version for t in pytree.tree_leaves(inputs) if isinstance(t, Tensor))
                outputs = tuple((k, y.detach()) for k, y in leaves)
                calls.append(_Call(site, inputs, versions, outputs, tuple(get_gradient_edge(y) for _, y in leaves)))
                return output

            return hook

        with ExitStack() as stack:
            for site in sites:
                # First of all hooks, so that a user's hook that changes the output is differentiated and not recorded.
                handle = site.module.register_forward_hook(record(site), prepend=True, with_kwargs=True)
                stack.callback(handle.remove)
            stack.enter_context(_trainable([s.params[k] for s in sites for _, names in s.routes for k in names]))
            stack.enter_context(torch.enable_grad())
            f = self.outputs(batch)
        return f, calls

    def _probe(self, sites: Sequence[Site], batch: data.Batch) -> _Plan:
        """Find where the examples are in every tensor, and check that the derivative of each is well defined.

        The model is run on two and on three examples: the axis whose length changes is that of examples. Then a
        cotangent for one example alone must not reach the others, which would mean that the model mixes examples.
        """
        n = data.count(batch)
        if n == 0:
            raise ValueError("a minibatch has no example")
        few = [data.take(batch, torch.arange(m) % n) for m in (2, 3)]
        with unchanged(self.model):
            runs = [self._forward(sites, b, None)[1] for b in few]
            if [c.site.name for c in runs[0]] != [c.site.name for c in runs[1]]:
                raise ValueError("the model calls different layers for different numbers of examples")
            called = {c.site.name for c in runs[0]}
            for site in sites:
                if site.name not in called and not self._acts_elsewhere(site, sites, called):
                    names = ", ".join(repr(layer.name) for layer, _ in site.routes)
                    raise ValueError(
                        f"layer {site.name!r} ({type(site.module).__name__}) was never called, so the Jacobian of "
                        f"{names} is unknown. "
                        "Leave it out with LayerCollection.exclude, or, if the module above uses its parameters "
                        "without "
                        "calling it, declare that module's type with nngeometry.whole"
                    )
            layouts = tuple(_layout(one, two) for one, two in zip(*runs, strict=True))
            plain = self.outputs_unchecked(few[1]) if any(layout.outputs == (None,) for layout in layouts) else None
            f, calls = self._forward(sites, few[1], layouts)
            if plain is not None and not (f.shape == plain.shape and torch.equal(f, plain)):
                names = ", ".join(
                    repr(c.site.name) for c, o in zip(calls, layouts, strict=True) if o.outputs == (None,)
                )
                raise ValueError(
                    f"layer {names}: its output has no axis of examples, and giving it one changes the model's output. "
                    "Call it with one input for each example (e.g. position ids expanded to the batch)"
                )
            batched = self._check_separate(f, calls, layouts)
        return _Plan(layouts, batched)

    def _acts_elsewhere(self, site: Site, sites: Sequence[Site], called: set[str]) -> bool:
        """Whether all parameters of an uncalled module act through other modules that were called (a tied, unused
        module).
        """
        through = {id(p) for s in sites if s.name in called for p in s.params.values()}
        wanted = {k for _, names in site.routes for k in names}
        return all(id(site.params[k]) in through for k in wanted)

    def _check_separate(self, f: Tensor, calls: Sequence[_Call], layouts: Sequence[_Layout]) -> bool:
        """Raise if the gradient of one example's output reaches another example; whether backward can be vectorised."""
        index = torch.arange(f.numel(), device=f.device).view(f.shape)
        s = torch.zeros(2, *f.shape, dtype=f.dtype, device=f.device)
        for example in (0, 1):
            s[example, example] = torch.cos(index[example].to(f.dtype) + 1)
        edges = [e for c in calls for e in c.edges]
        if not edges or not f.requires_grad:
            raise ValueError("the output of the model does not depend on the collected parameters")
        try:
            grads = pull([f], edges, [s], batched=True)
            batched = True
        except RuntimeError:
            grads = pull([f], edges, [s], batched=False)
            batched = False
        remaining = iter(grads)
        for call, layout in zip(calls, layouts, strict=True):
            for axis in layout.outputs:
                g = next(remaining)
                if g is None:
                    continue
                # An output without examples was expanded: its examples are first.
                rows = _to_front(g, axis or _Axis(0, 1), 1).unflatten(1, (f.shape[0], -1))
                others = [rows[0, 1:], rows[1, :1], rows[1, 2:]]
                if any(bool(r.count_nonzero()) for r in others):
                    raise ValueError(
                        f"layer {call.site.name!r}: the output for one example depends on the others, so "
                        "per-example derivatives are "
                        "undefined. Something above it mixes examples (batch statistics, attention over the batch, "
                        "a sequence that is not split by example): use model.eval(), or feed one example at a time"
                    )
        return batched

    def _observe(self, sites: Sequence[Site], batch: data.Batch, position: int, plan: _Plan) -> Iterator[Observation]:
        with unchanged(self.model):
            f, calls = self._forward(sites, batch, plan.layouts)
        if len(calls) != len(plan.layouts):
            raise ValueError("the model calls a different number of layers for different minibatches")
        cotangents = self.cotangents(f.detach(), batch, position)
        edges = [e for c in calls for e in c.edges]
        per_cotangent = sum(y.numel() * y.element_size() for c in calls for _, y in c.outputs)
        step = chunk_length(per_cotangent, cotangents.count) if plan.batched else 1
        for start in range(0, cotangents.count, step):
            s = cotangents.take(start, min(start + step, cotangents.count)).to(f.dtype)
            grads = pull([f], edges, [s], plan.batched)
            n, weight = (f.shape[0], self.weigh(f.detach(), batch)) if start == 0 else (0, 0.0)
            yield Observation(n, weight, self._forms(calls, plan.layouts, grads, s.shape[0]))

    def _forms(
        self, calls: Sequence[_Call], layouts: Sequence[_Layout], grads: Sequence[Tensor | None], cotangents: int
    ) -> dict[str, LayerJacobian]:
        """One form for each layer, of all calls and all modules through which its parameters act."""
        of_site: dict[str, list[LayerJacobian]] = {}
        sites = {call.site.name: call.site for call in calls}
        remaining = iter(grads)
        for call, layout in zip(calls, layouts, strict=True):
            gys = [next(remaining) for _ in call.edges]
            of_site.setdefault(call.site.name, []).append(self._form(call, layout, gys, cotangents))
        of_layer: dict[str, list[LayerJacobian]] = {name: [] for name in self.layer_collection}
        for name, of_calls in of_site.items():
            form = forms.add(of_calls)
            for layer, names in sites[name].routes:
                of_layer[layer.name].append(_routed(form, sites[name], layer, names))
        return {name: forms.add(of_sites) for name, of_sites in of_layer.items()}

    def _form(self, call: _Call, layout: _Layout, gys: Sequence[Tensor | None], cotangents: int) -> LayerJacobian:
        """The Jacobian of one call of a module with respect to all of its parameters."""
        site = call.site
        leaves = pytree.tree_leaves(call.inputs)
        if call.versions != tuple(x._version for x in leaves if isinstance(x, Tensor)):
            raise ValueError(
                f"layer {site.name!r}: its input was modified in place after the call, so its derivative is lost: "
                "replace the in-place operation (+=, relu_, ...) by one that makes a new tensor"
            )
        ratios = {axis.ratio for axis in (*layout.inputs, *layout.outputs) if axis is not None}
        if len(ratios) > 1:
            raise NotImplementedError(
                f"layer {site.name!r} ({type(site.module).__name__}): its inputs and outputs split the examples "
                "differently; "
                "leave it out with LayerCollection.exclude"
            )
        ratio = ratios.pop() if ratios else 1
        fronts = []
        for (_, y), axis, gy in zip(call.outputs, layout.outputs, gys, strict=True):
            gy = gy if gy is not None else y.new_zeros(1).expand(cotangents, *y.shape)
            fronts.append(_to_front(gy, axis or _Axis(0, 1), 1))
        if site.kind.function is None:
            outputs = [(k, g) for (k, _), g in zip(call.outputs, fronts, strict=True)]
            axes = [None if axis is None else axis.axis for axis in layout.inputs]
            form: LayerJacobian = generic(site.module, site.params, call.inputs, axes, outputs, site.name, self.dtype)
        else:
            (gy,) = fronts
            inputs = [
                self._cast(_examples_first(x, axis, gy.shape[1]))
                for x, axis in zip(leaves, layout.inputs, strict=True)
                if isinstance(x, Tensor)
            ]
            with torch.no_grad():
                form = site.kind.function(site.module, self._cast(gy), *inputs)
        return form if ratio == 1 else form.fold(ratio)

    def _cast(self, t: Tensor) -> Tensor:
        return t.to(self.dtype) if t.is_floating_point() else t


def check_mode(model: nn.Module) -> None:
    """Raise, naming the module, if the model is in a mode in which per-example derivatives are undefined."""
    for name, module in model.named_modules():
        batch_norm = isinstance(module, nn.modules.batchnorm._BatchNorm)
        if batch_norm and (module.training or module.running_mean is None):
            raise ValueError(
                f"layer {name!r} ({type(module).__name__}) normalises with the statistics of the batch, so "
                "per-example derivatives "
                "are undefined: call model.eval() (and keep track_running_stats=True)"
            )
        rate = module.p if isinstance(module, nn.modules.dropout._DropoutNd) else getattr(module, "dropout", 0.0)
        if module.training and isinstance(rate, float) and rate > 0:
            raise ValueError(
                f"layer {name!r} ({type(module).__name__}) drops units at random in train mode, so its derivative "
                "is random: "
                "call model.eval()"
            )


def _layout(two: _Call, three: _Call) -> _Layout:
    """The layout of a call from how its shapes change between two and three examples."""

    def axis(a: Any, b: Any) -> _Axis | None:
        if not isinstance(a, Tensor) or a.shape == b.shape:
            return None
        changed = [k for k, (m, n) in enumerate(zip(a.shape, b.shape, strict=False)) if m != n]
        if a.ndim == b.ndim and len(changed) == 1 and a.shape[changed[0]] * 3 == b.shape[changed[0]] * 2:
            return _Axis(changed[0], a.shape[changed[0]] // 2)
        raise ValueError(
            f"layer {two.site.name!r}: a tensor of shape {tuple(a.shape)} for two examples and {tuple(b.shape)} "
            "for three has no axis "
            "that is that of examples"
        )

    inputs = zip(pytree.tree_leaves(two.inputs), pytree.tree_leaves(three.inputs), strict=True)
    outputs = tuple(axis(a, b) for (_, a), (_, b) in zip(two.outputs, three.outputs, strict=True))
    if len(outputs) != 1 and None in outputs:
        raise NotImplementedError(
            f"layer {two.site.name!r} ({type(two.site.module).__name__}) has several outputs, some without an axis "
            "of examples: "
            "leave it out with LayerCollection.exclude"
        )
    return _Layout(tuple(axis(a, b) for a, b in inputs), outputs)


def _to_front(t: Tensor, axis: _Axis, lead: int) -> Tensor:
    """Move the axis of examples, counted after ``lead`` leading axes, to just behind them."""
    return t if axis.axis == 0 else t.movedim(lead + axis.axis, lead)


def _examples_first(x: Tensor, axis: _Axis | None, examples: int) -> Tensor:
    if axis is not None:
        return _to_front(x, axis, 0)
    return x.expand(examples, *x.shape[1:]) if x.ndim > 0 and x.shape[0] == 1 else x.expand(examples, *x.shape)


def _routed(form: LayerJacobian, site: Site, layer: Layer, names: dict[str, int]) -> LayerJacobian:
    """The part of a module's Jacobian that belongs to one layer, in that layer's packing."""
    positions = list(names.values())
    if (
        list(names) == list(site.params)
        and positions == list(range(len(layer.params)))
        and form.shape == layer.packing.shape
    ):
        return form
    if isinstance(form, Outer) and layer.kronecker:
        return form.without_last_column()
    numel = [p.numel() for p in site.params.values()]
    sizes = [prod(shape) for _, shape in layer.params]
    unpack = (
        Packing.flat(sum(numel)) if site.kind.packing is None else site.kind.packing(site.module, "bias" in site.params)
    )

    def compute(start: int, stop: int) -> Tensor:
        whole = dict(zip(site.params, unpack.unpack(form.narrow(start, stop).dense()).split(numel, -1), strict=True))
        mine = {k: whole[name] for name, k in names.items()}
        one = next(iter(mine.values()))
        zeros = [one.new_zeros(1).expand(*one.shape[:-1], size) for size in sizes]
        flat = torch.cat([mine.get(k, zero) for k, zero in enumerate(zeros)], -1)
        return layer.packing.pack(flat)

    return forms.Lazy(compute, form.cotangents, form.examples, layer.packing.shape, form.dtype, form.device)


@contextmanager
def _trainable(parameters: Sequence[nn.Parameter]) -> Iterator[None]:
    """Switch ``requires_grad`` on for a while."""
    frozen = [p for p in parameters if not p.requires_grad]
    try:
        for p in frozen:
            p.requires_grad_(True)
        yield
    finally:
        for p in frozen:
            p.requires_grad_(False)


@contextmanager
def unchanged(model: nn.Module) -> Iterator[None]:
    """Put buffers and random state back as they were, and raise if the model had changed them."""
    buffers = [(name, b, b._version, b.clone()) for name, b in model.named_buffers()]
    devices = {b.device for b in (*model.parameters(), *model.buffers()) if b.device.type == "cuda"}
    states = [torch.get_rng_state(), *(torch.cuda.get_rng_state(d) for d in devices)]
    try:
        yield
        now = [torch.get_rng_state(), *(torch.cuda.get_rng_state(d) for d in devices)]
        if not all(torch.equal(a, b) for a, b in zip(states, now, strict=True)):
            raise ValueError(
                "the forward pass of the model draws random numbers, so its derivative is random: call model.eval(), "
                "or switch the noise off"
            )
        changed = [name for name, b, version, _ in buffers if b._version != version]
        if changed:
            raise ValueError(
                f"the forward pass of the model changes its buffers {', '.join(changed)}, so its output depends on "
                "the batches before: "
                "call model.eval()"
            )
    finally:
        with torch.no_grad():
            for _, b, version, before in buffers:
                if b._version != version:
                    b.copy_(before)
        torch.set_rng_state(states[0])
        for d, state in zip(devices, states[1:], strict=True):
            torch.cuda.set_rng_state(state, d)


def _check_one_of(what: str, found: set[Any], remedy: str) -> None:
    if len(found) > 1:
        raise ValueError(
            f"the collected parameters have more than one {what} ({', '.join(map(str, sorted(found, key=str)))}): "
            f"{remedy}"
        )
