"""Conjugate gradients for many right-hand sides at once."""

from __future__ import annotations

import torch
from torch import Tensor

from .base import Matvec, Solution, retire, solve


def cg(
    matvec: Matvec,
    b: Tensor,
    *,
    x0: Tensor | None = None,
    rtol: float = 1e-6,
    max_products: int | None = None,
    preconditioner: Matvec | None = None,
) -> Solution:
    """Solve ``A x = b`` for a symmetric positive definite A, each row of b on its own.

    Args:
        matvec: A, ``(k, p) -> (k, p)``, which is called on the rows that have not converged.
        b: Right-hand sides ``(k, p)``.
        x0: Where to start, ``(k, p)``, by default at zero.
        rtol: The target of ``|b - A x| / |b|``, the true residual, by default 1e-6.
        max_products: How many calls of matvec there may be, by default 10 p + 10, at most 10 000.
        preconditioner: An approximation of A^-1, symmetric positive definite, ``(k, p) -> (k, p)``; by default none.

    Returns:
        The solution, with its true residuals and the number of calls.

    Raises:
        RuntimeError: If the target is not reached. It says whether the number of products, the precision or a matrix
            that is not positive definite stood in the way.

    Example:
        >>> A = torch.diag(torch.tensor([1.0, 2.0, 4.0]))
        >>> cg(lambda v: v @ A, torch.ones(1, 3)).x
        tensor([[1.0000, 0.5000, 0.2500]])

    Source:
        Hestenes and Stiefel (1952), J. Res. Natl. Bur. Stand. 49.
    """
    condition = preconditioner or (lambda v: v)

    def step(x: Tensor, broken: Tensor, r: Tensor, p: Tensor, rz: Tensor, target: Tensor) -> tuple[Tensor, ...]:
        ap = matvec(p)
        curvature = (p * ap).sum(1)
        broken = ~((curvature > 0) & (rz > 0))
        alpha = torch.where(broken, 0.0, rz / curvature).unsqueeze(1)
        x, r = x + alpha * p, r - alpha * ap
        z = condition(r)
        rz, previous = (r * z).sum(1), rz
        return x, broken, r, z + (rz / previous).unsqueeze(1) * p, rz, target

    def finished(x: Tensor, broken: Tensor, r: Tensor, p: Tensor, rz: Tensor, target: Tensor) -> Tensor:
        return broken | (torch.linalg.vector_norm(r, dim=1) <= target)

    def inner(r: Tensor, target: Tensor, limit: int) -> tuple[Tensor, int, str]:
        z = condition(r)
        state = (torch.zeros_like(r), torch.zeros_like(target, dtype=torch.bool), r, z, (r * z).sum(1), target)
        (x, broken, *_), products = retire(step, finished, state, limit)
        text = "the matrix (or the preconditioner) is not positive definite: add regul, or use minres"
        return x, products, text if bool(broken.any()) else ""

    return solve(
        "cg",
        inner,
        lambda b, x: b - matvec(x),
        lambda r: torch.linalg.vector_norm(r, dim=1),
        b,
        torch.zeros_like(b) if x0 is None else x0,
        rtol=rtol,
        max_products=min(10 * b.shape[1] + 10, 10_000) if max_products is None else max_products,
        warm=x0 is not None,
    )
