"""The representation that holds nothing: products by automatic differentiation, one pass over the data each."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call, jvp, vjp
from torch.nn.attention import SDPBackend, sdpa_kernel

from .. import data
from ..blocks import Block, Operator
from ..generator import Generator, check_mode
from .pmat import PMat
from .representations import PMatDiag


class PMatImplicit(PMat):
    """``M v`` as ``J^T (H (J v))`` with one forward- and one reverse-mode product for each minibatch: free of C and
    of P**2.

    Holds the model and the data, which must not change while it is used, and reads the data again for every
    product. Trace and diagonal are exact, from the stream of Jacobians; solve is by conjugate gradients.
    """

    @classmethod
    def _estimate(cls, generator: Generator, examples: Any, **options: Any) -> Block:
        if options:
            raise TypeError(f"{cls.__name__} has no option {', '.join(options)}")
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
    padding = _padding(generator)
    if padding is not None:
        try:
            return differentiated_product(generator, examples, V.masked_fill(padding, 0.0)).masked_fill(padding, 0.0)
        except NotImplementedError as error:
            reason = str(error).strip().splitlines()[0]
    else:
        reason = "an embedding with padding_idx is tied to another layer"
    warnings.warn(
        f"PMatImplicit: no forward-mode derivative ({reason}). Products are exact, but go through the stream of "
        "Jacobians, at "
        "one backward pass for each output: PMatLowRank or PMatDense may be faster",
        RuntimeWarning,
        stacklevel=2,
    )
    return streamed_product(generator, examples, V)


def differentiated_product(generator: Generator, examples: Any, V: Tensor) -> Tensor:
    """By forward- and reverse-mode differentiation of the model."""
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

        def f(p: dict[str, Tensor], batch: Any = batch) -> Tensor:
            return functional_call(module, p, (batch,))

        with torch.enable_grad(), _differentiable_attention():
            outputs, pull = vjp(f, params)[:2]
            for row, v in zip(out, V, strict=True):
                u = jvp(f, (params,), (unflatten(v),))[1]
                s = generator.curvature(outputs.detach(), u.detach(), batch, position)
                (grads,) = pull(s, retain_graph=True)
                row += torch.cat([g.detach().flatten() for g in grads.values()])
    return out / n


def streamed_product(generator: Generator, examples: Any, V: Tensor) -> Tensor:
    """By the per-example Jacobians: exact for whatever the stream is, at one backward pass for each cotangent."""
    layers = generator.layer_collection.layers
    slices = generator.layer_collection.slices()
    packed = {name: layer.packing.pack(V[:, slices[name]]) for name, layer in layers.items()}
    out = {name: torch.zeros_like(v) for name, v in packed.items()}
    n = 0
    with torch.no_grad():
        for observation in generator.stream(examples):
            n += observation.n
            u = torch.stack([form.dot(packed[name]) for name, form in observation.forms.items()]).sum(0)
            for name, form in observation.forms.items():
                out[name] += form.pull(u)
    return torch.cat([layers[name].packing.unpack(v) for name, v in out.items()], 1) / n


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


def _padding(generator: Generator) -> Tensor | None:
    """Which flat parameters are rows of padding, which have no derivative; None if such a row acts elsewhere too."""
    lc = generator.layer_collection
    like = lc.parameters(generator.model)[0]
    mask = torch.zeros(lc.numel(), dtype=torch.bool, device=like.device)
    sites = lc.sites(generator.model)
    for site in sites:
        if isinstance(site.module, nn.Embedding) and site.module.padding_idx is not None:
            weight = site.module.weight
            if sum(any(p is weight for p in s.params.values()) for s in sites) > 1:
                return None
            layer, _ = site.routes[0]
            start = lc.slices()[layer.name].start + site.module.padding_idx * weight.shape[1]
            mask[start : start + weight.shape[1]] = True
    return mask


@contextmanager
def _differentiable_attention() -> Iterator[None]:
    """The fused attention kernels have no forward-mode derivative, the plain ones do."""
    before = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        with sdpa_kernel(SDPBackend.MATH):
            yield
    finally:
        torch.backends.mha.set_fastpath_enabled(before)
