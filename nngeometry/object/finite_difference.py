"""Products with the Hessian of a loss by central differences of its gradient, each with an estimate of its error."""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import cached_property, partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.autograd.graph import get_gradient_edge
from torch.linalg import vector_norm
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from ..linearisation import INDEPENDENT, Linearisations, Total, split_like
from ..memory import nbytes_of
from ..model import data
from ..model.entries import same_entries
from ..model.evaluator import Evaluator, State, counted
from ..model.weights import WRITES_WEIGHTS

#: From one step to the next.
_RATIO = 4
#: How many shorter and longer steps are tried where the first one does not do.
_SHORTER, _LONGER = 9, 5
#: How often the examples are parted in two where no step does for all of them.
_PARTINGS = 8
#: What a model raises that does not run in another precision, or on other examples.
_FAILURES = (RuntimeError, TypeError, ValueError, NotImplementedError)


class Differences(Linearisations):
    """``V -> H V`` for the Hessian of a loss, by central differences of its gradient: to within rtol, or not at all.

    total: the summed loss of a minibatch. others: what has parameters and buffers that take part beside the model.
    mean: whether the sum over minibatches is divided by what they count. step: how far parameters are moved at first,
    for a vector whose largest entry is one; None for the third root of the machine epsilon. rtol: None for
    1e-9 in float64 and 1e-3 otherwise.

    Every minibatch chooses the step of its own part of a product (:meth:`Gradient.along`). The error of the sum is
    compared with the length of H v or, where H takes nearly all of a vector away, with what it is for a vector of that
    length in a direction without structure.
    """

    def __init__(
        self,
        evaluator: Evaluator,
        examples: Any,
        total: Total,
        others: Sequence[nn.Module],
        mean: bool,
        step: float | None = None,
        rtol: float | None = None,
    ) -> None:
        super().__init__(evaluator, examples, lambda batches, position: self._gradient(batches), others)
        self.total = total
        self.mean = mean
        self.step = step
        self.rtol = rtol if rtol is not None else 1e-9 if self.dtype == torch.float64 else 1e-3
        #: Of the error in the product of one minibatch, whose errors add up.
        self.allowed = self.rtol / 2

    def _gradient(self, batches: list[data.Batch]) -> tuple[Gradient, float, Sequence[Tensor]]:
        gradient = Gradient(self, data.join(batches))
        return gradient, gradient.weight, ()

    def _prepare(self, position: int, batches: list[data.Batch], sized: bool) -> tuple[Gradient, float, int]:
        gradient, weight, _ = super()._prepare(position, batches, sized)
        return gradient, weight, nbytes_of([*data.tensors_of(gradient.batch), gradient.origin])

    def __call__(self, V: Tensor) -> Tensor:
        """``(k, P) -> (k, P)``.

        Raises ``RuntimeError`` if the estimated error of a product is above rtol.
        """
        sizes = V.detach().abs().amax(1, keepdim=True).to(self.evaluator.dtype)
        sizes = sizes.where(sizes != 0, 1.0)
        V = V.detach() / sizes
        finite = torch.isfinite(sizes)
        V = V.where(finite, 0.0)
        both = V.new_zeros(len(V), V.shape[1] + 1, dtype=self.evaluator.dtype)
        total = self.team.summed(both, partial(self._add, V), V)
        out, errors = both[:, :-1], both[:, -1].tolist()
        for v, product, error in zip(V, out, errors, strict=True):
            if not error <= self.rtol * float(vector_norm(product)):
                scale = max(float(vector_norm(product)), self._typical * float(vector_norm(v)))
                if not error <= self.rtol * scale:
                    raise RuntimeError(self._refusal(error / scale if scale else math.inf))
        #: What was seen counts together.
        self.weight = total
        out = (out / counted(total) if self.mean else out) * sizes
        return out.where(finite, math.nan)

    def _add(self, V: Tensor, both: Tensor) -> float:
        """Add the products over the minibatches of this process, and their errors behind them. Returns what they
        count.
        """
        total = 0.0
        for gradient, weight, _ in self:
            for k, v in enumerate(V):
                found = gradient.along(v)
                both[k, :-1] += found.product
                both[k, -1] += found.error
            total += weight
        return total

    def at_origin(self, dtype: torch.dtype) -> bool:
        """Whether the parameters that the model holds now are those that products are taken at."""
        return all(same_entries(p.detach(), v.to(dtype)) for p, v in zip(self._theirs, self.values, strict=True))

    @cached_property
    def _typical(self) -> float:
        """How much longer the Hessian of the sum makes a vector without structure."""
        image = torch.zeros(sum(p.numel() for p in self.values), dtype=self.evaluator.dtype, device=self.device)

        def add(out: Tensor) -> float:
            for gradient, *_ in self:
                out += gradient.image
            return 0.0

        self.team.summed(image, add)
        return float(vector_norm(image))

    def _refusal(self, error: float) -> str:
        return (
            f"FiniteDifference: the estimated relative error of a Hessian product is {error:.1e}, above "
            f"rtol={self.rtol:.0e}: along the vector the loss has kinks too near the parameters (ReLU, max-pooling), "
            "or it is computed in too low a precision: allow more with rtol=, try another step=, use Hessian "
            "without products= if the model can be differentiated twice, or GGN"
        )


class Estimate(NamedTuple):
    """A product, the estimated length of its error, and the step that it was found with."""

    product: Tensor
    error: float
    step: float

    @property
    def size(self) -> float:
        """Its length."""
        return float(vector_norm(self.product))


class Gradient:
    """The gradient of the summed loss of one minibatch, as a function of the parameters.

    It is computed in float64, whatever the model is in, if the model runs in it; otherwise in what the model is in.
    """

    def __init__(self, maps: Differences, batch: data.Batch) -> None:
        self.maps = maps
        self.batch = batch
        self.dtype = torch.float64
        try:
            with Roundings() as seen:
                self.origin, self.weight = self._moved(None)
        except _FAILURES:
            if maps.values[0].dtype == torch.float64:
                raise
            # Some of what it computes with stays in another precision, or the device has no float64.
            self.dtype = maps.values[0].dtype
            with Roundings() as seen:
                self.origin, self.weight = self._moved(None)
        self.eps = max(seen.eps, torch.finfo(self.dtype).eps)
        #: Shorter steps do not change the parameters much more than rounding does.
        self.finest = 1e3 * self.eps * max(float(p.detach().abs().max()) for p in maps.values if p.numel())

    def along(self, v: Tensor) -> Estimate:
        """The Hessian times v, whose largest entry is one or zero, and the estimated length of its error.

        Shorter steps are tried where the first one does not do, to leave kinks behind, until rounding alone would break
        the promise; then longer ones, to leave rounding behind; then the examples are parted, so that each part chooses
        its own step. The best is returned if none of that will do.
        """
        if not bool(v.any()):
            return Estimate(torch.zeros_like(v), 0.0, self._first)
        v = v.to(self.dtype)
        best = self._shorter(v, 0.0, 0.0)
        if not self._does(best, 0.0):
            enough = self.maps.allowed * float(vector_norm(self.image)) * float(vector_norm(v))
            if best.step == self._first:  # a shorter one, if that was better, had been nearer than a kink
                best = self._longer(v, best, enough)
            best = self._parted(v, best, enough, _PARTINGS)
        return best

    def _does(self, found: Estimate, enough: float) -> bool:
        """Whether an error is small next to the product, or in absolute terms."""
        return found.error <= max(enough, self.maps.allowed * found.size)

    def _shorter(self, v: Tensor, enough: float, limit: float) -> Estimate:
        """The first step or a shorter one. limit: up to where rounding is let grow."""
        noise = self.eps * float(vector_norm(self.origin))
        best = self._difference(v, step := self._first)
        for _ in range(_SHORTER):
            step /= _RATIO
            limit = max(limit, self.maps.allowed * best.size)
            if self._does(best, enough) or (math.isfinite(best.error) and noise > limit * step):
                break
            best = min(best, self._difference(v, step), key=_error)
        return best

    def _longer(self, v: Tensor, best: Estimate, enough: float) -> Estimate:
        step = self._first
        for _ in range(_LONGER):
            if self._does(best, enough):
                break
            step *= _RATIO
            best = min(best, self._difference(v, step), key=_error)
        return best

    def _parted(self, v: Tensor, best: Estimate, enough: float, depth: int) -> Estimate:
        if self._does(best, enough) or depth == 0 or not (halves := self._halves()):
            return best
        size = best.size
        if best.error < 0.1 * size:
            enough = max(enough, self.maps.allowed * size)
        one, other = (half._parted(v, half._shorter(v, enough / 2, enough), enough / 2, depth - 1) for half in halves)
        return min(best, Estimate(one.product + other.product, one.error + other.error, best.step), key=_error)

    def _halves(self) -> list[Gradient]:
        """The same of either half of the examples, nothing if the gradient is not their sum."""
        n = data.count(self.batch)
        if n < 2 or not data.aligned(self.batch):
            return []
        try:
            halves = [Gradient(self.maps, data.take(self.batch, index)) for index in torch.arange(n).tensor_split(2)]
        except _FAILURES:
            return []
        one, other = (half.origin for half in halves)
        tolerance = self.eps**0.5 * float(vector_norm(one) + vector_norm(other))
        return halves if float(vector_norm(self.origin - one - other)) <= tolerance else []

    @property
    def _first(self) -> float:
        step = self.maps.step
        return self.eps ** (1 / 3) if step is None else step

    def _difference(self, v: Tensor, h: float) -> Estimate:
        """The derivative of the gradient along v from the steps h and h/2, and its estimated error.

        ``R(h) = (4 D(h/2) - D(h)) / 3`` with D the central difference is right up to h^4 where the loss is smooth.
        Kinks, be they of the gradient or of its derivative, and rounding show in two ways. One is what they are to
        either side: in S(h), the second difference divided by h, all is proportional to h up to h^3 where the loss is
        smooth, and the error is what there is more in ``S(h) - 2 S(h/2)``. That does not see what has opposite signs on
        both sides, a sign at the parameters: the other is the change from D(h) to D(h/2), or if that is large, as it
        may be for the curvature, from R(h) to R(h/2).
        """
        if h < self.finest:
            return Estimate(torch.zeros_like(v), math.inf, h)
        try:
            (far, _), (back, _) = self._moved(h * v), self._moved(-h * v)
            (near, _), (before, _) = self._moved(h / 2 * v), self._moved(-h / 2 * v)
            wide, narrow = (far - back) / (2 * h), (near - before) / h
            product = (4 * narrow - wide) / 3
            error = float(vector_norm(far + back - 4 * (near + before) + 6 * self.origin)) / (2 * h)
            change = float(vector_norm(wide - narrow))
            size = self.maps.rtol * float(vector_norm(product))
            if change > size / 2 and error <= size:
                (near, _), (before, _) = self._moved(h / 4 * v), self._moved(-h / 4 * v)
                change = float(vector_norm(4 * (near - before) / (h / 2) - 5 * narrow + wide)) / 3
        except ValueError:  # not in the domain of the model
            error = change = math.inf
        error = max(error, change)
        if not math.isfinite(error):
            return Estimate(torch.zeros_like(v), math.inf, h)
        return Estimate(product, error, h)

    @cached_property
    def image(self) -> Tensor:
        """The Hessian times a unit vector without structure, or zero if that is not known to a tenth."""
        v = torch.cos(torch.arange(1, len(self.origin) + 1, dtype=self.dtype, device=self.origin.device))
        found = self._shorter(v / vector_norm(v), 0.0, 0.0)
        return found.product if found.error <= 0.1 * found.size else torch.zeros_like(found.product)

    def _moved(self, shift: Tensor | None) -> tuple[Tensor, float]:
        """The gradient at the parameters plus a shift ``(P,)``, and what the minibatch counts in a mean."""
        maps = self.maps
        leaves = [p.to(self.dtype, copy=True) for p in maps.values]
        if shift is not None:
            leaves = [p + s for p, s in zip(leaves, split_like(shift, leaves), strict=True)]
        edges = [get_gradient_edge(p.requires_grad_()) for p in leaves]
        state = State(maps.evaluator.model, values=True)
        with maps.evaluator.running(maps.weights.moved(leaves, self._cast), state):
            value, weight = maps.total(data.map_tensors(self._cast, self.batch))
            maps.weights.check()
            if shift is None and not maps.at_origin(self.dtype):
                raise ValueError(WRITES_WEIGHTS)
            state.check(lambda: maps.total(data.map_tensors(self._cast, self.batch)))
            grads: Sequence[Tensor | None] = [None] * len(edges)
            if value.requires_grad:
                grads = torch.autograd.grad(value, edges, allow_unused=True)
        if all(g is None for g in grads):
            raise ValueError(f"the loss {INDEPENDENT}")
        flat = [
            p.new_zeros(p.numel()) if g is None else (g.to_dense() if g.is_sparse else g).flatten().to(self.dtype)
            for g, p in zip(grads, maps.values, strict=True)
        ]
        return torch.cat([g.to(self.dtype) for g in flat]), weight

    def _cast(self, t: Tensor) -> Tensor:
        if self.dtype != torch.float64:  # the model is left in its own precision
            return t
        return t.to(torch.complex128) if t.is_complex() else t.to(self.dtype) if t.is_floating_point() else t


def _error(found: Estimate) -> float:
    return found.error


class Roundings(TorchDispatchMode):
    """Inside, the coarsest precision into which an operation puts what came in a finer one: ``eps``, zero if none."""

    def __init__(self) -> None:
        super().__init__()
        self.eps = 0.0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        to = _coarsest(out)
        if to > self.eps and to > min((_eps(t) for t in tree_leaves((args, kwargs)) if _eps(t)), default=to):
            self.eps = to
        return out


def _eps(t: Any) -> float:
    return torch.finfo(t.dtype).eps if isinstance(t, Tensor) and t.is_floating_point() else 0.0


def _coarsest(out: Any) -> float:
    return _eps(out) if isinstance(out, Tensor) else max(map(_eps, tree_leaves(out)), default=0.0)
