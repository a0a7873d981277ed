"""SWATS: its algorithm by hand, when it switches, and that it is torch's SGD from then on."""

import copy
import io

import pytest
import torch
from torch import nn
from torch.nn.functional import cross_entropy

from nngeometry.optim import SWATS


def problem():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3))
    return model, torch.randn(12, 4), torch.randint(3, (12,))


def flat(model):
    return torch.cat([p.detach().flatten() for p in model.parameters()])


def close(a, b, tolerance=1e-12):
    torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance)


def train(opt, model, x, y, steps=1):
    for _ in range(steps):
        opt.zero_grad()
        cross_entropy(model(x), y).backward()
        opt.step()


def by_hand(model, x, y, steps, *, lr=1e-3, b1=0.9, b2=0.999, eps=1e-9, decay=0.0, tolerance=1e-5):
    """Algorithm 1: the weights after each step, and when it switched with what."""
    model = copy.deepcopy(model)
    w, adam, found = flat(model), True, []
    m, a, lam, v, switched = torch.zeros_like(w), torch.zeros_like(w), 0.0, 0.0, None
    for k in range(1, steps + 1):
        nn.utils.vector_to_parameters(w, model.parameters())
        grads = torch.autograd.grad(cross_entropy(model(x), y), list(model.parameters()))
        g = torch.cat([q.flatten() for q in grads]) + decay * w
        if not adam:
            v = b1 * v + g
            w = w - (1 - b1) * switched[1] * v
            found.append(w)
            continue
        m, a = b1 * m + (1 - b1) * g, b2 * a + (1 - b2) * g**2
        p = -lr * (1 - b2**k) ** 0.5 / (1 - b1**k) * m / (a.sqrt() + eps)
        w = w + p
        if p @ g != 0:
            gamma = float(p @ p / -(p @ g))
            lam = b2 * lam + (1 - b2) * gamma
            if k > 1 and abs(lam / (1 - b2**k) - gamma) < tolerance:
                adam, switched = False, (k, lam / (1 - b2**k))
        found.append(w)
    return found, switched


@pytest.mark.parametrize(
    "options", [{"tolerance": 3e-4}, {"tolerance": 3e-4, "weight_decay": 0.01}, {"tolerance": 0.0}]
)
def test_the_algorithm(options):
    model, x, y = problem()
    by = {
        "lr": 0.01,
        "b1": 0.8,
        "b2": 0.9,
        "decay": options.get("weight_decay", 0.0),
        "tolerance": options["tolerance"],
    }
    found, switched = by_hand(model, x, y, 65, **by)
    opt = SWATS(model.parameters(), 0.01, (0.8, 0.9), min_steps=2, **options)
    for w in found:
        train(opt, model, x, y)
        close(flat(model), w, 1e-10)
    assert opt.switched == (switched and switched[0])
    if switched:
        assert 2 < opt.switched < 60
        close(opt.estimate, switched[1])


@pytest.mark.parametrize("c", [torch.tensor([1.0, -2.0, 0.5]), torch.full((4,), -3.0), torch.tensor([0.2])])
def test_a_constant_gradient(c):
    w = nn.Parameter(torch.randn_like(c))
    opt = SWATS([w], lr=0.03, min_steps=2, tolerance=1e-7, eps=1e-12)
    for k in range(1, 4):
        w.grad = c.clone()
        before = w.detach().clone()
        opt.step()
        close(opt.estimate, float(0.03 * len(c) / c.abs().sum()), 1e-8)
        assert opt.switched == (None if k < 2 else 2)
    close(w.detach(), before - 0.1 * opt.estimate * c)  # momentum from zero
    w = nn.Parameter(torch.zeros(3))
    late = SWATS([w], lr=0.03)
    for _ in range(12):
        w.grad = torch.ones(3)
        late.step()
    assert late.switched == 10


def test_gradients_of_zero_do_not_count():
    w = nn.Parameter(torch.zeros(2))
    opt = SWATS([w], min_steps=0)
    for _ in range(5):
        w.grad = torch.zeros(2)
        opt.step()
    assert opt.switched is None
    assert torch.equal(w.detach(), torch.zeros(2))
    opt.zero_grad()
    opt.step()


@pytest.mark.parametrize("decay", [0.0, 0.05])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_after_the_switch_it_is_sgd_to_the_bit(decay, dtype):
    model, x, y = problem()
    model, x = model.to(dtype), x.to(dtype)
    opt = SWATS(model.parameters(), 0.01, relative=0.5, weight_decay=decay)
    while opt.switched is None:
        train(opt, model, x, y)
    other = copy.deepcopy(model)
    sgd = torch.optim.SGD(other.parameters(), lr=(1 - 0.9) * opt.estimate, momentum=0.9, weight_decay=decay)
    for _ in range(20):
        train(opt, model, x, y)
        train(sgd, other, x, y)
        assert torch.equal(flat(model), flat(other))


def test_a_scheduler_changes_the_learning_rate_of_sgd_by_its_factor():
    model, x, y = problem()
    opt = SWATS(model.parameters(), 0.01, relative=0.5)
    scheduler = torch.optim.lr_scheduler.ExponentialLR(opt, 0.99)
    while opt.switched is None:
        train(opt, model, x, y)
        scheduler.step()
    other = copy.deepcopy(model)
    sgd = torch.optim.SGD(other.parameters(), lr=0.1 * opt.estimate * 0.99, momentum=0.9)
    plan = torch.optim.lr_scheduler.ExponentialLR(sgd, 0.99)
    for _ in range(10):
        for o, m, s in ((opt, model, scheduler), (sgd, other, plan)):
            train(o, m, x, y)
            s.step()
        close(flat(model), flat(other))


@pytest.mark.parametrize("before", [3, 15])
def test_resumed_to_the_bit(before):
    model, x, y = problem()
    opt = SWATS(model.parameters(), 0.01, relative=0.5)
    train(opt, model, x, y, before)
    file = io.BytesIO()
    torch.save((model.state_dict(), opt.state_dict()), file)
    kept = opt.state_dict()
    other, _, _ = problem()
    again = SWATS(other.parameters(), 0.01, relative=0.5)
    file.seek(0)
    weights, state = torch.load(file, weights_only=True)
    other.load_state_dict(weights)
    again.load_state_dict(state)
    third, _, _ = problem()  # and from a state that is held in memory
    third.load_state_dict(weights)
    held = SWATS(third.parameters(), 0.01, relative=0.5)
    held.load_state_dict(copy.deepcopy(kept))
    for o, m in ((opt, model), (again, other), (held, third)):
        train(o, m, x, y, 12)
    assert torch.equal(flat(model), flat(other))
    assert torch.equal(flat(model), flat(third))
    assert opt.switched == again.switched
    assert opt.switched is not None
    with pytest.raises(ValueError, match="of a SWATS"):
        opt.load_state_dict(torch.optim.Adam(model.parameters()).state_dict())


def test_groups():
    model, x, y = problem()
    opt = SWATS([{"params": model[0].parameters(), "lr": 0.02}, {"params": model[2].parameters()}], 0.01, relative=0.5)
    extra = nn.Parameter(torch.ones(2))
    while opt.switched is None:
        train(opt, model, x, y)
    opt.add_param_group({"params": [extra]})
    extra.grad = torch.ones(2)
    before = opt.estimate
    opt.step()
    close(extra.detach(), torch.ones(2) - 0.1 * before)
    with pytest.raises(ValueError, match="the same for all groups"):
        opt.add_param_group({"params": [nn.Parameter(torch.ones(2))], "betas": (0.9, 0.99)})


def test_what_torch_asks_of_optimisers():
    model, x, y = problem()
    opt = SWATS(model.parameters(), 0.01, relative=0.5)
    scaler, called = torch.amp.GradScaler("cpu", init_scale=64.0), []
    opt.register_step_post_hook(lambda *_: called.append(1))
    other, _, _ = problem()
    plain = SWATS(other.parameters(), 0.01, relative=0.5)
    for _ in range(15):
        opt.zero_grad()
        scaler.scale(cross_entropy(model(x), y)).backward()
        scaler.step(opt)
        scaler.update()

        def closure():
            plain.zero_grad()
            loss = cross_entropy(other(x), y)
            loss.backward()
            return loss

        assert plain.step(closure) > 0
    close(flat(model), flat(other))
    assert len(called) == 15
    copy.deepcopy(opt)


@pytest.mark.parametrize(
    ("options", "error", "text"),
    [
        ({"lr": -1.0}, ValueError, "lr: expected"),
        ({"betas": (0.9, 1.0)}, ValueError, r"betas\[1\]: expected a number from 0 to below 1"),
        ({"betas": 0.9}, TypeError, "betas: expected two numbers"),
        ({"eps": -1.0}, ValueError, "eps: expected"),
        ({"weight_decay": -1.0}, ValueError, "weight_decay: expected"),
        ({"tolerance": -1.0}, ValueError, "tolerance: expected"),
        ({"relative": -1.0}, ValueError, "relative: expected"),
        ({"min_steps": 1.5}, TypeError, "min_steps: expected"),
        ({"params": [nn.Parameter(torch.zeros(2, dtype=torch.complex128))]}, TypeError, "SWATS: .* is complex"),
    ],
)
def test_wrong_arguments(options, error, text):
    model, _, _ = problem()
    with pytest.raises(error, match=text):
        SWATS(**{"params": model.parameters(), **options})


def test_sparse_gradients_are_refused():
    model = nn.Embedding(5, 3, sparse=True)
    opt = SWATS(model.parameters())
    model(torch.tensor([1, 2])).sum().backward()
    with pytest.raises(TypeError, match=r"SWATS: .* is sparse"):
        opt.step()
