"""Old names of maps and kernels."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .. import object as objects
from ..blocks import Dense, Direct, Part
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
from ..object.fspace import kernel_of
from ..object.map import Adjoint
from ..object.vector import check_same_space
from ..spelling import renamed, warn
from .matrices import check_impl, get_eigendecomposition
from .names import attach


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


def _compute_eigendecomposition_of_kernel(self: FMat, impl: str = "eigh") -> None:
    """Store ``evals`` and ``evecs``, in the order of ``to_torch().flatten()``.

    :meta private:
    """
    check_impl(impl)
    warn("compute_eigendecomposition()", "eig()")
    vars(self)["evals"], vars(self)["evecs"] = torch.linalg.eigh(self.to_torch().flatten(2).flatten(0, 1))


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


def _from_the_left(self: PFMap, other: Any) -> Any:
    """``u @ J``, and ``J.T @ J``, a dense matrix."""
    if isinstance(other, FVector):
        return self.vjp(other)
    if not isinstance(other, Adjoint):
        return NotImplemented
    left, p = other.map, self.layer_collection.numel()
    check_same_space(self.layer_collection, left.layer_collection, type(left).__name__)
    require(
        p * p * self.dtype.itemsize,
        f"the dense matrix {left}.T @ {self}",
        "use FIM or GradientSecondMoment",
        self.device,
    )
    rows = self.to_dense().to_torch().flatten(0, 1)
    entries = rows.T @ rows if left is self else left.to_dense().to_torch().flatten(0, 1).T @ rows
    block = Dense(entries, is_symmetric=left is self)
    return PMatDense(self.layer_collection, data=Direct((Part(((0, p),), Packing.flat(p), block),)))


def _adjoint_from_the_left(self: Adjoint, other: Any) -> Any:
    """``M @ J.T`` and ``v @ J.T``."""
    if isinstance(other, PVector):
        return self.map.jvp(other)
    return Adjoint(other.mv(self.map)) if isinstance(other, PMat) and other.root.symmetric else NotImplemented


def _kernel_power(self: FMat, exponent: int) -> FMatDense:
    """``K ** n`` for an integer."""
    entries = self.to_torch()
    power = torch.linalg.matrix_power(entries.flatten(2).flatten(0, 1), exponent)
    return kernel_of((power + power.T).view_as(entries) / 2 if self.root.symmetric else power.view_as(entries))


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
    """Attach the old names of maps and kernels."""
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
        __rmatmul__=lambda self, u: self.T @ u if isinstance(u, FVector) else NotImplemented,
        generator=None,
        data=property(lambda self: self.to_torch(), lambda self, value: vars(self).update(vars(kernel_of(value)))),
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
