"""A matrix that is known by its products: of minibatches whose examples are not apart."""

from functools import partial

import torch
from torch.func import functional_call, jvp, vjp

from nngeometry import LayerCollection, PVector
from nngeometry.blocks import Operator
from nngeometry.estimation import ProductSource


def MeanOutput(model, loader, representation, *, layer_collection=None, **options):
    """``J^T J`` with J the derivative of the mean output of a minibatch; the mean over examples of that."""
    lc = LayerCollection.from_model(model) if layer_collection is None else layer_collection
    names = [name for name, _ in lc.named_parameters(model)]

    def mean_output(x, w):
        values = [v for vs in PVector(lc, w).to_dict().values() for v in vs]
        return functional_call(model, dict(zip(names, values, strict=True)), (x,)).mean(0)

    def operator(examples):
        inputs = [x for x, *_ in (examples if isinstance(examples, list) else [examples])]
        w, n = PVector.from_model(model, lc).clone().detach().to_torch(), sum(map(len, inputs))

        def product(v):
            means = [(len(x) / n, partial(mean_output, x)) for x in inputs]
            return sum(c * vjp(f, w)[1](jvp(f, (w,), (v,))[1])[0] for c, f in means)

        products = torch.vmap(product)
        return Operator(products, lc.numel(), None, None, like=w[:0], psd=True, weight_of=lambda: n)

    source = ProductSource(lc, operator, PVector.from_model(model, lc).to_torch().detach()[:0])
    return representation(layer_collection=lc, generator=source, examples=loader, **options)
