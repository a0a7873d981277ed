"""The representation that holds nothing: products by automatic differentiation, one pass over the data each."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ..blocks import Block
from ..estimation import Estimation, Source
from ..generator import Generator, Observation, fold
from .pmat import PMat


class PMatImplicit(PMat):
    """``M v`` by automatic differentiation: free of the number of outputs and of P**2.

    It holds the model and the data, which it reads again for every product, and a copy of the parameters as they are
    now: it stays the matrix at these when the model moves on. Once products are repeated, the forward pass is kept from
    one to the next while what autograd needs fits the memory budget. Trace and diagonal are exact, from the stream of
    Jacobians; solve is by conjugate gradients.

    Example:
        >>> from nngeometry import FIM, PVector
        >>> model = torch.nn.Linear(4, 3)
        >>> F = FIM(model, (torch.randn(20, 4),), PMatImplicit)
        >>> F.mv(PVector.from_model(model).detach()).size()
        torch.Size([15])
    """

    @classmethod
    def _estimate(cls, generator: Any, examples: Any, **options: Any) -> Block:
        if options:
            raise TypeError(f"{cls.__name__} has no option {', '.join(options)}")
        return generator.operator(examples)

    @classmethod
    def estimation(cls, source: Source, **options: Any) -> Estimation:
        raise NotImplementedError(
            f"{cls.__name__}: a matrix known by its products has no running average, since it would need all data "
            "again: use a representation that holds its entries, or make it anew of the last minibatch"
        )


def diagonal_of_gram(generator: Generator, examples: Any, names: Sequence[str]) -> Tensor:
    """The squared norms of the rows of a Jacobian over some layers: ``(C, n)``."""
    found: list[list[Tensor]] = []

    def step(observation: Observation) -> None:
        if observation.n:
            found.append([])
        found[-1].append(sum(observation.forms[name].sqnorm() for name in names))  # type: ignore[arg-type]

    fold(generator.stream(examples), step)
    return torch.cat([torch.cat(chunks) for chunks in found], 1)
