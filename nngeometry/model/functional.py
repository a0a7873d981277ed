"""Weights that are used without a call of their layer: ``F.linear(x, layer.weight)``, look-ups in a tied table, and
parameters of containers that are added to activations, multiplied with them or given to every example.

A use is one functional call on a parameter, or on consecutive rows and columns of it. Its input and its output are
recorded as those of a call of the layer are, so that the layer keeps its form, and several uses add.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence, Set
from math import prod
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from ..changes import Change, entered, forward_hook
from ..derivatives.pulling import nodes
from ..forms import Gather, LayerJacobian, Lazy, Outer
from ..kinds import Kind, Packing
from ..kinds.affine import conv, embedding
from ..layercollection import Site
from .parts import Home, Matrix, Part, Vector, late
from .recording import Call, Recorder


class Uses(TorchFunctionMode):
    """Inside of it, uses of collected parameters outside of the calls of their own modules are recorded.

    recorder: what they are recorded by. sites: the modules that are recorded. opened: the names of those whose
    parameters are seen by their uses only, instead of by calls of the module.
    """

    def __init__(self, recorder: Recorder, sites: Sequence[Site], opened: Set[str] = frozenset()) -> None:
        super().__init__()
        self._recorder = recorder
        self._sites = [site for site in sites if site.name not in opened]
        self._homes = {
            id(site.params[name]): (Home(site, layer, k), site.params[name])
            for site in sites
            for layer, names in site.routes
            if layer.name == site.name
            for name, k in names.items()
            if name in site.params
        }
        #: Parameters in another precision, as they were made of these.
        self._casts: dict[int, tuple[Home, Tensor]] = {}
        #: The parameters of the modules that are being called, whose calls are recorded as such.
        self._inside: list[set[int]] = []

    def changes(self) -> list[Change]:
        """What has to be in force: the mode, and hooks that tell of the modules that are being called."""
        hooks: list[Change] = []
        for site in self._sites:
            own = {id(p) for p in site.params.values()}
            hooks.append(_before(site.module, lambda *_, own=own: self._inside.append(own)))
            hooks.append(forward_hook(site.module, lambda *_: self._leave(), prepend=True))
        return [*hooks, entered(self)]

    def _leave(self) -> None:
        self._inside.pop()

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        seen = _READ.get(func)
        self._recorder.hooked |= func is Tensor.register_hook
        if seen is None or not any(self._base(t) is not None for t in _operands(*args, *kwargs.values())):
            return func(*args, **kwargs)
        return seen(self, lambda: func(*args, **kwargs), *args, **kwargs)

    def _base(self, t: Any) -> tuple[Home, Tensor] | None:
        """The parameter that a tensor is, or is a view of, if its use counts."""
        if not isinstance(t, Tensor):
            return None
        key = id(t) if id(t) in self._homes or id(t) in self._casts else id(t._base)
        found = self._homes.get(key) or self._casts.get(key)
        if found is None or any(key in own for own in self._inside):
            return None
        if key != id(t) and t.grad_fn is None:  # a view made under torch.no_grad is a constant
            return None
        return found

    def cast(self, t: Any, y: Tensor) -> None:
        """Remember a parameter in another precision, whose derivative is that of the parameter."""
        found = self._base(t)
        if found is not None and found[1] is t and y is not t and y.requires_grad:
            self._casts[id(y)] = found[0], y

    def matrix(self, t: Any) -> Matrix | None:
        """What part of a parameter a tensor is, None if it is none or not a matrix."""
        found = self._base(t)
        return None if found is None else Matrix.of(t, found[1], found[0])

    def vector(self, t: Any) -> Vector | None:
        """The same of one axis."""
        found = self._base(t)
        return None if found is None else Vector.of(t, found[1], found[0])

    def scaled(self, t: Any) -> tuple[Vector, Tensor | None] | None:
        """Of which vector a tensor is made, and by what its derivative is that of it, entry by entry: a bias of which
        some entries were set to zero (on a copy), or one times a number. None for another tensor.
        """
        v = self.vector(t)
        if v is not None:
            return v, None
        if not isinstance(t, Tensor) or t.ndim != 1 or not t.requires_grad:
            return None
        leaves: set[int] = set()
        for k, node in enumerate(nodes([t])):
            if k == _MOST_NODES:
                return None
            if hasattr(node, "variable"):
                leaves.add(id(node.variable))
        found = self._homes.get(leaves.pop()) if len(leaves) == 1 else None
        if found is None or found[1].shape != t.shape or self._base(found[1]) is None:
            return None
        slope, again = _pulled(t, found[1], 1.0), _pulled(t, found[1], 2.0)
        entries = _generic(t, 1.0), _generic(t, 2.0)
        slope = slope / entries[0]
        if not torch.allclose(slope * entries[1], again, rtol=8 * torch.finfo(t.dtype).eps, atol=0.0):
            return None  # entries depend on each other
        return Vector(found[0], 0, len(t)), slope

    def part(self, t: Any) -> Part | None:
        """The entries of a parameter that a tensor has, None if it has none."""
        found = self._base(t)
        return None if found is None else Part.of(t, found[1], found[0])

    def add(self, home: Home, form: Callable[..., LayerJacobian], x: Tensor, y: Tensor, features_last: bool) -> Tensor:
        """Record one use, and return the output that is passed on."""
        if not y.requires_grad:
            return y
        layer = home.layer
        names = {name: k for k, (name, _) in enumerate(layer.params)}
        params = {
            name: p for h, p in self._homes.values() if h.layer is layer for name in [layer.params[h.position][0]]
        }
        kind = Kind(lambda _, gy, x: form(gy, x), features_last=features_last, ours=True)
        site = Site(home.site.name, home.site.module, kind, {k: params[k] for k in names}, ((layer, names),))
        return self._recorder.add(site, (x,), {}, y)

    def linear(self, x: Tensor, weight: Any, bias: Any, y: Tensor) -> Tensor:
        """Record ``y = F.linear(x, weight, bias)``."""
        w = self.matrix(weight) if x.layout == torch.strided else None
        b, slope = self.scaled(bias) or (None, None)
        together = w is not None and b is not None and slope is None and b.belongs_to(w)
        if w is not None:
            y = self.add(w.home, lambda gy, x: w.form(gy, x, together), x, y, True)
        if b is not None and not together:
            y = self.add(b.home, lambda gy, x: b.form(gy if slope is None else gy * slope, x), y, y, True)
        return y


def _operands(*given: Any) -> Iterator[Any]:
    """What a function is called with, also in a list."""
    for x in given:
        yield from x if isinstance(x, list | tuple) else (x,)


#: From a function to what records a call of it, ``(uses, compute, *its arguments)``, by the names that torch has.
_READ: dict[Any, Callable[..., Any]] = {}
_Compute = Callable[[], Tensor]


def _reads(*functions: Any) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    def register(seen: Callable[..., Any]) -> Callable[..., Any]:
        _READ.update(dict.fromkeys(functions, seen))
        return seen

    return register


@_reads(F.linear)
def _linear(uses: Uses, compute: _Compute, input: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    return uses.linear(input, weight, bias, compute())


@_reads(Tensor.to, Tensor.type_as, Tensor.float, Tensor.double, Tensor.half, Tensor.bfloat16)
def _to(uses: Uses, compute: _Compute, t: Any, *how: Any, **named: Any) -> Tensor:
    y = compute()
    uses.cast(t, y)
    return y


@_reads(torch.matmul, torch.mm, Tensor.matmul, Tensor.mm, Tensor.__matmul__)
def _matmul(
    uses: Uses, compute: _Compute, input: Tensor, other: Any = None, *, mat2: Any = None, out: Any = None
) -> Tensor:
    other = mat2 if other is None else other
    if out is None and isinstance(other, Tensor) and other.ndim == 3 <= input.ndim:
        return _matrices(uses, compute, input, other)
    if out is None and uses.matrix(other) is not None and input.ndim > 0:
        return uses.linear(input, other.mT, None, compute())
    if out is None and uses.matrix(input) is not None and other.ndim > 1:  # the same from the left
        return uses.linear(other.mT, input, None, compute().mT).mT
    return compute()


@_reads(torch.bmm, Tensor.bmm)
def _bmm(uses: Uses, compute: _Compute, input: Tensor, mat2: Tensor, *, out: Any = None) -> Tensor:
    return compute() if out is not None else _matrices(uses, compute, input, mat2)


def _matrices(uses: Uses, compute: _Compute, x: Tensor, w: Tensor) -> Tensor:
    """``x @ w`` with a matrix for each group ``(groups, in, out)``, as batched experts have them."""
    y, part = compute(), uses.part(w)
    if part is None or x.shape[-3] != w.shape[0]:
        return y
    y = uses.add(part.home, part.matrices, x.movedim(-3, -2), y.movedim(-3, -2), True)
    return y.movedim(-2, -3)


@_reads(Tensor.__rmatmul__)
def _rmatmul(uses: Uses, compute: _Compute, a: Tensor, b: Tensor) -> Tensor:
    return _matmul(uses, compute, b, a)


@_reads(torch.addmm, Tensor.addmm)
def _addmm(uses: Uses, compute: _Compute, input: Tensor, mat1: Tensor, mat2: Any, *old: Any, **scales: Any) -> Tensor:
    if old or scales or input.ndim != 1 or uses.matrix(mat2) is None:
        return compute()
    return uses.linear(mat1, mat2.mT, input, compute())


@_reads(torch.add, Tensor.add, Tensor.__add__, Tensor.__radd__, Tensor.__iadd__)
def _add(uses: Uses, compute: _Compute, input: Any, other: Any, *old: Any, **scales: Any) -> Tensor:
    y = compute()
    if old or scales:
        return y
    for one, two in ((input, other), (other, input)):
        v = uses.vector(one)
        if v is not None and isinstance(two, Tensor) and two.shape == y.shape:
            return uses.add(v.home, v.form, two, y, True)
        part = uses.part(one)
        if part is not None and _of_examples(two, y) and _alike_for_all(part, y):
            return uses.add(part.home, _along(uses, one) or part.form, two, y, False)
    return y


def _along(uses: Uses, t: Tensor) -> Callable[..., LayerJacobian] | None:
    """How a bias is added that has its entries along another axis than the last one, ``bias[:, None]``: it keeps its
    Kronecker factors. None if t is something else.
    """
    axes = [k for k in range(-t.ndim, 0) if t.shape[k] > 1]
    v = uses.vector(t.flatten()) if len(axes) == 1 else None
    if v is None or not v.in_last_column:
        return None
    return lambda gy, x: v.form(gy.movedim(axes[0], -1), x)


@_reads(torch.mul, torch.multiply, Tensor.mul, Tensor.multiply, Tensor.__mul__, Tensor.__rmul__)
def _mul(uses: Uses, compute: _Compute, input: Any, other: Any, *, out: Any = None) -> Tensor:
    y = compute()
    if out is not None:
        return y
    for one, two in ((input, other), (other, input)):
        part = uses.part(one)
        if part is not None and uses.part(two) is None and _of_examples(two, y) and _alike_for_all(part, y):
            return uses.add(part.home, lambda gy, x, part=part: part.form(gy, x, True), two, y, False)
    return y


@_reads(Tensor.expand, Tensor.expand_as)
def _expand(uses: Uses, compute: _Compute, t: Tensor, *size: Any, **named: Any) -> Tensor:
    """What every example is given, where the first axis is theirs."""
    y, part = compute(), uses.part(t)
    if part is None or not _alike_for_all(part, y):
        return y
    return uses.add(part.home, part.form, y, y, False)


def _generic(t: Tensor, phase: float) -> Tensor:
    """A vector like another one, without zeros, and another one for each phase."""
    return torch.cos(torch.arange(len(t), dtype=t.dtype, device=t.device) + phase).add_(2)


def _pulled(y: Tensor, t: Tensor, phase: float) -> Tensor:
    """The derivative in t of a generic sum of what is made of it."""
    return torch.autograd.grad(y, t, _generic(y, phase), retain_graph=True)[0].detach()


#: Of how many operations what is made of a bias is looked through.
_MOST_NODES = 32


def _of_examples(x: Any, y: Tensor) -> bool:
    """Whether an operand has all entries of the result."""
    return isinstance(x, Tensor) and x.shape == y.shape and x.is_floating_point()


def _alike_for_all(part: Part, y: Tensor) -> bool:
    """Whether it has no axis that meets the first one of the result."""
    return part.index.ndim < y.ndim or (part.index.ndim == y.ndim and part.index.shape[0] == 1)


@_reads(torch.einsum)
def _einsum(uses: Uses, compute: _Compute, equation: Any, *operands: Any) -> Tensor:
    """Two operands of which one is a matrix: one of its axes is summed, the other is new."""
    operands = tuple(_operands(*operands))
    if not isinstance(equation, str) or len(operands) != 2 or "->" not in equation:
        return compute()
    inputs, output = equation.replace(" ", "").replace("...", ".").split("->")
    letters, (x, w) = inputs.split(","), operands
    if uses.matrix(w) is None:
        letters, (x, w) = letters[::-1], (w, x)
    if uses.matrix(w) is None or len(letters[1]) != 2 or len(set(letters[0])) < len(letters[0]):
        return compute()
    old = [c for c in letters[1] if c in letters[0] and c not in output]
    new = [c for c in letters[1] if c not in letters[0] and c in output]
    if len(old) != 1 or len(new) != 1 or set(output) != set(letters[0]) - {*old} | {*new}:
        return compute()
    rest = letters[0].replace(old[0], "")
    w = w if letters[1] == new[0] + old[0] else w.mT
    x = torch.einsum(f"{letters[0]}->{rest}{old[0]}".replace(".", "..."), x)
    y = torch.einsum(f"{output}->{rest}{new[0]}".replace(".", "..."), compute())
    y = uses.linear(x, w, None, y)
    return torch.einsum(f"{rest}{new[0]}->{output}".replace(".", "..."), y)


@_reads(F.embedding)
def _embedding(
    uses: Uses,
    compute: _Compute,
    input: Tensor,
    weight: Tensor,
    padding_idx: int | None = None,
    max_norm: float | None = None,
    norm_type: float = 2.0,
    scale_grad_by_freq: bool = False,
    sparse: bool = False,
) -> Tensor:
    w = uses.matrix(weight)
    if w is None or w.crossed or w.size != (w.home.shape[0], prod(w.home.shape[1:])):
        return compute()
    size, padding = len(weight), None if padding_idx is None else padding_idx % len(weight)
    like = SimpleNamespace(
        max_norm=max_norm, scale_grad_by_freq=scale_grad_by_freq, padding_idx=padding, num_embeddings=size
    )
    packing = w.home.layer.packing

    def form(gy: Tensor, ids: Tensor) -> LayerJacobian:
        found = embedding(like, gy, ids)
        if packing.perm == (1, 2, 0) and packing.shape == found.shape:
            return found

        def entries(g: Tensor, ids: Tensor) -> Tensor:
            return w.placed(Gather(ids, g, size).dense()[:, :, 0].mT)

        assert isinstance(found, Gather)
        return late(entries, found.g, found.ids, w.home.layer)

    return uses.add(w.home, form, input, compute(), True)


@_reads(Tensor.__getitem__)
def _getitem(uses: Uses, compute: _Compute, weight: Tensor, index: Any) -> Tensor:
    if not isinstance(index, Tensor) or index.dtype != torch.long or uses.matrix(weight) is None:
        return compute()
    return _embedding(uses, compute, index % len(weight), weight)


@_reads(F.conv1d, F.conv2d, F.conv3d)
def _conv(
    uses: Uses,
    compute: _Compute,
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: Any = 1,
    padding: Any = 0,
    dilation: Any = 1,
    groups: int = 1,
) -> Tensor:
    y, d = compute(), weight.dim() - 2
    found, (b, slope) = uses._base(weight), uses.scaled(bias) or (None, None)
    home = None if found is None or not _all_of(weight, found[1]) or input.ndim < d + 2 else found[0]
    together = home is not None and b is not None and slope is None and b.home.layer is home.layer and b.start == 0
    if home is not None:
        like = _of_convolution(weight, together, stride, padding, dilation, groups)
        y = uses.add(home, lambda gy, x: _convolved(like, home, gy, x), input, y, False)
    if b is not None and not together:

        def form(gy: Tensor, x: Tensor) -> LayerJacobian:
            g = gy.movedim(2, -1)
            return b.form(g if slope is None else g * slope, x)

        y = uses.add(b.home, form, y, y, False)
    return y


def _all_of(t: Tensor, base: Tensor) -> bool:
    """Whether a tensor has the entries of a parameter in their order, in whatever shape."""
    same = t.numel() == base.numel() and t.dtype == base.dtype
    return same and t.is_contiguous() and base.is_contiguous() and t.data_ptr() == base.data_ptr()


def _of_convolution(weight: Tensor, bias: bool, stride: Any, padding: Any, dilation: Any, groups: int) -> Any:
    """What a form takes from a module."""

    def each(of: Any) -> tuple[int, ...]:
        of = tuple(of) if isinstance(of, Iterable) else (of,)
        return of * d if len(of) == 1 else of

    d, kernel = weight.dim() - 2, tuple(weight.shape[2:])
    around: list[int] = []
    if isinstance(padding, str):
        for k, dil in zip(kernel, each(dilation), strict=True):
            total = dil * (k - 1) if padding == "same" else 0
            around = [total // 2, total - total // 2, *around]
    return SimpleNamespace(
        weight=weight,
        bias=bias or None,
        stride=each(stride),
        padding=padding if isinstance(padding, str) else each(padding),
        dilation=each(dilation),
        groups=groups,
        kernel_size=kernel,
        padding_mode="zeros",
        _reversed_padding_repeated_twice=around,
    )


def _convolved(like: Any, home: Home, gy: Tensor, x: Tensor) -> LayerJacobian:
    found, layer = conv(like, gy, x), home.layer
    assert isinstance(found, Outer)
    bias = like.bias is not None
    rows = like.weight.shape[0] // like.groups
    packing = Packing.matrix((like.groups, rows, like.weight[0].numel()), (0, 1, 2), (like.groups, rows), bias)
    if packing == layer.packing:
        return found
    if not bias and layer.packing.bias and packing == layer.packing.without_bias():
        return Outer(F.pad(found.a, (0, 1)), found.g)

    def compute(start: int, stop: int, first: int, last: int) -> Tensor:
        flat = packing.unpack(found.narrow(start, stop, first, last).dense())
        size = like.weight.numel()
        total = home.flat(flat[..., :size], 0)
        if bias:
            total = total + Home(home.site, layer, len(layer.params) - 1).flat(flat[..., size:], 0)
        return total

    return Lazy(compute, found.cotangents, found.examples, layer.packing.shape, found.dtype, found.device)


def _before(module: nn.Module, hook: Callable[..., Any]) -> Change:
    """A hook in front of a call, after those of the user."""
    return lambda: module.register_forward_pre_hook(lambda m, args: hook(m, args)).remove


def is_use(call: Call, sites: Sequence[Site]) -> bool:
    """Whether a recorded call is none of a module."""
    return all(call.site is not site for site in sites)
