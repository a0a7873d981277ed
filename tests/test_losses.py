"""Losses: what is compared with what, that examples are apart, and the Hessians of any loss, by loops over examples."""

from types import SimpleNamespace

import oracle
import pytest
import torch
from torch import nn
from torch.nn import functional as F

from nngeometry import (
    GGN,
    EmpiricalFisher,
    FiniteDifference,
    GradientCovariance,
    Hessian,
    Influence,
    LayerCollection,
    OutputLoss,
    OwnLoss,
    PMatBlockDiag,
    PMatDense,
    PMatDiag,
    PMatEKFAC,
    PMatImplicit,
    PMatLowRank,
    TokenCrossEntropy,
    memory_budget,
    random_pvector,
)
from nngeometry.likelihood import Categorical
from nngeometry.losses import example_loss, loss_gradient, output_loss

TOLERANCE = 1e-10
pytestmark = pytest.mark.filterwarnings("ignore:.*cannot be vectorised:RuntimeWarning")

#: name -> (loss, targets of n examples with k outputs each, in the shape of the outputs)
ELEMENTWISE = {
    "mse": (nn.MSELoss(), lambda n, k: (torch.randn(n, k),)),
    "l1": (nn.L1Loss(), lambda n, k: (torch.randn(n, k),)),
    "smooth-l1": (nn.SmoothL1Loss(beta=0.7), lambda n, k: (torch.randn(n, k),)),
    "huber": (nn.HuberLoss(delta=0.7), lambda n, k: (torch.randn(n, k),)),
    "poisson": (nn.PoissonNLLLoss(), lambda n, k: (torch.rand(n, k) + 1,)),
    "gaussian": (nn.GaussianNLLLoss(), lambda n, k: (torch.randn(n, k), torch.rand(n, k) + 0.5)),
    "bce-logits": (nn.BCEWithLogitsLoss(), lambda n, k: (torch.rand(n, k),)),
    "soft-margin": (nn.SoftMarginLoss(), lambda n, k: (torch.randn(n, k).sign(),)),
    "kl": (nn.KLDivLoss(reduction="sum"), lambda n, k: (torch.rand(n, k),)),
    "kl-batchmean": (nn.KLDivLoss(reduction="batchmean"), lambda n, k: (torch.rand(n, k),)),
    "hinge": (nn.HingeEmbeddingLoss(), lambda n, k: (torch.randn(n, k).sign(),)),
    "ranking": (nn.MarginRankingLoss(0.3), lambda n, k: (torch.randn(n, k), torch.randn(n, k).sign())),
}
SPLITS = {"one": [8], "uneven": [7, 1], "ones": [1] * 8}


def net(outputs, squeezed=False, inputs=4):
    modules = [nn.Linear(inputs, 5), nn.Tanh(), nn.Linear(5, outputs)]
    return oracle.randomise(nn.Sequential(*modules, *([nn.Flatten(0)] if squeezed else [])))


def cut(tensors, sizes):
    return list(zip(*[t.split(sizes) for t in tensors], strict=True))


def hessian(value, params):
    grads = torch.autograd.grad(value, params, create_graph=True, allow_unused=True, materialize_grads=True)
    g = torch.cat([x.flatten() for x in grads])
    rows = []
    for e in g:
        row = (
            torch.autograd.grad(e, params, retain_graph=True, allow_unused=True, materialize_grads=True)
            if e.requires_grad
            else [torch.zeros_like(p) for p in params]
        )
        rows.append(torch.cat([x.flatten() for x in row]))
    return torch.stack(rows).detach()


def gauss_newton(model, f, loss):
    """J^T H J, H being the Hessian of the loss of all examples in all outputs."""
    params = list(model.parameters())
    rows = [torch.autograd.grad(e, params, retain_graph=True) for e in f.flatten()]
    J = torch.stack([torch.cat([x.flatten() for x in row]) for row in rows])
    leaf = f.detach().requires_grad_()
    (g,) = torch.autograd.grad(loss(leaf), leaf, create_graph=True)
    H = [
        torch.autograd.grad(e, leaf, retain_graph=True, allow_unused=True, materialize_grads=True)[0].flatten()
        if e.requires_grad
        else torch.zeros(leaf.numel())
        for e in g.flatten()
    ]
    return J.T @ torch.stack(H) @ J


def product(M):
    """With a generic vector."""
    return M.mv(random_pvector(M.layer_collection))


def rows_of(model, x, targets, loss):
    """The gradients of the losses of single examples, one forward pass each."""
    rows = []
    for k in range(len(x)):
        value = loss(model(x[k : k + 1]), *(t[k : k + 1] for t in targets))
        rows.append(torch.cat([g.flatten() for g in torch.autograd.grad(value, list(model.parameters()))]))
    return torch.stack(rows)


@pytest.mark.parametrize("split", SPLITS)
@pytest.mark.parametrize("squeezed", [False, True], ids=["outputs (n, 1)", "outputs (n,)"])
@pytest.mark.parametrize("which", ELEMENTWISE)
def test_an_axis_of_length_one_is_no_matter(which, squeezed, split):
    """Targets (n, 1) and (n,), against outputs (n, 1) and (n,), in minibatches of any length."""
    loss, make = ELEMENTWISE[which]
    summed = type(loss)(**{k: v for k, v in vars(loss).items() if k in ("beta", "delta", "margin")}, reduction="sum")
    model = net(1, squeezed)
    x = torch.randn(8, 4)
    y = make(8, 1)
    f = model(x)
    same = [t.reshape(f.shape) for t in y]
    other = [t.reshape(8) if f.ndim == 2 else t.reshape(8, 1) for t in y]
    g = rows_of(model, x, same, summed)
    M = g.T @ g / 8
    params = list(model.parameters())
    H, G = hessian(loss(f, *same), params), gauss_newton(model, f, lambda f: loss(f, *same))
    for targets in (same, other):
        batches = cut([x, *targets], SPLITS[split])
        assert oracle.relative(EmpiricalFisher(model, batches, PMatDense, loss).to_torch(), M) < TOLERANCE
        trace = EmpiricalFisher(model, batches, PMatImplicit, loss).trace()
        assert oracle.relative(trace, M.trace()) < TOLERANCE
        C = GradientCovariance(model, batches, PMatDense, loss).to_torch()
        assert oracle.relative(C, M - torch.outer(g.mean(0), g.mean(0))) < TOLERANCE
        for representation in (PMatDense, PMatImplicit):
            assert oracle.relative(Hessian(model, batches, representation, loss).to_torch(), H) < TOLERANCE
            found = GGN(model, batches, representation, loss).to_torch()
            assert float((found - G).norm()) <= TOLERANCE * float(M.norm() + G.norm())
        F0 = EmpiricalFisher(model, batches, PMatDense, loss)
        scores = Influence(model, F0, loss, 0.1).scores(batches, batches)
        assert oracle.relative(scores, g @ torch.linalg.inv(M + 0.1 * torch.eye(len(M))) @ g.T) < TOLERANCE


@pytest.mark.parametrize("n", [8, 1])
@pytest.mark.parametrize("wrong", [(3, 2), (1,), (2,), ()], ids=str)
@pytest.mark.parametrize("which", ["mse", "l1", "poisson", "bce-logits", "huber", "kl"])
def test_whatever_else_would_be_broadcast_is_refused(which, wrong, n):
    """With both shapes, for one example as for eight."""
    loss, _ = ELEMENTWISE[which]
    model = net(3)
    shape = (n, *wrong)
    batch = [(torch.randn(n, 4), torch.rand(shape))]
    for matrix in (EmpiricalFisher, GradientCovariance, GGN, Hessian):
        with pytest.raises(ValueError, match=rf"\({n}, 3\) and targets \({', '.join(map(str, shape))},?\).*broadcast"):
            matrix(model, batch, PMatDense, loss)


def test_variances_are_those_of_elements_of_examples_or_of_all():
    loss, model, x, y = nn.GaussianNLLLoss(), net(3), torch.randn(8, 4), torch.randn(8, 3)
    each = torch.rand(8, 1) + 0.5
    full = GGN(model, (x, y, each.expand(8, 3)), PMatDense, loss)
    for var in (each, each[:, 0]):
        for sizes in ([8], [3, 5], [1] * 8):
            assert (
                oracle.relative(GGN(model, cut([x, y, var], sizes), PMatDense, loss).to_torch(), full.to_torch())
                < 1e-12
            )
    with pytest.raises(ValueError, match=r"outputs \(8, 3\) and variances \(8, 2\)"):
        GGN(model, (x, y, torch.rand(8, 2)), PMatDense, loss)


@pytest.mark.parametrize("weight", ["weight", "pos_weight"])
def test_weights_of_a_loss_do_not_broadcast_outputs(weight):
    loss = nn.BCEWithLogitsLoss(**{weight: torch.rand(8)})
    with pytest.raises(ValueError, match=rf"the {weight} of BCEWithLogitsLoss, \(8,\), and the outputs \(8, 1\)"):
        EmpiricalFisher(net(1), (torch.randn(8, 4), torch.rand(8, 1)), PMatDense, loss)


CLASSES = {
    "one-hot": (lambda y: F.one_hot(y, 3), r"int64 targets \(8, 3\).*one-hot.*argmax"),
    "floating": (lambda y: y.double(), r"floating point targets \(8,\).*integers"),
    "floating column": (lambda y: y.double()[:, None], "integers"),
    "bool": (lambda y: y > 0, "integers"),
    "large": (lambda y: y + 1, "class 3, but the outputs have 3 classes"),
    "negative": (lambda y: y - 1, "class -1, but the outputs have 3 classes"),
    "short": (lambda y: y[:4], r"targets \(4,\) for outputs \(8, 3\)"),
    "two columns": (lambda y: torch.stack([y, y], 1), r"targets \(8, 2\) for outputs \(8, 3\)"),
    "probabilities of two": (lambda y: torch.rand(8, 2), "shape of the outputs|needs one class"),
    "no tensor": (lambda y: "label", "but was given a str"),
}


@pytest.mark.parametrize("matrix", [EmpiricalFisher, GGN, Hessian])
@pytest.mark.parametrize("which", CLASSES)
def test_classes_are_indices(which, matrix):
    spoil, message = CLASSES[which]
    x, y = torch.randn(8, 4), torch.arange(8) % 3
    with pytest.raises((ValueError, TypeError), match=message):
        matrix(net(3), [(x, spoil(y))], PMatDense)
    with pytest.raises((ValueError, TypeError), match=r"CrossEntropyLoss was given|given a str"):
        product(matrix(net(3), [(x, spoil(y))], PMatImplicit))


@pytest.mark.parametrize("make", [lambda y: y[:, None], lambda y: y.int(), lambda y: y.to(torch.uint8)[:, None]])
@pytest.mark.parametrize("sizes", [[8], [1] * 8, [3, 5]])
def test_classes_in_a_column_or_of_another_integer_type(make, sizes):
    model, x, y = net(3), torch.randn(8, 4), torch.arange(8) % 3
    for matrix in (EmpiricalFisher, GGN, Hessian):
        plain = matrix(model, (x, y), PMatDense).to_torch()
        assert oracle.relative(matrix(model, cut([x, make(y)], sizes), PMatDense).to_torch(), plain) < 1e-12


def test_class_weights_are_one_for_each_class_of_any_precision():
    model, x, y = net(3), torch.randn(8, 4), torch.arange(8) % 3
    weight = torch.tensor([0.25, 1.0, 4.0])
    single = nn.CrossEntropyLoss(weight.float())
    for matrix in (EmpiricalFisher, GGN, Hessian):
        expected = matrix(model, (x, y), PMatDense, nn.CrossEntropyLoss(weight)).to_torch()
        assert oracle.relative(matrix(model, (x, y), PMatDense, single).to_torch(), expected) < 1e-12
        with pytest.raises(ValueError, match=r"class weights \(5,\) for outputs \(8, 3\)"):
            matrix(model, [(x, y)], PMatDense, nn.CrossEntropyLoss(torch.rand(5)))
    assert single.weight.dtype == torch.float32


def test_the_class_axis_of_tokens_is_named():
    f, y = torch.randn(2, 4, 5), torch.randint(5, (2, 4))
    with pytest.raises(ValueError, match="TokenCrossEntropy"):
        loss_gradient(nn.CrossEntropyLoss(), f, y)
    with pytest.raises(ValueError, match=r"outputs \(n, classes\), got \(8,\)"):
        loss_gradient(nn.CrossEntropyLoss(), torch.randn(8), torch.tensor(3))
    masks = torch.randint(4, (2, 1, 5))  # a channel of one, as images of classes have it
    assert torch.equal(
        loss_gradient(nn.CrossEntropyLoss(), f, masks), loss_gradient(nn.CrossEntropyLoss(), f, masks[:, 0])
    )


# Callables


def mixing(kind):
    def loss(f, y):
        r = f[:, 0] - y
        match kind:
            case "mean of outputs":
                return (r - f.mean()).square()
            case "mean of targets":
                return (f[:, 0] - (y - y.mean())).square()
            case "those before":
                return torch.cumsum(r.square(), 0)
            case "targets before":
                return (f[:, 0] - torch.cumsum(y, 0)).square()
            case "the one before":
                return (r - torch.cat([torch.zeros(1), f[:-1, 0]])).square()
            case "the target before":
                return (r - torch.cat([torch.zeros(1), y[:-1]])).square()
            case "the last of the first":
                return r.square() + F.one_hot(torch.tensor(len(f) - 1), len(f)) * f[0, 0]
            case "the last of the first target":
                return (r + F.one_hot(torch.tensor(len(f) - 1), len(f)) * y[0]).square()
            case "ranks":
                return (f[:, 0] - y.argsort().argsort()).square()
            case "a partner":
                return (f[:, 0] - y[torch.arange(len(y)) ^ 1]).square() if len(y) % 2 == 0 else r
            case "counts":
                return r.square() / (y > 0).sum()
            case "noise":
                return (r + torch.randn(len(r))).square()
        raise AssertionError(kind)

    return loss


MIXING = [
    "mean of outputs",
    "mean of targets",
    "those before",
    "targets before",
    "the one before",
    "the target before",
    "the last of the first",
    "the last of the first target",
    "ranks",
    "a partner",
    "counts",
    "noise",
]


@pytest.mark.parametrize("n", [8, 7, 2])
@pytest.mark.parametrize("kind", MIXING)
def test_a_loss_of_other_examples_is_refused(kind, n):
    if kind == "a partner" and n % 2:
        pytest.skip("no partner")
    if kind == "targets before" and n == 2:
        pytest.skip("the first target is nobody's")
    model, x, y = net(1), torch.randn(n, 4), torch.rand(n) + 0.1
    batches = [(x, y)]
    for matrix in (EmpiricalFisher, GradientCovariance, GGN, Hessian):
        with pytest.raises(ValueError, match="depends on the outputs of others, or on their targets"):
            matrix(model, batches, PMatDense, mixing(kind))
    for matrix in (GGN, Hessian):
        with pytest.raises(ValueError, match="depends on the outputs of others, or on their targets"):
            product(matrix(model, batches, PMatImplicit, mixing(kind)))
    influence = Influence(model, EmpiricalFisher(model, (x, y[:, None]), PMatDense, nn.MSELoss()), mixing(kind))
    with pytest.raises(ValueError, match="depends on the outputs of others, or on their targets"):
        influence.scores(batches, batches)


@pytest.mark.parametrize("same", [False, True], ids=["", "equal targets"])
@pytest.mark.parametrize("n", [8, 2, 1])
@pytest.mark.parametrize("swapped", [False, True])
@pytest.mark.parametrize("reduced", ["", "mean", "sum"])
def test_a_callable_that_broadcasts_is_refused(reduced, swapped, n, same):
    """By shapes, also where the values do not tell."""

    def loss(f, y):
        values = (f - y).square()
        return getattr(values, reduced)(1) if reduced else values

    if reduced and (swapped or n == 1):
        pytest.skip("one value for each example all the same")
    if reduced == "mean" and same:
        pytest.skip("the mean of what is broadcast is what was meant")
    f, y = torch.randn(n, 1), torch.ones(n) if same else torch.randn(n)
    if swapped:
        f, y = f[:, 0], y[:, None]
    with pytest.raises(ValueError, match=rf"outputs \({n},.*\({n},"):
        loss_gradient(loss, f, y)


def test_minibatches_of_one_obey_the_rule_of_many():
    """A callable that works on one example alone is not told from one that broadcasts, unless shapes do."""
    model, x, y = net(1), torch.randn(3, 4), torch.randn(3)
    with pytest.raises(ValueError, match=r"outputs \(1, 1\) and targets \(1,\)"):
        EmpiricalFisher(
            model, [(a[None], b[None]) for a, b in zip(x, y, strict=True)], PMatDiag, lambda f, y: (f - y) ** 2
        )
    of_one = lambda f, y: (f.squeeze(0) - y.squeeze(0)).square()[None].sum(1)  # noqa: E731
    singles = [(a[None], b[None, None]) for a, b in zip(x, y, strict=True)]
    ours = loss_gradient(of_one, model(x[:1]), y[:1, None])
    assert torch.equal(ours, loss_gradient(nn.MSELoss(), model(x[:1]), y[:1]))
    assert len(singles) == 3


FINE = {
    "weights of these examples": lambda w: lambda f, y: w * F.cross_entropy(f, y, reduction="none"),
    "class weights": lambda w: lambda f, y: torch.arange(1.0, 4.0)[y] * F.cross_entropy(f, y, reduction="none"),
    "not finite": lambda w: lambda f, y: F.cross_entropy(f, y, reduction="none") + (y == 1) * torch.inf,
    "a constant": lambda w: lambda f, y: (f * torch.eye(3)[y]).sum(1) + f.square().sum(1),
    "of shape": lambda w: lambda f, y: f.view(8, 3)[torch.arange(8), y].exp(),
    "whole": lambda w: lambda f, y: f.sin(),
}


@pytest.mark.parametrize("which", FINE)
def test_losses_of_examples_by_themselves_are_taken(which):
    f, y, w = torch.randn(8, 3), torch.arange(8) % 3, torch.rand(8)
    loss = FINE[which](w)
    leaf = f.clone().requires_grad_()
    expected = torch.stack([torch.autograd.grad(loss(leaf, y)[k].sum(), leaf)[0][k] for k in range(8)])
    torch.testing.assert_close(loss_gradient(loss, f, y), expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("scale", [1.0, 30.0, 1e4])
def test_saturated_outputs_do_not_look_mixed(dtype, scale):
    """Where all that is left of the values is rounding."""
    y = torch.arange(8) % 3
    f = (scale * F.one_hot(y, 3) + 0.1 * torch.randn(8, 3)).to(dtype)
    loss = lambda f, y: F.cross_entropy(f, y, reduction="none")  # noqa: E731
    ours = loss_gradient(loss, f, y)
    torch.testing.assert_close(ours, loss_gradient(nn.CrossEntropyLoss(), f, y))
    u = torch.randn(8, 3).to(dtype)
    ours = output_loss(loss).hvp(f, u, y)
    torch.testing.assert_close(ours, output_loss(nn.CrossEntropyLoss()).hvp(f, u, y), atol=1e-5, rtol=1e-4)


def test_misuse_says_what_was_expected():
    f, y = torch.randn(8, 3), torch.arange(8) % 3
    with pytest.raises(TypeError, match="the class MSELoss: pass an instance"):
        loss_gradient(nn.MSELoss, f, y)
    with pytest.raises(TypeError, match="got 'mse'"):
        output_loss("mse")
    with pytest.raises(TypeError, match="got a float"):
        loss_gradient(lambda f, y: 0.5, f, y)
    with pytest.raises(TypeError, match="got a list"):
        loss_gradient(lambda f, y: list(f.unbind()), f, y)
    with pytest.raises(ValueError, match="nothing to differentiate"):
        loss_gradient(lambda f, y: f.detach().sum(1), f, y)
    with pytest.raises(ValueError, match="nothing to differentiate"):
        GGN(net(3), (torch.randn(8, 4), y), PMatDense, lambda f, y: (f.argmax(1) == y).double())
    with pytest.raises(ValueError, match="takes 1 target beside the output, the minibatch gives 2: pass targets="):
        loss_gradient(nn.CrossEntropyLoss(), f, y, y)
    with pytest.raises(ValueError, match="takes 1 target beside the output, the minibatch gives 0"):
        loss_gradient(nn.MSELoss(), f)
    with pytest.raises(ValueError, match="'input_ids', 'labels': pass targets="):
        loss_gradient(nn.CrossEntropyLoss(), f, {"input_ids": f, "labels": y})
    with pytest.raises(TypeError, match="was given a float"):
        loss_gradient(nn.MSELoss(), f, 1.0)


def test_a_subclass_with_a_forward_of_its_own_is_a_callable():
    class Halved(nn.MSELoss):
        def forward(self, f, y):
            return super().forward(f, y) / 2

    class Named(nn.MSELoss):
        pass

    f, y = torch.randn(8, 3), torch.randn(8, 3)
    torch.testing.assert_close(loss_gradient(Halved(), f, y), f - y)
    torch.testing.assert_close(loss_gradient(Named(), f, y), 2 * (f - y))
    with pytest.raises(NotImplementedError, match="no closed form"):
        output_loss(Halved())
    hooked = nn.MSELoss()
    hooked.register_forward_hook(lambda module, args, out: 3 * out)
    torch.testing.assert_close(loss_gradient(hooked, f, y), 6 * (f - y))


# Hessians of callables


CONVEX = {
    "cross entropy": lambda f, y: F.cross_entropy(f, y, reduction="none"),
    "exp": lambda f, y: f.exp().sum(1),
    "linear": lambda f, y: f.gather(1, y[:, None])[:, 0],
    "one of many": lambda f, y: f.gather(1, y[:, None])[:, 0].square(),
    "log-sum-exp squared": lambda f, y: f.logsumexp(1).exp(),
    "dead": lambda f, y: F.relu(f - 100).square().sum(1),
    "partly dead": lambda f, y: F.relu(f).square().sum(1),
}


@pytest.mark.parametrize("budget", [2**30, 2000, 1])
@pytest.mark.parametrize("k", [2, 5, 12])
@pytest.mark.parametrize("which", CONVEX)
def test_products_and_roots_of_callables(which, k, budget):
    loss = CONVEX[which]
    f, y, u = torch.randn(6, k), torch.arange(6) % k, torch.randn(6, k)

    def hessian_of(one, label):
        leaf = one.detach().clone().requires_grad_()
        (g,) = torch.autograd.grad(loss(leaf, label).sum(), leaf, create_graph=True)
        if not g.requires_grad:
            return torch.zeros(k, k)
        rows = [torch.autograd.grad(e, leaf, retain_graph=True, materialize_grads=True)[0][0] for e in g.flatten()]
        return torch.stack(rows)

    H = torch.stack([hessian_of(f[b : b + 1], y[b : b + 1]) for b in range(6)])
    with memory_budget(budget):
        known = output_loss(loss)
        torch.testing.assert_close(known.hvp(f, u, y), torch.einsum("bkl,bl->bk", H, u))
        cotangents = known.sqrt(f, y)
        S = torch.cat([cotangents.take(c, min(c + 5, k)) for c in range(0, k, 5)])
    assert S.shape == (k, 6, k)
    torch.testing.assert_close(torch.einsum("cbk,cbl->bkl", S, S), H, atol=1e-13, rtol=1e-10)


def test_a_callable_of_many_outputs_costs_no_matrix_for_each_product():
    """A thousand outputs under a budget that holds no (K, K)."""
    f, y, u = torch.randn(3, 1000), torch.arange(3), torch.randn(3, 1000)
    with memory_budget(2**16):
        ours = output_loss(CONVEX["cross entropy"]).hvp(f, u, y)
    torch.testing.assert_close(ours, Categorical().hvp(f, u))
    S = output_loss(CONVEX["cross entropy"]).sqrt(f[:1].float(), y[:1]).take(0, 1000)[:, 0].double()
    p = f[0].float().double().softmax(0)
    H = p.diag() - torch.outer(p, p)
    assert float((S.T @ S - H).norm() / H.norm()) < 1e-5


@pytest.mark.parametrize("k", [1, 3, 8, 40])
def test_concave_directions_are_found(k):
    """By products: one direction out of forty does not hide."""
    f, y = torch.randn(4, k), torch.zeros(4, dtype=torch.long)
    concave = lambda f, y: f.square().sum(1) - 3 * f[:, -1].square()  # noqa: E731
    with pytest.raises(ValueError, match="negative eigenvalue"):
        output_loss(concave).hvp(f, torch.randn(4, k), y)
    with pytest.raises(ValueError, match="negative eigenvalue"):
        output_loss(concave).sqrt(f, y).take(0, 1)
    model = net(k)
    with pytest.raises(ValueError, match="negative eigenvalue"):
        product(GGN(model, (torch.randn(4, 4), y), PMatImplicit, concave))
    product(Hessian(model, (torch.randn(4, 4), y), PMatImplicit, concave))


def test_a_curvature_out_of_range_is_refused():
    with pytest.raises(ValueError, match="negative second derivative"):
        GGN(net(3), (torch.randn(4, 4), -torch.ones(4, 3)), PMatDense, nn.PoissonNLLLoss(log_input=False))


class Cosh(OutputLoss):
    """A loss of one method."""

    def total(self, f, y):
        return (f - y).cosh().sum()


def test_a_loss_of_ones_own_is_one_method():
    model, x, y = net(3), torch.randn(5, 4), torch.randn(5, 3)
    plain = lambda f, y: (f - y).cosh().sum(1)  # noqa: E731
    for matrix in (EmpiricalFisher, GGN, Hessian):
        ours = matrix(model, cut([x, y], [2, 3]), PMatDense, Cosh()).to_torch()
        assert oracle.relative(ours, matrix(model, (x, y), PMatDense, plain).to_torch()) < 1e-12
    assert float(Cosh()(model(x), y).detach()) == pytest.approx(float(plain(model(x), y).mean().detach()))


# targets=


class Two(nn.Module):
    def __init__(self):
        super().__init__()
        self.inner = net(3)

    def forward(self, x, **rest):
        return SimpleNamespace(logits=self.inner(x))


CHOICES = {
    "a key": ("labels", nn.CrossEntropyLoss()),
    "keys": (("values", "variance"), nn.GaussianNLLLoss()),
    "list of keys": (["values", "variance"], nn.GaussianNLLLoss()),
    "a function": (lambda batch: batch["labels"], nn.CrossEntropyLoss()),
    "a function of several": (lambda batch: (batch["values"], batch["variance"]), nn.GaussianNLLLoss()),
}


@pytest.mark.parametrize("which", CHOICES)
def test_targets_are_chosen(which):
    targets, loss = CHOICES[which]
    model = Two()
    n = 6
    tensors = {
        "x": torch.randn(n, 4),
        "labels": torch.arange(n) % 3,
        "values": torch.randn(n, 3),
        "variance": torch.rand(n, 3) + 0.5,
    }
    own = [tensors[k] for k in (["labels"] if isinstance(loss, nn.CrossEntropyLoss) else ["values", "variance"])]
    batches = [{k: v[a:b] for k, v in tensors.items()} for a, b in ((0, 4), (4, 6))]
    function = lambda batch: model(**batch).logits  # noqa: E731
    plain = (tensors["x"], *own)
    shared = {"function": function, "targets": targets}
    lc = LayerCollection.from_model(model)
    for matrix in (EmpiricalFisher, GradientCovariance, GGN, Hessian):
        expected = matrix(model.inner, plain, PMatDense, loss).to_torch()
        for representation in (PMatDense, PMatImplicit):
            ours = matrix(model, batches, representation, loss, **shared).to_torch()
            assert oracle.relative(ours, expected) < TOLERANCE
    G = GGN(model, batches, PMatDense, loss, layer_collection=lc, **shared)
    ours = Influence(model, G, loss, 0.1, **shared).scores(batches, batches)
    G = GGN(model.inner, plain, PMatDense, loss)
    assert oracle.relative(ours, Influence(model.inner, G, loss, 0.1).scores(plain, plain)) < TOLERANCE


def test_targets_of_tuples_and_of_queries():
    model, x, noise, y = net(3), torch.randn(6, 4), torch.randn(6, 2), torch.arange(6) % 3
    plain = EmpiricalFisher(model, (x, y), PMatDense)
    for targets in (2, -1, [2], lambda batch: batch[2]):
        ours = EmpiricalFisher(model, (x, noise, y), PMatDense, targets=targets)
        assert torch.equal(ours.to_torch(), plain.to_torch())
    margin = lambda f, r: (f * r).sum(1)  # noqa: E731
    r = torch.randn(6, 3)
    ours = Influence(model, plain, None, 0.1, targets=2, query_loss=margin, query_targets=1)
    expected = Influence(model, plain, None, 0.1, query_loss=margin)
    found = ours.scores((x, r), (x, noise, y))
    assert torch.equal(found, expected.scores((x, r), (x, y)))
    with pytest.raises(ValueError, match=r"targets='label': the minibatch has the keys 'x', 'labels'"):
        EmpiricalFisher(model, {"x": x, "labels": y}, PMatDense, function=lambda b: model(b["x"]), targets="label")
    with pytest.raises(ValueError, match=r"targets=3: the minibatch has 3 elements"):
        EmpiricalFisher(model, (x, noise, y), PMatDense, targets=3)
    with pytest.raises(TypeError, match="expected a key of the minibatch"):
        GGN(model, (x, y), PMatDense, targets=0.5)


# Tokens


class Language(nn.Module):
    def __init__(self, vocabulary=6, width=3):
        super().__init__()
        self.embedding = nn.Embedding(vocabulary, width)
        self.mix = nn.Linear(width, width)
        self.head = nn.Linear(width, vocabulary)

    def forward(self, tokens):
        h = self.embedding(tokens)
        return self.head(torch.tanh(self.mix(h.cumsum(1))))


def language(n, t=4):
    torch.manual_seed(n)
    model = oracle.randomise(Language().double())
    tokens = torch.randint(6, (n, t))
    labels = tokens.clone()
    labels[0, -2:] = -100
    labels[-1, :1] = -100
    return model, tokens, labels


def token_loss(shift, reduction):
    def loss(f, y):
        f, y = (f[:, :-1], y[:, 1:]) if shift else (f, y)
        return F.cross_entropy(f.flatten(0, 1), y.flatten(), reduction=reduction)

    return loss


@pytest.mark.parametrize("sizes", [[5], [2, 3], [1] * 5])
@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize("shift", [False, True])
def test_cross_entropy_of_tokens(shift, reduction, sizes):
    model, tokens, labels = language(5)
    loss, plain = TokenCrossEntropy(shift, reduction=reduction), token_loss(shift, reduction)
    batches = cut([tokens, labels], sizes)
    f, params = model(tokens), list(model.parameters())
    torch.testing.assert_close(loss(f, labels), plain(f, labels))
    H, G = hessian(plain(f, labels), params), gauss_newton(model, f, lambda f: plain(f, labels))
    g = rows_of(model, tokens, [labels], token_loss(shift, "sum"))
    for representation in (PMatDense, PMatImplicit):
        assert oracle.relative(Hessian(model, batches, representation, loss).to_torch(), H) < TOLERANCE
        assert oracle.relative(GGN(model, batches, representation, loss).to_torch(), G) < TOLERANCE
        ours = EmpiricalFisher(model, batches, representation, loss).to_torch()
        assert oracle.relative(ours, g.T @ g / 5) < TOLERANCE
    assert oracle.relative(GGN(model, batches, PMatDiag, loss).get_diag(), G.diagonal()) < TOLERANCE
    assert oracle.relative(GGN(model, batches, PMatEKFAC, loss).trace(), G.trace()) < TOLERANCE


def test_a_large_vocabulary_takes_no_square_of_it():
    """One column of the square root for 30 000 classes, and products, where a mask of classes would take 900 MB."""
    k = 30000
    f, y = torch.randn(2, 3, k), torch.randint(k, (2, 3))
    largest = []

    class Watch(torch.overrides.TorchFunctionMode):
        def __torch_function__(self, func, types, args=(), kwargs=None):
            out = func(*args, **(kwargs or {}))
            if isinstance(out, torch.Tensor):
                largest.append(out.numel())
            return out

    loss = TokenCrossEntropy()
    with Watch():
        loss.hvp(f, f, y)
        loss.gradient(f, y)
        loss.sqrt(f, y).take(5, 7)
    assert max(largest) <= 4 * f.numel()


def test_tokens_that_make_no_sense():
    f, y = torch.randn(2, 3, 5), torch.randint(5, (2, 3))
    with pytest.raises(ValueError, match="class 5, but the outputs have 5 classes"):
        loss_gradient(TokenCrossEntropy(), f, y.where(y != 0, 0) * 0 + 5)
    with pytest.raises(ValueError, match="one-hot"):
        loss_gradient(TokenCrossEntropy(), f, F.one_hot(y, 5))
    with pytest.raises(ValueError, match="integers"):
        loss_gradient(TokenCrossEntropy(), f, y.double())
    with pytest.raises(ValueError, match=r"targets \(2, 2\) for outputs \(2, 3, 5\)"):
        loss_gradient(TokenCrossEntropy(), f, y[:, :2])
    with pytest.raises(ValueError, match="shift=True"):
        loss_gradient(TokenCrossEntropy(shift=True), f[:, 0], y[:, 0])
    with pytest.raises(ValueError, match='use "mean" or "sum"'):
        TokenCrossEntropy(reduction="none")


def test_other_positions_and_another_index_that_is_ignored():
    f, y = torch.randn(2, 3, 4, 5), torch.randint(-1, 5, (2, 3, 4))
    leaf = f.clone().requires_grad_()
    value = F.cross_entropy(leaf.movedim(-1, 1), y, ignore_index=-1, reduction="sum")
    torch.testing.assert_close(
        loss_gradient(TokenCrossEntropy(ignore_index=-1), f, y), torch.autograd.grad(value, leaf)[0]
    )


# The loss of the model itself


class Owner(nn.Module):
    """As the models of Hugging Face: keywords in, an output with logits and, given labels, the loss out."""

    def __init__(self):
        super().__init__()
        self.inner = Language()

    def forward(self, tokens, labels=None):
        logits = self.inner(tokens)
        return {"logits": logits, "loss": None if labels is None else token_loss(True, "mean")(logits, labels)}


def test_the_models_own_loss():
    _, tokens, labels = language(5)
    model = oracle.randomise(Owner().double())
    params = list(model.parameters())
    parts = [{"tokens": t, "labels": l} for t, l in cut([tokens, labels], [2, 3])]
    values = [model(**part)["loss"] for part in parts]
    mean = (2 * values[0] + 3 * values[1]) / 5
    for representation in (PMatDense, PMatImplicit):
        ours = Hessian(model, parts, representation, OwnLoss()).to_torch()
        assert oracle.relative(ours, hessian(mean, params)) < TOLERANCE
    count = lambda batch: (batch["labels"][:, 1:] != -100).sum()  # noqa: E731
    ours = Hessian(model, parts, PMatDense, OwnLoss(count)).to_torch()
    expected = Hessian(
        model,
        parts,
        PMatDense,
        TokenCrossEntropy(shift=True),
        function=lambda b: model(b["tokens"])["logits"],
        targets="labels",
    ).to_torch()
    assert oracle.relative(ours, expected) < TOLERANCE
    v = random_pvector(LayerCollection.from_model(model))
    approximate = Hessian(model, parts, PMatImplicit, OwnLoss(count), products=FiniteDifference()).mv(v).to_torch()
    assert oracle.relative(approximate, expected @ v.to_torch()) < 1e-5


@pytest.mark.parametrize("centred", [False, True])
def test_gradients_of_the_models_own_loss(centred):
    _, tokens, labels = language(5)
    model = oracle.randomise(Owner().double())
    singles = [{"tokens": t[None], "labels": l[None]} for t, l in zip(tokens, labels, strict=True)]
    rows = [torch.autograd.grad(model(**one)["loss"], list(model.parameters())) for one in singles]
    g = torch.stack([torch.cat([x.flatten() for x in row]) for row in rows])
    M = g.T @ g / 5
    matrix = GradientCovariance if centred else EmpiricalFisher
    if centred:
        M = M - torch.outer(g.mean(0), g.mean(0))
    for representation in (PMatDense, PMatImplicit, PMatLowRank):
        assert oracle.relative(matrix(model, singles, representation, OwnLoss()).to_torch(), M) < TOLERANCE
    lc = LayerCollection.from_model(model)
    ours = matrix(model, singles, PMatBlockDiag, OwnLoss()).to_torch()
    assert oracle.relative(ours, oracle.blockdiag(M, lc)) < TOLERANCE
    assert oracle.relative(matrix(model, singles, PMatDiag, OwnLoss()).get_diag(), M.diagonal()) < TOLERANCE
    assert oracle.relative(matrix(model, singles, PMatImplicit, OwnLoss()).trace(), M.trace()) < TOLERANCE
    if not centred:
        F0 = EmpiricalFisher(model, singles, PMatDense, OwnLoss())
        ours = Influence(model, F0, OwnLoss(), 0.1).scores(singles, singles)
        assert oracle.relative(ours, g @ torch.linalg.inv(M + 0.1 * torch.eye(len(M))) @ g.T) < 1e-9
    with pytest.raises(ValueError, match="a minibatch of 5 examples is one number"):
        matrix(model, {"tokens": tokens, "labels": labels}, PMatDiag, OwnLoss())


def test_own_losses_that_make_no_sense():
    _, tokens, labels = language(2)
    model = oracle.randomise(Owner().double())
    batch = {"tokens": tokens, "labels": labels}
    with pytest.raises(NotImplementedError, match="as a function of the output"):
        GGN(model, batch, PMatDense, OwnLoss())
    with pytest.raises(ValueError, match="no loss of the minibatch"):
        Hessian(model, {"tokens": tokens}, PMatDense, OwnLoss())
    with pytest.raises(TypeError, match="need function="):
        Hessian(model, (tokens, labels), PMatDense, OwnLoss())
    with pytest.raises(ValueError, match="leave targets out"):
        Hessian(model, batch, PMatDense, OwnLoss(), targets="labels")
    with pytest.raises(ValueError, match="leave targets out"):
        EmpiricalFisher(model, batch, PMatDense, OwnLoss(), targets="labels")
    with pytest.raises(ValueError, match="NaN or infinite"):
        Hessian(model, {"tokens": tokens, "labels": torch.full_like(labels, -100)}, PMatDense, OwnLoss())


def test_reductions_have_no_say_in_gradients():
    f, y = torch.randn(4, 3), torch.arange(4) % 3
    for kind in (nn.CrossEntropyLoss, nn.NLLLoss):
        found = [example_loss(kind(reduction=r)).gradient(f, y) for r in ("none", "mean", "sum")]
        assert all(torch.equal(a, found[0]) for a in found)


@pytest.mark.parametrize("n", [2, 3, 5])
def test_class_weights_in_the_minibatch(n):
    """Also where there are as many classes as examples; a target alone is never of classes."""
    f, y, w = torch.randn(n, 3), torch.arange(n) % 3, torch.rand(3)
    loss = lambda f, y, w: w[y] * F.cross_entropy(f, y, reduction="none") * w.sum()  # noqa: E731
    expected = (w[y] * w.sum()).unsqueeze(1) * loss_gradient(nn.CrossEntropyLoss(), f, y)
    torch.testing.assert_close(loss_gradient(loss, f, y, w), expected)
    with pytest.raises(ValueError, match=r"outputs \(3, 3\)"):
        loss_gradient(lambda f, y: (f - y).square(), torch.randn(3, 3), torch.randn(3))
