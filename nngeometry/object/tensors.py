"""The layout of ``.data``: what a matrix consists of as tensors, tuples and dicts by layer, and back."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from math import prod
from typing import Any

import torch
from torch import Tensor

from .. import arguments
from ..blocks import Block, Dense, Diag, DirectSum, Eye, Kron, LowRank, Part, QuasiDiag, Spectral
from ..kinds import Packing
from ..layercollection import Layer, LayerCollection


@dataclass(frozen=True)
class TensorLayout:
    """How a representation is laid out as tensors. read: from the matrix; make: the block that they are."""

    read: Callable[[Any], Any]
    make: Callable[[LayerCollection, Any], Block]


class Held:
    """Tensors that a matrix consists of, however they change: ``factor.data = ...`` leaves no trace."""

    def __init__(self, layer_collection: LayerCollection, layout: TensorLayout, symmetric: bool) -> None:
        self.layer_collection = layer_collection
        self.layout = layout
        self.symmetric = symmetric
        self.current = True
        self.value: Any = None

    @classmethod
    def of(cls, matrix: Any) -> Held:
        """Those of a matrix."""
        if matrix._tensors is None:
            raise AttributeError(f"{type(matrix).__name__} has no .data: use to_torch(), get_diag() or repr()")
        held = cls(matrix.layer_collection, matrix._tensors, matrix.root.symmetric)
        held.value = held._by_layer(matrix._tensors.read(matrix))
        return held

    @classmethod
    def given(cls, matrix: Any, value: Any) -> Held:
        """These, as those of a matrix. Raises ``ValueError`` if they cannot be."""
        if matrix._tensors is None or not isinstance(value, Tensor | Mapping | tuple | list):
            raise TypeError(_expected(matrix, value))
        held = cls(matrix.layer_collection, matrix._tensors, True)
        held.value = held._own(value)
        try:
            held.block()
        except (AttributeError, IndexError, KeyError, TypeError) as error:
            raise TypeError(f"{_expected(matrix, value)} ({error})") from error
        return held

    def block(self) -> Block:
        """The block that the tensors are now."""
        lc = self.layer_collection
        for by_layer in self.value if isinstance(self.value, tuple) else (self.value,):
            if isinstance(by_layer, Mapping) and set(by_layer) != set(lc):
                odd = ", ".join(map(repr, sorted(set(by_layer) ^ set(lc))))
                raise ValueError(f"data: its layers are not those of the matrix, the difference is {odd}")
        root = self.layout.make(lc, self.value)
        if root.shape != (lc.numel(),):
            raise ValueError(f"data: {root.shape[0]} parameters for a matrix of {lc.numel()}")
        return root if self.symmetric else _of_a_product(root)

    def _by_layer(self, value: Any) -> Any:
        if isinstance(value, Mapping):
            return _ByLayer(self, value)
        return tuple(self._by_layer(v) for v in value) if isinstance(value, tuple | list) else value

    def _own(self, value: Any) -> Any:
        """Data that were given, as they are, but not those of another matrix."""
        if isinstance(value, _ByLayer):
            return _ByLayer(self, value)
        return tuple(self._own(v) for v in value) if isinstance(value, tuple | list) else value


def _expected(matrix: Any, value: Any) -> str:
    return (
        f"{type(matrix).__name__}: data: expected a block, as in another matrix's root, or tensors as NNGeometry lays "
        f"them out, got {arguments.described(value)}"
    )


class _ByLayer(dict[str, Any]):
    """The tensors of a matrix by layer, of which the matrix consists; it has these layers and no others."""

    def __init__(self, held: Held, items: Mapping[str, Any]) -> None:
        super().__init__(items)
        self.held = held

    def __setitem__(self, name: str, value: Any) -> None:
        if name not in self:
            raise KeyError(f"data: no layer {name!r}, the matrix has {', '.join(self)}")
        if not self.held.current:
            raise RuntimeError("data: the matrix has changed since these were read: read .data again")
        before = self[name]
        super().__setitem__(name, value)
        try:
            self.held.block()
        except BaseException:
            super().__setitem__(name, before)
            raise

    def update(self, *args: Any, **kwargs: Any) -> None:
        for name, value in dict(*args, **kwargs).items():
            self[name] = value

    def __reduce__(self) -> Any:
        return dict, (dict(self),)


def _of_a_product(block: Block) -> Block:
    """The same entries, of a matrix that need not be symmetric."""
    if isinstance(block, DirectSum):
        return DirectSum(tuple(part.with_block(_of_a_product(part.block)) for part in block.parts))
    if isinstance(block, Kron):
        return Kron(_of_a_product(block.left), _of_a_product(block.right))
    return replace(block, is_symmetric=False) if isinstance(block, Dense) else block


def _side_by_side(lc: LayerCollection, make: Callable[[Layer, slice], tuple[Packing, Block]]) -> DirectSum:
    parts = []
    for (name, s), layer in zip(lc.slices().items(), lc.layers.values(), strict=True):
        packing, block = make(layer, s)
        if block.numel != layer.numel():
            raise ValueError(f"data: layer {name!r} has {layer.numel()} parameters, its tensors are of {block.numel}")
        parts.append(Part(((s.start, s.stop),), packing, block))
    return DirectSum(tuple(parts))


def _flat(layer: Layer) -> Packing:
    return Packing.flat(layer.numel())


def parts_of(matrix: Any) -> Iterator[tuple[str, Layer, Packing, Block]]:
    """The block of each layer, with its name and packing."""
    parts = {part.slices: part for part in matrix.root.parts} if isinstance(matrix.root, DirectSum) else {}
    for name, s in matrix.layer_collection.slices().items():
        part = parts.get(((s.start, s.stop),))
        if part is None:
            raise AttributeError(f"data: the {type(matrix).__name__} does not consist of one block for each layer")
        yield name, matrix.layer_collection[name], part.packing, part.block


def _structure(name: str, block: Block) -> AttributeError:
    return AttributeError(f"data: the block of layer {name!r} is a {block.describe()}, which has no such layout")


def _read_dense(matrix: Any) -> Tensor:
    block = matrix.root.parts[0].block if isinstance(matrix.root, DirectSum) and len(matrix.root.parts) == 1 else None
    return block.data if isinstance(block, Dense) and block.data.ndim == 2 else matrix.to_torch()


def _make_dense(lc: LayerCollection, value: Tensor) -> DirectSum:
    return DirectSum((Part(((0, len(value)),), Packing.flat(len(value)), Dense(value)),))


def _read_blocks(matrix: Any) -> dict[str, Tensor]:
    return {
        name: block.data if isinstance(block, Dense) and block.data.ndim == 2 else matrix.block(name).to_torch()
        for name, _, _, block in parts_of(matrix)
    }


def _make_blocks(lc: LayerCollection, value: Mapping[str, Tensor]) -> DirectSum:
    return _side_by_side(lc, lambda layer, s: (_flat(layer), Dense(value[layer.name])))


def _make_diag(lc: LayerCollection, value: Tensor) -> DirectSum:
    return _side_by_side(lc, lambda layer, s: (_flat(layer), Diag(value[s])))


def _read_quasidiag(matrix: Any) -> dict[str, tuple[Tensor, Tensor | None]]:
    value: dict[str, tuple[Tensor, Tensor | None]] = {}
    for name, layer, packing, block in parts_of(matrix):
        if isinstance(block, QuasiDiag):
            cross = packing.unpack(torch.cat([block.cross, torch.zeros_like(block.d[..., -1:])], -1))
            value[name] = packing.unpack(block.d), cross[: prod(layer.weight)].view(*layer.weight)
        elif isinstance(block, Diag):
            value[name] = packing.unpack(block.d), None
        else:
            raise _structure(name, block)
    return value


def _make_quasidiag(lc: LayerCollection, value: Mapping[str, tuple[Tensor, Tensor | None]]) -> DirectSum:
    def make(layer: Layer, s: slice) -> tuple[Packing, Block]:
        d, cross = value[layer.name]
        if cross is None:
            return _flat(layer), Diag(d)
        padded = torch.cat([cross.reshape(-1), cross.new_zeros(len(d) - cross.numel())])
        return layer.packing, QuasiDiag(layer.packing.pack(d), layer.packing.pack(padded)[..., :-1])

    return _side_by_side(lc, make)


def _ungrouped(t: Tensor) -> Tensor:
    """Without the axis of groups, where there is one group."""
    return t[0] if len(t) == 1 else t


def _grouped(t: Tensor, ndim: int) -> Tensor:
    return t if t.ndim == ndim else t.unsqueeze(0)


def _factor(block: Block) -> Tensor | None:
    """A Kronecker factor or basis as a tensor: ``(d, d)``, of an embedding its diagonal ``(d,)``, None for the
    identity.
    """
    if isinstance(block, Dense):
        return _ungrouped(block.data)
    if isinstance(block, LowRank):
        return block.to_dense()
    return _ungrouped(block.d) if isinstance(block, Diag) else None


def _read_kfac(matrix: Any) -> dict[str, Any]:
    value: dict[str, Any] = {}
    for name, _, _, block in parts_of(matrix):
        if isinstance(block, Kron):
            value[name] = (_factor(block.right), _factor(block.left))
        elif isinstance(block, Dense):
            value[name] = block.data
        else:
            raise _structure(name, block)
    return value


def make_kfac(lc: LayerCollection, value: Mapping[str, Any]) -> DirectSum:
    def make(layer: Layer, s: slice) -> tuple[Packing, Block]:
        one = value[layer.name]
        if isinstance(one, Tensor):
            return _flat(layer), Dense(one)
        a, g = one
        right = Diag(_grouped(a, 2)) if a.ndim == 1 else Dense(_grouped(a, 3))
        return layer.packing, Kron(Dense(_grouped(g, 3)), right)

    return _side_by_side(lc, make)


def _read_ekfac(matrix: Any) -> tuple[dict[str, Any], dict[str, Tensor]]:
    evecs: dict[str, Any] = {}
    diags: dict[str, Tensor] = {}
    for name, _, _, block in parts_of(matrix):
        if isinstance(block, Spectral) and isinstance(block.basis, Kron):
            right, l = _factor(block.basis.right), block.l
            if right is not None and right.ndim == 2 and right.shape[0] > right.shape[1]:  # a basis of few inputs
                full = torch.linalg.qr(right, mode="complete").Q
                right, missing = torch.cat([right, full[:, right.shape[1] :]], 1), right.shape[0] - right.shape[1]
                l = torch.cat([l, block.rest.expand(*l.shape[:-1], missing)], -1)
            evecs[name] = (right, _factor(block.basis.left))
            diags[name] = l.flatten()
        elif isinstance(block, Dense):
            evecs[name], diags[name] = None, block.data
        else:
            raise _structure(name, block)
    return evecs, diags


def _make_ekfac(lc: LayerCollection, value: tuple[Mapping[str, Any], Mapping[str, Tensor]]) -> DirectSum:
    def make(layer: Layer, s: slice) -> tuple[Packing, Block]:
        basis, diag = value[0][layer.name], value[1][layer.name]
        if basis is None:
            return _flat(layer), Dense(diag)
        a, g = basis
        left = Dense(_grouped(g, 3))
        right = Eye.like(g, (1, layer.packing.shape[-1])) if a is None else Dense(_grouped(a, 3))
        kron = Kron(left, right)
        if diag.ndim == 2:  # in the shape of its weight
            diag = layer.packing.pack(diag.flatten())
        return layer.packing, Spectral(kron, diag.reshape(kron.shape), diag.new_zeros(()))

    return _side_by_side(lc, make)


def _read_lowrank(matrix: Any) -> Tensor:
    block = matrix.root.parts[0].block if isinstance(matrix.root, DirectSum) else matrix.root
    if not isinstance(block, LowRank) or bool((block.weights < 0).any()):
        raise _structure("all", block)
    rows = block.rows if bool((block.weights == 1).all()) else block.weights.sqrt().unsqueeze(1) * block.rows
    return rows.unsqueeze(1)


def make_lowrank(lc: LayerCollection, value: Tensor) -> DirectSum:
    rows = value.reshape(-1, value.shape[-1])
    p = rows.shape[1]
    return DirectSum((Part(((0, p),), Packing.flat(p), LowRank(rows, rows.new_ones(len(rows)))),))


DENSE = TensorLayout(_read_dense, _make_dense)
BLOCKS = TensorLayout(_read_blocks, _make_blocks)
DIAG = TensorLayout(lambda matrix: matrix.root.diag(), _make_diag)
QUASIDIAG = TensorLayout(_read_quasidiag, _make_quasidiag)
KFAC = TensorLayout(_read_kfac, make_kfac)
EKFAC = TensorLayout(_read_ekfac, _make_ekfac)
LOWRANK = TensorLayout(_read_lowrank, make_lowrank)
