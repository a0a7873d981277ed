"""Stochastic estimates of the trace and the diagonal, with their errors, to a number of products or a tolerance."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from .. import arguments
from ..memory import chunk_length
from .base import (
    Estimate,
    Matvec,
    Sampler,
    mean_of,
    noise,
    nystrom_factor,
    orthonormal_rows,
    rademacher,
    sphere,
    widening,
)

#: A tolerance is never taken for reached on fewer probes than this.
MINIMUM = 10


def hutchinson(
    matvec: Matvec,
    size: int,
    *,
    products: int | None = None,
    rtol: float | None = None,
    sampler: Sampler = rademacher,
    generator: torch.Generator | None = None,
    like: Tensor,
) -> Estimate:
    """The trace, as the mean of ``v . A v`` over random v. The error falls with the square root of the products.

    Args:
        matvec: A, ``(k, p) -> (k, p)``.
        size: The number of its rows, p.
        products: How many vectors to multiply; as many as p give the exact trace.
        rtol: Instead, stop when the error is below rtol times the value, after no fewer than 10 probes and no more than
            ``products`` (by default p, where the value is exact).
        sampler: What draws the probes, by default random signs.
        generator: The source of randomness, by default torch's global one.
        like: An empty tensor of the dtype and device.

    Returns:
        The trace, with its standard error.

    Raises:
        ValueError: If neither products nor rtol is given, or there are too few for an error.
        RuntimeError: If rtol is not reached.

    Example:
        >>> l = torch.arange(1.0, 101.0)
        >>> hutchinson(lambda v: l * v, 100, products=10, like=torch.empty(0))  # exact on a diagonal
        Estimate(value=tensor(5050.), error=tensor(0.), products=10)

    Source:
        Girard (1989), Numer. Math. 56; Hutchinson (1990), Commun. Stat. Simul. Comput. 19.
    """
    samples: list[Tensor] = []

    def grow(n: int) -> Estimate:
        for count in _chunks(n - sum(map(len, samples)), size, like):
            v = sampler(count, size, like=like, generator=generator)
            samples.append((v * matvec(v)).sum(1))
        return mean_of(torch.cat(samples), n)

    return _run(grow, _exact_trace(matvec, size, like), size, products, rtol, cost=1, least=2)


def hutchpp(
    matvec: Matvec,
    size: int,
    *,
    products: int | None = None,
    rtol: float | None = None,
    generator: torch.Generator | None = None,
    like: Tensor,
) -> Estimate:
    """The trace of a symmetric matrix: exact on the range of a random sketch, by probes on the rest.

    A third of the products each go into the sketch, its image, and the probes. For positive semidefinite matrices, and
    others whose eigenvalues decay, the error falls with the products rather than their square root. The products are
    held as rows.

    Args:
        matvec: A, ``(k, p) -> (k, p)``.
        size: The number of its rows, p.
        products: How many vectors to multiply, as in :func:`hutchinson`.
        rtol: Instead, a target of the error relative to the value.
        generator: The source of randomness, by default torch's global one.
        like: An empty tensor of the dtype and device.

    Returns:
        The trace, with its standard error.

    Raises:
        RuntimeError: If rtol is not reached.

    Example:
        >>> l = torch.tensor([0.5]) ** torch.arange(100)
        >>> round(float(hutchpp(lambda v: l * v, 100, products=60, like=torch.empty(0)).value), 3)
        2.0

    Source:
        Meyer, Musco, Musco, Woodruff (2020), 2010.09649; probes scaled to the complement as in 2301.07825.
    """
    sketch = _Sketch(matvec, sphere, size, generator, like)
    probes, images = like.new_empty(0, size), like.new_empty(0, size)

    def grow(n: int) -> Estimate:
        nonlocal probes, images
        sketch.grow(n // 3)
        new = sphere(n - sketch.products - len(probes), size, like=like, generator=generator)
        probes, images = torch.cat([probes, new]), torch.cat([images, matvec(new)])
        inner = probes @ sketch.basis.mT
        u, image = probes - inner @ sketch.basis, images - inner @ sketch.basis_images
        quadratic = _ratio((u * image).sum(1) * (size - len(sketch.basis)), u.square().sum(1))
        return mean_of(sketch.inner().trace() + quadratic, n)

    return _run(grow, _exact_trace(matvec, size, like), size, products, rtol, cost=3, least=6)


def xtrace(
    matvec: Matvec,
    size: int,
    *,
    products: int | None = None,
    rtol: float | None = None,
    generator: torch.Generator | None = None,
    like: Tensor,
) -> Estimate:
    """The trace of a symmetric matrix: every probe serves as a sample on the complement of what the others span, and to
    span it.

    It takes two products for each probe and holds them as rows. It is exact for a matrix of rank below half the
    products, and by a factor of several better than :func:`hutchpp` where eigenvalues decay fast. The error is that of
    the mean of the leave-one-out estimates, with their covariance, which leave-two-out estimates give and which the
    source leaves out.

    Args:
        matvec: A, ``(k, p) -> (k, p)``.
        size: The number of its rows, p.
        products: How many vectors to multiply, as in :func:`hutchinson`.
        rtol: Instead, a target of the error relative to the value.
        generator: The source of randomness, by default torch's global one.
        like: An empty tensor of the dtype and device.

    Returns:
        The trace, with its standard error.

    Raises:
        RuntimeError: If rtol is not reached.

    Example:
        >>> l = torch.tensor([0.5]) ** torch.arange(100)
        >>> round(float(xtrace(lambda v: l * v, 100, products=60, like=torch.empty(0)).value), 3)
        2.0

    Source:
        Epperly, Tropp, Webber (2024), 2301.07825, with probes scaled to the complement (section 2.3).
    """
    sketch = _Sketch(matvec, sphere, size, generator, like)

    def grow(n: int) -> Estimate:
        sketch.grow(n // 2)
        unit, inner = sketch.left_out(), sketch.inner()
        # Without probe i the basis loses the direction unit[i]; u is what it leaves of the probe.
        part = sketch.probes @ sketch.basis.mT
        kept = part - (part * unit).sum(1, keepdim=True) * unit
        u, image = sketch.probes - kept @ sketch.basis, sketch.images - kept @ sketch.basis_images
        length, quadratic = u.square().sum(1), (u * image).sum(1)
        dimension = size - len(sketch.basis) + unit.square().sum(1).round()
        lost, image = ((unit @ inner) * unit).sum(1), image @ sketch.basis.mT

        def change(i: int, further: Tensor, _: Tensor) -> Tensor:
            more, onto = ((further @ inner) * further).sum(1), further @ part[i]
            new = quadratic[i] + 2 * onto * (further @ image[i]) + onto.square() * more
            space = dimension[i] + further.square().sum(1).round()
            return more + _ratio(quadratic[i] * dimension[i], length[i]) - _ratio(new * space, length[i] + onto**2)

        samples = inner.trace() - lost + _ratio(quadratic * dimension, length)
        return _dependent_mean(samples, unit, change, sketch.products)

    return _run(grow, _exact_trace(matvec, size, like), size, products, rtol, cost=2, least=4)


def xnystrace(
    matvec: Matvec,
    size: int,
    *,
    products: int | None = None,
    rtol: float | None = None,
    generator: torch.Generator | None = None,
    like: Tensor,
) -> Estimate:
    """The trace of a positive semidefinite matrix: as :func:`xtrace`, with a Nystrom approximation instead of a
    projection, so that a probe takes one product.

    Args:
        matvec: A, ``(k, p) -> (k, p)``.
        size: The number of its rows, p.
        products: How many vectors to multiply, as in :func:`hutchinson`.
        rtol: Instead, a target of the error relative to the value.
        generator: The source of randomness, by default torch's global one.
        like: An empty tensor of the dtype and device.

    Returns:
        The trace, with its standard error.

    Raises:
        ValueError: If the matrix is seen not to be positive semidefinite.
        RuntimeError: If rtol is not reached.

    Example:
        >>> l = torch.tensor([0.5]) ** torch.arange(100)
        >>> round(float(xnystrace(lambda v: l * v, 100, products=30, like=torch.empty(0)).value), 3)
        2.0

    Source:
        Epperly, Tropp, Webber (2024), 2301.07825.
    """
    probes, images = like.new_empty(0, size), like.new_empty(0, size)

    def grow(n: int) -> Estimate:
        nonlocal probes, images
        new = sphere(n - len(probes), size, like=like, generator=generator)
        probes, images = torch.cat([probes, new]), torch.cat([images, matvec(new)])
        if not bool(images.any()):
            return mean_of(images[:, 0], n)
        factor, lower, shift = nystrom_factor(probes, images)
        eye = torch.eye(n, dtype=like.dtype, device=like.device)
        # Without probe i the approximation loses the direction unit[i]; 1 / weight is what then is left of v . A v.
        unit = torch.linalg.solve_triangular(lower, eye, upper=False).mT
        weight = unit.square().sum(1)
        unit, inner = unit / weight.sqrt().unsqueeze(1), factor @ factor.mT
        gram = torch.cholesky_inverse(torch.linalg.cholesky(probes @ probes.mT))
        length = 1 / gram.diagonal()
        quadratic = (size - n + 1) / (length * weight)

        def change(i: int, further: Tensor, distance: Tensor) -> Tensor:
            length = 1 / (gram[i, i] - gram[i].square() / gram.diagonal())
            new = _ratio((size - n + 2) * torch.ones_like(distance), length * weight[i] * distance**2)
            return ((further @ inner) * further).sum(1) + quadratic[i] - new

        samples = factor.square().sum() - ((unit @ inner) * unit).sum(1) + quadratic
        return _dependent_mean(samples - shift * size, unit, change, n)

    return _run(grow, _exact_trace(matvec, size, like), size, products, rtol, cost=1, least=2)


def hutchinson_diag(
    matvec: Matvec,
    size: int,
    *,
    products: int | None = None,
    rtol: float | None = None,
    sampler: Sampler = rademacher,
    generator: torch.Generator | None = None,
    like: Tensor,
) -> Estimate:
    """The diagonal, as the mean of ``v * A v`` over random v, with an error for each entry. It holds a few vectors
    only.

    Args:
        matvec: A, ``(k, p) -> (k, p)``.
        size: The number of its rows, p.
        products: How many vectors to multiply, as in :func:`hutchinson`.
        rtol: Instead, a target of the norm of the error relative to that of the value.
        sampler: What draws the probes, by default random signs.
        generator: The source of randomness, by default torch's global one.
        like: An empty tensor of the dtype and device.

    Returns:
        The diagonal ``(p,)``, with the standard error of each entry.

    Raises:
        RuntimeError: If rtol is not reached.

    Example:
        >>> l = torch.arange(1.0, 4.0)
        >>> hutchinson_diag(lambda v: l * v, 3, products=2, like=torch.empty(0)).value
        tensor([1., 2., 3.])

    Source:
        Bekas, Kokiopoulou, Saad (2007), Appl. Numer. Math. 57.
    """
    have, mean, spread = 0, like.new_zeros(size), like.new_zeros(size)

    def grow(n: int) -> Estimate:
        nonlocal have, mean, spread
        for count in _chunks(n - have, size, like):
            v = sampler(count, size, like=like, generator=generator)
            x = v * matvec(v)
            shift = x.mean(0) - mean
            spread = spread + (x - x.mean(0)).square().sum(0) + shift.square() * (have * count / (have + count))
            mean = mean + shift * (count / (have + count))
            have += count
        return Estimate(mean, (spread / (n - 1) / n).sqrt() * widening(n), n)

    return _run(grow, _exact_diag(matvec, size, like), size, products, rtol, cost=1, least=2)


def xdiag(
    matvec: Matvec,
    size: int,
    *,
    products: int | None = None,
    rtol: float | None = None,
    generator: torch.Generator | None = None,
    like: Tensor,
) -> Estimate:
    """The diagonal of a symmetric matrix, to :func:`hutchinson_diag` what :func:`xtrace` is to :func:`hutchinson`.

    It takes two products for each probe and holds them as rows. It is worth it where eigenvalues decay: on a flat
    spectrum :func:`hutchinson_diag` is better.

    Args:
        matvec: A, ``(k, p) -> (k, p)``.
        size: The number of its rows, p.
        products: How many vectors to multiply, as in :func:`hutchinson`.
        rtol: Instead, a target of the norm of the error relative to that of the value.
        generator: The source of randomness, by default torch's global one.
        like: An empty tensor of the dtype and device.

    Returns:
        The diagonal ``(p,)``, with the standard error of each entry.

    Raises:
        RuntimeError: If rtol is not reached.

    Example:
        >>> l = torch.tensor([0.5]) ** torch.arange(100)
        >>> xdiag(lambda v: l * v, 100, products=60, like=torch.empty(0)).value[:3]
        tensor([1.0000, 0.5000, 0.2500])

    Source:
        Epperly, Tropp, Webber (2024), 2301.07825.
    """
    sketch = _Sketch(matvec, rademacher, size, generator, like)

    def grow(n: int) -> Estimate:
        sketch.grow(n // 2)
        unit = sketch.left_out()
        # Without probe i the basis loses the direction unit[i], and nothing else of the image is left over.
        onto = sketch.images @ sketch.basis.mT

        def loss(direction: Tensor) -> Tensor:
            lost, share = direction @ sketch.basis, (onto * direction).sum(1, keepdim=True)
            return lost * (direction @ sketch.basis_images - sketch.probes * share)

        mean = mean_of((sketch.basis * sketch.basis_images).sum(0) - loss(unit), sketch.products)
        # The covariance of the samples, as in _dependent_mean, from neighbours only: a vector for each pair.
        here, there = (loss(_further(unit.roll(turn, 0), unit)[0]) for turn in (-1, 1))
        covariance = (here * there.roll(-1, 0)).mean(0).clamp_min(0)
        return mean._replace(error=(mean.error.square() + covariance * widening(len(unit)) ** 2).sqrt())

    return _run(grow, _exact_diag(matvec, size, like), size, products, rtol, cost=2, least=4)


class _Sketch:
    """Probes, their images under A, an orthonormal basis of the images, and its image. Grows without repeating a
    product.
    """

    def __init__(
        self, matvec: Matvec, sampler: Sampler, size: int, generator: torch.Generator | None, like: Tensor
    ) -> None:
        self.matvec = matvec
        self.draw = lambda count: sampler(count, size, like=like, generator=generator)
        self.probes = self.images = self.basis = self.basis_images = like.new_empty(0, size)
        self.products = 0

    def grow(self, count: int) -> None:
        """To this number of probes."""
        probes = self.draw(count - len(self.probes))
        images = self.matvec(probes)
        self.probes, self.images = torch.cat([self.probes, probes]), torch.cat([self.images, images])
        floor = noise(images) * float(torch.linalg.vector_norm(self.images))
        basis = orthonormal_rows(images, self.basis, floor)
        self.basis = torch.cat([self.basis, basis])
        if len(basis):
            self.basis_images = torch.cat([self.basis_images, self.matvec(basis)])
        self.products += len(probes) + len(basis)

    def inner(self) -> Tensor:
        """A in the basis."""
        return self.basis @ self.basis_images.mT

    def left_out(self) -> Tensor:
        """For each probe the direction, in the basis, that no image of another probe has; zero if there is none."""
        u, s, v = torch.linalg.svd(self.images @ self.basis.mT, full_matrices=False)
        rows = (u / s) @ v
        # The image of probe i is independent of the others just if unit vector i lies in the span of u.
        needed = u.square().sum(1, keepdim=True) > 1 - torch.finfo(u.dtype).eps ** 0.5
        return torch.where(needed, rows / torch.linalg.vector_norm(rows, dim=1, keepdim=True), 0.0)


def _ratio(a: Tensor, b: Tensor) -> Tensor:
    return torch.where(b > 0, a / torch.where(b > 0, b, 1.0), 0.0)


def _further(unit: Tensor, other: Tensor) -> tuple[Tensor, Tensor]:
    """The directions of the parts of unit vectors that are orthogonal to others, and the lengths of those parts."""
    for _ in range(2):
        unit = unit - (unit * other).sum(1, keepdim=True) * other
    distance = torch.linalg.vector_norm(unit, dim=1, keepdim=True)
    distance = torch.where(distance > noise(unit), distance, 0.0)
    return _ratio(unit, distance), distance.squeeze(1)


def _dependent_mean(
    samples: Tensor, unit: Tensor, change: Callable[[int, Tensor, Tensor], Tensor], products: int
) -> Estimate:
    """The mean of leave-one-out estimates, with an error that allows for their covariance.

    Sample i is unbiased given the other probes. So with c_ij what it changes by when probe j is left out too,
    ``E c_ij c_ji`` is the covariance of samples i and j: in the product of (t_i - t) - (t_i^j - t) and
    (t_j - t) - (t_j^i - t) all terms but the first have mean zero. The usual squared error of a mean, which takes
    the samples for independent, is too small by just this covariance.

    unit: for each probe the direction that the approximation loses without it. ``change(i, further, distance)``: c_ij
    for all j, from the directions orthogonal to unit[i] that are lost next, and the sine of their angle.
    """
    n = len(samples)
    changes = samples.new_empty(n, n)
    for i in range(n):
        further, distance = _further(unit, unit[i])
        changes[i] = torch.where(distance > 0, change(i, further, distance), 0.0)
    covariance = (changes * changes.mT).fill_diagonal_(0).sum() / (n * (n - 1))
    mean = mean_of(samples, products)
    return mean._replace(error=(mean.error.square() + covariance.clamp_min(0) * widening(n) ** 2).sqrt())


def _run(
    grow: Callable[[int], Estimate],
    exact: Callable[[], Tensor],
    size: int,
    products: int | None,
    rtol: float | None,
    *,
    cost: int,
    least: int,
) -> Estimate:
    """Grow an estimate to a number of products, or until its error is small; where that takes as many products as
    the matrix has rows, take those instead.
    """
    if products is None and rtol is None:
        raise ValueError("give products= (how many), or rtol= (the relative error to reach)")
    if products is not None:
        arguments.integer("products", products, least=1)
    rtol = None if rtol is None else arguments.number("rtol", rtol, least=0.0)
    spent, n = 0, size if products is None else products
    limit = n
    if rtol is not None:
        n = min(MINIMUM * cost, limit)
    while True:
        if n >= size:
            value = exact()
            return Estimate(value, torch.zeros_like(value), spent + size)
        if n < least:
            raise ValueError(f"an error needs at least {least} products, got {n}")
        estimate = grow(n)
        if rtol is None:
            return estimate
        norm, error = (float(torch.linalg.vector_norm(t)) for t in estimate[:2])
        if n >= MINIMUM * cost and error <= rtol * norm:
            return estimate
        if n >= limit:
            raise RuntimeError(
                f"relative error {error / norm if norm else float('inf'):.2g} after {estimate.products} products, "
                f"the target was {rtol:.2g}: raise products or rtol"
            )
        spent, n = estimate.products, min(n + max(n // 2, cost), limit)


def _exact_diag(matvec: Matvec, size: int, like: Tensor) -> Callable[[], Tensor]:
    def exact() -> Tensor:
        out, start = like.new_empty(size), 0
        for count in _chunks(size, size, like):
            unit = like.new_zeros(count, size)
            unit[torch.arange(count), torch.arange(start, start + count)] = 1.0
            out[start : start + count] = matvec(unit)[:, start : start + count].diagonal()
            start += count
        return out

    return exact


def _exact_trace(matvec: Matvec, size: int, like: Tensor) -> Callable[[], Tensor]:
    diagonal = _exact_diag(matvec, size, like)
    return lambda: diagonal().sum()


def _chunks(count: int, size: int, like: Tensor) -> list[int]:
    """Numbers of rows, within the memory budget, that add up to ``count``."""
    step = chunk_length(size * like.element_size(), max(count, 1), like.device)
    return [min(step, count - start) for start in range(0, count, step)]
