"""Programs written for NNGeometry, as they are: what they write into matrices, ask of solutions and combine."""

import copy
import pickle
import warnings

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

from nngeometry import FIM, FIM_MonteCarlo, GramMatrix, Hessian, Jacobian, legacy
from nngeometry.backend import TorchFuncHessianBackend, TorchFuncJacobianBackend, TorchHooksJacobianBackend
from nngeometry.generator import Jacobian as GeneratorOf02
from nngeometry.layercollection import (
    AbstractLayer,
    Conv2dLayer,
    EmbeddingLayer,
    LayerCollection,
    LinearLayer,
    Parameter,
)
from nngeometry.metrics import FIM_Types
from nngeometry.object import (
    FMatDense,
    FVector,
    PFMapDense,
    PFMapFactored,
    PMatBlockDiag,
    PMatDense,
    PMatDiag,
    PMatEKFAC,
    PMatEKFACBlockDiag,
    PMatEye,
    PMatImplicit,
    PMatKFAC,
    PMatLowRank,
    PMatMixed,
    PMatQuasiDiag,
    PVector,
)
from nngeometry.object.map import random_pfmap
from nngeometry.object.vector import random_fvector, random_pvector
from nngeometry.utils import get_n_parameters, grad

pytestmark = pytest.mark.filterwarnings("ignore:.*old name of NNGeometry:DeprecationWarning")
close = torch.testing.assert_close


@pytest.fixture
def model():
    return nn.Sequential(nn.Conv2d(1, 2, 3), nn.BatchNorm2d(2), nn.Tanh(), nn.Flatten(), nn.Linear(8, 3)).eval()


@pytest.fixture
def loader():
    return DataLoader(TensorDataset(torch.randn(12, 1, 4, 4), torch.randint(3, (12,))), batch_size=5)


@pytest.fixture
def lc(model):
    return LayerCollection.from_model(model)


@pytest.fixture
def v(lc):
    return random_pvector(lc)


# `.data` is what the matrix consists of, however it is changed

HELD = [PMatDense, PMatBlockDiag, PMatDiag, PMatQuasiDiag, PMatKFAC, PMatEKFAC, PMatLowRank]


def tensors(value):
    if isinstance(value, torch.Tensor):
        return [value]
    return [
        t for part in (value.values() if isinstance(value, dict) else value) if part is not None for t in tensors(part)
    ]


def replaced(t):
    t.data = 2 * t.data


def scaled(t):
    t.data.mul_(2)


def written(t):
    t[...] = 2 * t


@pytest.mark.parametrize(
    "change", [replaced, scaled, written, lambda t: t.mul_(2), lambda t: t.detach().numpy().__imul__(2)]
)
@pytest.mark.parametrize("representation", HELD)
def test_a_matrix_changes_with_its_tensors(representation, change, model, loader, v):
    M = FIM(model, loader, representation)
    data = M.data
    before = M.to_torch()
    M.solve(v, 1e-2)  # nothing of this may be left
    for t in tensors(data[1] if representation is PMatEKFAC else data):
        change(t)
    whole = before.clone()
    factor = 2.0
    if representation in (PMatKFAC, PMatLowRank):
        factor = 4.0
    whole *= factor
    if representation is PMatKFAC:  # the normalisation has one block, not two factors
        s = M.layer_collection.slices()["1"]
        whole[s, s] /= 2
    close(M.to_torch(), whole)
    close(M.mv(v).to_torch(), whole @ v.to_torch())
    close(M.vTMv(v), v.to_torch() @ whole @ v.to_torch())
    damped = whole + 1e-1 * torch.eye(len(whole))
    close(M.solve(v, 1e-1).to_torch(), torch.linalg.solve(damped, v.to_torch()))
    close(copy.deepcopy(M).to_torch(), whole)
    close(pickle.loads(pickle.dumps(M)).trace(), whole.trace())
    assert M.dtype == v.dtype
    assert "parameters" in repr(M)


def test_a_running_average_of_factors(model, loader, v):
    M, now = FIM(model, loader, PMatKFAC), FIM(model, loader, PMatKFAC, "regression")
    old = {name: [t.clone() for t in tensors(f)] for name, f in M.data.items()}
    for name in M.data:
        for mine, new in zip(tensors(M.data[name]), tensors(now.data[name]), strict=True):
            mine.data = 0.9 * mine.data + 0.1 * new.data
    a, g = M.data["4"]
    close(a, 0.9 * old["4"][0] + 0.1 * now.data["4"][0])
    index = M.layer_collection.slices()["4"]
    rows = torch.cat([v.to_dict()["4"][0], v.to_dict()["4"][1].unsqueeze(1)], 1)
    expected = g @ rows @ a
    mine = M.mv(v).to_torch()[index]
    close(mine, torch.cat([expected[:, :-1].flatten(), expected[:, -1]]))


def test_items_of_lists_inside_of_data(model, loader, v):
    M, ref = FIM(model, loader, PMatKFAC), FIM(model, loader, PMatKFAC)
    for name in M.data:
        if isinstance(ref.data[name], tuple):
            M.data[name] = list(M.data[name])
            M.data[name][0] = 2 * ref.data[name][0]
            M.data[name][1] = 2 * ref.data[name][1]
    close(M.block("4").to_torch(), 4 * ref.block("4").to_torch())
    close(M.block("0").to_torch(), 4 * ref.block("0").to_torch())
    lists = {name: list(f) if isinstance(f, tuple) else f for name, f in ref.data.items()}
    ref.data = lists
    ref.data["4"][1] = 3 * ref.data["4"][1]
    close(ref.block("4").to_torch(), 0.75 * M.block("4").to_torch())


@pytest.mark.parametrize("representation", HELD)
def test_data_that_were_given_are_those_of_the_matrix(representation, model, loader, lc):
    given = copy.deepcopy(FIM(model, loader, representation).data)
    M = representation(lc, None, given)
    before = M.to_torch()
    N = representation(layer_collection=lc, generator=None, data=given)
    for t in tensors(given[1] if representation is PMatEKFAC else given):
        t.data = 3 * t.data
    for matrix in (M, N):
        assert not torch.allclose(matrix.to_torch(), before)
    close(M.to_torch(), N.to_torch())
    if isinstance(given, dict):
        assert M.data is given
        given["4"] = [0 * t for t in tensors(given["4"])] if isinstance(given["4"], tuple) else 0 * given["4"]
        assert not M.block("4").to_torch().any()
        assert not N.get_diag()[lc.slices()["4"]].any()


def test_data_of_wrong_shape_say_which(model, loader, v):
    M = FIM(model, loader, PMatKFAC)
    data = M.data
    before = M.to_torch()
    with pytest.raises(ValueError, match="layer '4' has 27 parameters, its tensors are of 12"):
        data["4"] = (torch.eye(4), torch.eye(3))
    close(M.to_torch(), before)
    data["4"][0].data = torch.eye(4)
    with pytest.raises(ValueError, match="layer '4' has 27 parameters"):
        M.mv(v)
    with pytest.raises(ValueError, match="its layers are not those of the matrix, the difference is '4'"):
        M.data = {name: f for name, f in FIM(model, loader, PMatKFAC).data.items() if name != "4"}


@pytest.mark.parametrize("representation", [PMatDense, PMatBlockDiag])
def test_data_of_a_product_are_its_tensors(representation, model, loader, v):
    product = FIM(model, loader, representation).mm(FIM(model, loader, representation, "regression"))
    whole = product.to_torch().clone()
    for t in tensors(product.data):
        t.data = 3 * t.data
    close(product.to_torch(), 3 * whole)
    close(product.mv(v).to_torch(), 3 * whole @ v.to_torch())
    assert not product.root.symmetric


# Solutions, powers and inverses


@pytest.mark.parametrize("representation", [PMatEKFAC, PMatDense, PMatDiag, PMatKFAC, PMatLowRank, PMatBlockDiag])
def test_small_eigenvalues_are_dropped_where_that_is_asked_for(representation, model, loader, v):
    M, cut = FIM(model, loader, representation), 1e-3
    l, q = torch.linalg.eigh(M.to_torch())
    inverse = (q * torch.where(l > cut, 1 / l, 0.0)) @ q.T
    close(M.solve(v, regul=cut, solve="lstsq").to_torch(), inverse @ v.to_torch())
    close(M.solve(v, cut, impl="lstsq").to_torch(), inverse @ v.to_torch())
    close(M.pinv(atol=cut).to_torch(), inverse)
    close(M.pinverse(cut).to_torch(), inverse)
    close(M.pow(-1, regul=cut, impl="lstsq").to_torch(), inverse)
    J = random_pfmap(M.layer_collection, (2, 3))
    close(M.solve(J, regul=cut, solve="lstsq").to_torch(), J.to_torch() @ inverse)
    relative = M.pinv(rtol=0.5, atol=1e-12).to_torch()
    close(relative, (q * torch.where(l > 0.5 * l.max(), 1 / l, 0.0)) @ q.T)
    for name in ("default", "solve", "svd", "eigendecomposition"):
        close(M.solve(v, 1e-1, solve=name).to_torch(), M.solve(v, 1e-1).to_torch())


def test_solutions_that_are_not_here_are_refused_by_name(model, loader, v):
    M = FIM(model, loader, PMatDense)
    for refused in ("nothing", torch.linalg.solve):
        with pytest.raises(NotImplementedError, match="leave it out, the solution is exact"):
            M.solve(v, 1e-2, solve=refused)
    with pytest.raises(TypeError, match="max_iter is of an iteration, and this matrix is solved exactly"):
        M.solve(v, 1e-2, max_iter=3)
    with pytest.raises(NotImplementedError, match="'lstsq' needs eigenvalues"):
        FIM(model, loader, PMatImplicit).solve(v, 1e-2, solve="lstsq")
    with pytest.raises(TypeError, match=r"write rtol=0\.001, in units of the largest eigenvalue, or atol=0\.001"):
        M.pinv(1e-3)
    with pytest.raises(TypeError, match="one value for each representation is of PMatMixed"):
        M.solve(v, 1e-2, solve={PMatDense: "lstsq"})
    with pytest.raises(NotImplementedError, match="strategy= other than 'kfac'"):
        FIM(model, loader, PMatKFAC, strategy="one_iter_kpsvd")
    with pytest.raises(NotImplementedError, match="eigendecomposition= is torch"):
        FIM(model, loader, PMatEKFAC, eigendecomposition=torch.linalg.eigh)
    close(FIM(model, loader, PMatKFAC, strategy="kfac").trace(), FIM(model, loader, PMatKFAC).trace())
    with pytest.raises(NotImplementedError, match="impl='nothing'"):
        M.pow(-1, impl="nothing")
    for thing in (M, GramMatrix(model, loader)):
        with pytest.raises(NotImplementedError, match="is not 'eigh' or 'svd'"):
            thing.compute_eigendecomposition(impl="nothing")


def test_conjugate_gradients_have_their_old_arguments(model, loader, v):
    M = FIM(model, loader, PMatImplicit)
    x = M.solve(v, regul=1e-1, M=FIM(model, loader, PMatDiag), x0=0.5 * v, rtol=1e-10, max_iter=500)
    close((M.mv(x) + 1e-1 * x).to_torch(), v.to_torch(), rtol=1e-7, atol=1e-7)


def test_factors_damped_one_by_one(model, loader, lc, v):
    M = FIM(model, loader, PMatKFAC, layer_collection=lc.select("4"))
    a, g = (t.clone() for t in M.data["4"])
    for use_pi in (True, False):
        pi = (a.trace() / g.trace() * len(g) / len(a)).sqrt() if use_pi else torch.tensor(1.0)
        da, dg = a + 0.1 * pi * torch.eye(len(a)), g + 0.1 / pi * torch.eye(len(g))
        for damped in (M.inv(1e-2, use_pi=use_pi), M.inv(1e-2, use_pi), M.inverse(1e-2, use_pi)):
            close(damped.data["4"][0], torch.linalg.inv(da))
            close(damped.data["4"][1], torch.linalg.inv(dg))
        close(M.pow(-1, 1e-2, use_pi).to_torch(), M.inv(1e-2, use_pi).to_torch())
        close(M.pow(2, regul=1e-2, use_pi=use_pi).data["4"][0], da @ da)
        close(M.pow(pow=2, regul=1e-2, use_pi=use_pi).data["4"][1], dg @ dg)
    close(M.pow(pow=2).to_torch(), M.to_torch() @ M.to_torch())
    close(M.inv(1e-2).to_torch(), torch.linalg.inv(M.to_torch() + 1e-2 * torch.eye(27)))
    with pytest.raises(ValueError, match="has an eigenvalue of"):
        (M - 2 * M).pow(0.5, regul=1e-8)


@pytest.mark.parametrize("kind", [PMatDense, PMatLowRank, FMatDense])
@pytest.mark.parametrize("impl", ["eigh", "svd"])
def test_eigenvalues_are_in_the_order_of_their_implementation(kind, impl, model, loader):
    M = GramMatrix(model, loader) if kind is FMatDense else FIM(model, loader, kind)
    M.compute_eigendecomposition(impl=impl)
    l, q = M.get_eigendecomposition()
    entries = M.to_torch().reshape(2 * [int(M.to_torch().numel() ** 0.5)])
    close((q * l) @ q.T, entries)
    if kind is not FMatDense:  # whose svd was turned round
        assert bool(((l.diff() <= 1e-12) if impl == "svd" else (l.diff() >= -1e-12)).all())


# Vectors, layers and collections


@pytest.mark.parametrize("representation", [*HELD, PMatImplicit, PMatEKFACBlockDiag])
def test_a_vector_with_more_layers_than_the_matrix(representation, model, loader, lc, v):
    part = lc.select("0", "4") if representation is not PMatDense else lc.select("4")
    M = FIM(model, loader, representation, layer_collection=part)
    mine = PVector(part, dict_repr={name: v.to_dict()[name] for name in part})
    close(M.mv(v).to_torch(), M.mv(mine).to_torch())
    close(M.vTMv(v), M.vTMv(mine))
    close(M.solve(v, 1e-1).to_torch(), M.solve(mine, 1e-1).to_torch())
    assert M.mv(v).layer_collection == part
    J = random_pfmap(lc, (2, 3))
    close(M.mapTMmap(J), M.mapTMmap(J.on(part)))
    fewer = PVector(lc.select("1"), torch.ones(4))
    with pytest.raises(ValueError, match="another layer collection"):
        M.mv(fewer)


def test_kinds_of_layers_are_classes(model, lc):
    assert [type(layer) is LinearLayer for layer in lc.layers.values()] == [False, False, True]
    assert [name for name, layer in lc.layers.items() if type(layer) in [LinearLayer, Conv2dLayer]] == ["0", "4"]
    assert lc["4"].__class__.__name__ == "LinearLayer"
    assert all(isinstance(layer, AbstractLayer) for layer in lc.layers.values())
    again = pickle.loads(pickle.dumps(lc))
    assert again == lc
    assert [type(layer) for layer in again.layers.values()] == [type(layer) for layer in lc.layers.values()]
    assert copy.deepcopy(lc) == lc

    class Mine(nn.Linear):
        pass

    assert type(LayerCollection.from_model(Mine(2, 2)).layers[""]) is LinearLayer

    class Linear(nn.Module):  # which has nothing but its name in common
        def __init__(self):
            super().__init__()
            self.weight = nn.Parameter(torch.ones(2, 2))

    assert type(LayerCollection.from_model(Linear()).layers[""]) is not LinearLayer
    assert Conv2dLayer(3, 4, (2, 2), False).bias is None
    assert Conv2dLayer(3, 4, (2, 2)) == LayerCollection.from_model(nn.Conv2d(3, 4, 2)).layers[""]
    layer = Conv2dLayer(3, 4, kernel_size=(2, 5))
    assert (layer.in_channels, layer.out_channels, layer.kernel_size) == (3, 4, (2, 5))
    assert (LinearLayer(3, 2).in_features, LinearLayer(3, 2).out_features) == (3, 2)
    assert Parameter(3, 2).numel() == 6
    with pytest.raises(TypeError, match="takes in_features, out_features, bias"):
        LinearLayer(1, 2, True, 3)
    embedding = EmbeddingLayer(7, 4)
    assert embedding.transposed
    assert not layer.transposed
    assert (embedding.num_embeddings, embedding.embedding_dim) == (7, 4)
    assert get_n_parameters(nn.Linear(3, 2)) == 8


@pytest.mark.parametrize("representation", [PMatKFAC, PMatEKFAC])
def test_the_order_without_biases_is_that_of_the_weights(representation):
    model = nn.Sequential(nn.Embedding(6, 2), nn.Flatten(), nn.Linear(6, 4, bias=False), nn.Linear(4, 3, bias=True))
    x = torch.randint(6, (12, 3))
    M = FIM(model, DataLoader(TensorDataset(x, x[:, 0] % 3), batch_size=5), representation)
    whole, mixed = M.to_torch(), M.to_torch(split_weight_bias=False)
    plain = slice(0, M.layer_collection.p_pos["3"])
    close(whole[plain, plain], mixed[plain, plain])
    close(M.get_diag(split_weight_bias=False), mixed.diagonal())
    assert not torch.allclose(whole.diagonal(), mixed.diagonal())


# Matrices


@pytest.mark.parametrize("reduction", ["sum", "diag"])
@pytest.mark.parametrize("representation", [*HELD, PMatImplicit, PMatEye])
def test_quadratic_forms_of_maps(representation, reduction, model, loader):
    M, J = FIM(model, loader, representation), Jacobian(model, loader)
    rows = J.to_torch()
    whole = M.to_torch()
    expected = torch.einsum("cnp,pq,cnq->cn", rows, whole, rows)
    close(M.mapTMmap(J, reduction=reduction), expected.sum(0) if reduction == "sum" else expected)
    close(M.mapTMmap(J), expected.sum(0))
    close(M.mmap(J).to_torch(), rows @ whole)
    with pytest.raises(ValueError, match="is not 'sum' or 'diag'"):
        M.mapTMmap(J, reduction="mean")


def test_matrices_and_maps_from_both_sides(model, loader, lc, v):
    M, J = FIM(model, loader, PMatDense), random_pfmap(lc, (3, 4))
    u, rows = random_fvector(4, 3), J.to_torch().flatten(0, 1)
    close((M @ J.adjoint()).adjoint().to_torch(), J.to_torch() @ M.to_torch())
    close((J.adjoint() @ J).to_torch(), rows.T @ rows)
    K = random_pfmap(lc, (3, 4))
    crossed = J.adjoint() @ K
    close(crossed.to_torch(), rows.T @ K.to_torch().flatten(0, 1))
    close(crossed.mv(v).to_torch(), crossed.to_torch() @ v.to_torch())
    close((v @ J.adjoint()).to_torch(), (J @ v).to_torch())
    close((u @ J).to_torch(), (J.adjoint() @ u).to_torch())
    for wrong in (lambda: J.adjoint() @ J.adjoint(), lambda: J @ J, lambda: J.adjoint() @ v, lambda: u @ J.adjoint()):
        with pytest.raises(TypeError):
            wrong()
    G = GramMatrix(model, loader)
    f = random_fvector(12, 3)
    close((f @ G).to_torch(), G.mv(f).to_torch())
    entries = G.to_torch().flatten(2).flatten(0, 1)
    close((G**2).to_torch().flatten(2).flatten(0, 1), entries @ entries)
    close(G.mTMm(G).to_torch().flatten(2).flatten(0, 1), entries @ entries @ entries)
    close(G.solveFVec(f, regul=1e-1).to_torch(), G.solve(f, 1e-1, solve="default").to_torch())
    with pytest.raises(NotImplementedError, match="is not 'default' or 'solve'"):
        G.solve(f, 1e-1, solve="cg")
    G.compute_eigendecomposition()
    close(G.project_from_diag(G.project_to_diag(f)).to_torch(), f.to_torch())


def test_the_factors_of_a_factored_map(model, loader, lc):
    part = lc.select("0", "4")
    J = Jacobian(model, loader, layer_collection=part, representation=PFMapFactored)
    for name in part:
        a, g = J.data[name]
        assert a.shape[:2] == (12, g.shape[2])
        assert g.shape[:2] == (3, 12)
        weight, bias = J.to_torch_layer(name)
        rows = torch.einsum("cnto,nti->cnoi", g, a)
        close(rows[..., :-1].reshape(weight.shape), weight)
        close(rows[..., -1], bias)
    with pytest.raises(AttributeError, match=r"layer '1' .BatchNorm2d. has no two factors"):
        Jacobian(model, loader, representation=PFMapFactored).data  # noqa: B018


@pytest.mark.parametrize("scaling", [None, 2.0, torch.tensor(0.1)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_identity_takes_vectors_of_any_dtype(scaling, dtype, model, loader, lc):
    default = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64 if dtype == torch.float32 else torch.float32)
    try:
        E = PMatEye(lc) if scaling is None else PMatEye(layer_collection=lc, scaling=scaling)
        v, s = random_pvector(lc, dtype=dtype), 1.0 if scaling is None else float(scaling)
        for M, c in ((E, s), (-1.5 * E, -1.5 * s), (E / 2, s / 2), (E.inv(0.5), 1 / (s + 0.5))):
            if isinstance(scaling, torch.Tensor) and scaling.dtype != torch.get_default_dtype():
                continue
            close(M.mv(v).to_torch(), c * v.to_torch())
            close(M.vTMv(v), c * v.dot(v))
            close(M.solve(v, regul=1.0).to_torch(), v.to_torch() / (c + 1.0))
            J = random_pfmap(lc, (2, 3), dtype=dtype)
            close(M.mv(J).to_torch(), c * J.to_torch())
            close((J @ M).to_torch(), c * J.to_torch())
            close(M.mapTMmap(J, "diag"), c * J.to_torch().square().sum(-1))
    finally:
        torch.set_default_dtype(default)
    if scaling == 2.0:
        D = FIM(model, loader, PMatDiag)
        for total in (D + E, E + D):
            assert total.dtype == D.dtype
            close(total.get_diag(), D.get_diag() + 2.0)
        close((D @ E).to_torch(), 2 * D.to_torch())
    with pytest.raises(ValueError, match="move one of them"):
        PMatEye(lc, dtype=torch.float32).mv(random_pvector(lc, dtype=torch.float64))


class ByHand(PMatMixed):
    """As programs define a mixed representation of their own."""

    def __init__(self, layer_collection, generator, data=None, examples=None, **options):
        made = PMatMixed.from_mapping(
            layer_collection,
            generator,
            data=data,
            examples=examples,
            default_representation=PMatDense,
            map_layers_to={LinearLayer: PMatKFAC},
            **options,
        )
        super().__init__(layer_collection, generator, made.layer_collection_each, made.layer_map, made.sub_pmats)


def test_mixed_matrices_as_they_were_made(model, loader, lc, v):
    M = FIM(model=model, loader=loader, representation=ByHand)
    dense, kfac = FIM(model, loader, PMatDense).to_torch(), FIM(model, loader, PMatKFAC)
    s = lc.slices()["4"]
    whole = torch.zeros_like(dense)
    whole[: s.start, : s.start] = dense[: s.start, : s.start]
    whole[s, s] = kfac.block("4").to_torch()
    close(M.to_torch(), whole)
    assert {k: list(c) for k, c in M.layer_collection_each.items()} == {PMatDense: ["0", "1"], PMatKFAC: ["4"]}
    assert M.layer_map == {"0": PMatDense, "1": PMatDense, "4": PMatKFAC}
    close(M.sub_pmats[PMatKFAC].to_torch(), whole[s, s])
    close(M.sub_pmats[PMatDense].to_torch(), whole[: s.start, : s.start])
    assert not hasattr(M, "update_diag")
    chosen = M.solve(v, 1e-3, solve={PMatDense: "lstsq"}).to_torch()
    close(chosen[: s.start], M.sub_pmats[PMatDense].solve(v, 1e-3, solve="lstsq").to_torch())
    close(chosen[s], M.solve(v, 1e-3).to_torch()[s])
    with pytest.raises(AttributeError, match="does not know its representations"):
        (2 * M).sub_pmats  # noqa: B018


def test_a_kind_of_layer_that_is_not_there(model, loader, lc):
    part = lc.select("4")
    source = TorchHooksJacobianBackend(model, layer_collection=part)
    M = PMatMixed.from_mapping(
        part, source, default_representation=PMatDiag, map_layers_to={Conv2dLayer: PMatKFAC}, examples=loader
    )
    close(M.trace(), PMatDense(part, source, examples=loader).trace())


def test_exact_blocks_beside_kronecker_factored_ones():
    model = nn.Sequential(nn.ConvTranspose2d(1, 2, 2), nn.Tanh(), nn.Flatten(), nn.Linear(32, 3), nn.LayerNorm(3))
    loader = DataLoader(TensorDataset(torch.randn(12, 1, 3, 3), torch.randint(3, (12,))), batch_size=5)
    M, B, E = (FIM(model, loader, kind) for kind in (PMatEKFACBlockDiag, PMatBlockDiag, PMatEKFAC))
    for _ in range(2):
        for name, same in (("0", B), ("3", E), ("4", B)):
            close(M.block(name).to_torch(), same.block(name).to_torch())
        M.update_diag(loader)
    with pytest.raises(ValueError, match="no generator"):
        copy.deepcopy(M).update_diag(loader)


# Where they come from


def test_a_matrix_from_the_generator_of_another(model, loader):
    M = FIM_MonteCarlo(model, loader, PMatImplicit, trials=5)
    close(PMatDiag(M.generator).trace(), M.trace())
    with pytest.raises(ValueError, match="the generator keeps no loader: give examples=loader too"):
        PMatDiag(FIM(model, next(iter(loader)), PMatImplicit).generator)


def test_the_covariance_of_a_sampled_regression(model, loader):
    generator = torch.Generator()
    one, four = (
        FIM_MonteCarlo(
            model, loader, PMatDense, "regression", trials=3, generator=generator.manual_seed(0), **covariance
        )
        for covariance in ({}, {"covariance": torch.tensor(4.0)})
    )
    close(four.to_torch(), 4 * one.to_torch())
    for wrong, sentence in (
        ({"variant": "regression", "covariance": torch.eye(3)}, "one positive number"),
        ({"variant": "regression", "covariance": -1.0}, "one positive number"),
        ({"covariance": 2.0}, "is for variant='regression'"),
    ):
        with pytest.raises(ValueError, match=sentence):
            FIM_MonteCarlo(model, loader, PMatDense, **wrong)
    assert FIM(model, loader, PMatDiag, FIM_Types.REGRESSION).trace() > 0


@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_the_fourth_argument_of_a_hessian(reduction, model, loader, lc):
    def loss(f, y):
        return F.cross_entropy(f, y, reduction=reduction)

    expected = Hessian(model, loader, PMatDense, nn.CrossEntropyLoss(reduction=reduction)).to_torch()
    for H in (
        Hessian(model, loader, PMatDense, loss),
        Hessian(model, loader, PMatDense, function=loss),
        Hessian(model, loader, PMatDense, loss, lc),
    ):
        close(H.to_torch(), expected)


@pytest.mark.parametrize("scale", [1.0, 0.0])
def test_a_loss_of_a_minibatch_is_a_mean_or_a_sum(scale, model, loader):
    batches = [(x, scale * model(x).detach()) for x, _ in loader]  # of loss zero, to begin with

    for reduction in ("mean", "sum"):
        H = Hessian(model, batches, PMatDense, lambda f, y, r=reduction: 3 * F.mse_loss(f, y, reduction=r))
        expected = 3 * Hessian(model, batches, PMatDense, nn.MSELoss(reduction=reduction)).to_torch()
        close(H.to_torch(), expected)
    weight = torch.tensor([1.0, 2.0, 3.0])
    for mixed, data in (
        (lambda f, y: F.mse_loss(f, y).sqrt(), batches),
        (lambda f, y: F.cross_entropy(f, y, weight=weight), loader),
    ):
        with pytest.raises(ValueError, match="neither their mean nor their sum"):
            Hessian(model, data, PMatDense, mixed)


def test_a_look_at_the_loss_leaves_the_random_state_alone(model):
    batches = []

    def seen(f, y):
        batches.append(y)
        return F.cross_entropy(f, y, reduction="none")

    loader = DataLoader(TensorDataset(torch.randn(8, 1, 4, 4), torch.randint(3, (8,))), batch_size=8, shuffle=True)
    torch.manual_seed(3)
    [(_, y)] = loader
    torch.manual_seed(3)
    before = torch.get_rng_state()
    Hessian(model, loader, PMatDense, seen)
    assert all(torch.equal(b, y) for b in batches if len(b) == 8)
    assert torch.equal(torch.get_rng_state(), before)


def test_a_function_of_the_prediction(model, loader, lc, v):
    mine = PMatImplicit(
        generator=TorchFuncJacobianBackend(model=model, function=lambda p, _: 2 * p),
        examples=loader,
        layer_collection=lc,
    )
    close(mine.mv(v).to_torch(), (4 * FIM(model, loader, PMatImplicit, "regression")).mv(v).to_torch())


def test_what_backends_gave(model, loader, lc, v):
    source = TorchHooksJacobianBackend(model, layer_collection=lc)
    M = FIM(model, loader, PMatDense, "regression")
    close(source.get_covariance_matrix(loader), M.to_torch())
    close(source.get_covariance_diag(loader, lc), M.get_diag())
    close(source.get_covariance_layer_blocks(examples=loader)["4"], M.block("4").to_torch())
    assert list(source.get_kfac_blocks(loader)) == list(source.get_covariance_quasidiag(loader)) == ["0", "1", "4"]
    close(source.implicit_mv(v, loader).to_torch(), M.mv(v).to_torch())
    close(source.implicit_vTMv(v, loader), M.vTMv(v))
    close(source.implicit_trace(loader), M.trace())
    close(source.implicit_Jv(v, loader).to_torch(), source.get_jacobian(loader) @ v.to_torch())
    evecs, diags = FIM(model, loader, PMatEKFAC, "regression").data
    for name, diag in source.get_kfe_diag(evecs, loader).items():
        close(diag, diags[name])
    hessian = TorchFuncHessianBackend(model, F.cross_entropy)
    H = Hessian(model, loader, PMatDense, nn.CrossEntropyLoss())
    close(hessian.get_covariance_matrix(loader, lc), H.to_torch())
    close(hessian.implicit_mv(v, loader, lc).to_torch(), H.mv(v).to_torch())
    of_0_2 = GeneratorOf02(layer_collection=lc, model=model, loader=loader, n_output=3)
    close(of_0_2.get_covariance_matrix(), M.to_torch())


def test_the_switch_of_convolutions_does_nothing(model, loader):
    from nngeometry.backend.torch_hooks.grads_conv import use_conv_impl_for_convs

    from nngeometry.backend import torch_hooks
    from nngeometry.generator import jacobian

    legacy.warn.cache_clear()
    with pytest.warns(DeprecationWarning, match="there is one implementation"), jacobian.use_unfold_impl_for_convs():
        FIM(model, loader, PMatDiag)
    with torch_hooks.use_conv_impl_for_convs(), use_conv_impl_for_convs():
        pass


class TwoHeads(nn.Module):
    def __init__(self):
        super().__init__()
        self.body, self.head, self.other = nn.Linear(4, 3), nn.Linear(3, 2), nn.Linear(3, 2, bias=False)
        self.ids, self.norm = nn.Embedding(5, 2), nn.LayerNorm(3)

    def forward(self, x):
        return self.head(torch.tanh(self.body(x)))


@pytest.mark.parametrize("knowingly", [True, False])
@pytest.mark.parametrize("representation", [*HELD, PMatImplicit])
def test_layers_that_are_not_called(representation, knowingly):
    model, batch = TwoHeads(), (torch.randn(6, 4),)
    called = LayerCollection.from_model(model, "body", "head")
    expected = FIM(model, batch, representation, "regression", layer_collection=called)
    if knowingly:
        lc = LayerCollection.from_model(model, ignore_uncalled=True)
        M = FIM(model, batch, representation, "regression", layer_collection=lc)
    else:
        lc = LayerCollection.from_model(model)
        M = representation(generator=TorchHooksJacobianBackend(model), examples=batch, layer_collection=lc)
    close(M.trace(), expected.trace())
    whole = M.to_torch()
    mine = torch.cat([torch.arange(s.start, s.stop) for name, s in lc.slices().items() if name in called])
    close(whole[mine][:, mine], expected.to_torch())
    close(whole.square().sum(), expected.to_torch().square().sum())
    v = random_pvector(lc)
    close(
        M.solve(v, 1e-1).to_torch(),
        torch.linalg.solve(whole + 0.1 * torch.eye(len(whole)), v.to_torch()),
        rtol=1e-5,
        atol=1e-5,
    )


def test_layers_that_are_not_called_are_refused_unless_that_is_known():
    model, batch = TwoHeads(), (torch.randn(6, 4),)
    with pytest.raises(ValueError, match=r"was never called.*ignore_uncalled=True"):
        FIM(model, batch, PMatDiag)
    lc = LayerCollection.from_model(model, ignore_uncalled=True)
    J = Jacobian(model, batch, layer_collection=lc)
    assert not J.to_torch_layer("ids")[0].any()
    assert J.to_torch_layer("body")[0].any()
    assert lc.exclude("body").ignore_uncalled
    nothing = PMatDense(generator=TorchHooksJacobianBackend(model, lambda x: x[:, :2] * 1.0), examples=batch)
    assert not nothing.to_torch().any()


def test_gradients_with_respect_to_the_vector_of_a_model(model):
    w = PVector.from_model(model)
    loss = model(torch.randn(2, 1, 4, 4)).square().sum()
    truth = torch.autograd.grad(loss, list(model.parameters()), retain_graph=True)
    close(grad(loss, w).to_torch(), torch.cat([g.flatten() for g in truth]))


def test_old_arguments_by_keyword(model, loader, v):
    M = FIM(model=model, loader=loader, representation=PMatDense, variant="classif_logits", device="cpu")
    close(M.solve(x=v, regul=1e-2).to_torch(), M.solve(v, 1e-2).to_torch())
    close(M.solve(v=v, regul=1e-2).to_torch(), M.solve(v, 1e-2).to_torch())
    modules = M.layer_collection.get_layerid_module_map(model)
    assert M.layer_collection.parameters(layerid_to_module=modules) == list(model.parameters())
    close(M.get_block_torch("4", M.layer_collection["4"]), M.block("4").to_torch())
    assert isinstance(
        PFMapDense(generator=None, data=torch.ones(2, 3, len(v.to_torch())), layer_collection=v.layer_collection),
        PFMapDense,
    )
    assert isinstance(FVector(torch.ones(1, 2)), FVector)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        v.to_torch_layer("4")
