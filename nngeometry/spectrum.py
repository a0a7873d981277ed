"""Spectra of matrices in parameter space: density, extreme eigenpairs, outliers, negative part."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from math import ceil, hypot, inf, pi
from typing import Any, NamedTuple, get_args

import torch
from torch import Tensor

from . import arguments
from .blocks.operator import drawn_alike
from .changes import no_grad, uncast
from .linalg import Density, Estimate, Quadrature, eigsh, gaussian, slq
from .linalg.base import Matvec
from .linalg.lanczos import Which
from .object.pmat import PMat
from .object.vector import PVector
from .tables import as_html, number

#: A default smoothing width is this fraction of the range of the eigenvalues; on a logarithmic axis, in decades.
_WIDTH, LOG_WIDTH = 1 / 200, 0.1
#: How far a logarithmic axis reaches below the largest absolute eigenvalue, in powers of ten.
_DECADES = 6.0
#: Points of a default grid in one smoothing width, and at most in all.
_POINTS, _MOST = 4, 20_000


class Negative(NamedTuple):
    """The negative part of a spectrum.

    Attributes:
        number: How many eigenvalues it has.
        total: Their sum.
    """

    number: Estimate
    total: Estimate


@dataclass(frozen=True, eq=False)
class Spectrum:
    """What stochastic Lanczos quadrature knows of the eigenvalues of a matrix, in float64 on the CPU.

    A function f summed over all eigenvalues is ``sum_j weights_j f(nodes_j)`` for each probe, plus its values at the
    outliers. That is exact in expectation for polynomials of degree up to ``2 steps - 1``. The standard errors are
    those of the mean over the probes; they include the difference to fewer steps, as a measure of the bias.

    Args:
        bulk: The quadrature, without the outliers.
        outliers: Eigenvalues that are known, ``(k,)``, those of largest magnitude first.
        size: The number of rows of the matrix.
        steps: How many of Lanczos there were, at most.
        products: How many vectors were multiplied with it.
    """

    bulk: Quadrature
    outliers: Tensor
    size: int
    steps: int
    products: int

    @property
    def nodes(self) -> Tensor:
        """Ritz values ``(probes, steps)``, of each row ascending."""
        return self.bulk.values

    @property
    def weights(self) -> Tensor:
        """How many eigenvalues each node stands for ``(probes, steps)``; each row sums to ``size - k``."""
        return self.bulk.weights * self.bulk.size

    def sum(self, f: Callable[[Tensor], Tensor]) -> Estimate:
        """The sum of ``f`` over all eigenvalues, the trace of f(F).

        Args:
            f: A function of a tensor of eigenvalues, entry by entry.

        Returns:
            The sum, with its standard error.

        Raises:
            ValueError: If f is not finite at one of them.
        """
        if not callable(f):
            raise TypeError(f"sum: f: expected a function of a tensor of eigenvalues, got {arguments.described(f)}")
        exact = f(self.outliers)
        arguments.instance("sum: what f returns", exact, Tensor, "f acts on a tensor of eigenvalues, e.g. torch.exp")
        exact = exact.double()
        if not bool(exact.isfinite().all()):
            raise ValueError(f"sum: f is not finite at the eigenvalue {float(self.outliers[~exact.isfinite()][0]):.3g}")
        rest = self.bulk.trace_of(lambda l: f(l).double())
        return Estimate(rest.value + exact.sum(), rest.error, self.products)

    def count(self, low: float = -inf, high: float = inf) -> Estimate:
        """How many eigenvalues there are with ``low <= l < high``.

        The error includes what the nodes leave open: the count below x of any two spectra that agree on polynomials of
        degree ``2 steps - 2`` differs by at most the Christoffel number at x.

        Args:
            low: The lower end, by default minus infinity.
            high: The upper end, by default infinity.
        """
        for name, value in (("low", low), ("high", high)):
            if arguments.scalar(value) is None:
                raise TypeError(f"count: {name}: expected a number, got {arguments.described(value)}")
        inside = self.sum(lambda l: ((l >= low) & (l < high)).double())
        blur = self.bulk.size * sum(self.bulk.christoffel(x) for x in (low, high) if abs(x) < inf)
        return inside._replace(error=torch.tensor(hypot(float(inside.error), blur), dtype=torch.float64))

    def negative(self, threshold: float | None = None) -> Negative:
        """How many eigenvalues are below ``-threshold``, and their sum.

        Args:
            threshold: By default that of :meth:`floor`, since what rounding and unfinished Lanczos steps leave of a
                zero eigenvalue may have either sign.
        """
        edge = -(self.floor() if threshold is None else arguments.number("negative: threshold", threshold))
        return Negative(self.count(high=edge), self.sum(lambda l: torch.where(l < edge, l, 0.0)))

    def trace(self) -> Estimate:
        """The sum of the eigenvalues."""
        return self.sum(lambda l: l)

    def logdet(self, regul: float = 0.0) -> Estimate:
        """``log det(F + regul)``.

        Args:
            regul: What is added to every eigenvalue, by default 0.

        Raises:
            ValueError: If that is not positive definite.
        """
        arguments.number("logdet: regul", regul)
        lowest = min(float(self.nodes.min()), *self.outliers.tolist(), inf)
        if not lowest + regul > self.bulk.rounding:
            raise ValueError(
                f"logdet: the matrix has an eigenvalue near {lowest:.3g}, so F + {regul:.3g} is not positive definite "
                "to working precision: give a larger regul"
            )
        return self.sum(lambda l: (l + regul).log())

    def density(self, grid: Tensor | None = None, width: float | None = None) -> Density:
        """The density of eigenvalues, of total mass one with the outliers: each is smoothed to a normal density.

        The error is over the probes; gaps between nodes that are wider than ``width`` show as bumps.

        Args:
            grid: Where, ``(n,)``, by default from six widths below the lowest to six above the highest.
            width: The standard deviation of the smoothing, by default a two-hundredth of the range.
        """
        low, high = self.range()
        width = _positive("density: width", width, self.width())
        _check_grid("density", grid)
        grid = _grid(low - 6 * width, high + 6 * width, width) if grid is None else grid.to(self.nodes)
        return Density(grid, *self._smooth(grid, self.bulk, self.outliers, width))

    def log_density(
        self, grid: Tensor | None = None, width: float | None = None, floor: float | None = None
    ) -> Density:
        """The densities of log10 of the magnitude of positive and of negative eigenvalues, in this order ``(2, g)``.

        The two sum to the share of the eigenvalues above the floor.

        Args:
            grid: Magnitudes, by default from the floor to the largest.
            width: The standard deviation of the smoothing in decades, by default 0.1.
            floor: What is smaller counts as zero and is left out, by default a millionth of the largest.
        """
        width = _positive("log_density: width", width, LOG_WIDTH)
        floor = _positive("log_density: floor", floor, self.floor())
        _check_grid("log_density", grid)
        top = max(self._largest(), floor)
        at = torch.tensor([floor, top], dtype=torch.float64).log10()
        points = _grid(float(at[0]) - 6 * width, float(at[1]) + 6 * width, width)
        points = points if grid is None else grid.to(self.nodes).log10()
        pairs = []
        for sign in (1.0, -1.0):
            inside, beyond = sign * self.nodes >= floor, sign * self.outliers >= floor
            nodes = torch.where(inside, sign * self.nodes, 1.0).log10()
            bulk = replace(self.bulk, values=nodes, weights=self.bulk.weights * inside)
            pairs.append(self._smooth(points, bulk, (sign * self.outliers[beyond]).log10(), width))
        value, error = (torch.stack(parts) for parts in zip(*pairs, strict=True))
        return Density(10**points, value, error)

    def table(self) -> dict[str, Estimate]:
        """What a person asks first: extreme Ritz values or outliers, the negative part, trace and log-determinant;
        absolute, and in the rows that say so per parameter, i.e. divided by the size.

        The log-determinant is there if the matrix is seen to be positive definite.

        Returns:
            From names to estimates, with error zero for what is one value.
        """
        low, high = self.range()
        below, total = self.negative()
        of = {"trace": self.trace(), "negative eigenvalues": below, "sum of negative eigenvalues": total}
        if min(float(self.nodes.min()), *self.outliers.tolist(), inf) > self.bulk.rounding:
            of["log-determinant"] = self.logdet()
        found = {
            name: Estimate(torch.tensor(value), torch.tensor(0.0), 0)
            for name, value in (("largest", high), ("smallest", low))
        }
        for name, e in of.items():
            found[name] = e
            found[f"{name} per parameter"] = Estimate(e.value / self.size, e.error / self.size, e.products)
        return found

    def __repr__(self) -> str:
        probes = len(self.nodes)
        return (
            f"Spectrum of {self.size} eigenvalues, {probes} probes of {self.steps} steps, {len(self.outliers)} outliers"
        )

    def _repr_html_(self) -> str:
        rows = [[name, number(float(e.value), float(e.error))] for name, e in self.table().items()]
        return as_html(repr(self), ["", "value"], rows)

    def width(self) -> float:
        """The default width of the smoothing."""
        low, high = self.range()
        return _WIDTH * (high - low or abs(high) or 1.0)

    def floor(self) -> float:
        """Below which an eigenvalue counts as zero unless another limit is given: a millionth of the largest
        magnitude.
        """
        return 10**-_DECADES * self._largest() or 1.0

    def range(self) -> tuple[float, float]:
        """The lowest and the highest Ritz value or outlier."""
        every = torch.cat([self.nodes[self.weights > 0], self.outliers])
        return float(every.min()), float(every.max())

    def _largest(self) -> float:
        return max(map(abs, self.range()))

    def _smooth(self, grid: Tensor, bulk: Quadrature, outliers: Tensor, width: float) -> tuple[Tensor, Tensor]:
        """The density of all, and its standard error ``(g,)``."""
        share = bulk.size / self.size
        _, value, error = bulk.density(grid, width)
        z = (grid.unsqueeze(1) - outliers) / width
        exact = torch.exp(-z.square() / 2).sum(1) / (width * (2 * pi) ** 0.5)
        return share * value + exact / self.size, share * error


@uncast
@arguments.called_as
def spectral_density(
    F: PMat,
    *,
    steps: int = 80,
    probes: int = 10,
    outliers: int = 0,
    generator: torch.Generator | None = None,
    verbose: bool = False,
) -> Spectrum:
    """The eigenvalues of a symmetric matrix as a density, by stochastic Lanczos quadrature: ``steps`` x ``probes``
    products, and memory for ``steps`` vectors.

    For a random vector v, the quadrature of Gauss that Lanczos gives is the spectrum as v sees it: Ritz values, with
    weights. It is averaged over several v, from which the standard errors come. The extreme eigenvalues are found best,
    the bulk is blurred.

    Args:
        F: The matrix, in any representation.
        steps: How many of Lanczos there are, by default 80; at most P are taken.
        probes: How many random vectors, by default 10. With one, the spectrum as it is often drawn, errors are not a
            number: nothing is known of them.
        outliers: So many eigenvalues of largest magnitude are computed first and removed, so that they are exact, and
            the bulk is resolved better; by default 0.
        generator: The source of the probes, by default torch's global one.
        verbose: Whether to show a progress bar.

    Returns:
        The spectrum.

    Example:
        >>> from nngeometry import Hessian, PMatImplicit
        >>> model = torch.nn.Sequential(torch.nn.Linear(4, 5), torch.nn.Tanh(), torch.nn.Linear(5, 3))
        >>> H = Hessian(model, (torch.randn(20, 4), torch.randint(3, (20,))), PMatImplicit)
        >>> spectrum = spectral_density(H, steps=20, outliers=2)
        >>> len(spectrum.outliers), round(float(spectrum.count().value))
        (2, 43)
        >>> grid, density, error = spectrum.density()
        >>> round(float(torch.trapezoid(density, grid)), 3)
        1.0

    Source:
        Ubaru, Chen, Saad (2017), SIAM J. Matrix Anal. Appl. 38; Ghorbani, Krishnan, Xiao (2019), 1901.10159; Papyan
        (2018), 1811.07062, for the deflation.
    """
    arguments.instance("F", F, PMat, "pass a matrix, e.g. Hessian(model, loader, PMatImplicit, loss)")
    for name, value, least in (("steps", steps, 1), ("probes", probes, 1), ("outliers", outliers, 0)):
        arguments.integer(f"spectral_density: {name}", value, least)
    arguments.generator(generator)
    size = F.size(0)
    if steps < 1 or probes < 1:
        raise ValueError(f"spectral_density: expected steps >= 1 and probes >= 1, got {steps} and {probes}")
    if not 0 <= outliers < size:
        raise ValueError(f"spectral_density: expected 0 <= outliers < {size}, got {outliers}")
    like, spent = F.like, 0
    exact, basis = torch.zeros(0, dtype=torch.float64), like.new_empty(0, size)
    free = size - outliers

    def sphere(count: int, size: int, *, like: Tensor, generator: torch.Generator | None = None) -> Tensor:
        """Uniform, orthogonal to the outliers, so that the total weight of each probe is exact."""
        rows = gaussian(count, size, like=like, generator=generator)
        rows = rows - (rows @ basis.mT) @ basis
        return rows * (free**0.5 / torch.linalg.vector_norm(rows, dim=1, keepdim=True))

    with no_grad(), drawn_alike(F.root), _progress(F.matvec, verbose) as matvec:
        if outliers:
            exact, basis, _, spent = eigsh(matvec, size, outliers, which="magnitude", like=like)
        bulk = slq(
            matvec, size, steps=steps, probes=probes, sampler=sphere, deflate=basis, generator=generator, like=like
        )
    return Spectrum(bulk, exact.double().cpu(), size, min(steps, free), spent + bulk.products)


@uncast
@arguments.called_as
def layer_spectra(F: PMat, **options: Any) -> dict[str, Spectrum]:
    """The spectra of the diagonal blocks of the layers, by name.

    Args:
        F: The matrix, in any representation.
        **options: As of :func:`spectral_density`; steps, probes and outliers are those of each block, of a small block
            as many as it has.

    Example:
        >>> from nngeometry import GGN, PMatKFAC
        >>> model = torch.nn.Sequential(torch.nn.Linear(4, 5), torch.nn.Tanh(), torch.nn.Linear(5, 3))
        >>> G = GGN(model, (torch.randn(20, 4), torch.randint(3, (20,))), PMatKFAC)
        >>> {name: spectrum.size for name, spectrum in layer_spectra(G).items()}
        {'0': 25, '2': 18}
    """
    arguments.instance("F", F, PMat, "pass a matrix, e.g. Hessian(model, loader, PMatImplicit, loss)")
    arguments.keywords("layer_spectra", spectral_density, options)
    arguments.integer("layer_spectra: outliers", options.get("outliers", 0), 0)
    spectra = {}
    for name, layer in F.layer_collection.layers.items():
        outliers = min(options.get("outliers", 0), layer.numel() - 1)
        spectra[name] = spectral_density(F.block(name), **{**options, "outliers": outliers})
    return spectra


@uncast
@arguments.called_as
def effective_dimension(F: PMat, regul: float) -> Tensor:
    """How many directions the data determine: ``tr(F (F + regul)^-1) = sum_i l_i / (l_i + regul)``.

    Of a posterior with precision ``N F + d`` it is the number of parameters that the data, rather than the prior, have
    settled, with regul = d / N. Negative eigenvalues, which a Hessian may have, count as the formula says.

    Args:
        F: A representation that holds entries; for one known by its products use :func:`spectral_density`.
        regul: A positive number.

    Returns:
        A scalar.

    Raises:
        ValueError: If F + regul is not positive definite, or regul is lost in rounding.

    Example:
        >>> from nngeometry import GGN, PMatKFAC
        >>> model = torch.nn.Linear(4, 3)
        >>> G = GGN(model, (torch.randn(20, 4), torch.randint(3, (20,))), PMatKFAC)
        >>> 0 < effective_dimension(G, 1e-2) < 15
        tensor(True)

    Source: MacKay (1992), Neural Computation 4, 415-447; Maddox, Benton, Wilson (2020), 2003.02139.
    """
    arguments.instance("F", F, PMat, "pass a matrix, e.g. FIM(model, loader, PMatKFAC)")
    r = arguments.number("effective_dimension: regul", regul, above=0.0)
    if F.matrix_free:
        raise NotImplementedError(
            "effective_dimension: a matrix known by its products does not have all eigenvalues: use "
            "spectral_density(F).sum(lambda l: l / (l + regul)), which says how far off it may be"
        )
    l = F.eigenvalues()
    least, largest, eps = float(l.min()), float(l.abs().max()), torch.finfo(l.dtype).eps
    noise = 16 * len(l) ** 0.5 * eps * largest
    if least < -noise and least + r <= noise:
        raise ValueError(
            f"effective_dimension: the matrix has the eigenvalue {least:.3g}, so with regul={r:g} no posterior whose "
            "parameters could be counted: use GGN or FIM, which have none below zero (in every representation but "
            "PMatQuasiDiag), or a larger regul"
        )
    if r <= 4 * eps * largest:
        raise ValueError(
            f"effective_dimension: regul={r:g} is lost in rounding beside eigenvalues that reach {largest:.3g} in "
            f"{l.dtype}: give at least {10 * noise:.1g}, or the matrix in float64"
        )
    l = torch.where(l.abs() <= noise, l.clamp(min=0), l)  # of a singular matrix some are below zero by rounding
    return (l / (l + r)).sum()


@dataclass(frozen=True)
class ExtremePairs:
    """Some eigenvalues with their eigenvectors.

    Args:
        values: The eigenvalues ``(k,)``.
        vectors: Eigenvectors of norm one, orthogonal.
        residuals: ``|F v - l v|`` ``(k,)``, computed at the end: within this distance of each value there is an
            eigenvalue.
        products: How many vectors were multiplied with F.
    """

    values: Tensor
    vectors: list[PVector]
    residuals: Tensor
    products: int


@uncast
@arguments.called_as
def extreme_eigenpairs(
    F: PMat, k: int, which: Which = "largest", *, verbose: bool = False, **options: Any
) -> ExtremePairs:
    """The k eigenpairs at one end of the spectrum of a symmetric matrix, by its products alone.

    Args:
        F: The matrix, in any representation.
        k: How many pairs.
        which: "largest" (descending, the default), "smallest" (ascending), "both" (k of each end, all descending) or
            "magnitude" (largest absolute value first).
        verbose: Whether to show a progress bar.
        **options: As of :func:`~nngeometry.linalg.eigsh`, such as tol, max_products, generator.

    Returns:
        The pairs, with their residuals.

    Raises:
        RuntimeError: Unless all pairs have converged.

    Example:
        >>> from nngeometry import Hessian, PMatImplicit
        >>> model = torch.nn.Sequential(torch.nn.Linear(4, 5), torch.nn.Tanh(), torch.nn.Linear(5, 3))
        >>> H = Hessian(model, (torch.randn(20, 4), torch.randint(3, (20,))), PMatImplicit)
        >>> pairs = extreme_eigenpairs(H, 1, "both")
        >>> v = pairs.vectors[1]
        >>> bool((H.mv(v) - pairs.values[1] * v).norm() < 1e-5)
        True

    Source:
        Wu and Simon (2000), SIAM J. Matrix Anal. Appl. 22.
    """
    arguments.instance("F", F, PMat, "pass a matrix, e.g. Hessian(model, loader, PMatImplicit, loss)")
    arguments.integer("extreme_eigenpairs: k", k, least=1)
    arguments.one_of("extreme_eigenpairs: which", which, get_args(Which))
    arguments.keywords("extreme_eigenpairs", eigsh, options, given=("matvec", "size", "like"))
    arguments.generator(options.get("generator"))
    with no_grad(), drawn_alike(F.root), _progress(F.matvec, verbose) as matvec:
        pairs = eigsh(matvec, F.size(0), k, which=which, like=F.like, **options)
    vectors = [PVector(F.layer_collection, row) for row in pairs.vectors]
    return ExtremePairs(pairs.values, vectors, pairs.residuals, pairs.products)


@contextmanager
def _progress(matvec: Matvec, verbose: bool) -> Iterator[Matvec]:
    """The same products, counted by a progress bar."""
    if not verbose:
        yield matvec
        return
    try:
        from tqdm.auto import tqdm
    except ImportError as error:
        raise ImportError("verbose=True shows a progress bar with tqdm: pip install tqdm") from error
    with tqdm(desc="products") as bar:

        def counted(rows: Tensor) -> Tensor:
            bar.update(len(rows))
            return matvec(rows)

        yield counted


def _positive(name: str, given: float | None, default: float) -> float:
    value = default if given is None else arguments.number(name, given)
    if not value > 0:
        raise ValueError(f"{name}: it must be positive, got {value}")
    return value


def _check_grid(name: str, grid: Any) -> None:
    if grid is not None:
        arguments.instance(f"{name}: grid", grid, Tensor, "pass a tensor of points, e.g. torch.linspace(0, 1, 100)")


def _grid(low: float, high: float, width: float) -> Tensor:
    return torch.linspace(low, high, min(_MOST, 2 + ceil(_POINTS * (high - low) / width)), dtype=torch.float64)


#: The examples of functions that stand wrapped above, for doctest to find.
__test__ = {
    f.__name__: f.__doc__ or "" for f in (spectral_density, layer_spectra, effective_dimension, extreme_eigenpairs)
}
