"""Variational training: the distribution that it should find, draws that leave no trace, and resumption to the bit."""

import copy
import io
import math
import signal
import warnings
from functools import partial
from itertools import pairwise

import pytest
import torch
from interrupts import Tracer
from torch import nn
from torch.nn.functional import cross_entropy, mse_loss

from nngeometry import (
    FIM,
    GGN,
    Categorical,
    EmpiricalFisher,
    FIM_MonteCarlo,
    Gaussian,
    LayerCollection,
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
    PVector,
    changes,
    random_pvector,
)
from nngeometry.optim import IVON, VIOptimizer, draws
from nngeometry.posterior import Posterior

REPRESENTATIONS = {
    "dense": PMatDense,
    "blockdiag": PMatBlockDiag,
    "kfac": PMatKFAC,
    "ekfac": PMatEKFAC,
    "diag": PMatDiag,
    "lowrank": partial(PMatLowRank, rows=6),
    "eye": PMatEye,
    "mixed": PMatMixed.of(PMatKFAC, {"2": PMatDiag}),
}


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def problem():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3))
    return model, torch.randn(12, 4), torch.randint(3, (12,))


def made(model, representation=PMatDense, matrix=FIM, **options):
    return VIOptimizer(model, representation, matrix, **{"num_data": 12, "lr": 0.1, "generator": seeded(), **options})


def train(opt, model, x, y, steps=1, observe=True):
    for _ in range(steps):
        for _ in range(opt.samples):
            with opt.sampled():
                cross_entropy(model(x), y).backward()
                if observe:
                    opt.observe((x, y))
        opt.step()


def flat(model):
    return torch.cat([p.detach().flatten() for p in model.parameters()])


def gradient(model, x, y, w):
    """Of the loss, at other weights."""
    other = copy.deepcopy(model)
    PVector(LayerCollection.from_model(other), w).copy_to_model(other)
    return torch.cat([g.flatten() for g in torch.autograd.grad(cross_entropy(other(x), y), list(other.parameters()))])


def close(a, b, tolerance=1e-12):
    torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance)


# The distribution


def regression(n=200, d=5):
    torch.manual_seed(0)
    x = torch.randn(n, d) @ torch.randn(d, d)
    return x, x @ torch.randn(d, 1) + torch.randn(n, 1)


def fitted(
    representation, matrix, x, y, tau=1.0, delta=2.0, steps=3, batch=None, damping=0.0, decay=1.0, lr=1.0, settled=False
):
    model = nn.Linear(x.shape[1], 1, bias=False)
    model.weight.data = torch.linalg.lstsq(x, y).solution.T if settled else torch.zeros(1, x.shape[1])
    options = {"variant": "regression"} if matrix is FIM else {"loss": lambda f, t: 0.5 * (f - t).square().sum(1)}
    opt = VIOptimizer(
        model,
        representation,
        matrix,
        num_data=len(x),
        lr=lr,
        momentum=0.0,
        temperature=tau,
        prior_precision=delta,
        damping=damping,
        decay=decay,
        samples=4,
        generator=seeded(),
        **options,
    )
    for _ in range(steps):
        for xs, ys in zip(x.split(batch or len(x)), y.split(batch or len(x)), strict=True):
            for _ in range(opt.samples):
                with opt.sampled():
                    (0.5 * mse_loss(model(xs), ys)).backward()
                    opt.observe((xs, ys))
            opt.step()
    return model, opt


@pytest.mark.parametrize("batch", [None, 40])
@pytest.mark.parametrize("tau", [1.0, 0.3])
@pytest.mark.parametrize("representation", [PMatDense, PMatBlockDiag])
def test_bayesian_linear_regression(representation, tau, batch):
    x, y = regression()
    _, opt = fitted(representation, FIM, x, y, tau, batch=batch)
    truth = torch.linalg.inv(x.T @ x / tau + 2.0 * torch.eye(5))
    close(opt.covariance.to_torch(), truth)
    close(opt.covariance.to_torch() / truth.diag().mean(), truth / truth.diag().mean())


def test_the_mean_is_that_of_the_posterior_but_for_the_noise_of_the_gradient():
    x, y = regression()
    model, opt = fitted(PMatDense, FIM, x, y)
    posterior = torch.linalg.solve(x.T @ x + 2.0 * torch.eye(5), x.T @ y).T
    with torch.no_grad():
        model.weight.copy_(posterior)
    root, noise = opt.covariance.pow(0.5).to_torch(), seeded()
    noise.set_state(opt._generator.get_state())
    mean = torch.stack([torch.randn(1, 5, generator=noise) @ root for _ in range(4)]).mean(0)
    for _ in range(4):
        with opt.sampled():
            (0.5 * mse_loss(model(x), y)).backward()
    opt.step()
    S = x.T @ x / 200
    close(model.weight.detach(), posterior - mean @ S @ torch.linalg.inv(S + 2.0 / 200 * torch.eye(5)))


@pytest.mark.parametrize("tau", [1.0, 0.3])
def test_the_diagonal_is_the_mean_field_optimum_for_the_fisher_matrix_and_not_for_the_empirical_one(tau):
    x, y = regression()
    _, opt = fitted(PMatDiag, FIM, x, y, tau)
    optimum = 1 / (x.square().sum(0) / tau + 2.0)  # the variances of the closest normal distribution
    close(opt.covariance.get_diag() / optimum, torch.ones(5))
    _, wrong = fitted(PMatDiag, EmpiricalFisher, x, y, tau, steps=20, decay=0.9, lr=0.2, settled=True)
    assert 0.02 < (wrong.covariance.get_diag() / optimum - 1).abs().max() < 0.5


def test_damping_and_priors_of_layers():
    model, x, y = problem()
    precision = {"0": 3.0, "2": 0.5}
    opt = made(model, prior_precision=precision, damping=0.01, temperature=0.5)
    train(opt, model, x, y)
    d = torch.cat([torch.full((25,), 3.0), torch.full((18,), 0.5)])
    S = opt.matrix.to_torch()
    close(opt.covariance.to_torch(), 0.5 / 12 * torch.linalg.inv(S + torch.diag(0.01 + 0.5 * d / 12)), 1e-10)
    opt.param_groups[1]["prior_precision"] = 7.0
    d[25:] = 7.0
    close(opt.covariance.to_torch(), 0.5 / 12 * torch.linalg.inv(S + torch.diag(0.01 + 0.5 * d / 12)), 1e-10)


def test_before_anything_is_observed():
    model, x, y = problem()
    close(made(model).covariance.to_torch(), torch.eye(43) / (12 + 1))
    close(made(model, init_precision=100.0, temperature=0.5).covariance.to_torch(), torch.eye(43) / (200 + 1))
    opt = made(model)
    with opt.sampled():
        cross_entropy(model(x), y).backward()
    with pytest.raises(ValueError, match=r"step: nothing was observed yet: call observe\(minibatch\)"):
        opt.step()


def test_warm_up_raises_the_temperature():
    model, x, y = problem()
    opt = made(model, temperature=0.8, warmup=4)
    taus, m = [], torch.zeros(43)
    for _ in range(6):
        taus.append(opt.tau)
        before = flat(model)
        train(opt, model, x, y)
        scale = taus[-1] / 12
        m = 0.9 * m + flat_grad(model) + scale * before
        d = torch.linalg.solve(opt.matrix.to_torch() + scale * torch.eye(43), m)
        close(flat(model), before - 0.1 * d, 1e-9)
    close(torch.tensor(taus), torch.tensor([0.2, 0.4, 0.6, 0.8, 0.8, 0.8]))


def flat_grad(model):
    return torch.cat([p.grad.flatten() for p in model.parameters()])


# Samples


@pytest.mark.parametrize("name", REPRESENTATIONS)
@pytest.mark.parametrize("precision", [1.0, {"0": 3.0, "2": 0.5}])
def test_samples_have_the_covariance(name, precision):
    """By the exact map from noise to weights, and by which noise that is."""
    model, x, y = problem()
    opt = made(model, REPRESENTATIONS[name], prior_precision=precision)
    train(opt, model, x, y, 2)
    covariance = opt.covariance
    root = covariance.pow(0.5).to_torch()
    close(root @ root.T, covariance.to_torch())
    regul = (
        torch.cat([torch.full((25,), 3.0), torch.full((18,), 0.5)]) if isinstance(precision, dict) else torch.ones(43)
    )
    close(covariance.to_torch(), torch.linalg.inv(12 * opt.matrix.to_torch() + torch.diag(regul)), 1e-10)
    noise = seeded()
    noise.set_state(opt._generator.get_state())
    before = flat(model)
    expected = covariance.sample(noise).to_torch()
    with opt.sampled():
        drawn = flat(model) - before
    close(drawn, expected)


def test_many_samples_have_the_covariance():
    model, x, y = problem()
    opt = made(model, PMatKFAC)
    train(opt, model, x, y, 2)
    mean = flat(model)
    n, rows = 20_000, []
    for _ in range(n // 10):
        with opt.sampled():
            rows.append(flat(model) - mean)
    rows += [v.to_torch() for v in opt.covariance.sample(opt._generator, n - len(rows))]
    truth = opt.covariance.to_torch()
    for some in (torch.stack(rows[: n // 10]), torch.stack(rows)):
        spread = ((truth.square() + truth.diag().outer(truth.diag())) / len(some)).sqrt()
        off = (some.T @ some / len(some) - truth) / spread
        assert off.abs().max() < 5
        assert some.mean(0).abs().max() < 5 * truth.diag().max().sqrt() / len(some) ** 0.5


def test_the_same_seed_gives_the_same_noise():
    runs = []
    for seed in (1, 1, 2):
        model, x, y = problem()
        opt = made(model, PMatKFAC, FIM_MonteCarlo, generator=seeded(seed))
        train(opt, model, x, y, 3)
        runs.append(flat(model))
    assert torch.equal(runs[0], runs[1])
    assert not torch.equal(runs[0], runs[2])
    for seed, same in ((5, True), (6, False)):
        model, x, y = problem()
        torch.manual_seed(seed)
        opt = made(model, PMatKFAC, FIM_MonteCarlo, generator=None)
        torch.manual_seed(9)  # what others draw meanwhile does not matter
        train(opt, model, x, y, 3)
        first = flat(model) if seed == 5 else first  # noqa: F821
        assert torch.equal(first, flat(model)) == same


# Steps


@pytest.mark.parametrize("name", REPRESENTATIONS)
@pytest.mark.parametrize("samples", [1, 3])
def test_steps_by_hand(name, samples):
    model, x, y = problem()
    lc = LayerCollection.from_model(model)
    opt = made(model, REPRESENTATIONS[name], samples=samples, momentum=0.7, temperature=0.5, decay=0.6)
    noise, m, weights, kept = seeded(), torch.zeros(43), [], []
    for k in range(4):
        mu, root = flat(model), opt.covariance.pow(0.5)
        at = [mu + root.mv(random_pvector(lc, generator=noise)).to_torch() for _ in range(samples)]
        train(opt, model, x, y)
        g = torch.stack([gradient(model, x, y, w) for w in at]).mean(0)
        close(flat_grad(model), g)
        m = 0.7 * m + g + 0.5 / 12 * mu
        d = opt.matrix.solve(PVector(lc, m), 0.5 / 12).to_torch()
        close(flat(model), mu - 0.1 * d)
        if name == "dense":  # curvature is the mean over draws, once, and decays once for a step
            kept.append(torch.stack([fisher(model, x, w) for w in at]).mean(0))
            weights = [0.6 * w for w in weights] + [1.0]
            S = sum(w * F for w, F in zip(weights, kept, strict=True)) / sum(weights)
            close(opt.matrix.to_torch(), S)
            assert math.isclose(opt.accumulator.n, samples * 12 * sum(weights))
        assert opt._steps == k + 1


def fisher(model, x, w):
    other = copy.deepcopy(model)
    PVector(LayerCollection.from_model(other), w).copy_to_model(other)
    return FIM(other, (x,), PMatDense).to_torch()


def test_the_step_is_solve_to_the_bit():
    for representation in REPRESENTATIONS.values():
        model, x, y = problem()
        opt = made(model, representation, momentum=0.0, prior_precision=0.0, damping=0.1)
        with opt.sampled():
            cross_entropy(model(x), y).backward()
            opt.observe((x, y))
        before, g = flat(model), PVector.from_model_grad(model)
        opt.step()
        assert torch.equal(flat(model), before - 0.1 * opt.matrix.solve(g, 0.1).to_torch())


def test_refresh_and_observe_every():
    model, x, y = problem()
    opt = made(model, refresh=3, observe_every=2)
    seen, used = [], []
    for _ in range(7):
        with opt.sampled():
            cross_entropy(model(x), y).backward()
            seen.append(opt.observe((x, y)))
        opt.step()
        used.append(opt.matrix)
    assert seen == [True, False] * 3 + [True]
    assert [a is b for a, b in pairwise(used)] == [True, True, False, True, True, False]
    assert math.isclose(opt.accumulator.n, 12 * (1 + 0.95 + 0.95**2 + 0.95**3))


def test_layers_without_a_distribution_are_stepped_by_their_gradient():
    model, x, y = problem()
    lc = LayerCollection.from_model(model, "2")
    with pytest.warns(UserWarning, match=r"outside of the layer collection .*: 0\.weight, 0\.bias"):
        opt = made(model, layer_collection=lc, samples=2, momentum=0.5)
    first = model[0].weight.detach().clone()
    with opt.sampled():
        assert torch.equal(model[0].weight, first)
    train(opt, model, x, y)
    g = model[0].weight.grad.clone()
    close(model[0].weight.detach(), first - 0.1 * g)
    train(opt, model, x, y)
    close(model[0].weight.detach(), first - 0.1 * (g + 0.5 * g + model[0].weight.grad))
    assert opt.covariance.size(0) == 18


# Draws leave no trace


def facts(model):
    return [
        (name, id(p), p.data_ptr(), p._version, p.requires_grad, p.is_leaf, p.stride())
        for name, p in model.named_parameters()
    ]


def optimisers():
    def vi(model):
        return made(model, PMatKFAC)

    def ivon(model):
        return IVON(model.parameters(), 0.1, 12, generator=seeded())

    return {"vi": vi, "ivon": ivon}


both = pytest.mark.parametrize("make", optimisers().values(), ids=optimisers())


def seen(opt, batch):
    if isinstance(opt, VIOptimizer):
        opt.observe(batch)


@both
@pytest.mark.parametrize("where", ["before", "after backward", "after observing", "generator", "second draw"])
def test_exceptions_leave_the_weights_and_give_up_the_step(make, where):
    model, x, y = problem()
    opt = make(model)
    train_any(opt, model, x, y)
    before, now = facts(model), flat(model)
    n = opt.accumulator.n if isinstance(opt, VIOptimizer) else 0
    if where == "second draw":
        with opt.sampled():
            cross_entropy(model(x), y).backward()
            seen(opt, (x, y))
    kept = [p.grad.clone() for p in model.parameters()]
    with pytest.raises(ZeroDivisionError), opt.sampled():  # noqa: PT012
        assert not torch.equal(flat(model), now)
        if where == "before":
            raise ZeroDivisionError
        cross_entropy(model(x), y).backward()
        if where == "after backward":
            raise ZeroDivisionError
        seen(opt, (x, y))
        with torch.no_grad():
            model[0].weight.add_(1)
        raise ZeroDivisionError
    assert facts(model) == before
    assert torch.equal(flat(model), now)
    assert all(torch.equal(p.grad, g) for p, g in zip(model.parameters(), kept, strict=True))
    if isinstance(opt, VIOptimizer):
        assert opt.accumulator.n == n
    with pytest.raises(ValueError, match="no gradients of drawn weights"):
        opt.step()
    twin_model, _, _ = problem()  # the next step is a whole one
    twin = make(twin_model)
    train_any(twin, twin_model, x, y)
    twin._generator.set_state(opt._generator.get_state())
    train_any(opt, model, x, y)
    train_any(twin, twin_model, x, y)
    close(flat(model), flat(twin_model))


def train_any(opt, model, x, y):
    for _ in range(opt.samples):
        with opt.sampled():
            cross_entropy(model(x), y).backward()
            seen(opt, (x, y))
    opt.step()


@both
def test_a_draw_that_cannot_be_made_leaves_all_as_it_was(make):
    model, x, y = problem()
    opt = make(model)
    train_any(opt, model, x, y)
    now, before = flat(model), facts(model)
    grads = [p.grad for p in model.parameters()]
    if isinstance(opt, VIOptimizer):
        opt.temperature, opt.param_groups[0]["prior_precision"] = -1.0, 1.0
    else:
        opt.param_groups[0]["ess"] = "many"
    with pytest.raises((ValueError, TypeError)), opt.sampled():
        raise AssertionError
    assert facts(model) == before
    assert torch.equal(flat(model), now)
    assert all(p.grad is g for p, g in zip(model.parameters(), grads, strict=True))


@both
def test_ctrl_c_at_every_moment(make):
    model, x, y = problem()
    opt = make(model)
    train_any(opt, model, x, y)
    before, now, grads = facts(model), flat(model), [p.grad for p in model.parameters()]
    x.requires_grad_(False)

    def run():
        with opt.sampled(), torch.no_grad():
            model(x)

    run()  # what is kept for later is made now
    tracer = Tracer((changes.__file__, draws.__file__, __file__))
    moments = tracer.moments(run)
    assert len(moments) > 20
    for moment in moments:
        assert isinstance(tracer.run(run, moment), KeyboardInterrupt)
        assert facts(model) == before
        assert torch.equal(flat(model), now)
        assert not opt._draws.inside
        assert all(p.grad is g for p, g in zip(model.parameters(), grads, strict=True))


def test_an_alarm_inside():
    model, x, y = problem()
    opt = made(model, PMatKFAC)
    train(opt, model, x, y)
    now = flat(model)

    def ring(number, frame):
        raise TimeoutError

    before = signal.signal(signal.SIGALRM, ring)
    try:
        with pytest.raises(TimeoutError), opt.sampled():  # noqa: PT012
            signal.setitimer(signal.ITIMER_REAL, 0.01)
            while True:
                cross_entropy(model(x), y).backward()
    finally:
        signal.signal(signal.SIGALRM, before)
    assert torch.equal(flat(model), now)


@both
def test_the_weights_are_the_same_tensors_and_gradients_come_to_them(make):
    model, x, y = problem()
    held = list(model.parameters())
    called = []
    held[0].register_hook(lambda g: called.append(1))
    opt = make(model)
    mu = flat(model)
    with opt.sampled():
        assert all(a is b for a, b in zip(held, model.parameters(), strict=True))
        w = flat(model)
        cross_entropy(model(x), y).backward()
    close(flat_grad(model), gradient(model, x, y, w))
    assert torch.equal(flat(model), mu)
    assert called
    loss = cross_entropy(model(x), y)
    with opt.sampled(), pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()
    with opt.sampled():
        late = cross_entropy(model(x), y)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        late.backward()


@both
def test_gradients_are_the_mean_over_draws_and_old_ones_do_not_count(make):
    for clear in ("none", "zero_grad", "inside", "zeros"):
        model, x, y = problem()
        opt = make(model)
        for _ in range(2):
            at = []
            if clear == "zero_grad":
                opt.zero_grad()
            if clear == "zeros":
                opt.zero_grad(set_to_none=False)
            for _ in range(3):
                with opt.sampled():
                    if clear == "inside":
                        opt.zero_grad()
                    at.append(flat(model))
                    cross_entropy(model(x), y).backward()
                    seen(opt, (x, y))
                with opt.sampled(), torch.no_grad():  # a prediction is no draw of the step
                    model(x)
            close(flat_grad(model), torch.stack([gradient(model, x, y, w) for w in at]).mean(0))
            opt.step()


@both
@pytest.mark.parametrize("clear", ["opt", "zeros", "model"])
def test_gradients_that_are_taken_away_are_no_draws(make, clear):
    model, x, y = problem()
    opt = make(model)
    with opt.sampled():
        cross_entropy(model(x), y).backward()
    if clear == "opt":
        opt.zero_grad()
    elif clear == "zeros":
        opt.zero_grad(set_to_none=False)
    else:
        model.zero_grad()
    with opt.sampled():
        w = flat(model)
        cross_entropy(model(x), y).backward()
        seen(opt, (x, y))
    close(flat_grad(model), gradient(model, x, y, w))
    opt.step()


def test_accumulated_gradients_of_one_draw_add():
    model, x, y = problem()
    opt = made(model)
    with opt.sampled():
        w = flat(model)
        for xs, ys in zip(x.split(4), y.split(4), strict=True):
            (cross_entropy(model(xs), ys) / 3).backward()
            opt.observe((xs, ys))
    close(flat_grad(model), gradient(model, x, y, w))
    opt.step()
    close(opt.matrix.to_torch(), fisher(model, x, w))


@both
def test_misuse_is_told(make):
    model, x, y = problem()
    opt = make(model)
    with pytest.raises(ValueError, match=r"step: no gradients of drawn weights .* inside of `with opt\.sampled\(\):`"):
        opt.step()
    cross_entropy(model(x), y).backward()
    with pytest.raises(ValueError, match="no gradients of drawn weights"):
        opt.step()
    train_any(opt, model, x, y)
    with pytest.raises(ValueError, match="no gradients of drawn weights"):  # those of the last step
        opt.step()
    now = flat(model)
    with opt.sampled():
        w = flat(model)
        for wrong in (lambda: opt.sampled().__enter__(), opt.step, lambda: opt.load_state_dict(opt.state_dict())):
            with pytest.raises(RuntimeError, match="drawn ones, which are put back later: do it after the block"):
                wrong()
        assert torch.equal(flat(model), w)
    assert torch.equal(flat(model), now)


def test_inside_of_inference_mode_and_no_grad():
    model, x, _ = problem()
    opt = made(model)
    for mode in (torch.inference_mode, torch.no_grad):
        with mode(), opt.sampled():
            model(x)
        with opt.sampled(), mode():
            model(x)
    assert not any(p.is_inference() for p in model.parameters())


# As an optimiser of torch


def test_resumed_to_the_bit():
    for name, representation in REPRESENTATIONS.items():
        for matrix in (FIM_MonteCarlo, FIM):
            model, x, y = problem()
            options = {"samples": 2, "refresh": 3, "warmup": 9, "matrix": matrix}
            opt = made(model, representation, **options)
            train(opt, model, x, y, 7)
            file = io.BytesIO()
            torch.save((model.state_dict(), opt.state_dict()), file)
            train(opt, model, x, y, 5)
            file.seek(0)
            weights, state = torch.load(file, weights_only=True)
            other, _, _ = problem()
            again = made(other, representation, generator=seeded(77), **options)
            train(again, other, x, y, 2)
            other.load_state_dict(weights)
            again.load_state_dict(state)
            train(again, other, x, y, 5)
            assert torch.equal(flat(model), flat(other)), (name, matrix)
            assert torch.equal(opt.covariance.to_torch(), again.covariance.to_torch())
            assert again._steps == 12


def test_state_of_something_else():
    model, x, y = problem()
    opt = made(model)
    train(opt, model, x, y)
    now = opt.state_dict()
    with pytest.raises(ValueError, match="of a VIOptimizer"):
        opt.load_state_dict(torch.optim.SGD(model.parameters(), lr=0.1).state_dict())
    other = nn.Linear(4, 3)
    with pytest.raises(ValueError, match="of something else"):
        opt.load_state_dict(made(other, PMatDense).state_dict())
    with pytest.raises(ValueError, match="of something else"):
        opt.load_state_dict(made(problem()[0], PMatDiag).state_dict())
    after = opt.state_dict()
    assert torch.equal(now["state"][0]["momentum"], after["state"][0]["momentum"])
    assert after["variational"]["steps"] == 1
    train(opt, model, x, y)


def test_what_torch_asks_of_optimisers():
    model, x, y = problem()
    opt = made(model, PMatKFAC)
    scheduler = torch.optim.lr_scheduler.StepLR(opt, 1, gamma=0.5)
    called = []
    opt.register_step_pre_hook(lambda *_: called.append("before"))
    opt.register_step_post_hook(lambda *_: called.append("after"))
    train(opt, model, x, y)
    scheduler.step()
    assert [group["lr"] for group in opt.param_groups] == [0.05, 0.05]
    assert [group["name"] for group in opt.param_groups] == ["0", "2"]
    assert called == ["before", "after"]
    opt.zero_grad()
    assert all(p.grad is None for p in model.parameters())
    before = flat(model)
    opt.param_groups[0]["lr"] = 0.0
    train(opt, model, x, y)
    moved = (flat(model) != before).tolist()
    assert not any(moved[:25])
    assert all(moved[25:])
    for wrong in (copy.deepcopy, lambda o: io.BytesIO(torch.save(o, io.BytesIO()))):
        with pytest.raises(TypeError, match="VIOptimizer cannot be"):
            wrong(opt)
    extra = nn.Parameter(torch.ones(2))
    with pytest.warns(UserWarning, match="those of a group that was added"):
        opt.add_param_group({"params": [extra], "lr": 0.5})
    with opt.sampled():
        (cross_entropy(model(x), y) + extra.sum()).backward()
        opt.observe((x, y))
    opt.step()
    close(extra.detach(), torch.full((2,), 0.5))
    with pytest.raises(ValueError, match="lr"):
        opt.add_param_group({"params": [nn.Parameter(torch.ones(2))], "lr": -1.0})


@both
def test_a_closure_is_called_for_each_draw(make):
    losses, runs = [], []
    for way in ("closure", "loop"):
        model, x, y = problem()
        opt = make(model)
        opt.samples = 3
        for _ in range(2):

            def closure(opt=opt, model=model, x=x, y=y):
                opt.zero_grad()
                loss = cross_entropy(model(x), y)
                loss.backward()
                seen(opt, (x, y))
                losses.append(loss.detach())
                return loss

            if way == "closure":
                result = opt.step(closure)
                close(result.detach(), torch.stack(losses).mean())
                losses.clear()
            else:
                for _ in range(3):
                    with opt.sampled():
                        closure()
                opt.step()
        runs.append(flat(model))
    close(*runs)


@pytest.mark.parametrize("unscale", [False, True])
def test_scaled_losses(unscale):
    def run(scaler):
        model, x, y = problem()
        opt = made(model, PMatKFAC, samples=2)
        for k in range(4):
            for _ in range(2):
                with opt.sampled():
                    loss = cross_entropy(model(x), y) * (float("inf") if k == 2 and scaler else 1.0)
                    (loss if scaler is None else scaler.scale(loss)).backward()
                    opt.observe((x, y))
            if scaler is None:
                if k != 2:
                    opt.step()
                else:
                    opt._give_up()
                    opt.zero_grad()
            else:
                before, n = flat(model), opt.accumulator.n
                if unscale:
                    scaler.unscale_(opt)
                scaler.step(opt)
                scaler.update()
                assert torch.equal(before, flat(model)) == (k == 2)
                assert k != 2 or opt.accumulator.n < n  # what was observed for it does not count
        return flat(model)

    close(run(None), run(torch.amp.GradScaler("cpu", init_scale=1024.0)))


def test_losses_scaled_and_data_twice():
    model, x, y = problem()
    opt = made(model, PMatKFAC)
    twin, _, _ = problem()
    other = made(twin, PMatKFAC)
    train(opt, model, x, y, 3)
    train(other, twin, torch.cat([x, x]), torch.cat([y, y]), 3)
    close(flat(model), flat(twin), 1e-10)


def test_half_precision():
    model = problem()[0].to(torch.bfloat16)
    opt = made(model, PMatDiag)
    with opt.sampled():
        assert model[0].weight.dtype == torch.bfloat16
    assert opt.mean.dtype == torch.float32


def test_gradients_may_be_clipped():
    model, x, y = problem()
    opt = made(model, samples=2, momentum=0.0, prior_precision=0.0, damping=0.1)
    for _ in range(2):
        with opt.sampled():
            cross_entropy(model(x), y).backward()
            opt.observe((x, y))
    nn.utils.clip_grad_norm_(model.parameters(), 0.01)
    before = flat(model)
    opt.step()
    close(flat_grad(model).norm(), torch.tensor(0.01), 1e-5)
    close(flat(model), before - 0.1 * opt.matrix.solve(PVector.from_model_grad(model), 0.1).to_torch())


# Wrong arguments


@pytest.mark.parametrize(
    ("options", "error", "text"),
    [
        ({"num_data": 0}, ValueError, "num_data: expected a finite number above 0"),
        ({"num_data": "all"}, TypeError, "num_data: expected a number"),
        ({"lr": -1.0}, ValueError, "lr: expected a finite number of at least 0"),
        ({"prior_precision": -1.0}, ValueError, "prior_precision: expected"),
        ({"prior_precision": {"0": 1.0}}, ValueError, "prior_precision: give one value for each layer; 2 do not"),
        ({"prior_precision": {"0": 1.0, "2": -1.0}}, ValueError, "prior_precision of layer '2'"),
        ({"temperature": -0.1}, ValueError, "temperature: expected"),
        ({"samples": 0}, ValueError, "samples: expected at least 1"),
        ({"warmup": 1.5}, TypeError, "warmup: expected a whole number"),
        ({"decay": 1.5}, ValueError, "decay: what the past counts"),
        ({"init_precision": 0.0}, ValueError, "init_precision: expected"),
        ({"refresh": 0}, ValueError, "refresh: expected at least 1"),
        ({"refresh": True}, TypeError, "refresh: expected"),
        ({"generator": 3}, TypeError, "generator: expected"),
        ({"representation": PMatImplicit}, NotImplementedError, "PMatImplicit: .* has no running average"),
        ({"matrix": PMatDense}, TypeError, "matrix: expected a constructor"),
        ({"triasl": 2}, TypeError, "trials"),
    ],
)
def test_wrong_arguments(options, error, text):
    model, _, _ = problem()
    with pytest.raises(error, match=text):
        made(model, **{"matrix": FIM_MonteCarlo, **options})


def test_a_matrix_that_is_not_positive():
    model, x, y = problem()
    opt = made(model, PMatQuasiDiag, prior_precision=0.01)
    with pytest.raises(ValueError, match=r"not positive: .*use more prior_precision"):
        train(opt, model, x, y, 3)
    opt = made(model, PMatDense, prior_precision=0.0)
    with pytest.raises(ValueError, match="use more prior_precision or damping"):
        train(opt, model, x, y, 2)


def test_a_model_that_has_changed():
    model, x, y = problem()
    opt = made(model)
    train(opt, model, x, y)
    model[2] = nn.Linear(5, 3)
    with (
        pytest.raises(ValueError, match=r"sampled: the model has changed .*'2\.weight' is another one now"),
        opt.sampled(),
    ):
        pass
    model, x, y = problem()
    opt = made(model, PMatKFAC)
    model.float()
    with pytest.raises(ValueError, match=r"'0\.weight' has another shape, dtype or device now"), opt.sampled():
        pass


def test_a_parameter_without_a_gradient():
    model, x, y = problem()
    opt = made(model)
    with opt.sampled():
        opt.observe((x, y))
        model[2].weight.sum().backward()
    with pytest.raises(ValueError, match=r"step: parameter '0\.weight' has no gradient"):
        opt.step()


def test_other_losses_and_matrices():
    model, x, y = problem()
    opt = made(model, PMatKFAC, partial(GGN, loss=nn.CrossEntropyLoss(label_smoothing=0.1)))
    train(opt, model, x, y, 2)
    close(opt.covariance.size(0), 43)


def test_nothing_is_warned_of():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model, x, y = problem()
        opt = made(model, PMatEKFAC)
        train(opt, model, x, y, 3)


def test_posterior_is_the_distribution_of_the_draws():
    model, x, y = problem()
    opt = made(model, temperature=0.3, damping=0.02, prior_precision={"0": 3.0, "2": 0.5})
    with pytest.raises(ValueError, match="posterior: there was no step yet"):
        opt.posterior()
    train(opt, model, x, y)
    assert torch.equal(opt.mean.to_torch(), flat(model))
    found = opt.posterior()
    assert isinstance(found, Posterior)
    assert torch.equal(found.mean.to_torch(), flat(model))
    close(found.precision.to_torch() @ opt.covariance.to_torch(), torch.eye(43), 1e-9)


@pytest.mark.parametrize(
    ("matrix", "loss", "likelihood"),
    [
        (FIM_MonteCarlo, nn.CrossEntropyLoss(), Categorical),
        (partial(FIM, variant="regression"), nn.MSELoss(), Gaussian),
        (partial(FIM_MonteCarlo, variant=Gaussian(0.5)), nn.MSELoss(), Gaussian),
        (GGN, nn.CrossEntropyLoss(), Categorical),
        (partial(GGN, loss=nn.MSELoss()), nn.MSELoss(), None),
        (partial(EmpiricalFisher, loss=nn.BCEWithLogitsLoss()), nn.BCEWithLogitsLoss(), None),
    ],
)
def test_the_posterior_is_of_the_likelihood_that_was_trained(matrix, loss, likelihood):
    model, x, y = problem()
    if not isinstance(loss, nn.CrossEntropyLoss):
        y = nn.functional.one_hot(y, 3).to(x)
    opt = made(model, PMatKFAC, matrix)
    with opt.sampled():
        loss(model(x), y).backward()
        opt.observe((x, y))
    opt.step()
    if likelihood is None:
        with pytest.raises(ValueError, match=r"posterior: .* likelihood .* give it"):
            opt.posterior()
        assert opt.posterior(Gaussian(1.5)).likelihood == Gaussian(1.5)
        return
    assert isinstance(opt.posterior().likelihood, likelihood)
    if isinstance(matrix, partial):
        assert torch.equal(opt.posterior().predict(x), model(x))
        with pytest.raises(ValueError, match="likelihood: the matrix is that of Gaussian"):
            opt.posterior("classif_logits")


def test_the_posterior_of_a_model_in_train_mode():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 5), nn.BatchNorm1d(5), nn.Linear(5, 3))
    x, y = torch.randn(20, 4), torch.randint(3, (20,))
    opt = made(model)
    train(opt, model, x, y, 2)
    before = model[1].running_mean.clone()
    found = opt.posterior().predict(x)
    assert torch.equal(model[1].running_mean, before)
    assert model.training
    assert torch.equal(opt.posterior().predict(x[:5]), found[:5])


@pytest.mark.parametrize("name", REPRESENTATIONS)
def test_a_temperature_of_zero_has_no_noise(name):
    model, x, y = problem()
    opt = made(model, REPRESENTATIONS[name], temperature=0.0, damping=0.1)
    for _ in range(2):
        mu = flat(model)
        with opt.sampled():
            close(flat(model), mu)
        train(opt, model, x, y)
    with pytest.raises(ValueError, match="posterior: at temperature=0"):
        opt.posterior()
