"""Kernels between outputs of examples: the tangent kernel, and the same through any matrix in parameter space."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from . import data
from .blocks import Block, Operator
from .generator import Generator
from .jacobian import of_outputs
from .layercollection import LayerCollection
from .memory import budget
from .object import FMatDense, FMatImplicit, PMat
from .object.fspace import FMat, Rectangular
from .object.implicit import diagonal_of_gram
from .object.kernel import Kernel, Tape
from .object.layouts import Diagonal, Full, Layout, Traced
from .object.map import PFMap, PFMapImplicit
from .object.storage import in_memory
from .object.vector import check_same_space

#: What ``output=`` accepts: which entries are kept.
OUTPUTS: dict[str, type[Layout]] = {
    "full": Full,
    "diag": Diagonal,
    "trace": Traced,
    "mean_trace": Traced,
    "sum": Traced,
}


def GramMatrix(
    model: nn.Module,
    loader: Any,
    loader2: Any = None,
    function: Callable[..., Any] | None = None,
    function2: Callable[..., Any] | None = None,
    model2: nn.Module | None = None,
    layer_collection: LayerCollection | None = None,
    representation: Any = FMatDense,
    output: str = "full",
    per_layer: bool = False,
    metric: PMat | None = None,
    centering: bool = False,
    *,
    device: torch.device | str | None = None,
    verbose: bool = False,
) -> Any:
    """The kernel ``K[c, x, d, y] = J[c, x] M J'[d, y]^T`` of Jacobians of outputs; with M the identity, the NTK.

    model, loader, function, layer_collection: as in :func:`~nngeometry.Jacobian`. loader2, function2, model2: the other
    side, where it differs: other examples, another function of the model, the model at other parameters. Each loader
    is read once, so that a shuffling or augmenting one is consistent.
    output: "full" ``(C, n, C', n')``; "diag" ``(C, n, n')``, each output with itself; "trace" and "mean_trace" ``(n,
    n')``, the sum and mean of these; "sum" ``(n, n')``, the kernel of the sum of outputs.
    per_layer: a dict of the kernels of the layers, which sum to the whole; not with a metric that couples layers.
    metric: M, a PMat or an inverse of one (``F.inv(r)``). centering: Jacobians less their mean over the examples of
    their side.
    representation: FMatDense; FMatImplicit, products by automatic differentiation; ``FMatMemmap.at(folder)``, on disk.

    Jacobians are kept in the form in which layers make them, in memory while they fit the memory budget, and made again
    for pairs of minibatches where they do not.

    >>> from nngeometry import GramMatrix
    >>> model = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3))
    >>> K = GramMatrix(model, (torch.randn(6, 4),))
    >>> K.to_torch().shape, K.trace() > 0
    (torch.Size([3, 6, 3, 6]), tensor(True))

    Source: Jacot, Gabriel and Hongler (2018), 1806.07572.
    """
    if output not in OUTPUTS:
        raise ValueError(f"GramMatrix: output={output!r} is not one of {', '.join(map(repr, OUTPUTS))}")
    lc = LayerCollection.from_model(model) if layer_collection is None else layer_collection
    if metric is not None:
        check_same_space(lc, metric.layer_collection, "metric")
    same = loader2 is None and function2 is None and model2 is None

    def side(model: nn.Module, function: Callable[..., Any] | None) -> Generator:
        wanted = summed(model, function) if output == "sum" else function
        return of_outputs(model, wanted, lc, device=device)

    left = side(model, function)
    right = left if same else side(model2 or model, function2 or function)
    if metric is not None and (metric.dtype != left.dtype or metric.device.type != left.device.type):
        raise ValueError(
            f"GramMatrix: the metric is {metric.dtype} on {metric.device}, the Jacobian {left.dtype} on {left.device}: "
            "move it with .to(device, dtype)"
        )
    groups: dict[str, tuple[str, ...]] = {name: (name,) for name in lc} if per_layer else {"": tuple(lc)}
    if per_layer and metric is not None:
        _check_separate(metric.root, lc)
    examples = list(left.minibatches(loader))
    examples2 = examples if loader2 is None else list(right.minibatches(loader2))
    root = None if metric is None else metric.root
    build = _implicit if representation is FMatImplicit else partial(_entries, representation, verbose)
    found = build(left, right, examples, examples2, same, OUTPUTS[output], groups, root, output == "mean_trace")
    if centering:
        found = {name: K.centred() for name, K in found.items()}
    return found if per_layer else found[""]


def summed(model: nn.Module, function: Callable[..., Any] | None) -> Callable[..., Tensor]:
    """The sum of the outputs of each example, as one output."""

    def total(*minibatch: Any) -> Tensor:
        f = model(minibatch[0]) if function is None else function(*minibatch)
        return f.flatten(1).sum(1, keepdim=True)

    return total


def _entries(
    representation: Any,
    verbose: bool,
    left: Generator,
    right: Generator,
    examples: list[data.Batch],
    examples2: list[data.Batch],
    same: bool,
    layout: type[Layout],
    groups: dict[str, tuple[str, ...]],
    metric: Block | None,
    mean: bool,
) -> dict[str, FMat]:
    symmetric = same and (metric is None or metric.symmetric)
    counts = [sum(map(data.count, batches)) for batches in (examples, examples2)]
    limit = budget() // 5  # for each side, and the rest for what it takes to make them
    one = Tape(left, examples, metric, counts[1], limit)
    two = None if symmetric else Tape(right, examples2, metric, counts[0], limit)
    outputs = one.outputs, one.outputs if two is None else two.outputs
    _check_outputs(outputs, left, right)
    chosen = layout(outputs, (counts[0], counts[1]))
    chosen.check()
    kernel = Kernel(one, two, chosen, groups, 1 / outputs[0] if mean else 1.0)
    fill: Callable[..., Any] = in_memory if representation is FMatDense else representation
    found: dict[str, FMat] = fill(kernel, verbose=verbose)
    return found


def _implicit(
    left: Generator,
    right: Generator,
    examples: list[data.Batch],
    examples2: list[data.Batch],
    same: bool,
    layout: type[Layout],
    groups: dict[str, tuple[str, ...]],
    metric: Block | None,
    mean: bool,
) -> dict[str, FMat]:
    one = PFMapImplicit.of(left, examples)
    two = one if same else PFMapImplicit.of(right, examples2)
    outputs = one.shape[0], two.shape[0]
    _check_outputs(outputs, left, right)
    chosen = layout(outputs, (one.shape[1], two.shape[1]))
    chosen.check()
    scale = 1 / outputs[0] if mean else 1.0
    slices = left.layer_collection.slices()
    found: dict[str, FMat] = {}
    for group, names in groups.items():
        whole = len(groups) == 1
        a, b = (one, two) if whole else (one.layer(names[0]), two.layer(names[0]))
        block = metric if metric is None or whole else metric.restrict(slices[names[0]])
        root = _products(a, b, chosen, block, same, scale, None if metric is not None else (left, examples, names))
        found[group] = FMatImplicit(root, chosen)
    return found


def _products(
    one: PFMap,
    two: PFMap,
    layout: Layout,
    metric: Block | None,
    same: bool,
    scale: float,
    exact: tuple[Generator, Any, tuple[str, ...]] | None,
) -> Block:
    def product(a: PFMap, b: PFMap, layout: Layout, metric: Block | None) -> Callable[[Tensor], Tensor]:
        def matvec(V: Tensor) -> Tensor:
            groups, _, columns = layout.shape
            w = b._vjp(layout.cotangents(V.view(-1, groups, columns)))
            w = w if metric is None else metric.mv(w)
            return scale * layout.collect(a._jvp(w)).reshape(len(V), -1)

        return matvec

    groups, rows, columns = layout.shape
    like = torch.empty(0, dtype=one.dtype, device=one.device)
    forward = product(one, two, layout, metric)
    if same and (metric is None or metric.symmetric):
        diagonal = None if exact is None else partial(_diagonal, *exact, layout, scale)
        trace = None if diagonal is None else lambda: diagonal().sum()
        psd = metric is None or metric.definite
        return Operator(forward, groups * rows, trace, diagonal, like, psd)
    back = product(two, one, layout.transpose(), None if metric is None else metric.transpose())
    return Rectangular(forward, back, (groups * rows,), (groups * columns,), like)


def _diagonal(generator: Generator, examples: Any, names: tuple[str, ...], layout: Layout, scale: float) -> Tensor:
    """The diagonal of a tangent kernel, from the squared norms of the Jacobian."""
    return scale * layout.of_squares(diagonal_of_gram(generator, examples, names)).flatten()


def _check_outputs(outputs: tuple[int, int], left: Generator, right: Generator) -> None:
    if outputs[0] != outputs[1] and left.function is right.function and left.model is right.model:
        raise ValueError(
            f"GramMatrix: the model has {outputs[0]} outputs for each example of loader and {outputs[1]} for those of "
            "loader2: if that is meant, pass function2"
        )


def _check_separate(metric: Block, lc: LayerCollection) -> None:
    parts = getattr(metric, "parts", None)
    ends = {s.stop for s in lc.slices().values()}
    if parts is None or any(len({e for e in ends if a < e <= b}) > 1 for p in parts for a, b in p.slices):
        raise ValueError(
            "GramMatrix: the metric couples layers, so there are no kernels of layers that sum to the whole: use "
            "per_layer=False, or a metric with a block for each layer (PMatBlockDiag, PMatKFAC, ...)"
        )
