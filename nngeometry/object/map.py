"""Maps between parameter space and function space: batches of vectors."""

from __future__ import annotations

import torch
from torch import Tensor

from ..layercollection import LayerCollection
from .vector import FlatArray, FVector, PVector


class PFMapDense(FlatArray):
    """A dense map from parameters to C outputs of n examples: data ``(C, n, P)``. Every representation takes it as
    many right-hand sides.

    >>> lc = LayerCollection.from_model(torch.nn.Linear(2, 1))
    >>> J = PFMapDense(lc, torch.ones(4, 5, 3))
    >>> J.jvp(PVector(lc, torch.ones(3))).to_torch().shape
    torch.Size([4, 5])
    """

    def __init__(self, layer_collection: LayerCollection, data: Tensor) -> None:
        if data.ndim != 3 or data.shape[2] != layer_collection.numel():
            raise ValueError(f"PFMapDense: expected shape (C, n, {layer_collection.numel()}), got {tuple(data.shape)}")
        super().__init__(layer_collection, data)

    def _like(self, flat: Tensor) -> PFMapDense:
        return PFMapDense(self.layer_collection, flat)

    def jvp(self, v: PVector) -> FVector:
        """``J v``."""
        return FVector(self._flat @ self._operand(v))

    def vjp(self, u: FVector) -> PVector:
        """``J^T u``."""
        return PVector(self.layer_collection, torch.einsum("cn,cnp->p", u.to_torch(), self._flat))

    def __repr__(self) -> str:
        c, n, p = self._flat.shape
        return f"PFMapDense of {c} outputs, {n} examples, {p} parameters, {self._flat.dtype}"
