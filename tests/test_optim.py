"""The laws of the optimiser: a step is a solve, and what is saved, scaled, split or skipped does not change it."""

import contextlib
import copy
import io
import itertools
import warnings
from functools import partial

import oracle
import pytest
import torch
from sklearn.datasets import load_breast_cancer, load_diabetes
from torch import nn
from torch.nn.functional import cross_entropy, mse_loss

from nngeometry import (
    FIM,
    GGN,
    Accumulator,
    EmpiricalFisher,
    FIM_MonteCarlo,
    Hessian,
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
)
from nngeometry.blocks import Dense, Diag, Kron
from nngeometry.optim import LevenbergMarquardt, Rotated, SecondOrderOptimizer, Stale, Turned, VIOptimizer

MIXED = PMatMixed.of(PMatKFAC, {"2": PMatDense})
REPRESENTATIONS = [
    *(PMatDense, PMatBlockDiag, PMatDiag, PMatQuasiDiag, PMatKFAC, PMatEKFAC, PMatLowRank, PMatEye),
    MIXED,
]
MATRICES = [FIM, FIM_MonteCarlo, EmpiricalFisher, GGN]
PAIRS = [(M, R) for M in MATRICES for R in REPRESENTATIONS]
PAIRS += [(Hessian, R) for R in (PMatDense, PMatBlockDiag, PMatDiag)]
POLICIES = [1, 3, lambda step: step % 2 == 0, Stale(), Rotated(0.1), Turned(2)]


def name_of(value):
    return getattr(value, "__name__", type(value).__name__)


def net(seed=0):
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3))


def batches(*sizes, seed=1):
    g = torch.Generator().manual_seed(seed)
    return [(torch.randn(n, 4, generator=g), torch.randint(3, (n,), generator=g)) for n in sizes]


def made(model, representation=PMatKFAC, matrix=FIM, **options):
    if matrix is FIM_MonteCarlo:
        options.setdefault("generator", torch.Generator().manual_seed(5))
    return SecondOrderOptimizer(model, representation, matrix, **{"lr": 0.1, "damping": 0.5, **options})


def one(model, opt, batch, observe=True):
    opt.zero_grad()
    loss = cross_entropy(model(batch[0]), batch[1])
    loss.backward()
    if observe:
        opt.observe(batch)
    opt.step()
    return loss.item()


def values(model):
    return PVector.from_model(model).to_torch().detach().clone()


def run(model, opt, data):
    return [one(model, opt, batch) for batch in data]


# A step is a solve


@pytest.mark.parametrize(("matrix", "representation"), PAIRS, ids=name_of)
def test_a_step_is_a_solve_to_the_bit(matrix, representation):
    model, data = net(), batches(9, 7, 8)
    opt = made(model, representation, matrix, lr=1.0, momentum=0.0, refresh=1, decay=0.5)
    r = 2.0 if matrix is Hessian else 0.5
    for group in opt.param_groups:
        group["damping"] = r
    options = {"generator": torch.Generator().manual_seed(5)} if matrix is FIM_MonteCarlo else {}
    running = Accumulator(matrix, model, representation, **options)
    for k, batch in enumerate(data):
        before = values(model)
        running.decay(0.5).update(batch)
        if representation is PMatEKFAC and k:
            running.rebase()
        one(model, opt, batch)
        g = PVector.from_model_grad(model)
        d = running.matrix().solve(g, regul=r).to_torch()
        assert torch.equal(values(model), before - d)
        again = opt.matrix.solve(g, regul=r).to_torch()
        assert torch.equal(values(model), before - again)
        assert torch.equal(opt.accumulator.matrix().to_torch(), running.matrix().to_torch())


@pytest.mark.parametrize("preconditioner", [None, PMatKFAC, PMatDiag], ids=name_of)
@pytest.mark.parametrize("matrix", [*MATRICES, Hessian], ids=name_of)
def test_a_step_by_products_is_a_solve_with_the_last_minibatch(matrix, preconditioner):
    if matrix is Hessian and preconditioner is PMatKFAC:
        preconditioner = PMatBlockDiag
    model, data = net(), batches(9, 7)
    opt = made(model, PMatImplicit, matrix, lr=1.0, momentum=0.0, damping=1.0, preconditioner=preconditioner)
    for batch in data:
        before = values(model)
        generator = None if opt._generator is None else copy.deepcopy(opt._generator.get_state())
        options = {}
        if generator is not None:
            options["generator"] = torch.Generator()
            options["generator"].set_state(generator)
        at = copy.deepcopy(model)
        one(model, opt, batch)
        g = PVector.from_model_grad(model)
        F = matrix(at, batch, PMatDense, **options)
        d = F.solve(g, regul=1.0).to_torch()
        assert oracle.relative(before - values(model), d) < 1e-5
        guide = None if preconditioner is None else opt._running.matrix
        assert torch.equal(before - opt.matrix.solve(g, 1.0, preconditioner=guide).to_torch(), values(model))


@pytest.mark.parametrize("representation", [PMatDense, PMatBlockDiag, PMatKFAC, PMatDiag], ids=name_of)
def test_the_whole_formula(representation):
    """l2, momentum, decoupled weight decay and the clip, each of its own size in each layer."""
    model, data = net(), batches(9, 7, 8, 6)
    opt = made(model, representation, lr=0.3, refresh=1, clip=0.015)
    options = {
        "0": {"lr": 0.3, "damping": 0.4, "momentum": 0.8, "weight_decay": 0.01, "l2": 0.02},
        "2": {"lr": 0.2, "damping": 0.6, "momentum": 0.5, "weight_decay": 0.03, "l2": 0.01},
    }
    for group in opt.param_groups:
        group.update(options[group["name"]])
    spread = {
        k: torch.cat([torch.full((25,), options["0"][k]), torch.full((18,), options["2"][k])]) for k in options["0"]
    }
    lr = spread["lr"]
    m, clipped = torch.zeros(43), 0
    running = Accumulator(FIM, model, representation)
    for batch in data:
        w = values(model)
        running.decay(0.95).update(batch)
        F = running.matrix().to_torch()
        one(model, opt, batch)
        g = PVector.from_model_grad(model).to_torch() + spread["l2"] * w
        d = torch.linalg.solve(F + torch.diag(spread["damping"] + spread["l2"]), g)
        size = float((lr * g) @ (lr * d))
        clipped += size > 0.015
        d = d * min(1, (0.015 / size) ** 0.5)
        m = spread["momentum"] * m + d
        assert oracle.relative(values(model), w - lr * (m + spread["weight_decay"] * w)) < 1e-11
    assert clipped > 0


@pytest.mark.parametrize("groups", [1, 2])
def test_factored_damping(groups):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(2, 4, 2, groups=groups), nn.Flatten(), nn.Linear(16, 3))
    x, y = torch.randn(6, 2, 3, 3), torch.randint(3, (6,))
    opt = SecondOrderOptimizer(model, PMatKFAC, FIM, lr=1.0, momentum=0.0, damping=0.1, factored=True)
    w = values(model)
    cross_entropy(model(x), y).backward()
    opt.observe((x, y))
    g = PVector.from_model_grad(model)
    F = FIM(model, (x, y), PMatKFAC)
    opt.step()
    expected = []
    for part in F.root.parts:
        G, A = (
            factor.to_dense().reshape(k, -1, k, factor.shape[-1]).diagonal(dim1=0, dim2=2).movedim(-1, 0)
            for factor, k in ((part.block.left, part.block.shape[0]), (part.block.right, part.block.shape[0]))
        )
        pieces = []
        for k, V in enumerate(part.take(g.to_torch())):
            pi = ((A[k].trace() / len(A[k])) / (G[k].trace() / len(G[k]))).sqrt()
            left = torch.linalg.inv(G[k] + 0.1**0.5 / pi * torch.eye(len(G[k])))
            right = torch.linalg.inv(A[k] + 0.1**0.5 * pi * torch.eye(len(A[k])))
            pieces.append(left @ V @ right)
        expected += part.give(torch.stack(pieces))
    d = torch.cat([piece for _, piece in sorted(expected, key=lambda pair: pair[0])])
    assert oracle.relative(w - values(model), d) < 1e-11


@pytest.mark.parametrize("representation", [PMatDense, PMatBlockDiag, PMatDiag, PMatImplicit], ids=name_of)
def test_absolute_values_of_a_hessian(representation):
    model, (batch,) = net(3), batches(12)
    with torch.no_grad():
        for p in model.parameters():
            p.mul_(3)
    opt = made(model, representation, Hessian, lr=1.0, momentum=0.0, damping=0.1, absolute=True)
    held = PMatDense if representation is PMatImplicit else representation
    H = Hessian(model, batch, held).to_torch()
    l, q = torch.linalg.eigh(H)
    assert l[0] < -1e-3
    w = values(model)
    one(model, opt, batch)
    d = (q / (l.abs() + 0.1)) @ q.T @ PVector.from_model_grad(model).to_torch()
    assert oracle.relative(w - values(model), d) < 1e-7


# The numbers of textbooks


def test_one_step_is_least_squares():
    X, y = load_diabetes(return_X_y=True)
    X, y = torch.tensor(X), torch.tensor(y)
    Y = torch.stack([y, y.square() / 100], 1)
    Y = (Y - Y.mean(0)) / Y.std(0)
    X = X / X.std(0)
    torch.manual_seed(0)
    model = nn.Linear(10, 2)
    opt = SecondOrderOptimizer(model, PMatDense, FIM, lr=1.0, momentum=0.0, damping=0.0, variant="regression")
    (0.5 * (model(X) - Y).square().sum(1).mean()).backward()
    opt.observe((X, Y))
    opt.step()
    design = torch.cat([X, torch.ones(len(X), 1)], 1)
    exact = torch.linalg.lstsq(design, Y, driver="gelsd").solution.T
    assert oracle.relative(torch.cat([model.weight, model.bias.unsqueeze(1)], 1), exact) < 1e-12


def test_newton_converges_quadratically():
    X, y = load_breast_cancer(return_X_y=True)
    X, y = torch.tensor(X)[:, :10], torch.tensor(y).double().unsqueeze(1)
    X = (X - X.mean(0)) / X.std(0)
    torch.manual_seed(0)
    model = nn.Linear(10, 1)
    loss = nn.BCEWithLogitsLoss()
    opt = SecondOrderOptimizer(
        model, PMatDense, GGN, lr=1.0, momentum=0.0, damping=0.0, decay=0.0, refresh=1, loss=loss
    )
    norms = []
    for _ in range(14):
        opt.zero_grad()
        loss(model(X), y).backward()
        opt.observe((X, y))
        opt.step()
        norms.append(float(PVector.from_model_grad(model).norm()))
    assert norms[-1] < 1e-14
    (k,) = [k for k, norm in enumerate(norms) if norm < 1e-6][:1]
    assert norms[k + 1] < 1e-10


@pytest.mark.parametrize("representation", [PMatDense, PMatKFAC, PMatDiag, PMatEKFAC], ids=name_of)
@pytest.mark.parametrize("c", [1e-3, 7.0])
def test_scaling_the_loss_and_the_damping_changes_nothing(representation, c):
    curves = []
    for scale in (1.0, c):
        model = net()

        def loss(f, y, scale=scale):
            return scale * cross_entropy(f, y, reduction="none")

        opt = made(model, representation, GGN, damping=0.1 * scale, loss=loss, refresh=2)
        curve = []
        for x, y in batches(20, 20, 20, 20, 20):
            opt.zero_grad()
            value = loss(model(x), y).mean()
            value.backward()
            opt.observe((x, y))
            opt.step()
            curve.append(value.item() / scale)
        curves.append(torch.tensor(curve))
    assert oracle.relative(curves[1], curves[0]) < 1e-12


@pytest.mark.parametrize("representation", REPRESENTATIONS, ids=name_of)
@pytest.mark.parametrize("matrix", [FIM, EmpiricalFisher, GGN], ids=name_of)
def test_a_minibatch_twice_is_the_same_update(matrix, representation):
    ends = []
    for times in (1, 2):
        model = net()
        data = [(x.repeat(times, 1), y.repeat(times)) for x, y in batches(9, 7, 8)]
        run(model, made(model, representation, matrix), data)
        ends.append(values(model))
    assert oracle.relative(ends[1], ends[0]) < 1e-10


def test_kfac_does_not_see_an_affine_change_of_the_inputs():
    X, y = load_diabetes(return_X_y=True)
    x, y = torch.tensor(X[:200]) * 20, torch.tensor(y[:200]).unsqueeze(1) / 100
    g = torch.Generator().manual_seed(0)
    A, b = torch.randn(10, 10, generator=g) + torch.eye(10), torch.randn(10, generator=g)
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(10, 8), nn.Tanh(), nn.Linear(8, 1))
    other = copy.deepcopy(model)
    with torch.no_grad():
        inverse = torch.linalg.inv(A)
        other[0].weight.copy_(model[0].weight @ inverse)
        other[0].bias.copy_(model[0].bias - other[0].weight @ b)

    def curve(net, inputs, opt, observe=True):
        out = []
        for _ in range(30):
            opt.zero_grad()
            loss = mse_loss(net(inputs), y)
            out.append(loss.item())
            loss.backward()
            if observe:
                opt.observe((inputs, y))
            opt.step()
        return torch.tensor(out)

    def kfac(net):
        return SecondOrderOptimizer(
            net, PMatKFAC, FIM, lr=0.05, momentum=0.9, damping=1e-20, refresh=1, variant="regression"
        )

    pairs = ((copy.deepcopy(model), x), (copy.deepcopy(other), x @ A.T + b))
    one, two = (curve(net, inputs, kfac(net)) for net, inputs in pairs)
    assert oracle.relative(two, one) < 1e-5
    assert one[-1] < one[0] / 2
    nets = ((copy.deepcopy(model), x), (copy.deepcopy(other), x @ A.T + b))
    one, two = (curve(net, inputs, torch.optim.SGD(net.parameters(), 1e-2), False) for net, inputs in nets)
    assert oracle.relative(two, one) > 1e-2, "gradient descent does"


# What is saved


@pytest.mark.parametrize("policy", POLICIES, ids=name_of)
@pytest.mark.parametrize("representation", [*REPRESENTATIONS, PMatImplicit], ids=name_of)
def test_saved_at_step_7_the_next_5_are_the_same_to_the_bit(representation, policy):
    data = batches(*[8] * 12)
    model = net()
    options = {"representation": representation, "matrix": FIM_MonteCarlo, "refresh": policy, "momentum": 0.5}
    if representation is PMatImplicit:
        options["preconditioner"] = PMatKFAC
    opt = made(model, **options)
    run(model, opt, data[:7])
    file = io.BytesIO()
    torch.save({"model": model.state_dict(), "opt": opt.state_dict()}, file)
    expected = run(model, opt, data[7:])
    file.seek(0)
    saved = torch.load(file, weights_only=True)
    again = net(9)
    again.load_state_dict(saved["model"])
    other = made(again, **{**options, "generator": torch.Generator().manual_seed(77)})
    other.load_state_dict(saved["opt"])
    assert run(again, other, data[7:]) == expected
    assert torch.equal(values(again), values(model))
    assert other.refresh_fraction == opt.refresh_fraction
    assert other.intervals == opt.intervals


def test_saved_between_observe_and_step():
    (first, second), model = batches(8, 9), net()
    opt = made(model, momentum=0.0)
    one(model, opt, first)
    opt.zero_grad()
    cross_entropy(model(second[0]), second[1]).backward()
    opt.observe(second)
    again = copy.deepcopy(model)
    other = made(again, momentum=0.0)
    other.load_state_dict(opt.state_dict())
    for p, q in zip(again.parameters(), model.parameters(), strict=True):
        p.grad = q.grad.clone()
    opt.step()
    other.step()
    assert torch.equal(values(again), values(model))
    assert other.accumulator.n == opt.accumulator.n


def test_the_damping_and_the_quadratic_step_are_saved():
    data = batches(*[8] * 9)

    def steps(model, opt, data):
        for x, y in data:

            def closure(x=x, y=y):
                opt.zero_grad()
                loss = cross_entropy(model(x), y)
                loss.backward()
                return loss

            opt.observe((x, y))
            opt.step(closure)

    def fresh(model):
        damping = LevenbergMarquardt(0.3, every=2, omega=0.8)
        return made(model, matrix=FIM_MonteCarlo, lr="quadratic", damping=damping)

    model = net()
    opt = fresh(model)
    steps(model, opt, data[:4])
    again, saved = copy.deepcopy(model), copy.deepcopy(opt.state_dict())
    assert saved["param_groups"][0]["damping"] != 0.3
    steps(model, opt, data[4:])
    other = fresh(again)
    other.load_state_dict(saved)
    steps(again, other, data[4:])
    assert torch.equal(values(again), values(model))


def test_a_state_of_something_else_is_refused_and_nothing_changes():
    model = net()
    opt = made(model)
    one(model, opt, *batches(8))
    before = opt.matrix.to_torch()
    for other, message in (
        (torch.optim.SGD(net().parameters(), 0.1), "SecondOrderOptimizer"),
        (made(net(), PMatDiag), "representation"),
        (made(net(), matrix=EmpiricalFisher), "matrix"),
        (made(net(), PMatImplicit), "PMatImplicit"),
    ):
        with pytest.raises(ValueError, match=message):
            opt.load_state_dict(other.state_dict())
        assert torch.equal(opt.matrix.to_torch(), before)
    with pytest.raises(TypeError, match="state_dict"):
        copy.deepcopy(opt)


# What is split, scaled or skipped


@pytest.mark.parametrize("representation", [r for r in REPRESENTATIONS if r is not PMatEKFAC], ids=name_of)
@pytest.mark.parametrize("matrix", [FIM, EmpiricalFisher, GGN], ids=name_of)
def test_minibatches_in_pieces_are_the_whole(matrix, representation):
    ends = []
    for sizes in ((12,), (5, 4, 3)):
        model = net()
        opt = made(model, representation, matrix)
        for x, y in batches(12, 12, 12):
            opt.zero_grad()
            for a, b in zip(x.split(sizes), y.split(sizes), strict=True):
                (cross_entropy(model(a), b) * len(a) / 12).backward()
                assert opt.observe((a, b))
            opt.step()
        ends.append(values(model))
        assert opt.accumulator.n == pytest.approx(12 * (1 + 0.95 + 0.95**2))
    assert oracle.relative(ends[1], ends[0]) < 1e-10


def scaled_run(scaler, poisoned=(), clip=None, representation=PMatKFAC):
    model = net().float()
    opt = made(model, representation, FIM_MonteCarlo)
    counts = []
    for k, (x, y) in enumerate(batches(*[8] * 6)):
        x = x.float()
        opt.zero_grad()
        scaler.scale(cross_entropy(model(x), y)).backward()
        opt.observe((x, y))
        if k in poisoned:
            model[0].weight.grad[0, 0] = float("inf")
        if clip is not None:
            scaler.unscale_(opt)
            nn.utils.clip_grad_norm_(model.parameters(), clip)
        before = values(model), copy.deepcopy(opt.state_dict())
        scaler.step(opt)
        scaler.update()
        if k in poisoned:
            assert torch.equal(values(model), before[0])
        counts.append(opt.accumulator.n)
    return values(model), counts


@pytest.mark.parametrize("clip", [None, 0.3])
@pytest.mark.parametrize("representation", [PMatKFAC, PMatDense], ids=name_of)
def test_a_scaled_run_is_the_unscaled_one(clip, representation):
    plain, _ = scaled_run(torch.amp.GradScaler("cpu", enabled=False), (), clip, representation)
    scaled, _ = scaled_run(torch.amp.GradScaler("cpu", init_scale=2.0**10), (), clip, representation)
    assert oracle.relative(scaled, plain) < 1e-6


@pytest.mark.parametrize("clip", [None, 0.3])
def test_a_skipped_step_leaves_all_averages_as_they_were(clip):
    _, counts = scaled_run(torch.amp.GradScaler("cpu", init_scale=4.0), (2, 3), clip)
    _, expected = scaled_run(torch.amp.GradScaler("cpu", init_scale=4.0), (), clip)
    assert counts[:2] + counts[4:] == expected[:4]
    assert counts[2] == counts[3] == counts[1]


def test_a_skipped_step_is_no_step():
    """The run goes on as if the minibatch had not come."""
    scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
    ends = []
    for poisoned in (False, True):
        model = net()
        opt = made(model, refresh=2)
        for k, (x, y) in enumerate(batches(*[8] * 5)):
            if k == 2 and not poisoned:
                continue
            opt.zero_grad()
            scaler.scale(cross_entropy(model(x), y)).backward()
            opt.observe((x, y))
            if k == 2:
                model[2].bias.grad[0] = float("nan")
            scaler.step(opt)
            scaler.update()
        ends.append((values(model), opt.state_dict()["curvature"]["steps"]))
    assert torch.equal(ends[0][0], ends[1][0])
    assert ends[0][1] == ends[1][1] == 4


def test_curvature_is_not_in_half_precision():
    model, (batch,) = net().float(), batches(8)
    batch = batch[0].float(), batch[1]
    opt = made(model)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = cross_entropy(model(batch[0]), batch[1])
        opt.observe(batch)
    loss.backward()
    opt.step()
    assert opt.matrix.dtype == torch.float32
    reference = net().float()
    assert torch.equal(FIM(reference, batch, PMatKFAC).to_torch(), opt.accumulator.matrix().to_torch())


def test_a_model_in_half_precision():
    model, data = net().to(torch.bfloat16), batches(8, 8, 8)
    opt = made(model)
    for x, y in data:
        one(model, opt, (x.to(torch.bfloat16), y))
    assert opt.matrix.dtype == torch.float32
    assert all(p.dtype == torch.bfloat16 and bool(p.isfinite().all()) for p in model.parameters())


# What people have around it


def test_schedulers_hooks_and_clipping():
    model, data = net(), batches(*[8] * 4)
    opt = made(model, lr=0.4, momentum=0.0)
    scheduler = torch.optim.lr_scheduler.StepLR(opt, 2, 0.5)
    calls = []
    opt.register_step_pre_hook(lambda *_: calls.append("before"))
    opt.register_step_post_hook(lambda *_: calls.append("after"))
    sizes = []
    for batch in data:
        w = values(model)
        opt.zero_grad()
        cross_entropy(model(batch[0]), batch[1]).backward()
        total = nn.utils.clip_grad_norm_(model.parameters(), 1e-2)
        assert total > 1e-2
        opt.observe(batch)
        opt.step()
        g = PVector.from_model_grad(model)
        assert g.norm() < 1.01e-2
        sizes.append(float(((w - values(model)) / opt.matrix.solve(g, 0.5).to_torch()).mean()))
        scheduler.step()
    assert sizes == pytest.approx([0.4, 0.4, 0.2, 0.2])
    assert calls == ["before", "after"] * 4
    opt.zero_grad()
    assert all(p.grad is None for p in model.parameters())


def test_parameters_outside_of_the_collection_are_stepped_plainly_with_one_notice():
    model, data = net(), batches(8, 8, 8)
    with pytest.warns(UserWarning, match="gradient alone: 2.weight, 2.bias") as told:
        opt = made(model, layer_collection=LayerCollection.from_model(model, "0"), momentum=0.5, l2=0.1)
    assert len(told) == 1
    assert [group["name"] for group in opt.param_groups] == ["0", None]
    twin = net()
    sgd = torch.optim.SGD(twin[2].parameters(), 0.1, momentum=0.5, weight_decay=0.1)
    for batch in data:
        twin[0].load_state_dict(model[0].state_dict())
        twin.zero_grad()
        cross_entropy(twin(batch[0]), batch[1]).backward()
        sgd.step()
        one(model, opt, batch)
        assert oracle.relative(model[2].weight, twin[2].weight) < 1e-13


def test_a_group_that_is_added_is_stepped():
    model = net()
    extra = nn.Parameter(torch.ones(3))
    opt = made(model)
    with pytest.warns(UserWarning, match="a group that was added"):
        opt.add_param_group({"params": [extra], "lr": 0.5})
    ((x, y),) = batches(8)
    cross_entropy(model(x) + extra * 0 + extra, y).backward()
    opt.observe((x, y))
    opt.step()
    assert torch.allclose(extra, 1 - 0.5 * extra.grad)
    saved = opt.state_dict()
    opt.load_state_dict(saved)
    with pytest.raises(ValueError, match="lr"):
        opt.add_param_group({"params": [nn.Parameter(torch.ones(1))], "lr": -1.0})


def test_batch_norm_in_training_where_matrices_know_it():
    model = nn.Sequential(nn.Linear(4, 5), nn.BatchNorm1d(5), nn.Linear(5, 3))
    told = []

    def matrix(model, loader, representation, *, batch_statistics=False, **options):
        told.append(batch_statistics)
        return FIM(model, loader, representation, **options)

    made(model, matrix=matrix)
    made(net(), matrix=matrix)
    made(model, matrix=partial(matrix, batch_statistics=False))
    made(model.eval(), matrix=matrix)
    assert told == [True, False, False, False]


@pytest.mark.parametrize("representation", [PMatKFAC, PMatDiag, PMatDense], ids=name_of)
def test_batch_norm_in_training(representation):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 5), nn.BatchNorm1d(5), nn.Tanh(), nn.Linear(5, 3))
    opt = made(model, representation, FIM, refresh=1, momentum=0.0, lr=1.0)
    counts = []
    for batch in batches(12, 10):
        F = FIM(model, batch, representation, batch_statistics=True)
        w = values(model)
        one(model, opt, batch)
        counts.append(int(model[1].num_batches_tracked))
        if len(counts) == 1:
            d = F.solve(PVector.from_model_grad(model), 0.5).to_torch()
            assert torch.equal(values(model), w - d)
    assert counts == [1, 2], "what is observed leaves no trace in the running statistics"


# When blocks are taken into use


def test_intervals_of_statistics_that_do_not_change():
    policy, memory, step, refreshed = Stale(0.1), {}, 0, []
    block = Kron(Dense(torch.eye(3).unsqueeze(0)), Dense(torch.eye(2).unsqueeze(0)))
    policy.renew(block, None, 0, memory)
    refreshed.append(0)
    for step in range(1, 40):
        if policy.due(step, memory):
            policy.renew(block, None, step, memory)
            refreshed.append(step)
    assert [b - a for a, b in itertools.pairwise(refreshed)] == [1, 2, 3, 5, 8, 13]


def test_intervals_after_a_shock_are_halved_and_grow_again():
    policy, memory, intervals = Stale(0.1), {}, []
    for k in range(14):
        X = Diag(torch.ones(3) * (1 if k < 5 else 2 if k < 6 else 3))
        policy.renew(X, None, 100 * k, memory)
        intervals += memory["d1"]
    # 3 is not similar to 2, which was not similar to 1; then X1 is similar, X2 is not: as long as before
    assert intervals == [1, 2, 3, 5, 8, 4, 2, 2, 4, 6, 10, 16, 26, 42]
    bounded, memory = Stale(0.1, most=4), {}
    for k in range(9):
        bounded.renew(Diag(torch.ones(3)), None, 100 * k, memory)
    assert memory["d1"] == [4]


@pytest.mark.parametrize("representation", REPRESENTATIONS, ids=name_of)
def test_stale_on_constant_statistics(representation):
    model, (batch,) = net(), batches(8)
    opt = made(model, representation, lr=0.0, refresh=Stale(0.1))
    steps = []
    for k in range(20):
        before = opt.matrix
        one(model, opt, batch)
        if opt.matrix is not before:
            steps.append(k)
    assert steps == [0, 1, 3, 6, 11, 19]
    assert opt.refresh_fraction == pytest.approx(6 / 20)
    assert set(opt.intervals) == {"0", "2"}


def test_each_layer_has_an_interval_of_its_own():
    model, data = net(), batches(*[30] * 30)
    opt = made(model, lr=0.1, refresh=Stale(0.2))
    used, intervals = [], []
    for x, y in data:
        one(model, opt, (x * (1 + 0.5 * torch.rand(())), y))
        intervals.append(opt.intervals)
        used.append([part.block for part in opt.matrix.root.parts])
    changes = [[k for k in range(1, 30) if used[k][i] is not used[k - 1][i]] for i in range(2)]
    assert changes[0] != changes[1]
    assert any(a != b for at in intervals for a, b in [at["0"]]), "and each factor"


def test_rotated_decomposes_when_the_eigenvectors_turn():
    model, data = net(), batches(*[40] * 12)
    never = made(model, lr=0.0, refresh=Rotated(10.0), decay=0.5)
    run(model, never, data)
    assert never.refresh_fraction == pytest.approx(1 / 12)
    running, basis = never.accumulator.matrix().root.parts[0].block, never.matrix.root.parts[0].block.basis
    q = basis.to_dense()
    assert (
        oracle.relative(never.matrix.root.parts[0].block.to_dense(), q @ torch.diag(_factorwise(running, basis)) @ q.T)
        < 1e-12
    )
    always = made(model, lr=0.0, refresh=Rotated(0.0), decay=0.5)
    run(model, always, data)
    assert always.refresh_fraction == 1.0
    assert oracle.relative(always.matrix.to_torch(), always.accumulator.matrix().to_torch()) < 1e-12
    some = made(model, lr=0.0, refresh=Rotated(0.1), decay=0.5)
    run(model, some, data)
    assert 1 / 12 < some.refresh_fraction < 1


def _factorwise(running, basis):
    l = [
        torch.diagonal(b.to_dense().T @ f.to_dense() @ b.to_dense())
        for f, b in ((running.left, basis.left), (running.right, basis.right))
    ]
    return torch.outer(*l).flatten()


@pytest.mark.parametrize("representation", [PMatKFAC, PMatEKFAC], ids=name_of)
def test_turns_tend_to_the_decomposition(representation):
    model, (batch,) = net(), batches(300)
    opt = made(model, representation, lr=0.0, refresh=Turned(1))
    run(model, opt, [(batch[0] * torch.tensor([1.0, 2.0, 3.0, 4.0]), batch[1])])
    other = batch[0] * torch.tensor([4.0, 1.0, 2.0, 3.0]), batch[1]
    distances = []
    exact = Accumulator(FIM, model, PMatKFAC)
    exact.update((batch[0] * torch.tensor([1.0, 2.0, 3.0, 4.0]), batch[1]))
    for _ in range(60):
        one(model, opt, other)
        exact.decay(0.95).update(other)
        if representation is PMatKFAC:
            distances.append(oracle.relative(opt.matrix.to_torch(), exact.matrix().to_torch()))
    if representation is PMatKFAC:
        assert distances[-1] < 0.02 * max(distances)
    assert opt.refresh_fraction == pytest.approx(1 / 61)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("rank", [3, 8])
def test_turns_keep_a_decomposition_of_what_stays_and_follow_what_moves(rank, dtype):
    """Also where eigenvalues are zero, or orders of magnitude apart."""
    g = torch.Generator().manual_seed(0)
    rows = torch.randn(2, rank, 8, generator=g) * torch.logspace(0, -3, rank).unsqueeze(-1)
    block = Dense((rows.mT @ rows).to(dtype))
    turned, exact = block.eig(), block.to_dense()
    for _ in range(10):
        turned = block.turned(turned.basis)
        assert oracle.relative(turned.to_dense(), exact) < 100 * torch.finfo(dtype).eps
    for _ in range(10):
        rows = rows + 0.02 * torch.randn(rows.shape, generator=g) * torch.logspace(0, -3, rank).unsqueeze(-1)
        block = Dense((rows.mT @ rows).to(dtype))
        turned = block.turned(turned.basis)
        assert oracle.relative(turned.to_dense(), block.to_dense()) < 0.05


def test_a_schedule():
    model, data = net(), batches(*[8] * 12)
    opt = made(model, refresh=lambda step: 1 if step < 4 else 3)
    used = []
    for batch in data:
        before = opt.matrix
        one(model, opt, batch)
        used.append(opt.matrix is not before)
    assert [k for k, new in enumerate(used) if new] == [0, 1, 2, 3, 6, 9]
    assert opt.refresh_fraction == 0.5


def test_observing_seldom():
    model, data = net(), batches(*[8] * 9)
    opt = made(model, observe_every=3, refresh=1)
    due = []
    for batch in data:
        opt.zero_grad()
        cross_entropy(model(batch[0]), batch[1]).backward()
        due.append(opt.observe(batch))
        opt.step()
    assert due == [True, False, False] * 3
    assert opt.refresh_fraction == pytest.approx(1 / 3), "nothing new, nothing to decompose"


# Damping and steps by the quadratic model


def test_the_damping_follows_the_ratio():
    lm = LevenbergMarquardt(1.0, every=2, omega=0.5, least=0.1, most=10.0)
    assert lm.updated(1.0, 0.9) == 0.25
    assert lm.updated(1.0, 0.5) == 1.0
    assert lm.updated(1.0, 0.1) == 4.0
    assert lm.updated(1.0, float("nan")) == 4.0
    assert lm.updated(9.0, 0.0) == 10.0
    assert lm.updated(0.2, 0.8) == 0.1


@pytest.mark.parametrize("l2", [0.0, 0.1])
def test_levenberg_marquardt_looks_at_loss_and_model(l2):
    model, data = net(), batches(*[8] * 6)
    opt = made(model, PMatKFAC, GGN, lr=0.7, momentum=0.3, l2=l2, damping=LevenbergMarquardt(0.2, every=1, omega=0.9))
    for x, y in data:
        w, damping = values(model), opt.param_groups[0]["damping"]
        G = GGN(model, (x, y), PMatDense).to_torch() + (damping + l2) * torch.eye(43)
        loss = cross_entropy(model(x), y)
        opt.zero_grad()
        loss.backward()
        opt.observe((x, y))
        grads = [p.grad.clone() for p in model.parameters()]
        opt.step(lambda x=x, y=y: cross_entropy(model(x), y))
        assert all(torch.equal(p.grad, g) for p, g in zip(model.parameters(), grads, strict=True))
        s, g = values(model) - w, PVector.from_model_grad(model).to_torch() + l2 * w
        after = cross_entropy(model(x), y) + l2 / 2 * values(model).square().sum()
        rho = ((after - loss - l2 / 2 * w.square().sum()) / (g @ s + 0.5 * s @ G @ s)).item()
        assert opt.param_groups[0]["damping"] == pytest.approx(opt.levenberg.updated(damping, rho))


def test_a_step_that_raises_the_loss_is_taken_back():
    model, (batch,) = net(), batches(8)
    opt = made(model, PMatKFAC, GGN, lr=1e4, momentum=0.0, damping=LevenbergMarquardt(1e-3, reject=True))

    def closure():
        opt.zero_grad()
        loss = cross_entropy(model(batch[0]), batch[1])
        loss.backward()
        return loss

    w = values(model)
    opt.observe(batch)
    before = opt.step(closure)
    assert torch.equal(values(model), w)
    assert opt.param_groups[0]["damping"] > 1e-3
    assert before.item() == cross_entropy(model(batch[0]), batch[1]).item()


def test_the_quadratic_step_is_the_minimum_of_the_model():
    model, data = net(), batches(*[8] * 4)
    opt = made(model, PMatDiag, GGN, lr="quadratic", damping=0.1, l2=0.05)
    previous = None
    for batch in data:
        w = values(model)
        G = GGN(model, batch, PMatDense).to_torch() + 0.15 * torch.eye(43)
        one(model, opt, batch)
        g = PVector.from_model_grad(model).to_torch() + 0.05 * w
        d = opt.matrix.solve(PVector(opt.layer_collection, g), 0.15).to_torch()
        U = torch.stack([d] if previous is None else [d, previous], 1)
        expected = -U @ torch.linalg.solve(U.T @ G @ U, U.T @ g)
        previous = values(model) - w
        assert oracle.relative(previous, expected) < 1e-10
    assert opt.param_groups[0]["lr"] == 1.0


def test_the_exact_matrix_and_the_quadratic_step_are_newton():
    """On a quadratic loss one step reaches the minimum."""
    torch.manual_seed(0)
    model, x, y = nn.Linear(4, 2), torch.randn(20, 4), torch.randn(20, 2)
    opt = SecondOrderOptimizer(model, PMatEye, GGN, lr="quadratic", damping=0.0, refresh=1, loss=nn.MSELoss())
    losses = []
    for _ in range(40):  # conjugate gradients, in effect: 10 parameters
        opt.zero_grad()
        loss = mse_loss(model(x), y)
        loss.backward()
        opt.observe((x, y))
        opt.step()
        losses.append(loss.item())
    design = torch.cat([x, torch.ones(20, 1)], 1)
    best = mse_loss(design @ torch.linalg.lstsq(design, y).solution, y)
    assert losses[12] - float(best) < 1e-12


# What is told


def test_a_step_without_observe():
    model, ((x, y),) = net(), batches(8)
    opt = made(model)
    cross_entropy(model(x), y).backward()
    with pytest.raises(ValueError, match=r"call observe\(minibatch\) before step"):
        opt.step()


def test_a_minibatch_of_another_shape():
    model, ((x, y),) = net(), batches(8)
    opt = made(model)
    one(model, opt, (x, y))
    before = opt.accumulator.n
    with pytest.raises(ValueError, match=r"observe: .*\(8, 5\)"):
        opt.observe((torch.randn(8, 5), y))
    assert opt.accumulator.n == before
    opt = made(model)
    with pytest.raises(Exception, match="shape"):
        opt.observe((torch.randn(8, 5), y))


@pytest.mark.parametrize("representation", [PMatDense, PMatBlockDiag, PMatDiag], ids=name_of)
def test_damping_that_leaves_a_hessian_indefinite(representation):
    model, (batch,) = net(3), batches(12)
    with torch.no_grad():
        for p in model.parameters():
            p.mul_(3)
    opt = made(model, representation, Hessian, damping=1e-6)
    cross_entropy(model(batch[0]), batch[1]).backward()
    opt.observe(batch)
    w = values(model)
    with pytest.raises(ValueError, match=r"layer '0'.*more damping.*absolute"):
        opt.step()
    assert torch.equal(values(model), w)


def test_a_gradient_that_is_missing():
    model, (batch,) = net(), batches(8)
    opt = made(model)
    opt.observe(batch)
    with pytest.raises(ValueError, match=r"'0.weight' has no gradient"):
        opt.step()


def test_a_model_that_has_changed():
    (batch,) = batches(8)
    for change, message in (
        (lambda m: m.__setitem__(2, nn.Linear(5, 3)), "'2.weight' is another one"),
        (lambda m: m.append(nn.Linear(3, 3)), "'3.weight' is new"),
        (lambda m: m.float(), "dtype"),
    ):
        model = net()
        opt = made(model)
        one(model, opt, batch)
        change(model)
        with pytest.raises(ValueError, match=f"observe: the model has changed .*{message}"):
            opt.observe(batch)
        with pytest.raises(ValueError, match="step: the model has changed"):
            opt.step()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"lr": -1.0}, "lr"),
        ({"lr": "best"}, "quadratic"),
        ({"damping": -1.0}, "damping"),
        ({"momentum": "much"}, "momentum"),
        ({"decay": 2.0}, "decay"),
        ({"refresh": 0}, "refresh"),
        ({"refresh": Stale}, "refresh"),
        ({"observe_every": 0}, "observe_every"),
        ({"clip": 0.0}, "clip"),
        ({"factored": True, "refresh": Rotated()}, "factored"),
        ({"factored": True, "representation": PMatImplicit}, "factored"),
        ({"preconditioner": PMatDiag}, "preconditioner"),
        ({"sharin": "reduce"}, "sharing"),
        ({"representation": "kfac"}, "representation"),
        ({"matrix": PMatKFAC}, "matrix"),
    ],
    ids=lambda v: str(v)[:40],
)
def test_arguments(options, message):
    with pytest.raises((ValueError, TypeError), match=message):
        made(net(), **options)


def test_levenberg_marquardt_needs_a_closure_and_the_minibatch():
    model, (batch,) = net(), batches(8)
    opt = made(model, damping=LevenbergMarquardt(1.0))
    opt.observe(batch)
    with pytest.raises(ValueError, match="closure"):
        opt.step()
    opt = made(model, matrix=GGN, lr="quadratic")
    one(model, opt, batch)
    with pytest.raises(ValueError, match="before every step"):
        one(model, opt, batch, observe=False)


@pytest.mark.parametrize("factored", [False, True])
@pytest.mark.parametrize("representation", [PMatDense, PMatKFAC, PMatDiag, PMatEKFAC], ids=name_of)
def test_damping_below_the_precision_is_told_once_and_steps_go_down(representation, factored):
    model, (x, y) = net().float(), batches(30)[0]
    x = 3e3 * x.float()
    opt = made(model, representation, GGN, lr=1e-7, damping=1e-9, refresh=1, factored=factored)
    with pytest.warns(UserWarning, match=r"damping is below what torch.float32 resolves.*'0'") as told:
        run(model, opt, [(x, y)] * 3)
    assert len([w for w in told if "resolves" in str(w.message)]) == 1
    assert bool(values(model).isfinite().all())


def test_no_damping_of_a_singular_matrix_is_refused():
    model, (batch,) = net(), batches(3)
    opt = made(model, PMatDense, damping=0.0)
    with pytest.raises(ValueError, match=r"step: the matrix of layer '0', '2' is singular.*use some damping"):
        one(model, opt, batch)


def drawn(model, representation=PMatKFAC, matrix=FIM, **options):
    generator = torch.Generator().manual_seed(3)
    return VIOptimizer(model, representation, matrix, num_data=20, lr=0.1, generator=generator, **options)


def gradients(model, opt, batch, poison=None):
    """What comes before a step."""
    opt.zero_grad()
    with opt.sampled() if isinstance(opt, VIOptimizer) else contextlib.nullcontext():
        cross_entropy(model(batch[0]), batch[1]).backward()
        opt.observe(batch)
    if poison is not None:
        poison.grad.view(-1)[0] = float("nan")


@pytest.mark.parametrize("make", [made, drawn], ids=["second order", "variational"])
@pytest.mark.parametrize("name", ["2.bias", "0.weight"])
@pytest.mark.parametrize("part", [None, "2"], ids=["all", "one layer"])
def test_gradients_that_are_not_finite_are_told_and_their_minibatch_does_not_count(make, name, part):
    (first, second, third), model = batches(8, 9, 7), net()
    options = {} if part is None else {"layer_collection": LayerCollection.from_model(model, part)}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        opt = make(model, **options)
    gradients(model, opt, first)
    opt.step()
    before, n = values(model), opt.accumulator.n
    gradients(model, opt, second, model.get_parameter(name))
    with pytest.raises(ValueError, match=f"step: the gradient of parameter '{name}' has NaN .* no step is made"):
        opt.step()
    assert torch.equal(values(model), before)
    assert opt.accumulator.n == n
    gradients(model, opt, third)
    opt.step()
    assert opt.accumulator.n == pytest.approx(0.95 * n + 7)


@pytest.mark.parametrize("make", [made, drawn], ids=["second order", "variational"])
def test_layers_that_are_frozen_or_thawed(make):
    (batch,) = batches(8)
    model = net()
    model[0].requires_grad_(False)
    opt = make(model)
    gradients(model, opt, batch)
    opt.step()
    model[0].requires_grad_(True)
    with pytest.raises(ValueError, match=r"parameter '0.weight' is new, or was frozen then: .*add_param_group"):
        gradients(model, opt, batch)
    model = net()
    opt = make(model)
    model[0].requires_grad_(False)
    with pytest.raises(ValueError, match=r"'0.weight' has no gradient: it is frozen now"):  # noqa: PT012
        gradients(model, opt, batch)
        opt.step()
    model[0].requires_grad_(True)
    gradients(model, opt, batch)
    opt.step()


@pytest.mark.parametrize("make", [made, drawn], ids=["second order", "variational"])
@pytest.mark.parametrize("matrix", [GGN, Hessian, partial(GGN, loss=nn.CrossEntropyLoss(reduction="sum"))])
def test_a_loss_that_is_a_sum_has_no_running_average(make, matrix):
    loss = {} if isinstance(matrix, partial) else {"loss": nn.CrossEntropyLoss(reduction="sum")}
    with pytest.raises(ValueError, match=r'loss: it is a sum over examples.*reduction="mean".*decay=0'):
        make(net(), PMatDense, matrix, **loss)
    make(net(), PMatDense, matrix, decay=0.0, **loss)


def damage(state, where):
    *path, last = where
    for key in path:
        state = state[key]
    del state[last]


@pytest.mark.parametrize("make", [made, drawn], ids=["second order", "variational"])
@pytest.mark.parametrize(
    "where",
    [("steps",), ("generator",), ("running", "used"), ("running", "new"), ("running", "running", "seen"), None],
    ids=str,
)
def test_a_state_that_is_damaged_changes_nothing(make, where):
    data, ends = batches(8, 9, 7, 6), []
    for load in (False, True):
        model = net()
        opt = make(model, matrix=FIM_MonteCarlo, refresh=2)
        for k, batch in enumerate(data):
            gradients(model, opt, batch)
            opt.step()
            if k == 1 and load:
                saved = copy.deepcopy(opt.state_dict())
                part = "variational" if make is drawn else "curvature"
                damage(saved, ("state",) if where is None else (part, *where))
                with pytest.raises(ValueError, match="load_state_dict: "):
                    opt.load_state_dict(saved)
        ends.append(values(model))
    with pytest.raises(ValueError, match=rf"load_state_dict: expected what .* of a {type(opt).__name__}"):
        opt.load_state_dict(None)
    assert torch.equal(*ends)


def test_what_was_loaded_does_not_go_on_with_the_last_minibatch_of_before():
    model, (batch,) = net(), batches(8)
    fresh = made(net(), PMatImplicit).state_dict()
    opt = made(model, PMatImplicit)
    one(model, opt, batch)
    opt.load_state_dict(fresh)
    assert opt.matrix is None
    with pytest.raises(ValueError, match="nothing was observed yet"):
        one(model, opt, batch, observe=False)


@pytest.mark.parametrize("seed", range(4))
def test_by_default_a_training_from_random_weights_does_not_diverge(seed):
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(3, 16), nn.Tanh(), nn.Linear(16, 2))
    x = torch.randn(100, 3)
    y = torch.stack([x.sum(1).sin(), x[:, 0]], 1)
    opt = SecondOrderOptimizer(model, PMatKFAC, GGN, loss=nn.MSELoss(), lr=0.03, damping=1e-2)
    refreshed = []
    for _ in range(60):
        opt.zero_grad()
        loss = nn.functional.mse_loss(model(x), y)
        loss.backward()
        opt.observe((x, y))
        before = opt.matrix
        opt.step()
        refreshed.append(opt.matrix is not before)
    assert loss.item() < 0.15
    assert [k for k, yes in enumerate(refreshed) if yes] == [*range(10), 10, 20, 30, 40, 50]
