"""The representation that holds nothing: products by automatic differentiation, one pass over the data each."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call, jvp, vjp

from .. import data
from ..blocks import Block, Operator
from ..generator import Generator, check_mode
from .pmat import PMat
from .representations import PMatDiag


class PMatImplicit(PMat):
    """``M v`` as ``J^T (H (J v))`` with one forward- and one reverse-mode product for each minibatch: free of C and of P**2.

    Holds the model and the data, which must not change while it is used, and reads the data again for every product. Trace and
    diagonal are exact, from the stream of Jacobians; solve is by conjugate gradients.
    """

    @classmethod
    def _estimate(cls, generator: Generator, examples: Any) -> Block:
        data.require_repeatable(examples, cls.__name__)
        if generator.centred:
            raise NotImplementedError("PMatImplicit has no centred products yet: use PMatLowRank or PMatDense")
        like = generator.layer_collection.parameters(generator.model)[0]

        def matvec(V: Tensor) -> Tensor:
            return product(generator, examples, V)

        def trace() -> Tensor:
            return trace_of(generator, examples)

        def diag() -> Tensor:
            return PMatDiag(generator.layer_collection, generator, examples=examples).get_diag()

        size = generator.layer_collection.numel()
        return Operator(matvec, size, trace, diag, torch.empty(0, dtype=like.dtype, device=like.device))


class _Function(nn.Module):
    """The user's function of a minibatch as a module, so that the parameters of the model can be substituted."""

    def __init__(self, model: nn.Module, function: Callable[[Any], Tensor]) -> None:
        super().__init__()
        self.model = model
        self.function = function

    def forward(self, batch: Any) -> Tensor:
        return self.function(batch)


def product(generator: Generator, examples: Any, V: Tensor) -> Tensor:
    """``M V`` for each row of V ``(k, P)``."""
    lc, model = generator.layer_collection, generator.model
    check_mode(model)
    module = _Function(model, generator.outputs_unchecked)
    params = {f"model.{name}": p.detach() for name, p in lc.named_parameters(model)}
    sizes = [p.numel() for p in params.values()]

    def unflatten(v: Tensor) -> dict[str, Tensor]:
        return {k: piece.view_as(p) for piece, (k, p) in zip(v.split(sizes), params.items(), strict=True)}

    out = torch.zeros_like(V)
    n = 0
    for position, batch in enumerate(generator.minibatches(examples)):
        n += data.count(batch)
        with torch.enable_grad():

            def f(p: dict[str, Tensor], batch: Any = batch) -> Tensor:
                return functional_call(module, p, (batch,))

            outputs, pull = vjp(f, params)
            for row, v in zip(out, V, strict=True):
                _, u = jvp(f, (params,), (unflatten(v),))
                s = generator.curvature(outputs.detach(), u.detach(), batch, position)
                (grads,) = pull(s, retain_graph=True)
                row += torch.cat([g.flatten() for g in grads.values()])
    return out / n


def trace_of(generator: Generator, examples: Any) -> Tensor:
    """The exact trace: the sum of the squared norms of the Jacobian, layer by layer."""
    total: Tensor | None = None
    n = 0
    with torch.no_grad():
        for observation in generator.stream(examples):
            n += observation.n
            for form in observation.forms.values():
                norms = form.sqnorm().sum()
                total = norms if total is None else total + norms
    assert total is not None
    return total / n

