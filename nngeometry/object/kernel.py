"""Inner products of Jacobians of examples, ``J M J'^T``, minibatch by minibatch and layer by layer."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from math import prod
from typing import Any, TypeVar

import torch
from torch import Tensor

from .. import forms
from ..blocks import Block, Diag, DirectSum, Eye, Kron, Part, Spectral
from ..changes import no_grad, unrecorded
from ..forms import LayerJacobian, Outer
from ..generator import Generator, Plan
from ..kinds import Packing
from ..layercollection import Layer, LayerCollection
from ..memory import budget, require, slices
from ..model import data
from ..team import Team
from .kernel_layouts import Layout

Forms = dict[str, LayerJacobian]
Item = TypeVar("Item")
#: From the name of a matrix and the examples of a tile to where its values ``(G, r, c)`` are made.
Place = Callable[[str, slice, slice], Tensor]


@dataclass(frozen=True)
class BatchJacobian:
    """The Jacobians of neighbouring examples under all cotangents, layer by layer.

    f: the outputs of the model ``(B, *out)``, where it has just been run.
    """

    examples: int
    outputs: int
    forms: Forms
    f: Tensor | None = None

    def narrow(self, start: int, stop: int) -> BatchJacobian:
        """The examples ``start:stop``."""
        return BatchJacobian(
            stop - start, self.outputs, {name: f.narrow(start, stop, 0, None) for name, f in self.forms.items()}
        )


def batch_jacobians(
    generator: Generator, examples: Any, plan: Plan | None = None, by_example: bool = False
) -> Iterator[BatchJacobian]:
    """One slab for each minibatch, or by example for a few examples at a time (:meth:`Generator.stream`), all with as
    many outputs. It is not kept here: who lets go of it before asking for the next one holds one at a time.
    """
    chunks: list[Forms] = []
    n, outputs = 0, None
    for observation in without_grad(generator.stream(examples, plan, by_example)):
        n = observation.n or n
        chunks.append(observation.forms)
        f, last = observation.outputs, observation.last
        del observation
        if last:
            outputs = _same_outputs(sum(next(iter(chunk.values())).cotangents for chunk in chunks), outputs)
            yield _slab(n, chunks, f)


def _same_outputs(found: int, outputs: int | None) -> int:
    """How many outputs a slab has. Raises ``ValueError`` if those before had others."""
    if outputs not in (None, found):
        raise ValueError(
            f"the minibatches have different numbers of outputs, {outputs} and {found}: give them as many, or "
            "let function= return as many for all"
        )
    return found


def without_grad(items: Iterator[Item]) -> Iterator[Item]:
    """The items, each made outside of autograd and not kept. Between them the mode is the caller's, also of one who
    stops early.
    """
    end = object()
    while True:
        with no_grad():
            item: Any = next(items, end)
        if item is end:
            return
        yield item
        del item


@unrecorded
def _slab(n: int, chunks: list[Forms], f: Tensor) -> BatchJacobian:
    """Of the chunks, which are taken out of the list."""
    taken, chunks[:] = chunks[:], []
    joined = {name: forms.stack([chunk[name] for chunk in taken]) for name in taken[0]}
    return BatchJacobian(n, next(iter(joined.values())).cotangents, joined, f)


@dataclass(frozen=True)
class Sides:
    """A slab as it is on the left and on the right of inner products."""

    left: BatchJacobian
    right: BatchJacobian


@unrecorded
def sides(slab: BatchJacobian, metric: Block | None, layer_collection: LayerCollection, examples: int) -> Sides:
    """The two sides of ``J M J'^T``, kept as is best for inner products with that many examples."""

    def prepared(found: Forms) -> BatchJacobian:
        kept = {name: form.prepared(examples) for name, form in found.items()}
        return BatchJacobian(slab.examples, slab.outputs, kept)

    if metric is None:
        kept = prepared(slab.forms)
        return Sides(kept, kept)
    left, right = _through(metric, slab.forms, layer_collection)
    return Sides(prepared(left), prepared(right))


def predicted_bytes(slab: BatchJacobian, metric: Block | None, examples: int) -> int:
    """About what :func:`sides` will hold for this slab."""
    total = 0
    for form in slab.forms.values():
        dense = form.cotangents * form.examples * prod(form.shape) * form.dtype.itemsize
        own = form.prepared(examples).nbytes()
        total += own if metric is None else own + max(own, dense)
    return total


@unrecorded
def through(matrix: Any, found: Forms) -> tuple[Forms, Forms]:
    """J and J' such that the inner products of J with J' are those of the given Jacobian with itself through a PMat."""
    return _through(matrix.root, found, matrix.layer_collection)


@unrecorded
def images(matrix: Any, found: Forms) -> Forms:
    """M J through a PMat. What :func:`through` leaves in an eigenbasis is turned back, so that what it meets need not
    be turned: for few examples on this side and many on the other.
    """
    out: Forms = {}
    for part, layers in _parts(matrix.root, matrix.layer_collection):
        right = _right_of(part, layers, found, _left_of(part, layers, found))
        for name, layer in layers.items():
            basis = _basis(part, layer, found[name])
            out[name] = right[name] if basis is None else _rotated(right[name], basis)
    return out


def check_separate(matrix: Any) -> None:
    """Raise ``ValueError`` if a PMat has a block over several layers."""
    if matrix.couples_layers:
        raise ValueError(
            "GramMatrix: the metric couples layers, so there are no kernels of layers that sum to the whole: use "
            "per_layer=False, or a metric with a block for each layer (PMatBlockDiag, PMatKFAC, ...)"
        )


@unrecorded
def within_examples(matrix: Any, slab: BatchJacobian, full: bool) -> Tensor:
    """``J M J^T`` of the outputs of each example through a PMat (None: the identity): ``(C, C, b)``, or its diagonal
    ``(C, b)`` unless full. What is made of the Jacobian stays in its form where the matrix lets it.
    """
    terms = [one.own(two, weight, full) for one, two, weight in _factors(matrix, slab)]
    return torch.stack(terms).sum(0) if len(terms) > 1 else terms[0]


def example_bytes(matrix: Any, two: BatchJacobian, full: bool) -> int:
    """About what one more example takes in :func:`within_examples`, given two."""
    held = [f.nbytes() - f.narrow(0, 1).nbytes() for pair in _factors(matrix, two) for f in pair[:2]]
    entries = two.outputs**2 if full else two.outputs
    return sum(held) + entries * next(iter(two.forms.values())).dtype.itemsize


def _factors(matrix: Any, slab: BatchJacobian) -> Iterator[tuple[LayerJacobian, LayerJacobian, Tensor | None]]:
    """J, J' and w such that ``J M J^T`` is the sum of the ``J (w J')^T``."""
    if matrix is None:
        yield from ((form, form, None) for form in slab.forms.values())
        return
    for part, layers in _parts(matrix.root, matrix.layer_collection):
        if len(layers) > 1:
            images = _mapped(part, layers, slab.forms)
            yield from ((slab.forms[name], images[name], None) for name in layers)
            continue
        ((name, layer),) = layers.items()
        form, block = slab.forms[name], part.block
        basis = _basis(part, layer, form)
        if basis is not None:
            turned = _rotated(form, basis.transpose())
            yield turned, turned, block.l  # type: ignore[attr-defined]
        elif _spans_rows(part, layer, form):
            right = block.basis.right  # type: ignore[attr-defined]
            inside = _rotated(form, block.basis.transpose())  # type: ignore[attr-defined]
            yield inside, inside, block.l  # type: ignore[attr-defined]
            # Apart, since what is outside may count for far more than what is inside.
            outside = form.rotate(None, lambda a, right=right: _outside(_outside(a, right), right))  # type: ignore[misc]
            yield outside, outside.scale(float(block.rest)), None  # type: ignore[attr-defined]
        elif isinstance(block, Diag) and part.packing.view is None:
            yield form, form, layer.packing.pack(block.d)
        else:
            yield form, _right_of_one(part, layer, form, form), None


def _through(metric: Block, found: Forms, layer_collection: LayerCollection) -> tuple[Forms, Forms]:
    left: Forms = {}
    right: Forms = {}
    for part, layers in _parts(metric, layer_collection):
        mine = _left_of(part, layers, found)
        left |= mine
        right |= _right_of(part, layers, found, mine)
    return left, right


def _left_of(part: Part, layers: Mapping[str, Layer], found: Forms) -> Forms:
    """The left sides for the layers of a part."""
    bases = {name: _basis(part, layer, found[name]) for name, layer in layers.items()}
    return {name: found[name] if b is None else _rotated(found[name], b.transpose()) for name, b in bases.items()}


def _parts(metric: Block, layer_collection: LayerCollection) -> Iterator[tuple[Part, dict[str, Layer]]]:
    """The parts of a matrix, each with the layers that it acts on."""
    slices = layer_collection.slices()
    for part in metric.parts if isinstance(metric, DirectSum) else (_whole(metric),):
        mine = [n for n, s in slices.items() if any(a <= s.start and s.stop <= b for a, b in part.slices)]
        yield part, {n: layer_collection[n] for n in mine}


def _basis(part: Part, layer: Layer, form: LayerJacobian) -> Kron | None:
    """The Kronecker eigenbasis in which a part is diagonal and a form stays one."""
    block = part.block
    if not form.rotates or part.packing != layer.packing or not isinstance(block, Spectral):
        return None
    return block.basis if isinstance(block.basis, Kron) and block.l.shape == block.shape else None


def _spans_rows(part: Part, layer: Layer, form: LayerJacobian) -> bool:
    """Whether a part is diagonal in a Kronecker basis of all rows and some directions of the columns."""
    block = part.block
    if not isinstance(form, Outer) or part.packing != layer.packing or not isinstance(block, Spectral):
        return False
    return isinstance(block.basis, Kron) and block.l.shape[:-1] == block.shape[:-1]


def _outside(a: Tensor, basis: Block) -> Tensor:
    """What is orthogonal to the columns of a basis."""
    return a - basis.mv(basis.transpose().mv(a))


def _whole(metric: Block) -> Part:
    (p,) = metric.shape
    return Part(((0, p),), Packing.flat(p), metric)


def _right_of(part: Part, layers: Mapping[str, Layer], found: Forms, left: Forms) -> Forms:
    """The right sides for the layers of a part."""
    if len(layers) > 1:
        return _mapped(part, layers, found)
    ((name, layer),) = layers.items()
    return {name: _right_of_one(part, layer, found[name], left[name])}


def _right_of_one(part: Part, layer: Layer, form: LayerJacobian, left: LayerJacobian) -> LayerJacobian:
    """The right side for one layer. Kronecker products act on the factors of a form, so that it stays one."""
    block = part.block
    if _basis(part, layer, form) is not None:
        return left.weighted(block.l)  # type: ignore[attr-defined]
    if isinstance(block, Eye):
        return form.scale(float(block.c))
    if isinstance(block, Diag) and part.packing.view is None:
        return form.weighted(layer.packing.pack(block.d))
    if isinstance(block, Kron) and form.rotates and part.packing == layer.packing:
        return _rotated(form, block)
    return _mapped(part, {layer.name: layer}, {layer.name: form})[layer.name]


def _rotated(form: LayerJacobian, kron: Kron) -> LayerJacobian:
    """``(left (x) right) J``."""
    left, right = kron.left, kron.right
    out = form if isinstance(left, Eye) and float(left.c) == 1 else form.rotate(left.mv, None)
    if isinstance(right, Diag):
        return out.weighted(right.d.unsqueeze(1))
    if isinstance(right, Eye):
        return out.scale(float(right.c))
    return out.rotate(None, right.mv)


def _mapped(part: Part, layers: Mapping[str, Layer], found: Forms) -> Forms:
    """M J for a part of any structure, dense."""
    flat = dense_rows(found, layers)
    packed = part.packing.pack(flat)
    image = part.block.mv(packed.reshape(*flat.shape[:2], *part.block.shape))
    return dense_forms(part.packing.unpack(image.reshape(packed.shape)), layers)


def dense_rows(found: Mapping[str, LayerJacobian], layers: Mapping[str, Layer]) -> Tensor:
    """The Jacobian of layers side by side: ``(C, B, P)``."""
    return forms.dense_rows([found[name] for name in layers], _places(layers))


def _places(layers: Mapping[str, Layer]) -> list[forms.ColumnViews]:
    return [layer.packing.places for layer in layers.values()]


def stacked_rows(
    found: Iterable[BatchJacobian], layer_collection: LayerCollection, examples: int, what: str, remedy: str
) -> Tensor:
    """The Jacobian of slabs, one after the other, ``(C, n, P)``. Raises ``MemoryError`` if that does not fit."""
    layers = layer_collection.layers
    start = 0
    out: Tensor | None = None
    for slab in found:
        if out is None:
            form = next(iter(slab.forms.values()))
            shape = slab.outputs, examples, layer_collection.numel()
            require(prod(shape) * form.dtype.itemsize, what, remedy, form.device)
            out = torch.empty(shape, dtype=form.dtype, device=form.device)
        with no_grad():  # not around the loop: generators that are not finished share its mode
            mine = [slab.forms[name] for name in layers]
            forms.write_rows(mine, _places(layers), out[:, start : start + slab.examples])
        start += slab.examples
        del slab, mine
    assert out is not None
    return out


def dense_forms(rows: Tensor, layers: Mapping[str, Layer]) -> Forms:
    """The inverse of :func:`dense_rows`."""
    pieces = rows.split([layer.numel() for layer in layers.values()], -1)
    return {
        name: forms.Dense(layer.packing.pack(piece))
        for (name, layer), piece in zip(layers.items(), pieces, strict=True)
    }


def tile(
    one: BatchJacobian, other: BatchJacobian, layout: Layout, names: Sequence[str], out: Tensor | None = None
) -> Tensor:
    """The inner products of two slabs over some layers, as the layout has matrices ``(G, r, c)``; made in out."""
    if out is None:
        out = layout.of_examples(one.examples, other.examples).empty(next(iter(one.forms.values())))
    out.zero_()
    for name in names:
        layout.add(one.forms[name], other.forms[name], out)
    return out


def symmetric_tile(
    one: BatchJacobian, other: BatchJacobian, layout: Layout, names: Sequence[str], out: Tensor
) -> Tensor:
    """:func:`tile` of the two sides of the same examples under a symmetric matrix: symmetric to the bit, and made in
    panels of rows up to the diagonal, for little more than half of the products.
    """
    n = one.examples
    step = max(-(-n // _PANELS), -(-_ROWS * n // out.shape[1]))
    for b in slices(n, step):
        g, rows, cols = layout.where(b, slice(0, b.stop))
        tile(one.narrow(b.start, b.stop), other.narrow(0, b.stop), layout, names, out[g, rows, cols])
        square = out[g, rows, rows]
        out[g, rows, rows] = (square + square.mT) / 2
        before = slice(0, rows.start)
        forms.copy_transposed(out[g, rows, before], out[g, before, rows])
    return out


#: Panels of a symmetric tile, and how many rows they have at least, so that matrix products run at speed.
_PANELS, _ROWS = 8, 128
#: Entries of a Jacobian that are made at a time.
_PIECE = 2**19


class KernelSide:
    """One side of a kernel: minibatches, held in memory, whose Jacobians are made again where they do not fit.

    generator: of the Jacobians. batches: as the generator takes them. matrix: a PMat between the sides. partners: how
    many examples the other side has. limit: bytes that the Jacobians of neighbouring minibatches may take. runs:
    neighbouring minibatches that fit together, each with which examples it is.
    """

    def __init__(
        self, generator: Generator, batches: Sequence[data.Batch], matrix: Any, partners: int, limit: int
    ) -> None:
        self.generator = generator
        self.metric: Block | None = None if matrix is None else matrix.root
        self.partners = partners
        self.plan = generator.examine(batches[0])
        self.batches = batches = data.Minibatches(map(self.plan.read, batches))
        one = next(batch_jacobians(generator, data.Minibatches([data.take(batches[0], torch.arange(1))]), self.plan))
        self.outputs = one.outputs
        self.dtype, self.device = generator.dtype, generator.device
        each = max(1, predicted_bytes(one, self.metric, partners))
        tile = budget(self.device) // 16 // self.dtype.itemsize  # entries
        self.runs = _runs(batches, max(1, limit // each), max(1, int(tile**0.5) // self.outputs))

    def where(self, run: int) -> list[slice]:
        """Which examples the minibatches of a run are."""
        return [where for where, _ in self.runs[run]]

    def make(self, run: int) -> list[tuple[slice, Sides]]:
        """The Jacobians of a run of minibatches, each with which examples they are."""
        found = batch_jacobians(self.generator, data.Minibatches(batch for _, batch in self.runs[run]), self.plan)
        lc = self.generator.layer_collection
        made = []
        for where, slab in zip(self.where(run), found, strict=True):
            _same_outputs(slab.outputs, self.outputs)
            made.append((where, sides(slab, self.metric, lc, self.partners)))
        return made


def _runs(batches: Sequence[data.Batch], most: int, piece_most: int) -> list[list[tuple[slice, data.Batch]]]:
    """Neighbouring minibatches of at most ``most`` examples together, each with which examples it is.

    Minibatches of more examples than that or than ``piece_most`` are split.
    """
    runs: list[list[tuple[slice, data.Batch]]] = []
    start = held = 0
    for batch in batches:
        n = data.count(batch)
        pieces = -(-n // min(most, piece_most))
        size = -(-n // pieces)
        for first in range(0, n, size):
            m = min(size, n - first)
            piece = batch if pieces == 1 else data.take(batch, torch.arange(first, first + m))
            if not runs or held + m > most:
                runs.append([])
                held = 0
            runs[-1].append((slice(start, start + m), piece))
            held += m
            start += m
    return runs


@dataclass(frozen=True)
class Kernel:
    """What a kernel is to be made of.

    right: None if it is that of the left side with itself, and symmetric. groups: which layers make one matrix, by
    name. scale: a factor of all entries.
    """

    left: KernelSide
    right: KernelSide | None
    layout: Layout
    groups: dict[str, tuple[str, ...]]
    scale: float = 1.0

    def tiles(self, place: Place, done: Callable[[slice, slice], bool] = lambda b, e: False) -> Iterator[Tile]:
        """Tiles that cover it (only those on and below the diagonal if it is symmetric), less those that are done.

        place: where each is made.
        """
        other = self.left if self.right is None else self.right
        for i in range(len(self.left.runs)):
            rows: list[tuple[slice, Sides]] = []
            for j in range(len(other.runs) if self.right is not None else i + 1):
                wanted = {
                    (b.start, e.start)
                    for b in self.left.where(i)
                    for e in other.where(j)
                    if (self.right is not None or e.start <= b.start) and not done(b, e)
                }
                if wanted:
                    rows = rows or self.left.make(i)
                    cols = rows if self.right is None and i == j else other.make(j)
                    yield from self._between(rows, cols, wanted, place)
                    del cols  # before the next ones are made

    def _between(
        self,
        rows: list[tuple[slice, Sides]],
        cols: list[tuple[slice, Sides]],
        wanted: set[tuple[int, int]],
        place: Place,
    ) -> Iterator[Tile]:
        for b, one in rows:
            for e, two in cols:
                if (b.start, e.start) in wanted:
                    make = symmetric_tile if self.right is None and b == e else tile
                    outs = {group: place(group, b, e) for group in self.groups}
                    with no_grad():
                        for group, out in outs.items():
                            make(one.left, two.right, self.layout, self.groups[group], out)
                            if self.scale != 1:
                                out *= self.scale
                    yield Tile(b, e, outs)

    def of_others(self, team: Team, done: Callable[[slice, slice], bool]) -> Callable[[slice, slice], bool]:
        """Which tiles a rank leaves out: those that are done, and those of the other ranks, by turns.

        Raises:
            ValueError: If the ranks have other tiles.
        """
        if team.size == 1:
            return done
        other = self.left if self.right is None else self.right
        every = [
            (b, e)
            for i in range(len(self.left.runs))
            for j in range(len(other.runs) if self.right is not None else i + 1)
            for b in self.left.where(i)
            for e in other.where(j)
            if (self.right is not None or e.start <= b.start) and not done(b, e)
        ]
        places = [(b.start, b.stop, e.start, e.stop) for b, e in every]
        if any(there != places for there in team.exchange(places)):
            raise ValueError(
                "process_group: the ranks cut the kernel into different tiles: give them the same memory_budget"
            )
        mine = {(b.start, e.start) for b, e in every[team.rank :: team.size]}
        return lambda b, e: (b.start, e.start) not in mine

    def count(self) -> int:
        """How many tiles there are."""
        n = sum(map(len, self.left.runs))
        return n * (n + 1) // 2 if self.right is None else n * sum(map(len, self.right.runs))


@dataclass(frozen=True)
class Tile:
    """The entries of some examples with others, ``(G, r, c)`` for each group of layers."""

    rows: slice
    cols: slice
    values: dict[str, Tensor]
