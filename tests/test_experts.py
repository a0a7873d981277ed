"""Experts with batched weights, among which tokens are routed."""

from __future__ import annotations

import oracle
import pytest
import torch
from torch import nn

from nngeometry import (
    FIM,
    EmpiricalFisher,
    LayerCollection,
    PMatDense,
    PMatDiag,
    PMatImplicit,
    PMatKFAC,
    PMatLowRank,
    PVector,
)
from nngeometry.forms import Beside
from nngeometry.generator import Generator, rowwise
from nngeometry.likelihood import Gaussian
from nngeometry.memory import memory_budget

transformers = pytest.importorskip("transformers")
modeling = pytest.importorskip("transformers.models.mixtral.modeling_mixtral")

T, D, E = 3, 4, 3
NAME = "experts"


class Net(nn.Module):
    """Every token goes to two of three experts."""

    def __init__(self, act="silu", implementation="eager"):
        super().__init__()
        torch.manual_seed(0)
        config = transformers.MixtralConfig(
            hidden_size=D,
            intermediate_size=2,
            num_local_experts=E,
            num_experts_per_tok=2,
            hidden_act=act,
            experts_implementation=implementation,
        )
        self.router, self.experts, self.head = nn.Linear(D, E), modeling.MixtralExperts(config), nn.Linear(D, 2)
        nn.init.normal_(self.experts.gate_up_proj)
        nn.init.normal_(self.experts.down_proj)

    def forward(self, x):
        h = x.flatten(0, 1)
        weights, index = self.router(h).softmax(-1).topk(2)
        return self.head(torch.tanh(h + self.experts(h, index, weights)).view_as(x)).mean(1)


@pytest.fixture
def x():
    torch.manual_seed(1)
    return torch.randn(5, T, D)


@pytest.mark.parametrize("act", ["silu", "gelu"])
@pytest.mark.parametrize("implementation", ["eager", "batched_mm"])
def test_exact(x, act, implementation):
    model = Net(act, implementation)
    batches = [(x,), (x[:1],)]
    M = oracle.fim(model, batches, "classif_logits")
    assert oracle.relative(FIM(model, batches, PMatDense).to_torch(), M) < 1e-10
    assert oracle.relative(FIM(model, batches, PMatDiag).get_diag(), M.diagonal()) < 1e-10
    F = FIM(model, batches, PMatKFAC)
    at = F.layer_collection.slices()[NAME]
    assert oracle.relative(F.block(NAME).to_torch(), M[at, at]) < 1e-10
    y = torch.randint(2, (len(x),))
    G = oracle.loss_gradients(model, [(x, y)], nn.CrossEntropyLoss(reduction="none"))
    assert oracle.relative(EmpiricalFisher(model, (x, y), PMatDiag).get_diag(), G.square().mean(0)) < 1e-10


def test_form(x):
    """No loop over tokens: linear maps with a group for each expert."""
    model = Net()
    lc = LayerCollection.from_model(model)
    generator = Generator(model, lc, rowwise(lambda f, batch, k: Gaussian().sqrt(f)))
    (observation,) = generator.stream((x,))
    j = observation.forms[NAME]
    assert isinstance(j, Beside)


def test_a_product_for_each_expert_where_the_block_does_not_fit(x):
    model = Net()
    M = oracle.fim(model, [(x,)], "classif_logits")
    with memory_budget(20000):
        F = FIM(model, (x,), PMatKFAC)
    at = F.layer_collection.slices()[NAME]
    found = F.block(NAME).to_torch()
    p = E * 2 * 2 * D
    for k in range(E):  # nothing between experts, and the trace of each is exact
        one = slice(k * p // E, (k + 1) * p // E)
        assert found[one, :p].abs().sum() == found[one, one].abs().sum()
        assert oracle.relative(found[one, one].trace(), M[at, at][one, one].trace()) < 1e-10


@pytest.mark.parametrize("frozen", ["gate_up_proj", "down_proj"])
def test_some_are_frozen(x, frozen):
    model = Net()
    getattr(model.experts, frozen).requires_grad_(False)
    M = oracle.fim(model, [(x,)], "classif_logits")
    assert oracle.relative(FIM(model, (x,), PMatDense).to_torch(), M) < 1e-10
    assert oracle.relative(FIM(model, (x,), PMatDiag).get_diag(), M.diagonal()) < 1e-10


def test_all_representations(x):
    model = Net()
    M = oracle.fim(model, [(x,)], "classif_logits")
    v = PVector.from_model(model)
    for representation in (PMatLowRank, PMatImplicit):
        F = FIM(model, (x,), representation)
        assert oracle.relative(F.mv(v).to_torch(), M @ v.to_torch()) < 1e-10
        assert oracle.relative(F.trace(), M.trace()) < 1e-10
