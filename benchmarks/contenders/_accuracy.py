"""The same accuracy for all: each contender at the cheapest of its settings whose eigenvalues are right."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from settings import ACCURACY, TOP, Task
from torch import Tensor
from torch.nn import functional as F

#: Steps of Lanczos after which the largest eigenvalues are taken for exact.
_STEPS = 40


def cheapest(task: Task, eigenvalues: Callable[[Any], Tensor], settings: Sequence[Any]) -> Callable[[], float]:
    """What computes them at the first of the settings, which get dearer, where each is right to the tolerance.

    Which that is is found before anything is measured, with the model and the data that are measured.
    """
    exact = largest(task)
    for setting in settings:
        found = eigenvalues(setting).double().cpu()
        if float(((found - exact) / exact).abs().max()) <= ACCURACY:
            return lambda: float(eigenvalues(setting).sum())
    raise RuntimeError(f"none of the settings {settings} gives the eigenvalues to {ACCURACY}")


def largest(task: Task) -> Tensor:
    """Eigenvalues of the Hessian of largest magnitude, by Lanczos, orthogonalised in double precision, with two
    backward passes for a product."""
    ps = list(task.model.parameters())

    def product(v: Tensor) -> Tensor:
        out = torch.zeros_like(v)
        for x, y in task.batches:
            loss = F.cross_entropy(task.model(x), y, reduction="sum") / task.examples
            gradient = torch.cat([g.flatten() for g in torch.autograd.grad(loss, ps, create_graph=True)])
            out += torch.cat([h.flatten() for h in torch.autograd.grad(gradient @ v.to(gradient), ps)])
        return out

    size = sum(p.numel() for p in ps)
    steps = min(size, _STEPS)
    v = torch.randn(size, dtype=torch.float64, generator=torch.Generator().manual_seed(3)).to(task.device)
    basis, matrix = v.new_empty(0, size), torch.zeros(steps, steps, dtype=torch.float64)
    for k in range(steps):
        if float(v.norm()) < 1e-12:
            break  # the space is closed
        basis = torch.cat([basis, (v / v.norm()).unsqueeze(0)])
        v = product(basis[k])
        for _ in range(2):
            inner = basis @ v
            v = v - inner @ basis
            matrix[k, : k + 1] += inner.cpu()
    values = torch.linalg.eigvalsh(matrix[: len(basis), : len(basis)])  # of the lower triangle
    return values[values.abs().argsort(descending=True)[:TOP]]
