"""Old names of maps and kernels."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from .. import object as objects
from ..forms import Outer
from ..generator import Generator
from ..layercollection import LayerCollection
from ..object import (
    FMat,
    FVector,
    PFMap,
    PFMapDense,
    PFMapFactored,
    PFMapImplicit,
    PVector,
    fspace,
)
from ..object import map as pfmap
from ..object.fspace import kernel_of
from ..object.map import Adjoint
from ..spelling import warn
from .matrices import check_impl
from .names import adopt, attach


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


def random_pfmap(
    layer_collection: LayerCollection, output_size: Any, device: Any = None, dtype: Any = None
) -> PFMapDense:
    """A dense map ``(*output_size, P)`` of independent standard normal entries."""
    return PFMapDense(layer_collection, torch.randn(*output_size, layer_collection.numel(), device=device, dtype=dtype))


class OfMaps:
    """Old names of all maps."""

    generator: Any = None

    @staticmethod
    def from_dict(layer_collection: Any = None, generator: Any = None, data_dict: Any = None) -> PFMapDense:
        """A map from the tensors ``(C, n, *shape)`` of its layers; in 0.4 without the layer collection."""
        if isinstance(layer_collection, Generator):
            generator, layer_collection, data_dict = layer_collection, None, data_dict or generator
        lc = generator.layer_collection if layer_collection is None else layer_collection
        return PFMapDense(lc, torch.cat([t.flatten(2) for name in lc for t in data_dict[name]], -1))

    def size(self: Any, dim: int | None = None) -> Any:
        """Its shape, or the length of one axis.

        :meta private:
        """
        return self.shape if dim is None else self.shape[dim]

    def to_torch(self: Any) -> Tensor:
        """All entries ``(C, n, P)``.

        :meta private:
        """
        entries: Tensor = self.to_dense().to_torch()
        return entries

    def get_dense_tensor(self: Any) -> Any:
        """Old name of ``to_torch()``.

        :meta private:
        """
        warn("get_dense_tensor()", "to_torch()")
        return self.to_torch()

    def to_torch_layer(self: Any, name: str) -> Any:
        """The entries of the columns of one layer, in the shapes of its parameters.

        :meta private:
        """
        return self.to_dense().to_dict()[name]

    def iter_by_module(self: Any) -> Iterator[tuple[str, Any]]:
        """Layers by name, with their entries.

        :meta private:
        """
        return iter(self.to_dense().to_dict().items())

    def iter_by_layer(self: Any) -> Iterator[tuple[str, Any, Any]]:
        """Layers by name, with their entries.

        :meta private:
        """
        return ((name, self.layer_collection[name], values) for name, values in self.iter_by_module())


class OfDenseMaps:
    """Old names of dense maps."""

    @property
    def data(self: Any) -> Tensor:
        """The entries ``(C, n, P)``."""
        entries: Tensor = self.to_torch()
        return entries

    @data.setter
    def data(self: Any, value: Tensor) -> None:
        self._flat = value


class OfFactoredMaps:
    """Old names of factored maps."""

    @property
    def data(self: Any) -> dict[str, tuple[Tensor, Tensor]]:
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


class OfKernels:
    """Old names of kernels."""

    generator: Any = None

    @property
    def data(self: Any) -> Tensor:
        """The entries, as :meth:`to_torch` says."""
        entries: Tensor = self.to_torch()
        return entries

    @data.setter
    def data(self: Any, value: Tensor) -> None:
        vars(self).update(vars(kernel_of(value)))

    def adjoint(self: Any) -> Any:
        """Old name of ``T``.

        :meta private:
        """
        return self.T

    def get_dense_tensor(self: Any) -> Any:
        """Old name of ``to_torch()``.

        :meta private:
        """
        warn("get_dense_tensor()", "to_torch()")
        return self.to_torch()

    def frobenius_norm(self: Any) -> Any:
        """Old name of ``norm()``.

        :meta private:
        """
        warn("frobenius_norm()", "norm()")
        return self.norm()

    def mm(self: Any, other: Any) -> Any:
        """Old name of ``K @ other``.

        :meta private:
        """
        warn("mm(other)", "K @ other")
        return self @ other

    def mTMm(self: Any, other: Any) -> Any:
        """Old name of ``other.T @ K @ other``.

        :meta private:
        """
        warn("mTMm(other)", "other.T @ K @ other")
        return other.T @ (self @ other)

    def solveFVec(self: Any, *args: Any, **kwargs: Any) -> Any:
        """Old name of ``solve``.

        :meta private:
        """
        warn("solveFVec", "solve")
        return self.solve(*args, **kwargs)

    def solveFMat(self: Any, *args: Any, **kwargs: Any) -> Any:
        """Old name of ``solve``.

        :meta private:
        """
        warn("solveFMat", "solve")
        return self.solve(*args, **kwargs)

    def compute_eigendecomposition(self: Any, impl: str = "eigh") -> None:
        """Store ``evals`` and ``evecs``, in the order of ``to_torch().flatten()``.

        :meta private:
        """
        check_impl(impl)
        warn("compute_eigendecomposition()", "eig()")
        vars(self)["evals"], vars(self)["evecs"] = torch.linalg.eigh(self.to_torch().flatten(2).flatten(0, 1))

    def get_eigendecomposition(self: Any) -> tuple[Any, Any]:
        """What :meth:`compute_eigendecomposition` stored.

        :meta private:
        """
        return vars(self)["evals"], vars(self)["evecs"]

    def project_to_diag(self: Any, v: FVector) -> Tensor:
        """A vector in the eigenvectors of :meth:`compute_eigendecomposition`.

        :meta private:
        """
        return vars(self)["evecs"].T @ v.to_torch().flatten()

    def project_from_diag(self: Any, v: Tensor) -> FVector:
        """The inverse of :meth:`project_to_diag`.

        :meta private:
        """
        return FVector((vars(self)["evecs"] @ v).view(*self.size()[:2]))


def install() -> None:
    """Add the old names of maps and kernels."""
    adopt(PFMap, OfMaps)
    adopt(PFMapDense, OfDenseMaps)
    adopt(PFMapFactored, OfFactoredMaps)
    adopt(FMat, OfKernels)
    attach(fspace, FMatAbstract=FMat)
    maps = {cls.__name__: cls for cls in (PushForwardDense, PushForwardImplicit, PullBackDense)}
    bases = {"AbstractPushForward": PFMap, "PullBackAbstract": PFMap, "PFMapAdjoint": Adjoint}
    attach(pfmap, random_pfmap=random_pfmap, **bases, **maps)
    attach(objects, **maps)
