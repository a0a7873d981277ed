"""How each structure is estimated: from Jacobians, or from products with a matrix."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from itertools import accumulate
from math import prod
from typing import Any

import torch
from torch import Tensor

from .. import forms
from ..blocks import (
    AxisKron,
    Block,
    Dense,
    Diag,
    DirectSum,
    Eye,
    Kron,
    LowRank,
    Part,
    QuasiDiag,
    Spectral,
    nearest_product,
)
from ..estimation import Estimator, Refinement
from ..forms import Beside, LayerJacobian
from ..kinds import Packing
from ..layercollection import Layer
from ..memory import budget, chunk_length, require
from ..sums import Contracted, Rows, Samples, State, merge


def _flat(layers: Sequence[Layer]) -> Packing:
    return Packing.flat(sum(layer.numel() for layer in layers))


def dense(layers: Sequence[Layer]) -> Estimator:
    """The exact dense block of one or several layers, cross terms included.

    Args:
        layers: The layers.
    """
    places = [layer.packing.places for layer in layers]

    def add(state: State, js: Sequence[LayerJacobian], n: int) -> State:
        (total,) = state
        if not isinstance(total, Tensor):
            contraction = forms.Contraction.of(js, None if total is None else total.contraction)
            if contraction is not None:
                return (Contracted(contraction),)
            total = None if total is None else expanded(total)  # minibatches so far had one position
        return (forms.gram(js, places, total),)

    def expanded(total: Tensor | Contracted) -> Tensor:
        return total if isinstance(total, Tensor) else total.contraction.matrix(places)

    def merged(a: State, b: State) -> State:
        if isinstance(a[0], Contracted) and isinstance(b[0], Contracted):
            return merge(a, b)
        return merge((expanded(a[0]),), (expanded(b[0]),))

    def finish(state: State, n: float) -> Block:
        (total,) = state
        matrix = forms.mirror(total) if isinstance(total, Tensor) else expanded(total)
        return Dense(matrix.div_(n))

    return Estimator(
        tuple(layers),
        _flat(layers),
        lambda js, n: add((None,), js, n),
        finish,
        lambda block, mean: Dense(block.data.sub_(torch.outer(mean, mean))),  # type: ignore[attr-defined]
        add=add,
        merge=merged,
    )


def diag(layer: Layer) -> Estimator:
    """The exact diagonal of one layer.

    Args:
        layer: The layer.
    """
    return Estimator(
        (layer,),
        _flat([layer]),
        lambda js, n: (js[0].square(),),
        lambda state, n: Diag(layer.packing.unpack(state[0].div_(n))),
        lambda block, mean: Diag((block.diag() - mean.square()).clamp(min=0)),
        by_example=True,
    )


def quasidiag(layer: Layer) -> Estimator:
    """The exact diagonal of one layer and the products of each weight with the bias of its row; the diagonal if it has
    no bias.

    Args:
        layer: The layer.
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


def lowrank(layers: Sequence[Layer], rows: int | None = None) -> Estimator:
    """The Jacobian itself of one or several layers, ``(C n, P)``: exact, of rank at most C n.

    Args:
        layers: The layers.
        rows: How many rows are kept at least, all if None, the default.
    """
    places = [layer.packing.places for layer in layers]
    most = rows

    def finish(state: State, n: float) -> Block:
        rows = torch.cat(state[0].pieces)
        return LowRank(rows.div_(n**0.5), rows.new_ones(len(rows)))

    def centre(block: Block, mean: Tensor) -> Block:
        less = LowRank(mean.unsqueeze(0), -mean.new_ones(1))
        return block.plus(less) or block

    return Estimator(
        tuple(layers),
        _flat(layers),
        lambda js, n: (Rows([j.flatten(0, 1) for j in forms.rows(js, places)], most),),
        finish,
        centre,
    )


def exact_block(layer: Layer, representation: str) -> Estimator:
    """The dense block of a layer that has no Kronecker form, if it fits the memory budget.

    Args:
        layer: The layer.
        representation: What it is for, for the message.

    Raises:
        MemoryError: When it is estimated, if it does not fit.
    """
    exact, p = dense([layer]), layer.numel()

    def observe(js: Sequence[LayerJacobian], n: int) -> State:
        require(
            js[0].dtype.itemsize * p * p,
            f"{representation}: layer {layer.name!r} ({layer.kind_name}) has no Kronecker form, and its exact block of "
            f"{p} parameters",
            "leave dense= out, by which it has a Kronecker product over the axes of each parameter, or give it another "
            "representation with PMatMixed.of, e.g. PMatDiag",
            js[0].device,
        )
        return exact.observe(js, n)

    return replace(exact, observe=observe)


def block_or_axes(layer: Layer) -> Estimator:
    """The exact dense block of a layer that has no Kronecker form, if it fits the memory budget; otherwise a Kronecker
    product for each of its linear maps, if it consists of such (:func:`maps`), or over the axes of each parameter
    (:func:`axes`).

    Args:
        layer: The layer.
    """
    exact, by_axes, by_maps, p = dense([layer]), axes(layer), maps(layer), layer.numel()

    def of(state: State) -> Estimator:
        return exact if _is_exact(state) else by_maps if len(state) % 2 else by_axes

    def fits(j: LayerJacobian) -> bool:
        return j.dtype.itemsize * p * p <= budget(j.device)

    def observe(js: Sequence[LayerJacobian], n: int) -> State:
        if fits(js[0]):
            return exact.observe(js, n)
        one_group = isinstance(js[0], Beside) and all(m.form.shape[0] == 1 for m in js[0].maps)
        return (by_maps if one_group else by_axes).observe(js, n)

    def add(state: State, js: Sequence[LayerJacobian], n: int) -> State:
        if _is_exact(state):
            assert exact.add is not None
            return exact.add(state, js, n)
        return of(state).merged(state, of(state).observe(js, n))

    def finish(state: State, n: float) -> Block:
        return of(state).finish(state, n)

    def centre(block: Block, mean: Tensor) -> Block:
        if isinstance(block, Dense) and exact.centre is not None:
            return exact.centre(block, mean)
        raise NotImplementedError(
            f"layer {layer.name!r} ({layer.kind_name}): a centred covariance has no Kronecker factors, and its exact "
            "block does not fit the memory budget: use PMatDiag for it, or EmpiricalFisher, which is not centred"
        )

    def merged(a: State, b: State) -> State:
        if _is_exact(a) != _is_exact(b):
            raise ValueError(
                f"layer {layer.name!r} ({layer.kind_name}): one of the two has its exact block and the other one a "
                "Kronecker product over axes: estimate both under the same nngeometry.memory_budget"
            )
        return of(a).merged(a, b)

    return Estimator((layer,), exact.packing, observe, finish, centre, add=add, merge=merged)


def maps(layer: Layer) -> Estimator:
    """A Kronecker product for each linear map of a layer that consists of several, as recurrent layers and experts do:
    KFAC of each, a bias as a column of its weight. Different maps are independent.

    Args:
        layer: The layer, whose weights are ``(rows, cols)`` or, of several maps, ``(maps, rows, cols)``; a bias is
            named as its weight is, ``bias`` in the place of ``weight``.
    """
    names = {name: k for k, (name, _) in enumerate(layer.params)}
    shapes = [_rows_and_columns(shape) for _, shape in layer.params]
    starts = [0, *accumulate(map(prod, shapes))]
    pairs = [
        (k, names.get(name.replace("weight", "bias")) if "weight" in name else None)
        for name, k in names.items()
        if len(layer.params[k][1]) > 1
    ]

    def observe(js: Sequence[LayerJacobian], n: int) -> State:
        (j,) = js
        assert isinstance(j, Beside)
        found = {m.weight: m.form for m in j.maps}
        state: list[Any] = []
        lefts: dict[Any, Tensor] = {}

        def factors(form: forms.Outer) -> tuple[Tensor, Any, int]:
            g = form.g
            key = g.data_ptr(), g.shape, g.stride()  # maps that are added have the same derivatives, held once
            if key not in lefts:
                lefts[key] = form.left_factor(False)
            return lefts[key], *(form.right_factor(False) if n else (0, 0))

        for k, _ in pairs:
            size = prod(shapes[k][1:])
            of_maps = (factors(found[starts[k] + m * size]) for m in range(shapes[k][0]))
            left, right, counts = zip(*of_maps, strict=True)
            state += [torch.cat(left), torch.cat(right) if n else 0, left[0].new_tensor(counts).view(-1, 1, 1)]
        return tuple(state) if len(state) % 2 else (*state, 0)  # of an odd length, unlike that of axes

    def finish(state: State, n: float) -> Block:
        parts = []
        for i, (k, b) in enumerate(pairs):
            packing = Packing.matrix(shapes[k], (0, 1, 2), shapes[k][:2], b is not None)
            slices = [(starts[k], starts[k + 1]), *([] if b is None else [(starts[b], starts[b + 1])])]
            left, right, count = state[3 * i : 3 * i + 3]
            parts.append(Part(tuple(slices), packing, _product(left, right, torch.where(count > 0, count, 1), n)))
        return DirectSum(tuple(parts))

    return Estimator((layer,), _flat([layer]), observe, finish)


def _is_exact(state: State) -> bool:
    """Whether the statistic of :func:`block_or_axes` is that of an exact block."""
    return len(state) == 1


def axes(layer: Layer) -> Estimator:
    """A Kronecker product over the last two axes of each parameter of a layer, one for each index in front of them: the
    second moments of the rows and of the columns of its exact Jacobian, such that the trace is exact. Different
    parameters are independent. A factor that does not fit the memory is diagonal.

    Args:
        layer: The layer.
    """
    shapes = [_rows_and_columns(shape) for _, shape in layer.params]
    sizes = [prod(shape) for shape in shapes]

    def moments(j: Tensor) -> list[Tensor]:
        found = []
        for piece, shape in zip(layer.packing.unpack(j).flatten(0, 1).split(sizes, 1), shapes, strict=True):
            x = piece.view(-1, *shape).transpose(0, 1)  # (G, n, rows, columns)
            for y in (x.transpose(2, 3), x):
                y = y.flatten(1, 2)
                full = _fits(y.shape[0] * y.shape[2] ** 2 * y.dtype.itemsize, y.device)
                found.append(y.mT @ y if full else y.square().sum(1))
        return found

    def observe(js: Sequence[LayerJacobian], n: int) -> State:
        total: State | None = None
        for _, _, piece in js[0].tiles():
            found = tuple(moments(piece.dense()))
            total = found if total is None else merge(total, found)
        assert total is not None
        return total

    def finish(state: State, n: float) -> Block:
        parts, start = [], 0
        for k, (shape, size) in enumerate(zip(shapes, sizes, strict=True)):
            rows, columns = state[2 * k : 2 * k + 2]
            traces = (rows if rows.ndim == 2 else rows.diagonal(dim1=1, dim2=2)).sum(1)
            share = torch.where(traces > 0, 1 / traces, 0).view(-1, *[1] * (columns.ndim - 1))
            block = AxisKron(_factor(rows.div_(n)), _factor(columns.mul_(share)))
            packing = Packing.matrix(shape, (0, 1, 2), shape[:2], bias=False)
            parts.append(Part(((start, start + size),), packing, block))
            start += size
        return DirectSum(tuple(parts))

    return Estimator((layer,), _flat([layer]), observe, finish)


def _rows_and_columns(shape: tuple[int, ...]) -> tuple[int, int, int]:
    """How many matrices a parameter is seen as, of how many rows and columns; axes of length one are none."""
    axes = (1, *(a for a in shape if a != 1))
    axes = axes if len(axes) > 2 else (*axes, *[1] * (3 - len(axes)))
    return prod(axes[:-2]), axes[-2], axes[-1]


def _fits(nbytes: int, device: torch.device) -> bool:
    """Whether a factor of so many bytes may be dense."""
    return 4 * nbytes <= budget(device)


def _factor(moment: Tensor) -> Block:
    return Diag(moment) if moment.ndim == 2 else Dense(moment)


def kron(layer: Layer, reduce: bool = False, thin: bool = True) -> Estimator:
    """KFAC of one layer, ``G (x) A``: the second moments of output gradients and of inputs.

    A weight that is used in several ways (looked up as a table, and multiplied with as the head of the model) has such
    a product for each, and the product that is nearest to the sum of them, in the Frobenius norm. The factor over the
    rows of a table is diagonal.

    Args:
        layer: A layer with ``layer.kronecker``.
        reduce: Whether positions that share the weight are reduced first; by default each counts.
        thin: Whether A is held by the inputs themselves, where they are few; by default it is.
    """
    table = layer.packing.crossed is True

    def of_use(j: LayerJacobian, n: int, diagonal: bool) -> State:
        if isinstance(j, forms.Transposed) and isinstance(j.of, forms.Outer):  # the inputs are on the left
            left, count = j.of.right_factor(reduce) if n else (0, 0)
            return left, j.columns_factor(reduce) if diagonal else j.of.left_factor(reduce), count
        if not isinstance(j, forms.Outer | forms.Gather):
            raise ValueError(
                f'layer {layer.name!r}: its derivatives have no Kronecker factors here: those of unit="minibatch", of '
                "loss=OwnLoss() and of attention whose weights are used beside what it reads never do, nor those of a "
                "weight that is used in another order than the layer's own or through a function (softplus, a mask), "
                'so use PMatDiag, PMatBlockDiag, PMatLowRank, ... (or unit="example", or the loss as a function of the '
                "output); otherwise the layer collection is of another model, so build it with "
                "LayerCollection.from_model(model)"
            )
        right, count = (j.right_squares if diagonal else j.right_factor)(reduce) if n else (0, 0)
        return j.left_factor(reduce), right, count

    def observe(js: Sequence[LayerJacobian], n: int) -> State:
        (j,) = js
        if isinstance(j, forms.Sum):
            return tuple(statistic for part in j.parts for statistic in of_use(part, n, table))
        if table and not isinstance(j, forms.Gather):
            return of_use(j, n, True)
        samples = j.right_samples(reduce) if n and thin and isinstance(j, forms.Outer) else None
        if samples is not None:
            return j.left_factor(reduce), Samples(samples), len(samples)  # type: ignore[attr-defined]
        return of_use(j, n, False)

    def finish(state: State, n: float) -> Block:
        # What is left of a decayed count may be less than one.
        uses = [_product(state[k], state[k + 1], state[k + 2] or 1, n) for k in range(0, len(state), 3)]
        return uses[0] if len(uses) == 1 else nearest_product(uses)

    return Estimator((layer,), layer.packing, observe, finish)


def _product(left: Tensor, right: Tensor | Samples, count: float | Tensor, n: float) -> Kron:
    """Of sums, of which one is over so many inputs (of each group) and the other one over n examples."""
    g = Dense(forms.mirror(left.div_(n)))
    if isinstance(right, Samples):
        rows = right.rows / count**0.5
        return Kron(g, LowRank(rows, rows.new_ones(len(rows))))
    a = right.div_(count)
    return Kron(g, Diag(a) if a.ndim == 2 else Dense(forms.mirror(a)))


def ekfac(layer: Layer, reduce: bool = False) -> Estimator:
    """EKFAC of one layer: the eigenbasis of KFAC, then in a second pass the exact second moments in it.

    Args:
        layer: A layer with ``layer.kronecker``.
        reduce: As in :func:`kron`.
    """
    first = kron(layer, reduce, thin=not reduce)  # the span of averaged inputs does not hold the inputs

    def refine(basis: Block) -> Refinement:
        def carried(old: Block, state: State) -> State:
            return _rotated(old, basis, state)

        return Refinement(basis, second_moments(layer, basis), second_moments(layer, basis, elsewhere=True), carried)

    def centre(block: Block, mean: Tensor) -> Block:
        raise AssertionError("only what was refined is centred")

    return replace(first, centre=centre, refine=refine)


def second_moments(layer: Layer, basis: Block, elsewhere: bool = False) -> Estimator:
    """The exact diagonal of one layer in a given Kronecker basis.

    Args:
        layer: A layer with ``layer.kronecker``.
        basis: The basis, a Kronecker product of orthogonal factors.
        elsewhere: Whether it is estimated from other data than the basis is of, so that there may be something outside
            of its span: the mean of that. By default it is not.
    """
    left, right = basis.left.transpose(), basis.right.transpose()  # type: ignore[attr-defined]
    to_left = None if not isinstance(left, Dense) else left.mv
    to_right = None if not isinstance(right, Dense) else right.mv

    def observe(js: Sequence[LayerJacobian], n: int) -> State:
        inside = forms.total_of(piece.rotate(to_left, to_right).square() for piece in js[0].pieces())
        if not elsewhere or inside.numel() == prod(basis.shape):
            return inside, inside.new_zeros(())
        return inside, js[0].sqnorm().sum() - inside.sum()

    def finish(state: State, n: float) -> Block:
        inside, outside = state
        l = inside.div_(n)
        return Spectral(basis, l, (outside / n).clamp(min=0) / max(1, prod(basis.shape) - l.numel()))

    def centre(block: Block, mean: Tensor) -> Block:
        assert isinstance(block, Spectral)
        m = block.basis.transpose().mv(layer.packing.pack(mean))
        return Spectral(block.basis, (block.l - m.square()).clamp(min=0), block.rest)

    return Estimator((layer,), layer.packing, observe, finish, centre, by_example=True)


def _rotated(old: Block, new: Block, state: State) -> State:
    """Second moments in one Kronecker basis as the diagonal, in another one, of the matrix that they are."""
    inside, outside = state
    left = _squares(new.left, old.left, inside.shape[-2])  # type: ignore[attr-defined]
    right = _squares(new.right, old.right, inside.shape[-1])  # type: ignore[attr-defined]
    total, rest = inside.sum() + outside, outside / max(1, prod(old.shape) - inside.numel())
    covered = left.sum(-1).unsqueeze(-1) * right.sum(-1).unsqueeze(-2)
    moved = left @ inside @ right.mT + rest * (1 - covered).clamp(min=0)
    missing = prod(new.shape) - moved.numel()
    return moved, total - moved.sum() if missing else torch.zeros_like(total)


def _squares(new: Block, old: Block, size: int) -> Tensor:
    """The squared entries of the change from one basis of a factor to another one, for each group."""
    if isinstance(new, Dense) and isinstance(old, Dense):
        return (new.data.mT @ old.data).square()
    return torch.eye(size, dtype=new.dtype, device=new.device)  # of a diagonal factor, which keeps its basis


def eye(layers: Sequence[Layer]) -> Estimator:
    """The multiple of the identity with the exact trace over several layers.

    Args:
        layers: The layers.
    """
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
    """Columns of a matrix known by its products, a few at a time.

    Args:
        operator: The matrix.
        start: The first of the columns.
        stop: The end of them.

    Yields:
        The first of these columns, and as many of them, ``(k, P)``.
    """
    p = operator.numel
    step = chunk_length(4 * p * operator.dtype.itemsize, stop - start, operator.device)
    for first in range(start, stop, step):
        k = min(step, stop - first)
        units = torch.zeros(k, p, dtype=operator.dtype, device=operator.device)
        units[torch.arange(k), first + torch.arange(k)] = 1.0
        yield first, operator.mv(units)


def principal(operator: Block, start: int, stop: int) -> Tensor:
    """The diagonal sub-block of some coordinates, by as many products.

    Args:
        operator: The matrix.
        start: The first of them.
        stop: The end of them.
    """
    block = torch.cat([rows[:, start:stop] for _, rows in columns(operator, start, stop)])
    return (block + block.T) / 2


def diagonal(operator: Block) -> Tensor:
    """The diagonal, by P products."""
    pieces = [rows[:, first:].diagonal() for first, rows in columns(operator, 0, operator.numel)]
    return torch.cat(pieces)
