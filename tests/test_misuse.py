"""Wrong arguments: one sentence each that names the argument and the remedy, before any work."""

import inspect
import io
import operator
from fractions import Fraction
from functools import partial

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
    FMatMemmap,
    FVector,
    Gaussian,
    Generator,
    GradientCovariance,
    GramMatrix,
    Hessian,
    Influence,
    Jacobian,
    LayerCollection,
    Likelihood,
    OwnLoss,
    PFMapDense,
    PFMapFactored,
    PFMapImplicit,
    PMat,
    PMatDense,
    PMatDiag,
    PMatEye,
    PMatImplicit,
    PMatKFAC,
    PMatLowRank,
    PMatMixed,
    PVector,
    kind,
    linalg,
    memory_budget,
    random_pvector,
    spectrum,
    whole,
)
from nngeometry.likelihood import Cotangents

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
    for k, error in ((-1, ValueError), (1.5, TypeError), ("a", TypeError)):
        refused(lambda k=k: F.eig(k), error, "eig: k")
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


# Operators and the objects that they are of


def one_of_each(m, b):
    v = PVector.from_model(m)
    J = Jacobian(m, b)
    return {
        "vector of a model": v,
        "vector": v.clone().detach(),
        "outputs": FVector(torch.ones(3, 6)),
        "matrix": FIM(m, b, PMatKFAC),
        "products": GGN(m, b, PMatImplicit),
        "map": J,
        "factored map": Jacobian(m, b, representation=PFMapFactored),
        "kernel": GramMatrix(m, b),
    }


OPERATORS = {
    "+": operator.add,
    "-": operator.sub,
    "*": operator.mul,
    "/": operator.truediv,
    "**": operator.pow,
    "@": operator.matmul,
}
FOREIGN = {
    "None": None,
    "string": "2",
    "list": [1.0],
    "complex": 1j,
    "tensor": torch.ones(43),
    "array": np.ones(43),
    "class": PVector,
    "collection": LayerCollection(),
}
NAMES = ["vector of a model", "vector", "outputs", "matrix", "products", "map", "factored map", "kernel"]


@pytest.mark.parametrize("sign", OPERATORS)
@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("foreign", FOREIGN)
def test_operators_with_things_that_have_no_place_there(m, b, name, foreign, sign):
    mine, other, of = one_of_each(m, b)[name], FOREIGN[foreign], OPERATORS[sign]
    for left, right in ((mine, other), (other, mine)):
        if sign == "**" and left is mine and name in ("matrix", "products", "kernel"):
            refused(lambda left=left, right=right: of(left, right), TypeError, "exponent")
        else:
            refused(
                lambda left=left, right=right: of(left, right), TypeError, f" {sign} ", "has no meaning: ", " goes "
            )


@pytest.mark.parametrize("name", ["vector of a model", "vector", "outputs", "matrix", "products", "map", "kernel"])
def test_numbers_of_all_kinds_multiply(m, b, name):
    mine = one_of_each(m, b)[name]
    expected = (2 * mine).to_torch()
    for number in (2, 2.0, np.float32(2), np.float64(2), np.int64(2), np.array(2.0), torch.tensor(2.0), Fraction(2)):
        for found in (number * mine, mine * number, mine / (1 / number)):
            assert type(found) is type(2 * mine)
            torch.testing.assert_close(found.to_torch(), expected)


def test_sums_with_what_is_of_another_space(m, b):
    of = one_of_each(m, b)
    F, v, u, K, J = (of[name] for name in ("matrix", "vector", "outputs", "kernel", "map"))
    for call in (
        lambda: F + v,
        lambda: v + F,
        lambda: F + 1,
        lambda: 1 - F,
        lambda: F * F,
        lambda: F / F,
        lambda: 1 / F,
        lambda: v @ F,
        lambda: u @ v,
        lambda: F @ u,
        lambda: F @ K,
        lambda: K @ v,
        lambda: F + K,
        lambda: J @ J,
        lambda: K + 1,
        lambda: J.T @ v,
        lambda: J.T @ torch.ones(3, 6),
        lambda: J.T @ None,
        lambda: np.ones(43) @ J.T,
        lambda: torch.ones(43) @ J.T,
    ):
        refused(call, TypeError, "has no meaning")
    for call in (lambda: v + u, lambda: u - v):
        refused(call, TypeError, "not in")
    for zero in (0, 0.0, torch.tensor(0.0), np.float32(0)):
        refused(lambda zero=zero: F / zero, ZeroDivisionError, "a PMatKFAC / 0")
    refused(lambda: v.__iadd__(J), ValueError, "does not fit")
    refused(lambda: v.dot(torch.ones(43)), TypeError, "dot", "PVector(")
    refused(lambda: u.dot(v), TypeError, "dot", "FVector(")
    refused(lambda: K**0.5, TypeError, "exponent")


def test_other_classes_may_know_what_to_do(m, b):
    class Both:
        def __radd__(self, other):
            return "their sum"

        def __rmatmul__(self, other):
            return "their product"

    for name, mine in one_of_each(m, b).items():
        assert mine + Both() == "their sum", name
        assert mine @ Both() == "their product", name


# Signatures


@pytest.mark.parametrize("matrix", MATRICES, ids=lambda f: f.__name__)
def test_a_representation_that_is_missing(m, b, matrix):
    called = f"it is called as {matrix.__name__}(model, loader, representation, "
    refused(lambda: matrix(m, b), TypeError, "missing a required argument: 'representation'", called)
    refused(lambda: matrix(), TypeError, "missing a required argument: 'model'", called)
    assert matrix.__doc__
    assert inspect.signature(matrix).parameters["representation"].default is inspect.Parameter.empty


def test_arguments_that_are_not_taken(m, b):
    F = FIM(m, b, PMatDense)
    for call in (Jacobian, GramMatrix):
        refused(lambda call=call: call(m, b, reprsentation=3), TypeError, "did you mean 'representation'?")
    refused(lambda: EmpiricalFisher(m, b, PMatDense, nn.MSELoss(), 3), TypeError, "too many positional arguments")
    refused(lambda: spectrum.spectral_density(F, stps=3), TypeError, "did you mean 'steps'?")
    refused(lambda: spectrum.spectral_density(F, 10), TypeError, "called as spectral_density(F, steps=, probes=")
    refused(lambda: spectrum.extreme_eigenpairs(F), TypeError, "missing a required argument: 'k'")
    for option in ("like", "size", "matvec"):
        refused(lambda o=option: spectrum.extreme_eigenpairs(F, 1, **{o: 3}), TypeError, "unknown option")
    refused(lambda: Influence(m), TypeError, "Influence: missing a required argument: 'matrix'", "Influence(model, ")
    refused(lambda: Influence(m, F, los=3), TypeError, "did you mean 'loss'?")
    refused(lambda: PMatMixed.of({"0": PMatDense}), TypeError, "PMatMixed.of: missing a required argument: 'rules'")
    refused(lambda: random_pvector(seed=1), TypeError, "random_pvector: ")


def test_an_error_from_inside_is_not_one_of_the_call(m, b):
    def broken(x, y):
        return m(x, y)  # takes one argument

    with pytest.raises(TypeError, match="forward"):
        Jacobian(m, b, function=broken)


# Models that do not take their inputs


def multiplied(F):
    """A product, for which also a matrix that is known by its products reads the data."""
    return F.mv(random_pvector(F.layer_collection))


@pytest.mark.parametrize("call", [*MATRICES, Jacobian, GramMatrix], ids=lambda f: f.__name__)
@pytest.mark.parametrize("representation", [PMatDense, PMatImplicit])
def test_inputs_of_other_shapes(m, b, call, representation):
    options = {"representation": representation} if call in MATRICES else {}
    refused(
        lambda: multiplied(call(m, (b[0][:, :3], b[1]), **options)),
        RuntimeError,
        "the model fails for the minibatch (",
        ", 3) torch.float64",
        "function=",
    )


INPUTS = {
    "embedding": (nn.Sequential(nn.Embedding(4, 3), nn.Flatten()), torch.tensor([[1, 9], [0, 1]]), IndexError),
    "channels": (nn.Sequential(nn.Conv2d(3, 2, 3), nn.Flatten()), torch.randn(2, 1, 5, 5), RuntimeError),
    "channels last": (nn.Sequential(nn.Conv2d(3, 2, 3), nn.Flatten()), torch.randn(2, 5, 5, 3), RuntimeError),
    "norm": (nn.LayerNorm(3), torch.randn(2, 5), RuntimeError),
    "batch norm": (nn.BatchNorm1d(3).eval(), torch.randn(2, 5), RuntimeError),
}


@pytest.mark.parametrize("case", INPUTS)
def test_inputs_that_a_layer_does_not_take(case):
    model, x, kind = INPUTS[case]
    for call in (Jacobian, GramMatrix, lambda *of: FIM(*of, PMatDense, "regression")):
        refused(lambda call=call: call(model, (x,)), kind, "the model fails for the minibatch", "function=")


def test_errors_of_the_model_itself_stay_as_they_are(m, b):
    class Odd(RuntimeError):
        pass

    for error in (Odd("the shape of things to come"), RuntimeError("not today"), KeyError("shape")):

        def function(x, y, error=error):
            raise error

        with pytest.raises(type(error)) as info:
            Jacobian(m, b, function=function)
        assert info.value is error


@pytest.mark.parametrize("representation", [PMatDense, PMatImplicit])
def test_the_model_as_function_of_all_elements(m, b, representation):
    refused(lambda: FIM(m, [b], representation, function=m).trace(), TypeError, "function:", "2 here")
    refused(lambda: GramMatrix(m, b, loader2=b, function=m), TypeError, "function:", "2 here")
    FIM(m, [(b[0],)], representation, function=m).trace()


@pytest.mark.parametrize("output", [None, 3.0])
@pytest.mark.parametrize("representation", [PMatDense, PMatImplicit])
def test_functions_without_outputs(m, b, output, representation):
    for matrix in MATRICES:
        refused(
            lambda matrix=matrix: multiplied(matrix(m, b, representation, function=lambda x, y: output)),
            TypeError,
            "function= returned",
        )


@pytest.mark.parametrize("matrix", OF_LOSSES, ids=lambda f: f.__name__)
@pytest.mark.parametrize("representation", [PMatDense, PMatImplicit])
def test_losses_that_are_no_real_numbers(m, b, matrix, representation):
    for bad, error, words in (
        (lambda f, y: f.sum(1) * 1j, TypeError, "loss: expected real numbers"),
        (lambda f, y: f.sum(1) * float("nan"), ValueError, "loss: its gradient has NaN"),
    ):
        if matrix is Hessian and error is ValueError:  # it is NaN there, for all to see
            continue
        refused(lambda bad=bad: multiplied(matrix(m, b, representation, bad)), error, words)


# Files, vectors, representations, likelihoods


def test_files(m, b, tmp_path):
    F = FIM(m, b, PMatKFAC)
    for path in (None, 3, [tmp_path / "a"], F):
        refused(lambda path=path: F.save(path), TypeError, "save: path", "a path")
        refused(lambda path=path: PMat.load(path), TypeError, "PMat.load: path", "a path")
        refused(lambda path=path: FMatMemmap.at(path), TypeError, "FMatMemmap.at: path", "folder")
    with pytest.raises(IsADirectoryError, match=tmp_path.name):
        F.save(tmp_path)
    with pytest.raises(FileNotFoundError, match="missing"):
        F.save(tmp_path / "missing" / "F.pt")
    with pytest.raises(FileNotFoundError, match="missing"):
        PMat.load(tmp_path / "missing")
    F.save(str(tmp_path / "F.pt"))
    refused(lambda: PMat.load(tmp_path / "F.pt", device="gpu"), ValueError, "device='gpu'")
    torch.testing.assert_close(PMat.load(tmp_path / "F.pt").to_torch(), F.to_torch())
    buffer = io.BytesIO()
    F.save(buffer)
    assert torch.load(io.BytesIO(buffer.getvalue()), weights_only=True)["class"] == "PMatKFAC"


def test_moves(m, b):
    of = one_of_each(m, b)
    implicit = Jacobian(m, b, representation=PFMapImplicit)
    for mine in (*of.values(), implicit):
        refused(lambda mine=mine: mine.to("gpu"), ValueError, "device='gpu'")
        refused(lambda mine=mine: mine.to(torch.float32), TypeError, "device:", "dtype")
        refused(lambda mine=mine: mine.to(dtype="float32"), TypeError, "dtype:", "torch.float64")
    for name in ("matrix", "products", "kernel", "factored map"):
        refused(lambda mine=of[name]: mine.to(dtype=torch.int64), TypeError, "dtype:", "real numbers", "int64")


def test_vectors(m):
    lc = LayerCollection.from_model(m)
    flat = torch.zeros(43)
    for wrong in (m, None, "0", {"0": 1}, flat):
        refused(lambda w=wrong: PVector(w, flat), TypeError, "layer_collection:", "from_model")
        refused(lambda w=wrong: random_pvector(w), TypeError, "layer_collection:", "from_model")
        if wrong is not None:
            refused(lambda w=wrong: PFMapDense(w, torch.zeros(1, 1, 43)), TypeError, "layer_collection:")
        refused(lambda w=wrong: PMatEye(w), TypeError, "layer_collection")
    for wrong in ("0", ["0"], m):
        refused(lambda w=wrong: PVector.from_model(m, w), TypeError, "layer_collection:")
        refused(lambda w=wrong: PVector.from_model_grad(m, w), TypeError, "layer_collection:")
        refused(lambda w=wrong: PVector(lc, flat).on(w), TypeError, "layer_collection:")
    for wrong in ([0.0] * 43, np.zeros(43), 3.0, PVector(lc, flat)):
        refused(lambda w=wrong: PVector(lc, w), TypeError, "vector_repr:", "tensor")
        refused(lambda w=wrong: FVector(w), TypeError, "vector_repr:", "tensor")
    for wrong in ([1], {"0": 1, "2": 2}, {"0": (1, 2), "2": (1, 2)}):
        refused(lambda w=wrong: PVector(lc, dict_repr=w), TypeError, "dict_repr:")
    for wrong in ("a", None, [2]):
        refused(lambda w=wrong: PVector(lc, flat).norm(w), TypeError, "norm: p")
    refused(lambda: random_pvector(lc, device="gpu"), ValueError, "device='gpu'")
    refused(lambda: random_pvector(lc, dtype=torch.long), TypeError, "dtype:", "int64")
    refused(lambda: random_pvector(lc, dtype="a"), TypeError, "dtype:")
    refused(lambda: random_pvector(lc, generator=3), TypeError, "generator:")
    other = PVector.from_model(nn.Linear(2, 2))
    for call in (lambda: PVector.from_model(m) + other, lambda: random_pvector(lc) @ other):
        refused(call, ValueError, "the PVector is of another layer collection")


def test_collections_and_kinds(m):
    lc = LayerCollection()
    refused(lambda: lc.add_layer("0", m[0]), TypeError, "layer:", "add_layer_from_model")
    refused(lambda: lc.add_layer(3, LayerCollection.from_model(m)["0"]), TypeError, "name:")
    refused(lambda: lc.add_layer_from_model(None, m), TypeError, "model:")
    refused(lambda: LayerCollection({"0": 3}), TypeError, "layers:")
    for wrong in ("a", m, 3, [nn.Linear]):
        refused(lambda w=wrong: whole(w), TypeError, "whole:")
    for wrong in (3, None):
        refused(lambda w=wrong: kind(nn.Bilinear)(w), TypeError, "kind:", "a function")
    refused(lambda: kind(nn.Bilinear, packing=3), TypeError, "packing:")
    refused(lambda: kind(nn.Bilinear, parameters=3), TypeError, "parameters=3")


def test_representations_of_layers(m, b):
    F = FIM(m, b, PMatDiag)
    for wrong in ("PMatDiag", F, nn.Linear, None, lambda x: x):
        refused(lambda w=wrong: PMatMixed.of(PMatDiag, {"0": w}), TypeError, "the rule for '0'", "PMat class")
        refused(lambda w=wrong: PMatMixed.of(w, {}), TypeError, "default", "PMat class")
    refused(lambda: PMatMixed.of(PMatDiag, ["0"]), TypeError, "rules:")
    lc = F.layer_collection
    for wrong in (3, "g", m, nn.Linear):
        refused(lambda w=wrong: PMatDense(lc, generator=w, examples=b), TypeError, "generator:", "FIM(")
        refused(lambda w=wrong: PMatDense(w, generator=w, examples=b), TypeError)
    for representation in (PMatDense, PMatDiag, PMatKFAC, PMatImplicit):
        refused(lambda r=representation: r(lc, data="a"), TypeError, "data:", "'a'")
        refused(lambda r=representation: r(None, data=F.root), TypeError, "layer_collection")
        refused(lambda r=representation: r(), TypeError, "layer_collection")
    for wrong in ("a", None, 1j, torch.ones(3)):
        refused(lambda w=wrong: PMatEye(lc, scaling=w), TypeError, "scaling")
    refused(lambda: PMatEye(lc, device="gpu"), ValueError, "device='gpu'")
    refused(lambda: PMatEye(lc, dtype="a"), TypeError, "dtype:")


def test_likelihoods(m, b):
    for wrong in ("a", None, 1j, torch.ones(3)):
        refused(lambda w=wrong: Gaussian(w), TypeError, "Gaussian: variance")
    for wrong in (0, -1.0, float("nan"), float("inf")):
        refused(lambda w=wrong: Gaussian(w), ValueError, "Gaussian: variance")
    for wrong in ("a", None, 1.0, True):
        refused(lambda w=wrong: Categorical(w), TypeError, "Categorical: dim")
    refused(lambda: Categorical(positions="a"), TypeError, "Categorical: positions")
    for dim in (5, 2, 0, -2, -7):
        refused(lambda d=dim: FIM(m, b, PMatDense, Categorical(d)), ValueError, f"dim={dim}", "(6, 3)")
    torch.testing.assert_close(
        FIM(m, b, PMatDense, Categorical(-1)).to_torch(), FIM(m, b, PMatDense, Categorical(1)).to_torch()
    )


@pytest.mark.parametrize("representation", [PMatDense, PMatKFAC, PMatDiag, PMatImplicit])
def test_likelihoods_that_give_something_else(m, b, representation):
    class Odd(Likelihood):
        def __init__(self, made):
            self.made = made

        def sqrt(self, f):
            return self.made(f)

        def sample(self, f, trials, generator=None):
            return self.made(f)

        def hvp(self, f, u):
            return u

    for made, error in (
        (lambda f: f, TypeError),
        (lambda f: None, TypeError),
        (lambda f: [f], TypeError),
        (Cotangents.of, ValueError),
    ):
        if representation is not PMatImplicit:  # which asks for hvp alone
            refused(lambda made=made: FIM(m, b, representation, Odd(made)), error, "cotangents", "Cotangents.of(")
        if made is not Cotangents.of:
            refused(lambda made=made: FIM_MonteCarlo(m, b, representation, Odd(made)).trace(), error, "Cotangents.of(")


def test_generators_of_jacobians(m, b):
    lc = LayerCollection.from_model(m)
    refused(lambda: Generator(m, lc, None), TypeError, "cotangents:", "function")
    refused(lambda: Generator(m, lc), TypeError, "Generator: missing a required argument: 'cotangents'")
    refused(lambda: list(Generator(m, lc, lambda f, b, k: f).stream(b)), TypeError, "Cotangents.of(")


def test_targets_and_own_losses(m, b):
    for wrong in (lambda: b[1], m, 3.5):
        for matrix in OF_LOSSES:
            refused(lambda w=wrong, f=matrix: f(m, b, PMatDiag, targets=w), TypeError, "targets:", "a function")
    refused(lambda: OwnLoss(count=3), TypeError, "count:")
    for wrong in ("a", None):
        loss = OwnLoss(count=lambda batch, w=wrong: w)
        refused(lambda loss=loss: Hessian(m, b, PMatDense, loss, function=lambda x, y: m(x).sum()), TypeError, "count")


def test_arguments_of_spectra(m, b):
    F = FIM(m, b, PMatDense)
    found = spectrum.spectral_density(F, steps=5)
    for call, name in (
        (lambda: found.count("a"), "low"),
        (lambda: found.count(high=None), "high"),
        (lambda: found.density(grid=[1.0]), "grid"),
        (lambda: found.density(width="a"), "width"),
        (lambda: found.log_density(floor="a"), "floor"),
        (lambda: found.log_density(grid="a"), "grid"),
        (lambda: found.sum("exp"), "f:"),
        (lambda: found.sum(lambda l: 3), "f returns"),
        (lambda: found.logdet("a"), "regul"),
        (lambda: found.negative("a"), "threshold"),
        (lambda: spectrum.extreme_eigenpairs(F, 1, tol="a"), "tol"),
        (lambda: spectrum.extreme_eigenpairs(F, 1, block="a"), "block"),
        (lambda: spectrum.extreme_eigenpairs(F, 1, max_products="a"), "max_products"),
        (lambda: spectrum.extreme_eigenpairs(F, 1, generator=3), "generator"),
        (lambda: F.trace(estimator=partial(linalg.xtrace, products="6")), "products"),
        (lambda: F.trace(estimator=partial(linalg.hutchpp, products=6.5)), "products"),
        (lambda: F.get_diag(estimator=partial(linalg.xdiag, products="6")), "products"),
        (lambda: F.trace(estimator=partial(linalg.xtrace, rtol="a")), "rtol"),
    ):
        refused(call, TypeError, name)
    refused(lambda: found.density(width=0), ValueError, "width")
    refused(lambda: spectrum.extreme_eigenpairs(F, 1, block=0), ValueError, "block")
    refused(lambda: F.trace(estimator=partial(linalg.xtrace, rtol=-1.0)), ValueError, "rtol")


def test_influence_of_another_dtype(m, b):
    G = GGN(m, b, PMatKFAC)
    refused(lambda: Influence(m, G.to(dtype=torch.float16)), ValueError, "matrix:", ".to(device, dtype)")
    refused(lambda: Influence(m, G).top(b, b, 1, largest="a"), TypeError, "largest")
