"""Lanczos with full reorthogonalisation: Krylov bases, eigenpairs with their multiplicity, functions of a matrix."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from .. import arguments
from ..memory import budget, chunk_length
from .base import Matvec, gaussian, inner, noise, norms, orthogonalise, orthonormal_rows, to_dense

Which = Literal["largest", "smallest", "both", "magnitude"]

#: The accepted chance to miss a copy of a repeated eigenvalue.
MISSED = 1e-6


class Krylov(NamedTuple):
    """A Krylov space.

    Attributes:
        basis: Orthonormal rows ``(m, p)``.
        matrix: The matrix in that basis ``(m, m)``, in float64: tridiagonal, or block tridiagonal.
        closed: Whether the basis spans an invariant space, so that every eigenvalue of ``matrix`` is exact.
    """

    basis: Tensor
    matrix: Tensor
    closed: bool


class Eigenpairs(NamedTuple):
    """Some eigenvalues with their eigenvectors.

    Attributes:
        values: The eigenvalues ``(k,)``.
        vectors: Orthonormal rows ``(k, p)``.
        residuals: ``|A v - l v|`` ``(k,)``, computed from the matrix at the end, or a bound of it that takes what
            rounding did to every product into account; within this distance of each value there is an eigenvalue, but
            for a few units of rounding of the dtype.
        products: How many vectors were multiplied with the matrix.
    """

    values: Tensor
    vectors: Tensor
    residuals: Tensor
    products: int


class _Space:
    """A growing orthonormal basis V, the matrix T = V A V^T in it, and the block X that comes next:
    ``A V^T = V^T T + X^T link``.
    """

    def __init__(self, matvec: Matvec, capacity: int, size: int, like: Tensor) -> None:
        self.matvec, self.capacity, self.size = matvec, capacity, size
        self.rows = like.new_empty(capacity, size)
        self.full = torch.zeros(capacity, capacity, dtype=torch.float64)
        self.next = like.new_empty(0, size)
        self.link = torch.zeros(0, 0, dtype=torch.float64)
        self.count = self.products = 0
        self.near = 0  # the first row of the basis to which the images of the next block are not orthogonal
        self.missing = 0.0  # a bound of what is not in the equation above: rounding, and what seeds leave out
        self.scale = 0.0

    @property
    def basis(self) -> Tensor:
        return self.rows[: self.count]

    @property
    def matrix(self) -> Tensor:
        return self.full[: self.count, : self.count]

    def seed(self, rows: Tensor) -> None:
        """Go on with these rows, whatever they add to the basis."""
        self.near = 0
        self.missing = math.inf if self.count else 0.0
        self.next = orthonormal_rows(rows, self.basis)
        self.link = torch.zeros(len(self.next), self.count, dtype=torch.float64)

    def replace(self, values: Tensor, vectors: Tensor, rest: Tensor) -> None:
        """Hold these approximate eigenpairs only, and go on with the rows of their residuals."""
        self.count = len(values)
        self.rows[: self.count] = vectors
        self.full.zero_()
        self.full[: self.count, : self.count] = torch.diag(values).to(self.full)
        self.seed(rest)
        self.link += inner(self.next, rest)

    def expand(self, slack: float = 0.0) -> None:
        """Take the next block into the basis, at one product for each of its rows."""
        old, new = self.count, self.count + len(self.next)
        self.rows[old:new] = self.next
        self.count = new
        images = self.matvec(self.next)
        self.products += len(images)
        size = float(norms(images).max())
        if not math.isfinite(size):
            raise RuntimeError("Lanczos: a product is not finite")
        self.scale = max(self.scale, size)
        y, taken = orthogonalise(images, self.basis, self.near)
        across, within = taken[:, :old] - self.link, taken[:, old:] - taken[:, old:].mT
        off = max(_largest(across), _largest(within))
        self.missing = math.hypot(self.missing, float(across.norm()), float(within.norm()))
        if off > max(slack, noise(y) ** 0.5) * self.scale:
            _require_precise(self.matvec, self.next, images, off, self.scale)
            raise ValueError("Lanczos: the matrix is not symmetric")
        self.full[old:new, :new] = taken
        self.full[:new, old:new] = taken.mT
        self.full[old:new, old:new] = (taken[:, old:] + taken[:, old:].mT) / 2
        floor = noise(y) * self.scale
        if len(y) == 1:
            size = float(norms(y))
            self.next = y / size if size > floor else y[:0]
        else:
            self.next = orthonormal_rows(y, self.basis, floor)
        self.link = torch.zeros(len(self.next), new, dtype=torch.float64)
        self.link[:, old:] = inner(self.next, y)
        self.near = old

    def ritz(self) -> tuple[Tensor, Tensor, Tensor]:
        """Ritz values (ascending), their coefficients in the basis as columns, and bounds of their residuals."""
        values, columns = torch.linalg.eigh(self.matrix)
        return values, columns, torch.linalg.vector_norm(self.link @ columns, dim=0)

    def compress(self, values: Tensor, columns: Tensor) -> None:
        """Keep these Ritz vectors only."""
        keep = len(values)
        turn = columns.mT.to(self.rows)
        few = chunk_length(keep * self.rows.element_size(), self.rows.shape[1], self.rows.device)
        for piece in self.rows.split(few, dim=1):
            piece[:keep] = turn @ piece[: self.count]
        self.full.zero_()
        self.full[:keep, :keep] = torch.diag(values)
        self.link = self.link @ columns
        self.count, self.near = keep, 0


def lanczos(matvec: Matvec, start: Tensor, steps: int) -> Krylov:
    """An orthonormal basis of the Krylov space of a symmetric matrix and some rows, and the matrix in it.

    Every new row is orthogonalised twice against all others, so no eigenvalue appears twice that is not double.

    Args:
        matvec: A, ``(k, p) -> (k, p)``.
        start: Rows ``(k, p)`` that share one space.
        steps: How often the block is multiplied; the basis has up to ``k steps`` rows, fewer if the space closes.

    Returns:
        The space.

    Raises:
        ValueError: If the matrix is seen not to be symmetric.
        RuntimeError: If a product is not finite.

    Example:
        >>> A = torch.diag(torch.arange(1.0, 6.0))
        >>> space = lanczos(lambda v: v @ A, torch.ones(1, 5), steps=5)
        >>> torch.linalg.eigvalsh(space.matrix).round(decimals=3)
        tensor([1., 2., 3., 4., 5.], dtype=torch.float64)

    Source:
        Lanczos (1950), J. Res. Natl. Bur. Stand. 45; Golub and Underwood (1977) for blocks.
    """
    size = start.shape[1]
    space = _Space(matvec, min(size, len(start) * steps), size, start)
    space.seed(start)
    for _ in range(steps):
        if not len(space.next):
            break
        space.expand()
    return Krylov(space.basis, space.matrix, not len(space.next))


# Eigenpairs


def eigsh(
    matvec: Matvec,
    size: int,
    k: int,
    *,
    which: Which = "largest",
    tol: float | None = None,
    max_products: int | None = None,
    block: int = 1,
    basis: int | None = None,
    multiplicities: bool = True,
    generator: torch.Generator | None = None,
    like: Tensor,
) -> Eigenpairs:
    """Some eigenpairs of a symmetric matrix, by thick-restart Lanczos with full reorthogonalisation.

    Args:
        matvec: A, ``(k, p) -> (k, p)``.
        size: The number of its rows, p.
        k: How many pairs.
        which: "largest" (descending, the default), "smallest" (ascending), "magnitude" (largest absolute value first)
            or "both" (the k largest and the k smallest, all descending; each pair once if that is more than p).
        tol: The bound of the residuals relative to the largest absolute eigenvalue, by default eps^(2/3), 4e-11 in
            float64; the error of the eigenvalues is usually its square.
        max_products: How many vectors may be multiplied, by default 100 for each pair, and at least 2000.
        block: How many rows are multiplied at once, by default 1.
        basis: How many rows to hold, by default up to 200 within half of the memory budget. A matrix no larger than
            that is simply built, by p products; so is one that fits a sixteenth of the budget when p products were not
            enough.
        multiplicities: Whether to begin again at random rows until nothing new is found, for up to twice as many
            products; by default True. Without it, further copies of a repeated eigenvalue beyond ``block`` may be
            missed; with it, one is missed with a chance of about 1e-6.
        generator: The source of the first rows, by default one of its own with a fixed seed.
        like: An empty tensor of the dtype and device.

    Returns:
        The pairs, with their residuals.

    Raises:
        RuntimeError: Unless all pairs asked for have converged, or if rounding of the products keeps them from it.
        ValueError: For a matrix that is seen not to be symmetric, or a tolerance that the dtype does not allow.

    Example:
        >>> l = torch.tensor([5.0, 5.0, 3.0, 1.0, 0.0])
        >>> eigsh(lambda v: l * v, 5, 3, like=torch.empty(0)).values.round(decimals=3)
        tensor([5., 5., 3.])

    Source:
        Wu and Simon (2000), SIAM J. Matrix Anal. Appl. 22. That a random start misses no end of the spectrum: Kuczynski
        and Wozniakowski (1992), ibid. 13.
    """
    for name, value in (("k", k), ("block", block), ("max_products", max_products)):
        if value is not None or name != "max_products":
            arguments.integer(f"eigsh: {name}", value, least=1)
    if not 1 <= k <= size:
        raise ValueError(f"eigsh: expected 1 <= k <= {size}, got {k}")
    if which not in ("largest", "smallest", "both", "magnitude"):
        raise ValueError(f"eigsh: which is largest, smallest, both or magnitude, got {which!r}")
    eps = torch.finfo(like.dtype).eps
    tol = eps ** (2 / 3) if tol is None else arguments.number("eigsh: tol", tol)
    if tol < 10 * eps:
        raise ValueError(f"eigsh: {like.dtype} allows no tolerance below {10 * eps:.1g}, got {tol:.1g}")
    wanted = min(size, 2 * k if which == "both" else k)
    block = min(block, size)
    capacity = max(wanted + max(wanted // 2, 10) + 2 * block, basis or _affordable(size, like, max(200, 4 * wanted)))
    if capacity >= size:
        return _dense_pairs(matvec, size, wanted, which, like, tol)
    limit = max(2000, 100 * wanted) if max_products is None else max_products
    if generator is None:
        generator = torch.Generator(like.device).manual_seed(0)

    space = _Space(matvec, capacity, size, like)
    small = size * size * like.element_size() <= budget(like.device) // 16
    settled: Tensor | None = None  # the wanted values when the space last began anew at random rows
    shifts = torch.zeros(0, dtype=torch.float64)  # the Ritz values dropped since then
    check, anew = wanted, True  # the size of the space at which to look again
    least = math.inf  # the residuals, computed from the matrix, that were left so far
    while True:
        if anew or not len(space.next):
            space.seed(gaussian(block, size, like=like, generator=generator))
        if small and size <= space.products <= limit - size:
            return _dense_pairs(matvec, size, wanted, which, like, tol, space.products)
        if space.products + len(space.next) > limit:
            raise RuntimeError(_failure(space, wanted, which, tol, settled is not None))
        space.expand(4 * tol)
        anew, closed, full = False, not len(space.next), space.count + len(space.next) > capacity
        if not (closed or full or space.count >= check):
            continue
        check = space.count + max(block, space.count // 10)
        values, columns, bounds = space.ritz()
        order = _order(values, which)
        lead = order[:wanted]
        scale = float(values.abs().max())
        if len(lead) == wanted and bool((bounds[lead] <= 0.5 * tol * scale).all()):
            found = (values[lead].abs() if which == "magnitude" else values[lead]).sort().values
            if multiplicities and (settled is None or bool(((found - settled).abs() > 2 * tol * scale).any())):
                block = block if settled is None else min(2 * block, max(1, (capacity - wanted) // 4))
                settled, shifts, check, anew = found, shifts[:0], wanted, True
                space.compress(values[lead], columns[:, lead])
            elif (
                not multiplicities
                or closed
                or _missed(values, bounds, order, wanted, which, tol, shifts, block, size) < MISSED
            ):
                space.compress(values[lead], columns[:, lead])
                pairs = _pairs(space, bounds[lead], which)
                if bool((pairs.residuals <= tol * scale).all()):
                    return pairs
                pairs, images, rest = _true_pairs(space, which)
                if bool((pairs.residuals <= tol * scale).all()):
                    return pairs
                worst = pairs.residuals.argmax()
                if (residual := float(pairs.residuals[worst])) > 0.5 * least:  # going on does not help
                    _require_precise(matvec, pairs.vectors[worst, None], images[worst, None], residual, scale)
                least = min(least, residual)
                space.replace(pairs.values, pairs.vectors, rest)
            elif full:
                shifts = torch.cat([shifts, _restart(space, values, columns, order, wanted, which)])
        elif full and not closed:
            shifts = torch.cat([shifts, _restart(space, values, columns, order, wanted, which)])


def _affordable(size: int, like: Tensor, most: int) -> int:
    return min(most, budget(like.device) // (2 * size * like.element_size()))


def _order(values: Tensor, which: Which) -> Tensor:
    """Indices, the most wanted first; "both" takes turns."""
    if which == "magnitude":
        return values.abs().argsort(descending=True, stable=True)
    order = values.argsort(descending=which != "smallest", stable=True)
    return torch.stack([order, order.flip(0)], 1).flatten()[: len(order)] if which == "both" else order


def _sorted(values: Tensor, which: Which) -> Tensor:
    """Indices, in the order of the result."""
    return _order(values, "largest" if which == "both" else which)


def _restart(space: _Space, values: Tensor, columns: Tensor, order: Tensor, wanted: int, which: Which) -> Tensor:
    """Keep the wanted Ritz vectors and some of the next best; return the values of the others."""
    lead, rest = order[:wanted], order[wanted:]
    if which == "magnitude":  # both ends must converge before we know that nothing was missed
        rest = rest[_order(values[rest], "both")]
    more = (space.capacity - wanted) // 3
    keep = torch.cat([lead, rest[:more]])
    space.compress(values[keep], columns[:, keep])
    return values[rest[more:]]


def _missed(
    values: Tensor,
    bounds: Tensor,
    order: Tensor,
    wanted: int,
    which: Which,
    tol: float,
    shifts: Tensor,
    block: int,
    size: int,
) -> float:
    """About the chance that there is an eigenvalue better than the wanted ones that the space, which began at random
    rows, has not shown.

    The best of the other Ritz vectors is p(A) v, where v is random and the roots of p are the other Ritz values and
    those dropped in restarts. So its part along an eigenvector beyond the wanted value is that of v, about
    1 / sqrt(p), times the growth of p from the Ritz value to there; and it is at most the residual over the gap.
    """
    if len(values) == wanted:
        return 1.0
    lead, rest = values[order[:wanted]], order[wanted:]

    def chance(sign: float, edge: Tensor) -> float:
        best = rest[(sign * values[rest]).argmax()]
        here, gap = sign * values[best], edge - sign * values[best]
        if bounds[best] <= 0.5 * tol * values.abs().max():
            return 0.0
        if gap <= 0:
            return 1.0
        roots = sign * torch.cat([values[rest[rest != best]], shifts])
        growth = (torch.log((edge - roots).abs()) - torch.log((here - roots).abs())).sum() / block
        return float(size**0.5 * (bounds[best] / gap).clamp_max(1.0) * torch.exp(-growth))

    if which == "magnitude":
        edge = lead.abs().min()
        return max(chance(1.0, edge), chance(-1.0, edge))
    upper, lower = (lead, lead) if which != "both" else (lead[0::2], lead[1::2])
    at_the_top = 0.0 if which == "smallest" else chance(1.0, upper.min())
    return max(at_the_top, 0.0 if which == "largest" else chance(-1.0, -lower.max()))


def _pairs(space: _Space, bounds: Tensor, which: Which) -> Eigenpairs:
    """The pairs that a space is compressed to, with bounds of their residuals."""
    values = space.matrix.diagonal()
    order = _sorted(values, which)
    residuals = (bounds + space.missing)[order].to(space.rows)
    return Eigenpairs(values[order].to(space.rows), space.basis[order.to(space.rows.device)], residuals, space.products)


def _true_pairs(space: _Space, which: Which) -> tuple[Eigenpairs, Tensor, Tensor]:
    """The eigenpairs of the matrix in the whole basis, the images of their vectors, and the rows of their residuals."""
    rows = space.basis
    products = space.matvec(rows)
    space.products += len(rows)
    matrix = inner(rows, products)
    values, columns = torch.linalg.eigh((matrix + matrix.mT) / 2)
    order = _sorted(values, which)
    values, turn = values[order].to(rows), columns[:, order].mT.to(rows)
    vectors = turn @ rows
    images = turn @ products
    rest = images - values.unsqueeze(1) * vectors
    return Eigenpairs(values, vectors, torch.linalg.vector_norm(rest, dim=1), space.products), images, rest


def _dense_pairs(
    matvec: Matvec, size: int, wanted: int, which: Which, like: Tensor, tol: float, products: int = 0
) -> Eigenpairs:
    dense = to_dense(matvec, size, like)
    if not bool(dense.isfinite().all()):
        raise RuntimeError("eigsh: a product is not finite")
    if _asymmetry(dense) > noise(dense) ** 0.5 * float(dense.abs().max()):
        raise ValueError("eigsh: the matrix is not symmetric")
    values, columns = torch.linalg.eigh((dense + dense.mT) / 2)
    order = _order(values, which)[:wanted]
    order = order[_sorted(values[order], which)]
    values, vectors = values[order], columns[:, order].mT
    images = vectors @ dense.mT
    residuals = torch.linalg.vector_norm(images - values.unsqueeze(1) * vectors, dim=1)
    worst, scale = residuals.argmax(), float(norms(dense).max())
    if (off := float(residuals[worst])) > max(tol, size**0.5 * noise(dense)) * scale:
        _require_precise(matvec, vectors[worst, None].contiguous(), images[worst, None], off, scale)
        raise ValueError("eigsh: the matrix is not symmetric")
    return Eigenpairs(values, vectors.contiguous(), residuals, products + size)


def _asymmetry(matrix: Tensor) -> float:
    return _largest(matrix - matrix.mT)


def _largest(entries: Tensor) -> float:
    return float(entries.abs().max()) if entries.numel() else 0.0


def _require_precise(matvec: Matvec, rows: Tensor, images: Tensor, off: float, scale: float) -> None:
    """Raise if rounding of the products explains a good part of what is off.

    The products of multiples of the rows show it: they would be multiples of the images. So may it be with the Hessian
    of a net that is certain of nearly every label, whose entries are differences of numbers that are much larger.
    """
    multiple = 1.7  # no power of two, by which everything would be rounded alike
    rounding = float(norms(matvec(multiple * rows) / multiple - images).max())
    if rounding > 0.1 * off:
        raise RuntimeError(
            f"Lanczos: rounding in {rows.dtype} leaves products with the matrix with errors of "
            f"{max(rounding, off) / scale:.1g} of the largest, and no eigenpair can be had more precisely than that: "
            "use float64 (model.double()), or a tol above it"
        )


def _failure(space: _Space, wanted: int, which: Which, tol: float, again: bool) -> str:
    if again:
        what = "the pairs converged, but not the search for further copies of them"
        remedy = "raise max_products or basis, or set multiplicities=False"
    else:
        values, _, bounds = space.ritz()
        lead = _order(values, which)[:wanted]
        done = int((bounds[lead] <= 0.5 * tol * float(values.abs().max())).sum()) if len(lead) else 0
        what = f"{done} of {wanted} pairs converged"
        remedy = "raise max_products, basis or tol"
    return f"eigsh: {what} in {space.products} products: {remedy}"


# Each row on its own


def tridiagonals(matvec: Matvec, b: Tensor, steps: int) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """Lanczos from each row of b on its own, one step at a time; products are shared.

    Yields after each step the bases ``(k, m, p)``, the tridiagonal matrices ``(k, m, m)`` in float64, and which rows
    are closed: their space is invariant. From then on the matrix of such a row repeats its first entry, which has
    no weight. Ends when all are.
    """
    count, size = b.shape
    start = norms(b)
    rows = b.new_zeros(count, min(steps, size), size)
    full = torch.zeros(count, rows.shape[1], rows.shape[1], dtype=torch.float64)
    live = start > 0
    v = b / torch.where(live, start, 1.0).to(b).unsqueeze(1)
    scale = torch.zeros_like(start)
    for m in range(1, rows.shape[1] + 1):
        rows[:, m - 1] = v
        y = torch.zeros_like(v)
        if bool(live.any()):
            y[live] = matvec(v[live])
        length, images = norms(y), y
        if not bool(length.isfinite().all()):
            raise RuntimeError("Lanczos: a product is not finite")
        scale = torch.maximum(scale, length)
        left, taken = orthogonalise(y.unsqueeze(1), rows[:, :m], max(m - 2, 0))
        y, taken = left.squeeze(1), taken.squeeze(1)
        off = taken[:, : max(m - 2, 0)].abs().amax(1) if m > 2 else torch.zeros_like(scale)
        if bool((wrong := off > noise(y) ** 0.5 * scale).any()):
            k = wrong.nonzero()[:1, 0]
            _require_precise(matvec, v[k], images[k], float(off[k]), float(scale[k]))
            raise ValueError("Lanczos: the matrix is not symmetric")
        full[:, m - 1, m - 1] = torch.where(live, taken[:, m - 1], full[:, 0, 0])
        beta = norms(y)
        live = live & (beta > noise(y) * scale) & (m < size)
        yield rows[:, :m], full[:, :m, :m], ~live
        if m == rows.shape[1] or not bool(live.any()):
            return
        beta = torch.where(live, beta, 0.0)
        full[:, m, m - 1] = full[:, m - 1, m] = beta
        v = y * torch.where(live, 1 / beta, 0.0).to(y).unsqueeze(1)


def quadrature_of(matrices: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Ritz values, weights (squared first components of the eigenvectors) and eigenvectors as columns."""
    values, columns = torch.linalg.eigh(matrices)
    return values, columns[..., 0, :].square(), columns


def funm(
    matvec: Matvec,
    b: Tensor,
    f: Callable[[Tensor], Tensor],
    *,
    steps: int | None = None,
    tol: float | None = None,
) -> Tensor:
    """``f(A) b`` for a symmetric matrix and each row of b, by Lanczos.

    It is exact when the space closes, at the latest after p steps. It takes memory for k x steps x p numbers, in chunks
    of rows that fit the memory budget. Rounding can put a Ritz value of a singular matrix slightly below zero: add
    regul in f, or clamp.

    Args:
        matvec: A, ``(k, p) -> (k, p)``.
        b: Rows ``(k, p)``.
        f: A function of a tensor of Ritz values, entry by entry, which lie between the smallest and the largest
            eigenvalue.
        steps: How many products there may be for each row, by default 500.
        tol: The relative error to reach, by default eps^(2/3), 4e-11 in float64. It is extrapolated from how the result
            changed while the space grew three times by a fifth.

    Returns:
        Rows ``(k, p)``.

    Raises:
        RuntimeError: If the tolerance is not reached.
        ValueError: If f is not finite where it matters: the inverse square root of a singular matrix, say.

    Example:
        >>> A = torch.diag(torch.tensor([1.0, 4.0, 9.0]))
        >>> funm(lambda v: v @ A, torch.ones(1, 3), torch.sqrt).round(decimals=3)
        tensor([[1., 2., 3.]])

    Source:
        Saad (1992), SIAM J. Numer. Anal. 29; Druskin and Knizhnerman (1989).
    """
    steps = min(500 if steps is None else steps, b.shape[1])
    tol = torch.finfo(b.dtype).eps ** (2 / 3) if tol is None else tol
    length = max(1, budget(b.device) // (steps * b.shape[1] * b.element_size()))
    return torch.cat([_funm(matvec, rows, f, steps, tol) for rows in b.split(length)]) if len(b) else b.clone()


def _funm(matvec: Matvec, b: Tensor, f: Callable[[Tensor], Tensor], steps: int, tol: float) -> Tensor:
    start = norms(b)
    last = torch.zeros(len(b), 0, dtype=torch.float64)
    changes = [torch.full_like(start, torch.inf)] * 3
    check, error = 2, changes[0]
    for rows, matrices, done in tridiagonals(matvec, b, steps):
        m = matrices.shape[1]
        if m < check and m < steps and not bool(done.all()):
            continue
        check = m + max(2, m // 5)
        coefficients = start.unsqueeze(1) * _first_column(f, matrices, start > 0)
        size = torch.linalg.vector_norm(coefficients, dim=1).clamp_min(torch.finfo(start.dtype).tiny)
        wider = torch.nn.functional.pad(last, (0, m - last.shape[1]))
        changes = [*changes[1:], torch.linalg.vector_norm(coefficients - wider, dim=1) / size]
        # The space grows by a constant factor, so the changes go on falling by at least their last rates.
        rate = torch.maximum(changes[1] / changes[0].clamp_min(1e-300), changes[2] / changes[1].clamp_min(1e-300))
        error = torch.where(rate < 1, changes[2] / (1 - rate), torch.inf)
        error = torch.where(done | (torch.stack(changes[1:]) <= 1e-3 * tol).all(0), 0.0, error)
        last = coefficients
        if bool((error <= tol).all()):
            return (coefficients.unsqueeze(1).to(b) @ rows).squeeze(1)
    worst = float(error.max())
    reached = f"the relative error is about {worst:.1g}" if worst < math.inf else "nothing has converged"
    raise RuntimeError(
        f"funm: after {steps} steps {reached}, the target was {tol:.1g}: raise steps or tol, or add regul"
    )


def _first_column(f: Callable[[Tensor], Tensor], matrices: Tensor, live: Tensor) -> Tensor:
    values, weights, columns = quadrature_of(matrices)
    mapped = torch.where((weights > 0) & live.unsqueeze(1), f(values), 0.0)
    if not bool(mapped.isfinite().all()):
        raise ValueError(
            f"funm: f is not finite at a Ritz value of {float(values[~mapped.isfinite()][0]):.3g}, where the largest "
            f"is {float(values.abs().max()):.3g}: the matrix is singular to working precision, or not positive, and f "
            "needs that it is not: add regul, or use the pseudo-inverse"
        )
    return (columns @ (mapped * columns[:, 0]).unsqueeze(2)).squeeze(2)
