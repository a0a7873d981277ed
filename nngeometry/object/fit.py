"""Estimation of blocks from a stream of Jacobians: observe a chunk, merge, finish. The same for all representations."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from math import prod
from typing import Any

import torch
from torch import Tensor

from .. import forms
from ..blocks import Block, Dense, Diag, Eye, Kron, LowRank, Part, QuasiDiag, Spectral
from ..changes import no_grad
from ..data import require_repeatable
from ..forms import LayerJacobian
from ..generator import Generator, Observation, counted
from ..kinds import Packing
from ..layercollection import Layer
from ..memory import chunk_length, require

#: Tensors, numbers and lists, in tuples: merged entry by entry with ``+``.
State = tuple[Any, ...]


@dataclass(frozen=True)
class Estimator:
    """How the block of one group of layers is estimated.

    observe: ``(forms of the layers, examples counted) -> State``, a statistic that adds up over chunks, minibatches
    and machines. finish: ``(State, n) -> Block``, n being what the sum is divided by, usually the number of
    examples. centre: takes the outer product of the mean Jacobian, in flat parameters, off the block. refine: what
    estimates the block again in a second pass, given the first. by_example: whether all cotangents of few examples
    are cheaper to observe than few cotangents of all examples, because the inputs are looked at once. add: merges a
    state and what would be observed, in place, where both take much memory.
    """

    layers: tuple[Layer, ...]
    packing: Packing
    observe: Callable[[Sequence[LayerJacobian], int], State]
    finish: Callable[[State, float], Block]
    centre: Callable[[Block, Tensor], Block]
    refine: Callable[[Block], Estimator] | None = None
    by_example: bool = False
    add: Callable[[State, Sequence[LayerJacobian], int], State] | None = None


@dataclass(frozen=True)
class Samples:
    """Few vectors ``(N, d)`` whose second moment is a statistic: the moment itself would be larger, and of low rank."""

    rows: Tensor

    def __add__(self, other: Samples | Tensor) -> Samples | Tensor:
        if isinstance(other, Samples) and 2 * (len(self.rows) + len(other.rows)) <= self.rows.shape[1]:
            return Samples(torch.cat([self.rows, other.rows]))
        return self.moment().add_(other.moment() if isinstance(other, Samples) else other)

    def moment(self) -> Tensor:
        """The lower triangle of ``(1, d, d)``."""
        return forms.second_moment(self.rows.unsqueeze(1))


def merge(a: State, b: State) -> State:
    """The statistic of the union of what a and b saw."""
    return tuple(_add(x, y) for x, y in zip(a, b, strict=True))


def _add(x: Any, y: Any) -> Any:
    if isinstance(x, Tensor) and isinstance(y, Tensor):
        return x.add_(y)  # x is the accumulator: nobody else holds it
    if isinstance(x, Tensor) and isinstance(y, Samples):
        return x.add_(y.moment())
    return x if isinstance(y, int) and y == 0 else x + y


def fit(generator: Generator, examples: Any, estimators: Sequence[Estimator]) -> list[Part]:
    """One part for each estimator, in one pass over the examples, and a second one for those that refine."""
    if any(e.refine for e in estimators):
        require_repeatable(examples, "this representation")
    blocks, mean = _run(generator, examples, estimators)
    again = [k for k, e in enumerate(estimators) if e.refine is not None]
    if again:
        second = [estimators[k].refine(blocks[k]) for k in again]  # type: ignore[misc]
        refined, _ = _run(generator, examples, second)
        for k, block in zip(again, refined, strict=True):
            blocks[k] = block
    slices = generator.layer_collection.slices()
    parts = []
    for e, block in zip(estimators, blocks, strict=True):
        where = [slices[layer.name] for layer in e.layers]
        if mean is not None:
            block = e.centre(block, torch.cat([mean[layer.name] for layer in e.layers]))
        parts.append(Part(_runs(where), e.packing, block))
    return parts


def _run(
    generator: Generator, examples: Any, estimators: Sequence[Estimator]
) -> tuple[list[Block], dict[str, Tensor] | None]:
    """One pass: the blocks, and the mean Jacobian of each layer where the matrix is centred."""
    states: list[State | None] = [None] * len(estimators)
    mean: dict[str, Tensor] = {}
    total = 0.0
    with no_grad():
        by_example = all(e.by_example for e in estimators)
        for observation in generator.stream(examples, by_example=by_example, join=True):
            total += observation.weight
            states = [_updated(state, e, observation) for state, e in zip(states, estimators, strict=True)]
            if generator.centred:
                for e in estimators:
                    for layer in e.layers:
                        j = layer.packing.unpack(observation.forms[layer.name].total())
                        mean[layer.name] = mean[layer.name] + j if layer.name in mean else j
            del observation  # before the next one is made
        n = counted(total) if generator.mean else 1.0
        blocks = [e.finish(state, n) for e, state in zip(estimators, states, strict=True) if state is not None]
    return blocks, {name: j / n for name, j in mean.items()} if generator.centred else None


def _updated(state: State | None, estimator: Estimator, observation: Observation) -> State:
    js = [observation.forms[layer.name] for layer in estimator.layers]
    if state is not None and estimator.add is not None:
        return estimator.add(state, js, observation.n)
    new = estimator.observe(js, observation.n)
    return new if state is None else merge(state, new)


def _runs(where: Sequence[slice]) -> tuple[tuple[int, int], ...]:
    """Slices with neighbours joined."""
    runs: list[tuple[int, int]] = []
    for s in where:
        if runs and runs[-1][1] == s.start:
            runs[-1] = (runs[-1][0], s.stop)
        else:
            runs.append((s.start, s.stop))
    return tuple(runs)


def _flat(layers: Sequence[Layer]) -> Packing:
    return Packing.flat(sum(layer.numel() for layer in layers))


def dense(layers: Sequence[Layer]) -> Estimator:
    """The exact dense block of one or several layers, cross terms included."""
    places = [layer.packing.places for layer in layers]

    def add(state: State, js: Sequence[LayerJacobian], n: int) -> State:
        (total,) = state
        if not isinstance(total, Tensor):
            contraction = forms.Contraction.of(js, total)
            if contraction is not None:
                return (contraction,)
            total = None if total is None else total.matrix(places)  # minibatches so far had one position
        return (forms.gram(js, places, total),)

    def finish(state: State, n: float) -> Block:
        (total,) = state
        matrix = total.matrix(places) if isinstance(total, forms.Contraction) else forms.mirror(total)
        return Dense(matrix.div_(n))

    return Estimator(
        tuple(layers),
        _flat(layers),
        lambda js, n: add((None,), js, n),
        finish,
        lambda block, mean: Dense(block.data.sub_(torch.outer(mean, mean))),  # type: ignore[attr-defined]
        add=add,
    )


def diag(layer: Layer) -> Estimator:
    """The exact diagonal."""
    return Estimator(
        (layer,),
        _flat([layer]),
        lambda js, n: (js[0].square(),),
        lambda state, n: Diag(layer.packing.unpack(state[0].div_(n))),
        lambda block, mean: Diag((block.diag() - mean.square()).clamp(min=0)),
        by_example=True,
    )


def quasidiag(layer: Layer) -> Estimator:
    """The exact diagonal and products of each weight with the bias of its row; the diagonal for a layer without
    bias.
    """
    if not layer.packing.bias:
        return diag(layer)

    def centre(block: Block, mean: Tensor) -> Block:
        m = layer.packing.pack(mean)
        return QuasiDiag((block.diag() - m.square()).clamp(min=0), block.cross - m[..., :-1] * m[..., -1:])  # type: ignore[attr-defined]

    return Estimator(
        (layer,),
        layer.packing,
        lambda js, n: (js[0].square(), js[0].arrow()),
        lambda state, n: QuasiDiag(state[0].div_(n), state[1].div_(n)),
        centre,
        by_example=True,
    )


def lowrank(layers: Sequence[Layer]) -> Estimator:
    """The Jacobian itself, ``(C n, P)``: exact, of rank at most C n."""
    places = [layer.packing.places for layer in layers]

    def finish(state: State, n: float) -> Block:
        rows = torch.cat(state[0])
        return LowRank(rows.div_(n**0.5), rows.new_ones(len(rows)))

    def centre(block: Block, mean: Tensor) -> Block:
        less = LowRank(mean.unsqueeze(0), -mean.new_ones(1))
        return block.plus(less) or block

    return Estimator(
        tuple(layers),
        _flat(layers),
        lambda js, n: ([j.flatten(0, 1) for j in forms.rows(js, places)],),
        finish,
        centre,
    )


def exact_block(layer: Layer, representation: str) -> Estimator:
    """The dense block of a layer that has no Kronecker form, if it fits the memory budget."""
    exact, p = dense([layer]), layer.numel()

    def observe(js: Sequence[LayerJacobian], n: int) -> State:
        require(
            js[0].dtype.itemsize * p * p,
            f"{representation}: layer {layer.name!r} ({layer.kind_name}) has no Kronecker form, and its exact block of "
            f"{p} parameters",
            "give that layer another representation with PMatMixed.of, e.g. PMatDiag, or leave it out of the layer "
            "collection",
            js[0].device,
        )
        return exact.observe(js, n)

    return replace(exact, observe=observe)


def kron(layer: Layer, reduce: bool, thin: bool = True) -> Estimator:
    """KFAC: ``G (x) A``, the second moments of output gradients and of inputs.

    thin: A is held by the inputs themselves, where they are few.
    """

    def observe(js: Sequence[LayerJacobian], n: int) -> State:
        (j,) = js
        if not isinstance(j, forms.Outer | forms.Gather):
            raise ValueError(
                f"layer {layer.name!r}: the layer collection says that it has Kronecker factors, but the module of "
                "this model has not: build it with LayerCollection.from_model(model). The gradients of loss=OwnLoss() "
                "have none: give the loss as a function of the output, or use PMatDiag, PMatBlockDiag, PMatLowRank, ..."
            )
        left = j.left_factor(reduce)
        samples = j.right_samples(reduce) if n and thin and isinstance(j, forms.Outer) else None
        if samples is not None:
            return left, Samples(samples), len(samples)
        right, count = j.right_factor(reduce) if n else (0, 0)
        return left, right, count

    def finish(state: State, n: float) -> Block:
        left, right, count = state
        g = Dense(forms.mirror(left.div_(n)))
        if isinstance(right, Samples):
            rows = right.rows / count**0.5
            return Kron(g, LowRank(rows, rows.new_ones(len(rows))))
        a = right.div_(max(count, 1))
        return Kron(g, Diag(a) if a.ndim == 2 else Dense(forms.mirror(a)))

    def centre(block: Block, mean: Tensor) -> Block:
        raise NotImplementedError(
            f"layer {layer.name!r}: a centred covariance has no Kronecker factors; use PMatEKFAC, which is its exact "
            "diagonal in the Kronecker eigenbasis, or EmpiricalFisher, which is not centred"
        )

    return Estimator((layer,), layer.packing, observe, finish, centre)


def ekfac(layer: Layer, reduce: bool) -> Estimator:
    """EKFAC: the eigenbasis of KFAC, then in a second pass the exact second moments in it."""
    first = kron(layer, reduce, thin=not reduce)  # the span of averaged inputs does not hold the inputs
    return Estimator(
        first.layers,
        first.packing,
        first.observe,
        first.finish,
        lambda block, mean: second_moments(layer, block.eig().basis).centre(block, mean),  # type: ignore[attr-defined]
        lambda block: second_moments(layer, block.eig().basis),  # type: ignore[attr-defined]
    )


def second_moments(layer: Layer, basis: Block, elsewhere: bool = False) -> Estimator:
    """The exact diagonal in a given Kronecker basis.

    elsewhere: other data than the basis is of, so that there may be something outside of its span: the mean of that.
    """
    left, right = basis.left.transpose(), basis.right.transpose()  # type: ignore[attr-defined]
    to_left = None if not isinstance(left, Dense) else left.mv
    to_right = None if not isinstance(right, Dense) else right.mv

    def observe(js: Sequence[LayerJacobian], n: int) -> State:
        inside = forms.total_of(piece.rotate(to_left, to_right).square() for piece in js[0].pieces())
        return (inside, js[0].sqnorm().sum()) if elsewhere else (inside,)

    def finish(state: State, n: float) -> Block:
        l = state[0].div_(n)
        missing = prod(basis.shape) - l.numel()
        rest = l.new_zeros(())
        if elsewhere and missing:
            rest = (state[1] / n - l.sum()).clamp(min=0) / missing
        return Spectral(basis, l, rest)

    def centre(block: Block, mean: Tensor) -> Block:
        m = basis.transpose().mv(layer.packing.pack(mean))
        return Spectral(basis, (block.l - m.square()).clamp(min=0), block.rest)  # type: ignore[attr-defined]

    return Estimator((layer,), layer.packing, observe, finish, centre, by_example=True)


def eye(layers: Sequence[Layer]) -> Estimator:
    """The multiple of the identity with the exact trace."""
    packing = _flat(layers)
    (p,) = packing.shape
    return Estimator(
        tuple(layers),
        packing,
        lambda js, n: (torch.stack([j.sqnorm().sum() for j in js]).sum(),),
        lambda state, n: Eye(state[0] / (n * p), (p,)),
        lambda block, mean: Eye((block.c - mean.square().sum() / p).clamp(min=0), (p,)),  # type: ignore[attr-defined]
        by_example=True,
    )


def columns(operator: Block, start: int, stop: int) -> Iterator[tuple[int, Tensor]]:
    """The columns ``start:stop`` of a matrix known by its products, a few at a time: (first of them, ``(k, P)``)."""
    p = operator.numel
    step = chunk_length(4 * p * operator.dtype.itemsize, stop - start, operator.device)
    for first in range(start, stop, step):
        k = min(step, stop - first)
        units = torch.zeros(k, p, dtype=operator.dtype, device=operator.device)
        units[torch.arange(k), first + torch.arange(k)] = 1.0
        yield first, operator.mv(units)


def principal(operator: Block, start: int, stop: int) -> Tensor:
    """The diagonal sub-block of the coordinates ``start:stop``, by as many products."""
    block = torch.cat([rows[:, start:stop] for _, rows in columns(operator, start, stop)])
    return (block + block.T) / 2


def diagonal(operator: Block) -> Tensor:
    """The diagonal, by P products."""
    pieces = [rows[:, first:].diagonal() for first, rows in columns(operator, 0, operator.numel)]
    return torch.cat(pieces)
