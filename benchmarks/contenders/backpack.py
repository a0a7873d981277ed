"""The jobs as BackPACK 1.7.1 does them, on a copy of the model, because what it adds to one would slow gradients."""

from __future__ import annotations

from collections.abc import Callable
from copy import deepcopy
from importlib import metadata
from typing import Any, NamedTuple

import torch
from backpack import backpack, extend
from backpack.extensions import KFAC, KFLR, DiagGGNExact, DiagGGNMC, SumGradSquared
from settings import Task
from torch import Tensor, nn

VERSION = metadata.version("backpack-for-pytorch")
_APART = "weight and bias apart, and cotangents summed over the positions of a convolution"
NOTES = {
    "kfac": _APART,
    "kfac_mc": f"other random labels; {_APART}",
    "diag_mc": "other random labels",
}


class Diagonal(NamedTuple):
    """Parameter by parameter."""

    entries: list[Tensor]


class Kronecker(NamedTuple):
    """The factors of each parameter: of a weight two, of a bias one."""

    factors: list[list[Tensor]]


def _extended(task: Task) -> tuple[nn.Module, nn.Module, list[nn.Parameter]]:
    """The model and its loss with the library's hooks, and the parameters that count."""
    model = deepcopy(task.model)
    modules = dict(model.named_modules())
    parameters = [p for name in task.layers for p in modules[name].parameters()]
    residual = any(isinstance(m, nn.BatchNorm2d) for m in model.modules())
    return extend(model, use_converter=residual), extend(nn.CrossEntropyLoss()), parameters


def _quantities(task: Task, extension: Callable[[], Any]) -> Callable[[], list[tuple[int, list[Any]]]]:
    """For each minibatch, how many examples it has, and what the library keeps for each parameter."""
    model, loss, parameters = _extended(task)

    def run() -> list[tuple[int, list[Any]]]:
        found = []
        for x, y in task.batches:
            asked = extension()
            with backpack(asked):
                loss(model(x), y).backward()
            found.append((len(x), [getattr(p, asked.savefield) for p in parameters]))
            for p in model.parameters():
                p.grad = None
                if hasattr(p, asked.savefield):
                    delattr(p, asked.savefield)
        return found

    return run


def _diag(extension: Callable[[], Any], power: int = 1) -> Callable[[Task], Callable[[], Diagonal]]:
    """power: how often the mean over a minibatch divides by its examples."""

    def prepare(task: Task) -> Callable[[], Diagonal]:
        batches = _quantities(task, extension)

        def run() -> Diagonal:
            scaled = [[n**power / task.examples * d for d in diags] for n, diags in batches()]
            return Diagonal([sum(parts) for parts in zip(*scaled, strict=True)])

        return run

    return prepare


def _kfac(extension: Callable[[], Any]) -> Callable[[Task], Callable[[], Kronecker]]:
    def prepare(task: Task) -> Callable[[], Kronecker]:
        batches = _quantities(task, extension)

        def run() -> Kronecker:
            scaled = [[[n / task.examples * f for f in factors] for factors in of] for n, of in batches()]
            parameters = zip(*scaled, strict=True)
            return Kronecker([[sum(parts) for parts in zip(*of, strict=True)] for of in parameters])

        return run

    return prepare


JOBS: dict[str, Callable[[Task], Callable[[], Any]]] = {
    "kfac": _kfac(KFLR),
    "kfac_mc": _kfac(KFAC),
    "diag": _diag(DiagGGNExact),
    "diag_mc": _diag(DiagGGNMC),
    "diag_ef": _diag(SumGradSquared, power=2),
}
#: It has no attention, of LSTMs only those of one layer, and no Kronecker factors through batch normalisation.
LACKS = {name: set(JOBS) for name in ("transformer", "vit", "lstm", "experts")} | {"resnet18": {"kfac", "kfac_mc"}}


def fingerprint(task: Task, result: Any) -> float:
    """One number that tells a result from a wrong one."""
    v = task.vectors()
    if isinstance(result, Diagonal):
        return float(v @ (torch.cat([d.flatten() for d in result.entries]) * v))
    found = 0.0
    for p, (left, *right) in zip(v.split([p.numel() for p in task.parameters]), result.factors, strict=True):
        V = p.view(len(left), -1)
        found += float((V * (left @ V @ right[0] if right else left @ V)).sum())
    return found
