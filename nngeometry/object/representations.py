"""The representations: which structure each layer, or all of them together, is given."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from itertools import accumulate
from typing import Any

import torch

from .. import arguments, blocks
from ..blocks import Block
from ..blocks.operator import drawn_alike
from ..changes import no_grad
from ..estimation import Estimation, Estimator, OfJacobians, Source
from ..kinds import Packing
from ..layercollection import Layer, LayerCollection
from ..linalg import LowRank, eigsh, nystrom, randomised_eigh
from ..passes import update
from ..reading import reading
from . import estimators, old_arguments, tensors
from .map import PFMap, PFMapDense
from .mixture import Mixture, joined
from .pmat import PMat, RegulLike
from .vector import PVector


class PMatDense(PMat):
    """All P x P entries: exact, in memory for P**2 numbers.

    Example:
        >>> from nngeometry import FIM
        >>> FIM(torch.nn.Linear(4, 3), (torch.randn(20, 4),), PMatDense).to_torch().shape
        torch.Size([15, 15])
    """

    _tensors = tensors.DENSE

    @classmethod
    def plan(cls, layers: Sequence[Layer]) -> list[Estimator]:
        return [estimators.dense(layers)]

    @classmethod
    def project(cls, operator: Block, layers: Sequence[Layer]) -> Block:
        return _direct([blocks.Dense(estimators.principal(operator, 0, operator.numel))])


class PMatBlockDiag(PMat):
    """One dense block for each layer: exact inside of layers, in memory for the sum of the squared sizes.

    Example:
        >>> from nngeometry import FIM
        >>> model = torch.nn.Sequential(torch.nn.Linear(4, 5), torch.nn.Tanh(), torch.nn.Linear(5, 3))
        >>> FIM(model, (torch.randn(20, 4),), PMatBlockDiag).block("2").size()
        (18, 18)
    """

    _tensors = tensors.BLOCKS

    @classmethod
    def plan(cls, layers: Sequence[Layer]) -> list[Estimator]:
        return [estimators.dense([layer]) for layer in layers]

    @classmethod
    def project(cls, operator: Block, layers: Sequence[Layer]) -> Block:
        ends = list(accumulate(layer.numel() for layer in layers))
        starts = [0, *ends[:-1]]
        return _direct([blocks.Dense(estimators.principal(operator, a, b)) for a, b in zip(starts, ends, strict=True)])


class PMatDiag(PMat):
    """The diagonal, in memory for P numbers.

    Example:
        >>> from nngeometry import FIM
        >>> FIM(torch.nn.Linear(4, 3), (torch.randn(20, 4),), PMatDiag).get_diag().shape
        torch.Size([15])
    """

    _tensors = tensors.DIAG

    @classmethod
    def plan(cls, layers: Sequence[Layer]) -> list[Estimator]:
        return [estimators.diag(layer) for layer in layers]

    @classmethod
    def project(cls, operator: Block, layers: Sequence[Layer]) -> Block:
        pieces = estimators.diagonal(operator).split([layer.numel() for layer in layers])
        return _direct([blocks.Diag(piece) for piece in pieces])


class PMatQuasiDiag(PMat):
    """The diagonal, and the products of each weight with the bias of its row, in memory for 2 P numbers.

    Since it has only a part of the entries of a positive matrix, it may be indefinite: sample, logdet and roots then
    raise.

    Example:
        >>> from nngeometry import FIM
        >>> F = FIM(torch.nn.Linear(4, 3), (torch.randn(20, 4),), PMatQuasiDiag)
        >>> F.inv(1e-2).size()
        (15, 15)

    Source:
        Ollivier (2015), 1303.0818.
    """

    _tensors = tensors.QUASIDIAG

    @classmethod
    def plan(cls, layers: Sequence[Layer]) -> list[Estimator]:
        return [estimators.quasidiag(layer) for layer in layers]


class PMatKFAC(PMat):
    """A Kronecker product ``G (x) A`` for each layer, weight and bias together.

    The groups of a convolution have a product each. A of few inputs, fewer than half of its columns, is held by these.
    A weight that is looked up and multiplied with, as the embedding of a language model is that is its head too, has
    the product that is nearest to the sum of those of its uses, whose factor over the vocabulary is diagonal; ``repr``
    says so. What the uses have in common is in the exact representations, and in the diagonal of :class:`PMatEKFAC`.
    A layer without Kronecker form (normalisation, attention, bare parameters, ...) has its exact dense block, if it
    fits the memory budget, and otherwise a Kronecker product over the axes of each parameter, of the moments of its
    exact Jacobian along them; ``repr`` shows which, the latter as "approximate: axes".

    Args:
        sharing: How positions (tokens, pixels) that share a weight are treated, "expand" (the default) or "reduce".
        dense: Whether layers without Kronecker form must have their exact block: True for all, or selectors of layers
            (as of :meth:`LayerCollection.select`) for some. By default where it fits.

    Raises:
        MemoryError: If the block of one that must does not fit the memory budget.

    Example:
        >>> from nngeometry import FIM
        >>> model = torch.nn.Sequential(torch.nn.Conv2d(1, 2, 3), torch.nn.Flatten(), torch.nn.Linear(8, 3))
        >>> FIM(model, (torch.randn(20, 1, 4, 4),), PMatKFAC, sharing="reduce")
        PMatKFAC of 47 parameters, torch.float32, 776 bytes
          layer  block               parameters  bytes
          0      Kron(Dense, Dense)  20          416
          2      Kron(Dense, Dense)  27          360

    Source:
        Martens and Grosse (2015), 1503.05671; Eschenhagen et al. (2023), 2311.00636, for sharing.
    """

    _tensors = tensors.KFAC

    @classmethod
    def plan(cls, layers: Sequence[Layer], sharing: str = "expand", dense: Any = False) -> list[Estimator]:
        reduce, exact = _reduce(sharing), _exact(layers, dense)
        return [
            estimators.kron(layer, reduce) if layer.kronecker else _unfactored(layer, cls, exact) for layer in layers
        ]

    def inv(self, regul: RegulLike = 1e-8, use_pi: bool | None = None) -> PMat:
        """``(M + regul)^-1`` as a matrix.

        Args:
            regul: As in :meth:`solve`.
            use_pi: If given, the factors are damped one by one instead, as in NNGeometry.
        """
        inverse: PMat = super().inv(regul) if use_pi is None else old_arguments.factored(self, regul, use_pi)
        return inverse


class PMatEKFAC(PMat):
    """The eigenbasis of KFAC with the exact second moments in it. It reads the data twice.

    Args:
        sharing: As in :class:`PMatKFAC`, for the basis.
        dense: As in :class:`PMatKFAC`.

    Example:
        >>> from nngeometry import FIM, PMatDense
        >>> model, x = torch.nn.Linear(4, 3), torch.randn(20, 4)
        >>> exact, F = FIM(model, (x,), PMatDense), FIM(model, (x,), PMatEKFAC)
        >>> torch.allclose(F.trace(), exact.trace(), rtol=1e-4)
        True

    Source:
        George et al. (2018), 1806.03884.
    """

    _tensors = tensors.EKFAC

    @classmethod
    def plan(cls, layers: Sequence[Layer], sharing: str = "expand", dense: Any = False) -> list[Estimator]:
        reduce, exact = _reduce(sharing), _exact(layers, dense)
        return [
            estimators.ekfac(layer, reduce) if cls.factored(layer) else _unfactored(layer, cls, exact)
            for layer in layers
        ]

    @classmethod
    def factored(cls, layer: Layer) -> bool:
        """Whether a layer has a Kronecker-factored basis; otherwise it has its exact block.

        Args:
            layer: The layer.
        """
        return layer.kronecker

    def update_diag(self, examples: Any = None, process_group: Any = None) -> PMatEKFAC:
        """Estimate the second moments again in the same basis, in place, e.g. after the parameters moved.

        A basis of fewer inputs than the layer has columns does not span them: what is outside has one eigenvalue, its
        mean second moment.

        Args:
            examples: A loader, or one minibatch, by default that of the estimation if it was a DataLoader.
            process_group: Of ``torch.distributed``, if they are one rank's part; by default this process has all.

        Returns:
            The matrix itself.

        Raises:
            ValueError: If it was loaded or derived, so that it has no generator.
        """
        if not hasattr(self.generator, "jacobians"):  # a source
            raise ValueError("update_diag: the matrix was loaded or derived, it has no generator to estimate with")
        examples = old_arguments.loader_of(self.generator, "update_diag") if examples is None else examples
        examples = reading(examples, process_group, what=("update_diag",))
        layers = list(self.layer_collection.layers.values())
        old = self.root.parts  # type: ignore[attr-defined]
        again = OfJacobians(
            self.generator,
            [
                estimators.second_moments(layer, part.block.basis, elsewhere=True)
                if self.factored(layer)
                else estimators.block_or_axes(layer)
                for layer, part in zip(layers, old, strict=True)
            ],
        )
        update(again, examples, last=True)
        self.root = again.root(last=True)
        return self


class PMatLowRank(PMat):
    """The Jacobian itself, ``M = J^T J / n``: exact, in memory for C n P numbers, for few examples.

    Of a Hessian, which has none, it has the eigenpairs of largest magnitude. Of any matrix, :meth:`nystrom` and
    :meth:`randomised` make an approximation from products with random vectors.

    As the preconditioner of a ``solve`` with A it solves the directions that it holds and divides the others by regul.
    That leaves a condition number of about ``1 + norm(A - M, 2) / regul``, whatever the large eigenvalues of A are.
    (Frangella, Tropp, Udell 2021, 2110.02820, take the smallest eigenvalue held for the others instead, as
    :func:`nngeometry.linalg.nystrom_preconditioner` does, to much the same effect.)

    Args:
        rows: How many rows of the Jacobian are kept at least, by default all. Whenever there are more than twice as
            many, they are replaced by the ``rows`` that are nearest to them in least squares (a truncated singular
            value decomposition): an approximation from below.
        rank: Of a Hessian, how many eigenpairs, by default 10.

    Example:
        >>> from nngeometry import FIM
        >>> F = FIM(torch.nn.Linear(40, 3), (torch.randn(10, 40),), PMatLowRank)
        >>> F.size(), F.eig()[0].shape
        ((123, 123), torch.Size([20]))
    """

    _tensors = tensors.LOWRANK

    @classmethod
    def plan(cls, layers: Sequence[Layer], rows: int | None = None) -> list[Estimator]:
        if rows is not None:
            arguments.integer("PMatLowRank: rows", rows, least=1)
        return [estimators.lowrank(layers, rows)]

    @classmethod
    def estimation(cls, source: Source, **options: Any) -> Estimation:
        if not source.jacobians:
            raise NotImplementedError(
                f"{cls.__name__}: the eigenpairs of a Hessian have no running average: use PMatDense, PMatBlockDiag or "
                "PMatDiag, whose entries have one, or GGN instead of Hessian"
            )
        return super().estimation(source, **options)

    @classmethod
    def project(cls, operator: Block, layers: Sequence[Layer], rank: int = 10) -> Block:
        """The eigenpairs of largest magnitude of a matrix that is known by its products.

        Args:
            operator: The matrix.
            layers: The layers, in flat order.
            rank: How many, by default 10.
        """
        arguments.integer("PMatLowRank: rank", rank, least=1)
        like = torch.empty(0, dtype=operator.dtype, device=operator.device)
        with drawn_alike(operator):
            pairs = eigsh(operator.mv, operator.numel, rank, which="magnitude", like=like)
        return _direct([blocks.LowRank(pairs.vectors, pairs.values)])

    @classmethod
    def nystrom(
        cls,
        matrix: PMat,
        rank: int,
        *,
        oversampling: int = 10,
        iterations: int = 0,
        generator: torch.Generator | None = None,
    ) -> PMatLowRank:
        """The Nystrom approximation of a positive semidefinite matrix, from ``rank + oversampling`` products.

        Args:
            matrix: The matrix, in any representation.
            rank: The rank of the result.
            oversampling: How many rows the sketch has beyond that, by default 10.
            iterations: How often the sketch is multiplied with the matrix first, by default 0.
            generator: The source of randomness, by default torch's global one.

        Raises:
            ValueError: If the matrix is not symmetric, or is seen not to be positive semidefinite.

        Example:
            >>> from nngeometry import GGN, PMatImplicit, PVector
            >>> model = torch.nn.Linear(20, 3)
            >>> G = GGN(model, (torch.randn(50, 20), torch.randint(3, (50,))), PMatImplicit)
            >>> near = PMatLowRank.nystrom(G, 20)
            >>> x = G.solve(PVector.from_model(model).detach(), 1e-2, preconditioner=near)

        Source:
            Tropp, Yurtsever, Udell, Cevher (2017), 1706.05736.
        """
        return cls._sketched(nystrom, matrix, rank, oversampling, iterations, generator)

    @classmethod
    def randomised(
        cls,
        matrix: PMat,
        rank: int,
        *,
        oversampling: int = 10,
        iterations: int = 1,
        generator: torch.Generator | None = None,
    ) -> PMatLowRank:
        """About the ``rank`` eigenpairs of largest magnitude of a symmetric matrix, by
        ``(iterations + 2) (rank + oversampling)`` products.

        Args:
            matrix: The matrix, in any representation.
            rank: How many.
            oversampling: How many rows the sketch has beyond that, by default 10.
            iterations: How often the sketch is multiplied with the matrix beyond once, by default 1.
            generator: The source of randomness, by default torch's global one.

        Raises:
            ValueError: If the matrix is not symmetric.

        Example:
            >>> from nngeometry import Hessian, PMatImplicit
            >>> model = torch.nn.Sequential(torch.nn.Linear(4, 5), torch.nn.Tanh(), torch.nn.Linear(5, 3))
            >>> H = Hessian(model, (torch.randn(20, 4), torch.randint(3, (20,))), PMatImplicit)
            >>> PMatLowRank.randomised(H, 7).eig()[0].shape
            torch.Size([7])

        Source:
            Halko, Martinsson, Tropp (2011), 0909.4061.
        """
        return cls._sketched(randomised_eigh, matrix, rank, oversampling, iterations, generator)

    @classmethod
    def _sketched(
        cls,
        algorithm: Callable[..., LowRank],
        matrix: PMat,
        rank: int,
        oversampling: int,
        iterations: int,
        generator: torch.Generator | None,
    ) -> PMatLowRank:
        if not matrix.symmetric:
            raise ValueError(f"{cls.__name__}: the matrix is not symmetric, as a product of two matrices need not be")
        with no_grad(), drawn_alike(matrix.root):
            near = algorithm(
                matrix.matvec,
                matrix.size(0),
                rank,
                oversampling=oversampling,
                iterations=iterations,
                probes=0,
                generator=generator,
                like=matrix.like,
            )
        return cls(matrix.layer_collection, data=_direct([blocks.LowRank(near.vectors, near.values)]))


class PMatMixed(Mixture, PMat):
    """A representation for each layer, all in one pass.

    Layers that share a joint representation (PMatDense, PMatLowRank) keep their cross terms.

    Args:
        default: For the layers that no rule selects, by default PMatDiag.
        rules: From a layer name, module type or predicate to a representation; the first that selects a layer counts.
        default_representation: ``default`` in NNGeometry's words.
        map_layers_to: ``rules`` in NNGeometry's words, which may select nothing.
        sub_pmats: Matrices that it is put together of.
        layer_map: Which layers have which of these.

    Raises:
        KeyError: For a rule that selects no layer.

    Example:
        >>> from nngeometry import FIM
        >>> model = torch.nn.Sequential(torch.nn.Linear(4, 5), torch.nn.LayerNorm(5), torch.nn.Linear(5, 3))
        >>> mixed = PMatMixed.of(PMatKFAC, {torch.nn.LayerNorm: PMatBlockDiag})
        >>> FIM(model, (torch.randn(20, 4),), mixed).size()
        (53, 53)
    """

    def __init__(
        self,
        layer_collection: Any = None,
        generator: Any = None,
        data: Any = None,
        examples: Any = None,
        sub_pmats: Mapping[Any, PMat] | None = None,
        *,
        layer_map: Mapping[str, Any] | None = None,
        layer_collection_each: Any = None,
        **options: Any,
    ) -> None:
        if sub_pmats is not None:  # (layer_collection, generator, layer_collection_each, layer_map, sub_pmats)
            layer_map = examples if layer_map is None else layer_map
            data, examples = joined(layer_collection, sub_pmats.values()), None
        super().__init__(layer_collection, generator, data, examples, **options)
        if layer_map is None:
            chosen = _chosen(list(self.layer_collection.layers.values()), **options)
            layer_map = {layer.name: representation for layer, representation in chosen}
        self._layer_map = dict(layer_map)

    @classmethod
    @arguments.called_as
    def of(cls, default: Any, rules: Mapping[Any, Any]) -> Any:
        """The mixed representation as one object, to pass wherever a representation is expected.

        Args:
            default: For the layers that no rule selects.
            rules: From a layer name, module type or predicate to a representation.
        """
        _check_rules(default, rules)
        return partial(cls, default=default, rules=rules)

    @classmethod
    def plan(
        cls,
        layers: Sequence[Layer],
        default: Any = PMatDiag,
        rules: Mapping[Any, Any] | None = None,
        default_representation: Any = None,
        map_layers_to: Mapping[Any, Any] | None = None,
    ) -> list[Estimator]:
        _check_rules(default, rules or {})
        if map_layers_to is not None:
            _check_rules(default_representation or default, map_layers_to)
        for selector in rules or {}:
            if not any(layer.matches(selector) for layer in layers):
                raise KeyError(
                    f"PMatMixed: the rule for {selector!r} selects no layer of "
                    f"{', '.join(layer.name for layer in layers)}"
                )
        chosen: list[tuple[Any, list[Layer]]] = []
        for layer, representation in _chosen(layers, default, rules, default_representation, map_layers_to):
            group = next((group for r, group in chosen if r is representation), None)
            if group is None:
                chosen.append((representation, [layer]))
            else:
                group.append(layer)
        planned: list[Estimator] = []
        for representation, group in chosen:
            if isinstance(representation, partial):
                planned += representation.func.plan(group, **representation.keywords)  # type: ignore[attr-defined]
            else:
                planned += representation.plan(group)
        return planned


def _check_rules(default: Any, rules: Any) -> None:
    """Raise ``TypeError`` unless each layer's representation is one."""
    arguments.instance("PMatMixed: rules", rules, Mapping, "pass {selector: representation}")
    for name, value in (("default", default), *((f"the rule for {k!r}", r) for k, r in rules.items())):
        of = value.func if isinstance(value, partial) else value
        if not (isinstance(of, type) and issubclass(of, PMat)):
            raise TypeError(
                f"PMatMixed: {name}: expected a PMat class, e.g. PMatKFAC, or a partial of one, got "
                f"{arguments.described(of)}" + (": pass the class" if isinstance(of, PMat) else "")
            )


def _chosen(
    layers: Sequence[Layer],
    default: Any = PMatDiag,
    rules: Mapping[Any, Any] | None = None,
    default_representation: Any = None,
    map_layers_to: Mapping[Any, Any] | None = None,
    **others: Any,
) -> list[tuple[Layer, Any]]:
    """The representation of each layer."""
    default = default if default_representation is None else default_representation
    mapping = {**(rules or {}), **(map_layers_to or {})}
    return [(layer, next((r for key, r in mapping.items() if layer.matches(key)), default)) for layer in layers]


class PMatEye(PMat):
    """A multiple of the identity. Estimated from data, it is the one with the trace of the matrix.

    Args:
        layer_collection: The coordinates.
        scaling: The multiple, by default 1.
        dtype: Its dtype. If neither that nor device is given, it takes vectors and matrices of any.
        device: Where it is.

    Example:
        >>> lc = LayerCollection.from_model(torch.nn.Linear(2, 1))
        >>> PMatEye(lc, scaling=2.0).trace()
        tensor(6.)
    """

    _free: float | None = None  # the scaling, of one that has no dtype and device of its own

    def __init__(
        self,
        layer_collection: Any = None,
        generator: Any = None,
        data: blocks.Block | None = None,
        examples: Any = None,
        scaling: float | torch.Tensor = 1.0,
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
    ) -> None:
        if isinstance(generator, torch.Tensor | float | int):  # PMatEye(layer_collection, scaling)
            generator, scaling = None, generator
        if isinstance(scaling, torch.Tensor):
            plain = scaling.dtype == torch.get_default_dtype() and scaling.device == torch.empty(0).device
            dtype, device = (dtype, device) if plain else (scaling.dtype, scaling.device)
            scaling = arguments.number("PMatEye: scaling", scaling)
        if data is None and examples is None:
            arguments.instance(
                "layer_collection", layer_collection, LayerCollection, "LayerCollection.from_model(model)"
            )
            scaling = arguments.number("PMatEye: scaling", scaling)
            arguments.device(device)
            arguments.dtype(dtype, real=True)
            p = layer_collection.numel()
            eye = blocks.Eye(torch.tensor(scaling, dtype=dtype or torch.get_default_dtype(), device=device), (p,))
            data = blocks.DirectSum((blocks.Part(((0, p),), Packing.flat(p), eye),))
            if dtype is None and device is None:
                self._free = scaling
        super().__init__(layer_collection, generator, data, examples)

    @classmethod
    def plan(cls, layers: Sequence[Layer]) -> list[Estimator]:
        return [estimators.eye(layers)]

    def _fitted(self, like: Any) -> PMatEye:
        if (
            self._free is None
            or not isinstance(like, PMat | PFMap | PVector | torch.Tensor)
            or (like.dtype == self.dtype and like.device == self.device)
        ):
            return self
        return PMatEye(self.layer_collection, scaling=self._free, dtype=like.dtype, device=like.device)

    def mv(self, v: Any) -> Any:
        return super(PMatEye, self._fitted(v)).mv(v)

    def vTMv(self, v: PVector, per_layer: bool = False) -> Any:
        return super(PMatEye, self._fitted(v)).vTMv(v, per_layer)

    def mapTMmap(self, pfmap: PFMapDense, reduction: str = "sum") -> torch.Tensor:
        return super(PMatEye, self._fitted(pfmap)).mapTMmap(pfmap, reduction)

    def solve(self, b: Any = None, regul: RegulLike = 1e-8, impl: Any = None, **options: Any) -> Any:
        """As :meth:`PMat.solve`.

        Args:
            **options: The keywords of that.
        """
        return super(PMatEye, self._fitted(b)).solve(b, regul, impl, **options)

    def inv(self, regul: RegulLike = 1e-8) -> PMat:
        if self._free is None or not isinstance(regul, int | float) or self._free + regul == 0:
            return super().inv(regul)
        return PMatEye(self.layer_collection, scaling=1 / (self._free + regul))

    def _combined(self, other: Any, weight: float) -> PMat:
        mine = self._fitted(other) if isinstance(other, PMat) else self
        return super(PMatEye, mine)._combined(other, weight)

    def _scaled(self, c: float) -> PMat:
        return super()._scaled(c) if self._free is None else PMatEye(self.layer_collection, scaling=c * self._free)

    def __matmul__(self, other: Any) -> Any:
        mine = self._fitted(other) if isinstance(other, PMat) else self
        return super(PMatEye, mine).__matmul__(other)


def _dense(layer_collection: LayerCollection, entries: torch.Tensor, symmetric: bool) -> PMatDense:
    return PMatDense(layer_collection, data=_direct([blocks.Dense(entries, is_symmetric=symmetric)]))


PFMap._dense_matrix = staticmethod(_dense)  # a matrix is made of maps, so that these do not know it


def _direct(side_by_side: Sequence[Block]) -> blocks.DirectSum:
    """Blocks on flat parameters, side by side."""
    parts, start = [], 0
    for block in side_by_side:
        parts.append(blocks.Part(((start, start + block.numel),), Packing.flat(block.numel), block))
        start += block.numel
    return blocks.DirectSum(tuple(parts))


def _exact(layers: Sequence[Layer], dense: Any) -> set[str]:
    """The names of the layers that must have their exact block."""
    if isinstance(dense, bool):
        return {layer.name for layer in layers} if dense else set()
    selectors = [dense] if isinstance(dense, str | type) or callable(dense) else list(dense)
    return set(LayerCollection({layer.name: layer for layer in layers}).select(*selectors).layers)


def _unfactored(layer: Layer, representation: type[PMat], exact: set[str]) -> Estimator:
    """How a layer without Kronecker form is estimated."""
    if layer.name in exact:
        return estimators.exact_block(layer, representation.__name__)
    return estimators.block_or_axes(layer)


def _reduce(sharing: str) -> bool:
    if sharing not in ("expand", "reduce"):
        raise ValueError(f"sharing={sharing!r} is not 'expand' or 'reduce'")
    return sharing == "reduce"
