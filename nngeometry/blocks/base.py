"""Blocks: the linear algebra of one matrix on one set of coordinates, written once for all structures.

A block is a linear map on tensors of shape ``(..., *shape)``, symmetric unless it says otherwise. A structure gives
``mv`` and, where it has something better than the defaults, ``diag``, ``to_dense``, ``eigenvalues`` and ``eig``.
Everything else is here: matrix functions are spectral, f(M) = Q f(l) Q^T.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields, replace
from math import prod
from typing import Any, ClassVar

import torch
from torch import Tensor

from ..changes import no_grad, with_methods_uncast
from ..linalg import cg, eigsh, minres
from ..memory import require
from ..registry import Registry

Map = Callable[[Tensor], Tensor]
#: What rounding leaves of a Ritz value of zero is below so many eps of the largest, whatever the size of the matrix.
_ROUNDING = 64


CLASSES: Registry[Block] = Registry("block")


@dataclass(frozen=True, eq=False)
@with_methods_uncast
class Block(ABC):
    """A linear map on tensors of shape ``(..., *shape)``, symmetric unless it says otherwise.

    A structure is a frozen dataclass of tensors, blocks and plain values, and must give :attr:`shape` and :meth:`mv`.
    It may give whatever it has something better for than the defaults: ``diag``, ``to_dense``, ``eig``, ``solve``,
    ``inv``, ``logdet``, ``scale``, ``plus``, ``times``, ``congruence`` and ``restrict`` above all. The defaults make it
    dense, within the memory budget.

    Example:
        >>> @dataclass(frozen=True, eq=False)
        ... class Reversed(Block):
        ...     "c times the matrix that turns a vector round."
        ...     c: Tensor
        ...     size: int
        ...     @property
        ...     def shape(self):
        ...         return (self.size,)
        ...     def mv(self, V):
        ...         return self.c * V.flip(-1)
        >>> Reversed(torch.tensor(2.0), 3).to_dense()
        tensor([[0., 0., 2.],
                [0., 2., 0.],
                [2., 0., 0.]])
    """

    def __init_subclass__(cls) -> None:
        CLASSES.add(with_methods_uncast(cls))

    # What a structure is: these four, of which the first two are due.

    @property
    @abstractmethod
    def shape(self) -> tuple[int, ...]:
        """Shape of the vectors it returns (and takes, unless it is a basis)."""

    @abstractmethod
    def mv(self, V: Tensor) -> Tensor:
        """The product ``M V``, differentiable in V.

        Args:
            V: Vectors ``(..., *shape)``.
        """

    def once(self, V: Tensor) -> Tensor:
        """The product ``M V`` where it may be the only one: nothing is made for the sake of later ones.

        Args:
            V: Vectors ``(..., *shape)``.
        """
        return self.mv(V)

    def on_columns(self, V: Tensor) -> Tensor:
        """The product of a block on ``(G, cols)`` along the last axis.

        Args:
            V: ``(..., G, rows, cols)``.
        """
        return self.mv(V.transpose(-3, -2)).transpose(-3, -2)

    def on_rows(self, V: Tensor) -> Tensor:
        """The product of a block on ``(G, rows)`` along the second last axis.

        Args:
            V: ``(..., G, rows, cols)``.
        """
        return self.mv(V.movedim(-1, 0)).movedim(0, -1)

    def to_dense(self) -> Tensor:
        """The matrix ``(p, p)`` on flattened coordinates."""
        eye = torch.eye(self.numel, dtype=self.dtype, device=self.device)
        return self.mv(eye.view(-1, *self.shape)).reshape(self.numel, self.numel).T

    def eig(self) -> Block:
        """The same block with its eigendecomposition at hand, as a :class:`Spectral` (or several, side by side)."""
        return self._as_dense("eigendecomposition").eig()

    @property
    def symmetric(self) -> bool:
        """Whether it equals its transpose; sums and direct sums of symmetric blocks do, products do not."""
        return True

    @property
    def matrix_free(self) -> bool:
        """Whether entries are known by products alone: then verbs that need the whole matrix are iterative, or
        raise.
        """
        return False

    @property
    def definite(self) -> bool:
        """Whether it is known to be positive semidefinite."""
        return False

    # Derived, and overridden where the structure makes it cheaper.

    @property
    def numel(self) -> int:
        """Number of coordinates."""
        return prod(self.shape)

    def diag(self) -> Tensor:
        """The diagonal, in the shape of a vector."""
        return self._as_dense("diagonal").data.diagonal().reshape(self.shape)

    def eigenvalues(self) -> Tensor:
        """All eigenvalues ``(p,)``, in no particular order."""
        return self.eig().eigenvalues()

    def top(self, k: int | None) -> tuple[Tensor, Tensor]:
        """The largest eigenvalues, descending, and their eigenvectors.

        Args:
            k: How many, None for all that it holds.

        Returns:
            ``(k,)``, and ``(k, *shape)``.
        """
        if not self.matrix_free:
            return self.eig().top(k)
        if k is None:
            raise ValueError("eig: say how many, eig(k): a matrix known by its products has them by Lanczos")
        if k == 0:
            return self._empty().new_zeros(0), self._empty().new_zeros(0, self.numel)
        pairs = eigsh(self._product, self.numel, k, like=self._empty())
        return pairs.values, pairs.vectors

    def trace(self) -> Tensor:
        """The trace, a scalar."""
        return self.diag().sum()

    def norm(self, ord: int | float | str | None = None) -> Tensor:
        """A norm of the matrix.

        Args:
            ord: Frobenius (None, the default, or "fro"), spectral (2), smallest singular value (-2), or nuclear
                ("nuc").
        """
        check_order(ord)
        if ord is None or ord == "fro":
            return self._frobenius()
        if ord == 2 and self.matrix_free:
            return eigsh(self._product, self.numel, 1, which="magnitude", like=self._empty()).values.abs()[0]
        if ord == 2:
            return self.eigenvalues().abs().max()
        if ord == -2:
            return self.eigenvalues().abs().min()
        return self.eigenvalues().abs().sum()

    def _frobenius(self) -> Tensor:
        return torch.linalg.vector_norm(self._as_dense("norm").data)

    def apply(self, f: Map) -> Block:
        """The matrix f(M).

        Args:
            f: A function of a tensor of eigenvalues, entry by entry.
        """
        return Derived.function(self, f) if self.matrix_free else self.eig().apply(f)

    def solve(self, V: Tensor, regul: float = 0.0) -> Tensor:
        """``(M + regul)^-1 V``.

        Args:
            V: Vectors ``(..., *shape)``.
            regul: One number, however it was given to the matrix; by default 0.

        Raises:
            ValueError: If that is singular to working precision.
        """
        solved: Tensor = self.iterate(V, regul) if self.matrix_free else self._as_dense("solve").solve(V, regul)
        return solved

    def solver(self, regul: float = 0.0) -> Map:
        """The map ``V -> (M + regul)^-1 V`` of :meth:`solve`, with all of the work done that takes no V."""
        return lambda V: self.solve(V, regul)

    def iterate(
        self, V: Tensor, shift: float | Tensor, rtol: float | None = None, precondition: Map | None = None
    ) -> Tensor:
        """``(M + shift)^-1 V`` by conjugate gradients, or by MINRES where M may be indefinite.

        Args:
            V: Vectors ``(..., *shape)``.
            shift: A number, or a flat one for each coordinate.
            rtol: The true relative residual to reach, by default 1e-6 (100 eps if that is more).
            precondition: An approximation of ``(M + shift)^-1`` on ``(k, p)``, for conjugate gradients.

        Raises:
            RuntimeError: If rtol is not reached.
            NotImplementedError: For a matrix that is not symmetric.
        """
        if not self.symmetric:
            raise NotImplementedError(
                f"solve: {self.describe()} is not symmetric and known by its products alone, which conjugate gradients "
                "and MINRES do not solve: use a representation that holds its entries, or nngeometry.linalg.lsmr"
            )
        with no_grad():
            b = V.reshape(-1, self.numel)
            tolerance = max(1e-6, 100 * torch.finfo(self.dtype).eps) if rtol is None else rtol

            def shifted(rows: Tensor) -> Tensor:
                return self._product(rows) + shift * rows

            if self.definite or precondition is not None:
                x = cg(shifted, b, rtol=tolerance, preconditioner=precondition).x
            else:
                x = minres(shifted, b, rtol=tolerance).x
            return x.view(V.shape)

    def _product(self, rows: Tensor) -> Tensor:
        """``(k, p) -> (k, p)``, outside of autograd."""
        with no_grad():
            return self.mv(rows.reshape(-1, *self.shape)).reshape(-1, self.numel)

    def _empty(self) -> Tensor:
        return torch.empty(0, dtype=self.dtype, device=self.device)

    def inv(self, regul: float = 0.0) -> Block:
        """``(M + regul)^-1`` as a block.

        Args:
            regul: As in :meth:`solve`.

        Raises:
            ValueError: If that is singular to working precision.
        """
        inverse: Block = Derived.inverse(self, regul) if self.matrix_free else self._as_dense("inverse").inv(regul)
        return inverse

    def logdet(self, regul: float = 0.0) -> Tensor:
        """``log det(M + regul)``.

        Args:
            regul: As in :meth:`solve`.

        Raises:
            ValueError: If that is not positive definite.
        """
        l = self.eigenvalues()
        check_invertible(l, regul)
        if bool((l + regul < 0).any()):
            raise ValueError(
                f"logdet: the matrix has negative eigenvalues (smallest {float(l.min()):.3g}), regul={regul} is "
                "too small"
            )
        return (l + regul).log().sum()

    def shows_semidefinite(self) -> bool:
        """Whether it is seen without eigenvalues that none is negative by more than rounding."""
        return self.definite

    def check_positive(self, regul: float = 0.0) -> None:
        """Raise ``ValueError`` if ``M + regul`` has an eigenvalue that is negative by more than rounding, as far as
        entries are known.
        """
        if self.matrix_free or (regul >= 0 and self.shows_semidefinite()):
            return
        l = self.eigenvalues()
        least, noise = float(l.min()), l.numel() * torch.finfo(l.dtype).eps * float(l.abs().max())
        if least + regul < -noise:
            raise ValueError(f"its smallest eigenvalue is {least:.3g}, which plus {regul:.3g} is negative")

    def lifted(self) -> Block:
        """The matrix with the eigenvalues that are lost in rounding raised to its size, so that any multiple of the
        identity can be added to it: of a matrix that is positive but for rounding.
        """
        spectral = self.eig()
        floor = 8 * torch.finfo(self.dtype).eps * spectral.eigenvalues().abs().max()
        return spectral.apply(lambda l: l.clamp(min=floor))

    # A matrix that changes little by little, and is decomposed again and again.

    def decomposed(self) -> Block:
        """The same matrix in the form in which it is solved with, whatever is added to the diagonal."""
        return self

    def in_basis(self, basis: Block | None, tolerance: float) -> tuple[Block, float]:
        """The matrix by its diagonal in an orthonormal basis, as a :class:`Spectral`, if what is off that diagonal is
        at most ``tolerance`` times its Frobenius norm, otherwise by its eigendecomposition; and the share of it that
        was decomposed, since each of several factors is looked at by itself. What needs no decomposition is as it is.
        """
        return self.decomposed(), 1.0

    def turned(self, basis: Block | None) -> Block:
        """The matrix by its diagonal in ``qr(M basis)``, one turn of orthogonal iteration, which tends to the
        eigendecomposition. Where there is no such basis, or no need of one, it is exact.
        """
        return self.decomposed()

    def absolute(self) -> Block:
        """The matrix with the absolute values of its eigenvalues."""
        return self.apply(torch.abs) if self.matrix_free else self.eig().apply(torch.abs)

    def solver_by_factors(self, regul: float) -> Map:
        """As :meth:`solver`, but regul is shared among factors where there are some, which then are inverted one by
        one: an approximation (Martens and Grosse 2015, 1503.05671, section 6.3).
        """
        return self.solver(regul)

    def statistics(self) -> tuple[Block, ...]:
        """The matrices that it consists of: itself, or its factors."""
        return (self,)

    def with_statistics(self, statistics: Sequence[Block]) -> Block:
        """The same of other matrices."""
        (block,) = statistics
        return block

    @property
    def work(self) -> float:
        """About how many operations :meth:`eig` takes, which keeps what it finds; zero where it takes none, or keeps
        nothing.
        """
        return 0.0

    def with_eig(self, found: Block) -> Block:
        """The same matrix, for which :meth:`eig` gives what was found by another process: where :attr:`work` is not
        zero.
        """
        known = replace(self)
        vars(known)["_eig"] = found
        return known

    def pinv(self, rtol: float | None = None) -> Block:
        """The pseudo-inverse.

        Args:
            rtol: Eigenvalues below this times the largest are dropped, by default p eps.
        """
        largest = self.norm(2)
        eps = torch.finfo(self.dtype).eps
        cut = (self.numel * eps if rtol is None else rtol) * largest
        return self.apply(lambda l: torch.where(l.abs() > cut, l.abs().clamp(min=cut).reciprocal() * l.sign(), 0.0))

    def pow(self, exponent: float) -> Block:
        """``M**exponent``.

        Args:
            exponent: Any number.

        Raises:
            ValueError: Where an eigenvalue makes it undefined.
        """
        if exponent == 1:
            return self
        if self.matrix_free:
            return self.apply(_Power(float(exponent), self.definite, _ROUNDING * torch.finfo(self.dtype).eps))
        spectral = self.eig()
        l = spectral.eigenvalues()
        if exponent < 0:
            check_invertible(l, 0.0)
        if exponent == int(exponent):
            return spectral.apply(lambda l: l**exponent)
        noise = self.numel * torch.finfo(l.dtype).eps * l.abs().max()
        if bool((l < -noise).any()):
            raise ValueError(f"pow({exponent}): the matrix has negative eigenvalues (smallest {float(l.min()):.3g})")
        return spectral.apply(lambda l: l.clamp(min=0) ** exponent)

    def sample(self, noise: Tensor) -> Tensor:
        """Vectors with covariance M.

        Args:
            noise: White noise ``(..., *shape)``.
        """
        return self.pow(0.5).mv(noise)

    def congruence(self, s: Tensor) -> Block:
        """The matrix ``diag(s) M diag(s)``.

        Args:
            s: The diagonal, of shape ``shape``.
        """
        made: Block = Derived.congruence(self, s) if self.matrix_free else self._as_dense("rescaling").congruence(s)
        return made

    def restrict(self, s: slice) -> Block:
        """The diagonal sub-block of some flat coordinates.

        Args:
            s: These coordinates.
        """
        return Derived.compression(self, s.start, s.stop)

    def transpose(self) -> Block:
        """The transpose."""
        return self

    def map_square(self) -> Block:
        """The matrix of squared entries, for the bases that need it."""
        return Derived.dense(self.to_dense().square(), self.shape)

    def scale(self, c: float) -> Block:
        """The matrix ``c M``.

        Args:
            c: A number.
        """
        return Derived.sum((self,), (c,))

    def plus(self, other: Block) -> Block | None:
        """M + other.

        Args:
            other: A block on the same vectors.

        Returns:
            The sum if it has a closed form here, otherwise None.
        """
        return None

    def times(self, other: Block) -> Block | None:
        """M other.

        Args:
            other: A block on the same vectors.

        Returns:
            The product if it has a closed form here, otherwise None.
        """
        return None

    # What every block can do because its fields are tensors, blocks and plain values.

    @property
    def dtype(self) -> torch.dtype:
        return self.tensors()[0].dtype

    @property
    def device(self) -> torch.device:
        return self.tensors()[0].device

    def tensors(self) -> list[Tensor]:
        """Its tensors, depth first."""
        found: list[Tensor] = []

        def note(t: Tensor) -> Tensor:
            found.append(t)
            return t

        self.map(note)
        return found

    def nbytes(self) -> int:
        """Bytes held, each tensor counted once."""
        return sum({t.data_ptr(): t.numel() * t.element_size() for t in self.tensors()}.values())

    def describe(self) -> str:
        """What it is, in a word or two, for tables."""
        return type(self).__name__

    def map(self, fn: Map) -> Block:
        """The same block with a function applied to every tensor.

        Args:
            fn: The function.
        """
        return type(self)(**{f.name: _map(fn, getattr(self, f.name)) for f in fields(self)})

    def state(self) -> dict[str, Any]:
        """A plain dict of tensors, numbers and strings, from which :meth:`from_state` makes the block again.

        Raises:
            TypeError: For a field that files do not hold.
        """
        return {"block": CLASSES.name_of(type(self)), **self._fields()}

    def _fields(self) -> dict[str, Any]:
        return {f.name: _state(getattr(self, f.name), f"{type(self).__name__}.{f.name}") for f in fields(self)}

    @staticmethod
    def from_state(state: dict[str, Any]) -> Block:
        """The block of what :meth:`state` gave.

        Args:
            state: That.
        """
        return CLASSES.find(state["block"])._rebuild({k: v for k, v in state.items() if k != "block"})

    @classmethod
    def _rebuild(cls, state: dict[str, Any]) -> Block:
        return cls(**{k: _from_state(v) for k, v in state.items()})

    def __getstate__(self) -> dict[str, Any]:
        return {f.name: getattr(self, f.name) for f in fields(self)}  # without caches

    def _as_dense(self, operation: str) -> Any:
        """As a dense matrix, if it fits the memory budget and takes no products."""
        if self.matrix_free:
            raise NotImplementedError(
                f"{operation}: a matrix known by its products alone would take {self.numel} of them. Use an estimator "
                "of nngeometry.linalg (hutchpp for a trace, hutchinson for a diagonal) or nngeometry.spectrum, a "
                "representation that holds its entries, or to_torch()"
            )
        from_ = type(self).__name__
        require(
            self.numel**2 * self.dtype.itemsize,
            f"{operation}: the dense form of a {from_} of {self.numel} parameters",
            "work on fewer layers, use a representation with a closed form",
            self.device,
        )
        return Derived.dense(self.to_dense(), self.shape, self.symmetric)


class Derived:
    """What any block is made into: the classes of these are written upon this file, and put here by theirs."""

    dense: ClassVar[Callable[..., Any]]
    function: ClassVar[Callable[..., Any]]
    inverse: ClassVar[Callable[..., Any]]
    compression: ClassVar[Callable[..., Any]]
    congruence: ClassVar[Callable[..., Any]]
    sum: ClassVar[Callable[..., Any]]


def check_order(ord: Any) -> None:
    """Raise ``ValueError`` unless there is a norm of that order."""
    if not (ord is None or (isinstance(ord, str | int | float) and ord in ("fro", 2, -2, "nuc"))):
        raise ValueError(f"norm: ord={ord!r} is not one of None, 'fro', 2, -2, 'nuc'")


def check_invertible(l: Tensor, regul: float) -> None:
    """Check that ``l + regul`` stays away from zero by more than rounding.

    Args:
        l: Eigenvalues.
        regul: What is added to them.

    Raises:
        ValueError: If it does not, with a regul that would do.
    """
    if l.numel() == 0:
        return
    largest = float(l.abs().max())
    smallest = float((l + regul).abs().min())
    tolerance = (l.numel() if regul == 0 else 4) * torch.finfo(l.dtype).eps * largest
    if smallest <= tolerance:
        raise ValueError(
            f"the matrix plus regul={regul:.3g} is singular to working precision ({l.dtype}: eigenvalues reach "
            f"{largest:.3g}, and one of the "
            f"regularised ones is {smallest:.3g}): use regul of at least {max(10 * tolerance, 1e-30):.1g}, or pinv"
        )


def check_held(l: Tensor, k: int | None, rest: Tensor) -> None:
    """Raise ``ValueError`` unless the k largest eigenvalues are among the descending l, rather than those outside
    of its eigenvectors.
    """
    if k is None:
        return
    noise = l.numel() * torch.finfo(l.dtype).eps * l.abs().max() if len(l) else 0.0
    if k > len(l) or (k and len(rest) and bool(l[k - 1] < rest.max() - noise)):
        raise ValueError(
            f"eig(k={k}): the representation holds {len(l)} eigenvectors; outside of their span eigenvalues reach "
            f"{float(rest.max()) if len(rest) else 0.0:.3g}, which is more than the smallest asked for: ask for "
            "fewer, or for all with k=None"
        )


def _map(fn: Map, value: Any) -> Any:
    if isinstance(value, Tensor):
        return fn(value)
    if isinstance(value, Block):
        return value.map(fn)
    if isinstance(value, tuple):
        return tuple(_map(fn, v) for v in value)
    return value


def _state(value: Any, where: str) -> Any:
    if isinstance(value, Block):
        return value.state()
    if isinstance(value, tuple):
        return [_state(v, where) for v in value]
    if value is None or isinstance(value, Tensor | str | bool | int | float):
        return value
    raise TypeError(
        f"{where} is of type {type(value).__name__}, which files do not hold: tensors, blocks, numbers, strings and "
        "tuples of these they do. Write state() and _rebuild() for the block"
    )


def _from_state(value: Any) -> Any:
    if isinstance(value, dict):
        return Block.from_state(value)
    if isinstance(value, list):
        return tuple(_from_state(v) for v in value)
    return value


@dataclass(frozen=True)
class _Power:
    """Ritz values to an exponent, NaN where that is undefined: those of zero, as far as rounding lets one know, to a
    negative exponent, and negative ones to a fractional exponent.

    definite: whether none is negative but for rounding. eps: the size of rounding, relative to the largest.
    """

    exponent: float
    definite: bool
    eps: float

    def __call__(self, l: Tensor) -> Tensor:
        noise = self.eps * l.abs().max()
        whole = self.exponent == int(self.exponent)
        power = l**self.exponent if whole else l.clamp(min=0) ** self.exponent
        if self.exponent < 0:
            power = torch.where(l.abs() <= noise, torch.nan, power)
        return power if whole or self.definite else torch.where(l < -noise, torch.nan, power)
