"""Matrices in parameter space: one algebra for all representations."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, ClassVar, Self

import torch
from torch import Tensor

from .. import arguments
from ..blocks import Block, DirectSum, Regul, Solver, Uniform, Varying, add, matmul
from ..blocks.operator import drawn_alike
from ..estimation import Estimation, Estimator, OfJacobians, OfProducts, Source
from ..kinds import Packing
from ..layercollection import Layer, LayerCollection
from ..linalg import gaussian
from ..passes import update
from ..reading import Reading
from ..registry import Registry, Unknown
from ..tables import as_html
from . import old_arguments, tensors
from .arithmetic import VectorSpace
from .map import PFMap, PFMapDense
from .offload import offloaded
from .regul import Relative, regul_number
from .saved import FORMAT, check_whole, read
from .vector import FlatArray, PVector, check_same_space

#: What ``regul=`` accepts: a number, Relative(factor), or one of these for each layer by name.
RegulLike = float | Relative | Mapping[str, "float | Relative"]


#: A stochastic estimate from products: ``(matvec, size, like=) -> Estimate``, see :mod:`nngeometry.linalg`.
OfProbes = Callable[..., Any]


CLASSES: Registry[PMat] = Registry("representation")


class PMat(VectorSpace):
    """A P x P matrix in parameter space, in some representation.

    Operations return new matrices and leave this one as it is. A representation is a subclass with :meth:`plan`, see
    :doc:`/extending`; users make one with FIM and the like. The class itself holds a block of any structure.

    Args:
        layer_collection: The coordinates.
        generator: The source that it is estimated from, together with examples.
        data: Instead, the block that it consists of, of shape ``(P,)``, or the tensors of :attr:`data`.
        examples: A loader, or one minibatch.
        **options: Those of the representation.

    Raises:
        ValueError: If not just one of data and examples is given, or the block has another shape.
        TypeError: For what is no source, or options that are not known.

    Example:
        >>> from nngeometry import blocks
        >>> lc = LayerCollection.from_model(torch.nn.Linear(2, 1))
        >>> PMat(lc, data=blocks.Diag(torch.tensor([1.0, 2.0, 3.0]))).trace()
        tensor(6.)
    """

    _tensors: ClassVar[tensors.TensorLayout | None] = None
    _held: tensors.Held | None = None
    _remedy = (
        "a matrix goes (@) with a PVector, a map or a PMat, (+) with a PMat and (*) with a number; for F + c write "
        "F + c * PMatEye(F.layer_collection), or regul=c"
    )

    def __init_subclass__(cls) -> None:
        CLASSES.add(cls)

    def __init__(
        self,
        layer_collection: Any = None,
        generator: Any = None,
        data: Any = None,
        examples: Any = None,
        **options: Any,
    ) -> None:
        name = type(self).__name__
        given = old_arguments.of_source(name, layer_collection, generator, data, examples)
        layer_collection, generator, data, examples = given
        if (data is None) == (examples is None):
            raise ValueError(f"{name}: give either data, or generator and examples")
        if data is None:
            if generator is None:
                raise ValueError(f"{name}: estimation from examples needs a generator")
            if not hasattr(generator, "layer_collection"):
                raise TypeError(
                    f"generator: expected a Generator, got {arguments.described(generator)}: use FIM(model, loader, "
                    "representation) and the like"
                )
            check_same_space(layer_collection, generator.layer_collection, "generator")
            data = self._estimate(generator, examples, **old_arguments.refuse(name, options))
            if getattr(generator, "centering", False):  # of each output, as a backend of the old names is asked for it
                data = generator.without_mean(data, examples, type(self))
        elif options:
            raise TypeError(f"{name}: options {', '.join(options)} are for estimation from examples")
        self.layer_collection = layer_collection
        self.generator = generator
        if not isinstance(data, Block):
            self.data = data
            return
        if data.shape != (layer_collection.numel(),):
            raise ValueError(f"{name}: data of shape {data.shape} for {layer_collection.numel()} parameters")
        self.root = data

    @property
    def root(self) -> Block:
        """The block that the matrix consists of."""
        return self._root if self._held is None else self._held.block()

    @root.setter
    def root(self, block: Block) -> None:
        if self._held is not None:
            self._held.current = False
            self._held = None
        self._root = block

    @property
    def data(self) -> Any:
        """The tensors that the matrix consists of, in NNGeometry's layout, from when they are first asked for: it
        changes with them in whatever way they are changed. ``AttributeError`` for a matrix without such a layout.
        """
        if self._held is None:
            self._held = tensors.Held.of(self)
            del self._root
        return self._held.value

    @data.setter
    def data(self, value: Any) -> None:
        held = tensors.Held.given(self, value)
        if self._held is not None:
            self._held.current = False
        self._held = held

    @classmethod
    def _estimate(cls, generator: Any, examples: Any, **options: Any) -> Block:
        kept = isinstance(examples, Reading) and examples.checkpoint is not None and not generator.jacobians
        estimation = (cls.estimation if kept else cls._begun)(generator, **options)  # in pieces, or at once
        update(estimation, examples, last=True)
        return estimation.root(last=True)

    @classmethod
    def estimation(cls, source: Source, **options: Any) -> Estimation:
        """This representation of the matrix of a source, of which nothing was seen yet, to be estimated in pieces.

        Args:
            source: What the matrix is made from.
            **options: Those of the representation.

        Raises:
            NotImplementedError: If it has no average.
        """
        return cls._begun(source, **options)

    @classmethod
    def _begun(cls, source: Source, **options: Any) -> Estimation:
        layers = list(source.layer_collection.layers.values())
        if source.jacobians:
            return OfJacobians(source, cls.plan(layers, **options))
        return OfProducts(source, partial(cls.project, layers=layers, **options))

    @classmethod
    def project(cls, operator: Block, layers: Sequence[Layer]) -> Block:
        """This representation of a matrix that is known by its products.

        Args:
            operator: The matrix, of shape ``(P,)``.
            layers: The layers, in flat order.

        Raises:
            NotImplementedError: By default, since a representation need not have one.
        """
        raise NotImplementedError(
            f"{cls.__name__} is made of per-example Jacobians, which a Hessian is not: use PMatImplicit, PMatDense, "
            "PMatBlockDiag, PMatDiag or PMatLowRank, or GGN instead of Hessian"
        )

    @classmethod
    def plan(cls, layers: Sequence[Layer]) -> list[Estimator]:
        """How this representation estimates a set of layers. Further arguments, with defaults, are its options.

        Args:
            layers: The layers, in flat order.

        Returns:
            One estimator for each of its blocks, which together have every layer once.
        """
        raise NotImplementedError(
            f"{cls.__name__} cannot be estimated from data: use one of {', '.join(CLASSES.ours())}"
        )

    # Products

    def mv(self, v: Any) -> Any:
        """The product ``M v``, differentiable in v.

        Here and in the other products and :meth:`solve`, of a vector with more layers than the matrix has those of the
        matrix count, and the result has no others.

        Args:
            v: A PVector, or a map (PFMap), on each of whose rows M acts.

        Returns:
            An object of the same kind.

        Raises:
            ValueError: If it has other layers, or is of another dtype or device.
        """
        if isinstance(v, PFMap) and not isinstance(v, FlatArray):
            check_same_space(self.layer_collection, v.layer_collection, arguments.name_of(v))
            self._check_like(v)
            return v.through(self.root)
        flat = self._of(v)
        return v._like(self.root.once(flat), self.layer_collection)

    def vTMv(self, v: PVector, per_layer: bool = False) -> Any:
        """The quadratic form ``v^T M v``, differentiable in v.

        Args:
            v: The vector.
            per_layer: Whether to return a dict of the shares ``v_l . (M v)_l``, which sum to it; by default not.

        Returns:
            A scalar.
        """
        flat = self._of(v)
        return self._per_layer(flat * self.root.once(flat), per_layer)

    def mapTMmap(self, pfmap: PFMapDense, reduction: str = "sum") -> Tensor:
        """The quadratic forms ``j^T M j`` of the rows j of a map, differentiable in the map.

        Args:
            pfmap: The map ``(C, n, P)``.
            reduction: "sum", the default, over the outputs of each example, or "diag" for each of them.

        Returns:
            ``(n,)``, or ``(C, n)``.
        """
        if reduction not in ("sum", "diag"):
            raise ValueError(f"mapTMmap: reduction={reduction!r} is not 'sum' or 'diag'")
        j = self._of(pfmap)
        forms = (j * self.root.once(j)).sum(-1)
        return forms.sum(0) if reduction == "sum" else forms

    def matvec(self, V: Tensor) -> Tensor:
        """``M`` times each row of a tensor in flat parameter order, for algorithms that know nothing of layers. It is
        differentiable in V.

        Args:
            V: Rows ``(..., P)``.

        Returns:
            Rows ``(..., P)``.

        Raises:
            ValueError: For rows of another length, dtype or device.

        Example:
            >>> from nngeometry import PMatEye, linalg
            >>> F = PMatEye(LayerCollection.from_model(torch.nn.Linear(2, 1)), scaling=2.0)
            >>> F.matvec(torch.ones(2, 3))
            tensor([[2., 2., 2.],
                    [2., 2., 2.]])
            >>> linalg.eigsh(F.matvec, F.size(0), 1, like=F.like).values
            tensor([2.])
        """
        if not isinstance(V, Tensor):
            raise TypeError(f"matvec: expected a tensor (..., {self.size(0)}), got {arguments.described(V)}: use mv")
        fitted = self._fitted(V)
        if V.shape[-1:] != fitted.root.shape:
            raise ValueError(f"matvec: expected rows of {self.size(0)} parameters, got a tensor {tuple(V.shape)}")
        fitted._check_like(V)
        return fitted.root.mv(V)

    @property
    def like(self) -> Tensor:
        """An empty tensor of its dtype, on its device: what algorithms make vectors like."""
        return torch.empty(0, dtype=self.dtype, device=self.device)

    @property
    def symmetric(self) -> bool:
        """Whether it equals its transpose, as a product of two matrices need not."""
        return self.root.symmetric

    @property
    def definite(self) -> bool:
        """Whether it is known to be positive semidefinite by how it is made, without a look at its eigenvalues."""
        return self.root.definite

    @property
    def matrix_free(self) -> bool:
        """Whether it is known by its products alone, so that what needs all entries is iterative, or raises."""
        return self.root.matrix_free

    @property
    def couples_layers(self) -> bool:
        """Whether there are entries between parameters of different layers, as far as the representation has any."""
        if not isinstance(self.root, DirectSum):
            return len(self.layer_collection) > 1
        slices = self.layer_collection.slices().values()
        inside = [any(s.start <= p.slices[0][0] and p.slices[-1][1] <= s.stop for s in slices) for p in self.root.parts]
        return not all(inside)

    def __matmul__(self, other: Any) -> Any:
        if isinstance(other, PMat):
            return self._with(matmul(self.root, self._other(other)))
        if isinstance(other, FlatArray | PFMap):
            return self.mv(other)
        return arguments.unfit("@", self, other, self._remedy)

    # Linear systems

    def solve(
        self,
        b: Any = None,
        regul: RegulLike = 1e-8,
        impl: Any = None,
        *,
        rtol: float | None = None,
        preconditioner: PMat | None = None,
        **old: Any,
    ) -> Any:
        """``(M + regul)^-1 b``, whatever the representation.

        A matrix known by its products alone is solved by conjugate gradients, or MINRES where it may be indefinite. All
        others are solved exactly.

        Args:
            b: A PVector, or a PFMapDense, for each of whose rows it is solved.
            regul: A number; ``Relative(factor)``, in units of the mean eigenvalue; or a dict with one of these for each
                layer. By default it is 1e-8.
            impl: What NNGeometry took, see :doc:`/from-nngeometry`.
            rtol: The relative residual to reach by an iteration, by default 1e-6 (1e-5 in float32).
            preconditioner: Another representation, whose own solve with the same regul guides the iteration.
            **old: What NNGeometry took, see :doc:`/from-nngeometry`.

        Returns:
            An object of the kind of b.

        Raises:
            ValueError: If M + regul is singular to working precision.
            RuntimeError: If rtol is not reached.

        Example:
            >>> from nngeometry import FIM, PMatKFAC
            >>> model = torch.nn.Linear(4, 3)
            >>> F = FIM(model, (torch.randn(20, 4),), PMatKFAC)
            >>> b = PVector.from_model(model).detach()
            >>> x = F.solve(b, regul=0.1)
            >>> torch.allclose((F.mv(x) + 0.1 * x).to_torch(), b.to_torch(), atol=1e-5)
            True
        """
        if impl is not None or old:
            return old_arguments.solve(self, b, regul, impl, rtol=rtol, preconditioner=preconditioner, **old)
        flat, r = self._of(b), self._regul(regul)
        rtol = None if rtol is None else arguments.number("solve: rtol", rtol, least=0.0)
        inverse = None if preconditioner is None else self._other(preconditioner)
        if not self.root.matrix_free:
            x = r.solve(self.root, flat)
        elif inverse is None:
            x = self.root.iterate(flat, r.shift, rtol)
        else:
            x = self.root.iterate(flat, r.shift, rtol, lambda rows: r.solve(inverse, rows))
        return b._like(x, self.layer_collection)

    def solver(self, regul: RegulLike = 1e-8, **options: Any) -> Solver:
        """The map from flat values ``(..., P)`` to those of :meth:`solve`, with all of the work done that takes no
        vector.

        Args:
            regul: As in :meth:`solve`.
            **options: As of :class:`~nngeometry.blocks.Solver`.

        Returns:
            The map.
        """
        assert isinstance(self.root, DirectSum), self.root.describe()
        return Solver(self.root, self._regul(regul), **options)

    def inv(self, regul: RegulLike = 1e-8) -> PMat:
        """``(M + regul)^-1`` as a matrix.

        Args:
            regul: As in :meth:`solve`.

        Raises:
            ValueError: If M + regul is singular to working precision.
        """
        return self._with(self._regul(regul).inv(self.root))

    def pinv(self, cut: None = None, /, *, rtol: float | None = None, atol: float | None = None) -> PMat:
        """The pseudo-inverse.

        Args:
            cut: It is there for a message alone: say which of the two it is.
            rtol: Eigenvalues up to this times the largest, in magnitude, count as zero; by default those of the size of
                the rounding error do.
            atol: Eigenvalues up to this, in magnitude, count as zero.
        """
        if cut is not None:
            raise TypeError(f"pinv({cut}): write rtol={cut}, in units of the largest eigenvalue, or atol={cut}")
        rtol = None if rtol is None else arguments.number("pinv: rtol", rtol, least=0.0)
        if atol is None:
            return self._with(self.root.pinv(rtol))
        least = arguments.number("pinv: atol", atol, least=0.0)
        bound = least if rtol is None else max(least, rtol * float(self.norm(2)))
        return self._with(self.root.apply(lambda l: torch.where(l.abs() > bound, 1 / l, 0.0)))

    def logdet(self, regul: RegulLike = 0.0) -> Tensor:
        """``log det(M + regul)``.

        Args:
            regul: As in :meth:`solve`, by default 0.

        Raises:
            ValueError: If that is not positive definite.
        """
        return self._regul(regul).logdet(self.root)

    def check_positive(self, regul: RegulLike = 0.0) -> None:
        """Check that M + regul has no eigenvalue that is negative by more than rounding, as far as entries are known.

        Args:
            regul: As in :meth:`solve`, by default 0.

        Raises:
            ValueError: If it has.
        """
        self._regul(regul).check_positive(self.root)

    # Spectrum

    def pow(self, exponent: float | None = None, *old: Any, **named: Any) -> PMat:
        """``M**exponent``.

        Args:
            exponent: Any number. Negative and fractional ones need eigenvalues that allow them.
            *old: What NNGeometry took, see :doc:`/from-nngeometry`.
            **named: What NNGeometry took, see :doc:`/from-nngeometry`.

        Raises:
            ValueError: If an eigenvalue makes it undefined: of a matrix known by its products alone, when it is
                multiplied with a vector and an eigenvalue that the vector meets is zero to working precision.
            RuntimeError: Of a matrix known by its products alone, when it is multiplied with a vector and the iteration
                does not converge.
        """
        if exponent is None or old or named:
            found: PMat = old_arguments.pow(self, exponent, *old, **named)
            return found
        return self._with(self.root.pow(arguments.number("pow: exponent", exponent)))

    __pow__ = pow

    def absolute(self) -> PMat:
        """``|M|``: the eigenvalues by their absolute values. Where M is known by its products alone, by Lanczos."""
        return self._with(self.root.absolute())

    def eig(self, k: int | None = None) -> tuple[Tensor, list[PVector]]:
        """The largest eigenvalues, descending, and their eigenvectors.

        Args:
            k: How many, by default all; of a low-rank matrix, those it holds.

        Returns:
            Eigenvalues ``(k,)``, and eigenvectors of norm one.
        """
        with drawn_alike(self.root):
            l, vectors = self.root.top(arguments.how_many("eig: k", k, self.size(0)))
        return l, [PVector(self.layer_collection, v) for v in vectors]

    def eigenvalues(self, per_layer: bool = False) -> Any:
        """All P eigenvalues, descending.

        Args:
            per_layer: Whether to return a dict of those of each layer; by default not.

        Returns:
            A tensor ``(P,)``, or the dict.

        Raises:
            ValueError: If they are asked for by layer and the matrix couples layers.
        """
        arguments.flag("eigenvalues: per_layer", per_layer)
        if not per_layer:
            return self.root.eigenvalues().sort(descending=True).values
        if self.couples_layers:
            raise ValueError(
                "eigenvalues: per_layer=True is for matrices with a block for each layer (PMatBlockDiag, PMatKFAC, "
                "...), and this one couples layers: use block(name) for a diagonal block"
            )
        return {name: self.block(name).eigenvalues() for name in self.layer_collection}

    def norm(self, ord: int | str | None = None) -> Tensor:
        """A norm of the matrix.

        Args:
            ord: Frobenius (None, the default, or "fro"), spectral (2), smallest singular value (-2) or nuclear ("nuc").
        """
        with drawn_alike(self.root):
            return self.root.norm(ord)

    def trace(self, per_layer: bool = False, estimator: OfProbes | None = None) -> Any:
        """The trace, exact unless it is estimated.

        Args:
            per_layer: Whether to return a dict of the traces of the diagonal blocks of the layers; by default not.
            estimator: For a matrix known by its products only, e.g. ``functools.partial(linalg.xtrace, products=60)``.

        Returns:
            A scalar, or the :class:`~nngeometry.linalg.Estimate` of the estimator, with its standard error.
        """
        arguments.flag("trace: per_layer", per_layer)
        if estimator is not None and per_layer:
            raise ValueError("trace: an estimator gives one number: use per_layer=True without it, or block(name)")
        if estimator is not None:
            return self._estimated(estimator)
        return self._per_layer(self.get_diag(), True) if per_layer else self.root.trace()

    def sample(self, generator: torch.Generator | None = None, k: int | None = None) -> Any:
        """A vector from the normal distribution with mean zero and covariance M.

        Args:
            generator: The source of randomness, on any device, by default torch's global one.
            k: If given, how many: a list of vectors, with one decomposition.

        Raises:
            ValueError: If M has negative eigenvalues.

        Example:
            >>> from nngeometry import FIM, PMatKFAC
            >>> F = FIM(torch.nn.Linear(4, 3), (torch.randn(20, 4),), PMatKFAC)
            >>> F.inv(0.1).sample(generator=torch.Generator().manual_seed(0)).size()  # from a Laplace posterior
            torch.Size([15])
        """
        arguments.generator(generator)
        count = 1 if k is None else arguments.integer("sample: k", k, least=0)
        with drawn_alike(self.root):
            noise = gaussian(count, self.size(0), like=self.like, generator=generator)
        drawn = [PVector(self.layer_collection, row) for row in (self.root.sample(noise) if count else noise)]
        return drawn[0] if k is None else drawn

    # Entries

    def get_diag(self, estimator: OfProbes | bool | None = None, split_weight_bias: bool = True) -> Any:
        """The diagonal ``(P,)``, in flat parameter order.

        Args:
            estimator: As in :meth:`trace`, e.g. ``linalg.xdiag``.
            split_weight_bias: If False, each bias stands behind the row of its weight, as in NNGeometry.
        """
        if isinstance(estimator, bool):
            return self.get_diag(split_weight_bias=estimator)
        diag = self.root.diag() if estimator is None else self._estimated(estimator)
        return diag if split_weight_bias else old_arguments.rows_first(self, diag)

    def to_torch(self, split_weight_bias: bool = True) -> Tensor:
        """The dense matrix ``(P, P)``.

        Args:
            split_weight_bias: As in :meth:`get_diag`.
        """
        entries = self.root.to_dense()
        return entries if split_weight_bias else old_arguments.rows_first(self, entries)

    def to_scipy(self) -> Any:
        """As a ``scipy.sparse.linalg.LinearOperator`` on numpy vectors, for ``eigsh``, ``cg``, ``lobpcg``, ..."""
        from scipy.sparse.linalg import LinearOperator

        def matmat(V: Any) -> Any:
            rows = torch.as_tensor(V, dtype=self.dtype, device=self.device).reshape(self.size(0), -1).T
            return self.root.mv(rows).T.detach().cpu().numpy().reshape(V.shape)

        dtype = torch.empty(0, dtype=self.dtype).numpy().dtype
        return LinearOperator(self.size(), matvec=matmat, rmatvec=matmat, matmat=matmat, rmatmat=matmat, dtype=dtype)

    def block(self, name: str) -> PMat:
        """The diagonal block of one layer, as a matrix on that layer alone.

        Args:
            name: The name of the layer.

        Raises:
            KeyError: If there is none of that name.
        """
        lc = LayerCollection({name: self.layer_collection.layer(name, "block")})
        root = self.root.restrict(self.layer_collection.slices()[name])
        return PMat(lc, data=root) if type(self) is PMat else type(self)._of_blocks(lc, root)

    def size(self, dim: int | None = None) -> Any:
        """Its shape, whatever is held in memory.

        Args:
            dim: The axis, None for both.

        Returns:
            ``(P, P)``, or P.
        """
        p = self.layer_collection.numel()
        return (p, p) if dim is None else p

    # Vector space

    def _combined(self, other: Any, weight: float) -> PMat:
        return self._with(add(self.root, self._other(other), weight)) if isinstance(other, PMat) else NotImplemented

    def _scaled(self, c: float) -> PMat:
        return self._with(self.root.scale(c))

    # Moving and keeping

    @property
    def dtype(self) -> torch.dtype:
        return self.root.dtype

    @property
    def device(self) -> torch.device:
        return self.root.device

    def nbytes(self) -> int:
        """Bytes held in tensors."""
        return self.root.nbytes()

    def to(self, device: torch.device | str | None = None, dtype: torch.dtype | None = None) -> Self:
        """The same matrix on another device or in another dtype.

        Args:
            device: Where to, by default where it is.
            dtype: In which dtype, by default its own.
        """
        arguments.device(device)
        arguments.dtype(dtype, real=True)
        return self._rebuild(self.root.map(lambda t: t.to(device=device, dtype=dtype)))

    def state(self) -> dict[str, Any]:
        """The matrix as tensors and plain values, for files that hold it beside other things, and
        :meth:`from_state`.
        """
        layers = [
            {
                "name": layer.name,
                "params": [[k, list(shape)] for k, shape in layer.params],
                "packing": layer.packing.state(),
                "kronecker": layer.kronecker,
            }
            for layer in self.layer_collection.layers.values()
        ]
        name = CLASSES.name_of(type(self))
        return {"format": FORMAT, "class": name, "layers": layers, "root": self.root.state()}

    @staticmethod
    def from_state(
        saved: Mapping[str, Any], unknown: str = "PMat.from_state", damaged: str = "PMat.from_state"
    ) -> PMat:
        """The matrix of which :meth:`state` gave these values.

        Args:
            saved: The values.
            unknown: How the error for a representation that is not imported begins.
            damaged: How the error for wrong values begins.

        Returns:
            The matrix.

        Raises:
            ValueError: If it is none, or of a representation that is not imported.
        """
        try:
            layers = {}
            for entry in saved["layers"]:
                packing = Packing.from_state(entry["packing"])
                params = tuple((k, tuple(size)) for k, size in entry["params"])
                layers[entry["name"]] = Layer(entry["name"], params, packing, entry["kronecker"])
            found: PMat = CLASSES.find(saved["class"])._of_blocks(
                LayerCollection(layers), Block.from_state(saved["root"])
            )
            check_whole(found.root, found.layer_collection)
        except Unknown as error:
            raise ValueError(f"{unknown}: {error}") from error
        except (AssertionError, AttributeError, IndexError, KeyError, RuntimeError, TypeError, ValueError) as error:
            reason = f"{type(error).__name__}: {str(error).strip().splitlines()[0] if str(error).strip() else ''}"
            raise ValueError(f"{damaged} ({reason}): save it again") from error
        return found

    def save(self, path: str | Path) -> None:
        """Write the matrix to a file that :meth:`load` and ``torch.load(path, weights_only=True)`` read.

        Args:
            path: The name of the file, or an open one.

        Raises:
            TypeError: For a matrix that is known by its products alone.
        """
        if not hasattr(path, "write"):
            arguments.path("save: path", path, "where to write the file")
        saved = self.state()
        if hasattr(path, "write"):
            torch.save(saved, path)
            return
        with open(path, "wb") as file:  # an error of a missing folder or a lack of permission names the path
            torch.save(saved, file)

    @staticmethod
    def load(path: str | Path, device: torch.device | str | None = None) -> PMat:
        """Read what :meth:`save` wrote. Only tensors and plain values are read, no code is run.

        Args:
            path: The name of the file.
            device: Where to, by default where it was.

        Raises:
            ValueError: If the file is cut short, changed, of a newer version or something else, or has a block or
                representation of yours whose module is not imported.
        """
        arguments.path("PMat.load: path", path, "of a file that save(path) wrote")
        arguments.device(device)
        saved = read(path, device)
        return PMat.from_state(
            saved, f"PMat.load: {path} cannot be read", f"PMat.load: the matrix in {path} is damaged"
        )

    def offload(self, folder: str | Path) -> Self:
        """The same matrix, decomposed, with what it holds on disk: for decompositions that do not fit memory.

        Blocks are decomposed one at a time, as :meth:`solve` needs them, and written to a file each, which is mapped
        into memory: the system reads what is in use and lets go of it. Where the program was stopped, the same call
        goes on with the blocks that are missing. The files have to stay while the matrix is used.

        Args:
            folder: Where the files are, ``0.block``, ``1.block``, ...; it is made if there is none.

        Returns:
            The matrix, whose blocks are decompositions. Let go of the one that it was made of.

        Raises:
            NotImplementedError: For a matrix that is known by its products alone, or on an accelerator.
            ValueError: If there are files of another matrix.
            OSError: If there is no room.

        Example:
            >>> import tempfile
            >>> from nngeometry import FIM, PMatKFAC, PVector
            >>> model = torch.nn.Linear(4, 3)
            >>> F, v = FIM(model, (torch.randn(20, 4),), PMatKFAC), PVector.from_model(model)
            >>> folder = tempfile.TemporaryDirectory()
            >>> bool(torch.allclose(F.offload(folder.name).vTMv(v), F.vTMv(v), rtol=1e-4))
            True
            >>> folder.cleanup()
        """
        return self._rebuild(offloaded(self.root, folder))

    def __getstate__(self) -> dict[str, Any]:
        held = {"_held": None, "_root": self.root}  # tensors that were read stay with the matrix that they were read of
        return {**vars(self), **held, "generator": None}  # a generator holds the model and user functions

    def _table(self) -> tuple[str, list[tuple[str, ...]]]:
        """What it is, and a row for each block, after the titles of columns."""
        title = f"{type(self).__name__} of {self.size(0)} parameters, {self.dtype}, {self.nbytes()} bytes"
        rows: list[tuple[str, ...]] = [("layer", "block", "parameters", "bytes")]
        parts = self.root.parts if isinstance(self.root, DirectSum) else ()
        slices = self.layer_collection.slices()
        for part in parts:
            names = [
                n or "(root)" for n, s in slices.items() if any(a <= s.start and s.stop <= b for a, b in part.slices)
            ]
            layer = names[0] if len(names) == 1 else f"{names[0]} ... {names[-1]} ({len(names)} layers)"
            rows.append((layer, part.block.describe(), str(part.block.numel), str(part.block.nbytes())))
        if not parts:
            rows.append(("all", self.root.describe(), str(self.size(0)), str(self.nbytes())))
        return title, rows

    def __repr__(self) -> str:
        title, rows = self._table()
        widths = [max(len(row[k]) for row in rows) for k in range(4)]
        lines = ["  " + "  ".join(cell.ljust(w) for cell, w in zip(row, widths, strict=True)).rstrip() for row in rows]
        return "\n".join([title, *lines])

    def _repr_html_(self) -> str:
        title, rows = self._table()
        return as_html(title, rows[0], rows[1:])

    # Helpers

    def _estimated(self, estimator: OfProbes) -> Any:
        if not callable(estimator):
            raise TypeError(
                f"estimator: expected a function such as linalg.hutchpp or functools.partial(linalg.xtrace, "
                f"products=60), got {arguments.described(estimator)}"
            )
        with drawn_alike(self.root):
            return estimator(self.matvec, self.size(0), like=self.like)

    def _of(self, v: Any) -> Tensor:
        """The flat values of a vector or map, checked to be of this space."""
        if not isinstance(v, FlatArray):
            raise TypeError(
                f"expected a PVector or a PFMapDense, got {arguments.described(v)}: make one with "
                "PVector(layer_collection, tensor)"
            )
        mine, theirs = self.layer_collection, v.layer_collection
        if len(theirs) > len(mine) and mine.layers.items() <= theirs.layers.items():
            v = v.on(mine)
        else:
            check_same_space(mine, theirs, arguments.name_of(v))
        flat = v.to_torch()
        self._check_like(v, flat)
        return flat

    def _check_like(self, v: FlatArray | PFMap | Tensor, flat: Tensor | None = None) -> None:
        values = v if flat is None else flat
        if values.device != self.device or values.dtype != self.dtype:
            raise ValueError(
                f"the {arguments.name_of(v)} is {values.dtype} on {values.device}, the matrix is {self.dtype} on "
                f"{self.device}: move one of them with .to(device, dtype)"
            )

    def _fitted(self, like: Any) -> PMat:
        """This matrix for operands of the dtype and device of another; itself, if it has a dtype and device."""
        return self

    def _other(self, other: PMat) -> Block:
        if not isinstance(other, PMat):
            raise TypeError(f"expected a matrix, a PMat, got {arguments.described(other)}")
        other = other._fitted(self)
        check_same_space(self.layer_collection, other.layer_collection, arguments.name_of(other))
        if other.device != self.device or other.dtype != self.dtype:
            raise ValueError(
                f"matrices of {self.dtype} on {self.device} and of {other.dtype} on {other.device}: move one of "
                "them with .to(device, dtype)"
            )
        return other.root

    def _regul(self, regul: RegulLike) -> Regul:
        if isinstance(regul, Mapping):
            missing = set(regul) ^ set(self.layer_collection)
            if missing:
                raise ValueError(
                    f"regul: give one value for each layer; {', '.join(sorted(map(str, missing)))} do not match the "
                    "collection"
                )
            traces = self.trace(per_layer=True) if any(isinstance(r, Relative) for r in regul.values()) else {}
            values = []
            for name, layer in self.layer_collection.layers.items():
                mean = float(traces[name]) / layer.numel() if isinstance(regul[name], Relative) else 1.0
                value = regul_number(f"regul of layer {name!r}", regul[name], mean)
                values.append(torch.full((layer.numel(),), value, dtype=self.dtype, device=self.device))
            return Varying(torch.cat(values))
        mean = float(self.trace()) / self.size(0) if isinstance(regul, Relative) else 1.0
        return Uniform(regul_number("regul", regul, mean))

    def _per_layer(self, flat: Tensor, per_layer: bool) -> Any:
        arguments.flag("per_layer", per_layer)
        if not per_layer:
            return flat.sum()
        return {name: flat[s].sum() for name, s in self.layer_collection.slices().items()}

    @classmethod
    def _of_blocks(cls, layer_collection: LayerCollection, root: Block) -> Any:
        made = cls.__new__(cls)
        PMat.__init__(made, layer_collection, data=root)
        return made

    def _rebuild(self, root: Block) -> Self:
        return type(self)._of_blocks(self.layer_collection, root)

    def _with(self, root: Block) -> PMat:
        """A result: of the same representation if its blocks have the same structure, otherwise a plain PMat."""
        same = _structure(root) == _structure(self.root)
        return self._rebuild(root) if same else PMat(self.layer_collection, data=root)


CLASSES.add(PMat)


def _structure(root: Block) -> list[type[Block]]:
    return [type(p.block) for p in root.parts] if isinstance(root, DirectSum) else [type(root)]
