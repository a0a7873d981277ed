"""Stochastic Lanczos quadrature: the spectral density of a matrix, and the trace of any function of it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from ..memory import budget
from .base import Estimate, Matvec, Sampler, mean_of, noise, rademacher, to_dense
from .lanczos import quadrature_of, tridiagonals


class Density(NamedTuple):
    """A density of eigenvalues on a grid.

    Attributes:
        grid: The points ``(n,)``.
        value: The mean density over the probes, a fraction of the eigenvalues per unit of the grid.
        error: Its standard error, with the convention of :class:`Estimate`.
    """

    grid: Tensor
    value: Tensor
    error: Tensor


@dataclass(frozen=True, eq=False)
class Quadrature:
    """The spectrum of a matrix as several random probes see it, from which much is computed without further products.

    For each probe there are Ritz values and weights, which sum to one (in the mean, if something was deflated): a
    spectrum of atoms that has the first ``2 steps`` moments of the matrix as the probe sees it.

    By what values and weights of half of the steps differ, the quadrature is biased, and this is part of every error.
    Where the bias falls only slowly, as it does for the logarithm of eigenvalues over many decades, that is its size
    rather than a bound: take more steps until it no longer matters.

    Args:
        values: Ritz values ``(probes, steps)``, in float64.
        weights: Their weights, in the same shape.
        size: The number of rows of the matrix, p.
        products: How many vectors were multiplied with it.
        coarse: Values and weights of half of the steps.
        closed: ``(probes,)``, whether the space of a probe is invariant, so that its values are eigenvalues.
        exact: Whether they are all eigenvalues.
        rounding: What it may leave of a value of zero.
    """

    values: Tensor
    weights: Tensor
    size: int
    products: int
    coarse: tuple[Tensor, Tensor]
    closed: Tensor
    exact: bool = False
    rounding: float = 0.0

    def trace_of(self, f: Callable[[Tensor], Tensor]) -> Estimate:
        """The trace of f(A).

        Args:
            f: A function of a tensor of Ritz values, entry by entry.

        Returns:
            The trace, with its standard error.

        Raises:
            ValueError: Where f is not finite.

        Example:
            >>> l = torch.linspace(1, 2, 1000)
            >>> spectrum = slq(lambda v: l * v, 1000, steps=10, probes=2, like=torch.empty(0))
            >>> spectrum.trace_of(torch.ones_like).value.round(decimals=3)
            tensor(1000., dtype=torch.float64)
        """
        samples = self.size * _average(f, self.values, self.weights)
        if self.exact:
            return Estimate(samples[0], torch.zeros_like(samples[0]), self.products)
        mean = mean_of(samples, self.products)
        bias = mean.value - self.size * _average(f, *self.coarse).mean()
        return mean._replace(error=torch.hypot(mean.error, bias))

    def logdet(self, regul: float = 0.0) -> Estimate:
        """The logarithm of the determinant of A + regul.

        Args:
            regul: What is added to every eigenvalue, by default 0.

        Raises:
            ValueError: Unless that is positive definite.
        """
        smallest = float(self.values[self.weights > 0].min()) + regul
        if not smallest > self.rounding:
            raise ValueError(
                f"logdet: the matrix plus regul={regul:.3g} is not positive definite to working precision (one of its "
                f"eigenvalues is near {smallest:.3g}): add regul"
            )
        return self.trace_of(lambda l: torch.log(l + regul))

    def density(self, grid: int | Tensor = 1000, sigma: float | None = None) -> Density:
        """The spectral density, blurred by a Gaussian.

        Args:
            grid: The points, or how many, by default 1000.
            sigma: The standard deviation of the Gaussian, by default a hundredth of the width of the spectrum.
        """
        width = float(self.values.max() - self.values.min())
        largest = float(self.values.abs().max())
        if sigma is None:
            sigma = 0.01 * (width if width > 1e-8 * largest else largest) or 1.0
        return self._blurred(self.values, self.weights, grid, sigma)

    def log_density(
        self, grid: int | Tensor = 1000, sigma: float = 0.1, *, sign: int = 0, floor: float | None = None
    ) -> Density:
        """The density of ``log10 |l|``, blurred by a Gaussian; the grid is in these units too.

        Args:
            grid: The points, or how many, by default 1000.
            sigma: The standard deviation of the Gaussian, in decades, by default 0.1.
            sign: 1 or -1 for the positive or negative eigenvalues only, by default 0 for both.
            floor: What is smaller in absolute value, in particular a zero eigenvalue, counts as this, and has no sign,
                so that it is left out if one is given. By default it is machine precision times the largest.
        """
        largest = float(self.values.abs().max())
        floor = (torch.finfo(self.values.dtype).eps * largest or 1.0) if floor is None else floor
        chosen = sign * self.values > floor if sign else torch.ones_like(self.values, dtype=torch.bool)
        return self._blurred(self.values.abs().clamp_min(floor).log10(), self.weights * chosen, grid, sigma)

    def christoffel(self, x: float) -> float:
        """The largest weight that x can have as a node, mean over the probes: ``1 / sum_j L_j(x)^2 / w_j`` with the
        Lagrange polynomials of the nodes.

        By no more can the weight below x of two spectra differ that agree on polynomials of degree ``2 steps - 2``. It
        is zero where the space closed.

        Args:
            x: The point.

        Example:
            >>> l = torch.linspace(0, 1, 100)
            >>> few, many = (slq(lambda v: l * v, 100, steps=m, probes=2, like=torch.empty(0)) for m in (5, 20))
            >>> many.christoffel(0.5) < few.christoffel(0.5) < 1
            True

        Source:
            Akhiezer (1965), The classical moment problem, chapter 2.
        """
        total = 0.0
        for nodes, weights, closed in zip(self.values, self.weights, self.closed, strict=True):
            used = weights > 0
            if not bool(closed) and int(used.sum()) < self.size:
                n, w = nodes[used], weights[used]
                apart = (n.unsqueeze(1) - n).abs().clamp(min=1e-300).log().fill_diagonal_(0.0).sum(1)
                near = (x - n).abs().clamp(min=1e-300).log()
                total += float((-(2 * (near.sum() - near - apart) - w.log()).logsumexp(0)).exp())
        return total / len(self.values)

    def _blurred(self, values: Tensor, weights: Tensor, grid: int | Tensor, sigma: float) -> Density:
        if isinstance(grid, int):
            grid = torch.linspace(
                float(values.min()) - 5 * sigma, float(values.max()) + 5 * sigma, grid, dtype=torch.float64
            )
        points = grid.to(values)
        rows = []
        for l, w in zip(values, weights, strict=True):
            z = (points.unsqueeze(1) - l) / sigma
            rows.append((torch.exp(-0.5 * z.square()) @ w) / (sigma * (2 * torch.pi) ** 0.5))
        if self.exact:
            return Density(grid, rows[0], torch.zeros_like(rows[0]))
        mean = mean_of(torch.stack(rows), self.products)
        return Density(grid, mean.value, mean.error)


def slq(
    matvec: Matvec,
    size: int,
    *,
    steps: int,
    probes: int,
    sampler: Sampler = rademacher,
    deflate: Tensor | None = None,
    generator: torch.Generator | None = None,
    like: Tensor,
) -> Quadrature:
    """Stochastic Lanczos quadrature of a symmetric matrix: ``steps`` products for each of several probes.

    It takes memory for probes x steps x p numbers, in chunks of probes that fit the memory budget.

    Args:
        matvec: A, ``(k, p) -> (k, p)``.
        size: The number of its rows, p.
        steps: How many products there are for each probe.
        probes: How many there are; one has no standard error. At p or more of them all eigenvalues are computed
            instead, by p products.
        sampler: What draws the probes, by default random signs.
        deflate: Orthonormal eigenvectors ``(m, p)`` to leave out, such as outliers known from :func:`eigsh`: the result
            is that of the matrix on the other p - m directions. A probe loses its share of those, so its total weight
            is one just in the mean, unless the sampler gives probes orthogonal to them, of squared length p - m.
        generator: The source of randomness, by default torch's global one.
        like: An empty tensor of the dtype and device.

    Returns:
        The quadrature.

    Raises:
        ValueError: For less than one probe or one step.

    Example:
        >>> l = torch.linspace(1, 2, 1000)
        >>> spectrum = slq(lambda v: l * v, 1000, steps=10, probes=5, like=torch.empty(0))
        >>> spectrum.values.shape
        torch.Size([5, 10])

    Source:
        Golub and Meurant (1994); Ubaru, Chen, Saad (2017), SIAM J. Matrix Anal. Appl. 38; Papyan (2018), 1811.07062;
        Ghorbani, Krishnan, Xiao (2019), 1901.10159.
    """
    free = size - (0 if deflate is None else len(deflate))
    if steps < 1 or free < 1:
        raise ValueError(f"slq: expected at least one step and one direction, got steps={steps} and {free} directions")
    if probes >= size:
        dense = to_dense(matvec, size, like).to("cpu", torch.float64)
        if deflate is not None:
            rest = torch.linalg.qr(deflate.mT.to(dense), mode="complete").Q[:, len(deflate) :]
            dense = rest.mT @ dense @ rest
        values = torch.linalg.eigvalsh((dense + dense.mT) / 2).unsqueeze(0)
        weights = torch.full_like(values, 1 / free)
        closed = torch.ones(1, dtype=torch.bool)
        lost = _rounding(values, like)
        return Quadrature(values, weights, free, size, (values, weights), closed, exact=True, rounding=lost)
    if probes < 1:
        raise ValueError(f"slq: expected at least one probe, got {probes}")

    def off(rows: Tensor) -> Tensor:
        return rows if deflate is None else rows - (rows @ deflate.mT) @ deflate

    spent = 0

    def product(rows: Tensor) -> Tensor:
        nonlocal spent
        spent += len(rows)
        return off(matvec(rows))

    fine: list[tuple[Tensor, Tensor]] = []
    coarse: list[tuple[Tensor, Tensor]] = []
    invariant: list[Tensor] = []
    length = max(1, budget(like.device) // (min(steps, size) * size * like.element_size()))
    for start in range(0, probes, length):
        v = off(off(sampler(min(length, probes - start), size, like=like, generator=generator)))
        mass = (v.square().sum(1) / free).to("cpu", torch.float64).unsqueeze(1)
        for _, matrix, now in tridiagonals(product, v, min(steps, free)):
            matrices, closed = matrix, now.cpu()
        invariant.append(closed)
        m, done = matrices.shape[1], bool(closed.all())
        for out, order in ((fine, m), (coarse, m if done else max(1, m // 2))):
            values, weights, _ = quadrature_of(matrices[:, :order, :order])
            out.append((values, weights * mass))
    values, weights = _stack(fine)
    lost = _rounding(values, like)
    return Quadrature(values, weights, free, spent, _stack(coarse), torch.cat(invariant), rounding=lost)


def _rounding(values: Tensor, like: Tensor) -> float:
    """What rounding may leave of a Ritz value of zero, in products of the dtype of ``like``."""
    return noise(like) * float(values.abs().max())


def _average(f: Callable[[Tensor], Tensor], values: Tensor, weights: Tensor) -> Tensor:
    mapped = torch.where(weights > 0, f(values), 0.0)
    if not bool(mapped.isfinite().all()):
        raise ValueError(f"f is not finite at a Ritz value of {float(values[~mapped.isfinite()][0]):.3g}")
    return (mapped * weights).sum(1)


def _stack(parts: list[tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
    """Parts of unlike width under each other, with atoms of no weight."""
    width = max(values.shape[1] for values, _ in parts)
    values = [torch.cat([l, l[:, -1:].expand(-1, width - l.shape[1])], 1) for l, _ in parts]
    weights = [torch.nn.functional.pad(w, (0, width - w.shape[1])) for _, w in parts]
    return torch.cat(values), torch.cat(weights)
