"""Vectors in parameter space and in function space."""

from __future__ import annotations

from collections.abc import Mapping
from functools import reduce
from itertools import islice
from math import prod
from typing import Any, Self

import torch
from torch import Tensor, nn

from .. import arguments
from ..changes import alone, unrecorded
from ..layercollection import LayerCollection, split
from ..linalg import gaussian


class Array:
    """Arithmetic of one tensor of coordinates: vectors and dense maps."""

    #: What to write instead of an operation that has no meaning.
    _remedy = "its other side is a number or an object of the same kind"
    __array_ufunc__ = None  # numpy leaves operators to this class, and does not take it for an entry of an array

    def __init__(self, flat: Tensor) -> None:
        self._flat = flat

    def _like(self, flat: Tensor) -> Self:
        """The same kind of object with other values."""
        raise NotImplementedError

    def _operand(self, other: Any) -> Any:
        """What the other side of an operation is as a tensor; raises if it lives in another space."""
        if isinstance(other, Array):
            self._check_same_space(other)
            _check_tensors(self, other, "operands")
            return other._flat
        if isinstance(other, int | float) or (isinstance(other, Tensor) and other.ndim == 0):
            return other
        number = arguments.scalar(other)
        return NotImplemented if number is None else number

    def _check_same_space(self, other: Array) -> None:
        """Raise ``ValueError`` unless the other one has the same coordinates."""
        raise NotImplementedError

    def _binary(self, other: Any, sign: str, fn: Any) -> Any:
        operand = self._operand(other)
        if operand is NotImplemented:
            return arguments.unfit(sign, self, other, self._remedy)
        return self._like(fn(self._flat, operand))

    def _reflected(self, other: Any, sign: str, fn: Any) -> Any:
        operand = self._operand(other)
        if operand is NotImplemented:
            arguments.refuse(sign, other, self, self._remedy)
        return self._like(fn(operand, self._flat))

    def __add__(self, other: Any) -> Self:
        return self._binary(other, "+", lambda a, b: a + b)

    def __radd__(self, other: Any) -> Self:
        if isinstance(other, int) and other == 0:  # sum() starts from 0
            return self
        return self._reflected(other, "+", lambda a, b: a + b)

    def __sub__(self, other: Any) -> Self:
        return self._binary(other, "-", lambda a, b: a - b)

    def __rsub__(self, other: Any) -> Self:
        return self._reflected(other, "-", lambda a, b: a - b)

    def __mul__(self, other: Any) -> Self:
        return self._binary(other, "*", lambda a, b: a * b)

    def __rmul__(self, other: Any) -> Self:
        return self._reflected(other, "*", lambda a, b: a * b)

    def __truediv__(self, other: Any) -> Self:
        return self._binary(other, "/", lambda a, b: a / b)

    def __rtruediv__(self, other: Any) -> Self:
        return self._reflected(other, "/", lambda a, b: a / b)

    def __pow__(self, other: Any) -> Self:
        return self._binary(other, "**", lambda a, b: a**b)

    def __rpow__(self, other: Any) -> Any:
        arguments.refuse("**", other, self, self._remedy)

    def __neg__(self) -> Self:
        return self._like(-self._flat)

    def _in_place(self, other: Any, fn: Any) -> Self:
        operand = self._operand(other)
        if operand is NotImplemented:
            return NotImplemented
        if isinstance(other, Array) and other._flat.ndim > self._flat.ndim:
            raise ValueError(f"{arguments.described(other)} does not fit into {arguments.described(self)} in place")
        fn(self._flat, operand)
        return self

    def __iadd__(self, other: Any) -> Self:
        return self._in_place(other, Tensor.add_)

    def __isub__(self, other: Any) -> Self:
        return self._in_place(other, Tensor.sub_)

    def __imul__(self, other: Any) -> Self:
        return self._in_place(other, Tensor.mul_)

    def __itruediv__(self, other: Any) -> Self:
        return self._in_place(other, Tensor.div_)

    def to_torch(self) -> Tensor:
        """The values as one tensor."""
        return self._flat

    def norm(self, p: float = 2) -> Tensor:
        """The p-norm of all entries.

        Args:
            p: Any number, ``float("inf")`` included, by default 2.
        """
        if arguments.scalar(p) is None:
            raise TypeError(f"norm: p: expected a number, got {arguments.described(p)}")
        return torch.linalg.vector_norm(self._flat, p)

    def clone(self) -> Self:
        """A copy that shares no memory."""
        return self._like(self._flat.clone())

    def detach(self) -> Self:
        """The same values, outside of the autograd graph."""
        return self._like(self._flat.detach())

    def to(self, device: torch.device | str | None = None, dtype: torch.dtype | None = None) -> Self:
        """The same values on another device or in another dtype.

        Args:
            device: Where to, by default where it is.
            dtype: In which dtype, by default its own.
        """
        arguments.device(device)
        arguments.dtype(dtype)
        return self._like(self._flat.to(device=device, dtype=dtype))

    @property
    def dtype(self) -> torch.dtype:
        return self._flat.dtype

    @property
    def device(self) -> torch.device:
        return self._flat.device

    def size(self, dim: int | None = None) -> Any:
        """Its shape, or the length of one axis.

        Args:
            dim: The axis, None for all.
        """
        return self._flat.shape if dim is None else self._flat.shape[dim]


class FlatArray(Array):
    """An array whose last axis is the flat parameters of a layer collection."""

    def __init__(self, layer_collection: LayerCollection, flat: Tensor) -> None:
        super().__init__(flat)
        self.layer_collection = layer_collection

    def _like(self, flat: Tensor, layer_collection: LayerCollection | None = None) -> Self:
        """The same kind of object with other values, on other layers if given."""
        raise NotImplementedError

    def _check_same_space(self, other: Array) -> None:
        if not isinstance(other, FlatArray):
            raise TypeError(f"a {arguments.name_of(other)} is not in parameter space")
        check_same_space(self.layer_collection, other.layer_collection, arguments.name_of(other))

    def on(self, layer_collection: LayerCollection) -> Self:
        """The part on some of the layers.

        Args:
            layer_collection: These layers.

        Raises:
            ValueError: For a layer that this one does not have.
        """
        arguments.instance("layer_collection", layer_collection, LayerCollection, "take part of one with select(...)")
        for name, layer in layer_collection.layers.items():
            if name not in self.layer_collection or self.layer_collection[name] != layer:
                check_same_space(layer_collection, self.layer_collection, arguments.name_of(self))
        flat, slices = self._flat, self.layer_collection.slices()
        pieces = [flat[..., slices[name]] for name in layer_collection]
        return self._like(torch.cat(pieces, -1), layer_collection)

    def to_dict(self) -> dict[str, tuple[Tensor, ...]]:
        """Views of the values: for each layer, one tensor for each of its parameters (weight, bias)."""
        slices = self.layer_collection.slices()
        return {
            name: tuple(split(layer, self._flat[..., slices[name]]))
            for name, layer in self.layer_collection.layers.items()
        }


class PVector(FlatArray):
    """A vector in parameter space: one number for each parameter of a layer collection.

    It has arithmetic with numbers and with other vectors of the same layers, and ``v @ w`` is their inner product.
    Gradients flow through it.

    Args:
        layer_collection: The coordinates.
        vector_repr: Flat values ``(P,)``.
        dict_repr: Instead, for each layer a tuple of tensors in the shapes of its parameters.

    Raises:
        ValueError: If not just one of them is given, or shapes, devices or dtypes do not fit.

    Example:
        >>> model = nn.Linear(2, 1)
        >>> w = PVector.from_model(model)
        >>> torch.allclose((w - 0.1 * w).norm(), 0.9 * w.norm())
        True
    """

    _remedy = "a PVector goes with a number or another PVector of the same layers, PVector(layer_collection, tensor)"

    def __init__(
        self,
        layer_collection: LayerCollection,
        vector_repr: Tensor | None = None,
        dict_repr: Mapping[str, tuple[Tensor, ...]] | None = None,
    ) -> None:
        if (vector_repr is None) == (dict_repr is None):
            raise ValueError("PVector: give either vector_repr or dict_repr")
        arguments.instance("layer_collection", layer_collection, LayerCollection, _COLLECTION)
        if dict_repr is not None:
            vector_repr = _flatten(layer_collection, dict_repr)
        assert vector_repr is not None
        arguments.instance("vector_repr", vector_repr, Tensor, "make one with torch.as_tensor(values)")
        numel = layer_collection.numel()
        if vector_repr.shape != (numel,):
            raise ValueError(f"PVector: expected {numel} values in one axis, got shape {tuple(vector_repr.shape)}")
        super().__init__(layer_collection, vector_repr)

    def _like(self, flat: Tensor, layer_collection: LayerCollection | None = None) -> PVector:
        return PVector(self.layer_collection if layer_collection is None else layer_collection, flat)

    @classmethod
    def from_model(cls, model: nn.Module, layer_collection: LayerCollection | None = None) -> PVector:
        """The parameters of a model, inside the autograd graph: gradients of functions of it reach the model.

        It has the values that the model has at the time of each use, so one vector serves all steps of a training. What
        is made of it (``clone``, ``detach``, ``to``, arithmetic, ``w += d`` too, a pickle) stays as it is, and the
        model with it.

        Args:
            model: The model.
            layer_collection: Which parameters, by default all trainable ones.

        Raises:
            ValueError: If the model does not have the layers of the collection.

        Example:
            >>> model = nn.Linear(2, 1)
            >>> w = PVector.from_model(model)
            >>> start = w.clone().detach()
            >>> nn.init.zeros_(model.weight) is nn.init.zeros_(model.bias)
            False
            >>> w.norm(), torch.equal((w - start).norm(), start.norm())
            (tensor(0., grad_fn=<LinalgVectorNormBackward0>), True)
        """
        return _OfModel(model, _collection(model, layer_collection))

    @classmethod
    def from_model_grad(cls, model: nn.Module, layer_collection: LayerCollection | None = None) -> PVector:
        """The ``.grad`` of the parameters of a model, as a copy.

        Args:
            model: The model.
            layer_collection: Which parameters, by default all trainable ones.

        Raises:
            ValueError: If a parameter has none, with its name.
        """
        lc = _collection(model, layer_collection)
        grads = []
        for name, p in lc.named_parameters(model):
            if p.grad is None:
                raise ValueError(
                    f"parameter {name!r} has no gradient: call backward() first, or leave its layer out of the "
                    "collection"
                )
            grads.append(p.grad.flatten())
        return cls(lc, torch.cat(grads))

    @alone
    @unrecorded
    def copy_to_model(self, model: nn.Module) -> None:
        """Overwrite the collected parameters of a model, in place.

        Args:
            model: The model.
        """
        for p, v in self._of(model):
            p.copy_(v)

    @alone
    @unrecorded
    def add_to_model(self, model: nn.Module) -> None:
        """Add to the collected parameters of a model, in place.

        Args:
            model: The model.
        """
        for p, v in self._of(model):
            p.add_(v)

    def to_model_grad(self, model: nn.Module) -> None:
        """Overwrite the ``.grad`` of the collected parameters of a model, for an optimiser to use.

        Args:
            model: The model.
        """
        for p, v in self._of(model):
            p.grad = v.detach().to(p).clone()

    def _of(self, model: nn.Module) -> list[tuple[nn.Parameter, Tensor]]:
        values = [v for vs in self.to_dict().values() for v in vs]
        return list(zip(self.layer_collection.parameters(model), values, strict=True))

    def dot(self, other: PVector) -> Tensor:
        """The inner product of two vectors, a scalar.

        Args:
            other: A vector of the same layers.
        """
        if not isinstance(other, PVector):
            arguments.instance(
                "dot: the other vector", other, PVector, "make one with PVector(layer_collection, tensor)"
            )
        return torch.dot(self._flat, self._operand(other))

    def __matmul__(self, other: Any) -> Tensor:
        return self.dot(other) if isinstance(other, PVector) else arguments.unfit("@", self, other, self._remedy)

    def __rmatmul__(self, other: Any) -> Any:
        arguments.refuse("@", other, self, self._remedy)

    def __repr__(self) -> str:
        return f"PVector of {self.size(0)} parameters, {self.dtype}"


class _OfModel(PVector):
    """The parameters that a model has whenever they are asked for."""

    def __init__(self, model: nn.Module, layer_collection: LayerCollection) -> None:
        self.layer_collection = layer_collection
        self._model = model
        self._parameters()  # raises if the model does not have them

    def _parameters(self) -> list[nn.Parameter]:
        return self.layer_collection.parameters(self._model)

    @property
    def _flat(self) -> Tensor:  # type: ignore[override]
        return self._values()

    @alone
    def _values(self) -> Tensor:
        return torch.cat([p.flatten() for p in self._parameters()])

    @property
    def dtype(self) -> torch.dtype:
        return reduce(torch.promote_types, (p.dtype for p in self._parameters()))

    @property
    def device(self) -> torch.device:
        return self._parameters()[0].device

    def size(self, dim: int | None = None) -> Any:
        shape = torch.Size((self.layer_collection.numel(),))
        return shape if dim is None else shape[dim]

    def to_dict(self) -> dict[str, tuple[Tensor, ...]]:
        """The parameters of the model themselves, for each layer."""
        parameters = iter(self._parameters())
        return {name: tuple(islice(parameters, len(l.params))) for name, l in self.layer_collection.layers.items()}

    def _in_place(self, other: Any, fn: Any) -> Any:
        """``w += d`` is ``w = w + d``: the model is changed by ``d.add_to_model(model)`` alone."""
        operand = self._operand(other)
        return NotImplemented if operand is NotImplemented else self._like(fn(self._flat, operand))

    def __radd__(self, other: Any) -> Any:
        sum_ = super().__radd__(other)
        return self._like(self._flat) if sum_ is self else sum_

    def __copy__(self) -> PVector:
        return _OfModel(self._model, self.layer_collection)

    def __reduce__(self) -> Any:
        return PVector, (self.layer_collection, self._flat.detach())


class FVector(Array):
    """A vector in function space: one number for each of C outputs of n examples. It has arithmetic as a PVector has.

    Args:
        vector_repr: The values ``(C, n)``.

    Raises:
        ValueError: For another number of axes.

    Example:
        >>> u = FVector(torch.ones(3, 5))
        >>> (2 * u - u).dot(u)
        tensor(15.)
    """

    _remedy = "an FVector goes with a number or another FVector of the same shape, FVector(tensor)"

    def __init__(self, vector_repr: Tensor) -> None:
        arguments.instance("vector_repr", vector_repr, Tensor, "pass a tensor of shape (C, n)")
        if vector_repr.ndim != 2:
            raise ValueError(f"FVector: expected shape (C, n), got {tuple(vector_repr.shape)}")
        super().__init__(vector_repr)

    @property
    def vector_repr(self) -> Tensor:
        """The values ``(C, n)``."""
        return self._flat

    def _like(self, flat: Tensor) -> FVector:
        return FVector(flat)

    def _check_same_space(self, other: Array) -> None:
        if not isinstance(other, FVector):
            raise TypeError(f"a {arguments.name_of(other)} is not in function space")
        if other._flat.shape != self._flat.shape:
            raise ValueError(
                f"the FVector has {tuple(other._flat.shape)} outputs and examples, expected {tuple(self._flat.shape)}"
            )

    def dot(self, other: FVector) -> Tensor:
        """The inner product of two vectors, a scalar.

        Args:
            other: A vector of the same shape.
        """
        if not isinstance(other, FVector):
            arguments.instance("dot: the other vector", other, FVector, "make one with FVector(tensor) of shape (C, n)")
        return (self._flat * self._operand(other)).sum()

    def __matmul__(self, other: Any) -> Tensor:
        return self.dot(other) if isinstance(other, FVector) else arguments.unfit("@", self, other, self._remedy)

    def __rmatmul__(self, other: Any) -> Any:
        arguments.refuse("@", other, self, self._remedy)

    def __repr__(self) -> str:
        c, n = self._flat.shape
        return f"FVector of {c} outputs of {n} examples, {self._flat.dtype}"


@arguments.called_as
def random_pvector(
    layer_collection: LayerCollection,
    device: torch.device | str | None = None,
    dtype: torch.dtype | None = None,
    generator: torch.Generator | None = None,
) -> PVector:
    """A vector of independent standard normal entries.

    Args:
        layer_collection: The coordinates.
        device: Where, by default on the CPU.
        dtype: In which dtype, by default torch's default.
        generator: The source of randomness, on any device; they are drawn there. By default it is torch's global one.

    Example:
        >>> lc = LayerCollection.from_model(nn.Linear(2, 1))
        >>> random_pvector(lc, generator=torch.Generator().manual_seed(0)).size()
        torch.Size([3])
    """
    arguments.instance("layer_collection", layer_collection, LayerCollection, _COLLECTION)
    arguments.device(device)
    arguments.dtype(dtype)
    arguments.generator(generator)
    if dtype is not None and not (dtype.is_floating_point or dtype.is_complex):
        raise TypeError(f"dtype: normal numbers are of a floating point dtype, e.g. torch.float64, got {dtype}")
    like = torch.empty(0, device=device, dtype=dtype)
    return PVector(layer_collection, gaussian(1, layer_collection.numel(), like=like, generator=generator)[0])


#: What to write where a layer collection is asked for.
_COLLECTION = "make one with LayerCollection.from_model(model)"


def _collection(model: nn.Module, layer_collection: LayerCollection | None) -> LayerCollection:
    """The layers of a vector of a model, by default all."""
    if layer_collection is None:
        return LayerCollection.from_model(model)
    arguments.instance("layer_collection", layer_collection, LayerCollection, _COLLECTION)
    return layer_collection


def _flatten(layer_collection: LayerCollection, values: Mapping[str, tuple[Tensor, ...]]) -> Tensor:
    arguments.instance("dict_repr", values, Mapping, "give for each layer a tuple of tensors, as to_dict() does")
    if set(values) != set(layer_collection):
        odd = ", ".join(sorted(set(values) ^ set(layer_collection)))
        raise ValueError(f"dict_repr: its layers are not those of the collection; the difference is {odd}")
    pieces = []
    for name, layer in layer_collection.layers.items():
        if not isinstance(values[name], tuple | list) or not all(isinstance(v, Tensor) for v in values[name]):
            raise TypeError(f"dict_repr: layer {name!r}: expected a tuple of tensors, one for each of its parameters")
        shapes = [shape for _, shape in layer.params]
        found = [tuple(v.shape) for v in values[name]]
        if found != shapes:
            raise ValueError(f"dict_repr: layer {name!r} has tensors of shapes {found}, expected {shapes}")
        pieces += [v.reshape(prod(shape)) for v, shape in zip(values[name], shapes, strict=True)]
    for piece in pieces[1:]:
        _check_tensors(pieces[0], piece, "dict_repr")
    return torch.cat(pieces)


def check_same_space(mine: LayerCollection, other: LayerCollection, what: str) -> None:
    """Check that two collections are the same layers in the same order.

    Args:
        mine: The one.
        other: The other one.
        what: What the other one belongs to, for the message.

    Raises:
        ValueError: If they are not.
    """
    if mine is other or mine == other:
        return
    names = [n for n in mine if n not in other] + [n for n in other if n not in mine]
    detail = f"they differ in {', '.join(map(repr, names[:5]))}" if names else "their layers differ in shape or order"
    raise ValueError(f"the {what} is of another layer collection: {detail}. Build both from the same LayerCollection")


def _check_tensors(a: Tensor | Array, b: Tensor | Array, what: str) -> None:
    if a.device != b.device:
        raise ValueError(f"{what}: tensors on {a.device} and {b.device}; move one with .to(device)")
    if a.dtype != b.dtype:
        raise ValueError(f"{what}: tensors of {a.dtype} and {b.dtype}; cast one with .to(dtype=...)")
