"""Spectra by products agree with dense eigendecompositions, within the errors that they state."""

import math

import numpy as np
import pytest
import scipy.sparse.linalg
import torch
from torch import nn

from nngeometry import FIM, GGN, Hessian, PMat, PMatDense, PMatImplicit, PMatKFAC
from nngeometry.plot import plot_density
from nngeometry.spectrum import Spectrum, extreme_eigenpairs, layer_spectra, spectral_density


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def problem():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 10), nn.Tanh(), nn.Linear(10, 8), nn.Tanh(), nn.Linear(8, 4))
    return model, torch.randn(60, 6), torch.randint(4, (60,))


def matrix(name):
    model, x, y = problem()
    made = {
        "fim-dense": lambda: FIM(model, (x,), PMatDense),
        "fim-kfac": lambda: FIM(model, (x,), PMatKFAC),
        "fim-implicit": lambda: FIM(model, (x,), PMatImplicit),
        "ggn-implicit": lambda: GGN(model, (x, y), PMatImplicit),
        "hessian-dense": lambda: Hessian(model, (x, y), PMatDense),
        "hessian-implicit": lambda: Hessian(model, (x, y), PMatImplicit),
    }
    return made[name]()


MATRICES = ["fim-dense", "fim-kfac", "fim-implicit", "ggn-implicit", "hessian-dense", "hessian-implicit"]


@pytest.fixture(params=MATRICES)
def F(request):
    return matrix(request.param)


@pytest.fixture
def H():
    return matrix("hessian-implicit")


def exact(F: PMat):
    """Ascending."""
    return torch.linalg.eigvalsh(F.to_torch()).cpu()  # where spectra are


def by_magnitude(l):
    return l[l.abs().argsort(descending=True)]


def near(estimate, true, errors=3.0, slack=1e-9):
    return abs(float(estimate.value) - float(true)) <= errors * float(estimate.error) + slack


# The density


@pytest.mark.parametrize("outliers", [0, 5])
def test_the_density_has_mass_one(F, outliers):
    spectrum = spectral_density(F, steps=30, outliers=outliers, generator=seeded())
    grid, density, error = spectrum.density()
    assert torch.trapezoid(density, grid) == pytest.approx(1, abs=1e-6)
    assert density.shape == error.shape == grid.shape
    assert (density >= 0).all()
    assert (error >= 0).all()


def test_the_log_densities_and_what_is_near_zero_have_mass_one(F):
    spectrum = spectral_density(F, steps=30, outliers=3, generator=seeded())
    grid, density, _ = spectrum.log_density()
    zero = spectrum.count(-spectrum.floor(), spectrum.floor()).value / spectrum.size
    assert torch.trapezoid(density, grid.log10()).sum() + zero == pytest.approx(1, abs=1e-6)


@pytest.mark.parametrize("outliers", [0, 5])
def test_the_density_is_that_of_the_eigenvalues(F, outliers):
    """Smoothed over more than the gaps between nodes; the errors of neighbours on the grid are not independent."""
    spectrum = spectral_density(F, steps=60, outliers=outliers, generator=seeded())
    width = 6 * spectrum.width()
    grid, density, error = spectrum.density(width=width)
    z = (grid.unsqueeze(1) - exact(F)) / width
    true = torch.exp(-z.square() / 2).mean(1) / (width * math.sqrt(2 * math.pi))
    assert ((density - true).abs() <= 4 * error + 1e-3 * true.max()).all()


def test_moments(F):
    l = exact(F)
    spectrum = spectral_density(F, steps=12, probes=20, outliers=4, generator=seeded())
    assert float(spectrum.count().value) == pytest.approx(F.size(0))
    assert near(spectrum.trace(), l.sum())
    for power in (2, 3, 5):
        assert near(spectrum.sum(lambda x, p=power: x**p), (l**power).sum())
    shift = 1.5 * float(l.abs().max())
    assert near(spectrum.logdet(shift), (l + shift).log().sum())


def test_more_outliers_make_the_trace_better():
    F = matrix("ggn-implicit")
    errors = [float(spectral_density(F, steps=20, outliers=k, generator=seeded()).trace().error) for k in (0, 30)]
    assert errors[1] < 0.5 * errors[0]


def test_a_width_and_a_grid_can_be_given(H):
    spectrum = spectral_density(H, steps=20, generator=seeded())
    grid = torch.linspace(-0.1, 0.1, 7).cpu()
    assert (spectrum.density(grid, width=0.2).grid == grid).all()
    assert spectrum.log_density(torch.tensor([1e-3, 1e-1])).value.shape == (2, 2)
    with pytest.raises(ValueError, match="must be positive"):
        spectrum.density(width=0.0)


def test_the_same_generator_gives_the_same_spectrum(H):
    first, second = (spectral_density(H, steps=10, generator=seeded(3)) for _ in range(2))
    assert torch.equal(first.nodes, second.nodes)
    assert torch.equal(first.weights, second.weights)


def test_float32():
    model, x, y = problem()
    H = Hessian(model.float(), (x.float(), y), PMatImplicit)
    spectrum = spectral_density(H, steps=40, outliers=4, generator=seeded())
    l = exact(matrix("hessian-dense"))
    assert spectrum.nodes.dtype == torch.float64
    assert torch.allclose(spectrum.outliers, by_magnitude(l)[:4], rtol=1e-4)
    assert near(spectrum.trace(), l.sum())


# A spectrum that is known


def test_few_distinct_eigenvalues():
    """Lanczos ends by itself, and the count is without blur."""
    model, x, _ = problem()
    F = FIM(model, (x,), PMatDense)
    q = torch.linalg.qr(torch.randn(F.size(0), F.size(0))).Q
    l = torch.tensor([2.0, 1.0, 0.0, -0.5]).repeat(50)[: F.size(0)]
    A = F - PMat(F.layer_collection, data=F.root) + known(F, q * l @ q.T)
    spectrum = spectral_density(A, steps=30, probes=30, generator=seeded())
    live = spectrum.nodes[spectrum.weights > 1e-12]
    assert (live.unsqueeze(1) - l.unique().cpu()).abs().amin(1).max() < 1e-9
    count, total = spectrum.negative()
    assert near(count, (l < 0).sum())
    assert count.error < 0.1 * len(l)
    assert near(total, l[l < 0].sum())


def known(F, dense):
    """A matrix with these entries."""
    like = F * 0.0
    like.root.parts[0].block.data.copy_(dense)
    return like


# Outliers


def test_outliers_are_exact(F):
    spectrum = spectral_density(F, steps=20, outliers=6, generator=seeded())
    assert (spectrum.outliers - by_magnitude(exact(F))[:6]).abs().max() < 1e-9
    bulk = spectrum.nodes[spectrum.weights > 0].abs().max()
    assert bulk <= spectrum.outliers[-1].abs() + 1e-9
    assert torch.allclose(spectrum.weights.sum(1), torch.full((), F.size(0) - 6.0).cpu())


def test_all_but_one_outlier():
    model = nn.Linear(2, 2)
    x = torch.randn(20, 2)
    F = FIM(model, (x,), PMatImplicit)
    spectrum = spectral_density(F, outliers=5)
    assert near(spectrum.trace(), exact(F).sum(), slack=1e-10)
    assert float(spectrum.trace().error) < 1e-10


# The negative part


@pytest.mark.parametrize("threshold", [None, 1e-4, 1e-2, 0.1])
@pytest.mark.parametrize("steps", [20, 60, 1000])
def test_the_negative_part(steps, threshold):
    H = matrix("hessian-dense")
    l = exact(H)
    spectrum = spectral_density(H, steps=steps, outliers=3, generator=seeded(1))
    number, total = spectrum.negative(threshold)
    below = l < -(spectrum.floor() if threshold is None else threshold)
    assert near(number, below.sum())
    assert near(total, l[below].sum()) or threshold not in (None, 1e-4)


def test_the_count_is_sharp_when_the_steps_suffice():
    H = matrix("hessian-dense")
    spectrum = spectral_density(H, steps=H.size(0), probes=20, generator=seeded())
    count, total = spectrum.negative()
    assert count.error < 0.05 * H.size(0)
    assert total.error < 0.2 * total.value.abs()


def test_a_positive_semidefinite_matrix_has_no_negative_part():
    count, total = spectral_density(matrix("ggn-implicit"), steps=40, generator=seeded()).negative(1e-3)
    assert count.value == total.value == 0


# Pairs


@pytest.mark.parametrize("which", ["largest", "smallest", "both", "magnitude"])
def test_extreme_eigenpairs(F, which):
    k = 4
    pairs = extreme_eigenpairs(F, k, which)
    l = exact(F)
    true = {
        "largest": l.flip(0)[:k],
        "smallest": l[:k],
        "both": torch.cat([l[-k:], l[:k]]).sort(descending=True).values,
        "magnitude": by_magnitude(l)[:k],
    }[which]
    assert torch.allclose(pairs.values.cpu(), true, rtol=0, atol=1e-9)
    for value, vector, residual in zip(pairs.values, pairs.vectors, pairs.residuals, strict=True):
        assert float(vector.norm()) == pytest.approx(1)
        assert float((F.mv(vector) - value * vector).norm()) == pytest.approx(float(residual), abs=1e-9)
        assert residual < 1e-8
    assert pairs.products > 0


# Layers


@pytest.mark.parametrize("name", ["fim-dense", "fim-kfac", "ggn-implicit", "hessian-implicit"])
def test_spectra_of_layers(name):
    F = matrix(name)
    spectra = layer_spectra(F, steps=20, probes=8, outliers=3, generator=seeded())
    assert list(spectra) == list(F.layer_collection)
    dense = F.to_torch()
    for layer, s in F.layer_collection.slices().items():
        l = torch.linalg.eigvalsh(dense[s, s]).cpu()
        assert spectra[layer].size == len(l)
        assert torch.allclose(spectra[layer].outliers, by_magnitude(l)[:3], rtol=0, atol=1e-9)
        assert near(spectra[layer].trace(), l.sum())


# With scipy


def test_scipy_takes_a_matrix(H):
    A, l = H.to_scipy(), exact(H).numpy()
    rng = np.random.default_rng(0)
    n = H.size(0)
    assert np.allclose(np.sort(scipy.sparse.linalg.eigsh(A, 3, which="LA", v0=rng.normal(size=n))[0]), l[-3:])

    G = matrix("ggn-implicit")
    shifted = G.to_scipy() + scipy.sparse.linalg.aslinearoperator(0.1 * np.eye(n))
    b = rng.normal(size=n)
    x, info = scipy.sparse.linalg.cg(shifted, b, rtol=1e-10)
    assert info == 0
    assert np.allclose(x, np.linalg.solve(G.to_torch().cpu().numpy() + 0.1 * np.eye(n), b), atol=1e-7)

    values, vectors = scipy.sparse.linalg.lobpcg(G.to_scipy(), rng.normal(size=(n, 3)), tol=1e-9, maxiter=200)
    assert np.allclose(values, exact(G).numpy()[::-1][:3])
    assert isinstance(vectors, np.ndarray)


# Errors


@pytest.mark.parametrize("options", [{"steps": 0}, {"probes": 0}, {"outliers": -1}, {"outliers": 10_000}])
def test_arguments_are_checked(H, options):
    with pytest.raises(ValueError, match="expected"):
        spectral_density(H, **options)


def test_a_function_must_be_finite(H):
    spectrum = spectral_density(H, steps=10, generator=seeded())
    with pytest.raises(ValueError, match="not finite"):
        spectrum.sum(torch.log)
    with pytest.raises(ValueError, match="not positive definite"):
        spectrum.logdet(1e-3)


def test_a_progress_bar_is_shown(H, capsys):
    spectral_density(H, steps=3, probes=2, verbose=True)
    assert "products" in capsys.readouterr().err


# Pictures


@pytest.mark.parametrize(("log", "stems"), [(False, True), (True, True), (True, False)])
def test_pictures(tmp_path, log, stems):
    spectra = {
        name: spectral_density(matrix(name), steps=20, outliers=3, generator=seeded())
        for name in ("fim-kfac", "hessian-implicit")
    }
    figure = plot_density(spectra, tmp_path / "picture.png", log=log, stems=stems, ncols=1)
    assert [ax.get_title() for ax in figure.axes] == list(spectra)
    for ax in figure.axes:
        low, high = ax.get_ylim()
        assert 0 < low < high < math.inf
        assert any(((line.get_ydata() > low) & (line.get_ydata() < high)).sum() > 20 for line in ax.lines)
        for line in ax.lines:
            assert np.isfinite(np.asarray(line.get_xydata(), dtype=float)).all()
    assert (tmp_path / "picture.png").stat().st_size > 10_000


def test_one_spectrum_is_a_picture_too(H):
    assert len(plot_density(spectral_density(H, steps=10)).axes) == 1


def test_a_picture_of_the_zero_matrix():
    zero = matrix("fim-dense") * 0.0
    spectrum = spectral_density(zero, steps=5, outliers=1)
    assert isinstance(spectrum, Spectrum)
    for log in (False, True):
        assert all(math.isfinite(y) for y in plot_density(spectrum, log=log).axes[0].get_ylim())


def test_nothing_to_draw():
    with pytest.raises(ValueError, match="no spectrum"):
        plot_density({})


def test_one_vector_has_no_error():
    """The spectrum as one vector sees it: a quadrature of mass one, extreme Ritz values, and a table that says so."""
    H = matrix("hessian-implicit")
    l, size = exact(H), H.size(0)
    one = spectral_density(H, steps=12, probes=1, generator=seeded())
    assert one.nodes.shape == (1, 12)
    assert float(one.weights.sum()) == pytest.approx(size)
    table = one.table()
    for name in ("largest", "smallest", "trace", "negative eigenvalues", "sum of negative eigenvalues"):
        assert bool(table[name].value.isfinite())
    assert bool(table["trace"].error.isnan())
    assert float(table["largest"].error) == 0
    assert float(table["trace per parameter"].value) == float(table["trace"].value) / size
    assert "± unknown" in one._repr_html_()
    grid, density, _ = one.density()
    assert float(torch.trapezoid(density, grid)) == pytest.approx(1, abs=1e-3)
    plot_density(one)
    full = spectral_density(H, steps=size, probes=1, generator=seeded())
    assert full.range() == pytest.approx((float(l.min()), float(l.max())), rel=1e-6)
