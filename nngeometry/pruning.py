"""Prune a trained model: optimal brain damage and optimal brain surgeon."""

from __future__ import annotations

import torch
from torch import Tensor

from . import arguments
from .linalg import cg
from .memory import require
from .object import PMat, PMatDense, PVector
from .object.pmat import RegulLike


@arguments.called_as
def saliency(
    F: PMat, w: PVector, regul: RegulLike = 1e-8, *, method: str = "obs", mask: PVector | None = None
) -> PVector:
    """By how much the loss rises when one weight is removed, to second order.

    "obs": ``w_i^2 / (2 [(F + regul)^-1]_ii)``, the other weights making up for it (see :func:`prune`); "obd":
    ``F_ii w_i^2 / 2``, the others staying. Of a diagonal F the two are the same but for regul.

    Args:
        F: The curvature of the loss at w, in any representation that has an inverse and a diagonal.
        w: The weights, ``PVector.from_model(model)``.
        regul: As in :meth:`PMat.solve`.
        method: "obs" or "obd".
        mask: Zero for weights that were removed before and stay so, such as :func:`keep` gives: the others make up
            without them, and their own saliency is zero. It takes the dense matrix of each layer, or of all layers
            where F couples them. By default none were removed, and weights that are zero may move.

    Returns:
        A number for each parameter.

    Raises:
        ValueError: For "obs", if F + regul is singular to working precision or has negative eigenvalues.

    Example:
        >>> from nngeometry import FIM, PMatDiag
        >>> model = torch.nn.Linear(4, 3)
        >>> F, w = FIM(model, (torch.randn(20, 4),), PMatDiag), PVector.from_model(model)
        >>> w = prune(F, w, keep(saliency(F, w), 0.5))

    Source: LeCun, Denker, Solla (1989), Optimal brain damage; Hassibi and Stork (1992), Second order derivatives for
    network pruning: Optimal brain surgeon.
    """
    flat = _weights(F, w)
    arguments.one_of("method", method, ["obs", "obd"])
    lc = F.layer_collection
    kept = torch.ones_like(flat) if mask is None else _mask(F, mask)
    if method == "obd":
        return PVector(lc, kept * F.get_diag() * flat.square() / 2)
    if F.matrix_free:
        raise NotImplementedError(
            f'saliency: method="obs" needs the diagonal of an inverse, which {type(F).__name__}, known by its '
            'products, does not have: use method="obd" or another representation'
        )
    try:
        if mask is None:
            F.check_positive(regul)
            inverse = F.inv(regul).get_diag()
        else:
            inverse = _inverse_diagonal(F, kept, regul)
    except ValueError as error:
        raise ValueError(_NO_MINIMUM.format("saliency", regul, error)) from error
    return PVector(lc, kept * flat.square() / (2 * inverse))


def _inverse_diagonal(F: PMat, kept: Tensor, regul: RegulLike) -> Tensor:
    """The diagonal of the inverse of F + regul without the rows and columns of what is not kept."""
    lc = F.layer_collection
    parts = [("all layers", F)] if F.couples_layers else [(f"layer {name!r}", F.block(name)) for name in lc]
    shift = F._regul(regul).shift * torch.ones_like(kept)
    found, start = [], 0
    for name, part in parts:
        p = part.size(0)
        require(p * p * F.dtype.itemsize, f"saliency: the matrix of {name}", "prune fewer layers", F.device)
        own, d = kept[start : start + p], shift[start : start + p]
        H = own.unsqueeze(1) * part.to_torch() * own
        # What is removed has entries of the same size as the rest, so that none looks small beside them.
        H.diagonal().add_(torch.where(own == 1, d, H.trace() / p + d.mean()))
        staying = PMatDense(part.layer_collection, data=H)
        staying.check_positive()
        found.append(staying.inv(0.0).get_diag())
        start += p
    return torch.cat(found)


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
    if bool(flat.isnan().any()):
        raise ValueError("scores: some are NaN, so that they have no order: look at the matrix and the weights")
    mask = torch.zeros_like(flat)
    mask[flat.topk(round(fraction * len(flat))).indices] = 1.0
    return PVector(scores.layer_collection, mask)


@arguments.called_as
def prune(F: PMat, w: PVector, mask: PVector, regul: RegulLike = 1e-8, rtol: float | None = None) -> PVector:
    """The weights with those where the mask is zero removed and the others moved to where the quadratic approximation
    ``(w' - w)^T (F + regul) (w' - w)`` is then least; if that is in many places (F is singular and regul 0), to the
    nearest.

    For one weight q that is ``w - w_q / [H^-1]_qq H^-1 e_q``, the optimal brain surgeon; for several it is exact too.
    By products with F and conjugate gradients, for every representation. To remove more weights of what was pruned,
    give a mask that is zero for those before too: the result is that of removing all at once.

    Args:
        F: The curvature at w.
        w: The weights.
        mask: Zeros and ones, such as :func:`keep` gives.
        regul: As in :meth:`PMat.solve`.
        rtol: The relative residual to reach, by default 1e-10 (in float32 1e-5).

    Raises:
        ValueError: If F + regul has negative eigenvalues on what stays, along which weights would move.
        RuntimeError: If rtol is not reached.

    Example:
        See :func:`saliency`.
    """
    flat, kept = _weights(F, w), _mask(F, mask)
    shift = F._regul(regul).shift
    if rtol is None:
        rtol = max(1e-10, 100 * torch.finfo(F.dtype).eps)

    def inside(rows: Tensor) -> Tensor:
        """On what stays; the identity on the rest, where all vectors are zero."""
        return kept * (F.matvec(kept * rows) + shift * rows)

    removed = (1 - kept) * flat
    b = kept * F.matvec(removed.unsqueeze(0))
    try:
        step = cg(inside, b, rtol=rtol).x[0] if bool(b.any()) else torch.zeros_like(flat)
    except RuntimeError as error:
        if "positive definite" not in str(error):
            raise
        raise ValueError(_NO_MINIMUM.format("prune", regul, error)) from error
    return PVector(F.layer_collection, kept * (flat + step))


_NO_MINIMUM = (
    "{}: with regul={} the quadratic approximation has no single minimum over the weights that stay: give a larger "
    "regul, and a matrix without negative eigenvalues (FIM or GGN, and not PMatQuasiDiag) ({})"
)


def _weights(F: PMat, w: PVector) -> Tensor:
    """The flat weights on the layers of the matrix."""
    arguments.instance("F", F, PMat, "pass a matrix, e.g. FIM(model, loader, PMatKFAC)")
    arguments.instance("w", w, PVector, "pass PVector.from_model(model)")
    flat = F._of(w.detach().on(F.layer_collection))
    if not bool(flat.isfinite().all()):
        raise ValueError("w: the weights are not finite: train the model with a smaller learning rate")
    return flat


def _mask(F: PMat, mask: PVector) -> Tensor:
    """The flat zeros and ones of a mask on the layers of the matrix."""
    arguments.instance("mask", mask, PVector, "pass keep(saliency(F, w), fraction)")
    kept = mask.detach().on(F.layer_collection).to_torch().to(F.device, F.dtype)
    if not bool(((kept == 0) | (kept == 1)).all()):
        raise ValueError("mask: expected zeros and ones, such as keep(scores, fraction) gives")
    return kept


__test__ = {f.__name__: f.__doc__ or "" for f in (saliency, keep, prune)}
