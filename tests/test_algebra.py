"""The algebra of matrices: every operation of every representation equals the same operation on its dense matrix."""

import copy
import pickle
from functools import partial

import oracle
import pytest
import torch
from laws import HELD, MIXED, OPEN
from models import CASES
from torch import nn

from nngeometry import (
    FIM,
    LayerCollection,
    PFMapDense,
    PMat,
    PMatDense,
    PMatDiag,
    PMatEKFAC,
    PMatEye,
    PMatImplicit,
    PMatKFAC,
    PMatLowRank,
    PVector,
    Relative,
    linalg,
    memory_budget,
    random_pvector,
)

TOLERANCE = 1e-10
BUILT = {
    "inverse": lambda F: FIM_OF("kfac").inv(0.1),
    "scaled": lambda F: -2.0 * FIM_OF("lowrank"),
    "sum-kfac-diag": lambda F: FIM_OF("kfac") + FIM_OF("diag"),
    "sum-dense-lowrank": lambda F: FIM_OF("dense") - FIM_OF("lowrank") * 0.5,
    "sum-lowrank-quasidiag": lambda F: FIM_OF("lowrank") + FIM_OF("quasidiag"),
    "sum-three": lambda F: FIM_OF("ekfac") + 0.3 * FIM_OF("lowrank") - 2 * FIM_OF("eye"),
    "pow": lambda F: FIM_OF("ekfac").pow(0.5),
}
NAMES = [*HELD, *BUILT]
_CACHE: dict[str, PMat] = {}


def FIM_OF(name):
    if name not in _CACHE:
        model, batch, _ = CASES["convnet"].make(3)
        _CACHE[name] = FIM(model, batch, HELD[name]) if name in HELD else BUILT[name](None)
    return _CACHE[name]


@pytest.fixture(params=NAMES)
def matrix(request):
    return FIM_OF(request.param)


@pytest.fixture
def F(matrix):
    return matrix, matrix.to_torch()


def close(a, b):
    a, b = (x if isinstance(x, torch.Tensor) else x.to_torch() for x in (a, b))
    assert a.shape == b.shape
    assert oracle.relative(a, b) < TOLERANCE, oracle.relative(a, b)


def vector(F, seed=0):
    return random_pvector(F.layer_collection, generator=torch.Generator().manual_seed(seed))


def rows(F):
    data = torch.randn(2, 3, F.size(0), generator=torch.Generator().manual_seed(1))
    return PFMapDense(F.layer_collection, data)


def eye(M):
    return torch.eye(len(M))


def test_symmetric(F):
    _, M = F
    torch.testing.assert_close(M, M.T)


def test_mv(F):
    F, M = F
    v, J = vector(F), rows(F)
    close(F.mv(v), M @ v.to_torch())
    close(F @ v, M @ v.to_torch())
    close(F.mv(J), J.to_torch() @ M)
    close(F @ J, J.to_torch() @ M)
    assert isinstance(F.mv(J), PFMapDense)


def test_vTMv(F):
    F, M = F
    v, J = vector(F), rows(F)
    expected = v.to_torch() @ M @ v.to_torch()
    close(F.vTMv(v), expected)
    close(sum(F.vTMv(v, per_layer=True).values()), expected)
    quadratic = torch.einsum("cnp,pq,cnq->cn", J.to_torch(), M, J.to_torch())
    close(F.mapTMmap(J, reduction="diag"), quadratic)
    close(F.mapTMmap(J), quadratic.sum(0))


def test_vTMv_is_differentiable(F):
    F, M = F
    flat = vector(F).to_torch().clone().requires_grad_()
    F.vTMv(PVector(F.layer_collection, flat)).backward()
    close(flat.grad, 2 * M @ flat.detach())
    data = rows(F).to_torch().clone().requires_grad_()
    F.mapTMmap(PFMapDense(F.layer_collection, data)).sum().backward()
    close(data.grad, 2 * data.detach() @ M)


def test_solve(F):
    F, M = F
    v, J = vector(F), rows(F)
    regul = 0.1 if float(torch.linalg.eigvalsh(M)[0]) > -1e-9 else 100.0
    dense = torch.linalg.inv(M + regul * eye(M))
    close(F.solve(v, regul=regul), dense @ v.to_torch())
    close(F.solve(J, regul=regul), J.to_torch() @ dense)
    close(F.inv(regul=regul), dense)
    close(F.inv(regul=regul).mv(v), dense @ v.to_torch())


def test_solve_relative_and_per_layer(F):
    F, M = F
    if float(torch.linalg.eigvalsh(M)[0]) < -1e-9:
        pytest.skip("an indefinite matrix has no damping relative to its trace")
    v = vector(F)
    relative = 0.1 * M.trace() / len(M)
    close(F.solve(v, Relative(0.1)), torch.linalg.solve(M + relative * eye(M), v.to_torch()))
    slices = F.layer_collection.slices()
    values = {name: 0.05 * (k + 1) for k, name in enumerate(slices)}
    values[next(iter(values))] = Relative(0.2)
    D = torch.zeros(len(M))
    for name, s in slices.items():
        r = values[name]
        D[s] = r if isinstance(r, float) else 0.2 * M[s, s].trace() / (s.stop - s.start)
    dense = torch.linalg.inv(M + torch.diag(D))
    close(F.solve(v, values), dense @ v.to_torch())
    close(F.inv(values), dense)
    close(F.logdet(values), torch.logdet(M + torch.diag(D)))


def test_pinv(F):
    F, M = F
    l = torch.linalg.eigvalsh(M).abs()
    kept = l[l > 1e-9 * l.max()]
    rounding = 10 * torch.finfo(M.dtype).eps * kept.max() / kept.min()
    expected = torch.linalg.pinv(M, rtol=1e-9, hermitian=True)
    assert oracle.relative(F.pinv(rtol=1e-9).to_torch(), expected) < max(TOLERANCE, float(rounding))


def test_logdet(F):
    F, M = F
    if float(torch.linalg.eigvalsh(M)[0]) < -0.1:
        with pytest.raises(ValueError, match="negative eigenvalues"):
            F.logdet(0.1)
    else:
        close(F.logdet(0.1), torch.logdet(M + 0.1 * eye(M)))
    if float(torch.linalg.eigvalsh(M)[0]) > -1e-9:
        close(F.logdet(Relative(0.1)), torch.logdet(M + 0.1 * M.trace() / len(M) * eye(M)))


def test_trace_and_diag(F):
    F, M = F
    close(F.trace(), M.trace())
    per_layer = F.trace(per_layer=True)
    for name, s in F.layer_collection.slices().items():
        close(per_layer[name], M[s, s].trace())
    close(F.get_diag(), M.diagonal())


@pytest.mark.parametrize("ord", [None, "fro", 2, -2, "nuc"])
def test_norm(F, ord):
    F, M = F
    expected = torch.linalg.norm(M) if ord is None else torch.linalg.matrix_norm(M, ord)
    assert abs(float(F.norm(ord) - expected)) < 1e-10 * float(torch.linalg.norm(M))


def test_eig(F):
    F, M = F
    expected = torch.linalg.eigvalsh(M).flip(0)
    scale = float(expected.abs().max())
    torch.testing.assert_close(F.eigenvalues(), expected, rtol=0, atol=1e-12 * scale)
    k = 4 if float(expected[3]) > 1e-9 else 0
    l, vectors = F.eig(k)
    torch.testing.assert_close(l, expected[:k], rtol=0, atol=1e-12 * scale)
    for value, v in zip(l, vectors, strict=True):
        assert float((F.mv(v) - value * v).norm()) < 1e-11 * scale
    l, vectors = F.eig()
    V = torch.stack([v.to_torch() for v in vectors], 1)
    torch.testing.assert_close(V.T @ V, torch.eye(len(l)), rtol=0, atol=1e-10)
    assert bool((l[:-1] >= l[1:]).all())
    if len(l) == len(M) or type(F) is PMatLowRank:
        close(V @ torch.diag(l) @ V.T, M)


@pytest.mark.parametrize("exponent", [0.5, 2, 1, 1.5])
def test_pow(F, exponent):
    F, M = F
    l, Q = torch.linalg.eigh(M)
    if float(l[0]) < -1e-9 and exponent != int(exponent):
        with pytest.raises(ValueError, match="negative eigenvalues"):
            F.pow(exponent)
        return
    l = l if exponent == int(exponent) else l.clamp(min=0)
    expected = (Q * l**exponent) @ Q.T
    assert oracle.relative(F.pow(exponent).to_torch(), expected) < 1e-7  # the root of rounding at zero
    assert oracle.relative((F**exponent).to_torch(), expected) < 1e-7


def test_negative_power():
    F = FIM_OF("kfac").inv(0.1)
    close(F.pow(-1), torch.linalg.inv(F.to_torch()))
    half = F.pow(-0.5).to_torch()
    close(half @ F.to_torch() @ half, eye(half))
    with pytest.raises(ValueError, match="singular"):
        FIM_OF("lowrank").pow(-0.5)


def test_sample_has_the_right_covariance(F):
    """The map from white noise to samples is a square root of the matrix."""
    F, M = F
    if float(torch.linalg.eigvalsh(M)[0]) < -1e-9:
        with pytest.raises(ValueError, match="negative eigenvalues"):
            F.sample()
        return
    root = F.root.sample(eye(M)).T
    assert oracle.relative(root @ root.T, M) < 1e-9
    a, b = (F.sample(generator=torch.Generator().manual_seed(3)) for _ in range(2))
    assert torch.equal(a.to_torch(), b.to_torch())


@pytest.mark.parametrize("other", [*HELD, "sum-kfac-diag"])
def test_sums_of_all_with_all(F, other):
    F, M = F
    G = FIM_OF(other)
    N = G.to_torch()
    v = vector(F)
    for total, expected in ((F + G, M + N), (F - 0.5 * G, M - 0.5 * N), (G + F, M + N)):
        close(total, expected)
        close(total.mv(v), expected @ v.to_torch())
        close(total.get_diag(), expected.diagonal())
        assert abs(float(total.trace() - expected.trace())) < TOLERANCE * float(torch.linalg.norm(expected))
        regul = 1.0 + 2 * float(torch.linalg.eigvalsh(expected)[0].clamp(max=0).abs())
        close(total.solve(v, regul), torch.linalg.solve(expected + regul * eye(M), v.to_torch()))


@pytest.mark.parametrize("other", HELD)
def test_products_of_all_with_all(F, other):
    F, M = F
    G = FIM_OF(other)
    product = F @ G
    v = vector(F)
    close(product, M @ G.to_torch())
    close(product.mv(v), M @ (G.to_torch() @ v.to_torch()))
    close(product.get_diag(), (M @ G.to_torch()).diagonal())
    close(product.trace(), (M @ G.to_torch()).trace())


def test_scalars(F):
    F, M = F
    close(2 * F, 2 * M)
    close(F * -0.5, -0.5 * M)
    close(F / 4, M / 4)
    close(-F, -M)
    close(torch.tensor(3.0) * F, 3 * M)
    close(sum([F, F]), 2 * M)
    assert type(2 * F) is type(F)
    assert (2 * F).dtype == torch.float64


def test_negative_multiples_stay_real():
    F = -1 * FIM_OF("lowrank")
    assert not F.to_torch().is_complex()
    close(F.norm(2), torch.linalg.matrix_norm(F.to_torch(), 2))
    close((-1 * FIM_OF("ekfac")).norm(2), torch.linalg.matrix_norm(FIM_OF("ekfac").to_torch(), 2))


def test_block(F):
    F, M = F
    for name, s in F.layer_collection.slices().items():
        B = F.block(name)
        close(B, M[s, s])
        v = vector(B)
        close(B.mv(v), M[s, s] @ v.to_torch())
        close(B.solve(v, 200.0), torch.linalg.solve(M[s, s] + 200 * torch.eye(B.size(0)), v.to_torch()))


@pytest.mark.parametrize("how", ["pickle", "deepcopy", "file"])
def test_copies(F, how, tmp_path):
    F, M = F
    if how == "file":
        F.save(tmp_path / "F.pt")
        torch.load(tmp_path / "F.pt", weights_only=True)
        G = PMat.load(tmp_path / "F.pt")
    else:
        G = pickle.loads(pickle.dumps(F)) if how == "pickle" else copy.deepcopy(F)
    assert type(G) is type(F)
    assert G.layer_collection == F.layer_collection
    assert torch.equal(G.to_torch(), M)
    v = vector(F)
    close(G.mv(v), M @ v.to_torch())
    close(G.solve(v, 100.0), F.solve(v, 100.0))
    assert str(G).splitlines()[2:] == str(F).splitlines()[2:]


def test_dtype(F):
    F, M = F
    G = F.to(dtype=torch.float32)
    assert G.dtype == torch.float32
    assert type(G) is type(F)
    assert oracle.relative(G.to_torch().double(), M) < 1e-5
    assert F.dtype == torch.float64
    with pytest.raises(ValueError, match="move one of them"):
        G.mv(vector(F))
    with pytest.raises(ValueError, match="move one of them"):
        _ = F + G


def test_operations_do_not_change_the_matrix(F):
    F, M = F
    before = M.clone()
    _ = F + F, 2 * F, F.inv(200.0), F.eigenvalues(), F.solve(vector(F), 200.0), F.norm(2)
    assert torch.equal(F.to_torch(), before)


def test_representation_is_kept():
    for name, F in ((n, FIM_OF(n)) for n in HELD):
        assert type(F + F) is type(F) or name in OPEN, name
        assert type(0.5 * F) is type(F)
    assert type(FIM_OF("dense") + FIM_OF("diag")) is PMatDense
    for name in ("dense", "blockdiag", "diag", "ekfac"):
        assert type(FIM_OF(name).inv(0.1)) is type(FIM_OF(name)), name
    assert type(FIM_OF("dense").pow(0.5)) is PMatDense
    assert type(FIM_OF("diag").pinv()) is PMatDiag
    assert type(FIM_OF("dense") @ FIM_OF("dense")) is PMatDense


def test_singular_systems_raise():
    for name in ("dense", "lowrank", "kfac", "blockdiag", "ekfac", "mixed"):
        F = FIM_OF(name)
        for regul in (0.0, 1e-30):
            with pytest.raises(ValueError, match="singular to working precision"):
                F.solve(vector(F), regul=regul)
            with pytest.raises(ValueError, match="singular to working precision"):
                F.inv(regul=regul)
            with pytest.raises(ValueError, match="singular to working precision"):
                F.logdet(regul=regul)
    F32 = FIM_OF("dense").to(dtype=torch.float32)
    with pytest.raises(ValueError, match="use regul of at least"):
        F32.solve(vector(F32).to(dtype=torch.float32), regul=1e-12)


def test_dead_layer():
    """A layer that the output does not depend on has a zero block, and solve is still defined."""
    model, batch, _ = CASES["residual-inplace"].make(3)
    for representation in HELD.values():
        if representation is MIXED:
            continue
        F = FIM(model, batch, representation)
        M = F.to_torch()
        v = vector(F)
        if representation is not PMatEye:
            assert float(F.trace(per_layer=True)["unused_path"]) == 0
        close(F.solve(v, 0.01), torch.linalg.solve(M + 0.01 * eye(M), v.to_torch()))


def test_products_are_not_symmetric():
    product = FIM_OF("dense") @ FIM_OF("diag")
    with pytest.raises(NotImplementedError, match="not symmetric"):
        product.eig()
    with pytest.raises(NotImplementedError, match="not symmetric"):
        product.pow(0.5)
    M = product.to_torch()
    v = vector(product)
    close(product.solve(v, 0.1), torch.linalg.solve(M + 0.1 * eye(M), v.to_torch()))


def test_eye():
    lc = LayerCollection.from_model(nn.Linear(2, 3))
    F = PMatEye(lc, scaling=3.0, device=oracle.HERE)
    close(F, 3.0 * torch.eye(9))
    close(F.inv(0.0), torch.eye(9) / 3)
    assert F.nbytes() == 8


def test_implicit():
    model, batch, _ = CASES["convnet"].make(3)
    batches = [(batch[0][:2],), (batch[0][2:],)]
    F = FIM(model, batches, PMatImplicit)
    M = FIM_OF("dense").to_torch()
    v, J = vector(F), rows(F)
    close(F.mv(v), M @ v.to_torch())
    close(F.mv(J), J.to_torch() @ M)
    close(F.vTMv(v), v.to_torch() @ M @ v.to_torch())
    close(F.trace(), M.trace())
    close(F.get_diag(), M.diagonal())
    close((F + FIM_OF("diag")).mv(v), M @ v.to_torch() + M.diagonal() * v.to_torch())
    close((2 * F).mv(v), 2 * M @ v.to_torch())
    assert oracle.relative(F.solve(v, 0.1).to_torch(), FIM_OF("dense").solve(v, 0.1).to_torch()) < 1e-5
    flat = v.to_torch().clone().requires_grad_()
    F.vTMv(PVector(F.layer_collection, flat)).backward()
    close(flat.grad, 2 * M @ v.to_torch())
    expected = torch.linalg.eigvalsh(M).flip(0)
    l, vectors = F.eig(3)
    torch.testing.assert_close(l, expected[:3])
    close(F.mv(vectors[0]), l[0] * vectors[0].to_torch())
    close(F.norm(2), expected[0])
    dense = M + 0.1 * eye(M)
    assert oracle.relative(F.inv(0.1).mv(v).to_torch(), torch.linalg.solve(dense, v.to_torch())) < 1e-5
    half = FIM_OF("dense").pow(0.5).to_torch()
    assert oracle.relative(F.pow(0.5).mv(v).to_torch(), half @ v.to_torch()) < 1e-6
    assert (
        oracle.relative(
            (F + 0.1 * PMatEye(F.layer_collection, device=oracle.HERE)).pow(-0.5).mv(v).to_torch(),
            FIM_OF("dense").inv(0.1).pow(0.5).mv(v).to_torch(),
        )
        < 1e-6
    )
    preconditioned = F.solve(v, 0.1, rtol=1e-9, preconditioner=FIM_OF("kfac"))
    assert oracle.relative(preconditioned.to_torch(), torch.linalg.solve(dense, v.to_torch())) < 1e-7
    estimate = F.trace(estimator=partial(linalg.xtrace, products=40, generator=torch.Generator().manual_seed(0)))
    assert abs(float(estimate.value - M.trace())) < 6 * float(estimate.error) + 1e-9
    for operation in (F.logdet, F.eigenvalues, F.norm, F.eig):
        with pytest.raises((NotImplementedError, ValueError), match=r"known by its products"):
            operation()
    with pytest.raises(TypeError, match="cannot be saved"):
        F.save("nowhere")
    with torch.no_grad():  # it stays the matrix at the parameters that it was made with
        for p in model.parameters():
            p.mul_(1.5)
    moved = PVector.from_model(model).detach()
    close(F.mv(v), M @ v.to_torch())
    close(FIM(model, batches, PMatImplicit).mv(v), FIM(model, batches, PMatDense).mv(v))
    close(F.trace(), M.trace())
    close(F.get_diag(), M.diagonal())
    assert torch.equal(PVector.from_model(model).to_torch(), moved.to_torch())
    with memory_budget(1):  # nothing is kept from one product to the next
        close(F.mv(v), M @ v.to_torch())
    one_pass = iter(batches)
    with pytest.raises(ValueError, match="one-pass iterator"):
        FIM(model, one_pass, PMatImplicit)


def test_ewc():
    """The penalty of elastic weight consolidation, differentiable in the parameters of the model."""
    model, batch, _ = CASES["mlp"].make(5)
    F = FIM(model, batch, PMatKFAC)
    w = PVector.from_model(model).clone().detach()
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.1)
    penalty = F.vTMv(PVector.from_model(model) - w)
    penalty.backward()
    d = PVector.from_model(model).detach() - w
    close(PVector.from_model_grad(model), 2 * F.mv(d).to_torch())


def test_update_diag():
    model, batch, _ = CASES["convnet"].make(3)
    F = FIM(model, batch, PMatEKFAC)
    before = F.to_torch()
    assert torch.allclose(F.update_diag(batch).to_torch(), before)
    with torch.no_grad():
        for p in model.parameters():
            p.mul_(1.1)
    M = FIM(model, batch, PMatDense)
    F.update_diag(batch)
    close(F.trace(), M.trace())
    with pytest.raises(ValueError, match="no generator"):
        pickle.loads(pickle.dumps(F)).update_diag(batch)


def test_products_for_algorithms(F):
    F, M = F
    p = F.size(0)
    assert F.like.shape == (0,)
    assert (F.like.dtype, F.like.device) == (F.dtype, F.device)
    for lead in ((), (3,), (2, 3), (0,)):
        V = torch.randn(*lead, p)
        close(F.matvec(V), V @ M.T)
    V = torch.randn(2, p, requires_grad=True)
    (grad,) = torch.autograd.grad(F.matvec(V).sum(), V)
    close(grad, (M.T @ torch.ones(p)).expand(2, p))
    for wrong in (torch.randn(p - 1), torch.randn(2, p + 1), torch.tensor(1.0), torch.randn(p, 1)):
        with pytest.raises(ValueError, match="matvec: expected rows of"):
            F.matvec(wrong)
    with pytest.raises(ValueError, match="move one of them"):
        F.matvec(torch.randn(p, dtype=torch.float32))
    with pytest.raises(TypeError, match="use mv"):
        F.matvec(vector(F))
    assert F.symmetric
    assert not F.definite or float(torch.linalg.eigvalsh(M).min()) > -1e-9


def test_an_identity_of_no_dtype_takes_rows_of_any():
    lc = LayerCollection.from_model(nn.Linear(2, 1))
    for dtype in (torch.float32, torch.float64):
        out = PMatEye(lc, scaling=0.1).matvec(torch.ones(2, 3, dtype=dtype))
        assert out.dtype == dtype
        assert torch.equal(out, torch.full((2, 3), 0.1, dtype=dtype))
