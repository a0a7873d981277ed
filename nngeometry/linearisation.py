"""Products with a matrix by automatic differentiation, free of the number of outputs and of P x P.

Only reverse mode is used, twice where a forward mode would do: J v is the derivative of the linear map u -> J^T u,
which costs as much as a forward-mode product, keeps its graph from one product to the next, and is right wherever
the gradient is (torch's forward mode is missing for fused attention and weight_norm, and disagrees with the
gradient on padding).
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable, Iterator, Sequence
from functools import cache, partial
from itertools import chain, islice
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.autograd.function import BackwardCFunction

from .changes import Borrowed, Change, Changed, differentiable_attention, entered, no_grad
from .derivatives.cheap import CheapDerivatives, Pulled, SecondPull, Value
from .derivatives.pulling import BatchedVJP, accumulate, check_twice, nodes, operations_named
from .memory import budget, chunk_length
from .model import data
from .model.evaluator import MIXES, Evaluator, State, check_same, counted
from .model.weights import Weights
from .reading import team_of

#: From vectors ``(k, P)`` and where to add their products ``(k, P)``: sums over one minibatch, not divided by anything.
Product = Callable[[Tensor, Tensor], None]
#: From neighbouring minibatches and the position of the first to the linear map of them, what they count in the mean,
#: and the tensors from which autograd will start.
Linearise = Callable[[list[data.Batch], int], tuple[Any, float, Sequence[Tensor]]]

#: From a minibatch to the sum of its losses and what a mean counts it as.
Total = Callable[[data.Batch], tuple[Tensor, float]]

#: How many times what the model makes is kept, to differentiate it twice.
_COPIES = 4


class Linearisations:
    """Every minibatch made a linear map at the parameters as they are now.

    evaluator: the model. linearise: how a minibatch gives its map. If what autograd saved for them fits the memory
    budget, all minibatches are linearised once and kept, so that a product costs no forward pass; otherwise the data
    are read and linearised again whenever they are iterated. others: what takes part beside the model, a loss.
    """

    def __init__(
        self, evaluator: Evaluator, examples: Any, linearise: Linearise, others: Sequence[nn.Module] = ()
    ) -> None:
        data.require_repeatable(examples, "a matrix or map known by its products")
        self.evaluator = evaluator
        self.examples = examples
        self.team = team_of(examples)
        self.linearise = linearise
        named = evaluator.layer_collection.named_parameters(evaluator.model)
        self._names, self._theirs = zip(*named, strict=True)
        self.weights = Weights([evaluator.model, *others], self._theirs)
        self.values = self.weights.values
        self.edges = self.weights.edges
        self.dtype, self.device = self.values[0].dtype, self.values[0].device
        self._kept: list[tuple[Any, float, int]] | None = None
        self._pull = BatchedVJP()
        self._used = False
        #: What must be in force on the way back: nothing, unless something of the model is run again there.
        self._replay: tuple[Change, ...] | None = None
        self.checked = False
        self.apart = False
        self._norms = evaluator.norms_as_in_training()

    def __iter__(self) -> Iterator[tuple[Any, float, int]]:
        """The map of every minibatch, what it counts in a mean, and the bytes that one vector takes in it."""
        return self.each()

    def each(self, single: bool = False, sized: bool = True) -> Iterator[tuple[Any, float, int]]:
        """The same. single: this may be the only time, so that of several minibatches none is kept the first time, but
        all are the second time. sized: whether the bytes are asked for; without, they may be zero.
        """
        self.evaluator.check_mode()
        if self._kept is None and self._norms != self.evaluator.norms_as_in_training():
            raise ValueError(
                "the model has other norms in train mode than when this was made of it: put it into that mode again "
                "(model.train(), model.eval()), or make it again"
            )
        return iter(self._kept) if self._kept is not None else self._linearised(single, sized)

    def _linearised(self, single: bool, sized: bool) -> Iterator[tuple[Any, float, int]]:
        """All minibatches linearised; all are kept if together they fit, and if there may be more products."""
        evaluator = self.evaluator
        groups = evaluator.joined(self.examples, lambda b: _COPIES * evaluator.dry_run(b, self.weights.in_place).made)
        head = list(islice(groups, 2))
        once, self._used = single and not self._used, True
        keep: list[tuple[Any, float, int]] | None = None if once and len(head) > 1 else []
        for position, batches in chain(head, groups):
            made = self._prepare(position, batches, sized or keep is not None)
            if keep is not None:
                keep.append(made)
                keep = keep if sum(held for *_, held in keep) <= budget(evaluator.device) else None
            yield made
            del made
        self._kept = keep

    def _prepare(self, position: int, batches: list[data.Batch], sized: bool) -> tuple[Any, float, int]:
        within: list[Change] = []
        if self.evaluator.batch_statistics or self.evaluator.undivided:
            with Borrowed(self.weights.in_place):
                within = [change for batch in batches for change in self.evaluator.within(batch)]
        self.apart = self.evaluator.called_apart(batches[0]) is not None
        if self.apart:  # by what the types of the modules are there is nothing to look at
            with self.evaluator.running(self.weights.in_place, *within), operations_named():
                made, weight, roots = self.linearise(batches, position)
        else:
            made, weight, roots = self._looked_at(position, batches, within)
        self.checked = True
        if not sized:
            return made, weight, 0
        # What is made again on the way back would be made to be counted: it is taken for too much to keep.
        held = saved_bytes(roots) if self._replay is None else budget(self.evaluator.device) + 1
        return made, weight, held

    def _looked_at(
        self, position: int, batches: list[data.Batch], within: Sequence[Change]
    ) -> tuple[Any, float, Sequence[Tensor]]:
        """What a minibatch gives, with a look at what the model does to itself, thorough for the first one."""
        first = not self.checked
        state, before = State(self.evaluator.model, values=first), self.weights.marks() if first else None

        def look() -> tuple[Any, float, Sequence[Tensor]]:
            if not within:
                return self.linearise(batches, position)
            with Borrowed(*within):
                return self.linearise(batches, position)

        with self.evaluator.running(self.weights.in_place, state, differentiable_attention), operations_named():
            made = look()
            state.check(look)
            if first:
                self.weights.check(before)
        if first:
            self.weights.check_reached(nodes(made[2]), self._theirs, self._name_of)
        return made

    def _name_of(self, parameter: Tensor) -> str:
        return next(name for name, p in zip(self._names, self._theirs, strict=True) if p is parameter)

    def outputs(self, batch: data.Batch) -> Tensor:
        """The outputs of the model, recorded by operations that have cheap derivatives."""
        return self.evaluator.outputs(batch) if self.apart else self.evaluator.outputs_of(batch)

    def customs(self, root: Tensor) -> bool:
        """Whether something in a graph has a backward of the user's."""
        return not self.apart and any(custom(node) for node in nodes([root]))

    def recorded(self, function: Callable[..., Any], *arguments: Any) -> tuple[CheapDerivatives, Any]:
        """``function(*arguments)`` with operations that have cheap derivatives, and their mode."""
        derivatives = CheapDerivatives()
        with Changed(entered(derivatives)):
            found = function(*arguments)
        if derivatives.replayed:
            self.replay()
        return derivatives, found

    def replay(self) -> None:
        """From now on have the model as it was on the way back too: it is run again there, by activation checkpoints or
        a user's backward.
        """
        self._replay = (self.weights.in_place, differentiable_attention)

    def _back(self, within: Sequence[Change]) -> Borrowed:
        """What is in force on the way back."""
        return Borrowed() if self._replay is None else self.evaluator.running(*self._replay, *within, record=False)

    def pull(
        self,
        outputs: Sequence[Tensor],
        inputs: Sequence[Tensor],
        weights: Sequence[Tensor],
        within: Sequence[Change] = (),
    ) -> list[Tensor]:
        """Vector-Jacobian products for every row of ``weights``, zero for an input that is not used.

        within: what was in force on the way there, see :meth:`Evaluator.within`.
        """
        with self._back(within), operations_named():
            grads = self._pull(outputs, inputs, weights)
        k = len(weights[0])
        return [x.new_zeros(k, *x.shape) if g is None else g for x, g in zip(inputs, grads, strict=True)]

    def add_pulled(
        self, outputs: Sequence[Tensor], weights: Sequence[Tensor], into: Tensor, within: Sequence[Change] = ()
    ) -> None:
        """Add vector-Jacobian products with respect to the parameters, for every row of ``weights``, to ``(k, P)``.

        within: as of :meth:`pull`.
        """
        with self._back(within), operations_named():
            if len(into) == 1 and into.dtype == self.dtype:
                accumulate(outputs, self.edges, [w[0] for w in weights], split_like(into[0], self.values))
                return
            grads = self._pull(outputs, self.edges, weights)
        pieces = into.split([p.numel() for p in self.values], 1)
        for piece, grad in zip(pieces, grads, strict=True):
            if grad is not None:
                piece += (grad.to_dense() if grad.is_sparse else grad).reshape(len(piece), -1)


class Products(Linearisations):
    """``V -> M V`` for a matrix that is a sum over minibatches. mean: whether it is divided by what they count."""

    def __init__(self, evaluator: Evaluator, examples: Any, linearise: Linearise, mean: bool = True) -> None:
        super().__init__(evaluator, examples, linearise)
        self.mean = mean

    def __call__(self, V: Tensor) -> Tensor:
        """``(k, P) -> (k, P)``."""
        return self._product(V, self)

    def once(self, V: Tensor) -> Tensor:
        """The same, which keeps nothing for a second product if it is the first."""
        return self._product(V, self.each(single=True, sized=len(V) > 1))

    def _product(self, V: Tensor, maps: Iterable[tuple[Any, float, int]]) -> Tensor:
        V = V.detach().to(self.dtype)
        out = torch.zeros_like(V, dtype=self.evaluator.dtype)
        #: What was seen counts together.
        self.weight = self.team.summed(out, partial(self._add, V, maps), V)
        return out.div_(counted(self.weight)) if self.mean else out

    def _add(self, V: Tensor, maps: Iterable[tuple[Any, float, int]], out: Tensor) -> float:
        """Add the sum over the minibatches of this process to out. Returns what they count."""
        total = 0.0
        for product, weight, held in maps:
            for rows, into in zip(V.split(step := chunk_length(held, len(V), V.device)), out.split(step), strict=True):
                product(rows, into)
            total += weight
            del product  # the graph of a minibatch that is not kept, before the next one is made
        return total


class LinearisedBatch:
    """The Jacobian J of one minibatch: ``J v`` is the derivative of the linear map from u to ``J^T u``."""

    def __init__(self, maps: Linearisations, batch: data.Batch) -> None:
        self.maps = maps
        self.within = maps.evaluator.within(batch)
        derivatives, self.f = maps.recorded(maps.outputs, batch)
        self._customs = maps.customs(self.f)
        if self._customs:
            maps.replay()
        self.u = torch.zeros_like(self.f, requires_grad=True)
        with derivatives.at_zero():
            self.pulled = _differentiable(_gradient(self.f, maps, self.u, "the output of the model"))

    @property
    def roots(self) -> list[Tensor]:
        """Where autograd starts."""
        return [self.f, *(g for _, g in self.pulled)]

    def jvp(self, V: Tensor) -> Tensor:
        """``(k, P) -> (k, *output)``."""
        shares = _shares(V, self.maps.values, self.pulled)
        (jv,) = self.maps.pull([g for _, g in self.pulled], [self.u], shares, self.within)
        return jv

    def add_vjp(self, S: Tensor, into: Tensor) -> None:
        """Add ``J^T s`` for each s of ``(k, *output)`` to ``(k, P)``."""
        self.maps.add_pulled([self.f], [S], into, self.within)

    def check(self, batch: data.Batch) -> bool:
        """Raise if examples mix, or if an operation has a backward that cannot be differentiated; once for all
        minibatches, and whether it was now.
        """
        if self.maps.checked:
            return False
        if not self.maps.apart and not self.maps.evaluator.undivided:
            self.maps.evaluator.apart(batch, self._check_alone)
        if self._customs:
            check_transpose(self.maps.edges, self.f, self.u, self.pulled)
        return True

    def _check_alone(self, batch: data.Batch) -> None:
        n = len(self.f)
        some = [n // 2, 0][:n]  # in another order: examples may depend on those before
        if self.maps.evaluator.needs_order(batch):
            some = [n - 1]
        alone = self.maps.evaluator.outputs_of(data.take(batch, torch.tensor(some))).detach()
        fixed = self.f.detach()
        check_same(alone, fixed[some], fixed, "the output for one example depends on the others", MIXES)


class Curved(Protocol):
    """What the Gauss-Newton matrix of a model is made of beside its Jacobian: see :class:`~nngeometry.Generator`."""

    seed: int
    mean: bool
    weigh: Callable[[Tensor, data.Batch], float]

    @property
    def cotangents(self) -> Callable[[Tensor, Sequence[data.Batch], int], Any]:
        """The s_c of neighbouring minibatches laid end to end."""
        ...

    def curvature(self, f: Tensor, batches: Sequence[data.Batch], position: int) -> Callable[[Tensor], Tensor]:
        """From u in the shape of f to ``sum_c s_c (s_c . u)`` of each example."""
        ...


def gauss_newton(evaluator: Evaluator, curved: Curved, examples: Any) -> Products:
    """Products with ``sum_x J^T (sum_c s_c s_c^T) J``: J v, then the curvature, then J^T."""

    def linearise(batches: list[data.Batch], position: int) -> tuple[Product, float, Sequence[Tensor]]:
        linear = LinearisedBatch(products, batch := data.join(batches))
        fixed = linear.f.detach()
        rows = data.split(fixed, batches)
        if linear.check(batch):
            curved.cotangents(rows[0], batches[:1], curved.seed + position)  # for the checks in there
        curvature = curved.curvature(fixed, batches, curved.seed + position)

        def product(V: Tensor, into: Tensor) -> None:
            linear.add_vjp(torch.stack([curvature(one) for one in linear.jvp(V)]), into)

        return product, sum(map(curved.weigh, rows, batches)), linear.roots

    products = Products(evaluator, examples, linearise, curved.mean)
    return products


def jacobians(evaluator: Evaluator, examples: Any) -> Linearisations:
    """The Jacobian of every minibatch, as a :class:`LinearisedBatch`."""

    def linearise(batches: list[data.Batch], position: int) -> tuple[LinearisedBatch, float, Sequence[Tensor]]:
        linear = LinearisedBatch(maps, batch := data.join(batches))
        linear.check(batch)
        return linear, len(linear.f), linear.roots

    maps = Linearisations(evaluator, examples, linearise)
    return maps


def check_transpose(params: Sequence[Any], f: Tensor, u: Tensor, pulled: Sequence[tuple[int, Tensor]]) -> None:
    """Raise unless J v, by double backward, is the transpose of J^T u: not so if a custom backward hides from
    autograd.
    """
    w = torch.cos(torch.arange(1, f.numel() + 1, dtype=f.dtype, device=f.device)).view(f.shape)
    v = [torch.sin(torch.arange(1, g.numel() + 1, dtype=g.dtype, device=g.device)).view(g.shape) for _, g in pulled]
    jv = torch.autograd.grad([g for _, g in pulled], u, v, retain_graph=True, allow_unused=True)[0]
    inputs = [params[k] for k, _ in pulled]
    jw = torch.autograd.grad(f, inputs, w, retain_graph=True)
    with no_grad():
        one = 0.0 if jv is None else float((w * jv).sum())
        other = float(sum((a * b).sum() for a, b in zip(v, jw, strict=True)))
        size = float(sum((a * b).abs().sum() for a, b in zip(v, jw, strict=True)))
    if abs(one - other) > 1e-3 * size:
        raise NotImplementedError(
            "the backward of some operation cannot be differentiated (a custom autograd function with detached or "
            "once_differentiable backward): use a representation that is made of Jacobians, e.g. PMatLowRank"
        )


def hessian(evaluator: Evaluator, examples: Any, total: Total, mean: bool) -> Products:
    """Products with the Hessian of a loss: the derivative of its gradient along a vector."""

    def linearise(batches: list[data.Batch], position: int) -> tuple[Product, float, Sequence[Tensor]]:
        within = evaluator.within(batch := data.join(batches))
        derivatives, (value, weight) = products.recorded(total, batch)
        check_second_derivatives(value)
        if products.customs(value):
            products.replay()
        with derivatives.without_values():
            # With a cotangent that is differentiated too, functions that are once differentiable show.
            one = torch.ones_like(value, requires_grad=True) if any(map(custom, nodes([value]))) else None
            gradient = _gradient(value, products, one, "the loss")
            if one is not None:
                check_twice(gradient)
            curved = _differentiable(gradient)

        def product(V: Tensor, into: Tensor) -> None:
            if curved:
                products.add_pulled([g for _, g in curved], _shares(V, products.values, curved), into, within)

        return product, weight, [value, *(g for _, g in curved)]

    products = Products(evaluator, examples, linearise, mean)
    return products


INDEPENDENT = "does not depend on the collected parameters: does function= use another model, or a copy?"


def _gradient(value: Tensor, maps: Linearisations, weight: Tensor | None, what: str) -> list[Tensor]:
    """A gradient that can be differentiated again."""
    found: Sequence[Tensor | None] = [None] * len(maps.edges)
    if value.requires_grad:
        found = torch.autograd.grad(value, maps.edges, weight, create_graph=True, allow_unused=True)
    if all(g is None for g in found):
        raise ValueError(f"{what} {INDEPENDENT}")
    return [torch.zeros_like(p) if g is None else g for g, p in zip(found, maps.values, strict=True)]


def _differentiable(gradient: Sequence[Tensor]) -> list[tuple[int, Tensor]]:
    """Those entries of a gradient that depend on something, with their positions."""
    return [(k, g) for k, g in enumerate(gradient) if g.requires_grad]


def _shares(V: Tensor, params: Sequence[Tensor], wanted: Sequence[tuple[int, Tensor]]) -> list[Tensor]:
    """The shares of flat rows ``(k, P)`` that belong to the wanted parameters, ``(k, *shape)`` each. The entries of a
    row lie side by side: kernels of torch take that for granted without a look (that of batch normalisation).
    """
    pieces = V.contiguous().split([p.numel() for p in params], 1)
    return [pieces[k].reshape(-1, *params[k].shape) for k, _ in wanted]


def split_like(v: Tensor, params: Sequence[Tensor]) -> list[Tensor]:
    """Flat parameters ``(P,)`` in the shapes of ``params``."""
    return [piece.view_as(p) for piece, p in zip(v.split([p.numel() for p in params]), params, strict=True)]


#: Nodes of torch's autograd graph whose own derivative is wrong (found by comparing with central differences), and
#: the remedy.
WRONG_SECOND_DERIVATIVE = {
    "WeightNormInterfaceBackward0": "torch.nn.utils.weight_norm (old and parametrised)",
}


def check_second_derivatives(value: Tensor) -> None:
    """Raise ``NotImplementedError`` if torch's second derivative of something in the graph is known to be wrong."""
    for node in nodes([value]):
        if node.name() in WRONG_SECOND_DERIVATIVE:
            raise NotImplementedError(
                f"the second derivative of {WRONG_SECOND_DERIVATIVE[node.name()]} is wrong in torch: use GGN, remove "
                "the normalisation, or pass products=FiniteDifference()"
            )


def custom(node: Any) -> bool:
    """Whether a node is a backward written in Python, which need not be differentiable, and not one of ours."""
    return isinstance(node, BackwardCFunction) and not issubclass(type(node)._forward_cls, Value | Pulled | SecondPull)  # type: ignore[attr-defined]


@cache
def _saved_names(node_type: Hashable) -> list[str]:
    return [name for name in dir(node_type) if name.startswith("_saved_") or name == "saved_tensors"]


def saved_bytes(roots: Sequence[Tensor]) -> int:
    """Bytes of the tensors that autograd saved for the graphs of some tensors, each counted once."""
    sizes: dict[int, int] = {}
    for node in nodes(roots):
        for name in _saved_names(type(node)):  # type: ignore[arg-type]
            value = getattr(node, name, None)
            for t in value if isinstance(value, tuple | list) else (value,):
                if isinstance(t, Tensor) and t.layout == torch.strided:
                    sizes[t.data_ptr()] = max(sizes.get(t.data_ptr(), 0), t.numel() * t.element_size())
    return sum(sizes.values())
