"""Influence functions of kronfluence 1.0.1. What it makes goes through files, which are in its cost."""

from __future__ import annotations

import shutil
import tempfile
import weakref
from collections.abc import Callable
from copy import deepcopy
from importlib import metadata
from typing import Any

import torch
from kronfluence import task as kron
from kronfluence.analyzer import Analyzer, prepare_model
from kronfluence.arguments import FactorArguments, ScoreArguments
from settings import QUERIES, REGUL, Task
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import TensorDataset

VERSION = metadata.version("kronfluence")
NOTES = {"influence_factors": "the file of factors has no number to compare"}
LACKS: dict[str, set[str]] = {}
_FACTORS = FactorArguments(strategy="ekfac", use_empirical_fisher=True)
_SCORES = ScoreArguments(damping_factor=REGUL)


class _Sum(kron.Task):
    """The sum over tokens, of training examples and of queries."""

    def __init__(self, layers: list[str]) -> None:
        self.layers = layers

    def compute_train_loss(self, batch: Any, model: nn.Module, sample: bool = False) -> Tensor:
        x, y = batch
        return F.cross_entropy(model(x), y, reduction="sum")

    def compute_measurement(self, batch: Any, model: nn.Module) -> Tensor:
        return self.compute_train_loss(batch, model)

    def get_influence_tracked_modules(self) -> list[str]:
        return self.layers


class _Analysis:
    """An analyser in a folder of its own, and the data."""

    def __init__(self, task: Task) -> None:
        of = _Sum(list(task.layers))
        self.folder = tempfile.mkdtemp()
        weakref.finalize(self, shutil.rmtree, self.folder, ignore_errors=True)
        model = prepare_model(deepcopy(task.model), of)
        self.analyzer = Analyzer("a", model, of, cpu=True, output_dir=self.folder, disable_tqdm=True)
        self.data = TensorDataset(*(torch.cat(column) for column in zip(*task.batches, strict=True)))
        self.size = len(task.batches[0][0])

    def fit(self) -> float:
        self.analyzer.fit_all_factors(
            "f", self.data, per_device_batch_size=self.size, factor_args=_FACTORS, overwrite_output_dir=True
        )
        return 1.0

    def scores(self) -> Tensor:
        queries = TensorDataset(*(column[:QUERIES] for column in self.data.tensors))
        self.analyzer.compute_pairwise_scores(
            "s",
            "f",
            queries,
            self.data,
            per_device_query_batch_size=QUERIES,
            per_device_train_batch_size=self.size,
            score_args=_SCORES,
            overwrite_output_dir=True,
        )
        return self.analyzer.load_pairwise_scores("s")["all_modules"]


def _scores(task: Task) -> Callable[[], Tensor]:
    analysis = _Analysis(task)
    analysis.fit()
    return analysis.scores


JOBS: dict[str, Callable[[Task], Callable[[], Any]]] = {
    "influence_factors": lambda task: _Analysis(task).fit,
    "influence_scores": _scores,
}


def fingerprint(task: Task, result: Any) -> float:
    """One number that tells a result from a wrong one."""
    return float(result.sum()) if isinstance(result, Tensor) else result
