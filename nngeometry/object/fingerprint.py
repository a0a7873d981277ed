"""What a kernel was made of, in a few numbers, so that one that was begun is continued and another one is not.

Tensors that are given (parameters, data) are compared by a hash. What is computed differs by rounding from run to
run, so it is compared as numbers: what the model returns, which tells functions apart, some entries of the kernel,
and the products of the metric with fixed vectors.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence
from dataclasses import fields, is_dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from ..blocks import Block
from ..changes import no_grad
from ..layercollection import LayerCollection
from ..model import data
from ..registry import name_in_files
from .kernel import Kernel, KernelSide, batch_jacobians, sides, tile

#: The version of what is written.
FORMAT = 2
#: A number that stands for a tensor, and how far it may differ: of what it is a sum over, the norm.
Mark = tuple[float, float]
_EXAMPLES = 2


def fingerprint(kernel: Kernel) -> dict[str, Any]:
    """Plain values, from which :func:`differences` tells whether another kernel is the same."""
    left, right = kernel.left, kernel.right
    tapes = [left] if right is None else [left, right]
    lc = left.generator.layer_collection
    exact: dict[str, str] = {
        "layers": repr([(layer.name, layer.params) for layer in lc.layers.values()]),
        "layout": repr((kernel.layout, list(kernel.groups.items()), kernel.scale, str(left.dtype), right is None)),
    }
    near: dict[str, list[Mark]] = {}
    for k, tape in enumerate(tapes):
        model, side = tape.generator.model, "" if k == 0 else " of the other side"
        exact["parameters and buffers" + side] = _hash(
            item for named in (model.named_parameters(), model.named_buffers()) for pair in named for item in pair
        )
        exact["data" + side] = _hash(item for batch in tape.batches for item in _contents(batch))
        near["outputs of the model" + side] = _outputs(tape)
    metric = left.metric
    numbers: list[float] = []
    exact["metric"] = repr(None if metric is None else _outline(metric, numbers))
    near["metric"] = [] if metric is None else [(x, abs(x)) for x in numbers] + _products(metric, lc)
    near["entries"] = _entries(kernel)
    eps = torch.finfo(left.dtype).eps
    iterated = metric is not None and metric.matrix_free  # its products are right to the tolerance of solves
    tolerance = max(eps**0.5 / 10, 10 * max(1e-6, 100 * eps) if iterated else 0.0)
    return {"format": FORMAT, "tolerance": tolerance, "exact": exact, "near": near}


def differences(one: Any, other: dict[str, Any]) -> list[str]:
    """In what two fingerprints differ by more than rounding, the first one read from a file."""
    if not is_fingerprint(one):
        return ["the version of the library"]
    exact, near = ({**other[kind], **one.get(kind, {})} for kind in ("exact", "near"))
    names = [k for k in exact if one.get("exact", {}).get(k) != other["exact"].get(k)]
    mine, yours = one.get("near", {}), other["near"]
    names += [k for k in near if not _close(mine.get(k, []), yours.get(k, []), other["tolerance"])]
    return list(dict.fromkeys(names))


def is_fingerprint(value: Any) -> bool:
    """Whether it is what :func:`fingerprint` makes, rather than that of another version or something else."""
    return isinstance(value, dict) and value.get("format") == FORMAT


def _close(one: Sequence[Sequence[float]], other: Sequence[Sequence[float]], tolerance: float) -> bool:
    def same(a: Sequence[float], b: Sequence[float]) -> bool:
        allowed = tolerance * max(a[1], b[1])
        return abs(a[0] - b[0]) <= allowed and abs(a[1] - b[1]) <= allowed

    return len(one) == len(other) and all(map(same, one, other))


def _hash(items: Iterable[Any]) -> str:
    digest = hashlib.sha256()
    for item in items:
        if isinstance(item, Tensor):
            t = item.detach().to_dense() if item.layout != torch.strided else item.detach()
            digest.update(repr((tuple(t.shape), t.dtype)).encode())
            digest.update(t.cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
        else:
            digest.update(repr(item).encode())
    return digest.hexdigest()


def _contents(batch: data.Batch) -> list[Any]:
    """The tensors of a minibatch, and the plain values in it."""
    rest = pytree.tree_leaves(data.map_tensors(lambda t: t, batch))
    return [*data.tensors_of(batch), *(x for x in rest if isinstance(x, str | int | float | bool))]


def _mark(t: Tensor) -> Mark:
    """A sum with weights that are alike nowhere, and the norm."""
    t = t.detach().flatten().cpu().double()
    weights = torch.cos(torch.arange(1, t.numel() + 1, dtype=torch.float64))
    return float(weights @ t), float(torch.linalg.vector_norm(t))


def _outputs(tape: KernelSide) -> list[Mark]:
    with no_grad():
        return [_mark(tape.generator.outputs_of(batch)) for batch in tape.batches]


def _outline(value: Any, numbers: list[float]) -> Any:
    """The structure of a matrix: its blocks, their shapes and plain values; real numbers go to ``numbers``."""
    if isinstance(value, Tensor):
        return tuple(value.shape), str(value.dtype)
    if isinstance(value, float):
        numbers.append(value)
        return "a number"
    if isinstance(value, tuple | list):
        return [_outline(v, numbers) for v in value]
    if is_dataclass(value):
        return name_in_files(type(value)), [_outline(getattr(value, f.name), numbers) for f in fields(value)]
    return value if value is None or isinstance(value, str | int | bool) else "a function"


def _products(metric: Block, layer_collection: LayerCollection) -> list[Mark]:
    """Of the products with two fixed vectors, layer by layer."""
    rows = torch.randn(2, metric.numel, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    with no_grad():
        images = metric.mv(rows.to(metric.device, metric.dtype).reshape(-1, *metric.shape)).reshape(2, -1)
    return [_mark(row[s]) for row in images for s in layer_collection.slices().values()]


def _entries(kernel: Kernel) -> list[Mark]:
    """Of the entries of the first examples, for each group of layers."""
    left = _first(kernel.left)
    right = left if kernel.right is None else _first(kernel.right)
    lc = kernel.left.generator.layer_collection
    with no_grad():
        one = sides(left, kernel.left.metric, lc, right.examples).left
        two = sides(right, kernel.left.metric, lc, left.examples).right
        return [_mark(tile(one, two, kernel.layout, names)) for names in kernel.groups.values()]


def _first(tape: KernelSide) -> Any:
    batch = tape.batches[0]
    few = data.take(batch, torch.arange(min(_EXAMPLES, data.count(batch))))
    return next(batch_jacobians(tape.generator, [few], tape.plan))
