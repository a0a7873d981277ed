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
from ..spelling import renamed, warn
from .names import attach


def _inverse(self: PMat, regul: Any = 1e-8, use_pi: bool | None = None) -> PMat:
    """``(M + regul)^-1``. use_pi: if given, of KFAC, the inverse of the factors damped one by one instead.

    :meta private:
    """
    warn("inverse(regul)", "inv(regul)")
    inverse = self.inv(regul) if use_pi is None else factored(self, regul, use_pi)
    device = self.device
    inverse.generator = SimpleNamespace(layer_collection=self.layer_collection, get_device=lambda: device)
    return inverse


def _get_kfe(self: PMatEKFAC, split_weight_bias: bool = True) -> dict[str, Tensor]:
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


def _compute_eigendecomposition(self: PMat, impl: str | None = None) -> None:
    """Store ``evals`` and ``evecs``: ascending by "eigh" (or "symeig"), descending by "svd", which is the default of
    PMatLowRank.

    :meta private:
    """
    check_impl(impl)
    warn("compute_eigendecomposition()", "eig()")
    if isinstance(self, PMatKFAC):
        factors = {n: one if isinstance(one, tuple) else (one,) for n, one in self.data.items()}
        pairs = {n: [torch.linalg.eigh(torch.diag(t) if t.ndim == 1 else t) for t in ts] for n, ts in factors.items()}
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


def check_impl(impl: str | None) -> None:
    """Raise ``NotImplementedError`` unless it is the name of an eigendecomposition."""
    if impl not in (None, "eigh", "symeig", "svd"):
        raise NotImplementedError(f"compute_eigendecomposition: impl={impl!r} is not 'eigh' or 'svd'")


def get_eigendecomposition(self: PMat) -> tuple[Any, Any]:
    """What :meth:`compute_eigendecomposition` stored.

    :meta private:
    """
    return vars(self)["evals"], vars(self)["evecs"]


def _project_to_diag(self: PMatDense, v: PVector) -> Tensor:
    """``v`` in the eigenvectors of :meth:`compute_eigendecomposition`.

    :meta private:
    """
    return vars(self)["evecs"].T @ v.to_torch()


def _project_from_diag(self: PMatDense, v: Tensor) -> PVector:
    """The inverse of :meth:`project_to_diag`.

    :meta private:
    """
    return PVector(self.layer_collection, vars(self)["evecs"] @ v)


def _from_mapping(
    cls: type[PMatMixed],
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


class PMatEKFACBlockDiag(PMatEKFAC):
    """:class:`PMatEKFAC` of linear maps, convolutions in one and two dimensions and embeddings; the exact block of
    every other layer.
    """

    @classmethod
    def factored(cls, layer: Layer) -> bool:
        """Whether a layer is of one of these kinds."""
        return layer.kronecker and any(layer.matches(t) for t in (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Embedding))


def install() -> None:
    """Attach the old names of matrices."""
    attach(
        PMat,
        inverse=_inverse,
        get_dense_tensor=renamed(
            "get_dense_tensor()", "to_torch()", lambda self, *args, **kw: self.to_torch(*args, **kw)
        ),
        frobenius_norm=renamed("frobenius_norm()", "norm()", lambda self: self.norm()),
        mm=renamed("mm(other)", "M @ other", lambda self, other: self @ other),
        mmap=renamed("mmap(map)", "M @ map", lambda self, pfmap: self @ pfmap),
        pinverse=renamed("pinverse(atol)", "pinv(atol=)", lambda self, atol=1e-8: self.pinv(atol=atol)),
        solvePVec=renamed("solvePVec", "solve", lambda self, *args, **kw: self.solve(*args, **kw)),
        solvePFMap=renamed("solvePFMap", "solve", lambda self, *args, **kw: self.solve(*args, **kw)),
        get_block_torch=renamed(
            "get_block_torch(name, layer)",
            "block(name).to_torch()",
            lambda self, name, layer=None, **kw: self.block(name).to_torch(**kw),
        ),
        get_device=lambda self: self.device,
        compute_eigendecomposition=_compute_eigendecomposition,
        get_eigendecomposition=get_eigendecomposition,
    )
    attach(PMatDense, project_to_diag=_project_to_diag, project_from_diag=_project_from_diag)
    attach(PMatEye, scaling=property(lambda self: self.trace() / self.size(0)))
    attach(PMatEKFAC, get_KFE=_get_kfe)
    attach(PMatMixed, from_mapping=classmethod(_from_mapping))
    for module in (objects, pspace):
        attach(module, PMatEKFACBlockDiag=PMatEKFACBlockDiag)
