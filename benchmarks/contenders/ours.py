"""The jobs as this library does them."""

from __future__ import annotations

import os
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from settings import CYCLE, DAMPING, DECAY, PROBES, QUERIES, REGUL, STEPS, TOP, TRACE_PROBES, Task
from torch import Tensor

import nngeometry
from contenders._accuracy import cheapest
from contenders._training import ten_steps
from nngeometry import (
    FIM,
    GGN,
    Accumulator,
    EmpiricalFisher,
    FIM_MonteCarlo,
    FMatDense,
    GramMatrix,
    Hessian,
    Influence,
    Jacobian,
    LayerCollection,
    PFMapDense,
    PMat,
    PMatBlockDiag,
    PMatDense,
    PMatDiag,
    PMatEKFAC,
    PMatImplicit,
    PMatKFAC,
    Posterior,
    PVector,
)
from nngeometry.continual import EWC
from nngeometry.linalg import Density, hutchinson, lanczos
from nngeometry.optim import SecondOrderOptimizer, Turned
from nngeometry.spectrum import extreme_eigenpairs, spectral_density

VERSION = nngeometry.__version__
#: What makes this contender's answer another number than ours by definition, for each job where something does.
NOTES: dict[str, str] = {}
#: What it cannot do although it has the job, for each setting.
LACKS: dict[str, set[str]] = {}

if "NNGEOMETRY_BUDGET" in os.environ:
    _BUDGET = nngeometry.memory_budget(int(os.environ["NNGEOMETRY_BUDGET"]) * 2**20)
    _BUDGET.__enter__()  # of the whole process


def _collection(task: Task) -> LayerCollection:
    return LayerCollection.from_model(task.model, *(() if task.everything else task.layers))


def _maker(task: Task, metric: Any = FIM) -> Callable[..., Any]:
    """From a representation to the matrix."""
    positions = task.positions > 1 and metric in (FIM, FIM_MonteCarlo)
    options = {"variant": "segmentation_logits"} if positions else {}
    return partial(metric, task.model, task.batches, layer_collection=_collection(task), **options)


def _build(representation: Any, metric: Any = FIM) -> Callable[[Task], Callable[[], PMat]]:
    return lambda task: partial(_maker(task, metric), representation)


def _trace(task: Task) -> Callable[[], Any]:
    make = _maker(task)
    return lambda: make(PMatImplicit).trace()


def _trace_empirical(task: Task) -> Callable[[], Any]:
    make = _maker(task, EmpiricalFisher)
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


def _density(metric: Any) -> Callable[[Task], Callable[[], Density]]:
    def prepare(task: Task) -> Callable[[], Density]:
        make = _maker(task, metric)
        return lambda: spectral_density(make(PMatImplicit), steps=STEPS, probes=PROBES).density()

    return prepare


def _hessian_trace(task: Task) -> Callable[[], float]:
    make = _maker(task, Hessian)
    return lambda: float(make(PMatImplicit).trace(estimator=partial(hutchinson, products=TRACE_PROBES)).value)


def _hessian_top(task: Task) -> Callable[[], float]:
    """Without the search for multiple eigenvalues, which the others do not have."""
    make = _maker(task, Hessian)

    def eigenvalues(tol: float) -> Tensor:
        return extreme_eigenpairs(make(PMatImplicit), TOP, "magnitude", tol=tol, multiplicities=False).values

    return cheapest(task, eigenvalues, [0.1, 0.03, 0.01, 3e-3, 1e-3, 3e-4, 1e-4])


def _jacobian(task: Task) -> Callable[[], PFMapDense]:
    return partial(Jacobian, task.model, task.batches, layer_collection=_collection(task))


def _gram(task: Task) -> Callable[[], FMatDense]:
    return partial(GramMatrix, task.model, task.batches, layer_collection=_collection(task))


def _product_again(task: Task) -> Callable[[], PVector]:
    matrix = _maker(task)(PMatImplicit)
    v = PVector(matrix.layer_collection, task.vectors())
    matrix.mv(v)
    return partial(matrix.mv, v)


def _update(task: Task) -> Callable[[], float]:
    accumulator = Accumulator(FIM_MonteCarlo, task.model, PMatKFAC, layer_collection=_collection(task))

    def update() -> float:
        return accumulator.decay(DECAY).update(task.batches[0]).n

    update()
    return update


def _ten_steps(observe_every: int, refresh: Any = CYCLE, factored: bool = False) -> Callable[[Task], Callable[[], Any]]:
    """Their length is zero, so that they are the same each time."""

    def prepare(task: Task) -> Callable[[], Any]:
        optimiser = SecondOrderOptimizer(
            task.model,
            lr=0.0,
            damping=DAMPING,
            decay=DECAY,
            observe_every=observe_every,
            refresh=refresh,
            factored=factored,
            layer_collection=_collection(task),
        )

        steps = ten_steps(task.model, task.batches[0], optimiser, optimiser.observe)
        if isinstance(refresh, Turned):  # the first time there is nothing to turn
            steps()
        return steps

    return prepare


def _factors(task: Task) -> Callable[[], PMat]:
    return partial(_maker(task, EmpiricalFisher), PMatEKFAC)


def _scores(task: Task) -> Callable[[], Tensor]:
    influence = Influence(task.model, _factors(task)(), regul=REGUL)
    queries = tuple(column[:QUERIES] for column in task.batches[0])
    return lambda: influence.scores(queries, task.batches)


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


def _fitted(task: Task, representation: Any, last: bool) -> Posterior:
    names = list(task.layers)[-1:] if last else list(task.layers)
    lc = LayerCollection.from_model(task.model, *names)
    F = FIM(task.model, task.batches, representation, layer_collection=lc)
    posterior = Posterior(task.model, F, num_data=task.examples)
    posterior.covariance  # noqa: B018, it is made when it is first asked for
    return posterior


def _fit(representation: Any, last: bool = False) -> Callable[[Task], Callable[[], Posterior]]:
    return lambda task: partial(_fitted, task, representation, last)


def _predict(representation: Any, last: bool = False) -> Callable[[Task], Callable[[], float]]:
    def prepare(task: Task) -> Callable[[], float]:
        posterior = _fitted(task, representation, last)
        return lambda: sum(float(posterior.predict(x).square().sum()) for x, _ in task.batches)

    return prepare


def _consolidate(task: Task) -> Callable[[], int]:
    ewc = EWC(task.model, PMatDiag, EmpiricalFisher, strength=1.0, layer_collection=_collection(task), online=True)

    def consolidate() -> int:
        return ewc.consolidate(task.batches).tasks

    return consolidate


def _penalty(task: Task) -> Callable[[], float]:
    ewc = EWC(task.model, PMatDiag, EmpiricalFisher, strength=1.0, layer_collection=_collection(task))
    ewc.consolidate(task.batches)
    with torch.no_grad():
        for p in task.parameters:
            p += 0.01

    def step() -> float:
        penalty = ewc.penalty()
        torch.autograd.grad(penalty, task.parameters)
        return float(penalty.detach())

    return step


JOBS: dict[str, Callable[[Task], Callable[[], Any]]] = {
    "kfac": _build(PMatKFAC),
    "kfac_mc": _build(PMatKFAC, FIM_MonteCarlo),
    "kfac_ef": _build(PMatKFAC, EmpiricalFisher),
    "ekfac": _build(PMatEKFAC),
    "diag": _build(PMatDiag),
    "diag_mc": _build(PMatDiag, FIM_MonteCarlo),
    "diag_ef": _build(PMatDiag, EmpiricalFisher),
    "blockdiag": _build(PMatBlockDiag),
    "dense": _build(PMatDense),
    "trace": _trace,
    "trace_ef": _trace_empirical,
    "fim_product": _product(FIM),
    "fim_product_again": _product_again,
    "ggn_product": _product(GGN),
    "ggn_product_lanczos": _lanczos(GGN),
    "hessian_product": _product(Hessian),
    "hessian_product_lanczos": _lanczos(Hessian),
    "spectral_density": _density(GGN),
    "hessian_trace": lambda task: _hessian_trace(task.trained()),
    "hessian_top": lambda task: _hessian_top(task.trained()),
    "hessian_density": lambda task: _density(Hessian)(task.trained()),
    "accumulator_update": _update,
    "ten_steps": _ten_steps(1),
    "ten_steps_factored": _ten_steps(1, factored=True),
    "ten_steps_turned": _ten_steps(1, Turned(CYCLE)),
    "ten_steps_seldom": _ten_steps(CYCLE),
    "ten_steps_seldom_factored": _ten_steps(CYCLE, factored=True),
    "ten_steps_seldom_turned": _ten_steps(CYCLE, Turned(CYCLE)),
    "influence_factors": _factors,
    "influence_scores": _scores,
    "kfac_first_solve": _first_solve,
    "kfac_solve_1": _solve_1,
    "kfac_solve_320": _solve_320,
    "jacobian": _jacobian,
    "gram": _gram,
    "gram_one_batch": _gram,
    "posterior_fit_kron": _fit(PMatKFAC),
    "posterior_fit_diag": _fit(PMatDiag),
    "posterior_fit_last": _fit(PMatKFAC, last=True),
    "posterior_predict_kron": _predict(PMatKFAC),
    "posterior_predict_diag": _predict(PMatDiag),
    "posterior_predict_last": _predict(PMatKFAC, last=True),
    "ewc_consolidate": _consolidate,
    "ewc_penalty": _penalty,
}


def fingerprint(task: Task, result: Any) -> float:
    """One number that tells a result from a wrong one."""
    if isinstance(result, PMat):
        return float(result.vTMv(PVector(result.layer_collection, task.vectors())))
    if isinstance(result, PVector | PFMapDense):
        flat = result.to_torch()
        return float((flat * task.vectors(*flat.shape[:-1])).sum(-1).mean())
    if isinstance(result, Posterior):
        return -float(result.covariance.logdet())
    if isinstance(result, FMatDense):
        return task.quadratic_form(result.to_torch())
    if isinstance(result, Density):
        return float((result.grid * result.value).sum() / result.value.sum())
    return float(result.sum() if isinstance(result, Tensor) else result)
