"""Where libraries of this field are silently wrong: ours is right, or says in one sentence what and why, and leaves
no trace.
"""

import oracle
import pytest
import torch
from models import CASES, SelfAttention
from torch import nn
from torch.utils.data import BatchSampler, DataLoader, IterableDataset, RandomSampler, TensorDataset

from nngeometry import (
    FIM,
    EmpiricalFisher,
    FIM_MonteCarlo,
    LayerCollection,
    PMatBlockDiag,
    PMatDense,
    PMatDiag,
    PMatEKFAC,
    PMatImplicit,
    PMatKFAC,
    PMatMixed,
    PVector,
    blocks,
    kind,
    memory_budget,
    random_pvector,
    whole,
)
from nngeometry.forms import Dense
from nngeometry.kinds import Packing


def mlp(n=5):
    model, batch, _ = CASES["mlp"].make(n)
    return model, batch[0]


# Data


def test_loaders_count_the_examples_they_yield():
    model, x = mlp(10)
    y = torch.arange(10) % 3
    data = TensorDataset(x, y)

    class Stream(IterableDataset):
        def __iter__(self):
            return iter(data)

    whole_ = FIM(model, (x,), PMatDense).to_torch()
    eight = FIM(model, (x[:8],), PMatDense).to_torch()
    for loader, expected in (
        (DataLoader(data, 4), whole_),
        (DataLoader(data, 4, drop_last=True), eight),
        (DataLoader(data, 3, shuffle=True), whole_),
        (DataLoader(Stream(), 4), whole_),
        (DataLoader(data, batch_sampler=BatchSampler(RandomSampler(data), 4, False)), whole_),
        (DataLoader(data, 4, sampler=range(8)), eight),
        ([x[:5], x[5:]], None),  # a list of tensors is one minibatch
        (((x[:5],), (x[5:],)), whole_),
        ([{"x": x[:5]}, {"x": x[5:]}], whole_),
        (x, whole_),
        (iter([(x,)]), whole_),
    ):
        function = (
            (lambda batch: model(batch["x"])) if isinstance(loader, list) and isinstance(loader[0], dict) else None
        )
        F = FIM(model, loader, PMatDense, function=function).to_torch()
        assert oracle.relative(F, FIM(model, (x[:5],), PMatDense).to_torch() if expected is None else expected) < 1e-10


def test_two_pass_representations_refuse_one_pass_loaders():
    model, x = mlp()
    with pytest.raises(ValueError, match="one-pass iterator: pass a DataLoader or a list"):
        FIM(model, iter([(x,)]), PMatEKFAC)


@pytest.mark.parametrize("loader", [[], [()], DataLoader(TensorDataset(torch.zeros(0, 3)), 2), (torch.zeros(0, 3),)])
def test_empty_loader(loader):
    model, _ = mlp()
    with pytest.raises((ValueError, IndexError), match=r"no minibatch|holds no tensor|no example"):
        FIM(model, loader, PMatDense)


def test_inputs_are_left_alone():
    model, x = mlp()
    before = x.clone()
    FIM(model, (x,), PMatKFAC)
    assert not x.requires_grad
    assert torch.equal(x, before)


def test_dict_batches_need_a_function():
    model, x = mlp()
    with pytest.raises(TypeError, match="need function="):
        FIM(model, {"x": x}, PMatDense)


def test_loss_of_a_dict():
    model, x = mlp()
    y = torch.arange(5) % 3
    batch = {"x": x, "y": y}
    F = EmpiricalFisher(
        model,
        batch,
        PMatDense,
        lambda f, b: nn.functional.cross_entropy(f, b["y"], reduction="none"),
        function=lambda b: model(b["x"]),
    )
    G = EmpiricalFisher(model, (x, y), PMatDense)
    assert oracle.relative(F.to_torch(), G.to_torch()) < 1e-12


def test_outputs_that_are_not_rows_of_examples():
    model, x = mlp()
    for function, error, message in (
        (lambda x: model(x).sum(), ValueError, "one row for each example"),
        (lambda x: model(x).flatten(), ValueError, "one row for each example"),
        (lambda x: (model(x),), TypeError, "not a tensor"),
        (lambda x: model(x) * float("nan"), ValueError, "NaN or infinite"),
        (lambda x: model(x).detach(), ValueError, "does not depend on the collected parameters"),
    ):
        with pytest.raises(error, match=message):
            FIM(model, (x,), PMatDense, function=function)


def test_n_output_is_checked():
    model, x = mlp()
    FIM(model, (x,), PMatDense, n_output=3)
    with pytest.raises(ValueError, match="n_output=4, but the model returns"):
        FIM(model, (x,), PMatDense, n_output=4)


# Modes and randomness


class Noise(nn.Module):
    def forward(self, x):
        return x + torch.randn_like(x)


class Centre(nn.Module):
    """Mixes examples without any state."""

    def forward(self, x):
        return x - x.mean(0)


class Count(nn.Module):
    def __init__(self):
        super().__init__()
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, x):
        self.calls += 1
        return x * self.calls


def net(middle, train=True):
    model = nn.Sequential(nn.Linear(3, 4), middle, nn.Linear(4, 3))
    return model.train(train)


@pytest.mark.parametrize(
    ("middle", "message"),
    [
        (lambda: nn.BatchNorm1d(4), r"layer '1' \(BatchNorm1d\) normalises with the statistics of the batch"),
        (lambda: nn.BatchNorm1d(4, track_running_stats=False).eval(), r"layer '1' \(BatchNorm1d\) normalises"),
        (lambda: nn.Dropout(0.5), r"layer '1' \(Dropout\) drops units at random"),
        (Noise, "draws random numbers"),
        (Centre, "depends on the others"),
        (Count, "changes its buffers 1.calls"),
        (lambda: nn.utils.parametrizations.spectral_norm(nn.Linear(4, 4)), "changes its buffers"),
    ],
)
@pytest.mark.parametrize("representation", [PMatDense, PMatKFAC, PMatImplicit])
def test_undefined_derivatives_are_refused(middle, message, representation):
    model, x = net(middle()), torch.randn(5, 3)
    state = {k: v.clone() for k, v in model.state_dict().items()}
    rng = torch.get_rng_state()
    with pytest.raises(ValueError, match=message):
        FIM(model, (x,), representation).trace()
    assert all(torch.equal(v, state[k]) for k, v in model.state_dict().items())
    assert torch.equal(torch.get_rng_state(), rng)
    assert not any(m._forward_hooks for m in model.modules())


@pytest.mark.parametrize("module", [nn.Dropout(0.0), nn.Dropout(0.5).eval(), nn.LSTM(4, 4, dropout=0.0)])
def test_harmless_train_mode_is_accepted(module):
    model = nn.Sequential(
        nn.Linear(3, 4), module if not isinstance(module, nn.LSTM) else nn.Identity(), nn.Linear(4, 3)
    )
    FIM(model, (torch.randn(3, 3),), PMatDiag)
    assert model.training


def test_sequences_that_look_like_batches():
    """As many tokens as examples: the axis of examples is found, not assumed."""
    model, batch, _ = CASES["sequence-first"].make(4)
    assert batch[0].shape[0] == batch[0].shape[1]
    M = oracle.fim(model, [batch], "regression")
    assert oracle.relative(FIM(model, batch, PMatDense, "regression").to_torch(), M) < 1e-10


def test_one_example():
    for name in ("mlp", "convnet", "sequence-first", "attention", "positions", "windows"):
        model, batch, function = CASES[name].make(1)
        M = oracle.fim(model, [batch], "regression", function)
        assert oracle.relative(FIM(model, batch, PMatDense, "regression", function=function).to_torch(), M) < 1e-10


# Layers


class Detached(nn.Module):
    """Uses the weight of a child without calling it."""

    def __init__(self):
        super().__init__()
        self.inner = nn.Linear(3, 3)

    def forward(self, x):
        return torch.tanh(x @ self.inner.weight.softmax(0).T + self.inner.bias.softmax(0))


def test_a_layer_that_is_never_called_is_named():
    model = oracle.randomise(nn.Sequential(nn.Linear(3, 3), Detached()))
    batch = (torch.randn(4, 3),)
    with pytest.raises(ValueError, match=r"layer '1.inner' \(Linear\) was never called"):
        FIM(model, batch, PMatDense)
    lc = LayerCollection.from_model(model).exclude("1.inner")
    FIM(model, batch, PMatDense, layer_collection=lc)


def test_whole_modules():
    class Own(Detached):
        pass

    whole(Own)
    model = oracle.randomise(nn.Sequential(nn.Linear(3, 3), Own()))
    batch = (torch.randn(4, 3),)
    M = oracle.fim(model, [batch], "regression")
    F = FIM(model, batch, PMatDense, "regression")
    assert list(F.layer_collection) == ["0", "1"]
    assert oracle.relative(F.to_torch(), M) < 1e-10


def test_a_users_kind():
    class Gain(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = nn.Parameter(torch.ones(3))

        def forward(self, x):
            return self.weight * x

    calls = []

    @kind(Gain, packing=lambda module, bias: Packing.flat(3))
    def gain(module, gy, x):
        calls.append(1)
        return Dense(gy * x)

    model = oracle.randomise(nn.Sequential(nn.Linear(3, 3), Gain()))
    batch = (torch.randn(4, 3),)
    M = oracle.fim(model, [batch], "regression")
    assert oracle.relative(FIM(model, batch, PMatDense, "regression").to_torch(), M) < 1e-10
    assert calls


def test_layers_behind_no_grad_or_checkpointing_are_named():
    class Behind(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Linear(3, 3), nn.Linear(3, 3)

        def forward(self, x):
            with torch.no_grad():
                x = self.a(x)
            return self.b(x)

    model, batch = Behind(), (torch.randn(4, 3),)
    with pytest.raises(RuntimeError, match=r"layer 'a' ran under torch\.no_grad"):
        FIM(model, batch, PMatDense)
    assert not model.a._forward_hooks
    FIM(model, batch, PMatDense, layer_collection=LayerCollection.from_model(model, "b"))


def test_an_input_changed_in_place_is_named():
    class Inplace(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Linear(3, 3), nn.Linear(3, 3)

        def forward(self, x):
            h = torch.tanh(self.a(x)) + 0
            y = self.b(h.detach())
            h += y
            return h

    with pytest.raises(ValueError, match="layer 'b': its input was modified in place"):
        FIM(Inplace(), (torch.randn(4, 3),), PMatDense)


def test_embeddings_that_have_no_derivative_are_named():
    for options in ({"max_norm": 1.0}, {"scale_grad_by_freq": True}):
        model = nn.Sequential(nn.Embedding(5, 3, **options), nn.Flatten(), nn.Linear(6, 3))
        with pytest.raises(NotImplementedError, match=next(iter(options))):
            FIM(model, (torch.randint(5, (4, 2)),), PMatDense)


def test_a_large_vocabulary_costs_no_square():
    model = nn.Sequential(nn.Embedding(30000, 4), nn.Flatten(), nn.Linear(8, 3))
    F = FIM(model, (torch.randint(30000, (4, 2)),), PMatKFAC)
    assert "Kron(Dense, Diag)" in repr(F)
    assert F.nbytes() < 10 * 30000 * 8
    F = FIM(model, (torch.randint(30000, (4, 2)),), PMatEKFAC)
    assert "Kron(Dense, Eye)" in repr(F)
    F.solve(random_pvector(F.layer_collection), 0.1)


def test_layers_without_kronecker_form_have_their_exact_block_or_say_so():
    model, batch = SelfAttention(add_bias_kv=True), (torch.randn(3, 3, 4),)
    F = FIM(model, batch, PMatKFAC)
    G = FIM(model, batch, PMatBlockDiag)
    assert oracle.relative(F.block("attention").to_torch(), G.block("attention").to_torch()) < 1e-12
    assert "attention  Dense" in repr(F)
    with (
        memory_budget(1000),
        pytest.raises(MemoryError, match=r"'attention' \(MultiheadAttention\) has no Kronecker form.*PMatMixed"),
    ):
        FIM(model, batch, PMatKFAC, dense="attention")
    with memory_budget(1000):
        assert "approximate: axes" in repr(FIM(model, batch, PMatKFAC))
    FIM(model, batch, PMatMixed.of(PMatKFAC, {nn.MultiheadAttention: PMatDiag}))
    with pytest.raises(KeyError, match="selects no layer"):
        FIM(model, batch, PMatMixed.of(PMatKFAC, {nn.Conv2d: PMatDiag}))


def test_mixed_dtypes_and_devices():
    model, x = mlp()
    model[0].float()
    with pytest.raises(ValueError, match=r"more than one dtype \(torch.float32, torch.float64\)"):
        FIM(model, (x,), PMatDense)
    model, x = mlp()
    with pytest.raises(ValueError, match=f"but the model is on {oracle.HERE}"):
        FIM(model, (x,), PMatDense, device="meta")


def test_collections_and_vectors_of_other_models():
    model, x = mlp()
    other = LayerCollection.from_model(nn.Sequential(nn.Linear(2, 2)))
    with pytest.raises(ValueError, match=r"another model: it has '0.weight' of shape \(2, 2\)"):
        FIM(model, (x,), PMatDense, layer_collection=other)
    F = FIM(model, (x,), PMatDense)
    for operation in (F.mv, F.solve, F.vTMv):
        with pytest.raises(ValueError, match="PVector is of another layer collection"):
            operation(random_pvector(other))
        with pytest.raises(TypeError, match="expected a PVector"):
            operation(torch.zeros(F.size(0)))
    with pytest.raises(ValueError, match="PMatDense is of another layer collection"):
        _ = F + FIM(nn.Sequential(nn.Linear(3, 3)), (x,), PMatDense)
    with pytest.raises(KeyError, match="no layer 'x'"):
        F.block("x")
    with pytest.raises(ValueError, match="give one value for each layer"):
        F.solve(PVector.from_model(model), regul={"0": 0.1})
    with pytest.raises(ValueError, match="either data, or generator and examples"):
        PMatDense(F.layer_collection)
    with pytest.raises(ValueError, match="sharing='both'"):
        FIM(model, (x,), PMatKFAC, sharing="both")
    with pytest.raises(ValueError, match="norm: ord='x'"):
        F.norm("x")


# Hygiene


@pytest.mark.parametrize("representation", [PMatDense, PMatKFAC, PMatEKFAC, PMatImplicit])
@pytest.mark.parametrize("fails", [False, True])
def test_the_users_objects_are_as_they_were(representation, fails):
    model, batch, _ = CASES["residual-inplace"].make(4)
    model.train()
    model.bn.eval()
    model.conv.weight.requires_grad_(False)
    seen = []
    model.head.register_forward_hook(lambda m, a, y: seen.append(1))
    for p in model.parameters():
        p.grad = torch.ones_like(p) if p.requires_grad else None
    state = {k: v.clone() for k, v in model.state_dict().items()}
    flags = [p.requires_grad for p in model.parameters()]
    modes = [m.training for m in model.modules()]
    hooks = [len(m._forward_hooks) for m in model.modules()]
    rng = torch.get_rng_state()

    def function(x):
        if fails and len(seen) > (0 if representation is PMatImplicit else 1):
            raise ZeroDivisionError
        return model(x)

    lc = LayerCollection.from_model(model, frozen=True)
    try:
        F = FIM(model, [batch, batch], representation, function=function, layer_collection=lc)
        F.mv(PVector.from_model(model, lc).detach())
        assert not fails
    except ZeroDivisionError:
        assert fails
    assert seen
    assert all(torch.equal(v, state[k]) for k, v in model.state_dict().items())
    assert [p.requires_grad for p in model.parameters()] == flags
    assert [m.training for m in model.modules()] == modes
    assert [len(m._forward_hooks) for m in model.modules()] == hooks
    assert all(p.grad is None or bool((p.grad == 1).all()) for p in model.parameters())
    assert torch.equal(torch.get_rng_state(), rng)


def test_randomness_comes_from_the_given_generator():
    model, x = mlp()
    rng = torch.get_rng_state()
    FIM_MonteCarlo(model, (x,), PMatDiag, generator=torch.Generator().manual_seed(0))
    assert torch.equal(torch.get_rng_state(), rng)
    torch.manual_seed(5)
    a = FIM_MonteCarlo(model, (x,), PMatDiag).to_torch()
    torch.manual_seed(5)
    assert torch.equal(FIM_MonteCarlo(model, (x,), PMatDiag).to_torch(), a)
    with pytest.raises(ValueError, match="trials"):
        FIM_MonteCarlo(model, (x,), PMatDiag, trials=0)


def test_works_inside_no_grad():
    model, x = mlp()
    expected = FIM(model, (x,), PMatDense).to_torch()
    with torch.no_grad():
        assert torch.equal(FIM(model, (x,), PMatDense).to_torch(), expected)
        assert oracle.relative(FIM(model, (x,), PMatImplicit).to_torch(), expected) < 1e-12
    assert not expected.requires_grad


def test_a_users_hook_that_changes_the_output_is_differentiated():
    model, x = mlp()
    model[0].register_forward_hook(lambda m, a, y: 2 * y)
    M = oracle.fim(model, [(x,)], "regression")
    assert oracle.relative(FIM(model, (x,), PMatDense, "regression").to_torch(), M) < 1e-12


def test_progress_bar(capsys):
    model, x = mlp()
    FIM(model, [(x,), (x,)], PMatDiag, verbose=True)
    assert "2/2" in capsys.readouterr().err


# What an adversary tried: each was silently wrong once


class Cell(nn.Module):
    """Two outputs, one of which depends on the other."""

    def __init__(self):
        super().__init__()
        self.cell = nn.LSTMCell(3, 3)

    def forward(self, x):
        h, c = self.cell(x)
        h, c = self.cell(x.flip(1), (h, c))
        return h + c


class WithFeatures(nn.Module):
    """Bare parameters, several outputs of which one is computed from the other."""

    def __init__(self):
        super().__init__()
        self.w = nn.Parameter(torch.ones(3))
        self.head = nn.Linear(3, 3)

    def forward(self, x):
        features = torch.tanh(x * self.w)
        return features, self.head(features), features


class UsesFeatures(nn.Module):
    def __init__(self):
        super().__init__()
        self.inner = WithFeatures()

    def forward(self, x):
        a, b, c = self.inner(x)
        return a * b + c


class Lists(nn.Module):
    def __init__(self):
        super().__init__()
        self.ws = nn.ParameterList([nn.Parameter(torch.ones(3)) for _ in range(2)])
        self.named = nn.ParameterDict({"b": nn.Parameter(torch.ones(3))})
        self.linear = nn.Linear(3, 3)

    def forward(self, x):
        return self.linear(torch.tanh(x * self.ws[0]) * self.ws[1] + self.named["b"])


class Swapped(nn.Module):
    def __init__(self):
        super().__init__()
        self.bilinear = nn.Bilinear(3, 3, 2)

    def forward(self, x):
        return self.bilinear(input2=x, input1=torch.tanh(x.flip(1)))


class Flattened(nn.Module):
    """Tokens flattened before the layer."""

    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(3, 2)

    def forward(self, x):
        return torch.tanh(self.linear(x.reshape(-1, 3))).view(x.shape[0], -1, 2).sum(1)


@pytest.mark.parametrize("net", [Cell, UsesFeatures, Lists, Swapped])
def test_unusual_modules(net):
    model = oracle.randomise(net())
    batch = (torch.randn(4, 3),)
    M = oracle.fim(model, [batch], "regression")
    for representation in (PMatDense, PMatImplicit):
        assert oracle.relative(FIM(model, batch, representation, "regression").to_torch(), M) < 1e-10


def test_sequences_of_different_lengths():
    model = oracle.randomise(Flattened())
    batches = [(torch.randn(2, 4, 3),), (torch.randn(2, 2, 3),), (torch.randn(1, 5, 3),)]
    M = oracle.fim(model, batches, "regression")
    assert oracle.relative(FIM(model, batches, PMatDense, "regression").to_torch(), M) < 1e-10


@pytest.mark.parametrize("variant", ["classif_binary_logits", "regression"])
def test_outputs_without_an_axis_of_outputs(variant):
    model = nn.Sequential(nn.Linear(3, 1), nn.Flatten(0))
    batch = (torch.randn(4, 3),)
    expected = FIM(model[0], batch, PMatDense, variant).to_torch()
    for representation in (PMatDense, PMatImplicit):
        F = FIM(model, batch, representation, variant, n_output=1)
        assert oracle.relative(F.to_torch(), expected) < 1e-12


class FunctionalTie(nn.Module):
    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(3, 3)

    def forward(self, x):
        return torch.nn.functional.linear(torch.tanh(self.linear(x)), 2 * self.linear.weight.T)


class SideOutput(nn.Module):
    def __init__(self):
        super().__init__()
        self.inner = Detached()

    def forward(self, x):
        return self.inner(x) + self.inner.inner.weight.sum()


class OwnBatchNorm(nn.Module):
    def __init__(self):
        super().__init__()
        self.w = nn.Parameter(torch.ones(3))

    def forward(self, x):
        return (x - x.mean(0)) * self.w


@pytest.mark.parametrize("net", [FunctionalTie, OwnBatchNorm])
def test_derivatives_that_do_not_add_up_are_refused(net):
    model = oracle.randomise(net())
    with pytest.raises(ValueError, match=r"do not add up to the gradient|depends on the others"):
        FIM(model, (torch.randn(4, 3),), PMatDense, "regression")


def test_hooks_of_the_user_on_generic_modules():
    model = nn.Sequential(OwnScale(), nn.Linear(3, 2))
    model[0].register_forward_hook(lambda m, a, y: 2 * y)
    model[0].register_forward_pre_hook(lambda m, a: (a[0] + 1,))
    batch = (torch.randn(4, 3),)
    M = oracle.fim(model, [batch], "regression")
    assert oracle.relative(FIM(model, batch, PMatDense, "regression").to_torch(), M) < 1e-10
    assert len(model[0]._forward_hooks) == 1


class OwnScale(nn.Module):
    def __init__(self):
        super().__init__()
        self.w = nn.Parameter(torch.rand(3))

    def forward(self, x):
        return torch.sin(x * self.w)


#: What of other examples is added to an example, before a layer.
MIXTURES = {
    "mean": lambda h: h.mean(0),
    "first": lambda h: h[0],
    "last": lambda h: h[-1],
    "one before": lambda h: h.roll(1, 0),
    "one behind": lambda h: h.roll(-1, 0),
    "all before": lambda h: h.cumsum(0) - h,
    "all behind": lambda h: h.flip(0).cumsum(0).flip(0) - h,
    "opposite": lambda h: h.flip(0),
    "attention": lambda h: torch.softmax(h @ h.T, 1) @ h,
    "causal attention": lambda h: torch.softmax((h @ h.T).tril(), 1) @ h,
    "one value": lambda h: nn.functional.pad(h[-1:, :1], (0, 2, 0, len(h) - 1)),  # of the last in the first
    "neighbours in pairs": lambda h: h.unflatten(0, (-1, 2)).flip(1).flatten(0, 1) if len(h) % 2 == 0 else 0 * h,
}


@pytest.mark.parametrize("much", [1.0, 1e-2])
@pytest.mark.parametrize("mixture", MIXTURES)
@pytest.mark.parametrize("representation", [PMatDiag, PMatKFAC, PMatImplicit])
def test_models_that_mix_examples_are_refused(mixture, much, representation):
    one, two = oracle.randomise(nn.Linear(3, 3)), oracle.randomise(nn.Linear(3, 2))
    model = nn.Sequential(one, two)

    def function(x):
        h = torch.tanh(one(x))
        return two(h + much * MIXTURES[mixture](h))

    batches = [(torch.randn(6, 3),), (torch.randn(6, 3),)]
    with pytest.raises(ValueError, match="depends on the others"):
        FIM(model, batches, representation, function=function).mv(PVector.from_model(model).detach())


@pytest.mark.parametrize("representation", [PMatDense, PMatDiag, PMatKFAC, PMatImplicit])
def test_a_minibatch_with_more_axes_is_looked_at_anew(representation):
    """Its examples may be along another axis, which is as long here."""
    one, two = oracle.randomise(nn.Linear(3, 4)), oracle.randomise(nn.Linear(4, 2))
    model = nn.Sequential(one, two)

    def function(x):
        return two(one(x)) if x.ndim == 2 else two(one(x.transpose(0, 1)).tanh().mean(0))

    batches = [(torch.randn(5, 3),), (torch.randn(5, 5, 3),)]
    v = PVector.from_model(model).detach()

    def product(loader):
        return FIM(model, loader, representation, "regression", function=function).mv(v).to_torch()

    if representation is PMatKFAC:  # of which the factors are means, not the products
        assert oracle.relative(product(batches), product(batches[::-1])) < 1e-10
    else:
        assert oracle.relative(2 * product(batches), sum(map(product, batches))) < 1e-10


def test_losses_that_mix_examples_are_refused():
    model, x = mlp(3)
    y = torch.randn(3, 3)
    for loss in (
        lambda f, y: (f - y).square().mean(0),
        lambda f, y: torch.log_softmax(f @ f.T, 1).diagonal(),
    ):
        with pytest.raises(ValueError, match="depends on the outputs of others"):
            EmpiricalFisher(model, (x, y), PMatDiag, loss)
    with pytest.raises(ValueError, match="NaN or infinite"):
        EmpiricalFisher(model, (x, y * float("nan")), PMatDiag, nn.MSELoss())


def test_ambiguous_arguments_are_refused():
    model, x = mlp(4)
    with pytest.raises(ValueError, match="not clear whether that is one minibatch"):
        FIM(model, ((x, x), x), PMatDiag)
    with pytest.raises(ValueError, match="these have 3, 4 examples"):
        FIM(model, [x, x[:3]], PMatDiag)
    with pytest.raises(ValueError, match='use "segmentation_logits"'):
        FIM(nn.Linear(3, 4), (torch.randn(2, 5, 3),), PMatDiag)
    with pytest.raises(NotImplementedError, match="complex"):
        FIM(nn.Linear(3, 4, dtype=torch.complex64), (x,), PMatDiag)
    with pytest.raises(ValueError, match="collection is empty"):
        FIM(model, (x,), PMatDiag, layer_collection=LayerCollection())


def test_inputs_changed_in_place_are_refused():
    model, x = mlp(4)

    def function(x):
        x -= 1
        return model(x)

    with pytest.raises(ValueError, match="modifies its inputs in place"):
        FIM(model, (x,), PMatDiag, function=function)


class Once(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return x.exp()

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, g):
        return g * ctx.saved_tensors[0].exp()


def test_backwards_that_cannot_be_differentiated_are_refused():
    model, x = mlp(4)
    function = lambda x: model[2](Once.apply(model[0](x)))  # noqa: E731
    M = oracle.fim(model, [(x,)], "regression", function)
    assert oracle.relative(FIM(model, (x,), PMatDense, "regression", function=function).to_torch(), M) < 1e-10
    with pytest.raises((NotImplementedError, RuntimeError), match=r"cannot be differentiated|once_differentiable"):
        FIM(model, (x,), PMatImplicit, "regression", function=function).mv(PVector.from_model(model).detach())


def test_a_loader_that_shuffles_is_no_harm_to_products():
    model, x = mlp(12)
    torch.manual_seed(0)
    loader = DataLoader(TensorDataset(x), 3, shuffle=True)
    M = FIM(model, (x,), PMatDense).to_torch()
    v = PVector.from_model(model).detach()
    for budget in (2**30, 3000, 1):
        with memory_budget(budget):
            F = FIM(model, loader, PMatImplicit)
            for _ in range(3):
                assert oracle.relative(F.mv(v).to_torch(), M @ v.to_torch()) < 1e-10


def test_products_of_matrices_keep_that_they_are_not_symmetric():
    model, x = mlp(6)
    A, B = FIM(model, (x,), PMatDense), FIM(model, (x,), PMatDiag)
    P = A @ B
    M = P.to_torch()
    v = PVector.from_model(model).detach()
    values = {"0": 0.1, "2": 0.7}
    D = torch.cat([torch.full((16,), 0.1), torch.full((15,), 0.7)])
    assert oracle.relative(P.solve(v, values).to_torch(), torch.linalg.solve(M + torch.diag(D), v.to_torch())) < 1e-9
    block = P.block("2")
    u = random_pvector(block.layer_collection)
    assert (
        oracle.relative(
            block.solve(u, 0.1).to_torch(), torch.linalg.solve(M[16:, 16:] + 0.1 * torch.eye(15), u.to_torch())
        )
        < 1e-9
    )


def test_a_pending_backward_survives_the_trace_of_an_implicit_matrix():
    model, x = mlp(4)
    F = FIM(model, (x,), PMatImplicit)
    before = float(F.trace())
    with torch.no_grad():
        for p in model.parameters():
            p.mul_(2)
    loss = model(x).square().sum()
    assert float(F.trace()) == pytest.approx(before, rel=1e-12)
    loss.backward()


class NeedsTheBatch(nn.Module):
    """What it does with its parameter has no form of its own, so that it is run on examples alone."""

    def __init__(self):
        super().__init__()
        self.w = nn.Parameter(torch.ones(3))

    def forward(self, x, n):
        return (x * self.w.softmax(0)).view(n, -1)


class ScalesTheBatch(NeedsTheBatch):
    def forward(self, x, n):
        return (x * self.w).view(n, -1)


class GivesTheBatch(nn.Module):
    def __init__(self, inner=NeedsTheBatch):
        super().__init__()
        self.inner = inner()

    def forward(self, x):
        return self.inner(x, x.shape[0])


@pytest.mark.filterwarnings("ignore:.*cannot be vectorised:RuntimeWarning")
def test_a_module_that_does_not_run_on_one_example_is_named():
    with pytest.raises((NotImplementedError, ValueError), match=r"layer 'inner' \(NeedsTheBatch\)"):
        FIM(GivesTheBatch(), (torch.randn(4, 3),), PMatDense)


def test_a_module_that_does_not_run_on_one_example_is_seen_by_what_it_does():
    model, batch = GivesTheBatch(ScalesTheBatch), (torch.randn(4, 3),)
    M = oracle.fim(model, [batch], "classif_logits")
    assert oracle.relative(FIM(model, batch, PMatDense).to_torch(), M) < 1e-10


def test_a_representation_is_a_class():
    model, x = mlp(3)
    with pytest.raises(TypeError, match="expected a PMat class"):
        FIM(model, (x,), "KFAC")


def test_a_decomposition_that_does_not_converge_is_made_in_double_precision(monkeypatch):
    real = torch.linalg.eigh

    def fails(m):
        if m.dtype == torch.float32:
            raise torch.linalg.LinAlgError("did not converge")
        return real(m)

    monkeypatch.setattr(torch.linalg, "eigh", fails)
    half = torch.randn(1, 5, 3, dtype=torch.float32)
    found = blocks.Dense(half @ half.mT).eig()
    assert found.l.dtype == torch.float32
    torch.testing.assert_close(found.to_dense(), (half @ half.mT)[0])
