"""A model in training: statistics of minibatches held constant, and minibatches that count as one example."""

import copy

import oracle
import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from nngeometry import (
    FIM,
    GGN,
    Accumulator,
    EmpiricalFisher,
    FIM_MonteCarlo,
    FiniteDifference,
    FMatDense,
    FMatImplicit,
    GradientCovariance,
    GramMatrix,
    Hessian,
    Influence,
    Jacobian,
    LayerCollection,
    OwnLoss,
    PFMapDense,
    PFMapFactored,
    PFMapImplicit,
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
    memory_budget,
    whole,
)

TOLERANCE = 1e-9


def draw(*shape):
    """Always the same, and not of the generator that must be left alone."""
    return torch.randn(*shape, generator=torch.Generator().manual_seed(7), dtype=torch.float64)


def classes(n, k=3):
    return torch.randint(k, (n,), generator=torch.Generator().manual_seed(8))


# Models


def seeded(model):
    """Generic parameters and buffers, in train mode."""
    return oracle.randomise(model.double()).train()


def mlp():
    return nn.Sequential(
        nn.Linear(4, 5),
        nn.BatchNorm1d(5),
        nn.Tanh(),
        nn.Dropout(0.4),
        nn.Linear(5, 4),
        nn.BatchNorm1d(4),
        nn.Linear(4, 3),
    )


def odd_norms():
    """No affine parameters, no running statistics, a cumulative average, one that is frozen."""
    return nn.Sequential(
        nn.Linear(4, 5),
        nn.BatchNorm1d(5, affine=False),
        nn.Tanh(),
        nn.Linear(5, 4),
        nn.BatchNorm1d(4, track_running_stats=False),
        nn.Linear(4, 4),
        nn.BatchNorm1d(4, momentum=None),
        nn.Tanh(),
        nn.BatchNorm1d(4),
        nn.Linear(4, 3),
    )


def convolutional():
    return nn.Sequential(
        nn.Conv2d(2, 3, 3, padding=1, bias=False),
        nn.BatchNorm2d(3),
        nn.ReLU(),
        nn.Conv2d(3, 2, 2),
        nn.InstanceNorm2d(2, affine=True, track_running_stats=True),
        nn.Tanh(),
        nn.Dropout2d(0.3),
        nn.BatchNorm2d(2, affine=False),
        nn.Flatten(),
        nn.Linear(18, 3),
    )


class Residual(nn.Module):
    """Not in a row, so that it is looked at; with attention that drops, and a norm over tokens."""

    def __init__(self):
        super().__init__()
        self.inner = nn.Linear(4, 4)
        self.norm = nn.BatchNorm1d(4)
        self.attention = nn.MultiheadAttention(4, 2, dropout=0.3, batch_first=True)
        self.tokens = nn.SyncBatchNorm(4)
        self.scale = nn.Parameter(torch.ones(4))
        self.head = nn.Linear(4, 3)

    def forward(self, x):
        h = x + torch.tanh(self.norm(self.inner(x))) * self.scale
        t = torch.stack([h, x, h * x], 1)
        t = t + self.attention(t, t, t)[0]
        return self.head(self.tokens(t.transpose(1, 2)).mean(2))


class Checkpointed(nn.Module):
    def __init__(self):
        super().__init__()
        self.a = nn.Sequential(nn.Linear(4, 5), nn.BatchNorm1d(5), nn.Tanh())
        self.b = nn.Linear(5, 3)

    def forward(self, x):
        return self.b(checkpoint(self.a, x, use_reentrant=False))


def frozen():
    model = seeded(odd_norms())
    model[8].eval()
    return model


#: Models in train mode, and the shape of an example.
MODELS = {
    "mlp": (lambda: seeded(mlp()), (4,)),
    "mlp in eval mode": (lambda: seeded(mlp()).eval(), (4,)),
    "odd norms": (lambda: seeded(odd_norms()), (4,)),
    "frozen norm": (frozen, (4,)),
    "convolutional": (lambda: seeded(convolutional()), (2, 4, 4)),
    "convolutional in eval mode": (lambda: seeded(convolutional()).eval(), (2, 4, 4)),
    "residual": (lambda: seeded(Residual()), (4,)),
    "checkpointed": (lambda: seeded(Checkpointed()), (4,)),
}
every_model = pytest.mark.parametrize("name", MODELS)


def made(name, sizes=(6, 4, 3)):
    make, shape = MODELS[name]
    torch.manual_seed(0)
    model = make()
    g = torch.Generator().manual_seed(1)
    data = [(torch.randn(n, *shape, generator=g), torch.randint(3, (n,), generator=g)) for n in sizes]
    return model, data


class HeldNorm(nn.Module):
    """Batch norm in formulas, its statistics constants."""

    def __init__(self, norm):
        super().__init__()
        self.weight, self.bias, self.eps = norm.weight, norm.bias, norm.eps

    def forward(self, x):
        axes = [k for k in range(x.ndim) if k != 1]
        mean = x.mean(axes, keepdim=True).detach()
        var = (x - mean).square().mean(axes, keepdim=True).detach()
        y = (x - mean) / (var + self.eps).sqrt()
        shape = [1, -1, *[1] * (x.ndim - 2)]
        return y if self.weight is None else y * self.weight.view(shape) + self.bias.view(shape)


def reference(model):
    """The model with norms in formulas, and without dropout: run on a whole minibatch, derivatives of single outputs
    are what is asked for.
    """
    training = model.training
    found = copy.deepcopy(model)

    def replaced(module):
        if isinstance(module, nn.modules.batchnorm._BatchNorm) and (
            module.training or not training or module.running_mean is None
        ):
            return HeldNorm(module)
        if isinstance(module, nn.modules.instancenorm._InstanceNorm):
            module.track_running_stats, module.running_mean, module.running_var = False, None, None
        if isinstance(module, nn.modules.dropout._DropoutNd):
            return nn.Identity()
        if isinstance(module, nn.MultiheadAttention):
            module.dropout = 0.0
        for name, child in module.named_children():
            setattr(module, name, replaced(child))
        return module

    return replaced(found)


def kept(model):
    """All that must be as it was."""
    return (
        {k: v.clone() for k, v in model.state_dict().items()},
        [m.training for m in model.modules()],
        [dict(m._buffers) for m in model.modules()],
        [(len(m._forward_hooks), len(m._forward_pre_hooks), "forward" in vars(m)) for m in model.modules()],
        [vars(m).get("p", getattr(m, "dropout", None)) for m in model.modules()],
        [(p.requires_grad, p.grad) for p in model.parameters()],
        torch.get_rng_state(),
    )


def assert_as_it_was(model, before):
    state, modes, buffers, hooks, rates, flags, rng = kept(model)
    assert all(torch.equal(v, before[0][k]) for k, v in state.items())
    assert modes == before[1]
    for mine, theirs in zip(buffers, before[2], strict=True):
        assert list(mine) == list(theirs)
        assert all(mine[k] is theirs[k] for k in mine)
    assert (hooks, rates, flags) == before[3:6]
    assert torch.equal(rng, before[6])


@pytest.fixture
def unchanged():
    """``unchanged(model)``: at the end of the test the model must be as it is now."""
    watched = []

    def watch(model):
        watched.append((model, kept(model)))
        return model

    yield watch
    for model, before in watched:
        assert_as_it_was(model, before)


# Batch statistics


@every_model
def test_outputs_are_those_of_training(name, unchanged):
    model, data = made(name)
    unchanged(model)
    plain = copy.deepcopy(model)
    plain.train()
    for module in plain.modules():
        if isinstance(module, nn.modules.dropout._DropoutNd | nn.MultiheadAttention):
            module.eval()
    if name == "frozen norm":
        plain[8].eval()
    seen = []
    g = FIM(model, data, lambda layer_collection, generator, examples: generator, batch_statistics=True)
    for observation in g.stream(data):
        seen += [observation.outputs] if observation.n else []
    expected = torch.cat([plain(x) for x, _ in data])
    assert oracle.relative(torch.cat(seen), expected) < TOLERANCE


@every_model
def test_jacobian(name, unchanged):
    model, data = made(name)
    unchanged(model)
    expected = torch.cat([oracle.jacobian(reference(model), batch) for batch in data], 1)
    for representation in (PFMapDense, PFMapFactored, PFMapImplicit):
        J = Jacobian(model, data, representation=representation, batch_statistics=True)
        assert J.shape == tuple(expected.shape)
        assert oracle.relative(J.to_dense().to_torch(), expected) < TOLERANCE, representation


@every_model
def test_fisher(name, unchanged):
    model, data = made(name)
    unchanged(model)
    expected = oracle.fim(reference(model), data, "classif_logits")
    for representation in (PMatDense, PMatLowRank):
        F_ = FIM(model, data, representation, batch_statistics=True)
        assert oracle.relative(F_.to_torch(), expected) < TOLERANCE, representation
    D = FIM(model, data, PMatDiag, batch_statistics=True)
    assert oracle.relative(D.to_torch().diag(), expected.diag()) < TOLERANCE
    lc = LayerCollection.from_model(model)
    B = FIM(model, data, PMatBlockDiag, batch_statistics=True)
    assert oracle.relative(B.to_torch(), oracle.blockdiag(expected, lc)) < TOLERANCE
    M = FIM(model, data, PMatImplicit, batch_statistics=True)
    v = draw(lc.numel())
    assert oracle.relative(M.mv(PVector(lc, v)).to_torch(), expected @ v) < TOLERANCE
    assert oracle.relative(M.trace(), expected.trace()) < TOLERANCE


@every_model
def test_gradients_of_losses(name, unchanged):
    model, data = made(name)
    unchanged(model)
    loss = nn.CrossEntropyLoss(reduction="none")
    g = oracle.loss_gradients(reference(model), data, loss)
    E = EmpiricalFisher(model, data, PMatDense, batch_statistics=True)
    assert oracle.relative(E.to_torch(), g.T @ g / len(g)) < TOLERANCE
    C = GradientCovariance(model, data, PMatDense, batch_statistics=True)
    c = g - g.mean(0)
    assert oracle.relative(C.to_torch(), c.T @ c / len(g)) < TOLERANCE


@every_model
def test_ggn_and_hessian(name, unchanged):
    model, data = made(name)
    unchanged(model)
    ref = reference(model)
    expected = oracle.fim(ref, data, "classif_logits")  # as the cross entropy has it
    G = GGN(model, data, PMatDense, batch_statistics=True)
    assert oracle.relative(G.to_torch(), expected) < TOLERANCE
    H = Hessian(model, data, PMatDense, batch_statistics=True)
    n = sum(len(y) for _, y in data)
    expected = sum(hessian(ref, lambda x=x, y=y: F.cross_entropy(ref(x), y, reduction="sum")) for x, y in data) / n
    assert oracle.relative(H.to_torch(), expected) < TOLERANCE
    if name in ("mlp", "odd norms"):
        M = Hessian(model, data, PMatImplicit, batch_statistics=True, products=FiniteDifference())
        v = PVector(M.layer_collection, draw(len(expected)))
        assert oracle.relative(M.mv(v).to_torch(), expected @ v.to_torch()) < 1e-7


def hessian(model, value):
    """The Hessian of a scalar, row by row."""
    params = LayerCollection.from_model(model).parameters(model)
    grads = torch.autograd.grad(value(), params, create_graph=True, allow_unused=True, materialize_grads=True)
    flat = torch.cat([g.flatten() for g in grads])
    rows = []
    for e in flat:
        row = torch.autograd.grad(e, params, retain_graph=True, allow_unused=True, materialize_grads=True)
        rows.append(torch.cat([r.flatten() for r in row]))
    return torch.stack(rows)


@every_model
@pytest.mark.parametrize("representation", [PMatKFAC, PMatEKFAC, PMatQuasiDiag, PMatEye], ids=lambda r: r.__name__)
def test_representations_are_those_of_the_model_with_these_statistics(name, representation, unchanged):
    """One minibatch: put its statistics into the buffers of a copy by hand, which is then in eval mode."""
    model, data = made(name, (7,))
    unchanged(model)
    by_hand = with_statistics(model, data[0][0])
    for matrix in (FIM, EmpiricalFisher):
        one = matrix(model, data, representation, batch_statistics=True)
        assert oracle.relative(one.to_torch(), matrix(by_hand, data, representation).to_torch()) < TOLERANCE
    mixed = PMatMixed.of(representation, {"0" if isinstance(model, nn.Sequential) else nn.Linear: PMatDense})
    one = FIM_MonteCarlo(model, data, mixed, generator=torch.Generator().manual_seed(3), batch_statistics=True)
    other = FIM_MonteCarlo(by_hand, data, mixed, generator=torch.Generator().manual_seed(3))
    assert oracle.relative(one.to_torch(), other.to_torch()) < TOLERANCE


def with_statistics(model, x):
    """A copy in eval mode with the statistics of x as running ones."""
    found = copy.deepcopy(model)
    for module in found.modules():
        if isinstance(module, nn.modules.dropout._DropoutNd | nn.MultiheadAttention):
            module.eval()
    training = model.training
    norms = [
        m
        for m in found.modules()
        if isinstance(m, nn.modules.batchnorm._BatchNorm) and (m.training or not training or m.running_mean is None)
    ]
    for module in found.modules():
        if isinstance(module, nn.modules.instancenorm._InstanceNorm):
            module.track_running_stats, module.running_mean, module.running_var = False, None, None
    seen = {}
    hooks = [m.register_forward_pre_hook(lambda m, args: seen.update({m: args[0]})) for m in norms]
    for m in norms:
        m.train()
    found(x)
    for hook in hooks:
        hook.remove()
    for m, inputs in seen.items():
        axes = [k for k in range(inputs.ndim) if k != 1]
        m.running_mean = inputs.mean(axes).detach()
        m.running_var = inputs.var(axes, correction=0).detach()
    return found.eval()


@pytest.mark.parametrize("name", ["mlp", "convolutional", "residual"])
@pytest.mark.parametrize("representation", [PMatKFAC, PMatDense, PMatDiag], ids=lambda r: r.__name__)
def test_an_accumulator_takes_minibatches_as_they_come(name, representation, unchanged):
    model, data = made(name)
    unchanged(model)
    whole = GGN(model, data, representation, batch_statistics=True)
    acc = Accumulator(GGN, model, representation, batch_statistics=True)
    for batch in data:
        acc.update(batch)
    assert oracle.relative(acc.matrix().to_torch(), whole.to_torch()) < TOLERANCE
    assert acc.n == 13
    if representation is not PMatKFAC:
        return
    parts = [Accumulator(GGN, with_statistics(model, x), PMatKFAC).update((x, y)) for x, y in data]
    total = parts[0] + parts[1] + parts[2]
    assert oracle.relative(whole.to_torch(), total.matrix().to_torch()) < TOLERANCE


@pytest.mark.parametrize("name", ["mlp", "convolutional", "residual"])
def test_kernels(name, unchanged):
    model, data = made(name)
    other, _ = made(name)
    with torch.no_grad():
        for p in other.parameters():
            p.mul_(1.1)
    unchanged(model)
    unchanged(other)
    J = torch.cat([oracle.jacobian(reference(model), batch) for batch in data], 1)
    J2 = torch.cat([oracle.jacobian(reference(other), batch) for batch in data], 1)
    for representation in (FMatDense, FMatImplicit):
        K = GramMatrix(model, data, representation=representation, batch_statistics=True)
        assert oracle.relative(K.to_torch(), torch.einsum("cnp,dmp->cndm", J, J)) < TOLERANCE
        K = GramMatrix(model, data, model2=other, representation=representation, batch_statistics=True)
        assert oracle.relative(K.to_torch(), torch.einsum("cnp,dmp->cndm", J, J2)) < TOLERANCE
        K = GramMatrix(model, data, data[:1], output="sum", representation=representation, batch_statistics=True)
        assert oracle.relative(K.to_torch(), torch.einsum("np,mp->nm", J.sum(0), J.sum(0)[:6])) < TOLERANCE


@pytest.mark.parametrize("name", ["mlp", "convolutional"])
def test_pieces_of_a_minibatch_have_the_statistics_of_all_of_it(name, unchanged):
    model, data = made(name, (24,))
    unchanged(model)
    J = oracle.jacobian(reference(model), data[0])
    with memory_budget(2**17):
        D = FIM(model, data, PMatDiag, batch_statistics=True)
        K = GramMatrix(model, data, output="trace", batch_statistics=True)
    assert oracle.relative(D.to_torch().diag(), oracle.fim(reference(model), data, "classif_logits").diag()) < TOLERANCE
    assert oracle.relative(K.to_torch(), torch.einsum("cnp,cmp->nm", J, J)) < TOLERANCE


def test_products_stay_those_at_the_parameters_that_they_were_made_at():
    model, data = made("mlp")
    expected = oracle.fim(reference(model), data, "classif_logits")
    M = FIM(model, data, PMatImplicit, batch_statistics=True)
    hessian_before = Hessian(model, data, PMatImplicit, batch_statistics=True)
    H = Hessian(model, data, PMatDense, batch_statistics=True).to_torch()
    with torch.no_grad():
        for p in model.parameters():
            p.mul_(2)
    lc = LayerCollection.from_model(model)
    v = draw(lc.numel())
    with memory_budget(1):  # nothing is kept
        for _ in range(2):
            assert oracle.relative(M.mv(PVector(lc, v)).to_torch(), expected @ v) < TOLERANCE
            assert oracle.relative(hessian_before.mv(PVector(lc, v)).to_torch(), H @ v) < TOLERANCE


def test_influence(unchanged):
    model, data = made("mlp")
    unchanged(model)
    G = GGN(model, data, PMatDense, batch_statistics=True)
    influence = Influence(model, G, nn.CrossEntropyLoss(), regul=0.1, batch_statistics=True)
    g = oracle.loss_gradients(reference(model), data, nn.CrossEntropyLoss(reduction="none"))
    expected = g[:6] @ torch.linalg.solve(G.to_torch() + 0.1 * torch.eye(g.shape[1]), g.T)
    assert oracle.relative(influence.scores(data[:1], data), expected) < TOLERANCE


def test_minibatches_of_other_sorts(unchanged):
    """Mappings, lists of examples, tensors of other lengths."""
    model, ((x, y), *_) = made("mlp")
    unchanged(model)
    expected = EmpiricalFisher(model, (x, y), PMatDense, batch_statistics=True).to_torch()
    for batch, function in (
        ({"x": x, "y": y}, lambda b: model(b["x"])),
        ({"edges": torch.arange(9), "x": x, "y": y}, lambda b: model(b["x"])),
        ([{"x": a, "y": b} for a, b in zip(x, y, strict=True)], lambda b: model(torch.stack([e["x"] for e in b]))),
    ):
        targets = (lambda b: torch.stack([e["y"] for e in b])) if isinstance(batch, list) else "y"
        E = EmpiricalFisher(model, [batch], PMatDense, targets=targets, function=function, batch_statistics=True)
        assert oracle.relative(E.to_torch(), expected) < TOLERANCE


class Twice(nn.Module):
    def __init__(self, same=False):
        super().__init__()
        self.norm, self.head, self.same = nn.BatchNorm1d(4), nn.Linear(4, 3), same

    def forward(self, x):
        return self.head(self.norm(x) + self.norm(x if self.same else 2 * x + x**2))


def test_a_norm_that_is_called_twice():
    model = seeded(Twice())
    x = draw(6, 4)
    with pytest.raises(NotImplementedError, match=r"layer 'norm' \(BatchNorm1d\) is called 2 times"):
        FIM(model, (x,), PMatDense, batch_statistics=True)
    model = seeded(Twice(same=True))
    F_ = FIM(model, (x,), PMatDense, batch_statistics=True)
    assert oracle.relative(F_.to_torch(), oracle.fim(reference(model), [(x,)], "classif_logits")) < TOLERANCE


@pytest.mark.parametrize("name", ["mlp", "residual", "mlp in eval mode"])
def test_a_minibatch_of_one_has_no_statistics(name, unchanged):
    model, data = made(name, (6, 1))
    unchanged(model)
    for call in (FIM, EmpiricalFisher, GGN, Hessian):
        with pytest.raises(ValueError, match=r"one value for each channel.*drop_last=True"):
            call(model, data, PMatDiag, batch_statistics=True)


def test_one_example_with_several_positions_has_statistics(unchanged):
    model, data = made("convolutional", (6, 1))
    unchanged(model)
    D = FIM(model, data, PMatDense, batch_statistics=True)
    assert oracle.relative(D.to_torch(), oracle.fim(reference(model), data, "classif_logits")) < TOLERANCE


class Noisy(nn.Module):
    def __init__(self):
        super().__init__()
        self.norm, self.head = nn.BatchNorm1d(4), nn.Linear(4, 3)

    def forward(self, x):
        return self.head(F.dropout(self.norm(x), 0.5, self.training))


class Counting(nn.Module):
    def __init__(self):
        super().__init__()
        self.norm, self.head = nn.BatchNorm1d(4), nn.Linear(4, 3)
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, x):
        self.calls += 1
        return self.head(self.norm(x)) + self.calls


class Clipped(nn.BatchNorm1d):
    """Other statistics than those of the input."""

    def forward(self, x):
        return super().forward(x.clamp(-0.5, 0.5))


class Ghost(nn.BatchNorm1d):
    """A norm of halves of the minibatch."""

    def forward(self, x):
        if not self.training:
            return super().forward(x)
        return torch.cat([F.batch_norm(h, None, None, self.weight, self.bias, True) for h in x.chunk(2)])


@pytest.mark.parametrize("unit", ["example", "minibatch"])
def test_what_else_is_random_or_changes_is_refused(unit, unchanged):
    x = draw(6, 4)
    options = {"unit": unit, "batch_statistics": unit == "example"}
    noisy, counting = seeded(Noisy()), seeded(Counting())
    for model, sentence in ((noisy, "draws random numbers"), (counting, "changes its buffers calls")):
        unchanged(model)
        for call in (FIM, EmpiricalFisher, Hessian):
            for representation in (PMatDiag, PMatDense):
                with pytest.raises(ValueError, match=sentence):
                    call(model, (x, classes(6)), representation, **options)


def test_norms_with_a_forward_of_their_own(unchanged):
    x = draw(6, 4)
    for model in [seeded(nn.Sequential(norm, nn.Linear(4, 3))) for norm in (Ghost(4), Clipped(4))]:
        unchanged(model)
        with pytest.raises(ValueError, match=rf"\({type(model[0]).__name__}\) returns something else than in training"):
            FIM(model, (x,), PMatDense, batch_statistics=True)


def test_the_default_refuses_and_names_both():
    model, data = made("mlp")
    for call in (FIM, FIM_MonteCarlo, EmpiricalFisher, GradientCovariance, GGN, Hessian):
        with pytest.raises(ValueError, match=r"layer '1' \(BatchNorm1d\).*batch_statistics=True.*unit=\"minibatch\""):
            call(model, data, PMatDiag)
    dropping = nn.Sequential(nn.Linear(4, 3), nn.Dropout()).train()
    with pytest.raises(ValueError, match=r"layer '1' \(Dropout\).*batch_statistics=True"):
        FIM(dropping, data, PMatDiag)
    with pytest.raises(ValueError, match=r"layer '1' \(Dropout\).*eval\(\) on it alone"):
        FIM(dropping, data, PMatDiag, unit="minibatch")


def test_instance_norm_with_running_statistics_is_not_written_into():
    model = (
        nn.Sequential(nn.InstanceNorm1d(2, track_running_stats=True), nn.Flatten(), nn.Linear(6, 3)).double().train()
    )
    before = kept(model)
    with pytest.raises(ValueError, match="changes its buffers"):
        FIM(model, (draw(4, 2, 3),), PMatDiag)
    assert_as_it_was(model, before)


class Fails(nn.Module):
    """Raises in a call."""

    def __init__(self, at):
        super().__init__()
        self.at, self.calls = at, [0]

    def forward(self, x):
        self.calls[0] += 1
        if self.calls[0] == self.at:
            raise KeyboardInterrupt
        return x


@pytest.mark.parametrize("options", [{"batch_statistics": True}, {"unit": "minibatch"}], ids=str)
@pytest.mark.parametrize("call", [FIM, EmpiricalFisher, GGN, Hessian])
@pytest.mark.parametrize("at", [1, 2, 3, 4])
def test_after_an_exception_all_is_as_it_was(options, call, at):
    model, data = made("mlp", (6, 4, 3, 5))
    model[3].p = 0.0 if "unit" in options else 0.4
    model.append(Fails(at))
    before = kept(model)
    with pytest.raises(KeyboardInterrupt):
        call(model, data, PMatDiag, **options)
    assert_as_it_was(model, before)


@pytest.mark.parametrize("name", ["mlp", "residual"])
def test_after_training_went_on_the_look_is_still_right(name):
    """A plan that is remembered, statistics that are not."""
    model, data = made(name)
    acc = Accumulator(FIM, model, PMatDense, batch_statistics=True).update(data)
    model(data[0][0])
    with torch.no_grad():
        for p in model.parameters():
            p.mul_(1.2)
    acc.reset().update(data)
    expected = oracle.fim(reference(model), data, "classif_logits")
    assert oracle.relative(acc.matrix().to_torch(), expected) < TOLERANCE


def test_half_precision_and_single():
    model, data = made("mlp")
    J = Jacobian(model, data, batch_statistics=True).to_torch()
    single = [(x.float(), y) for x, y in data]
    found = Jacobian(model.float(), single, batch_statistics=True).to_torch()
    assert found.dtype == torch.float32
    assert oracle.relative(found.double(), J) < 1e-5
    H = Hessian(model, single, PMatImplicit, batch_statistics=True, products=FiniteDifference())
    v = draw(J.shape[2])
    product = H.mv(PVector(H.layer_collection, v.float())).to_torch()
    exact = Hessian(model.double(), data, PMatDense, batch_statistics=True).to_torch()
    assert oracle.relative(product.double(), exact @ v) < 1e-3
    found = Jacobian(model.bfloat16(), [(x.bfloat16(), y) for x, y in data], batch_statistics=True).to_torch()
    assert oracle.relative(found.double(), J) < 0.1


# A minibatch as one example


class Pair(nn.Module):
    """Two views of each example, compared with all others."""

    def __init__(self):
        super().__init__()
        self.body = nn.Sequential(nn.Linear(4, 5), nn.BatchNorm1d(5), nn.Tanh(), nn.Linear(5, 3))

    def forward(self, x):
        return torch.stack([self.body(x), self.body(x.flip(1))])


class Graph(nn.Module):
    """Rows of nodes that are mixed along edges."""

    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(4, 5), nn.Linear(5, 3)

    def forward(self, x, edges):
        h = torch.tanh(self.a(x))
        h = h.index_add(0, edges[1], h[edges[0]])
        return self.b(h)


class Packed(nn.Module):
    def __init__(self):
        super().__init__()
        self.rnn, self.head = nn.RNN(3, 4), nn.Linear(4, 2)

    def forward(self, packed):
        return self.head(self.rnn(packed)[0].data)


class Residue(nn.Module):
    """A physical residual over all points, by a derivative in the forward."""

    def __init__(self):
        super().__init__()
        self.net = nn.Sequential(nn.Linear(2, 5), nn.Tanh(), nn.Linear(5, 1))

    def forward(self, x):
        x = x.detach().requires_grad_()
        u = self.net(x)
        (du,) = torch.autograd.grad(u.sum(), x, create_graph=True)
        return du[:, 0] - u[:, 0] * du[:, 1]


def contrastive(f, *targets):
    one, other = (F.normalize(v, dim=1) for v in f)
    return F.cross_entropy(one @ other.T / 0.5, torch.arange(len(one)))


def pinned(f, *targets):
    return f.square().mean()


def no_targets(batch):
    return ()


def sequences(*lengths):
    g = torch.Generator().manual_seed(3)
    return nn.utils.rnn.pack_sequence(
        [torch.randn(n, 3, generator=g, dtype=torch.float64) for n in lengths], enforce_sorted=False
    )


def edges(n):
    return torch.stack([torch.arange(n), torch.arange(n).roll(1)])


def labelled(n):
    return draw(n, 4), classes(n)


def graph(n):
    return {"x": draw(n, 4), "edges": edges(n), "y": classes(n)}


def plain_norms():
    model = mlp()
    model[3].p = 0.0
    return model


#: A model, minibatches, the function, the loss and its targets.
WHOLE = {
    "norms": (plain_norms, [labelled(6), labelled(4)], None, nn.CrossEntropyLoss(), None),
    "norms, summed": (plain_norms, [labelled(5)], None, nn.CrossEntropyLoss(reduction="sum"), None),
    "norms, several values": (plain_norms, [labelled(5)], None, nn.CrossEntropyLoss(reduction="none"), None),
    "squares": (plain_norms, [(draw(5, 4), draw(5, 3)), (draw(3, 4), draw(3, 3))], None, nn.MSELoss(), None),
    "contrastive": (Pair, [(draw(4, 4),), (draw(3, 4),)], None, contrastive, no_targets),
    "graph": (
        Graph,
        [graph(5), graph(3)],
        lambda model: lambda b: model(b["x"], b["edges"]),
        nn.CrossEntropyLoss(),
        "y",
    ),
    "packed": (
        Packed,
        [sequences(3, 2), sequences(1, 4, 2)],
        lambda model: lambda b: model(b),
        pinned,
        no_targets,
    ),
    "residual of points": (Residue, [(draw(6, 2),), (draw(4, 2),)], None, pinned, no_targets),
    "a number": (
        plain_norms,
        [labelled(6), labelled(4)],
        lambda model: lambda x, y: model(x).exp().sum(),
        pinned,
        no_targets,
    ),
}
every_whole = pytest.mark.parametrize("name", WHOLE)


class Case:
    def __init__(self, name):
        make, self.data, function, self.loss, self.targets = WHOLE[name]
        torch.manual_seed(0)
        self.model = seeded(make())
        self.function = None if function is None else function(self.model)
        self.plain = copy.deepcopy(self.model)  # whose buffers may change
        self.plain_function = None if function is None else function(self.plain)
        self.options = {"function": self.function, "unit": "minibatch"}
        self.with_loss = {**self.options, "loss": self.loss, "targets": self.targets}

    def output(self, batch):
        if isinstance(batch, nn.utils.rnn.PackedSequence):
            return self.plain_function(batch)
        return oracle.run(self.plain, batch, self.plain_function)

    def given(self, batch):
        if self.targets is None:
            return batch[1:]
        return self.targets(batch) if callable(self.targets) else (batch[self.targets],)

    def value(self, batch, f=None):
        return self.loss(self.output(batch) if f is None else f, *self.given(batch)).sum()

    @property
    def params(self):
        return LayerCollection.from_model(self.plain).parameters(self.plain)

    def rows(self, outputs):
        """The gradient of each entry."""
        found = []
        for e in outputs.flatten():
            g = torch.autograd.grad(e, self.params, retain_graph=True, allow_unused=True, materialize_grads=True)
            found.append(torch.cat([d.flatten() for d in g]))
        return torch.stack(found)

    def jacobian(self, batch):
        return self.rows(self.output(batch))

    def gradients(self):
        return torch.cat([self.rows(self.value(batch)) for batch in self.data])

    def hessian(self):
        return sum(hessian(self.plain, lambda b=b: self.value(b)) for b in self.data) / len(self.data)

    def ggn(self):
        total = 0
        for batch in self.data:
            J, f = self.jacobian(batch), self.output(batch).detach().requires_grad_()
            (g,) = torch.autograd.grad(self.value(batch, f), f, create_graph=True)
            H = torch.stack([torch.autograd.grad(e, f, retain_graph=True)[0].flatten() for e in g.flatten()])
            total = total + J.T @ H @ J
        return total / len(self.data)

    def fisher(self, variant):
        total = 0
        for batch in self.data:
            f = self.output(batch)
            J = self.jacobian(batch).view(*f.shape[:1], -1, sum(p.numel() for p in self.params))
            total = total + torch.einsum("ncp,ncd,ndq->pq", J, oracle.output_hessians(f, variant), J)
        return total / len(self.data)


@every_whole
def test_hessian_of_the_loss_of_a_minibatch(name, unchanged):
    case = Case(name)
    unchanged(case.model)
    expected = case.hessian()
    H = Hessian(case.model, case.data, PMatDense, **case.with_loss)
    assert oracle.relative(H.to_torch(), expected) < TOLERANCE
    lc = H.layer_collection
    v = PVector(lc, draw(lc.numel()))
    M = Hessian(case.model, case.data, PMatImplicit, **case.with_loss)
    for _ in range(2):
        assert oracle.relative(M.mv(v).to_torch(), expected @ v.to_torch()) < TOLERANCE
    if name in ("norms", "graph"):
        M = Hessian(case.model, case.data, PMatImplicit, products=FiniteDifference(), **case.with_loss)
        assert oracle.relative(M.mv(v).to_torch(), expected @ v.to_torch()) < 1e-7


@every_whole
def test_gradients_of_minibatches(name, unchanged):
    case = Case(name)
    unchanged(case.model)
    g = case.gradients()
    for representation in (PMatDense, PMatLowRank):
        E = EmpiricalFisher(case.model, case.data, representation, **case.with_loss)
        assert oracle.relative(E.to_torch(), g.T @ g / len(g)) < TOLERANCE
    acc = Accumulator(GradientCovariance, case.model, PMatDiag, **case.with_loss)
    for batch in case.data:
        acc.update([batch])
    assert acc.n == len(case.data)
    assert oracle.relative(acc.matrix().to_torch().diag(), g.var(0, correction=0)) < 1e-7
    M = EmpiricalFisher(case.model, case.data, PMatImplicit, **case.with_loss)
    v = draw(g.shape[1])
    assert oracle.relative(M.mv(PVector(M.layer_collection, v)).to_torch(), g.T @ (g @ v) / len(g)) < TOLERANCE
    own = Hessian if name == "norms" else EmpiricalFisher

    def value(*args):
        f = case.model(args[0]) if case.function is None else case.function(*args)
        return case.loss(f, *case.given(args[0] if not isinstance(case.data[0], tuple) else args)).sum()

    O = own(case.model, case.data, PMatDense, OwnLoss(), function=value, unit="minibatch")
    assert oracle.relative(O.to_torch(), case.hessian() if own is Hessian else g.T @ g / len(g)) < TOLERANCE


@pytest.mark.parametrize("name", [n for n in WHOLE if n not in ("contrastive",)])
def test_gauss_newton_of_minibatches(name, unchanged):
    case = Case(name)
    unchanged(case.model)
    expected = case.ggn()
    for representation in (PMatDense, PMatLowRank, PMatBlockDiag, PMatQuasiDiag, PMatEye):
        G = GGN(case.model, case.data, representation, **case.with_loss)
        if representation in (PMatDense, PMatLowRank):
            assert oracle.relative(G.to_torch(), expected) < TOLERANCE
        assert oracle.relative(G.trace(), expected.trace()) < TOLERANCE
    M = GGN(case.model, case.data, PMatImplicit, **case.with_loss)
    v = draw(len(expected))
    assert oracle.relative(M.mv(PVector(M.layer_collection, v)).to_torch(), expected @ v) < TOLERANCE
    assert oracle.relative(M.trace(), expected.trace()) < TOLERANCE


def test_a_loss_that_is_not_convex_is_refused():
    case = Case("contrastive")
    for representation in (PMatDense, PMatDiag):
        with pytest.raises(ValueError, match="negative eigenvalue"):
            GGN(case.model, case.data, representation, **case.with_loss)


@pytest.mark.parametrize(
    ("name", "variant"),
    [
        ("norms", "classif_logits"),
        ("graph", "classif_logits"),
        ("squares", "regression"),
        ("packed", "regression"),
        ("residual of points", "regression"),
    ],
)
def test_fisher_of_minibatches(name, variant, unchanged):
    case = Case(name)
    unchanged(case.model)
    expected = case.fisher(variant)
    for representation in (PMatDense, PMatLowRank):
        F_ = FIM(case.model, case.data, representation, variant, **case.options)
        assert oracle.relative(F_.to_torch(), expected) < TOLERANCE
    M = FIM(case.model, case.data, PMatImplicit, variant, **case.options)
    v = draw(len(expected))
    assert oracle.relative(M.mv(PVector(M.layer_collection, v)).to_torch(), expected @ v) < TOLERANCE
    generator = torch.Generator().manual_seed(0)
    S = FIM_MonteCarlo(case.model, case.data, PMatDense, variant, trials=2000, generator=generator, **case.options)
    assert oracle.relative(S.to_torch(), expected) < 0.1


@every_whole
def test_maps_and_kernels_of_minibatches(name, unchanged):
    case = Case(name)
    unchanged(case.model)
    data = case.data[:1]
    expected = case.jacobian(data[0])
    for representation in (PFMapDense, PFMapFactored, PFMapImplicit):
        J = Jacobian(case.model, data, representation=representation, **case.options)
        assert J.shape == (len(expected), 1, expected.shape[1])
        assert oracle.relative(J.to_dense().to_torch()[:, 0], expected) < TOLERANCE
    for representation in (FMatDense, FMatImplicit):
        K = GramMatrix(case.model, data, representation=representation, **case.options)
        assert oracle.relative(K.to_torch()[:, 0, :, 0], expected @ expected.T) < TOLERANCE
        K = GramMatrix(case.model, case.data, representation=representation, output="sum", **case.options)
        J = torch.stack([case.jacobian(batch).sum(0) for batch in case.data])
        assert oracle.relative(K.to_torch(), J @ J.T) < TOLERANCE


def test_minibatches_of_other_numbers_of_outputs_have_no_map():
    case = Case("norms")
    for representation in (PFMapDense, PFMapImplicit):
        with pytest.raises(ValueError, match="different numbers of outputs"):
            Jacobian(case.model, case.data, representation=representation, **case.options)
    for representation in (FMatDense, FMatImplicit):
        with pytest.raises(ValueError, match="different numbers of outputs"):
            GramMatrix(case.model, case.data, representation=representation, **case.options)


@pytest.mark.parametrize("representation", [PMatKFAC, PMatEKFAC], ids=lambda r: r.__name__)
def test_no_kronecker_factors(representation):
    case = Case("norms")
    for call in (FIM, EmpiricalFisher, GGN):
        with pytest.raises(ValueError, match=r"layer '0'.*unit=\"minibatch\".*PMatDiag"):
            call(case.model, case.data, representation, unit="minibatch")


@pytest.mark.parametrize("name", ["mlp", "residual", "convolutional"])
def test_statistics_held_constant_in_minibatches_that_count_as_one(name, unchanged):
    model, data = made(name)
    unchanged(model)
    ref = reference(model)
    options = {"unit": "minibatch", "batch_statistics": True}
    rows = []
    for x, y in data:
        value = F.cross_entropy(ref(x), y)
        rows.append(
            torch.cat(
                [g.flatten() for g in torch.autograd.grad(value, LayerCollection.from_model(ref).parameters(ref))]
            )
        )
    g = torch.stack(rows)
    E = EmpiricalFisher(model, data, PMatDense, **options)
    assert oracle.relative(E.to_torch(), g.T @ g / 3) < TOLERANCE
    H = Hessian(model, data, PMatDense, **options)
    expected = sum(hessian(ref, lambda x=x, y=y: F.cross_entropy(ref(x), y)) for x, y in data) / 3
    assert oracle.relative(H.to_torch(), expected) < TOLERANCE


def test_influence_of_minibatches(unchanged):
    case = Case("norms")
    unchanged(case.model)
    E = EmpiricalFisher(case.model, case.data, PMatDense, **case.with_loss)
    influence = Influence(case.model, E, case.loss, regul=0.1, unit="minibatch")
    g = case.gradients()
    expected = g @ torch.linalg.solve(g.T @ g / 2 + 0.1 * torch.eye(g.shape[1]), g.T)
    assert oracle.relative(influence.scores(case.data, case.data), expected) < TOLERANCE


def test_norms_inside_of_checkpoints_leave_no_trace(unchanged):
    model, data = made("checkpointed")
    unchanged(model)
    plain = copy.deepcopy(model)
    params = LayerCollection.from_model(plain).parameters(plain)
    g = torch.stack(
        [torch.cat([d.flatten() for d in torch.autograd.grad(F.cross_entropy(plain(x), y), params)]) for x, y in data]
    )
    for representation in (PMatDense, PMatLowRank):
        E = EmpiricalFisher(model, data, representation, unit="minibatch")
        assert oracle.relative(E.to_torch(), g.T @ g / 3) < TOLERANCE
    M = EmpiricalFisher(model, data, PMatImplicit, unit="minibatch")
    v = draw(g.shape[1])
    assert oracle.relative(M.mv(PVector(M.layer_collection, v)).to_torch(), g.T @ (g @ v) / 3) < TOLERANCE


def test_memory_is_cut_into_pieces(unchanged):
    case = Case("squares")
    unchanged(case.model)
    with memory_budget(2**16):
        G = GGN(case.model, case.data, PMatDiag, **case.with_loss)
    assert oracle.relative(G.to_torch().diag(), case.ggn().diag()) < TOLERANCE
    with memory_budget(2**10), pytest.raises(MemoryError, match="outputs of a minibatch"):
        GGN(case.model, case.data, PMatDiag, unit="minibatch", loss=lambda f, y: ((f - y) ** 2).mean())


@pytest.mark.parametrize("call", [FIM, FIM_MonteCarlo, EmpiricalFisher, GradientCovariance, GGN, Hessian])
def test_arguments(call):
    case = Case("norms")
    with pytest.raises(ValueError, match=r"unit='minibatches'.*did you mean 'minibatch'"):
        call(case.model, case.data, PMatDiag, unit="minibatches")
    with pytest.raises(TypeError, match="batch_statistics: expected True or False"):
        call(case.model, case.data, PMatDiag, batch_statistics="yes")


def test_arguments_of_maps_and_kernels():
    case = Case("norms")
    for call in (Jacobian, GramMatrix):
        with pytest.raises(ValueError, match="unit='batch'"):
            call(case.model, case.data, unit="batch")
        with pytest.raises(TypeError, match="batch_statistics: expected True or False"):
            call(case.model, case.data, batch_statistics=1)


def test_what_a_loss_of_a_minibatch_may_be():
    case = Case("norms")
    for loss, sentence in (
        (lambda f, y: 3.0, "expected a tensor"),
        (lambda f, y: f.detach().sum(), "does not depend on the outputs"),
        (lambda f, y: f.sum() * torch.nan, "NaN or infinite"),
        (lambda f, y, z: f.sum(), "fails for outputs"),
        (nn.MSELoss(), "broadcast"),
    ):
        for call in (EmpiricalFisher, GGN, Hessian):
            with pytest.raises((TypeError, ValueError), match=sentence):
                call(case.model, case.data, PMatDiag, loss, unit="minibatch")
    with pytest.raises(ValueError, match="leave count or unit out"):
        Hessian(case.model, case.data, PMatDiag, OwnLoss(count=len), function=lambda x, y: x.sum(), unit="minibatch")
    with pytest.raises(ValueError, match=r"return \(rows, \.\.\.\)"):
        FIM(case.model, case.data, PMatDiag, function=lambda x, y: case.model(x).sum(), unit="minibatch")


@pytest.mark.parametrize(
    "loss",
    [
        nn.NLLLoss(torch.tensor([0.2, 1.0, 3.0]).double()),
        nn.CrossEntropyLoss(torch.tensor([0.2, 1.0, 3.0]).double(), ignore_index=1),
        nn.CrossEntropyLoss(label_smoothing=0.2, reduction="none"),
        nn.MultiMarginLoss(),
    ],
)
def test_the_reduction_is_that_of_the_loss(loss):
    case = Case("norms")
    function = (lambda x, y: case.model(x).log_softmax(1)) if isinstance(loss, nn.NLLLoss) else None
    case.loss = loss
    if function is not None:
        case.plain_function = lambda x, y: case.plain(x).log_softmax(1)
    options = {"loss": loss, "function": function, "unit": "minibatch"}
    g = case.gradients()
    E = EmpiricalFisher(case.model, case.data, PMatDense, **options)
    assert oracle.relative(E.to_torch(), g.T @ g / 2) < TOLERANCE
    if isinstance(loss, nn.CrossEntropyLoss):
        G = GGN(case.model, case.data, PMatDense, **options)
        assert oracle.relative(G.to_torch(), case.ggn()) < TOLERANCE
    if not isinstance(loss, nn.MultiMarginLoss):
        H = Hessian(case.model, case.data, PMatDense, **options)
        assert oracle.relative(H.to_torch(), case.hessian()) < TOLERANCE


def test_several_losses_of_one_size_and_others():
    """Losses of torch.nn without reduction "mean": a loss of three tensors."""
    case = Case("norms")
    triplet = nn.TripletMarginLoss()

    def loss(f, y):
        return triplet(f, f.roll(1, 0), f.roll(2, 0))

    case.loss = loss
    H = Hessian(case.model, case.data, PMatDense, loss, unit="minibatch")
    assert oracle.relative(H.to_torch(), case.hessian()) < TOLERANCE


@pytest.mark.parametrize("options", [{"batch_statistics": True}, {"unit": "minibatch"}], ids=str)
@pytest.mark.parametrize("call", [FIM, Hessian])
def test_products_do_not_go_on_in_another_mode(options, call):
    model, data = made("odd norms")
    M = call(model, data, PMatImplicit, **options)
    v = PVector(M.layer_collection, draw(M.size(0)))
    model[8].eval()
    with memory_budget(1), pytest.raises(ValueError, match="other norms in train mode"):
        M.mv(v)


# Odd models


class Block(nn.Module):
    """Declared as one layer, whose Jacobian is made by running it again."""

    def __init__(self):
        super().__init__()
        self.a, self.norm, self.b = nn.Linear(4, 4), nn.BatchNorm1d(4), nn.Linear(4, 4)

    def forward(self, x):
        return x + self.b(torch.tanh(self.norm(self.a(x))))


whole(Block)


def test_a_norm_inside_of_a_layer(unchanged):
    model = seeded(nn.Sequential(nn.Linear(4, 4), Block(), nn.Linear(4, 3)))
    x = draw(6, 4)
    F_ = FIM(model, (x,), PMatDense, batch_statistics=True)
    assert oracle.relative(F_.to_torch(), oracle.fim(reference(model), [(x,)], "classif_logits")) < TOLERANCE
    expected = oracle.jacobian(reference(model), (x,))
    J = Jacobian(model, (x,), representation=PFMapFactored, batch_statistics=True)
    with torch.no_grad():
        for p in model.parameters():
            p.mul_(1.5)
    unchanged(model)
    assert oracle.relative(J.to_dense().to_torch(), expected) < TOLERANCE, "made later, at the parameters of before"


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_convolutions_of_minibatches(layout, unchanged):
    model, ((x, _),) = made("convolutional", (5,))
    model[6].p = 0.0
    unchanged(model)
    x = x.to(memory_format=layout)
    plain = copy.deepcopy(model)
    params = LayerCollection.from_model(plain).parameters(plain)
    f = plain(x)
    rows = [torch.autograd.grad(e, params, retain_graph=True) for e in f.flatten()]
    expected = torch.stack([torch.cat([g.flatten() for g in row]) for row in rows])
    for representation in (PFMapDense, PFMapImplicit):
        J = Jacobian(model, (x,), representation=representation, unit="minibatch")
        assert oracle.relative(J.to_dense().to_torch()[:, 0], expected) < TOLERANCE


class Recurrent(nn.Module):
    def __init__(self):
        super().__init__()
        self.rnn = nn.LSTM(3, 4, num_layers=2, dropout=0.5, batch_first=True)
        self.norm, self.head = nn.BatchNorm1d(4), nn.Linear(4, 2)

    def forward(self, x):
        return self.head(self.norm(self.rnn(x)[0].transpose(1, 2)).mean(2))


@pytest.mark.filterwarnings("ignore:layer")
def test_dropout_inside_of_a_recurrent_layer(unchanged):
    model, x = seeded(Recurrent()), draw(5, 3, 3)
    unchanged(model)
    ref = reference(model)
    ref.rnn.dropout = 0.0
    F_ = FIM(model, (x,), PMatDense, batch_statistics=True)
    assert oracle.relative(F_.to_torch(), oracle.fim(ref, [(x,)], "classif_logits")) < TOLERANCE
    with pytest.raises(ValueError, match=r"layer 'rnn' \(LSTM\) drops units at random"):
        FIM(model, (x,), PMatDense, unit="minibatch")


class Words(nn.Module):
    def __init__(self, **options):
        super().__init__()
        self.words, self.norm, self.head = nn.Embedding(7, 4, **options), nn.BatchNorm1d(4), nn.Linear(4, 3)

    def forward(self, ids):
        return self.head(self.norm(self.words(ids)))


@pytest.mark.parametrize("options", [{"batch_statistics": True}, {"unit": "minibatch"}], ids=str)
@pytest.mark.parametrize("call", [FIM, EmpiricalFisher, GGN, Hessian])
def test_a_forward_that_writes_leaves_no_trace(options, call, unchanged):
    bounded = seeded(Words(max_norm=0.1))
    spectral = seeded(nn.Sequential(nn.utils.parametrizations.spectral_norm(nn.Linear(4, 4)), nn.BatchNorm1d(4)))
    for model, x in ((bounded, torch.tensor([0, 3, 3, 5, 6])), (spectral, draw(5, 4))):
        unchanged(model)
        with pytest.raises(
            (ValueError, NotImplementedError), match=r"writes into its parameters|changes its buf|max_norm"
        ):
            call(model, (x, classes(5)), PMatDiag, **options)


def test_sparse_gradients(unchanged):
    model, ids = seeded(Words(sparse=True)), torch.tensor([0, 3, 3, 5, 6])
    unchanged(model)
    plain = copy.deepcopy(model)
    grads = torch.autograd.grad(F.cross_entropy(plain(ids), classes(5)), list(plain.parameters()))
    g = torch.cat([(d.to_dense() if d.is_sparse else d).flatten() for d in grads])
    E = EmpiricalFisher(model, (ids, classes(5)), PMatDense, unit="minibatch")
    assert oracle.relative(E.to_torch(), torch.outer(g, g)) < TOLERANCE


class Conditional(nn.Module):
    def __init__(self):
        super().__init__()
        self.norm, self.head = nn.BatchNorm1d(4), nn.Linear(4, 3)

    def forward(self, x):
        return self.head(self.norm(x) if len(x) < 4 else x)


def test_a_norm_that_is_called_for_a_few_examples_alone():
    with pytest.raises(ValueError, match=r"layer 'norm' \(BatchNorm1d\) is called for some of the examples"):
        FIM(seeded(Conditional()), (draw(6, 4),), PMatDense, batch_statistics=True)


@pytest.mark.parametrize("options", [{"batch_statistics": True}, {"unit": "minibatch"}], ids=str)
def test_trace_and_diagonal_stay_those_at_the_parameters_that_they_were_made_at(options):
    model, data = made("odd norms")
    for call in (FIM, GradientCovariance):
        D, M = call(model, data, PMatDense, **options), call(model, data, PMatImplicit, **options)
        with torch.no_grad():
            for p in model.parameters():
                p.mul_(1.2)
        assert oracle.relative(M.trace(), D.trace()) < TOLERANCE
        assert oracle.relative(M.root.diag(), D.to_torch().diag()) < TOLERANCE


def test_a_function_that_returns_a_number_is_not_taken_for_a_loss():
    model = seeded(nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4), nn.Tanh()))
    plain, x = copy.deepcopy(model), draw(6, 4)
    options = {"function": lambda x: model(x).square().sum(), "targets": no_targets, "unit": "minibatch"}
    H = Hessian(model, (x,), PMatDense, lambda f: f, **options)
    assert oracle.relative(H.to_torch(), hessian(plain, lambda: plain(x).square().sum())) < TOLERANCE


def test_kernels_through_a_matrix_and_by_layer(unchanged):
    model, data = made("mlp")
    unchanged(model)
    M = FIM(model, data, PMatKFAC, batch_statistics=True).inv(0.1)
    J = torch.cat([oracle.jacobian(reference(model), batch) for batch in data], 1)
    K = GramMatrix(model, data, metric=M, batch_statistics=True)
    assert oracle.relative(K.to_torch(), torch.einsum("cnp,pq,dmq->cndm", J, M.to_torch(), J)) < TOLERANCE
    layers = GramMatrix(model, data, per_layer=True, representation=FMatImplicit, batch_statistics=True)
    total = sum(K.to_torch() for K in layers.values())
    assert oracle.relative(total, torch.einsum("cnp,dmp->cndm", J, J)) < TOLERANCE


@pytest.mark.parametrize("options", [{"batch_statistics": True}, {"unit": "minibatch"}], ids=str)
def test_frozen_parameters_that_are_collected(options, unchanged):
    model, data = made("odd norms")
    for p in model[6].parameters():
        p.requires_grad_(False)
    unchanged(model)
    lc = LayerCollection.from_model(model, frozen=True)
    D, M = (FIM(model, data, R, layer_collection=lc, **options) for R in (PMatDense, PMatImplicit))
    v = PVector(lc, draw(lc.numel()))
    assert oracle.relative(M.mv(v).to_torch(), D.to_torch() @ v.to_torch()) < TOLERANCE
