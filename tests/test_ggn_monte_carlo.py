"""The Gauss-Newton matrix from random vectors: what it estimates, in what units, and what does not count."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from torch import Tensor, nn

from nngeometry import (
    GGN,
    Accumulator,
    FIM_MonteCarlo,
    GGN_MonteCarlo,
    PMatDense,
    PMatDiag,
    PMatEKFAC,
    PMatImplicit,
    PMatKFAC,
    PVector,
    TokenCrossEntropy,
)

F64 = torch.float64
REPRESENTATIONS = [PMatDense, PMatDiag, PMatKFAC, PMatEKFAC, PMatImplicit]


@pytest.fixture
def model() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 3), nn.Tanh(), nn.Linear(3, 3)).to(F64)


def draws(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def distance(estimate: Tensor, exact: Tensor) -> float:
    return float((estimate - exact).norm() / exact.norm())


class LogCosh(nn.Module):
    """One number for each example, with a Hessian that is known by differentiating alone."""

    def forward(self, f: Tensor, y: Tensor) -> Tensor:
        return (f - y).cosh().log().sum(1) + 0.1 * (f.sum(1)).square()


LOSSES = [
    (nn.CrossEntropyLoss(), "classes"),
    (nn.CrossEntropyLoss(weight=torch.tensor([1.0, 2.0, 0.5], dtype=F64), label_smoothing=0.2), "classes"),
    (nn.CrossEntropyLoss(reduction="sum"), "classes"),
    (nn.MSELoss(), "numbers"),
    (nn.BCEWithLogitsLoss(reduction="sum"), "probabilities"),
    (nn.PoissonNLLLoss(), "counts"),
    (LogCosh(), "numbers"),
]


def targets(what: str, n: int) -> Tensor:
    torch.manual_seed(2)
    if what == "classes":
        return torch.randint(3, (n,))
    if what == "counts":
        return torch.poisson(torch.ones(n, 3, dtype=F64))
    return torch.rand(n, 3, dtype=F64) if what == "probabilities" else torch.randn(n, 3, dtype=F64)


@pytest.mark.parametrize(("loss", "what"), LOSSES)
def test_it_tends_to_the_gauss_newton_matrix(model: nn.Module, loss: nn.Module, what: str) -> None:
    x = torch.randn(7, 4, dtype=F64)
    y = targets(what, 7)
    batches = [(x[:3], y[:3]), (x[3:], y[3:])]
    exact = GGN(model, batches, PMatDense, loss).to_torch()
    few, many = (GGN_MonteCarlo(model, batches, PMatDense, loss, trials=t, generator=draws()) for t in (50, 5000))
    assert distance(many.to_torch(), exact) < 0.04
    assert distance(many.to_torch(), exact) < distance(few.to_torch(), exact)


@pytest.mark.parametrize("representation", REPRESENTATIONS)
def test_of_the_cross_entropy_it_is_the_sampled_fisher_matrix(model: nn.Module, representation: type) -> None:
    batches = [(torch.randn(n, 4, dtype=F64), torch.randint(3, (n,))) for n in (3, 4)]
    one = GGN_MonteCarlo(model, batches, representation, trials=2, generator=draws())
    other = FIM_MonteCarlo(model, batches, representation, trials=2, generator=draws())
    v = PVector.from_model(model).detach()
    torch.testing.assert_close(one.mv(v).to_torch(), other.mv(v).to_torch(), rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("representation", REPRESENTATIONS)
def test_of_one_output_it_is_exact(representation: type) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 3), nn.Tanh(), nn.Linear(3, 1)).to(F64)
    batch = torch.randn(6, 4, dtype=F64), torch.randn(6, 1, dtype=F64)
    v = PVector.from_model(model).detach()
    make = (partial(GGN_MonteCarlo, generator=draws()), GGN)
    one, other = (m(model, batch, representation, nn.MSELoss()).mv(v).to_torch() for m in make)
    torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-14)


def test_it_is_in_the_units_of_a_mean_over_tokens_and_padding_does_not_count() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Embedding(5, 4), nn.Linear(4, 5)).to(F64)
    tokens = torch.randint(5, (3, 6))
    labels = tokens.masked_fill(torch.arange(6) >= torch.tensor([[6], [4], [3]]), -100)
    batches = [{"tokens": tokens[:2], "labels": labels[:2]}, {"tokens": tokens[2:], "labels": labels[2:]}]
    how = {"loss": TokenCrossEntropy(shift=True), "targets": "labels", "function": lambda b: model(b["tokens"])}
    exact = GGN(model, batches, PMatDense, **how).to_torch()
    found = GGN_MonteCarlo(model, batches, PMatDense, trials=4000, generator=draws(), **how).to_torch()
    assert distance(found, exact) < 0.05
    emptied = [{"tokens": b["tokens"], "labels": torch.full_like(b["labels"], -100)} for b in batches[1:]]
    alone = GGN_MonteCarlo(model, batches[:1], PMatDense, generator=draws(), **how).to_torch()
    with_empty = GGN_MonteCarlo(model, batches[:1] + emptied, PMatDense, generator=draws(), **how).to_torch()
    torch.testing.assert_close(alone, with_empty, rtol=1e-12, atol=1e-14)


def test_the_global_source_of_randomness_is_used_once_and_a_generator_alone(model: nn.Module) -> None:
    batch = torch.randn(5, 4, dtype=F64), torch.randint(3, (5,))
    torch.manual_seed(3)
    before = torch.get_rng_state()
    GGN_MonteCarlo(model, batch, PMatDiag, generator=draws())
    assert torch.equal(before, torch.get_rng_state())
    one = GGN_MonteCarlo(model, batch, PMatDiag).get_diag()
    torch.manual_seed(3)
    torch.testing.assert_close(one, GGN_MonteCarlo(model, batch, PMatDiag).get_diag(), rtol=0, atol=0)


def test_a_running_estimate_draws_anew_for_each_minibatch(model: nn.Module) -> None:
    batch = torch.randn(5, 4, dtype=F64), torch.randint(3, (5,))
    running = Accumulator(GGN_MonteCarlo, model, PMatDense, generator=draws())
    for _ in range(400):
        running.update(batch)
    exact = GGN(model, batch, PMatDense).to_torch()
    assert distance(running.matrix().to_torch(), exact) < 0.1


def test_what_is_not_convex_and_what_is_no_count_are_told(model: nn.Module) -> None:
    batch = torch.randn(5, 4, dtype=F64), torch.randn(5, 3, dtype=F64)
    with pytest.raises(ValueError, match="trials"):
        GGN_MonteCarlo(model, batch, PMatDiag, nn.MSELoss(), trials=0)
    with pytest.raises(ValueError, match="negative"):
        GGN_MonteCarlo(model, batch, PMatDiag, lambda f, y: -(f - y).square().sum(1))
