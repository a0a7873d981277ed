"""IVON against its equations written out, in loops over plain gradients."""

import copy
import io
import math

import pytest
import torch
from torch import nn
from torch.nn.functional import cross_entropy

from nngeometry.optim import IVON


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def problem():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3))
    return model, torch.randn(12, 4), torch.randint(3, (12,))


def train(opt, model, x, y, steps=1):
    for _ in range(steps):
        for _ in range(opt.samples):
            with opt.sampled():
                cross_entropy(model(x), y).backward()
        opt.step()


def flat(model):
    return torch.cat([p.detach().flatten() for p in model.parameters()])


def close(a, b, tolerance=1e-12):
    torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance)


def by_hand(model, x, y, noise, samples, steps, *, lr, N, h, b1, b2, d):
    w = [p.detach().clone() for p in model.parameters()]
    h, m = [torch.full_like(p, h) for p in w], [torch.zeros_like(p) for p in w]
    for t in range(1, steps + 1):
        g, eg = [0.0] * len(w), [0.0] * len(w)
        for _ in range(samples):
            eps = [torch.randn(p.shape, generator=noise) / (N * (q + d)).sqrt() for p, q in zip(w, h, strict=True)]
            other = copy.deepcopy(model)
            for p, a, b in zip(other.parameters(), w, eps, strict=True):
                p.data = a + b
            found = torch.autograd.grad(cross_entropy(other(x), y), list(other.parameters()))
            g = [a + b / samples for a, b in zip(g, found, strict=True)]
            eg = [a + e * b / samples for a, e, b in zip(eg, eps, found, strict=True)]
        for k in range(len(w)):
            f = N * (h[k] + d) * eg[k]
            h[k] = b2 * h[k] + (1 - b2) * f + (1 - b2) ** 2 * (h[k] - f) ** 2 / (2 * (h[k] + d))
            m[k] = b1 * m[k] + (1 - b1) * g[k]
            w[k] = w[k] - lr * (m[k] / (1 - b1**t) + d * w[k]) / (h[k] + d)
    return torch.cat([p.flatten() for p in w]), torch.cat([q.flatten() for q in h])


@pytest.mark.parametrize("samples", [1, 3])
@pytest.mark.parametrize("b2", [0.9, 0.99999])
def test_equations(samples, b2):
    model, x, y = problem()
    start = copy.deepcopy(model)
    opt = IVON(model.parameters(), 0.1, 12, 0.5, 0.8, b2, 0.01, samples=samples, generator=seeded())
    train(opt, model, x, y, 6)
    w, h = by_hand(start, x, y, seeded(), samples, 6, lr=0.1, N=12, h=0.5, b1=0.8, b2=b2, d=0.01)
    close(flat(model), w)
    close(torch.cat([opt.state[p]["hessian"].flatten() for p in model.parameters()]), h)
    assert (h > 0).all()


def test_groups_with_their_own_numbers():
    model, x, y = problem()
    own = {"lr": 0.01, "ess": 50.0, "hess_init": 2.0, "beta1": 0.5, "beta2": 0.9, "weight_decay": 0.1}
    opt = IVON(model[0].parameters(), 0.1, 12, 0.5, generator=seeded())
    opt.add_param_group({"params": list(model[2].parameters()), **own})
    with opt.sampled():
        inside = flat(model)
        cross_entropy(model(x), y).backward()
    noise, mu = seeded(), flat(model)
    eps = torch.cat([torch.randn(p.shape, generator=noise).flatten() for p in model.parameters()])
    spread = torch.cat([torch.full((25,), 12 * (0.5 + 1e-4)), torch.full((18,), 50 * (2.0 + 0.1))])
    close(inside - mu, eps / spread.sqrt())
    opt.step()
    g, e = torch.cat([p.grad.flatten() for p in model.parameters()]), eps / spread.sqrt()
    f = 50 * 2.1 * (e * g)[25:]
    h = 0.9 * 2 + 0.1 * f + 0.01 * (2 - f) ** 2 / (2 * 2.1)
    close(flat(model)[25:], mu[25:] - 0.01 * (g[25:] + 0.1 * mu[25:]) / (h + 0.1))


def test_the_diagonal_posterior_of_a_linear_model():
    """h goes to the diagonal of the Hessian of the mean loss."""
    torch.manual_seed(0)
    x = torch.randn(50, 4) * torch.tensor([0.5, 1.0, 2.0, 3.0])
    model, y = nn.Linear(4, 1, bias=False), torch.randn(50, 1)
    opt = IVON(model.parameters(), 0.1, 50, 1.0, 0.9, 0.99, 0.02, samples=4, generator=seeded())
    for _ in range(600):
        for _ in range(opt.samples):
            with opt.sampled():
                (0.5 * (model(x) - y).square().mean()).backward()
        opt.step()
    (h,) = opt.state[model.weight]["hessian"]
    close(h / x.square().mean(0), torch.ones(4), 0.3)
    close(model.weight.detach().T, torch.linalg.solve(x.T @ x / 50 + 0.02 * torch.eye(4), x.T @ y / 50), 0.1)


def test_resumed_to_the_bit():
    model, x, y = problem()
    opt = IVON(model.parameters(), 0.1, 12, beta2=0.95, samples=2, generator=seeded())
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(opt, 20)
    for _ in range(7):
        train(opt, model, x, y)
        scheduler.step()
    file = io.BytesIO()
    torch.save((model.state_dict(), opt.state_dict(), scheduler.state_dict()), file)
    other, _, _ = problem()
    again = IVON(other.parameters(), 0.1, 12, beta2=0.95, samples=2)
    plan = torch.optim.lr_scheduler.CosineAnnealingLR(again, 20)
    train(again, other, x, y, 2)
    file.seek(0)
    weights, state, planned = torch.load(file, weights_only=True)
    other.load_state_dict(weights)
    again.load_state_dict(state)
    plan.load_state_dict(planned)
    for _ in range(5):
        for o, m, s in ((opt, model, scheduler), (again, other, plan)):
            train(o, m, x, y)
            s.step()
    assert torch.equal(flat(model), flat(other))
    assert {s["step"] for s in again.state.values()} == {12}
    with pytest.raises(ValueError, match="of an IVON"):
        opt.load_state_dict(torch.optim.SGD(model.parameters(), lr=0.1).state_dict())


def test_parameters_without_gradients_stay():
    model, x, y = problem()
    unused = nn.Parameter(torch.ones(3))
    opt = IVON([*model.parameters(), unused], 0.1, 12, generator=seeded())
    train(opt, model, x, y, 2)
    assert torch.equal(unused.detach(), torch.ones(3))
    assert unused not in opt.state or not opt.state[unused]


def test_what_torch_asks_of_optimisers():
    model, x, y = problem()
    opt = IVON(model.parameters(), 0.1, 12, generator=seeded())
    called = []
    opt.register_step_pre_hook(lambda *_: called.append("before"))
    train(opt, model, x, y)
    assert called == ["before"]
    opt.zero_grad()
    assert all(p.grad is None for p in model.parameters())
    copied = copy.deepcopy(opt.state_dict())
    assert len(copied["state"]) == 4


def test_scaled_losses():
    def run(scaler):
        model, x, y = problem()
        opt = IVON(model.parameters(), 0.1, 12, beta2=0.9, samples=2, generator=seeded())
        for k in range(4):
            for _ in range(2):
                with opt.sampled():
                    loss = cross_entropy(model(x), y) * (float("inf") if k == 2 and scaler else 1.0)
                    (loss if scaler is None else scaler.scale(loss)).backward()
            if scaler is not None:
                scaler.step(opt)
                scaler.update()
            elif k != 2:
                opt.step()
            else:
                opt.zero_grad()
        return flat(model)

    close(run(None), run(torch.amp.GradScaler("cpu", init_scale=1024.0)))
    model, x, y = problem()
    opt, scaler = IVON(model.parameters(), 0.1, 12), torch.amp.GradScaler("cpu")
    with opt.sampled():
        scaler.scale(cross_entropy(model(x), y)).backward()
    scaler.unscale_(opt)
    with pytest.raises(ValueError, match=r"leave out scaler\.unscale_"):
        scaler.step(opt)


def test_half_precision_keeps_its_curvature_in_single():
    model, x, y = problem()
    model = model.to(torch.bfloat16)
    opt = IVON(model.parameters(), 0.1, 12, beta2=0.9, generator=seeded())
    train(opt, model, x.to(torch.bfloat16), y, 2)
    opt.load_state_dict(opt.state_dict())
    assert {s[name].dtype for s in opt.state.values() for name in ("hessian", "momentum")} == {torch.float32}


@pytest.mark.parametrize(
    ("options", "error", "text"),
    [
        ({"lr": -1.0}, ValueError, "lr: expected"),
        ({"ess": 0.0}, ValueError, "ess: expected a finite number above 0"),
        ({"hess_init": 0.0}, ValueError, "hess_init: expected"),
        ({"beta1": 1.0}, ValueError, "beta1: expected a number from 0 to below 1"),
        ({"beta2": math.nan}, ValueError, "beta2: expected"),
        ({"weight_decay": -0.1}, ValueError, "weight_decay: expected"),
        ({"samples": 0}, ValueError, "samples: expected"),
        ({"generator": 1}, TypeError, "generator: expected"),
        ({"params": []}, ValueError, "empty parameter list"),
        ({"params": [nn.Parameter(torch.zeros(2, dtype=torch.complex128))]}, TypeError, "IVON: .* is complex"),
    ],
)
def test_wrong_arguments(options, error, text):
    model, _, _ = problem()
    with pytest.raises(error, match=text):
        IVON(**{"params": model.parameters(), "lr": 0.1, "ess": 12, **options})


def test_sparse_gradients_are_refused():
    model = nn.Embedding(5, 3, sparse=True)
    opt = IVON(model.parameters(), 0.1, 12)
    with opt.sampled():
        model(torch.tensor([1, 2])).sum().backward()
    with pytest.raises(TypeError, match=r"IVON: .* is sparse: make its layer with sparse=False"):
        opt.step()
