"""A model at other weights for a while."""

from __future__ import annotations

from collections.abc import Callable
from functools import reduce
from typing import Any

import torch
from torch import nn

from .. import arguments
from ..changes import Borrowed, other_values
from .vector import PVector


def at(model: nn.Module, vector: PVector) -> Borrowed:
    """Hold a model at other weights inside of a ``with`` block.

    The parameters of the vector's layers have its values, w, inside of the block, and their own again after it, however
    it ends: by an exception or a signal too. Nothing else of them changes: they are the same tensors, with their
    ``requires_grad``, their hooks and their ``.grad``, to which ``backward()`` adds the gradient at w. What is written
    into them inside of the block is lost. The vector is copied, and parameters outside of its layers stay as they are.

    What is recorded inside is to be differentiated inside, and what was recorded before outside: otherwise torch
    raises, where it needs the values of the parameters. Other threads that use this library wait until the end of the
    block.

    Args:
        model: Any module.
        vector: The weights, on all or some layers of the model, e.g. an average of ``PVector.from_model(model)``.

    Raises:
        ValueError: On entering, if the model does not have the layers of the vector, or is of another dtype or device.

    Example:
        >>> model = nn.Linear(2, 1)
        >>> w = PVector.from_model(model).clone().detach()
        >>> x = torch.randn(5, 2)
        >>> with at(model, 2 * w):
        ...     double = model(x)
        >>> torch.allclose(double, 2 * model(x))
        True
    """
    arguments.model(model)
    arguments.instance("vector", vector, PVector, "make one with PVector.from_model(model) or PVector(layers, tensor)")

    def change() -> Callable[[], Any]:
        lc = vector.layer_collection
        params = lc.parameters(model)
        flat = vector.to_torch().detach()
        dtype = reduce(torch.promote_types, (p.dtype for p in params))  # that of a vector of all of them
        if flat.dtype != dtype or any(p.device != flat.device for p in params):
            raise ValueError(
                f"at: the vector is {flat.dtype} on {flat.device}, the model {dtype} on {params[0].device}: move one "
                "of them with .to"
            )
        pieces = flat.split([p.numel() for p in params])
        with torch.inference_mode(False):  # or they could not be the values of parameters
            ours = [torch.empty_like(p.detach()).copy_(v.view(p.shape)) for p, v in zip(params, pieces, strict=True)]
        return other_values(params, ours)()

    return Borrowed(change)
