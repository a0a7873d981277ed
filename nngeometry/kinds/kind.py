"""The table of layer kinds, and how a layer's parameters are packed into one tensor."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from functools import cache
from math import prod
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from ..arguments import described
from ..changes import Change
from ..forms import Places


@dataclass(frozen=True)
class Packing:
    """A bijection between the flat parameters of a layer (in order) and a tensor of shape ``shape``.

    With ``view=None`` the flat parameters are kept, ``shape = (p,)``. Otherwise the first parameter (the weight) is
    viewed as ``view``, its axes permuted by ``perm``, reshaped to ``shape``, and a bias, if there is one, becomes the
    last column. :meth:`flat` and :meth:`matrix` make the two sorts. Weight and bias may each be of several parameters,
    whose groups follow one another (``runs``).

    Args:
        shape: The shape of the tensor.
        view: The axes of the weight, None to keep the flat parameters.
        perm: Their order in the tensor.
        bias: Whether a bias is the last column.
        runs: Where the groups of the weight, and then those of the bias, are in the flat parameters, as pairs of start
            and stop; by default they are in this order.

    Example:
        >>> packing = Packing.matrix((1, 2, 3), (0, 1, 2), (1, 2), bias=True)
        >>> packing.pack(torch.arange(8))
        tensor([[[0, 1, 2, 6],
                 [3, 4, 5, 7]]])
    """

    shape: tuple[int, ...]
    view: tuple[int, ...] | None = None
    perm: tuple[int, ...] = ()
    bias: bool = False
    runs: tuple[tuple[int, int], ...] = ()

    @classmethod
    def flat(cls, numel: int) -> Packing:
        """The flat parameters as they are.

        Args:
            numel: How many there are.
        """
        return cls((numel,))

    @classmethod
    def matrix(
        cls,
        view: tuple[int, ...],
        perm: tuple[int, ...],
        rows: tuple[int, ...],
        bias: bool,
        runs: tuple[tuple[int, int], ...] = (),
    ) -> Packing:
        """The weight as ``(*rows, cols)``, plus a column for the bias.

        Args:
            view: The shape in which the weight is seen.
            perm: The order of these axes in the matrix.
            rows: The shape of the rows, ``(groups, rows of each)`` for a form with Kronecker factors.
            bias: Whether there is a bias, of one number for each row.
            runs: As of the class.
        """
        return cls((*rows, prod(view) // prod(rows) + bias), view, perm, bias, runs)

    def numel(self) -> int:
        """Number of entries."""
        return prod(self.shape)

    def without_bias(self) -> Packing:
        """The same of the weight alone."""
        if self.runs:
            raise NotImplementedError("a packing of several parameters has no part without bias")
        return Packing((*self.shape[:-1], self.shape[-1] - 1), self.view, self.perm)

    @property
    def crossed(self) -> bool | None:
        """Whether the tensor is the transpose of the weight, seen as a matrix of its first axis and all others, and not
        that matrix itself; None if it is neither.
        """
        if self.view is None or self.runs or self.shape[0] != 1 or len(self.view) != 3:
            return None
        if self.perm == (0, 1, 2) and self.view[0] == 1:
            return False
        return True if self.perm == (1, 2, 0) and self.view[1] == 1 else None

    @property
    def _in_order(self) -> bool:
        """Whether the axes of the weight are packed in their own order."""
        return list(self.perm) == sorted(self.perm)

    def pack(self, v: Tensor) -> Tensor:
        """From flat parameters to the tensor.

        Args:
            v: ``(..., p)``.

        Returns:
            ``(..., *shape)``.
        """
        if self.view is None:
            return v
        if self.runs:
            v = torch.cat([v[..., a:b] for a, b in self.runs], -1)
        lead = v.shape[:-1]
        weight = v[..., : prod(self.view)]
        if not self._in_order:
            n = len(lead)
            weight = weight.reshape(*lead, *self.view).permute(*range(n), *(n + k for k in self.perm))
        if not self.bias:
            return weight.reshape(*lead, *self.shape)
        weight = weight.reshape(*lead, *self.shape[:-1], self.shape[-1] - 1)
        bias = v[..., prod(self.view) :].reshape(*lead, *self.shape[:-1], 1)
        return torch.cat([weight, bias], -1)

    def unpack(self, m: Tensor) -> Tensor:
        """From the tensor to flat parameters, the inverse of :meth:`pack`.

        Args:
            m: ``(..., *shape)``.

        Returns:
            ``(..., p)``.
        """
        if self.view is None:
            return m
        lead = m.shape[: m.ndim - len(self.shape)]
        n = len(lead)
        weight = m[..., :-1] if self.bias else m
        if not self._in_order:
            weight = weight.reshape(*lead, *(self.view[k] for k in self.perm))
            weight = weight.permute(*range(n), *(n + self.perm.index(k) for k in range(len(self.perm))))
        flat = weight.reshape(*lead, prod(self.view))
        if self.bias:
            flat = torch.cat([flat, m[..., -1].reshape(*lead, prod(self.shape[:-1]))], -1)
        if not self.runs:
            return flat
        pieces = zip(self.runs, flat.split([b - a for a, b in self.runs], -1), strict=True)
        return torch.cat([piece for _, piece in sorted(pieces, key=lambda pair: pair[0])], -1)

    def places(self, v: Tensor) -> Places:
        """Where the parts of the tensor are in flat parameters, as views of these.

        Args:
            v: Flat parameters ``(..., p)``.
        """
        if self.view is None:
            return [((slice(None),), v)]
        lead, n = v.shape[:-1], v.ndim - 1
        every, size = slice(None), prod(self.view)
        columns, last = (slice(-1), slice(-1, None)) if self.bias else (every, every)
        if self.runs:
            return self._places_of_groups(v, columns, last)
        if self._in_order:
            weight = v[..., :size].view(*lead, *self.shape[:-1], -1)
        else:
            weight = v[..., :size].view(*lead, *self.view).permute(*range(n), *(n + k for k in self.perm))
        rows = [every] * (len(self.shape) - 1)
        if not self.bias:
            return [((*rows, columns), weight)]
        return [((*rows, columns), weight), ((*rows, last), v[..., size:].view(*lead, *self.shape[:-1], 1))]

    def _places_of_groups(self, v: Tensor, columns: slice, last: slice) -> Places:
        """Those of a weight, and a bias, each of several parameters that have some of the groups."""
        groups, rows, _ = self.shape
        found, group = [], 0
        for a, b in self.runs:
            of_weight = group < groups
            width = prod(self.view or ()) // (groups * rows) if of_weight else 1
            count = (b - a) // (rows * width)
            index = slice(group % groups, group % groups + count), slice(None), columns if of_weight else last
            found.append((index, v[..., a:b].view(*v.shape[:-1], count, rows, width)))
            group += count
        return found

    def state(self) -> list[Any]:
        """Plain values, from which :meth:`from_state` makes it again."""
        found = [list(self.shape), None if self.view is None else list(self.view), list(self.perm), self.bias]
        return [*found, [list(run) for run in self.runs]] if self.runs else found

    @classmethod
    def from_state(cls, state: Sequence[Any]) -> Packing:
        """The packing of which :meth:`state` gave these values.

        Args:
            state: The values.
        """
        shape, view, perm, bias, *runs = state
        pairs = tuple((a, b) for a, b in runs[0]) if runs else ()
        return cls(tuple(shape), None if view is None else tuple(view), tuple(perm), bias, pairs)


#: ``(module, gy, *inputs) -> form``, see :func:`kind`.
KindFunction = Callable[..., Any]
#: ``(module, bias) -> packing``, with or without a column for the module's last parameter.
PackingFunction = Callable[[Any, bool], Packing]
_USUAL = ("weight", "bias")


@dataclass(frozen=True)
class Kind:
    """How modules of one exact type give their Jacobian.

    Args:
        function: From the module, ``gy (C, B, *y)`` and its inputs ``(B, *x)`` to a form in the shape of the packing;
            None for the generic kind, which differentiates the module itself.
        packing: See :func:`kind`.
        kronecker: Whether the form has Kronecker factors.
        features_last: Whether the function takes any number of axes in front of the last one.
        whole: Whether the module owns all parameters below it, so that its children are not layers.
        parameters: The names of those that the form is with respect to, in its order.
        ours: Whether it is one of the library's own, whose Jacobians are known to be right; others are compared with
            autograd.
        bound: Whether the function is given the arguments of the call by their names, those with an axis of examples
            with that in front, and the names of the tensors without one, instead of its tensors in order; it may then
            return None where it does not know the call.
    """

    function: KindFunction | None
    packing: PackingFunction | None = None
    kronecker: bool = False
    features_last: bool = False
    whole: bool = False
    parameters: tuple[str, ...] = _USUAL
    ours: bool = False
    bound: bool = False

    @property
    def name(self) -> str:
        """The name of its function."""
        if self.function is None:
            return "generic"
        return getattr(self.function, "__name__", type(self.function).__name__)

    def known(self, params: dict[str, nn.Parameter]) -> dict[str, nn.Parameter]:
        """Those of a module's parameters that the form is with respect to, in its order."""
        return params if self.function is None else {k: params[k] for k in self.parameters if k in params}

    def packing_of(self, module: nn.Module, known: dict[str, nn.Parameter]) -> Packing:
        """How the parameters of a module that are known are packed in the form."""
        if self.packing is None:
            return Packing.flat(sum(p.numel() for p in known.values()))
        return self.packing(module, len(self.parameters) > 1 and self.parameters[-1] in known)


GENERIC = Kind(None, ours=True)
_WHOLE = Kind(None, whole=True, ours=True)
_TABLE: dict[type[nn.Module], Kind] = {}


def kind(
    *types: type[nn.Module],
    packing: PackingFunction | None = None,
    parameters: Sequence[str] = _USUAL,
    kronecker: bool = False,
    features_last: bool = False,
) -> Callable[[KindFunction], KindFunction]:
    """Register a function as the Jacobian of modules of exactly these types.

    A subclass may compute something else: it is left to the generic kind, which is exact, until it is registered
    itself.

    The function receives ``(module, gy, *inputs)``: the cotangents of the module's output, ``(C, B, *y)``, and its
    tensor inputs, ``(B, *x)``, and returns a form of :mod:`nngeometry.forms`. It is compared with autograd on a few
    examples before it is used. A module that has collected parameters with other names, or has them in its children, is
    an error of :meth:`LayerCollection.from_model`.

    Args:
        *types: The types of modules.
        packing: From the module, and whether it has the last of several parameters, to how they are laid out in the
            form; by default end to end, ``(C, B, p)``.
        parameters: The names of the module's own parameters that the form is with respect to, in its order, frozen ones
            too: what is not collected is cut out. A module may lack some of them (a bias that is None). It may have
            others if they are not collected, e.g. because they are frozen. By default they are weight and bias.
        kronecker: Whether the form has Kronecker factors (an ``Outer`` of a first parameter, and maybe a bias in its
            last column); by default not.
        features_last: Whether the function takes any number of axes in front of the last one; by default not.

    Returns:
        A decorator, which returns the function as it is.

    Raises:
        TypeError: For what is not a type of modules or not a function.
        ValueError: For names that are none.

    Example:
        >>> class Scale(nn.Module):
        ...     def __init__(self):
        ...         super().__init__()
        ...         self.factor = nn.Parameter(torch.ones(1))
        ...     def forward(self, x):
        ...         return self.factor * x
        >>> from nngeometry.forms import Dense
        >>> @kind(Scale, parameters=["factor"])
        ... def scale(module, gy, x):
        ...     return Dense((gy * x).flatten(2).sum(2, keepdim=True))
    """
    _check_types("kind", types, "write @kind(TheModule, ...) above the function")
    if packing is not None and not callable(packing):
        raise TypeError(f"kind: packing: expected a function of the module, got {described(packing)}")
    if not isinstance(parameters, Iterable):
        raise TypeError(f"kind: parameters={parameters!r}: expected the names of parameters")
    names = (parameters,) if isinstance(parameters, str) else tuple(parameters)
    if not names or len(set(names)) < len(names) or not all(isinstance(name, str) and name for name in names):
        raise ValueError(f"kind: parameters={parameters!r} must be different names of parameters")

    def register(function: KindFunction) -> KindFunction:
        if not callable(function):
            raise TypeError(f"kind: expected a function (module, gy, *inputs), got {described(function)}")
        _register_imported()
        for t in types:
            _TABLE[t] = Kind(function, packing, kronecker, features_last, parameters=names)
        return function

    return register


def built_in(
    *types: type[nn.Module], whole: bool = False, bound: bool = False, **options: Any
) -> Callable[[KindFunction], KindFunction]:
    """:func:`kind` for those of the library."""
    add = kind(*types, **options)

    def register(function: KindFunction) -> KindFunction:
        add(function)
        for t in types:
            _TABLE[t] = replace(_TABLE[t], ours=True, whole=whole, bound=bound)
        return function

    return register


def _check_types(what: str, types: Sequence[Any], remedy: str) -> None:
    for t in types:
        if not (isinstance(t, type) and issubclass(t, nn.Module)):
            raise TypeError(f"{what}: {described(t)} is not a type of modules: {remedy}")
    if not types:
        raise TypeError(f"{what}: name the types of modules: {remedy}")


def whole(*types: type[nn.Module]) -> None:
    """Declare that modules of these types use the parameters of their children without calling them: each is one layer.

    Args:
        *types: The types of modules.

    Raises:
        TypeError: For what is not a type of modules.

    Example:
        >>> class Block(nn.Module):
        ...     pass
        >>> whole(Block)
    """
    _check_types("whole", types, "write whole(TheModule)")
    for t in types:
        _TABLE[t] = _WHOLE


def declared_whole(of: type[nn.Module]) -> Change:
    """What :func:`whole` declares, as a change."""

    def change() -> Callable[[], Any]:
        before = _TABLE.get(of)
        _TABLE[of] = _WHOLE
        return lambda: _TABLE.pop(of) if before is None else _TABLE.update({of: before})

    return change


_LATER: dict[str, Callable[[], None]] = {}


def when_imported(name: str) -> Callable[[Callable[[], None]], Callable[[], None]]:
    """Register kinds for an optional package only once the user's program has imported its module ``name``."""

    def register(function: Callable[[], None]) -> Callable[[], None]:
        _LATER[name] = function
        return function

    return register


def _register_imported() -> None:
    for name in [name for name in _LATER if name in sys.modules]:
        _LATER.pop(name, _nothing)()  # registering one comes here again


def _nothing() -> None:
    """For a package whose kinds are registered already."""


#: From a type of modules that is not in the table to one that computes the same and is, if there is such.
_ALIKE: list[Callable[[type[nn.Module]], type[nn.Module] | None]] = []


def computing_alike(
    function: Callable[[type[nn.Module]], type[nn.Module] | None],
) -> Callable[[type[nn.Module]], type[nn.Module] | None]:
    """Have types of modules served by the kind of another type, where a function says that both compute the same."""
    _ALIKE.append(function)
    return function


@cache
def _alike(t: type[nn.Module]) -> type[nn.Module] | None:
    """The type whose kind serves one that has none of its own."""
    return next((found for function in _ALIKE if (found := function(t)) is not None), None)


def is_ours(found: Kind) -> bool:
    """Whether a kind is one of the library's own, and not the user's."""
    return found.ours


def own_parameters(module: nn.Module) -> dict[str, nn.Parameter]:
    """The parameters of a module itself, by all of their names."""
    return {name: p for name, p in module._parameters.items() if p is not None}


def kind_of(module: nn.Module) -> Kind:
    """The kind of a module, by exact type; the generic kind for everything else, which is exact, only slower."""
    _register_imported()
    if parametrize.is_parametrized(module):
        return _WHOLE
    found = _TABLE.get(type(module))
    if found is None and (alike := _alike(type(module))) is not None:  # type: ignore[arg-type]
        _register_imported()
        found = _TABLE.get(alike)
    return GENERIC if found is None else found


def serving(found: Kind, params: dict[str, nn.Parameter]) -> Kind:
    """A kind, or the generic one if it is the library's own and a module has not the parameters that it is for.

    E.g. the old torch.nn.utils.weight_norm replaces the weight of an instance.
    """
    if found.function is None or (found.parameters[0] in params and list(found.known(params)) == list(params)):
        return found
    if is_ours(found):
        return _WHOLE if found.whole else GENERIC
    return found
