"""The table of layer kinds, and how a layer's parameters are packed into one tensor."""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import dataclass
from math import prod
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from ..forms import LayerJacobian, Places


@dataclass(frozen=True)
class Packing:
    """A bijection between the flat parameters of a layer (in order) and a tensor of shape ``shape``.

    With ``view=None`` the flat parameters are kept, ``shape = (p,)``. Otherwise the first parameter (the weight) is
    viewed as ``view``, its axes permuted by ``perm``, reshaped to ``shape``, and a bias, if there is one, becomes
    the last column.
    """

    shape: tuple[int, ...]
    view: tuple[int, ...] | None = None
    perm: tuple[int, ...] = ()
    bias: bool = False

    @classmethod
    def flat(cls, numel: int) -> Packing:
        return cls((numel,))

    @classmethod
    def matrix(
        cls,
        view: tuple[int, ...],
        perm: tuple[int, ...],
        rows: tuple[int, ...],
        bias: bool,
    ) -> Packing:
        """The weight viewed as ``view``, permuted by ``perm``, as ``(*rows, cols)`` plus a column for the bias."""
        return cls((*rows, prod(view) // prod(rows) + bias), view, perm, bias)

    @property
    def _in_order(self) -> bool:
        """Whether the axes of the weight are packed in their own order."""
        return list(self.perm) == sorted(self.perm)

    def pack(self, v: Tensor) -> Tensor:
        """``(..., p) -> (..., *shape)``."""
        if self.view is None:
            return v
        lead = v.shape[:-1]
        weight = v[..., : prod(self.view)]
        if not self._in_order:
            n = len(lead)
            weight = weight.reshape(*lead, *self.view).permute(*range(n), *(n + k for k in self.perm))
        if not self.bias:
            return weight.reshape(*lead, *self.shape)
        weight = weight.reshape(*lead, *self.shape[:-1], -1)
        bias = v[..., prod(self.view) :].reshape(*lead, *self.shape[:-1], 1)
        return torch.cat([weight, bias], -1)

    def unpack(self, m: Tensor) -> Tensor:
        """``(..., *shape) -> (..., p)``, the inverse of :meth:`pack`."""
        if self.view is None:
            return m
        lead = m.shape[: m.ndim - len(self.shape)]
        n = len(lead)
        weight = m[..., :-1] if self.bias else m
        if not self._in_order:
            weight = weight.reshape(*lead, *(self.view[k] for k in self.perm))
            weight = weight.permute(*range(n), *(n + self.perm.index(k) for k in range(len(self.perm))))
        weight = weight.reshape(*lead, -1)
        if not self.bias:
            return weight
        return torch.cat([weight, m[..., -1].reshape(*lead, -1)], -1)

    def places(self, v: Tensor) -> Places:
        """Where the columns of what :meth:`unpack` takes are in what it returns, ``(..., p)``: views of that."""
        if self.view is None:
            return [(slice(None), v)]
        lead, n = v.shape[:-1], v.ndim - 1
        size = prod(self.view)
        if self._in_order:
            weight = v[..., :size].view(*lead, *self.shape[:-1], -1)
        else:
            weight = v[..., :size].view(*lead, *self.view).permute(*range(n), *(n + k for k in self.perm))
        if not self.bias:
            return [(slice(None), weight)]
        return [(slice(-1), weight), (slice(-1, None), v[..., size:].view(*lead, *self.shape[:-1], 1))]


#: ``(module, gy, *inputs) -> form``, see :func:`kind`.
KindFunction = Callable[..., LayerJacobian]
#: ``(module, bias) -> packing``, with or without a column for the module's bias.
PackingFunction = Callable[[Any, bool], Packing]


@dataclass(frozen=True)
class Kind:
    """How modules of one exact type give their Jacobian.

    function: from the module, ``gy (C, B, *y)`` and its inputs ``(B, *x)`` to a form in the shape of
    ``packing(module, bias)``; None for the generic kind, which differentiates the module itself. kronecker: the
    form has Kronecker factors. whole: the module owns all parameters below it (its children are not layers).
    """

    function: KindFunction | None
    packing: PackingFunction | None = None
    kronecker: bool = False
    features_last: bool = False
    whole: bool = False


GENERIC = Kind(None)
_WHOLE = Kind(None, whole=True)
_TABLE: dict[type[nn.Module], Kind] = {}


def kind(
    *types: type[nn.Module], packing: PackingFunction, kronecker: bool = False, features_last: bool = False
) -> Callable[[KindFunction], KindFunction]:
    """Register a function as the Jacobian of modules of exactly these types (a subclass may compute something else).

    The function receives ``(module, gy, *inputs)``: the cotangents of the module's output, ``(C, B, *y)``, and its
    tensor inputs, ``(B, *x)``, and returns a form of :mod:`nngeometry.forms` in the shape that ``packing(module,
    bias)`` says.

    >>> class Scale(nn.Module):
    ...     def __init__(self):
    ...         super().__init__()
    ...         self.weight = nn.Parameter(torch.ones(1))
    ...     def forward(self, x):
    ...         return self.weight * x
    >>> from nngeometry.forms import Dense
    >>> @kind(Scale, packing=lambda module, bias: Packing.flat(1))
    ... def scale(module, gy, x):
    ...     return Dense((gy * x).flatten(2).sum(2, keepdim=True))
    """

    def register(function: KindFunction) -> KindFunction:
        for t in types:
            _TABLE[t] = Kind(function, packing, kronecker, features_last)
        return function

    return register


def whole(*types: type[nn.Module]) -> None:
    """Declare that modules of these types use the parameters of their children without calling them: each is one layer.

    >>> class Block(nn.Module):
    ...     pass
    >>> whole(Block)
    """
    for t in types:
        _TABLE[t] = _WHOLE


#: The parameters that the functions of the table know.
_USUAL = (["weight"], ["weight", "bias"])
_LATER: dict[str, Callable[[], None]] = {}


def when_imported(name: str) -> Callable[[Callable[[], None]], Callable[[], None]]:
    """Register kinds for an optional package only once the user's program has imported its module ``name``."""

    def register(function: Callable[[], None]) -> Callable[[], None]:
        _LATER[name] = function
        return function

    return register


def is_ours(found: Kind) -> bool:
    """Whether a kind is one of the library's own, whose Jacobians are known to be right, and not the user's."""
    return found.function is None or found.function.__module__.startswith(__package__ + ".")


def own_parameters(module: nn.Module) -> dict[str, nn.Parameter]:
    """The parameters of a module itself, each once: ``named_parameters(recurse=False)``, which takes several times as
    long.
    """
    found = {name: p for name, p in module._parameters.items() if p is not None}
    return found if len({id(p) for p in found.values()}) == len(found) else dict(module.named_parameters(recurse=False))


def kind_of(module: nn.Module) -> Kind:
    """The kind of a module, by exact type; the generic kind for everything else, which is exact, only slower."""
    for name in [name for name in _LATER if name in sys.modules]:
        _LATER.pop(name)()
    if parametrize.is_parametrized(module):
        return _WHOLE
    found = _TABLE.get(type(module), GENERIC)
    if found.function is not None and list(own_parameters(module)) not in _USUAL:
        return GENERIC  # e.g. the old torch.nn.utils.weight_norm, which replaces the weight on an instance
    return found
