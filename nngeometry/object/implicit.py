"""The representation that holds nothing: products by automatic differentiation, one pass over the data each."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from ..blocks import Block, Operator
from ..changes import Borrowed, no_grad
from ..generator import Generator, counted
from .fit import diag, fit
from .pmat import PMat
from .products import gauss_newton


class PMatImplicit(PMat):
    """``M v`` by automatic differentiation: free of the number of outputs and of P**2.

    Holds the model and the data, which it reads again for every product, and a copy of the parameters as they are
    now: it stays the matrix at these when the model moves on. Once products are repeated, the forward pass is kept
    from one to the next while what autograd needs fits the memory budget. Trace and diagonal are exact, from the
    stream of Jacobians; solve is by conjugate gradients.
    """

    @classmethod
    def _estimate(cls, generator: Any, examples: Any, **options: Any) -> Block:
        if options:
            raise TypeError(f"{cls.__name__} has no option {', '.join(options)}")
        return operator(generator, examples) if isinstance(generator, Generator) else generator.operator(examples)


def operator(generator: Generator, examples: Any) -> Operator:
    """The matrix of a generator as an operator."""
    products = gauss_newton(generator, examples)
    size = generator.layer_collection.numel()
    like = torch.empty(0, dtype=generator.dtype, device=products.device)

    def trace() -> Tensor:
        with Borrowed(products.weights.in_place):
            return trace_of(generator, examples)

    def diagonal() -> Tensor:
        layers = list(generator.layer_collection.layers.values())
        with Borrowed(products.weights.in_place):
            return torch.cat(
                [part.block.diag() for part in fit(generator, examples, [diag(layer) for layer in layers])]
            )

    if not generator.centred:
        return Operator(products, size, trace, diagonal, like, psd=True, single=products.once)
    with Borrowed(products.weights.in_place):
        mean = mean_jacobian(generator, examples)

    def centred(product: Callable[[Tensor], Tensor], V: Tensor) -> Tensor:
        return product(V) - torch.outer(V @ mean, mean)

    return Operator(
        partial(centred, products),
        size,
        lambda: trace() - mean.square().sum(),
        diagonal,
        like,
        psd=True,
        single=partial(centred, products.once),
    )


def trace_of(generator: Generator, examples: Any) -> Tensor:
    """The exact trace, not centred: the sum of the squared norms of the Jacobian, layer by layer."""
    trace = torch.zeros((), dtype=generator.dtype, device=generator.device)
    total = 0.0
    with no_grad():
        for observation in generator.stream(examples, by_example=True, join=True):
            total += observation.weight
            trace += sum(form.sqnorm().sum() for form in observation.forms.values())
            del observation  # before the next one is made
    return trace / counted(total) if generator.mean else trace


def diagonal_of_gram(generator: Generator, examples: Any, names: Sequence[str]) -> Tensor:
    """The squared norms of the rows of a Jacobian over some layers: ``(C, n)``."""
    found: list[list[Tensor]] = []
    with no_grad():
        for observation in generator.stream(examples):
            if observation.n:
                found.append([])
            found[-1].append(sum(observation.forms[name].sqnorm() for name in names))  # type: ignore[arg-type]
            del observation  # before the next one is made
    return torch.cat([torch.cat(chunks) for chunks in found], 1)


def mean_jacobian(generator: Generator, examples: Any) -> Tensor:
    """The sum of ``J[c, b]`` over cotangents and examples, divided as the matrix is: ``(P,)``."""
    layers = generator.layer_collection.layers
    pieces = {name: torch.zeros((), dtype=generator.dtype, device=generator.device) for name in layers}
    total = 0.0
    with no_grad():
        for observation in generator.stream(examples, join=True):
            total += observation.weight
            for name, form in observation.forms.items():
                pieces[name] = pieces[name] + layers[name].packing.unpack(form.total())
            del observation, form  # before the next one is made
    flat = torch.cat(list(pieces.values()))
    return flat / counted(total) if generator.mean else flat
