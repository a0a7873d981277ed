"""A minibatch as one example: nothing of it is taken apart, whatever its first axis is."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from . import arguments
from .changes import no_grad, trainable
from .derivatives.pulling import operations_named
from .forms import LayerJacobian
from .generator import Curvature, Generator, Observation, OfSeveral, Plan
from .likelihood import Cotangents
from .linearisation import INDEPENDENT, saved_bytes
from .losses import Loss, example_loss
from .losses.convex import OutputHessian
from .losses.of_torch import OfTorch
from .losses.output import ByExample, OutputLoss
from .memory import chunk_length, require, slices
from .model import data
from .model.evaluator import State
from .model.structure import Structure
from .object.kernel import dense_forms


class Undivided(Generator):
    """Streams ``s_c^T df/dw`` of whole minibatches, by plain differentiation of the model in all parameters.

    No example is looked at, only the output, which is that of one example: cotangents get it as ``(1, *output)``. Forms
    are dense, so there are no Kronecker factors. Arguments as in :class:`~nngeometry.Generator`.

    >>> from torch import nn
    >>> from nngeometry import LayerCollection
    >>> from nngeometry.likelihood import diagonal_cotangents
    >>> model = nn.Sequential(nn.Linear(3, 2), nn.BatchNorm1d(2))  # in train mode
    >>> lc = LayerCollection.from_model(model)
    >>> def of_outputs(f, batch, position):
    ...     return diagonal_cotangents(torch.ones_like(f))
    >>> g = Undivided(model, lc, of_outputs, unit="minibatch")
    >>> [observation] = g.stream((torch.randn(5, 3),))
    >>> observation.n, observation.forms["0"].dense().shape
    (1, torch.Size([10, 1, 1, 2, 4]))
    """

    def examine(self, batch: data.Batch) -> Plan:
        """There is nothing to know."""
        self.check_mode()
        return Plan((), (), aligned=False, axes=data.axes(batch), looked=False)

    def stream(
        self,
        examples: Any,
        plan: Plan | None = None,
        by_example: bool = False,
        join: bool = False,
        first: int | None = None,
    ) -> Iterator[Observation]:
        """As that of :class:`~nngeometry.Generator`, with one example for each minibatch."""
        start = self.seed if first is None else first
        self.check_mode()
        parameters = self.layer_collection.parameters(self.model)
        for position, batch in enumerate(self.minibatches(examples)):
            if self._remembered() is None:
                self.looked(partial(self.outputs_of, batch))
                self._looked = Structure(self.model), self.examine(batch)
            f = self._recorded(parameters, batch)
            outputs = f.detach()
            cotangents = self._of_one(outputs, batch, start + data.position_of(batch, position))
            weight = self.weigh(outputs, batch)
            row = self.layer_collection.numel() * f.element_size()
            held = row + f.nbytes + (saved_bytes([f]) if cotangents.count > 1 else 0)
            for c in slices(cotangents.count, chunk_length(held, cotangents.count, f.device)):
                s = cotangents.take(c.start, c.stop).to(f.dtype)
                new = int(c.start == 0)
                last = c.stop == cotangents.count
                forms = self._rows(f, parameters, s, batch, last)
                yield Observation(new, new * weight, forms, outputs, batch, new, last)
                del forms
            del f

    def _recorded(self, parameters: Sequence[Tensor], batch: data.Batch) -> Tensor:
        state = State(self.model)
        with self.running(trainable(parameters), state):
            f = self.outputs_of(batch)
            state.check(partial(self.outputs_of, batch))
        if not f.requires_grad:
            raise ValueError(f"the output of the model {INDEPENDENT}")
        return f

    def _rows(
        self, f: Tensor, parameters: Sequence[Tensor], s: Tensor, batch: data.Batch, last: bool
    ) -> dict[str, LayerJacobian]:
        changes = (trainable(parameters), *self.within(batch))
        with self.running(*changes, record=False), operations_named():
            grads = self._pull([f], parameters, [s], last)
            if all(g is None for g in grads):
                raise ValueError(f"the output of the model {INDEPENDENT}")
            flat = [
                s.new_zeros(len(s), p.numel())
                if g is None
                else (g.to_dense() if g.is_sparse else g).reshape(len(s), -1)
                for g, p in zip(grads, parameters, strict=True)
            ]
            rows = torch.cat([piece.to(self.dtype) for piece in flat], 1)
        return dict(dense_forms(rows.unsqueeze(1), self.layer_collection.layers))


def each_row(cotangents: Cotangents, rows: int) -> Cotangents:
    """Those of each row of an output, zero at the other rows, as so many of one example.

    >>> each_row(Cotangents.of(torch.ones(2, 3, 4)), 3).take(0, 6).shape
    torch.Size([6, 1, 3, 4])
    """

    def take(start: int, stop: int) -> Tensor:
        first = start // rows
        s = cotangents.take(first, -(-stop // rows))
        k = torch.arange(start, stop, device=s.device) - first * rows
        found = s.new_zeros(len(k), *s.shape[1:])
        found[torch.arange(len(k), device=s.device), k % rows] = s[k // rows, k % rows]
        return found.unsqueeze(1)

    return Cotangents(cotangents.count * rows, take)


def all_rows(cotangents: Cotangents, rows: int) -> Cotangents:
    """Those of all rows of an output together as one of one example: a draw of all of them."""
    return Cotangents(cotangents.count, lambda start, stop: cotangents.take(start, stop).unsqueeze(1))


def of_rows(cotangents: OfSeveral, laid: Callable[[Cotangents, int], Cotangents]) -> OfSeveral:
    """The cotangents of a minibatch from those of the rows of its output.

    laid: :func:`each_row` or :func:`all_rows`.
    """

    def several(f: Tensor, batches: Sequence[data.Batch], position: int) -> Cotangents | None:
        rows = _rows(f)
        found = cotangents(rows, [replace(data.known(batch), n=len(rows)) for batch in batches], position)
        return None if found is None else laid(found, len(rows))

    return OfSeveral(several)


def curvature_of_rows(curvature: Curvature) -> Curvature:
    """The curvature of a minibatch from that of the rows of its output."""

    def of_minibatch(f: Tensor, u: Tensor, batch: data.Batch, position: int) -> Tensor:
        rows = _rows(f)
        return curvature(rows, u[0], replace(data.known(batch), n=len(rows)), position).unsqueeze(0)

    return of_minibatch


def _rows(f: Tensor) -> Tensor:
    if f.ndim < 2:
        raise ValueError(
            'unit="minibatch": the model returned one number for a minibatch, but the likelihood of a minibatch is the '
            "product of those of the rows of its output: return (rows, ...)"
        )
    return f[0]


class UndividedLoss(OutputLoss):
    """The loss of a whole minibatch as that of one example, with the output ``(1, *output)``: ``loss(output,
    *targets)`` with its own reduction, summed if that leaves several values.

    loss: of ``torch.nn``, an :class:`OutputLoss` or any function, whose values may depend on everything.
    """

    def __init__(self, loss: Loss) -> None:
        self.loss = loss
        found = example_loss(loss)
        #: If it is a sum over the rows of the output, up to a factor.
        self._of_rows = None if isinstance(found, ByExample) else found
        self._value = arguments.explaining(loss, self._checked)
        self._positive: set[torch.Size] = set()

    def _checked(self, output: Tensor, *targets: Any) -> Tensor:
        if isinstance(self._of_rows, OfTorch):
            targets = self._of_rows.aligned(output, *targets)
        value = self.loss(output, *targets)
        if not isinstance(value, Tensor):
            raise TypeError(f"loss: expected a tensor, the loss of the minibatch, got {arguments.described(value)}")
        if output.requires_grad and not value.requires_grad:
            raise ValueError("loss: its value does not depend on the outputs (detached, or not differentiable)")
        value = value.sum()
        if not bool(torch.isfinite(value.detach())):
            raise ValueError("loss: its value for a minibatch is NaN or infinite: check the targets")
        return value

    def total(self, f: Tensor, *targets: Any) -> Tensor:
        return self._value(f[0], *targets)

    def gradient(self, f: Tensor, *targets: Any) -> Tensor:
        gradient = super().gradient(f, *targets)
        if not bool(torch.isfinite(gradient).all()):
            raise ValueError("loss: its gradient has NaN or infinite entries: check the targets of this minibatch")
        return gradient

    def hvp(self, f: Tensor, u: Tensor, *targets: Any) -> Tensor:
        closed = self._closed(f[0], *targets)
        if closed is not None:
            of_rows, factor = closed
            return of_rows.hvp(f[0], u[0], *targets).mul(factor).unsqueeze(0)
        hessian = OutputHessian(lambda leaf: self.total(leaf, *targets), f)
        if f.shape not in self._positive:
            hessian.check_positive()
            self._positive.add(f.shape)
        return hessian.mv(u)

    def sqrt(self, f: Tensor, *targets: Any) -> Cotangents:
        closed = self._closed(f[0], *targets)
        if closed is not None:
            of_rows, factor = closed
            found = each_row(of_rows.sqrt(f[0], *targets), len(f[0]))
            return Cotangents(found.count, lambda start, stop: found.take(start, stop) * factor**0.5)
        k = f.numel()
        require(
            2 * k * k * f.element_size(),
            f"the Hessian of the loss in the {k} outputs of a minibatch",
            "use PMatImplicit, or smaller minibatches",
            f.device,
        )
        return super().sqrt(f, *targets)

    def _closed(self, output: Tensor, *targets: Any) -> tuple[OutputLoss, float] | None:
        """The loss as a sum over rows, and what the loss of this minibatch is of that, if it is a multiple of it."""
        with no_grad():
            value = float(self._value(output, *targets))
            if self._of_rows is None or output.ndim == 0:
                return None
            total, weight = float(self._of_rows.total(output, *targets)), self._of_rows.weight(output, *targets)
        reduction = getattr(self.loss, "reduction", None)
        factor = 1.0 if reduction in ("none", "sum") or not self._of_rows.mean else 1 / weight
        return (self._of_rows, factor) if abs(value - factor * total) <= _SAME * abs(value) else None


#: What counts as equal of two numbers that may be made in single precision.
_SAME = 1e-5
