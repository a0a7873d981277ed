"""Jacobians of several calls, cotangents or layers as one."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from math import prod

import torch
from torch import Tensor

from ..memory import panel_length, slices
from .base import ColumnViews, Dense, LayerJacobian, tiling
from .gather import Gather
from .moments import add_gram
from .outer import Outer
from .uses import Sum, Transposed


def add(forms: Sequence[LayerJacobian]) -> LayerJacobian:
    """The sum of Jacobians of the same parameters, e.g. of a module that is called several times: those of one form
    are one form of more positions.
    """
    parts = [part for f in forms for part in (f.parts if isinstance(f, Sum) else (f,))]
    of_form: dict[type, list[LayerJacobian]] = {}
    for part in parts:
        of_form.setdefault(type(part), []).append(part)
    joined = [form for alike in of_form.values() for form in _joined(alike)]
    return joined[0] if len(joined) == 1 else Sum(joined)


def _joined(alike: Sequence[LayerJacobian]) -> Sequence[LayerJacobian]:
    """Forms of one type as one of more positions, where there is such."""
    if len(alike) == 1:
        return alike
    if all(isinstance(f, Outer) and f.filled is None for f in alike):
        return [Outer(torch.cat([f.a for f in alike], 1), torch.cat([f.g for f in alike], 2))]  # type: ignore[attr-defined]
    if all(isinstance(f, Gather) for f in alike):
        ids = torch.cat([f.ids for f in alike], 1)  # type: ignore[attr-defined]
        return [Gather(ids, torch.cat([f.g for f in alike], 2), alike[0].size)]  # type: ignore[attr-defined]
    if all(isinstance(f, Transposed) for f in alike):
        return [Transposed(form) for form in _joined([f.of for f in alike])]  # type: ignore[attr-defined]
    return alike


def stack(forms: Sequence[LayerJacobian]) -> LayerJacobian:
    """The same examples under the cotangents of each in turn."""
    first = forms[0]
    if len(forms) == 1:
        return first
    if all(isinstance(f, Outer) and f.shared == first.shared for f in forms):  # type: ignore[attr-defined]
        g = torch.cat([f.g[:, :1] if f.shared else f.g for f in forms])  # type: ignore[attr-defined]
        g = g.expand(-1, first.examples, -1, -1, -1)
        return Outer(first.inputs, g, first.expand, first.shape[2], filled=first.filled)  # type: ignore[attr-defined]
    if all(isinstance(f, Gather) for f in forms):
        return Gather(first.ids, torch.cat([f.g for f in forms]), first.size)  # type: ignore[attr-defined]
    if all(isinstance(f, Transposed) for f in forms):
        return Transposed(stack([f.of for f in forms]))  # type: ignore[attr-defined]
    if all(isinstance(f, Sum) and [*map(type, f.parts)] == [*map(type, first.parts)] for f in forms):  # type: ignore[attr-defined]
        return Sum([stack(parts) for parts in zip(*(f.parts for f in forms), strict=True)])  # type: ignore[attr-defined]
    return Dense(torch.cat([f.dense() for f in forms]))


def write_rows(forms: Sequence[LayerJacobian], places: Sequence[ColumnViews], out: Tensor) -> None:
    """The Jacobian of several layers side by side, into ``(C, B, P)``, in pieces that stay in the cache."""
    sizes = [prod(f.shape) for f in forms]
    for form, of, own in zip(forms, places, out.split(sizes, -1), strict=True):
        size = form.cotangents * prod(form.shape) * form.dtype.itemsize
        for b in slices(form.examples, panel_length(size, form.examples, form.device)):
            form.narrow(b.start, b.stop).write(of(own[:, b]))


def dense_rows(forms: Sequence[LayerJacobian], places: Sequence[ColumnViews]) -> Tensor:
    """:func:`write_rows` into a new array."""
    one = forms[0]
    p = sum(prod(f.shape) for f in forms)
    out = torch.empty(one.cotangents, one.examples, p, dtype=one.dtype, device=one.device)
    write_rows(forms, places, out)
    return out


def rows(forms: Sequence[LayerJacobian], places: Sequence[ColumnViews]) -> Iterator[Tensor]:
    """:func:`dense_rows`, ``(c, b, P)``, of some cotangents and examples at a time such that each fits a work array."""
    one = forms[0]
    size = 2 * sum(prod(f.shape) for f in forms) * one.dtype.itemsize
    for c, b in tiling(size, one.cotangents, one.examples, one.device):
        yield dense_rows([f.narrow(b.start, b.stop, c.start, c.stop) for f in forms], places)


def gram(forms: Sequence[LayerJacobian], places: Sequence[ColumnViews], total: Tensor | None = None) -> Tensor:
    """``sum_cb J[c, b] J[c, b]^T`` over the parameters of several layers: the lower triangle of ``(P, P)`` in flat
    parameter order. total: what it is added to, in place.
    """
    if total is None:
        p = sum(prod(f.shape) for f in forms)
        total = torch.zeros(p, p, dtype=forms[0].dtype, device=forms[0].device)
    for piece in rows(forms, places):
        add_gram(total, piece.flatten(0, 1))
    return total
