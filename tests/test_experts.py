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
from nngeometry.kinds.experts import gated_experts
from nngeometry.kinds.kind import kind_of
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


def written_out(model, x, y):
    """KFAC of the empirical Fisher matrix, from a loop over examples and experts: for each map of each expert the mean
    over examples of the sum of g g^T over the tokens that are routed to it, and the mean of a a^T over these tokens.
    """
    e, act = model.experts, model.experts.act_fn
    sums = [[[0, 0, 0] for _ in range(E)] for _ in range(2)]
    for one, label in zip(x, y, strict=True):
        weights, index = model.router(one).softmax(-1).topk(2)
        seen, mixed = [], torch.zeros_like(one)
        for k in range(E):
            tokens, slot = torch.where(index == k)
            pre = (one[tokens] @ e.gate_up_proj[k].T).requires_grad_()
            gate, up = pre.chunk(2, -1)
            inner = act(gate) * up
            out = inner @ e.down_proj[k].T
            mixed = mixed.index_add(0, tokens, out * weights[tokens, slot, None])
            seen += [(0, k, one[tokens], pre), (1, k, inner, out)]
        f = model.head(torch.tanh(one + mixed)).mean(0)
        loss = nn.functional.cross_entropy(f, label)
        for which, k, a, z in seen:
            (g,) = torch.autograd.grad(loss, z, retain_graph=True)
            total = sums[which][k]
            total[0] = total[0] + g.T @ g
            total[1] = total[1] + (a.T @ a).detach()
            total[2] += len(a)
    blocks = [torch.kron(left / len(x), right / max(count, 1)) for of in sums for left, right, count in of]
    return torch.block_diag(*blocks)


@pytest.mark.parametrize("nobody", [False, True])
def test_a_product_for_each_expert_where_the_block_does_not_fit(x, nobody):
    model, y = Net(), torch.randint(2, (len(x),))
    if nobody:  # goes to the second one
        with torch.no_grad():
            model.router.bias[1] = -100
    expected = written_out(model, x, y)
    for batches in ([(x, y)], [(x[:1], y[:1]), (x[1:], y[1:])]):
        with memory_budget(20000):
            F = EmpiricalFisher(model, batches, PMatKFAC)
        assert oracle.relative(F.block(NAME).to_torch(), expected) < 1e-10
    assert "3 x Kron(Dense, Dense)" in repr(F)


def test_experts_that_compute_as_those_of_mixtral_have_their_form(x):
    olmoe = pytest.importorskip("transformers.models.olmoe.modeling_olmoe")
    jamba = pytest.importorskip("transformers.models.jamba.modeling_jamba")
    oss = pytest.importorskip("transformers.models.gpt_oss.modeling_gpt_oss")
    config = transformers.MixtralConfig(hidden_size=D, intermediate_size=2, num_local_experts=E, num_experts=E)
    model = Net()
    for of, same in ((olmoe.OlmoeExperts, True), (jamba.JambaExperts, True), (oss.GptOssExperts, False)):
        experts = of.__new__(of)
        nn.Module.__init__(experts)
        assert (kind_of(experts).function is gated_experts) == same
    model.experts = olmoe.OlmoeExperts(config).requires_grad_()
    nn.init.normal_(model.experts.gate_up_proj)
    nn.init.normal_(model.experts.down_proj)
    M = oracle.fim(model, [(x,)], "classif_logits")
    assert oracle.relative(FIM(model, (x,), PMatDiag).get_diag(), M.diagonal()) < 1e-10


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


@pytest.mark.filterwarnings("ignore:.*cannot be vectorised over examples")
def test_a_replaced_forward_is_differentiated_itself(x):
    model = Net()
    forward = model.experts.forward
    model.experts.forward = lambda *args: 2 * forward(*args)
    M = oracle.fim(model, [(x,)], "classif_logits")
    assert oracle.relative(FIM(model, (x,), PMatDense).to_torch(), M) < 1e-10
    F = FIM(model, (x,), PMatKFAC)
    at = F.layer_collection.slices()[NAME]
    assert oracle.relative(F.block(NAME).to_torch(), M[at, at]) < 1e-10


class Router(nn.Module):
    """It flattens examples and positions by itself, as that of DeepSeek does."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(E, D))

    def forward(self, h):
        return nn.functional.linear(self.flat(h), self.weight)

    def flat(self, h):
        return h.reshape(-1, D)

    def back(self, y):
        return y


class PositionsFirst(Router):
    def flat(self, h):
        return h.transpose(0, 1).reshape(-1, D)

    def back(self, y):
        return y.unflatten(0, (T, -1)).transpose(0, 1).flatten(0, 1)


class Routing(Net):
    def __init__(self, router):
        super().__init__()
        self.router = router()

    def forward(self, x):
        weights, index = torch.tanh(self.router.back(self.router(x))).softmax(-1).topk(2)
        h = x.flatten(0, 1)
        return self.head(torch.tanh(h + self.experts(h, index, weights)).view_as(x)).mean(1)


def test_a_router_that_flattens_examples(x):
    model = Routing(Router)
    batches = [(x,), (x[:1],)]
    M = oracle.fim(model, batches, "classif_logits")
    assert oracle.relative(FIM(model, batches, PMatDense).to_torch(), M) < 1e-10
    assert oracle.relative(FIM(model, batches, PMatDiag).get_diag(), M.diagonal()) < 1e-10
    with pytest.raises(ValueError, match="router"):
        FIM(Routing(PositionsFirst), (x,), PMatDense)
