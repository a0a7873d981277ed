"""Statistics over minibatches are those of dense matrices, and estimates are as far off as they say."""

from functools import cache

import pytest
import torch
from sklearn.datasets import load_digits
from torch import nn
from torch.nn.functional import cross_entropy

from nngeometry import FIM, GGN, EmpiricalFisher, Hessian, LayerCollection, PMatBlockDiag, PMatDense, PMatDiag, PMatKFAC
from nngeometry.minibatches import block_statistics, estimated
from nngeometry.statistics import LossStatistics, Trajectory, loss_statistics, loss_trajectory

#: Of 200 intervals, as many may miss with probability 1e-3 where 5 % do.
MISSES = 21


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


@cache
def problem():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3)).double()
    return model, [(torch.randn(n, 4, dtype=torch.float64), torch.randint(3, (n,))) for n in (12, 12, 12, 7)]


@cache
def digits():
    """226 parameters, 14 minibatches of 128, after a few epochs."""
    torch.manual_seed(0)
    of = load_digits()
    x, y = torch.tensor(of.data[:1792] / 16).view(-1, 1, 8, 8), torch.tensor(of.target[:1792])
    x = nn.functional.avg_pool2d(x, 2).flatten(1)  # few enough for 200 seeds in seconds
    model = nn.Sequential(nn.Linear(16, 8), nn.Tanh(), nn.Linear(8, 10))
    batches = list(zip(x.split(128), y.split(128), strict=True))
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    for _ in range(5):
        for a, b in batches:
            optimizer.zero_grad()
            cross_entropy(model(a), b).backward()
            optimizer.step()
    return model, batches


def dense_hessian(model, x, y):
    """By plain loops."""
    params = list(model.parameters())
    grads = torch.autograd.grad(cross_entropy(model(x), y), params, create_graph=True)
    flat = torch.cat([g.flatten() for g in grads])
    rows = []
    for g in flat:
        row = torch.autograd.grad(g, params, retain_graph=True, materialize_grads=True)
        rows.append(torch.cat([r.flatten() for r in row]))
    return flat.detach(), torch.stack(rows)


def of_dense(model, batches, where=slice(None)):
    pairs = [dense_hessian(model, x, y) for x, y in batches]
    g = torch.stack([p[0][where] for p in pairs])
    H = torch.stack([p[1][where, where] for p in pairs])
    M, P, B = H.mean(0), H.shape[1], len(H)
    l = torch.linalg.eigvalsh(M)
    variance = (H - M).square().sum((1, 2)).mean()
    delta = (l - l.mean()).square().mean()
    w = torch.cat([p.flatten() for p in model.parameters()]).detach()[where]
    return {
        "gradient_norm2": g.mean(0).square().sum(),
        "gradient_variance": (g - g.mean(0)).square().sum(1).mean(),
        "trace": l.sum(),
        "norm2": l.square().sum(),
        "curvature_variance": variance,
        "spectral_mean": l.mean(),
        "spectral_variance": delta,
        "shrinkage": (1 - variance / (B * P * delta)).clamp(min=0),
        "l2": w.norm(),
        "linf": w.abs().max(),
    }


def value(found, name):
    got = getattr(found, name)
    return torch.as_tensor(getattr(got, "value", got))


def test_exact_statistics_are_those_of_dense_matrices():
    model, batches = problem()
    found = loss_statistics(model, batches, representation=PMatDense, per_layer=True)
    where = {"0": slice(0, 25), "2": slice(25, 43)}
    for of, expected in [(found, of_dense(model, batches))] + [
        (found.layers[name], of_dense(model, batches, s)) for name, s in where.items()
    ]:
        assert of.exact
        for name, v in expected.items():
            torch.testing.assert_close(value(of, name), v, rtol=1e-10, atol=1e-13)
    losses = torch.stack([cross_entropy(model(x), y) for x, y in batches]).detach()
    assert found.loss == pytest.approx(float(losses.mean()), rel=1e-12)
    assert found.loss_variance == pytest.approx(float(losses.var(correction=0)), rel=1e-10)
    x, y = (torch.cat(parts) for parts in zip(*batches, strict=True))
    assert found.train.loss == pytest.approx(float(cross_entropy(model(x), y).detach()), rel=1e-12)
    assert found.train.accuracy == pytest.approx(float((model(x).argmax(1) == y).double().mean()))
    assert found.test is None
    assert found.train.n == 43


@pytest.mark.parametrize("representation", [PMatDiag, PMatBlockDiag, PMatKFAC])
@pytest.mark.parametrize("matrix", [GGN, EmpiricalFisher])
def test_of_a_representation(matrix, representation):
    model, batches = problem()
    found = loss_statistics(model, batches, matrix=matrix, representation=representation)
    H = torch.stack([matrix(model, b, representation).to_torch() for b in batches])
    torch.testing.assert_close(found.norm2.value, H.mean(0).square().sum(), rtol=1e-10, atol=0)
    expected = (H - H.mean(0)).square().sum((1, 2)).mean()
    torch.testing.assert_close(found.curvature_variance.value, expected, rtol=1e-10, atol=0)


def test_few_parameters_are_exact_by_products():
    model, batches = problem()
    found = loss_statistics(model, batches, probes=43, per_layer=True)
    assert found.exact
    for name, v in of_dense(model, batches).items():
        torch.testing.assert_close(value(found, name), v, rtol=1e-9, atol=1e-13)
    assert loss_statistics(model, batches, matrix=FIM, variant="classif_logits", probes=43).exact


@pytest.mark.slow
@pytest.mark.parametrize("layers", [(), ("0",)], ids=["all", "first"])
def test_intervals_cover(layers):
    """Through dense matrices, so that 200 seeds take seconds."""
    model, batches = digits()
    lc = LayerCollection.from_model(model, *layers)
    exact = loss_statistics(model, batches, representation=PMatDense, layer_collection=lc)
    held = [Hessian(model, b, PMatDense, layer_collection=lc) for b in batches]
    names = ("trace", "norm2", "curvature_variance", "spectral_variance", "shrinkage")
    missed = dict.fromkeys(names, 0)
    position = {id(b[0]): k for k, b in enumerate(batches)}
    for seed in range(200):
        samples = estimated(
            lambda b: held[position[id(b[0])]], lambda: iter(batches), [None], held[0], 30, seeded(seed)
        )[None]
        for name, e in block_statistics(samples, exact.size, len(batches)).items():
            if name in missed:
                missed[name] += int(abs(float(e.value) - float(getattr(exact, name).value)) > 1.96 * float(e.error))
    assert max(missed.values()) <= MISSES, missed


def test_estimates_are_those_of_the_model():
    model, batches = digits()
    exact = loss_statistics(model, batches[:3], representation=PMatDense)
    dense = of_dense(model, batches[:3])
    assert exact.size == 226
    for name, v in dense.items():
        torch.testing.assert_close(value(exact, name), v, rtol=1e-10, atol=1e-13)
    found = loss_statistics(model, batches[:3], generator=seeded(1))
    assert not found.exact
    for name in ("trace", "norm2", "curvature_variance", "spectral_variance"):
        e = getattr(found, name)
        assert abs(float(e.value) - float(getattr(exact, name).value)) < 5 * float(e.error)
    again = loss_statistics(model, batches[:3], generator=seeded(1))
    assert float(again.trace.value) == float(found.trace.value)


def test_both_normalisations_are_named():
    model, batches = problem()
    found = loss_statistics(model, batches, representation=PMatDense, test_loader=batches[:1])
    columns = found.columns()
    assert float(columns["trace"].value) == pytest.approx(43 * float(columns["trace per parameter"].value))
    assert "test accuracy" in columns
    assert "trace per parameter" in str(found)


def test_trajectory_is_a_table_and_leaves_the_model():
    model, batches = problem()
    begin = {k: v.clone() for k, v in model.state_dict().items()}
    states = {0: begin, 5: {k: 2 * v for k, v in begin.items()}}
    found = loss_trajectory(model, states, batches, representation=PMatDiag)
    assert all(isinstance(s, LossStatistics) for s in found.at.values())
    assert [float(e.value) for e in found.columns()["|weights|"]] == pytest.approx([found.at[0].l2, 2 * found.at[0].l2])
    assert str(found).splitlines()[0].split() == ["0", "5"]
    assert all(torch.equal(v, begin[k]) for k, v in model.state_dict().items())
    with pytest.raises(ValueError, match="checkpoint 3 is of another model"):
        loss_trajectory(model, {3: nn.Linear(2, 2).state_dict()}, batches)
    assert all(torch.equal(v, begin[k]) for k, v in model.state_dict().items())


def test_tables_of_layers_called_anything_and_of_nothing():
    layers = {"all": nn.Linear(4, 3), "a<b": nn.Linear(3, 2), 'q"&': nn.Linear(2, 3)}
    model = nn.Sequential()
    for name, layer in layers.items():
        model.add_module(name, layer)
    batches = [(torch.randn(9, 4), torch.randint(3, (9,))) for _ in range(2)]
    found = loss_statistics(model, batches, representation=PMatDiag, per_layer=True)
    assert str(found).splitlines()[0].split() == ["all", *layers]  # that of all, and the layer of this name
    html = found._repr_html_()
    assert "a&lt;b" in html
    assert "q&quot;&amp;" in html
    assert "a<b" not in html
    alone = loss_statistics(nn.Linear(4, 3), batches, representation=PMatDiag, per_layer=True)
    assert str(alone).splitlines()[0].split() == ["all", "(root)"]
    assert "<table>" in Trajectory({})._repr_html_()
    assert Trajectory({}).columns() == {}


@pytest.mark.parametrize(
    ("loader", "options", "message"),
    [
        (lambda b: iter(b), {}, "more than once"),
        (lambda b: [(x,) for x, _ in b], {}, "no labels"),
        (lambda b: b, {"probes": 11}, "probes: expected at least 12"),
        (lambda b: [], {}, "no minibatch"),
    ],
)
def test_bad_input_in_one_sentence(loader, options, message):
    model, batches = problem()
    with pytest.raises(ValueError, match=message):
        loss_statistics(model, loader(batches), **options)


def test_train_mode_is_refused():
    model = nn.Sequential(nn.Linear(4, 3), nn.BatchNorm1d(3))
    _, batches = problem()
    with pytest.raises(ValueError, match=r"model.eval\(\)"):
        loss_statistics(model, batches, representation=PMatDiag, matrix=GGN)


def test_sum_and_other_losses():
    model, batches = problem()
    found = loss_statistics(model, batches, nn.CrossEntropyLoss(reduction="sum"), representation=PMatDense)
    mean = loss_statistics(model, batches[:3], representation=PMatDense)
    total = loss_statistics(model, batches[:3], nn.CrossEntropyLoss(reduction="sum"), representation=PMatDense)
    assert float(total.trace.value) == pytest.approx(12 * float(mean.trace.value))
    assert found.train.accuracy is not None
    regression = [(x, torch.randn(len(x), 3)) for x, _ in batches]
    assert loss_statistics(model, regression, nn.MSELoss(), representation=PMatDense).train.accuracy is None
