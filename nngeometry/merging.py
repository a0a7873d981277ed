"""Merge models that were trained separately: the mode of the product of their posteriors."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from . import arguments
from .linalg import cg, gaussian
from .object import PMat, PVector


@arguments.called_as
def merge(experts: Sequence[tuple[nn.Module | PVector, PMat]], regul: float = 1e-8) -> PVector:
    """The weights ``(sum_i F_i)^-1 sum_i F_i w_i``, at which the sum of the quadratic approximations of the experts'
    losses is least.

    A matrix is a mean over examples: for experts of unlike numbers of examples n_i, give ``n_i * F_i``. Sums that stay
    in their representation are solved exactly, others (of Kronecker products, and of what is known by its products) by
    conjugate gradients to 1e-10 (in float32 to 1e-5).

    Args:
        experts: Pairs of a model (or its weights as a PVector) and its matrix, on the same layers.
        regul: Shared out among the F_i, so that directions without curvature get the mean of the experts.

    Returns:
        The weights, for :func:`~nngeometry.at` or ``copy_to_model``.

    Raises:
        ValueError: If experts have other layers, weights are not finite, or there is no single minimum: the sum is
            singular to working precision, or has negative eigenvalues.

    Example:
        >>> from nngeometry import FIM, PMatKFAC
        >>> models = [nn.Linear(4, 3) for _ in range(2)]
        >>> experts = [(model, FIM(model, (torch.randn(20, 4),), PMatKFAC)) for model in models]
        >>> merge(experts, regul=1e-4).copy_to_model(models[0])

    Source: Matena and Raffel (2022), 2111.09832, for diagonal matrices; Tam, Bansal, Raffel (2024), 2312.04339, for
    others.
    """
    if not isinstance(experts, Sequence) or not experts:
        raise TypeError(f"experts: expected pairs (model, F), got {arguments.described(experts)}")
    r = arguments.number("regul", regul, least=0.0)
    weights: list[PVector] = []
    matrices: list[PMat] = []
    for k, pair in enumerate(experts):
        if not isinstance(pair, tuple | list) or len(pair) != 2 or not isinstance(pair[1], PMat):
            raise TypeError(f"experts: expected pairs (model, F), got {arguments.described(pair)} as number {k}")
        weights.append(_weights(k, pair[0], pair[1]))
        matrices.append(pair[1])
        if pair[1].layer_collection != matrices[0].layer_collection:
            raise ValueError(
                f"experts: number {k} has other layers than the first one, or of other shapes: experts are merged on "
                "the layers that they share, which layer_collection= of their matrices chooses"
            )
    total: PMat = sum(matrices[1:], start=matrices[0])
    # From the mean: along what no expert has curvature the step is zero but for rounding, however small regul is.
    mean: PVector = sum(weights[1:], start=weights[0]) * (1 / len(weights))
    b: PVector = sum(
        (F.mv(w - mean) for F, w in zip(matrices[1:], weights[1:], strict=True)),
        start=matrices[0].mv(weights[0] - mean),
    )
    if type(total) is not type(matrices[0]) or total.matrix_free:
        return mean + PVector(b.layer_collection, _iterated(total, matrices, b.to_torch(), r))
    try:
        total.check_positive(r)
        found: PVector = mean + total.solve(b, regul=r)
    except ValueError as error:
        raise ValueError(_NO_MINIMUM.format(r, error)) from error
    return found


def _weights(k: int, expert: Any, F: PMat) -> PVector:
    """The weights of one expert on the layers of its matrix."""
    try:
        w = expert if isinstance(expert, PVector) else PVector.from_model(expert, F.layer_collection)
        w = w.on(F.layer_collection).detach()
    except (AttributeError, ValueError) as error:
        raise ValueError(f"experts: number {k} does not have the layers of its matrix ({error})") from error
    if not bool(w.to_torch().isfinite().all()):
        raise ValueError(f"experts: the weights of number {k} are not finite: leave it out, or train it again")
    return w


def _iterated(total: PMat, matrices: list[PMat], b: Tensor, regul: float) -> Tensor:
    """``(total + regul)^-1 b`` by its products, with the mean of the experts' inverses for a preconditioner."""
    eps = torch.finfo(total.dtype).eps
    noise = 4 * eps * max(float(F.norm(2)) for F in matrices)
    solved = partial(
        cg,
        lambda rows: total.matvec(rows) + regul * rows,
        preconditioner=None if total.matrix_free else _near(matrices, max(regul, 2 * len(matrices) * noise)),
    )
    try:
        if regul <= noise:  # b is in the range also of a singular sum, and what is drawn at random is not
            draw = gaussian(1, len(b), like=total.like, generator=torch.Generator().manual_seed(0))
            found = solved(draw, rtol=max(1e-6, 100 * eps), max_products=min(3 * len(b) + 30, 10_000)).x
            largest = float(torch.linalg.vector_norm(found))
            if largest * noise > 0.1:
                raise ValueError(_NO_MINIMUM.format(regul, f"its inverse is about {largest:.1g}"))
        return solved(b.unsqueeze(0), rtol=max(1e-10, 100 * eps)).x[0]
    except RuntimeError as error:
        raise ValueError(_NO_MINIMUM.format(regul, error)) from error


def _near(matrices: list[PMat], shift: float) -> Callable[[Tensor], Tensor]:
    """The mean of the experts' inverses."""
    shifts = [max(shift, 1e-8 * float(F.trace()) / F.size(0)) or 1.0 for F in matrices]
    inverses = [(len(matrices) * F).inv(c) for F, c in zip(matrices, shifts, strict=True)]
    return lambda rows: torch.stack([inverse.matvec(rows) for inverse in inverses]).mean(0)


_NO_MINIMUM = (
    "regul: with {:g} the sum of the matrices is not positive definite to working precision, so no single point makes "
    "the losses of the experts least: give a larger regul, with which directions without curvature get the mean of the "
    "experts, and matrices without negative eigenvalues (FIM or GGN) ({})"
)

__test__ = {merge.__name__: merge.__doc__ or ""}
