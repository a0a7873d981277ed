"""Posteriors as laplace-torch 0.3 has them, with the backends of its own choice."""

from __future__ import annotations

from collections.abc import Callable
from importlib import metadata
from typing import Any

import torch
from laplace import Laplace
from laplace.baselaplace import BaseLaplace
from settings import Task
from torch.utils.data import DataLoader, TensorDataset

VERSION = metadata.version("laplace-torch")
_APART = "weight and bias of a layer have a Kronecker product each"
NOTES = {
    "posterior_fit_kron": _APART,
    "posterior_fit_last": _APART,
    "posterior_predict_kron": _APART,
    "posterior_predict_last": _APART,
}
#: Its products of factors for pairs of 1000 outputs take minutes for a few images.
LACKS: dict[str, set[str]] = {"convnet-1000": {"posterior_predict_last"}}


def _fitted(task: Task, structure: str, weights: str) -> Any:
    x, y = (torch.cat(parts) for parts in zip(*task.batches, strict=True))
    posterior = Laplace(task.model, "classification", weights, structure)
    posterior.fit(DataLoader(TensorDataset(x, y), batch_size=len(task.batches[0][0])))
    return posterior


def _fit(structure: str, weights: str = "all") -> Callable[[Task], Callable[[], Any]]:
    return lambda task: lambda: _fitted(task, structure, weights)


def _predict(structure: str, weights: str = "all") -> Callable[[Task], Callable[[], float]]:
    def prepare(task: Task) -> Callable[[], float]:
        posterior = _fitted(task, structure, weights)
        return lambda: sum(float(posterior(x, link_approx="probit").square().sum()) for x, _ in task.batches)

    return prepare


JOBS: dict[str, Callable[[Task], Callable[[], Any]]] = {
    "posterior_fit_kron": _fit("kron"),
    "posterior_fit_diag": _fit("diag"),
    "posterior_fit_last": _fit("kron", "last_layer"),
    "posterior_predict_kron": _predict("kron"),
    "posterior_predict_diag": _predict("diag"),
    "posterior_predict_last": _predict("kron", "last_layer"),
}


def fingerprint(task: Task, result: Any) -> float:
    """One number that tells a result from a wrong one."""
    if isinstance(result, BaseLaplace):
        return float(result.log_det_posterior_precision)
    return float(result)
