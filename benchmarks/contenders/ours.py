"""The jobs as this library does them."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from settings import REGUL, STEPS, Task

import nngeometry
from nngeometry import (
    FIM,
    GGN,
    FIM_MonteCarlo,
    Hessian,
    LayerCollection,
    PFMapDense,
    PMat,
    PMatBlockDiag,
    PMatDense,
    PMatDiag,
    PMatEKFAC,
    PMatImplicit,
    PMatKFAC,
    PVector,
)
from nngeometry.linalg import lanczos

VERSION = nngeometry.__version__
#: What makes this contender's answer another number than ours by definition, for each job where something does.
NOTES: dict[str, str] = {}


def _collection(task: Task) -> LayerCollection:
    return LayerCollection.from_model(task.model, *task.layers)


def _maker(task: Task, metric: Any = FIM) -> Callable[..., Any]:
    """From a representation to the matrix."""
    return partial(metric, task.model, task.batches, layer_collection=_collection(task))


def _build(representation: Any, metric: Any = FIM) -> Callable[[Task], Callable[[], PMat]]:
    return lambda task: partial(_maker(task, metric), representation)


def _trace(task: Task) -> Callable[[], Any]:
    make = _maker(task)
    return lambda: make(PMatImplicit).trace()


def _product(metric: Any) -> Callable[[Task], Callable[[], PVector]]:
    def prepare(task: Task) -> Callable[[], PVector]:
        make, v = _maker(task, metric), PVector(_collection(task), task.vectors())
        return lambda: make(PMatImplicit).mv(v)

    return prepare


def _lanczos(metric: Any) -> Callable[[Task], Callable[[], float]]:
    """The largest Ritz value."""

    def prepare(task: Task) -> Callable[[], float]:
        make, start = _maker(task, metric), task.vectors(1)
        return lambda: float(torch.linalg.eigvalsh(lanczos(make(PMatImplicit).root.mv, start, STEPS).matrix)[-1])

    return prepare


def _product_again(task: Task) -> Callable[[], PVector]:
    matrix = _maker(task)(PMatImplicit)
    return partial(matrix.mv, PVector(matrix.layer_collection, task.vectors()))


def _first_solve(task: Task) -> Callable[[], PVector]:
    matrix = _maker(task)(PMatKFAC)
    b = PVector(matrix.layer_collection, task.vectors())
    return lambda: matrix.to().solve(b, REGUL)  # to() gives the same matrix, not decomposed yet


def _solve_1(task: Task) -> Callable[[], PVector]:
    matrix = _maker(task)(PMatKFAC)
    return partial(matrix.solve, PVector(matrix.layer_collection, task.vectors()), REGUL)


def _solve_320(task: Task) -> Callable[[], PFMapDense]:
    matrix = _maker(task)(PMatKFAC)
    return partial(matrix.solve, PFMapDense(matrix.layer_collection, task.vectors(10, 32)), REGUL)


JOBS: dict[str, Callable[[Task], Callable[[], Any]]] = {
    "kfac": _build(PMatKFAC),
    "kfac_mc": _build(PMatKFAC, FIM_MonteCarlo),
    "ekfac": _build(PMatEKFAC),
    "diag": _build(PMatDiag),
    "blockdiag": _build(PMatBlockDiag),
    "dense": _build(PMatDense),
    "trace": _trace,
    "fim_product": _product(FIM),
    "fim_product_again": _product_again,
    "ggn_product": _product(GGN),
    "ggn_product_lanczos": _lanczos(GGN),
    "hessian_product": _product(Hessian),
    "hessian_product_lanczos": _lanczos(Hessian),
    "kfac_first_solve": _first_solve,
    "kfac_solve_1": _solve_1,
    "kfac_solve_320": _solve_320,
}


def fingerprint(task: Task, result: Any) -> float:
    """One number that tells a result from a wrong one."""
    if isinstance(result, PMat):
        return float(result.vTMv(PVector(result.layer_collection, task.vectors())))
    if isinstance(result, PVector | PFMapDense):
        flat = result.to_torch()
        return float((flat * task.vectors(*flat.shape[:-1])).sum(-1).mean())
    return float(result)
