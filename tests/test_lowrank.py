"""Low-rank matrices from sketches of other matrices: against the dense matrix, and as preconditioners."""

import oracle
import pytest
import torch
from sklearn.datasets import load_digits
from torch import nn
from torch.nn.functional import cross_entropy

from nngeometry import (
    FIM,
    GGN,
    Hessian,
    LayerCollection,
    PMatDense,
    PMatImplicit,
    PMatKFAC,
    PMatLowRank,
    PVector,
)
from nngeometry.linalg import cg, nystrom_preconditioner


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def problem():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 10), nn.Tanh(), nn.Linear(10, 4))
    return model, torch.randn(30, 6), torch.randint(4, (30,))


def matrix(name):
    model, x, y = problem()
    made = {
        "fim-dense": lambda: FIM(model, (x,), PMatDense),
        "fim-kfac": lambda: FIM(model, (x,), PMatKFAC),
        "fim-lowrank": lambda: FIM(model, (x,), PMatLowRank),
        "ggn-implicit": lambda: GGN(model, (x, y), PMatImplicit),
        "hessian-dense": lambda: Hessian(model, (x, y), PMatDense),
        "hessian-implicit": lambda: Hessian(model, (x, y), PMatImplicit),
    }
    return made[name]()


SEMIDEFINITE = ["fim-dense", "fim-kfac", "fim-lowrank", "ggn-implicit"]
INDEFINITE = ["hessian-dense", "hessian-implicit"]


def by_magnitude(dense):
    l = torch.linalg.eigvalsh(dense)
    return l[l.abs().argsort(descending=True)]


def check_algebra(near):
    """The usual one, with its own dense form as the truth."""
    M, p = near.to_torch(), near.size(0)
    v = PVector(near.layer_collection, torch.randn(p, generator=seeded(1)))
    torch.testing.assert_close(near.mv(v).to_torch(), M @ v.to_torch())
    torch.testing.assert_close(near.get_diag(), M.diagonal())
    torch.testing.assert_close(near.trace(), M.trace())
    torch.testing.assert_close(near.norm(), M.norm())
    r = 2 * float(torch.linalg.matrix_norm(M, 2))
    expected = torch.linalg.solve(M + r * torch.eye(p), v.to_torch())
    torch.testing.assert_close(near.solve(v, r).to_torch(), expected)
    assert type(2 * near) is type(near + near) is PMatLowRank


@pytest.mark.parametrize("rank", [1, 10, 40])
@pytest.mark.parametrize("name", SEMIDEFINITE)
def test_nystrom(name, rank):
    F = matrix(name)
    near = PMatLowRank.nystrom(F, rank, generator=seeded())
    assert type(near) is PMatLowRank
    assert near.layer_collection is F.layer_collection
    M, l = F.to_torch(), by_magnitude(F.to_torch())
    rest = M - near.to_torch()
    assert float(rest.trace()) <= (2 + rank / 9) * float(l[rank:].sum())  # the bound in the source
    assert float(torch.linalg.eigvalsh(rest).min()) > -1e-10 * float(l[0])
    assert len(near.eig()[0]) == rank
    check_algebra(near)


@pytest.mark.parametrize("rank", [1, 10, 40])
@pytest.mark.parametrize("name", SEMIDEFINITE + INDEFINITE)
def test_randomised(name, rank):
    F = matrix(name)
    near = PMatLowRank.randomised(F, rank, iterations=4, generator=seeded())
    assert type(near) is PMatLowRank
    M, l = F.to_torch(), by_magnitude(F.to_torch())
    assert float((M - near.to_torch()).norm()) <= 1.5 * float(l[rank:].norm())
    leading = by_magnitude(near.to_torch())[: rank // 2]
    torch.testing.assert_close(leading.abs(), l[: rank // 2].abs(), rtol=0.1, atol=0)
    check_algebra(near)


def test_a_sketch_of_full_rank_is_the_matrix():
    for name, make in (("fim-kfac", PMatLowRank.nystrom), ("hessian-implicit", PMatLowRank.randomised)):
        F = matrix(name)
        assert oracle.relative(make(F, F.size(0)).to_torch(), F.to_torch()) < 1e-7


def test_iterations_and_oversampling_bring_it_nearer():
    F = matrix("fim-kfac")
    rough = {"oversampling": 0, "iterations": 0}
    for make in (PMatLowRank.nystrom, PMatLowRank.randomised):
        far, more, again = (
            sum(oracle.relative(make(F, 8, generator=seeded(s), **o).to_torch(), F.to_torch()) for s in range(5))
            for o in (rough, {**rough, "oversampling": 10}, {**rough, "iterations": 2})
        )
        assert more < far
        assert again < far


def test_what_is_not_semidefinite_or_not_symmetric_is_refused():
    with pytest.raises(ValueError, match="not positive semidefinite"):
        PMatLowRank.nystrom(matrix("hessian-dense"), 10)
    F = matrix("fim-dense")
    with pytest.raises(ValueError, match="not symmetric"):
        PMatLowRank.randomised(F @ matrix("fim-kfac"), 10)


def test_a_sketch_can_be_saved(tmp_path):
    near = PMatLowRank.nystrom(matrix("ggn-implicit"), 5, generator=seeded())
    near.save(tmp_path / "near.pt")
    assert torch.equal(PMatLowRank.load(tmp_path / "near.pt").to_torch(), near.to_torch())


# As a preconditioner


@pytest.mark.parametrize("regul", [1e-1, 1e-3])
def test_a_preconditioned_solve_is_the_dense_one(regul):
    G = matrix("ggn-implicit")
    near = PMatLowRank.nystrom(G, 40, generator=seeded())
    b = PVector(G.layer_collection, torch.randn(G.size(0), generator=seeded(1)))
    x = G.solve(b, regul, rtol=1e-10, preconditioner=near)
    expected = torch.linalg.solve(G.to_torch() + regul * torch.eye(G.size(0)), b.to_torch())
    torch.testing.assert_close(x.to_torch(), expected, rtol=1e-7, atol=1e-9)


def test_outside_of_the_span_a_solve_divides_by_regul():
    near = PMatLowRank.nystrom(matrix("ggn-implicit"), 10, generator=seeded())
    vectors = torch.stack([v.to_torch() for v in near.eig()[1]])
    v = torch.randn(near.size(0), generator=seeded(1))
    v = v - (v @ vectors.T) @ vectors
    b = PVector(near.layer_collection, v)
    torch.testing.assert_close(near.solve(b, 1e-2).to_torch(), 100 * v)


def products(G, regul, precondition=None):
    """How many products a solve takes, from the right-hand side of a fixed random vector."""
    b = torch.randn(1, G.size(0), generator=seeded(1))
    M = G.to_torch()
    return cg(lambda v: v @ M + regul * v, b, rtol=1e-6, preconditioner=precondition).products


def inverse(F, regul):
    inv = F.inv(regul)
    return lambda rows: torch.stack([inv.mv(PVector(F.layer_collection, row)).to_torch() for row in rows])


@pytest.mark.parametrize("regul", [1e-2, 1e-3])
def test_it_takes_no_more_products_than_with_the_smallest_eigenvalue_outside(regul):
    F = matrix("fim-dense")
    near = PMatLowRank.nystrom(F, 30, generator=seeded())
    l, vectors = near.eig()
    other = nystrom_preconditioner(l, torch.stack([v.to_torch() for v in vectors]), regul)
    held, plain = products(F, regul, inverse(near, regul)), products(F, regul)
    assert held <= products(F, regul, other) + 1
    assert held < 0.5 * plain


def digits(steps):
    """A small classifier after some steps of training, and images."""
    data = load_digits()
    x, y = torch.tensor(data.data[:300]) / 16, torch.tensor(data.target[:300])
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 16), nn.ReLU(), nn.Linear(16, 10))
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    for _ in range(steps):
        optimizer.zero_grad()
        cross_entropy(model(x), y).backward()
        optimizer.step()
    return model, (x, y)


@pytest.mark.parametrize("regul", [1e-2, 1e-3])
@pytest.mark.parametrize("layer", ["0", "2"])
@pytest.mark.parametrize("steps", [0, 20])
def test_kfac_takes_fewer_products_on_a_layer_of_a_classifier_of_digits(steps, layer, regul):
    """Of a layer: it leaves out what couples several of them, which undoes the gain unless regul is small."""
    model, batch = digits(steps)
    lc = LayerCollection.from_model(model, layer)
    G = GGN(model, batch, PMatDense, layer_collection=lc)
    kfac = inverse(GGN(model, batch, PMatKFAC, layer_collection=lc), regul)
    assert products(G, regul, kfac) < 0.6 * products(G, regul)


@pytest.mark.parametrize("steps", [0, 20])
def test_kfac_takes_fewer_products_on_a_classifier_of_digits_where_regul_is_small(steps):
    if oracle.HERE != "cpu":
        pytest.skip("how many depends on the last digits of the trained parameters")
    model, batch = digits(steps)
    G, regul = GGN(model, batch, PMatDense), 1e-5
    kfac = inverse(GGN(model, batch, PMatKFAC), regul)
    assert products(G, regul, kfac) < 0.95 * products(G, regul)


@pytest.mark.parametrize("regul", [1e-2, 1e-3])
@pytest.mark.parametrize("steps", [0, 20])
def test_a_sketch_takes_fewer_products_on_a_classifier_of_digits(steps, regul):
    model, batch = digits(steps)
    G = GGN(model, batch, PMatDense)
    near = PMatLowRank.nystrom(G, 50, generator=seeded())
    assert products(G, regul, inverse(near, regul)) < 0.5 * products(G, regul)
