"""Vectors in parameter space: arithmetic, conversions, and traffic with models."""

import copy
import math
import pickle

import pytest
import torch
from models import CASES
from torch import nn
from torch.nn.utils import parameters_to_vector

from nngeometry import LayerCollection, PFMapDense, PMatDiag, PVector, random_pvector


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


# The vector of a model has the values that the model has now


@pytest.fixture
def live(model, lc):
    return PVector.from_model(model, lc)


def now(model):
    return torch.cat([p.detach().flatten() for p in model.parameters()])


def data_replaced(model):
    for p in model.parameters():
        p.data = 2 * p.data


def parameters_replaced(model):
    for module in model.modules():
        for name, p in list(module.named_parameters(recurse=False)):
            setattr(module, name, nn.Parameter(3 * p.detach()))


def stepped(model):
    optimiser = torch.optim.SGD(model.parameters(), lr=0.1)
    PVector.from_model(model).norm().backward()
    optimiser.step()
    optimiser.zero_grad()


CHANGES = [
    data_replaced,
    parameters_replaced,
    stepped,
    lambda model: model.to(torch.float32),
    lambda model: model.load_state_dict({k: v + 1 for k, v in model.state_dict().items()}),
    lambda model: (0.5 * PVector.from_model(model)).copy_to_model(model),
    lambda model: PVector.from_model(model).add_to_model(model),
]


@pytest.mark.parametrize("change", CHANGES)
def test_it_follows_the_model(change, model, lc, live):
    kept = {
        "clone": live.clone(), "detach": live.detach(), "sum": live + 0.0, "product": 1.0 * live, "to": live.to(),
        "total": sum([live]), "pickle": pickle.loads(pickle.dumps(live)), "deepcopy": copy.deepcopy(live),
    }  # fmt: skip
    before = now(model).clone()
    live.to_torch()
    change(model)
    after = now(model)
    assert before.dtype != after.dtype or not torch.equal(before, after)
    assert torch.equal(live.to_torch(), after)
    assert (live.dtype, live.device, live.size(), live.size(0)) == (after.dtype, after.device, after.shape, len(after))
    d = random_pvector(lc, dtype=after.dtype)
    M = PMatDiag(lc, data=(d**2).to_torch())
    torch.testing.assert_close(live.norm(), after.norm())
    torch.testing.assert_close(live.dot(d), after @ d.to_torch())
    torch.testing.assert_close(d @ live, after @ d.to_torch())
    torch.testing.assert_close((live - d).to_torch(), after - d.to_torch())
    torch.testing.assert_close((d - live).to_torch(), d.to_torch() - after)
    torch.testing.assert_close(M.mv(live).to_torch(), d.to_torch() ** 2 * after)
    torch.testing.assert_close(M.vTMv(live), (d.to_torch() ** 2 * after**2).sum())
    torch.testing.assert_close(copy.copy(live).to_torch(), after)
    torch.testing.assert_close(live.on(lc.select("0")).to_torch(), after[: lc["0"].numel()])
    assert [p is q for p, q in zip(model.parameters(), (t for ts in live.to_dict().values() for t in ts), strict=True)]
    assert str(len(after)) in repr(live)
    assert repr(after.dtype) in repr(live)
    for name, v in kept.items():
        assert torch.equal(v.to_torch(), before), name


def test_gradients_reach_the_model_in_every_step(model, lc, live):
    anchor = live.clone().detach()
    M = PMatDiag(lc, data=torch.rand(lc.numel()))
    optimiser = torch.optim.SGD(model.parameters(), lr=0.1)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(torch.randn_like(p))
    for _ in range(3):
        expected = 2 * M.get_diag() * (now(model) - anchor.to_torch())
        optimiser.zero_grad()
        penalty = M.vTMv(live - anchor)
        penalty.backward()
        torch.testing.assert_close(PVector.from_model_grad(model, lc).to_torch(), expected)
        torch.testing.assert_close(penalty.detach(), (M.get_diag() * (now(model) - anchor.to_torch()) ** 2).sum())
        optimiser.step()


def test_it_may_be_used_twice_in_a_graph(model, live):
    a, b = live.to_torch(), live.to_torch()
    assert torch.equal(a, b)
    (a @ b).backward()
    torch.testing.assert_close(PVector.from_model_grad(model).to_torch(), 2 * now(model))
    model.zero_grad()
    with torch.no_grad():
        assert not live.to_torch().requires_grad
        assert not live.norm().requires_grad
    live.norm().backward()
    torch.testing.assert_close(PVector.from_model_grad(model).to_torch(), now(model) / now(model).norm())


def test_arithmetic_in_place_leaves_the_model_alone(model, lc, live):
    before, w = now(model).clone(), live
    w += random_pvector(lc)
    w *= 2
    w -= 1
    w /= 3
    assert w is not live
    assert torch.equal(now(model), before)
    assert torch.equal(live.to_torch(), before)
    assert not torch.equal(w.to_torch(), before)
    d = random_pvector(lc)
    d += live
    data_replaced(model)
    torch.testing.assert_close(live.to_torch(), 2 * before)
    kept = w.to_torch().clone()
    data_replaced(model)
    assert torch.equal(w.to_torch(), kept)
    w.to_torch().sum().backward()
    torch.testing.assert_close(PVector.from_model_grad(model).to_torch(), torch.full_like(before, 2 / 3))


def test_to_and_from_its_own_model(model, lc, live):
    before = now(model).clone()
    live.copy_to_model(model)
    assert torch.equal(now(model), before)
    live.add_to_model(model)
    torch.testing.assert_close(now(model), 2 * before)
    live.to_model_grad(model)
    torch.testing.assert_close(PVector.from_model_grad(model).to_torch(), 2 * before)
    other = copy.deepcopy(model)
    data_replaced(model)
    live.copy_to_model(other)
    torch.testing.assert_close(now(other), 4 * before)
    gradient = PVector.from_model_grad(model, lc)
    for p in model.parameters():
        p.grad.mul_(5)
    torch.testing.assert_close(gradient.to_torch(), 2 * before)  # gradients are a copy


def test_it_sees_parameters_that_stand_in_for_others(model, live):
    def norm(parameters):
        with torch.nn.utils.stateless._reparametrize_module(model, parameters):
            return live.norm()

    values = {name: torch.full_like(p, 2.0) for name, p in model.named_parameters()}
    torch.testing.assert_close(norm(values), torch.full((live.size(0),), 2.0).norm())
    torch.testing.assert_close(live.to_torch(), now(model))


def test_a_model_that_lost_its_layers(model, lc, live):
    with pytest.raises(ValueError, match="is of another model"):
        PVector.from_model(nn.Linear(2, 2), lc)
    model[0] = nn.Identity()
    with pytest.raises(ValueError, match=r"it has '0\.weight'"):
        live.norm()


def test_parts_of_vectors_and_maps(lc):
    v, J = random_pvector(lc), PFMapDense(lc, torch.randn(2, 3, lc.numel()))
    part = LayerCollection({name: lc[name] for name in reversed(list(lc.select("0", "7")))})
    slices = lc.slices()
    index = torch.cat([torch.arange(slices[name].start, slices[name].stop) for name in part])
    assert torch.equal(v.on(part).to_torch(), v.to_torch()[index])
    assert torch.equal(J.on(part).to_torch(), J.to_torch()[..., index])
    assert J.on(part).layer_collection == part
    with pytest.raises(ValueError, match="another layer collection"):
        v.on(LayerCollection.from_model(nn.Linear(2, 2)))
    with pytest.raises(ValueError, match="another layer collection"):
        v.on(part).on(lc)
