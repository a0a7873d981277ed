"""From a model and data to a stream of per-example Jacobians, one small chunk of cotangents at a time."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, nullcontext
from dataclasses import dataclass
from itertools import islice
from math import hypot, prod
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.autograd.graph import GradientEdge, get_gradient_edge
from torch.utils import _pytree as pytree

from . import data, forms
from .autograd import Pull
from .evaluator import Evaluator, Trial, check_mode, trainable, unchanged
from .forms import LayerJacobian, Outer
from .kinds import Packing, is_ours
from .kinds.generic import generic
from .layercollection import Layer, LayerCollection, Site
from .likelihood import Cotangents
from .memory import Made, chunk_length, grain, slices

#: From the output of the model, the minibatch and its position in the loader to the cotangents whose products with
#: the Jacobian are streamed. It is a function: the same arguments give the same cotangents (random ones are drawn
#: from a seed and the position).
CotangentFunction = Callable[[Tensor, data.Batch, int], Cotangents]
#: The same of neighbouring minibatches laid end to end, from the position of the first.
SeveralCotangents = Callable[[Tensor, Sequence[data.Batch], int], Cotangents]
#: From the output, a vector u in its shape, the minibatch and its position to ``sum_c s_c (s_c . u)`` for each example.
Curvature = Callable[[Tensor, Tensor, data.Batch, int], Tensor]


@dataclass(frozen=True)
class Observation:
    """The Jacobians of one chunk of cotangents of one minibatch, or of some of its examples.

    n: how many examples this chunk counts, which is those that it has in their first chunk and zero afterwards, so that
    sums of n count every example once, and statistics of the inputs alone are taken where n > 0. weight: what the
    minibatch counts in the mean, in its first chunk, and zero afterwards. forms: one for each layer, by name. It
    should be let go of before the next one is made.
    """

    n: int
    weight: float
    forms: dict[str, LayerJacobian]


class _Output(NamedTuple):
    """What is remembered of a leaf of the output of a call, without its entries."""

    leaf: int
    shape: torch.Size
    dtype: torch.dtype

    @property
    def nbytes(self) -> int:
        return prod(self.shape) * self.dtype.itemsize


@dataclass(frozen=True)
class _Call:
    """One call of a module, as its forward hook saw it."""

    site: Site
    inputs: Any
    versions: list[int]
    outputs: tuple[_Output, ...]  # the differentiable ones
    edges: tuple[GradientEdge, ...]


@dataclass(frozen=True)
class _Layout:
    """The axis of examples (or of a multiple of them) in the tensors of one call; None for a tensor without one."""

    inputs: tuple[int | None, ...]
    outputs: tuple[int | None, ...]


@dataclass(frozen=True)
class Plan:
    """What the types of the modules, or a probe of the model on a few examples, told.

    layouts: of every call. names: the layers in the order of calls. aligned: whether all tensors of a minibatch have a
    row for each example, so that it can be taken apart. trial: of two examples, if what is made of them was counted.
    axes: how many each tensor of the minibatch had; a model may do something else with more or fewer.
    """

    layouts: tuple[_Layout, ...]
    names: tuple[str, ...]
    aligned: bool
    trial: Trial | None
    axes: tuple[int, ...]

    def fits(self, batch: data.Batch) -> bool:
        """Whether it is for minibatches like this one."""
        return self.axes == data.axes(batch)


class Generator(Evaluator):
    """Streams ``s_c^T df/dw`` for each example: the per-example Jacobian of a model seen through cotangents s_c.

    model, layer_collection, function, device, verbose: as in :class:`Evaluator`. cotangents: from the output f
    ``(B, *out)``, the minibatch and its position to the s_c. centred: matrices are of ``J - mean J`` instead of J.
    curvature: ``sum_c s_c (s_c . u)``, if there is a faster way than by the s_c. weigh: from f and the minibatch to
    what it counts in a mean, by default its number of examples. mean: whether matrices are divided by the sum of that.
    together: the cotangents of minibatches laid end to end, if there is a faster way than one minibatch at a time.

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
        together: SeveralCotangents | None = None,
    ) -> None:
        super().__init__(model, layer_collection, function=function, device=device, verbose=verbose)
        self.cotangents = cotangents
        self.centred = centred
        self._closed = curvature
        self.weigh = weigh if weigh is not None else lambda f, batch: f.shape[0]
        self.mean = mean
        self._together = together
        self._pull = Pull()

    def plan(self, batch: data.Batch) -> Plan:
        """What :meth:`stream` has to know of the model, which it takes if it has been found before."""
        check_mode(self.model)
        return self._plan(self.layer_collection.sites(self.model), batch)

    def _plan(self, sites: Sequence[Site], batch: data.Batch, measure: bool = False) -> Plan:
        if data.count(batch) == 0:
            raise ValueError("a minibatch has no example")
        called = self.called_apart(batch)
        if called is None or not all(is_ours(site.kind) for site in sites):
            return self.probe(sites, batch, measure)
        names = {id(site.module): site.name for site in sites}
        order = tuple(names[id(module)] for module in called if id(module) in names)
        return Plan((_Layout((0,), (0,)),) * len(order), order, data.aligned(batch), None, data.axes(batch))

    def stream(
        self, examples: Any, plan: Plan | None = None, by_example: bool = False, join: bool = False
    ) -> Iterator[Observation]:
        """The observations of a loader or of one minibatch, in order.

        by_example: where a minibatch does not fit a work array with all of its cotangents, split its examples and not
        the cotangents, where that can be done. The model runs once more on each part; cotangents are those of the whole
        minibatch. join: where a model and its minibatches are so small that most time would go into starting
        operations, observe neighbouring minibatches as one; each has its own cotangents.
        """
        sites = self.layer_collection.sites(self.model)
        check_mode(self.model)

        def planned(batch: data.Batch, measure: bool = False) -> Plan:
            nonlocal plan
            if plan is None or not plan.fits(batch):
                plan = self._plan(sites, batch, measure)
            return plan

        def made_of_two(batch: data.Batch) -> int:
            trial = planned(batch, measure=True).trial or self.trial(batch)
            return trial.made * (1 + self.cotangents(trial.output, trial.pair, 0).count)

        one_by_one = ((k, [batch]) for k, batch in enumerate(self.minibatches(examples)))
        for position, batches in self.joined(examples, made_of_two) if join else one_by_one:
            yield from self._observe(sites, batches, position, planned(batches[0]), by_example)

    def _joint(self, f: Tensor, batches: Sequence[data.Batch], position: int) -> Cotangents | None:
        """The cotangents of minibatches laid end to end, None if their numbers differ."""
        if self._together is not None:
            return self._together(f, batches, position)
        own = zip(data.split(f, batches), batches, strict=True)
        each = [self.cotangents(rows, batch, position + k) for k, (rows, batch) in enumerate(own)]
        return Cotangents.joined(each) if len({c.count for c in each}) == 1 else None

    def curvature(self, f: Tensor, batches: Sequence[data.Batch], position: int) -> Callable[[Tensor], Tensor]:
        """For minibatches laid end to end: from u in the shape of f to ``sum_c s_c (s_c . u)`` of each example."""
        if self._closed is not None:
            batch, closed = data.join(batches), self._closed
            return lambda u: closed(f, u, batch, position)

        def product(u: Tensor) -> Tensor:
            cotangents = self._joint(f, batches, position)
            if cotangents is not None:
                return self._curvature(f, u, cotangents)
            own = zip(data.split(f, batches), data.split(u, batches), batches, strict=True)
            each = [(g, v, self.cotangents(g, batch, position + k)) for k, (g, v, batch) in enumerate(own)]
            return torch.cat([self._curvature(g, v, c) for g, v, c in each])

        return product

    def _curvature(self, f: Tensor, u: Tensor, cotangents: Cotangents) -> Tensor:
        step = chunk_length(f.numel() * f.element_size(), cotangents.count, f.device)
        out = torch.zeros_like(f)
        for c in slices(cotangents.count, step):
            s = cotangents.take(c.start, c.stop)
            s = s.reshape(*s.shape[:2], -1)
            out += torch.einsum("cbk,cb->bk", s, torch.einsum("cbk,bk->cb", s, u.reshape(len(u), -1))).view_as(f)
        return out

    def _forward(self, sites: Sequence[Site], batch: data.Batch, plan: Plan | None) -> tuple[Tensor, list[_Call]]:
        """Run the model once and record every call of the sites."""
        calls: list[_Call] = []
        n = data.count(batch)

        def record(site: Site) -> Callable[..., Any]:
            def hook(module: nn.Module, args: Any, kwargs: Any, output: Any) -> Any:
                if not torch.is_grad_enabled():
                    raise RuntimeError(
                        f"layer {site.name!r} ran under torch.no_grad (or activation checkpointing), where its "
                        "derivative is not recorded: leave it out of the layer collection, or switch checkpointing off"
                    )
                if plan is not None and len(calls) < len(plan.layouts) and plan.layouts[len(calls)].outputs == (None,):
                    # The same output for all examples (position embeddings): give each example its own copy.
                    output = _examples_first(output, None, n)
                if len(_differentiable(output)) > 1:
                    # Outputs that depend on each other: only what passes through a copy is the derivative in it alone.
                    output = pytree.tree_map_only(Tensor, lambda y: y.view_as(y) if y.requires_grad else y, output)
                leaves = _differentiable(output)
                inputs = _detached(_in_order(module, args, kwargs))
                outputs = tuple(_Output(k, y.shape, y.dtype) for k, y in leaves)
                calls.append(
                    _Call(site, inputs, _versions(inputs), outputs, tuple(get_gradient_edge(y) for _, y in leaves))
                )
                return output

            return hook

        with ExitStack() as stack:
            for site in sites:
                # First of all hooks, so that a user's hook that changes the output is differentiated and not recorded.
                handle = site.module.register_forward_hook(record(site), prepend=True, with_kwargs=True)
                stack.callback(handle.remove)
            stack.enter_context(trainable(_collected(sites)))
            stack.enter_context(torch.enable_grad())
            f = self.outputs_of(batch)
        for call in calls:
            if call.versions != _versions(call.inputs):
                raise ValueError(
                    f"layer {call.site.name!r}: its input was modified in place after the call, so its derivative is "
                    "lost: replace the in-place operation (+=, relu_, ...) by one that makes a new tensor"
                )
        if plan is not None and [c.site.name for c in calls] != list(plan.names):
            raise ValueError("the model calls its layers differently for different minibatches, which is not supported")
        return f, calls

    def probe(self, sites: Sequence[Site], batch: data.Batch, measure: bool = False) -> Plan:
        """Find where the examples are in every tensor, and check that the derivative of each is what the forms say.

        The model is run on two examples, and on three in another order: the axis whose length changes is that of
        examples, and an output that changes has others mixed into it. Then :meth:`_check_derivatives`.

        measure: whether to count what the model makes.
        """
        n = data.count(batch)
        few = [data.take(batch, torch.tensor([k % n for k in index])) for index in ([1, 0], [0, 1, 2])]
        with unchanged(self.model):
            with Made() if measure else nullcontext() as made:
                f2, two = self._forward(sites, few[0], None)
            f3, three = self._forward(sites, few[1], None)
        with unchanged(self.model):
            check_same(
                f2,
                f3[[1, 0]],
                f3,
                "the output of the model for an example depends on the others, or is random",
                MIXES,
            )
            if [c.site.name for c in two] != [c.site.name for c in three]:
                raise ValueError("the model calls different layers for different numbers of examples")
            self._check_called(sites, {c.site.name for c in two})
            layouts = tuple(_layout(one, other) for one, other in zip(two, three, strict=True))
            plan = Plan(
                layouts,
                tuple(c.site.name for c in two),
                data.aligned(batch),
                None if made is None else Trial(few[0], f2.detach(), made.nbytes),
                data.axes(batch),
            )
            constant = [c.site.name for c, layout in zip(two, layouts, strict=True) if layout.outputs == (None,)]
            f, calls = self._with_copies(sites, few[1], plan, constant, f3) if constant else (f3, three)
            self._check_derivatives(f, calls, plan)
        return plan

    def _check_called(self, sites: Sequence[Site], called: set[str]) -> None:
        through = {id(p) for site in sites if site.name in called for p in site.params.values()}
        for site in sites:
            wanted = {k for _, names in site.routes for k in names}
            if site.name in called or all(id(site.params[k]) in through for k in wanted):
                continue  # a tied module that is not used is no harm
            raise ValueError(
                f"layer {site.name!r} ({type(site.module).__name__}) was never called, so its Jacobian is unknown. "
                "Leave it out with LayerCollection.exclude, or, if the module above uses its parameters without "
                "calling it, declare that module's type with nngeometry.whole"
            )

    def _with_copies(
        self, sites: Sequence[Site], batch: data.Batch, plan: Plan, constant: list[str], expected: Tensor
    ) -> tuple[Tensor, list[_Call]]:
        """Run the model with a copy for each example of the outputs that have no axis of examples."""
        remedy = (
            "giving it one changes what the model does. Call it with one input for each example (e.g. position ids "
            "expanded to the batch), or leave it out with LayerCollection.exclude"
        )
        problem = f"layer {', '.join(map(repr, constant))}: its output has no axis of examples, and"
        try:
            f, calls = self._forward(sites, batch, plan)
        except Exception as error:
            raise ValueError(f"{problem} {remedy} ({error})") from error
        if f.shape != expected.shape:
            raise ValueError(f"{problem} {remedy}")
        check_same(f, expected, expected, problem, remedy)
        return f, calls

    def _check_derivatives(self, f: Tensor, calls: Sequence[_Call], plan: Plan) -> None:
        """Raise, naming the layer, unless examples are apart and the forms add up to what autograd says.

        The cotangent is of one example, between others: its gradient may reach none of these, and its forms must add
        up to the gradient in the parameters.
        """
        edges = [e for c in calls for e in c.edges]
        if not edges or not f.requires_grad:
            raise ValueError("the output of the model does not depend on the collected parameters")
        cotangent = _generic_cotangent(f)
        cotangent[::2] = 0.0
        parameters = self.layer_collection.parameters(self.model)
        with trainable(parameters):
            every: list[Any] = [*edges, *parameters]
            found = torch.autograd.grad(f, every, cotangent, allow_unused=True)
        grads, truth = found[: len(edges)], found[len(edges) :]
        where = [(call, axis or 0) for call, layout in zip(calls, plan.layouts, strict=True) for axis in layout.outputs]
        for (call, axis), g in zip(where, grads, strict=True):
            if g is not None and _by_example(g, axis, len(f))[::2].any():
                raise ValueError(
                    f"layer {call.site.name!r}: the output for one example depends on the others, so per-example "
                    f"derivatives are undefined. {MIXES}"
                )
        of_one = [None if g is None else g.unsqueeze(0) for g in grads]
        self._check_sum(
            self._forms(calls, plan.layouts, of_one, 1, len(f)),
            [_dense(g, p) for g, p in zip(truth, parameters, strict=True)],
            _tolerance(f.dtype),
        )

    def _check_sum(self, found: Mapping[str, LayerJacobian], truth: Sequence[Tensor], tolerance: float) -> None:
        """Raise, naming the layer, unless the forms of all examples add up to the gradients of the parameters."""
        norm = torch.linalg.vector_norm
        layers = self.layer_collection.layers
        remaining = iter(truth)
        every = [torch.cat([g.flatten() for g in islice(remaining, len(one.params))]) for one in layers.values()]
        sizes = [float(norm(expected, dtype=self.dtype)) for expected in every]
        floor = 1e-3 * hypot(*sizes)
        for (name, layer), expected, size in zip(layers.items(), every, sizes, strict=True):
            with torch.no_grad():
                wrong = float(norm(layer.packing.unpack(found[name].total()) - expected))
            if wrong > tolerance * max(floor, size):
                raise ValueError(
                    f"layer {name!r} ({layer.kind_name}): its per-example derivatives do not add up to the gradient of "
                    "the model. Its parameters also act outside of its forward (used by another module, a cached or "
                    "stored tensor), or what it returns for one example alone differs. Leave it out with "
                    "LayerCollection.exclude, or declare the module that uses them all with nngeometry.whole"
                )

    def _observe(
        self, sites: Sequence[Site], batches: Sequence[data.Batch], position: int, plan: Plan, by_example: bool
    ) -> Iterator[Observation]:
        batch = data.join(batches)
        with unchanged(self.model):
            f, calls = self._forward(sites, batch, plan)
        fixed = f.detach()
        cotangents = self._joint(fixed, batches, position)
        if cotangents is None:
            for k, b in enumerate(batches):
                yield from self._observe(sites, [b], position + k, plan, by_example)
            return
        weight = sum(map(self.weigh, data.split(fixed, batches), batches))
        per_cotangent = f.nbytes + sum(y.nbytes for c in calls for y in c.outputs)
        n, count = len(f), cotangents.count
        busy = 1 if by_example else grain(f.device).busy  # inputs are looked at once, however few cotangents at a time
        step = chunk_length(per_cotangent * busy, count, f.device)
        few = min(n, max(2, n * step // max(1, count)))  # with all cotangents; a model may squeeze away a single one
        parts = min(-(-n // few), n // 2)
        apart = plan.aligned and chunk_length(fixed.numel() * fixed.element_size(), count, f.device) >= step
        if not (by_example and apart) or step == count or parts < 2:
            yield from self._chunks(f, calls, cotangents, step, weight, plan)
            return
        del f, calls  # what a work array holds is made again, for a few examples at a time
        for k in range(parts):
            start, stop = k * n // parts, (k + 1) * n // parts
            with unchanged(self.model):
                f, calls = self._forward(sites, data.take(batch, torch.arange(start, stop)), plan)
            check_same(
                f, fixed[start:stop], fixed, "the output of the model for an example depends on the others", MIXES
            )
            at_once = max(1, n * step // (stop - start))
            yield from self._chunks(f, calls, cotangents.narrow(start, stop), at_once, 0.0 if k else weight, plan)
            del f, calls

    def _chunks(
        self, f: Tensor, calls: Sequence[_Call], cotangents: Cotangents, step: int, weight: float, plan: Plan
    ) -> Iterator[Observation]:
        for c in slices(cotangents.count, step):
            s = cotangents.take(c.start, c.stop).to(f.dtype)
            n, counted = (0, 0.0) if c.start else (len(f), weight)
            last = c.stop == cotangents.count
            # Not kept here, so that who receives it can let go of it.
            yield self._pulled(f, calls, s, plan, n, counted, last)

    def _pulled(
        self, f: Tensor, calls: Sequence[_Call], s: Tensor, plan: Plan, n: int, weight: float, last: bool
    ) -> Observation:
        grads = self._pull([f], [e for c in calls for e in c.edges], [s], last)
        return Observation(n, weight, self._forms(calls, plan.layouts, grads, len(s), len(f)))

    def _forms(
        self,
        calls: Sequence[_Call],
        layouts: Sequence[_Layout],
        grads: Sequence[Tensor | None],
        cotangents: int,
        examples: int,
    ) -> dict[str, LayerJacobian]:
        """One form for each layer, of all calls and all modules through which its parameters act."""
        of_site: dict[str, list[LayerJacobian]] = {}
        sites = {call.site.name: call.site for call in calls}
        remaining = iter(grads)
        for call, layout in zip(calls, layouts, strict=True):
            gys = [next(remaining) for _ in call.edges]
            of_site.setdefault(call.site.name, []).append(self._form(call, layout, gys, cotangents, examples))
        of_layer: dict[str, list[LayerJacobian]] = {name: [] for name in self.layer_collection}
        for name, of_calls in of_site.items():
            form = forms.add(of_calls)
            for layer, names in sites[name].routes:
                of_layer[layer.name].append(_routed(form, sites[name], layer, names))
        return {name: forms.add(of_sites) for name, of_sites in of_layer.items()}

    def _form(
        self, call: _Call, layout: _Layout, gys: Sequence[Tensor | None], cotangents: int, examples: int
    ) -> LayerJacobian:
        """The Jacobian of one call of a module with respect to all of its parameters."""
        site = call.site
        what = f"layer {site.name!r} ({type(site.module).__name__})"
        leaves = _leaves(call.inputs)
        if not call.outputs:
            raise ValueError(
                f"{what} returned no tensor that can be differentiated (a {type(site.module).__name__} that returns "
                "its own class of output, or a detached one): leave it out with LayerCollection.exclude"
            )
        tensors = list(zip((*leaves, *call.outputs), (*layout.inputs, *layout.outputs), strict=True))
        lengths = {t.shape[axis] for t, axis in tensors if axis is not None}
        length = lengths.pop() if lengths else examples
        if lengths or length % examples:
            raise NotImplementedError(
                f"{what}: its inputs and outputs split {examples} examples differently; leave it out with "
                "LayerCollection.exclude"
            )
        fronts = []
        for y, axis, gy in zip(call.outputs, layout.outputs, gys, strict=True):
            if gy is None:
                zero = next(iter(site.params.values())).new_zeros(1, dtype=y.dtype)
                gy = zero.expand(cotangents, *y.shape)
            fronts.append(_to_front(gy, axis or 0, 1))
        if site.kind.function is None:
            of_leaves = [(y.leaf, g) for y, g in zip(call.outputs, fronts, strict=True)]
            form: LayerJacobian = generic(
                site.module, site.params, call.inputs, layout.inputs, of_leaves, site.name, self.dtype
            )
        else:
            (gy,) = fronts
            for t, axis in tensors:
                if axis and (not site.kind.features_last or axis == len(t.shape) - 1):
                    raise NotImplementedError(f"{what}: its examples are along axis {axis}, expected axis 0")
            inputs = [
                self._cast(_examples_first(x, axis, length))
                for x, axis in zip(leaves, layout.inputs, strict=True)
                if isinstance(x, Tensor)
            ]
            with torch.no_grad():
                form = site.kind.function(site.module, self._cast(gy), *inputs)
        return form if length == examples else form.fold(length // examples)

    def _cast(self, t: Tensor) -> Tensor:
        return t.to(self.dtype) if t.is_floating_point() else t


def at_once(cotangents: CotangentFunction) -> SeveralCotangents:
    """Those of several minibatches as of one, where each depends on an example's own output and targets alone."""
    return lambda f, batches, position: cotangents(f, data.join(batches), position)


MIXES = (
    "Something mixes examples (batch statistics, attention over the batch, a sequence that is not split by example) or "
    "is random: use model.eval(), or feed one example at a time"
)


def _generic_cotangent(f: Tensor) -> Tensor:
    """One cotangent without structure, the same every time."""
    return torch.cos(torch.arange(1, f.numel() + 1, dtype=f.dtype, device=f.device)).view(f.shape)


def _by_example(g: Tensor, axis: int, examples: int) -> Tensor:
    """``(examples, ...)``: an output without an axis of examples was expanded, and has them first."""
    return _to_front(g, axis, 0).unflatten(0, (examples, -1))


def _dense(g: Tensor | None, p: Tensor) -> Tensor:
    """A gradient of p as a plain tensor."""
    if g is None:
        return torch.zeros_like(p)
    return g.to_dense() if g.is_sparse else g


def _tolerance(dtype: torch.dtype) -> float:
    """What counts as equal up to rounding in a checked sum: far above it, far below any mistake."""
    return {torch.float64: 1e-8, torch.float32: 1e-3}.get(dtype, 0.1)


def check_same(f: Tensor, expected: Tensor, scale: Tensor, problem: str, remedy: str) -> None:
    """Raise unless f is what is expected, up to rounding of numbers as large as those of ``scale``."""
    if bool((f - expected).abs().max() > _tolerance(f.dtype) * scale.abs().max()):
        raise ValueError(f"{problem}. {remedy}")


def _plain(inputs: tuple[Any, dict[str, Any]]) -> bool:
    """Whether arguments are tensors alone, as nearly all are, which needs no machinery to take apart."""
    args, kwargs = inputs
    return not kwargs and all(isinstance(t, Tensor) for t in args)


def _leaves(inputs: tuple[Any, dict[str, Any]]) -> list[Any]:
    return list(inputs[0]) if _plain(inputs) else pytree.tree_leaves(inputs)


def _versions(inputs: tuple[Any, dict[str, Any]]) -> list[int]:
    """How often each tensor has been modified in place."""
    return [t._version for t in _leaves(inputs) if isinstance(t, Tensor)]


def _detached(inputs: tuple[Any, dict[str, Any]]) -> Any:
    if _plain(inputs):
        return tuple(t.detach() for t in inputs[0]), {}
    return pytree.tree_map_only(Tensor, Tensor.detach, inputs)


def _differentiable(output: Any) -> list[tuple[int, Tensor]]:
    """The leaves of an output that a gradient can reach, with their positions."""
    leaves = [output] if isinstance(output, Tensor) else pytree.tree_leaves(output)
    return [(k, y) for k, y in enumerate(leaves) if isinstance(y, Tensor) and y.requires_grad]


def _in_order(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
    """Arguments in the order of the module's signature, however they were passed."""
    if not kwargs:
        return args, kwargs
    bound = inspect.signature(module.forward).bind(*args, **kwargs)
    return bound.args, bound.kwargs


def _collected(sites: Sequence[Site]) -> list[nn.Parameter]:
    return [s.params[k] for s in sites for _, names in s.routes for k in names]


def _layout(two: _Call, three: _Call) -> _Layout:
    """The layout of a call from how its shapes change between two and three examples."""

    def axis(a: torch.Size, b: torch.Size) -> int | None:
        if a == b:
            return None
        changed = [k for k, (m, n) in enumerate(zip(a, b, strict=False)) if m != n]
        if len(a) == len(b) and len(changed) == 1 and a[changed[0]] * 3 == b[changed[0]] * 2:
            return changed[0]
        raise ValueError(
            f"layer {two.site.name!r}: a tensor of shape {tuple(a)} for two examples and {tuple(b)} for "
            "three has no axis that is that of examples"
        )

    inputs = zip(_leaves(two.inputs), _leaves(three.inputs), strict=True)
    outputs = tuple(axis(a.shape, b.shape) for a, b in zip(two.outputs, three.outputs, strict=True))
    if len(outputs) != 1 and None in outputs:
        raise NotImplementedError(
            f"layer {two.site.name!r} ({type(two.site.module).__name__}) has several outputs, some without an axis of "
            "examples: leave it out with LayerCollection.exclude"
        )
    return _Layout(tuple(axis(a.shape, b.shape) if isinstance(a, Tensor) else None for a, b in inputs), outputs)


def _to_front(t: Tensor, axis: int, lead: int) -> Tensor:
    """Move an axis, counted after ``lead`` leading axes, to just behind them."""
    return t if axis == 0 else t.movedim(lead + axis, lead)


def _examples_first(x: Tensor, axis: int | None, examples: int) -> Tensor:
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

    def compute(start: int, stop: int, first: int, last: int) -> Tensor:
        whole = dict(
            zip(site.params, unpack.unpack(form.narrow(start, stop, first, last).dense()).split(numel, -1), strict=True)
        )
        mine = {k: whole[name] for name, k in names.items()}
        one = next(iter(mine.values()))
        zeros = [one.new_zeros(1).expand(*one.shape[:-1], size) for size in sizes]
        flat = torch.cat([mine.get(k, zero) for k, zero in enumerate(zeros)], -1)
        return layer.packing.pack(flat)

    return forms.Lazy(compute, form.cotangents, form.examples, layer.packing.shape, form.dtype, form.device)
