"""The functions of ``maths``, ``utils`` and ``solve``."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from ..object import PMat, PVector
from ..object.old_arguments import cg

__all__ = ["cg", "display_correl", "get_n_parameters", "grad", "kronecker"]


def kronecker(A: Tensor, B: Tensor) -> Tensor:
    """The Kronecker product of two matrices."""
    return torch.kron(A.contiguous(), B.contiguous())


def display_correl(M: PMat, axis: Any) -> None:
    """Show the absolute correlations of a matrix on a matplotlib axis."""
    dense = M.to_torch()
    scale = (dense.diagonal() + dense.diagonal().mean() / 100).sqrt()
    axis.imshow((dense.abs() / torch.outer(scale, scale)).detach().cpu())


def grad(output: Tensor, vec: PVector, *args: Any, **kwargs: Any) -> PVector:
    """The gradient of ``output`` with respect to the parameters that ``vec`` was made of, e.g. by
    ``PVector.from_model``. Further arguments as of ``torch.autograd.grad``.
    """
    lc = vec.layer_collection
    leaves = [t for ts in vec.to_dict().values() for t in ts]
    if not all(t.is_leaf and t.requires_grad for t in leaves):
        leaves = list(_leaves(vec.to_torch().grad_fn))
    if [tuple(p.shape) for p in leaves] != [shape for layer in lc.layers.values() for _, shape in layer.params]:
        raise RuntimeError("grad: the vector does not consist of the parameters of a model: use PVector.from_model")
    grads = torch.autograd.grad(output, leaves, *args, **kwargs)
    return PVector(
        lc,
        torch.cat([p.new_zeros(p.numel()) if g is None else g.flatten() for p, g in zip(leaves, grads, strict=True)]),
    )


def _leaves(node: Any) -> Iterator[Tensor]:
    """The leaves that a tensor was made of, in order."""
    if node is not None and hasattr(node, "variable"):
        yield node.variable
    elif node is not None:
        for before, _ in node.next_functions:
            yield from _leaves(before)


def get_n_parameters(model: nn.Module) -> int:
    """The number of parameters of a model."""
    return sum(p.numel() for p in model.parameters())
