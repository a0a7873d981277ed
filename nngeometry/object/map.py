"""Maps between parameter space and function space: Jacobians of outputs of examples."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor

from .. import arguments, forms
from ..blocks import Block
from ..changes import Borrowed, no_grad, with_methods_uncast
from ..generator import Generator
from ..layercollection import LayerCollection
from ..linearisation import jacobians
from ..memory import chunk_length, require
from ..model import data
from ..model.weights import Weights
from . import old_arguments
from .arithmetic import VectorSpace
from .fspace import FMat, FMatDense, dense_root
from .kernel import BatchJacobian, batch_jacobians, sides, stacked_rows, tile
from .kernel_layouts import Full, positions
from .vector import Array, FlatArray, FVector, PVector, check_same_space


@with_methods_uncast
class PFMap(VectorSpace, ABC):
    """A linear map J from parameters to C outputs of n examples: rows ``J[c, x]`` in parameter space.

    ``J @ v`` is ``J v``, ``J.T @ u`` is ``J^T u``, ``J @ M`` is a map again, ``J @ J2.T`` their kernel, ``J[2:5]`` the
    map of some examples.
    """

    layer_collection: LayerCollection
    #: ``(layer_collection, entries, symmetric)`` to a dense matrix.
    _dense_matrix: ClassVar[Callable[..., Any]]
    _remedy = "a map J goes (@) with a PVector, a PMat or J2.T, (+) with a map of the same shape and (*) with a number"

    def __init_subclass__(cls) -> None:
        with_methods_uncast(cls)

    @property
    @abstractmethod
    def shape(self) -> tuple[int, int, int]:
        """``(C, n, P)``."""

    @abstractmethod
    def _jvp(self, V: Tensor) -> Tensor:
        """``(k, P) -> (k, C, n)``."""

    @abstractmethod
    def _vjp(self, S: Tensor) -> Tensor:
        """``(k, C, n) -> (k, P)``."""

    @property
    @abstractmethod
    def dtype(self) -> torch.dtype: ...

    @property
    @abstractmethod
    def device(self) -> torch.device: ...

    def jvp(self, v: PVector) -> FVector:
        """The product ``J v``.

        Args:
            v: A vector in parameter space.

        Returns:
            A vector in function space, ``(C, n)``.
        """
        if not isinstance(v, PVector):
            raise TypeError(
                f"jvp: expected a PVector, got {arguments.described(v)}: make one with "
                "PVector(layer_collection, tensor)"
            )
        check_same_space(self.layer_collection, v.layer_collection, arguments.name_of(v))
        self._check_like(v)
        return FVector(self._jvp(v.to_torch().unsqueeze(0))[0])

    def vjp(self, u: FVector) -> PVector:
        """The product ``J^T u``.

        Args:
            u: A vector in function space, ``(C, n)``.

        Returns:
            A vector in parameter space.
        """
        if not isinstance(u, FVector):
            raise TypeError(
                f"vjp: expected an FVector, got {arguments.described(u)}: make one with FVector(tensor) of shape (C, n)"
            )
        self._check_like(u)
        if tuple(u.size()) != self.shape[:2]:
            raise ValueError(f"the FVector has {tuple(u.size())} outputs and examples, {self} has {self.shape[:2]}")
        return PVector(self.layer_collection, self._vjp(u.to_torch().unsqueeze(0))[0])

    def _check_like(self, v: Any) -> None:
        """Raise unless a vector, map or matrix is of the same dtype on the same device."""
        if v.dtype != self.dtype or v.device != self.device:
            raise ValueError(
                f"the {arguments.name_of(v)} is {v.dtype} on {v.device}, the map is {self.dtype} on {self.device}: "
                "move one of them with .to(device, dtype)"
            )

    def adjoint(self) -> Adjoint:
        """``J^T``."""
        return Adjoint(self)

    @property
    def T(self) -> Adjoint:
        return Adjoint(self)

    def to_dense(self) -> PFMapDense:
        """All entries.

        Raises:
            MemoryError: If they do not fit the memory budget.
        """
        c, n, p = self.shape
        require(c * n * p * self.dtype.itemsize, f"the dense form of {self}", "use jvp and vjp", self.device)
        step = chunk_length(2 * p * self.dtype.itemsize, c * n, self.device)
        units = torch.eye(c * n, dtype=self.dtype, device=self.device).view(-1, c, n)
        rows = torch.cat([self._vjp(piece) for piece in units.split(step)])
        return PFMapDense(self.layer_collection, rows.view(c, n, p))

    def __matmul__(self, other: Any) -> Any:
        if isinstance(other, PVector):
            return self.jvp(other)
        if isinstance(other, Adjoint):
            return self._kernel(other.map)
        if hasattr(other, "root") and hasattr(other, "layer_collection"):
            check_same_space(self.layer_collection, other.layer_collection, arguments.name_of(other))
            fitted = other._fitted(self)
            self._check_like(fitted)
            return self.through(fitted.root.transpose())
        return arguments.unfit("@", self, other, self._remedy)

    def __rmatmul__(self, other: Any) -> Any:
        """``u @ J``, and ``J.T @ J``, a dense matrix."""
        if isinstance(other, FVector):
            return self.vjp(other)
        if not isinstance(other, Adjoint):
            arguments.refuse("@", other, self, self._remedy)
        left, p = other.map, self.layer_collection.numel()
        check_same_space(self.layer_collection, left.layer_collection, arguments.name_of(left))
        remedy = "use FIM or GradientSecondMoment"
        require(p * p * self.dtype.itemsize, f"the dense matrix {left}.T @ {self}", remedy, self.device)
        rows = self.to_dense().to_torch().flatten(0, 1)
        entries = rows.T @ rows if left is self else left.to_dense().to_torch().flatten(0, 1).T @ rows
        return self._dense_matrix(self.layer_collection, entries, left is self)

    def _kernel(self, other: PFMap) -> FMat:
        check_same_space(self.layer_collection, other.layer_collection, arguments.name_of(other))
        self._check_like(other)
        (c, n, _), (d, m, _) = self.shape, other.shape
        what = f"the dense kernel {self} @ {other}.T"
        require(c * n * d * m * self.dtype.itemsize, what, "use GramMatrix", self.device)
        layout = Full((c, d), (n, m))
        entries = self._inner(other)
        if other is self:
            entries = (entries + entries.permute(2, 3, 0, 1)) / 2
        return FMatDense(dense_root(layout.unview(entries), layout, other is self), layout)

    def _inner(self, other: PFMap) -> Tensor:
        """The inner products of all rows with those of another map: ``(C, n, C', n')``."""
        rows = self.to_dense().to_torch()
        right = rows if other is self else other.to_dense().to_torch()
        return (rows.flatten(0, 1) @ right.flatten(0, 1).T).view(*rows.shape[:2], *right.shape[:2])

    def through(self, block: Block) -> PFMap:
        """The map with rows ``M j`` for the rows j of this one.

        Args:
            block: M, the root of a PMat.
        """
        return self._composed(self.shape[:2], lambda t: t, lambda s: s, block)

    def __getitem__(self, examples: Any) -> PFMap:
        index = positions(examples, self.shape[1], self.device)

        def spread(S: Tensor) -> Tensor:
            out = S.new_zeros(len(S), self.shape[0], self.shape[1])
            return out.index_add_(2, index, S)

        return self._composed((self.shape[0], len(index)), lambda t: t[:, :, index], spread)

    def layer(self, name: str) -> PFMap:
        """The columns of one layer, as a map from its parameters alone.

        Args:
            name: The name of the layer.
        """
        lc = LayerCollection({name: self.layer_collection.layer(name, "layer")})
        where, p = self.layer_collection.slices()[name], self.shape[2]

        def pad(V: Tensor) -> Tensor:
            return torch.nn.functional.pad(V, (where.start, p - where.stop))

        return PFMapImplicit(
            lc, self.shape[:2], lambda V: self._jvp(pad(V)), lambda S: self._vjp(S)[:, where], self._empty()
        )

    def centred(self) -> PFMap:
        """Each row less the mean over examples of the rows of its output."""

        def centre(t: Tensor) -> Tensor:
            return t - t.mean(2, keepdim=True)

        return self._composed(self.shape[:2], centre, centre)

    def _scaled(self, c: float) -> PFMap:
        return self._composed(self.shape[:2], lambda t: c * t, lambda s: c * s)

    def _combined(self, other: Any, weight: float) -> PFMap:
        if not isinstance(other, PFMap):
            return NotImplemented
        check_same_space(self.layer_collection, other.layer_collection, arguments.name_of(other))
        self._check_like(other)
        if other.shape != self.shape:
            raise ValueError(f"{self} and {other} have other outputs or examples")
        return PFMapImplicit(
            self.layer_collection,
            self.shape[:2],
            lambda V: self._jvp(V) + weight * other._jvp(V),
            lambda S: self._vjp(S) + weight * other._vjp(S),
            self._empty(),
        )

    def _composed(
        self,
        shape: tuple[int, int],
        after: Callable[[Tensor], Tensor],
        before: Callable[[Tensor], Tensor],
        block: Block | None = None,
    ) -> PFMap:
        """``after J M^T`` by its products; before is the transpose of after."""
        back = None if block is None else block.transpose()
        return PFMapImplicit(
            self.layer_collection,
            shape,
            lambda V: after(self._jvp(V if back is None else back.mv(V))),
            lambda S: self._vjp(before(S)) if block is None else block.mv(self._vjp(before(S))),
            self._empty(),
        )

    def _empty(self) -> Tensor:
        return torch.empty(0, dtype=self.dtype, device=self.device)

    def __repr__(self) -> str:
        c, n, p = self.shape
        return f"{type(self).__name__} of {c} outputs, {n} examples, {p} parameters, {self.dtype}"


class Adjoint:
    """``J^T``, from function space to parameter space: ``J.T @ u``."""

    _remedy = "J.T goes (@) with an FVector, FVector(tensor) of shape (C, n), or behind a map, J @ J.T"
    __array_ufunc__ = None

    def __init__(self, map: PFMap) -> None:
        self.map = map

    def mv(self, u: FVector) -> PVector:
        """The product ``J^T u``.

        Args:
            u: A vector in function space, ``(C, n)``.
        """
        return self.map.vjp(u)

    def __matmul__(self, other: Any) -> Any:
        return self.mv(other) if isinstance(other, FVector) else arguments.unfit("@", self, other, self._remedy)

    def __rmatmul__(self, other: Any) -> Any:
        """``v @ J.T``, and ``M @ J.T`` of a symmetric matrix, the adjoint of ``J @ M``."""
        if isinstance(other, PVector):
            return self.map.jvp(other)
        if hasattr(other, "root") and hasattr(other, "layer_collection") and other.root.symmetric:
            return Adjoint(other.mv(self.map))
        return arguments.refuse("@", other, self, self._remedy)

    def adjoint(self) -> PFMap:
        """J."""
        return self.map

    @property
    def T(self) -> PFMap:
        return self.map


class PFMapDense(FlatArray, PFMap):
    """All entries of a map: ``PFMapDense(layer_collection, data)``. Every PMat takes it as many right-hand sides.

    Args:
        layer_collection: The columns.
        generator: A backend of NNGeometry's, with examples, in place of data.
        data: The entries ``(C, n, P)``.
        examples: Its loader.

    Raises:
        ValueError: For entries of another shape.

    Example:
        >>> lc = LayerCollection.from_model(torch.nn.Linear(2, 1))
        >>> J = PFMapDense(lc, torch.ones(4, 5, 3))
        >>> J.jvp(PVector(lc, torch.ones(3))).to_torch().shape
        torch.Size([4, 5])
    """

    _remedy = PFMap._remedy

    def __init__(
        self, layer_collection: Any = None, generator: Any = None, data: Any = None, examples: Any = None
    ) -> None:
        if isinstance(generator, Tensor):  # the entries
            arguments.instance(
                "layer_collection", layer_collection, LayerCollection, "LayerCollection.from_model(model)"
            )
            generator, data = None, generator
        if data is None or not isinstance(layer_collection, LayerCollection):
            given = _of_source("PFMapDense", layer_collection, generator, data, examples)
            layer_collection, generator, data, examples = given
            data = generator.map(PFMapDense, examples).to_torch() if data is None else data
        arguments.instance("data", data, Tensor, "pass a tensor of shape (C, n, P)")
        if data.ndim != 3 or data.shape[2] != layer_collection.numel():
            raise ValueError(f"PFMapDense: expected shape (C, n, {layer_collection.numel()}), got {tuple(data.shape)}")
        super().__init__(layer_collection, data)

    @classmethod
    def of(cls, generator: Generator, examples: Any) -> PFMapDense:
        """The Jacobian that a generator streams.

        Args:
            generator: The generator.
            examples: A loader, or one minibatch.
        """
        lc = generator.layer_collection
        batches = data.Minibatches(generator.minibatches(examples))
        n = sum(map(data.count, batches))
        remedy = "use representation=PFMapFactored or PFMapImplicit"
        return cls(lc, stacked_rows(batch_jacobians(generator, batches), lc, n, "a dense Jacobian", remedy))

    @property
    def shape(self) -> tuple[int, int, int]:
        c, n, p = self._flat.shape
        return c, n, p

    def _check_same_space(self, other: Array) -> None:
        super()._check_same_space(other)
        if isinstance(other, PFMapDense) and other.shape != self.shape:
            raise ValueError(f"{self} and {other} have other outputs or examples")

    def _like(self, flat: Tensor, layer_collection: LayerCollection | None = None) -> PFMapDense:
        return PFMapDense(self.layer_collection if layer_collection is None else layer_collection, flat)

    def _jvp(self, V: Tensor) -> Tensor:
        return torch.einsum("cnp,kp->kcn", self._flat, V)

    def _vjp(self, S: Tensor) -> Tensor:
        return torch.einsum("cnp,kcn->kp", self._flat, S)

    def to_dense(self) -> PFMapDense:
        return self

    def through(self, block: Block) -> PFMapDense:
        return self._like(block.mv(self._flat))

    def __getitem__(self, examples: Any) -> PFMapDense:
        index = positions(examples, self.shape[1], self.device)
        return self._like(self._flat[:, index])

    def layer(self, name: str) -> PFMapDense:
        lc = LayerCollection({name: self.layer_collection.layer(name, "layer")})
        return PFMapDense(lc, self._flat[..., self.layer_collection.slices()[name]])

    def centred(self) -> PFMapDense:
        return self._like(self._flat - self._flat.mean(1, keepdim=True))

    def __repr__(self) -> str:
        return PFMap.__repr__(self)


class PFMapFactored(PFMap):
    """The Jacobian in the form in which its layers produce it: inputs and output gradients, nothing of size C n P.

    Args:
        layer_collection: The columns.
        pieces: The Jacobians of neighbouring examples, layer by layer; or a generator, as of :class:`PFMapDense`.
        data: Leave it out.
        examples: As of :class:`PFMapDense`.
        generator: As of :class:`PFMapDense`.
    """

    def __init__(
        self,
        layer_collection: Any = None,
        pieces: Any = None,
        data: Any = None,
        examples: Any = None,
        *,
        generator: Any = None,
    ) -> None:
        if not isinstance(pieces, Sequence):
            found = _made(PFMapFactored, layer_collection, pieces if generator is None else generator, data, examples)
            layer_collection, pieces = found.layer_collection, found.pieces
        self.layer_collection = layer_collection
        self.pieces: tuple[BatchJacobian, ...] = tuple(pieces)

    @classmethod
    def of(cls, generator: Generator, examples: Any) -> PFMapFactored:
        """The Jacobian that a generator streams.

        Args:
            generator: The generator.
            examples: A loader, or one minibatch.
        """
        own = (data.map_tensors(Tensor.clone, batch) for batch in data.minibatches(examples, generator.device))
        pieces = list(batch_jacobians(generator, own))  # inputs are held: not those of the user
        if any(form.on_demand for piece in pieces for form in piece.forms.values()):
            model, lc = generator.model, generator.layer_collection
            weights = Weights([model], lc.parameters(model))  # which are looked at whenever rows are made
            pieces = [_at(weights, piece) for piece in pieces]
        return cls(generator.layer_collection, pieces)

    @property
    def shape(self) -> tuple[int, int, int]:
        return self.pieces[0].outputs, sum(p.examples for p in self.pieces), self.layer_collection.numel()

    @property
    def dtype(self) -> torch.dtype:
        return next(iter(self.pieces[0].forms.values())).dtype

    @property
    def device(self) -> torch.device:
        return next(iter(self.pieces[0].forms.values())).device

    def _jvp(self, V: Tensor) -> Tensor:
        slices = self.layer_collection.slices()
        packed = {n: layer.packing.pack(V[:, slices[n]]) for n, layer in self.layer_collection.layers.items()}
        with no_grad():
            return torch.cat([sum(f.dot(packed[n]) for n, f in p.forms.items()) for p in self.pieces], 2)  # type: ignore[misc]

    def _vjp(self, S: Tensor) -> Tensor:
        total: dict[str, Tensor] = {}
        start = 0
        with no_grad():
            for piece in self.pieces:
                u = S[:, :, start : start + piece.examples]
                start += piece.examples
                for name, form in piece.forms.items():
                    total[name] = total[name] + form.pull(u) if name in total else form.pull(u)
        layers = self.layer_collection.layers
        return torch.cat([layer.packing.unpack(total[name]) for name, layer in layers.items()], -1)

    def to_dense(self) -> PFMapDense:
        lc = self.layer_collection
        rows = stacked_rows(self.pieces, lc, self.shape[1], f"the dense form of {self}", "use jvp and vjp")
        return PFMapDense(lc, rows)

    def _inner(self, other: PFMap) -> Tensor:
        if not isinstance(other, PFMapFactored):
            return super()._inner(other)
        lc = self.layer_collection
        layout = Full((self.shape[0], other.shape[0]), (self.shape[1], other.shape[1]))
        with no_grad():
            left = [sides(p, None, lc, other.shape[1]).left for p in self.pieces]
            right = left if other is self else [sides(p, None, lc, self.shape[1]).right for p in other.pieces]
            rows = [torch.cat([tile(a, b, layout, list(lc)) for b in right], 2) for a in left]
        return layout.view(torch.cat(rows, 1))

    def __getitem__(self, examples: Any) -> PFMap:
        if not isinstance(examples, slice | int) or (isinstance(examples, slice) and examples.step not in (None, 1)):
            return super().__getitem__(examples)
        start, stop, _ = _as_slice(examples).indices(self.shape[1])
        pieces, first = [], 0
        for piece in self.pieces:
            a, b = max(start - first, 0), min(stop - first, piece.examples)
            if a < b:
                pieces.append(piece.narrow(a, b))
            first += piece.examples
        if not pieces:
            raise IndexError(f"{self} has no examples {start}:{stop}")
        return PFMapFactored(self.layer_collection, pieces)

    def layer(self, name: str) -> PFMapFactored:
        lc = LayerCollection({name: self.layer_collection.layer(name, "layer")})
        return PFMapFactored(lc, [BatchJacobian(p.examples, p.outputs, {name: p.forms[name]}) for p in self.pieces])

    def _scaled(self, c: float) -> PFMapFactored:
        return self._each(lambda f: f.scale(c))

    def _combined(self, other: Any, weight: float) -> PFMap:
        if not isinstance(other, PFMapFactored) or [p.examples for p in other.pieces] != [
            p.examples for p in self.pieces
        ]:
            return super()._combined(other, weight)
        check_same_space(self.layer_collection, other.layer_collection, arguments.name_of(other))
        self._check_like(other)
        pieces = []
        for one, two in zip(self.pieces, other.pieces, strict=True):
            if one.outputs != two.outputs:
                raise ValueError(f"{self} and {other} have other outputs")
            joined = {k: forms.add([f, two.forms[k].scale(weight)]) for k, f in one.forms.items()}
            pieces.append(BatchJacobian(one.examples, one.outputs, joined))
        return PFMapFactored(self.layer_collection, pieces)

    def to(self, device: torch.device | str | None = None, dtype: torch.dtype | None = None) -> PFMapFactored:
        """The same map on another device or in another dtype.

        Args:
            device: Where to, by default where it is.
            dtype: In which dtype, by default its own.
        """
        arguments.device(device)
        arguments.dtype(dtype, real=True)
        return self._each(lambda f: f.to(device, dtype))

    def _each(self, fn: Callable[[forms.LayerJacobian], forms.LayerJacobian]) -> PFMapFactored:
        pieces = [BatchJacobian(p.examples, p.outputs, {k: fn(f) for k, f in p.forms.items()}) for p in self.pieces]
        return PFMapFactored(self.layer_collection, pieces)


def _at(weights: Weights, slab: BatchJacobian) -> BatchJacobian:
    """A slab whose rows are those of the model at these weights, whenever they are made."""

    held = {name: form.within(lambda: Borrowed(weights.in_place)) for name, form in slab.forms.items()}
    return BatchJacobian(slab.examples, slab.outputs, held)


class PFMapImplicit(PFMap):
    """A map that is known by its products: of a model by automatic differentiation, or made of other maps.

    Args:
        layer_collection: The columns.
        outputs: ``(C, n)``; or a generator, as of :class:`PFMapDense`.
        jvp_of: The product, ``(k, P) -> (k, C, n)``.
        vjp_of: That with its transpose, ``(k, C, n) -> (k, P)``.
        like: An empty tensor of its dtype and device.
        generator: As of :class:`PFMapDense`.
        data: Leave it out.
        examples: As of :class:`PFMapDense`.
    """

    def __init__(
        self,
        layer_collection: Any = None,
        outputs: Any = None,
        jvp_of: Any = None,
        vjp_of: Any = None,
        like: Any = None,
        *,
        generator: Any = None,
        data: Any = None,
        examples: Any = None,
    ) -> None:
        if like is None:
            source, value = generator if outputs is None else outputs, data if jvp_of is None else jvp_of
            found = _made(PFMapImplicit, layer_collection, source, value, examples if vjp_of is None else vjp_of)
            vars(self).update(vars(found))
            return
        self.layer_collection = layer_collection
        self.outputs = outputs
        self._jvp_of = jvp_of
        self._vjp_of = vjp_of
        self.like = like

    def __deepcopy__(self, memo: dict[int, Any]) -> PFMapImplicit:
        return self  # nothing of it changes

    def __reduce_ex__(self, protocol: Any) -> Any:
        raise TypeError(
            "a map known by its products alone cannot be pickled: it holds the model, the data and functions of yours. "
            "Make it again from these where it is needed, or pickle to_dense()"
        )

    @classmethod
    def of(cls, generator: Generator, examples: Any) -> PFMapImplicit:
        """The Jacobian of the model of a generator at its parameters as they are now.

        While what autograd needs fits the memory budget, the forward pass is kept from one product to the next.

        Args:
            generator: The generator.
            examples: A loader, or one minibatch.
        """
        maps = jacobians(generator, examples)
        shapes = [(len(linear.f), linear.f[0].numel()) for linear, _, _ in maps]
        if len({c for _, c in shapes}) > 1:
            raise ValueError(f"the minibatches have different numbers of outputs: {sorted({c for _, c in shapes})}")

        def jvp(V: Tensor) -> Tensor:
            found = []
            for linear, _, held in maps:
                pieces = [linear.jvp(v.to(linear.f.dtype)) for v in V.split(chunk_length(held, len(V), V.device))]
                found.append(torch.cat(pieces).detach().reshape(len(V), len(linear.f), -1).transpose(1, 2))
            return torch.cat(found, 2).to(generator.dtype)

        def vjp(S: Tensor) -> Tensor:
            total = torch.zeros(len(S), generator.layer_collection.numel(), dtype=generator.dtype, device=S.device)
            start = 0
            for linear, _, held in maps:
                u = S[:, :, start : start + len(linear.f)].transpose(1, 2)
                start += len(linear.f)
                u = u.reshape(len(S), *linear.f.shape).to(linear.f.dtype)
                step = chunk_length(held, len(u), u.device)
                for some, into in zip(u.split(step), total.split(step), strict=True):
                    linear.add_vjp(some, into)
            return total

        like = torch.empty(0, dtype=generator.dtype, device=maps.device)
        return cls(generator.layer_collection, (shapes[0][1], sum(n for n, _ in shapes)), jvp, vjp, like)

    @property
    def shape(self) -> tuple[int, int, int]:
        return *self.outputs, self.layer_collection.numel()

    @property
    def dtype(self) -> torch.dtype:
        return self.like.dtype

    @property
    def device(self) -> torch.device:
        return self.like.device

    def _jvp(self, V: Tensor) -> Tensor:
        return self._jvp_of(V.detach())

    def _vjp(self, S: Tensor) -> Tensor:
        return self._vjp_of(S.detach())

    def to(self, device: torch.device | str | None = None, dtype: torch.dtype | None = None) -> PFMapImplicit:
        """The same map in another dtype, on the device where its model is.

        Args:
            device: That of the model.
            dtype: In which dtype, by default its own.

        Raises:
            ValueError: For another device.
        """
        arguments.device(device)
        arguments.dtype(dtype, real=True)
        if device is not None and torch.device(device) != self.device:
            raise ValueError("a map known by its products stays where its model is: move the model and build it again")
        there = self.dtype if dtype is None else dtype
        return PFMapImplicit(
            self.layer_collection,
            self.outputs,
            lambda V: self._jvp_of(V.to(self.dtype)).to(there),
            lambda S: self._vjp_of(S.to(self.dtype)).to(there),
            self.like.to(there),
        )


def _of_source(name: str, lc: Any, generator: Any, value: Any, examples: Any) -> tuple[Any, Any, Any, Any]:
    return old_arguments.of_source(name, lc, generator, value, examples, "Jacobian(model, loader)")


def _made(kind: type[PFMap], lc: Any, generator: Any, value: Any, examples: Any) -> Any:
    """The map of a backend of NNGeometry's."""
    _, generator, value, examples = _of_source(kind.__name__, lc, generator, value, examples)
    if value is not None:
        raise TypeError(f"{kind.__name__}: data= are the entries of a map: use PFMapDense(layer_collection, data)")
    return generator.map(kind, examples)


def _as_slice(examples: slice | int) -> slice:
    return examples if isinstance(examples, slice) else slice(examples, examples + 1 or None)
