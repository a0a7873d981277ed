"""Refreshing where minibatches have fewer examples than layers have inputs: factors are first held by their rows."""

import copy

import pytest
import torch
from torch import nn

from nngeometry import FIM, GGN, PMatBlockDiag, PMatEKFAC, PMatKFAC
from nngeometry.blocks import Dense, LowRank
from nngeometry.optim import Rotated, SecondOrderOptimizer, Stale, Turned


@pytest.mark.parametrize("alpha", [1e-3, 0.05, 0.3, 2.0])
def test_rows_and_a_matrix_are_compared_by_what_they_are(alpha):
    rows, m = torch.randn(3, 7), torch.randn(7, 7)
    low = LowRank(rows, torch.ones(3))
    a = low.to_dense()
    b = a + 0.02 * (m + m.T)
    dense = Dense(b.unsqueeze(0))
    assert low.shape != dense.shape
    assert Stale(alpha)._similar(dense, low) == bool((a - b).norm() < alpha * a.norm())
    assert Stale(alpha)._similar(low, dense) == bool((a - b).norm() < alpha * b.norm())


@pytest.mark.parametrize("policy", [Stale(0.05), Stale(0.5), Rotated(0.1), Turned(2)])
@pytest.mark.parametrize("representation", [PMatKFAC, PMatEKFAC, PMatBlockDiag])
@pytest.mark.parametrize("matrix", [FIM, GGN])
def test_trainings_on_few_examples_go_on_and_are_resumed_to_the_bit(matrix, representation, policy):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(30, 8), nn.Tanh(), nn.Linear(8, 3))
    data = [(torch.randn(4, 30), torch.randint(3, (4,))) for _ in range(7)]

    def made(model):
        return SecondOrderOptimizer(model, representation, matrix, lr=1e-2, damping=0.1, refresh=policy)

    def run(model, opt, minibatches):
        for x, y in minibatches:
            opt.zero_grad()
            nn.functional.cross_entropy(model(x), y).backward()
            opt.observe((x, y))
            opt.step()

    opt = made(model)
    run(model, opt, data[:2])
    other = copy.deepcopy(model)
    again = made(other)
    again.load_state_dict(copy.deepcopy(opt.state_dict()))
    run(model, opt, data[2:])
    run(other, again, data[2:])
    assert all(map(torch.equal, model.parameters(), other.parameters()))
