"""Sums of outer products: linear maps with shared weights."""

from __future__ import annotations

from collections.abc import Iterator
from functools import cached_property

import torch
from torch import Tensor

from ..memory import chunk_length, nbytes_of, panel_bytes, panel_length, slices, tuning
from .base import LayerJacobian, Map, Places
from .inner import add_inner, add_traced, examples_together, matmul
from .moments import few_examples, moment_of_columns, outer_sum, second_moment, sum_of_squares, total_of


class Outer(LayerJacobian):
    """Sums over positions of outer products, ``J[c, b] = sum_t g[c, b, t] a[b, t]^T``, one for each group.

    This is the form of linear maps with shared weights: ``nn.Linear`` (T: all axes between the first and the last),
    convolutions (T: pixels; a: patches) and bilinear maps. With a bias the last entry of ``a`` is one. The packed shape
    is ``(G, rows, cols)``.

    Args:
        inputs: ``(B, ...)``, from which ``expand`` makes a ``(B, T, G, cols)`` when it is needed; by default they are
            a.
        g: Output gradients ``(C, B, T, G, rows)``.
        expand: From the inputs of some examples to a.
        cols: The number of columns, if there is an ``expand``.
        moment: From inputs to the sum of a a^T over examples and positions, ``(G, cols, cols)``, if there is a faster
            way than from a.
        filled: Of each group the share of the positions that it has; a and g are zero at the others. By default it has
            all of them.

    Example:
        >>> Outer(torch.ones(5, 1, 1, 3), torch.ones(4, 5, 1, 1, 2)).dense().shape
        torch.Size([4, 5, 1, 2, 3])
    """

    def __init__(
        self,
        inputs: Tensor,
        g: Tensor,
        expand: Map | None = None,
        cols: int | None = None,
        moment: Map | None = None,
        filled: tuple[float, ...] | None = None,
    ) -> None:
        cols = inputs.shape[-1] if cols is None else cols
        super().__init__(g.shape[0], g.shape[1], (g.shape[3], g.shape[4], cols), g.dtype, g.device)
        self.inputs = inputs
        self.g = g
        self.expand = expand
        self.moment = moment
        self.filled = filled

    @cached_property
    def a(self) -> Tensor:
        """``(B, T, G, cols)``. The patches of a convolution are many times its input, so they are made late."""
        return self.inputs if self.expand is None else self.expand(self.inputs)

    @cached_property
    def shared(self) -> bool:
        """Whether all examples have the same g, which is held once: that of the last layer, under the cotangents of
        each output.
        """
        return self.examples > 1 and self.g.stride(1) == 0

    def _mapped(self, fn: Map) -> Tensor:
        """fn of g, entry by entry or row by row."""
        return fn(self.g[:, :1]).expand_as(self.g) if self.shared else fn(self.g)

    @property
    def positions(self) -> int:
        """T."""
        return self.g.shape[2]

    def dense(self) -> Tensor:
        return torch.einsum("cbtgo,btgi->cbgoi", self.g, self.a)

    def write(self, places: Places) -> None:
        lead = self.cotangents, self.examples, *self.shape[:-1]
        if self.positions > 1 or any(place.shape[:-1] != lead for _, place in places):
            return super().write(places)
        for (*_, columns), place in places:
            torch.mul(self.g[:, :, 0].unsqueeze(-1), self.a[:, 0, :, None, columns], out=place)
        return None

    def narrow(self, start: int, stop: int, first: int = 0, last: int | None = None) -> Outer:
        g = self.g[first:last, start:stop]
        if self.expand is None or "a" in vars(self):
            return Outer(self.a[start:stop], g, filled=self.filled)
        return Outer(self.inputs[start:stop], g, self.expand, self.shape[2], self.moment, self.filled)

    def pieces(self) -> Iterator[Outer]:
        groups, rows, cols = self.shape
        size = self.positions * groups * (self.cotangents * rows + cols) * self.dtype.itemsize
        few = panel_length(size, self.examples, self.device) if self.positions > 1 else self.examples  # a is there
        for b in slices(self.examples, few):
            yield self.narrow(b.start, b.stop)

    def fold(self, ratio: int) -> Outer:
        a = self.a.reshape(-1, ratio * self.a.shape[1], *self.a.shape[2:])
        g = self.g.reshape(self.cotangents, -1, ratio * self.g.shape[2], *self.g.shape[3:])
        return Outer(a, g, filled=self.filled)

    def _panels(self) -> Iterator[tuple[slice, slice, slice, Tensor]]:
        """J in pieces that stay in the cache: of which examples, groups and rows, and ``(b, G', C, r, cols)``."""
        groups, rows, cols = self.shape
        fit = panel_bytes(self.device) // max(1, self.cotangents * cols * self.dtype.itemsize)  # rows of one example
        r, k = max(1, min(rows, fit)), max(1, min(groups, fit // max(1, rows)))
        patches = self.positions * groups * cols * self.dtype.itemsize
        b = max(1, min(fit // max(1, rows * groups), chunk_length(patches, self.examples, self.device)))
        for examples in slices(self.examples, b):
            a = self.narrow(examples.start, examples.stop, 0, 0).a.transpose(1, 2)
            g = self.g[:, examples].permute(1, 3, 0, 4, 2).contiguous()  # (b, G, C, rows, T)
            for some in slices(groups, k):
                right = a[:, some].flatten(0, 1)
                for part in slices(rows, r):
                    left = g[:, some, :, part]
                    j = torch.bmm(left.flatten(2, 3).flatten(0, 1), right)
                    yield examples, some, part, j.view(*left.shape[:4], cols)

    def square(self) -> Tensor:
        if self.positions == 1:
            return outer_sum(self.g[:, :, 0].square().sum(0), self.a[:, 0].square())
        out = self.g.new_zeros(self.shape)
        for _, groups, rows, j in self._panels():
            out[groups, rows] += sum_of_squares(j, (0, 2))
        return out

    def total(self) -> Tensor:
        if self.positions < self.shape[1]:
            g = self.g[0] if self.cotangents == 1 else self.g.sum(0)
            return outer_sum(g.flatten(0, 1), self.a.flatten(0, 1))
        out = self.g.new_zeros(self.shape)  # the sum of each example takes less memory than a copy of its patches
        for piece in self.pieces():
            g = piece.g[0] if self.cotangents == 1 else piece.g.sum(0)
            each = torch.bmm(g.permute(0, 2, 3, 1).flatten(0, 1), piece.a.transpose(1, 2).flatten(0, 1))
            out += each.view(-1, *self.shape).sum(0)
        return out

    def dot(self, V: Tensor) -> Tensor:
        return torch.einsum("cbtgo,kbtgo->kcb", self.g, torch.einsum("kgoi,btgi->kbtgo", V, self.a))

    def pull(self, u: Tensor) -> Tensor:
        return torch.einsum("kbtgo,btgi->kgoi", torch.einsum("kcb,cbtgo->kbtgo", u, self.g), self.a)

    def arrow(self) -> Tensor:
        if self.positions == 1:
            a = self.a[:, 0]
            return outer_sum(self.g[:, :, 0].square().sum(0), a[..., :-1] * a[..., -1:])
        groups, rows, cols = self.shape
        out = self.g.new_zeros(groups, rows, cols - 1)
        for _, k, r, j in self._panels():
            out[k, r] += (j[..., :-1] * j[..., -1:]).sum((0, 2))
        return out

    def sqnorm(self) -> Tensor:
        t = self.positions
        _, rows, cols = self.shape
        if t == 1:
            return torch.einsum("cbg,bg->cb", self.g[:, :, 0].square().sum(-1), self.a[:, 0].square().sum(-1))
        if t * (rows + cols) > rows * cols:
            norms = self.g.new_zeros(self.cotangents, self.examples)
            for b, _, _, j in self._panels():
                norms[:, b] += sum_of_squares(j, (1, 3, 4)).T
            return norms
        # |sum_t g_t a_t^T|^2 = sum_ts (g_t . g_s) (a_t . a_s): cheaper than J itself for short sequences.
        size = (self.cotangents + 1) * self.shape[0] * t * t * self.dtype.itemsize
        step = chunk_length(size, self.examples, self.device)
        out = []
        for b in slices(self.examples, step):
            a, g = self.a[b], self.g[:, b]
            aa = torch.einsum("btgi,bsgi->bgts", a, a)
            gg = torch.einsum("cbtgo,cbsgo->cbgts", g, g)
            out.append((gg * aa).sum((2, 3, 4)))
        return torch.cat(out, 1)

    @property
    def rotates(self) -> bool:
        return True

    def rotate(self, left: Map | None, right: Map | None) -> Outer:
        a, g = self.a, self.g if left is None else self._mapped(left)
        if right is not None:
            # One large product, whatever the order of patches in memory.
            a = right(a.flatten(0, 1)).unflatten(0, a.shape[:2])
        return Outer(a, g)

    def to(self, device: torch.device | str | None = None, dtype: torch.dtype | None = None) -> Outer:
        def moved(t: Tensor) -> Tensor:
            return t.to(device=device, dtype=dtype)

        return Outer(moved(self.inputs), self._mapped(moved), self.expand, self.shape[2], filled=self.filled)

    def map_cotangents(self, fn: Map) -> Outer:
        made = Outer(self.inputs, self._mapped(fn), self.expand, self.shape[2], filled=self.filled)
        if "a" in vars(self):
            vars(made)["a"] = self.a
        return made

    def nbytes(self) -> int:
        a = self.a if self.expand is None or "a" in vars(self) else self.inputs
        return nbytes_of([a, self.g[:, :1] if self.shared else self.g])

    def dense_is_cheaper(self, examples: int) -> bool:
        """By the multiplications for each pair of examples; the ones with positions run at a fifth of the speed."""
        c, t = self.cotangents, self.positions
        if t == 1:
            return False
        groups, rows, cols = self.shape
        by_positions = groups * (t * t * cols + c * t * t * rows + c * c * t * rows)
        dense = groups * (c * c * rows * cols + 2 * c * t * rows * cols / examples)
        return 5 * by_positions > dense

    def prepared(self, examples: int) -> LayerJacobian:
        return (
            super().prepared(examples) if self.dense_is_cheaper(examples) else Outer(self.a, examples_together(self.g))
        )

    def add_inner(self, other: LayerJacobian, out: Tensor) -> None:
        if not isinstance(other, Outer):
            return super().add_inner(other, out)
        for group in range(self.shape[0]):
            a, b = self.a[:, :, group], other.a[:, :, group]
            add_inner(lambda k, a=a, b=b: matmul(a[k], b), self.g[..., group, :], other.g[..., group, :], out)  # type: ignore[misc]
        return None

    def add_traced(self, other: LayerJacobian, out: Tensor) -> None:
        if not isinstance(other, Outer):
            return super().add_traced(other, out)
        for group in range(self.shape[0]):
            a, b = self.a[:, :, group], other.a[:, :, group]
            add_traced(lambda k, a=a, b=b: matmul(a[k], b), self.g[..., group, :], other.g[..., group, :], out)  # type: ignore[misc]
        return None

    def paired(self, other: LayerJacobian) -> Tensor:
        if not isinstance(other, Outer) or self.positions > 1 or other.positions > 1:
            return super().paired(other)
        outputs = (self.g[:, :, 0] * other.g[:, :, 0]).sum(-1)
        return torch.einsum("cbg,bg->cb", outputs, (self.a[:, 0] * other.a[:, 0]).sum(-1))

    def own(self, other: LayerJacobian, weight: Tensor | None = None, full: bool = True) -> Tensor:
        if not isinstance(other, Outer) or self.positions > 1 or other.positions > 1:
            return super().own(other, weight, full)
        columns = self.a[:, 0] * other.a[:, 0]  # the outer product of each example is never made
        rows = columns.sum(-1, keepdim=True) if weight is None else torch.einsum("bgi,goi->bgo", columns, weight)
        if not full and self.shared and other.shared:
            squares = (self.g[:, 0, 0] * other.g[:, 0, 0]).flatten(1)
            return squares @ rows.expand(-1, *self.shape[:2]).flatten(1).T
        left, right = self.g[:, :, 0] * rows, other.g[:, :, 0]
        if not full:
            return (left * right).flatten(2).sum(2)
        return torch.einsum("cbgo,dbgo->cdb", left, right)

    def without_last_column(self) -> Outer:
        """The same layer with its bias left out."""
        return Outer(self.a[..., :-1], self.g, filled=self.filled)

    def with_column_of_zeros(self) -> Outer:
        """The same layer with a bias of which nothing comes here."""
        return Outer(torch.nn.functional.pad(self.a, (0, 1)), self.g, filled=self.filled)

    def last_column(self) -> Tensor:
        """The derivatives in the bias alone, ``(C, B, G, rows)``."""
        return torch.einsum("cbtgo,btg->cbgo", self.g, self.a[..., -1])

    def left_factor(self, reduce: bool) -> Tensor:
        """Sum of g g^T over cotangents and examples (and positions, or of their sum): the lower triangles of
        ``(G, rows, rows)``.
        """
        g = self.g.sum(2, keepdim=True) if reduce else self.g
        positions_last = g.stride(2) == 1 and g.shape[2] >= g.shape[4]  # in memory, as convolutions leave it
        if positions_last and tuning(g.device).has_cache:
            return moment_of_columns(g.permute(0, 1, 3, 4, 2).flatten(0, 1))
        return second_moment(g.flatten(0, 2))

    def right_samples(self, reduce: bool) -> Tensor | None:
        """The a of all examples and positions (or their means over positions), ``(N, cols)``, if there is one group and
        they are fewer than half of the columns.
        """
        groups, _, cols = self.shape
        if groups > 1 or 2 * self.examples * (1 if reduce else self.positions) > cols:
            return None
        return (self.a.mean(1) if reduce else self.a.flatten(0, 1))[:, 0]

    def right_factor(self, reduce: bool) -> tuple[Tensor, int]:
        """Sum of a a^T over examples (and positions, or of their mean), the lower triangles of ``(G, cols, cols)``; how
        many were summed.
        """
        count = self.examples * (1 if reduce else self.positions)
        if self.moment is not None and not reduce:
            return self.moment(self.inputs), count
        groups, _, cols = self.shape
        size = self.positions * groups * cols * self.dtype.itemsize
        few = few_examples(size, self.examples, cols, count, self.device)

        def of(b: slice) -> Tensor:
            a = self.narrow(b.start, b.stop).a  # what it expands goes with it
            return second_moment((a.mean(1, keepdim=True) if reduce else a).flatten(0, 1))

        total = total_of(map(of, slices(self.examples, few)))
        if self.filled is not None and groups == 1 and not reduce:
            return total, round(count * self.filled[0])
        if self.filled is not None:  # of the mean over positions, twice
            total = total / total.new_tensor(self.filled).pow(2 if reduce else 1).view(-1, 1, 1)
        return total, count

    def right_squares(self, reduce: bool) -> tuple[Tensor, int]:
        """The diagonal of :meth:`right_factor`, ``(G, cols)``, of which no more is made."""
        a = self.a.mean(1, keepdim=True) if reduce else self.a
        return a.square().sum((0, 1)), a.shape[0] * a.shape[1]
