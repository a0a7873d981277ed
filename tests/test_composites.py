"""Operations put together of others: the same values, and the derivatives that torch's own lack or get wrong."""

import itertools

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from nngeometry import FIM, Hessian, PMatDense, PMatDiag, PMatImplicit
from nngeometry.derivatives.composites import OneExample, embedding_bag, hardsigmoid, normalize, prelu


def _bags():
    ids = torch.tensor([[0, 3, 1], [2, 2, 4], [1, 0, 0]])
    offsets = torch.tensor([0, 2, 2, 5])
    yield ids, {}
    yield ids, {"padding_idx": 2}
    yield ids, {"padding_idx": -4}
    yield ids.flatten(), {"offsets": offsets}
    yield ids.flatten(), {"offsets": torch.cat([offsets, torch.tensor([9])]), "include_last_offset": True}


@pytest.mark.parametrize("mode", ["sum", "mean", "max"])
@pytest.mark.parametrize("bag", range(5))
def test_bags_of_embeddings(bag, mode):
    ids, options = list(_bags())[bag]
    weight = torch.randn(5, 3, requires_grad=True)
    mine, theirs = (f(ids, weight, mode=mode, **options) for f in (embedding_bag, F.embedding_bag))
    torch.testing.assert_close(mine, theirs)
    g = torch.randn_like(mine)
    torch.testing.assert_close(*(torch.autograd.grad(y, weight, g)[0] for y in (mine, theirs)))
    assert torch.autograd.gradgradcheck(lambda w: embedding_bag(ids, w, mode=mode, **options), weight)


def test_weighted_bags():
    ids, weight = torch.tensor([[0, 3], [2, 2]]), torch.randn(5, 3, requires_grad=True)
    factors = torch.rand(2, 2, requires_grad=True)
    mine, theirs = (f(ids, weight, mode="sum", per_sample_weights=factors) for f in (embedding_bag, F.embedding_bag))
    torch.testing.assert_close(mine, theirs)
    for one, other in zip(
        *(torch.autograd.grad(y.sin().sum(), (weight, factors)) for y in (mine, theirs)), strict=True
    ):
        torch.testing.assert_close(one, other)


def test_hardsigmoid():
    x = torch.linspace(-4, 4, 41).requires_grad_()
    torch.testing.assert_close(hardsigmoid(x), F.hardsigmoid(x), rtol=1e-6, atol=1e-7)
    y = x * 1.0
    assert hardsigmoid(y, inplace=True) is y
    assert torch.autograd.gradgradcheck(hardsigmoid, torch.tensor([-3.5, -1.0, 0.5, 3.5], requires_grad=True))


@pytest.mark.parametrize("dim", [1, -1, (1, 2)])
def test_normalize(dim):
    x = torch.randn(3, 4, 2)
    x[0], x[1, :, 0] = 0.0, 1e-3
    x.requires_grad_()
    mine, theirs = (f(x, dim=dim, eps=0.5) for f in (normalize, F.normalize))
    torch.testing.assert_close(mine, theirs)
    g = torch.randn_like(x)
    torch.testing.assert_close(*(torch.autograd.grad(y, x, g)[0] for y in (mine, theirs)))
    assert torch.autograd.gradgradcheck(lambda x: normalize(x, dim=dim, eps=0.5), x)


class Directions(nn.Linear):
    """As Swin V2 has them of what is around a picture."""

    def forward(self, x):
        return F.normalize(super().forward(x), dim=-1).sum(1)


def test_the_hessian_of_what_has_no_direction():
    model, x = Directions(2, 3, bias=False), torch.randn(4, 3, 2)
    y, some = torch.tensor([0, 1, 2, 0]), torch.cat([x, torch.zeros(4, 2, 2)], 1)
    H, truth = (Hessian(model, (data, y), PMatDense, nn.CrossEntropyLoss()).to_torch() for data in (some, x))
    torch.testing.assert_close(H, truth)


@pytest.mark.parametrize(("shape", "count"), [((4, 3), 1), ((4, 3), 3), ((2, 3, 5), 3), ((3,), 1)])
def test_prelu(shape, count):
    x, w = torch.randn(shape, requires_grad=True), torch.rand(count, requires_grad=True)
    mine, theirs = prelu(x, w), F.prelu(x, w)
    torch.testing.assert_close(mine, theirs)
    for one, other in zip(*(torch.autograd.grad(y.sin().sum(), (x, w)) for y in (mine, theirs)), strict=True):
        torch.testing.assert_close(one, other)


def _laid(t, how):
    """The same entries in another order of memory."""
    if how == "contiguous":
        return t.contiguous()
    n, channels, *spatial = t.shape
    if how == "last":
        return t.movedim(1, -1).contiguous().movedim(-1, 1)
    strides, step = [], channels
    for size in reversed(spatial):
        strides, step = [step, *strides], step * size
    out = torch.empty(3 * t.numel()).as_strided(t.shape, (channels, 1, *strides)) if n == 1 else t.clone()
    return out.copy_(t)


NORMS = {
    "batch": lambda x, c: F.batch_norm(x, torch.linspace(-1, 1, c), torch.linspace(0.5, 2, c)),
    "batch, of the minibatch": lambda x, c: F.batch_norm(x, None, None, training=True),
    "instance": lambda x, c: F.instance_norm(x),
    "group": lambda x, c: F.group_norm(x, 1),
}


@pytest.mark.parametrize("orders", list(itertools.product(["contiguous", "last", "odd"], repeat=2)), ids="-".join)
@pytest.mark.parametrize("examples", [1, 2])
@pytest.mark.parametrize("spatial", [(5,), (4, 5), (2, 3, 2)], ids=len)
@pytest.mark.parametrize("norm", NORMS)
def test_normalisations_in_any_order_of_memory(norm, spatial, examples, orders):
    x, g = torch.randn(examples, 3, *spatial), torch.randn(examples, 3, *spatial)
    plain = x.clone().requires_grad_()
    (expected,) = torch.autograd.grad(NORMS[norm](plain, 3), plain, g)
    laid = _laid(x, orders[0]).requires_grad_()
    with OneExample():
        y = NORMS[norm](laid, 3)
    (found,) = torch.autograd.grad(y, laid, _laid(g, orders[1]))
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("activation", [nn.Identity, nn.Tanh, nn.ReLU])
@pytest.mark.parametrize(
    "norm", [nn.BatchNorm2d, lambda c: nn.InstanceNorm2d(c, affine=True), lambda c: nn.GroupNorm(1, c)]
)
def test_nets_that_end_in_a_norm_minibatches_of_one(norm, activation):
    model = nn.Sequential(nn.Conv2d(2, 3, 3, padding=1), norm(3), activation()).eval()
    for b in model.buffers():
        b.uniform_(0.5, 1.5) if b.is_floating_point() else None
    x, ps = torch.randn(3, 2, 4, 4), list(model.parameters())
    f = model(x)
    units = torch.eye(f[0].numel()).view(-1, *f[0].shape)
    rows = [
        torch.cat([d.flatten() for d in torch.autograd.grad(model(one[None]), ps, u[None].contiguous())])
        for one in x
        for u in units
    ]
    J = torch.stack(rows).view(3, 3, 16, -1)
    p = f.detach().softmax(1).flatten(2)
    H = torch.einsum("bkt,kl->bktl", p, torch.eye(3)) - torch.einsum("bkt,blt->bktl", p, p)
    diagonal = torch.einsum("bktp,bktl,bltp->p", J, H, J) / 3
    for split in ([3], [2, 1], [1, 1, 1]):
        for representation in (PMatDiag, PMatImplicit):
            found = FIM(model, [(b,) for b in x.split(split)], representation, "segmentation_logits").get_diag()
            torch.testing.assert_close(found, diagonal)
