"""Every representation of every matrix of every model is the projection of the dense oracle that its definition
says.
"""

from dataclasses import replace
from functools import partial

import oracle
import pytest
import torch
from laws import LOSSES, PROJECTIONS
from models import CASES, SMALL
from torch import nn

from nngeometry import (
    FIM,
    GGN,
    EmpiricalFisher,
    FIM_MonteCarlo,
    FVector,
    Gaussian,
    Generator,
    GradientCovariance,
    GramMatrix,
    Jacobian,
    LayerCollection,
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
    Poisson,
    PVector,
    memory,
    memory_budget,
)
from nngeometry.generator import one_by_one
from nngeometry.likelihood import Cotangents

TOLERANCE = 1e-10
pytestmark = pytest.mark.filterwarnings("ignore:.*cannot be vectorised:RuntimeWarning")


def batches_of(name):
    model, one, function = CASES[name].make(3)
    _, other, _ = CASES[name].make(2)
    return model, [one, other], function


@pytest.mark.parametrize("name", CASES)
def test_every_model(name):
    """The exact Fisher matrix of all models in all exact representations, over uneven minibatches."""
    model, batches, function = batches_of(name)
    M = oracle.fim(model, batches, "regression", function)
    for representation, project in PROJECTIONS.items():
        F = FIM(model, batches, representation, "regression", function=function)
        expected = project(M, F.layer_collection)
        assert oracle.relative(F.to_torch(), expected) < TOLERANCE, representation


@pytest.mark.parametrize("variant", list(oracle.NLL))
@pytest.mark.parametrize("name", [*SMALL, "cls-token", "attention"])
def test_every_variant(name, variant):
    model, batches, function = batches_of(name)
    likelihood = Poisson() if variant == "poisson" else variant
    M = oracle.fim(model, batches, variant, function)
    for representation, project in PROJECTIONS.items():
        F = FIM(model, batches, representation, likelihood, function=function)
        assert oracle.relative(F.to_torch(), project(M, F.layer_collection)) < TOLERANCE, representation


class Segmenter(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(1, 3, 2)

    def forward(self, x):
        return self.conv(torch.tanh(x))


def test_segmentation():
    model = oracle.randomise(Segmenter())
    batches = [(torch.randn(3, 1, 3, 3),), (torch.randn(1, 1, 3, 3),)]
    total, n = 0, 0
    for batch in batches:
        J = oracle.jacobian(model, batch)
        f = model(batch[0])
        for b in range(len(f)):
            H = oracle._hessian(lambda one: -torch.log_softmax(one, 0)[0].sum(), f[b])
            total = total + J[:, b].T @ H @ J[:, b]
            n += 1
    M = total / n
    for representation, project in PROJECTIONS.items():
        F = FIM(model, batches, representation, "segmentation_logits")
        assert oracle.relative(F.to_torch(), project(M, F.layer_collection)) < TOLERANCE, representation


def plain(loss):
    """The loss of one example, summed over its entries."""
    if not isinstance(loss, nn.Module):
        return loss
    options = {
        k: getattr(loss, k) for k in ("weight", "pos_weight", "ignore_index", "label_smoothing") if hasattr(loss, k)
    }
    return type(loss)(**{k: v for k, v in options.items() if v is not None}, reduction="none")


@pytest.mark.parametrize("which", LOSSES)
@pytest.mark.parametrize("name", ["mlp", "convnet", "shared"])
def test_empirical_and_covariance(name, which):
    make, loss = LOSSES[which]
    model, batches, _ = batches_of(name)
    outputs = 4 if name == "shared" else 3
    if outputs == 4:
        model = nn.Sequential(model, oracle.randomise(nn.Linear(4, 3)))
    batches = [(x, make(len(x))) for (x,) in batches]
    g = oracle.loss_gradients(model, batches, plain(loss))
    raw = g.T @ g / len(g)
    mean = g.mean(0)
    centred = raw - torch.outer(mean, mean)
    for representation, project in PROJECTIONS.items():
        F = EmpiricalFisher(model, batches, representation, loss)
        assert oracle.relative(F.to_torch(), project(raw, F.layer_collection)) < TOLERANCE, representation
        C = GradientCovariance(model, batches, representation, loss)
        assert oracle.relative(C.to_torch(), project(centred, C.layer_collection)) < 1e-8, representation


def test_centred_kfac_and_ekfac():
    model, batches, _ = batches_of("mlp")
    batches = [(x, torch.randint(3, (len(x),))) for (x,) in batches]
    with pytest.raises(NotImplementedError, match="no Kronecker factors; use PMatEKFAC"):
        GradientCovariance(model, batches, PMatKFAC)
    g = oracle.loss_gradients(model, batches, nn.CrossEntropyLoss())
    M = (g - g.mean(0)).T @ (g - g.mean(0)) / len(g)
    C = GradientCovariance(model, batches, PMatEKFAC)
    _check_diagonal_in_basis(C, M)


def _check_diagonal_in_basis(F, M):
    """EKFAC is the exact diagonal of M in its own basis."""
    for part, (name, s) in zip(F.root.parts, F.layer_collection.slices().items(), strict=True):
        packing = F.layer_collection[name].packing
        basis = packing.unpack(part.block.basis.to_dense().T.reshape(-1, *packing.shape))  # one eigenvector a row
        torch.testing.assert_close(basis @ basis.T, torch.eye(len(basis)), atol=1e-9, rtol=0)
        expected = torch.einsum("kp,pq,kq->k", basis, M[s, s], basis)
        assert oracle.relative(part.block.l.flatten(), expected) < TOLERANCE


@pytest.mark.parametrize("sharing", ["expand", "reduce"])
@pytest.mark.parametrize(
    "name", ["mlp", "conv2d-groups", "convt2d-groups", "conv1d", "embedding", "shared", "linear-sequence", "two-inputs"]
)
def test_kfac_and_ekfac_by_definition(name, sharing):
    model, batches, function = batches_of(name)
    lc = LayerCollection.from_model(model)
    M = oracle.fim(model, batches, "classif_logits", function)
    K = FIM(model, batches, PMatKFAC, function=function, sharing=sharing)
    E = FIM(model, batches, PMatEKFAC, function=function, sharing=sharing)
    for layer, s in lc.slices().items():
        k, e = K.block(layer).to_torch(), E.block(layer).to_torch()
        far = 1e-12 * torch.linalg.norm(M[s, s])
        assert torch.linalg.norm(M[s, s] - e) <= torch.linalg.norm(M[s, s] - k) + far
        torch.testing.assert_close(E.trace(per_layer=True)[layer], M[s, s].trace())
    kronecker = lc.select(lambda layer: layer.kronecker)
    E = FIM(model, batches, PMatEKFAC, function=function, sharing=sharing, layer_collection=kronecker)
    _check_diagonal_in_basis(E, oracle.fim(model, batches, "classif_logits", function, kronecker))


@pytest.mark.parametrize("name", ["mlp", "two-inputs", "embedding-1d"])
def test_kfac_is_exact_for_one_example(name):
    model, batch, function = CASES[name].make(1)
    M = oracle.fim(model, [batch], "classif_logits", function)
    for sharing in ("expand", "reduce"):
        F = FIM(model, batch, PMatKFAC, function=function, sharing=sharing)
        assert oracle.relative(F.to_torch(), oracle.blockdiag(M, F.layer_collection)) < TOLERANCE


def test_kfac_is_exact_for_each_group_of_one_example():
    """One position, several groups: a Kronecker product for each group, no terms between groups."""
    model = oracle.randomise(nn.Sequential(nn.Conv2d(4, 6, 2, groups=2), nn.Flatten()))
    batch = (torch.randn(1, 4, 2, 2),)
    M = oracle.fim(model, [batch], "regression")
    F = FIM(model, batch, PMatKFAC, "regression")
    lc = F.layer_collection
    index = lc["0"].packing.pack(torch.arange(lc.numel()))
    expected = torch.zeros_like(M)
    for group in index:
        i = group.flatten()
        expected[i.unsqueeze(1), i] = M[i.unsqueeze(1), i]
    assert oracle.relative(F.to_torch(), expected) < TOLERANCE


@pytest.mark.parametrize("positions", [(), (4,), (2, 2)])
def test_kfac_is_exact_for_a_linear_layer_with_gaussian_likelihood(positions):
    model = oracle.randomise(nn.Linear(3, 2))
    batches = [(torch.randn(5, *positions, 3),), (torch.randn(2, *positions, 3),)]
    M = oracle.fim(model, batches, "regression")
    F = FIM(model, batches, PMatKFAC, Gaussian())
    assert oracle.relative(F.to_torch(), M) < TOLERANCE


class MeanThen(nn.Module):
    """A deep linear net whose positions are averaged before the loss."""

    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(3, 4), nn.Linear(4, 2)

    def forward(self, x):
        return self.b(self.a(x)).mean(1)


class EveryPosition(MeanThen):
    """A deep linear net with an output for every position."""

    def forward(self, x):
        return self.b(self.a(x))


@pytest.mark.parametrize(("net", "sharing"), [(EveryPosition, "expand"), (MeanThen, "reduce")])
def test_kfac_is_exact_for_deep_linear_nets(net, sharing):
    """In the setting that belongs to each treatment of shared weights (Eschenhagen et al. 2023)."""
    model = oracle.randomise(net())
    batches = [(torch.randn(5, 3, 3),), (torch.randn(2, 3, 3),)]
    M = oracle.fim(model, batches, "regression")
    F = FIM(model, batches, PMatKFAC, "regression", sharing=sharing)
    assert oracle.relative(F.to_torch(), oracle.blockdiag(M, F.layer_collection)) < TOLERANCE
    other = FIM(model, batches, PMatKFAC, "regression", sharing="reduce" if sharing == "expand" else "expand")
    assert oracle.relative(other.to_torch(), oracle.blockdiag(M, F.layer_collection)) > 1e-3


def test_kfac_of_convolution_is_exact_for_deep_linear_convnets_reduced():
    model = oracle.randomise(nn.Sequential(nn.Conv2d(2, 3, 2, stride=2), nn.Conv2d(3, 2, 1)))
    batches = [(torch.randn(4, 2, 4, 4),)]

    def function(x):
        return model(x).mean((2, 3))

    M = oracle.fim(model, batches, "regression", function)
    F = FIM(model, batches, PMatKFAC, "regression", function=function, sharing="reduce")
    assert oracle.relative(F.to_torch(), oracle.blockdiag(M, F.layer_collection)) < TOLERANCE


@pytest.mark.parametrize("name", ["mlp", "convnet", "embedding", "cls-token", "attention", "tied"])
def test_mixed(name):
    """Each layer in the representation that was chosen for it, joint ones with their cross terms, in one pass."""
    model, batches, function = batches_of(name)
    lc = LayerCollection.from_model(model)
    first, last = next(iter(lc)), list(lc)[-1]
    M = oracle.fim(model, batches, "classif_logits", function)
    passes = []

    class Counting(list):
        def __iter__(self):
            passes.append(1)
            return super().__iter__()

    mixed = PMatMixed.of(PMatDiag, {lambda layer: layer.name in (first, last): PMatDense})
    F = FIM(model, Counting(batches), mixed, function=function)
    assert len(passes) == 1
    expected = torch.diag(M.diagonal())
    index = torch.cat([torch.arange(lc.slices()[k].start, lc.slices()[k].stop) for k in dict.fromkeys((first, last))])
    expected[index.unsqueeze(1), index] = M[index.unsqueeze(1), index]
    assert oracle.relative(F.to_torch(), expected) < TOLERANCE
    v = PVector.from_model(model).detach()
    torch.testing.assert_close(F.mv(v).to_torch(), expected @ v.to_torch())
    torch.testing.assert_close(
        F.solve(v, 0.1).to_torch(), torch.linalg.solve(expected + 0.1 * torch.eye(len(M)), v.to_torch())
    )


@pytest.mark.parametrize(
    "representation", [PMatDense, PMatBlockDiag, PMatDiag, PMatQuasiDiag, PMatKFAC, PMatEKFAC, PMatLowRank]
)
@pytest.mark.parametrize("name", SMALL)
def test_mixed_of_one_is_that_one(name, representation):
    model, batches, function = batches_of(name)
    one = FIM(model, batches, representation, function=function)
    mixed = FIM(model, batches, PMatMixed.of(representation, {}), function=function)
    assert oracle.relative(mixed.to_torch(), one.to_torch()) < 1e-12


@pytest.mark.parametrize(
    "representation", [PMatDense, PMatDiag, PMatQuasiDiag, PMatKFAC, PMatEKFAC, PMatBlockDiag, PMatLowRank, PMatEye]
)
@pytest.mark.parametrize("name", [*SMALL, "cls-token", "windows", "positions"])
def test_batches_chunks_and_order_do_not_matter(name, representation):
    model, batch, function = CASES[name].make(6)
    (x,) = batch
    whole = FIM(model, batch, representation, function=function).to_torch()
    order = torch.randperm(6)
    split = [(x[order[:1]],), (x[order[1:4]],), (x[order[4:]],)]
    assert oracle.relative(FIM(model, split, representation, function=function).to_torch(), whole) < 1e-9
    with memory_budget(2**14):  # a work array of a kilobyte
        small = FIM(model, split, PMatMixed.of(representation, {}), function=function)
    assert oracle.relative(small.to_torch(), whole) < 1e-9
    twice = FIM(model, [batch, batch], representation, function=function).to_torch()
    assert oracle.relative(twice, whole) < 1e-9


@pytest.mark.parametrize("representation", [PMatDiag, PMatQuasiDiag, PMatEKFAC, PMatEye])
def test_minibatches_that_are_split_see_the_same_draws(representation):
    model, (one, two), _ = batches_of("convnet")
    loader = [one, two]

    def drawn():
        return FIM_MonteCarlo(model, loader, representation, trials=3, generator=torch.Generator().manual_seed(0))

    def trace():
        return FIM(model, loader, PMatImplicit).trace()

    whole, exact = drawn().to_torch(), trace()
    for budget in (2**12, 2**15, 2**17):
        with memory_budget(budget):
            found, sum_of_squares = drawn(), trace()
        assert oracle.relative(found.to_torch(), whole) < 1e-10
        assert oracle.relative(sum_of_squares, exact) < 1e-10


class Squeezing(nn.Module):
    """Loses the axis of examples where there is one."""

    def __init__(self):
        super().__init__()
        self.conv, self.head = nn.Conv2d(1, 3, 2), nn.Linear(3, 2)

    def forward(self, x):
        return self.head(self.conv(x).relu().mean((2, 3), keepdim=True).squeeze())


@pytest.mark.parametrize("n", [2, 3, 5, 8])
def test_minibatches_are_split_into_several_examples(n):
    """At least two each; an example whose output is nearly zero is no reason to complain."""
    model = oracle.randomise(Squeezing())
    x = torch.randn(n, 1, 4, 4)
    with torch.no_grad():
        model.head.bias -= model(x)[0] - 1e-12
    whole = FIM(model, (x,), PMatDiag).to_torch()
    with memory_budget(2**12):
        assert oracle.relative(torch.diag(FIM(model, (x,), PMatDiag).get_diag()), whole) < 1e-10


def test_a_minibatch_that_is_not_all_of_examples_is_not_split():
    model, ((x, *_), _), _ = batches_of("convnet")
    batch = {"x": x, "scale": torch.rand(2, 3)}

    def function(batch):
        return model(batch["x"]) * batch["scale"].sum(0)

    whole = FIM(model, batch, PMatDiag, function=function)
    with memory_budget(2**12):
        found = FIM(model, batch, PMatDiag, function=function)
    assert oracle.relative(found.to_torch(), whole.to_torch()) < 1e-10


class Watching(nn.Module):
    """Notes how many examples it is called on; much is made of each on the way if ``width`` is large."""

    def __init__(self, width=1):
        super().__init__()
        self.head = nn.Linear(3, 2)
        self.width = width
        self.seen = []

    def forward(self, x):
        self.seen.append(len(x))
        with torch.no_grad():
            scale = x.new_ones(len(x), self.width).mean(1, keepdim=True)
        return self.head(x * scale).tanh()


def watched(loader, width=1, **options):
    """The numbers of examples that a matrix calls its model on, less those that it makes of a few examples."""
    model = oracle.randomise(Watching(width))
    FIM(model, loader, PMatDiag, **options)
    return [n for n in model.seen if n > 3]


MATRICES = {
    "fim": lambda *a: FIM(*a),
    "mc": lambda *a: FIM_MonteCarlo(*a, trials=2, generator=torch.Generator().manual_seed(0)),
    "empirical": lambda *a: EmpiricalFisher(*a),
    "covariance": lambda *a: GradientCovariance(*a),
    "ggn": lambda *a: GGN(*a, nn.CrossEntropyLoss(weight=torch.tensor([1.0, 2.0]))),
}


@pytest.mark.parametrize("representation", [PMatDense, PMatDiag, PMatKFAC, PMatEKFAC, PMatLowRank, PMatImplicit])
@pytest.mark.parametrize("matrix", MATRICES)
def test_small_minibatches_are_observed_together(matrix, representation):
    """Which changes no number, nor which labels are drawn."""
    if (matrix, representation) == ("covariance", PMatKFAC):
        pytest.skip("has no Kronecker factors")
    model = oracle.randomise(Watching())
    batches = [(torch.randn(n, 3), torch.randint(2, (n,))) for n in (5, 4, 6)]
    v = PVector.from_model(model).detach()
    joined = MATRICES[matrix](model, batches, representation).mv(v).to_torch()
    assert 15 in model.seen
    model.seen.clear()
    with memory_budget(2**10):
        apart = MATRICES[matrix](model, batches, representation).mv(v).to_torch()
    assert 15 not in model.seen
    assert oracle.relative(joined, apart) < 1e-12


@pytest.mark.parametrize("representation", [PMatDense, PMatDiag, PMatQuasiDiag, PMatKFAC, PMatEKFAC, PMatEye])
@pytest.mark.parametrize("name", ["mlp", "convnet", "conv2d-same", "conv2d-groups", "transformer-layer"])
def test_the_pieces_of_accelerators_change_nothing(name, representation, cut):
    model, batch, function = CASES[name].make()
    make = partial(FIM, model, batch, representation, "regression", function=function)
    v = PVector.from_model(model).detach()
    expected = make().mv(v).to_torch()
    for large_product in (0, 10**10):
        cut(replace(memory.ACCELERATOR, large_product=large_product))
        for budget in (2**30, 2**16):
            with memory_budget(budget):
                assert oracle.relative(make().mv(v).to_torch(), expected) < 1e-12


def test_what_is_not_observed_together(cut):
    cut(memory.CPU)

    def batches(*shapes, dtype=None):
        return [(torch.randn(n, 3, dtype=dtype), torch.randint(2, (n,))) for n in shapes]

    assert watched(batches(5, 4, 6)) == [15]
    with memory_budget(2**30):  # much is made of each example, out of sight of autograd
        assert watched(batches(5, 4, 6), width=2**20) == [5, 4, 6]
    assert watched([(x, y, 1.0) for x, y in batches(5, 4)]) == [5, 4]
    assert watched([(x, y, torch.tensor(2.0)) for x, y in batches(5, 4)]) == [5, 4]
    assert watched([(x, y.view(shape)) for (x, y), shape in zip(batches(4, 4), [(4, 1), (4,)], strict=True)]) == [4, 4]
    assert watched([[x, y] if len(x) == 4 else (x, y) for x, y in batches(5, 4, 6, 7)]) == [5, 4, 13]
    named = [{"x": x, "y": y} for x, y in batches(5, 4)]
    model = oracle.randomise(Watching())
    FIM(model, named, PMatDiag, function=lambda batch: model(batch["x"]))
    assert 9 in model.seen
    model.seen.clear()
    FIM(model, [named[0], {"x": named[1]["x"]}], PMatDiag, function=lambda batch: model(batch["x"]))
    assert 9 not in model.seen


def test_minibatches_with_unlike_cotangents_are_observed_apart():
    model = oracle.randomise(Watching())
    batches = [(torch.randn(n, 3),) for n in (4, 5)]

    def cotangents(f, batch, position):
        return Cotangents.of(torch.ones(len(batch[0]) - 2, *f.shape, dtype=f.dtype))

    lc = LayerCollection.from_model(model)
    generator = Generator(model, lc, one_by_one(cotangents))
    found = PMatDense(layer_collection=lc, generator=generator, examples=batches).to_torch()
    each = [PMatDense(layer_collection=lc, generator=generator, examples=[b]).to_torch() for b in batches]
    assert oracle.relative(found, (4 * each[0] + 5 * each[1]) / 9) < 1e-12


def test_loss_scale():
    """A loss c times as large gives matrices c**2 times as large."""
    model, (one, _), _ = batches_of("convnet")
    batch = (one[0], torch.randint(3, (3,)))

    def scaled(f, y):
        return 10 * nn.functional.cross_entropy(f, y, reduction="none")

    for representation in (PMatDense, PMatKFAC, PMatEKFAC, PMatDiag):
        a = EmpiricalFisher(model, batch, representation).to_torch()
        b = EmpiricalFisher(model, batch, representation, scaled).to_torch()
        assert oracle.relative(b, 100 * a) < 1e-12


@pytest.mark.parametrize(
    "variant", ["classif_logits", "classif_binary_logits", "regression", "segmentation_logits", "poisson"]
)
@pytest.mark.parametrize("n", [1, 4])
def test_monte_carlo_converges(variant, n):
    """The error over many trials is that of so many independent draws, also where trials is a multiple of the batch."""
    model, batch, _ = CASES["mlp"].make(n)
    if variant == "segmentation_logits":
        model, batch = oracle.randomise(Segmenter()), (torch.randn(n, 1, 3, 3),)
    likelihood = Poisson() if variant == "poisson" else variant
    exact = FIM(model, batch, PMatDense, likelihood).to_torch()
    errors = {}
    for trials in (4, 256):
        runs = [
            FIM_MonteCarlo(
                model, batch, PMatDense, likelihood, trials=trials, generator=torch.Generator().manual_seed(seed)
            ).to_torch()
            for seed in range(12)
        ]
        errors[trials] = torch.stack([(r - exact).square().sum() for r in runs]).mean().sqrt() / exact.norm()
    assert errors[4] / errors[256] > 4  # 8 in expectation
    assert errors[256] < 0.35


def test_monte_carlo_is_a_function_of_its_generator():
    model, batches, _ = batches_of("mlp")

    def run(seed, representation=PMatDense):
        return FIM_MonteCarlo(model, batches, representation, trials=3, generator=torch.Generator().manual_seed(seed))

    assert torch.equal(run(0).to_torch(), run(0).to_torch())
    assert not torch.equal(run(0).to_torch(), run(1).to_torch())
    for representation, project in PROJECTIONS.items():  # the same draws, whatever the number of passes
        F = run(0, representation)
        assert oracle.relative(F.to_torch(), project(run(0).to_torch(), F.layer_collection)) < TOLERANCE
    torch.testing.assert_close(run(0, PMatEKFAC).trace(), run(0).trace())


def test_float32_and_bfloat16():
    model, batch, _ = CASES["convnet"].make(6)
    exact = {r: FIM(model, batch, r).to_torch() for r in (PMatDense, PMatKFAC, PMatEKFAC, PMatDiag)}
    model, batch = model.float(), (batch[0].float(),)
    for representation, expected in exact.items():
        F = FIM(model, batch, representation)
        assert F.dtype == torch.float32
        assert oracle.relative(F.to_torch().double(), expected) < 1e-5
    model, batch = model.bfloat16(), (batch[0].bfloat16(),)
    for representation, expected in exact.items():
        F = FIM(model, batch, representation)
        assert F.dtype == torch.float32
        assert oracle.relative(F.to_torch().double(), expected) < 0.1
    v = PVector.from_model(model).detach().to(dtype=torch.float32)
    F = FIM(model, batch, PMatImplicit)
    assert F.dtype == torch.float32
    assert oracle.relative(F.mv(v).to_torch().double(), exact[PMatDense] @ v.to_torch().double()) < 0.1


@pytest.mark.parametrize("output", [torch.bfloat16, torch.float32])
def test_models_that_open_autocast(output):
    """As precise as what it computes in, with statistics in single precision."""
    model, batch, _ = CASES["convnet"].make(6)
    exact = {r: FIM(model, batch, r) for r in (PMatDense, PMatKFAC, PMatEKFAC, PMatDiag, PMatImplicit)}
    v = PVector.from_model(model).clone().detach()
    model, batch = model.float(), (batch[0].float(),)

    def cast(x):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            return model(x).to(output)

    for representation, expected in exact.items():
        found = FIM(model, batch, representation, function=cast)
        assert found.dtype == torch.float32
        Fv = found.mv(v.to(dtype=torch.float32)).to_torch().double()
        assert oracle.relative(Fv, expected.mv(v).to_torch()) < 0.03


@pytest.mark.parametrize("how", ["model", "autocast"])
def test_statistics_of_half_precision_are_in_single(how):
    """A sum of thousands of moments of the size of one comes to a halt in bfloat16, at 256."""
    x, low = torch.randn(3000, 4).bfloat16(), torch.bfloat16
    model = nn.Linear(4, 2).to(low if how == "model" else torch.float32)

    def cast(x):
        with torch.autocast("cpu", dtype=low):
            return model(x)

    for batches in ([(x,)], list(zip(x.split(100), strict=True))):
        batches = [(b.float(),) for (b,) in batches] if how == "autocast" else batches
        K = FIM(model, batches, PMatKFAC, "regression", function=cast if how == "autocast" else None)
        kron = K.root.parts[0].block
        a = torch.nn.functional.pad(x.double(), (0, 1), value=1.0)
        assert oracle.relative(kron.right.to_dense().double(), a.T @ a / len(a)) < 1e-5
        assert oracle.relative(kron.left.to_dense().double(), torch.eye(2)) < 1e-6
        assert kron.right.dtype == kron.left.dtype == torch.float32


def test_autocast_around_matrices_changes_nothing():
    model, batch, _ = CASES["convnet"].make(6)
    model, batch = model.float(), (batch[0].float(),)
    v = PVector.from_model(model).clone().detach()

    def computed():
        for representation in (PMatDense, PMatBlockDiag, PMatKFAC, PMatEKFAC, PMatLowRank, PMatImplicit):
            M = FIM(model, batch, representation)
            yield M.mv(v).to_torch()
            yield M.vTMv(v)
            if representation is not PMatImplicit:
                yield M.solve(v, regul=0.1).to_torch()
                yield M.inv(0.1).trace()
        K = GramMatrix(model, batch)
        yield K.to_torch()
        yield K.solve(K.mv(FVector(torch.ones(K.size()[:2], dtype=torch.float32))), regul=1.0).to_torch()
        J = Jacobian(model, batch)
        yield J.jvp(v).to_torch()
        yield J.vjp(J.jvp(v)).to_torch()

    plain = list(computed())
    with torch.autocast("cpu", dtype=torch.bfloat16):
        around = list(computed())
    assert all(map(torch.equal, plain, around))


@pytest.mark.parametrize("sharing", ["expand", "reduce"])
def test_kfac_of_few_inputs_holds_them(sharing):
    model = oracle.randomise(nn.Sequential(nn.Conv2d(4, 3, 3), nn.Tanh(), nn.Flatten(), nn.Linear(12, 3)))
    few = [(torch.randn(1, 4, 4, 4),), (torch.randn(1, 4, 4, 4),)]
    many = [(torch.randn(40, 4, 4, 4),)]
    F, G, both = (
        FIM(model, loader, PMatKFAC, "regression", sharing=sharing).block("0") for loader in (few, many, few + many)
    )
    factors = [matrix.root.parts[0].block for matrix in (F, G, both)]
    assert len(factors[0].right.rows) == (8 if sharing == "expand" else 2)
    a, b, c = (factor.right.to_dense() for factor in factors)
    assert oracle.relative(c, (2 * a + 40 * b) / 42) < TOLERANCE
    close = {F: F.to_torch(), G: G.to_torch()}
    for one in (F, G):
        for other in (F, G):
            product = one @ other
            assert type(product.root.parts[0].block) is type(factors[0])
            assert oracle.relative(product.to_torch(), close[one] @ close[other]) < TOLERANCE


def test_ekfac_of_few_inputs_has_a_thin_basis():
    """Exact where the inputs do not span their space: what is outside has no second moment, nor is it decomposed."""
    model = oracle.randomise(nn.Sequential(nn.Conv2d(4, 3, 3), nn.Tanh(), nn.Flatten(), nn.Linear(12, 3)))
    batches = [(torch.randn(1, 4, 4, 4),), (torch.randn(1, 4, 4, 4),)]
    F = FIM(model, batches, PMatEKFAC, "regression")
    lc = F.layer_collection
    M = oracle.fim(model, batches, "regression")
    K = FIM(model, batches, PMatKFAC, "regression").to_torch()
    for name, s in lc.slices().items():
        block = F.block(name)
        assert block.root.parts[0].block.l.numel() < block.size(0)
        Q = torch.linalg.eigh(K[s, s]).eigenvectors
        held = block.to_torch()
        assert oracle.relative(held.trace(), M[s, s].trace()) < TOLERANCE
        assert oracle.relative(block.eigenvalues().sum(), M[s, s].trace()) < TOLERANCE
        assert oracle.relative(Q.T @ held @ Q @ (Q.T @ K[s, s] @ Q), Q.T @ K[s, s] @ Q @ (Q.T @ held @ Q)) < 1e-9
    more = (torch.randn(5, 4, 4, 4),)
    F.update_diag(more)
    assert oracle.relative(F.trace(), oracle.fim(model, [more], "regression").trace()) < TOLERANCE
    v = PVector(lc, torch.randn(lc.numel()))
    solved = F.solve(v, 0.1)
    assert oracle.relative((F @ solved + 0.1 * solved).to_torch(), v.to_torch()) < TOLERANCE
    many = [(torch.randn(40, 4, 4, 4),), (torch.randn(1, 4, 4, 4),)]
    for order in (many, many[::-1]):  # few inputs join many, either way round
        whole = FIM(model, order, PMatEKFAC, "regression").block("0").root.parts[0].block
        assert whole.l.numel() == whole.numel


@pytest.mark.parametrize("lengths", [(1, 3), (3, 1), (1, 1, 2, 1)])
@pytest.mark.parametrize("representation", [PMatDense, PMatBlockDiag])
def test_sequences_of_one_position_among_others(lengths, representation):
    model = oracle.randomise(nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2)))
    batches = [(torch.randn(2, length, 3),) for length in lengths]

    def function(x):
        return model(x).sum(1)

    F = FIM(model, batches, representation, function=function)
    each = [FIM(model, [batch], representation, function=function).to_torch() for batch in batches]
    assert oracle.relative(F.to_torch(), torch.stack(each).mean(0)) < 1e-12


@pytest.mark.parametrize("groups", [1, 2])
def test_transposed_convolutions_of_one_position(groups):
    model = nn.Sequential(nn.ConvTranspose2d(4, 6, 3, padding=1, groups=groups), nn.Flatten(), nn.Linear(6, 2))
    oracle.randomise(model)
    x = torch.randn(3, 4, 1, 1)
    F = FIM(model, (x,), PMatDense, variant="regression")
    assert oracle.relative(F.to_torch(), oracle.fim(model, [(x,)], "regression")) < 1e-12
