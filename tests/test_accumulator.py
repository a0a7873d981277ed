"""The laws of a running estimate: the same matrix in whatever pieces, merges and round trips it comes."""

import copy
import io
import itertools
import pickle
from functools import partial

import oracle
import pytest
import torch
from laws import EXACT, FACTORED, PAIRS
from models import CASES, SMALL
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from nngeometry import (
    FIM,
    GGN,
    Accumulator,
    FIM_MonteCarlo,
    GradientCovariance,
    Hessian,
    LayerCollection,
    PMatBlockDiag,
    PMatDense,
    PMatDiag,
    PMatEKFAC,
    PMatImplicit,
    PMatKFAC,
    PMatLowRank,
)

TOLERANCE = 1e-12


def name_of(value):
    return getattr(value, "__name__", "PMatMixed")


def net():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3)).double()


def batches(*sizes):
    g = torch.Generator().manual_seed(1)
    return [(torch.randn(n, 4, generator=g).double(), torch.randint(3, (n,), generator=g)) for n in sizes]


def options(matrix):
    return {"generator": torch.Generator().manual_seed(5)} if matrix is FIM_MonteCarlo else {}


def same(one, other, tolerance=TOLERANCE):
    a, b = one.to_torch(), other.to_torch()
    assert oracle.relative(a, b) <= tolerance


@pytest.mark.parametrize(("matrix", "representation"), PAIRS, ids=name_of)
def test_one_update_is_the_constructor_to_the_bit(matrix, representation):
    model, data = net(), batches(7, 5, 4)
    F = matrix(model, data, representation, **options(matrix))
    acc = Accumulator(matrix, model, representation, **options(matrix))
    assert acc.update(data) is acc
    assert torch.equal(acc.matrix().to_torch(), F.to_torch())
    assert torch.equal(acc.matrix().to_torch(), F.to_torch()), "asked twice"
    assert type(acc.matrix()) is type(F)
    assert acc.n == 16


@pytest.mark.parametrize(
    ("matrix", "representation"), [p for p in PAIRS if p[1] in EXACT or p[0] is Hessian], ids=name_of
)
def test_any_split_is_the_same_matrix(matrix, representation):
    model, data = net(), batches(7, 5, 4, 1)
    F = matrix(model, data, representation, **options(matrix))
    acc = Accumulator(matrix, model, representation, **options(matrix)).decay(0.5)  # of nothing
    for batch in data:
        acc.update(batch)
        acc.matrix()
    same(acc.matrix(), F)


@pytest.mark.parametrize(
    ("matrix", "representation"),
    [p for p in PAIRS if (p[1] in EXACT or p[0] is Hessian) and p[0] is not FIM_MonteCarlo],
    ids=name_of,
)
def test_any_merge_tree_is_the_same_matrix(matrix, representation):
    model, data = net(), batches(7, 5, 4)
    F = matrix(model, data, representation)
    for order in itertools.permutations(range(3)):
        a, b, c = (Accumulator(matrix, model, representation).update(data[k]) for k in order)
        before = b.matrix().to_torch()
        same((a + b + c).matrix(), F)
        same((a + (b + c)).matrix(), F)
        assert torch.equal(b.matrix().to_torch(), before)
        empty = Accumulator(matrix, model, representation)
        same((empty + a).matrix(), a.matrix(), 0.0)
        assert a.merge(b) is a
        a.merge(c).merge(Accumulator(matrix, model, representation))
        same(a.matrix(), F)
        assert a.n == 16


@pytest.mark.parametrize(("matrix", "representation"), PAIRS, ids=name_of)
def test_decay_weighs_the_old(matrix, representation):
    model, (one, other) = net(), batches(7, 5)
    acc = Accumulator(matrix, model, representation, **options(matrix)).update(one)
    first = acc.matrix().to_torch()
    acc.decay(0.25)
    assert acc.n == 0.25 * 7
    assert oracle.relative(acc.matrix().to_torch(), first) < TOLERANCE, "a mean does not change when all of it is"
    acc.update(other)
    assert acc.n == 0.25 * 7 + 5
    if representation in FACTORED or matrix in (GradientCovariance, FIM_MonteCarlo):
        return  # no mean of matrices
    if not isinstance(representation, partial):
        second = matrix(model, other, representation, **options(matrix)).to_torch()
        expected = (0.25 * 7 * first + 5 * second) / (0.25 * 7 + 5)
        assert oracle.relative(acc.matrix().to_torch(), expected) < TOLERANCE


@pytest.mark.parametrize("name", [*SMALL, "attention"])
@pytest.mark.parametrize("representation", [*EXACT, PMatEKFAC])
def test_a_mean_stays_what_it_is_however_little_is_left_of_it(name, representation):
    model, one, function = CASES[name].make(3)
    acc = Accumulator(FIM, model, representation, variant="regression", function=function).update(one)
    before = acc.matrix().to_torch()
    same_as_before = partial(oracle.relative, b=before)
    assert same_as_before(acc.decay(1e-3).matrix().to_torch()) < TOLERANCE
    assert same_as_before(acc.decay(1e-9).update(one).matrix().to_torch()) < 1e-9


@pytest.mark.parametrize(("matrix", "representation"), PAIRS, ids=name_of)
def test_what_underflows_in_single_precision_stays_a_mean(matrix, representation):
    model, (one, other) = net().float(), [(x.float(), y) for x, y in batches(7, 5)]
    acc = Accumulator(matrix, model, representation, **options(matrix)).update(one)
    before = acc.matrix().to_torch()
    for _ in range(1000):
        acc.decay(0.9)
    assert oracle.relative(acc.matrix().to_torch(), before) < 1e-6
    saved = acc.state_dict()
    again = Accumulator(matrix, model, representation, **options(matrix)).load_state_dict(saved)
    assert torch.equal(again.matrix().to_torch(), acc.matrix().to_torch())
    assert again.n == acc.n > 0
    assert bool(torch.isfinite(acc.update(other).matrix().to_torch()).all())
    assert abs(acc.n - 5) < 1e-12


@pytest.mark.parametrize("representation", [PMatDense, PMatBlockDiag, PMatDiag, PMatLowRank, PMatEKFAC])
@pytest.mark.parametrize("matrix", [GGN, Hessian])
def test_a_sum_of_losses_is_a_decayed_sum(matrix, representation):
    if matrix is Hessian and representation in (PMatLowRank, PMatEKFAC):
        return  # no running average
    model, (one, other) = net(), batches(7, 5)
    made = partial(Accumulator, matrix, model, representation, loss=nn.CrossEntropyLoss(reduction="sum"))
    first, second = (made().update(batch).matrix() for batch in (one, other))
    acc = made().update(one).decay(0.25)
    assert oracle.relative(acc.matrix().to_torch(), 0.25 * first.to_torch()) < TOLERANCE
    again = made().load_state_dict(acc.state_dict())
    assert torch.equal(again.matrix().to_torch(), acc.matrix().to_torch())
    trace = 0.25 * first.trace() + second.trace()
    assert oracle.relative(acc.update(other).matrix().trace(), trace) < TOLERANCE
    if representation is not PMatEKFAC:
        both = (again + made().update(other).decay(0.5)).matrix().to_torch()
        assert oracle.relative(both, 0.25 * first.to_torch() + 0.5 * second.to_torch()) < TOLERANCE


def test_decayed_factors_are_decayed_means():
    model, (one, other) = net(), batches(7, 5)
    acc = Accumulator(FIM, model, PMatKFAC).update(one).decay(0.5).update(other)
    a, b = (FIM(model, batch, PMatKFAC) for batch in (one, other))
    for part, x, y in zip(acc.matrix().root.parts, a.root.parts, b.root.parts, strict=True):
        for factor in ("left", "right"):
            mine, first, second = (getattr(p.block, factor).to_dense() for p in (part, x, y))
            assert oracle.relative(mine, (3.5 * first + 5 * second) / 8.5) < TOLERANCE


def test_a_decayed_covariance_is_centred_on_the_decayed_mean():
    model, (one, other) = net(), batches(7, 5)
    acc = Accumulator(GradientCovariance, model, PMatDense).update(one).decay(0.5).update(other)
    g = []
    for x, y in (one, other):
        for k in range(len(x)):
            grads = torch.autograd.grad(
                nn.functional.cross_entropy(model(x[k : k + 1]), y[k : k + 1]), list(model.parameters())
            )
            g.append(torch.cat([one.flatten() for one in grads]))
    g = torch.stack(g)
    w = torch.cat([torch.full((7,), 0.5), torch.ones(5)]).double()
    w = w / w.sum()
    mean = w @ g
    expected = (g - mean).T @ ((g - mean) * w[:, None])
    assert oracle.relative(acc.matrix().to_torch(), expected) < TOLERANCE


@pytest.mark.parametrize("name", [*SMALL, "attention", "conv1d"] if "conv1d" in CASES else [*SMALL, "attention"])
@pytest.mark.parametrize("representation", [*EXACT, PMatEKFAC])
def test_every_kind_of_layer(name, representation):
    model, one, function = CASES[name].make(3)
    _, other, _ = CASES[name].make(2)
    F = FIM(model, [one, other], representation, "regression", function=function)
    acc = Accumulator(FIM, model, representation, variant="regression", function=function)
    if representation is PMatEKFAC:
        acc.update([one, other])
    else:
        acc.update(one).update(other)
    same(acc.matrix(), F)
    again = Accumulator(FIM, model, representation, variant="regression", function=function)
    again.load_state_dict(acc.state_dict())
    assert torch.equal(again.matrix().to_torch(), acc.matrix().to_torch())


@pytest.mark.parametrize(("matrix", "representation"), PAIRS, ids=name_of)
def test_a_state_goes_on_to_the_bit(matrix, representation):
    model, (one, other, third) = net(), batches(7, 5, 4)
    acc = Accumulator(matrix, model, representation, **options(matrix)).update(one).decay(0.9).update(other)
    file = io.BytesIO()
    torch.save(acc.state_dict(), file)
    file.seek(0)
    saved = torch.load(file, weights_only=True)
    made = Accumulator(matrix, model, representation, **options(matrix)).load_state_dict(saved)
    copied = copy.deepcopy(acc)
    assert torch.equal(made.matrix().to_torch(), acc.matrix().to_torch())
    for _ in range(2):
        for each in (acc, made, copied):
            each.decay(0.9).update(third)
    assert torch.equal(made.matrix().to_torch(), acc.matrix().to_torch())
    assert torch.equal(copied.matrix().to_torch(), acc.matrix().to_torch())
    assert made.n == acc.n


def test_the_state_is_no_view_of_what_goes_on():
    model, (one, other) = net(), batches(7, 5)
    acc = Accumulator(FIM, model, PMatDense).update(one)
    state, expected = acc.state_dict(), acc.matrix().to_torch()
    acc.decay(0.5).update(other)
    assert torch.equal(acc.load_state_dict(state).matrix().to_torch(), expected)
    acc.update(other)
    assert torch.equal(acc.load_state_dict(state).matrix().to_torch(), expected)


def test_many_updates_of_a_wide_layer():
    """A factor of few inputs is held by these, until there are many."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(40, 3), nn.Tanh(), nn.Linear(3, 2)).double()
    data = [(torch.randn(3, 40).double(),) for _ in range(12)]
    acc = Accumulator(FIM, model, PMatKFAC)
    for k, batch in enumerate(data):
        acc.update(batch)
        same(acc.matrix(), FIM(model, data[: k + 1], PMatKFAC))


class Grows(nn.Module):
    """Sequences of one position, or of more."""

    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(3, 4), nn.Linear(4, 2)

    def forward(self, x):
        return self.b(torch.tanh(self.a(x))).mean(1)


@pytest.mark.parametrize("lengths", [(1, 1, 3), (3, 1, 1), (1, 3, 1)])
@pytest.mark.parametrize("representation", EXACT)
def test_positions_may_come_later(lengths, representation):
    torch.manual_seed(0)
    model = Grows().double()
    data = [(torch.randn(4, t, 3).double(),) for t in lengths]
    F = FIM(model, data, representation, "regression")
    parts = [Accumulator(FIM, model, representation, variant="regression").update(batch) for batch in data]
    same((parts[0] + parts[1] + parts[2]).matrix(), F)
    acc = Accumulator(FIM, model, representation, variant="regression")
    for batch in data:
        acc.update(batch)
    same(acc.matrix(), F)


def eigenbasis(F, k):
    return F.root.parts[k].block.basis


def test_ekfac_adds_exact_moments_in_the_basis_at_hand():
    model, (one, other) = net(), batches(7, 5)
    acc = Accumulator(FIM, model, PMatEKFAC).update(one).update(other)
    F = FIM(model, one, PMatEKFAC)
    F.update_diag([one, other])
    same(acc.matrix(), F)


def test_ekfac_outside_of_a_thin_basis():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(40, 3), nn.Tanh(), nn.Linear(3, 2)).double()
    data = [(torch.randn(3, 40).double(),) for _ in range(3)]
    acc = Accumulator(FIM, model, PMatEKFAC).update(data[0]).update(data[1]).update(data[2])
    truth = FIM(model, data, PMatDense)
    assert oracle.relative(acc.matrix().trace(), truth.trace()) < TOLERANCE
    F = FIM(model, data[0], PMatEKFAC)
    F.update_diag(data)
    same(acc.matrix(), F, 1e-10)
    acc.rebase()
    assert oracle.relative(acc.matrix().trace(), truth.trace()) < TOLERANCE
    acc.reset().update(data)
    same(acc.matrix(), FIM(model, data, PMatEKFAC))


def test_rebase_is_the_diagonal_of_the_old_in_the_new_basis():
    model, (one, other) = net(), batches(7, 5)
    acc = Accumulator(FIM, model, PMatEKFAC).update(one).update(other)
    old = acc.matrix()
    assert acc.rebase() is acc
    new = acc.matrix()
    factors = FIM(model, [one, other], PMatKFAC)
    for before, after, kfac in zip(old.root.parts, new.root.parts, factors.root.parts, strict=True):
        Q = after.block.basis.to_dense()
        K = kfac.block.to_dense()
        rotated = Q.T @ K @ Q
        assert oracle.relative(rotated, torch.diag(rotated.diagonal())) < 1e-10, "the eigenbasis of all factors"
        expected = (Q.T @ before.block.to_dense() @ Q).diagonal()
        assert oracle.relative(after.block.l.flatten(), expected) < 1e-10
    assert oracle.relative(new.trace(), old.trace()) < TOLERANCE


def test_ekfac_in_different_bases_does_not_merge_silently():
    model, (one, other) = net(), batches(7, 5)
    a, b = (Accumulator(FIM, model, PMatEKFAC).update(batch) for batch in (one, other))
    with pytest.raises(ValueError, match=r"layer '0'.*rebase"):
        a.merge(b)
    a.merge(b.rebase(a))
    assert a.n == 12
    assert oracle.relative(a.matrix().trace(), FIM(model, [one, other], PMatDense).trace()) < TOLERANCE


def test_what_went_ahead_in_another_basis_is_not_taken_silently():
    model, (one, other, third) = net(), batches(7, 5, 6)
    acc = Accumulator(FIM, model, PMatEKFAC)
    early = acc.ahead().update(other)
    acc.update(one)
    rebased, late = acc.ahead().update(other).update(third).rebase(), acc.ahead().update(other)
    expected = copy.deepcopy(acc).take(copy.deepcopy(late)).matrix()
    for ahead in (early, rebased):
        with pytest.raises(ValueError, match="different bases"):
            acc.take(ahead)
        assert acc.n == 7
    same(copy.deepcopy(acc).take(late).matrix(), expected)
    late = acc.ahead().update(other)
    with pytest.raises(ValueError, match="different bases"):
        acc.update(third).rebase().take(late)


def test_an_empty_one_takes_the_basis_of_another():
    model, (one, other) = net(), batches(7, 5)
    a, b = Accumulator(FIM, model, PMatEKFAC), Accumulator(FIM, model, PMatEKFAC)
    with pytest.raises(ValueError, match="no basis yet"):
        b.rebase(a)
    a.update(one)
    b.rebase(a).update(other)
    same((a + b).matrix(), copy.deepcopy(a).update(other).matrix())


@pytest.mark.parametrize(("matrix", "representation"), PAIRS, ids=name_of)
def test_nothing_is_taken_twice(matrix, representation):
    model, (one, other) = net(), batches(7, 5)
    acc = Accumulator(matrix, model, representation, **options(matrix)).update(one)
    ahead = acc.ahead().update(other)
    expected = acc.take(ahead).matrix().to_torch()
    assert ahead.n == 0
    assert torch.equal(acc.take(ahead).matrix().to_torch(), expected)
    ahead.update(one)
    assert torch.equal(acc.matrix().to_torch(), expected)
    with pytest.raises(ValueError, match="use merge"):
        acc.take(acc)
    assert acc.n == 12


@pytest.mark.parametrize(("matrix", "representation"), PAIRS, ids=name_of)
def test_all_of_a_matrix_is_where_the_sums_are(matrix, representation):
    model, (one, other) = net(), batches(7, 5)
    acc = Accumulator(matrix, model, representation, **options(matrix)).update(one).to(dtype=torch.float32)
    assert acc.update(other).matrix().dtype == torch.float32
    wide = Accumulator(matrix, model, representation, **options(matrix)).update(one).update(other)
    assert oracle.relative(acc.matrix().to_torch().double(), wide.matrix().to_torch()) < 1e-5
    with pytest.raises(ValueError, match=r"to: dtype=torch\.int64"):
        acc.to(dtype=torch.int64)


def test_a_covariance_without_factors_is_refused_before_anything_is_read():
    with pytest.raises(NotImplementedError, match="no Kronecker factors; use PMatEKFAC"):
        Accumulator(GradientCovariance, net(), PMatKFAC)


def test_parameters_that_became_one():
    model, (one, other) = net(), batches(7, 5)
    model = nn.Sequential(nn.Linear(4, 4), *model).double()
    acc = Accumulator(FIM, model, PMatDense).update(one)
    model[0].bias = nn.Parameter(torch.zeros(4).double())
    before = acc.update(other).matrix().to_torch()
    model.insert(1, nn.Linear(4, 4).double())
    lc = LayerCollection.from_model(model)
    model[1].bias = model[0].bias
    with pytest.raises(ValueError, match=r"'0\.bias' and '1\.bias' are one and the same"):
        FIM(model, one, PMatDense, layer_collection=lc)
    assert torch.equal(acc.matrix().to_torch(), before)


def test_low_rank_keeps_the_best_rows():
    model, data = net(), batches(7, 5, 4, 6)
    acc = Accumulator(FIM, model, PMatLowRank, rows=6)
    for batch in data:
        acc.update(batch)
    near, exact = acc.matrix(), FIM(model, data, PMatDense)
    assert len(near.root.parts[0].block.eigenvalues()) >= 0
    rows = acc.state_dict()["seen"]["states"][0][0]["value"][1:]
    assert sum(map(len, rows)) <= 12
    l, best = near.eig(6)[0], exact.eig(6)[0]
    assert bool((l <= best * (1 + 1e-9)).all())
    assert float(l.sum()) > 0.9 * float(best.sum())
    with pytest.raises(ValueError, match="rows"):
        FIM(model, data, PMatLowRank, rows=0)


def test_an_exception_leaves_what_was_seen():
    model, (one, other) = net(), batches(7, 5)
    for R in (PMatKFAC, PMatDense, PMatEKFAC):
        acc = Accumulator(FIM, model, R).update(one)
        before = acc.matrix().to_torch()

        def broken():
            yield other
            raise RuntimeError("the disk is full")

        with pytest.raises(RuntimeError, match="disk"):
            acc.update(broken())
        assert acc.n == 7
        assert torch.equal(acc.matrix().to_torch(), before)
        acc.update(other)
        assert acc.n == 12


def test_sums_may_be_held_elsewhere_and_in_double():
    model, data = net().float(), [(x.float(), y) for x, y in batches(7, 5)]
    acc = Accumulator(FIM, model, PMatKFAC).update(data[0]).to(dtype=torch.float64)
    assert acc.update(data[1]).matrix().dtype == torch.float64
    wide = FIM(net(), batches(7, 5), PMatKFAC)
    assert oracle.relative(acc.matrix().to_torch(), wide.to_torch()) < 1e-5
    assert acc.to("cpu").matrix().device.type == "cpu"


def test_draws_do_not_repeat_and_resume():
    model, (one, _) = net(), batches(7, 5)
    acc = Accumulator(FIM_MonteCarlo, model, PMatDiag, generator=torch.Generator().manual_seed(0))
    first = acc.update(one).matrix().to_torch()
    assert oracle.relative(acc.update(one).matrix().to_torch(), first) > 1e-3, "other labels"
    both = FIM_MonteCarlo(model, [one, one], PMatDiag, generator=torch.Generator().manual_seed(0))
    same(acc.matrix(), both)


def test_the_parameters_are_those_of_the_update():
    model, (one, other) = net(), batches(7, 5)
    acc = Accumulator(FIM, model, PMatDense).update(one)
    first = FIM(model, one, PMatDense).to_torch()
    with torch.no_grad():
        model[0].weight += 0.3
    acc.update(other)
    second = FIM(model, other, PMatDense).to_torch()
    assert oracle.relative(acc.matrix().to_torch(), (7 * first + 5 * second) / 12) < TOLERANCE


class Switch(nn.Module):
    """Mixes examples once it is told to."""

    def __init__(self):
        super().__init__()
        self.a, self.b, self.mixes = nn.Linear(4, 5), nn.Linear(5, 3), False

    def forward(self, x):
        y = torch.tanh(self.a(x))
        return self.b(y - y.mean(0) if self.mixes else y)


def changed(model, how):
    if how == "attribute":
        model.mixes = True
    elif how == "module":
        model.b = nn.Sequential(nn.BatchNorm1d(5), nn.Linear(5, 3)).double()
    elif how == "hook":
        model.a.register_forward_hook(lambda module, inputs, y: y - y.mean(0))
    elif how == "pre-hook":
        model.b.register_forward_pre_hook(lambda module, inputs: (inputs[0] - inputs[0].mean(0),))
    elif how == "forward":
        model.forward = lambda x: Switch.forward(model, x - x.mean(0))
    elif how == "class":
        model.__class__ = type("Other", (Switch,), {"forward": lambda self, x: Switch.forward(self, x - x.mean(0))})
    elif how == "container":
        model.options = {"of": ["nothing"]}


@pytest.mark.parametrize("how", ["attribute", "hook", "pre-hook", "forward", "class"])
@pytest.mark.parametrize("representation", [PMatDense, PMatKFAC, PMatEKFAC, PMatDiag])
def test_a_changed_model_is_looked_at_again(how, representation):
    model, (one, other) = Switch().double(), batches(7, 5)
    acc = Accumulator(FIM, model, representation).update(one).update(other)
    before = acc.matrix().to_torch()
    changed(model, how)
    with pytest.raises(ValueError, match=r"mixes examples|depends on the others"):
        acc.update(one)
    assert torch.equal(acc.matrix().to_torch(), before)


class Settings:
    def __init__(self):
        self.mixes = self.centred = False


class Configured(nn.Module):
    """Mixes examples behind its last layer, where only a look at the model tells."""

    mixes = False

    def __init__(self):
        super().__init__()
        self.a, self.b, self.settings = nn.Linear(4, 5), nn.Linear(5, 3), Settings()

    def head(self, y):
        return y

    def forward(self, x):
        y = self.head(self.b(torch.tanh(self.a(x))))
        return y - y.mean(0) if self.mixes or self.settings.mixes else y


@pytest.mark.parametrize("how", ["settings", "type", "method"])
@pytest.mark.parametrize("representation", [PMatDense, PMatKFAC, PMatEKFAC, PMatDiag])
def test_a_change_of_what_a_model_consults_is_seen(how, representation, monkeypatch):
    model, (one, other) = Configured().double(), batches(7, 5)
    acc = Accumulator(FIM, model, representation).update(one).update(other)
    before = acc.matrix().to_torch()
    if how == "settings":
        model.settings.mixes = True
    elif how == "type":
        monkeypatch.setattr(Configured, "mixes", True)
    else:
        monkeypatch.setattr(Configured, "head", lambda self, y: y - y.mean(0))
    with pytest.raises(ValueError, match=r"mixes examples|depends on the others"):
        acc.update(one)
    assert torch.equal(acc.matrix().to_torch(), before)


def test_a_changed_layer_is_refused():
    model, (one, other) = Switch().double(), batches(7, 5)
    acc = Accumulator(FIM, model, PMatDense).update(one)
    model.b = nn.Linear(5, 4).double()
    with pytest.raises(ValueError, match=r"'b\.weight' of shape"):
        acc.update(other)
    model.b = nn.Linear(5, 3).double()
    acc.update(other)
    model.b = nn.Sequential(nn.Linear(5, 3)).double()
    with pytest.raises(ValueError, match=r"b\.weight"):
        acc.update(other)
    assert acc.n == 12


def test_other_axes_are_looked_at_again():
    torch.manual_seed(0)
    model = Grows().double()

    class Flat(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = model

        def forward(self, x):
            return self.inner(x if x.ndim == 3 else x.unsqueeze(1))

    flat = Flat()
    data = [(torch.randn(4, 2, 3).double(),), (torch.randn(4, 3).double(),)]
    acc = Accumulator(FIM, flat, PMatDense, variant="regression").update(data[0]).update(data[1])
    same(acc.matrix(), FIM(flat, data, PMatDense, "regression"))


def test_the_model_is_as_it_was():
    model, (one, other) = Switch().double(), batches(7, 5)
    state = {k: v.clone() for k, v in model.state_dict().items()}
    model.a.weight.grad = torch.ones_like(model.a.weight)
    random = torch.get_rng_state()
    acc = Accumulator(FIM, model, PMatEKFAC).update(one).decay(0.9).update(other)
    acc.rebase().matrix()
    assert all(torch.equal(v, state[k]) for k, v in model.state_dict().items())
    assert torch.equal(model.a.weight.grad, torch.ones_like(model.a.weight))
    assert torch.equal(torch.get_rng_state(), random)
    assert not model.a._forward_hooks


def test_loaders():
    model, data = net(), batches(7, 5)
    x, y = (torch.cat(parts) for parts in zip(*data, strict=True))
    loader = DataLoader(TensorDataset(x, y), batch_size=5)
    same(Accumulator(GGN, model, PMatKFAC).update(loader).matrix(), GGN(model, (x, y), PMatKFAC))
    with pytest.raises(ValueError, match="more than once"):
        Accumulator(FIM, model, PMatEKFAC).update(iter(data))


def test_what_is_refused():
    model, (one, other) = net(), batches(7, 5)
    acc = Accumulator(FIM, model, PMatKFAC)
    with pytest.raises(ValueError, match="nothing was seen"):
        acc.matrix()
    for weight in (-0.1, 1.5, float("nan")):
        with pytest.raises(ValueError, match="decay: weight"):
            acc.decay(weight)
    for R in (PMatImplicit,):
        with pytest.raises(NotImplementedError, match="no running average"):
            Accumulator(FIM, model, R)
    for R in (PMatImplicit, PMatLowRank, PMatKFAC):
        with pytest.raises(NotImplementedError, match=R.__name__):
            Accumulator(Hessian, model, R)
    with pytest.raises(TypeError, match="shareing"):
        Accumulator(FIM, model, PMatKFAC, shareing="reduce")
    with pytest.raises(TypeError, match="matrix"):
        Accumulator(model, FIM, PMatKFAC)
    with pytest.raises(TypeError, match="PMat class"):
        Accumulator(FIM, model, "PMatKFAC")
    with pytest.raises(TypeError, match="expected an Accumulator"):
        acc.merge(FIM(model, one, PMatKFAC))
    with pytest.raises(ValueError, match="only PMatEKFAC"):
        acc.rebase()
    with pytest.raises(ValueError, match="representation"):
        acc.update(one).merge(Accumulator(FIM, model, PMatDiag).update(one))
    with pytest.raises(ValueError, match="matrix"):
        acc.merge(Accumulator(GGN, model, PMatKFAC).update(one))
    wider = nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 3)).double()
    with pytest.raises(ValueError, match="layers"):
        acc.load_state_dict(Accumulator(FIM, wider, PMatKFAC).update(other).state_dict())
    with pytest.raises(ValueError, match="state_dict"):
        acc.load_state_dict({"a": 1})
    damaged = acc.state_dict()
    damaged["seen"].pop("states")
    with pytest.raises(ValueError, match="damaged"):
        acc.load_state_dict(damaged)
    assert acc.n == 7
    with pytest.raises(TypeError, match="state_dict"):
        pickle.dumps(acc)
    assert "FIM" in repr(acc)
    assert acc.reset().n == 0
    assert acc.update(one).decay(0).n == 0


def own_matrix(model, loader, representation, *, power=1.0, layer_collection=None, **options):
    """As somebody would write a matrix of his own."""
    from nngeometry import Generator, LayerCollection
    from nngeometry.generator import rowwise
    from nngeometry.likelihood import Cotangents

    lc = layer_collection or LayerCollection.from_model(model)
    source = Generator(model, lc, rowwise(lambda f, batch, k: Cotangents.of(f.detach().pow(power).unsqueeze(0))))
    return representation(layer_collection=lc, generator=source, examples=loader, **options)


def test_a_matrix_of_ones_own():
    model, data = net(), batches(7, 5)
    acc = Accumulator(own_matrix, model, partial(PMatKFAC, sharing="reduce"), power=2).update(data[0]).update(data[1])
    same(acc.matrix(), own_matrix(model, data, PMatKFAC, power=2, sharing="reduce"))
    part = Accumulator(partial(own_matrix, power=2), model, PMatDense).update(data)
    same(part.matrix(), own_matrix(model, data, PMatDense, power=2))
    with pytest.raises(TypeError, match="hands no source"):
        Accumulator(lambda model, loader, representation: None, model, PMatDense)
