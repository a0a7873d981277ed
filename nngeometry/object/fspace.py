"""Matrices in function space: kernels between the outputs of examples, under one algebra for all storages."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from .. import arguments
from ..blocks import Block, Dense, Operator, Rectangular
from ..blocks.base import Map, check_order
from ..changes import with_methods_uncast
from ..memory import require
from . import old_arguments
from .arithmetic import VectorSpace
from .kernel_layouts import Full, Layout, Traced, centre, positions, take
from .regul import Relative, regul_number
from .vector import FVector


@with_methods_uncast
class FMat(VectorSpace):
    """A kernel between outputs of examples, ``K[c, x, d, y] = J[c, x] M J'[d, y]^T``, or what a layout keeps of it.

    ``output="full"`` is seen as ``(C, n, C', n')``, "diag" as ``(C, n, n')``, "trace", "mean_trace" and "sum" as
    ``(n, n')``, which acts on every output of an FVector alike. Operations return new matrices.

    Args:
        root: The block that holds it.
        layout: What its rows and columns are.
    """

    _remedy = "a kernel goes (@) with an FVector or FMat, (+) with an FMat of the same shape and (*) with a number"

    def __init_subclass__(cls) -> None:
        with_methods_uncast(cls)

    def __init__(self, root: Block, layout: Layout) -> None:
        self.root = root
        self.layout = layout

    # Products

    def mv(self, u: FVector) -> FVector:
        """The product ``K u``.

        Args:
            u: A vector in function space, ``(C', n')``.
        """
        return self._unpack(self.root.mv(self._pack(u, self.layout.transpose(), "columns")))

    def __matmul__(self, other: Any) -> Any:
        if isinstance(other, FVector):
            return self.mv(other)
        if not isinstance(other, FMat):
            return arguments.unfit("@", self, other, self._remedy)
        same = type(self.layout) is type(other.layout) and self.layout.examples[1] == other.layout.examples[0]
        if not same or not (isinstance(self.layout, Traced) or self.layout.outputs[1] == other.layout.outputs[0]):
            raise ValueError(f"{self} @ {other}: the columns of one are not the rows of the other")
        self._check_kind(other, "@")
        layout = type(self.layout)(
            (self.layout.outputs[0], other.layout.outputs[1]), (self.layout.examples[0], other.layout.examples[1])
        )
        if isinstance(self.root, Dense) and isinstance(other.root, Dense):
            return FMatDense(dense_root(self.root.data @ other.root.data, layout, False), layout)
        one, two = self._products(), other._products()
        return FMat(
            root_of_products(lambda V: one[0](two[0](V)), lambda V: two[1](one[1](V)), layout, self._empty()), layout
        )

    def __rmatmul__(self, u: Any) -> FVector:
        """``u @ K``."""
        if not isinstance(u, FVector):
            arguments.refuse("@", u, self, self._remedy)
        return self.T.mv(u)

    def __pow__(self, exponent: int) -> FMatDense:
        """``K ** n`` for an integer."""
        arguments.integer("**: the exponent of a kernel", exponent, least=-(2**31))
        entries = self.to_torch()
        power = torch.linalg.matrix_power(entries.flatten(2).flatten(0, 1), exponent)
        return kernel_of((power + power.T).view_as(entries) / 2 if self.root.symmetric else power.view_as(entries))

    def vTMv(self, u: FVector, v: FVector | None = None) -> Tensor:
        """The bilinear form ``u^T K v``, a scalar.

        Args:
            u: A vector of the rows.
            v: A vector of the columns, by default u.
        """
        self._pack(u, self.layout)  # for the checks in there
        return u.dot(self.mv(u if v is None else v))

    @property
    def T(self) -> FMat:
        """The transpose."""
        return self._with(self.root.transpose(), self.layout.transpose())

    # Linear systems

    def solve(
        self, b: Any = None, regul: float | Relative = 1e-8, impl: Any = None, *, rtol: float | None = None, **old: Any
    ) -> Any:
        """``(K + regul)^-1 b``.

        Args:
            b: An FVector, or an FMat, for each of whose columns it is solved.
            regul: A number or ``Relative(factor)``, in units of the mean eigenvalue; by default 1e-8.
            impl: What NNGeometry took, see :doc:`/from-nngeometry`.
            rtol: The relative residual to reach by conjugate gradients (MINRES) for a kernel that is not in memory, by
                default 1e-6 (1e-5 in float32). Otherwise the solution is exact.
            **old: What NNGeometry took, see :doc:`/from-nngeometry`.

        Returns:
            An object of the kind of b.

        Raises:
            ValueError: If K + regul is singular to working precision, or the kernel is rectangular.
            RuntimeError: If rtol is not reached.
        """
        if impl is not None or old:
            return old_arguments.solve_kernel(self, b, regul, impl, rtol=rtol, **old)
        self._check_square("solve")
        r = self._regul(regul)
        rtol = None if rtol is None else arguments.number("solve: rtol", rtol, least=0.0)
        if isinstance(b, FVector):
            return self._unpack(self._solve(self._pack(b, self.layout), r, rtol))
        if not isinstance(b, FMat) or not isinstance(b.root, Dense):
            raise TypeError(f"solve: expected an FVector or a dense FMat, got {arguments.described(b)}")
        self._check_rows(b, "solve")
        columns = b.root.data.permute(2, 0, 1)
        x = self._solve(columns.reshape(len(columns), *self.root.shape), r, rtol)
        return FMatDense(dense_root(x.reshape(columns.shape).permute(1, 2, 0), b.layout, False), b.layout)

    def _solve(self, V: Tensor, regul: float, rtol: float | None) -> Tensor:
        return self.root.iterate(V, regul, rtol) if self.root.matrix_free else self.root.solve(V, regul)

    def inv(self, regul: float | Relative = 1e-8) -> FMat:
        """``(K + regul)^-1`` as a kernel.

        Args:
            regul: As in :meth:`solve`.
        """
        self._check_square("inv")
        return self._with(self.root.inv(self._regul(regul)), self.layout)

    def logdet(self, regul: float | Relative = 0.0) -> Tensor:
        """``log det(K + regul)``.

        Args:
            regul: As in :meth:`solve`, by default 0.

        Raises:
            ValueError: If that is not positive definite.
        """
        self._check_square("logdet")
        return self.root.logdet(self._regul(regul))

    # Spectrum

    def eig(self, k: int | None = None) -> tuple[Tensor, list[FVector]]:
        """The largest eigenvalues, descending, and their eigenvectors. (Those of ``output="trace"`` are of one output.)

        Args:
            k: How many, by default all.
        """
        self._check_square("eig")
        l, vectors = self.root.top(arguments.how_many("eig: k", k, self.root.numel))
        return l, [self._unpack(v) for v in vectors]

    def eigenvalues(self) -> Tensor:
        """All eigenvalues, descending."""
        self._check_square("eigenvalues")
        return self.root.eigenvalues().sort(descending=True).values

    def singular_values(self) -> Tensor:
        """All singular values, descending."""
        if self.root.symmetric:
            return self.root.eigenvalues().abs().sort(descending=True).values
        return torch.linalg.svdvals(self._held("singular values")).flatten().sort(descending=True).values

    def condition(self) -> Tensor:
        """The condition number, the largest over the smallest singular value."""
        s = self.singular_values()
        return s[0] / s[-1]

    def effective_rank(self) -> Tensor:
        """``exp`` of the entropy of the normalised singular values.

        Source:
            Roy and Vetterli (2007), EUSIPCO.
        """
        s = self.singular_values()
        p = s / s.sum()
        return torch.exp(-torch.special.xlogy(p, p).sum())

    def norm(self, ord: int | str | None = None) -> Tensor:
        """A norm of the matrix.

        Args:
            ord: Frobenius (None, the default, or "fro"), spectral (2), smallest singular value (-2) or nuclear ("nuc").
        """
        if self.root.symmetric:
            return self.root.norm(ord)
        if ord is None or ord == "fro":
            return torch.linalg.vector_norm(self._held("norm"))
        s = self.singular_values()
        check_order(ord)
        found: dict[Any, Tensor] = {2: s[0], -2: s[-1], "nuc": s.sum()}
        return found[ord]

    def trace(self) -> Tensor:
        """The sum of the diagonal."""
        self._check_square("trace")
        return self.root.trace()

    # Entries

    def get_diag(self) -> Tensor:
        """The diagonal: ``(C, n)``, or ``(n,)`` of a kernel that is ``(n, n')``."""
        self._check_square("get_diag")
        diag = self._unpack(self.root.diag()).to_torch()
        return diag[0] if isinstance(self.layout, Traced) else diag

    def to_torch(self) -> Tensor:
        """All entries, as :class:`FMat` says."""
        return self.layout.view(self._held("to_torch")).contiguous()

    def submatrix(self, examples: Any, others: Any = None) -> FMat:
        """The kernel of some examples with some others.

        Args:
            examples: The rows, a slice or indices.
            others: The columns, by default the same.
        """
        rows = positions(examples, self.layout.examples[0], self.device)
        cols = rows if others is None else positions(others, self.layout.examples[1], self.device)
        entries = take(self.to_torch(), self.layout.axes, rows, cols)
        layout = self.layout.of_examples(len(rows), len(cols))
        symmetric = self.root.symmetric and torch.equal(rows, cols)
        return FMatDense(dense_root(layout.unview(entries), layout, symmetric), layout)

    def size(self, dim: int | None = None) -> Any:
        """The shape of :meth:`to_torch`, or the length of one axis.

        Args:
            dim: The axis, None for all.
        """
        shape = torch.Size(self.layout.seen)
        return shape if dim is None else shape[dim]

    # Vector space

    def _scaled(self, c: float) -> FMat:
        return self._with(self.root.scale(c), self.layout)

    def _combined(self, other: Any, weight: float) -> FMat:
        if not isinstance(other, FMat):
            return NotImplemented
        if self.layout != other.layout:
            raise ValueError(f"{self} and {other} are of other outputs or examples")
        self._check_kind(other, "+")
        if isinstance(self.root, Dense) and isinstance(other.root, Dense):
            symmetric = self.root.symmetric and other.root.symmetric
            return FMatDense(dense_root(self.root.data + weight * other.root.data, self.layout, symmetric), self.layout)
        one, two = self._products(), other._products()
        root = root_of_products(
            lambda V: one[0](V) + weight * two[0](V),
            lambda V: one[1](V) + weight * two[1](V),
            self.layout,
            self._empty(),
            symmetric=self.root.symmetric and other.root.symmetric,
        )
        return FMat(root, self.layout)

    # Statistics

    def centred(self) -> FMat:
        """The kernel of Jacobians less their mean over the examples of their side, output by output."""
        if isinstance(self.root, Dense):
            entries = centre(self.to_torch(), self.layout.axes)
            return FMatDense(dense_root(self.layout.unview(entries), self.layout, self.root.symmetric), self.layout)
        rows, cols = self.layout, self.layout.transpose()
        forward, backward = self._products()
        left, right = _centring(rows), _centring(cols)
        root = root_of_products(
            lambda V: left(forward(right(V))),
            lambda V: right(backward(left(V))),
            self.layout,
            self._empty(),
            symmetric=self.root.symmetric,
            definite=self.root.definite,
        )
        return FMat(root, self.layout)

    def align(self, other: FMat | FVector | Tensor) -> Tensor:
        """Alignment with another kernel, ``<K, K'> / (|K| |K'|)``, or with that of labels, ``y y^T``.

        Args:
            other: An FMat; an FVector of labels; or a tensor of integer classes ``(n,)``, taken one-hot.

        Source:
            Cristianini et al. (2001), NIPS 14.
        """
        if isinstance(other, FMat):
            if self.layout != other.layout:
                raise ValueError(f"{self} and {other} are of other outputs or examples")
            self._check_kind(other, "align")
            a, b = self._held("align"), other._held("align")
            return (a * b).sum() / (torch.linalg.vector_norm(a) * torch.linalg.vector_norm(b))
        self._check_square("align")
        y = other if isinstance(other, FVector) else self._one_hot(other)
        groups, r, _ = self.layout.shape
        rows = self._pack(y, self.layout).reshape(-1, groups, r)
        inner = (rows * self.root.mv(rows.reshape(-1, *self.root.shape)).reshape(rows.shape)).sum()
        return inner / (self.norm() * torch.linalg.vector_norm(torch.einsum("kgr,lgr->gkl", rows, rows)))

    def cka(self, other: FMat | FVector | Tensor) -> Tensor:
        """Centred alignment: that of both kernels centred.

        Args:
            other: As in :meth:`align`.

        Source:
            Cortes, Mohri and Rostamizadeh (2012), JMLR 13; Kornblith et al. (2019), 1905.00414.
        """
        if isinstance(other, FMat):
            return self.centred().align(other.centred())
        y = (other if isinstance(other, FVector) else self._one_hot(other)).to_torch()
        return self.centred().align(FVector(y - y.mean(1, keepdim=True)))

    def distance(self, other: FMat) -> Tensor:
        """The kernel distance, ``1 - align``.

        Args:
            other: Another kernel.

        Source:
            Fort et al. (2020), 2010.15110.
        """
        return (1 - self.align(other)).clamp(min=0)

    def regress(
        self,
        targets: FVector,
        cross: FMat | None = None,
        *,
        regul: float | Relative = 1e-8,
        start: FVector | None = None,
        cross_start: FVector | None = None,
        time: float | None = None,
    ) -> FVector:
        """Kernel regression, or where gradient flow on the linearised model is at a time.

        It is ``f_0(x) + K_xX (K + regul)^-1 (y - f_0)``; with a time t, gradient flow on ``sum (f - y)^2 / 2``:
        ``f_0(x) + K_xX K^-1 (1 - exp(-K t)) (y - f_0)``, without regul.

        Args:
            targets: y at the training examples, of which self is the kernel.
            cross: The kernel of the query examples with the training ones, by default the training ones themselves.
            regul: As in :meth:`solve`.
            start: The outputs f_0 of the model at the training examples, by default zero.
            cross_start: Its outputs at the queries, by default zero.
            time: The time t, by default none.

        Returns:
            The outputs at the queries.

        Example:
            >>> from nngeometry import GramMatrix
            >>> model = torch.nn.Sequential(torch.nn.Linear(2, 5), torch.nn.Tanh(), torch.nn.Linear(5, 1)).double()
            >>> K = GramMatrix(model, (torch.randn(4, 2).double(),))
            >>> y = FVector(torch.ones(1, 4).double())
            >>> torch.allclose(K.regress(y, regul=1e-9).to_torch(), y.to_torch(), atol=1e-4)
            True

        Source:
            Jacot, Gabriel and Hongler (2018), 1806.07572; Lee et al. (2019), 1902.06720.
        """
        self._check_square("regress")
        for vector in [targets] if start is None else [targets, start]:
            self._pack(vector, self.layout)  # for the checks in there
        if cross is not None:
            self._check_columns(cross, "regress")
        residual = targets if start is None else targets - start
        if cross is not None and (start is None) != (cross_start is None):
            raise ValueError("regress: give the outputs at both, start= and cross_start=, or at neither")
        if cross is None and cross_start is not None:
            raise ValueError("regress: cross_start= is for queries: give their kernel with cross=, or leave it out")
        if cross is not None and cross_start is not None:
            cross._pack(cross_start, cross.layout)
        time = None if time is None else arguments.number("regress: time", time, least=0.0)
        if time is None:
            weights = self.solve(residual, regul)
        else:
            spectral = self.root if self.root.matrix_free else self.root.eig()
            weights = self._unpack(spectral.apply(lambda l: _flow(l, time)).mv(self._pack(residual, self.layout)))
        found = (self if cross is None else cross).mv(weights)
        base = start if cross is None else cross_start
        return found if base is None else found + base

    def gp_posterior(self, targets: FVector, cross: FMat, prior: FMat, noise: float | Relative) -> tuple[FVector, FMat]:
        """The posterior of a Gaussian process at queries. The kernel is that of the training examples.

        Args:
            targets: Those of the training examples.
            cross: The kernel of queries with training examples.
            prior: The kernel of the queries.
            noise: The variance of the targets about the function.

        Returns:
            The mean, and the covariance.

        Source:
            Rasmussen and Williams (2006), Gaussian Processes for Machine Learning, section 2.2.
        """
        self._check_columns(cross, "gp_posterior")
        if not isinstance(prior, FMat):
            raise TypeError(
                f"gp_posterior: expected the kernel of the queries as prior, an FMat, got {arguments.described(prior)}"
            )
        mean = self.regress(targets, cross, regul=noise)
        cov = prior - cross @ self.solve(cross.T, noise)
        data = cov._held("gp_posterior")
        return mean, FMatDense(dense_root((data + data.mT) / 2, cov.layout, True), cov.layout)

    # Moving

    @property
    def dtype(self) -> torch.dtype:
        return self.root.dtype

    @property
    def device(self) -> torch.device:
        return self.root.device

    def to(self, device: torch.device | str | None = None, dtype: torch.dtype | None = None) -> FMat:
        """The same matrix on another device or in another dtype.

        Args:
            device: Where to, by default where it is.
            dtype: In which dtype, by default its own.
        """
        arguments.device(device)
        arguments.dtype(dtype, real=True)
        return self._with(self.root.map(lambda t: t.to(device=device, dtype=dtype)), self.layout)

    def __repr__(self) -> str:
        return f"{type(self).__name__}{tuple(self.size())}"

    # Helpers

    def _with(self, root: Block, layout: Layout) -> FMat:
        return FMatDense(root, layout) if isinstance(root, Dense) else FMat(root, layout)

    def _empty(self) -> Tensor:
        return torch.empty(0, dtype=self.dtype, device=self.device)

    def _pack(self, u: FVector, layout: Layout, side: str = "rows") -> Tensor:
        """The values of a vector as the block of a layout's rows takes them."""
        if not isinstance(u, FVector):
            raise TypeError(
                f"expected an FVector, got {arguments.described(u)}: make one with FVector(tensor) of shape (C, n)"
            )
        (c, _), (n, _) = layout.outputs, layout.examples
        if u.size(1) != n or not (isinstance(layout, Traced) or u.size(0) == c):
            wanted = f"(any, {n})" if isinstance(layout, Traced) else f"{(c, n)}"
            raise ValueError(
                f"the FVector has {tuple(u.size())} outputs and examples, the {side} of {self} have {wanted}"
            )
        flat = u.to_torch()
        if flat.dtype != self.dtype or flat.device != self.device:
            raise ValueError(
                f"the FVector is {flat.dtype} on {flat.device}, the matrix {self.dtype} on {self.device}: move one of "
                "them with .to(device, dtype)"
            )
        U = layout.pack(flat)
        shape = self.root.shape if layout is self.layout else self.root.transpose().shape
        return U.reshape(*U.shape[:-2], *shape)

    def _unpack(self, U: Tensor) -> FVector:
        groups, rows, _ = self.layout.shape
        return FVector(self.layout.unpack(U.reshape(-1, groups, rows)))

    def _products(self) -> tuple[Map, Map]:
        """Products with the matrix and its transpose, on flat rows ``(k, p)``."""
        root, back = self.root, self.root.transpose()
        return (
            lambda V: root.mv(V.reshape(-1, *back.shape)).reshape(len(V), -1),
            lambda V: back.mv(V.reshape(-1, *root.shape)).reshape(len(V), -1),
        )

    def _regul(self, regul: float | Relative) -> float:
        mean = float(self.trace()) / self.root.numel if isinstance(regul, Relative) else 1.0
        return regul_number("regul", regul, mean)

    def _check_rows(self, other: FMat, operation: str) -> None:
        """Raise unless the rows of another matrix are those of this one."""
        same = type(other.layout) is type(self.layout) and other.layout.examples[0] == self.layout.examples[0]
        if not same or not (isinstance(self.layout, Traced) or other.layout.outputs[0] == self.layout.outputs[0]):
            raise ValueError(f"{operation}: the rows of {other} are not those of {self}")
        self._check_kind(other, operation)

    def _check_columns(self, other: Any, operation: str) -> None:
        """Raise unless the columns of another matrix are those of this one."""
        if not isinstance(other, FMat):
            raise TypeError(
                f"{operation}: expected the kernel of queries with training examples, got {arguments.described(other)}"
            )
        same = type(other.layout) is type(self.layout) and other.layout.examples[1] == self.layout.examples[1]
        if not same or not (isinstance(self.layout, Traced) or other.layout.outputs[1] == self.layout.outputs[1]):
            raise ValueError(f"{operation}: the columns of {other} are not those of {self}")
        self._check_kind(other, operation)

    def _check_kind(self, other: FMat, operation: str) -> None:
        if other.dtype != self.dtype or other.device != self.device:
            raise ValueError(
                f"{operation}: kernels of {self.dtype} on {self.device} and of {other.dtype} on {other.device}: move "
                "one of them with .to(device, dtype)"
            )

    def _is_square(self) -> bool:
        _, r, c = self.layout.shape
        return r == c

    def _check_square(self, operation: str) -> None:
        if not self._is_square():
            raise ValueError(f"{operation}: the kernel is rectangular, {tuple(self.size())}; build it without loader2")

    def _held(self, operation: str) -> Tensor:
        """The entries ``(G, r, c)``."""
        if isinstance(self.root, Dense):
            return self.root.data.reshape(self.layout.shape)
        groups, r, c = self.layout.shape
        require(
            groups * r * c * self.dtype.itemsize,
            f"{operation}: the dense form of {self}",
            "use products with it",
            self.device,
        )
        forward, _ = self._products()
        if groups > 1:
            units = torch.eye(c, dtype=self.dtype, device=self.device).unsqueeze(1).expand(c, groups, c)
            return forward(units.reshape(c, -1)).view(c, groups, r).permute(1, 2, 0)
        return forward(torch.eye(c, dtype=self.dtype, device=self.device)).T.reshape(1, r, c)

    def _one_hot(self, classes: Tensor) -> FVector:
        wanted = isinstance(classes, Tensor) and classes.ndim == 1
        if not wanted or classes.is_floating_point() or classes.is_complex() or classes.dtype == torch.bool:
            raise TypeError(
                "labels: expected an FVector (C, n), or a tensor of integer classes (n,), got "
                f"{arguments.described(classes)}"
            )
        if len(classes) != self.layout.examples[0] or bool((classes < 0).any()):
            raise ValueError(
                f"labels: expected one class of at least 0 for each of {self.layout.examples[0]} examples, got "
                f"{len(classes)}, the smallest {int(classes.min()) if len(classes) else 'missing'}"
            )
        count = max(int(classes.max()) + 1, self.layout.outputs[0])
        return FVector(torch.nn.functional.one_hot(classes, count).T.to(self._empty()))


class FMatDense(FMat):
    """All entries, in memory.

    Args:
        root: As of :class:`FMat`; or a layer collection, in NNGeometry's words.
        layout: As of :class:`FMat`; or a generator, in NNGeometry's words.
        data: Instead, the entries ``(C, n, C', n')``.
        examples: The loader of that generator.
        generator: The generator, by name.
        layer_collection: The layer collection, by name.
    """

    def __init__(
        self,
        root: Any = None,
        layout: Any = None,
        data: Any = None,
        examples: Any = None,
        *,
        generator: Any = None,
        layer_collection: Any = None,
    ) -> None:
        if not isinstance(root, Block):
            lc = layer_collection if root is None else root
            source = generator if layout is None else layout
            given = old_arguments.of_source("FMatDense", lc, source, data, examples, "GramMatrix(model, loader)")
            made = given[1].kernel(given[3]) if given[2] is None else kernel_of(given[2])
            root, layout = made.root, made.layout
        super().__init__(root, layout)


class FMatImplicit(FMat):
    """``K u = J M J'^T u`` by automatic differentiation; holds no entry."""


def kernel_of(value: Tensor) -> FMatDense:
    """A kernel from its entries ``(C, n, C', n')``."""
    c, n, d, m = value.shape
    layout = Full((c, d), (n, m))
    symmetric = value.shape[:2] == value.shape[2:] and bool(torch.equal(value, value.permute(2, 3, 0, 1)))
    return FMatDense(dense_root(layout.unview(value), layout, symmetric), layout)


def dense_root(data: Tensor, layout: Layout, symmetric: bool) -> Dense:
    """The entries ``(G, r, c)`` as a block."""
    groups, r, c = layout.shape
    return Dense(data.reshape(groups, r, c), (groups, r), symmetric, (groups, c))


def root_of_products(
    forward: Map,
    backward: Map,
    layout: Layout,
    like: Tensor,
    *,
    symmetric: bool = False,
    definite: bool = False,
    trace: Callable[[], Tensor] | None = None,
    diagonal: Callable[[], Tensor] | None = None,
) -> Block:
    """A block from products with a kernel and its transpose on flat rows ``(k, p)``."""
    groups, r, c = layout.shape
    if symmetric:
        return Operator(forward, groups * r, trace, diagonal, like, definite)
    return Rectangular(forward, backward, (groups * r,), (groups * c,), like)


def _flow(l: Tensor, time: float) -> Tensor:
    """``(1 - exp(-l t)) / l``."""
    small = l.abs() * time < 1e-8
    return torch.where(small, time, -torch.expm1(-l * time) / torch.where(small, 1.0, l))


def _centring(layout: Layout) -> Map:
    """Flat rows ``(k, p)`` less their mean over the examples, output by output."""

    def centred(V: Tensor) -> Tensor:
        groups, r, _ = layout.shape
        n = layout.examples[0]
        outputs = V.view(len(V), groups, n, r // n)
        return (outputs - outputs.mean(2, keepdim=True)).view(V.shape)

    return centred
