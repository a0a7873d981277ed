"""Jacobians and kernels equal those of plain loops, in every representation, and obey the identities that tie them."""

import json
from functools import partial

import oracle
import pytest
import torch
from models import CASES, SMALL
from torch import nn

from nngeometry import (
    FIM,
    FMatDense,
    FMatImplicit,
    FMatMemmap,
    FVector,
    GramMatrix,
    Jacobian,
    LayerCollection,
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
    PVector,
    Relative,
    memory_budget,
    random_pvector,
)

TOLERANCE = 1e-10
MAPS = [PFMapDense, PFMapFactored, PFMapImplicit]
pytestmark = pytest.mark.filterwarnings("ignore:.*cannot be vectorised:RuntimeWarning")


def kernel(J, J2=None, M=None):
    """``(C, n, C', n')`` from dense Jacobians."""
    J2 = J if J2 is None else J2
    right = J2 if M is None else J2 @ M.T
    return torch.einsum("cnp,dmp->cndm", J, right)


def reduced(K, output):
    """What an output keeps of a full kernel."""
    C = K.shape[0]
    return {
        "full": lambda: K,
        "diag": lambda: torch.stack([K[c, :, c] for c in range(C)]),
        "trace": lambda: sum(K[c, :, c] for c in range(C)),
        "mean_trace": lambda: sum(K[c, :, c] for c in range(C)) / C,
        "sum": lambda: K.sum((0, 2)),
    }[output]()


def uneven(batch):
    """Seven examples in minibatches of 3, 3 and 1."""
    if isinstance(batch, dict):
        return [{k: v[a:b] for k, v in batch.items()} for a, b in ((0, 3), (3, 6), (6, 7))]
    return [tuple(t[a:b] for t in batch) for a, b in ((0, 3), (3, 6), (6, 7))]


def case(name, n=7):
    model, batch, function = CASES[name].make(n)
    return model, batch, uneven(batch), function


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("representation", MAPS)
def test_jacobian_equals_loops(name, representation):
    model, batch, loader, function = case(name)
    J = Jacobian(model, loader, function, representation)
    truth = oracle.jacobian(model, batch, function)
    assert J.shape == truth.shape
    v = random_pvector(J.layer_collection, dtype=torch.float64)
    u = FVector(torch.randn(truth.shape[:2], dtype=torch.float64))
    assert oracle.relative((J @ v).to_torch(), truth @ v.to_torch()) < TOLERANCE
    assert oracle.relative((J.T @ u).to_torch(), torch.einsum("cnp,cn->p", truth, u.to_torch())) < TOLERANCE
    assert oracle.relative(J.to_dense().to_torch(), truth) < TOLERANCE


@pytest.mark.parametrize("name", CASES)
def test_gram_equals_loops(name):
    model, batch, loader, function = case(name)
    truth = kernel(oracle.jacobian(model, batch, function))
    for output in ("full", "diag", "trace", "mean_trace", "sum"):
        K = GramMatrix(model, loader, function=function, output=output)
        expected = reduced(truth, output)
        assert K.to_torch().shape == K.size() == expected.shape
        assert oracle.relative(K.to_torch(), expected) < TOLERANCE, output
    entries = GramMatrix(model, loader, function=function).root.data
    assert torch.equal(entries, entries.mT)  # symmetric to the bit
    assert torch.linalg.eigvalsh(entries).min() > -1e-12 * entries.norm()


@pytest.mark.parametrize("name", CASES)
def test_kernels_of_layers_sum_to_the_whole(name):
    model, batch, loader, function = case(name)
    lc = LayerCollection.from_model(model)
    J = oracle.jacobian(model, batch, function)
    found = GramMatrix(model, loader, function=function, per_layer=True, output="full")
    assert list(found) == list(lc)
    for layer, s in lc.slices().items():
        expected = kernel(J[..., s])
        assert torch.linalg.norm(found[layer].to_torch() - expected) < TOLERANCE * kernel(J).norm(), layer
    whole = GramMatrix(model, loader, function=function)
    assert oracle.relative(sum(found.values()).to_torch(), whole.to_torch()) < TOLERANCE


@pytest.mark.parametrize("name", SMALL)
@pytest.mark.parametrize("output", ["full", "diag", "trace", "mean_trace", "sum"])
@pytest.mark.parametrize("representation", [FMatDense, FMatImplicit, FMatMemmap])
def test_representations_of_kernels(name, output, representation, tmp_path):
    model, batch, loader, function = case(name)
    J = oracle.jacobian(model, batch, function)
    truth = reduced(kernel(J), output)
    if representation is FMatMemmap:
        representation = FMatMemmap.at(tmp_path / "square")
    K = GramMatrix(model, loader, function=function, output=output, representation=representation)
    truth = truth.to(K.device)  # on disk is not where the model is
    assert oracle.relative(K.to_torch(), truth) < TOLERANCE
    C = J.shape[0] if output in ("full", "diag") else 2
    u = FVector(torch.randn(C, 7, dtype=torch.float64)).to(K.device)
    expected = apply(truth, u.to_torch())
    assert oracle.relative((K @ u).to_torch(), expected) < TOLERANCE
    assert oracle.relative(K.vTMv(u), (expected * u.to_torch()).sum()) < TOLERANCE
    assert oracle.relative(K.get_diag(), diagonal(truth)) < TOLERANCE
    assert oracle.relative(K.trace(), diagonal(truth).sum()) < TOLERANCE
    shifted = K.solve(u, 0.1)
    assert oracle.relative((K @ shifted + 0.1 * shifted).to_torch(), u.to_torch()) < 1e-5
    closer = K.solve(u, 0.1, rtol=1e-9)
    assert oracle.relative((K @ closer + 0.1 * closer).to_torch(), u.to_torch()) < 1e-8
    l, vectors = K.eig(2)
    for value, v in zip(l, vectors, strict=True):
        assert oracle.relative((K @ v).to_torch(), (value * v).to_torch()) < 1e-8
    centred = K.centred()
    assert oracle.relative(centred.to_torch(), centre(truth)) < TOLERANCE
    double = K + 2 * K - K
    assert oracle.relative((double @ u).to_torch(), 2 * expected) < TOLERANCE


def apply(K, u):
    if K.ndim == 4:
        return torch.einsum("cndm,dm->cn", K, u)
    return torch.einsum("cnm,cm->cn", K, u) if K.ndim == 3 else u @ K.T


def diagonal(K):
    if K.ndim == 4:
        return torch.einsum("cncn->cn", K)
    return K.diagonal(dim1=-2, dim2=-1)


def centre(K):
    axes = {4: (1, 3), 3: (1, 2), 2: (0, 1)}[K.ndim]
    for a in axes:
        K = K - K.mean(a, keepdim=True)
    return K


@pytest.mark.parametrize("name", SMALL)
@pytest.mark.parametrize("representation", [FMatDense, FMatImplicit, FMatMemmap])
def test_rectangular_kernels(name, representation, tmp_path):
    model, batch, loader, function = case(name)
    _, batch2, _ = CASES[name].make(4)
    J, J2 = oracle.jacobian(model, batch, function), oracle.jacobian(model, batch2, function)
    for output in ("full", "diag", "trace", "sum"):
        kind = FMatMemmap.at(tmp_path / output) if representation is FMatMemmap else representation
        K = GramMatrix(model, loader, batch2, function=function, output=output, representation=kind)
        truth = reduced(kernel(J, J2), output).to(K.device)
        assert oracle.relative(K.to_torch(), truth) < TOLERANCE
        assert oracle.relative(K.T.to_torch(), reduced(kernel(J2, J), output).to(K.device)) < TOLERANCE
        u = FVector(torch.randn(J.shape[0], 4, dtype=torch.float64)).to(K.device)
        assert oracle.relative((K @ u).to_torch(), apply(truth, u.to_torch())) < TOLERANCE
        assert oracle.relative(K.centred().to_torch(), centre(truth)) < TOLERANCE
        with pytest.raises(ValueError, match="rectangular"):
            K.solve(u)


def test_two_functions_and_two_models():
    model, batch, loader, _ = case("mlp")
    other, _, _, _ = case("mlp")
    oracle.randomise(other, seed=3)
    square = lambda x: model(x).square().sum(1, keepdim=True)  # noqa: E731
    J, JS = oracle.jacobian(model, batch), oracle.jacobian(model, batch, square)
    K = GramMatrix(model, loader, function2=square)
    assert oracle.relative(K.to_torch(), kernel(J, JS)) < TOLERANCE
    K = GramMatrix(model, loader, function2=square, output="sum")
    assert oracle.relative(K.to_torch(), kernel(J, JS).sum((0, 2))) < TOLERANCE
    with pytest.raises(ValueError, match="3 and 1 outputs"):
        GramMatrix(model, loader, function2=square, output="trace")
    K = GramMatrix(model, loader, model2=other)
    assert oracle.relative(K.to_torch(), kernel(J, oracle.jacobian(other, batch))) < TOLERANCE
    assert not K.root.symmetric
    u = FVector(torch.randn(3, 7, dtype=torch.float64))
    x = K.solve(u, 0.5)
    assert oracle.relative((K @ x + 0.5 * x).to_torch(), u.to_torch()) < 1e-8


def test_sums_of_square_kernels_that_are_not_symmetric():
    model, _, loader, _ = case("mlp")
    other, _, _, _ = case("mlp")
    oracle.randomise(other, seed=3)
    K = GramMatrix(model, loader, model2=other)
    products = GramMatrix(model, loader, model2=other, representation=FMatImplicit)
    u = FVector(torch.randn(3, 7, dtype=torch.float64))
    for one, two in ((K + K, products + products), (K.centred(), products.centred()), (K @ K, products @ products)):
        assert not two.root.symmetric
        assert oracle.relative(two.T.mv(u).to_torch(), one.T.mv(u).to_torch()) < TOLERANCE
        assert oracle.relative(two.norm(), one.norm()) < TOLERANCE
        with pytest.raises(NotImplementedError, match="not symmetric"):
            two.solve(u, 0.5)


METRICS = [PMatDense, PMatBlockDiag, PMatDiag, PMatKFAC, PMatEKFAC, PMatLowRank, PMatEye, PMatImplicit]


@pytest.mark.parametrize("name", SMALL)
@pytest.mark.parametrize("metric", METRICS)
def test_kernels_through_a_metric(name, metric):
    model, batch, loader, function = case(name)
    J = oracle.jacobian(model, batch, function)
    F = FIM(model, loader, metric, variant="regression", function=function)
    dense = F.to_torch()
    for M, truth in ((F, dense), (F.inv(0.1), torch.linalg.inv(dense + 0.1 * torch.eye(len(dense))))):
        tolerance = 1e-5 if metric is PMatImplicit and M is not F else 1e-9
        for output in ("full", "trace"):
            K = GramMatrix(model, loader, function=function, metric=M, output=output)
            assert oracle.relative(K.to_torch(), reduced(kernel(J, M=truth), output)) < tolerance
        K = GramMatrix(model, loader, function=function, metric=M, representation=FMatImplicit)
        u = FVector(torch.randn(J.shape[:2], dtype=torch.float64))
        assert oracle.relative((K @ u).to_torch(), apply(kernel(J, M=truth), u.to_torch())) < tolerance
    two = uneven(batch)[:2]
    K = GramMatrix(model, loader, two, function=function, metric=F)
    assert oracle.relative(K.to_torch(), kernel(J, J[:, :6], dense)) < 1e-9


@pytest.mark.parametrize("metric", [PMatKFAC, PMatBlockDiag, PMatDiag])
def test_kernels_of_layers_through_a_metric(metric):
    model, _batch, loader, _ = case("convnet")
    F = FIM(model, loader, metric, variant="regression")
    whole = GramMatrix(model, loader, metric=F)
    for representation in (FMatDense, FMatImplicit):
        parts = GramMatrix(model, loader, metric=F, per_layer=True, representation=representation)
        assert oracle.relative(sum(p.to_torch() for p in parts.values()), whole.to_torch()) < TOLERANCE
    with pytest.raises(ValueError, match="couples layers"):
        GramMatrix(model, loader, metric=FIM(model, loader, PMatDense, variant="regression"), per_layer=True)


@pytest.mark.parametrize("name", ["mlp", "convnet", "embedding", "attention", "tied"])
def test_tiles_do_not_change_a_number(name):
    model, batch, loader, function = case(name)
    F = FIM(model, loader, PMatKFAC, variant="regression", function=function)
    for options in ({}, {"metric": F}, {"output": "trace"}, {"loader2": batch}):
        whole = GramMatrix(model, loader, function=function, **options).to_torch()
        biggest = sum(t.numel() for t in (whole,)) * 8
        with memory_budget(max(biggest, 4000)):
            again = GramMatrix(model, loader, function=function, **options).to_torch()
        assert oracle.relative(again, whole) < 1e-12


@pytest.mark.parametrize("output", ["full", "diag", "trace"])
def test_symmetric_tiles_in_panels(monkeypatch, output):
    model, batch, _, _ = case("convnet")
    F = FIM(model, batch, PMatKFAC, variant="regression")
    for metric in (None, F):
        whole = GramMatrix(model, [batch], metric=metric, output=output, representation=FMatDense).to_torch()
        with monkeypatch.context() as patch:
            patch.setattr("nngeometry.object.kernel._PANELS", 3)
            patch.setattr("nngeometry.object.kernel._ROWS", 2)
            K = GramMatrix(model, [batch], metric=metric, output=output)
        assert oracle.relative(K.to_torch(), whole) < 1e-12
        assert torch.equal(K.root.data, K.root.data.mT)


def test_identities_of_fisher_and_kernel():
    model, _batch, loader, _ = case("convnet")
    K = GramMatrix(model, loader)
    F = FIM(model, loader, PMatDense, variant="regression")
    assert oracle.relative(K.trace(), 7 * F.trace()) < TOLERANCE
    k = min(K.eigenvalues().numel(), F.size(0))
    assert oracle.relative(K.eigenvalues()[:k] / 7, F.eigenvalues()[:k]) < TOLERANCE
    # Woodbury: (F + r)^-1 = (1 - J^T (J J^T + n r)^-1 J) / r, and both ways
    r = 0.05
    J = Jacobian(model, loader)
    v = random_pvector(J.layer_collection, dtype=torch.float64)
    through_kernel = (v - J.T @ K.solve(J @ v, 7 * r)) / r
    assert oracle.relative(through_kernel.to_torch(), F.solve(v, r).to_torch()) < 1e-9
    predictive = GramMatrix(model, loader, metric=F.inv(r))
    expected = 7 * (K @ K.inv(7 * r)).to_torch()
    assert oracle.relative(predictive.to_torch(), expected) < 1e-9
    low = FIM(model, loader, PMatLowRank, variant="regression")
    assert oracle.relative(GramMatrix(model, loader, metric=low.inv(r)).to_torch(), expected) < 1e-9


def test_algebra_of_kernels():
    model, _batch, loader, _ = case("mlp")
    K = GramMatrix(model, loader) + 0.3 * GramMatrix(model, loader)
    data = K.root.data[0]
    r = 0.1
    shifted = data + r * torch.eye(len(data))
    assert oracle.relative(K.logdet(r), torch.logdet(shifted)) < TOLERANCE
    assert oracle.relative(K.inv(r).root.data[0], torch.linalg.inv(shifted)) < 1e-9
    assert oracle.relative(K.norm(), data.norm()) < TOLERANCE
    assert oracle.relative(K.norm(2), torch.linalg.matrix_norm(data, 2)) < TOLERANCE
    assert oracle.relative(K.norm("nuc"), torch.linalg.matrix_norm(data, "nuc")) < TOLERANCE
    assert oracle.relative((K @ K).root.data[0], data @ data) < TOLERANCE
    l = torch.linalg.eigvalsh(data)
    p = l / l.sum()
    assert oracle.relative(K.effective_rank(), torch.exp(-(p.clamp(min=0).xlogy(p.clamp(min=1e-300))).sum())) < 1e-6
    assert oracle.relative((K + 1e-2 * K).condition() / K.condition(), torch.ones(())) < 1e-2
    sub = K.submatrix([4, 1], slice(0, 3))
    assert torch.equal(sub.to_torch(), K.to_torch()[:, [4, 1]][..., :3])
    assert oracle.relative((2 * K - K / 2 - (-K)).to_torch(), 2.5 * K.to_torch()) < TOLERANCE
    solved = K.solve(K.submatrix(slice(None), [0, 2]), r)
    expected = torch.linalg.solve(shifted, K.submatrix(slice(None), [0, 2]).root.data[0])
    assert oracle.relative(solved.root.data[0], expected) < 1e-9
    u = FVector(torch.randn(3, 7, dtype=torch.float64))
    lam = 1e-2 * float(K.trace()) / 21
    assert oracle.relative(K.solve(u, Relative(1e-2)).to_torch(), K.solve(u, lam).to_torch()) < TOLERANCE
    assert K.to(dtype=torch.float32).dtype == torch.float32
    with pytest.raises(ValueError, match="other outputs or examples"):
        K + K.submatrix([0, 1])
    with pytest.raises(ValueError, match="outputs and examples"):
        K @ FVector(torch.zeros(3, 6, dtype=torch.float64))


def test_alignment():
    model, _batch, loader, _ = case("mlp")
    classes = torch.tensor([0, 1, 2, 1, 0, 2, 1])
    Y = torch.nn.functional.one_hot(classes).double().T
    K, T = GramMatrix(model, loader), GramMatrix(model, loader, output="trace")
    full, traced = K.root.data[0], T.to_torch()

    def cos(a, b):
        return (a * b).sum() / (a.norm() * b.norm())

    y = Y.T.reshape(-1)
    assert oracle.relative(K.align(classes), cos(full, torch.outer(y, y))) < TOLERANCE
    assert oracle.relative(T.align(classes), cos(traced, Y.T @ Y)) < TOLERANCE
    D = GramMatrix(model, loader, output="diag")
    blocks = torch.stack([torch.outer(a, a) for a in Y])
    assert oracle.relative(D.align(FVector(Y)), cos(D.to_torch(), blocks)) < TOLERANCE
    H = torch.eye(7) - 1 / 7
    assert oracle.relative(T.cka(classes), cos(H @ traced @ H, H @ Y.T @ Y @ H)) < TOLERANCE
    assert oracle.relative(T.cka(T), torch.ones((), dtype=torch.float64)) < TOLERANCE
    assert float(K.distance(K)) < 1e-12
    other = GramMatrix(oracle.randomise(case("mlp")[0], seed=5), loader)
    assert oracle.relative(K.distance(other), 1 - cos(full, other.root.data[0])) < TOLERANCE


def test_regression_and_gaussian_process():
    model, batch, loader, _ = case("mlp")
    _, queries, _ = CASES["mlp"].make(4)
    torch.manual_seed(3)
    queries = (torch.randn(4, 3, dtype=torch.float64),)
    J, Q = oracle.jacobian(model, batch), oracle.jacobian(model, queries)
    flat = lambda A: A.transpose(0, 1).reshape(-1, A.shape[-1])  # noqa: E731
    X, Z = flat(J), flat(Q)
    y = torch.randn(3, 7, dtype=torch.float64)
    K = GramMatrix(model, loader)
    cross, prior = GramMatrix(model, queries, loader), GramMatrix(model, queries)
    r = 0.2
    A = X @ X.T + r * torch.eye(21, dtype=torch.float64)
    mean = (Z @ X.T @ torch.linalg.solve(A, y.T.reshape(-1))).view(4, 3).T
    assert oracle.relative(K.regress(FVector(y), cross, regul=r).to_torch(), mean) < 1e-9
    found, cov = K.gp_posterior(FVector(y), cross, prior, r)
    expected = Z @ Z.T - Z @ X.T @ torch.linalg.solve(A, X @ Z.T)
    assert oracle.relative(found.to_torch(), mean) < 1e-9
    assert oracle.relative(cov.root.data[0], expected) < 1e-9
    # gradient flow of the linearised model, by small steps
    f0, g0 = model(batch[0]).T.detach(), model(queries[0]).T.detach()
    w = torch.zeros(X.shape[1], dtype=torch.float64)
    rhs = (y - f0).T.reshape(-1)
    time = 0.3
    H = X.T @ X
    l, U = torch.linalg.eigh(H)
    w = U @ (torch.where(l > 1e-12, (1 - torch.exp(-l * time)) / l.clamp(min=1e-300), time) * (U.T @ (X.T @ rhs)))
    at = g0 + (Z @ w).view(4, 3).T
    got = K.regress(FVector(y), cross, start=FVector(f0), cross_start=FVector(g0), time=time)
    assert oracle.relative(got.to_torch(), at) < 1e-8
    with pytest.raises(ValueError, match="start= and cross_start="):
        K.regress(FVector(y), cross, start=FVector(f0))


@pytest.mark.parametrize("representation", MAPS)
def test_algebra_of_maps(representation):
    model, batch, loader, _ = case("convnet")
    J = Jacobian(model, loader, representation=representation)
    truth = oracle.jacobian(model, batch)
    lc = J.layer_collection
    v = random_pvector(lc, dtype=torch.float64)
    assert oracle.relative((2 * J - J / 4 + J).to_dense().to_torch(), 2.75 * truth) < TOLERANCE
    assert oracle.relative((-J).to_dense().to_torch(), -truth) < TOLERANCE
    assert oracle.relative(J[2:5].to_dense().to_torch(), truth[:, 2:5]) < TOLERANCE
    assert oracle.relative(J[[5, 0]].to_dense().to_torch(), truth[:, [5, 0]]) < TOLERANCE
    assert oracle.relative(J[-1].to_dense().to_torch(), truth[:, -1:]) < TOLERANCE
    for name, s in lc.slices().items():
        assert oracle.relative(J.layer(name).to_dense().to_torch(), truth[..., s]) < TOLERANCE
    assert oracle.relative(J.centred().to_dense().to_torch(), truth - truth.mean(1, keepdim=True)) < TOLERANCE
    centred = Jacobian(model, loader, representation=representation, centering=True)
    assert oracle.relative((centred @ v).to_torch(), (truth - truth.mean(1, keepdim=True)) @ v.to_torch()) < TOLERANCE
    F = FIM(model, loader, PMatKFAC)
    M = F.to_torch()
    assert oracle.relative((J @ F).to_dense().to_torch(), truth @ M) < TOLERANCE
    assert oracle.relative((F @ J).to_dense().to_torch(), truth @ M) < TOLERANCE
    assert oracle.relative((J @ J.T).to_torch(), kernel(truth)) < TOLERANCE
    assert oracle.relative((J @ J[1:3].T).to_torch(), kernel(truth, truth[:, 1:3])) < TOLERANCE
    assert J.T.T is J
    single = J.to(dtype=torch.float32)
    assert single.dtype == torch.float32
    assert oracle.relative((single @ v.to(dtype=torch.float32)).to_torch().double(), truth @ v.to_torch()) < 1e-5
    other = Jacobian(model, loader)
    assert oracle.relative((J + other).to_dense().to_torch(), 2 * truth) < TOLERANCE
    assert oracle.relative((other - J / 2).to_dense().to_torch(), truth / 2) < TOLERANCE
    with pytest.raises(ValueError, match="outputs and examples"):
        J.T @ FVector(torch.zeros(2, 2, dtype=torch.float64))


def test_function_vectors():
    u = FVector(torch.arange(6.0).view(2, 3))
    assert torch.equal((2 * u - u / 2 + u).to_torch(), 2.5 * u.to_torch())
    assert u.dot(u) == 55 == u @ u
    assert u.norm() == 55**0.5
    assert u.norm(1) == 15
    with pytest.raises(ValueError, match="outputs and examples"):
        u + FVector(torch.zeros(2, 2))
    lc = LayerCollection.from_model(nn.Linear(2, 1))
    with pytest.raises(TypeError, match="function space"):
        u + PVector(lc, torch.zeros(3))


def test_a_shuffling_loader_is_read_once():
    model, batch, _, _ = case("mlp")
    data = torch.utils.data.TensorDataset(*batch)
    loader = torch.utils.data.DataLoader(data, batch_size=3, shuffle=True)
    K = GramMatrix(model, loader)
    expected = GramMatrix(model, batch)
    assert torch.equal(K.root.data, K.root.data.mT)
    assert oracle.relative(K.eigenvalues(), expected.eigenvalues()) < TOLERANCE
    once = iter([batch])
    assert oracle.relative(GramMatrix(model, once).to_torch(), expected.to_torch()) < TOLERANCE


def test_disk_resumes_and_refuses_another_kernel(tmp_path, monkeypatch):
    model, _batch, loader, _ = case("convnet")
    expected = GramMatrix(model, loader).to_torch().cpu()
    at = FMatMemmap.at(tmp_path / "k")
    from nngeometry.object import kernel as module

    calls = []
    real = module.tile

    def stops(*args):
        if len(calls) == 4:
            raise KeyboardInterrupt
        calls.append(1)
        return real(*args)

    monkeypatch.setattr(module, "tile", stops)
    with pytest.raises(KeyboardInterrupt):
        GramMatrix(model, loader, representation=at)
    calls.clear()
    monkeypatch.setattr(module, "tile", lambda *a: (calls.append(1), real(*a))[1])
    K = GramMatrix(model, loader, representation=at)
    assert len(calls) == 2  # of six
    assert oracle.relative(K.to_torch(), expected) < TOLERANCE
    calls.clear()
    GramMatrix(model, loader, representation=at)
    assert not calls
    oracle.randomise(model, seed=9)
    with pytest.raises(ValueError, match="of another model, data"):
        GramMatrix(model, loader, representation=at)
    assert json.loads((tmp_path / "k" / "tiles.json").read_text().splitlines()[1]) == [0, 3, 0, 3]


def test_errors_say_what_to_do():
    model, batch, loader, _ = case("mlp")
    with pytest.raises(ValueError, match="output='all' is not one of"):
        GramMatrix(model, loader, output="all")
    with memory_budget(1000), pytest.raises(MemoryError, match="FMatMemmap"):
        GramMatrix(model, loader)
    with memory_budget(1000), pytest.raises(MemoryError, match="PFMapFactored"):
        Jacobian(model, loader)
    train = nn.Sequential(nn.Linear(3, 2), nn.BatchNorm1d(2)).double().train()
    for make in (GramMatrix, partial(Jacobian, representation=PFMapImplicit)):
        with pytest.raises(ValueError, match="statistics of the batch"):
            make(train, batch)
    wide = nn.Linear(2, 3).double()
    two = [(torch.randn(2, 2, dtype=torch.float64),)]
    first = lambda x: wide(x)[:, : 3 if len(x) == 2 else 2]  # noqa: E731
    assert first(two[0][0]).shape == (2, 3)
    lc = LayerCollection.from_model(nn.Linear(2, 3))
    with pytest.raises(ValueError, match="another layer collection"):
        GramMatrix(model, loader, metric=PMatEye(lc, dtype=torch.float64))
    with pytest.raises(ValueError, match=r"move it with .to"):
        GramMatrix(model, loader, metric=PMatEye(LayerCollection.from_model(model), dtype=torch.float32))


@pytest.mark.parametrize("representation", [FMatDense, FMatImplicit])
def test_float32_and_the_users_objects(representation):
    model, _batch, loader, _ = case("convnet")
    model = model.float()
    loader = [tuple(t.float() for t in b) for b in loader]
    before = {k: v.clone() for k, v in model.state_dict().items()}
    state = torch.get_rng_state()
    K = GramMatrix(model, loader, representation=representation)
    K @ FVector(torch.ones(K.size()[:2], dtype=torch.float32))
    assert K.dtype == torch.float32
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    assert all(p.grad is None and p.requires_grad for p in model.parameters())
    assert not any(m._forward_hooks for m in model.modules())


@pytest.mark.parametrize("bias", [True, False])
def test_maps_do_not_change_with_the_minibatch(bias):
    model = nn.Sequential(nn.Linear(3, 4, bias=bias), nn.Tanh(), nn.Linear(4, 2))
    x = torch.randn(5, 3)
    J = Jacobian(model, [(x,)], representation=PFMapFactored)
    before = J.to_torch()
    x.mul_(2)
    torch.testing.assert_close(J.to_torch(), before)
