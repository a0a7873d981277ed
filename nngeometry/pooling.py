"""Statistics of several processes as one: a sum over all ranks for each block, by one collective."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from . import forms
from .estimation import Estimator, OfJacobians
from .sums import Contracted, Rows, Samples, State, Sums
from .team import Team


class Entry(NamedTuple):
    """One entry of a statistic, without its values.

    kind: "sum" of a tensor that adds up entry by entry, "number", "samples" and "rows" of what is laid end to end, or
    "contracted". shapes: of its tensors; of rows the length of one. many: of rows, how many; of a number, its value.
    other: what else it consists of.
    """

    kind: str
    shapes: tuple[tuple[int, ...], ...]
    dtype: torch.dtype | None
    many: float = 0
    other: Any = None


Outline = tuple[Entry, ...]


def _entry(x: Any) -> Entry:
    if isinstance(x, Tensor):
        return Entry("sum", (tuple(x.shape),), x.dtype)
    if isinstance(x, Samples):
        return Entry("samples", ((x.rows.shape[1],),), x.rows.dtype, len(x.rows))
    if isinstance(x, Rows):
        return Entry("rows", ((x.pieces[0].shape[1],),), x.pieces[0].dtype, sum(map(len, x.pieces)), x.most)
    if isinstance(x, Contracted):
        pairs = x.contraction.pairs
        shapes = tuple(tuple(pair.shape) for pair in pairs.values())
        of = [tuple(shape) for shape in x.contraction.shapes]
        return Entry("contracted", shapes, next(iter(pairs.values())).dtype, 0, (of, list(pairs)))
    return Entry("number", (), None, x)


def _outline(state: State | None) -> Outline | None:
    return None if state is None else tuple(map(_entry, state))


def outline(sums: Sums) -> Any:
    """What a rank has seen, without the tensors."""
    refined = {k: _outline(state) for k, state in sums.refined.items()}
    return list(map(_outline, sums.states)), refined, sums.weight, sums.seen


def merged(
    team: Team,
    own: Sums,
    estimation: OfJacobians,
    estimators: Mapping[int, Estimator],
    refining: Mapping[int, Estimator],
    outlines: Sequence[Any],
) -> Sums:
    """What all ranks have seen, on all of them: one collective for each block, and one for the mean where the matrix
    is centred. own: what this rank has seen, which is taken over. outlines: of every rank.
    """
    device = estimation.source.device
    new = Sums.nothing(len(own.states))
    for k, e in estimators.items():
        if own.states[k] is not None or any(of[0][k] is not None for of in outlines):
            new.states[k] = _state(team, e, own.states[k], [of[0][k] for of in outlines], device)
    for k, e in refining.items():
        there = [of[1].get(k) for of in outlines]
        if any(of is not None for of in there):
            new.refined[k] = _state(team, e, own.refined.get(k), there, device)
    new.weight, new.seen = (sum(of[at] for of in outlines) for at in (2, 3))
    if estimation.source.centred and estimators:
        new.means = _means(team, own.means, estimation)
    return new


def joined(a: Sums, b: Sums, estimators: Mapping[int, Estimator], refining: Mapping[int, Estimator]) -> Sums:
    """What was seen before and after, both of which are taken over."""
    new = Sums(list(a.states), dict(a.refined), dict(a.means), a.weight + b.weight, a.seen + b.seen)
    for k, e in estimators.items():
        x, y = a.states[k], b.states[k]
        new.states[k] = y if x is None else x if y is None else e.merged(x, y)
    for k, e in refining.items():
        if k in b.refined:
            new.refined[k] = e.merged(a.refined[k], b.refined[k]) if k in a.refined else b.refined[k]
    for name, mean in b.means.items():
        new.means[name] = a.means[name] + mean if name in a.means else mean
    return new


def _means(team: Team, own: dict[str, Tensor], estimation: OfJacobians) -> dict[str, Tensor]:
    layers = [layer for e in estimation.estimators for layer in e.layers]
    like = torch.zeros(0, dtype=estimation.source.dtype, device=estimation.source.device)
    flat = torch.cat([own[x.name] if x.name in own else like.new_zeros(x.numel()) for x in layers])
    pieces = team.add(flat).split([layer.numel() for layer in layers])
    return {layer.name: piece for layer, piece in zip(layers, pieces, strict=True)}


def _state(
    team: Team, estimator: Estimator, state: State | None, outlines: Sequence[Outline | None], device: torch.device
) -> State:
    """The statistic of a block of all ranks. Where some hold it as what it is made of and others do not, all do as
    these; those who have seen nothing add nothing.
    """
    target = _target([of for of in outlines if of is not None])
    if state is None:
        state = _nothing(target, device)
    elif _kinds(_outline(state)) != _kinds(target):
        state = estimator.merged(state, _nothing(target, device))
    counts = [[of[k].many if of is not None else 0 for of in outlines] for k in range(len(target))]
    pieces = [_pieces(x, rows, team.rank) for x, rows in zip(state, counts, strict=True)]
    flat = [piece for of_one in pieces for piece in of_one]
    if len(flat) == 1:
        added = [team.add(flat[0].contiguous())]
    else:
        total = team.add(torch.cat([piece.reshape(-1) for piece in flat])) if flat else None
        sizes = [piece.numel() for piece in flat]
        found = [] if total is None else total.split(sizes)
        added = [x.view(piece.shape) for x, piece in zip(found, flat, strict=True)]
    remaining = iter(added)
    return tuple(
        _remade(entry, [next(remaining) for _ in of_one], sum(rows))
        for entry, of_one, rows in zip(target, pieces, counts, strict=True)
    )


def _target(present: Sequence[Outline]) -> Outline:
    """How the sum is held: as few as possible of its entries by what they are made of."""
    found = max(present, key=lambda of: sum(entry.kind == "sum" for entry in of))
    return tuple(_summed(entry, [of[k] for of in present]) for k, entry in enumerate(found))


def _summed(entry: Entry, there: Sequence[Entry]) -> Entry:
    if entry.kind != "samples" or 2 * sum(other.many for other in there) <= entry.shapes[0][0]:
        return entry
    (size,) = entry.shapes[0]
    return Entry("sum", ((1, size, size),), entry.dtype)


def _kinds(of: Outline | None) -> list[Any]:
    assert of is not None
    return [(entry.kind, entry.shapes, entry.other) for entry in of]


def _nothing(target: Outline, device: torch.device) -> State:
    """The statistic of no example."""

    def zero(entry: Entry) -> Any:
        if entry.kind == "number":
            return 0
        if entry.kind in ("samples", "rows"):
            rows = torch.zeros(0, *entry.shapes[0], dtype=entry.dtype, device=device)
            return Samples(rows) if entry.kind == "samples" else Rows([rows], entry.other)
        zeros = [torch.zeros(shape, dtype=entry.dtype, device=device) for shape in entry.shapes]
        return zeros[0] if entry.kind == "sum" else _contracted(entry, zeros)

    return tuple(map(zero, target))


def _contracted(entry: Entry, tensors: Sequence[Tensor]) -> Contracted:
    shapes, keys = entry.other
    return Contracted(forms.Contraction(shapes, dict(zip(keys, tensors, strict=True))))


def _pieces(x: Any, counts: Sequence[float], rank: int) -> list[Tensor]:
    """The tensors of an entry that are added up: of rows, those of all ranks, with zeros for those of the others."""
    if isinstance(x, Tensor):
        return [x]
    if isinstance(x, Contracted):
        return list(x.contraction.pairs.values())
    if not isinstance(x, Samples | Rows):
        return []
    rows = x.rows if isinstance(x, Samples) else torch.cat(x.pieces)
    before = int(sum(counts[:rank]))
    out = rows.new_zeros(int(sum(counts)), rows.shape[1])
    out[before : before + len(rows)] = rows
    return [out]


def _remade(entry: Entry, tensors: list[Tensor], count: float) -> Any:
    if entry.kind == "number":
        return count
    if entry.kind == "contracted":
        return _contracted(entry, tensors)
    if entry.kind == "samples":
        return Samples(tensors[0])
    return Rows(tensors, entry.other) if entry.kind == "rows" else tensors[0]
