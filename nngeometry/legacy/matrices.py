"""Old names and arguments of matrices in parameter space."""

from __future__ import annotations

from collections.abc import Mapping
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn

from .. import object as objects
from ..blocks import Spectral
from ..layercollection import Layer, LayerCollection
from ..object import PMat, PMatDense, PMatEKFAC, PMatEye, PMatKFAC, PMatLowRank, PMatMixed, PVector, pspace
from ..object.old_arguments import factored
from ..object.tensors import parts_of
from ..spelling import warn
from .names import adopt, attach


def check_impl(impl: str | None) -> None:
    """Raise ``NotImplementedError`` unless it is the name of an eigendecomposition."""
    if impl not in (None, "eigh", "symeig", "svd"):
        raise NotImplementedError(f"compute_eigendecomposition: impl={impl!r} is not 'eigh' or 'svd'")


class PMatEKFACBlockDiag(PMatEKFAC):
    """:class:`PMatEKFAC` of linear maps, convolutions in one and two dimensions and embeddings; the exact block of
    every other layer.
    """

    @classmethod
    def factored(cls, layer: Layer) -> bool:
        """Whether a layer is of one of these kinds."""
        return layer.kronecker and any(layer.matches(t) for t in (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Embedding))


class OfMatrices:
    """Old names of all matrices."""

    def inverse(self: Any, regul: Any = 1e-8, use_pi: bool | None = None) -> Any:
        """``(M + regul)^-1``. use_pi: if given, of KFAC, the inverse of the factors damped one by one instead.

        :meta private:
        """
        warn("inverse(regul)", "inv(regul)")
        inverse = self.inv(regul) if use_pi is None else factored(self, regul, use_pi)
        device = self.device
        inverse.generator = SimpleNamespace(layer_collection=self.layer_collection, get_device=lambda: device)
        return inverse

    def get_dense_tensor(self: Any, *args: Any, **kwargs: Any) -> Any:
        """Old name of ``to_torch()``.

        :meta private:
        """
        warn("get_dense_tensor()", "to_torch()")
        return self.to_torch(*args, **kwargs)

    def frobenius_norm(self: Any) -> Any:
        """Old name of ``norm()``.

        :meta private:
        """
        warn("frobenius_norm()", "norm()")
        return self.norm()

    def mm(self: Any, other: PMat) -> Any:
        """Old name of ``M @ other``.

        :meta private:
        """
        warn("mm(other)", "M @ other")
        return self @ other

    def mmap(self: Any, pfmap: Any) -> Any:
        """Old name of ``M @ map``.

        :meta private:
        """
        warn("mmap(map)", "M @ map")
        return self @ pfmap

    def pinverse(self: Any, atol: float = 1e-8) -> Any:
        """Old name of ``pinv(atol=)``.

        :meta private:
        """
        warn("pinverse(atol)", "pinv(atol=)")
        return self.pinv(atol=atol)

    def solvePVec(self: Any, *args: Any, **kwargs: Any) -> Any:
        """Old name of ``solve``.

        :meta private:
        """
        warn("solvePVec", "solve")
        return self.solve(*args, **kwargs)

    def solvePFMap(self: Any, *args: Any, **kwargs: Any) -> Any:
        """Old name of ``solve``.

        :meta private:
        """
        warn("solvePFMap", "solve")
        return self.solve(*args, **kwargs)

    def get_block_torch(self: Any, name: str, layer: Any = None, **kwargs: Any) -> Any:
        """Old name of ``block(name).to_torch()``.

        :meta private:
        """
        warn("get_block_torch(name, layer)", "block(name).to_torch()")
        return self.block(name).to_torch(**kwargs)

    def get_device(self: Any) -> Any:
        """Old name of ``device``.

        :meta private:
        """
        return self.device

    def compute_eigendecomposition(self: Any, impl: str | None = None) -> None:
        """Store ``evals`` and ``evecs``: ascending by "eigh" (or "symeig"), descending by "svd", which is the default
        of PMatLowRank.

        :meta private:
        """
        check_impl(impl)
        warn("compute_eigendecomposition()", "eig()")
        if isinstance(self, PMatKFAC):
            factors = {n: one if isinstance(one, tuple) else (one,) for n, one in self.data.items()}
            pairs = {
                n: [torch.linalg.eigh(torch.diag(t) if t.ndim == 1 else t) for t in ts] for n, ts in factors.items()
            }
            vars(self)["evals"] = {n: tuple(l for l, _ in pair) for n, pair in pairs.items()}
            vars(self)["evecs"] = {n: tuple(q for _, q in pair) for n, pair in pairs.items()}
            return
        l, vectors = self.root.top(None)
        ascending = impl in ("eigh", "symeig") or (impl is None and not isinstance(self, PMatLowRank))
        if impl == "svd":
            order = l.abs().argsort(descending=True)
            l, vectors = l[order], vectors[order]
        vars(self)["evals"] = l.flip(0) if ascending else l
        vars(self)["evecs"] = (vectors.flip(0) if ascending else vectors).T

    def get_eigendecomposition(self: Any) -> tuple[Any, Any]:
        """What :meth:`compute_eigendecomposition` stored.

        :meta private:
        """
        return vars(self)["evals"], vars(self)["evecs"]


class OfDense:
    """Old names of dense matrices."""

    def project_to_diag(self: Any, v: PVector) -> Any:
        """``v`` in the eigenvectors of :meth:`compute_eigendecomposition`.

        :meta private:
        """
        return vars(self)["evecs"].T @ v.to_torch()

    def project_from_diag(self: Any, v: Tensor) -> PVector:
        """The inverse of :meth:`project_to_diag`.

        :meta private:
        """
        return PVector(self.layer_collection, vars(self)["evecs"] @ v)


class OfEye:
    """Old names of the identity."""

    @property
    def scaling(self: Any) -> Any:
        """The factor of the identity."""
        return self.trace() / self.size(0)


class OfEKFAC:
    """Old names of EKFAC."""

    def get_KFE(self: Any, split_weight_bias: bool = True) -> dict[str, Tensor]:
        """The eigenvectors of each layer as columns, in the order of ``.data[1]``.

        :meta private:
        """
        warn("get_KFE()", "eig(), or the bases of .data[0]")
        bases = {}
        for name, _, packing, block in parts_of(self):
            spectral = block.eig()
            assert isinstance(spectral, Spectral)
            q = spectral.basis.to_dense()
            bases[name] = packing.unpack(q.T.reshape(-1, *packing.shape)).T if split_weight_bias else q
        return bases


class OfMixed:
    """Old names of mixed matrices."""

    @classmethod
    def from_mapping(
        cls,
        layer_collection: LayerCollection,
        generator: Any,
        default_representation: Any,
        map_layers_to: Mapping[Any, Any],
        data: Any = None,
        examples: Any = None,
        **options: Any,
    ) -> PMatMixed:
        """A representation for each kind of layer.

        :meta private:
        """
        warn("PMatMixed.from_mapping(...)", "PMatMixed.of(default, {nn.Linear: ...})")
        if data is not None:
            raise NotImplementedError("PMatMixed.from_mapping: data= is not of one representation: give examples=")
        return PMatMixed(
            layer_collection,
            generator,
            examples=examples,
            default_representation=default_representation,
            map_layers_to=map_layers_to,
            **options,
        )


def install() -> None:
    """Attach the old names of matrices."""
    adopt(PMat, OfMatrices)
    adopt(PMatDense, OfDense)
    adopt(PMatEye, OfEye)
    adopt(PMatEKFAC, OfEKFAC)
    adopt(PMatMixed, OfMixed)
    for module in (objects, pspace):
        attach(module, PMatEKFACBlockDiag=PMatEKFACBlockDiag)
