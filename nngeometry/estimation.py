"""Estimation from a stream of Jacobians, or from products: observe, merge, forget, finish. The same for all matrices
and representations.

What was seen is held as sums (:data:`State`), which add up over chunks, minibatches and machines, and from which the
blocks of a matrix are made as often as they are asked for.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Protocol

import torch
from torch import Tensor

from .blocks import Block, DirectSum, Operator, Part, add
from .changes import no_grad, uninterrupted
from .forms import LayerJacobian
from .generator import Observation, fold
from .kinds import Packing
from .layercollection import Layer, LayerCollection
from .model.data import require_repeatable
from .model.evaluator import counted
from .sums import OTHER_STATISTICS, State, Sums, mapped, merge, same_shapes

__all__ = ["Estimation", "Estimator", "ProductSource", "Source", "State", "merge"]


class Source(Protocol):
    """What a matrix is made from: a model with what is asked of it, but without data.

    ``stream`` gives its Jacobians, ``operator`` its products. A source with ``jacobians`` has both.
    """

    layer_collection: LayerCollection
    #: Whether it has a stream of Jacobians.
    jacobians: bool
    #: Whether the matrix is divided by what was seen.
    mean: bool
    #: Whether the Jacobians are less their mean.
    centred: bool
    #: What tells its random draws from others: a minibatch has those of ``seed`` and its position.
    seed: int
    dtype: torch.dtype
    device: torch.device

    def stream(
        self, examples: Any, *, by_example: bool = False, join: bool = False, first: int = 0
    ) -> Iterator[Observation]:
        """The Jacobians of a loader or of one minibatch.

        Args:
            examples: These.
            by_example: Whether all cotangents of few examples are wanted, rather than few cotangents of all examples.
            join: Whether neighbouring minibatches may be observed as one.
            first: The position of the first minibatch, from which random cotangents are drawn.
        """
        ...

    def operator(self, examples: Any) -> Operator:
        """The matrix of a loader or of one minibatch by its products.

        Args:
            examples: These.
        """
        ...


@dataclass(frozen=True)
class ProductSource:
    """The source of a matrix that is known by its products alone: what a constructor of one hands to a representation.

    Args:
        layer_collection: The coordinates.
        operator: From a loader, or one minibatch, to the matrix by its products at the parameters as they are then.
            Its ``weight_of`` tells what these examples count in a mean, if representations are to be averaged.
        like: An empty tensor of the dtype and device of the matrix.
        mean: Whether the matrix of several loaders is the mean of theirs, by default, or their sum.

    Example:
        >>> from nngeometry import PMatDense
        >>> lc = LayerCollection.from_model(torch.nn.Linear(2, 1))
        >>> def twice(examples):
        ...     return Operator(lambda V: 2 * V, 3, None, None, like=torch.empty(0), psd=True)
        >>> PMatDense(layer_collection=lc, generator=ProductSource(lc, twice, torch.empty(0)), examples=[]).trace()
        tensor(6.)
    """

    layer_collection: LayerCollection
    operator: Callable[[Any], Operator]
    like: Tensor
    mean: bool = True
    jacobians: ClassVar[bool] = False
    centred: ClassVar[bool] = False
    seed: ClassVar[int] = 0

    @property
    def dtype(self) -> torch.dtype:
        return self.like.dtype

    @property
    def device(self) -> torch.device:
        return self.like.device


@dataclass(frozen=True)
class Estimator:
    """How the block of one group of layers is estimated.

    Args:
        layers: The layers of the block, whose forms it observes in this order.
        packing: How the flat parameters of these layers become a vector of the block; ``Packing.flat(p)`` leaves them
            as they are.
        observe: From the forms of the layers and the number of examples that this chunk counts to a statistic that adds
            up over chunks, minibatches and machines: a tuple of tensors and numbers.
        finish: From the sum of these and what it is divided by, usually the number of examples, to the block. It takes
            the statistic over and may write into it.
        centre: From the block and the mean Jacobian ``(p,)``, in flat parameters, to the block less the outer product
            of that mean, for covariances; None, the default, if there is no such block.
        refine: What estimates the block again, given the first, in a second pass; None by default.
        by_example: Whether all cotangents of few examples are cheaper to observe than few cotangents of all examples,
            because the inputs are looked at once.
        add: Adds what would be observed to a statistic in place, where both take much memory.
        merge: Of two statistics, which may write into the first; by default entry by entry.

    Example:
        >>> from nngeometry.blocks import Diag
        >>> (layer,) = LayerCollection.from_model(torch.nn.Linear(2, 1)).layers.values()
        >>> diagonal = Estimator(
        ...     (layer,), layer.packing, lambda forms, n: (forms[0].square(),), lambda state, n: Diag(state[0] / n)
        ... )
    """

    layers: tuple[Layer, ...]
    packing: Packing
    observe: Callable[[Sequence[LayerJacobian], int], State]
    finish: Callable[[State, float], Block]
    centre: Callable[[Block, Tensor], Block] | None = None
    refine: Callable[[Block], Refinement] | None = None
    by_example: bool = False
    add: Callable[[State, Sequence[LayerJacobian], int], State] | None = None
    merge: Callable[[State, State], State] | None = None

    def updated(self, state: State | None, observation: Observation) -> State:
        """A state and what was observed."""
        js = [observation.forms[layer.name] for layer in self.layers]
        if state is not None and self.add is not None:
            return self.add(state, js, observation.n)
        new = self.observe(js, observation.n)
        return new if state is None else self.merged(state, new)

    def merged(self, a: State, b: State) -> State:
        """The statistic of the union of what two have seen."""
        return (self.merge or merge)(a, b)


@dataclass(frozen=True)
class Refinement:
    """A second estimate, in the eigenbasis of the first one.

    Args:
        basis: The eigenbasis.
        first: Estimates the block in that basis from the examples that it is of.
        later: Estimates it from others, which may have something outside of its span.
        carried: From another basis and a state in it to what that is in this one, as far as it is known without the
            data.
    """

    basis: Block
    first: Estimator
    later: Estimator
    carried: Callable[[Block, State], State]


class Estimation(ABC):
    """A matrix while it is estimated: what was seen so far, from which it can be made at any time. ``seen`` is how many
    examples that were, those of the past for less where they were decayed.
    """

    source: Source
    seen: float

    @abstractmethod
    def update(self, examples: Any, last: bool = False) -> None:
        """Fold in a loader or one minibatch, as a whole: after an exception nothing has changed.

        Args:
            examples: These.
            last: Whether nothing more will follow, so that what only that would need is not kept.
        """

    @abstractmethod
    def root(self, last: bool = False) -> Block:
        """The matrix of what was seen.

        Args:
            last: Whether it is not asked for again, and may take over what is held.
        """

    @property
    @abstractmethod
    def groups(self) -> list[tuple[str, ...]]:
        """The names of the layers of each block."""

    @abstractmethod
    def part(self, k: int) -> Part:
        """One block of the matrix of what was seen, and the coordinates it acts on."""

    def statistic(self, k: int) -> Block:
        """What a decomposition of one block is of: the block itself, or the one in whose eigenbasis it is refined."""
        return self.part(k).block

    def refines(self, k: int) -> bool:
        """Whether one block is refined in an eigenbasis, which :meth:`refine` changes."""
        return False

    def refine(self, k: int, basis: Block) -> None:
        """Refine one block in another basis from now on; what was seen is carried over, approximately."""
        raise NotImplementedError

    @abstractmethod
    def ahead(self) -> Estimation:
        """Another one that has seen nothing and goes on where this one is: with its bases and random draws."""

    @abstractmethod
    def take(self, ahead: Any) -> None:
        """Add what one that went ahead has seen, which is given up."""

    @abstractmethod
    def decay(self, weight: float) -> None:
        """What was seen counts less from now on.

        Args:
            weight: What it counts, between 0 and 1.
        """

    @abstractmethod
    def absorb(self, other: Any) -> None:
        """Add what another one of the same kind has seen, which is left as it is.

        Args:
            other: The other one.
        """

    @abstractmethod
    def fresh(self) -> Estimation:
        """Another one that has seen nothing."""

    @abstractmethod
    def map(self, fn: Callable[[Tensor], Tensor]) -> Estimation:
        """Another one that has seen the same, with a function applied to every tensor."""

    @abstractmethod
    def plain(self) -> dict[str, Any]:
        """As tensors and plain values."""

    @abstractmethod
    def load(self, saved: Mapping[str, Any]) -> None:
        """Have seen what :meth:`plain` says, instead of what was seen."""


class OfJacobians(Estimation):
    """Blocks from a stream of Jacobians, in one pass over the examples, and at first a second one for those that
    refine; later these are refined in the basis that they have.

    Args:
        source: What the matrix is made from.
        estimators: One for each block.

    Raises:
        NotImplementedError: If the matrix is centred, and one of them does not say how that is done.
    """

    def __init__(self, source: Source, estimators: Sequence[Estimator]) -> None:
        self.source = source
        self.estimators = list(estimators)
        self._slices = source.layer_collection.slices()
        for e in self.estimators:
            if source.centred and e.centre is None:
                raise NotImplementedError(
                    f"layer {e.layers[0].name!r}: this representation does not say how its block is centred (a centred "
                    "covariance has no Kronecker factors; use PMatEKFAC, which is its exact diagonal in the Kronecker "
                    "eigenbasis, or EmpiricalFisher, which is not centred)"
                )
        self.sums = Sums.nothing(len(self.estimators))
        #: Of the blocks that are refined.
        self.refinements: dict[int, Refinement] = {}
        self.position = source.seed

    @property
    def seen(self) -> float:  # type: ignore[override]
        return self.sums.count

    def update(self, examples: Any, last: bool = False) -> None:
        first_time = self.seen == 0 and not self.refinements
        new = Sums.nothing(len(self.estimators))
        refinements = dict(self.refinements)
        if first_time and (again := [k for k, e in enumerate(self.estimators) if e.refine is not None]):
            require_repeatable(examples, "this representation")
            moved = self.observe(examples, new, dict(enumerate(self.estimators)), {})
            for k in again:
                refinements[k] = self.refined(k, new, last)
                if last:
                    new.states[k] = None
            self.observe(examples, new, {}, {k: r.first for k, r in refinements.items()}, count=False)
        else:
            later = {k: r.later for k, r in refinements.items()}
            moved = self.observe(examples, new, dict(enumerate(self.estimators)), later)
        uninterrupted(self.include, new, refinements, self.position + moved)

    def include(self, new: Sums, refinements: dict[int, Refinement], position: int) -> None:
        """Add what was seen. position: the one of what comes next."""
        self.refinements = refinements
        self.sums = new if self.seen == 0 else self._joined(self.sums, new)
        self.position = position

    def replace(self, new: Sums, refinements: dict[int, Refinement], position: int) -> None:
        """Have seen that instead."""
        self.refinements, self.sums, self.position = refinements, new, position

    def observe(
        self,
        examples: Any,
        sums: Sums,
        estimators: Mapping[int, Estimator],
        refining: Mapping[int, Estimator],
        count: bool = True,
        first: int | None = None,
    ) -> int:
        """One pass over the examples, added to sums, and how many minibatches they were. count: whether it is the first
        one over these. first: the position of the first minibatch, if not that of what comes next.
        """
        by_example = all(e.by_example for e in [*estimators.values(), *refining.values()])
        seen, minibatches = 0, 0

        def step(observation: Observation) -> None:
            nonlocal seen, minibatches
            seen += observation.n
            minibatches += observation.minibatches
            for k, e in estimators.items():
                sums.states[k] = e.updated(sums.states[k], observation)
            for k, e in refining.items():
                sums.refined[k] = e.updated(sums.refined.get(k), observation)
            if count and self.source.centred:
                for e in self.estimators:
                    for layer in e.layers:
                        j = layer.packing.unpack(observation.forms[layer.name].total())
                        sums.means[layer.name] = sums.means[layer.name] + j if layer.name in sums.means else j

        stream = self.source.stream(
            examples, by_example=by_example, join=True, first=self.position if first is None else first
        )
        weight = fold(stream, step)
        if count:
            sums.weight, sums.seen = sums.weight + weight, sums.seen + seen
        return minibatches

    def refined(self, k: int, sums: Sums, last: bool = False) -> Refinement:
        """The refinement of a block in the eigenbasis of what was seen."""
        estimator = self.estimators[k]
        assert estimator.refine is not None
        with no_grad():
            return estimator.refine(self._unrefined(k, sums, last).eig().basis)  # type: ignore[attr-defined]

    def _unrefined(self, k: int, sums: Sums, last: bool = False) -> Block:
        """The first estimate of a block that is refined."""
        state = sums.states[k]
        assert state is not None
        return self.estimators[k].finish(state if last else mapped(state, Tensor.clone), self._count(sums))

    def _count(self, sums: Sums) -> float:
        """What the statistics are divided by: their scale divides out of a mean."""
        return counted(sums.weight) if self.source.mean else 1 / sums.scale

    def root(self, last: bool = False) -> Block:
        return DirectSum(tuple(self.part(k, last) for k in range(len(self.estimators))))

    @property
    def groups(self) -> list[tuple[str, ...]]:
        return [tuple(layer.name for layer in e.layers) for e in self.estimators]

    def part(self, k: int, last: bool = False) -> Part:
        sums, n, e = self.sums, self._count(self.sums), self.estimators[k]
        state = sums.refined[k] if k in self.refinements else sums.states[k]
        assert state is not None
        final = self.refinements[k].later if k in self.refinements else e
        with no_grad():
            block = final.finish(state if last else mapped(state, Tensor.clone), n)
            if last:
                sums.states[k] = None
            elif k in self.refinements:  # the basis stays where the model is
                like = sums.like
                block = block.map(lambda t: t.to(like.device, like.dtype))
            if self.source.centred:
                assert final.centre is not None
                mean = torch.cat([sums.means[layer.name] for layer in e.layers]) / n
                block = final.centre(block, mean.to(block.device, block.dtype))
        return Part(_runs([self._slices[layer.name] for layer in e.layers]), e.packing, block)

    def statistic(self, k: int) -> Block:
        if k not in self.refinements:
            return self.part(k).block
        with no_grad():
            return self._unrefined(k, self.sums)

    def refines(self, k: int) -> bool:
        return k in self.refinements

    def refine(self, k: int, basis: Block) -> None:
        old, refine = self.refinements[k], self.estimators[k].refine
        assert refine is not None
        with no_grad():
            new = refine(basis)
            carried = new.carried(old.basis, self.sums.refined[k])
        uninterrupted(self._rebased, {**self.refinements, k: new}, {**self.sums.refined, k: carried})

    def ahead(self) -> OfJacobians:
        made = self.fresh()
        made.refinements, made.position = dict(self.refinements), self.position
        return made

    def take(self, ahead: OfJacobians) -> None:
        if ahead.seen:
            self._require_same_bases(ahead)
            uninterrupted(self.include, ahead.sums, self.refinements or ahead.refinements, ahead.position)

    def decay(self, weight: float) -> None:
        uninterrupted(self.sums.decay, weight)

    def absorb(self, other: OfJacobians) -> None:
        if other.seen == 0:
            return
        self._require_same_bases(other)
        uninterrupted(
            self.include, other.sums.mapped(Tensor.clone), self.refinements or other.refinements, self.position
        )

    def _require_same_bases(self, other: OfJacobians) -> None:
        for k, mine in self.refinements.items():
            if not _same_block(mine.basis, other.refinements[k].basis):
                raise ValueError(
                    f"layer {self.estimators[k].layers[0].name!r}: the two have second moments in different bases, so "
                    "they have no exact sum: call b.rebase(a) first, which carries those of b over to the basis of a, "
                    "approximately, or begin b with it, as a.ahead() does"
                )

    def rebase(self, other: OfJacobians | None = None) -> None:
        """Refine in the eigenbasis of all that was seen from now on, or in the basis of another one. The second moments
        are carried over as the diagonal, in the new basis, of the approximation in the old one.
        """
        if not any(e.refine for e in self.estimators):
            raise ValueError("rebase: this representation has no basis of its own: only PMatEKFAC and mixtures with it")
        if other is not None and not other.refinements:
            raise ValueError("rebase: the other accumulator has no basis yet: call update(loader) on it first")
        refinements, refined = dict(self.refinements if other is None else other.refinements), dict(self.sums.refined)
        for k, state in self.sums.refined.items():
            if other is None:
                refinements[k] = self.refined(k, self.sums)
            with no_grad():
                refined[k] = refinements[k].carried(self.refinements[k].basis, state)
        uninterrupted(self._rebased, refinements, refined)

    def _rebased(self, refinements: dict[int, Refinement], refined: dict[int, State]) -> None:
        self.refinements, self.sums.refined = refinements, refined

    def _joined(self, a: Sums, b: Sums) -> Sums:
        """What two have seen; a is written into."""
        for e, x, y in zip(self.estimators, a.states, b.states, strict=True):  # before anything is written into
            if x is not None and y is not None and not same_shapes(x, y):
                raise ValueError(f"layer {e.layers[0].name!r} ({e.layers[0].kind_name}): {OTHER_STATISTICS}")
        like, a = a.like, a.settled()
        b = b.mapped(lambda t: t.to(like.device, like.dtype) if t.is_floating_point() else t).settled()
        states = [
            e.merged(x, y) if x is not None and y is not None else x
            for e, x, y in zip(self.estimators, a.states, b.states, strict=True)
        ]
        refined = {k: self.refinements[k].later.merged(x, b.refined[k]) for k, x in a.refined.items()}
        means = {name: mean + b.means[name] for name, mean in a.means.items()}
        return Sums(states, refined, means, a.weight + b.weight, a.seen + b.seen)

    def fresh(self) -> OfJacobians:
        return OfJacobians(self.source, self.estimators)

    def map(self, fn: Callable[[Tensor], Tensor]) -> OfJacobians:
        made = self.fresh()
        made.sums, made.refinements, made.position = self.sums.mapped(fn), dict(self.refinements), self.position
        return made

    def plain(self) -> dict[str, Any]:
        bases = {k: refinement.basis.state() for k, refinement in self.refinements.items()}
        return {"position": self.position, "bases": bases, **self.sums.mapped(Tensor.clone).plain()}

    def load(self, saved: Mapping[str, Any]) -> None:
        refinements = {}
        for k, basis in saved["bases"].items():
            refine = self.estimators[k].refine
            assert refine is not None
            refinements[k] = refine(Block.from_state(basis).map(lambda t: t.to(self.source.device)))
        sums = Sums.of_plain(saved).mapped(lambda t: t.to(self.source.device, copy=True))
        self.replace(sums, refinements, saved["position"])


class OfProducts(Estimation):
    """A representation of a matrix that is known by its products: those of its entries that the representation has.

    Where the matrix is a mean, the mean over all that was seen is held, and otherwise the sum.

    Args:
        source: What the matrix is made from.
        project: From the matrix to the representation.
    """

    def __init__(self, source: Source, project: Callable[[Block], Block]) -> None:
        self.source = source
        self.project = project
        self._block: Block | None = None
        self.seen = 0.0

    def update(self, examples: Any, last: bool = False) -> None:
        operator = self.source.operator(examples)
        with no_grad():
            block = self.project(operator)
        self._add(block, 1.0 if last and operator.weight_of is None else operator.weight())

    def _add(self, block: Block, seen: float) -> None:
        if self._block is not None:
            before, now = (self.seen, seen) if self.source.mean else (1.0, 1.0)
            total = before + now if self.source.mean else 1.0
            like = self._block.tensors()[0]
            moved = block.map(lambda t: t.to(like.device, like.dtype))
            block = add(self._block.scale(before / total), moved.scale(now / total))
        self._block, self.seen = block, self.seen + seen

    def root(self, last: bool = False) -> Block:
        assert self._block is not None
        return self._block

    @property
    def groups(self) -> list[tuple[str, ...]]:
        names: list[tuple[str, ...]] = []
        slices = self.source.layer_collection.slices()
        for part in self.root().parts:  # type: ignore[attr-defined]
            inside = [any(a <= s.start and s.stop <= b for a, b in part.slices) for s in slices.values()]
            names.append(tuple(name for name, own in zip(slices, inside, strict=True) if own))
        return names

    def part(self, k: int) -> Part:
        part: Part = self.root().parts[k]  # type: ignore[attr-defined]
        return part

    def ahead(self) -> OfProducts:
        return self.fresh()

    def take(self, ahead: OfProducts) -> None:
        self.absorb(ahead)

    def decay(self, weight: float) -> None:
        if self._block is not None and not self.source.mean:
            self._block = self._block.scale(weight)
        self.seen *= weight

    def absorb(self, other: OfProducts) -> None:
        if other._block is not None:
            self._add(other._block, other.seen)

    def fresh(self) -> OfProducts:
        return OfProducts(self.source, self.project)

    def map(self, fn: Callable[[Tensor], Tensor]) -> OfProducts:
        made = self.fresh()
        made._block, made.seen = None if self._block is None else self._block.map(fn), self.seen
        return made

    def plain(self) -> dict[str, Any]:
        return {"block": None if self._block is None else self._block.state(), "seen": self.seen}

    def load(self, saved: Mapping[str, Any]) -> None:
        block = None if saved["block"] is None else Block.from_state(saved["block"])
        self._block = None if block is None else block.map(lambda t: t.to(self.source.device, copy=True))
        self.seen = saved["seen"]


def _same_block(one: Block, other: Block) -> bool:
    if one is other:
        return True
    a, b = one.tensors(), other.tensors()
    return len(a) == len(b) and all(x.shape == y.shape and torch.equal(x, y) for x, y in zip(a, b, strict=True))


def _runs(where: Sequence[slice]) -> tuple[tuple[int, int], ...]:
    """Slices with neighbours joined."""
    runs: list[tuple[int, int]] = []
    for s in where:
        if runs and runs[-1][1] == s.start:
            runs[-1] = (runs[-1][0], s.stop)
        else:
            runs.append((s.start, s.stop))
    return tuple(runs)
