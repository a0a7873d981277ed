"""What all examples have in common, and what cannot get an axis of examples: biases of relative positions."""

from __future__ import annotations

import oracle
import pytest
import torch
from torch import nn

from nngeometry import FIM, GramMatrix, PMatBlockDiag, PMatDense, PMatDiag, PMatEKFAC, PMatKFAC, memory_budget

T, HEADS, D = 4, 2, 6


class Relative(nn.Module):
    """Attention with a bias for each distance of positions, which is permuted before it is added to the scores."""

    def __init__(self, table):
        super().__init__()
        self.first, self.head = nn.Linear(3, D), nn.Linear(D, 3)
        self.table = table
        if table == "embedding":
            self.bias = nn.Embedding(2 * T - 1, HEADS)
        elif table == "net":
            self.bias = nn.Sequential(nn.Linear(1, 5), nn.Tanh(), nn.Linear(5, HEADS))
        else:
            self.bias = Table()

    def forward(self, x):
        h = torch.tanh(self.first(x))
        q = h.unflatten(-1, (HEADS, -1)).transpose(1, 2)
        where = torch.arange(T, device=x.device)
        distance = where - where[:, None] + T - 1
        of = self.bias(distance if self.table != "net" else distance[..., None].to(x.dtype))
        scores = q @ q.mT + of.permute(2, 0, 1).unsqueeze(0)
        return self.head((scores.softmax(-1) @ q).transpose(1, 2).flatten(2)).mean(1)


class Table(nn.Module):
    def __init__(self):
        super().__init__()
        self.values = nn.Parameter(torch.randn(2 * T - 1, HEADS))

    def forward(self, distance):
        return self.values[distance.flatten()].view(T, T, -1)


@pytest.mark.parametrize("table", ["embedding", "net", "bare"])
def test_exact(table):
    model = oracle.randomise(Relative(table))
    batches = [(torch.randn(4, T, 3),), (torch.randn(2, T, 3),)]
    M = oracle.fim(model, batches, "classif_logits")
    F = FIM(model, batches, PMatDense)
    assert oracle.relative(F.to_torch(), M) < 1e-10
    with memory_budget(2**15):
        assert oracle.relative(FIM(model, batches, PMatDiag).get_diag(), M.diagonal()) < 1e-10
    blocks = oracle.blockdiag(M, F.layer_collection)
    assert oracle.relative(FIM(model, batches, PMatBlockDiag).to_torch(), blocks) < 1e-10
    assert oracle.relative(FIM(model, batches, PMatEKFAC).trace(), M.trace()) < 1e-10
    assert FIM(model, batches, PMatKFAC).trace() > 0
    J = oracle.jacobian(model, batches[0])
    K = GramMatrix(model, batches[0]).to_torch()
    assert oracle.relative(K, torch.einsum("cbp,dep->cbde", J, J)) < 1e-10
