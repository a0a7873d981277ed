"""From a model and data to a stream of per-example Jacobians, one small chunk of cotangents at a time."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from . import arguments
from .blocks import Operator
from .changes import Borrowed, Change, no_grad
from .derivatives.pulling import BatchedVJP, operations_named
from .forms import LayerJacobian
from .layercollection import Layer, LayerCollection, Site
from .likelihood import Cotangents, Likelihood, as_cotangents
from .linearisation import gauss_newton
from .memory import chunk_length, slices, tuning
from .model import data
from .model.evaluator import (
    MIXES,
    check_same,
    counted,
)
from .model.probing import Plan, Probed
from .model.pullback import Pullback
from .model.recording import Call
from .model.structure import Structure

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
        found = self.function(f, batches, position)
        return None if found is None else as_cotangents(found)


@dataclass(frozen=True)
class Observation:
    """The Jacobians of one chunk of cotangents of one minibatch, or of some of its examples. It should be let go of
    before the next one is made.

    Args:
        n: How many examples this chunk counts, which is those that it has in their first chunk and zero afterwards, so
            that sums of n count every example once, and statistics of the inputs alone are taken where n > 0.
        weight: What the minibatch counts in the mean, in its first chunk, and zero afterwards.
        forms: One form for each layer, by name.
        outputs: Those of the model, for all examples of the chunk.
        batch: These examples.
        minibatches: How many begin with this chunk.
        last: Whether it is the last chunk of its examples.
    """

    n: int
    weight: float
    forms: dict[str, LayerJacobian]
    outputs: Tensor
    batch: data.Batch
    minibatches: int
    last: bool


class Generator(Probed):
    """Streams ``s_c^T df/dw`` for each example: the per-example Jacobian of a model seen through cotangents s_c.

    The user's model is found as it was after every minibatch: its mode, buffers, ``requires_grad``, ``grad``, hooks and
    the random state.

    Args:
        model: The model, in eval mode.
        layer_collection: The coordinates.
        cotangents: From the output f ``(B, *out)``, the minibatch and its position to the s_c; as :func:`rowwise` of
            such a function, where those of an example depend on its own output and targets alone, so that small
            minibatches can be taken together.
        function: ``function(*minibatch) -> outputs``, by default ``model(minibatch[0])``.
        device: Where minibatches go, by default to the model.
        verbose: Whether to show a progress bar.
        batch_statistics: Whether BatchNorm has the statistics of each minibatch, held constant, as in
            :func:`~nngeometry.FIM`; by default not.
        unit: What counts as an example, "example" (the default) or "minibatch", as in :func:`~nngeometry.FIM`.
        centred: Whether matrices are of ``J - mean J`` instead of J; by default not.
        curvature: From f, u, the minibatch and its position to ``sum_c s_c (s_c . u)``, if there is a faster way than
            by the s_c.
        weigh: From f and the minibatch to what it counts in a mean, by default its number of examples.
        mean: Whether matrices are divided by the sum of that, by default True.
        seed: The position of the first minibatch, from which random cotangents are drawn, by default 0.

    Raises:
        TypeError: For what is no function.

    Example:
        >>> from nngeometry.likelihood import Gaussian
        >>> model = nn.Linear(3, 2)
        >>> g = Generator(model, LayerCollection.from_model(model), rowwise(lambda f, batch, k: Gaussian().sqrt(f)))
        >>> [observation] = g.stream((torch.randn(5, 3),))
        >>> observation.n, observation.forms[""].dense().shape
        (5, torch.Size([2, 5, 1, 2, 4]))
    """

    jacobians = True
    #: Of which the cotangents are the Fisher information, where that is known.
    likelihood: Likelihood | None = None

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
        self._pull = BatchedVJP()

    def stream(
        self,
        examples: Any,
        plan: Plan | None = None,
        by_example: bool = False,
        join: bool = False,
        first: int | None = None,
    ) -> Iterator[Observation]:
        """The observations of a loader or of one minibatch, in order.

        Args:
            examples: These.
            plan: What is known of the model, by default what was found before.
            by_example: Where a minibatch does not fit a work array with all of its cotangents, split its examples and
                not the cotangents, where that can be done. The model runs once more on each part; cotangents are those
                of the whole minibatch.
            join: Where a model and its minibatches are so small that most time would go into starting operations,
                observe neighbouring minibatches as one; each has its own cotangents.
            first: The position of the first minibatch, by default the seed.

        Yields:
            The Jacobians, chunk by chunk.
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

        one_by_one = ((data.position_of(batch, k), [batch]) for k, batch in enumerate(self.minibatches(examples)))
        for position, batches in self.joined(examples, made_of_two) if join else one_by_one:
            found = planned(batches[0])
            yield from self._observe(sites, [found.read(b) for b in batches], start + position, found, by_example)

    def operator(self, examples: Any) -> Operator:
        """The matrix by its products, at the parameters as they are now; its trace and diagonal come by the Jacobians.

        Args:
            examples: A loader, or one minibatch.
        """
        products = gauss_newton(self, self, examples)
        layers = self.layer_collection.layers
        like = torch.empty(0, dtype=self.dtype, device=products.device)

        def summed(of: Callable[[Layer, LayerJacobian], Tensor], length: int) -> Tensor:
            """``sum of(layer, Jacobian)`` over all observations, divided as the matrix is: one for each layer, which
            are so many numbers together.
            """
            sums: dict[str, Tensor] = {}

            def step(observation: Observation) -> None:
                for name, layer in layers.items():
                    one = of(layer, observation.forms[name])
                    sums[name] = sums[name] + one if name in sums else one

            def add(out: Tensor) -> float:
                with Borrowed(products.weights.in_place):
                    total = fold(self.stream(examples, by_example=True, join=True), step)
                if sums:  # this process may have no minibatch
                    out += torch.cat([sums[name].flatten() for name in layers])
                return total

            found = torch.zeros(length, dtype=self.dtype, device=products.device)
            total = products.team.summed(found, add)
            return found / counted(total) if self.mean else found

        def trace() -> Tensor:
            return summed(lambda layer, j: j.sqnorm().sum(), len(layers)).sum()

        def diagonal() -> Tensor:
            return summed(lambda layer, j: layer.packing.unpack(j.square()), size)

        size = self.layer_collection.numel()
        if not self.centred:
            return Operator(products, size, trace, diagonal, like, psd=True, single=products.once, team=products.team)
        mean = summed(lambda layer, j: layer.packing.unpack(j.total()), size)

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
            team=products.team,
        )

    def _of_one(self, f: Tensor, batch: data.Batch, position: int) -> Cotangents:
        """The cotangents of one minibatch."""
        found = self.cotangents(f, [batch], position)
        assert found is not None
        return found

    def curvature(self, f: Tensor, batches: Sequence[data.Batch], position: int) -> Callable[[Tensor], Tensor]:
        """The product of the cotangents with themselves, for minibatches laid end to end.

        Args:
            f: Their outputs.
            batches: The minibatches.
            position: That of the first.

        Returns:
            A function from u in the shape of f to ``sum_c s_c (s_c . u)`` of each example.
        """
        if self._closed is not None:
            batch, closed = data.join(batches), self._closed
            return lambda u: closed(f, u, batch, position)

        def product(u: Tensor) -> Tensor:
            cotangents = self.cotangents(f, batches, position)
            if cotangents is not None:
                return self._curvature(f, u, cotangents)
            own = zip(data.split(f, batches), data.split(u, batches), batches, data.offsets(batches), strict=True)
            each = [(g, v, self._of_one(g, batch, position + k)) for g, v, batch, k in own]
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

    def _observe(
        self, sites: Sequence[Site], batches: Sequence[data.Batch], position: int, plan: Plan, by_example: bool
    ) -> Iterator[Observation]:
        batch = data.join(batches)
        f, calls = self._forward_apart(sites, batch, plan)
        fixed = f.detach()
        cotangents = self.cotangents(fixed, batches, position)
        if cotangents is None:
            for k, b in zip(data.offsets(batches), batches, strict=True):
                yield from self._observe(sites, [b], position + k, plan, by_example)
            return
        weight = sum(map(self.weigh, data.split(fixed, batches), batches))
        n, count = len(f), cotangents.count
        per_cotangent = _bytes_pulled(f, calls, cotangents.shared)
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
        outputs, within = f.detach(), self.within(batch)
        with self._back(calls, within):
            pullback = Pullback(f, calls, plan.layouts)
        for c in slices(cotangents.count, step):
            s = cotangents.take(c.start, c.stop).to(f.dtype)
            if s.shape[1:] != f.shape:
                raise ValueError(
                    f"cotangents of shape {tuple(s.shape)} for outputs {tuple(f.shape)}: a Likelihood and the function "
                    "of a Generator return Cotangents.of(s) with s of shape (C, *outputs)"
                )
            n, counted, begun = (0, 0.0, 0) if c.start else (len(f), weight, minibatches)
            last = c.stop == cotangents.count
            # Not kept here, so that who receives it can let go of it.
            yield Observation(
                n, counted, self._pulled(f, calls, pullback, s, plan, last, within), outputs, batch, begun, last
            )

    def _pulled(
        self,
        f: Tensor,
        calls: Sequence[Call],
        pullback: Pullback,
        s: Tensor,
        plan: Plan,
        last: bool,
        within: Sequence[Change],
    ) -> dict[str, LayerJacobian]:
        with self._back(calls, within), operations_named():
            pulled = self._pull([f], pullback.edges, [s], last and pullback.once) if calls else []
            grads = pullback.gradients(pulled, s, lambda edges, one: self._pull([f], edges, [one]))
            found = self._forms(calls, plan.layouts, grads, len(s), len(f))
        if not within:
            return found
        there = partial(Borrowed, *within)
        return {k: form.within(there) for k, form in found.items()}


def _bytes_pulled(f: Tensor, calls: Sequence[Call], shared: bool) -> int:
    """About what one cotangent takes, with what comes of it. One that all examples share, and where it is an output of
    a layer, too, is held once.
    """
    if not shared:
        return f.nbytes + sum(y.nbytes for c in calls for y in c.outputs)
    pulled = ((y, edge) for c in calls for y, edge in zip(c.outputs, c.edges, strict=True))
    return f.nbytes // max(1, len(f)) + sum(y.nbytes for y, edge in pulled if edge.node is not f.grad_fn)


def fold(stream: Iterable[Observation], step: Callable[[Observation], None]) -> float:
    """Call ``step(observation)`` for every observation, outside of autograd; each is let go of before the next one is
    made.

    Args:
        stream: The observations.
        step: What is done with each. It must keep nothing of an observation.

    Returns:
        What they weigh together.
    """
    total = 0.0
    with no_grad():
        for observation in stream:
            total += observation.weight
            step(observation)
            del observation
    return total


def rowwise(cotangents: CotangentFunction) -> OfSeveral:
    """Cotangents that depend on an example's own output and targets alone, so that those of several minibatches can be
    made as of one.

    Args:
        cotangents: From the output ``(B, *out)``, the minibatch and its position to the cotangents.

    Returns:
        What :class:`Generator` takes as cotangents.
    """
    return OfSeveral(lambda f, batches, position: as_cotangents(cotangents(f, data.join(batches), position)))


def one_by_one(cotangents: CotangentFunction) -> OfSeveral:
    """Cotangents of each minibatch for itself: they may be drawn at random, or depend on each other.

    Args:
        cotangents: From the output ``(B, *out)``, the minibatch and its position to the cotangents.

    Returns:
        What :class:`Generator` takes as cotangents.
    """

    def several(f: Tensor, batches: Sequence[data.Batch], position: int) -> Cotangents | None:
        own = zip(data.split(f, batches), batches, data.offsets(batches), strict=True)
        each = [as_cotangents(cotangents(rows, batch, position + k)) for rows, batch, k in own]
        return Cotangents.joined(each) if len({c.count for c in each}) == 1 else None

    return OfSeveral(several)
