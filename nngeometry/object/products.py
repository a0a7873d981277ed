"""Products with a matrix by automatic differentiation, free of the number of outputs and of P x P.

Only reverse mode is used, twice where a forward mode would do: J v is the derivative of the linear map u -> J^T u,
which costs as much as a forward-mode product, keeps its graph from one product to the next, and is right wherever
the gradient is (torch's forward mode is missing for fused attention and weight_norm, and disagrees with the
gradient on padding).
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from functools import cache
from itertools import chain, islice
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import BackwardCFunction
from torch.func import functional_call
from torch.nn.attention import SDPBackend, sdpa_kernel

from .. import data
from ..autograd import Pull, accumulate
from ..derivatives import CheapDerivatives, Pulled, Value
from ..evaluator import Evaluator, check_mode, unchanged
from ..generator import MIXES, Generator, check_same
from ..memory import budget, chunk_length

#: From vectors ``(k, P)`` and where to add their products ``(k, P)``: sums over one minibatch, not divided by anything.
Product = Callable[[Tensor, Tensor], None]
#: From the parameters (leaves of autograd), neighbouring minibatches and the position of the first to the linear map of
#: them, what they count in the mean, and the tensors from which autograd will start.
Linearise = Callable[[list[Tensor], list[data.Batch], int], tuple[Any, float, Sequence[Tensor]]]

#: From a minibatch to the sum of its losses and what a mean counts it as.
Total = Callable[[data.Batch], tuple[Tensor, float]]

#: How many times what the model makes is kept, to differentiate it twice.
_COPIES = 4


#: Whether the product at hand may be the only one.
_SINGLE: ContextVar[bool] = ContextVar("nngeometry_single_product", default=False)


@contextmanager
def single_product() -> Iterator[None]:
    """Inside, the first product of a matrix over several minibatches keeps nothing for a second one, which does."""
    token = _SINGLE.set(True)
    try:
        yield
    finally:
        _SINGLE.reset(token)


class Linearisations:
    """Every minibatch made a linear map at the parameters as they are now.

    evaluator: the model. linearise: how a minibatch gives its map. If what autograd saved for them fits the memory
    budget, all minibatches are linearised once and kept, so that a product costs no forward pass; otherwise the data
    are read and linearised again whenever they are iterated.
    """

    def __init__(self, evaluator: Evaluator, examples: Any, linearise: Linearise) -> None:
        data.require_repeatable(examples, "a matrix or map known by its products")
        self.evaluator = evaluator
        self.examples = examples
        self.linearise = linearise
        named = evaluator.layer_collection.named_parameters(evaluator.model)
        self.names, parameters = zip(*[(name, p.detach().clone().requires_grad_()) for name, p in named], strict=True)
        self.parameters: list[Tensor] = list(parameters)
        self._kept: list[tuple[Any, float, int]] | None = None
        self._pull = Pull()
        self._used = False
        self.checked = False

    def __iter__(self) -> Iterator[tuple[Any, float, int]]:
        """The map of every minibatch, what it counts in a mean, and the bytes that one vector takes in it."""
        check_mode(self.evaluator.model)
        return iter(self._kept) if self._kept is not None else self._linearised()

    def _linearised(self) -> Iterator[tuple[Any, float, int]]:
        """All minibatches linearised; all are kept if together they fit, and if there may be more products."""
        evaluator = self.evaluator
        groups = evaluator.joined(self.examples, lambda b: _COPIES * evaluator.trial(b).made)
        head = list(islice(groups, 2))
        once, self._used = _SINGLE.get() and not self._used, True
        keep: list[tuple[Any, float, int]] | None = None if once and len(head) > 1 else []
        for position, batches in chain(head, groups):
            made = self._prepare(position, batches)
            if keep is not None:
                keep.append(made)
                keep = keep if sum(held for *_, held in keep) <= budget(evaluator.device) else None
            yield made
            del made
        self._kept = keep

    def _prepare(self, position: int, batches: list[data.Batch]) -> tuple[Any, float, int]:
        with unchanged(self.evaluator.model), torch.enable_grad(), differentiable_attention():
            made, weight, roots = self.linearise(self.parameters, batches, position)
        return made, weight, saved_bytes(roots)

    def pull(self, outputs: Sequence[Tensor], inputs: Sequence[Tensor], weights: Sequence[Tensor]) -> list[Tensor]:
        """Vector-Jacobian products for every row of ``weights``, zero for an input that is not used."""
        grads = self._pull(outputs, inputs, weights)
        k = len(weights[0])
        return [x.new_zeros(k, *x.shape) if g is None else g for x, g in zip(inputs, grads, strict=True)]

    def add_pulled(self, outputs: Sequence[Tensor], weights: Sequence[Tensor], into: Tensor) -> None:
        """Add vector-Jacobian products with respect to the parameters, for every row of ``weights``, to ``(k, P)``."""
        if len(into) == 1 and into.dtype == self.parameters[0].dtype:
            accumulate(outputs, self.parameters, [w[0] for w in weights], split_like(into[0], self.parameters))
            return
        pieces = into.split([p.numel() for p in self.parameters], 1)
        for piece, grad in zip(pieces, self._pull(outputs, self.parameters, weights), strict=True):
            if grad is not None:
                piece += grad.reshape(len(piece), -1)

    def outputs(self, batch: data.Batch) -> Tensor:
        """The output of the model with the kept parameters in place of its own."""
        return self.evaluate(self.evaluator.outputs, batch)

    def evaluate(self, function: Callable[..., Any], *arguments: Any) -> Any:
        """``function(*arguments)`` while the model has the kept parameters."""
        module = _Function(self.evaluator.model, function)
        named = {f"model.{name}": p for name, p in zip(self.names, self.parameters, strict=True)}
        return functional_call(module, named, arguments)


class Products(Linearisations):
    """``V -> M V`` for a matrix that is a sum over minibatches. mean: whether it is divided by what they count."""

    def __init__(self, evaluator: Evaluator, examples: Any, linearise: Linearise, mean: bool = True) -> None:
        super().__init__(evaluator, examples, linearise)
        self.mean = mean

    def __call__(self, V: Tensor) -> Tensor:
        """``(k, P) -> (k, P)``."""
        V = V.detach().to(self.parameters[0].dtype)
        out = torch.zeros_like(V, dtype=self.evaluator.dtype)
        total = 0.0
        for product, weight, held in self:
            for rows, into in zip(V.split(step := chunk_length(held, len(V), V.device)), out.split(step), strict=True):
                product(rows, into)
            total += weight
            del product  # the graph of a minibatch that is not kept, before the next one is made
        return out.div_(total) if self.mean else out


class _Function(nn.Module):
    """A function that uses a model as a module, so that the parameters of the model can be substituted."""

    def __init__(self, model: nn.Module, function: Callable[..., Any]) -> None:
        super().__init__()
        self.model = model
        self.function = function

    def forward(self, *arguments: Any) -> Any:
        return self.function(*arguments)


class Linear:
    """The Jacobian J of one minibatch: ``J v`` is the derivative of the linear map from u to ``J^T u``."""

    def __init__(self, maps: Linearisations, batch: data.Batch) -> None:
        self.maps = maps
        derivatives = CheapDerivatives()
        with derivatives:
            self.f = maps.outputs(batch)
        if not self.f.requires_grad:
            raise ValueError("the output of the model does not depend on the collected parameters")
        self.u = torch.zeros_like(self.f, requires_grad=True)
        with derivatives.at_zero():
            self.pulled = _differentiable(_gradient(self.f, maps.parameters, self.u))

    @property
    def roots(self) -> list[Tensor]:
        """Where autograd starts."""
        return [self.f, *(g for _, g in self.pulled)]

    def jvp(self, V: Tensor) -> Tensor:
        """``(k, P) -> (k, *output)``."""
        (jv,) = self.maps.pull([g for _, g in self.pulled], [self.u], _shares(V, self.maps.parameters, self.pulled))
        return jv

    def add_vjp(self, S: Tensor, into: Tensor) -> None:
        """Add ``J^T s`` for each s of ``(k, *output)`` to ``(k, P)``."""
        self.maps.add_pulled([self.f], [S], into)

    def check(self, batch: data.Batch) -> bool:
        """Raise if examples mix, or if an operation has a backward that cannot be differentiated; once for all
        minibatches, and whether it was now.
        """
        if self.maps.checked:
            return False
        self.maps.checked = True
        if self.maps.evaluator.called_apart(batch) is None:
            with torch.no_grad():
                n = len(self.f)
                some = [n // 2, 0][:n]  # in another order: examples may depend on those before
                alone = self.maps.outputs(data.take(batch, torch.tensor(some)))
                check_same(alone, self.f[some], self.f, "the output for one example depends on the others", MIXES)
        if any(custom(node) for node in nodes([self.f])):
            check_transpose(self.maps.parameters, self.f, self.u, self.pulled)
        return True


def gauss_newton(generator: Generator, examples: Any) -> Products:
    """Products with ``sum_x J^T (sum_c s_c s_c^T) J``, the matrix of a generator: J v, then the curvature, then J^T."""

    def linearise(
        params: list[Tensor], batches: list[data.Batch], position: int
    ) -> tuple[Product, float, Sequence[Tensor]]:
        linear = Linear(products, batch := data.join(batches))
        fixed = linear.f.detach()
        rows = data.split(fixed, batches)
        if linear.check(batch):
            two = torch.arange(min(2, len(rows[0])))
            generator.cotangents(rows[0][:2], data.take(batches[0], two), position)  # for the checks in there
        curvature = generator.curvature(fixed, batches, position)

        def product(V: Tensor, into: Tensor) -> None:
            linear.add_vjp(torch.stack([curvature(one) for one in linear.jvp(V)]), into)

        return product, sum(map(generator.weigh, rows, batches)), linear.roots

    products = Products(generator, examples, linearise, generator.mean)
    return products


def jacobians(evaluator: Evaluator, examples: Any) -> Linearisations:
    """The Jacobian of every minibatch, as a :class:`Linear`."""

    def linearise(
        params: list[Tensor], batches: list[data.Batch], position: int
    ) -> tuple[Linear, float, Sequence[Tensor]]:
        linear = Linear(maps, batch := data.join(batches))
        linear.check(batch)
        return linear, len(linear.f), linear.roots

    maps = Linearisations(evaluator, examples, linearise)
    return maps


def check_transpose(params: list[Tensor], f: Tensor, u: Tensor, pulled: Sequence[tuple[int, Tensor]]) -> None:
    """Raise unless J v, by double backward, is the transpose of J^T u: not so if a custom backward hides from
    autograd.
    """
    w = torch.cos(torch.arange(1, f.numel() + 1, dtype=f.dtype, device=f.device)).view(f.shape)
    v = [torch.sin(torch.arange(1, g.numel() + 1, dtype=g.dtype, device=g.device)).view(g.shape) for _, g in pulled]
    jv = torch.autograd.grad([g for _, g in pulled], u, v, retain_graph=True, allow_unused=True)[0]
    inputs = [params[k] for k, _ in pulled]
    jw = torch.autograd.grad(f, inputs, w, retain_graph=True, allow_unused=True, materialize_grads=True)
    with torch.no_grad():
        one = 0.0 if jv is None else float((w * jv).sum())
        other = float(sum((a * b).sum() for a, b in zip(v, jw, strict=True)))
        size = float(sum((a * b).abs().sum() for a, b in zip(v, jw, strict=True)))
    if abs(one - other) > 1e-3 * size:
        raise NotImplementedError(
            "the backward of some operation cannot be differentiated (a custom autograd function with detached or "
            "once_differentiable backward): use a representation that is made of Jacobians, e.g. PMatLowRank"
        )


def hessian(evaluator: Evaluator, examples: Any, total: Total, mean: bool) -> Products:
    """Products with the Hessian of a loss: the derivative of its gradient along a vector."""

    def linearise(
        params: list[Tensor], batches: list[data.Batch], position: int
    ) -> tuple[Product, float, Sequence[Tensor]]:
        derivatives = CheapDerivatives()
        with derivatives:
            value, weight = products.evaluate(total, data.join(batches))
        check_second_derivatives(value)
        with derivatives.without_values():
            curved = _differentiable(_gradient(value, params, None))

        def product(V: Tensor, into: Tensor) -> None:
            if curved:
                products.add_pulled([g for _, g in curved], _shares(V, params, curved), into)

        return product, weight, [value, *(g for _, g in curved)]

    products = Products(evaluator, examples, linearise, mean)
    return products


def finite_difference(
    evaluator: Evaluator,
    examples: Any,
    total: Total,
    mean: bool,
    step: float,
) -> Products:
    """Products with the Hessian of a loss by central differences of its gradient, at ``step`` in the unit of the
    vector's largest entry.
    """

    def linearise(
        params: list[Tensor], batches: list[data.Batch], position: int
    ) -> tuple[Product, float, Sequence[Tensor]]:
        batch = data.join(batches)
        with torch.no_grad():
            _, weight = products.evaluate(total, batch)

        def gradient(shift: list[Tensor]) -> Tensor:
            moved = [(p + s).detach().requires_grad_() for p, s in zip(params, shift, strict=True)]
            named = {f"model.{name}": p for name, p in zip(products.names, moved, strict=True)}
            with torch.enable_grad():
                value, _ = functional_call(_Function(evaluator.model, total), named, (batch,))
                grads = torch.autograd.grad(value, moved, allow_unused=True, materialize_grads=True)
                return torch.cat([g.flatten() for g in grads])

        def product(V: Tensor, into: Tensor) -> None:
            for v, row in zip(V, into, strict=True):
                size = float(v.abs().max())
                if size > 0:
                    shift = split_like(v * (step / size), params)
                    difference = gradient(shift) - gradient([-s for s in shift])
                    row += difference * (size / (2 * step))

        return product, weight, ()

    products = Products(evaluator, examples, linearise, mean)
    return products


def _gradient(value: Tensor, params: list[Tensor], weight: Tensor | None) -> list[Tensor]:
    """A gradient that can be differentiated again."""
    return list(
        torch.autograd.grad(value, params, weight, create_graph=True, allow_unused=True, materialize_grads=True)
    )


def _differentiable(gradient: Sequence[Tensor]) -> list[tuple[int, Tensor]]:
    """Those entries of a gradient that depend on something, with their positions."""
    return [(k, g) for k, g in enumerate(gradient) if g.requires_grad]


def _shares(V: Tensor, params: Sequence[Tensor], wanted: Sequence[tuple[int, Tensor]]) -> list[Tensor]:
    """The shares of flat rows ``(k, P)`` that belong to the wanted parameters, ``(k, *shape)`` each."""
    pieces = V.split([p.numel() for p in params], 1)
    return [pieces[k].reshape(-1, *params[k].shape) for k, _ in wanted]


def split_like(v: Tensor, params: Sequence[Tensor]) -> list[Tensor]:
    """Flat parameters ``(P,)`` in the shapes of ``params``."""
    return [piece.view_as(p) for piece, p in zip(v.split([p.numel() for p in params]), params, strict=True)]


#: Nodes of torch's autograd graph whose own derivative is wrong (found by comparing with central differences), and
#: the remedy.
WRONG_SECOND_DERIVATIVE = {
    "WeightNormInterfaceBackward0": "torch.nn.utils.weight_norm (old and parametrised)",
}


def check_second_derivatives(value: Tensor) -> None:
    """Raise ``NotImplementedError`` if torch's second derivative of something in the graph is known to be wrong."""
    for node in nodes([value]):
        if node.name() in WRONG_SECOND_DERIVATIVE:
            raise NotImplementedError(
                f"the second derivative of {WRONG_SECOND_DERIVATIVE[node.name()]} is wrong in torch: use GGN, remove "
                "the normalisation, or pass products=FiniteDifference()"
            )


def nodes(roots: Sequence[Tensor]) -> Iterator[Any]:
    """Every node of the autograd graphs of some tensors, once."""
    seen: set[Any] = set()
    stack = [t.grad_fn for t in roots]
    while stack:
        node = stack.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        stack.extend(following for following, _ in node.next_functions)
        yield node


def custom(node: Any) -> bool:
    """Whether a node is a backward written in Python, which need not be differentiable, and not one of ours."""
    return isinstance(node, BackwardCFunction) and not issubclass(type(node)._forward_cls, Value | Pulled)  # type: ignore[attr-defined]


@cache
def _saved_names(node_type: Hashable) -> list[str]:
    return [name for name in dir(node_type) if name.startswith("_saved_") or name == "saved_tensors"]


def saved_bytes(roots: Sequence[Tensor]) -> int:
    """Bytes of the tensors that autograd saved for the graphs of some tensors, each counted once."""
    sizes: dict[int, int] = {}
    for node in nodes(roots):
        for name in _saved_names(type(node)):  # type: ignore[arg-type]
            value = getattr(node, name, None)
            for t in value if isinstance(value, tuple | list) else (value,):
                if isinstance(t, Tensor) and t.layout == torch.strided:
                    sizes[t.data_ptr()] = max(sizes.get(t.data_ptr(), 0), t.numel() * t.element_size())
    return sum(sizes.values())


@contextmanager
def differentiable_attention() -> Iterator[None]:
    """The fused attention kernels cannot be differentiated twice, the plain ones can."""
    before = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        with sdpa_kernel(SDPBackend.MATH):
            yield
    finally:
        torch.backends.mha.set_fastpath_enabled(before)
