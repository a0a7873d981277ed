"""Hessian and Gauss-Newton matrices equal loops over autograd, which central differences of the gradient check."""

import oracle
import pytest
import torch
from models import CASES
from torch import nn
from torch.utils.checkpoint import checkpoint

from nngeometry import (
    FIM,
    GGN,
    EmpiricalFisher,
    FiniteDifference,
    Hessian,
    LayerCollection,
    PMatBlockDiag,
    PMatDense,
    PMatDiag,
    PMatEKFAC,
    PMatImplicit,
    PMatKFAC,
    PMatLowRank,
    memory,
    memory_budget,
    random_pvector,
)

TOLERANCE = 1e-10
pytestmark = pytest.mark.filterwarnings("ignore:.*cannot be vectorised:RuntimeWarning")


def labels(n, *shape):
    return torch.arange(n * max(1, int(torch.tensor(shape).prod()) if shape else 1)).view(n, *shape) % 3


WEIGHT = [0.2, 1.0, 3.0]
#: name -> (targets of n examples with 3 outputs, loss)
LOSSES = {
    "ce": (lambda n: (labels(n),), lambda r: nn.CrossEntropyLoss(reduction=r)),
    "ce-weight": (lambda n: (labels(n),), lambda r: nn.CrossEntropyLoss(torch.tensor(WEIGHT), reduction=r)),
    "ce-ignore": (lambda n: (labels(n),), lambda r: nn.CrossEntropyLoss(ignore_index=1, reduction=r)),
    "ce-smoothing": (lambda n: (labels(n),), lambda r: nn.CrossEntropyLoss(label_smoothing=0.2, reduction=r)),
    "ce-all": (
        lambda n: (labels(n),),
        lambda r: nn.CrossEntropyLoss(torch.tensor(WEIGHT), ignore_index=1, label_smoothing=0.2, reduction=r),
    ),
    "ce-probabilities": (lambda n: (torch.rand(n, 3).softmax(1),), lambda r: nn.CrossEntropyLoss(reduction=r)),
    "ce-probabilities-all": (
        lambda n: (torch.rand(n, 3).softmax(1),),
        lambda r: nn.CrossEntropyLoss(torch.tensor(WEIGHT), label_smoothing=0.2, reduction=r),
    ),
    "bce": (
        lambda n: (torch.rand(n, 3),),
        lambda r: nn.BCEWithLogitsLoss(
            weight=torch.tensor(WEIGHT), pos_weight=torch.tensor([2.0, 1.0, 0.5]), reduction=r
        ),
    ),
    "mse": (lambda n: (torch.randn(n, 3),), lambda r: nn.MSELoss(reduction=r)),
    "poisson": (lambda n: (torch.rand(n, 3).round() + 1,), lambda r: nn.PoissonNLLLoss(reduction=r)),
    "gaussian": (lambda n: (torch.randn(n, 3), torch.rand(n, 3) + 0.5), lambda r: nn.GaussianNLLLoss(reduction=r)),
    "gaussian-one-variance": (
        lambda n: (torch.randn(n, 3), torch.rand(n, 1) + 0.5),
        lambda r: nn.GaussianNLLLoss(reduction=r),
    ),
    "huber": (lambda n: (torch.randn(n, 3),), lambda r: nn.HuberLoss(delta=0.7, reduction=r)),
    "smooth-l1": (lambda n: (torch.randn(n, 3),), lambda r: nn.SmoothL1Loss(beta=0.7, reduction=r)),
}


def minibatches(name, make_targets, sizes=(3, 2, 1)):
    out = []
    for k, n in enumerate(sizes):
        model, batch, _ = CASES[name].make(n)
        torch.manual_seed(10 + k)
        out.append((*batch, *make_targets(n)))
    return model, out


def joined(batches):
    return tuple(torch.cat(ts) for ts in zip(*batches, strict=True))


def dense_hessian(model, value, lc=None):
    """By loops over the entries of the gradient."""
    params = (lc or LayerCollection.from_model(model)).parameters(model)
    grads = torch.autograd.grad(value, params, create_graph=True, allow_unused=True, materialize_grads=True)
    g = torch.cat([x.flatten() for x in grads])
    rows = []
    for entry in g:
        if not entry.requires_grad:
            rows.append(torch.zeros_like(g))
            continue
        row = torch.autograd.grad(entry, params, retain_graph=True, allow_unused=True, materialize_grads=True)
        rows.append(torch.cat([x.flatten() for x in row]))
    return torch.stack(rows).detach()


def dense_ggn(model, f, loss, lc=None):
    """J^T H J with H by loops over the entries of the loss's gradient in the output of the whole data set."""
    params = (lc or LayerCollection.from_model(model)).parameters(model)
    rows = [
        torch.cat(
            [
                x.flatten()
                for x in torch.autograd.grad(e, params, retain_graph=True, allow_unused=True, materialize_grads=True)
            ]
        )
        for e in f.flatten()
    ]
    J = torch.stack(rows)
    H = oracle._hessian(loss, f)
    return J.T @ H @ J


@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize("which", LOSSES)
def test_every_loss_over_uneven_minibatches(which, reduction):
    """The loss of the data set is that of one minibatch with all of it, as torch defines it."""
    make_targets, make_loss = LOSSES[which]
    loss = make_loss(reduction)
    model, batches = minibatches("mlp", make_targets)
    x, *targets = joined(batches)
    f = model(x)
    H = dense_hessian(model, loss(f, *targets))
    G = dense_ggn(model, f, lambda f: loss(f, *targets))
    for representation in (PMatDense, PMatImplicit):
        assert oracle.relative(Hessian(model, batches, representation, loss).to_torch(), H) < TOLERANCE, representation
        assert oracle.relative(GGN(model, batches, representation, loss).to_torch(), G) < TOLERANCE, representation
    lc = LayerCollection.from_model(model)
    assert oracle.relative(GGN(model, batches, PMatDiag, loss).get_diag(), G.diagonal()) < TOLERANCE
    assert oracle.relative(GGN(model, batches, PMatLowRank, loss).to_torch(), G) < TOLERANCE
    assert oracle.relative(GGN(model, batches, PMatEKFAC, loss).trace(), G.trace()) < TOLERANCE
    assert oracle.relative(GGN(model, batches, PMatImplicit, loss).trace(), G.trace()) < TOLERANCE
    assert oracle.relative(Hessian(model, batches, PMatDiag, loss).get_diag(), H.diagonal()) < TOLERANCE
    assert oracle.relative(Hessian(model, batches, PMatBlockDiag, loss).to_torch(), oracle.blockdiag(H, lc)) < TOLERANCE
    assert loss.reduction == reduction


class Positions(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = nn.Conv1d(2, 3, 2)

    def forward(self, x):
        return self.conv(torch.tanh(x))


@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_extra_axes(reduction):
    model = oracle.randomise(Positions())
    loss = nn.CrossEntropyLoss(torch.tensor(WEIGHT), ignore_index=2, reduction=reduction)
    batches = [(torch.randn(n, 2, 4), labels(n, 3)) for n in (2, 1)]
    x, y = joined(batches)
    f = model(x)
    G = dense_ggn(model, f, lambda f: loss(f, y))
    assert oracle.relative(GGN(model, batches, PMatDense, loss).to_torch(), G) < TOLERANCE
    assert oracle.relative(GGN(model, batches, PMatImplicit, loss).to_torch(), G) < TOLERANCE
    H = dense_hessian(model, loss(model(x), y))
    assert oracle.relative(Hessian(model, batches, PMatDense, loss).to_torch(), H) < TOLERANCE


NO_SECOND = {"weight_norm", "weight_norm-old"}
PADDED = {"embedding-2d-padding", "positions", "positions-1d"}


def nonlinear(f, *rest):
    """A loss of any output, curved and not convex."""
    return (f.flatten(1) ** 2).sum(1) + torch.sin(f.flatten(1)).sum(1)


def convex(f, *rest):
    return (f.flatten(1) ** 2).sum(1) + f.flatten(1).exp().sum(1)


@pytest.mark.parametrize("name", CASES)
def test_every_model(name):
    """Every kind of layer, against central differences of the gradient, which need no second derivative."""
    model, batch, function = CASES[name].make(3)
    lc = LayerCollection.from_model(model)
    f = oracle.run(model, batch, function)
    G = dense_ggn(model, f, lambda f: convex(f).mean())
    assert oracle.relative(GGN(model, batch, PMatImplicit, convex, function=function).to_torch(), G) < TOLERANCE
    if name in NO_SECOND:
        with pytest.raises(NotImplementedError, match="second derivative of torch"):
            Hessian(model, batch, PMatImplicit, nonlinear, function=function).mv(random_pvector(lc))
    else:
        H = Hessian(model, batch, PMatDense, nonlinear, function=function).to_torch()
        torch.testing.assert_close(H, H.T)
    v = random_pvector(lc)
    differences = _central_difference(model, batch, function, lc, v.to_torch())
    approximate = Hessian(model, batch, PMatImplicit, nonlinear, function=function, products=FiniteDifference()).mv(v)
    keep = torch.ones(lc.numel(), dtype=torch.bool)
    if name in PADDED:  # the gradient is not a gradient with respect to padding: its rows are constants
        return
    # On CUDA torch normalises weights in single precision.
    tolerance = 1e-3 if name.startswith("weight_norm") and oracle.HERE != "cpu" else 1e-6
    assert oracle.relative(approximate.to_torch()[keep], differences[keep]) < tolerance
    if name not in NO_SECOND:
        assert oracle.relative(H @ v.to_torch(), differences) < tolerance


def _central_difference(model, batch, function, lc, v, step=1e-5):
    params = lc.parameters(model)

    def gradient():
        value = nonlinear(oracle.run(model, batch, function)).mean()
        grads = torch.autograd.grad(value, params, allow_unused=True, materialize_grads=True)
        return torch.cat([g.flatten() for g in grads])

    def shift(s):
        with torch.no_grad():
            for p, d in zip(params, v.split([p.numel() for p in params]), strict=True):
                p.add_(s * d.view_as(p))

    shift(step)
    plus = gradient()
    shift(-2 * step)
    minus = gradient()
    shift(step)
    return (plus - minus) / (2 * step)


def test_hessian_is_ggn_plus_residual():
    model, batches = minibatches("mlp", LOSSES["ce"][0])
    H, G = (matrix(model, batches, PMatImplicit) for matrix in (Hessian, GGN))
    residual = H - G
    v = random_pvector(H.layer_collection)
    torch.testing.assert_close((residual.mv(v) + G.mv(v)).to_torch(), H.mv(v).to_torch())
    assert (
        oracle.relative(GGN(model, batches, PMatDense).to_torch(), FIM(model, batches, PMatDense).to_torch())
        < TOLERANCE
    )


def test_rank_of_the_gauss_newton_matrix():
    model, _ = minibatches("mlp", LOSSES["ce"][0])
    G = GGN(model, (torch.randn(6, 3), labels(6)), PMatDense).to_torch()
    assert int(torch.linalg.matrix_rank(G)) == 6 * (3 - 1)


class Checkpointed(nn.Module):
    def __init__(self, checkpointed):
        super().__init__()
        self.first, self.second, self.head = nn.Conv2d(1, 2, 3), nn.Conv2d(2, 3, 3), nn.Linear(3 * 4, 3)
        self.checkpointed = checkpointed

    def forward(self, x):
        x = torch.relu(self.first(x))
        x = checkpoint(self.inner, x, use_reentrant=False) if self.checkpointed else self.inner(x)
        return self.head(x.flatten(1))

    def inner(self, x):
        return torch.relu(self.second(x)).sin()


@pytest.mark.parametrize("matrix", [Hessian, GGN])
def test_products_of_models_with_activation_checkpoints(matrix):
    model, plain = oracle.randomise(Checkpointed(True)), Checkpointed(False).double()
    plain.load_state_dict(model.state_dict())
    batches = [(torch.randn(4, 1, 6, 6), torch.randint(3, (4,))) for _ in range(2)]
    ours, expected = (matrix(m, batches, PMatImplicit) for m in (model, plain))
    v = random_pvector(ours.layer_collection)
    for _ in range(3):  # made, kept, used again
        assert oracle.relative(ours.mv(v).to_torch(), expected.mv(v).to_torch()) < 1e-12


def test_products_are_kept_or_made_again(cut):
    cut(memory.CPU)
    model, batches = minibatches("convnet", LOSSES["ce"][0])
    lc = LayerCollection.from_model(model)
    v = random_pvector(lc)
    calls = []
    handle = model.register_forward_hook(lambda *a: calls.append(1))
    for matrix in (Hessian, GGN):
        kept = matrix(model, batches, PMatImplicit)
        first = kept.mv(v).to_torch()
        calls.clear()
        assert torch.equal(kept.mv(v).to_torch(), first)
        assert not calls
        with memory_budget(1):
            again = matrix(model, batches, PMatImplicit)
            again.mv(v)
            torch.testing.assert_close(again.mv(v).to_torch(), first)
            calls.clear()
            again.mv(v)
        assert len(calls) == len(batches)
        with memory_budget(2**18):  # too little to look at minibatches together, enough to keep them
            several, found = matrix(model, batches, PMatImplicit), []
            for _ in range(3):
                calls.clear()
                torch.testing.assert_close(several.mv(v).to_torch(), first)
                found.append(len(calls))
            repeated = matrix(model, batches, PMatImplicit)
            repeated.to_scipy().matvec(v.to_torch().cpu().numpy())
            calls.clear()
            repeated.mv(v)
        assert min(found[:2]) >= len(batches)  # a single product keeps nothing
        assert found[2] == 0
        assert not calls  # who repeats products has the first one kept
    handle.remove()


MADE_OF = {
    "multiple": lambda H, D: 2 * H,
    "sum": lambda H, D: H + D,
    "product": lambda H, D: D @ H,
    "block": lambda H, D: H.block("2"),
}


@pytest.mark.parametrize("matrix", [Hessian, GGN])
@pytest.mark.parametrize("made", MADE_OF)
def test_what_is_made_of_a_matrix_keeps_nothing_of_a_single_product_either(cut, made, matrix):
    cut(memory.CPU)
    model, batches = minibatches("mlp", LOSSES["ce"][0])
    D = matrix(model, batches, PMatDiag)
    calls, found = [], []
    handle = model.register_forward_hook(lambda *a: calls.append(1))
    with memory_budget(2**17):
        M = MADE_OF[made](matrix(model, batches, PMatImplicit), D)
        v = random_pvector(M.layer_collection)
        for _ in range(3):
            calls.clear()
            M.vTMv(v)
            found.append(len(calls))
        repeated = MADE_OF[made](matrix(model, batches, PMatImplicit), D)
        repeated.matvec(v.to_torch())
        calls.clear()
        repeated.mv(v)
    handle.remove()
    assert min(found[:2]) >= len(batches)
    assert found[2] == 0
    assert not calls


def test_representations_that_make_no_sense_say_so():
    model, batches = minibatches("mlp", LOSSES["ce"][0])
    with pytest.raises(NotImplementedError, match="or GGN instead of Hessian"):
        Hessian(model, batches, PMatKFAC)
    H = Hessian(model, batches, PMatImplicit)
    with pytest.raises(NotImplementedError, match="would take 31 of them"):
        H.trace()
    with pytest.raises(ValueError, match="negative eigenvalue"):
        GGN(model, batches, PMatDense, lambda f, y: torch.sin(f).sum(1)).trace()
    with pytest.raises(ValueError, match='use "mean" or "sum"'):
        GGN(model, batches, PMatDense, nn.CrossEntropyLoss(reduction="none"))
    with pytest.raises(ValueError, match="neither their mean nor their sum"):
        Hessian(model, batches, PMatDense, lambda f, y: f.sum() ** 2)
    with pytest.raises(ValueError, match="one value for each of the"):
        GGN(model, batches, PMatDense, lambda f, y: f.sum())
    with pytest.raises(NotImplementedError, match='reduction="none"'):
        GGN(model, batches, PMatDense, nn.MultiMarginLoss())


def test_low_rank_hessian():
    """The best approximation of a given rank, of either sign."""
    model, batches = minibatches("mlp", LOSSES["ce"][0])
    H = Hessian(model, batches, PMatDense).to_torch()
    l, q = torch.linalg.eigh(H)
    keep = l.abs().argsort(descending=True)[:5]
    expected = (q[:, keep] * l[keep]) @ q[:, keep].T
    F = Hessian(model, batches, PMatLowRank, rank=5)
    assert oracle.relative(F.to_torch(), expected) < 1e-8
    torch.testing.assert_close(F.norm(), torch.linalg.norm(expected))


def test_rank_of_the_empirical_fisher():
    model, _ = minibatches("mlp", LOSSES["ce"][0])
    F = EmpiricalFisher(model, (torch.randn(6, 3), labels(6)), PMatDense).to_torch()
    assert int(torch.linalg.matrix_rank(F)) == 6


@pytest.mark.parametrize("name", ["convnet", "attention", "tied", "lstm", "transformer-layer"])
def test_second_derivatives_are_symmetric(name):
    """u . H v = v . H u, where torch's own formulas have been wrong."""
    model, batch, function = CASES[name].make(3)
    H = Hessian(model, batch, PMatImplicit, nonlinear, function=function)
    u, v = random_pvector(H.layer_collection), random_pvector(H.layer_collection)
    torch.testing.assert_close(u.dot(H.mv(v)), v.dot(H.mv(u)))
