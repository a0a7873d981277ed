"""Which examples to label next: designs that make the posterior small, by greedy choice."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from . import arguments
from .changes import unrecorded
from .jacobian import Jacobian
from .layercollection import LayerCollection
from .likelihood import VARIANTS, Likelihood, likelihood_of
from .memory import chunk_length, require, slices
from .model import data
from .object import FMat
from .object.kernel_layouts import positions


@unrecorded
def fisher_embeddings(
    model: nn.Module,
    loader: Any,
    likelihood: str | Likelihood = "classif_logits",
    *,
    layer_collection: LayerCollection | None = None,
    function: Callable[..., Any] | None = None,
) -> Tensor:
    """Rows whose outer products sum to the Fisher matrix of each example: V ``(n, r, P)`` with ``F_x = V_x^T V_x``.

    Dense, so of few layers, in general the last one.

    Args:
        model, loader, layer_collection, function: As in :func:`~nngeometry.Jacobian`.
        likelihood: As ``variant`` of :func:`~nngeometry.FIM`.

    Example:
        >>> model = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3))
        >>> last = LayerCollection.from_model(model, "2")
        >>> fisher_embeddings(model, (torch.randn(20, 4),), layer_collection=last).shape
        torch.Size([20, 2, 18])
    """
    arguments.variant(likelihood, Likelihood, list(VARIANTS))
    family = likelihood_of(likelihood)
    found = []
    batches = [loader] if data.is_minibatch(loader) else loader
    for batch in batches:
        J = Jacobian(model, batch, function, layer_collection=layer_collection).to_torch()
        f = _outputs(model, batch, function).detach()
        cotangents = family.sqrt(f)
        s = cotangents.take(0, cotangents.count).flatten(2)
        found.append(torch.einsum("rnc,cnp->nrp", s, J))
    if not found:
        raise ValueError("loader: there was no minibatch in it: pass at least one")
    return torch.cat(found)


def _outputs(model: nn.Module, batch: Any, function: Callable[..., Any] | None) -> Tensor:
    if function is not None:
        found: Tensor = function(*data.arguments(batch))
        return found
    f: Tensor = model(batch if isinstance(batch, Tensor) else batch[0])
    return f


@unrecorded
def bait(
    embeddings: Tensor, k: int, *, labelled: Tensor | None = None, regul: float = 1.0, oversample: float = 2.0
) -> Tensor:
    """Examples to label so that the Bayes risk ``tr((sum_S F_x + regul)^-1 F)`` of a linear model is small, with F the
    mean Fisher matrix of all examples.

    Greedily: ``oversample k`` examples are added, each the one that makes the trace least, then the least useful are
    taken off until k are left.

    Args:
        embeddings: ``(n, r, P)`` from :func:`fisher_embeddings`.
        k: How many.
        labelled: Positions of examples that have labels already.
        regul: In units of the Fisher matrix of one example.
        oversample: At least 1, which takes none off.

    Returns:
        Positions ``(k,)``, in the order of their choice.

    Raises:
        ValueError: If there are fewer than k examples without a label, or regul is lost in rounding.

    Example:
        >>> bait(torch.eye(3).unsqueeze(1) * torch.tensor([1.0, 3.0, 2.0]).view(3, 1, 1), 2).tolist()
        [1, 2]

    Source: Ash, Goel, Krishnamurthy, Kakade (2021), 2106.09675.
    """
    arguments.instance("embeddings", embeddings, Tensor, "make them with fisher_embeddings(model, loader)")
    if embeddings.ndim != 3:
        raise ValueError(f"embeddings: expected (n, r, P), got {tuple(embeddings.shape)}: see fisher_embeddings")
    n, _, p = embeddings.shape
    k = arguments.integer("k", k, least=0)
    if not embeddings.is_floating_point():
        raise TypeError(f"embeddings: expected real numbers, got {embeddings.dtype}: see fisher_embeddings")
    if not bool(embeddings.isfinite().all()):
        raise ValueError("embeddings: there are NaN or infinite entries: look at the parameters of the model")
    known = torch.zeros(n, dtype=torch.bool, device=embeddings.device)
    if labelled is not None:
        known[positions(labelled, n, known.device)] = True
    if k > n - int(known.sum()):
        raise ValueError(f"k={k}: there are {n - int(known.sum())} examples without a label")
    most = arguments.number("oversample", oversample, least=1.0)
    regul = arguments.number("regul", regul, above=0.0)
    require(8 * p * p, f"bait: a matrix of {p} parameters", "take fewer layers", embeddings.device)
    # In float64, and an inverse of its own in each step: both regul and the differences between examples may be small
    # beside the sums, and that costs less than to look at all examples.
    F = _sum(embeddings)
    least = 1e5 * torch.finfo(F.dtype).eps * float(F.trace())
    if regul < least:
        raise ValueError(
            f"regul={regul:g}: that is lost in rounding beside the Fisher matrices, whose traces sum to "
            f"{float(F.trace()):.3g}: give at least {2 * least:.1g}"
        )
    M = _sum(embeddings[known]) + regul * torch.eye(p, dtype=F.dtype, device=F.device)
    chosen: list[int] = []
    for _ in range(min(n - int(known.sum()), max(k, round(most * k)))):
        best = int(_change(embeddings, M, F / n, 1.0).masked_fill(known, -torch.inf).argmax())
        M = M + _sum(embeddings[best : best + 1])
        known[best] = True
        chosen.append(best)
    while len(chosen) > k:
        worst = chosen.pop(int(_change(embeddings[chosen], M, F / n, -1.0).argmax()))
        M = M - _sum(embeddings[worst : worst + 1])
    return torch.tensor(chosen, dtype=torch.int64, device=embeddings.device)


def _sum(V: Tensor) -> Tensor:
    """``sum_x V_x^T V_x``, in float64."""
    total = torch.zeros(V.shape[2], V.shape[2], dtype=torch.float64, device=V.device)
    for b in _few(V):
        rows = V[b].flatten(0, 1).double()
        total += rows.T @ rows
    return total


def _change(V: Tensor, M: Tensor, F: Tensor, sign: float) -> Tensor:
    """By how much ``tr(M^-1 F)`` falls when ``sign V_x^T V_x`` is added to M, for each x."""
    L = torch.linalg.cholesky(M)
    found = []
    for b in _few(V):
        own = V[b].double()
        rows = own.flatten(0, 1).T
        # By triangular systems: of an inverse there would be nothing left where V_x is alone in some direction.
        root = torch.linalg.solve_triangular(L, rows, upper=False)
        half = torch.linalg.solve_triangular(L.T, root, upper=True).T.reshape(own.shape)
        root = root.T.reshape(own.shape)
        inner = torch.eye(V.shape[1], dtype=L.dtype, device=L.device) + sign * root @ root.mT
        found.append(sign * torch.linalg.solve(inner, half @ F @ half.mT).diagonal(dim1=1, dim2=2).sum(1))
    return torch.cat(found)


def _few(V: Tensor) -> Iterator[slice]:
    """Examples, as many at a time as work arrays in float64 have room for."""
    return slices(len(V), chunk_length(4 * 8 * V[:1].numel(), len(V), V.device))


@unrecorded
def greedy(K: FMat | Tensor, k: int, *, labelled: Tensor | None = None, regul: float = 1.0) -> Tensor:
    """Examples whose outputs say most about each other: greedily those that make ``log det(K_SS + regul)`` largest.

    Each is the one whose outputs have the largest posterior covariance given those before. With the kernel through a
    posterior's covariance and the noise as regul it is the largest gain of information about the parameters.

    Args:
        K: A kernel of all examples, an FMat (``(n, n)`` or ``(C, n, C, n)``) or a tensor.
        k: How many.
        labelled: Positions of examples whose outputs are known already.
        regul: The variance of observations.

    Returns:
        Positions ``(k,)``, in the order of their choice.

    Example:
        >>> greedy(torch.tensor([[2.0, 1.9, 0.0], [1.9, 2.1, 0.0], [0.0, 0.0, 1.0]]), 2).tolist()
        [1, 2]

    Source: Krause, Singh, Guestrin (2008), J. Mach. Learn. Res. 9; Seeger (2004), Greedy forward selection in the
    informative vector machine.
    """
    entries = K.to_torch() if isinstance(K, FMat) else K
    arguments.instance("K", entries, Tensor, "pass GramMatrix(model, loader)")
    if entries.ndim == 2:
        entries = entries[None, :, None, :]
    if entries.ndim != 4 or entries.shape[:2] != entries.shape[2:]:
        raise ValueError(f"K: expected (n, n) or (C, n, C, n), got {tuple(entries.shape)}: use another output=")
    if not bool(entries.isfinite().all()):
        raise ValueError("K: there are NaN or infinite entries: look at the parameters of the model")
    apart, size = float((entries - entries.permute(2, 3, 0, 1)).norm()), float(entries.norm())
    if apart > 1e-3 * size:
        raise ValueError(
            f"K: it differs from its transpose by {apart / size:.1g} of its norm: pass the kernel of all examples with "
            "themselves"
        )
    c, n = entries.shape[:2]
    k = arguments.integer("k", k, least=0)
    regul = arguments.number("regul", regul, above=0.0)
    known = torch.zeros(n, dtype=torch.bool, device=entries.device)
    before = [] if labelled is None else positions(labelled, n, entries.device).unique().tolist()
    if k > n - len(before):
        raise ValueError(f"k={k}: there are {n - len(before)} examples without a label")
    blocks = entries.permute(1, 3, 0, 2)  # (n, n, C, C)
    conditional = blocks.diagonal(dim1=0, dim2=1).movedim(-1, 0).clone()
    columns = entries.new_zeros(n, c, 0)
    eye = torch.eye(c, dtype=entries.dtype, device=entries.device)
    chosen: list[int] = []
    for step in range(len(before) + k):
        if step < len(before):
            best = before[step]
        else:
            gain = torch.linalg.slogdet(conditional / regul + eye)[1].masked_fill(known, -torch.inf)
            best = int(gain.argmax())
            chosen.append(best)
        known[best] = True
        factor, failed = torch.linalg.cholesky_ex(conditional[best] + regul * eye)
        if int(failed):
            raise ValueError(
                f"K: with regul={regul:g} it is not positive definite, so it is no covariance: pass a kernel of "
                "Jacobians with themselves through a matrix without negative eigenvalues, or a larger regul"
            )
        cross = blocks[:, best] - columns @ columns[best].T
        new = torch.linalg.solve_triangular(factor, cross.mT, upper=False).mT
        columns = torch.cat([columns, new], 2)
        conditional = conditional - new @ new.mT
    return torch.tensor(chosen, dtype=torch.int64, device=entries.device)


__test__ = {f.__name__: f.__doc__ or "" for f in (fisher_embeddings, bait, greedy)}
