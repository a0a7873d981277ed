"""Landscapes are the loss where they say, and leave the model as it was."""

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn.functional import cross_entropy

from nngeometry import GGN, Hessian, LayerCollection, PMatDense, PVector
from nngeometry.landscape import along_eigenvectors, landscape
from nngeometry.objective import recompute_batch_norm


def problem(batch_norm=False):
    torch.manual_seed(0)
    layers = [nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 3)]
    if batch_norm:
        layers.insert(1, nn.BatchNorm1d(6))
    model = nn.Sequential(*layers)
    batches = [(torch.randn(15, 4), torch.randint(3, (15,))) for _ in range(3)]
    recompute_batch_norm(model, batches)
    return model.eval(), batches


def state_of(model):
    return {k: v.clone() for k, v in model.state_dict().items()}, [m.training for m in model.modules()]


def unchanged(model, before):
    state, modes = state_of(model)
    return modes == before[1] and all(torch.equal(v, before[0][k]) for k, v in state.items())


def at_weights(model, flat, batches):
    """The loss, by plain torch."""
    import copy

    other = copy.deepcopy(model)
    nn.utils.vector_to_parameters(flat, other.parameters())
    x, y = (torch.cat(parts) for parts in zip(*batches, strict=True))
    return other, float(cross_entropy(other(x), y).detach())


@pytest.mark.parametrize("matrix", [Hessian, GGN])
def test_second_difference_is_the_eigenvalue(matrix):
    model, batches = problem()
    found = along_eigenvectors(model, batches, ranks=(0, 1, -1), matrix=matrix, distance=2e-3, points=3)
    H = Hessian(model, batches, PMatDense)
    F = matrix(model, batches, PMatDense)
    l, vectors = F.eig()
    for rank, line in found.items():
        assert line.eigenvalues[0] == pytest.approx(float(l[rank]), abs=1e-8)
        v = vectors[rank]
        assert line.second_difference() == pytest.approx(float(H.vTMv(v)), rel=2e-5, abs=2e-5 * float(l[0]))


def test_second_difference_is_the_eigenvalue_to_five_digits():
    model, batches = problem()
    found = along_eigenvectors(model, batches, ranks=(0, (0, 1)), distance=1e-2, points=5, eigen={"tol": 1e-12})
    line, surface = found[0], found[0, 1]
    h = line.positions[0][3]
    assert float(h) == pytest.approx(5e-3)
    assert line.second_difference() == pytest.approx(line.eigenvalues[0], rel=1e-5)
    for k in range(2):
        assert surface.second_difference(k) == pytest.approx(surface.eigenvalues[k], rel=1e-5)


def test_points_are_the_loss_there():
    model, batches = problem()
    before = state_of(model)
    lc = LayerCollection.from_model(model)
    d, e = (PVector(lc, torch.randn(lc.numel())) for _ in range(2))
    found = landscape(model, batches, (d, e), distance=(0.5, 2.0), points=3, test_loader=batches[:1])
    w = nn.utils.parameters_to_vector(model.parameters()).detach()
    for i, s in enumerate((-0.5, 0, 0.5)):
        for j, t in enumerate((-2.0, 0, 2.0)):
            there = w + s * d.to_torch() + t * e.to_torch()
            assert float(found.loss[i, j]) == pytest.approx(at_weights(model, there, batches)[1], rel=1e-12)
            assert float(found.test_loss[i, j]) == pytest.approx(at_weights(model, there, batches[:1])[1], rel=1e-12)
    assert found.accuracy.shape == (3, 3)
    assert unchanged(model, before)


@pytest.mark.parametrize("training", [False, True])
def test_batch_norm_is_recomputed_and_put_back(training):
    model, batches = problem(batch_norm=True)
    model.train(training)
    before = state_of(model)
    d = PVector.from_model(model).clone().detach()
    found = landscape(model, batches, d, points=3)
    kept = landscape(model, batches, d, points=3, recompute_batch_norm=False)
    assert unchanged(model, before)
    assert not torch.allclose(found.loss, kept.loss)
    w = nn.utils.parameters_to_vector(model.parameters()).detach()
    for k, t in ((0, -1.0), (2, 1.0)):
        other, _ = at_weights(model.eval(), w + t * d.to_torch(), batches)
        stats = [(other[0](x).mean(0), other[0](x).var(0)) for x, _ in batches]
        other[1].running_mean.copy_(torch.stack([m for m, _ in stats]).mean(0).detach())
        other[1].running_var.copy_(torch.stack([v for _, v in stats]).mean(0).detach())
        x, y = (torch.cat(parts) for parts in zip(*batches, strict=True))
        assert float(found.loss[k]) == pytest.approx(float(cross_entropy(other(x), y).detach()), rel=1e-10)


class Broken(Exception):
    pass


@pytest.mark.parametrize("after", [0, 2, 7])
def test_the_model_is_restored_after_an_exception(after):
    model, batches = problem(batch_norm=True)
    model.train()
    before = state_of(model)

    class Loader(list):
        left = after

        def __iter__(self):
            for b in super().__iter__():
                if self.left == 0:
                    raise Broken
                self.left -= 1
                yield b

    d = PVector.from_model(model).clone().detach()
    with pytest.raises(Broken):
        landscape(model, Loader(batches), d, points=3)
    assert unchanged(model, before)
    assert model[1].momentum == 0.1


def test_directions_on_some_layers_and_normalised_filters():
    model, batches = problem()
    lc = LayerCollection.from_model(model, "2")
    d = PVector(lc, torch.randn(lc.numel()))
    found = landscape(model, batches, d, points=3)
    w = nn.utils.parameters_to_vector(model.parameters()).detach()
    there = w + torch.cat([torch.zeros(30), d.to_torch()])
    assert float(found.loss[2]) == pytest.approx(at_weights(model, there, batches)[1], rel=1e-12)
    normal = landscape(model, batches, d, points=3, filter_normalise=True)
    weight = d.to_dict()["2"][0]
    scaled = weight / weight.norm(dim=1, keepdim=True) * model[2].weight.detach().norm(dim=1, keepdim=True)
    there = w + torch.cat([torch.zeros(30), scaled.flatten(), torch.zeros(3)])
    assert float(normal.loss[2]) == pytest.approx(at_weights(model, there, batches)[1], rel=1e-12)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"points": 4}, ValueError, "odd"),
        ({"distance": (1.0, 2.0)}, ValueError, "2 numbers for 1 directions"),
        ({"directions": []}, ValueError, "one PVector"),
        ({"names": ["a", "b"]}, ValueError, "names: expected one for each of 1"),
        ({"names": "a"}, ValueError, "names: expected one for each of 1"),
        ({"directions": [torch.zeros(51)]}, TypeError, "directions: expected a PVector"),
        ({"loader": iter([])}, ValueError, "more than once"),
        ({"loader": [(torch.zeros(2, 4, dtype=torch.float64),)]}, ValueError, "no labels"),
    ],
)
def test_bad_input_in_one_sentence(change, error, message):
    model, batches = problem()
    given = {"loader": batches, "directions": PVector.from_model(model).clone().detach(), **change}
    with pytest.raises(error, match=message):
        landscape(model, given.pop("loader"), given.pop("directions"), **given)


def test_directions_of_another_model():
    model, batches = problem()
    other = nn.Sequential(nn.Linear(4, 7), nn.Tanh(), nn.Linear(7, 3))
    with pytest.raises(ValueError, match="of another model"):
        landscape(model, batches, PVector.from_model(other).clone().detach())
    with pytest.raises(TypeError, match="ranks"):
        along_eigenvectors(model, batches, ranks=("largest",))


def test_numbers_of_numpy_and_a_single_rank():
    model, batches = problem()
    d = PVector.from_model(model).clone().detach()
    found = [landscape(model, batches, d, points=3, distance=r) for r in (0.5, np.float32(0.5), torch.tensor(0.5))]
    assert all(torch.equal(f.loss, found[0].loss) for f in found)
    assert list(along_eigenvectors(model, batches, ranks=0, points=3)) == [0]


def test_statistics_are_put_back_where_data_end_early():
    model, batches = problem(batch_norm=True)
    before = state_of(model)

    def broken():
        yield batches[0]
        raise Broken

    class Loader:
        def __iter__(self):
            return broken()

    with pytest.raises(Broken):
        recompute_batch_norm(model, Loader())
    assert unchanged(model, before)
    x, y = batches[0]
    with pytest.raises(ValueError, match=r"single value for each channel.*drop_last=True"):
        recompute_batch_norm(model, [(x, y), (x[:1], y[:1])])
    assert unchanged(model, before)


def test_frozen_models_have_landscapes():
    model, batches = problem()
    d = PVector.from_model(model).clone().detach()
    expected = landscape(model, batches, d, points=3).loss
    model.requires_grad_(False)
    assert torch.equal(landscape(model, batches, d, points=3).loss, expected)
    assert not any(p.requires_grad for p in model.parameters())


def test_points_too_far_are_named():
    model, batches = problem()
    far = 1e308 * PVector.from_model(model).clone().detach()
    with pytest.raises(ValueError, match=r"landscape: -\S+ along the directions.*take a smaller distance"):
        landscape(model, batches, 0.5 * far, points=3, distance=1e10)
    with pytest.raises(ValueError, match="directions: one has NaN"):
        landscape(model, batches, float("nan") * far)
