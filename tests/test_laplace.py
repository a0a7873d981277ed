"""The backend for laplace-torch against its own, where these are right; skipped where it is not installed."""

import math

import oracle
import pytest
import torch
from torch import nn

from nngeometry import FIM, Gaussian, LayerCollection, PMatBlockDiag, PMatEKFAC, PMatKFAC, PMatLowRank, Posterior

laplace = pytest.importorskip("laplace")
ours = pytest.importorskip("nngeometry.integrations.laplace")
curvlinops = pytest.importorskip("laplace.curvature.curvlinops")

pytestmark = pytest.mark.filterwarnings("ignore")
N = 14


def problem(likelihood, norm=False):
    torch.manual_seed(0)
    layers = [nn.Conv2d(1, 2, 3), nn.Tanh(), nn.Flatten(), nn.Linear(18, 4), nn.Tanh(), nn.Linear(4, 3)]
    model = nn.Sequential(*layers[:4], *([nn.LayerNorm(4)] if norm else []), *layers[4:])
    x = torch.randn(N, 1, 5, 5)
    y = torch.randn(N, 3) if likelihood == "regression" else torch.randint(3, (N,))
    data = torch.utils.data.TensorDataset(x, y)
    return oracle.randomise(model), x, y, torch.utils.data.DataLoader(data, batch_size=5)


def fitted(model, loader, likelihood, weights, structure, **options):
    if weights == "subnetwork":
        options["subnetwork_indices"] = torch.tensor([1, 5, 30, 60, 99])
    la = laplace.Laplace(model, likelihood, weights, structure, prior_precision=0.7, **options)
    la.fit(loader)
    return la


@pytest.mark.parametrize("likelihood", ["classification", "regression"])
@pytest.mark.parametrize("weights", ["all", "last_layer", "subnetwork"])
@pytest.mark.parametrize("structure", ["full", "diag"])
def test_exact_structures_are_those_of_its_own_backends(likelihood, weights, structure):
    model, x, _, loader = problem(likelihood)
    a = fitted(model, loader, likelihood, weights, structure, backend=ours.NNGeometryGGN)
    b = fitted(model, loader, likelihood, weights, structure, backend=curvlinops.CurvlinopsGGN)
    assert oracle.relative(a.H, b.H) < 1e-10
    assert abs(float(a.log_marginal_likelihood() - b.log_marginal_likelihood())) < 1e-9
    for one, two in zip(_tuple(a(x)), _tuple(b(x)), strict=True):
        assert oracle.relative(one, two) < 1e-9


def _tuple(found):
    return found if isinstance(found, tuple) else (found,)


@pytest.mark.parametrize("weights", ["all", "last_layer"])
@pytest.mark.parametrize("likelihood", ["classification", "regression"])
def test_kron_has_the_blocks_of_ours(likelihood, weights):
    """One minibatch: then its factors are those of PMatKFAC, weight and bias apart."""
    model, x, y, _ = problem(likelihood, norm=True)
    loader = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(x, y), batch_size=N)
    la = fitted(model, loader, likelihood, weights, "kron", backend=ours.NNGeometryGGN)
    variant = Gaussian() if likelihood == "regression" else "classif_logits"
    lc = LayerCollection.from_model(model, *(["6"] if weights == "last_layer" else []))
    F = N * FIM(model, (x,), PMatKFAC, variant, layer_collection=lc).to_torch()
    slices, start = [], 0
    for p in lc.parameters(model):
        slices.append(slice(start, start + p.numel()))
        start += p.numel()
    for s, factors in zip(slices, la.H_facs.kfacs, strict=True):
        block = factors[0] if len(factors) == 1 else torch.kron(*factors)
        assert oracle.relative(block, F[s, s]) < 1e-10
    assert bool(torch.isfinite(la.log_marginal_likelihood()))
    assert _tuple(la(x))[0].shape == (N, 3)


@pytest.mark.parametrize("likelihood", ["classification", "regression"])
@pytest.mark.parametrize(
    ("structure", "representation"), [("ekfac", PMatEKFAC), ("blockdiag", PMatBlockDiag), ("lowrank_ggn", PMatLowRank)]
)
def test_structures_of_ours(likelihood, structure, representation):
    model, x, y, loader = problem(likelihood, norm=True)
    la = fitted(model, loader, likelihood, "all", structure)
    variant = Gaussian() if likelihood == "regression" else "classif_logits"
    F = FIM(model, [(b,) for b in x.split(5)], representation, variant)
    posterior = Posterior(model, F, variant, num_data=N, prior_precision=0.7, data=(x, y))
    f, v = la._glm_predictive_distribution(x)
    assert torch.allclose(f, model(x))
    assert oracle.relative(v, posterior.variance(x, "full")) < 1e-10
    assert oracle.relative(la._glm_predictive_distribution(x, diagonal_output=True)[1], posterior.variance(x)) < 1e-10
    assert abs(float(la.log_marginal_likelihood() - posterior.log_marginal_likelihood())) < 1e-9
    if likelihood == "classification":
        assert torch.allclose(la(x, link_approx="probit"), posterior.predict(x))
        assert torch.allclose(la(x, link_approx="bridge"), posterior.predict(x, "bridge"))
    J = la.backend.jacobians(x)[0]
    assert oracle.relative(la.functional_variance(J), v) < 1e-10
    assert la.functional_covariance(J).shape == (3 * N, 3 * N)
    assert la.sample(4).shape == (4, la.n_params)
    density = posterior.precision.logdet() / 2 - la.n_params * math.log(2 * math.pi) / 2
    assert abs(float((la.log_prob(la.mean) - density).detach())) < 1e-8
    d = torch.tensor(0.9, requires_grad=True)
    la.log_marginal_likelihood(prior_precision=d).backward()
    e = torch.tensor(0.9, requires_grad=True)
    posterior.log_marginal_likelihood(e).backward()
    assert torch.allclose(d.grad, e.grad)
    with pytest.raises(NotImplementedError, match="takes one number"):
        laplace.Laplace(model, likelihood, "all", structure, prior_precision=torch.ones(8))._prior()


def test_the_empirical_fisher_of_a_regression_is_that_of_the_likelihood():
    """That of laplace-torch is of squares, not of half of them."""
    model, x, y, loader = problem("regression")
    la = fitted(model, loader, "regression", "all", "full", backend=ours.NNGeometryEF)
    rows = oracle.loss_gradients(model, [(x, y)], lambda f, t: (f - t).square() / 2)
    assert oracle.relative(la.H, rows.T @ rows) < 1e-10


def test_counts_examples_rather_than_the_length_of_a_dataset():
    model, x, y, _ = problem("classification")
    loader = torch.utils.data.DataLoader(
        torch.utils.data.TensorDataset(x, y), sampler=torch.utils.data.SubsetRandomSampler(range(9)), batch_size=4
    )
    la = fitted(model, loader, "classification", "all", "ekfac")
    assert la.n_data == 9
    again = fitted(model, loader, "classification", "all", "blockdiag")
    again.fit(loader, override=False)
    assert again.n_data == 18


def test_a_layer_without_factors_is_named():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Embedding(5, 3), nn.Flatten(), nn.Linear(6, 3))
    x, y = torch.randint(5, (N, 2)), torch.randint(3, (N,))
    loader = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(x, y), batch_size=5)
    with pytest.raises(NotImplementedError, match=r"layer '0' has no pair .*ekfac"):
        fitted(model, loader, "classification", "all", "kron", backend=ours.NNGeometryGGN)
    assert fitted(model, loader, "classification", "all", "ekfac").n_params == 36


class Pooled(nn.Module):
    def __init__(self):
        super().__init__()
        self.body, self.head = nn.Linear(2, 4), nn.Linear(4, 3)

    def forward(self, x):
        return self.head(torch.tanh(self.body(x))).mean(1)


@pytest.mark.parametrize("structure", ["full", "diag"])
def test_what_comes_after_the_last_layer(structure):
    """It is no part of that, so that its outputs are not those of the model, unless laplace-torch is told."""
    torch.manual_seed(0)
    model, x, y = oracle.randomise(Pooled()), torch.randn(9, 3, 2), torch.randint(3, (9,))
    loader = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(x, y), batch_size=4)
    options = {"backend": ours.NNGeometryGGN}
    with pytest.raises(NotImplementedError, match=r"last layer 'head' .*feature_reduction=.*subnetwork"):
        fitted(model, loader, "classification", "last_layer", structure, **options)
    la = fitted(model, loader, "classification", "last_layer", structure, feature_reduction="average", **options)
    M = 9 * oracle.fim(model, [(x,)], "classif_logits")[-15:, -15:]
    assert oracle.relative(la.H, M if structure == "full" else M.diagonal()) < 1e-10


@pytest.mark.parametrize("structure", ["ekfac", "blockdiag", "lowrank_ggn"])
def test_what_was_not_fitted_says_so(structure):
    model, x, _, loader = problem("classification")
    la = laplace.Laplace(model, "classification", "all", structure)
    for ask in (lambda: la(x), lambda: la.sample(1), la.log_marginal_likelihood, lambda: la.posterior_precision):
        with pytest.raises(AttributeError, match="not fitted"):
            ask()
    with pytest.raises(ValueError, match="fit: train_loader yielded no minibatch"):
        la.fit([])
    la.fit(loader)
    other = laplace.Laplace(model, "classification", "all", structure)
    other.load_state_dict(la.state_dict())
    assert torch.equal(other(x), la(x))
    state = torch.get_rng_state()
    one, two = (la.sample(2, generator=torch.Generator().manual_seed(0)) for _ in range(2))
    assert torch.equal(one, two)
    assert torch.equal(torch.get_rng_state(), state)
