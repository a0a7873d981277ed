"""What is asked of posteriors, consolidation, merging and selection and cannot be had: one sentence with the remedy."""

import pytest
import torch
from torch import nn

from nngeometry import FIM, Bernoulli, PMatDense, PMatDiag, PMatImplicit, PMatKFAC, Poisson, Posterior, PVector
from nngeometry.continual import EWC
from nngeometry.merging import merge
from nngeometry.selection import bait, greedy

X = torch.randn(8, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0))


def net(outputs=3):
    torch.manual_seed(outputs)
    return nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, outputs)).double().eval()


@pytest.mark.parametrize(
    "ask",
    [
        lambda p: p.predict(X),
        lambda p: p.predict(X, "mc"),
        lambda p: p.predict(X, "samples"),
        lambda p: p.information(X),
        lambda p: p.variance(X),
        lambda p: p.log_marginal_likelihood(),
    ],
)
def test_one_logit_by_name_and_several_outputs(ask):
    model = net()
    F = FIM(model, (X,), PMatKFAC, Bernoulli())
    data = X, torch.ones(8, 3, dtype=torch.float64)
    with pytest.raises(ValueError, match=r'classif_binary_logits.*returns 3.*"classif_logits".*Bernoulli\(\)'):
        ask(Posterior(model, F, "classif_binary_logits", num_data=8, data=data))
    ask(Posterior(model, F, Bernoulli(), num_data=8, data=data))


@pytest.mark.parametrize("how", ["probit", "mc", "samples", "bridge"])
def test_predictions_of_no_example(how):
    model = net()
    posterior = Posterior(model, FIM(model, (X,), PMatKFAC), num_data=8)
    for x in (X[:0], [(X,), (X[:0],)]):
        with pytest.raises(ValueError, match=r"^x: a minibatch of it has no example"):
            posterior.predict(x, how)


@pytest.mark.parametrize(("likelihood", "value"), [(Poisson(), -1.0), (Bernoulli(), 2.0), (Bernoulli(), -1.0)])
def test_targets_that_a_likelihood_does_not_have(likelihood, value):
    model = net(1)
    F = FIM(model, (X,), PMatKFAC, variant=likelihood)
    posterior = Posterior(model, F, likelihood, num_data=8, data=(X, torch.full((8, 1), value)))
    with pytest.raises(ValueError, match=rf"^{type(likelihood).__name__}: targets are .* use "):
        posterior.log_marginal_likelihood()


def test_no_prior_on_a_singular_matrix():
    model = net()
    for representation in (PMatDense, PMatKFAC):
        with pytest.raises(ValueError, match="prior_precision: with 0 the precision is singular"):
            Posterior(model, FIM(model, (X[:2],), representation), num_data=2, prior_precision=0.0)
    posterior = Posterior(model, FIM(model, (X[:2],), PMatImplicit), num_data=2, prior_precision=0.0)
    with pytest.raises(ValueError, match="prior_precision: with 0 the precision is singular"):
        posterior.variance(X)


@pytest.mark.parametrize("online", [False, True])
def test_consolidation_after_a_head_was_replaced(online):
    model = net()
    ewc = EWC(model, strength=1.0, online=online).consolidate((X,))
    state = ewc.state_dict()
    model[2] = nn.Linear(5, 7).double()
    for where, ask in (("penalty", ewc.penalty), ("consolidate", lambda: ewc.consolidate((X,)))):
        with pytest.raises(ValueError, match=rf"^{where}: the model does not have the layers.*leave layers"):
            ask()
    assert ewc.tasks == 1
    with pytest.raises(ValueError, match=r"^load_state_dict: the model does not have the layers"):
        EWC(model, strength=1.0, online=online).load_state_dict(state)


def test_experts_that_are_not_finite():
    model = net()
    F = FIM(model, (X,), PMatDiag)
    with pytest.raises(ValueError, match="weights of number 1 are not finite"):
        merge([(model, F), (PVector.from_model(model) * float("nan"), F)])


def test_selection_from_what_is_none():
    with pytest.raises(ValueError, match="embeddings: there are NaN"):
        bait(torch.full((3, 1, 2), float("nan")), 1)
    with pytest.raises(ValueError, match="not positive definite"):
        greedy(-3 * torch.eye(3), 2)
    for choose in (lambda **k: bait(torch.ones(3, 1, 2), 1, **k), lambda **k: greedy(torch.eye(3), 1, **k)):
        with pytest.raises(IndexError, match="positions below 3"):
            choose(labelled=torch.tensor([7]))
