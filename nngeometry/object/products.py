"""Products with a matrix by automatic differentiation, free of the number of outputs and of P x P.

Only reverse mode is used, twice where a forward mode would do: J v is the derivative of the linear map u -> J^T u,
which costs as much as a forward-mode product, keeps its graph from one product to the next, and is right wherever
the gradient is (torch's forward mode is missing for fused attention and weight_norm, and disagrees with the
gradient on padding).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.attention import SDPBackend, sdpa_kernel

from .. import data
from ..generator import Evaluator, Generator, check_mode, unchanged
from ..memory import budget

#: ``(k, P) -> (k, P)``: the sum over one minibatch, not divided by anything.
Product = Callable[[Tensor], Tensor]
#: From the parameters (leaves of autograd), a minibatch and its position to the product on it, what it counts in
#: the mean, and the tensors from which autograd will start.
Linearise = Callable[[list[Tensor], data.Batch, int], tuple[Product, float, Sequence[Tensor]]]


class Products:
    """``V -> M V`` for a matrix that is a sum over minibatches, with the parameters as they are now.

    evaluator: the model. linearise: how a minibatch gives its product. mean: whether the sum is divided by what
    minibatches count. While what autograd saved for them fits the memory budget, minibatches are linearised once
    and kept, so that a product costs no forward pass; the others are linearised again in every product.
    """

    def __init__(self, evaluator: Evaluator, examples: Any, linearise: Linearise, mean: bool = True) -> None:
        data.require_repeatable(examples, "a matrix known by its products")
        self.evaluator = evaluator
        self.examples = examples
        self.linearise = linearise
        self.mean = mean
        named = evaluator.layer_collection.named_parameters(evaluator.model)
        self.names, parameters = zip(*[(name, p.detach().clone().requires_grad_()) for name, p in named], strict=True)
        self.parameters: list[Tensor] = list(parameters)
        self._kept: dict[int, tuple[Product, float]] = {}
        self._kept_bytes = 0

    def __call__(self, V: Tensor) -> Tensor:
        """``(k, P) -> (k, P)``."""
        check_mode(self.evaluator.model)
        V = V.detach().to(self.parameters[0].dtype)
        out = torch.zeros_like(V)
        total = 0.0
        for position, batch in enumerate(self.evaluator.minibatches(self.examples)):
            product, weight = self._kept.get(position) or self._prepare(position, batch)
            out += product(V)
            total += weight
        if not self.mean:
            return out.to(self.evaluator.dtype)
        return (out / total).to(self.evaluator.dtype)

    def _prepare(self, position: int, batch: data.Batch) -> tuple[Product, float]:
        with unchanged(self.evaluator.model), torch.enable_grad(), differentiable_attention():
            product, weight, roots = self.linearise(self.parameters, batch, position)
        held = saved_bytes(roots)
        if self._kept_bytes + held <= budget():
            self._kept[position] = product, weight
            self._kept_bytes += held
        return product, weight

    def outputs(self, batch: data.Batch) -> Tensor:
        """The output of the model with the kept parameters in place of its own."""
        return self.evaluate(self.evaluator.outputs, batch)

    def evaluate(self, function: Callable[..., Any], *arguments: Any) -> Any:
        """``function(*arguments)`` while the model has the kept parameters."""
        module = _Function(self.evaluator.model, function)
        named = {f"model.{name}": p for name, p in zip(self.names, self.parameters, strict=True)}
        return functional_call(module, named, arguments)


class _Function(nn.Module):
    """A function that uses a model as a module, so that the parameters of the model can be substituted."""

    def __init__(self, model: nn.Module, function: Callable[..., Any]) -> None:
        super().__init__()
        self.model = model
        self.function = function

    def forward(self, *arguments: Any) -> Any:
        return self.function(*arguments)


def gauss_newton(generator: Generator, examples: Any) -> Products:
    """Products with ``sum_x J^T (sum_c s_c s_c^T) J``, the matrix of a generator: J v, then the curvature, then J^T."""

    def linearise(params: list[Tensor], batch: data.Batch, position: int) -> tuple[Product, float, Sequence[Tensor]]:
        f = products.outputs(batch)
        if not f.requires_grad:
            raise ValueError("the output of the model does not depend on the collected parameters")
        u = torch.zeros_like(f, requires_grad=True)
        pulled = _grads(f, params, u, create_graph=True)
        pulled_u = [g for g in pulled if g.requires_grad]
        depends = [g.requires_grad for g in pulled]
        fixed = f.detach()

        def product(V: Tensor) -> Tensor:
            def one(v: Tensor) -> Tensor:
                shares = [s for s, d in zip(split_like(v, params), depends, strict=True) if d]
                (jv,) = torch.autograd.grad(pulled_u, u, shares, retain_graph=True)
                return flatten(_grads(f, params, generator.curvature(fixed, jv, batch, position), retain_graph=True))

            return torch.stack([one(v) for v in V])

        return product, generator.weigh(fixed, batch), (f, *pulled_u)

    products = Products(generator, examples, linearise, generator.mean)
    return products


def hessian(
    evaluator: Evaluator, examples: Any, total: Callable[[data.Batch], tuple[Tensor, float]], mean: bool
) -> Products:
    """Products with the Hessian of a loss. total: from a minibatch to the sum of its losses and what the mean
    counts it as.
    """

    def linearise(params: list[Tensor], batch: data.Batch, position: int) -> tuple[Product, float, Sequence[Tensor]]:
        value, weight = products.evaluate(total, batch)
        check_second_derivatives(value)
        gradient = _grads(value, params, None, create_graph=True)
        curved = [g for g in gradient if g.requires_grad]
        depends = [g.requires_grad for g in gradient]

        def product(V: Tensor) -> Tensor:
            def one(v: Tensor) -> Tensor:
                shares = [s for s, d in zip(split_like(v, params), depends, strict=True) if d]
                if not curved:
                    return torch.zeros_like(v)
                return flatten(_grads(curved, params, shares, retain_graph=True))

            return torch.stack([one(v) for v in V])

        return product, weight, (value, *curved)

    products = Products(evaluator, examples, linearise, mean)
    return products


def finite_difference(
    evaluator: Evaluator,
    examples: Any,
    total: Callable[[data.Batch], tuple[Tensor, float]],
    mean: bool,
    step: float,
) -> Products:
    """Products with the Hessian of a loss by central differences of its gradient, at ``step`` in the unit of the
    vector's largest entry.
    """

    def linearise(params: list[Tensor], batch: data.Batch, position: int) -> tuple[Product, float, Sequence[Tensor]]:
        with torch.no_grad():
            _, weight = products.evaluate(total, batch)

        def gradient(shift: list[Tensor]) -> Tensor:
            moved = [(p + s).detach().requires_grad_() for p, s in zip(params, shift, strict=True)]
            named = {f"model.{name}": p for name, p in zip(products.names, moved, strict=True)}
            with torch.enable_grad():
                value, _ = functional_call(_Function(evaluator.model, total), named, (batch,))
                return flatten(_grads(value, moved, None))

        def product(V: Tensor) -> Tensor:
            def one(v: Tensor) -> Tensor:
                size = float(v.abs().max())
                if size == 0:
                    return torch.zeros_like(v)
                shift = split_like(v * (step / size), params)
                difference = gradient(shift) - gradient([-s for s in shift])
                return difference * (size / (2 * step))

            return torch.stack([one(v) for v in V])

        return product, weight, ()

    products = Products(evaluator, examples, linearise, mean)
    return products


def _grads(outputs: Any, params: list[Tensor], weights: Any, **options: bool) -> list[Tensor]:
    return list(torch.autograd.grad(outputs, params, weights, allow_unused=True, materialize_grads=True, **options))


def split_like(v: Tensor, params: Sequence[Tensor]) -> list[Tensor]:
    """Flat parameters ``(P,)`` in the shapes of ``params``."""
    return [piece.view_as(p) for piece, p in zip(v.split([p.numel() for p in params]), params, strict=True)]


def flatten(tensors: Sequence[Tensor]) -> Tensor:
    """``(P,)``."""
    return torch.cat([t.detach().flatten() for t in tensors])


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
                f"the second derivative of {WRONG_SECOND_DERIVATIVE[node.name()]} is wrong in torch: use GGN, "
                "remove the "
                "normalisation, or pass products=FiniteDifference()"
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


def saved_bytes(roots: Sequence[Tensor]) -> int:
    """Bytes of the tensors that autograd saved for the graphs of some tensors, each counted once."""
    sizes: dict[int, int] = {}
    for node in nodes(roots):
        for name in dir(node):
            if name.startswith("_saved_") or name == "saved_tensors":
                value = getattr(node, name, None)
                for t in value if isinstance(value, tuple | list) else (value,):
                    if isinstance(t, Tensor):
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
