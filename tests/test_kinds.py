"""Every kind of layer: its streamed Jacobian equals loops over autograd, whatever the form."""

import math
from dataclasses import replace

import oracle
import pytest
import torch
from models import CASES
from torch import nn

from nngeometry import Gaussian, Generator, LayerCollection, forms, memory, memory_budget
from nngeometry.autocorrelation import patch_moment
from nngeometry.kinds import affine
from nngeometry.likelihood import Cotangents


def streamed(model, batch, function, lc=None, budget=2**30):
    """The Jacobian ``(C, n, P)`` from the stream of forms."""
    lc = lc or LayerCollection.from_model(model)
    generator = Generator(model, lc, lambda f, b, k: Gaussian().sqrt(f), function=function)
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

    generator = Generator(model, lc, cotangents, function=function)
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


@pytest.mark.parametrize("positions", [(1, 1), (3, 2)])
@pytest.mark.parametrize("groups", [1, 2])
def test_inner_products_of_forms(positions, groups):
    """The fast ways of inner products equal the derived ones, between all pairs of forms."""

    def forms_of(examples, t):
        g = torch.randn(2, examples, t, groups, 3)
        outer = forms.Outer(torch.randn(examples, t, groups, 4), g)
        ids = torch.randint(-1, 4, (examples, t))
        gather = forms.Gather(ids, torch.randn(2, examples, t, 3).masked_fill((ids < 0)[..., None], 0.0), 4)
        return [outer, forms.Dense(outer.dense()), outer.tape(5)], [gather, forms.Dense(gather.dense())]

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
    real = forms.second_moment
    monkeypatch.setattr(forms, "second_moment", lambda x: (rows.append(len(x)), real(x))[1])
    a = torch.randn(10, 2, 1, 7)
    found, count = forms.Outer(a, torch.zeros(1, 10, 2, 1, 3)).right_factor(reduce=False)
    x = a.flatten(0, 2)
    torch.testing.assert_close(forms.mirror(found)[0], x.T @ x)
    assert (count, rows) == (20, [8, 8, 4])
