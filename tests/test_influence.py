"""Influence scores equal their definition with dense matrices, and what leaving an example out does."""

import weakref

import oracle
import pytest
import torch
from models import CASES, SMALL
from torch import nn

import nngeometry.influence
from nngeometry import (
    FIM,
    GGN,
    Influence,
    LayerCollection,
    PMatBlockDiag,
    PMatDense,
    PMatDiag,
    PMatEKFAC,
    PMatImplicit,
    PMatKFAC,
    PMatLowRank,
    Relative,
)

REPRESENTATIONS = [PMatDense, PMatBlockDiag, PMatDiag, PMatKFAC, PMatEKFAC, PMatLowRank]
LOSS = nn.CrossEntropyLoss()
pytestmark = pytest.mark.filterwarnings("ignore:.*cannot be vectorised:RuntimeWarning")


def problem(name, n=7):
    """A model with labelled training examples in uneven minibatches, and three labelled queries."""
    model, batch, _ = CASES[name].make(n)
    _, queries, _ = CASES[name].make(3)
    classes = model(batch[0]).shape[1]
    train = (batch[0], torch.arange(n) % classes)
    asked = (queries[0], (torch.arange(3) + 1) % classes)
    return model, train, [tuple(t[a:b] for t in train) for a, b in ((0, 3), (3, 7))], asked


def per_example(f, y):
    return torch.nn.functional.cross_entropy(f, y, reduction="none")


@pytest.mark.parametrize("name", SMALL)
@pytest.mark.parametrize("representation", REPRESENTATIONS)
def test_scores_equal_their_definition(name, representation):
    model, train, loader, queries = problem(name)
    F = FIM(model, loader, representation)
    g = oracle.loss_gradients(model, [train], per_example)
    q = oracle.loss_gradients(model, [queries], per_example)
    dense = F.to_torch()
    inverse = torch.linalg.inv(dense + 0.05 * torch.eye(len(dense)))
    influence = Influence(model, F, LOSS, regul=0.05)
    expected = q @ inverse @ g.T
    assert oracle.relative(influence.scores(queries, loader), expected) < 1e-9
    own = torch.einsum("tp,pq,tq->t", g, inverse, g)
    assert oracle.relative(influence.self_scores(loader), own) < 1e-9
    shares = influence.scores(queries, loader, per_layer=True)
    assert oracle.relative(sum(shares.values()), expected) < 1e-9
    shares = influence.self_scores(loader, per_layer=True)
    assert oracle.relative(sum(shares.values()), own) < 1e-9
    values, index = influence.top(queries, loader, 4)
    best = expected.topk(4, 1)
    assert oracle.relative(values, best.values) < 1e-9
    assert torch.equal(index, best.indices)
    values, index = influence.top(queries, loader, 2, largest=False)
    assert torch.equal(index, expected.topk(2, 1, largest=False).indices)


def test_shares_of_layers_are_those_of_blocks():
    model, train, loader, queries = problem("convnet")
    F = FIM(model, loader, PMatKFAC)
    shares = Influence(model, F, LOSS, regul=0.05).scores(queries, loader, per_layer=True)
    g = oracle.loss_gradients(model, [train], per_example)
    q = oracle.loss_gradients(model, [queries], per_example)
    inverse = F.inv(0.05).to_torch()
    for name, s in LayerCollection.from_model(model).slices().items():
        assert oracle.relative(shares[name], q[:, s] @ inverse[s, s] @ g[:, s].T) < 1e-9


@pytest.mark.parametrize("regul", [0.05, Relative(0.1)])
def test_refinement_solves_the_exact_system(regul):
    model, _, loader, queries = problem("convnet")
    exact = GGN(model, loader, PMatImplicit, LOSS)
    dense = GGN(model, loader, PMatDense, LOSS)
    rough = GGN(model, loader, PMatEKFAC, LOSS)
    refined = Influence(model, rough, LOSS, regul, refine=exact, rtol=1e-10)
    expected = Influence(model, dense, LOSS, regul)
    assert oracle.relative(refined.scores(queries, loader), expected.scores(queries, loader)) < 1e-7
    assert oracle.relative(refined.self_scores(loader), expected.self_scores(loader)) < 1e-7


def test_query_loss():
    model, train, loader, queries = problem("mlp")
    F = FIM(model, loader, PMatDense)
    margin = lambda f, y: f.gather(1, y[:, None])[:, 0]  # noqa: E731
    found = Influence(model, F, LOSS, 0.1, query_loss=margin).scores(queries, loader)
    g = oracle.loss_gradients(model, [train], per_example)
    q = oracle.loss_gradients(model, [queries], margin)
    assert oracle.relative(found, q @ F.inv(0.1).to_torch() @ g.T) < 1e-9


def test_sign_and_scale_are_those_of_leaving_one_out():
    """On ridge regression the prediction is exact up to the leverage of the example."""
    torch.manual_seed(0)
    n, r = 30, 0.1
    x, y = torch.randn(n, 3), torch.randn(n)
    xq, yq = torch.randn(2, 3), torch.randn(2)
    model = nn.Linear(3, 1, bias=False)

    def fit(keep):
        a, b = x[keep], y[keep]
        return torch.linalg.solve(a.T @ a / n + r * torch.eye(3), a.T @ b / n)

    with torch.no_grad():
        w = fit(torch.ones(n, dtype=torch.bool))
        model.weight.copy_(w)
    loss = lambda f, y: (f[:, 0] - y).square() / 2  # noqa: E731
    F = GGN(model, (x, y), PMatDense, loss)
    scores = Influence(model, F, loss, r).scores((xq, yq), (x, y))
    for t in range(n):
        keep = torch.arange(n) != t
        change = ((xq @ fit(keep) - yq).square() - (xq @ w - yq).square()) / 2
        assert torch.allclose(scores[:, t] / n, change, rtol=0.35, atol=2e-3)
    changes = torch.stack(
        [((xq @ fit(torch.arange(n) != t) - yq).square() - (xq @ w - yq).square()) / 2 for t in range(n)], 1
    )
    for a, b in zip(scores, changes, strict=True):
        assert float(torch.corrcoef(torch.stack([a, b]))[0, 1]) > 0.99


@pytest.mark.parametrize("representation", [PMatDense, PMatKFAC, PMatEKFAC])
@pytest.mark.parametrize("ask", [lambda i, q, t: i.scores(q, t), lambda i, q, t: i.self_scores(t)])
def test_gradients_of_a_minibatch_are_let_go_of_before_the_next_ones_are_made(representation, ask, monkeypatch):
    model, train, _, queries = problem(SMALL[0], 12)
    influence = Influence(model, FIM(model, train, representation), LOSS, 0.1)
    loader = [tuple(t[a : a + 3] for t in train) for a in range(0, 12, 3)]
    held: list[weakref.ref] = []
    jacobians = nngeometry.influence.batch_jacobians

    def watched(generator, examples):
        def forward(*_):
            assert not any(one() for one in held)

        hook = model.register_forward_pre_hook(forward)
        for slab in jacobians(generator, examples):
            hook.remove()
            if examples is loader:
                held.extend(weakref.ref(form) for form in slab.forms.values())
            hook = model.register_forward_pre_hook(forward)
            yield slab
            del slab
        hook.remove()

    monkeypatch.setattr(nngeometry.influence, "batch_jacobians", watched)
    ask(influence, queries, loader)
    assert len(held) == 4 * len(influence.matrix.layer_collection)
