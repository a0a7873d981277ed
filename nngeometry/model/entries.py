"""What tensors of any layout hold."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor


def equal(a: Tensor, b: Tensor) -> bool:
    """``torch.equal`` of tensors of any layout; of sparse ones, of the entries that are stored.

    >>> A = torch.eye(3).to_sparse()
    >>> equal(A, A.clone()), equal(A, 2 * A), equal(A, A.to_dense())
    (True, False, False)
    """
    return _all(torch.equal, a, b)


def same_entries(a: Tensor, b: Tensor) -> bool:
    """Whether all entries are equal, those that are not numbers included."""
    return _all(_same, a, b)


def _same(a: Tensor, b: Tensor) -> bool:
    real = a.dtype == b.dtype and (a.is_floating_point() or a.is_complex())
    return torch.equal(a, b) or (real and torch.allclose(a, b, rtol=0, atol=0, equal_nan=True))


def _all(alike: Callable[[Tensor, Tensor], bool], a: Tensor, b: Tensor) -> bool:
    if a.layout != b.layout or a.is_nested != b.is_nested or (not a.is_nested and a.shape != b.shape):
        return False
    one, other = stored(a), stored(b)
    return len(one) == len(other) and all(map(alike, one, other))


def rows(t: Tensor, start: int, stop: int) -> Tensor:
    """``t[start:stop]``, also where there are no views."""
    return t[start:stop] if t.layout == torch.strided else picked(t, torch.arange(start, stop, device=t.device))


def picked(t: Tensor, index: Tensor) -> Tensor:
    """``t[index]``, in the same layout.

    >>> picked(torch.eye(3).to_sparse(), torch.tensor([2, 0])).to_dense()
    tensor([[0., 0., 1.],
            [1., 0., 0.]])
    """
    if t.layout == torch.strided:
        return t[index]
    if t.layout == torch.sparse_coo:
        return t.index_select(0, index)
    return t.to_sparse().index_select(0, index).to_sparse(layout=t.layout)


def stored(t: Tensor) -> list[Tensor]:
    """The strided tensors that a tensor is made of, without its graph: one, unless it is sparse or nested."""
    t = t.detach()
    if t.is_nested:
        return list(t.unbind())
    if t.layout == torch.strided:
        return [t]
    if t.layout == torch.sparse_coo:
        return [t._indices(), t._values()]
    if t.layout in (torch.sparse_csr, torch.sparse_bsr):
        return [t.crow_indices(), t.col_indices(), t.values()]
    if t.layout in (torch.sparse_csc, torch.sparse_bsc):
        return [t.ccol_indices(), t.row_indices(), t.values()]
    return [t.to_dense()]
