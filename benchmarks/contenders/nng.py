"""The jobs as NNGeometry 0.4 does them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from importlib import metadata
from typing import Any

import torch
from settings import REGUL, Batch, Task
from torch import Tensor
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

from nngeometry.gram import GramMatrix
from nngeometry.jacobian import Jacobian
from nngeometry.layercollection import LayerCollection
from nngeometry.metrics import FIM, FIM_MonteCarlo
from nngeometry.object import (
    FMatDense,
    PFMapDense,
    PMatBlockDiag,
    PMatDense,
    PMatDiag,
    PMatEKFAC,
    PMatImplicit,
    PMatKFAC,
    PVector,
)

VERSION = metadata.version("nngeometry")
_DAMPING = "damps each Kronecker factor instead of their product"
NOTES = {
    "kfac_mc": "other random labels",
    "diag_mc": "other random labels",
    "kfac_first_solve": _DAMPING,
    "kfac_solve_1": _DAMPING,
    "kfac_solve_320": _DAMPING,
}


class _Loader(DataLoader):  # type: ignore[type-arg]
    """The minibatches as they are, in the type that this library asks for: loading costs it no more than the others."""

    def __init__(self, task: Task) -> None:
        tensors = [torch.cat(parts) for parts in zip(*task.batches, strict=True)]
        super().__init__(TensorDataset(*tensors), batch_size=len(task.batches[0][0]))
        self._batches = task.batches

    def __iter__(self) -> Iterator[Batch]:  # type: ignore[override]
        return iter([(x.detach(), y) for x, y in self._batches])  # detached: its inputs are made to require gradients


def _collection(task: Task) -> LayerCollection:
    collection = LayerCollection()
    for layer in task.layers.values():
        collection.add_layer_from_model(task.model, layer)
    return collection


def _maker(task: Task, metric: Any = FIM) -> Callable[..., Any]:
    """From a representation to the matrix."""
    return partial(metric, task.model, _Loader(task), layer_collection=_collection(task), device=str(task.device))


def _build(representation: Any, metric: Any = FIM) -> Callable[[Task], Callable[[], Any]]:
    return lambda task: partial(_maker(task, metric), representation)


def _ekfac(task: Task) -> Callable[[], PMatEKFAC]:
    make, loader = _maker(task), _Loader(task)

    def run() -> PMatEKFAC:
        matrix = make(PMatEKFAC)
        matrix.update_diag(loader)
        return matrix

    return run


def _empirical(task: Task) -> Callable[..., Any]:
    """The losses of the examples as the output of a regression, whose Fisher matrix has their gradients."""

    def losses(x: Tensor, y: Tensor) -> Tensor:
        return F.cross_entropy(task.model(x), y, reduction="none").unsqueeze(1)

    return partial(_maker(task), variant="regression", function=losses)


def _build_empirical(representation: Any) -> Callable[[Task], Callable[[], Any]]:
    return lambda task: partial(_empirical(task), representation)


def _trace_empirical(task: Task) -> Callable[[], Any]:
    make = _empirical(task)
    return lambda: make(PMatImplicit).trace()


def _jacobian(task: Task) -> Callable[[], PFMapDense]:
    return partial(Jacobian, task.model, _Loader(task), layer_collection=_collection(task))


def _gram(task: Task) -> Callable[[], FMatDense]:
    return partial(GramMatrix, task.model, _Loader(task), layer_collection=_collection(task))


def _trace(task: Task) -> Callable[[], Any]:
    make = _maker(task)
    return lambda: make(PMatImplicit).trace()


def _product(task: Task) -> Callable[[], PVector]:
    make = _maker(task)
    v = PVector(_collection(task), vector_repr=task.vectors())
    return lambda: make(PMatImplicit).mv(v)


def _product_again(task: Task) -> Callable[[], PVector]:
    matrix = _maker(task)(PMatImplicit)
    return partial(matrix.mv, PVector(_collection(task), vector_repr=task.vectors()))


def _solve_1(task: Task) -> Callable[[], PVector]:
    matrix = _maker(task)(PMatKFAC)
    b = PVector(matrix.generator.layer_collection, vector_repr=task.vectors())
    return partial(matrix.solve, b, REGUL)


def _solve_320(task: Task) -> Callable[[], PFMapDense]:
    matrix = _maker(task)(PMatKFAC)
    return partial(matrix.solve, PFMapDense(matrix.generator, data=task.vectors(10, 32)), REGUL)


JOBS: dict[str, Callable[[Task], Callable[[], Any]]] = {
    "kfac": _build(PMatKFAC),
    "kfac_mc": _build(PMatKFAC, FIM_MonteCarlo),
    "kfac_ef": _build_empirical(PMatKFAC),
    "ekfac": _ekfac,
    "diag": _build(PMatDiag),
    "diag_mc": _build(PMatDiag, FIM_MonteCarlo),
    "diag_ef": _build_empirical(PMatDiag),
    "blockdiag": _build(PMatBlockDiag),
    "dense": _build(PMatDense),
    "trace": _trace,
    "trace_ef": _trace_empirical,
    "fim_product": _product,
    "fim_product_again": _product_again,
    "kfac_first_solve": _solve_1,  # it keeps no decomposition
    "kfac_solve_1": _solve_1,
    "kfac_solve_320": _solve_320,
    "jacobian": _jacobian,
    "gram": _gram,
    "gram_one_batch": _gram,
}
#: Linear layers with several positions are none of its layers, nor are attention and LSTMs.
LACKS = {name: set(JOBS) for name in ("transformer", "vit", "lstm", "experts")}


def fingerprint(task: Task, result: Any) -> float:
    """One number that tells a result from a wrong one."""
    if isinstance(result, Tensor):
        return float(result)
    if isinstance(result, FMatDense):
        return task.quadratic_form(result.to_torch())
    if isinstance(result, PVector | PFMapDense):
        flat = result.to_torch()
        return float((flat * task.vectors(*flat.shape[:-1])).sum(-1).mean())
    return float(result.vTMv(PVector(result.generator.layer_collection, vector_repr=task.vectors())))
