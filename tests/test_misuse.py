"""Wrong arguments: one sentence each that names the argument and the remedy, before any work."""

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

from nngeometry import (
    FIM,
    GGN,
    Categorical,
    EmpiricalFisher,
    FIM_MonteCarlo,
    FiniteDifference,
    FMatDense,
    GradientCovariance,
    GramMatrix,
    Hessian,
    Influence,
    Jacobian,
    LayerCollection,
    PFMapDense,
    PMat,
    PMatDense,
    PMatDiag,
    PMatImplicit,
    PMatKFAC,
    PMatLowRank,
    PMatMixed,
    PVector,
    memory_budget,
    spectrum,
)

torch.manual_seed(0)
MATRICES = [FIM, FIM_MonteCarlo, EmpiricalFisher, GradientCovariance, GGN, Hessian]
OF_LOSSES = [EmpiricalFisher, GradientCovariance, GGN, Hessian]


@pytest.fixture
def m():
    return nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3))


@pytest.fixture
def b():
    return torch.randn(6, 4), torch.tensor([0, 1, 2, 2, 0, 1])


def refused(call, kind, *words):
    with pytest.raises(kind) as info:
        call()
    text = str(info.value)
    assert type(info.value) is kind, info.value
    for word in words:
        assert word in text, text
    assert len(text) < 500
    assert "\n" not in text


ANYWHERE = {
    "model class": (lambda m, b: {"model": nn.Linear}, TypeError, "model:", "the class Linear"),
    "model none": (lambda m, b: {"model": None}, TypeError, "model:", "None"),
    "model list": (lambda m, b: {"model": [m]}, TypeError, "model:", "a list"),
    "swapped": (
        lambda m, b: {"model": DataLoader(TensorDataset(*b)), "loader": m},
        TypeError,
        "model:",
        "comes first",
    ),
    "meta": (lambda m, b: {"model": nn.Linear(4, 3, device="meta")}, ValueError, "meta device"),
    "lazy": (lambda m, b: {"model": nn.LazyLinear(3)}, ValueError, "lazy", "run it once"),
    "no parameters": (lambda m, b: {"model": nn.Tanh()}, ValueError, "no parameters to collect"),
    "loader is a model": (lambda m, b: {"loader": m}, TypeError, "loader:", "the model Sequential"),
    "loader class": (lambda m, b: {"loader": DataLoader}, TypeError, "loader:", "the class DataLoader"),
    "dataset": (lambda m, b: {"loader": TensorDataset(*b)}, TypeError, "loader:", "TensorDataset", "DataLoader("),
    "loader none": (lambda m, b: {"loader": None}, TypeError, "loader:"),
    "loader number": (lambda m, b: {"loader": 3}, TypeError, "loader:"),
    "loader string": (lambda m, b: {"loader": "abc"}, TypeError, "loader:"),
    "function": (lambda m, b: {"function": "m"}, TypeError, "function:", "'m'"),
    "function class": (lambda m, b: {"function": nn.Linear}, TypeError, "function:", "the class Linear"),
    "device": (lambda m, b: {"device": "gpu"}, ValueError, "device='gpu'", "cuda"),
    "device misspelt": (lambda m, b: {"device": "cdua"}, ValueError, "device='cdua'", "cuda"),
    "device number": (lambda m, b: {"device": [3]}, TypeError, "device:"),
    "collection is a model": (lambda m, b: {"layer_collection": m}, TypeError, "layer_collection:", "from_model"),
    "collection of names": (lambda m, b: {"layer_collection": ["0"]}, TypeError, "layer_collection:", "from_model"),
    "collection class": (lambda m, b: {"layer_collection": LayerCollection}, TypeError, "layer_collection:"),
}
AT_WORK = {
    "empty": (lambda m, b: {"loader": []}, ValueError, "yielded no minibatch"),
    "no example": (lambda m, b: {"loader": (b[0][:0], b[1][:0])}, ValueError, "a minibatch has no example"),
    "numbers": (lambda m, b: {"loader": [1, 2]}, TypeError, "loader:", "1"),
    "strings": (lambda m, b: {"loader": ["a"]}, TypeError, "loader:", "'a'"),
    "none": (lambda m, b: {"loader": [None]}, TypeError, "loader:", "None"),
    "single precision": (lambda m, b: {"loader": (b[0].float(), b[1])}, ValueError, "float32", "float64", "x.to("),
    "integers": (lambda m, b: {"loader": (b[0].long(), b[1])}, ValueError, "int64", "float64"),
    "complex": (lambda m, b: {"function": lambda x, y: m(x) * 1j}, TypeError, "complex128"),
    "classes": (lambda m, b: {"function": lambda x, y: m(x).argmax(1)}, TypeError, "int64"),
    "tuple": (lambda m, b: {"function": lambda x, y: (m(x),)}, TypeError, "tuple", "function="),
    "dict": (lambda m, b: {"loader": {"x": b[0]}}, TypeError, "need function="),
    "nan": (lambda m, b: {"loader": (b[0] * float("nan"), b[1])}, ValueError, "NaN"),
    "arity": (lambda m, b: {"loader": [b], "function": lambda x: m(x)}, TypeError, "function:", "2 here"),
}


@pytest.mark.parametrize("case", ANYWHERE)
@pytest.mark.parametrize("call", [*MATRICES, Jacobian, GramMatrix], ids=lambda f: f.__name__)
def test_arguments_of_all(m, b, call, case):
    make, kind, *words = ANYWHERE[case]
    options = {"representation": PMatDense} if call in MATRICES else {}
    refused(lambda: call(**{"model": m, "loader": b, **options, **make(m, b)}), kind, *words)


@pytest.mark.parametrize("case", AT_WORK)
@pytest.mark.parametrize("call", [*MATRICES, Jacobian, GramMatrix], ids=lambda f: f.__name__)
def test_data_of_all(m, b, call, case):
    make, kind, *words = AT_WORK[case]
    options = {"representation": PMatDense} if call in MATRICES else {}
    refused(lambda: call(**{"model": m, "loader": b, **options, **make(m, b)}), kind, *words)


@pytest.mark.parametrize("matrix", MATRICES, ids=lambda f: f.__name__)
@pytest.mark.parametrize(
    "representation", ["PMatKFAC", None, 3, PFMapDense, FMatDense, PVector, nn.Linear, lambda x: x]
)
def test_representations(m, b, matrix, representation):
    refused(lambda: matrix(m, b, representation), TypeError, "representation:", "PMat class")


@pytest.mark.parametrize("matrix", MATRICES, ids=lambda f: f.__name__)
def test_a_matrix_for_a_representation(m, b, matrix):
    refused(lambda: matrix(m, b, FIM(m, b, PMatDiag)), TypeError, "representation:", "pass the class")


@pytest.mark.parametrize("matrix", MATRICES[:-1], ids=lambda f: f.__name__)
def test_options(m, b, matrix):
    refused(lambda: matrix(m, b, PMatKFAC, shareing="reduce"), TypeError, "'shareing'", "did you mean 'sharing'?")
    refused(lambda: matrix(m, b, PMatDense, fuction=m), TypeError, "'fuction'", "did you mean 'function'?")
    refused(lambda: matrix(m, b, PMatDense, layercollection=m), TypeError, "did you mean 'layer_collection'?")
    refused(lambda: matrix(m, b, PMatKFAC, sharing="reduced"), ValueError, "sharing='reduced'")
    if matrix is not GradientCovariance:
        matrix(m, b, PMatKFAC, sharing="reduce")
    matrix(m, b, PMatMixed, default=PMatDiag)


def test_options_of_a_hessian(m, b):
    refused(lambda: Hessian(m, b, PMatLowRank, rnak=3), TypeError, "did you mean 'rank'?")
    for representation in (PMatKFAC, PMatMixed, PMatMixed.of(PMatKFAC, {})):
        refused(lambda r=representation: Hessian(m, b, r), NotImplementedError, "which a Hessian is not")
    refused(lambda: Hessian(m, b, PMatKFAC, sharing="reduce"), NotImplementedError, "which a Hessian is not")
    refused(lambda: Hessian(m, b, PMatLowRank, rank=1.5), TypeError, "rank", "whole number")
    refused(
        lambda: Hessian(m, b, PMatImplicit, products=FiniteDifference), TypeError, "products:", "FiniteDifference()"
    )
    refused(lambda: Hessian(m, b, PMatImplicit, products="fd"), TypeError, "products:", "'fd'")
    refused(lambda: FiniteDifference(0), ValueError, "step", "above 0")
    refused(lambda: FiniteDifference("a"), TypeError, "step", "number")
    Hessian(m, b, PMatLowRank, rank=3)


LABELS = {
    "none": (lambda x, y: (x,), ValueError, "target", "targets="),
    "double": (lambda x, y: (x, y.double()), ValueError, "floating point targets", "y.long()"),
    "one-hot": (lambda x, y: (x, F.one_hot(y, 3)), ValueError, "one-hot", "argmax"),
    "too few": (lambda x, y: [(x, y[:4])], ValueError, "(6,)", "(4,)"),
    "too large": (lambda x, y: (x, y + 1), ValueError, "the class 3", "0 to 2"),
    "negative": (lambda x, y: (x, y - 1), ValueError, "the class -1", "0 to 2"),
    "bool": (lambda x, y: (x, y > 0), ValueError, "bool", "y.long()"),
    "list": (lambda x, y: [(x, y.tolist())], TypeError, "needs a tensor", "list"),
    "None": (lambda x, y: [(x, None)], TypeError, "needs a tensor", "None"),
    "numpy": (lambda x, y: [(x, y.cpu().numpy())], TypeError, "needs a tensor", "ndarray"),
}


@pytest.mark.parametrize("case", LABELS)
@pytest.mark.parametrize("matrix", OF_LOSSES, ids=lambda f: f.__name__)
@pytest.mark.parametrize("representation", [PMatDense, PMatImplicit])
def test_labels(m, b, matrix, representation, case):
    make, kind, *words = LABELS[case]
    v = PVector.from_model(m)
    refused(lambda: matrix(m, make(*b), representation).mv(v), kind, "loss:", *words)


@pytest.mark.parametrize("matrix", OF_LOSSES, ids=lambda f: f.__name__)
@pytest.mark.parametrize("representation", [PMatDense, PMatImplicit])
@pytest.mark.parametrize("loss", ["float", "list", "none", "detached", "numpy", "classes", "arity", "scalar"])
def test_what_losses_return(m, b, matrix, representation, loss):
    losses = {
        "float": lambda f, y: 3.0,
        "list": lambda f, y: [1.0] * len(y),
        "none": lambda f, y: None,
        "detached": lambda f, y: F.cross_entropy(f.detach(), y, reduction="none"),
        "numpy": lambda f, y: np.ones(len(y)),
        "classes": lambda f, y: f.argmax(1),
        "arity": lambda f: f.sum(1),
        "scalar": F.cross_entropy,
    }
    v = PVector.from_model(m)
    if loss == "scalar" and matrix is Hessian:  # one number for a minibatch tells which mean or sum it is
        expected = Hessian(m, b, representation, nn.CrossEntropyLoss()).mv(v)
        torch.testing.assert_close(Hessian(m, b, representation, losses[loss]).mv(v).to_torch(), expected.to_torch())
        return
    refused(
        lambda: matrix(m, b, representation, losses[loss]).mv(v),
        TypeError if loss in ("float", "list", "none", "numpy") else ValueError,
        "loss:",
    )


@pytest.mark.parametrize("matrix", OF_LOSSES, ids=lambda f: f.__name__)
def test_losses(m, b, matrix):
    refused(lambda: matrix(m, b, PMatDense, nn.CrossEntropyLoss), TypeError, "loss:", "pass CrossEntropyLoss()")
    refused(lambda: matrix(m, b, PMatDense, "cross_entropy"), TypeError, "loss:", "'cross_entropy'")
    refused(lambda: matrix(m, b, PMatDense, Categorical()), TypeError, "loss:", "a Categorical")


@pytest.mark.parametrize("matrix", [FIM, FIM_MonteCarlo])
def test_variants(m, b, matrix):
    refused(lambda: matrix(m, b, PMatDense, "classif_logit"), ValueError, "did you mean 'classif_logits'?")
    refused(lambda: matrix(m, b, PMatDense, "regresion"), ValueError, "did you mean 'regression'?")
    refused(lambda: matrix(m, b, PMatDense, Categorical), TypeError, "variant:", "pass Categorical()")
    refused(lambda: matrix(m, b, PMatDense, ["regression"]), TypeError, "variant:", "a list")
    refused(lambda: matrix(m, b, PMatDense, nn.CrossEntropyLoss()), TypeError, "variant:", "a CrossEntropyLoss")
    refused(lambda: matrix(m, b, PMatDense, n_output="3"), TypeError, "n_output", "'3'")


@pytest.mark.parametrize("trials", [0, -1, 1.5, "3", None, True, 2**70, float("nan")])
def test_trials(m, b, trials):
    kind = ValueError if isinstance(trials, int) and trials is not True else TypeError
    refused(lambda: FIM_MonteCarlo(m, b, PMatDense, trials=trials), kind, "trials")


@pytest.mark.parametrize("generator", [3, "seed", np.random.default_rng(0), torch.Generator])
def test_generators(m, b, generator):
    refused(lambda: FIM_MonteCarlo(m, b, PMatDense, generator=generator), TypeError, "generator:", "manual_seed")
    refused(lambda: FIM(m, b, PMatDense).sample(generator), TypeError, "generator:", "manual_seed")
    F = FIM(m, b, PMatDense)
    refused(lambda: spectrum.spectral_density(F, generator=generator), TypeError, "generator:", "manual_seed")


@pytest.mark.parametrize("budget", ["1GB", None, [1], float("nan"), True])
def test_budgets(budget):
    refused(lambda: memory_budget(budget).__enter__(), TypeError, "memory_budget", "bytes")


@pytest.mark.parametrize("regul", ["0.1", None, [1.0], 1j, torch.ones(2), float("nan"), PMat])
def test_regularisation(m, b, regul):
    F, v = FIM(m, b, PMatKFAC), PVector.from_model(m)
    kind = ValueError if isinstance(regul, float) else TypeError
    for call in (
        lambda: F.solve(v, regul),
        lambda: F.inv(regul),
        lambda: F.solve(v, dict.fromkeys(F.layer_collection, regul)),
    ):
        refused(call, kind, "regul")
    assert F.solve(v, torch.tensor(0.1)).size() == F.solve(v, np.float32(0.1)).size()


def test_operations(m, b):
    F = FIM(m, b, PMatDense)
    refused(lambda: F.pow("a"), TypeError, "exponent")
    for k, kind in ((-1, ValueError), (1.5, TypeError), ("a", TypeError)):
        refused(lambda k=k: F.eig(k), kind, "eig: k")
    refused(lambda: F.to("gpu"), ValueError, "device='gpu'")
    for x in (3, None, m, b[0], PVector):
        refused(lambda x=x: F.mv(x), TypeError, "PVector")


def test_jacobians_and_kernels(m, b):
    for representation in ("a", None, PMatDense, FMatDense, FIM(m, b, PMatDiag)):
        refused(lambda r=representation: Jacobian(m, b, representation=r), TypeError, "representation:", "PFMapDense")
    for representation in ("a", None, PMatDense, PFMapDense, FIM(m, b, PMatDiag)):
        refused(lambda r=representation: GramMatrix(m, b, representation=r), TypeError, "representation:", "FMatDense")
    refused(lambda: GramMatrix(m, b, output="ful"), ValueError, "output", "did you mean 'full'?")
    refused(lambda: GramMatrix(m, b, output=["full"]), ValueError, "output")
    for metric in ("K", PMatKFAC, PVector.from_model(m)):
        refused(lambda metric=metric: GramMatrix(m, b, metric=metric), TypeError, "metric:")
    refused(lambda: GramMatrix(m, b, loader2=m), TypeError, "loader2:")
    refused(lambda: GramMatrix(m, b, model2="a"), TypeError, "model:")


def test_influence(m, b):
    G = GGN(m, b, PMatKFAC)
    for matrix in ("G", PMatKFAC, None, m):
        refused(lambda matrix=matrix: Influence(m, matrix), TypeError, "matrix:")
    refused(lambda: Influence(G, m), TypeError, "model:")
    refused(lambda: Influence(m, G, nn.MSELoss), TypeError, "loss:", "MSELoss()")
    refused(lambda: Influence(m, G, query_loss="a"), TypeError, "query_loss:")
    refused(lambda: Influence(m, G, regul="a"), TypeError, "regul")
    refused(lambda: Influence(m, G, refine=PMatImplicit), TypeError, "refine:")
    influence = Influence(m, G)
    for examples in (None, 3, m, TensorDataset(*b), "a"):
        refused(lambda e=examples: influence.scores(e, b), TypeError, "queries:")
        refused(lambda e=examples: influence.scores(b, e), TypeError, "train:")
        refused(lambda e=examples: influence.self_scores(e), TypeError, "train:")
    for k in (0, -1, 1.5, "a"):
        refused(lambda k=k: influence.top(b, b, k), ValueError if isinstance(k, int) else TypeError, "top: k")


def test_spectra(m, b):
    G = GGN(m, b, PMatDense)
    for wrong in (None, "a", PMatKFAC, PVector.from_model(m), m, G.to_torch()):
        for call in (spectrum.spectral_density, spectrum.layer_spectra, lambda F: spectrum.extreme_eigenpairs(F, 1)):
            refused(lambda call=call, wrong=wrong: call(wrong), TypeError, "F:", "Hessian(")
    for option in ("steps", "probes", "outliers"):
        refused(lambda o=option: spectrum.spectral_density(G, **{o: 1.5}), TypeError, option)
        refused(lambda o=option: spectrum.spectral_density(G, **{o: -1}), ValueError, option)
    refused(lambda: spectrum.layer_spectra(G, stps=3), TypeError, "did you mean 'steps'?")
    refused(lambda: spectrum.extreme_eigenpairs(G, 1, "largets"), ValueError, "did you mean 'largest'?")
    refused(lambda: spectrum.extreme_eigenpairs(G, 1, max_product=3), TypeError, "did you mean 'max_products'?")
    refused(lambda: spectrum.extreme_eigenpairs(G, 1.5), TypeError, "k")


def test_layer_collections(m):
    lc = LayerCollection.from_model(m)
    for wrong in (nn.Linear, None, "a", [m], lc):
        refused(lambda w=wrong: LayerCollection.from_model(w), TypeError, "model:")
        refused(lambda w=wrong: PVector.from_model(w), TypeError, "model:")
    for wrong in (0, None, ["0"]):
        refused(lambda w=wrong: lc.select(w), TypeError, "selector")
    for wrong in (m, ["0"], "0"):
        refused(lambda w=wrong: LayerCollection(w), TypeError, "from_model")
        refused(lambda w=wrong: lc.merge(w), TypeError, "from_model")
    refused(lambda: lc["7"], KeyError, "no layer '7'")
