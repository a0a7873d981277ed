"""What the algorithms share: random, orthonormal and unit rows, estimates with an error, and restarted solves."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from ..memory import chunk_length, tuning
from ..tables import number
from ..team import SENT

#: A matrix as a function of rows, ``(k, p) -> (k, p)``, for any k.
Matvec = Callable[[Tensor], Tensor]
#: Entries of a row at a time in sums over rows, as many as stay in a cache.
_PIECE = 2**16
#: Entries whose products are added in the precision of the rows.
_FEW = 2**11
#: A way to draw probes: ``sampler(count, size, like=, generator=)``.
Sampler = Callable[..., Tensor]


# Random rows: independent, of mean zero and covariance one, made on the generator's device


def rademacher(count: int, size: int, *, like: Tensor, generator: torch.Generator | None = None) -> Tensor:
    """Random signs: of all probes those of least variance for a trace; exact on a diagonal matrix.

    Args:
        count: How many rows.
        size: Their length.
        like: An empty tensor of the dtype and device.
        generator: The source of randomness, by default torch's global one; the signs are drawn on its device.

    Returns:
        Rows ``(count, size)``.

    Example:
        >>> rademacher(3, 2, like=torch.empty(0)).abs()
        tensor([[1., 1.],
                [1., 1.],
                [1., 1.]])
    """
    device = like.device if generator is None else generator.device
    signs = torch.randint(0, 2, (count, size), dtype=torch.int8, device=device, generator=generator)
    return _drawn((2 * signs - 1).to(like))


def gaussian(count: int, size: int, *, like: Tensor, generator: torch.Generator | None = None) -> Tensor:
    """Standard normal rows.

    Args:
        count: How many rows.
        size: Their length.
        like: An empty tensor of the dtype and device.
        generator: The source of randomness, by default torch's global one; they are drawn on its device.

    Returns:
        Rows ``(count, size)``.

    Example:
        >>> gaussian(3, 2, like=torch.empty(0)).shape
        torch.Size([3, 2])
    """
    device = like.device if generator is None else generator.device
    return _drawn(torch.randn(count, size, dtype=like.dtype, device=device, generator=generator).to(like))


def sphere(count: int, size: int, *, like: Tensor, generator: torch.Generator | None = None) -> Tensor:
    """Rows that are uniform on the sphere of radius sqrt(size).

    Args:
        count: How many rows.
        size: Their length.
        like: An empty tensor of the dtype and device.
        generator: The source of randomness, by default torch's global one; they are drawn on its device.

    Returns:
        Rows ``(count, size)``.

    Example:
        >>> sphere(3, 4, like=torch.empty(0)).norm(dim=1).round(decimals=3)
        tensor([2., 2., 2.])
    """
    rows = gaussian(count, size, like=like, generator=generator)
    return rows * (size**0.5 / torch.linalg.vector_norm(rows, dim=1, keepdim=True))


def _drawn(rows: Tensor) -> Tensor:
    send = SENT.get()
    return rows if send is None else send(rows)


# Rows of a basis


def inner(one: Tensor, other: Tensor) -> Tensor:
    """Inner products of rows, summed in float64: a sum over ten million entries in float32 is off by 1e-4, and so is
    one over fifty thousand of many sizes.

    Args:
        one: Rows ``(..., k, p)``.
        other: Rows ``(..., m, p)``.

    Returns:
        ``(..., k, m)`` in float64, on the CPU.

    Example:
        >>> inner(torch.ones(1, 3), torch.ones(2, 3))
        tensor([[3., 3.]], dtype=torch.float64)
    """
    if one.ndim > 2:  # several axes in front cannot be multiplied without copies
        return torch.stack([inner(a, b) for a, b in zip(one, other, strict=True)])
    if not tuning(one.device).has_cache:
        return _added(one, other, _PIECE)
    pieces = zip(one.split(_PIECE, -1), other.split(_PIECE, -1), strict=True)
    return sum((_added(a, b, _FEW) for a, b in pieces), torch.zeros(len(one), len(other), dtype=torch.float64))


def _added(one: Tensor, other: Tensor, few: int) -> Tensor:
    """``one @ other^T`` of two axes, few entries of a row at a time in their precision, and these in float64."""
    n = one.shape[1] // few
    if n < 2:
        return (one @ other.mT).cpu().double()
    a, b = (rows[:, : n * few].unflatten(1, (n, few)).movedim(1, 0) for rows in (one, other))
    rest = (one[:, n * few :] @ other[:, n * few :].mT).cpu().double()
    return rest + torch.bmm(a, b.mT).cpu().double().sum(0)


def norms(rows: Tensor) -> Tensor:
    """The norm of each row, ``(..., p) -> (...)``, on the CPU: of few entries at a time in the precision of the rows,
    and of these in float64. A sum of squares of many sizes is off by 1e-5 in float32 where there are some thousands.
    """
    n = rows.shape[-1] // _FEW
    parts = [rows[..., : n * _FEW].unflatten(-1, (n, _FEW)), rows[..., n * _FEW :].unsqueeze(-2)]
    sums = torch.cat([torch.linalg.vector_norm(part, dim=-1) for part in parts], -1)
    return torch.linalg.vector_norm(sums.cpu().double(), dim=-1)


def subtract(rows: Tensor, weights: Tensor, basis: Tensor) -> None:
    """``rows -= weights @ basis``, in place."""
    if not tuning(rows.device).has_cache:
        rows -= weights.to(rows) @ basis
        return
    for piece, part in zip(rows.split(_PIECE, -1), basis.split(_PIECE, -1), strict=True):
        piece -= weights.to(piece) @ part


def orthogonalise(rows: Tensor, basis: Tensor, near: int) -> tuple[Tensor, Tensor]:
    """What is left of rows ``(..., k, p)`` outside of an orthonormal basis ``(..., m, p)``, and what was taken away,
    ``(..., k, m)`` in float64. From ``near`` on are the rows of the basis to which they are not orthogonal but for
    rounding errors.

    First these alone, then all, and again until hardly anything changes: once is enough then, unless little is left.
    """
    out = rows.clone()
    taken = torch.zeros(*rows.shape[:-1], basis.shape[-2], dtype=torch.float64)

    def turn(first: int) -> None:
        h = inner(out, basis[..., first:, :])
        subtract(out, h, basis[..., first:, :])
        taken[..., first:] += h

    turn(near)
    left = norms(out)
    for _ in range(3):
        before = left
        turn(0)
        left = norms(out)
        if bool((left >= 0.5 * before).all()):
            break
    return out, taken


def orthonormal_rows(rows: Tensor, basis: Tensor | None = None, floor: float = 0.0) -> Tensor:
    """Orthonormal rows that span what ``rows`` adds to an orthonormal basis.

    What is not above ``floor``, or is rounding error of the rows, is left out, so there may be fewer.

    Args:
        rows: Rows ``(k, p)``.
        basis: Orthonormal rows ``(m, p)``, by default none.
        floor: A singular value, by default 0.

    Example:
        >>> orthonormal_rows(torch.tensor([[3.0, 4.0, 0.0], [6.0, 8.0, 0.0]])).abs()
        tensor([[0.6000, 0.8000, 0.0000]])

    Source:
        "twice is enough", Giraud, Langou, Rozloznik (2005), Comput. Math. Appl. 50.
    """
    out = rows
    floor = max(floor, noise(rows) * float(torch.linalg.vector_norm(rows)))
    for turn in range(2):
        if basis is not None and len(basis):
            out = out - (out @ basis.mT) @ basis
        if not len(out):
            break
        q, r = torch.linalg.qr(out.mT)
        u, s, _ = torch.linalg.svd(r, full_matrices=False)
        # What the second turn still shortens was rounding error along the basis.
        out = (q @ u[:, s > (0.5 if turn else floor)]).mT
    # LAPACK sums squares in the precision of the rows.
    return out / norms(out).unsqueeze(-1).to(out) if len(out) else out


def nystrom_factor(probes: Tensor, images: Tensor) -> tuple[Tensor, Tensor, float]:
    """B, L and s such that ``B^T B`` is the Nystrom approximation of ``A + s`` from A's images of the probes, and
    ``L L^T`` its matrix in the probes; s is a shift by rounding error that makes that stable.

    Source: Tropp, Yurtsever, Udell, Cevher (2017), 1706.05736, algorithm 3.
    """
    scale = float(torch.linalg.vector_norm(images)) / probes.shape[1] ** 0.5
    if scale == 0:
        return images, torch.eye(len(probes), dtype=images.dtype, device=images.device), 0.0
    shift = torch.finfo(images.dtype).eps * scale
    for _ in range(5):
        shifted = images + shift * probes
        inner = probes @ shifted.mT
        lower, info = torch.linalg.cholesky_ex((inner + inner.mT) / 2)
        if not int(info) and bool(lower.isfinite().all()):
            return torch.linalg.solve_triangular(lower, shifted, upper=False), lower, shift
        shift *= 10
    raise ValueError("the matrix is not positive semidefinite: use xtrace or randomised_eigh")


def to_dense(matvec: Matvec, size: int, like: Tensor) -> Tensor:
    """The matrix, by ``size`` products."""
    out = like.new_empty(size, size)
    step = chunk_length(size * like.element_size(), size, like.device)
    for start in range(0, size, step):
        stop = min(start + step, size)
        unit = like.new_zeros(stop - start, size)
        unit[torch.arange(stop - start), torch.arange(start, stop)] = 1.0
        out[:, start:stop] = matvec(unit).mT
    return out


def noise(rows: Tensor) -> float:
    """The relative size of what rounding leaves of a vector that should vanish."""
    return 16 * torch.finfo(rows.dtype).eps


# Estimates


class Estimate(NamedTuple):
    """A value known up to a random error: the convention of the whole library.

    Attributes:
        value: The estimate.
        error: Its standard error, of the same shape, such that ``value +- 1.96 error`` is a 95 % interval (for few
            probes it is widened by Student's quantile: by 15 % with ten, by 3 % with fifty). It is zero where the value
            is exact, and not a number where one random vector tells nothing of it.
        products: How many vectors were multiplied with the matrix.
    """

    value: Tensor
    error: Tensor
    products: int

    def _repr_html_(self) -> str:
        after = f"after {self.products} products"
        if self.value.numel() == 1:
            return f"<p>{number(float(self.value), float(self.error))}, {after}</p>"
        largest = float(self.error.max()) if self.error.numel() else 0.0
        return f"<p>{tuple(self.value.shape)} values, standard errors up to {largest:.1g}, {after}</p>"


def mean_of(samples: Tensor, products: int) -> Estimate:
    """The mean over the first axis, with its standard error, which is not a number for one sample.

    Args:
        samples: Independent samples ``(n, ...)``.
        products: How many products they took.

    Example:
        >>> mean_of(torch.tensor([1.0, 2.0, 3.0]), products=3).value
        tensor(2.)
    """
    n = len(samples)
    if n == 1:
        return Estimate(samples[0], torch.full_like(samples[0], torch.nan), products)
    return Estimate(samples.mean(0), samples.std(0) * (widening(n) / n**0.5), products)


def widening(n: int) -> float:
    """The 97.5 % quantile of Student's t with n - 1 degrees of freedom, over that of the normal distribution."""
    if n < 2:
        raise ValueError("an error needs at least two probes")
    z, d = 1.959964, n - 1
    if d <= 4:
        return (12.7062, 4.3027, 3.1824, 2.7764)[d - 1] / z
    # Expansion of the quantile in 1 / d: Abramowitz and Stegun (1964), 26.7.5.
    t2, t4, t6 = z**2 + 1, 5 * z**4 + 16 * z**2 + 3, 3 * z**6 + 19 * z**4 + 17 * z**2 - 15
    return 1 + t2 / (4 * d) + t4 / (96 * d**2) + t6 / (384 * d**3)


# Solves


class Solution(NamedTuple):
    """The solutions of several systems.

    Attributes:
        x: The solutions, a row each.
        residuals: Relative residuals ``(k,)``, recomputed from x at the end.
        products: How many calls of ``matvec`` there were, each on all rows that were not finished.
    """

    x: Tensor
    residuals: Tensor
    products: int


def retire(
    step: Callable[..., tuple[Tensor, ...]],
    finished: Callable[..., Tensor],
    state: Sequence[Tensor],
    limit: int,
) -> tuple[tuple[Tensor, ...], int]:
    """Repeat ``step`` on a state of tensors with a common first axis, without the rows that are ``finished``; at
    most ``limit`` times. The final state of all rows, and the number of steps.
    """
    out = tuple(t.clone() for t in state)
    state = tuple(state)
    rows = torch.arange(len(state[0]), device=state[0].device)
    for count in range(limit + 1):
        done = finished(*state)
        if count == limit:
            done = torch.ones_like(done)
        if bool(done.any()):
            for whole, part in zip(out, state, strict=True):
                whole[rows[done]] = part[done]
            state, rows = tuple(t[~done] for t in state), rows[~done]
        if not len(rows):
            break
        state = step(*state)
    return out, count


def solve(
    name: str,
    inner: Callable[[Tensor, Tensor, int], tuple[Tensor, int, str]],
    residual: Callable[[Tensor, Tensor], Tensor],
    measure: Callable[[Tensor], Tensor],
    b: Tensor,
    x: Tensor,
    *,
    rtol: float,
    max_products: int,
    warm: bool,
) -> Solution:
    """Repeat an inner solver, which follows its residual by a recursion, on the true residual, until that is small.

    inner: ``(residuals, targets, limit) -> (correction of x, products, what went wrong)``. residual: ``(b, x) -> b -
    A x``. measure: the size of a residual, which shall come down to ``rtol`` times its value at x = 0. warm: x is
    not zero.
    """
    start = measure(b)
    x = torch.where((start == 0).unsqueeze(1), 0.0, x)
    r = residual(b, x) if warm else b.clone()
    norms = measure(r) if warm else start.clone()
    stuck = torch.zeros_like(norms, dtype=torch.bool)
    products, trouble = int(warm), ""
    while True:
        rows = (~(norms <= rtol * start) & ~stuck).nonzero().squeeze(1)
        exhausted = products + 2 > max_products
        if not len(rows) or exhausted:
            break
        correction, used, text = inner(r[rows], 0.5 * rtol * start[rows], max_products - products - 1)
        trial = x[rows] + correction
        rest = residual(b[rows], trial)
        text = text if bool(rest.isfinite().all()) else "a product is not finite"
        products, trouble = products + used + 1, trouble or text
        size = measure(rest)
        stuck[rows] = ~(size < 0.5 * norms[rows])
        gain = size < norms[rows]
        better = rows[gain]
        for whole, part in ((x, trial), (r, rest), (norms, size)):
            whole[better] = part[gain]
    residuals = norms / torch.where(start > 0, start, 1.0)
    if bool((residuals <= rtol).all()):
        return Solution(x, residuals, products)
    if exhausted and not trouble:
        trouble = "raise max_products or rtol, add regul, or give a preconditioner"
    elif not trouble:
        trouble = f"products in {str(b.dtype).removeprefix('torch.')} allow no better: raise rtol or the precision"
    worst = float(residuals[(residuals <= rtol).logical_not()].max())
    raise RuntimeError(
        f"{name}: relative residual {worst:.2g} after {products} products, the target was {rtol:.2g}: {trouble}"
    )
