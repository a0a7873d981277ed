"""Algorithms on products against dense linear algebra: one contract for all solvers, eigenpairs, and estimates."""

import math

import pytest
import torch

from nngeometry.linalg import (
    cg,
    eigsh,
    funm,
    hutchinson,
    hutchinson_diag,
    hutchpp,
    lsmr,
    minres,
    nystrom,
    randomised_eigh,
    slq,
    xdiag,
    xnystrace,
    xtrace,
)

LIKE = torch.empty(0, dtype=torch.float64)


def symmetric(spectrum, seed=0):
    """A dense matrix with these eigenvalues."""
    g = torch.Generator().manual_seed(seed)
    q, _ = torch.linalg.qr(torch.randn(len(spectrum), len(spectrum), generator=g, dtype=torch.float64))
    return (q * spectrum) @ q.T


SPECTRA = {
    "decaying": 0.9 ** torch.arange(60.0).double(),
    "repeated": torch.tensor([5.0] * 3 + [4.0] * 2 + [1.0] * 55).double(),
    "low-rank": torch.cat([torch.arange(1.0, 8.0), torch.zeros(53)]).double(),
    "indefinite": torch.linspace(-3, 5, 60).double(),
    "zero": torch.zeros(60).double(),
}


@pytest.mark.parametrize("which", ["largest", "smallest", "both", "magnitude"])
@pytest.mark.parametrize("name", SPECTRA)
@pytest.mark.parametrize("k", [1, 6, 60])
def test_eigenpairs(name, which, k):
    A = symmetric(SPECTRA[name])
    exact = torch.linalg.eigvalsh(A)
    found = eigsh(lambda v: v @ A, 60, k, which=which, like=LIKE)
    expected = {
        "largest": exact.flip(0)[:k],
        "smallest": exact[:k],
        "both": exact.flip(0) if 2 * k >= 60 else torch.cat([exact.flip(0)[:k], exact.flip(0)[-k:]]),
        "magnitude": exact[exact.abs().argsort(descending=True)][:k],
    }[which]
    values = found.values.abs() if which == "magnitude" else found.values
    torch.testing.assert_close(values, expected.abs() if which == "magnitude" else expected, atol=1e-10, rtol=1e-10)
    V = found.vectors
    torch.testing.assert_close(V @ V.T, torch.eye(len(V)), atol=1e-9, rtol=0)
    assert float((V @ A - found.values.unsqueeze(1) * V).norm(dim=1).max()) < 1e-8


def test_no_ghosts_in_a_large_matrix():
    """Top ten of a matrix of a thousand, some repeated, by far fewer products than its size: no copies, none missed."""
    spectrum = torch.cat([torch.tensor([9.0, 9.0, 7.0, 6.0, 6.0, 6.0, 5.0, 4.5, 4.0, 3.5]), torch.rand(990)]).double()
    A = symmetric(spectrum)
    found = eigsh(lambda v: v @ A, 1000, 10, like=LIKE)
    torch.testing.assert_close(found.values, spectrum[:10], atol=1e-10, rtol=1e-10)
    assert found.products < 1000


@pytest.mark.parametrize("solver", [cg, minres])
@pytest.mark.parametrize("rows", [1, 3])
def test_solvers(solver, rows):
    A = symmetric(torch.logspace(-2, 1, 60).double())
    b = torch.randn(rows, 60)
    found = solver(lambda v: v @ A, b, rtol=1e-10)
    torch.testing.assert_close(found.x, torch.linalg.solve(A, b.T).T, atol=1e-7, rtol=1e-7)
    true = (b - found.x @ A).norm(dim=1) / b.norm(dim=1)
    torch.testing.assert_close(found.residuals, true, atol=1e-12, rtol=1e-3)
    assert float(true.max()) <= 1e-10
    zero = solver(lambda v: v @ A, 0 * b)
    assert not bool(zero.x.any())
    with pytest.raises(RuntimeError):
        solver(lambda v: v @ A, b, rtol=1e-10, max_products=5)


def test_indefinite_systems():
    A = symmetric(SPECTRA["indefinite"])
    b = torch.randn(2, 60)
    torch.testing.assert_close(
        minres(lambda v: v @ A, b, rtol=1e-10).x, torch.linalg.solve(A, b.T).T, atol=1e-7, rtol=1e-6
    )
    with pytest.raises(RuntimeError, match="not positive definite"):
        cg(lambda v: v @ A, b)


def test_a_perfect_preconditioner_takes_a_step_or_two():
    A = symmetric(torch.logspace(-4, 1, 60).double())
    inverse = torch.linalg.inv(A)
    found = cg(lambda v: v @ A, torch.randn(1, 60), preconditioner=lambda v: v @ inverse)
    assert found.products <= 4


def test_least_squares():
    A = torch.randn(40, 15)
    b = torch.randn(1, 40)
    found = lsmr(lambda v: v @ A.T, lambda u: u @ A, b, rtol=1e-10)
    torch.testing.assert_close(found.x[0], torch.linalg.lstsq(A, b.T).solution[:, 0], atol=1e-7, rtol=1e-6)


@pytest.mark.parametrize("f", [torch.sqrt, torch.exp, lambda l: l**-0.5])
def test_functions_of_a_matrix(f):
    A = symmetric(torch.linspace(0.5, 5, 60).double())
    b = torch.randn(2, 60)
    l, q = torch.linalg.eigh(A)
    torch.testing.assert_close(funm(lambda v: v @ A, b, f), b @ (q * f(l)) @ q.T, atol=1e-8, rtol=1e-8)


@pytest.mark.parametrize("sketch", [nystrom, randomised_eigh])
def test_sketches_of_low_rank_matrices_are_exact(sketch):
    A = symmetric(SPECTRA["low-rank"])
    found = sketch(lambda v: v @ A, 60, 10, like=LIKE)
    V = found.vectors
    torch.testing.assert_close(V.T @ torch.diag(found.values) @ V, A, atol=1e-7, rtol=0)


TRACES = {"hutchinson": hutchinson, "hutchpp": hutchpp, "xtrace": xtrace, "xnystrace": xnystrace}


@pytest.mark.parametrize("name", TRACES)
def test_traces_are_within_their_errors(name):
    """Of 200 seeds, about 95 % within 1.96 standard errors."""
    A = symmetric(1 / torch.arange(1.0, 81.0).double())
    inside, seeds = 0, 200
    for seed in range(seeds):
        found = TRACES[name](lambda v: v @ A, 80, products=24, generator=torch.Generator().manual_seed(seed), like=LIKE)
        inside += bool((found.value - A.trace()).abs() <= 1.96 * found.error)
    assert 0.87 < inside / seeds <= 1.0


def test_xtrace_beats_hutchinson():
    A = symmetric(0.8 ** torch.arange(100.0).double())

    def error(estimator):
        found = [
            estimator(lambda v: v @ A, 100, products=30, generator=torch.Generator().manual_seed(s), like=LIKE).value
            for s in range(30)
        ]
        return float((torch.stack(found) - A.trace()).square().mean().sqrt())

    assert error(xtrace) < 0.3 * error(hutchinson)


@pytest.mark.parametrize("estimator", [hutchinson_diag, xdiag])
def test_diagonals(estimator):
    A = symmetric(0.8 ** torch.arange(60.0).double())
    found = estimator(lambda v: v @ A, 60, products=50, generator=torch.Generator().manual_seed(0), like=LIKE)
    assert float((found.value - A.diagonal()).norm()) < 4 * float(found.error.norm()) + 1e-9


def test_quadrature():
    spectrum = torch.linspace(0.1, 3, 120).double()
    A = symmetric(spectrum)
    q = slq(lambda v: v @ A, 120, steps=40, probes=20, generator=torch.Generator().manual_seed(0), like=LIKE)
    for f in (torch.log, torch.sqrt, torch.exp):
        estimate = q.trace_of(f)
        assert abs(float(estimate.value - f(spectrum).sum())) < 4 * float(estimate.error)
        assert float(estimate.error) < 0.1 * abs(float(estimate.value)) + 10
    logdet = q.logdet(0.0)
    assert abs(float(logdet.value) - math.log(1) - float(spectrum.log().sum())) < 4 * float(logdet.error)
