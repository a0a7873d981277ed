"""The jobs as curvlinops 3.0.1 does them, without its optional checks of the model and the data."""

from __future__ import annotations

from collections.abc import Callable
from importlib import metadata
from typing import Any, NamedTuple

import torch
from curvlinops import (
    EKFACLinearOperator,
    FisherType,
    GGNLinearOperator,
    HessianLinearOperator,
    KFACInverseLinearOperator,
    KFACLinearOperator,
    lanczos_approximate_spectrum,
)
from settings import PROBES, REGUL, STEPS, Task
from torch import Tensor, nn

from contenders._kernels import with_forward_derivatives
from contenders._lanczos import largest_ritz_value

VERSION = metadata.version("curvlinops-for-pytorch")
NOTES = {"kfac_mc": "other random labels", "spectral_density": "other random vectors, other widths"}
_FACTORS = {"kfac", "kfac_mc", "kfac_ef"}
_HESSIAN = {"hessian_product", "hessian_product_lanczos"}
#: Its Kronecker factors are of linear layers and convolutions alone. Of the Hessian the entries of weights of LayerNorm
#: are not those of double backward, and torch refuses what it makes of SiLU.
LACKS = {"vit": _FACTORS | _HESSIAN, "lstm": _FACTORS, "experts": _FACTORS | _HESSIAN}
#: How many columns of the identity are multiplied at once, as all of them do not fit.
_COLUMNS = 64


class Density(NamedTuple):
    """Of eigenvalues."""

    grid: Tensor
    density: Tensor


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
    options = {
        "fisher_type": fisher_type,
        "num_per_example_loss_terms": task.positions,
        "separate_weight_and_bias": False,
    }
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
        columns = torch.eye(operator.shape[1], device=task.device).split(_COLUMNS, 1)
        return torch.cat([operator @ c for c in columns], 1)

    return run


def _fim_operator(task: Task) -> Any:
    """The Gauss-Newton matrix of the sum over positions, as a Fisher matrix is; the default is of their mean."""
    return task.positions * _operator(task, GGNLinearOperator)


def _product(cls: Any) -> Callable[[Task], Callable[[], Tensor]]:
    def prepare(task: Task) -> Callable[[], Tensor]:
        v = task.vectors()
        return lambda: _operator(task, cls) @ v

    return prepare


def _fim_product(task: Task) -> Callable[[], Tensor]:
    v = task.vectors()
    return lambda: _fim_operator(task) @ v


def _lanczos(cls: Any) -> Callable[[Task], Callable[[], float]]:
    """The Lanczos of this library does not reorthogonalise."""

    def prepare(task: Task) -> Callable[[], float]:
        start = task.vectors()
        return lambda: largest_ritz_value(_operator(task, cls).__matmul__, start)

    return prepare


def _density(task: Task) -> Callable[[], Density]:
    """It is told the boundaries of the spectrum, so that the number of products is that of the others."""
    top = _lanczos(GGNLinearOperator)(task)()

    def run() -> Density:
        operator = _operator(task, GGNLinearOperator)
        return Density(*lanczos_approximate_spectrum(operator, STEPS, num_repeats=PROBES, boundaries=(0.0, top)))

    return run


def _product_again(task: Task) -> Callable[[], Tensor]:
    operator, v = _fim_operator(task), task.vectors()
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
    "kfac_ef": _kfac(FisherType.EMPIRICAL),
    "ekfac": _ekfac,
    "dense": _dense,
    "fim_product": _fim_product,
    "fim_product_again": _product_again,
    "ggn_product": _product(GGNLinearOperator),
    "ggn_product_lanczos": _lanczos(GGNLinearOperator),
    "hessian_product": _product(HessianLinearOperator),
    "hessian_product_lanczos": _lanczos(HessianLinearOperator),
    "spectral_density": _density,
    "kfac_first_solve": _first_solve,
    "kfac_solve_1": _solve_1,
    "kfac_solve_320": _solve_320,
}
JOBS |= {name: with_forward_derivatives(job) for name, job in JOBS.items() if "product" in name}


def fingerprint(task: Task, result: Any) -> float:
    """One number that tells a result from a wrong one."""
    if isinstance(result, float):
        return result
    if isinstance(result, Density):
        return float((result.grid * result.density).sum() / result.density.sum())
    v = task.vectors()
    if isinstance(result, KFACLinearOperator):  # of the mean over positions, where a Fisher matrix is of the sum
        return task.positions * float(v @ (result @ v))
    if result.shape == (len(v), len(v)):
        return float(v @ (result @ v))
    return float((result * task.vectors(*result.shape[:-1])).sum(-1).mean())
