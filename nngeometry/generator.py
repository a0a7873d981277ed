"""From a model and data to a stream of per-example Jacobians, one small chunk of cotangents at a time."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from functools import partial
from itertools import islice, product
from math import hypot, prod
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from . import arguments, forms
from .blocks import Operator
from .changes import Borrowed, Change, entered, no_grad, trainable
from .derivatives.composites import OneExample, normalises_one, require_derivative
from .derivatives.pulling import BatchedVJP, coarsest, nodes, operations_named
from .forms import Gather, LayerJacobian, Outer
from .kinds import is_ours
from .kinds.generic import generic
from .layercollection import Layer, LayerCollection, Site
from .likelihood import Cotangents
from .linearisation import gauss_newton
from .memory import BytesMade, chunk_length, slices, tuning
from .model import data, remedies
from .model.evaluator import (
    MIXES,
    DryRun,
    Evaluator,
    State,
    check_same,
    counted,
    same_up_to_rounding,
    tolerance,
)
from .model.mixing import check_apart, every_other, powers, weighted
from .model.recording import Call, Layout, Recorder, in_first, in_front, leaves_of
from .model.refused import EXCLUDE, Refused, named
from .model.structure import Structure
from .model.weights import Weights

#: From the output of the model, the minibatch and its position to the cotangents whose products with the Jacobian are
#: streamed. It is a function: the same arguments give the same cotangents (random ones are drawn from the position).
CotangentFunction = Callable[[Tensor, data.Batch, int], Cotangents]
#: From the output, a vector u in its shape, the minibatch and its position to ``sum_c s_c (s_c . u)`` for each example.
Curvature = Callable[[Tensor, Tensor, data.Batch, int], Tensor]


@dataclass(frozen=True)
class OfSeveral:
    """The cotangents of neighbouring minibatches laid end to end, from the position of the first; None if they cannot
    be taken together. Made of a :data:`CotangentFunction` by :func:`rowwise` or :func:`one_by_one`.
    """

    function: Callable[[Tensor, Sequence[data.Batch], int], Cotangents | None]

    def __call__(self, f: Tensor, batches: Sequence[data.Batch], position: int) -> Cotangents | None:
        return self.function(f, batches, position)


@dataclass(frozen=True)
class Observation:
    """The Jacobians of one chunk of cotangents of one minibatch, or of some of its examples.

    n: how many examples this chunk counts, which is those that it has in their first chunk and zero afterwards, so that
    sums of n count every example once, and statistics of the inputs alone are taken where n > 0. weight: what the
    minibatch counts in the mean, in its first chunk, and zero afterwards. forms: one for each layer, by name. outputs:
    of the model, for all examples of the chunk. batch: these examples. minibatches: how many begin with this chunk. It
    should be let go of before the next one is made.
    """

    n: int
    weight: float
    forms: dict[str, LayerJacobian]
    outputs: Tensor
    batch: data.Batch
    minibatches: int


@dataclass(frozen=True)
class Plan:
    """What the types of the modules, or a probe of the model on a few examples, told.

    layouts: of every call, None for one that nothing comes of. names: the layers in the order of calls. aligned:
    whether all tensors of a minibatch have a row for each example, so that it can be taken apart. axes: how many each
    tensor of the minibatch had; a model may do something else with more or fewer. whole: where there are tensors as
    long as the minibatch that are none of examples. trial: of two examples, if what is made of them was counted.
    looked: whether it was found by running the model. one: whether with one example, too. normalises_one: whether
    something is normalised as one example however many there are. repeated: whether it saw one example several times,
    by which one cannot tell whether a model mixes examples.
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

    def read(self, batch: data.Batch) -> data.Batch:
        """A minibatch, with what was found about those like it."""
        return data.reread(batch, self.whole) if self.whole else batch

    def fits(self, batch: data.Batch) -> bool:
        """Whether it is for minibatches like this one."""
        return self.axes == data.axes(batch) and not (self.repeated and data.count(batch) > 1)


class _Probed(NamedTuple):
    """Gradients in the outputs of calls and in the parameters, of one example between others, and of all."""

    alone: Sequence[Tensor | None]
    truth_alone: Sequence[Tensor | None]
    of_all: Sequence[Tensor | None]
    truth: Sequence[Tensor | None]


class Generator(Evaluator):
    """Streams ``s_c^T df/dw`` for each example: the per-example Jacobian of a model seen through cotangents s_c.

    model, layer_collection, function, device, verbose, batch_statistics, unit: as in :class:`Evaluator`. cotangents:
    from the output f ``(B, *out)``, the minibatch and its position to the s_c; as :func:`rowwise` of such a function,
    where those of an example depend on its own output and targets alone, so that small minibatches can be taken
    together. centred: matrices are of ``J - mean J`` instead of J. curvature: ``sum_c s_c (s_c . u)``, if there is a
    faster way than by the s_c. weigh: from f and the minibatch to what it counts in a mean, by default its number of
    examples. mean: whether matrices are divided by the sum of that. seed: the position of the first minibatch, from
    which random cotangents are drawn.

    The user's model is found as it was after every minibatch: its mode, buffers, ``requires_grad``, ``grad``, hooks
    and the random state.

    >>> from nngeometry.likelihood import Gaussian
    >>> model = nn.Linear(3, 2)
    >>> g = Generator(model, LayerCollection.from_model(model), rowwise(lambda f, batch, k: Gaussian().sqrt(f)))
    >>> [observation] = g.stream((torch.randn(5, 3),))
    >>> observation.n, observation.forms[""].dense().shape
    (5, torch.Size([2, 5, 1, 2, 4]))
    """

    jacobians = True

    @arguments.called_as
    def __init__(
        self,
        model: nn.Module,
        layer_collection: LayerCollection,
        cotangents: CotangentFunction | OfSeveral,
        *,
        function: Callable[..., Any] | None = None,
        device: torch.device | str | None = None,
        verbose: bool = False,
        batch_statistics: bool = False,
        unit: str = "example",
        centred: bool = False,
        curvature: Curvature | None = None,
        weigh: Callable[[Tensor, data.Batch], float] | None = None,
        mean: bool = True,
        seed: int = 0,
    ) -> None:
        super().__init__(
            model,
            layer_collection,
            function=function,
            device=device,
            verbose=verbose,
            batch_statistics=batch_statistics,
            unit=unit,
        )
        if not callable(cotangents):
            raise TypeError(
                f"cotangents: expected a function of outputs, the minibatch and its position, got "
                f"{arguments.described(cotangents)}: e.g. lambda f, batch, k: Gaussian().sqrt(f)"
            )
        self.cotangents = cotangents if isinstance(cotangents, OfSeveral) else one_by_one(cotangents)
        self.centred = centred
        self._closed = curvature
        self.weigh = weigh if weigh is not None else lambda f, batch: f.shape[0]
        self.mean = mean
        self.seed = seed
        self.ignore_uncalled = layer_collection.ignore_uncalled
        self._pull = BatchedVJP()
        #: What was found when the model was looked at last, and what it was then.
        self._looked: tuple[Structure, Plan] | None = None
        #: How many examples minibatches had that were found to keep them apart, with the axes of their tensors.
        self._apart: set[tuple[int, tuple[int, ...]]] = set()

    def plan(self, batch: data.Batch) -> Plan:
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

    def stream(
        self,
        examples: Any,
        plan: Plan | None = None,
        by_example: bool = False,
        join: bool = False,
        first: int | None = None,
    ) -> Iterator[Observation]:
        """The observations of a loader or of one minibatch, in order.

        by_example: where a minibatch does not fit a work array with all of its cotangents, split its examples and not
        the cotangents, where that can be done. The model runs once more on each part; cotangents are those of the whole
        minibatch. join: where a model and its minibatches are so small that most time would go into starting
        operations, observe neighbouring minibatches as one; each has its own cotangents. first: the position of the
        first minibatch, by default the seed.
        """
        start = self.seed if first is None else first
        sites = self.layer_collection.sites(self.model)
        self.check_mode()

        if plan is None:
            plan = self._remembered()

        def planned(batch: data.Batch, measure: bool = False) -> Plan:
            nonlocal plan
            before = plan
            if plan is None or not plan.fits(batch):
                plan = self._plan(sites, batch, measure)
            if plan.looked and not plan.one and data.count(batch) == 1:
                plan = self._with_one(sites, batch, plan)
            if plan is not before and plan.looked:
                self._looked = Structure(self.model), plan
            return plan

        def made_of_two(batch: data.Batch) -> int:
            trial = planned(batch, measure=True).trial or self.dry_run(batch)
            return trial.made * (1 + self._of_one(trial.output, trial.pair, start).count)

        one_by_one = ((k, [batch]) for k, batch in enumerate(self.minibatches(examples)))
        for position, batches in self.joined(examples, made_of_two) if join else one_by_one:
            found = planned(batches[0])
            yield from self._observe(sites, [found.read(b) for b in batches], start + position, found, by_example)

    def _remembered(self) -> Plan | None:
        """What was found when the model was looked at last, if it is still the same."""
        if self._looked is None:
            return None
        then, plan = self._looked
        return plan if then.same(Structure(self.model)) else None

    def operator(self, examples: Any) -> Operator:
        """The matrix by its products, at the parameters as they are now; its trace and diagonal by the Jacobians."""
        products = gauss_newton(self, self, examples)
        layers = self.layer_collection.layers
        like = torch.empty(0, dtype=self.dtype, device=products.device)

        def summed(of: Callable[[Layer, LayerJacobian], Tensor]) -> Tensor:
            """``sum of(layer, Jacobian)`` over all observations, divided as the matrix is: one for each layer."""
            sums = [torch.zeros((), dtype=self.dtype, device=products.device) for _ in layers]

            def step(observation: Observation) -> None:
                for k, (name, layer) in enumerate(layers.items()):
                    sums[k] = sums[k] + of(layer, observation.forms[name])

            with Borrowed(products.weights.in_place):
                total = fold(self.stream(examples, by_example=True, join=True), step)
            found = torch.cat([s.flatten() for s in sums])
            return found / counted(total) if self.mean else found

        def trace() -> Tensor:
            return summed(lambda layer, j: j.sqnorm().sum()).sum()

        def diagonal() -> Tensor:
            return summed(lambda layer, j: layer.packing.unpack(j.square()))

        size = self.layer_collection.numel()
        if not self.centred:
            return Operator(products, size, trace, diagonal, like, psd=True, single=products.once)
        mean = summed(lambda layer, j: layer.packing.unpack(j.total()))

        def centred(product: Callable[[Tensor], Tensor], V: Tensor) -> Tensor:
            return product(V) - torch.outer(V @ mean, mean)

        def spread() -> Tensor:
            return (diagonal() - mean.square()).clamp(min=0)

        return Operator(
            partial(centred, products),
            size,
            lambda: trace() - mean.square().sum(),
            spread,
            like,
            psd=True,
            single=partial(centred, products.once),
        )

    def _of_one(self, f: Tensor, batch: data.Batch, position: int) -> Cotangents:
        """The cotangents of one minibatch."""
        found = self.cotangents(f, [batch], position)
        assert found is not None
        return found

    def curvature(self, f: Tensor, batches: Sequence[data.Batch], position: int) -> Callable[[Tensor], Tensor]:
        """For minibatches laid end to end: from u in the shape of f to ``sum_c s_c (s_c . u)`` of each example."""
        if self._closed is not None:
            batch, closed = data.join(batches), self._closed
            return lambda u: closed(f, u, batch, position)

        def product(u: Tensor) -> Tensor:
            cotangents = self.cotangents(f, batches, position)
            if cotangents is not None:
                return self._curvature(f, u, cotangents)
            own = zip(data.split(f, batches), data.split(u, batches), batches, strict=True)
            each = [(g, v, self._of_one(g, batch, position + k)) for k, (g, v, batch) in enumerate(own)]
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

    def _forward(self, sites: Sequence[Site], batch: data.Batch, plan: Plan | None) -> tuple[Tensor, list[Call]]:
        """Run the model once and record every call of the sites."""
        n = data.count(batch)
        recorder = Recorder(n, () if plan is None else [None if x is None else x.expand for x in plan.layouts])
        changes: list[Change] = [*recorder.hooks(sites), trainable(_collected(sites))]
        state = None if plan is None or not plan.looked else State(self.model)  # a probe has one of its own
        if state is not None:
            changes.append(state)
        if n == 1 or plan is None or plan.normalises_one:
            changes.append(entered(OneExample()))
        self.within(batch)  # what is looked for there is none of the calls
        with self.running(*changes):
            f = self.outputs_of(batch)
            calls = list(recorder.calls)
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

    def probe(self, sites: Sequence[Site], batch: data.Batch, measure: bool = False) -> Plan:
        """Find where the examples are in every tensor, and check that the derivative of each is what the forms say.

        The model, at a copy of its parameters and buffers, is run on two examples, and on three in another order: the
        axis whose length changes is that of examples, and an output that changes has others mixed into it. Then
        :meth:`_check_derivatives`.

        measure: whether to count what the model makes.
        """
        self._apart.clear()
        try:
            return self.apart(batch, lambda b: self._probe(sites, b, measure))
        except Refused as error:
            refused = error

        def look(at: LayerCollection) -> Plan:
            other = Generator(
                self.model,
                at,
                self.cotangents,
                function=self.function,
                device=self.device,
                batch_statistics=self.batch_statistics,
            )
            return other.apart(batch, lambda b: other._probe(at.sites(self.model), b, False))

        raise remedies.tried(self.model, self.layer_collection, refused, look) from refused.__cause__

    def _probe(self, sites: Sequence[Site], batch: data.Batch, measure: bool) -> Plan:
        n = data.count(batch)
        for site in sites:
            require_derivative(site.module)
        parameters = self.layer_collection.parameters(self.model)
        weights, state = Weights([self.model], parameters), State(self.model, values=True)
        before = weights.norm()
        with self.running(weights.in_place, *self.within(batch), state):
            few = [data.take(batch, torch.tensor([k % n for k in index])) for index in ([1, 0], [0, 1, 2])]
            with BytesMade() if measure else nullcontext() as made:
                f2, two = self._forward(sites, few[0], None)
            f3, three = self._forward(sites, few[1], None)
            graph = list(nodes([f3]))
            state.check(lambda: self._forward(sites, few[1], None))
            weights.check(before)
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
            probed = self._probed(f3, three, parameters)
            reached = iter(g is not None for g in probed.of_all)
            layouts = tuple(
                Layout.of(one, other, list(islice(reached, len(other.edges))))
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
            )
            if any(layout is not None and layout.constant for layout in layouts):
                plan = self._with_copies(sites, few[1], plan, f3, parameters)
            else:
                self._check_derivatives(f3, three, plan, parameters, probed)
        if three or not self.ignore_uncalled:
            weights.check_reached(graph, parameters, self._name_of)
        return plan

    def _with_one(self, sites: Sequence[Site], batch: data.Batch, plan: Plan) -> Plan:
        """The plan, checked with a minibatch of one example, for which a model may compute otherwise."""
        parameters = self.layer_collection.parameters(self.model)
        weights = Weights([self.model], parameters)
        with self.running(weights.in_place, *self.within(batch), State(self.model)):
            f, calls = self._forward(sites, batch, plan)
            self._check_derivatives(f, calls, plan, parameters, self._probed(f, calls, parameters))
        return replace(plan, one=True)

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
        parameters: Sequence[Tensor],
    ) -> Plan:
        """The plan with a way to give each example a copy of the outputs that have no axis of examples: one that
        changes neither what the model returns nor that examples are apart.
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
        for way in islice(product(*ways), _MOST_WAYS):
            layouts = list(plan.layouts)
            for k, expand in zip(constant, way, strict=True):
                layouts[k] = replace(layouts[k], expand=expand)  # type: ignore[type-var]
            tried = replace(plan, layouts=tuple(layouts))
            try:
                f, calls = self._forward(sites, batch, tried)
            except Exception:
                wrong = wrong or refused
                continue
            if f.shape != expected.shape or not same_up_to_rounding(f, expected, expected):
                wrong = wrong or refused
                continue
            try:
                self._check_derivatives(f, calls, tried, parameters, self._probed(f, calls, parameters))
            except Refused as error:
                wrong = refused if error.layers[0] in names else error
            except ValueError as error:
                wrong = error
            else:
                return tried
        assert wrong is not None
        raise wrong

    def _probed(self, f: Tensor, calls: Sequence[Call], parameters: Sequence[Tensor]) -> _Probed:
        """The gradients of a few examples in the outputs of calls and in the parameters."""
        edges = [e for c in calls for e in c.edges]
        uncalled = not calls and self.ignore_uncalled
        if uncalled and not f.requires_grad:
            return _Probed([], [None] * len(parameters), [], [None] * len(parameters))
        if not f.requires_grad or not (edges or uncalled):
            raise ValueError("the output of the model does not depend on the collected parameters")
        cotangent = _generic_cotangent(f)
        several = len(f) > 1
        every: list[Any] = [*edges, *parameters]
        with operations_named():
            found = torch.autograd.grad(f, every, cotangent, retain_graph=several, allow_unused=True)
        of_all, truth = found[: len(edges)], found[len(edges) :]
        if not several:
            return _Probed(of_all, truth, of_all, truth)
        found = torch.autograd.grad(f, every, weighted(cotangent, every_other(f)), allow_unused=True)
        return _Probed(found[: len(edges)], found[len(edges) :], of_all, truth)

    def _check_derivatives(
        self, f: Tensor, calls: Sequence[Call], plan: Plan, parameters: Sequence[Tensor], probed: _Probed
    ) -> None:
        """Raise, naming the layer, unless examples are apart and the forms add up to what autograd says.

        The gradient of one example, between others, may reach none of these, and its forms must add up to the gradient
        in the parameters. So must those of all, since the one may have no derivative; only less precisely, for sums of
        several may be made in a lower precision than the output has.
        """
        if len(f) > 1:
            check_apart(calls, plan.layouts, probed.of_all, probed.alone, every_other(f))
        exact = max(tolerance(f.dtype), *(tolerance(p.dtype) for p in parameters))
        for grads, truth, most in (
            (probed.alone, probed.truth_alone, exact),
            (probed.of_all, probed.truth, max(exact, _OF_SUMS)),
        ):
            batched = [None if g is None else g.unsqueeze(0) for g in grads]
            self._check_sum(
                self._forms(calls, plan.layouts, batched, 1, len(f)),
                [_dense(g, p) for g, p in zip(truth, parameters, strict=True)],
                most,
                f,
            )

    def _check_sum(self, found: Mapping[str, LayerJacobian], truth: Sequence[Tensor], most: float, f: Tensor) -> None:
        """Raise, naming the layer, unless the forms of all examples add up to the gradients of the parameters.

        most: how far they may be from that, relative to these. f: the output of the model.
        """
        norm = torch.linalg.vector_norm
        layers = self.layer_collection.layers
        remaining = iter(truth)
        every = [torch.cat([g.flatten() for g in islice(remaining, len(one.params))]) for one in layers.values()]
        sizes = [float(norm(expected, dtype=self.dtype)) for expected in every]
        floor = 1e-3 * hypot(*sizes)
        for (name, layer), expected, size in zip(layers.items(), every, sizes, strict=True):
            with no_grad():
                wrong = float(norm(layer.packing.unpack(found[name].total()) - expected))
            if wrong > most * max(floor, size):
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

    def _observe(
        self, sites: Sequence[Site], batches: Sequence[data.Batch], position: int, plan: Plan, by_example: bool
    ) -> Iterator[Observation]:
        batch = data.join(batches)
        f, calls = self._forward_apart(sites, batch, plan)
        fixed = f.detach()
        cotangents = self.cotangents(fixed, batches, position)
        if cotangents is None:
            for k, b in enumerate(batches):
                yield from self._observe(sites, [b], position + k, plan, by_example)
            return
        weight = sum(map(self.weigh, data.split(fixed, batches), batches))
        per_cotangent = f.nbytes + sum(y.nbytes for c in calls for y in c.outputs)
        n, count = len(f), cotangents.count
        busy = 1 if by_example else tuning(f.device).busy  # inputs are looked at once, however few cotangents at a time
        step = chunk_length(per_cotangent * busy, count, f.device)
        few = min(n, max(2, n * step // max(1, count)))  # with all cotangents; a model may squeeze away a single one
        parts = min(-(-n // few), n // 2)
        apart = plan.aligned and chunk_length(fixed.numel() * fixed.element_size(), count, f.device) >= step
        if not (by_example and apart) or step == count or parts < 2:
            yield from self._chunks(f, calls, cotangents, step, weight, plan, batch, len(batches))
            return
        del f, calls  # what a work array holds is made again, for a few examples at a time
        for k in range(parts):
            start, stop = k * n // parts, (k + 1) * n // parts
            part = data.take(batch, torch.arange(start, stop))
            f, calls = self._forward_apart(sites, part, plan)
            check_same(
                f, fixed[start:stop], fixed, "the output of the model for an example depends on the others", MIXES
            )
            at_once = max(1, n * step // (stop - start))
            those, counted = cotangents.narrow(start, stop), (0.0, 0) if k else (weight, len(batches))
            yield from self._chunks(f, calls, those, at_once, counted[0], plan, part, counted[1])
            del f, calls

    def _forward_apart(self, sites: Sequence[Site], batch: data.Batch, plan: Plan) -> tuple[Tensor, list[Call]]:
        """Run the model once. For the first minibatch of so many examples raise if these are not apart where the probe
        has found them: a model may do something else with more than it has seen, or with other entries.
        """
        f, calls = self._forward(sites, batch, plan)
        like = len(f), plan.axes
        if plan.looked and len(f) > _PROBED and calls and like not in self._apart:
            s, weights = _generic_cotangent(f), powers(f)
            edges = [e for c in calls for e in c.edges]
            with self._back(calls, self.within(batch)), operations_named():
                grads, others = (
                    torch.autograd.grad(f, edges, one, retain_graph=True, allow_unused=True)
                    for one in (s, weighted(s, weights))
                )
            check_apart(calls, plan.layouts, grads, others, weights)
            self._apart.add(like)
        return f, calls

    def _chunks(
        self,
        f: Tensor,
        calls: Sequence[Call],
        cotangents: Cotangents,
        step: int,
        weight: float,
        plan: Plan,
        batch: data.Batch,
        minibatches: int,
    ) -> Iterator[Observation]:
        outputs = f.detach()
        for c in slices(cotangents.count, step):
            s = cotangents.take(c.start, c.stop).to(f.dtype)
            if s.shape[1:] != f.shape:
                raise ValueError(
                    f"cotangents of shape {tuple(s.shape)} for outputs {tuple(f.shape)}: a Likelihood and the function "
                    "of a Generator return Cotangents.of(s) with s of shape (C, *outputs)"
                )
            n, counted, begun = (0, 0.0, 0) if c.start else (len(f), weight, minibatches)
            # Not kept here, so that who receives it can let go of it.
            yield Observation(
                n, counted, self._pulled(f, calls, s, plan, c.stop == cotangents.count, batch), outputs, batch, begun
            )

    def _pulled(
        self, f: Tensor, calls: Sequence[Call], s: Tensor, plan: Plan, last: bool, batch: data.Batch
    ) -> dict[str, LayerJacobian]:
        edges = [e for c in calls for e in c.edges]
        within = self.within(batch)
        with self._back(calls, within), operations_named():
            grads = self._pull([f], edges, [s], last) if calls else []
            found = self._forms(calls, plan.layouts, grads, len(s), len(f))
        if not within:
            return found
        there = partial(Borrowed, *within)
        return {k: form.within(there) if isinstance(form, forms.Lazy) else form for k, form in found.items()}

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
        of_site: dict[str, list[LayerJacobian]] = {}
        sites = {call.site.name: call.site for call in calls}
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
                of_site.setdefault(call.site.name, []).append(self._form(call, layout, gys, cotangents, examples))
        of_layer: dict[str, list[LayerJacobian]] = {name: [] for name in self.layer_collection}
        for name, of_calls in of_site.items():
            form = forms.add(of_calls)
            for layer, names in sites[name].routes:
                of_layer[layer.name].append(_routed(form, sites[name], layer, names))
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
        inputs = zip(leaves, layout.inputs, strict=True)
        axes = [(t.shape, axis) for t, axis in (*inputs, *outputs) if axis is not None]
        lengths = {shape[axis] for shape, axis in axes}
        length = lengths.pop() if lengths else examples
        if lengths or length % examples:
            raise Refused(
                [site.name], f"{call.what}: its inputs and outputs split {examples} examples differently", EXCLUDE
            )
        fronts = []
        used_gys = [gy for gy, used in zip(gys, layout.used, strict=True) if used]
        for (y, axis), gy in zip(outputs, used_gys, strict=True):
            if gy is None:
                zero = next(iter(site.params.values())).new_zeros(1, dtype=y.dtype)
                gy = zero.expand(cotangents, *y.shape)
            fronts.append(_to_front(gy.reshape(cotangents, *y.shape), axis or 0, 1))
        if site.kind.function is None:
            of_leaves = [(y.leaf, g) for (y, _), g in zip(outputs, fronts, strict=True)]
            form: LayerJacobian = generic(
                site.module, site.params, call.inputs, layout.inputs, of_leaves, site.name, self.dtype
            )
        else:
            (gy,) = fronts
            for _, axis in axes:
                if axis and not site.kind.features_last:
                    raise Refused(
                        [site.name], f"{call.what}: its examples are along axis {axis}, expected axis 0", EXCLUDE
                    )
            where = {id(x): axis for x, axis in zip(leaves, layout.inputs, strict=True)}
            given = [self._cast(_examples_first(x, where[id(x)], length)) for x in call.tensors()]
            with no_grad():
                form = site.kind.function(site.module, self._cast(gy), *given)
            if not is_ours(site.kind) and form.shape != site.packing.shape:
                raise ValueError(
                    f"{call.what}: its registered kind {site.kind.name!r} returned a Jacobian in the shape "
                    f"{form.shape}, but its parameters {', '.join(site.params)} are packed in {site.packing.shape}"
                )
        return form if length == examples else form.fold(length // examples)

    def _cast(self, t: Tensor) -> Tensor:
        return t.to(self.dtype) if t.is_floating_point() else t


def fold(stream: Iterable[Observation], step: Callable[[Observation], None]) -> float:
    """``step(observation)`` for every observation, outside of autograd, each let go of before the next one is made.
    Returns what they weigh together. step: must keep nothing of an observation.
    """
    total = 0.0
    with no_grad():
        for observation in stream:
            total += observation.weight
            step(observation)
            del observation
    return total


def rowwise(cotangents: CotangentFunction) -> OfSeveral:
    """Those of several minibatches as of one, where each depends on an example's own output and targets alone."""
    return OfSeveral(lambda f, batches, position: _made(cotangents(f, data.join(batches), position)))


def one_by_one(cotangents: CotangentFunction) -> OfSeveral:
    """Those of several minibatches, each for itself: they may be drawn at random, or depend on each other."""

    def several(f: Tensor, batches: Sequence[data.Batch], position: int) -> Cotangents | None:
        own = zip(data.split(f, batches), batches, strict=True)
        each = [_made(cotangents(rows, batch, position + k)) for k, (rows, batch) in enumerate(own)]
        return Cotangents.joined(each) if len({c.count for c in each}) == 1 else None

    return OfSeveral(several)


def _generic_cotangent(f: Tensor) -> Tensor:
    """One cotangent without structure, the same every time."""
    dtype = torch.promote_types(f.dtype, torch.float32)  # half precision does not count far
    return torch.cos(torch.arange(1, f.numel() + 1, dtype=dtype, device=f.device)).view(f.shape).to(f.dtype)


def _dense(g: Tensor | None, p: Tensor) -> Tensor:
    """A gradient of p as a plain tensor."""
    if g is None:
        return torch.zeros_like(p)
    return g.to_dense() if g.is_sparse else g


#: How many examples the largest minibatch of a probe has.
_PROBED = 3
#: What counts as equal in sums that may be made in single precision.
_OF_SUMS = 1e-4
#: How many ways of giving examples copies of what is alike for them are tried.
_MOST_WAYS = 16


def _collected(sites: Sequence[Site]) -> list[nn.Parameter]:
    return [s.params[k] for s in sites for _, names in s.routes for k in names]


def _to_front(t: Tensor, axis: int, lead: int) -> Tensor:
    """Move an axis, counted after ``lead`` leading axes, to just behind them."""
    return t if axis == 0 else t.movedim(lead + axis, lead)


def _examples_first(x: Tensor, axis: int | None, examples: int) -> Tensor:
    """An input with a row for each example, of which one without an axis of examples has copies."""
    if axis is not None:
        return _to_front(x, axis, 0)
    return in_first(x, examples) if x.ndim > 0 and x.shape[0] == 1 else in_front(x, examples)


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
    if layer.kronecker:
        raise NotImplementedError(
            f"layer {layer.name!r} ({layer.kind_name}): the factors of a {type(form).__name__} cannot be cut to "
            f"{', '.join(names)}: collect all of {', '.join(site.params)}, or register the kind without kronecker=True"
        )
    numel = [p.numel() for p in site.params.values()]
    sizes = [prod(shape) for _, shape in layer.params]

    def compute(start: int, stop: int, first: int, last: int) -> Tensor:
        flat = site.packing.unpack(form.narrow(start, stop, first, last).dense())
        whole = dict(zip(site.params, flat.split(numel, -1), strict=True))
        mine: dict[int, Tensor] = {}
        for name, k in names.items():  # a parameter may have several names
            mine[k] = mine[k] + whole[name] if k in mine else whole[name]
        zero = flat.new_zeros(1)
        pieces = [mine.get(k, zero.expand(*flat.shape[:-1], size)) for k, size in enumerate(sizes)]
        return layer.packing.pack(torch.cat(pieces, -1))

    return forms.Lazy(compute, form.cotangents, form.examples, layer.packing.shape, form.dtype, form.device)


def _made(found: Any) -> Cotangents:
    """What a likelihood or the user's function gives as cotangents, checked to be some."""
    if not isinstance(found, Cotangents):
        raise TypeError(
            f"cotangents: expected Cotangents, got {arguments.described(found)}: the sqrt and sample of a Likelihood, "
            "and the function of a Generator, return Cotangents.of(s) with s of shape (C, *outputs)"
        )
    return found
