"""Prune a trained model: optimal brain damage and optimal brain surgeon."""

from __future__ import annotations

import torch
from torch import Tensor

from . import arguments
from .linalg import cg
from .object import PMat, PVector
from .object.pmat import RegulLike


@arguments.called_as
def saliency(F: PMat, w: PVector, regul: RegulLike = 1e-8, *, method: str = "obs") -> PVector:
    """By how much the loss rises when one weight is removed, to second order.

    "obs": ``w_i^2 / (2 [(F + regul)^-1]_ii)``, the other weights making up for it (see :func:`prune`); "obd":
    ``F_ii w_i^2 / 2``, the others staying. Of a diagonal F the two are the same but for regul.

    Args:
        F: The curvature of the loss at w, in any representation that has an inverse and a diagonal.
        w: The weights, ``PVector.from_model(model)``.
        regul: As in :meth:`PMat.solve`.
        method: "obs" or "obd".

    Returns:
        A number for each parameter.

    Example:
        >>> from nngeometry import FIM, PMatDiag
        >>> model = torch.nn.Linear(4, 3)
        >>> F, w = FIM(model, (torch.randn(20, 4),), PMatDiag), PVector.from_model(model)
        >>> w = prune(F, w, keep(saliency(F, w), 0.5))

    Source: LeCun, Denker, Solla (1989), Optimal brain damage; Hassibi and Stork (1992), Second order derivatives for
    network pruning: Optimal brain surgeon.
    """
    _check(F, w)
    arguments.one_of("method", method, ["obs", "obd"])
    w = w.detach().on(F.layer_collection)
    if method == "obd":
        return PVector(w.layer_collection, F.get_diag()) * w**2 / 2
    return w**2 / (2 * PVector(w.layer_collection, F.inv(regul).get_diag()))


@arguments.called_as
def keep(scores: PVector, fraction: float) -> PVector:
    """A mask: one for the given fraction of the parameters, those with the largest scores, and zero for the others.

    Example:
        >>> from nngeometry import random_pvector, LayerCollection
        >>> scores = random_pvector(LayerCollection.from_model(torch.nn.Linear(9, 1)))
        >>> int(keep(scores, 0.3).to_torch().sum())
        3
    """
    arguments.instance("scores", scores, PVector, "pass saliency(F, w)")
    fraction = arguments.number("fraction", fraction, least=0.0)
    if fraction > 1:
        raise ValueError(f"fraction: the share of parameters that stay is between 0 and 1, got {fraction}")
    flat = scores.detach().to_torch()
    mask = torch.zeros_like(flat)
    mask[flat.topk(round(fraction * len(flat))).indices] = 1.0
    return PVector(scores.layer_collection, mask)


@arguments.called_as
def prune(F: PMat, w: PVector, mask: PVector, regul: float = 1e-8, rtol: float | None = None) -> PVector:
    """The weights with those where the mask is zero removed and the others moved to where the quadratic approximation
    ``(w' - w)^T (F + regul) (w' - w)`` is then least.

    For one weight q that is ``w - w_q / [H^-1]_qq H^-1 e_q``, the optimal brain surgeon; for several it is exact too.
    By products with F and conjugate gradients, for every representation.

    Args:
        F: The curvature at w.
        w: The weights.
        mask: Zeros and ones, such as :func:`keep` gives.
        regul: A number.
        rtol: The relative residual to reach, by default 1e-10 (in float32 1e-5).

    Example:
        See :func:`saliency`.
    """
    _check(F, w)
    arguments.instance("mask", mask, PVector, "pass keep(saliency(F, w), fraction)")
    r = arguments.number("regul", regul, least=0.0)
    lc = F.layer_collection
    flat, kept = w.detach().on(lc).to_torch(), mask.on(lc).to_torch().to(F.dtype)
    if not bool(((kept == 0) | (kept == 1)).all()):
        raise ValueError("mask: expected zeros and ones, such as keep(scores, fraction) gives")
    if rtol is None:
        rtol = max(1e-10, 100 * torch.finfo(F.dtype).eps)

    def inside(rows: Tensor) -> Tensor:
        """On what stays; the identity on the rest, where all vectors are zero."""
        return kept * (F.matvec(kept * rows) + r * rows)

    removed = (1 - kept) * flat
    b = kept * F.matvec(removed.unsqueeze(0))
    step = cg(inside, b, rtol=rtol).x[0] if bool(b.any()) else torch.zeros_like(flat)
    return PVector(lc, kept * (flat + step))


def _check(F: PMat, w: PVector) -> None:
    arguments.instance("F", F, PMat, "pass a matrix, e.g. FIM(model, loader, PMatKFAC)")
    arguments.instance("w", w, PVector, "pass PVector.from_model(model)")


__test__ = {f.__name__: f.__doc__ or "" for f in (saliency, keep, prune)}
