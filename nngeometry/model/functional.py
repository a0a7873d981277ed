"""Weights that are used without a call of their layer: ``F.linear(x, layer.weight)``, look-ups in a tied table, and
parameters of containers that are added to activations, multiplied with them or given to every example.

A use is one functional call on a parameter, on rows and columns of it, or on what was made of it entry by entry
(``softplus(p)``, ``1 + p``). Its input and its output are recorded as those of a call of the layer are, so that the
layer keeps its form, and several uses add.
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
        #: Tensors without examples, as masks are.
        self._constants = {id(b) for site in sites for b in site.module.buffers()}
        self._sizes = {p.numel() for _, p in self._homes.values()}
        #: What was made of parameters, as it was at a version: those in another precision, and those entry by entry.
        self._made: dict[tuple[int, int], tuple[Home, Tensor]] = {}
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
        if seen is None or not any(self.of(t) is not None for t in _operands(*args, *kwargs.values())):
            return func(*args, **kwargs)
        return seen(self, lambda: func(*args, **kwargs), *args, **kwargs)

    def of(self, t: Any) -> tuple[Home, Tensor] | None:
        """The parameter that a tensor is, or is a view of, or what was made of one, if its use counts."""
        if not isinstance(t, Tensor):
            return None
        base = t if t._base is None or id(t) in self._homes else t._base
        found = self._home(base) or self._made.get((id(base), base._version)) or self._entrywise(base)
        if base is not t and t.grad_fn is None:  # a view made under torch.no_grad is a constant
            return None
        return found

    def _home(self, p: Any) -> tuple[Home, Tensor] | None:
        """A parameter, unless its module is being called."""
        return None if any(id(p) in own for own in self._inside) else self._homes.get(id(p))

    def cast(self, t: Any, y: Tensor) -> None:
        """Remember a parameter in another precision, whose derivative is that of the parameter."""
        found = self.of(t)
        if found is not None and found[1] is t and y is not t and y.requires_grad and y.is_floating_point():
            self._made[id(y), y._version] = found[0], y

    def _entrywise(self, t: Tensor) -> tuple[Home, Tensor] | None:
        """What a tensor is that was made of one parameter and of nothing else, entry by entry and in its order: a bias
        of which some entries were set to zero, on a copy, the exponential of a scale. Its derivative in that is looked
        at. None for another one.
        """
        likely = t.requires_grad and t.numel() in self._sizes and t.is_floating_point() and t.is_contiguous()
        if not likely:
            return None
        found = self._source(t)
        if found is None or found[1].numel() != t.numel():
            return None
        home, p = found
        generic = torch.cos(torch.arange(t.numel(), dtype=t.dtype, device=t.device)).add_(2).view(t.shape)
        slope, again = (torch.autograd.grad(t, p, v, retain_graph=True)[0] for v in (torch.ones_like(t), generic))
        slope, again = slope.detach().flatten(), again.detach().flatten()
        if not torch.allclose(slope * generic.flatten(), again, rtol=16 * torch.finfo(p.dtype).eps, atol=0.0):
            return None
        made = home._replace(slope=slope if home.slope is None else slope * home.slope), t
        self._made[id(t), t._version] = made
        return made

    def _source(self, t: Tensor) -> tuple[Home, Tensor] | None:
        """The only parameter of which a tensor was made, in the precision in which it was. None if it has been used on
        the way there.
        """
        used = {edge.node for call in self._recorder.calls for edge in call.edges}
        made = {y.grad_fn: (home, y) for (_, version), (home, y) in self._made.items() if y._version == version}
        sources: dict[int, tuple[Home, Tensor]] = {}
        for k, node in enumerate(nodes([t], made)):
            if node in used or k == _MOST_NODES:
                return None
            found = made.get(node)
            if found is None and hasattr(node, "variable"):
                found = self._home(node.variable)
                if found is None:
                    return None
            if found is not None:
                sources[id(found[1])] = found
        return next(iter(sources.values())) if len(sources) == 1 else None

    def may_have_examples(self, x: Any) -> bool:
        """Whether what a parameter is combined with may be activations."""
        if not isinstance(x, Tensor) or not x.is_floating_point():
            return False
        return id(x if x._base is None else x._base) not in self._constants and self.of(x) is None

    def matrix(self, t: Any) -> Matrix | None:
        """What part of a parameter a tensor is, None if it is none or not a matrix."""
        found = self.of(t)
        return None if found is None else Matrix.of(t, found[1], found[0])

    def vector(self, t: Any) -> Vector | None:
        """The same of one axis."""
        found = self.of(t)
        return None if found is None else Vector.of(t, found[1], found[0])

    def part(self, t: Any) -> Part | None:
        """The entries of a parameter that a tensor has, None if it has none."""
        found = self.of(t)
        return None if found is None else Part.of(t, found[1], found[0])

    def add(
        self,
        home: Home,
        form: Callable[..., LayerJacobian],
        x: Tensor | None,
        y: Tensor,
        features_last: bool,
        bias: Home | None = None,
    ) -> Tensor:
        """Record one use, and return the output that is passed on. x: None if derivatives do not depend on it. bias: of
        which parameter of the same layer the form is, too.
        """
        if not y.requires_grad:
            return y
        layer = home.layer
        names = {name: k for k, (name, _) in enumerate(layer.params)}
        params = {
            name: p for h, p in self._homes.values() if h.layer is layer for name in [layer.params[h.position][0]]
        }
        kind = Kind(lambda _, gy, x: form(gy, x), features_last=features_last, ours=True)
        site = Site(home.site.name, home.site.module, kind, {k: params[k] for k in names}, ((layer, names),))
        given = y.new_zeros(()).expand(y.shape) if x is None else x
        used = (home.position,) if bias is None else (home.position, bias.position)
        return self._recorder.add(site, (given,), {}, y, used)

    def product(
        self, x: Tensor, w: Tensor, y: Tensor, bias: Any = None, alpha: float = 1.0, beta: float = 1.0
    ) -> Tensor:
        """Record ``y = beta * bias + alpha * x @ w``."""
        if w.ndim == 3 <= x.ndim:
            part = self.part(w) if x.shape[-3] == len(w) else None
            if part is not None:
                x = (x if alpha == 1 else alpha * x).movedim(-3, -2)
                y = self.add(part.home, part.matrices, x, y.movedim(-3, -2), True).movedim(-2, -3)
        elif x.ndim > 0 and self.matrix(w) is not None:
            return self.linear(x, w.mT, bias, y, alpha, beta)
        elif w.ndim > 1 and self.matrix(x) is not None:  # the same from the left
            y = self.linear(w.mT, x, None, y.mT, alpha).mT
        return self.entrywise(bias, y, beta)

    def linear(self, x: Tensor, weight: Any, bias: Any, y: Tensor, alpha: float = 1.0, beta: float = 1.0) -> Tensor:
        """Record ``y = beta * bias + alpha * F.linear(x, weight)``."""
        w, b = self.matrix(weight) if x.layout == torch.strided else None, self.vector(bias)
        together = w is not None and b is not None and alpha == beta == 1 and b.belongs_to(w)
        if w is not None:
            x = x if alpha == 1 else alpha * x
            also = b.home if together and b is not None else None
            y = self.add(w.home, lambda gy, x: w.form(gy, x, together), x, y, True, also)
        return y if together else self.entrywise(bias, y, beta)

    def entrywise(self, t: Any, y: Tensor, slope: Tensor | float = 1.0) -> Tensor:
        """Record a use of t entry by entry, as it was broadcast to y. slope: of y in it, broadcast as well."""
        found = self.of(t)
        if found is None or y.ndim < max(1, t.ndim):
            return y
        x, number = (slope.detach().expand(y.shape), None) if isinstance(slope, Tensor) else (None, slope)

        def of_all(form: Callable[..., LayerJacobian], axis: int = -1) -> Callable[..., LayerJacobian]:
            def moved(gy: Tensor, x: Tensor) -> LayerJacobian:
                gy, x = gy.movedim(axis, -1), x.movedim(axis, -1)
                return form(gy, x, True) if number is None else form(gy if number == 1 else number * gy, x)

            return moved

        v = Vector.of(t, found[1], found[0])
        if v is not None and v.size == y.shape[-1]:
            return self.add(v.home, of_all(v.form), x, y, True)
        t = t[(None,) * (y.ndim - t.ndim)]
        examples = next((k for k, size in enumerate(t.shape) if size == 1), None)
        if examples is None:  # it differs between examples, wherever these are
            return y
        t = t.movedim(examples, 0)
        part = Part.of(t, found[1], found[0])
        if part is None:
            return y
        axes = [k for k in range(-t.ndim, 0) if t.shape[k] > 1]
        v = Vector.of(t.flatten(), found[1], found[0]) if len(axes) == 1 else None
        form = of_all(part.form) if v is None or not v.in_last_column else of_all(v.form, axes[0])
        if examples == 0:
            return self.add(part.home, form, x, y, False)
        x = None if x is None else x.movedim(examples, 0)
        return self.add(part.home, form, x, y.movedim(examples, 0), False).movedim(0, examples)


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
    return compute() if out is not None else uses.product(input, mat2 if other is None else other, compute())


@_reads(torch.bmm, Tensor.bmm)
def _bmm(uses: Uses, compute: _Compute, input: Tensor, mat2: Tensor, *, out: Any = None) -> Tensor:
    return compute() if out is not None else uses.product(input, mat2, compute())


@_reads(Tensor.__rmatmul__)
def _rmatmul(uses: Uses, compute: _Compute, a: Tensor, b: Tensor) -> Tensor:
    return uses.product(b, a, compute())


@_reads(torch.addmm, Tensor.addmm)
def _addmm(uses: Uses, compute: _Compute, input: Any, mat1: Any, mat2: Any, *old: Any, **scales: Any) -> Tensor:
    y = compute()
    return y if old or "out" in scales else uses.product(mat1, mat2, y, input, **scales)


@_reads(torch.baddbmm, Tensor.baddbmm)
def _baddbmm(uses: Uses, compute: _Compute, input: Any, batch1: Any, batch2: Any, *old: Any, **scales: Any) -> Tensor:
    return _addmm(uses, compute, input, batch1, batch2, *old, **scales)


@_reads(torch.add, Tensor.add, Tensor.__add__, Tensor.__radd__, Tensor.add_)
def _add(uses: Uses, compute: _Compute, input: Any, other: Any, *old: Any, alpha: float = 1, out: Any = None) -> Tensor:
    y = compute()
    return y if old or out is not None else _either(uses, input, other, y, lambda: 1.0, lambda: alpha)


@_reads(torch.sub, torch.subtract, Tensor.sub, Tensor.subtract, Tensor.__sub__, Tensor.sub_)
def _sub(uses: Uses, compute: _Compute, input: Any, other: Any, *old: Any, alpha: float = 1, out: Any = None) -> Tensor:
    y = compute()
    return y if old or out is not None else _either(uses, input, other, y, lambda: 1.0, lambda: -alpha)


@_reads(torch.mul, torch.multiply, Tensor.mul, Tensor.multiply, Tensor.__mul__, Tensor.__rmul__)
def _mul(uses: Uses, compute: _Compute, input: Any, other: Any, *, out: Any = None) -> Tensor:
    y = compute()
    return y if out is not None else _either(uses, input, other, y, lambda: other, lambda: input)


@_reads(Tensor.mul_)
def _mul_in_place(uses: Uses, compute: _Compute, input: Tensor, other: Any) -> Tensor:
    before = input.detach().clone()
    return _either(uses, before, other, compute(), lambda: 1.0, lambda: before)


@_reads(torch.div, torch.true_divide, Tensor.div, Tensor.true_divide, Tensor.__truediv__, Tensor.div_)
def _div(uses: Uses, compute: _Compute, input: Any, other: Any, **how: Any) -> Tensor:
    y = compute()
    return y if how else _either(uses, input, other, y, lambda: 1 / other, lambda: -y / other)


def _either(uses: Uses, one: Any, two: Any, y: Tensor, *slopes: Callable[[], Any]) -> Tensor:
    """Record the use of one of two of which y was made entry by entry, if it is the other one that has examples.

    slopes: of y in each.
    """
    for t, x, slope in ((one, two, slopes[0]), (two, one, slopes[1])):
        # What a parameter is broadcast to, or what comes from others: not a constant, as it is in 2 * p.
        seen = uses.of(t) is not None and (x is y or uses.may_have_examples(x))  # in place x is what was made
        if seen and (x.shape == y.shape or x.requires_grad or t.shape != y.shape):
            return uses.entrywise(t, y, slope())
    return y


@_reads(F.layer_norm)
def _layer_norm(
    uses: Uses,
    compute: _Compute,
    input: Tensor,
    normalized_shape: Any,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
) -> Tensor:
    normal = F.layer_norm(input.detach(), normalized_shape, None, None, eps)
    return uses.entrywise(bias, uses.entrywise(weight, compute(), normal))


@_reads(F.rms_norm)
def _rms_norm(
    uses: Uses,
    compute: _Compute,
    input: Tensor,
    normalized_shape: Any,
    weight: Tensor | None = None,
    eps: float | None = None,
) -> Tensor:
    return uses.entrywise(weight, compute(), F.rms_norm(input.detach(), normalized_shape, None, eps))


@_reads(Tensor.expand, Tensor.expand_as)
def _expand(uses: Uses, compute: _Compute, t: Tensor, *size: Any, **named: Any) -> Tensor:
    """What every example is given, where the first axis is theirs."""
    y = compute()
    if t.ndim == y.ndim and t.shape[0] > 1:
        return y
    return uses.entrywise(t, y.clone())  # which is no view of it any more


#: Of how many operations what is made of a parameter is looked through.
_MOST_NODES = 32


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
        if packing.perm == (1, 2, 0) and packing.shape == found.shape and w.home.number is not None:
            return found.scale(w.home.number)

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
    found, b = uses.of(weight), uses.vector(bias)
    home = None if found is None or not _all_of(weight, found[1]) or input.ndim < d + 2 else found[0]
    together = (
        home is not None
        and b is not None
        and b.home.layer is home.layer
        and b.size == b.home.shape[0]
        and home.slope is b.home.slope is None
    )
    if home is not None:
        like = _of_convolution(weight, together, stride, padding, dilation, groups)
        also = b.home if together and b is not None else None
        y = uses.add(home, lambda gy, x: _convolved(like, home, gy, x), input, y, False, also)
    return y if together or bias is None else uses.entrywise(bias[(..., *[None] * d)], y)


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
    if home.slope is not None and home.number is not None:
        gy, home = gy * home.number, home._replace(slope=None)
    found, layer = conv(like, gy, x), home.layer
    assert isinstance(found, Outer)
    bias = like.bias is not None
    rows = like.weight.shape[0] // like.groups
    packing = Packing.matrix((like.groups, rows, like.weight[0].numel()), (0, 1, 2), (like.groups, rows), bias)
    if home.slope is None and packing == layer.packing:
        return found
    if home.slope is None and not bias and layer.packing.bias and packing == layer.packing.without_bias():
        return Outer(F.pad(found.a, (0, 1)), found.g)

    def compute(start: int, stop: int, first: int, last: int) -> Tensor:
        flat = packing.unpack(found.narrow(start, stop, first, last).dense())
        size = like.weight.numel()
        total = home.flat(flat[..., :size])
        if bias:
            total = total + Home(home.site, layer, len(layer.params) - 1).flat(flat[..., size:])
        return total

    return Lazy(compute, found.cotangents, found.examples, layer.packing.shape, found.dtype, found.device)


def _before(module: nn.Module, hook: Callable[..., Any]) -> Change:
    """A hook in front of a call, after those of the user."""
    return lambda: module.register_forward_pre_hook(lambda m, args: hook(m, args)).remove


def is_use(call: Call, sites: Sequence[Site]) -> bool:
    """Whether a recorded call is none of a module."""
    return all(call.site is not site for site in sites)
