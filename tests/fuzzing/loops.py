"""Right values, by plain loops over ``torch.autograd.grad``: nothing vectorised, no normalisation of torch."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any
from unittest import mock

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel


@contextmanager
def plain() -> Iterator[None]:
    """Normalisations by their formulas and attention by matrix products, which have right derivatives of all orders."""

    def normalise(x: Tensor, axes: Any, eps: float) -> Tensor:
        return (x - x.mean(axes, keepdim=True)) / (x.var(axes, keepdim=True, unbiased=False) + eps).sqrt()

    def channels(t: Tensor, x: Tensor) -> Tensor:
        return t.view(1, -1, *[1] * (x.ndim - 2))

    def affine(x: Tensor, weight: Any, bias: Any) -> Tensor:
        x = x if weight is None else x * weight
        return x if bias is None else x + bias

    def by_channel(x: Tensor, of: Tensor, weight: Any, bias: Any) -> Tensor:
        return affine(x, *(None if t is None else channels(t, of) for t in (weight, bias)))

    def batch_norm(x, mean, var, weight=None, bias=None, training=False, momentum=0.1, eps=1e-5):
        y = (x - channels(mean, x)) / (channels(var, x) + eps).sqrt()
        return by_channel(y, x, weight, bias)

    def instance_norm(x, mean=None, var=None, weight=None, bias=None, use_input_stats=True, momentum=0.1, eps=1e-5):
        if not use_input_stats:
            return batch_norm(x, mean, var, weight, bias, eps=eps)
        return by_channel(normalise(x, tuple(range(2, x.ndim)), eps), x, weight, bias)

    def group_norm(x, groups, weight=None, bias=None, eps=1e-5):
        y = normalise(x.reshape(len(x), groups, -1), 2, eps).reshape(x.shape)
        return by_channel(y, x, weight, bias)

    def layer_norm(x, shape, weight=None, bias=None, eps=1e-5):
        return affine(normalise(x, tuple(range(-len(shape), 0)), eps), weight, bias)

    def rms_norm(x, shape, weight=None, eps=None):
        eps = torch.finfo(x.dtype).eps if eps is None else eps
        y = x / (x.square().mean(tuple(range(-len(shape), 0)), keepdim=True) + eps).sqrt()
        return affine(y, weight, None)

    def weight_norm(v, g, dim=0):
        axes = [k for k in range(v.ndim) if k != dim % v.ndim]
        return v * (g / v.square().sum(axes, keepdim=True).sqrt())

    def embedding(ids, weight, padding_idx=None, max_norm=None, norm_type=2.0, scale_grad_by_freq=False, sparse=False):
        return of_torch(ids, weight, padding_idx, max_norm, norm_type)  # by frequency is no derivative

    def laid_out(formula: Callable[..., Tensor], kernel: Callable[..., Tensor]) -> Callable[..., Tensor]:
        """The formula, in memory as torch has it: what is a view of it depends on that."""

        def call(*args: Any, **kwargs: Any) -> Tensor:
            with torch.no_grad():
                like = torch.empty_like(kernel(*args, **kwargs))
            return like.copy_(formula(*args, **kwargs))

        return call

    of_torch = F.embedding
    norms = {
        one.__name__: laid_out(one, getattr(F, one.__name__))
        for one in (batch_norm, instance_norm, group_norm, layer_norm, rms_norm)
    }
    with (
        mock.patch.multiple(F, embedding=embedding, **norms),
        mock.patch.object(torch, "_weight_norm", weight_norm),
        sdpa_kernel(SDPBackend.MATH),
    ):
        yield


def gradient(value: Tensor, params: Sequence[Tensor], create_graph: bool = False) -> Tensor:
    """The gradient of a scalar, flat."""
    if not value.requires_grad:
        return torch.cat([torch.zeros_like(p).flatten() for p in params])
    found = torch.autograd.grad(
        value, params, retain_graph=True, create_graph=create_graph, allow_unused=True, materialize_grads=True
    )
    return torch.cat([(g.to_dense() if g.is_sparse else g).reshape(-1) for g in found])


def jacobian(
    run: Callable[..., Tensor], params: Sequence[Tensor], batches: Sequence[Any], within: Any = plain
) -> tuple[Tensor, Tensor]:
    """``(n, K, P)``, one backward pass for each output of each example; and the outputs ``(n, ...)``."""
    rows, outputs = [], []
    with within():
        for batch in batches:
            f = run(batch)
            outputs.append(f.detach().clone())
            rows += [gradient(e, params) for e in f.clone().reshape(-1).unbind()]
    f = torch.cat(outputs)
    return torch.stack(rows).view(len(f), f[0].numel(), -1), f


def output_hessian(value: Callable[[Tensor], Tensor], f: Tensor) -> Tensor:
    """Second derivatives of a scalar function of all outputs, ``(n K, n K)``."""
    leaf = f.clone().requires_grad_()
    g = gradient(value(leaf), [leaf], create_graph=True)
    return torch.stack([gradient(e, [leaf]) for e in g])


def curvature(J: Tensor, f: Tensor, value: Callable[[Tensor], Tensor]) -> Tensor:
    """``J^T H J`` with H the second derivatives of ``value(f)``."""
    rows = J.flatten(0, 1)
    return rows.T @ output_hessian(value, f) @ rows


def loss_gradients(J: Tensor, f: Tensor, each: Callable[..., Tensor], targets: Sequence[Any]) -> Tensor:
    """``(n, P)``: the gradient of each example's loss, from its own output and targets alone."""
    rows = []
    for k in range(len(f)):
        leaf = f[k : k + 1].clone().requires_grad_()
        rows.append(gradient(each(leaf, *(t[k : k + 1] for t in targets)), [leaf]) @ J[k])
    return torch.stack(rows)


def loss_gradient(total: Callable[[], Tensor], params: Sequence[Tensor], create_graph: bool = False) -> Tensor:
    """The gradient of the loss of all data."""
    with plain():
        return gradient(total(), params, create_graph)


def hessian_product(total: Callable[[], Tensor], params: Sequence[Tensor], v: Tensor) -> Tensor:
    """``H v`` for the Hessian of the loss of all data, by differentiating the gradient once more."""
    with plain():
        g = gradient(total(), params, create_graph=True)
        return gradient(g @ v, params)


def difference_product(total: Callable[[], Tensor], params: Sequence[Tensor], v: Tensor, step: float) -> Tensor:
    """The same by central differences of the gradient, right to some digits."""
    with torch.no_grad():
        before = [p.clone() for p in params]
        pieces = v.split([p.numel() for p in params])
    found = []
    for sign in (1, -1):
        with torch.no_grad():
            for p, start, d in zip(params, before, pieces, strict=True):
                p.copy_(start + sign * step * d.view_as(p))
        found.append(loss_gradient(total, params))
    with torch.no_grad():
        for p, start in zip(params, before, strict=True):
            p.copy_(start)
    return (found[0] - found[1]) / (2 * step)


def kfac_block(J: Tensor, f: Tensor, value: Callable[[Tensor], Tensor], layer: slice, a: Tensor) -> Tensor:
    """``G (x) A`` of a linear layer with a bias, which saw the rows a once: in flat order, weight before bias."""
    n, i = a.shape
    o = (layer.stop - layer.start) // (i + 1)
    of_bias = J[:, :, layer.stop - o : layer.stop]
    a = torch.cat([a, torch.ones(n, 1, dtype=a.dtype)], 1)
    G, A = curvature(of_bias, f, value) / n, a.T @ a / n
    order = torch.cat([torch.arange(o * (i + 1)).view(o, i + 1)[:, :i].reshape(-1), torch.arange(o) * (i + 1) + i])
    return torch.kron(G, A)[order][:, order]


def linear_inputs(net: Any, run: Callable[..., Any], batches: Sequence[Any]) -> dict[str, Tensor]:
    """For each linear layer that is called once for every minibatch, on (n, i): all that it saw."""
    seen: dict[str, list[Tensor]] = {}
    kept = []

    def hook(name: str) -> Any:
        return lambda module, args: seen.setdefault(name, []).append(args[0].detach().clone())

    for name, module in net.named_modules():
        if type(module) is torch.nn.Linear and module.bias is not None:
            kept.append(module.register_forward_pre_hook(hook(name)))
    for batch in batches:
        run(batch)
    for handle in kept:
        handle.remove()
    once = {k: v for k, v in seen.items() if len(v) == len(batches) and all(a.ndim == 2 for a in v)}
    return {k: torch.cat(v) for k, v in once.items()}


def blocks_of(M: Tensor, slices: Sequence[slice]) -> Tensor:
    """The diagonal blocks of M, zero elsewhere."""
    out = torch.zeros_like(M)
    for s in slices:
        out[s, s] = M[s, s]
    return out


def relative(got: Tensor, want: Tensor, size: float = 0.0) -> float:
    """The distance in units of ``want``, or of ``size`` where that is larger."""
    if got.shape != want.shape:
        return float("inf")
    error = float((got.detach() - want.detach()).norm())
    largest = max(float(want.detach().norm()), size)
    return error / largest if largest > 0 else error
