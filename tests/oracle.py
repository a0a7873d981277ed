"""The truth that everything is compared with: plain loops over autograd on the plain model, nothing vectorised,
nothing shared.
"""

from __future__ import annotations

import torch
from torch import nn
from torch.nn import functional as F

from nngeometry import LayerCollection

#: Where the tests make their tensors.
HERE = str(torch.empty(0).device)


def run(model, batch, function=None):
    """The outputs as the library defines them. Recurrent layers of cuDNN have no derivative in eval mode."""
    with torch.backends.cudnn.flags(enabled=False):
        if function is None:
            return model(batch[0])
        return function(*batch) if isinstance(batch, tuple | list) else function(batch)


def jacobian(model, batch, function=None, layer_collection=None):
    """``(C, n, P)``: the gradient of every output of every example, one at a time."""
    lc = layer_collection or LayerCollection.from_model(model)
    params = lc.parameters(model)
    frozen = [p for p in params if not p.requires_grad]
    for p in frozen:
        p.requires_grad_(True)
    f = run(model, batch, function).flatten(1)
    rows = []
    for c in range(f.shape[1]):
        for b in range(f.shape[0]):
            grads = torch.autograd.grad(f[b, c], params, retain_graph=True, allow_unused=True, materialize_grads=True)
            rows.append(torch.cat([g.flatten() for g in grads]))
    for p in frozen:
        p.requires_grad_(False)
    return torch.stack(rows).view(f.shape[1], f.shape[0], -1)


def _hessian(nll, f):
    """Hessian of a scalar function of one example's output, by loops."""
    f = f.detach().clone().requires_grad_()
    (g,) = torch.autograd.grad(nll(f), f, create_graph=True)
    rows = [torch.autograd.grad(e, f, retain_graph=True)[0].flatten() for e in g.flatten()]
    return torch.stack(rows)


#: -log p(y | f) of one example for any fixed y: the Hessians do not depend on y.
NLL = {
    "classif_logits": lambda f: -F.log_softmax(f, 0)[0].sum(),
    "segmentation_logits": lambda f: -F.log_softmax(f, 0)[0].sum(),
    "classif_binary_logits": lambda f: F.binary_cross_entropy_with_logits(f, torch.ones_like(f), reduction="sum"),
    "regression": lambda f: 0.5 * f.square().sum(),
    "poisson": lambda f: F.poisson_nll_loss(f, torch.ones_like(f), reduction="sum"),
}


def output_hessians(f, variant):
    """``(n, C, C)``."""
    return torch.stack([_hessian(NLL[variant], one) for one in f])


def fim(model, batches, variant, function=None, layer_collection=None):
    """The dense Fisher matrix over a list of minibatches."""
    total, n = 0, 0
    for batch in batches:
        J = jacobian(model, batch, function, layer_collection)
        H = output_hessians(run(model, batch, function), variant)
        total = total + torch.einsum("cnp,ncd,dnq->pq", J, H, J)
        n += J.shape[1]
    return total / n


def loss_gradients(model, batches, loss, function=None, layer_collection=None):
    """``(n, P)``: the gradient of each example's loss, one example at a time through the whole model."""
    lc = layer_collection or LayerCollection.from_model(model)
    params = lc.parameters(model)
    rows = []
    for batch in batches:
        f = run(model, batch, function)
        for b in range(f.shape[0]):
            value = loss(f[b : b + 1], *(t[b : b + 1] for t in batch[1:])).sum()
            grads = torch.autograd.grad(value, params, retain_graph=True, allow_unused=True, materialize_grads=True)
            rows.append(torch.cat([g.flatten() for g in grads]))
    return torch.stack(rows)


def blockdiag(M, layer_collection):
    """M with everything outside of the diagonal blocks of the layers set to zero."""
    out = torch.zeros_like(M)
    for s in layer_collection.slices().values():
        out[s, s] = M[s, s]
    return out


def relative(a, b):
    """Frobenius distance relative to the size of b."""
    return float(torch.linalg.norm(a.detach() - b.detach()) / torch.linalg.norm(b.detach()).clamp(min=1e-30))


def randomise(model, seed=0):
    """Give every parameter (norms and biases included) a generic value, so that no structure is accidental."""
    g = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.3 * torch.randn(p.shape, generator=g, dtype=p.dtype))
        for name, b in model.named_buffers():
            if name.endswith("running_mean"):
                b.copy_(0.3 * torch.randn(b.shape, generator=g, dtype=b.dtype))
            if name.endswith("running_var"):
                b.copy_(0.5 + torch.rand(b.shape, generator=g, dtype=b.dtype))
    return model.eval()


__all__ = [
    "NLL",
    "blockdiag",
    "fim",
    "jacobian",
    "loss_gradients",
    "nn",
    "output_hessians",
    "randomise",
    "relative",
    "run",
]
