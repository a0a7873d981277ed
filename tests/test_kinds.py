"""Every kind of layer: its streamed Jacobian equals loops over autograd, whatever the form."""

import math
from dataclasses import replace
from functools import partial

import oracle
import pytest
import torch
from models import CASES
from torch import nn

from nngeometry import (
    FIM,
    Gaussian,
    Generator,
    LayerCollection,
    PMatBlockDiag,
    PMatDense,
    PMatDiag,
    PMatEKFAC,
    PMatImplicit,
    PMatKFAC,
    PMatLowRank,
    PMatQuasiDiag,
    PVector,
    forms,
    kind,
    memory,
    memory_budget,
    whole,
)
from nngeometry.forms import Sum
from nngeometry.forms.autocorrelation import patch_moment
from nngeometry.generator import rowwise
from nngeometry.kinds import Packing, affine
from nngeometry.kinds.kind import _TABLE as table
from nngeometry.likelihood import Cotangents


def streamed(model, batch, function, lc=None, budget=2**30):
    """The Jacobian ``(C, n, P)`` from the stream of forms."""
    lc = lc or LayerCollection.from_model(model)
    generator = Generator(model, lc, rowwise(lambda f, b, k: Gaussian().sqrt(f)), function=function)
    pieces = []
    with memory_budget(budget), torch.no_grad():
        for observation in generator.stream(batch):
            flat = [lc[name].packing.unpack(form.dense()) for name, form in observation.forms.items()]
            pieces.append(torch.cat(flat, -1))
    return torch.cat(pieces, 0)


@pytest.mark.filterwarnings("ignore:.*cannot be vectorised:RuntimeWarning")
@pytest.mark.parametrize("name", CASES)
def test_jacobian(name):
    model, batch, function = CASES[name].make()
    expected = oracle.jacobian(model, batch, function)
    assert oracle.relative(streamed(model, batch, function), expected) < 1e-10


@pytest.mark.filterwarnings("ignore:.*cannot be vectorised:RuntimeWarning")
@pytest.mark.parametrize("name", CASES)
def test_a_tiny_budget_changes_nothing(name):
    """One cotangent and one example at a time."""
    model, batch, function = CASES[name].make()
    expected = oracle.jacobian(model, batch, function)
    assert oracle.relative(streamed(model, batch, function, budget=1), expected) < 1e-10


@pytest.mark.filterwarnings("ignore:.*cannot be vectorised:RuntimeWarning")
@pytest.mark.parametrize("name", CASES)
def test_form_methods_equal_the_derived_ones(name):
    """square, total, arrow, sqnorm and the factors of every form against its dense Jacobian."""
    model, batch, function = CASES[name].make()
    lc = LayerCollection.from_model(model)
    torch.manual_seed(3)

    def cotangents(f, b, k):
        return Cotangents.of(torch.randn(2, *f.shape))

    generator = Generator(model, lc, rowwise(cotangents), function=function)
    with torch.no_grad():
        (observation,) = generator.stream(batch)
        for layer, form in observation.forms.items():
            j = form.dense()
            assert j.shape == (form.cotangents, form.examples, *form.shape)
            torch.testing.assert_close(form.square(), j.square().sum((0, 1)))
            torch.testing.assert_close(form.total(), j.sum((0, 1)))
            torch.testing.assert_close(form.sqnorm(), j.flatten(2).square().sum(2))
            v, u = torch.randn(2, *form.shape), torch.randn(2, form.cotangents, form.examples)
            torch.testing.assert_close(form.dot(v), torch.einsum("cbp,kp->kcb", j.flatten(2), v.flatten(1)))
            torch.testing.assert_close(form.pull(u).flatten(1), torch.einsum("cbp,kcb->kp", j.flatten(2), u))
            torch.testing.assert_close(form.narrow(1, 3).dense(), j[:, 1:3])
            if form.shape[-1] > 1:
                torch.testing.assert_close(form.arrow(), (j[..., :-1] * j[..., -1:]).sum((0, 1)))
            if lc[layer].kronecker:
                _check_factors(form, j)


def _check_factors(form, j):
    """The left factor is invariant under the right rotation and the other way round; rotations act on the dense
    Jacobian.
    """
    groups, rows, cols = form.shape
    left, right = torch.randn(groups, rows, rows), torch.randn(groups, cols, cols)
    rotated = form.rotate(
        lambda v: torch.einsum("goq,...gq->...go", left, v), lambda v: torch.einsum("gij,...gj->...gi", right, v)
    )
    torch.testing.assert_close(rotated.dense(), torch.einsum("gpo,cbgoi,gji->cbgpj", left, j, right))
    only_left = form.rotate(lambda v: torch.einsum("goq,...gq->...go", left, v), None)
    torch.testing.assert_close(only_left.dense(), torch.einsum("gpo,cbgoi->cbgpi", left, j))
    if isinstance(form, Sum):  # each part has factors of its own
        return
    assert form.left_factor(False).shape == (groups, rows, rows)
    a, count = form.right_factor(False)
    assert a.shape in ((groups, cols, cols), (groups, cols))
    assert count > 0


@pytest.mark.parametrize("name", ["mlp", "convnet", "cls-token", "tied", "attention"])
def test_frozen_parameters(name):
    """Frozen ones are left out, or are in when asked; partly frozen layers keep the rest."""
    model, batch, function = CASES[name].make()
    for k, p in enumerate(model.parameters()):
        p.requires_grad_(k % 2 == 1)
    flags = [p.requires_grad for p in model.parameters()]
    for frozen in (False, True):
        lc = LayerCollection.from_model(model, frozen=frozen)
        assert lc.numel() == sum(p.numel() for p in model.parameters() if frozen or p.requires_grad)
        expected = oracle.jacobian(model, batch, function, lc)
        assert oracle.relative(streamed(model, batch, function, lc), expected) < 1e-10
        assert [p.requires_grad for p in model.parameters()] == flags
    for k, p in enumerate(model.parameters()):
        p.requires_grad_(k % 2 == 0)
    lc = LayerCollection.from_model(model)
    expected = oracle.jacobian(model, batch, function, lc)
    assert oracle.relative(streamed(model, batch, function, lc), expected) < 1e-10


@pytest.mark.parametrize("name", ["mlp", "convnet", "tied", "cls-token", "shared"])
def test_sub_collections(name):
    model, batch, function = CASES[name].make()
    whole = LayerCollection.from_model(model)
    for layer in whole:
        lc = whole.select(lambda x, layer=layer: x.name == layer)
        expected = oracle.jacobian(model, batch, function, lc)
        assert oracle.relative(streamed(model, batch, function, lc), expected) < 1e-10


@pytest.mark.parametrize("d", [1, 5, 208, 209, 513, 1300])
def test_symmetric_products(d):
    x = torch.randn(7, d)
    total = forms.mirror(forms.add_gram(forms.add_gram(torch.zeros(d, d), x[:3]), x[3:]))
    torch.testing.assert_close(total, x.T @ x)


@pytest.mark.parametrize("groups", [1, 2])
@pytest.mark.parametrize("d", [5, 300, 600])
def test_second_moments(d, groups):
    few, many = torch.randn(7, groups, d).double(), torch.randn(600, groups, d).double()
    total = forms.mirror(forms.second_moment(few) + forms.second_moment(many))
    x = torch.cat([few, many])
    torch.testing.assert_close(total, torch.einsum("ngi,ngj->gij", x, x))


@pytest.mark.parametrize("panel_bytes", [1, None])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize(
    ("shape", "kernel", "padding"),
    [
        ((3, 2, 6, 5), (3, 3), [(1, 1), (1, 1)]),
        ((2, 3, 5, 7), (3, 2), [(0, 0), (0, 0)]),
        ((2, 2, 4, 4), (5, 3), [(2, 2), (0, 2)]),
        ((2, 2, 9), (4,), [(1, 2)]),
        ((2, 2, 3, 4, 4), (2, 3, 2), [(1, 0), (1, 1), (0, 1)]),
        ((2, 1, 8, 8), (3, 3), [(3, 3), (2, 4)]),
        ((2, 2, 2, 3), (5, 4), [(2, 2), (3, 3)]),
        ((2, 2, 1, 1), (3, 3), [(1, 1), (1, 1)]),
        ((3, 2, 5, 6), (1, 3), [(1, 0), (1, 1)]),
        ((3, 2, 5, 6), (3, 1), [(1, 1), (0, 2)]),
    ],
)
def test_moments_of_patches(shape, kernel, padding, bias, panel_bytes, cut):
    cut(replace(memory.CPU, panel_bytes=panel_bytes))
    x = torch.randn(shape)
    n = len(kernel)
    patches = torch.nn.functional.pad(x, [p for pair in reversed(padding) for p in pair])
    for axis, k in enumerate(kernel):
        patches = patches.unfold(2 + axis, k, 1)
    a = patches.permute(0, *range(2, 2 + n), 1, *range(2 + n, 2 + 2 * n)).reshape(-1, shape[1] * math.prod(kernel))
    a = torch.nn.functional.pad(a, (0, int(bias)), value=1.0)
    for budget in (2**30, 2**10):  # of all examples at once, and one at a time
        with memory_budget(budget):
            found = patch_moment(x, kernel, padding, bias)
        assert torch.linalg.norm(found - a.T @ a) < 1e-13 * torch.linalg.norm(found)


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("padding", [0, 1, "same"])
def test_large_layers_take_the_moment_without_patches(padding, bias, cut):
    cut(replace(memory.CPU, large_product=0))
    layer = nn.Conv2d(2, 3, (3, 2), padding=padding, bias=bias)
    x = torch.randn(4, 2, 5, 6)
    form = affine.conv(layer, layer(x).detach().unsqueeze(0), x)
    assert form.moment is not None
    moment, count = form.right_factor(False)
    a = form.a.flatten(0, 1)
    assert count == len(a)
    torch.testing.assert_close(moment[0], a[:, 0].T @ a[:, 0])


@pytest.mark.parametrize("panel_bytes", [1, 2**22])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize(
    ("make", "shape"),
    [
        (partial(nn.Conv2d, kernel_size=3, padding=1), (6, 3, 6, 5)),
        (partial(nn.Conv2d, kernel_size=(3, 2), stride=(2, 1), dilation=(1, 2), padding=2), (9, 2, 6, 5)),
        (partial(nn.Conv2d, kernel_size=3, padding=1, padding_mode="reflect"), (6, 2, 6, 5)),
        (partial(nn.Conv2d, kernel_size=(2, 3), padding="same", padding_mode="circular"), (6, 2, 6, 5)),
        (partial(nn.Conv1d, kernel_size=4, stride=3, padding=2), (9, 2, 17)),
        (partial(nn.Conv3d, kernel_size=2, padding=(1, 0, 1)), (5, 2, 3, 4, 4)),
    ],
)
def test_moments_of_many_windows(make, shape, bias, panel_bytes, cut):
    cut(replace(memory.CPU, panel_bytes=panel_bytes))
    layer = make(shape[1], 3, bias=bias)
    x = torch.randn(shape)
    form = affine.conv(layer, layer(x).detach().unsqueeze(0), x)
    assert form.moment is not None
    a = form.a.flatten(0, 1)[:, 0]
    for budget in (2**30, 2**10):
        with memory_budget(budget):
            moment, count = form.right_factor(False)
            half, few = form.narrow(1, 3).right_factor(False)
        assert (count, few) == (len(a), 2 * len(a) // len(x))
        torch.testing.assert_close(moment[0], a.T @ a)
        part = form.a[1:3].flatten(0, 1)[:, 0]
        torch.testing.assert_close(half[0], part.T @ part)


@pytest.mark.parametrize("positions", [(1, 1), (3, 2)])
@pytest.mark.parametrize("groups", [1, 2])
def test_inner_products_of_forms(positions, groups):
    """The fast ways of inner products equal the derived ones, between all pairs of forms."""

    def forms_of(examples, t):
        g = torch.randn(2, examples, t, groups, 3)
        outer = forms.Outer(torch.randn(examples, t, groups, 4), g)
        ids = torch.randint(-1, 4, (examples, t))
        gather = forms.Gather(ids, torch.randn(2, examples, t, 3).masked_fill((ids < 0)[..., None], 0.0), 4)
        return [outer, forms.Dense(outer.dense()), outer.prepared(5)], [gather, forms.Dense(gather.dense())]

    for left, right in zip(forms_of(5, positions[0]), forms_of(4, positions[1]), strict=True):
        for one in left:
            for other in right:
                expected = torch.einsum("cbp,dep->bced", one.dense().flatten(2), other.dense().flatten(2))
                out = torch.ones(5, 2, 4, 2)
                one.add_inner(other, out)
                torch.testing.assert_close(out - 1, expected)
                traced = torch.ones(5, 4)
                one.add_traced(other, traced)
                torch.testing.assert_close(traced - 1, torch.einsum("bcec->be", expected))
        for one in left:
            for other in left:
                torch.testing.assert_close(one.paired(other), (one.dense() * other.dense()).flatten(2).sum(2))


@pytest.mark.parametrize("groups", [1, 2, 3])
@pytest.mark.parametrize("panel", [2**22, 8 * 3 * 4 * 2 * 3 * 2, 8 * 3 * 4 * 2 * 2, 8 * 3 * 4, 1, None])
def test_reductions_of_a_jacobian_in_panels(panel, groups, cut):
    """However few entries of J are made at a time, and however the patches come."""
    cut(replace(memory.CPU, panel_bytes=panel))
    x, g = torch.randn(5, 7, groups, 4), torch.randn(3, 5, 7, groups, 2)
    for form in (forms.Outer(x, g), forms.Outer(x, g, lambda x: x.cos(), 4)):
        j = form.dense()
        torch.testing.assert_close(form.square(), j.square().sum((0, 1)))
        torch.testing.assert_close(form.arrow(), (j[..., :-1] * j[..., -1:]).sum((0, 1)))
        torch.testing.assert_close(form.sqnorm(), j.flatten(2).square().sum(2))


def test_moments_but_the_last_are_of_no_fewer_rows_than_columns(cut, monkeypatch):
    cut(replace(memory.CPU, panel_bytes=1))
    rows = []
    real = forms.outer.second_moment
    monkeypatch.setattr(forms.outer, "second_moment", lambda x: (rows.append(len(x)), real(x))[1])
    a = torch.randn(10, 2, 1, 7)
    found, count = forms.Outer(a, torch.zeros(1, 10, 2, 1, 3)).right_factor(reduce=False)
    x = a.flatten(0, 2)
    torch.testing.assert_close(forms.mirror(found)[0], x.T @ x)
    assert (count, rows) == (20, [8, 8, 4])


class Adapter(nn.Module):
    """y = x W0^T + x A^T B^T + c, some of it frozen."""

    def __init__(self, c=True):
        super().__init__()
        self.W0 = nn.Parameter(torch.randn(3, 4), requires_grad=False)
        self.A, self.B = nn.Parameter(torch.randn(2, 4)), nn.Parameter(torch.randn(3, 2))
        self.c = nn.Parameter(torch.randn(3)) if c else None

    def forward(self, x):
        y = x @ self.W0.T + x @ self.A.T @ self.B.T
        return y if self.c is None else y + self.c


class Matrix(nn.Module):
    """An affine layer with names of its own."""

    def __init__(self, offset=True):
        super().__init__()
        self.offset = nn.Parameter(torch.randn(4)) if offset == "first" else None
        self.matrix = nn.Parameter(torch.randn(4, 4))
        if offset is True:
            self.offset = nn.Parameter(torch.randn(4))

    def forward(self, x):
        y = x @ self.matrix.T
        return y if self.offset is None else y + self.offset


def adapter_pieces(module, gy, x):
    return {
        "W0": torch.einsum("cbo,bi->cboi", gy, x),
        "A": torch.einsum("cbo,or,bi->cbri", gy, module.B, x),
        "B": torch.einsum("cbo,br->cbor", gy, x @ module.A.T),
        "c": gy,
    }


@pytest.fixture
def registered():
    """Kinds that are registered for the time of one test, and the calls of them."""
    before = dict(table)
    calls = []

    def register_adapter(*names):
        @kind(Adapter, parameters=names)
        def adapter(module, gy, x):
            calls.append("adapter")
            pieces = adapter_pieces(module, gy, x)
            present = [name for name in names if getattr(module, name) is not None]
            return forms.Dense(torch.cat([pieces[name].flatten(2) for name in present], 2))

    def packing(module, bias):
        return Packing.matrix((1, 4, 4), (0, 1, 2), (1, 4), bias)

    @kind(Matrix, parameters=("matrix", "offset"), packing=packing, kronecker=True)
    def matrix(module, gy, x):
        calls.append("matrix")
        ones = [] if module.offset is None else [torch.ones(len(x), 1)]
        return forms.Outer(torch.cat([x, *ones], 1)[:, None, None], gy[:, :, None, None])

    yield register_adapter, calls
    table.clear()
    table.update(before)


REPRESENTATIONS = [PMatDense, PMatBlockDiag, PMatDiag, PMatImplicit, PMatLowRank]


def check_every_representation(model, lc=None):
    """Jacobian and representations of a model of vectors of four, against loops."""
    batch = (torch.randn(5, 4),)
    lc = lc or LayerCollection.from_model(model)
    assert oracle.relative(streamed(model, batch, None, lc), oracle.jacobian(model, batch, None, lc)) < 1e-10
    M = oracle.fim(model, [batch], "regression", None, lc)
    blocks = torch.zeros_like(M)
    for s in lc.slices().values():
        blocks[s, s] = M[s, s]
    expected = {PMatBlockDiag: blocks, PMatDiag: M.diag().diag()}
    for representation in REPRESENTATIONS:
        F = FIM(model, batch, representation, "regression", layer_collection=lc)
        V = torch.randn(len(M), 2)
        found = torch.stack([F.mv(PVector(lc, v)).to_torch() for v in V.T], 1)
        assert oracle.relative(found, expected.get(representation, M) @ V) < 1e-9
    FIM(model, batch, PMatQuasiDiag, "regression", layer_collection=lc)
    return lc


NAMES = [("W0", "A", "B", "c"), ("A", "B", "c"), ("c", "B", "A"), ("B", "A", "c", "W0")]


@pytest.mark.parametrize("names", NAMES)
@pytest.mark.parametrize("frozen", [(), ("A",), ("B", "c"), ("A", "B")])
@pytest.mark.parametrize("c", [True, False])
def test_a_low_rank_adapter(registered, names, frozen, c):
    register_adapter, calls = registered
    register_adapter(*names)
    model = nn.Sequential(nn.Linear(4, 4), nn.Tanh(), Adapter(c))
    oracle.randomise(model)
    for name in frozen:
        if getattr(model[2], name) is not None:
            getattr(model[2], name).requires_grad_(False)
    lc = check_every_representation(model)
    if "2" in lc:
        assert repr(lc).endswith(", adapter")
        assert "W0" not in dict(lc["2"].params)
        assert calls


def test_the_frozen_weight_of_an_adapter_too(registered):
    register_adapter, calls = registered
    register_adapter("W0", "A", "B", "c")
    model = oracle.randomise(nn.Sequential(nn.Linear(4, 4), Adapter()))
    check_every_representation(model, LayerCollection.from_model(model, frozen=True))
    assert calls
    register_adapter("A", "B", "c")
    LayerCollection.from_model(model)
    LayerCollection.from_model(model, "0", frozen=True)
    with pytest.raises(
        ValueError, match=r"layer '1' \(Adapter\): its registered kind 'adapter' is for .* A, B, c, but it has W0"
    ):
        LayerCollection.from_model(model, frozen=True)


@pytest.mark.parametrize("frozen", [(), ("matrix",), ("offset",)])
@pytest.mark.parametrize("offset", [True, False, "first"])
def test_kronecker_factors_by_other_names(registered, offset, frozen):
    model = nn.Sequential(Matrix(), nn.Tanh(), Matrix(offset))
    oracle.randomise(model)
    for name in frozen:
        if getattr(model[2], name) is not None:
            getattr(model[2], name).requires_grad_(False)
    lc = check_every_representation(model)
    assert registered[1]
    assert lc["0"].kronecker
    if "2" in lc:
        collected = [name for name, _ in lc["2"].params]
        assert lc["2"].kronecker == (collected in (["matrix"], ["matrix", "offset"]))
    # The factors are those of the Linear layers that these are.
    if offset == "first":
        return
    linear = nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 4, bias=offset))
    with torch.no_grad():
        for one, other in ((model[0], linear[0]), (model[2], linear[2])):
            other.weight.copy_(one.matrix).requires_grad_(one.matrix.requires_grad)
            if one.offset is not None:
                other.bias.copy_(one.offset).requires_grad_(one.offset.requires_grad)
    batch = (torch.randn(5, 4),)
    for representation in (PMatKFAC, PMatEKFAC):
        found, expected = (FIM(m, batch, representation, "regression") for m in (model, linear))
        v = torch.randn(lc.numel())
        assert (
            oracle.relative(
                found.mv(PVector(lc, v)).to_torch(),
                expected.mv(PVector(expected.layer_collection, v)).to_torch(),
            )
            < 1e-9
        )


@pytest.mark.parametrize("frozen", [False, True])
def test_shared_and_tied_kinds_of_the_user(registered, frozen):
    register_adapter, calls = registered
    register_adapter("W0", "A", "B", "c")
    one, other = Adapter(), Adapter()
    other.A, other.c = one.A, one.c
    first, second = Matrix(), Matrix()
    second.matrix = first.matrix
    twice = nn.Linear(3, 4)

    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.one, self.up, self.second, self.other = first, one, twice, second, other

        def forward(self, x):
            h = self.up(self.one(torch.tanh(self.first(self.first(x)))))
            return self.other(torch.tanh(self.second(h))) + self.other(h)

    model = oracle.randomise(Net())
    first.matrix.requires_grad_(not frozen)
    one.A.requires_grad_(not frozen)
    check_every_representation(model)
    assert {"adapter", "matrix"} <= set(calls)


@pytest.mark.usefixtures("registered")
def test_one_parameter_by_two_names():
    class Square(nn.Module):
        def __init__(self):
            super().__init__()
            self.left = self.right = nn.Parameter(torch.randn(4, 4))

        def forward(self, x):
            return x @ self.left @ self.right

    model = oracle.randomise(nn.Sequential(Square(), nn.Linear(4, 3)))
    check_every_representation(model)

    @kind(Square, parameters=["left", "right"])
    def square(module, gy, x):
        left = torch.einsum("bi,cbj->cbij", x, gy @ module.right.T)
        right = torch.einsum("bi,cbj->cbij", x @ module.left, gy)
        return forms.Dense(torch.cat([left.flatten(2), right.flatten(2)], 2))

    lc = check_every_representation(model)
    assert lc["0"].served_by == "square"
    norm = oracle.randomise(nn.Sequential(nn.Linear(4, 4), nn.LayerNorm(4)))
    norm[1].bias = norm[1].weight
    check_every_representation(norm)


LIBRARY = {
    "linear": lambda: nn.Sequential(nn.Linear(4, 3)),
    "conv": lambda: nn.Sequential(nn.Unflatten(1, (1, 2, 2)), nn.Conv2d(1, 3, 2, padding=1)),
    "conv-transpose": lambda: nn.Sequential(nn.Unflatten(1, (1, 2, 2)), nn.ConvTranspose2d(1, 3, 2)),
    "batch-norm": lambda: nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4)),
    "layer-norm": lambda: nn.Sequential(nn.Linear(4, 4), nn.LayerNorm(4)),
    "group-norm": lambda: nn.Sequential(nn.Linear(4, 4), nn.GroupNorm(2, 4)),
}


@pytest.mark.parametrize("which", ["weight", "bias"])
@pytest.mark.parametrize("name", LIBRARY)
def test_frozen_parameters_of_the_kinds_of_the_library(name, which):
    model = oracle.randomise(nn.Sequential(nn.Linear(4, 4), LIBRARY[name]()))
    getattr(model[1][-1], which).requires_grad_(False)
    lc = check_every_representation(model)
    assert all(layer.served_by != "generic" for layer in lc.layers.values())


def test_a_frozen_embedding():
    model = oracle.randomise(nn.Sequential(nn.Embedding(5, 4), nn.Flatten(), nn.Linear(8, 3)))
    model[0].weight.requires_grad_(False)
    batch = (torch.randint(5, (6, 2)),)
    for frozen in (False, True):
        lc = LayerCollection.from_model(model, frozen=frozen)
        assert ("0" in lc) == frozen
        assert oracle.relative(streamed(model, batch, None, lc), oracle.jacobian(model, batch, None, lc)) < 1e-10


@pytest.mark.usefixtures("registered")
def test_a_kind_that_cannot_apply_is_named():
    @kind(Adapter)  # for weight and bias
    def usual(module, gy, x):
        raise AssertionError

    model = nn.Sequential(nn.Linear(4, 4), Adapter())
    with pytest.raises(ValueError, match=r"layer '1' \(Adapter\): .*'usual' is for parameters named weight, bias, but"):
        LayerCollection.from_model(model)
    LayerCollection.from_model(model, "0")
    model[1].requires_grad_(False)
    assert list(LayerCollection.from_model(model)) == ["0"]

    @kind(Adapter, parameters=["A", "B", "c"], packing=lambda module, bias: Packing.flat(7))
    def short(module, gy, x):
        raise AssertionError

    with pytest.raises(ValueError, match=r"'short' has a packing of shape \(7,\).* A, B, c are 17: mend packing="):
        LayerCollection.from_model(nn.Sequential(Adapter()))

    @kind(Adapter, parameters=["A", "B", "c"])
    def part(module, gy, x):
        return forms.Dense(gy)

    model = nn.Sequential(Adapter())
    with pytest.raises(ValueError, match=r"layer '0' \(Adapter\): .*'part' returned .* \(3,\), .* \(17,\)"):
        streamed(model, (torch.randn(5, 4),), None)

    @kind(Adapter, parameters=["A", "B", "c"])
    def wrong(module, gy, x):
        pieces = adapter_pieces(module, gy, x)
        return forms.Dense(torch.cat([pieces[name].flatten(2) * 2 for name in ("A", "B", "c")], 2))

    with pytest.raises(ValueError, match=r"layer '0'.*do not add up"):
        streamed(model, (torch.randn(5, 4),), None)

    @kind(Adapter, parameters=["A", "B", "c"])
    def of_others(module, gy, x):  # whose sum over the examples is right
        pieces = adapter_pieces(module, gy, x)
        return forms.Dense(torch.cat([pieces[name].flatten(2) for name in ("A", "B", "c")], 2).roll(1, 1))

    with pytest.raises(ValueError, match=r"layer '0'.*do not add up"):
        streamed(model, (torch.randn(5, 4),), None)


def test_a_tied_parameter_that_a_kind_does_not_know_is_named(registered):
    register_adapter, _ = registered
    register_adapter("A", "B", "c")
    model = nn.Sequential(nn.Linear(4, 3), nn.Linear(3, 4), Adapter())
    model[2].W0 = model[0].weight
    with pytest.raises(ValueError, match=r"layer '2' .*but it has W0"):
        LayerCollection.from_model(model)


def test_other_instances_and_subclasses_of_a_users_type(registered):
    _, calls = registered

    class Sub(Matrix):
        def forward(self, x):
            return super().forward(x) * self.matrix.sum()

    lc = check_every_representation(oracle.randomise(nn.Sequential(Sub())))
    assert lc["0"].served_by == "generic"
    parametrised = nn.utils.parametrizations.weight_norm(Matrix(), "matrix")
    lc = check_every_representation(oracle.randomise(nn.Sequential(parametrised)))
    assert lc["0"].served_by == "generic"
    assert not calls


@pytest.mark.filterwarnings("ignore:.*weight_norm.*:FutureWarning")
@pytest.mark.parametrize(
    "change", [nn.utils.weight_norm, nn.utils.spectral_norm, nn.utils.parametrizations.weight_norm]
)
def test_instances_that_torch_changed_stay_generic(change):
    model = nn.Sequential(nn.Linear(4, 4), change(nn.Linear(4, 3)))
    lc = LayerCollection.from_model(oracle.randomise(model))
    assert [layer.served_by for layer in lc.layers.values()] == ["linear", "generic"]
    batch = (torch.randn(5, 4),)
    assert oracle.relative(streamed(model, batch, None, lc), oracle.jacobian(model, batch, None, lc)) < 1e-10


def test_what_is_registered_is_a_type_of_modules_with_names():
    for wrong in (nn.Linear(2, 2), "Linear", int):
        with pytest.raises(TypeError, match="is not a type of modules"):
            kind(wrong)
    with pytest.raises(TypeError, match="name the types"):
        kind()
    for names in ((), ("a", "a"), (1,)):
        with pytest.raises(ValueError, match="must be different names"):
            kind(Adapter, parameters=names)
    with pytest.raises(TypeError, match="expected a function"):
        kind(Adapter)(None)
    with pytest.raises(TypeError, match=r"packing: expected a function"):
        kind(Adapter, packing=Packing.flat(3))
    for wrong in ("Linear", int):
        with pytest.raises(TypeError, match=r"whole: .* is not a type of modules"):
            whole(wrong)


class Doubled(nn.Linear):
    def forward(self, x):
        return 2 * super().forward(x)


@pytest.mark.usefixtures("registered")
def test_a_function_of_the_library_for_a_type_of_the_users_is_looked_at_too():
    class Same(nn.Linear):
        pass

    kind(Same, Doubled, packing=lambda module, bias: table[nn.Linear].packing(module, bias), kronecker=True)(
        affine.linear
    )
    lc = check_every_representation(oracle.randomise(nn.Sequential(Same(4, 3))))
    assert lc["0"].served_by == "linear"
    model = oracle.randomise(nn.Sequential(nn.Linear(4, 4), Doubled(4, 3)))
    with pytest.raises(ValueError, match=r"layer '1'.*do not add up"):
        streamed(model, (torch.randn(5, 4),), None)


class OfChildren(nn.Module):
    """A low-rank adapter of two layers, which may have a parameter of its own."""

    def __init__(self, scale=None):
        super().__init__()
        self.down, self.up = nn.Linear(4, 2, bias=False), nn.Linear(2, 4, bias=False)
        if scale is not False:
            self.scale = None if scale is None else nn.Parameter(torch.ones(4))

    def forward(self, x):
        y = self.up(self.down(x))
        return y if getattr(self, "scale", None) is None else y * self.scale


@pytest.mark.usefixtures("registered")
@pytest.mark.parametrize(
    ("names", "scale"),
    [
        (("down.weight", "up.weight"), None),
        (("weight", "bias"), None),
        (("scale",), False),
        (("scale", "down.weight"), True),
        (("scale", "up.weight"), None),
    ],
)
def test_a_kind_for_parameters_of_children_is_refused(names, scale):
    @kind(OfChildren, parameters=names)
    def never(module, gy, x):
        raise AssertionError

    model = nn.Sequential(nn.Linear(4, 4), OfChildren(scale))
    with pytest.raises(ValueError, match=r"layer '1' \(OfChildren\): .*'never' is for .* parameters of its children"):
        LayerCollection.from_model(model)
    model[1].requires_grad_(False)
    assert list(LayerCollection.from_model(model)) == ["0"]


@pytest.mark.usefixtures("registered")
def test_a_module_may_lack_what_its_kind_is_for():
    class Scaled(OfChildren):
        def forward(self, x):
            y = x + self.up(self.down(x))
            return y if self.scale is None else y * self.scale

    @kind(Scaled, parameters=["scale"])
    def scaled(module, gy, x):
        return forms.Dense(gy * (x + module.up(module.down(x))))

    for scale in (True, None):
        lc = check_every_representation(oracle.randomise(nn.Sequential(Scaled(scale))))
        assert list(lc) == ["0"] * (scale is True) + ["0.down", "0.up"]
        assert (", scaled" in repr(lc)) == (scale is True)
