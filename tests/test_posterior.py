"""Posteriors: conjugate cases exactly, every representation against dense formulas, and what is refused."""

import math

import oracle
import pytest
import torch
from numpy.polynomial.hermite_e import hermegauss
from scipy.optimize import minimize, minimize_scalar
from torch import nn

from nngeometry import (
    FIM,
    Accumulator,
    Bernoulli,
    Categorical,
    FIM_MonteCarlo,
    Gaussian,
    Hessian,
    LayerCollection,
    Likelihood,
    PMatBlockDiag,
    PMatDense,
    PMatDiag,
    PMatEKFAC,
    PMatEye,
    PMatImplicit,
    PMatKFAC,
    PMatLowRank,
    PMatMixed,
    PMatQuasiDiag,
    Poisson,
    Posterior,
    PVector,
)
from nngeometry.gram import example_kernels
from nngeometry.likelihood import Cotangents

REPRESENTATIONS = [
    PMatDense,
    PMatLowRank,
    PMatBlockDiag,
    PMatKFAC,
    PMatEKFAC,
    PMatQuasiDiag,
    PMatDiag,
    PMatEye,
    PMatMixed.of(PMatKFAC, {nn.LayerNorm: PMatDense}),
]
NAMES = [getattr(r, "__name__", "PMatMixed") for r in REPRESENTATIONS]
N, NOISE, PRIOR = 40, 0.3, 0.7


def regression():
    """Linear regression at the mode of its posterior, with the design matrix and the targets."""
    torch.manual_seed(1)
    x, w = torch.randn(N, 4), torch.randn(4)
    y = (x @ w + 0.5 + NOISE**0.5 * torch.randn(N)).unsqueeze(1)
    design = torch.cat([x, torch.ones(N, 1)], 1)
    mode = torch.linalg.solve(design.T @ design + NOISE * PRIOR * torch.eye(5), design.T @ y)[:, 0]
    model = nn.Linear(4, 1)
    PVector(LayerCollection.from_model(model), mode.clone()).copy_to_model(model)
    return model, x, y, design


def net(seed=0):
    torch.manual_seed(seed)
    model = nn.Sequential(
        nn.Conv2d(1, 2, 3), nn.Tanh(), nn.Flatten(), nn.Linear(18, 4), nn.LayerNorm(4), nn.Linear(4, 3)
    )
    return oracle.randomise(model), torch.randn(9, 1, 5, 5), torch.randint(3, (9,))


def conjugate(representation=PMatDense, **options):
    model, x, y, design = regression()
    F = FIM(model, (x,), representation, Gaussian(NOISE))
    options = {"num_data": N, "prior_precision": PRIOR, "data": (x, y), **options}
    return Posterior(model, F, Gaussian(NOISE), **options), x, y, design


def log_evidence(y, design, prior, noise):
    cov = noise * torch.eye(N) + design @ design.T / prior
    return torch.distributions.MultivariateNormal(torch.zeros(N), cov).log_prob(y[:, 0])


@pytest.mark.parametrize("representation", [PMatDense, PMatLowRank, PMatBlockDiag, PMatKFAC, PMatEKFAC])
def test_bayesian_linear_regression_is_exact(representation):
    posterior, _, y, design = conjugate(representation)
    precision = design.T @ design / NOISE + PRIOR * torch.eye(5)
    assert oracle.relative(posterior.covariance.to_torch(), torch.linalg.inv(precision)) < 1e-10
    assert oracle.relative(posterior.precision.to_torch(), precision) < 1e-10
    assert oracle.relative(posterior.mean.to_torch(), torch.linalg.solve(precision, design.T @ y / NOISE)[:, 0]) < 1e-10
    new = torch.randn(7, 4)
    features = torch.cat([new, torch.ones(7, 1)], 1)
    expected = (features @ torch.linalg.inv(precision) * features).sum(1, keepdim=True)
    assert oracle.relative(posterior.variance(new), expected) < 1e-10
    assert oracle.relative(posterior.predict(new), features @ posterior.mean.to_torch().unsqueeze(1)) < 1e-10
    evidence = log_evidence(y, design, torch.tensor(PRIOR), torch.tensor(NOISE))
    assert abs(float(posterior.log_marginal_likelihood() - evidence)) < 1e-10 * abs(float(evidence))


@pytest.mark.parametrize("per_layer", [False, True])
@pytest.mark.parametrize("representation", [PMatDense, PMatKFAC])
def test_evidence_is_differentiable_in_prior_and_noise(representation, per_layer):
    """At the mode the evidence of the approximation has the slopes of the evidence."""
    posterior, _, y, design = conjugate(representation)
    leaves = [torch.tensor(v, requires_grad=True) for v in (PRIOR, NOISE)]
    truth = torch.autograd.grad(log_evidence(y, design, *leaves), leaves)
    prior = {"": leaves[0]} if per_layer else leaves[0]
    found = torch.autograd.grad(posterior.log_marginal_likelihood(prior, leaves[1]), leaves)
    for a, b in zip(found, truth, strict=True):
        assert abs(float(a - b)) < 1e-10 * abs(float(b))


def test_eigenvalues_are_computed_once(monkeypatch):
    posterior = conjugate()[0]
    posterior.log_marginal_likelihood()
    monkeypatch.setattr(type(posterior.matrix), "eigenvalues", None)
    posterior.log_marginal_likelihood(2.0, 0.1)
    posterior.fit_prior()


def test_fit_prior_is_the_optimum():
    posterior = conjugate()[0]
    found = posterior.fit_prior()
    best = minimize_scalar(
        lambda log: -float(posterior.log_marginal_likelihood(math.exp(log))), bounds=(-8, 8), options={"xatol": 1e-9}
    )
    assert abs(math.log(found.prior_precision) - best.x) < 1e-6
    d = torch.tensor(found.prior_precision, requires_grad=True)
    assert abs(float(torch.autograd.grad(posterior.log_marginal_likelihood(d), d)[0])) < 1e-10 * N
    assert posterior.prior_precision == PRIOR


@pytest.mark.parametrize("representation", REPRESENTATIONS, ids=NAMES)
def test_fit_prior_of_each_layer_is_the_optimum(representation):
    if representation is PMatQuasiDiag:
        pytest.skip("its eigenvalues may be negative")
    model, x, y = net()
    posterior = Posterior(model, FIM(model, (x,), representation), num_data=9, data=(x, y))
    found, names = posterior.fit_prior(per_layer=True).prior_precision, list(posterior.layer_collection)

    def loss(logs):
        d = torch.tensor(logs, requires_grad=True)
        value = -posterior.log_marginal_likelihood(dict(zip(names, d.exp(), strict=True)))
        return float(value.detach()), torch.autograd.grad(value, d)[0].numpy()

    best = minimize(loss, [0.0] * len(names), jac=True, tol=1e-10)
    ours = torch.tensor([math.log(found[name]) for name in names])
    assert torch.allclose(ours, torch.tensor(best.x), atol=1e-5)
    value, slope = loss(ours.tolist())
    assert value <= best.fun + 1e-10
    assert abs(slope).max() < 1e-6


@pytest.mark.parametrize("per_layer", [False, True])
@pytest.mark.parametrize("representation", REPRESENTATIONS, ids=NAMES)
def test_every_representation_is_that_of_its_dense_matrix(representation, per_layer):
    model, x, y = net()
    F, lc = FIM(model, (x,), representation), LayerCollection.from_model(model)
    least = 5.0 if representation is PMatQuasiDiag else 0.5  # its eigenvalues may be negative
    prior = {name: least + k for k, name in enumerate(lc)} if per_layer else least
    d = torch.cat([torch.full((lc[n].numel(),), least + k if per_layer else least) for k, n in enumerate(lc)])
    posterior = Posterior(model, F, num_data=9, prior_precision=prior, temperature=0.2, data=(x, y))
    precision = 9 * F.to_torch() + torch.diag(d)
    covariance = 0.2 * torch.linalg.inv(precision)
    assert oracle.relative(posterior.covariance.to_torch(), covariance) < 1e-10
    J = oracle.jacobian(model, (x,))
    full = torch.einsum("cnp,pq,dnq->ncd", J, covariance, J)
    assert oracle.relative(posterior.variance(x, "full"), full) < 1e-10
    assert oracle.relative(posterior.variance(x), full.diagonal(dim1=1, dim2=2)) < 1e-10
    w = PVector.from_model(model).to_torch().detach()
    fit = -nn.functional.cross_entropy(model(x), y, reduction="sum").detach()
    expected = fit - ((w * d) @ w + torch.linalg.slogdet(precision)[1] - d.log().sum()) / 2
    assert abs(float(posterior.log_marginal_likelihood() - expected)) < 1e-9 * abs(float(expected))
    with torch.no_grad():  # the map from white noise to draws is a root of the covariance
        root = posterior.covariance.root.sample(torch.eye(len(d)))
    assert oracle.relative(root.T @ root, covariance) < 1e-10
    draws = torch.stack([v.to_torch() for v in posterior.sample(3, torch.Generator().manual_seed(0))])
    noise = torch.randn(3, len(d), generator=torch.Generator().manual_seed(0))
    assert oracle.relative(draws, w + noise @ root) < 1e-10


@pytest.mark.parametrize("output", ["diag", "full"])
@pytest.mark.parametrize("prior", [1e-8, 1.0])
@pytest.mark.parametrize("rows", ["few", "positions"])
def test_factors_of_few_inputs(rows, prior, output):
    """Their eigenvectors do not span the inputs; with a small prior what is outside counts for far more."""
    torch.manual_seed(0)
    if rows == "few":
        model, x = oracle.randomise(nn.Sequential(nn.Linear(12, 3), nn.Tanh(), nn.Linear(3, 2))), torch.randn(3, 12)
    else:
        layers = nn.Conv1d(6, 2, 3), nn.Tanh(), nn.Flatten(), nn.Linear(4, 2)
        model, x = oracle.randomise(nn.Sequential(*layers)), torch.randn(3, 6, 4)
    F = FIM(model, (x,), PMatKFAC)
    assert "LowRank" in repr(F)
    posterior = Posterior(model, F, num_data=3, prior_precision=prior)
    precision = 3 * F.to_torch() + prior * torch.eye(F.size(0))
    for inputs in (x, x + torch.randn_like(x)):
        J = oracle.jacobian(model, (inputs,))
        found = posterior.variance(inputs, output)
        solved = torch.linalg.solve(precision, J.flatten(0, 1).T).T.view_as(J)
        truth = torch.einsum("cnp,dnp->ncd", J, solved)
        truth = truth if output == "full" else truth.diagonal(dim1=1, dim2=2)
        assert oracle.relative(found, truth) < (1e-10 if prior == 1.0 else 1e-5)


@pytest.mark.parametrize("per_layer", [False, True])
def test_of_a_matrix_known_by_its_products(per_layer):
    model, x, y = net()
    prior = dict.fromkeys(LayerCollection.from_model(model), 0.5) if per_layer else 0.5
    dense, implicit = (
        Posterior(model, FIM(model, (x,), r), num_data=9, prior_precision=prior, data=(x, y))
        for r in (PMatDense, PMatImplicit)
    )
    assert oracle.relative(implicit.variance(x, "full"), dense.variance(x, "full")) < 1e-5
    draws = [p.sample(2, torch.Generator().manual_seed(0))[1].to_torch() for p in (implicit, dense)]
    assert oracle.relative(*draws) < 1e-6
    with pytest.raises(NotImplementedError, match="another representation"):
        implicit.log_marginal_likelihood()
    with pytest.raises(NotImplementedError, match="another representation"):
        implicit.fit_prior()


@pytest.mark.parametrize("representation", REPRESENTATIONS, ids=NAMES)
def test_of_the_last_layer(representation):
    model, x, y = net()
    if representation is REPRESENTATIONS[-1]:
        representation = PMatMixed.of(PMatKFAC, {})
    lc = LayerCollection.from_model(model, "5")
    F = FIM(model, (x,), representation, layer_collection=lc)
    posterior = Posterior(model, F, num_data=9, data=(x, y))
    covariance = torch.linalg.inv(9 * F.to_torch() + torch.eye(lc.numel()))
    J = oracle.jacobian(model, (x,), layer_collection=lc)
    assert oracle.relative(posterior.variance(x, "full"), torch.einsum("cnp,pq,dnq->ncd", J, covariance, J)) < 1e-10
    before = {k: v.clone() for k, v in model.state_dict().items()}
    with posterior.sampled(torch.Generator().manual_seed(1)) as draw:
        assert torch.equal(model[5].weight.detach().flatten(), draw.to_torch()[:12])
        assert torch.equal(model[3].weight, before["3.weight"])
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())


def test_the_model_is_put_back_after_an_exception():
    model, x, _ = net()
    posterior = Posterior(model, FIM(model, (x,), PMatKFAC), num_data=9)
    before = model[3].weight.clone()
    try:
        with posterior.sampled():
            assert not torch.equal(model[3].weight, before)
            raise KeyError
    except KeyError:
        pass
    assert torch.equal(model[3].weight, before)


def test_everything_is_at_the_mean_wherever_the_model_is():
    model, x, y = net()
    posterior = Posterior(model, FIM(model, (x,), PMatKFAC), num_data=9, data=(x, y))
    there = [posterior.predict(x), posterior.variance(x)]
    other = Posterior(net()[0], posterior.matrix, num_data=9, data=(x, y), mean=posterior.mean)
    evidence = posterior.log_marginal_likelihood()
    with torch.no_grad():
        for p in (*model.parameters(), *other.model.parameters()):
            p.add_(1.0)
    for one in (posterior, other):
        assert torch.equal(one.predict(x), there[0])
        assert torch.equal(one.variance(x), there[1])
        assert torch.equal(one.log_marginal_likelihood(), evidence)


# Predictions


def normal_expectation(g, mean, variance):
    """By Gauss-Hermite quadrature."""
    nodes, weights = (torch.tensor(v) for v in hermegauss(80))
    values = g(mean.unsqueeze(-1) + variance.sqrt().unsqueeze(-1) * nodes)
    return (values * weights).sum(-1) / math.sqrt(2 * math.pi)


@pytest.mark.parametrize(("likelihood", "tolerance"), [(Gaussian(0.3), 1e-12), (Poisson(), 1e-10), (Bernoulli(), 0.02)])
def test_probit_against_quadrature(likelihood, tolerance):
    f, v = torch.linspace(-3, 3, 13).repeat(5), torch.linspace(0, 2, 5).repeat_interleave(13)
    truth = normal_expectation(likelihood.mean, f, v)
    assert float((likelihood.averaged(f, v) - truth).abs().max()) < tolerance * float(truth.abs().max())


@pytest.mark.parametrize("how", ["probit", "mc", "bridge"])
def test_two_classes_are_one_logit(how):
    """Of independent logits with the same variance the exact mean is that of their difference."""
    torch.manual_seed(0)
    model = nn.Linear(3, 2)
    x = torch.randn(30, 3) / 2
    F = PMatEye(LayerCollection.from_model(model))
    posterior = Posterior(model, F, num_data=1, prior_precision=4.0)
    v = posterior.variance(x)
    truth = normal_expectation(torch.sigmoid, model(x).detach() @ torch.tensor([1.0, -1.0]), v.sum(1))
    found = posterior.predict(x, how, samples=20000, generator=torch.Generator().manual_seed(0))
    assert torch.allclose(found.sum(1), torch.ones(30))
    tolerance = {"probit": 0.03, "mc": 0.01, "bridge": 0.05}[how]
    assert float((found[:, 0] - truth).abs().max()) < tolerance


def test_draws_of_a_linear_model_are_those_of_its_outputs():
    torch.manual_seed(0)
    model, x = nn.Linear(3, 4), torch.randn(6, 3)
    posterior = Posterior(model, FIM(model, (x,), PMatDense), num_data=6)
    a, b = (
        posterior.predict(x, how, 5000, torch.Generator().manual_seed(k)) for k, how in enumerate(["mc", "samples"])
    )
    assert float((a - b).abs().max()) < 0.03


def test_the_bridge_is_that_of_the_paper():
    model, x, _ = net()
    posterior = Posterior(model, FIM(model, (x,), PMatKFAC), num_data=9)
    f, v = model(x).detach(), posterior.variance(x, "full")
    for k in range(9):
        m, S = f[k].clone(), v[k].clone()
        one = torch.ones(3)
        m = m - S @ one * (one @ m) / (one @ S @ one)
        S = S - torch.outer(S @ one, S @ one) / (one @ S @ one)
        alpha = torch.stack([(1 - 2 / 3 + m[i].exp() / 9 * (-m).exp().sum()) / S[i, i] for i in range(3)])
        assert torch.allclose(posterior.predict(x[k : k + 1], "bridge")[0], alpha / alpha.sum())


@pytest.mark.parametrize("representation", [PMatDense, PMatKFAC, PMatEKFAC, PMatDiag])
@pytest.mark.parametrize(
    "likelihood", ["segmentation_logits", Categorical(dim=-1), "classif_binary_logits", "regression"]
)
def test_outputs_at_several_positions(likelihood, representation):
    torch.manual_seed(0)
    model, x = oracle.randomise(nn.Conv1d(2, 3, 2)), torch.randn(5, 2, 5)
    posterior = Posterior(model, FIM(model, (x,), representation, likelihood), likelihood, num_data=5)
    J = oracle.jacobian(model, (x,))
    v = torch.einsum("cnp,pq,dnq->ncd", J, posterior.covariance.to_torch(), J)
    assert oracle.relative(posterior.variance(x, "full"), v) < 1e-10
    assert posterior.variance(x).shape == posterior.predict(x).shape == (5, 3, 4)
    found = posterior.predict(x, "mc", 10, torch.Generator().manual_seed(0))
    if likelihood == "segmentation_logits":
        assert torch.allclose(found.sum(1), torch.ones(5, 4))
    if isinstance(likelihood, Categorical):
        assert torch.allclose(found.sum(2), torch.ones(5, 3))


@pytest.mark.parametrize("x", ["tensor", "tuple", "loader", "dataset"])
def test_inputs_come_in_any_form(x):
    model, data, _ = net()
    posterior = Posterior(model, FIM(model, (data,), PMatKFAC), num_data=9)
    given = {
        "tensor": data,
        "tuple": (data,),
        "loader": [(data[:4],), (data[4:],)],
        "dataset": torch.utils.data.DataLoader(torch.utils.data.TensorDataset(data), batch_size=2),
    }[x]
    for how in ("probit", "mc", "samples"):
        generators = [torch.Generator().manual_seed(0) for _ in range(2)]
        a, b = (posterior.predict(d, how, 3, g) for d, g in zip((given, data), generators, strict=True))
        assert torch.allclose(a, b)
    assert torch.allclose(posterior.variance(given), posterior.variance(data))


def test_dict_minibatches():
    model, x, y = net()
    batch = {"x": x, "y": y}

    def function(b):
        return model(b["x"])

    posterior = Posterior(
        model, FIM(model, batch, PMatKFAC, function=function), num_data=9, data=batch, targets="y", function=function
    )
    plain = Posterior(model, FIM(model, (x,), PMatKFAC), num_data=9, data=(x, y))
    assert torch.allclose(posterior.predict(batch), plain.predict(x))
    assert torch.allclose(posterior.log_marginal_likelihood(), plain.log_marginal_likelihood())


def test_small_memory_budget_gives_the_same(cut):
    from nngeometry import memory_budget

    model, x, _ = net()
    for M in (None, FIM(model, (x,), PMatEKFAC).inv(0.1), FIM(model, (x,), PMatDense).inv(0.1)):
        for output in ("diag", "full"):
            whole = example_kernels(model, (x,), M, output)
            with memory_budget(2**14):
                assert torch.allclose(example_kernels(model, (x,), M, output), whole)


# Other likelihoods, data, files


@pytest.mark.parametrize(
    ("likelihood", "nll"),
    [
        (
            Bernoulli(),
            lambda f, y: nn.functional.binary_cross_entropy_with_logits(f, y.gt(1).double(), reduction="sum"),
        ),
        (Poisson(), lambda f, y: nn.functional.poisson_nll_loss(f, y, reduction="sum") + torch.lgamma(y + 1).sum()),
        (Gaussian(0.2), lambda f, y: -torch.distributions.Normal(f, 0.2**0.5).log_prob(y).sum()),
    ],
)
@pytest.mark.parametrize("flat", [False, True])
def test_likelihoods_of_targets(likelihood, nll, flat):
    torch.manual_seed(0)
    f, y = torch.randn(6, 1 if flat else 3), torch.randint(4, (6, 1 if flat else 3)).double()
    given = y.gt(1).double() if isinstance(likelihood, Bernoulli) else y
    found = likelihood.log_prob(f, given[:, 0] if flat else given)
    assert found.shape == (6,)
    assert torch.allclose(found.sum(), -nll(f, y))


def test_a_likelihood_of_ones_own():
    class Laplacian(Likelihood):
        def sqrt(self, f):
            return Gaussian().sqrt(f)

        def sample(self, f, trials, generator=None):
            return Cotangents.of(torch.zeros(trials, *f.shape))

        def hvp(self, f, u):
            return u

    model, x, y = net()
    posterior = Posterior(model, FIM(model, (x,), PMatKFAC, Laplacian()), Laplacian(), num_data=9, data=(x, y))
    assert posterior.variance(x).shape == (9, 3)
    with pytest.raises(NotImplementedError, match=r"averaged\(f, variance\)"):
        posterior.predict(x)
    with pytest.raises(NotImplementedError, match=r"mean\(f\)"):
        posterior.predict(x, "samples", 2)
    with pytest.raises(NotImplementedError, match=r"log_prob\(f, y\)"):
        posterior.log_marginal_likelihood()


@pytest.mark.parametrize("representation", [PMatDense, PMatLowRank, PMatBlockDiag, PMatKFAC, PMatDiag])
def test_an_update_is_the_posterior_of_all_data(representation):
    model, x, y = net()
    running = Accumulator(FIM, model, representation).update([(x[:5],)])
    posterior = Posterior(model, running, data=(x[:5], y[:5]))
    before = posterior.variance(x)
    updated = posterior.update((x[5:], y[5:]))
    whole = Posterior(model, Accumulator(FIM, model, representation).update([(x[:5],), (x[5:],)]), data=(x, y))
    assert updated.num_data == 9
    assert running.n == 5
    assert torch.allclose(updated.variance(x), whole.variance(x))
    assert torch.allclose(updated.log_marginal_likelihood(), whole.log_marginal_likelihood())
    assert abs(updated.fit_prior().prior_precision / whole.fit_prior().prior_precision - 1) < 1e-9
    assert torch.equal(posterior.variance(x), before)
    again = updated.update((x[:2], y[:2]))
    assert again.num_data == 11
    assert bool(again.log_marginal_likelihood().isfinite())


def test_another_model_is_told(tmp_path):
    model, x, y = net()
    posterior = Posterior(net(1)[0], Accumulator(FIM, model, PMatKFAC).update((x,)), data=(x, y))
    with pytest.raises(ValueError, match="update: the accumulator runs another model"):
        posterior.update((x, y))
    posterior.save(tmp_path / "posterior.pt")
    with pytest.raises(ValueError, match="the layer collection is of another model"):
        Posterior.load(tmp_path / "posterior.pt", nn.Linear(4, 3))


def test_a_prior_that_products_in_single_precision_do_not_resolve():
    torch.manual_seed(0)
    model, x = nn.Linear(4, 3).float(), 3 * torch.randn(9, 4, dtype=torch.float32)
    F = FIM(model, (x,), PMatImplicit)
    with pytest.raises(ValueError, match="prior_precision: with 1e-07 the precision is singular"):
        Posterior(model, F, num_data=9, prior_precision=1e-7).variance(torch.randn(2, 4, dtype=torch.float32))


@pytest.mark.parametrize("likelihood", [Gaussian(0.3), Poisson(), "regression", Bernoulli()])
@pytest.mark.parametrize("per_layer", [False, True])
def test_save_and_load(tmp_path, likelihood, per_layer):
    model, x, _ = net()
    y = torch.randint(2, (9, 3)).double()
    prior = {name: 1.0 + k for k, name in enumerate(LayerCollection.from_model(model))} if per_layer else 2.0
    posterior = Posterior(
        model,
        FIM(model, (x,), PMatEKFAC, likelihood),
        likelihood,
        num_data=9,
        prior_precision=prior,
        temperature=0.5,
        data=(x, y),
    )
    posterior.save(tmp_path / "posterior.pt")
    loaded = Posterior.load(tmp_path / "posterior.pt", net(1)[0])
    with torch.no_grad():
        for ours, theirs in zip(loaded.model.parameters(), model.parameters(), strict=True):
            ours.copy_(theirs)
    assert loaded.likelihood == posterior.likelihood
    assert torch.equal(loaded.predict(x), posterior.predict(x))
    assert torch.equal(loaded.log_marginal_likelihood(), posterior.log_marginal_likelihood())
    one, two = (p.sample(1, torch.Generator().manual_seed(3))[0].to_torch() for p in (loaded, posterior))
    assert torch.equal(one, two)


def test_float32():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3)).float()
    x, y = torch.randn(20, 4, dtype=torch.float32), torch.randint(3, (20,))
    posterior = Posterior(model, FIM(model, (x,), PMatKFAC), num_data=20, data=(x, y)).fit_prior()
    for how in ("probit", "mc", "samples", "bridge"):
        assert posterior.predict(x, how, 5).dtype == torch.float32
    double = Posterior(model, posterior.matrix.to(dtype=torch.float64), num_data=20)
    assert double.variance(x).dtype == torch.float32


# What is refused


def test_bad_input_is_named():
    model, x, y = net()
    F, R = FIM(model, (x,), PMatDense), FIM(model, (x,), PMatDense, "regression")
    cases = [
        (TypeError, "matrix: expected a PMat", lambda: Posterior(model, FIM, num_data=9)),
        (ValueError, "has seen nothing", lambda: Posterior(model, Accumulator(FIM, model, PMatKFAC))),
        (TypeError, "num_data: a matrix is a mean", lambda: Posterior(model, F)),
        (ValueError, "num_data: expected", lambda: Posterior(model, F, num_data=0)),
        (ValueError, "prior_precision: with 0 .*singular", lambda: Posterior(model, F, num_data=9, prior_precision=0)),
        (ValueError, "prior_precision: expected", lambda: Posterior(model, F, num_data=9, prior_precision=-1.0)),
        (ValueError, "temperature", lambda: Posterior(model, F, num_data=9, temperature=0)),
        (
            ValueError,
            "one value for each layer; 0, 3, 4, 5, 7 do",
            lambda: Posterior(model, F, num_data=9, prior_precision={"7": 1}),
        ),
        (ValueError, "is unknown", lambda: Posterior(model, F, "classif", num_data=9)),
        (ValueError, "not one of 'probit'", lambda: Posterior(model, F, num_data=9).predict(x, "glm")),
        (ValueError, "not one of 'diag'", lambda: Posterior(model, F, num_data=9).variance(x, "all")),
        (ValueError, "pass the training data", lambda: Posterior(model, F, num_data=9).log_marginal_likelihood()),
        (
            ValueError,
            "9 examples, and num_data is 8",
            lambda: Posterior(model, F, num_data=8, data=(x, y)).log_likelihood(),
        ),
        (TypeError, "of an Accumulator", lambda: Posterior(model, F, num_data=9).update((x,))),
        (ValueError, "is for classes", lambda: Posterior(model, R, "regression", num_data=9).predict(x, "bridge")),
        (
            ValueError,
            "is that of a regression",
            lambda: Posterior(model, F, num_data=9, data=(x, y)).log_likelihood(0.1),
        ),
        (
            ValueError,
            "0 has no evidence",
            lambda: Posterior(model, F, num_data=9, data=(x, y)).log_marginal_likelihood(0.0),
        ),
        (
            ValueError,
            "Gaussian: targets of shape",
            lambda: Posterior(model, R, "regression", num_data=9, data=(x, y)).log_likelihood(),
        ),
        (
            ValueError,
            "CrossEntropyLoss got the class",
            lambda: Posterior(model, F, num_data=9, data=(x, y + 2)).log_likelihood(),
        ),
    ]
    for kind, message, call in cases:
        with pytest.raises(kind, match=message):
            call()


def test_likelihood_and_outputs_that_disagree():
    torch.manual_seed(0)
    model, x = nn.Linear(3, 1), torch.randn(8, 3)
    F = FIM(model, (x,), PMatDense, "regression")
    posterior = Posterior(model, 1.0 * F, "classif_logits", num_data=8)  # a product does not say what it is of
    with pytest.raises(ValueError, match="has 1 class"):
        posterior.predict(x)


@pytest.mark.parametrize("of", ["regression", Gaussian(0.2), "classif_binary_logits", "classif_logits", Poisson()])
@pytest.mark.parametrize("other", ["regression", Gaussian(0.2), Bernoulli(), "segmentation_logits", Poisson()])
def test_a_matrix_of_another_likelihood(of, other):
    torch.manual_seed(0)
    model, x = nn.Linear(3, 2), torch.randn(8, 3)
    alike = {
        ("classif_binary_logits", Bernoulli()),
        ("classif_logits", "segmentation_logits"),
        *((one, one) for one in ("regression", Gaussian(0.2), Poisson())),
    }
    for F in (FIM(model, (x,), PMatKFAC, of), Accumulator(FIM_MonteCarlo, model, PMatDiag, variant=of).update((x,))):
        if (of, other) in alike:
            assert Posterior(model, F, other, num_data=8).variance(x).shape == (8, 2)
            continue
        with pytest.raises(ValueError, match=r"^likelihood: the matrix is that of .* give both the same"):
            Posterior(model, F, other, num_data=8)


def test_predictions_are_those_in_eval_mode():
    """Whatever mode the model is in, which is left alone, as are its statistics and the random numbers of others."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 5), nn.BatchNorm1d(5), nn.Dropout(0.5), nn.Linear(5, 3))
    oracle.randomise(model)
    x, y = torch.randn(9, 4), torch.randint(3, (9,))
    posterior = Posterior(model, FIM(model, (x,), PMatKFAC), num_data=9, data=(x, y))

    def found():
        one = Posterior(model, posterior.matrix, num_data=9, data=(x, y))
        predictions = [one.predict(x, how, 3, torch.Generator().manual_seed(0)) for how in ("probit", "mc", "samples")]
        return [*predictions, one.variance(x), one.information(x), one.log_marginal_likelihood()]

    expected = found()
    model.train()
    model[2].eval()
    before, state = {k: v.clone() for k, v in model.state_dict().items()}, torch.get_rng_state()
    for a, b in zip(found(), expected, strict=True):
        assert torch.equal(a, b)
    assert torch.equal(torch.get_rng_state(), state)
    assert [m.training for m in model] == [True, True, False, True]
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())


@pytest.mark.parametrize("representation", [PMatDense, PMatLowRank, PMatImplicit])
def test_a_prior_of_zero_for_one_of_coupled_layers(representation):
    model, x, _ = net()
    prior = dict.fromkeys(LayerCollection.from_model(model), 1.0) | {"4": 0.0}
    with pytest.raises(ValueError, match=r"prior_precision: it is zero for layer '4', and .* couples layers"):
        Posterior(model, FIM(model, (x,), representation), num_data=9, prior_precision=prior)


@pytest.mark.parametrize("representation", [PMatDense, PMatBlockDiag, PMatDiag])
def test_entries_that_are_no_numbers(representation):
    model, x, _ = net()
    F = FIM(model, (x,), representation)
    for value in (float("nan"), float("inf")):
        broken = F.to(dtype=F.dtype)
        broken.root.tensors()[0].flatten()[0] = value
        with pytest.raises(ValueError, match="matrix: it has NaN or infinite entries"):
            Posterior(model, broken, num_data=9)


@pytest.mark.parametrize("representation", [PMatDense, PMatLowRank])
def test_a_second_derivative_that_cannot_be_had_is_told(representation):
    """It was that of the other terms, without a word."""
    model, x, y = net()
    posterior = Posterior(model, FIM(model, (x,), representation), num_data=9, data=(x, y))
    names = list(posterior.layer_collection)

    def evidence(d):
        return posterior.log_marginal_likelihood(dict(zip(names, d, strict=True)))

    with pytest.raises(NotImplementedError, match="no second derivative: use a matrix with a block for each layer"):
        torch.autograd.functional.hessian(evidence, torch.ones(len(names)))
    second = torch.autograd.functional.hessian(posterior.log_marginal_likelihood, torch.tensor(1.0))
    values = [float(posterior.log_marginal_likelihood(1 + h)) for h in (-1e-4, 0.0, 1e-4)]
    assert abs(float(second) - (values[0] - 2 * values[1] + values[2]) / 1e-8) < 1e-4 * abs(float(second))


@pytest.mark.parametrize("representation", [PMatDense, PMatLowRank])
def test_two_layers_with_a_prior_each_are_exact(representation):
    """A model that is linear in its parameters, with data that come in pieces."""
    torch.manual_seed(0)

    class Added(nn.Module):
        def __init__(self):
            super().__init__()
            self.one, self.two = nn.Linear(3, 2), nn.Linear(4, 2, bias=False)

        def forward(self, x):
            return self.one(x[:, :3]) + self.two(x[:, 3:].tanh())

    model, x, y = Added(), torch.randn(30, 7), torch.randn(30, 2)
    lc, prior = LayerCollection.from_model(model), {"one": 0.7, "two": 2.5}
    d = torch.cat([torch.full((lc[name].numel(),), value) for name, value in prior.items()])
    design = oracle.jacobian(model, (x,)).movedim(0, 1).flatten(0, 1)
    precision = design.T @ design / NOISE + torch.diag(d)
    mode = torch.linalg.solve(precision, design.T @ y.flatten() / NOISE)
    PVector(lc, mode.clone()).copy_to_model(model)
    running = Accumulator(FIM, model, representation, variant=Gaussian(NOISE)).update((x[:11],))
    posterior = Posterior(model, running, Gaussian(NOISE), prior_precision=prior, data=(x[:11], y[:11]))
    posterior = posterior.update((x[11:20], y[11:20])).update([(x[20:25], y[20:25]), (x[25:], y[25:])])
    assert oracle.relative(posterior.covariance.to_torch(), torch.linalg.inv(precision)) < 1e-10

    def evidence(one, two, noise):
        each = torch.cat([one.expand(8), two.expand(8)])
        covariance = noise * torch.eye(60) + design / each @ design.T
        return torch.distributions.MultivariateNormal(torch.zeros(60), covariance).log_prob(y.flatten())

    leaves = [torch.tensor(v, requires_grad=True) for v in (0.7, 2.5, NOISE)]
    truth = evidence(*leaves)
    found = posterior.log_marginal_likelihood(dict(zip(prior, leaves[:2], strict=True)), leaves[2])
    assert abs(float((found - truth).detach())) < 1e-10 * abs(float(truth.detach()))
    for a, b in zip(torch.autograd.grad(found, leaves), torch.autograd.grad(truth, leaves), strict=True):
        assert abs(float(a - b)) < 1e-9 * abs(float(b))


def test_a_matrix_with_negative_eigenvalues_has_no_posterior():
    model, x, y = net()
    H = Hessian(model, (x, y), PMatDense)
    least = float(H.eigenvalues().min())
    with pytest.raises(ValueError, match="no posterior: use GGN"):
        Posterior(model, H, num_data=9, prior_precision=-4.5 * least)
    with pytest.raises(ValueError, match="no posterior: use GGN"):
        Posterior(model, H, num_data=9, prior_precision=dict.fromkeys(H.layer_collection, -4.5 * least))
    posterior = Posterior(model, H, num_data=9, prior_precision=-18 * least)
    assert bool((posterior.variance(x) > 0).all())
    with pytest.raises(ValueError, match="negative eigenvalues"):
        posterior.fit_prior()


@pytest.mark.parametrize("representation", [PMatDense, PMatKFAC])
@pytest.mark.parametrize("per_layer", [False, True])
def test_a_layer_of_zeros_has_no_best_prior(representation, per_layer):
    model, x, _ = net()
    nn.init.zeros_(model[0].weight)
    nn.init.zeros_(model[0].bias)
    posterior = Posterior(model, FIM(model, (x,), representation), num_data=9)
    if per_layer:
        with pytest.raises(ValueError, match="layer '0' has parameters of zero"):
            posterior.fit_prior(per_layer=True)
    else:
        assert posterior.fit_prior().prior_precision > 0


def test_files_of_something_else(tmp_path):
    model, x, _ = net()
    F = FIM(model, (x,), PMatKFAC)
    F.save(tmp_path / "matrix.pt")
    (tmp_path / "text.pt").write_text("no")
    for name, message in (("matrix.pt", "does not hold a posterior"), ("text.pt", "is not a file that")):
        with pytest.raises(ValueError, match=message):
            Posterior.load(tmp_path / name, model)
    with pytest.raises(FileNotFoundError):
        Posterior.load(tmp_path / "none.pt", model)


@pytest.mark.parametrize("likelihood", ["classif_binary_logits", Gaussian(NOISE)])
def test_information_of_one_output_without_an_axis(likelihood):
    torch.manual_seed(0)
    linear, x = nn.Linear(4, 1), torch.randn(5, 4)
    flat, kept = nn.Sequential(linear, nn.Flatten(0)), nn.Sequential(linear)
    found, expected = (
        Posterior(m, FIM(m, x, PMatDense, likelihood), likelihood, num_data=N).information(x) for m in (flat, kept)
    )
    torch.testing.assert_close(found, expected)


def test_draws_of_outputs_that_vary_alike_do_not_depend_on_rounding():
    """Positions with the same covariance: which vectors a decomposition finds is open."""
    torch.manual_seed(0)
    model, x = nn.Sequential(nn.Linear(4, 3), nn.Tanh(), nn.Linear(3, 3)), torch.randn(7, 2, 4)
    lc = LayerCollection.from_model(model).select("2")
    posterior = Posterior(model, FIM(model, x, PMatDense, Gaussian(), layer_collection=lc), Gaussian(), num_data=N)
    one, several = (
        posterior.predict(of, "mc", 5, torch.Generator().manual_seed(0)) for of in (x, [(x[:3],), (x[3:4],), (x[4:],)])
    )
    torch.testing.assert_close(several, one)
