"""Algorithms of a matvec against dense linear algebra, and estimates against the errors that they state."""

import pytest
import torch
from laws import SOLVERS, least_squares

from nngeometry import memory, memory_budget
from nngeometry.linalg import (
    base,
    cg,
    eigsh,
    funm,
    gaussian,
    hutchinson,
    hutchinson_diag,
    hutchpp,
    lanczos,
    lsmr,
    minres,
    neumann,
    nystrom,
    nystrom_preconditioner,
    rademacher,
    randomised_eigh,
    slq,
    sphere,
    xdiag,
    xnystrace,
    xtrace,
)
from nngeometry.linalg.base import orthonormal_rows, widening
from nngeometry.linalg.lanczos import tridiagonals

DTYPES = [torch.float32, torch.float64]


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def rotation(n, seed=0):
    return torch.linalg.qr(torch.randn(n, n, generator=seeded(seed)))[0]


def matrix(values, seed=0):
    Q = rotation(len(values), seed)
    return (Q * values) @ Q.T


class Product:
    """A product that counts the vectors it was given."""

    def __init__(self, A):
        self.A, self.vectors, self.calls = A, 0, 0

    def __call__(self, v):
        assert v.ndim == 2
        assert len(v)
        self.vectors += len(v)
        self.calls += 1
        return v @ self.A.mT


def norm(x):
    return torch.linalg.vector_norm(x, dim=-1)


# Eigenpairs

N = 300
SPECTRA = {
    "outliers": lambda u: torch.cat([5 * torch.arange(1.0, 9.0), u[8:]]),
    "indefinite": lambda u: torch.cat([2 * u[: N // 2], -u[N // 2 :]]),
    "decay": lambda u: 0.8 ** torch.arange(N),
    "repeated": lambda u: torch.tensor([5.0] * 4 + [4.0] * 3 + [-5.0] * 2 + [-6.0] * 5 + [0.0] * (N - 14)),
    "repeated in a bulk": lambda u: torch.cat([torch.full((7,), 2.0), torch.full((7,), -2.0), u[14:]]),
    "rank-deficient": lambda u: torch.cat([u[:20] + 0.1, torch.zeros(N - 20)]),
    "two values": lambda u: torch.where(u > 0.5, 1.0, 3.0),
    "identity": lambda u: torch.ones(N),
    "zero": lambda u: torch.zeros(N),
}
WHICH = ["largest", "smallest", "both", "magnitude"]


def wanted(values, k, which):
    down = values.sort(descending=True).values
    if which == "largest":
        return down[:k]
    if which == "smallest":
        return down.flip(0)[:k]
    if which == "both":
        return torch.cat([down[:k], down[-k:]]) if 2 * k < len(down) else down
    return values[values.abs().argsort(descending=True)][:k]


def check_pairs(pairs, A, values, which, k, tolerance):
    expected = wanted(values, k, which)
    compared = (pairs.values.abs(), expected.abs()) if which == "magnitude" else (pairs.values, expected)
    assert pairs.values.shape == expected.shape
    scale = max(float(values.abs().max()), 1e-300)
    assert float((compared[0] - compared[1]).abs().max()) <= tolerance * scale
    assert pairs.values.dtype == pairs.vectors.dtype == A.dtype
    eye = torch.eye(len(expected), dtype=A.dtype)
    assert float((pairs.vectors @ pairs.vectors.T - eye).abs().max()) < 100 * tolerance
    true = norm(pairs.vectors @ A - pairs.values[:, None] * pairs.vectors)
    assert float((true - pairs.residuals).abs().max()) <= tolerance * scale


@pytest.mark.parametrize("which", WHICH)
@pytest.mark.parametrize("spectrum", SPECTRA)
def test_eigenpairs(spectrum, which):
    values = SPECTRA[spectrum](torch.rand(N, generator=seeded()))
    product = Product(matrix(values))
    pairs = eigsh(product, N, 5, which=which, basis=60, like=values[:0])
    assert pairs.products == product.vectors
    check_pairs(pairs, product.A, values, which, 5, 1e-10)


@pytest.mark.parametrize("block", [1, 3])
@pytest.mark.parametrize("basis", [25, 40, 100])
@pytest.mark.parametrize("k", [1, 2, 6])
def test_eigenpairs_of_any_basis_and_block(k, basis, block):
    values = SPECTRA["outliers"](torch.rand(N, generator=seeded()))
    A = matrix(values)
    pairs = eigsh(lambda v: v @ A, N, k, basis=basis, block=block, like=A[:0])
    check_pairs(pairs, A, values, "largest", k, 1e-10)


def test_top_ten_of_a_thousand():
    u = torch.rand(1000, generator=seeded())
    A = matrix(torch.cat([torch.tensor([9.0, 9.0, 9.0, 8.0, 7.0, 7.0, 6.0, 5.0, 5.0, 5.0]), u[10:] * 4]))
    truth = torch.linalg.eigvalsh(A)
    pairs = eigsh(lambda v: v @ A, 1000, 10, like=A[:0])
    assert pairs.products < 1000
    check_pairs(pairs, A, truth, "largest", 10, 1e-12)


@pytest.mark.parametrize("entries", [1, 7, 8, 16, 19])
@pytest.mark.parametrize("tuning", [memory.CPU, memory.ACCELERATOR])
def test_sums_over_a_few_entries_at_a_time(tuning, entries, cut, monkeypatch):
    monkeypatch.setattr(base, "_PIECE", 8)
    cut(tuning)
    one, other = torch.randn(2, 3, entries), torch.randn(2, 4, entries)
    torch.testing.assert_close(base.inner(one, other), (one @ other.mT).cpu())
    torch.testing.assert_close(base.inner(one[0], other[1]), (one[0] @ other[1].mT).cpu())
    torch.testing.assert_close(base.norms(one), one.norm(dim=-1).cpu())
    left, weights = one.clone(), torch.randn(2, 3, 4)
    base.subtract(left, weights, other)
    torch.testing.assert_close(left, one - weights @ other)
    assert base.inner(one[0, :0], other[0]).shape == (0, 4)


@pytest.mark.parametrize("tuning", [memory.CPU, memory.ACCELERATOR])
def test_long_sums_in_single_precision(tuning, cut):
    cut(tuning)
    row = torch.full((1, 3 * 10**6), 0.1, dtype=torch.float32)
    exact = float(row[0, 0].double() ** 2) * row.shape[1]
    assert float(base.inner(row, row)) == pytest.approx(exact, rel=5e-5)
    assert float(base.norms(row)) == pytest.approx(exact**0.5, rel=5e-5)


def test_no_ghosts_at_200_steps():
    values = torch.cat([torch.logspace(0, 2, 12), torch.rand(988, generator=seeded())])
    A = matrix(values)
    space = lanczos(lambda v: v @ A, torch.randn(1, 1000, generator=seeded(1)), 200)
    assert space.basis.shape == (200, 1000)
    assert float((space.basis @ space.basis.T - torch.eye(200)).abs().max()) < 1e-13
    ritz = torch.linalg.eigvalsh(space.matrix).flip(0)
    torch.testing.assert_close(ritz[:10], values.sort(descending=True).values[:10].cpu(), rtol=1e-12, atol=0)
    assert float(((space.basis @ A @ space.basis.T).cpu() - space.matrix).abs().max()) < 1e-11
    band = space.matrix.tril(-2)
    assert float(band.abs().max()) < 1e-10


@pytest.mark.parametrize("rows", [1, 2, 5])
def test_block_lanczos_is_block_tridiagonal_and_closes(rows):
    values = torch.cat([torch.arange(1.0, 7.0), torch.zeros(94)])
    A = matrix(values)
    space = lanczos(lambda v: v @ A, torch.randn(rows, 100, generator=seeded(1)), 50)
    assert space.closed
    assert 6 + rows <= len(space.basis) <= 6 + 2 * rows
    assert float(space.matrix.tril(-2 * rows).abs().max()) < 1e-12
    ritz = torch.linalg.eigvalsh(space.matrix)
    torch.testing.assert_close(ritz[-6:], torch.arange(1.0, 7.0).cpu(), rtol=0, atol=1e-12)
    assert float(ritz[:-6].abs().max()) < 1e-12


@pytest.mark.parametrize("which", WHICH)
@pytest.mark.parametrize(("n", "k"), [(1, 1), (2, 1), (2, 2), (5, 3), (5, 5), (40, 40), (250, 250), (250, 249)])
def test_eigenpairs_of_small_matrices_and_all_of_them(n, k, which):
    values = torch.randn(n, generator=seeded())
    A = matrix(values)
    check_pairs(eigsh(lambda v: v @ A, n, k, which=which, like=A[:0]), A, values, which, k, 1e-10)


def test_eigenpairs_in_float32():
    values = SPECTRA["outliers"](torch.rand(N, generator=seeded()))
    A = matrix(values).float()
    pairs = eigsh(lambda v: v @ A, N, 5, basis=60, like=A[:0])
    check_pairs(pairs, A, values.float(), "largest", 5, 1e-5)


def test_few_products_and_multiplicities_as_an_option():
    values = torch.cat([torch.tensor([9.0, 9.0, 8.0]), torch.rand(N - 3, generator=seeded())])
    product = Product(matrix(values))
    full = eigsh(product, N, 3, basis=60, like=values[:0])
    short = eigsh(product, N, 2, basis=60, multiplicities=False, like=values[:0])
    assert short.products < full.products < 80
    check_pairs(full, product.A, values, "largest", 3, 1e-10)


def test_eigsh_says_what_is_wrong():
    A = matrix(torch.rand(N, generator=seeded()))
    with pytest.raises(ValueError, match="1 <= k <= 300, got 301"):
        eigsh(lambda v: v @ A, N, 301, like=A[:0])
    with pytest.raises(ValueError, match="got 'top'"):
        eigsh(lambda v: v @ A, N, 3, which="top", like=A[:0])
    with pytest.raises(ValueError, match="no tolerance below"):
        eigsh(lambda v: v @ A, N, 3, tol=1e-16, like=A[:0])
    with pytest.raises(RuntimeError, match="of 10 pairs converged in 100 products"):
        eigsh(lambda v: v @ A, N, 10, basis=40, max_products=100, like=A[:0])
    B = A + 0.1 * torch.randn(N, N, generator=seeded())
    for basis in (40, 300):
        with pytest.raises(ValueError, match="not symmetric"):
            eigsh(lambda v: v @ B, N, 3, basis=basis, like=A[:0])
        with pytest.raises(RuntimeError, match="not finite"):
            eigsh(lambda v: v * torch.nan, N, 3, basis=basis, like=A[:0])


@pytest.mark.parametrize("size", [1e3, 1e4])
def test_rounding_of_products_is_no_asymmetry(size):
    """Of a sum of terms that are much larger than it is, as in the Hessian of a net that is certain of its labels."""
    generator = seeded()
    A = matrix(torch.cat([torch.tensor([5.0, 3.0, 2.0]), torch.rand(N - 3, generator=generator)])).float()
    large = size * torch.randn(N, N, generator=generator).float()

    def product(v, more=1.0):
        return (v @ A + v @ (more * large)) - v @ (more * large)

    found = eigsh(product, N, 3, basis=40, tol=0.03, multiplicities=False, like=A[:0])
    torch.testing.assert_close(found.values.double(), torch.tensor([5.0, 3.0, 2.0]), rtol=0.02, atol=0)
    with pytest.raises(RuntimeError, match=r"rounding in torch.float32 leaves .* use float64"):
        eigsh(product, N, 3, basis=40, like=A[:0])
    with pytest.raises(RuntimeError, match=r"rounding in torch.float32"):
        funm(lambda v: product(v, 100.0), torch.randn(2, N, generator=generator).float(), torch.exp, tol=1e-6)


@pytest.mark.parametrize(("dtype", "off"), [(torch.float32, 3e-4), (torch.float64, 1e-8)])
@pytest.mark.parametrize("basis", [30, 200])
def test_slight_asymmetry_is_refused_where_the_matrix_is_built(dtype, off, basis):
    A = matrix(torch.linspace(0, 1, 120, dtype=torch.float64))
    K = torch.randn(120, 120, generator=seeded(1), dtype=torch.float64)
    K = K - K.T
    B = (A + off * K / torch.linalg.matrix_norm(K, 2)).to(dtype)
    with pytest.raises(ValueError, match="not symmetric"):
        eigsh(lambda v: v @ B, 120, 4, basis=basis, like=torch.empty(0, dtype=dtype))


def test_eigsh_leaves_the_global_generator_alone():
    A = matrix(torch.rand(N, generator=seeded()))
    state = torch.get_rng_state()
    first = eigsh(lambda v: v @ A, N, 3, basis=60, like=A[:0])
    again = eigsh(lambda v: v @ A, N, 3, basis=60, like=A[:0])
    assert torch.equal(state, torch.get_rng_state())
    assert torch.equal(first.vectors, again.vectors)


# Functions of a matrix

FUNCTIONS = {
    "inverse": torch.reciprocal,
    "inverse root": torch.rsqrt,
    "root": torch.sqrt,
    "log": torch.log,
    "exp": torch.exp,
}


@pytest.mark.parametrize("name", FUNCTIONS)
@pytest.mark.parametrize("condition", [1e1, 1e4])
def test_funm(name, condition):
    f = FUNCTIONS[name]
    values = torch.logspace(0, -float(torch.log10(torch.tensor(condition))), N)
    A, Q = matrix(values), rotation(N)
    b = torch.randn(4, N, generator=seeded(1))
    b[1], b[2] = 0.0, Q[:, 3]
    expected = b @ ((Q * f(values)) @ Q.T)
    for tol in (1e-3, None):
        result = funm(lambda v: v @ A, b, f, tol=tol)
        error = norm(result - expected) / norm(expected).clamp_min(1e-300)
        assert float(error.max()) < (tol or 1e-10)
    with memory_budget(2 * N * N * 8):
        torch.testing.assert_close(
            funm(lambda v: v @ A, b, f), expected, rtol=0, atol=1e-8 * float(expected.abs().max())
        )


def test_funm_stops_early_and_stays_in_the_dtype():
    product = Product(matrix(1 + torch.rand(1000, generator=seeded())).float())
    b = torch.randn(1, 1000, generator=seeded()).float()
    assert funm(product, b, torch.log).dtype == torch.float32
    assert product.calls < 20


def test_funm_says_what_is_wrong():
    A = matrix(torch.logspace(0, -6, N))
    b = torch.randn(2, N, generator=seeded())
    with pytest.raises(RuntimeError, match="after 15 steps"):
        funm(lambda v: v @ A, b, torch.rsqrt, steps=15)
    S = matrix(torch.cat([torch.ones(3), torch.zeros(N - 3)]))
    with pytest.raises(ValueError, match="not finite at a Ritz value"):
        funm(lambda v: v @ S, b, lambda l: torch.log(l.clamp_min(0)))
    with pytest.raises(ValueError, match="not symmetric"):
        funm(lambda v: v @ A.triu(), b, torch.exp)
    with pytest.raises(RuntimeError, match="not finite"):
        funm(lambda v: v * torch.nan, b, torch.exp)


def test_rows_of_lanczos_end_when_all_are_closed():
    product = Product(torch.diag(torch.cat([torch.arange(1.0, 5.0), torch.zeros(N - 4)])))
    b = torch.zeros(4, N)
    b[0, :3] = b[1, 0] = b[3, 100:] = 1.0
    steps = list(tridiagonals(product, b, 50))
    assert len(steps) == product.calls == 3
    assert product.vectors == 3 + 1 + 1
    assert [closed.tolist() for *_, closed in steps] == [[False, True, True, True]] * 2 + [[True] * 4]
    torch.testing.assert_close(torch.linalg.eigvalsh(steps[-1][1][0]), torch.arange(1.0, 4.0).cpu())
    assert [len(matrices) for _, matrices, _ in tridiagonals(product, torch.zeros(2, N), 50)] == [2]
    assert product.calls == 3


# Solvers: the same laws for all


@pytest.fixture(params=SOLVERS)
def solver(request):
    return SOLVERS[request.param]


@pytest.fixture
def system():
    A = matrix(torch.linspace(0.1, 1.5, 100))
    return A, torch.randn(5, 100, generator=seeded(1))


@pytest.mark.parametrize("dtype", DTYPES)
def test_solvers_reach_what_they_promise(solver, system, dtype):
    A, b = (t.to(dtype) for t in system)
    rtol = 1e-9 if dtype == torch.float64 else 1e-4
    b[2] = 0.0
    product = Product(A)
    result = solver(product, b, rtol=rtol)
    assert result.x.dtype == dtype
    assert torch.equal(result.x[2], torch.zeros_like(b[2]))
    assert result.residuals.shape == (5,)
    assert float(result.residuals.max()) <= rtol
    truth = torch.linalg.solve(A, b.T).T
    assert float((norm(result.x - truth) / norm(truth).clamp_min(1e-30)).max()) < 100 * rtol


def test_rows_are_solved_on_their_own(solver, system):
    A, b = system
    together = solver(lambda v: v @ A, b, rtol=1e-10).x
    for row, x in zip(b, together, strict=True):
        torch.testing.assert_close(solver(lambda v: v @ A, row[None], rtol=1e-10).x[0], x, rtol=1e-7, atol=1e-8)


def test_solvers_of_zero_and_of_one_dimension(solver):
    one = torch.full((1, 1), 0.5)
    torch.testing.assert_close(solver(lambda v: v @ one, torch.ones(1, 1), rtol=1e-10).x, torch.full((1, 1), 2.0))
    result = solver(lambda v: v, torch.zeros(2, 3), rtol=1e-6)
    assert torch.equal(result.x, torch.zeros(2, 3))
    assert float(result.residuals.max()) == 0.0


def test_solvers_say_that_they_did_not_converge(solver, system):
    A, b = system
    with pytest.raises(RuntimeError, match=r"relative residual .* after"):
        solver(lambda v: v @ A, b, rtol=1e-8, max_products=5)
    with pytest.raises(RuntimeError, match=r"relative residual .* after"):
        solver(lambda v: v.float() @ A.float(), b.float(), rtol=1e-12)
    with pytest.raises(RuntimeError, match="relative residual"):
        solver(lambda v: v * torch.nan, b, rtol=1e-6)
    with pytest.raises(RuntimeError, match="relative residual"):
        solver(lambda v: 0.0 * v, b, rtol=1e-6, max_products=20) if solver is not least_squares else cg(
            lambda v: 0.0 * v, b
        )


@pytest.mark.parametrize("solver", [cg, minres])
def test_float32_names_the_precision(solver, system):
    A, b = (t.float() for t in system)
    with pytest.raises(RuntimeError, match="products in float32 allow no better"):
        solver(lambda v: v @ A, b, rtol=1e-12)


@pytest.mark.parametrize("solver", [cg, minres])
def test_solvers_start_where_they_are_told(solver, system):
    A, b = system
    product = Product(A)
    far = solver(product, b, rtol=1e-8)
    assert far.products == product.calls
    near = solver(product, b, x0=far.x, rtol=1e-8)
    assert near.products == 1
    assert torch.equal(near.x, far.x)
    b[0] = 0.0
    assert torch.equal(solver(product, b, x0=far.x, rtol=1e-8).x[0], torch.zeros(100))
    assert solver(product, b, x0=far.x, rtol=1e-10).products < far.products


def test_finished_rows_cost_no_more():
    A = torch.diag(torch.linspace(1, 100, 50))
    b = torch.randn(8, 50, generator=seeded())
    b[1:] = torch.eye(50)[:7]
    product = Product(A)
    cg(product, b, rtol=1e-9)
    assert product.vectors < 2 * product.calls + 16


def test_cg_needs_a_positive_definite_matrix(system):
    A, b = system
    with pytest.raises(RuntimeError, match=r"not positive definite.*regul"):
        cg(lambda v: v @ (A - torch.eye(100)), b)
    with pytest.raises(RuntimeError, match=r"preconditioner.*not positive definite"):
        cg(lambda v: v @ A, b, preconditioner=lambda v: -v)


def test_cg_takes_fewer_products_with_a_preconditioner():
    values = torch.cat([torch.logspace(0, 4, 20), torch.rand(180, generator=seeded())])
    A = matrix(values)
    b = torch.randn(3, 200, generator=seeded(1))

    def damped(v):
        return v @ A + 0.1 * v

    plain = cg(damped, b, rtol=1e-8)
    near = nystrom(lambda v: v @ A, 200, 30, generator=seeded(2), like=A[:0])
    helped = cg(damped, b, rtol=1e-8, preconditioner=nystrom_preconditioner(near.values, near.vectors, 0.1))
    assert helped.products + near.products < plain.products
    torch.testing.assert_close(helped.x, plain.x, rtol=1e-4, atol=1e-5)


def test_minres_on_indefinite_and_on_singular_matrices():
    values = torch.cat([torch.linspace(0.2, 2, 60), -torch.linspace(0.1, 1, 40)])
    A = matrix(values)
    b = torch.randn(4, 100, generator=seeded(1))
    torch.testing.assert_close(
        minres(lambda v: v @ A, b, rtol=1e-11).x, torch.linalg.solve(A, b.T).T, rtol=0, atol=1e-7
    )
    S = matrix(values.where(torch.arange(100) > 10, 0.0))
    solution = minres(lambda v: v @ S, b @ S, rtol=1e-10).x
    torch.testing.assert_close(solution @ S, b @ S, rtol=0, atol=1e-8)
    with pytest.raises(RuntimeError, match="minres: relative residual"):
        minres(lambda v: v @ S, b)


@pytest.mark.parametrize("damp", [0.0, 0.5])
@pytest.mark.parametrize(
    ("q", "p", "rank"), [(60, 20, 20), (20, 60, 20), (30, 30, 30), (50, 40, 10), (3, 1, 1), (1, 4, 1)]
)
def test_lsmr(q, p, rank, damp):
    J = torch.randn(q, rank, generator=seeded()) @ torch.randn(rank, p, generator=seeded(1))
    b = torch.randn(3, q, generator=seeded(2))
    b[1] = 0.0
    calls = Product(J)
    result = lsmr(calls, lambda u: u @ J, b, damp=damp, rtol=1e-11)
    if damp:
        expected = torch.linalg.solve(J.T @ J + damp**2 * torch.eye(p), J.T @ b.T).T
    else:
        expected = b @ torch.linalg.pinv(J).T
    torch.testing.assert_close(result.x, expected, rtol=0, atol=1e-8)
    assert calls.calls == result.products
    single = lsmr(calls, lambda u: u @ J, b[0], damp=damp, rtol=1e-11)
    assert single.x.shape == (p,)
    torch.testing.assert_close(single.x, expected[0], rtol=0, atol=1e-8)


def test_neumann_diverges_loudly_and_can_be_cut_short(system):
    A, b = system
    with pytest.raises(RuntimeError, match="lower scale"):
        neumann(lambda v: v @ A, b, terms=200, scale=2.0)
    short = neumann(lambda v: v @ A, b, terms=3, rtol=None)
    assert short.products == 3 + 1
    torch.testing.assert_close(short.residuals, norm(b - short.x @ A) / norm(b))


# Estimates: the same laws for all

TRACES = {"hutchinson": hutchinson, "hutchpp": hutchpp, "xtrace": xtrace, "xnystrace": xnystrace}
DIAGONALS = {"hutchinson_diag": hutchinson_diag, "xdiag": xdiag}
ESTIMATORS = {**TRACES, **DIAGONALS}
M = 200
DECAYS = {
    "flat": 1 + torch.rand(M, generator=seeded()).double(),
    "power": (1.0 + torch.arange(M).double()) ** -2,
    "fast": 0.8 ** torch.arange(M).double(),
}


def truth(estimator, A):
    return A.diagonal() if estimator in DIAGONALS.values() else A.trace()


@pytest.fixture(params=ESTIMATORS)
def estimator(request):
    return ESTIMATORS[request.param]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("products", [6, 20, 60])
def test_estimates_count_their_products_and_repeat(estimator, products, dtype):
    product = Product(matrix(DECAYS["flat"]).to(dtype))
    empty = torch.empty(0, dtype=dtype)
    state = torch.get_rng_state()
    first = estimator(product, M, products=products, generator=seeded(), like=empty)
    assert product.vectors == first.products == products
    assert first.value.shape == first.error.shape == truth(estimator, product.A).shape
    assert first.value.dtype == first.error.dtype == dtype
    assert float(first.error.min()) > 0
    again = estimator(product, M, products=products, generator=seeded(), like=empty)
    assert torch.equal(first.value, again.value)
    assert torch.equal(first.error, again.error)
    assert torch.equal(state, torch.get_rng_state())


@pytest.mark.parametrize(("n", "products"), [(1, 1), (1, 10), (2, 2), (7, 8), (M, M), (M, 3 * M)])
def test_as_many_products_as_rows_are_exact(estimator, n, products):
    A = matrix(DECAYS["flat"][:n])
    result = estimator(lambda v: v @ A, n, products=products, like=A[:0])
    torch.testing.assert_close(result.value, truth(estimator, A))
    assert float(result.error.max()) == 0.0
    assert result.products == n


def test_estimates_of_zero_and_of_low_rank_are_exact(estimator):
    zero = estimator(lambda v: 0.0 * v, M, products=30, like=torch.empty(0))
    assert float(zero.value.abs().max()) == float(zero.error.abs().max()) == 0.0
    if estimator not in (hutchinson, hutchinson_diag):
        A = matrix(torch.cat([torch.rand(7, generator=seeded()), torch.zeros(M - 7)]))
        result = estimator(lambda v: v @ A, M, products=30, generator=seeded(), like=A[:0])
        torch.testing.assert_close(result.value, truth(estimator, A), rtol=0, atol=1e-12)
        assert float(result.error.max()) < 1e-12


def test_one_probe_is_refused(estimator):
    A = matrix(DECAYS["flat"])
    with pytest.raises(ValueError, match="an error needs at least"):
        estimator(lambda v: v @ A, M, products=1, like=A[:0])
    with pytest.raises(ValueError, match="give products"):
        estimator(lambda v: v @ A, M, like=A[:0])
    with pytest.raises(ValueError, match="at least one probe"):
        slq(lambda v: v @ A, M, steps=10, probes=0, like=A[:0])


def test_a_tolerance_is_reached_or_refused(estimator):
    n = 1000
    product = Product(matrix(0.7 ** torch.arange(n)) if estimator is not hutchinson_diag else torch.diag(torch.ones(n)))
    rtol = 0.3 if estimator is hutchinson else 1e-2
    result = estimator(product, n, rtol=rtol, generator=seeded(), like=torch.empty(0))
    assert product.vectors == result.products < n
    assert 0 < result.products >= 10
    assert float(norm(result.error.reshape(1, -1))) <= rtol * float(norm(result.value.reshape(1, -1)))
    assert float(norm((result.value - truth(estimator, product.A)).reshape(1, -1))) <= 3 * rtol * float(
        norm(truth(estimator, product.A).reshape(1, -1))
    )
    A = matrix(1 + torch.rand(M, generator=seeded()))
    with pytest.raises(RuntimeError, match=r"relative error .* after 40 products"):
        estimator(lambda v: v @ A, M, rtol=1e-8, products=40, like=A[:0])


def test_a_tolerance_out_of_reach_ends_in_the_exact_value(estimator):
    A = matrix(DECAYS["flat"])
    result = estimator(lambda v: v @ A, M, rtol=1e-13, generator=seeded(), like=A[:0])
    torch.testing.assert_close(result.value, truth(estimator, A))
    assert float(result.error.max()) == 0.0
    assert M <= result.products <= 2 * M


def test_luck_does_not_stop_an_estimate():
    # Half of all pairs of probes agree on this trace by chance; the mean of ten or more seldom does.
    A = torch.zeros(1000, 1000)
    A[0, 1] = A[1, 0] = 1.0
    A[2, 2] = 0.5
    result = hutchinson(lambda v: v @ A, 1000, rtol=0.1, generator=seeded(), like=A[:0])
    assert result.products > 100
    assert abs(float(result.value) - 0.5) < 0.15


@pytest.mark.parametrize("decay", DECAYS)
@pytest.mark.parametrize("name", TRACES)
def test_traces_lie_within_their_interval_95_times_of_100(name, decay):
    A, seeds = matrix(DECAYS[decay]), 200
    inside = 0
    for seed in range(seeds):
        result = TRACES[name](lambda v: v @ A, M, products=42, generator=seeded(seed), like=A[:0])
        inside += bool((result.value - A.trace()).abs() <= 1.96 * result.error)
    assert 0.90 <= inside / seeds <= 0.99


def test_quadratures_lie_within_their_interval_95_times_of_100():
    values, seeds = DECAYS["flat"], 200
    A, inside = matrix(values), dict.fromkeys((torch.square, torch.log, torch.exp), 0)
    for seed in range(seeds):
        spectrum = slq(lambda v: v @ A, M, steps=12, probes=8, generator=seeded(seed), like=A[:0])
        for function in inside:  # the quadrature is the same for all
            result = spectrum.trace_of(function)
            inside[function] += bool((result.value - function(values).sum()).abs() <= 1.96 * result.error)
    assert all(0.90 <= n / seeds <= 0.99 for n in inside.values()), inside


@pytest.mark.parametrize("decay", DECAYS)
@pytest.mark.parametrize("name", DIAGONALS)
def test_diagonals_lie_within_their_interval_95_times_of_100(name, decay):
    A, seeds = matrix(DECAYS[decay]), 50
    inside = 0.0
    for seed in range(seeds):
        result = DIAGONALS[name](lambda v: v @ A, M, products=42, generator=seeded(seed), like=A[:0])
        inside += float(((result.value - A.diagonal()).abs() <= 1.96 * result.error).double().mean())
    assert 0.93 <= inside / seeds <= 0.98


def errors(estimator, A, products, seeds=20):
    results = [
        estimator(lambda v: v @ A, len(A), products=products, generator=seeded(s), like=A[:0]).value
        for s in range(seeds)
    ]
    return (torch.stack(results) - truth(estimator, A)).square().mean().sqrt()


def test_better_estimators_are_better_at_equal_products():
    A = matrix(DECAYS["fast"])
    plain, sketched, left_out, nystrom_based = (errors(f, A, 60) for f in TRACES.values())
    assert plain > 10 * sketched > 50 * left_out > 250 * nystrom_based
    assert errors(hutchinson_diag, A, 60) > 20 * errors(xdiag, A, 60)


def test_xnystrace_refuses_an_indefinite_matrix():
    A = matrix(torch.randn(M, generator=seeded()))
    with pytest.raises(ValueError, match="not positive semidefinite"):
        xnystrace(lambda v: v @ A, M, products=60, generator=seeded(), like=A[:0])


@pytest.mark.parametrize("sampler", [rademacher, gaussian, sphere])
def test_probes_are_isotropic_and_their_traces_unbiased(sampler):
    draws = sampler(20000, 3, like=torch.empty(0), generator=seeded())
    assert float((draws.T @ draws / 20000 - torch.eye(3)).abs().max()) < 0.05
    assert float(draws.mean(0).abs().max()) < 0.05
    assert sampler(2, 3, like=torch.empty(0, dtype=torch.float32)).dtype == torch.float32
    A = matrix(DECAYS["flat"])
    result = hutchinson(lambda v: v @ A, M, products=150, sampler=sampler, generator=seeded(), like=A[:0])
    assert abs(float(result.value - A.trace())) < 3 * float(result.error)


@pytest.mark.parametrize("n", [2, 3, 4, 5, 6, 7, 10, 30, 1000])
def test_intervals_are_widened_by_the_quantile_of_student(n):
    from scipy.stats import t

    assert widening(n) == pytest.approx(t.ppf(0.975, n - 1) / 1.959964, rel=2e-3)


# Spectra


def test_density_is_that_of_the_eigenvalues():
    values = torch.cat([torch.randn(295, generator=seeded()), torch.tensor([20.0] * 5)])
    A = matrix(values)
    spectrum = slq(lambda v: v @ A, N, steps=80, probes=20, generator=seeded(), like=A[:0])
    assert spectrum.products == 1600
    for density in (spectrum.density(400, sigma=0.3), spectrum.density(torch.linspace(-6, 25, 500).cpu(), sigma=0.3)):
        expected = torch.exp(-0.5 * ((density.grid[:, None] - values.cpu()) / 0.3) ** 2).mean(1) / (
            0.3 * (2 * torch.pi) ** 0.5
        )
        assert float(((density.value - expected).abs() > 4 * density.error + 1e-3).double().mean()) < 0.01
        assert float(torch.trapezoid(density.value, density.grid)) == pytest.approx(1, abs=1e-3)


def test_log_density_holds_the_mass_of_each_sign():
    values = torch.cat([torch.logspace(-4, 1, 200), -torch.logspace(-3, 0, 100)])
    A = matrix(values)
    spectrum = slq(lambda v: v @ A, N, steps=150, probes=30, generator=seeded(), like=A[:0])
    mass = [float(torch.trapezoid(d.value, d.grid)) for d in (spectrum.log_density(sign=s) for s in (0, 1, -1))]
    assert mass[0] == pytest.approx(1, abs=1e-3)
    assert mass[1] == pytest.approx(2 / 3, abs=0.05)
    assert mass[1] + mass[2] == pytest.approx(1, abs=1e-3)
    floor = 3e-2
    mass = [float(torch.trapezoid(*spectrum.log_density(sign=s, floor=floor)[1::-1])) for s in (0, 1, -1)]
    zero = spectrum.trace_of(lambda l: (l.abs() <= floor).to(l)).value / N
    assert mass[0] == pytest.approx(1, abs=1e-3)
    assert mass[1] + mass[2] == pytest.approx(1 - float(zero), abs=1e-3)
    assert zero > 0.3
    negative = spectrum.trace_of(lambda l: (l < 0).to(l))
    assert abs(float(negative.value) - 100) < 3 * float(negative.error)


def test_quadrature_with_all_probes_is_exact_and_deflation_leaves_the_rest():
    values = torch.cat([torch.tensor([30.0, 20.0]), torch.rand(48, generator=seeded()) + 0.1])
    A, top = matrix(values), rotation(50)[:, :2].T
    exact = slq(lambda v: v @ A, 50, steps=5, probes=50, like=A[:0])
    assert exact.products == 50
    torch.testing.assert_close(exact.values[0], values.sort().values.cpu())
    torch.testing.assert_close(exact.logdet(0.5).value, (values + 0.5).log().sum().cpu())
    assert float(exact.logdet().error) == float(exact.density().error.max()) == 0.0
    for probes in (49, 50):
        rest = slq(lambda v: v @ A, 50, steps=48, probes=probes, deflate=top, generator=seeded(), like=A[:0])
        assert rest.size == 48
        assert float(rest.values.max()) < 1.2
        result = rest.trace_of(lambda l: l)
        assert abs(float(result.value - values[2:].sum())) <= 3 * float(result.error) + 1e-10


def test_the_mass_that_deflation_leaves():
    values = torch.cat([torch.full((20,), 30.0), torch.rand(40, generator=seeded()) + 0.1])
    A, top = matrix(values), rotation(60)[:, :20].T

    def in_the_rest(count, size, *, like, generator):
        rows = gaussian(count, size, like=like, generator=generator)
        rows = rows - (rows @ top.T) @ top
        return rows * (40**0.5 / norm(rows)[:, None])

    inside, seeds = 0, 200
    for seed in range(seeds):
        some = slq(lambda v: v @ A, 60, steps=5, probes=8, deflate=top, generator=seeded(seed), like=A[:0])
        mass = some.trace_of(torch.ones_like)
        inside += bool((mass.value - 40).abs() <= 1.96 * mass.error)
    assert 0.90 <= inside / seeds <= 0.99
    assert float(mass.error) > 0.5
    every = slq(
        lambda v: v @ A, 60, steps=5, probes=8, sampler=in_the_rest, deflate=top, generator=seeded(), like=A[:0]
    )
    torch.testing.assert_close(every.weights.sum(1), torch.ones(8).cpu())


def test_the_weight_below_a_point_is_known_to_the_christoffel_number():
    values = torch.linspace(-1, 1, 60)
    A, at = matrix(values), 0.3
    v = torch.randn(1, 60, generator=seeded())
    share = (v @ rotation(60)).square()[0] / v.square().sum()
    below = float(share[values < at].sum())
    blurs = []
    for steps in (5, 10, 20, 59, 60):
        some = slq(
            lambda v: v @ A, 60, steps=steps, probes=2, sampler=lambda *_, **__: v.expand(2, 60) * 1.0, like=A[:0]
        )
        seen = float(some.weights[0][some.values[0] < at].sum() / some.weights[0].sum())
        blurs.append(some.christoffel(at) / float(some.weights[0].sum()))
        assert abs(seen - below) <= blurs[-1] + 1e-9
    assert blurs[0] > blurs[1] > blurs[2] > blurs[4] == 0.0


def test_too_few_steps_show_in_the_error():
    values = torch.logspace(-3, 0, M)
    A = matrix(values)
    expected = float(values.log().sum())
    results = [
        slq(lambda v: v @ A, M, steps=steps, probes=30, generator=seeded(), like=A[:0]).logdet()
        for steps in (3, 6, 12, 24)
    ]
    assert all(abs(float(r.value) - expected) < 1.96 * float(r.error) for r in results)
    assert results[0].error > 5 * results[-1].error


@pytest.mark.parametrize("values", [torch.zeros(30), torch.ones(30), torch.tensor([2.0] + [0.0] * 29)])
def test_quadrature_of_degenerate_spectra(values):
    A = matrix(values.double())
    spectrum = slq(lambda v: v @ A, 30, steps=10, probes=5, generator=seeded(), like=A[:0])
    assert abs(float(spectrum.trace_of(lambda l: l).value - A.trace())) < 2.0
    for density in (spectrum.density(300), spectrum.log_density(300)):
        assert float(torch.trapezoid(density.value, density.grid)) == pytest.approx(1, abs=1e-2)
    if float(values.min()) == 0:
        with pytest.raises(ValueError, match=r"logdet.*regul"):
            spectrum.logdet()


# Sketches


@pytest.mark.parametrize("algorithm", [nystrom, randomised_eigh])
@pytest.mark.parametrize("rank", [1, 10, 30, 60, 290])
def test_low_rank_approximations_and_their_error(algorithm, rank):
    values = torch.cat([torch.logspace(0, -5, 60), torch.zeros(N - 60)])
    product = Product(matrix(values))
    near = algorithm(product, N, rank, generator=seeded(), like=values[:0])
    assert near.products == product.vectors
    assert float((near.vectors @ near.vectors.T - torch.eye(len(near.values))).abs().max()) < 1e-12
    rest = float(torch.linalg.matrix_norm(product.A - (near.vectors.T * near.values) @ near.vectors))
    assert rest <= 3 * float(values[rank:].norm()) + 1e-12
    assert float(near.error) == pytest.approx(rest, rel=0.5, abs=1e-12)
    assert bool((near.values.abs().diff() <= 1e-15).all())


def test_low_rank_of_indefinite_and_zero_matrices():
    values = torch.cat([torch.tensor([5.0, -4.0, 3.0, -2.0]), torch.zeros(N - 4)])
    A = matrix(values)
    near = randomised_eigh(lambda v: v @ A, N, 4, generator=seeded(), like=A[:0])
    torch.testing.assert_close(near.values, values[:4])
    with pytest.raises(ValueError, match="not positive semidefinite"):
        nystrom(lambda v: v @ A, N, 4, generator=seeded(), like=A[:0])
    for algorithm in (nystrom, randomised_eigh):
        zero = algorithm(lambda v: 0.0 * v, N, 4, generator=seeded(), like=A[:0])
        assert float(zero.values.abs().sum()) == float(zero.error) == 0.0
        with pytest.raises(ValueError, match="1 <= rank <= 300, got 0"):
            algorithm(lambda v: v @ A, N, 0, like=A[:0])


def test_orthonormal_rows_add_just_what_is_new():
    basis = orthonormal_rows(torch.randn(5, 40, generator=seeded()))
    fresh = torch.randn(3, 40, generator=seeded(1))
    rows = torch.cat([basis[:2] + 1e-9 * fresh[:1], fresh, fresh.sum(0, keepdim=True), torch.zeros(1, 40)])
    new = orthonormal_rows(rows, basis)
    both = torch.cat([basis, new])
    assert len(new) == 3
    assert float((both @ both.T - torch.eye(8)).abs().max()) < 1e-14
    assert float((fresh - fresh @ both.T @ both).abs().max()) < 1e-13
    assert len(orthonormal_rows(basis, basis)) == 0


def test_pairs_of_rows_of_many_sizes_in_single_precision():
    """Sums of their squares in float32 are off by 1e-5, more than the tolerance: the search for pairs did not end."""
    size = 50_000
    g = torch.Generator().manual_seed(0)
    rows = torch.randn(3, size, generator=g, dtype=torch.float32)
    rows[:, 64:] *= 3e-4
    exact = rows.double().norm(dim=1)
    assert float((base.norms(rows) / exact - 1).abs().max()) < 3e-6
    basis = orthonormal_rows(rows)
    assert float((basis.double().norm(dim=1) - 1).abs().max()) < 3e-6
    values, vectors = torch.tensor([1000.0, 300.0, 100.0]), basis.double()

    def product(V):
        return ((V.double() @ vectors.mT * values) @ vectors + 1e-2 * V).to(V)

    found = eigsh(product, size, 3, like=rows[:0], max_products=200)
    assert float(((found.values - 1e-2) / values - 1).abs().max()) < 1e-5
