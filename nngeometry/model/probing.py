"""A look at a model before it is believed: where its examples are, whether they are apart, and what the forms are."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from contextlib import nullcontext, suppress
from dataclasses import replace
from functools import partial
from itertools import chain, islice, product
from math import hypot, prod
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ..changes import no_grad
from ..derivatives.composites import normalises_one, require_derivative
from ..derivatives.pulling import coarsest, nodes, operations_named
from ..forms import LayerJacobian
from ..kinds import is_ours
from ..layercollection import LayerCollection, Site
from ..memory import BytesMade
from . import data, remedies
from .evaluator import (
    MIXES,
    DryRun,
    State,
    check_same,
    same_up_to_rounding,
    tolerance,
)
from .functional import is_use
from .layer_jacobians import Plan, Recorded
from .mixing import check_apart, every_other, powers, weighted
from .operations_apart import reached, recorded_apart
from .pullback import Pullback, junctions
from .recording import Call, Layout
from .refused import EXCLUDE, Refused, Unclear, named
from .structure import Structure
from .weights import Weights


class _Gradients(NamedTuple):
    """Those of one cotangent in the outputs of calls, ``(1, *shape)``, and in the parameters."""

    of_calls: Sequence[Tensor | None]
    of_parameters: Sequence[Tensor | None]


class _Some(NamedTuple):
    """Which examples a model is run on, two and three, and where the two are among the three."""

    two: tuple[int, int]
    three: tuple[int, int, int]
    among: tuple[int, int]


#: As different as can be.
_SOME = _Some((1, 0), (0, 1, 2), (1, 0))
#: In their order and the same ones, of which the longest is first if sequences are packed as they come.
_ALIKE = _Some((0, 1), (0, 0, 1), (1, 2))


class Probed(Recorded):
    """A model that is looked at, on a few examples and at a copy of its tensors, before it is believed. Arguments as of
    :class:`~nngeometry.model.evaluator.Evaluator`.
    """

    def __init__(self, model: nn.Module, layer_collection: LayerCollection, **options: Any) -> None:
        super().__init__(model, layer_collection, **options)
        #: What was found when the model was looked at last, and what it was then.
        self._looked: tuple[Structure, Plan] | None = None
        #: How many examples minibatches had that were found to keep them apart, with the axes of their tensors.
        self._apart: set[tuple[int, tuple[int, ...]]] = set()

    def examine(self, batch: data.Batch) -> Plan:
        """What :meth:`stream` has to know of the model, which it takes if it has been found before."""
        self.check_mode()
        return self._plan(self.layer_collection.sites(self.model), batch)

    def _plan(self, sites: Sequence[Site], batch: data.Batch, measure: bool = False) -> Plan:
        if data.count(batch) == 0:
            raise ValueError("a minibatch has no example")
        called = self.called_apart(batch)
        if called is None or not all(is_ours(site.kind) for site in sites):
            return self.probe(sites, batch, measure)
        names = {id(site.module): site.name for site in sites}
        order = tuple(names[id(module)] for module in called if id(module) in names)
        return Plan((Layout((0,), (0,)),) * len(order), order, data.aligned(batch), data.axes(batch), looked=False)

    def _remembered(self) -> Plan | None:
        """What was found when the model was looked at last, if it is still the same."""
        if self._looked is None:
            return None
        then, plan = self._looked
        return plan if then.same(Structure(self.model)) else None

    def probe(self, sites: Sequence[Site], batch: data.Batch, measure: bool = False) -> Plan:
        """Find where the examples are in every tensor, and check that the derivative of each is what the forms say.

        The model, at a copy of its parameters and buffers, is run on two examples, and on three in another order: the
        axis whose length changes is that of examples, and an output that changes has others mixed into it. Then
        :meth:`_check_derivatives` of the two.

        measure: whether to count what the model makes.
        """
        self._apart.clear()
        opened = frozenset(site.name for site in sites if _has_no_form(site))
        for _ in range(_MOST_LOOKS):  # what is done with their parameters may be seen, at a fraction of the cost
            if not opened:
                break
            try:
                return self.apart(batch, partial(self._probe, sites, measure=measure, opened=opened))
            except Refused as error:
                opened = opened.difference(error.layers) if opened.intersection(error.layers) else frozenset()
            except Exception:
                break
        try:
            return self.apart(batch, lambda b: self._probe(sites, b, measure))
        except Refused as error:
            refused = error

        def look(at: LayerCollection) -> Plan:
            other = Probed(
                self.model,
                at,
                function=self.function,
                device=self.device,
                batch_statistics=self.batch_statistics,
            )
            return other.apart(batch, lambda b: other._probe(at.sites(self.model), b, False))

        raise remedies.tried(self.model, self.layer_collection, refused, look) from refused.__cause__

    def _probe(
        self, sites: Sequence[Site], batch: data.Batch, measure: bool, opened: frozenset[str] = frozenset()
    ) -> Plan:
        try:
            return self._probe_some(_SOME, sites, batch, measure, opened)
        except RuntimeError as error:
            if isinstance(error, Refused) and not isinstance(error, Unclear):
                raise
            if data.count(batch) == 1 or not any(isinstance(m, nn.RNNBase) for m in self.model.modules()):
                raise
            try:
                return self._probe_some(_ALIKE, sites, batch, measure, opened)
            except Exception as other:
                raise (other if isinstance(other, Refused) else error) from None

    def _probe_some(
        self, some: _Some, sites: Sequence[Site], batch: data.Batch, measure: bool, opened: frozenset[str]
    ) -> Plan:
        n = data.count(batch)
        for site in sites:
            require_derivative(site.module)
        parameters = self.layer_collection.parameters(self.model)
        weights, state = Weights([self.model], parameters), State(self.model, values=True)
        before = weights.marks()
        with self.running(weights.in_place, *self.within(batch), state):
            few = [data.take(batch, torch.tensor([k % n for k in index])) for index in (some.two, some.three)]
            with BytesMade() if measure else nullcontext() as made:
                f2, two = self._forward(sites, few[0], None, opened)
            f3, three = self._forward(sites, few[1], None, opened)
            graph = list(nodes([f3]))
            state.check(lambda: self._forward(sites, few[1], None, opened))
            weights.check(before)
            check_same(
                f2,
                f3[list(some.among)],
                f3,
                "the output of the model for an example depends on the others, or is random",
                MIXES,
            )
            if [c.site.name for c in two] != [c.site.name for c in three]:
                raise ValueError("the model calls different layers for different numbers of examples")
            self._check_called(sites, {c.site.name for c in two})
            self._require_dependence(f2, two)
            ways = reached([(f2.grad_fn, f2.output_nr)])
            _require_seen([site for site in sites if site.name in opened], two, graph)
            layouts = tuple(
                Layout.of(one, other, [(e.node, e.output_nr) in ways for e in one.edges])
                for one, other in zip(two, three, strict=True)
            )
            plan = Plan(
                layouts,
                tuple(c.site.name for c in two),
                data.aligned(batch),
                data.axes(batch),
                data.whole(batch),
                None if made is None else DryRun(few[0], f2.detach(), made.nbytes),
                normalises_one=any(map(normalises_one, graph)),
                repeated=n == 1,
                uses=any(is_use(call, sites) for call in two),
                opened=opened,
                hooked=self._hooked,
            )
            if any(layout is not None and layout.constant for layout in layouts):
                plan = self._with_copies(sites, few[0], plan, f2, two, parameters)
            else:
                self._check_derivatives(f2, two, plan, parameters)
        if three or not self.ignore_uncalled:
            weights.check_reached(graph, parameters, self._name_of)
        return plan

    def _with_one(self, sites: Sequence[Site], batch: data.Batch, plan: Plan) -> Plan:
        """The plan, checked with a minibatch of one example, for which a model may compute otherwise."""
        parameters = self.layer_collection.parameters(self.model)
        weights = Weights([self.model], parameters)
        with self.running(weights.in_place, *self.within(batch), State(self.model)):
            f, calls = self._forward(sites, batch, plan)
            self._check_derivatives(f, calls, plan, parameters)
        return replace(plan, one=True)

    def _forward_apart(self, sites: Sequence[Site], batch: data.Batch, plan: Plan) -> tuple[Tensor, list[Call]]:
        """Run the model once. For the first minibatch of so many examples raise if these are not apart where the probe
        has found them: a model may do something else with more than it has seen, or with other entries.
        """
        f, calls = self._forward(sites, batch, plan)
        like = len(f), plan.axes
        new = plan.looked and len(f) > _PROBED and calls and like not in self._apart
        if new and not _proven_apart(f, calls, plan):
            s, weights = _generic_cotangent(f), powers(f)
            edges = [e for c in calls for e in c.edges]
            with self._back(calls, self.within(batch)), operations_named():
                grads, others = (
                    torch.autograd.grad(f, edges, one, retain_graph=True, allow_unused=True)
                    for one in (s, weighted(s, weights))
                )
            check_apart(calls, plan.layouts, grads, others, weights)
        if new:
            self._apart.add(like)
        return f, calls

    def _name_of(self, parameter: Tensor) -> str:
        return next(name for name, p in self.layer_collection.named_parameters(self.model) if p is parameter)

    def _check_called(self, sites: Sequence[Site], called: set[str]) -> None:
        if self.ignore_uncalled:
            return
        through = {id(p) for site in sites if site.name in called for p in site.params.values()}
        missing = [
            site  # a tied module that is not used is no harm
            for site in sites
            if site.name not in called
            and any(id(site.params[k]) not in through for _, names in site.routes for k in names)
        ]
        if missing:
            what = named(missing[0].name, missing[0].module, len(missing) - 1)
            raise Refused(
                [site.name for site in missing], f"{what} was never called, so its Jacobian is unknown", EXCLUDE
            )

    def _with_copies(
        self,
        sites: Sequence[Site],
        batch: data.Batch,
        plan: Plan,
        expected: Tensor,
        calls: Sequence[Call],
        parameters: Sequence[Tensor],
    ) -> Plan:
        """The plan with a way to give each example a copy of the outputs that have no axis of examples: one that
        changes neither what the model returns nor that examples are apart. Otherwise :meth:`_with_each_alone`.
        """
        constant = [k for k, layout in enumerate(plan.layouts) if layout is not None and layout.constant]
        names = list(dict.fromkeys(plan.names[k] for k in constant))
        first = next(site.module for site in sites if site.name == names[0])
        refused = Refused(
            names,
            f"{named(names[0], first, len(names) - 1)}: its output has no axis of examples, and giving it one changes "
            "what the model does",
            "call it with one input for each example (e.g. position ids expanded to the batch)",
            EXCLUDE,
        )
        ways = [plan.layouts[k].ways() for k in constant]  # type: ignore[union-attr]
        wrong: Exception | None = None
        alike = list(dict.fromkeys(tuple(of[0] if w not in of else w for of in ways) for w in ways[0]))
        others = (way for way in product(*ways) if way not in alike)
        common = [edge for k in constant for edge in calls[k].edges]
        taken_apart = junctions(expected, common) is not None  # which is as good
        for tries, way in enumerate(islice(chain(alike, () if taken_apart else others), _MOST_WAYS)):
            if tries == len(alike) and not self._has_way(sites, batch, plan, constant[0], expected):
                wrong = refused  # as it is with all others
                break
            layouts = list(plan.layouts)
            for k, expand in zip(constant, way, strict=True):
                layouts[k] = replace(layouts[k], expand=expand)  # type: ignore[type-var]
            tried = replace(plan, layouts=tuple(layouts))
            try:
                f, copied = self._forward(sites, batch, tried)
            except Exception:
                wrong = wrong or refused
                continue
            same = f.shape == expected.shape and same_up_to_rounding(f, expected, expected)
            if not same or (taken_apart and not _proven_apart(f, copied, tried)):
                wrong = wrong or refused
                continue
            try:
                self._check_derivatives(f, copied, tried, parameters)
            except Refused as error:
                wrong = refused if error.layers[0] in names else error
            except ValueError as error:
                wrong = error
            else:
                return tried
        if taken_apart or wrong is refused:
            return self._with_each_alone(expected, calls, plan, constant, parameters)
        assert wrong is not None
        raise wrong

    def _has_way(self, sites: Sequence[Site], batch: data.Batch, plan: Plan, k: int, expected: Tensor) -> bool:
        """Whether one call whose output has no axis of examples can be given one by itself, such that the output of an
        example depends on its own copy alone.
        """
        layout = plan.layouts[k]
        assert layout is not None
        for expand in layout.ways():
            layouts = list(plan.layouts)
            layouts[k] = replace(layout, expand=expand)
            with suppress(Exception):
                f, calls = self._forward(sites, batch, replace(plan, layouts=tuple(layouts)))
                if f.shape == expected.shape and same_up_to_rounding(f, expected, expected):
                    weights = every_other(f)
                    one = weighted(_generic_cotangent(f), weights)
                    (g,) = torch.autograd.grad(f, calls[k].edges, one, allow_unused=True)
                    if g is None or not g[weights == 0].any():
                        return True
        return False

    def _with_each_alone(
        self, f: Tensor, calls: Sequence[Call], plan: Plan, constant: Sequence[int], parameters: Sequence[Tensor]
    ) -> Plan:
        """The plan by which the gradients of each example are taken in the outputs that they have in common: where
        these come in, or one by one, as many more pulls as there are examples.
        """
        layouts = list(plan.layouts)
        for k in constant:
            layouts[k] = replace(layouts[k], each=True)  # type: ignore[type-var]
        tried = replace(plan, layouts=tuple(layouts))
        self._check_derivatives(f, calls, tried, parameters)
        return tried

    def _require_dependence(self, f: Tensor, calls: Sequence[Call]) -> None:
        nothing = not any(call.edges for call in calls)
        if not (nothing and self.ignore_uncalled) and (nothing or not f.requires_grad):
            raise ValueError("the output of the model does not depend on the collected parameters")

    def _gradients(self, f: Tensor, pullback: Pullback, parameters: Sequence[Tensor], s: Tensor) -> _Gradients:
        """The gradients of a cotangent in the outputs of calls and in the parameters."""
        if not f.requires_grad:
            return _Gradients([], [None] * len(parameters))

        def pull(ends: Sequence[Any], s: Tensor) -> Sequence[Tensor | None]:
            found = torch.autograd.grad(f, list(ends), s[0], retain_graph=True, allow_unused=True)
            return [None if g is None else g[None] for g in found]

        edges = pullback.edges
        with operations_named():
            found = pull([*edges, *parameters], s[None])
            of_calls = pullback.gradients(found[: len(edges)], s[None], pull)
        return _Gradients(of_calls, [None if g is None else g[0] for g in found[len(edges) :]])

    def _check_derivatives(self, f: Tensor, calls: Sequence[Call], plan: Plan, parameters: Sequence[Tensor]) -> None:
        """Raise, naming the layer, unless examples are apart and the forms add up to what autograd says.

        The forms of all must add up to the gradient in the parameters. Where these are sums of several that may be made
        in a lower precision than the output has, and where the operations do not tell that examples are apart, so must
        those of one example, between others, whose gradient may reach none of these.
        """
        self._require_dependence(f, calls)
        s, pullback = _generic_cotangent(f), Pullback(f, calls, plan.layouts)
        of_all = self._gradients(f, pullback, parameters, s)
        exact = max(tolerance(f.dtype), *(tolerance(p.dtype) for p in parameters))
        if any(call.cast for call in calls):  # the precision that the model asks for
            exact = max(exact, tolerance(coarsest([f], self.dtype)))

        def check(grads: _Gradients, most: float, one: bool = False) -> None:
            found = self._forms(calls, plan.layouts, grads.of_calls, 1, len(f))
            if one and len(f) == _PROBED:  # of the other there is nothing
                found = {name: form.narrow(1, 2) for name, form in found.items()}
            truth = [_dense(g, p) for g, p in zip(grads.of_parameters, parameters, strict=True)]
            self._check_sum(found, truth, most, f, plan.opened)

        if len(f) == 1:
            check(of_all, exact)
            return
        known = all(is_ours(call.site.kind) for call in calls)  # a form by a user may give them to other examples
        if known and _proven_apart(f, calls, plan):
            with suppress(Refused, NotImplementedError):
                check(of_all, exact)
                return
        weights = every_other(f)
        alone = self._gradients(f, pullback, parameters, weighted(s, weights))
        check_apart(calls, plan.layouts, _first_of(of_all), _first_of(alone), weights)
        check(alone, exact, one=True)
        check(of_all, max(exact, _OF_SUMS))

    def _check_sum(
        self,
        found: Mapping[str, LayerJacobian],
        truth: Sequence[Tensor],
        most: float,
        f: Tensor,
        opened: frozenset[str],
    ) -> None:
        """Raise, naming the layer, unless the forms of all examples add up to the gradients of the parameters.

        most: how far they may be from that, relative to these. f: the output of the model. opened: the layers of which
        some parameters may be seen, and others not: each has to add up by itself, however small its gradient is.
        """
        norm = torch.linalg.vector_norm
        layers = self.layer_collection.layers
        remaining = iter(truth)
        every = [list(islice(remaining, len(one.params))) for one in layers.values()]
        sizes = [[float(norm(g, dtype=self.dtype)) for g in of_layer] for of_layer in every]
        floor = 1e-3 * hypot(*(size for of_layer in sizes for size in of_layer))
        for (name, layer), of_layer, of_each in zip(layers.items(), every, sizes, strict=True):
            size = hypot(*of_each)
            with no_grad():  # one layer at a time, for all may be most of the memory
                total = layer.packing.unpack(found[name].total()).split([g.numel() for g in of_layer])
                off = [float(norm(a - g.flatten())) for a, g in zip(total, of_layer, strict=True)]
                wrong, least = hypot(*off), 0.0 if name in opened else most * floor
                lost = any(s > least and not a.any() for a, s in zip(total, of_each, strict=True))
            apart = name in opened and any(w > most * max(floor, s) for w, s in zip(off, of_each, strict=True))
            if lost or apart or wrong > most * max(floor, size):
                what = f"layer {name!r} ({layer.kind_name}): its per-example derivatives do not add up to the gradient"
                coarse = coarsest([f], self.dtype)
                if most < tolerance(coarse) and wrong <= tolerance(coarse) * max(floor, size):
                    cast = f"cast model and data to {coarse}, or " if coarse == torch.float32 else ""
                    raise NotImplementedError(
                        f"{what} more precisely than in {coarse}, in which the model computes somewhere (.float(), "
                        f".half(), autocast) though its parameters are {truth[0].dtype}: {cast}leave such casts and "
                        f"autocast out of the forward, or {remedies.PRODUCTS}"
                    )
                raise Refused(
                    [name],
                    f"{what} of the model, so its parameters also act outside of its forward (used by another module, "
                    "a cached or stored tensor), or what it returns for one example alone differs",
                    EXCLUDE,
                )


def _has_no_form(site: Site) -> bool:
    """Whether a module has none of its own, as those that a user writes."""
    return site.kind.function is None and not site.kind.whole


def _require_seen(opened: Sequence[Site], calls: Sequence[Call], graph: Iterable[Any]) -> None:
    """Raise unless each parameter that the output depends on has a use that was recorded: its gradient may be zero in
    the examples that are looked at. graph: the nodes of its graph.
    """
    leaves = {id(node.variable) for node in graph if hasattr(node, "variable")}
    for site in opened:
        seen = {position for call in calls if call.site.name == site.name for position in call.parameters}
        for layer, names in site.routes:
            for name, position in names.items():
                if layer.name == site.name and id(site.params[name]) in leaves and position not in seen:
                    what = f"{named(site.name, site.module)}: what it does with {name} is not seen"
                    raise Refused([site.name], what, EXCLUDE)


def _proven_apart(f: Tensor, calls: Sequence[Call], plan: Plan) -> bool:
    """Whether the operations that were recorded tell that examples are apart, where they were found in outputs of
    calls, and that what was found to be alike for all is.
    """
    apart = None if plan.hooked else recorded_apart(f, len(f))
    if apart is None:
        return False
    for call, layout in zip(calls, plan.layouts, strict=True):
        if layout is None:
            continue
        for y, edge, axis, used in zip(call.outputs, call.edges, layout.outputs, layout.used, strict=True):
            end, first = (edge.node, edge.output_nr), 0 if layout.expand is not None else axis
            if layout.each:
                if end in apart.met:
                    return False
            elif used and (first is None or apart.blocks.get(end) != prod(y.shape[:first])):
                return False
    return True


def _first_of(grads: _Gradients) -> list[Tensor | None]:
    """Those in the outputs of calls, without the axis of cotangents."""
    return [None if g is None else g[0] for g in grads.of_calls]


def _generic_cotangent(f: Tensor) -> Tensor:
    """One cotangent without structure, the same every time."""
    dtype = torch.promote_types(f.dtype, torch.float32)  # half precision does not count far
    return torch.cos(torch.arange(1, f.numel() + 1, dtype=dtype, device=f.device)).view(f.shape).to(f.dtype)


def _dense(g: Tensor | None, p: Tensor) -> Tensor:
    """A gradient of p as a plain tensor."""
    if g is None:
        return torch.zeros_like(p)
    return g.to_dense() if g.is_sparse else g


#: How many examples the derivatives of a probe are of.
_PROBED = 2


#: What counts as equal in sums that may be made in single precision.
_OF_SUMS = 1e-4


#: How many ways of giving examples copies of what is alike for them are tried.
_MOST_WAYS = 16
#: How often modules without a form are looked at by what they do with their parameters.
_MOST_LOOKS = 3
