"""Krylov solvers next to conjugate gradients: for indefinite matrices, for least squares, and the Neumann series."""

from __future__ import annotations

import torch
from torch import Tensor

from .base import Matvec, Solution, retire, solve


def minres(
    matvec: Matvec,
    b: Tensor,
    *,
    x0: Tensor | None = None,
    rtol: float = 1e-6,
    max_products: int | None = None,
) -> Solution:
    """Solve ``A x = b`` for a symmetric A that may be indefinite, each row of b on its own. A singular system is solved
    where it is consistent.

    Args:
        matvec: A, ``(k, p) -> (k, p)``, which is called on the rows that have not converged.
        b: Right-hand sides ``(k, p)``.
        x0: Where to start, ``(k, p)``, by default at zero.
        rtol: The target of ``|b - A x| / |b|``, the true residual, by default 1e-6.
        max_products: How many calls of matvec there may be, by default 10 p + 10, at most 10 000.

    Returns:
        The solution, with its true residuals and the number of calls.

    Raises:
        RuntimeError: If the true residual does not reach rtol.

    Example:
        >>> A = torch.diag(torch.tensor([1.0, -2.0, 4.0]))
        >>> minres(lambda v: v @ A, torch.ones(1, 3)).x.round(decimals=3)
        tensor([[ 1.0000, -0.5000,  0.2500]])

    Source:
        Paige and Saunders (1975), SIAM J. Numer. Anal. 12.
    """

    # Lanczos vectors v; T = Q R by Givens rotations (c, s); w the columns of V R^-1; phi the residual up to sign.
    def step(
        x: Tensor,
        broken: Tensor,
        v: Tensor,
        v_old: Tensor,
        beta: Tensor,
        w: Tensor,
        w_old: Tensor,
        turn: Tensor,
        turn_old: Tensor,
        phi: Tensor,
        scale: Tensor,
        target: Tensor,
    ) -> tuple[Tensor, ...]:
        y = matvec(v) - beta.unsqueeze(1) * v_old
        alpha = (y * v).sum(1)
        y = y - alpha.unsqueeze(1) * v
        beta_next = torch.linalg.vector_norm(y, dim=1)
        scale = torch.maximum(scale, alpha.abs() + beta_next)
        (c, s), (c_old, s_old) = turn.mT, turn_old.mT
        top, middle = s_old * beta, c_old * beta
        delta, below = c * middle + s * alpha, c * alpha - s * middle
        gamma = torch.hypot(below, beta_next)
        # Below rounding error the space has closed; if its last pivot is zero too, b has a part outside the range.
        broken = ~(gamma > torch.finfo(b.dtype).eps * scale)
        gamma = torch.where(broken, 1.0, gamma)
        new = torch.stack([below, beta_next], 1) / gamma.unsqueeze(1)
        w, w_old = (v - delta.unsqueeze(1) * w - top.unsqueeze(1) * w_old) / gamma.unsqueeze(1), w
        x = x + torch.where(broken, 0.0, new[:, 0] * phi).unsqueeze(1) * w
        v, v_old = y / torch.where(beta_next > 0, beta_next, 1.0).unsqueeze(1), v
        return x, broken, v, v_old, beta_next, w, w_old, new, turn, -new[:, 1] * phi, scale, target

    def finished(x: Tensor, broken: Tensor, *state: Tensor) -> Tensor:
        phi, _, target = state[-3:]
        return broken | (phi.abs() <= target)

    def inner(r: Tensor, target: Tensor, limit: int) -> tuple[Tensor, int, str]:
        norms = torch.linalg.vector_norm(r, dim=1)
        zero, none = torch.zeros_like(r), torch.zeros_like(norms)
        turn = torch.stack([torch.ones_like(norms), none], 1)
        state = (zero, none > 0, r / norms.unsqueeze(1), zero, none, zero, zero, turn, turn, norms, none, target)
        (x, broken, *_), products = retire(step, finished, state, limit)
        return x, products, "the matrix is singular, and b not in its range: add regul" if bool(broken.any()) else ""

    return solve(
        "minres",
        inner,
        lambda b, x: b - matvec(x),
        lambda r: torch.linalg.vector_norm(r, dim=1),
        b,
        torch.zeros_like(b) if x0 is None else x0,
        rtol=rtol,
        max_products=min(10 * b.shape[1] + 10, 10_000) if max_products is None else max_products,
        warm=x0 is not None,
    )


def lsmr(
    matvec: Matvec,
    rmatvec: Matvec,
    b: Tensor,
    *,
    damp: float = 0.0,
    rtol: float = 1e-6,
    max_products: int | None = None,
) -> Solution:
    """Minimise ``|A x - b|^2 + damp^2 |x|^2`` for a rectangular A, each row of b on its own. Of all minimisers it is
    the one of least norm.

    Args:
        matvec: A, ``(k, p) -> (k, q)``.
        rmatvec: Its transpose, ``(k, q) -> (k, p)``.
        b: Right-hand sides ``(k, q)``, or a vector ``(q,)``.
        damp: The weight of the norm of x, by default 0.
        rtol: The target of ``|A^T (b - A x) - damp^2 x| / |A^T b|``, by default 1e-6: the residual of the normal
            equations, which vanishes at the minimum whether or not the system has a solution.
        max_products: How many calls of matvec there may be, each with one of rmatvec, by default 10 p + 10, at most 10
            000.

    Returns:
        The solution, with these residuals, recomputed from x, and the number of calls.

    Raises:
        RuntimeError: If the target is not reached.

    Example:
        >>> A = torch.tensor([[1.0, 0.0], [0.0, 2.0], [0.0, 0.0]])
        >>> lsmr(lambda v: v @ A.T, lambda u: u @ A, torch.tensor([1.0, 2.0, 5.0])).x.round(decimals=3)
        tensor([1., 1.])

    Source:
        Fong and Saunders (2011), 1006.0758.
    """
    if b.ndim == 1:
        x, residuals, products = lsmr(matvec, rmatvec, b.unsqueeze(0), damp=damp, rtol=rtol, max_products=max_products)
        return Solution(x[0], residuals[0], products)
    like = rmatvec(b)
    q, p = b.shape[1], like.shape[1]

    # Damping is least squares with the rows damp * identity below A, so that a restart is one too.
    def down(v: Tensor) -> Tensor:
        return torch.cat([matvec(v), damp * v], 1) if damp else matvec(v)

    def up(u: Tensor) -> Tensor:
        return rmatvec(u[:, :q]) + damp * u[:, q:] if damp else rmatvec(u)

    def step(
        x: Tensor, u: Tensor, v: Tensor, h: Tensor, h_bar: Tensor, scalars: Tensor, target: Tensor
    ) -> tuple[Tensor, ...]:
        alpha, alpha_bar, zeta_bar, rho, rho_bar, c_bar, s_bar = scalars.mT
        u, beta = _unit(down(v) - alpha.unsqueeze(1) * u)
        v, alpha = _unit(up(u) - beta.unsqueeze(1) * v)
        # One rotation makes the bidiagonal matrix triangular, a second one its product with its transpose.
        rho_old, rho = rho, torch.hypot(alpha_bar, beta)
        c, s = _over(alpha_bar, rho), _over(beta, rho)
        theta, alpha_bar = s * alpha, c * alpha
        rho_bar_old, theta_bar = rho_bar, s_bar * rho
        rho_bar = torch.hypot(c_bar * rho, theta)
        c_bar, s_bar = _over(c_bar * rho, rho_bar), _over(theta, rho_bar)
        zeta, zeta_bar = c_bar * zeta_bar, -s_bar * zeta_bar
        h_bar = h - _over(theta_bar * rho, rho_old * rho_bar_old).unsqueeze(1) * h_bar
        x = x + _over(zeta, rho * rho_bar).unsqueeze(1) * h_bar
        h = v - _over(theta, rho).unsqueeze(1) * h
        return x, u, v, h, h_bar, torch.stack([alpha, alpha_bar, zeta_bar, rho, rho_bar, c_bar, s_bar], 1), target

    def finished(x: Tensor, *state: Tensor) -> Tensor:
        scalars, target = state[-2:]
        # What is below the target is done; an alpha of zero says that the space has closed.
        return (scalars[:, 2].abs() <= target) | (scalars[:, 0] == 0)

    def inner(r: Tensor, target: Tensor, limit: int) -> tuple[Tensor, int, str]:
        u, beta = _unit(r)
        v, alpha = _unit(up(u))
        one, zero = torch.ones_like(alpha), torch.zeros_like(alpha)
        scalars = torch.stack([alpha, alpha, alpha * beta, one, one, one, zero], 1)
        nothing = torch.zeros_like(v)
        (x, *_), products = retire(step, finished, (nothing, u, v, v, nothing, scalars, target), limit)
        return x, products, ""

    full = torch.cat([b, b.new_zeros(len(b), p)], 1) if damp else b
    return solve(
        "lsmr",
        inner,
        lambda b, x: b - down(x),
        lambda r: torch.linalg.vector_norm(up(r), dim=1),
        full,
        torch.zeros_like(like),
        rtol=rtol,
        max_products=min(10 * p + 10, 10_000) if max_products is None else max_products,
        warm=False,
    )


def neumann(matvec: Matvec, b: Tensor, *, terms: int, scale: float = 1.0, rtol: float | None = 1e-6) -> Solution:
    """``A^-1 b`` by the Neumann series ``scale sum_j (1 - scale A)^j b``, each row of b on its own.

    Args:
        matvec: A, ``(k, p) -> (k, p)``.
        b: Right-hand sides ``(k, p)``.
        terms: How many terms there may be.
        scale: The series converges if all eigenvalues of scale times A lie between 0 and 2; by default 1.
        rtol: The target of the relative residual, by default 1e-6, which but for rounding is the next term of the
            series. With None all terms are taken, and the residuals, recomputed from x, are whatever they are.

    Returns:
        The solution, with its true residuals and the number of calls.

    Raises:
        RuntimeError: If the target is not reached, or the series diverges.

    Example:
        >>> A = torch.diag(torch.tensor([1.0, 0.5]))
        >>> neumann(lambda v: v @ A, torch.ones(1, 2), terms=30).x.round(decimals=3)
        tensor([[1., 2.]])
    """
    start = torch.linalg.vector_norm(b, dim=1)
    x, term, norms, products = torch.zeros_like(b), b, start, 0
    while products < terms and bool((norms <= 1e3 * start).all()):
        x = x + scale * term
        term = term - scale * matvec(term)
        norms = torch.linalg.vector_norm(term, dim=1)
        products += 1
        if rtol is not None and bool((norms <= rtol * start).all()):
            break
    norms, products = torch.linalg.vector_norm(b - matvec(x), dim=1), products + 1
    residuals = norms / torch.where(start > 0, start, 1.0)
    text = f"neumann: relative residual {float(residuals.max()):.2g} after {products} products: "
    if not bool((residuals <= 1).all()):
        raise RuntimeError(text + "scale times the matrix has eigenvalues outside of 0 to 2: lower scale, or add regul")
    if rtol is not None and not bool((residuals <= rtol).all()):
        raise RuntimeError(text + "raise terms or rtol, or choose scale near 1 / the largest eigenvalue")
    return Solution(x, residuals, products)


def _unit(rows: Tensor) -> tuple[Tensor, Tensor]:
    norms = torch.linalg.vector_norm(rows, dim=1)
    return rows / torch.where(norms > 0, norms, 1.0).unsqueeze(1), norms


def _over(a: Tensor, b: Tensor) -> Tensor:
    return torch.where(b != 0, a / torch.where(b != 0, b, 1.0), 0.0)
