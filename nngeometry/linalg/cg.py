"""Conjugate gradients for many right-hand sides at once."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor


class CGResult(NamedTuple):
    """x: the solutions ``(k, p)``. residuals: true relative residuals ``(k,)``, recomputed at the end. products:
    how many of ``matvec``.
    """

    x: Tensor
    residuals: Tensor
    products: int


def cg(
    matvec: Callable[[Tensor], Tensor],
    b: Tensor,
    *,
    rtol: float = 1e-6,
    max_products: int | None = None,
    preconditioner: Callable[[Tensor], Tensor] | None = None,
) -> CGResult:
    """Solve ``A x = b`` for a symmetric positive definite A, each row of b on its own.

    matvec: ``(k, p) -> (k, p)``. b: ``(k, p)``. rtol: target of \\|b - A x\\| / \\|b\\|. max_products: by default
    10 p + 10. preconditioner: an approximation of A^-1, ``(k, p) -> (k, p)``. Raises ``RuntimeError`` if the target
    is not reached, or A is not positive definite along a search direction.

    >>> A = torch.diag(torch.tensor([1.0, 2.0, 4.0]))
    >>> cg(lambda v: v @ A, torch.ones(1, 3)).x
    tensor([[1.0000, 0.5000, 0.2500]])

    Source: Hestenes and Stiefel (1952), J. Res. Natl. Bur. Stand. 49.
    """
    limit = 10 * b.shape[1] + 10 if max_products is None else max_products
    size = torch.linalg.vector_norm(b, dim=1)
    size = torch.where(size > 0, size, 1.0)
    x = torch.zeros_like(b)
    products = 0
    residuals = torch.ones_like(size)
    # The recursive residual drifts from the true one: restart from the true one until that is small.
    for _ in range(3):
        r = b - matvec(x) if products else b.clone()
        products += bool(products)
        z = r if preconditioner is None else preconditioner(r)
        p = z.clone()
        rz = (r * z).sum(1)
        while products < limit:
            active = torch.linalg.vector_norm(r, dim=1) / size > rtol / 2
            if not bool(active.any()):
                break
            ap = matvec(p)
            products += 1
            curvature = (p * ap).sum(1)
            if bool((curvature[active] <= 0).any()):
                raise RuntimeError(
                    "cg: the matrix is not positive definite: add regul, or use a solver for indefinite matrices"
                )
            alpha = torch.where(active, rz / curvature, 0.0).unsqueeze(1)
            x = x + alpha * p
            r = r - alpha * ap
            z = r if preconditioner is None else preconditioner(r)
            rz, previous = (r * z).sum(1), rz
            p = z + torch.where(active, rz / previous, 0.0).unsqueeze(1) * p
        residuals = torch.linalg.vector_norm(b - matvec(x), dim=1) / size
        products += 1
        if bool((residuals <= rtol).all()):
            return CGResult(x, residuals, products)
    raise RuntimeError(
        f"cg: relative residual {float(residuals.max()):.2g} after {products} products, the target was {rtol:.2g}: "
        "increase regul, max_products or rtol, or give a preconditioner"
    )
