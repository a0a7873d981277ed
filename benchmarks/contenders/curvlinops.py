"""The jobs as curvlinops 3.0.1 does them, without its optional checks of the model and the data."""

from __future__ import annotations

from collections.abc import Callable
from importlib import metadata
from typing import Any

import torch
from curvlinops import (
    EKFACLinearOperator,
    FisherType,
    GGNLinearOperator,
    HessianLinearOperator,
    KFACInverseLinearOperator,
    KFACLinearOperator,
)
from settings import REGUL, STEPS, Task
from torch import Tensor, nn

VERSION = metadata.version("curvlinops-for-pytorch")
NOTES = {"kfac_mc": "other random labels"}
#: How many columns of the identity are multiplied at once, as all of them do not fit.
_COLUMNS = 64


def _operator(task: Task, cls: Any, **options: Any) -> Any:
    return cls(
        task.model,
        nn.CrossEntropyLoss(),
        task.parameters,
        task.batches,
        check_deterministic=False,
        num_data=task.examples,
        **options,
    )


def _kron(task: Task, cls: Any = KFACLinearOperator, fisher_type: str = FisherType.TYPE2) -> Any:
    """Weight and bias of a layer together, as the others have them."""
    options = {"fisher_type": fisher_type, "num_per_example_loss_terms": 1, "separate_weight_and_bias": False}
    return _operator(task, cls, **options)


def _kfac(fisher_type: str) -> Callable[[Task], Callable[[], Any]]:
    def prepare(task: Task) -> Callable[[], Any]:
        def run() -> Any:
            operator = _kron(task, fisher_type=fisher_type)
            operator.compute_kronecker_factors()
            return operator

        return run

    return prepare


def _ekfac(task: Task) -> Callable[[], Any]:
    def run() -> Any:
        operator = _kron(task, EKFACLinearOperator)
        operator.compute_eigenvalue_correction()
        return operator

    return run


def _dense(task: Task) -> Callable[[], Tensor]:
    def run() -> Tensor:
        operator = _operator(task, GGNLinearOperator)
        columns = torch.eye(operator.shape[1]).split(_COLUMNS, 1)
        return torch.cat([operator @ c for c in columns], 1)

    return run


def _product(cls: Any) -> Callable[[Task], Callable[[], Tensor]]:
    def prepare(task: Task) -> Callable[[], Tensor]:
        v = task.vectors()
        return lambda: _operator(task, cls) @ v

    return prepare


def _lanczos(cls: Any) -> Callable[[Task], Callable[[], float]]:
    """The largest Ritz value. The Lanczos of this library does not reorthogonalise, so that ours is written out."""

    def prepare(task: Task) -> Callable[[], float]:
        start = task.vectors()

        def run() -> float:
            operator, v = _operator(task, cls), start / start.norm()
            basis, matrix = start.new_empty(STEPS, len(start)), torch.zeros(STEPS, STEPS, dtype=torch.float64)
            for k in range(STEPS):
                basis[k] = v
                v, held = operator @ v, basis[: k + 1]
                for _ in range(2):
                    inner = held @ v
                    v = v - inner @ held
                    matrix[k, k] += inner[k]
                if k + 1 < STEPS:
                    beta = v.norm()
                    matrix[k, k + 1] = matrix[k + 1, k] = beta
                    v = v / beta
            return float(torch.linalg.eigvalsh(matrix)[-1])

        return run

    return prepare


def _product_again(task: Task) -> Callable[[], Tensor]:
    operator, v = _operator(task, GGNLinearOperator), task.vectors()
    return lambda: operator @ v


def _inverse(task: Task) -> Callable[[], Any]:
    kfac = _kfac(FisherType.TYPE2)(task)()
    return lambda: KFACInverseLinearOperator(kfac, damping=REGUL, use_exact_damping=True)


def _first_solve(task: Task) -> Callable[[], Tensor]:
    inverse, v = _inverse(task), task.vectors()
    return lambda: inverse() @ v


def _solve_1(task: Task) -> Callable[[], Tensor]:
    inverse, v = _inverse(task)(), task.vectors()
    return lambda: inverse @ v


def _solve_320(task: Task) -> Callable[[], Tensor]:
    inverse, columns = _inverse(task)(), task.vectors(10, 32).flatten(0, 1).T.contiguous()
    return lambda: (inverse @ columns).T.unflatten(0, (10, 32))


JOBS: dict[str, Callable[[Task], Callable[[], Any]]] = {
    "kfac": _kfac(FisherType.TYPE2),
    "kfac_mc": _kfac(FisherType.MC),
    "ekfac": _ekfac,
    "dense": _dense,
    "fim_product": _product(GGNLinearOperator),
    "fim_product_again": _product_again,
    "ggn_product": _product(GGNLinearOperator),
    "ggn_product_lanczos": _lanczos(GGNLinearOperator),
    "hessian_product": _product(HessianLinearOperator),
    "hessian_product_lanczos": _lanczos(HessianLinearOperator),
    "kfac_first_solve": _first_solve,
    "kfac_solve_1": _solve_1,
    "kfac_solve_320": _solve_320,
}


def fingerprint(task: Task, result: Any) -> float:
    """One number that tells a result from a wrong one."""
    if isinstance(result, float):
        return result
    v = task.vectors()
    if not isinstance(result, Tensor) or result.shape == (len(v), len(v)):
        return float(v @ (result @ v))
    return float((result * task.vectors(*result.shape[:-1])).sum(-1).mean())
