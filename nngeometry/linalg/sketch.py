"""Low-rank approximations from random sketches, and the preconditioner made of one."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from .base import Matvec, gaussian, nystrom_factor, orthonormal_rows


class LowRank(NamedTuple):
    """An approximation ``sum_i values_i vectors_i vectors_i^T``.

    Attributes:
        values: ``(r,)``, descending (in absolute value, from :func:`randomised_eigh`); fewer than asked for where the
            rank of the matrix is less.
        vectors: Orthonormal rows ``(r, p)``.
        error: An estimate of the Frobenius norm of what is left of the matrix, from independent probes: with the
            default of ten it is within a factor of about 1.5.
        products: How many vectors were multiplied with the matrix.
    """

    values: Tensor
    vectors: Tensor
    error: Tensor
    products: int


def nystrom(
    matvec: Matvec,
    size: int,
    rank: int,
    *,
    oversampling: int = 10,
    iterations: int = 0,
    probes: int = 10,
    generator: torch.Generator | None = None,
    like: Tensor,
) -> LowRank:
    """The Nystrom approximation of a positive semidefinite matrix from a random sketch, cut to a rank.

    It is exact when the rank of the matrix, or p, is no more than ``rank``.

    Args:
        matvec: A, ``(k, p) -> (k, p)``.
        size: The number of its rows, p.
        rank: The rank of the result.
        oversampling: How many rows the sketch has beyond that, by default 10.
        iterations: How often the sketch is multiplied with the matrix first, by default 0; each counts as many
            products, and helps where eigenvalues decay slowly.
        probes: How many vectors the error is estimated with, by default 10; none gives NaN.
        generator: The source of randomness, by default torch's global one.
        like: An empty tensor of the dtype and device.

    Returns:
        The approximation, with an estimate of its error.

    Raises:
        ValueError: If the matrix is seen not to be positive semidefinite.

    Example:
        >>> l = torch.tensor([3.0, 2.0, 1.0, 0.0, 0.0])
        >>> nystrom(lambda v: l * v, 5, 3, like=torch.empty(0)).values.round(decimals=3)
        tensor([3., 2., 1.])

    Source:
        Tropp, Yurtsever, Udell, Cevher (2017), 1706.05736, algorithm 3.
    """
    sketch, spent = _sketch(matvec, size, rank, oversampling, iterations, generator, like)
    factor, _, shift = nystrom_factor(sketch, matvec(sketch))
    _, s, vectors = torch.linalg.svd(factor, full_matrices=False)
    values = (s.square() - shift).clamp_min(0)
    return _with_error(matvec, values[:rank], vectors[:rank], probes, spent + len(sketch), generator)


def randomised_eigh(
    matvec: Matvec,
    size: int,
    rank: int,
    *,
    oversampling: int = 10,
    iterations: int = 1,
    probes: int = 10,
    generator: torch.Generator | None = None,
    like: Tensor,
) -> LowRank:
    """The eigenpairs of largest absolute value of a symmetric matrix, from its projection on a random sketch.

    The values are approximate unless the matrix has little outside the sketch: see ``error``, or use :func:`eigsh`,
    which does not return before they have converged.

    Args:
        matvec: A, ``(k, p) -> (k, p)``.
        size: The number of its rows, p.
        rank: How many pairs.
        oversampling: How many rows the sketch has beyond that, by default 10.
        iterations: How often the sketch is multiplied with the matrix beyond once, by default 1.
        probes: How many vectors the error is estimated with, by default 10; none gives NaN.
        generator: The source of randomness, by default torch's global one.
        like: An empty tensor of the dtype and device.

    Returns:
        The pairs, with an estimate of what is left of the matrix.

    Example:
        >>> l = torch.tensor([3.0, -2.0, 1.0, 0.0, 0.0])
        >>> randomised_eigh(lambda v: l * v, 5, 3, like=torch.empty(0)).values.round(decimals=3)
        tensor([ 3., -2.,  1.])

    Source:
        Halko, Martinsson, Tropp (2011), 0909.4061, algorithm 5.3.
    """
    sketch, spent = _sketch(matvec, size, rank, oversampling, iterations + 1, generator, like)
    inner = sketch @ matvec(sketch).mT
    values, columns = torch.linalg.eigh((inner + inner.mT) / 2)
    order = values.abs().argsort(descending=True)[:rank]
    return _with_error(matvec, values[order], columns[:, order].mT @ sketch, probes, spent + len(sketch), generator)


def nystrom_preconditioner(values: Tensor, vectors: Tensor, regul: float) -> Matvec:
    """An approximation of a multiple of ``(A + regul)^-1``, for :func:`cg`, from the leading eigenpairs of a positive
    semidefinite A: those directions are solved, and the others taken to have the smallest of the eigenvalues.

    Args:
        values: Eigenvalues ``(r,)``, not negative.
        vectors: Orthonormal rows ``(r, p)``.
        regul: What is added to A.

    Returns:
        A function of rows, ``(k, p) -> (k, p)``.

    Raises:
        ValueError: If regul is not positive and an eigenvalue is zero, or one is negative.

    Example:
        >>> from nngeometry.linalg import cg
        >>> l = torch.tensor([999.0, 99.0, 1.0, 1.0])
        >>> near = nystrom(lambda v: l * v, 4, 3, like=torch.empty(0))
        >>> precondition = nystrom_preconditioner(near.values, near.vectors, 1.0)
        >>> cg(lambda v: (l + 1) * v, torch.ones(1, 4), preconditioner=precondition).x.round(decimals=4)
        tensor([[0.0010, 0.0100, 0.5000, 0.5000]])

    Source:
        Frangella, Tropp, Udell (2021), 2110.02820.
    """
    if not regul > 0 and not bool((values > 0).all()):
        raise ValueError(f"nystrom_preconditioner: expected a positive regul, got {regul}")
    if bool((values < 0).any()):
        raise ValueError("nystrom_preconditioner: expected eigenvalues of a positive semidefinite matrix")
    scale = ((values.min() + regul) / (values + regul) - 1) if len(values) else values

    def precondition(v: Tensor) -> Tensor:
        return v + ((v @ vectors.mT) * scale) @ vectors

    return precondition


def _sketch(
    matvec: Matvec,
    size: int,
    rank: int,
    oversampling: int,
    iterations: int,
    generator: torch.Generator | None,
    like: Tensor,
) -> tuple[Tensor, int]:
    """Orthonormal rows, turned towards the leading eigenvectors by some products, and the number of those."""
    if not 1 <= rank <= size:
        raise ValueError(f"expected 1 <= rank <= {size}, got {rank}")
    count = rank + oversampling
    if count >= size:
        return torch.eye(size, dtype=like.dtype, device=like.device), 0
    rows, spent = orthonormal_rows(gaussian(count, size, like=like, generator=generator)), 0
    for _ in range(iterations):
        rows, spent = orthonormal_rows(matvec(rows)), spent + len(rows)
    return rows, spent


def _with_error(
    matvec: Matvec, values: Tensor, vectors: Tensor, probes: int, spent: int, generator: torch.Generator | None
) -> LowRank:
    """The squared norm of the rest times a normal vector is, in the mean, its squared Frobenius norm."""
    if not probes:
        return LowRank(values, vectors, values.new_full((), torch.nan), spent)
    v = gaussian(probes, vectors.shape[1], like=vectors, generator=generator)
    rest = matvec(v) - ((v @ vectors.mT) * values) @ vectors
    return LowRank(values, vectors, rest.square().sum(1).mean().sqrt(), spent + probes)
