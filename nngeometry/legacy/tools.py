"""The functions of ``maths``, ``utils`` and ``solve``."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from ..object import PMat, PVector


def kronecker(A: Tensor, B: Tensor) -> Tensor:
    """The Kronecker product of two matrices."""
    return torch.kron(A.contiguous(), B.contiguous())


def display_correl(M: PMat, axis: Any) -> None:
    """Show the absolute correlations of a matrix on a matplotlib axis."""
    dense = M.to_torch()
    scale = (dense.diagonal() + dense.diagonal().mean() / 100).sqrt()
    axis.imshow((dense.abs() / torch.outer(scale, scale)).detach().cpu())


def grad(output: Tensor, vec: PVector, *args: Any, **kwargs: Any) -> PVector:
    """The gradient of ``output`` with respect to the parameters that ``vec`` was made of, e.g. by
    ``PVector.from_model``. Further arguments as of ``torch.autograd.grad``.
    """
    lc = vec.layer_collection
    leaves = [t for ts in vec.to_dict().values() for t in ts]
    if not all(t.is_leaf and t.requires_grad for t in leaves):
        leaves = list(_leaves(vec.to_torch().grad_fn))
    if [tuple(p.shape) for p in leaves] != [shape for layer in lc.layers.values() for _, shape in layer.params]:
        raise RuntimeError("grad: the vector does not consist of the parameters of a model: use PVector.from_model")
    grads = torch.autograd.grad(output, leaves, *args, **kwargs)
    return PVector(
        lc,
        torch.cat([p.new_zeros(p.numel()) if g is None else g.flatten() for p, g in zip(leaves, grads, strict=True)]),
    )


def _leaves(node: Any) -> Iterator[Tensor]:
    """The leaves that a tensor was made of, in order."""
    if node is not None and hasattr(node, "variable"):
        yield node.variable
    elif node is not None:
        for before, _ in node.next_functions:
            yield from _leaves(before)


def cg(
    A: PMat,
    b: PVector,
    regul: float = 1e-8,
    x0: PVector | None = None,
    rtol: float = 1e-5,
    atol: float = 0.0,
    max_iter: int | None = None,
    M: PMat | None = None,
) -> PVector:
    """``(A + regul)^-1 b`` by conjugate gradients, with M for a preconditioner; warns if max_iter was too few."""
    target = max(rtol * float(b.norm()), atol)
    x = 0.0 * b if x0 is None else x0
    r = b - A.mv(x) - regul * x
    p, before = 0.0 * b, 1.0
    for _ in range(10 * A.size(0) if max_iter is None else max_iter):
        if float(r.norm()) <= target:
            return x
        z = r if M is None else M.solve(r, regul=regul)
        now = float(r.dot(z))
        p, before = z + (now / before) * p, now
        Ap = A.mv(p) + regul * p
        step = now / float(p.dot(Ap))
        x, r = x + step * p, r - step * Ap
    if float(r.norm()) > target:
        warnings.warn(
            f"cg: residual {float(r.norm()):.3g} after max_iter products, the target was {target:.3g}",
            RuntimeWarning,
            stacklevel=2,
        )
    return x


def get_n_parameters(model: nn.Module) -> int:
    """The number of parameters of a model."""
    return sum(p.numel() for p in model.parameters())
