"""Vectors in parameter space: arithmetic, conversions, and traffic with models."""

import math

import pytest
import torch
from models import CASES
from torch import nn
from torch.nn.utils import parameters_to_vector

from nngeometry import LayerCollection, PFMapDense, PVector, random_pvector


@pytest.fixture
def model():
    return CASES["convnet"].make(2)[0]


@pytest.fixture
def lc(model):
    return LayerCollection.from_model(model)


@pytest.mark.parametrize(
    "name", ["mlp", "convnet", "shared", "embedding", "attention", "lstm", "transformer-layer", "cls-token"]
)
def test_flat_order_is_that_of_torch(name):
    model, _, _ = CASES[name].make(2)
    assert torch.equal(PVector.from_model(model).to_torch(), parameters_to_vector(model.parameters()))


def test_dict_and_flat_are_the_same_vector(model, lc):
    v = random_pvector(lc)
    d = v.to_dict()
    for name, layer in lc.layers.items():
        assert [tuple(t.shape) for t in d[name]] == [shape for _, shape in layer.params]
    assert torch.equal(PVector(lc, dict_repr=d).to_torch(), v.to_torch())
    w = PVector.from_model(model)
    assert torch.equal(w.to_dict()["0"][0], model[0].weight)
    assert torch.equal(w.to_dict()["0"][1], model[0].bias)


@pytest.mark.parametrize("from_dict", [False, True])
def test_arithmetic(lc, from_dict):
    def make(t):
        v = PVector(lc, t)
        return PVector(lc, dict_repr=v.to_dict()) if from_dict else v

    a, b = torch.rand(lc.numel()) + 0.5, torch.rand(lc.numel()) + 0.5
    v, w, s = make(a), make(b), torch.tensor(2.5)
    for mine, truth in (
        (v + w, a + b), (v - w, a - b), (v * w, a * b), (v / w, a / b), (v**w, a**b),
        (v * 2, 2 * a), (2 * v, 2 * a), (v / 2, a / 2), (2 / v, 2 / a), (v + 1, a + 1), (1 - v, 1 - a), (v - 1, a - 1),
        (-v, -a), (v**2, a**2), (v**0.5, a**0.5), (s * v, 2.5 * a), (v * s, 2.5 * a), (v / s, a / 2.5),
        (sum([v, w]), a + b), (v.clone(), a), (v.detach(), a),
    ):  # fmt: skip
        torch.testing.assert_close(mine.to_torch(), truth)
    torch.testing.assert_close(v.dot(w), torch.dot(a, b))
    torch.testing.assert_close(v @ w, torch.dot(a, b))
    for p in (0, 0.5, 1, 2, 3, math.inf, -math.inf):
        torch.testing.assert_close((-v).norm(p), torch.linalg.vector_norm(a, p))
    assert v.size() == (lc.numel(),)
    assert v.size(0) == lc.numel()


def test_in_place(lc):
    v, w = random_pvector(lc), random_pvector(lc)
    a, b = v.to_torch().clone(), w.to_torch().clone()
    same = v
    v += w
    v -= 0.5
    v *= 2
    v /= w
    assert v is same
    torch.testing.assert_close(v.to_torch(), (a + b - 0.5) * 2 / b)
    c = w.clone()
    c *= 0
    torch.testing.assert_close(w.to_torch(), b)


def test_to_and_from_models(model, lc):
    w = PVector.from_model(model).clone().detach()
    d = random_pvector(lc)
    d.add_to_model(model)
    torch.testing.assert_close(PVector.from_model(model).to_torch(), (w + d).to_torch())
    w.copy_to_model(model)
    assert torch.equal(PVector.from_model(model).to_torch(), w.to_torch())
    with pytest.raises(ValueError, match=r"'0\.weight' has no gradient"):
        PVector.from_model_grad(model)
    model(torch.randn(2, 1, 4, 4)).sum().backward()
    g = PVector.from_model_grad(model)
    assert torch.equal(g.to_torch(), parameters_to_vector([p.grad for p in model.parameters()]))
    d.to_model_grad(model)
    assert torch.equal(PVector.from_model_grad(model).to_torch(), d.to_torch())
    sub = lc.select("0", "7")
    part = PVector.from_model(model, sub)
    assert part.size(0) == sub.numel()
    before = model[4].weight.clone()
    (0 * part).copy_to_model(model)
    assert not bool(model[0].weight.any())
    assert torch.equal(model[4].weight, before)


def test_gradients_reach_the_model(model):
    w = PVector.from_model(model)
    (w**2).to_torch().sum().backward()
    torch.testing.assert_close(model[0].weight.grad, 2 * model[0].weight.detach())
    assert not w.detach().to_torch().requires_grad


def test_random(lc):
    g = torch.Generator().manual_seed(0)
    a = random_pvector(lc, generator=g)
    b = random_pvector(lc, generator=torch.Generator().manual_seed(0))
    assert torch.equal(a.to_torch(), b.to_torch())
    assert random_pvector(lc, dtype=torch.float32).dtype == torch.float32


def test_maps(lc):
    data = torch.randn(2, 3, lc.numel())
    J = PFMapDense(lc, data)
    v = random_pvector(lc)
    torch.testing.assert_close(J.jvp(v).to_torch(), data @ v.to_torch())
    torch.testing.assert_close(J.vjp(J.jvp(v)).to_torch(), torch.einsum("cnp,cn->p", data, data @ v.to_torch()))
    torch.testing.assert_close((2 * J - J / 2).to_torch(), 1.5 * data)
    assert J.to_dict()["0"][0].shape == (2, 3, *lc["0"].weight)
    with pytest.raises(ValueError, match=r"expected shape \(C, n,"):
        PFMapDense(lc, data[0])


def test_errors(model, lc):
    other = LayerCollection.from_model(nn.Linear(2, 2))
    v, w = random_pvector(lc), random_pvector(other)
    for operation in (lambda: v + w, lambda: v.dot(w), lambda: v * w):
        with pytest.raises(ValueError, match="of another layer collection"):
            operation()
    with pytest.raises(ValueError, match="layer collection is of another model"):
        w.copy_to_model(model)
    with pytest.raises(ValueError, match="expected 6 values"):
        PVector(other, torch.zeros(5))
    with pytest.raises(ValueError, match="either"):
        PVector(other)
    with pytest.raises(ValueError, match=r"shapes \[\(2, 2\)\], expected"):
        PVector(other, dict_repr={"": (torch.zeros(2, 2),)})
    with pytest.raises(ValueError, match="layers are not those"):
        PVector(other, dict_repr={"x": (torch.zeros(2, 2),)})
    with pytest.raises(ValueError, match="cast one"):
        v + v.to(dtype=torch.float32)
    with pytest.raises(TypeError):
        v + "x"
