"""The names of NNGeometry (0.2, 0.3, 0.4 and main) that this library spells otherwise: its programs run unchanged.

:func:`install` attaches them to the classes and modules of the library. Nothing else imports this file, apart from the
import paths ``maths``, ``utils``, ``backend`` and ``solve``, which hold nothing of their own.
"""

from __future__ import annotations

import functools
import sys
import warnings
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from math import prod
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn

from . import blocks, data, generator, gram, layercollection, layers, likelihood, metrics
from . import object as objects
from .blocks import Block, Dense, Diag, Direct, Eye, Kron, LowRank, Part, QuasiDiag, Spectral
from .changes import Borrowed, recording
from .evaluator import State
from .generator import Generator
from .hessian import LossCurvature
from .kinds import Packing
from .layercollection import Layer, LayerCollection
from .losses import output_loss
from .object import (
    FMat,
    FMatDense,
    FVector,
    PFMap,
    PFMapDense,
    PFMapFactored,
    PFMapImplicit,
    PMat,
    PMatBlockDiag,
    PMatDense,
    PMatDiag,
    PMatEKFAC,
    PMatEye,
    PMatImplicit,
    PMatKFAC,
    PMatLowRank,
    PMatQuasiDiag,
    PVector,
    fspace,
    pspace,
    random_pvector,
    vector,
)
from .object import map as pfmap
from .object.layouts import Full


@functools.cache
def _warn(old: str, new: str) -> None:
    """Say once what an old name is called now, on behalf of the caller's caller."""
    warnings.warn(f"{old} is an old name of NNGeometry: write {new}", DeprecationWarning, stacklevel=3)


def _renamed(old: str, new: str, function: Callable[..., Any]) -> Callable[..., Any]:
    """``function`` under an old name."""

    def renamed(*args: Any, **kwargs: Any) -> Any:
        _warn(old, new)
        return function(*args, **kwargs)

    renamed.__doc__ = f"Old name of ``{new}``.\n\n:meta private:"
    return renamed


# The layout of `.data`: what a matrix consists of as tensors, tuples and dicts by layer, and back


class _ByLayer(dict[str, Any]):
    """A dict of the layers of a matrix: what is put into it goes into the matrix."""

    def __init__(self, matrix: PMat, items: Mapping[str, Any]) -> None:
        super().__init__(items)
        self.matrix = matrix

    def __setitem__(self, name: str, value: Any) -> None:
        root, held = vars(self.matrix)["_held"]
        if name not in self:
            raise KeyError(f"data: no layer {name!r}, the matrix has {', '.join(self)}")
        if root is not self.matrix.root or not any(d is self for d in (held if isinstance(held, tuple) else (held,))):
            raise RuntimeError("data: the matrix has changed since these were read: read .data again")
        super().__setitem__(name, value)
        _hold(self.matrix, held)

    def update(self, *args: Any, **kwargs: Any) -> None:
        for name, value in dict(*args, **kwargs).items():
            self[name] = value

    def __reduce__(self) -> Any:
        return dict, (dict(self),)


def _get_data(matrix: PMat) -> Any:
    """The tensors of the matrix in NNGeometry's layout; the matrix consists of them, so it changes with them."""
    held = vars(matrix).get("_held")
    if held is None or held[0] is not matrix.root:
        layout = _layout(type(matrix))
        if layout is None:
            raise AttributeError(f"{type(matrix).__name__} has no .data: use to_torch(), get_diag() or repr()")
        if not matrix.root.symmetric:
            return layout[0](matrix)  # of a product, which tensors alone do not say
        held = (None, _by_layer(matrix, layout[0](matrix)))
    _hold(matrix, held[1])
    return held[1]


def _set_data(matrix: PMat, value: Any) -> None:
    _hold(matrix, _by_layer(matrix, value))


def _hold(matrix: PMat, value: Any) -> None:
    """Make the matrix of these tensors, with nothing left of what was computed from it before."""
    layout = _layout(type(matrix))
    if layout is None:
        raise AttributeError(f"{type(matrix).__name__} has no .data to set")
    root = layout[1](matrix.layer_collection, value)
    if root.shape != (matrix.size(0),):
        raise ValueError(f"data: {root.shape[0]} parameters for a matrix of {matrix.size(0)}")
    matrix.root = root
    vars(matrix)["_held"] = (root, value)


def _by_layer(matrix: PMat, value: Any) -> Any:
    if isinstance(value, Mapping):
        return _ByLayer(matrix, value)
    return tuple(_by_layer(matrix, v) for v in value) if isinstance(value, tuple | list) else value


def _without_data(getstate: Callable[[PMat], dict[str, Any]]) -> Callable[[PMat], dict[str, Any]]:
    @functools.wraps(getstate)
    def __getstate__(self: PMat) -> dict[str, Any]:
        return {k: v for k, v in getstate(self).items() if k not in ("_held", "_examples")}

    return __getstate__


def _side_by_side(lc: LayerCollection, make: Callable[[Layer, slice], tuple[Packing, Block]]) -> Direct:
    slices = lc.slices()
    return Direct(
        tuple(
            Part(((s.start, s.stop),), *make(layer, s))
            for layer, s in zip(lc.layers.values(), slices.values(), strict=True)
        )
    )


def _flat(layer: Layer) -> Packing:
    return Packing.flat(layer.numel())


def _parts(matrix: PMat) -> Iterator[tuple[str, Layer, Packing, Block]]:
    """The block of each layer, with its name and packing."""
    parts = {part.slices: part for part in matrix.root.parts} if isinstance(matrix.root, Direct) else {}
    for name, s in matrix.layer_collection.slices().items():
        part = parts.get(((s.start, s.stop),))
        if part is None:
            raise AttributeError(f"data: the {type(matrix).__name__} does not consist of one block for each layer")
        yield name, matrix.layer_collection[name], part.packing, part.block


def _structure(name: str, block: Block) -> AttributeError:
    return AttributeError(f"data: the block of layer {name!r} is a {block.describe()}, which has no such layout")


def _read_dense(matrix: PMat) -> Tensor:
    block = matrix.root.parts[0].block if isinstance(matrix.root, Direct) and len(matrix.root.parts) == 1 else None
    return block.data if isinstance(block, Dense) and block.data.ndim == 2 else matrix.to_torch()


def _make_dense(lc: LayerCollection, value: Tensor) -> Direct:
    return Direct((Part(((0, len(value)),), Packing.flat(len(value)), Dense(value)),))


def _read_blocks(matrix: PMat) -> dict[str, Tensor]:
    return {
        name: block.data if isinstance(block, Dense) and block.data.ndim == 2 else matrix.block(name).to_torch()
        for name, _, _, block in _parts(matrix)
    }


def _make_blocks(lc: LayerCollection, value: Mapping[str, Tensor]) -> Direct:
    return _side_by_side(lc, lambda layer, s: (_flat(layer), Dense(value[layer.name])))


def _make_diag(lc: LayerCollection, value: Tensor) -> Direct:
    return _side_by_side(lc, lambda layer, s: (_flat(layer), Diag(value[s])))


def _read_quasidiag(matrix: PMat) -> dict[str, tuple[Tensor, Tensor | None]]:
    value: dict[str, tuple[Tensor, Tensor | None]] = {}
    for name, layer, packing, block in _parts(matrix):
        if isinstance(block, QuasiDiag):
            cross = packing.unpack(torch.cat([block.cross, torch.zeros_like(block.d[..., -1:])], -1))
            value[name] = packing.unpack(block.d), cross[: prod(layer.weight)].view(*layer.weight)
        elif isinstance(block, Diag):
            value[name] = packing.unpack(block.d), None
        else:
            raise _structure(name, block)
    return value


def _make_quasidiag(lc: LayerCollection, value: Mapping[str, tuple[Tensor, Tensor | None]]) -> Direct:
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


def _read_kfac(matrix: PMat) -> dict[str, Any]:
    value: dict[str, Any] = {}
    for name, _, _, block in _parts(matrix):
        if isinstance(block, Kron):
            value[name] = (_factor(block.right), _factor(block.left))
        elif isinstance(block, Dense):
            value[name] = block.data
        else:
            raise _structure(name, block)
    return value


def _make_kfac(lc: LayerCollection, value: Mapping[str, Any]) -> Direct:
    def make(layer: Layer, s: slice) -> tuple[Packing, Block]:
        one = value[layer.name]
        if isinstance(one, Tensor):
            return _flat(layer), Dense(one)
        a, g = one
        right = Diag(_grouped(a, 2)) if a.ndim == 1 else Dense(_grouped(a, 3))
        return layer.packing, Kron(Dense(_grouped(g, 3)), right)

    return _side_by_side(lc, make)


def _read_ekfac(matrix: PMat) -> tuple[dict[str, Any], dict[str, Tensor]]:
    evecs: dict[str, Any] = {}
    diags: dict[str, Tensor] = {}
    for name, _, _, block in _parts(matrix):
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


def _make_ekfac(lc: LayerCollection, value: tuple[Mapping[str, Any], Mapping[str, Tensor]]) -> Direct:
    def make(layer: Layer, s: slice) -> tuple[Packing, Block]:
        basis, diag = value[0][layer.name], value[1][layer.name]
        if basis is None:
            return _flat(layer), Dense(diag)
        a, g = basis
        left = Dense(_grouped(g, 3))
        right = Eye.like(g, (1, layer.packing.shape[-1])) if a is None else Dense(_grouped(a, 3))
        kron = Kron(left, right)
        return layer.packing, Spectral(kron, diag.reshape(kron.shape), diag.new_zeros(()))

    return _side_by_side(lc, make)


def _read_lowrank(matrix: PMat) -> Tensor:
    block = matrix.root.parts[0].block if isinstance(matrix.root, Direct) else matrix.root
    if not isinstance(block, LowRank) or bool((block.weights < 0).any()):
        raise _structure("all", block)
    rows = block.rows if bool((block.weights == 1).all()) else block.weights.sqrt().unsqueeze(1) * block.rows
    return rows.unsqueeze(1)


def _make_lowrank(lc: LayerCollection, value: Tensor) -> Direct:
    rows = value.reshape(-1, value.shape[-1])
    p = rows.shape[1]
    return Direct((Part(((0, p),), Packing.flat(p), LowRank(rows, rows.new_ones(len(rows)))),))


_Layout = tuple[Callable[[PMat], Any], Callable[[LayerCollection, Any], Direct]]
_LAYOUTS: dict[type, _Layout] = {
    PMatDense: (_read_dense, _make_dense),
    PMatBlockDiag: (_read_blocks, _make_blocks),
    PMatDiag: (lambda matrix: matrix.root.diag(), _make_diag),
    PMatQuasiDiag: (_read_quasidiag, _make_quasidiag),
    PMatKFAC: (_read_kfac, _make_kfac),
    PMatEKFAC: (_read_ekfac, _make_ekfac),
    PMatLowRank: (_read_lowrank, _make_lowrank),
}


def _layout(kind: type[PMat]) -> _Layout | None:
    return next((_LAYOUTS[base] for base in kind.__mro__ if base in _LAYOUTS), None)


# Matrices


_ORDER = ("layer_collection", "generator", "data", "examples")


def _constructor(init: Callable[..., None]) -> Callable[..., None]:
    """``PMat*(generator)``, ``PMat*(generator, data, examples)``, and data in NNGeometry's layout."""

    @functools.wraps(init)
    def __init__(self: PMat, *args: Any, **kwargs: Any) -> None:
        kind = type(self)
        names = _ORDER if args and isinstance(args[0], LayerCollection) else _ORDER[1:]
        given = {**dict(zip(names, args, strict=False)), **kwargs}
        source, value = given.get("generator"), given.get("data")
        if "layer_collection" not in given and source is not None:
            _warn(f"{kind.__name__}(generator, ...)", f"{kind.__name__}(layer_collection, generator, ...)")
            given["layer_collection"] = source.layer_collection
        lc: Any = given.get("layer_collection")
        layout = None if value is None or isinstance(value, Block) else _layout(kind)
        if layout is not None:
            given["data"] = layout[1](lc, value)
        if isinstance(source, TorchHooksJacobianBackend) and value is None:
            given["generator"] = source = source.on(lc)
            if given.get("examples") is None:
                given["examples"] = source.examples
        if "map_layers_to" in given:
            given["default"] = given.pop("default_representation")
            given["rules"] = _rules(lc, given.pop("map_layers_to"))
        init(self, **given)
        if isinstance(source, TorchHooksJacobianBackend) and value is None and source.centering:
            self.root = source.without_mean(self.root, given["examples"], kind)
        if isinstance(self, PMatEKFAC):
            vars(self)["_examples"] = given.get("examples")

    return __init__


def _eye_constructor(init: Callable[..., None]) -> Callable[..., None]:
    """``PMatEye(layer_collection, scaling)`` with a tensor."""

    @functools.wraps(init)
    def __init__(self: PMatEye, layer_collection: Any = None, *args: Any, **kwargs: Any) -> None:
        if args and isinstance(args[0], Tensor | float | int):
            kwargs["scaling"], args = args[0], args[1:]
        scaling = kwargs.get("scaling")
        if isinstance(scaling, Tensor):
            kwargs |= {"scaling": float(scaling), "dtype": scaling.dtype, "device": scaling.device}
        init(self, layer_collection, *args, **kwargs)

    return __init__


def _rules(lc: Any, mapping: Mapping[Any, Any]) -> dict[Any, Any]:
    """``map_layers_to`` of NNGeometry, which may name kinds of layers that the model has none of."""
    rules = {functools.partial(_is_kind, kind): representation for kind, representation in mapping.items()}
    return {rule: representation for rule, representation in rules.items() if any(map(rule, lc.layers.values()))}


def _is_kind(kind: Any, layer: Layer) -> bool:
    return isinstance(layer, kind) if isinstance(kind, _LayerKind) else layer.matches(kind)


def _solve(solve: Callable[..., Any]) -> Callable[..., Any]:
    """``solve(b, regul, impl=)``: every implementation gives the exact damped solution."""

    @functools.wraps(solve)
    def with_impl(self: PMat, b: Any, regul: Any = 1e-8, impl: str | None = None, **options: Any) -> Any:
        if impl is not None or options.pop("solve", None) is not None:
            _warn("solve(b, regul, impl=...)", "solve(b, regul), which is exact in every representation")
        if "use_pi" in options:
            _warn("solve(b, regul, use_pi=...)", "solve(b, regul), which is exact in every representation")
            return _factored(self, regul, options.pop("use_pi")).mv(b)
        return solve(self, b, regul, **options)

    return with_impl


def _inverse(self: PMat, regul: Any = 1e-8, use_pi: bool | None = None) -> PMat:
    """``(M + regul)^-1``. use_pi: if given, of KFAC, the inverse of the factors damped one by one instead.

    :meta private:
    """
    _warn("inverse(regul)", "inv(regul)")
    inverse = self.inv(regul) if use_pi is None else _factored(self, regul, use_pi)
    device = self.device
    inverse.generator = SimpleNamespace(layer_collection=self.layer_collection, get_device=lambda: device)
    return inverse


def _factored(matrix: PMat, regul: float, use_pi: bool) -> PMat:
    """KFAC with each factor damped before it is inverted (Martens and Grosse 2015, 1503.05671, section 6.3)."""
    if not isinstance(matrix, PMatKFAC):
        raise TypeError(f"use_pi: {type(matrix).__name__} has no factors to damp one by one: leave it out")

    def inverse(one: Any) -> Any:
        if isinstance(one, Tensor):
            return torch.linalg.inv(one + regul * torch.eye(len(one), dtype=one.dtype, device=one.device))
        a, g = (torch.diag(t) if t.ndim == 1 else t for t in one)
        mean_a, mean_g = (t.diagonal(dim1=-2, dim2=-1).mean(-1) for t in (a, g))
        if bool(((mean_a <= 0) | (mean_g <= 0)).any()):
            raise ValueError("use_pi: a factor is zero, so the damping of the factors is undefined: leave it out")
        pi = (mean_a / mean_g).sqrt() if use_pi else torch.ones_like(mean_a)
        damped = ((a, regul**0.5 * pi), (g, regul**0.5 / pi))
        return tuple(
            torch.linalg.inv(t + r[..., None, None] * torch.eye(t.shape[-1], dtype=t.dtype, device=t.device))
            for t, r in damped
        )

    return PMatKFAC(
        matrix.layer_collection,
        data=_make_kfac(matrix.layer_collection, {name: inverse(one) for name, one in _get_data(matrix).items()}),
    )


def _power(power: Callable[..., PMat]) -> Callable[..., PMat]:
    """``pow(exponent, regul=)``: of ``M + regul``."""

    @functools.wraps(power)
    def with_regul(self: PMat, exponent: float, regul: float | None = None) -> PMat:
        if regul is None:
            return power(self, exponent)
        _warn("pow(exponent, regul)", "(M + PMatEye(layer_collection, scaling=regul)).pow(exponent), or inv(regul)")
        return self._with(self.root.eig().apply(lambda l: (l + regul) ** exponent))

    return with_regul


def _rows_first(matrix: PMat) -> Tensor:
    """The flat parameters in the order of the Kronecker product: rows of the weight with their bias last."""
    pieces = []
    for layer, s in zip(
        matrix.layer_collection.layers.values(), matrix.layer_collection.slices().values(), strict=True
    ):
        index = torch.arange(s.start, s.stop, device=matrix.device)
        pieces.append((layer.packing.pack(index) if layer.kronecker else index).flatten())
    return torch.cat(pieces)


def _vtmv(vtmv: Callable[..., Any]) -> Callable[..., Any]:
    """``vTMv(v)`` of a vector that has more layers than the matrix, which count as zero in the matrix."""

    @functools.wraps(vtmv)
    def with_more_layers(self: PMat, v: PVector, *args: Any, **options: Any) -> Any:
        mine = self.layer_collection
        theirs = v.layer_collection if isinstance(v, PVector) else mine
        if len(theirs) > len(mine) and mine.layers.items() <= theirs.layers.items():
            values = v.to_dict()
            v = PVector(mine, dict_repr={name: values[name] for name in mine})
        return vtmv(self, v, *args, **options)

    return with_more_layers


def _to_torch(to_torch: Callable[[PMat], Tensor]) -> Callable[..., Tensor]:
    """``to_torch(split_weight_bias=)``."""

    @functools.wraps(to_torch)
    def with_split(self: PMat, split_weight_bias: bool = True) -> Tensor:
        if split_weight_bias:
            return to_torch(self)
        _warn("to_torch(split_weight_bias=False)", "to_torch(), in the order of the parameters")
        order = _rows_first(self)
        return to_torch(self)[order][:, order]

    return with_split


def _get_diag(get_diag: Callable[..., Any]) -> Callable[..., Any]:
    """``get_diag(split_weight_bias=)``."""

    @functools.wraps(get_diag)
    def with_split(self: PMat, estimator: Any = None, split_weight_bias: bool = True) -> Any:
        if isinstance(estimator, bool):
            estimator, split_weight_bias = None, estimator
        if split_weight_bias:
            return get_diag(self, estimator)
        _warn("get_diag(split_weight_bias=False)", "get_diag(), in the order of the parameters")
        return get_diag(self, estimator)[_rows_first(self)]

    return with_split


def _update_diag(update_diag: Callable[..., PMatEKFAC]) -> Callable[..., PMatEKFAC]:
    """``update_diag()`` on the examples of the estimation."""

    @functools.wraps(update_diag)
    def with_default(self: PMatEKFAC, examples: Any = None) -> PMatEKFAC:
        if not isinstance(self.generator, Generator):
            self.generator = None
        if examples is None:
            _warn("update_diag()", "update_diag(examples)")
            examples = vars(self).get("_examples")
        return update_diag(self, examples)

    return with_default


def _get_kfe(self: PMatEKFAC, split_weight_bias: bool = True) -> dict[str, Tensor]:
    """The eigenvectors of each layer as columns, in the order of ``.data[1]``.

    :meta private:
    """
    _warn("get_KFE()", "eig(), or the bases of .data[0]")
    bases = {}
    for name, _, packing, block in _parts(self):
        spectral = block.eig()
        assert isinstance(spectral, Spectral)
        q = spectral.basis.to_dense()
        bases[name] = packing.unpack(q.T.reshape(-1, *packing.shape)).T if split_weight_bias else q
    return bases


def _compute_eigendecomposition(self: PMat, impl: str = "eigh") -> None:
    """Store ``evals`` and ``evecs``.

    :meta private:
    """
    _warn("compute_eigendecomposition()", "eig()")
    if isinstance(self, PMatKFAC):
        factors = {n: one if isinstance(one, tuple) else (one,) for n, one in _get_data(self).items()}
        pairs = {n: [torch.linalg.eigh(torch.diag(t) if t.ndim == 1 else t) for t in ts] for n, ts in factors.items()}
        vars(self)["evals"] = {n: tuple(l for l, _ in pair) for n, pair in pairs.items()}
        vars(self)["evecs"] = {n: tuple(q for _, q in pair) for n, pair in pairs.items()}
        return
    l, vectors = self.root.top(None)
    ascending = not isinstance(self, PMatLowRank)
    vars(self)["evals"] = l.flip(0) if ascending else l
    vars(self)["evecs"] = (vectors.flip(0) if ascending else vectors).T


def _get_eigendecomposition(self: PMat) -> tuple[Any, Any]:
    """What :meth:`compute_eigendecomposition` stored.

    :meta private:
    """
    return vars(self)["evals"], vars(self)["evecs"]


def _project_to_diag(self: PMatDense, v: PVector) -> Tensor:
    """``v`` in the eigenvectors of :meth:`compute_eigendecomposition`.

    :meta private:
    """
    return vars(self)["evecs"].T @ v.to_torch()


def _project_from_diag(self: PMatDense, v: Tensor) -> PVector:
    """The inverse of :meth:`project_to_diag`.

    :meta private:
    """
    return PVector(self.layer_collection, vars(self)["evecs"] @ v)


# Vectors and coordinates


class _Shape(tuple[int, ...]):
    """A shape that answers as a parameter of NNGeometry did: ``layer.weight.size``, ``layer.weight.numel()``."""

    @property
    def size(self) -> tuple[int, ...]:
        return tuple(self)

    def numel(self) -> int:
        return prod(self)


class _LayerKind(type):
    """The kind of layer of one type of module: ``isinstance(layer, LinearLayer)``, ``LinearLayer(3, 2, bias=True)``."""

    module: type[nn.Module]

    def __instancecheck__(cls, layer: Any) -> bool:
        return isinstance(layer, Layer) and layer.kind_name == cls.module.__name__

    def __call__(cls, *args: Any, **kwargs: Any) -> Any:
        return _module_to_layer(cls.module(*args, **kwargs))


_MODULES = (
    nn.Linear,
    nn.Conv1d,
    nn.Conv2d,
    nn.ConvTranspose2d,
    nn.BatchNorm1d,
    nn.BatchNorm2d,
    nn.LayerNorm,
    nn.GroupNorm,
    nn.Embedding,
    layers.WeightNorm1d,
    layers.WeightNorm2d,
    layers.Cosine1d,
    layers.Affine1d,
)
_LAYER_KINDS = {f"{m.__name__}Layer": _LayerKind(f"{m.__name__}Layer", (), {"module": m}) for m in _MODULES}


def _module_to_layer(module: nn.Module) -> Layer:
    (layer,) = LayerCollection.from_model(module, frozen=True).layers.values()
    return layer


def _from_model(from_model: Callable[..., LayerCollection]) -> Callable[..., LayerCollection]:
    """``from_model(model, ignore_unsupported_layers=)``."""

    @functools.wraps(from_model)
    def with_option(cls: type[LayerCollection], model: nn.Module, *selectors: Any, **options: Any) -> LayerCollection:
        given = [s for s in selectors if not isinstance(s, bool)]
        if len(given) < len(selectors) or "ignore_unsupported_layers" in options:
            _warn("from_model(model, ignore_unsupported_layers)", "from_model(model): every layer is supported")
            options.pop("ignore_unsupported_layers", None)
        return from_model(cls, model, *given, **options)

    return with_option


def _add_layer(add_layer: Callable[..., None]) -> Callable[..., None]:
    """``add_layer(name, layer)`` of a layer without a name; in 0.2 and 0.3 ``name`` ended in ``str(module)``."""

    @functools.wraps(add_layer)
    def named(self: LayerCollection, name: str, layer: Layer) -> None:
        if "(" in name:
            name = name[: name.index("(")].rpartition(".")[0]
        add_layer(self, name, layer if layer.name == name else replace(layer, name=name))

    return named


def _of_modules(method: Callable[..., Any]) -> Callable[..., Any]:
    """``parameters(layerid_to_module)`` and ``named_parameters(layerid_to_module)``."""

    @functools.wraps(method)
    def with_map(self: LayerCollection, model: Any) -> Any:
        if not isinstance(model, Mapping):
            return method(self, model)
        _warn(f"{method.__name__}(layerid_to_module)", f"{method.__name__}(model)")
        named = [
            (f"{name}.{k}" if name else k, model[name].get_parameter(k))
            for name, layer in self.layers.items()
            for k, _ in layer.params
        ]
        return iter(named) if method.__name__ == "named_parameters" else [p for _, p in named]

    return with_map


def _module_map(self: LayerCollection, model: nn.Module) -> dict[str, nn.Module]:
    """The module of each layer.

    :meta private:
    """
    return {name: model.get_submodule(name) for name in self.layers}


def _module_maps(self: LayerCollection, model: nn.Module) -> tuple[dict[str, nn.Module], dict[nn.Module, str]]:
    """The module of each layer, and the layer of each module.

    :meta private:
    """
    _warn("get_layerid_module_maps(model)", "model.get_submodule(name): a layer has the name of its module")
    modules = _module_map(self, model)
    return modules, {module: name for name, module in modules.items()}


def random_pvector_dict(layer_collection: LayerCollection, device: Any = None) -> PVector:
    """Old name of ``random_pvector``."""
    _warn("random_pvector_dict", "random_pvector")
    return random_pvector(layer_collection, device=device)


def random_fvector(n_samples: int, n_output: int = 1, device: Any = None, dtype: Any = None) -> FVector:
    """A vector ``(n_output, n_samples)`` of independent standard normal entries."""
    return FVector(torch.randn(n_output, n_samples, device=device, dtype=dtype))


# Where Jacobians and Hessians come from


class TorchHooksJacobianBackend(Generator):
    """The Jacobian of all outputs of ``function(*minibatch)``, by default ``model(minibatch[0])``: for ``PMat*`` the
    second moment ``1/n sum_x J^T J``.

    centering: of ``J`` less its mean over examples; for PMatDense, PMatLowRank and PMatImplicit.
    """

    examples: Any = None

    def __init__(
        self,
        model: nn.Module,
        function: Callable[..., Any] | None = None,
        centering: bool = False,
        layer_collection: LayerCollection | None = None,
        verbose: bool = False,
    ) -> None:
        lc = LayerCollection.from_model(model) if layer_collection is None else layer_collection
        super().__init__(model, lc, self._all, function=function, verbose=verbose, curvature=lambda f, u, *_: u)
        self.centering = centering
        self.n_output: int | None = None

    def _all(self, f: Tensor, batch: data.Batch, position: int) -> likelihood.Cotangents:
        if self.n_output is not None and f[0].numel() != self.n_output:
            raise ValueError(f"n_output={self.n_output}, but the function returns {f[0].numel()} for each example")
        return likelihood.diagonal_cotangents(torch.ones_like(f))

    def on(self, lc: LayerCollection) -> TorchHooksJacobianBackend:
        """The same function, with the parameters of another layer collection."""
        if lc == self.layer_collection:
            return self
        other = TorchHooksJacobianBackend(self.model, self.function, self.centering, lc, self.verbose)
        other.n_output, other.examples = self.n_output, self.examples
        return other

    def get_jacobian(self, examples: Any) -> Tensor:
        """``(C, n, P)``."""
        return self.map(PFMapDense, examples).to_torch()

    def get_gram_matrix(self, examples: Any) -> Tensor:
        """``(C, n, C, n)``."""
        return self.kernel(examples).to_torch()

    def map(self, kind: Any, examples: Any) -> Any:
        """The Jacobian in a representation."""
        if self.centering and kind is PFMapFactored:
            raise NotImplementedError("centering: PFMapFactored has no centred form; use PFMapDense or PFMapImplicit")
        found = kind.of(self, examples)
        return found.centred() if self.centering else found

    def kernel(self, examples: Any) -> FMatDense:
        """The tangent kernel."""
        return gram.GramMatrix(
            self.model,
            examples,
            function=self.function,
            layer_collection=self.layer_collection,
            centering=self.centering,
            verbose=self.verbose,
        )

    def without_mean(self, root: Block, examples: Any, kind: type[PMat]) -> Block:
        """``root`` less the outer products of the mean Jacobian of each output."""
        if kind not in (PMatDense, PMatLowRank, PMatImplicit):
            raise NotImplementedError(
                f"centering: {kind.__name__} has no centred form; use PMatDense, PMatLowRank or PMatImplicit, or "
                "GradientCovariance for the gradients of a loss"
            )
        jacobian = PFMapImplicit.of(self, examples)
        c, n, _ = jacobian.shape
        each = torch.eye(c, dtype=jacobian.dtype, device=jacobian.device).unsqueeze(2).expand(c, c, n) / n
        means = torch.stack([jacobian.vjp(FVector(u)).to_torch() for u in each])
        return blocks.add(root, _make_lowrank(self.layer_collection, means), -1.0)


def _get_device(self: Generator) -> torch.device:
    return self.device


class Jacobian(TorchHooksJacobianBackend):
    """The generator of 0.2 and 0.3, with the loader in it or not; n_output is checked and not needed."""

    def __init__(
        self,
        model: nn.Module,
        *args: Any,
        loader: Any = None,
        function: Callable[..., Any] | None = None,
        n_output: int | None = None,
        centering: bool = False,
        layer_collection: LayerCollection | None = None,
    ) -> None:
        _warn("nngeometry.generator.Jacobian", "nngeometry.Jacobian, GramMatrix, FIM or GradientSecondMoment")
        given = list(args)
        if given and given[0] is not None and not callable(given[0]):
            loader = given.pop(0)
        defaults = [function, n_output, centering, layer_collection]
        function, n_output, centering, layer_collection = given + defaults[len(given) :]
        super().__init__(model, function, centering, layer_collection)
        self.n_output, self.examples = n_output, loader


def GradientSecondMoment(
    model: nn.Module,
    loader: Any,
    representation: Callable[..., Any],
    function: Callable[..., Any] | None = None,
    layer_collection: LayerCollection | None = None,
    verbose: bool = False,
    **options: Any,
) -> Any:
    """``1/n sum_x J^T J`` with J the Jacobian of all outputs of ``function(*minibatch)``."""
    source = TorchHooksJacobianBackend(model, function, False, layer_collection, verbose)
    return representation(layer_collection=source.layer_collection, generator=source, examples=loader, **options)


class TorchFuncHessianBackend(LossCurvature):
    """The Hessian of ``function(prediction, target)``, a loss."""

    def __init__(
        self,
        model: nn.Module,
        function: Callable[..., Any],
        layer_collection: LayerCollection | None = None,
        verbose: bool = False,
        compiled: bool = False,
    ) -> None:
        lc = LayerCollection.from_model(model) if layer_collection is None else layer_collection
        super().__init__(model, lc, nn.CrossEntropyLoss(), function=function, verbose=verbose)


class _Reduced:
    """A loss that gives one number for a minibatch: a mean over its examples or their sum, whichever it is."""

    def __init__(self, loss: Callable[..., Tensor], f: Tensor, *targets: Any) -> None:
        self.loss = loss
        once = loss(f, *targets)
        twice = loss(torch.cat([f, f]), *(torch.cat([t, t]) if isinstance(t, Tensor) else t for t in targets))
        self.mean = bool(torch.isclose(once, twice, rtol=1e-3))
        if not self.mean and not bool(torch.isclose(2 * once, twice, rtol=1e-3)):
            raise ValueError(
                f"Hessian: the loss of a minibatch is {float(once):.4g} and {float(twice):.4g} when its examples are "
                "given twice, so it is neither their mean nor their sum: use one with one value for each example"
            )

    def total(self, f: Tensor, *targets: Any) -> Tensor:
        return self.loss(f, *targets) * (len(f) if self.mean else 1)

    def weight(self, f: Tensor, *targets: Any) -> float:
        return len(f)


def _operator(operator: Callable[..., Any]) -> Callable[..., Any]:
    """``Hessian(model, loader, representation, function=loss)``: a function that is a loss is taken for one."""

    @functools.wraps(operator)
    def with_function(self: LossCurvature, examples: Any) -> Any:
        if self.function is not None and not isinstance(examples, Iterator):
            reduced = _reduced(self, examples)
            if reduced is not None:
                if not isinstance(self, TorchFuncHessianBackend):
                    _warn("Hessian(..., function=loss)", "Hessian(..., loss=loss); function= is the model to call")
                self.loss, self.function = reduced, None
        return operator(self, examples)

    return with_function


def _reduced(source: LossCurvature, examples: Any) -> Any:
    """The function of a source as a loss, None if it is none: called as one, it gives no scalar."""
    batch = next(data.minibatches(examples, source.device))
    function: Any = source.function
    certain = isinstance(source, TorchFuncHessianBackend)
    try:
        state = State(source.model)
        with Borrowed(state, recording(False)):
            f = source.model(data.arguments(batch)[0])
            value = function(f, *data.targets(batch))
            state.check()
    except Exception:
        if certain:
            raise
        return None
    if value.ndim > 0:
        return output_loss(function) if certain else None
    return output_loss(function) if isinstance(function, nn.Module) else _Reduced(function, f, *data.targets(batch))


def _positional(matrix: Callable[..., Any], names: tuple[str, ...]) -> Callable[..., Any]:
    """A metric whose options may be positional, in NNGeometry's order; in 0.2 and 0.3 n_output came first."""

    @functools.wraps(matrix)
    def with_positions(model: nn.Module, loader: Any, representation: Any, *args: Any, **kwargs: Any) -> Any:
        if len(args) > 1 or (args and isinstance(args[0], int)):
            order = ("n_output", *names) if isinstance(args[0], int) else names
            _warn(f"{matrix.__name__} with positional options", ", ".join(f"{name}=" for name in order))
            kwargs.update(zip(order, args, strict=False))
            args = ()
        return matrix(model, loader, representation, *args, **kwargs)

    return with_positions


# Function space


def _of_generator(init: Callable[..., None], name: str, new: str) -> Callable[..., None]:
    """``X(generator, data, examples)``, and with the layer collection before it."""

    @functools.wraps(init)
    def __init__(self: Any, *args: Any, **kwargs: Any) -> None:
        if "generator" not in kwargs and not any(a is None or isinstance(a, Generator) for a in args[:2]):
            init(self, *args, **kwargs)
            return
        _warn(f"{name if type(self).__module__ != __name__ else type(self).__name__}(generator, ...)", new)
        names = _ORDER if args and isinstance(args[0], LayerCollection) else _ORDER[1:]
        given = {**dict(zip(names, args, strict=False)), **kwargs}
        source: Any = given.get("generator")
        value, examples = given.get("data"), given.get("examples")
        lc = given.get("layer_collection")
        lc = source.layer_collection if lc is None else lc
        if value is not None:
            found = _kernel_of(value) if isinstance(self, FMat) else PFMapDense(lc, value)
        else:
            source = source.on(lc)
            examples = source.examples if examples is None else examples
            found = source.kernel(examples) if isinstance(self, FMat) else source.map(_REPRESENTATION[name], examples)
        vars(self).update(vars(found))

    return __init__


_REPRESENTATION: dict[str, Any] = {kind.__name__: kind for kind in (PFMapDense, PFMapFactored, PFMapImplicit)}


def _kernel_of(value: Tensor) -> FMatDense:
    """A kernel from its entries ``(C, n, C', n')``."""
    c, n, d, m = value.shape
    layout = Full((c, d), (n, m))
    symmetric = value.shape[:2] == value.shape[2:] and bool(torch.equal(value, value.permute(2, 3, 0, 1)))
    return FMatDense(fspace.dense_root(layout.unview(value), layout, symmetric), layout)


class PushForwardDense(PFMapDense):
    """Old name of ``PFMapDense``."""

    def mv(self, v: PVector) -> FVector:
        """``J v``."""
        return self.jvp(v)


class PushForwardImplicit(PFMapImplicit):
    """Old name of ``PFMapImplicit``."""

    def mv(self, v: PVector) -> FVector:
        """``J v``."""
        return self.jvp(v)


class PullBackDense(PFMapDense):
    """Old name of ``PFMapDense``, seen from the other side."""

    def mv(self, u: FVector) -> PVector:
        """``J^T u``."""
        return self.vjp(u)


def _from_dict(layer_collection: Any = None, generator: Any = None, data_dict: Any = None) -> PFMapDense:
    """A map from the tensors ``(C, n, *shape)`` of its layers; in 0.4 without the layer collection."""
    if isinstance(layer_collection, Generator):
        generator, layer_collection, data_dict = layer_collection, None, data_dict or generator
    lc = generator.layer_collection if layer_collection is None else layer_collection
    return PFMapDense(lc, torch.cat([t.flatten(2) for name in lc for t in data_dict[name]], -1))


def random_pfmap(
    layer_collection: LayerCollection, output_size: Any, device: Any = None, dtype: Any = None
) -> PFMapDense:
    """A dense map ``(*output_size, P)`` of independent standard normal entries."""
    return PFMapDense(layer_collection, torch.randn(*output_size, layer_collection.numel(), device=device, dtype=dtype))


def _contiguous(to_torch: Callable[[FMat], Tensor]) -> Callable[[FMat], Tensor]:
    """Entries that ``view`` takes, as those of NNGeometry."""

    @functools.wraps(to_torch)
    def contiguous(self: FMat) -> Tensor:
        return to_torch(self).contiguous()

    return contiguous


def _with_dim(size: Callable[[FMat], Any]) -> Callable[..., Any]:
    """``size(dim)``."""

    @functools.wraps(size)
    def of_dim(self: FMat, dim: int | None = None) -> Any:
        return size(self) if dim is None else size(self)[dim]

    return of_dim


def _compute_eigendecomposition_of_kernel(self: FMat, impl: str = "eigh") -> None:
    """Store ``evals`` and ``evecs``, in the order of ``to_torch().flatten()``.

    :meta private:
    """
    _warn("compute_eigendecomposition()", "eig()")
    entries = self.to_torch()
    vars(self)["evals"], vars(self)["evecs"] = torch.linalg.eigh(entries.flatten(2).flatten(0, 1))


def _gram_matrix(matrix: Callable[..., Any]) -> Callable[..., Any]:
    """``GramMatrix(model, loader, function, representation, layer_collection)``."""

    @functools.wraps(matrix)
    def with_positions(model: nn.Module, loader: Any, *args: Any, **kwargs: Any) -> Any:
        if args and callable(args[0]):
            names = ("function", "representation", "layer_collection")
            _warn("GramMatrix(model, loader, function)", "function=; what follows the loader is loader2")
            return matrix(model, loader, **dict(zip(names, args, strict=False)), **kwargs)
        return matrix(model, loader, *args, **kwargs)

    return with_positions


# Utilities


def kronecker(A: Tensor, B: Tensor) -> Tensor:
    """The Kronecker product of two matrices."""
    return torch.kron(A.contiguous(), B.contiguous())


def display_correl(M: PMat, axis: Any) -> None:
    """Show the absolute correlations of a matrix on a matplotlib axis."""
    dense = M.to_torch()
    scale = (dense.diagonal() + dense.diagonal().mean() / 100).sqrt()
    axis.imshow((dense.abs() / torch.outer(scale, scale)).detach().cpu())


def grad(output: Tensor, vec: PVector, *args: Any, **kwargs: Any) -> PVector:
    """The gradient of ``output`` with respect to the parameters that ``vec`` was made of, e.g. by
    ``PVector.from_model``. Further arguments as of ``torch.autograd.grad``.
    """
    lc = vec.layer_collection
    leaves = list(_leaves(vec.to_torch().grad_fn))
    if [tuple(p.shape) for p in leaves] != [shape for layer in lc.layers.values() for _, shape in layer.params]:
        raise RuntimeError("grad: the vector does not consist of the parameters of a model: use PVector.from_model")
    grads = torch.autograd.grad(output, leaves, *args, **kwargs)
    return PVector(
        lc,
        torch.cat([p.new_zeros(p.numel()) if g is None else g.flatten() for p, g in zip(leaves, grads, strict=True)]),
    )


def _leaves(node: Any) -> Iterator[Tensor]:
    """The leaves that a tensor was made of, in order."""
    if node is not None and hasattr(node, "variable"):
        yield node.variable
    elif node is not None:
        for before, _ in node.next_functions:
            yield from _leaves(before)


def cg(
    A: PMat,
    b: PVector,
    regul: float = 1e-8,
    x0: PVector | None = None,
    rtol: float = 1e-5,
    atol: float = 0.0,
    max_iter: int | None = None,
    M: PMat | None = None,
) -> PVector:
    """``(A + regul)^-1 b`` by conjugate gradients, with M for a preconditioner; warns if max_iter was too few."""
    target = max(rtol * float(b.norm()), atol)
    x = 0.0 * b if x0 is None else x0
    r = b - A.mv(x) - regul * x
    p, before = 0.0 * b, 1.0
    for _ in range(10 * A.size(0) if max_iter is None else max_iter):
        if float(r.norm()) <= target:
            return x
        z = r if M is None else M.solve(r, regul=regul)
        now = float(r.dot(z))
        p, before = z + (now / before) * p, now
        Ap = A.mv(p) + regul * p
        step = now / float(p.dot(Ap))
        x, r = x + step * p, r - step * Ap
    if float(r.norm()) > target:
        warnings.warn(
            f"cg: residual {float(r.norm()):.3g} after max_iter products, the target was {target:.3g}",
            RuntimeWarning,
            stacklevel=2,
        )
    return x


#: Modules inside of what are modules here.
_DEEP_PATHS = ("generator.jacobian", "backend.torch_hooks", "backend.torch_hooks.torch_hooks")
#: The examples of functions that stand wrapped in their modules, for doctest to find.
__test__ = {
    "FIM": metrics.FIM.__doc__ or "",
    "FIM_MonteCarlo": metrics.FIM_MonteCarlo.__doc__ or "",
    "GramMatrix": gram.GramMatrix.__doc__ or "",
}


@functools.cache
def install() -> None:
    """Attach the old names. It is done once, by ``import nngeometry``."""
    package = sys.modules[__package__]
    wrapped_gram = _gram_matrix(gram.GramMatrix)
    _attach(
        PMat,
        data=property(_get_data, _set_data),
        __init__=_constructor(PMat.__init__),
        __getstate__=_without_data(PMat.__getstate__),
        solve=_solve(PMat.solve),
        vTMv=_vtmv(PMat.vTMv),
        pow=_power(PMat.pow),
        to_torch=_to_torch(PMat.to_torch),
        get_diag=_get_diag(PMat.get_diag),
        inverse=_inverse,
        get_dense_tensor=_renamed(
            "get_dense_tensor()", "to_torch()", lambda self, *args, **kw: self.to_torch(*args, **kw)
        ),
        frobenius_norm=_renamed("frobenius_norm()", "norm()", lambda self: self.norm()),
        mm=_renamed("mm(other)", "M @ other", lambda self, other: self @ other),
        solvePVec=_renamed("solvePVec", "solve", lambda self, *args, **kw: self.solve(*args, **kw)),
        solvePFMap=_renamed("solvePFMap", "solve", lambda self, *args, **kw: self.solve(*args, **kw)),
        get_device=lambda self: self.device,
        compute_eigendecomposition=_compute_eigendecomposition,
        get_eigendecomposition=_get_eigendecomposition,
    )
    _attach(PMatDense, project_to_diag=_project_to_diag, project_from_diag=_project_from_diag)
    _attach(PMatEye, __init__=_eye_constructor(PMatEye.__init__))
    _attach(PMatEKFAC, update_diag=_update_diag(PMatEKFAC.update_diag), get_KFE=_get_kfe)
    _attach(
        PVector,
        vector_repr=property(lambda self: self.to_torch()),
        dict_repr=property(lambda self: self.to_dict()),
        get_dict_representation=_renamed("get_dict_representation()", "to_dict()", lambda self: self.to_dict()),
    )
    for cls in (PVector, FVector):
        _attach(
            cls,
            get_flat_representation=_renamed("get_flat_representation()", "to_torch()", lambda self: self.to_torch()),
        )
    _attach(
        Layer,
        weight=property(lambda self: _Shape(self.params[0][1]), doc=Layer.weight.__doc__),
        bias=property(
            lambda self: _Shape(dict(self.params)["bias"]) if "bias" in dict(self.params) else None,
            doc=Layer.bias.__doc__,
        ),
        has_bias=lambda self: "bias" in dict(self.params),
    )
    _attach(
        LayerCollection,
        from_model=classmethod(_from_model(LayerCollection.from_model.__func__)),  # type: ignore[attr-defined]
        add_layer=_add_layer(LayerCollection.add_layer),
        parameters=_of_modules(LayerCollection.parameters),
        named_parameters=_of_modules(LayerCollection.named_parameters),
        get_layerid_module_map=_module_map,
        get_layerid_module_maps=_module_maps,
        _module_to_layer=staticmethod(_module_to_layer),
    )
    _attach(Generator, get_device=_get_device)
    _attach(LossCurvature, operator=_operator(LossCurvature.operator))
    _attach(layercollection, **_LAYER_KINDS)
    here = sys.modules[__name__]
    _attach(generator, Jacobian=Jacobian, jacobian=here)
    _attach(vector, random_pvector_dict=random_pvector_dict, random_fvector=random_fvector)
    for module in (objects, pspace):
        _attach(module, PMatEKFACBlockDiag=PMatEKFAC)
    for path in _DEEP_PATHS:
        sys.modules[f"{__package__}.{path}"] = here
    likelihood.VARIANTS["classif_logsoftmax"] = likelihood.VARIANTS["classif_logits"]
    for name, kind in _REPRESENTATION.items():
        _attach(kind, __init__=_of_generator(kind.__init__, name, "Jacobian(model, loader)"))
    _attach(FMatDense, __init__=_of_generator(FMatDense.__init__, "FMatDense", "GramMatrix(model, loader)"))
    dense = _renamed("get_dense_tensor()", "to_torch()", lambda self: self.to_torch())
    _attach(
        PFMap,
        generator=None,
        size=lambda self, dim=None: self.shape if dim is None else self.shape[dim],
        to_torch=lambda self: self.to_dense().to_torch(),
        get_dense_tensor=dense,
        to_torch_layer=lambda self, name: self.to_dense().to_dict()[name],
        iter_by_module=lambda self: iter(self.to_dense().to_dict().items()),
        iter_by_layer=lambda self: (
            (name, self.layer_collection[name], values) for name, values in self.to_dense().to_dict().items()
        ),
        from_dict=staticmethod(_from_dict),
    )
    _attach(PFMapDense, data=property(lambda self: self.to_torch(), lambda self, value: setattr(self, "_flat", value)))
    _attach(
        FMat,
        generator=None,
        data=property(lambda self: self.to_torch(), lambda self, value: vars(self).update(vars(_kernel_of(value)))),
        to_torch=_contiguous(FMat.to_torch),
        size=_with_dim(FMat.size),
        solve=_solve(FMat.solve),
        adjoint=lambda self: self.T,
        get_dense_tensor=dense,
        frobenius_norm=_renamed("frobenius_norm()", "norm()", lambda self: self.norm()),
        mm=_renamed("mm(other)", "K @ other", lambda self, other: self @ other),
        compute_eigendecomposition=_compute_eigendecomposition_of_kernel,
        get_eigendecomposition=_get_eigendecomposition,
    )
    _attach(fspace, FMatAbstract=FMat)
    maps = {cls.__name__: cls for cls in (PushForwardDense, PushForwardImplicit, PullBackDense)}
    _attach(pfmap, random_pfmap=random_pfmap, **maps)
    _attach(objects, **maps)
    for module in (package, gram):
        _attach(module, GramMatrix=wrapped_gram)
    order = ("device", "function", "layer_collection")
    public = {
        "FIM": _positional(metrics.FIM, ("variant", *order)),
        "FIM_MonteCarlo": _positional(metrics.FIM_MonteCarlo, ("variant", "trials", *order)),
        "GradientSecondMoment": GradientSecondMoment,
    }
    for module in (package, metrics):
        _attach(module, **public)


def _attach(target: Any, **names: Any) -> None:
    for name, value in names.items():
        setattr(target, name, value)
