"""Old names of NNGeometry: where they are, what they say, what they return, and the numbers that differ on purpose."""

import copy
import importlib
import pickle
import warnings

import pytest
import torch
from oracle import HERE
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

import nngeometry
from nngeometry import FIM, EmpiricalFisher, FIM_MonteCarlo, Hessian, legacy
from nngeometry.backend import TorchFuncHessianBackend, TorchHooksJacobianBackend
from nngeometry.generator import Jacobian
from nngeometry.layercollection import Conv2dLayer, LayerCollection, LinearLayer
from nngeometry.maths import kronecker
from nngeometry.object import (
    FMatDense,
    FVector,
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
    PMatMixed,
    PMatQuasiDiag,
    PushForwardDense,
    PushForwardImplicit,
    PVector,
)
from nngeometry.object.map import random_pfmap
from nngeometry.object.vector import random_fvector, random_pvector
from nngeometry.solve import cg
from nngeometry.utils import display_correl, grad

quiet = pytest.mark.filterwarnings("ignore:.*old name of NNGeometry:DeprecationWarning")


@pytest.fixture(autouse=True)
def _warn_again():
    legacy.warn.cache_clear()


@pytest.fixture
def model():
    return nn.Sequential(
        nn.Conv2d(2, 3, 2), nn.Tanh(), nn.Conv2d(3, 2, 2, bias=False), nn.Flatten(), nn.Tanh(), nn.Linear(8, 3)
    )


@pytest.fixture
def loader():
    return DataLoader(TensorDataset(torch.randn(12, 2, 4, 4), torch.randint(3, (12,))), batch_size=5)


@pytest.fixture
def vector(model):
    return random_pvector(LayerCollection.from_model(model))


# Where the names are

NAMES = {
    "nngeometry": "FIM FIM_MonteCarlo Hessian GradientSecondMoment Jacobian GramMatrix",
    "nngeometry.metrics": "FIM FIM_MonteCarlo GradientSecondMoment",
    "nngeometry.object": "FVector PVector PMatBlockDiag PMatDense PMatDiag PMatEKFAC PMatImplicit PMatKFAC "
    "PMatLowRank PMatQuasiDiag PMatMixed PMatEKFACBlockDiag PMatEye FMatDense PFMapDense "
    "PFMapFactored PFMapImplicit PushForwardDense PushForwardImplicit PullBackDense",
    "nngeometry.object.pspace": "PMatAbstract PMatBlockDiag PMatDense PMatDiag PMatEKFAC PMatImplicit PMatKFAC "
    "PMatLowRank PMatQuasiDiag PMatMixed PMatEKFACBlockDiag PMatEye PVector",
    "nngeometry.object.vector": "PVector FVector random_pvector random_pvector_dict random_fvector",
    "nngeometry.object.map": "PFMap PFMapDense PFMapFactored PFMapImplicit random_pfmap PushForwardDense "
    "PushForwardImplicit PullBackDense",
    "nngeometry.object.fspace": "FMatAbstract FMatDense",
    "nngeometry.jacobian": "Jacobian",
    "nngeometry.gram": "GramMatrix",
    "nngeometry.layercollection": "LayerCollection LinearLayer Conv1dLayer Conv2dLayer ConvTranspose2dLayer "
    "BatchNorm1dLayer BatchNorm2dLayer LayerNormLayer GroupNormLayer EmbeddingLayer WeightNorm1dLayer "
    "WeightNorm2dLayer Cosine1dLayer Affine1dLayer",
    "nngeometry.layers": "Cosine1d WeightNorm1d WeightNorm2d Affine1d",
    "nngeometry.maths": "kronecker",
    "nngeometry.utils": "grad display_correl",
    "nngeometry.backend": "TorchHooksJacobianBackend TorchFuncHessianBackend",
    "nngeometry.backend.torch_hooks.torch_hooks": "TorchHooksJacobianBackend",
    "nngeometry.generator": "Jacobian",
    "nngeometry.generator.jacobian": "Jacobian",
    "nngeometry.hessian": "Hessian",
    "nngeometry.solve": "cg",
}


@pytest.mark.parametrize("module", NAMES)
def test_names_are_where_they_were(module):
    found = importlib.import_module(module)
    assert [name for name in NAMES[module].split() if not hasattr(found, name)] == []


def test_names_that_are_kept_do_not_warn(model, loader, vector):
    M = FIM(model=model, loader=loader, representation=PMatKFAC, variant="classif_logits", device=HERE, n_output=3)
    M.mv(vector), M.vTMv(vector), M.solve(vector, regul=1e-3), M.trace(), M.get_diag(), M.to_torch(), M.size(), M.data
    vector.to_dict(), vector.to_torch(), vector.vector_repr, vector.dict_repr
    PMatDense(generator=TorchHooksJacobianBackend(model), layer_collection=M.layer_collection, examples=loader)


# What old names say

WARNED = {
    "get_dense_tensor": (lambda M, v, model: M.get_dense_tensor(), r"to_torch\(\)"),
    "frobenius_norm": (lambda M, v, model: M.frobenius_norm(), r"norm\(\)"),
    "inverse": (lambda M, v, model: M.inverse(1e-2), r"inv\(regul\)"),
    "solve": (lambda M, v, model: M.solve(v, 1e-2, impl="default"), r"solve\(b, regul\)"),
    "solvePVec": (lambda M, v, model: M.solvePVec(v, 1e-2), "solve"),
    "mm": (lambda M, v, model: M.mm(M), "M @ other"),
    "pow": (lambda M, v, model: M.pow(-1, 1e-2), "inv"),
    "split_weight_bias": (lambda M, v, model: M.to_torch(split_weight_bias=False), "to_torch"),
    "eigendecomposition": (lambda M, v, model: M.compute_eigendecomposition(), "eig"),
    "get_flat_representation": (lambda M, v, model: v.get_flat_representation(), r"to_torch\(\)"),
    "get_dict_representation": (lambda M, v, model: v.get_dict_representation(), r"to_dict\(\)"),
    "get_layerid_module_maps": (
        lambda M, v, model: M.layer_collection.get_layerid_module_maps(model),
        "get_submodule",
    ),
    "Jacobian": (lambda M, v, model: Jacobian(model, n_output=3), "nngeometry.Jacobian"),
    "ignore_unsupported_layers": (
        lambda M, v, model: LayerCollection.from_model(model, ignore_unsupported_layers=True),
        "every layer is supported",
    ),
}


@pytest.mark.parametrize("name", WARNED)
def test_old_names_warn_once_with_the_new_spelling(name, model, loader, vector):
    use, new = WARNED[name]
    M = FIM(model, loader, PMatKFAC)
    with pytest.warns(DeprecationWarning, match=f"old name of NNGeometry: write .*{new}") as caught:
        use(M, vector, model)
    assert len(caught) == 1
    assert caught[0].filename == __file__
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        use(M, vector, model)


# `.data`

LAYOUTS = [PMatDense, PMatBlockDiag, PMatDiag, PMatQuasiDiag, PMatKFAC, PMatEKFAC, PMatLowRank]


def tensors(value):
    if isinstance(value, torch.Tensor):
        return [value]
    items = value.values() if isinstance(value, dict) else value
    return [t for v in items if v is not None for t in tensors(v)]


def test_data_has_the_layout_of_nngeometry(model, loader):
    lc = LayerCollection.from_model(model)
    p, sizes = lc.numel(), {name: layer.numel() for name, layer in lc.layers.items()}
    assert FIM(model, loader, PMatDense).data.shape == (p, p)
    assert FIM(model, loader, PMatDiag).data.shape == (p,)
    assert {k: b.shape for k, b in FIM(model, loader, PMatBlockDiag).data.items()} == {
        k: (n, n) for k, n in sizes.items()
    }
    quasi = FIM(model, loader, PMatQuasiDiag).data
    assert [(d.shape, None if c is None else c.shape) for d, c in quasi.values()] == [
        ((27,), (3, 2, 2, 2)),
        ((24,), None),
        ((27,), (3, 8)),
    ]
    factors = FIM(model, loader, PMatKFAC).data
    assert list(factors) == ["0", "2", "5"]
    assert [(a.shape, g.shape) for a, g in factors.values()] == [
        ((9, 9), (3, 3)),
        ((12, 12), (2, 2)),
        ((9, 9), (3, 3)),
    ]
    evecs, diags = FIM(model, loader, PMatEKFAC).data
    assert {k: (a.shape, g.shape) for k, (a, g) in evecs.items()} == {
        k: (a.shape, g.shape) for k, (a, g) in factors.items()
    }
    assert {k: d.shape for k, d in diags.items()} == {k: (n,) for k, n in sizes.items()}
    assert FIM(model, loader, PMatLowRank).data.shape == (12 * 2, 1, p)


def test_data_of_kfac_are_the_factors(model, loader):
    M = FIM(model, loader, PMatKFAC)
    a, g = M.data["5"]
    whole = kronecker(g, a)  # rows of the weight, the bias in the last column
    order = torch.cat([torch.arange(24).view(3, 8), torch.arange(24, 27).view(3, 1)], 1).flatten()
    torch.testing.assert_close(M.block("5").to_torch()[order][:, order], whole)


@pytest.mark.parametrize("representation", LAYOUTS)
def test_data_is_read_and_assigned(representation, model, loader):
    M = FIM(model, loader, representation)
    other = EmpiricalFisher(model, loader, representation)
    truth = other.to_torch()
    M.data = other.data
    torch.testing.assert_close(M.to_torch(), truth)
    made = representation(M.layer_collection, data=other.data)
    torch.testing.assert_close(made.to_torch(), truth)


@pytest.mark.parametrize("representation", [r for r in LAYOUTS if r is not PMatQuasiDiag])
def test_tensors_of_data_are_those_of_the_matrix(representation, model, loader):
    M = FIM(model, loader, representation)
    M.solve(random_pvector(M.layer_collection), 1e-2)  # computes what would be stale afterwards
    last = tensors(M.data)[-1]
    last.mul_(4.0)
    changed = M.to_torch()
    assert not torch.equal(changed, FIM(model, loader, representation).to_torch())
    torch.testing.assert_close(representation(M.layer_collection, data=copy.deepcopy(M).data).to_torch(), changed)
    v = random_pvector(M.layer_collection)
    expected = torch.linalg.solve(changed + 1e-2 * torch.eye(len(changed)), v.to_torch())
    torch.testing.assert_close(M.solve(v, 1e-2).to_torch(), expected)


@pytest.mark.parametrize("representation", [PMatBlockDiag, PMatQuasiDiag, PMatKFAC, PMatEKFAC])
def test_items_of_data_are_assigned(representation, model, loader):
    M, other = FIM(model, loader, representation), EmpiricalFisher(model, loader, representation)
    mine = M.data if isinstance(M.data, dict) else M.data[1]
    theirs = other.data if isinstance(other.data, dict) else other.data[1]
    if representation is PMatEKFAC:
        M.data[0]["2"] = other.data[0]["2"]
    mine["2"] = list(theirs["2"]) if isinstance(theirs["2"], tuple) else theirs["2"]
    torch.testing.assert_close(M.block("2").to_torch(), other.block("2").to_torch())
    assert not torch.allclose(M.block("0").to_torch(), other.block("0").to_torch())
    with pytest.raises(KeyError, match="the matrix has 0, 2, 5"):
        mine["nobody"] = theirs["2"]


def test_a_matrix_whose_data_were_read_is_copied_and_pickled(model, loader):
    M = FIM(model, loader, PMatKFAC)
    assert M.data is M.data
    for twin in (copy.deepcopy(M), pickle.loads(pickle.dumps(M))):
        twin.data["0"][0].mul_(2.0)
        assert not torch.allclose(twin.to_torch(), M.to_torch())


@quiet
def test_data_of_a_product_are_read(model, loader):
    M = FIM(model, loader, PMatDense)
    product = M.mm(FIM(model, loader, PMatDense, "regression"))
    torch.testing.assert_close(product.data, product.to_torch())
    assert not product.root.symmetric


def test_data_of_a_matrix_that_has_changed_since(model, loader):
    M = FIM(model, loader, PMatEKFAC)
    evecs, diags = M.data
    diags.update({"2": 2 * diags["2"]})
    torch.testing.assert_close(M.block("2").trace(), diags["2"].sum())
    M.update_diag(loader)
    with pytest.raises(RuntimeError, match=r"read \.data again"):
        diags["2"] = evecs["2"][0]


def test_data_that_does_not_exist(model, loader):
    M = FIM(model, loader, PMatKFAC)
    with pytest.raises(AttributeError, match=r"use to_torch\(\)"):
        (M + FIM(model, loader, PMatDiag)).data  # noqa: B018
    with pytest.raises(ValueError, match="parameters for a matrix of"):
        PMatDense(M.layer_collection, data=M.to_torch()).data = torch.eye(3)


def test_layers_without_kronecker_form_and_embeddings_have_their_own_layout():
    model = nn.Sequential(nn.Embedding(7, 4), nn.LayerNorm(4), nn.Flatten(), nn.Linear(8, 3))
    ids = torch.randint(7, (10, 2))
    for representation in (PMatKFAC, PMatEKFAC):
        M = FIM(model, (ids,), representation)
        truth = M.to_torch()
        data = M.data
        torch.testing.assert_close(M.to_torch(), truth)
        torch.testing.assert_close(representation(M.layer_collection, data=data).to_torch(), truth)
    a, g = FIM(model, (ids,), PMatKFAC).data["0"]
    assert (a.shape, g.shape) == ((7,), (4, 4))  # the factor of an embedding is diagonal


# Constructors


@quiet
def test_matrices_from_a_generator(model, loader, vector):
    lc = vector.layer_collection
    truth = FIM(model, loader, PMatDense, "regression").to_torch()
    backend = TorchHooksJacobianBackend(model, layer_collection=lc)
    of_0_2 = Jacobian(layer_collection=lc, model=model, loader=loader, function=lambda *d: model(d[0]), n_output=3)
    of_0_3 = Jacobian(model, lambda *d: model(d[0]), 3)
    for M in (
        PMatDense(of_0_2),
        PMatDense(Jacobian(model, loader, lambda *d: model(d[0]), n_output=3)),
        PMatDense(of_0_3, None, loader),
        PMatDense(generator=of_0_3, examples=loader),
        PMatDense(generator=backend, examples=loader),
        PMatDense(lc, backend, examples=loader),
        PMatDense(generator=backend, data=truth),
    ):
        torch.testing.assert_close(M.to_torch(), truth)
    part = lc.select("5")
    torch.testing.assert_close(
        PMatKFAC(part, backend, examples=loader).to_torch(),
        FIM(model, loader, PMatKFAC, "regression").block("5").to_torch(),
    )
    with pytest.raises(ValueError, match="n_output=2, but the function returns 3"):
        PMatDense(Jacobian(model, loader, n_output=2))


@quiet
@pytest.mark.parametrize("representation", [PMatDense, PMatLowRank, PMatImplicit])
def test_centred_generator(representation, model, loader, vector):
    generator = Jacobian(model, n_output=3, centering=True)
    J = generator.get_jacobian(loader)
    assert J.mean(1).abs().max() < 1e-12
    M = representation(generator=generator, examples=loader)
    torch.testing.assert_close(M.to_torch(), torch.einsum("cnp,cnq->pq", J, J) / 12)


@quiet
def test_centring_of_other_representations_is_refused(model, loader):
    with pytest.raises(NotImplementedError, match="GradientCovariance"):
        PMatKFAC(generator=Jacobian(model, centering=True), examples=loader)


@quiet
def test_positional_options_of_the_metrics(model, loader):
    truth = FIM(model, loader, PMatDiag).get_diag()
    assert torch.equal(FIM(model, loader, PMatDiag, 3).get_diag(), truth)
    assert torch.equal(FIM(model, loader, PMatDiag, 3, "classif_logits", HERE).get_diag(), truth)
    assert torch.equal(FIM(model, loader, PMatDiag, "classif_logits", HERE, lambda *d: model(d[0])).get_diag(), truth)
    assert FIM_MonteCarlo(model, loader, PMatDiag, "classif_logits", 2, HERE).size() == (78, 78)
    with pytest.raises(ValueError, match="n_output=4"):
        FIM(model, loader, PMatDiag, 4)
    assert torch.equal(FIM(model, loader, PMatDiag, 3, device=HERE).get_diag(), truth)
    with pytest.raises(TypeError, match="multiple values for argument 'variant'"):
        FIM(model, loader, PMatDiag, 3, variant="classif_logits")
    with pytest.raises(TypeError, match="positional options, there are variant, device"):
        FIM(model, loader, PMatDiag, "classif_logits", HERE, None, None, False, 3)


def test_log_softmax_is_a_variant(model, loader):
    torch.testing.assert_close(
        FIM(model, loader, PMatDiag, "classif_logsoftmax", function=lambda x, y: model(x).log_softmax(1)).get_diag(),
        FIM(model, loader, PMatDiag).get_diag(),
    )


def test_mixed_by_kinds_of_layers(model, loader):
    M = FIM(
        model,
        loader,
        PMatMixed,
        default_representation=PMatDiag,
        map_layers_to={Conv2dLayer: PMatKFAC, LinearLayer: PMatEKFAC, torch.nn.LSTM: PMatDense},
    )
    for name, representation in (("0", PMatKFAC), ("5", PMatEKFAC)):
        torch.testing.assert_close(M.block(name).to_torch(), FIM(model, loader, representation).block(name).to_torch())


def test_eye_with_a_tensor(vector):
    lc = vector.layer_collection
    for M in (PMatEye(lc, torch.tensor(2.0)), PMatEye(lc, scaling=2.0, device=vector.device)):
        torch.testing.assert_close(M.mv(vector).to_torch(), 2 * vector.to_torch())


@quiet
def test_update_diag_on_the_examples_of_the_estimation(model, loader):
    M = FIM(model, loader, PMatEKFAC, n_output=3)
    with torch.no_grad():
        model[5].weight.mul_(2.0)
    M.update_diag()
    moved = M.to_torch()
    torch.testing.assert_close(FIM(model, loader, PMatEKFAC).trace(), M.trace())
    M.update_diag(loader)
    torch.testing.assert_close(M.to_torch(), moved)
    for derived in (2 * M, M.inverse(1e-2)):
        with pytest.raises(ValueError, match="no generator"):
            derived.update_diag()


# Matrices and vectors


@quiet
@pytest.mark.parametrize("representation", [PMatKFAC, PMatEKFAC])
def test_order_with_the_bias_beside_its_row(representation, model, loader):
    M = FIM(model, loader, representation)
    mixed = M.to_torch(split_weight_bias=False)
    torch.testing.assert_close(M.get_diag(False), mixed.diagonal())
    torch.testing.assert_close(M.get_diag(split_weight_bias=True), M.to_torch().diagonal())
    if representation is PMatKFAC:
        start = M.layer_collection.p_pos["5"]
        torch.testing.assert_close(mixed[start:, start:], kronecker(*M.data["5"][::-1]))


@quiet
def test_kronecker_factored_eigenvectors(model, loader):
    M = FIM(model, loader, PMatEKFAC)
    for split in (True, False):
        dense = M.to_torch(split_weight_bias=split)
        for name, q in M.get_KFE(split_weight_bias=split).items():
            s = M.layer_collection.slices()[name]
            torch.testing.assert_close((q * M.data[1][name]) @ q.T, dense[s, s])


@quiet
def test_eigendecompositions(model, loader, vector):
    M = FIM(model, loader, PMatDense)
    M.compute_eigendecomposition()
    l, q = M.get_eigendecomposition()
    torch.testing.assert_close((q * l) @ q.T, M.to_torch())
    assert bool((l.diff() >= 0).all())
    torch.testing.assert_close(M.project_from_diag(M.project_to_diag(vector)).to_torch(), vector.to_torch())
    low = FIM(model, loader, PMatLowRank)
    low.compute_eigendecomposition()
    l, q = low.get_eigendecomposition()
    torch.testing.assert_close((q * l) @ q.T, M.to_torch())
    kfac = FIM(model, loader, PMatKFAC)
    kfac.compute_eigendecomposition()
    evals, evecs = kfac.get_eigendecomposition()
    assert len(evals) == 3
    (l, _), (q, _) = evals["5"], evecs["5"]
    torch.testing.assert_close((q * l) @ q.T, kfac.data["5"][0])


@quiet
def test_an_inverse_keeps_its_data_and_layer_collection(model, loader):
    inverse = FIM(model, loader, PMatEKFAC).inverse(regul=1e-2)
    assert list(inverse.data[1]) == list(inverse.generator.layer_collection.layers)


@quiet
def test_powers_of_a_regularised_matrix(model, loader):
    M = FIM(model, loader, PMatEKFAC)
    torch.testing.assert_close(M.pow(-1, regul=1e-2).to_torch(), M.inv(1e-2).to_torch())


def test_the_form_of_a_vector_with_more_layers(model, loader, vector):
    part = vector.layer_collection.select("5")
    M = FIM(model, loader, PMatKFAC, layer_collection=part)
    mine = PVector(part, dict_repr={"5": vector.to_dict()["5"]})
    torch.testing.assert_close(M.vTMv(vector), M.vTMv(mine))
    with pytest.raises(ValueError, match="another layer collection"):
        FIM(model, loader, PMatKFAC).vTMv(mine)


@quiet
def test_vectors(model):
    lc = LayerCollection.from_model(model)
    v = PVector(lc, vector_repr=torch.randn(lc.numel()))
    w = PVector(lc, dict_repr=v.dict_repr)
    assert torch.equal(w.vector_repr, v.get_flat_representation())
    assert all(isinstance(ts, tuple) for ts in w.to_dict().values())
    assert torch.equal(FVector(vector_repr=torch.ones(2, 3)).get_flat_representation(), torch.ones(2, 3))


@quiet
def test_layers_and_collections(model):
    lc = LayerCollection.from_model(model)
    layer = lc.layers["0"]
    assert (layer.weight.size, layer.weight.numel(), layer.bias.numel()) == ((3, 2, 2, 2), 24, 3)
    assert layer.has_bias()
    assert lc["2"].bias is None
    assert isinstance(layer, Conv2dLayer)
    assert not isinstance(layer, LinearLayer)
    modules, names = lc.get_layerid_module_maps(model)
    assert names[modules["5"]] == "5"
    assert all(p is q for p, q in zip(lc.parameters(modules), lc.parameters(model), strict=True))
    assert dict(lc.named_parameters(modules)).keys() == dict(lc.named_parameters(model)).keys()
    by_hand = LayerCollection()
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear | nn.Conv2d):
            by_hand.add_layer(f"{name}.{module}", LayerCollection._module_to_layer(module))
    assert by_hand == lc
    assert LinearLayer(in_features=8, out_features=3) == LayerCollection.from_model(nn.Linear(8, 3))[""]


def test_grad_with_respect_to_the_parameters_behind_a_vector(model, loader):
    x, y = next(iter(loader))
    w = PVector.from_model(model)
    loss = F.cross_entropy(model(x), y)
    found = grad(loss, w, retain_graph=True)
    loss.backward()
    torch.testing.assert_close(found.to_torch(), PVector.from_model_grad(model).to_torch())
    with pytest.raises(RuntimeError, match="from_model"):
        grad(loss, w.detach())


def test_display_correl(model, loader):
    class Axis:
        def imshow(self, image):
            self.image = image

    axis = Axis()
    display_correl(FIM(model, loader, PMatDense), axis)
    assert axis.image.shape == (78, 78)
    assert float(axis.image.max()) <= 1


# Function space


@quiet
def test_maps_and_kernels_from_a_generator(model, loader, vector):
    lc = vector.layer_collection
    for centering in (False, True):
        backend = TorchHooksJacobianBackend(model, centering=centering)
        J = nngeometry.Jacobian(model, loader, centering=centering)
        assert torch.equal(PFMapDense(generator=backend, examples=loader).data, J.to_torch())
        assert torch.equal(PFMapDense(lc, backend, examples=loader).data, J.to_torch())
        assert torch.equal(PFMapDense(lc, None, data=J.to_torch()).data, J.to_torch())
        kinds = (PFMapImplicit, PushForwardDense, PushForwardImplicit)
        for kind in kinds if centering else (PFMapFactored, *kinds):
            made = kind(generator=backend, examples=loader)
            torch.testing.assert_close(made.jvp(vector).to_torch(), J.jvp(vector).to_torch())
        K = torch.einsum("cnp,dmp->cndm", J.to_torch(), J.to_torch())
        for kernel in (
            FMatDense(backend, None, loader),
            FMatDense(lc, backend, examples=loader),
            FMatDense(lc, None, K),
        ):
            torch.testing.assert_close(kernel.data, K)
            torch.testing.assert_close(kernel.frobenius_norm(), K.norm())
        torch.testing.assert_close(backend.get_gram_matrix(loader), K)


@quiet
def test_a_factored_map_is_not_centred(model, loader):
    with pytest.raises(NotImplementedError, match="PFMapDense"):
        PFMapFactored(generator=TorchHooksJacobianBackend(model, centering=True), examples=loader)


@quiet
def test_methods_of_maps_and_kernels(model, loader, vector):
    J = nngeometry.Jacobian(model, loader, representation=PFMapDense)
    weight, bias = J.to_torch_layer("0")
    assert (weight.shape, bias.shape) == ((3, 12, 3, 2, 2, 2), (3, 12, 3))
    assert [name for name, _ in J.iter_by_module()] == [name for name, _, _ in J.iter_by_layer()] == ["0", "2", "5"]
    backend = TorchHooksJacobianBackend(model)
    again = PFMapDense.from_dict(backend, dict(J.iter_by_module()))
    assert torch.equal(again.get_dense_tensor(), J.data)
    assert torch.equal(
        PFMapDense.from_dict(layer_collection=J.layer_collection, generator=None, data_dict=J.to_dict()).data, J.data
    )
    J.data = 2 * J.data
    assert torch.equal(J.to_torch(), 2 * again.to_torch())
    K = nngeometry.GramMatrix(model, loader, lambda x, y: model(x))
    assert (K.size(), K.size(0)) == ((3, 12, 3, 12), 3)
    dense = K.get_dense_tensor().view(36, 36)
    K.compute_eigendecomposition()
    l, q = K.get_eigendecomposition()
    torch.testing.assert_close((q * l) @ q.T, dense)
    torch.testing.assert_close(K.mm(K).to_torch().reshape(36, 36), dense @ dense)
    u = random_fvector(12, n_output=3)
    x = K.solve(u, regul=1e-2, solve="default")
    torch.testing.assert_close(
        x.to_torch().flatten(), torch.linalg.solve(dense + 1e-2 * torch.eye(36), u.to_torch().flatten())
    )
    assert random_pfmap(vector.layer_collection, (2, 3)).data.shape == (2, 3, 78)


@quiet
def test_second_moment_of_gradients(model, loader):
    J = nngeometry.Jacobian(model, loader).to_torch()
    M = nngeometry.GradientSecondMoment(
        model=model, loader=loader, representation=PMatDense, function=lambda x, y: model(x)
    )
    torch.testing.assert_close(M.to_torch(), torch.einsum("cnp,cnq->pq", J, J) / 12)


# Numbers that differ on purpose


def test_a_kernel_of_a_shuffling_loader_is_symmetric(model, loader):
    shuffled = DataLoader(loader.dataset, batch_size=5, shuffle=True)
    K = nngeometry.GramMatrix(model, shuffled).to_torch()
    torch.testing.assert_close(K, K.permute(2, 3, 0, 1))
    ordered = nngeometry.GramMatrix(model, loader)
    torch.testing.assert_close(K.norm(), ordered.norm())


def test_a_damped_solve_is_exact(model, loader, vector):
    for representation in (PMatKFAC, PMatLowRank):
        M = FIM(model, loader, representation)
        expected = torch.linalg.solve(M.to_torch() + 1e-2 * torch.eye(78), vector.to_torch())
        torch.testing.assert_close(M.solve(vector, 1e-2).to_torch(), expected)


@quiet
def test_factored_damping_has_to_be_asked_for(model, loader, vector):
    M = FIM(model, loader, PMatKFAC)
    a, g = M.data["5"]
    pi = ((a.trace() / 9) / (g.trace() / 3)).sqrt()
    factors = [torch.linalg.inv(t + r * torch.eye(len(t))) for t, r in ((a, 0.1 * pi), (g, 0.1 / pi))]
    damped = M.inverse(regul=1e-2, use_pi=True)
    for one, expected in zip(damped.data["5"], factors, strict=True):
        torch.testing.assert_close(one, expected)
    torch.testing.assert_close(M.solvePVec(vector, 1e-2, use_pi=True).to_torch(), damped.mv(vector).to_torch())
    with pytest.raises(TypeError, match="no factors"):
        FIM(model, loader, PMatDiag).inverse(1e-2, use_pi=True)


def test_ekfac_is_complete_at_construction(model, loader):
    M = FIM(model, loader, PMatEKFAC)
    before = M.to_torch()
    torch.testing.assert_close(M.update_diag(loader).to_torch(), before)
    torch.testing.assert_close(M.trace(), FIM(model, loader, PMatDense).trace())


def test_examples_are_counted_as_they_are_seen(model, loader):
    x, y = loader.dataset.tensors
    dropping = DataLoader(loader.dataset, batch_size=5, drop_last=True)
    torch.testing.assert_close(
        FIM(model, dropping, PMatDiag).get_diag(), FIM(model, (x[:10], y[:10]), PMatDiag).get_diag()
    )


@quiet
@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_the_hessian_has_the_reduction_of_its_loss(reduction, model, loader):
    truth = Hessian(model, loader, PMatDense, nn.CrossEntropyLoss(reduction=reduction)).to_torch()

    def loss(prediction, y):
        return F.cross_entropy(prediction, y, reduction=reduction)

    torch.testing.assert_close(Hessian(model, loader, PMatDense, function=loss).to_torch(), truth)
    module = nn.CrossEntropyLoss(reduction=reduction)
    torch.testing.assert_close(Hessian(model, loader, PMatDense, function=module).to_torch(), truth)
    backend = TorchFuncHessianBackend(model, loss)
    torch.testing.assert_close(PMatDense(generator=backend, examples=loader).to_torch(), truth)
    with pytest.raises(IndexError):
        PMatDense(generator=TorchFuncHessianBackend(model, lambda f, y: f.sum(7)), examples=loader)


@quiet
def test_a_function_that_is_no_loss_is_the_model_to_call(model, loader):
    truth = Hessian(model, loader, PMatDense).to_torch()
    torch.testing.assert_close(Hessian(model, loader, PMatDense, function=lambda x, y: model(x)).to_torch(), truth)
    with pytest.raises(ValueError, match="neither their mean nor their sum"):
        Hessian(model, loader, PMatDense, function=lambda f, y: F.cross_entropy(f, y, reduction="sum") ** 2)


def test_kfac_of_a_sequence_is_exact_where_it_should_be():
    # One linear layer, the same input at every position, a sum over positions: F = E[gg^T] (x) E[aa^T] T^2 / T.
    layer = nn.Linear(3, 2)
    x = torch.randn(1, 1, 3).expand(1, 4, 3).contiguous()
    M = FIM(layer, (x,), PMatKFAC, "regression")
    a, g = M.data[""]
    one = torch.cat([x[0, 0], torch.ones(1)])
    torch.testing.assert_close(a, torch.outer(one, one))  # not T times it
    torch.testing.assert_close(g, 4.0 * torch.eye(2))


def test_kfac_of_a_grouped_convolution_has_factors_for_each_group():
    model = nn.Sequential(nn.Conv2d(4, 2, 2, groups=2), nn.Flatten())
    x = torch.randn(1, 4, 2, 2)  # one position, one example: KFAC is exact
    M = FIM(model, (x,), PMatKFAC, "regression")
    a, g = M.data["0"]
    assert (a.shape, g.shape) == ((2, 9, 9), (2, 1, 1))
    torch.testing.assert_close(M.to_torch(), FIM(model, (x,), PMatDense, "regression").to_torch())


def test_factors_are_second_moments(loader):
    model = nn.Sequential(nn.Flatten(), nn.Linear(32, 3))
    x = torch.cat([loader.dataset.tensors[0].flatten(1), torch.ones(12, 1)], 1)
    a, g = FIM(model, loader, PMatKFAC, "regression").data["1"]
    torch.testing.assert_close(a, x.T @ x / 12)  # no factor sqrt(n_output)
    torch.testing.assert_close(g, torch.eye(3))


def test_a_layer_collection_has_all_trainable_parameters():
    model = nn.Sequential(nn.Embedding(5, 3), nn.Flatten(), nn.Linear(6, 2), nn.PReLU())
    model[2].bias.requires_grad_(False)
    with pytest.warns(DeprecationWarning, match="every layer is supported"):
        lc = LayerCollection.from_model(model, ignore_unsupported_layers=True)
    assert lc.numel() == sum(p.numel() for p in model.parameters() if p.requires_grad)
    assert LayerCollection.from_model(model, frozen=True).numel() == lc.numel() + 2


def test_a_vector_from_a_model_follows_it_but_does_not_change_it(model):
    v = PVector.from_model(model)
    before, kept = v.to_torch().clone(), v.clone()
    same = v
    v *= 2
    assert torch.equal(v.to_torch(), 2 * before)
    assert torch.equal(same.to_torch(), before)
    with torch.no_grad():
        model[0].weight.zero_()
    assert torch.equal(same.to_torch(), PVector.from_model(model).to_torch())
    assert torch.equal(kept.to_torch(), before)


def test_random_vectors_have_the_default_dtype(model):
    torch.set_default_dtype(torch.float32)  # the fixture of all tests sets it back
    assert random_pvector(LayerCollection.from_model(model)).dtype == torch.float32


def test_singular_to_working_precision_is_an_error(model, loader, vector):
    M = FIM(model, loader, PMatKFAC).to(dtype=torch.float32)
    with pytest.raises(ValueError, match="singular to working precision"):
        M.solve(vector.to(dtype=torch.float32), regul=1e-12)


def test_trials_of_a_sampled_regression_are_all_used():
    model = nn.Linear(3, 2)
    x = torch.randn(8, 3)
    exact = FIM(model, (x,), PMatDense, "regression").to_torch()
    errors = [
        (FIM_MonteCarlo(model, (x,), PMatDense, "regression", trials=t).to_torch() - exact).norm() for t in (8, 8 * 64)
    ]
    assert errors[1] < errors[0] / 4


def test_cg_says_when_it_has_not_converged(model, loader, vector):
    M = FIM(model, loader, PMatImplicit)
    expected = M.solve(vector, 1e-2, rtol=1e-10).to_torch()
    torch.testing.assert_close(cg(M, vector, regul=1e-2, rtol=1e-10).to_torch(), expected, rtol=1e-5, atol=1e-6)
    K = FIM(model, loader, PMatKFAC)
    torch.testing.assert_close(
        cg(M, vector, 1e-2, x0=vector, M=K, rtol=1e-10).to_torch(), expected, rtol=1e-5, atol=1e-6
    )
    with pytest.warns(RuntimeWarning, match="residual"):
        cg(M, vector, regul=1e-2, max_iter=1)
