"""Lanczos for the contenders that have products but no Lanczos with reorthogonalisation."""

from __future__ import annotations

from collections.abc import Callable

import torch
from settings import STEPS
from torch import Tensor


def largest_ritz_value(product: Callable[[Tensor], Tensor], start: Tensor) -> float:
    """The top of the spectrum as it is seen from ``start``, orthogonalised twice in each step."""
    v = start / start.norm()
    basis, matrix = start.new_empty(STEPS, len(start)), start.new_zeros(STEPS, STEPS, dtype=torch.float64)
    for k in range(STEPS):
        basis[k] = v
        v, held = product(v), basis[: k + 1]
        for _ in range(2):
            inner = held @ v
            v = v - inner @ held
            matrix[k, k] += inner[k]
        if k + 1 < STEPS:
            beta = v.norm()
            matrix[k, k + 1] = matrix[k + 1, k] = beta
            v = v / beta
    return float(torch.linalg.eigvalsh(matrix)[-1])
