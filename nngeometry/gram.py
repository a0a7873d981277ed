"""Kernels between outputs of examples: the tangent kernel, and the same through any matrix in parameter space."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from . import arguments
from .blocks import Block
from .changes import uncast
from .distributed import everything, require_same
from .generator import Generator
from .identity import checksum, in_training, of_model
from .jacobian import of_outputs
from .layercollection import LayerCollection
from .memory import budget, slices
from .model import data
from .object import FMatDense, FMatImplicit, PMat
from .object.fspace import FMat, root_of_products
from .object.implicit import diagonal_of_gram
from .object.kernel import (
    Kernel,
    KernelSide,
    batch_jacobians,
    check_separate,
    example_bytes,
    within_examples,
)
from .object.kernel_layouts import Diagonal, Full, Layout, Traced
from .object.kernel_storage import in_memory
from .object.map import PFMap, PFMapImplicit
from .object.vector import check_same_space
from .reading import differences
from .spelling import warn
from .team import Team

#: What ``output=`` accepts: which entries are kept.
OUTPUTS: dict[str, type[Layout]] = {
    "full": Full,
    "diag": Diagonal,
    "trace": Traced,
    "mean_trace": Traced,
    "sum": Traced,
}


@uncast
@arguments.called_as
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
    batch_statistics: bool = False,
    unit: str = "example",
    device: torch.device | str | None = None,
    verbose: bool = False,
    process_group: Any = None,
) -> Any:
    """The kernel ``K[c, x, d, y] = J[c, x] M J'[d, y]^T`` of Jacobians of outputs; with M the identity, the NTK.

    Each loader is read once, so that a shuffling or augmenting one is consistent. Jacobians are kept in the form in
    which layers make them, in memory while they fit the memory budget, and made again for pairs of minibatches where
    they do not.

    Args:
        model: As in :func:`~nngeometry.FIM`.
        loader: As in :func:`~nngeometry.FIM`.
        loader2: Other examples on the other side, by default the same. A function in the place of it is one of both
            sides, followed by the representation and the layer collection, as in NNGeometry.
        function: As in :func:`~nngeometry.Jacobian`.
        function2: Another function of the model on the other side, by default the same.
        model2: The model at other parameters on the other side, by default the same.
        layer_collection: As in :func:`~nngeometry.FIM`.
        representation: FMatDense (the default); FMatImplicit, products by automatic differentiation; or
            ``FMatMemmap.at(folder)``, on disk.
        output: Which outputs are paired: "full" (the default) ``(C, n, C', n')``; "diag" ``(C, n, n')``, each output
            with itself; "trace" and "mean_trace" ``(n, n')``, the sum and mean of these; "sum" ``(n, n')``, the kernel
            of the sum of outputs.
        per_layer: Whether to return a dict of the kernels of the layers, which sum to the whole; by default not, and
            not with a metric that couples layers.
        metric: M, a PMat or an inverse of one (``F.inv(r)``), by default the identity.
        centering: Whether Jacobians are less their mean over the examples of their side; by default not.
        batch_statistics: As in :func:`~nngeometry.FIM`.
        unit: As in :func:`~nngeometry.Jacobian`.
        device: As in :func:`~nngeometry.FIM`.
        verbose: As in :func:`~nngeometry.FIM`.
        process_group: Of ``torch.distributed``, among whose ranks the tiles of the kernel are shared out. All call this
            with the same loaders, and all get the whole kernel; a folder of FMatMemmap is on a disk that they share.

    Returns:
        The kernel, of the representation.

    Raises:
        ValueError: As :func:`~nngeometry.Jacobian`, and for a metric of other layers.

    Example:
        >>> from nngeometry import GramMatrix
        >>> model = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3))
        >>> K = GramMatrix(model, (torch.randn(6, 4),))
        >>> K.to_torch().shape, K.trace() > 0
        (torch.Size([3, 6, 3, 6]), tensor(True))

    Source: Jacot, Gabriel and Hongler (2018), 1806.07572.
    """
    if (
        callable(loader2) and loader2 is not model
    ):  # GramMatrix(model, loader, function, representation, layer_collection)
        warn("GramMatrix(model, loader, function)", "function=; what follows the loader is loader2")
        if not (function2 is None or isinstance(function2, LayerCollection)):
            raise TypeError("GramMatrix: a function in the place of loader2 is one of both sides: name function2")
        representation, layer_collection = function or representation, function2 or layer_collection
        loader2, function, function2 = None, loader2, None
    team = Team(process_group)
    if process_group is not None:
        loader = everything(loader, team, "GramMatrix")
        loader2 = None if loader2 is None else everything(loader2, team, "GramMatrix")
    arguments.call(model, loader, function, layer_collection, LayerCollection, device)
    arguments.call(
        model2 or model, loader if loader2 is None else loader2, function2, None, LayerCollection, None, "loader2"
    )
    arguments.of_training(batch_statistics, unit)
    arguments.one_of("GramMatrix: output", output, list(OUTPUTS))
    if isinstance(representation, type) and not issubclass(representation, FMatDense | FMatImplicit):
        raise TypeError(
            "representation: expected FMatDense, FMatImplicit or FMatMemmap.at(folder), got "
            f"{arguments.described(representation)}"
        )
    if not callable(representation) or isinstance(representation, FMat):
        raise TypeError(
            "representation: expected FMatDense, FMatImplicit or FMatMemmap.at(folder), got "
            f"{arguments.described(representation)}"
        )
    if metric is not None:
        arguments.instance("metric", metric, PMat, "pass a matrix or an inverse of one, F.inv(regul)")
    lc = LayerCollection.from_model(model) if layer_collection is None else layer_collection
    if metric is not None:
        check_same_space(lc, metric.layer_collection, "metric")
    same = loader2 is None and function2 is None and model2 is None

    def side(model: nn.Module, function: Callable[..., Any] | None) -> Generator:
        wanted = summed(model, function, unit) if output == "sum" else function
        return of_outputs(model, wanted, lc, batch_statistics=batch_statistics, unit=unit, device=device)

    left = side(model, function)
    right = left if same else side(model2 or model, function2 or function)
    if metric is not None and (metric.dtype != left.dtype or metric.device.type != left.device.type):
        raise ValueError(
            f"GramMatrix: the metric is {metric.dtype} on {metric.device}, the Jacobian {left.dtype} on {left.device}: "
            "move it with .to(device, dtype)"
        )
    groups: dict[str, tuple[str, ...]] = {name: (name,) for name in lc} if per_layer else {"": tuple(lc)}
    if per_layer and metric is not None:
        check_separate(metric)
    examples = data.Minibatches(left.minibatches(loader))
    examples2 = examples if same else data.Minibatches(right.minibatches(examples if loader2 is None else loader2))
    if process_group is not None:
        _check_team(team, [model, model2 or model], lc, metric, representation, (output, per_layer, centering))
        require_same(team, [*examples, *examples2], "GramMatrix")
    asked = _Asked(left, right, examples, examples2, same, OUTPUTS[output], groups, metric, output == "mean_trace")
    found = _implicit(asked) if representation is FMatImplicit else _entries(asked, representation, verbose, team)
    if centering:
        found = {name: K.centred() for name, K in found.items()}
    return found if per_layer else found[""]


@uncast
@arguments.called_as
def example_kernels(
    model: nn.Module,
    loader: Any,
    metric: PMat | None = None,
    output: str = "diag",
    *,
    function: Callable[..., Any] | None = None,
    layer_collection: LayerCollection | None = None,
    device: torch.device | str | None = None,
) -> Tensor:
    """The part of :func:`GramMatrix` between the outputs of one and the same example, ``J_x M J_x^T`` for each x.

    With M the covariance of the parameters it is that of the linearised outputs. Layers of linear maps are never made
    into Jacobians of the size of their weights.

    Args:
        model, loader, function, layer_collection, metric, device: As in :func:`GramMatrix`.
        output: "diag", each output with itself ``(n, C)``; "full", with each other ``(n, C, C)``.

    Returns:
        A tensor.

    Example:
        >>> model = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3))
        >>> x = torch.randn(6, 4)
        >>> own = example_kernels(model, (x,))
        >>> torch.allclose(own, GramMatrix(model, (x,)).get_diag().T)
        True
    """
    arguments.call(model, loader, function, layer_collection, LayerCollection, device)
    arguments.one_of("output", output, ["diag", "full"])
    generator = of_outputs(model, function, layer_collection, device=device)
    if metric is not None:
        arguments.instance("metric", metric, PMat, "pass a matrix or an inverse of one, F.inv(regul)")
        check_same_space(generator.layer_collection, metric.layer_collection, "metric")
        if metric.dtype != generator.dtype or metric.device.type != generator.device.type:
            raise ValueError(
                f"example_kernels: the metric is {metric.dtype} on {metric.device}, the Jacobian {generator.dtype} on "
                f"{generator.device}: move it with .to(device, dtype)"
            )
    return joined(linearised(generator, loader, metric, output))[1]


def linearised(generator: Generator, loader: Any, metric: PMat | None, output: str) -> Iterator[tuple[Tensor, Tensor]]:
    """The outputs of examples ``(b, *out)`` with their :func:`example_kernels`, a few examples at a time, as the
    generator runs the model on them.
    """
    full = output == "full"
    step: int | None = None
    for slab in batch_jacobians(generator, loader, by_example=True):
        n = slab.examples
        if step is None and n > 1:
            each = example_bytes(metric, slab.narrow(0, 2), full)
            step = max(1, budget(generator.device) // _SHARE // max(1, each))
        made: Tensor | None = None
        for b in slices(n, step or n):
            own = within_examples(metric, slab.narrow(b.start, b.stop), full).movedim(-1, 0)
            made = own.new_empty(n, *own.shape[1:]) if made is None else made
            made[b] = own  # at once: what is kept between large arrays that come and go keeps their memory apart
            del own
        f = slab.f
        del slab
        assert f is not None
        assert made is not None
        yield f, made


def joined(pairs: Iterable[tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
    """Outputs and kernels of some examples after the other, as those of all."""
    f, v = map(torch.cat, zip(*pairs, strict=True))
    return f, v


#: What Jacobians of examples that are looked at together may take is the memory budget divided by that.
_SHARE = 64


def summed(model: nn.Module, function: Callable[..., Any] | None, unit: str = "example") -> Callable[..., Tensor]:
    """The sum of the outputs of each example, or of a minibatch, as one output."""

    def total(*minibatch: Any) -> Tensor:
        f = model(minibatch[0]) if function is None else function(*minibatch)
        return f.sum() if unit == "minibatch" else f.reshape(len(f), -1).sum(1, keepdim=True)

    return total


@dataclass(frozen=True)
class _Asked:
    """What a kernel is to be made of. groups: which layers make one matrix, by name."""

    left: Generator
    right: Generator
    examples: list[data.Batch]
    examples2: list[data.Batch]
    same: bool
    layout: type[Layout]
    groups: dict[str, tuple[str, ...]]
    metric: PMat | None
    mean: bool

    @property
    def symmetric(self) -> bool:
        return self.same and (self.metric is None or self.metric.symmetric)

    def arranged(self, outputs: tuple[int, int], counts: tuple[int, int]) -> tuple[Layout, float]:
        """The layout for that many outputs and examples, and the factor of all entries."""
        left, right = self.left, self.right
        if outputs[0] != outputs[1] and left.function is right.function and left.model is right.model:
            raise ValueError(
                f"GramMatrix: the model has {outputs[0]} outputs for each example of loader and {outputs[1]} for those "
                "of loader2: if that is meant, pass function2"
            )
        layout = self.layout(outputs, counts)
        layout.check()
        return layout, 1 / outputs[0] if self.mean else 1.0


def _check_team(
    team: Team,
    models: Sequence[nn.Module],
    lc: LayerCollection,
    metric: PMat | None,
    representation: Any,
    options: tuple[Any, ...],
) -> None:
    """Raise unless all ranks are about to make the same kernel, in tiles."""
    if representation is FMatImplicit:
        raise NotImplementedError(
            "process_group: FMatImplicit has no tiles that could be shared out: use FMatDense or "
            "FMatMemmap.at(folder), or leave process_group out, and every rank has the kernel by its own products"
        )
    if metric is not None and metric.root.matrix_free:
        raise NotImplementedError(
            "process_group: the metric is known by its products alone, for which the ranks would ask at different "
            "times: use a representation that holds entries"
        )
    metric_of = None if metric is None else checksum(metric.root.tensors())
    told = {
        "parameters and buffers of the model": list(map(of_model, models)),
        "modules in training mode": list(map(in_training, models)),
        "layers": [[layer.name, [list(shape) for _, shape in layer.params]] for layer in lc.layers.values()],
        "metric": metric_of,
        "representation and options": [str(options), getattr(representation, "__name__", "FMatMemmap")],
    }
    for rank, other in enumerate(team.exchange(told)):
        if differ := differences(told, other):
            raise ValueError(
                f"process_group: rank {rank} is about to make another kernel than this one, and they must be the same: "
                f"{differ}"
            )


def _entries(asked: _Asked, representation: Any, verbose: bool, team: Team) -> dict[str, FMat]:
    n, m = (sum(map(data.count, batches)) for batches in (asked.examples, asked.examples2))
    limit = budget(asked.left.device) // 5  # for each side, and the rest for what it takes to make them
    limit = min(team.exchange(limit))
    one = KernelSide(asked.left, asked.examples, asked.metric, m, limit)
    two = None if asked.symmetric else KernelSide(asked.right, asked.examples2, asked.metric, n, limit)
    layout, scale = asked.arranged((one.outputs, one.outputs if two is None else two.outputs), (n, m))
    fill: Callable[..., Any] = in_memory if representation is FMatDense else representation
    shared = {"team": team} if team.size > 1 else {}
    found: dict[str, FMat] = fill(Kernel(one, two, layout, asked.groups, scale), verbose=verbose, **shared)
    return found


def _implicit(asked: _Asked) -> dict[str, FMat]:
    one = PFMapImplicit.of(asked.left, asked.examples)
    two = one if asked.same else PFMapImplicit.of(asked.right, asked.examples2)
    layout, scale = asked.arranged((one.shape[0], two.shape[0]), (one.shape[1], two.shape[1]))
    found: dict[str, FMat] = {}
    for group, names in asked.groups.items():
        whole = len(asked.groups) == 1
        a, b = (one, two) if whole else (one.layer(names[0]), two.layer(names[0]))
        metric = asked.metric if asked.metric is None or whole else asked.metric.block(names[0])
        exact = None if metric is not None else partial(_diagonal, asked.left, asked.examples, names, layout, scale)
        found[group] = FMatImplicit(_products(a, b, layout, metric, asked.symmetric, scale, exact), layout)
    return found


def _products(
    one: PFMap,
    two: PFMap,
    layout: Layout,
    metric: PMat | None,
    symmetric: bool,
    scale: float,
    diagonal: Callable[[], Tensor] | None,
) -> Block:
    def product(a: PFMap, b: PFMap, layout: Layout) -> Callable[[Tensor], Tensor]:
        def matvec(V: Tensor) -> Tensor:
            groups, _, columns = layout.shape
            w = b._vjp(layout.cotangents(V.view(-1, groups, columns)))
            return scale * layout.collect(a._jvp(w)).reshape(len(V), -1)

        return matvec

    return root_of_products(
        product(one, two if metric is None else metric.mv(two), layout),
        product(two, one if metric is None else one @ metric, layout.transpose()),
        layout,
        torch.empty(0, dtype=one.dtype, device=one.device),
        symmetric=symmetric,
        definite=metric is None or metric.definite,
        trace=None if diagonal is None else lambda: diagonal().sum(),
        diagonal=diagonal,
    )


def _diagonal(generator: Generator, examples: Any, names: tuple[str, ...], layout: Layout, scale: float) -> Tensor:
    """The diagonal of a tangent kernel, from the squared norms of the Jacobian."""
    return scale * layout.of_squares(diagonal_of_gram(generator, examples, names)).flatten()


__test__ = {f.__name__: f.__doc__ or "" for f in (GramMatrix, example_kernels)}
