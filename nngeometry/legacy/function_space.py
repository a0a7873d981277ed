"""Old names of maps and kernels."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from .. import arguments, gram
from .. import object as objects
from ..blocks import Dense, DirectSum, Part
from ..forms import Outer
from ..generator import Generator
from ..kinds import Packing
from ..layercollection import LayerCollection
from ..memory import require
from ..object import (
    FMat,
    FMatDense,
    FVector,
    PFMap,
    PFMapDense,
    PFMapFactored,
    PFMapImplicit,
    PMat,
    PMatDense,
    PVector,
    fspace,
)
from ..object import map as pfmap
from ..object.kernel_layouts import Full
from ..object.map import Adjoint
from ..object.vector import check_same_space
from .matrices import ORDER, check_impl, get_eigendecomposition
from .names import attach, renamed, warn
from .sources import DummyGenerator


def _of_generator(init: Callable[..., None], name: str, new: str) -> Callable[..., None]:
    """``X(generator, data, examples)``, and with the layer collection before it."""

    @functools.wraps(init)
    def __init__(self: Any, *args: Any, **kwargs: Any) -> None:
        of_source = any(a is None or isinstance(a, Generator | DummyGenerator) for a in args[:2])
        if "generator" not in kwargs and not of_source:
            init(self, *args, **kwargs)
            return
        warn(f"{name if type(self).__module__ != __name__ else type(self).__name__}(generator, ...)", new)
        names = ORDER if args and isinstance(args[0], LayerCollection) else ORDER[1:]
        given = {**dict(zip(names, args, strict=False)), **kwargs}
        source: Any = given.get("generator")
        value, examples = given.get("data"), given.get("examples")
        lc = given.get("layer_collection")
        if source is None and (value is None or lc is None):
            raise TypeError(f"{name}: there are no entries and no generator of them: use {new}")
        lc = source.layer_collection if lc is None else lc
        if value is not None:
            found = _kernel_of(value) if isinstance(self, FMat) else PFMapDense(lc, value)
        else:
            source = source.on(lc)
            examples = source.examples if examples is None else examples
            found = source.kernel(examples) if isinstance(self, FMat) else source.map(_REPRESENTATION[name], examples)
        vars(self).update(vars(found))

    return __init__


_REPRESENTATION: dict[str, Any] = {kind.__name__: kind for kind in (PFMapDense, PFMapFactored, PFMapImplicit)}


def _kernel_of(value: Tensor) -> FMatDense:
    """A kernel from its entries ``(C, n, C', n')``."""
    c, n, d, m = value.shape
    layout = Full((c, d), (n, m))
    symmetric = value.shape[:2] == value.shape[2:] and bool(torch.equal(value, value.permute(2, 3, 0, 1)))
    return FMatDense(fspace.dense_root(layout.unview(value), layout, symmetric), layout)


class PushForwardDense(PFMapDense):
    """Old name of ``PFMapDense``."""

    def mv(self, v: PVector) -> FVector:
        """``J v``."""
        return self.jvp(v)


class PushForwardImplicit(PFMapImplicit):
    """Old name of ``PFMapImplicit``."""

    def mv(self, v: PVector) -> FVector:
        """``J v``."""
        return self.jvp(v)


class PullBackDense(PFMapDense):
    """Old name of ``PFMapDense``, seen from the other side."""

    def mv(self, u: FVector) -> PVector:
        """``J^T u``."""
        return self.vjp(u)


def _from_dict(layer_collection: Any = None, generator: Any = None, data_dict: Any = None) -> PFMapDense:
    """A map from the tensors ``(C, n, *shape)`` of its layers; in 0.4 without the layer collection."""
    if isinstance(layer_collection, Generator):
        generator, layer_collection, data_dict = layer_collection, None, data_dict or generator
    lc = generator.layer_collection if layer_collection is None else layer_collection
    return PFMapDense(lc, torch.cat([t.flatten(2) for name in lc for t in data_dict[name]], -1))


def random_pfmap(
    layer_collection: LayerCollection, output_size: Any, device: Any = None, dtype: Any = None
) -> PFMapDense:
    """A dense map ``(*output_size, P)`` of independent standard normal entries."""
    return PFMapDense(layer_collection, torch.randn(*output_size, layer_collection.numel(), device=device, dtype=dtype))


def _contiguous(to_torch: Callable[[FMat], Tensor]) -> Callable[[FMat], Tensor]:
    """Entries that ``view`` takes, as those of NNGeometry."""

    @functools.wraps(to_torch)
    def contiguous(self: FMat) -> Tensor:
        return to_torch(self).contiguous()

    return contiguous


def _with_dim(size: Callable[[FMat], Any]) -> Callable[..., Any]:
    """``size(dim)``."""

    @functools.wraps(size)
    def of_dim(self: FMat, dim: int | None = None) -> Any:
        return size(self) if dim is None else size(self)[dim]

    return of_dim


def _compute_eigendecomposition_of_kernel(self: FMat, impl: str = "eigh") -> None:
    """Store ``evals`` and ``evecs``, in the order of ``to_torch().flatten()``.

    :meta private:
    """
    check_impl(impl)
    warn("compute_eigendecomposition()", "eig()")
    vars(self)["evals"], vars(self)["evecs"] = torch.linalg.eigh(self.to_torch().flatten(2).flatten(0, 1))


def _kernel_solve(solve: Callable[..., Any]) -> Callable[..., Any]:
    """``solve(u, regul, solve=)``."""

    @functools.wraps(solve)
    def with_impl(self: FMat, b: Any = None, regul: Any = 1e-8, impl: str | None = None, **options: Any) -> Any:
        b = options.pop("x", b)
        chosen = options.pop("solve", None) if impl is None else impl
        if chosen is not None:
            warn("solve(b, regul, solve=...)", "solve(b, regul), which is exact")
            if chosen not in ("default", "solve"):
                raise NotImplementedError(f"{type(self).__name__}.solve: solve={chosen!r} is not 'default' or 'solve'")
        return solve(self, b, regul, **options)

    return with_impl


def _to_eigenvectors(self: FMat, v: FVector) -> Tensor:
    """A vector in the eigenvectors of :meth:`compute_eigendecomposition`.

    :meta private:
    """
    return vars(self)["evecs"].T @ v.to_torch().flatten()


def _from_eigenvectors(self: FMat, v: Tensor) -> FVector:
    """The inverse of :meth:`project_to_diag`.

    :meta private:
    """
    return FVector((vars(self)["evecs"] @ v).view(*self.size()[:2]))


def _gram_matrix(matrix: Callable[..., Any]) -> Callable[..., Any]:
    """``GramMatrix(model, loader, function, representation, layer_collection)``."""

    @arguments.called_as
    @functools.wraps(matrix)
    def with_positions(model: nn.Module, loader: Any, *args: Any, **kwargs: Any) -> Any:
        if args and callable(args[0]):
            names = ("function", "representation", "layer_collection")
            warn("GramMatrix(model, loader, function)", "function=; what follows the loader is loader2")
            return matrix(model, loader, **dict(zip(names, args, strict=False)), **kwargs)
        return matrix(model, loader, *args, **kwargs)

    return with_positions


def _from_the_left(self: PFMap, other: Any) -> Any:
    """``u @ J``, and ``J.T @ J``, a dense matrix."""
    if isinstance(other, FVector):
        return self.vjp(other)
    if not isinstance(other, Adjoint):
        arguments.refuse("@", other, self, self._remedy)
    left, p = other.map, self.layer_collection.numel()
    check_same_space(self.layer_collection, left.layer_collection, arguments.name_of(left))
    require(
        p * p * self.dtype.itemsize,
        f"the dense matrix {left}.T @ {self}",
        "use FIM or GradientSecondMoment",
        self.device,
    )
    rows = self.to_dense().to_torch().flatten(0, 1)
    entries = rows.T @ rows if left is self else left.to_dense().to_torch().flatten(0, 1).T @ rows
    block = Dense(entries, is_symmetric=left is self)
    return PMatDense(self.layer_collection, data=DirectSum((Part(((0, p),), Packing.flat(p), block),)))


def _adjoint_from_the_left(self: Adjoint, other: Any) -> Any:
    """``M @ J.T`` and ``v @ J.T``."""
    if isinstance(other, PVector):
        return self.map.jvp(other)
    if isinstance(other, PMat) and other.root.symmetric:
        return Adjoint(other.mv(self.map))
    return arguments.refuse("@", other, self, self._remedy)


def _kernel_from_the_left(self: FMat, other: Any) -> FVector:
    """``u @ K``."""
    if not isinstance(other, FVector):
        arguments.refuse("@", other, self, self._remedy)
    return self.T @ other


def _kernel_power(self: FMat, exponent: int) -> FMatDense:
    """``K ** n`` for an integer."""
    arguments.integer("**: the exponent of a kernel", exponent, least=-(2**31))
    entries = self.to_torch()
    power = torch.linalg.matrix_power(entries.flatten(2).flatten(0, 1), exponent)
    return _kernel_of((power + power.T).view_as(entries) / 2 if self.root.symmetric else power.view_as(entries))


def _factors(self: PFMapFactored) -> dict[str, tuple[Tensor, Tensor]]:
    """``{layer_id: (a, g)}``, inputs ``(n, T, cols)`` and output gradients ``(C, n, T, rows)``."""
    found = {}
    for name, layer in self.layer_collection.layers.items():
        each: list[Any] = [piece.forms[name] for piece in self.pieces]
        if not all(isinstance(f, Outer) and f.shape[0] == 1 and f.positions == each[0].positions for f in each):
            raise AttributeError(
                f"PFMapFactored.data: layer {name!r} ({layer.kind_name}) has no two factors: use layer()"
            )
        found[name] = torch.cat([f.a[:, :, 0] for f in each]), torch.cat([f.g[:, :, :, 0] for f in each], 1)
    return found


def install() -> None:
    """Attach the old names and arguments of maps and kernels."""
    for name, kind in _REPRESENTATION.items():
        attach(kind, __init__=_of_generator(kind.__init__, name, "Jacobian(model, loader)"))
    attach(FMatDense, __init__=_of_generator(FMatDense.__init__, "FMatDense", "GramMatrix(model, loader)"))
    dense = renamed("get_dense_tensor()", "to_torch()", lambda self: self.to_torch())
    attach(
        PFMap,
        generator=None,
        size=lambda self, dim=None: self.shape if dim is None else self.shape[dim],
        to_torch=lambda self: self.to_dense().to_torch(),
        get_dense_tensor=dense,
        to_torch_layer=lambda self, name: self.to_dense().to_dict()[name],
        iter_by_module=lambda self: iter(self.to_dense().to_dict().items()),
        iter_by_layer=lambda self: (
            (name, self.layer_collection[name], values) for name, values in self.to_dense().to_dict().items()
        ),
        from_dict=staticmethod(_from_dict),
    )
    attach(PFMapDense, data=property(lambda self: self.to_torch(), lambda self, value: setattr(self, "_flat", value)))
    attach(PFMapFactored, data=property(_factors))
    attach(PFMap, __rmatmul__=_from_the_left)
    attach(Adjoint, __rmatmul__=_adjoint_from_the_left)
    attach(
        FMat,
        __pow__=_kernel_power,
        __rmatmul__=_kernel_from_the_left,
        generator=None,
        data=property(lambda self: self.to_torch(), lambda self, value: vars(self).update(vars(_kernel_of(value)))),
        to_torch=_contiguous(FMat.to_torch),
        size=_with_dim(FMat.size),
        solve=_kernel_solve(FMat.solve),
        adjoint=lambda self: self.T,
        get_dense_tensor=dense,
        frobenius_norm=renamed("frobenius_norm()", "norm()", lambda self: self.norm()),
        mm=renamed("mm(other)", "K @ other", lambda self, other: self @ other),
        mTMm=renamed("mTMm(other)", "other.T @ K @ other", lambda self, other: other.T @ (self @ other)),
        solveFVec=renamed("solveFVec", "solve", lambda self, *args, **kw: self.solve(*args, **kw)),
        solveFMat=renamed("solveFMat", "solve", lambda self, *args, **kw: self.solve(*args, **kw)),
        compute_eigendecomposition=_compute_eigendecomposition_of_kernel,
        get_eigendecomposition=get_eigendecomposition,
        project_to_diag=_to_eigenvectors,
        project_from_diag=_from_eigenvectors,
    )
    attach(fspace, FMatAbstract=FMat)
    maps = {cls.__name__: cls for cls in (PushForwardDense, PushForwardImplicit, PullBackDense)}
    bases = {"AbstractPushForward": PFMap, "PullBackAbstract": PFMap, "PFMapAdjoint": Adjoint}
    attach(pfmap, random_pfmap=random_pfmap, **bases, **maps)
    attach(objects, **maps)
    attach(gram, GramMatrix=_gram_matrix(gram.GramMatrix))
