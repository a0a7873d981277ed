"""Activation checkpoints, whose modules run again on the way back: what is replaced on the way there must not show."""

import oracle
import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from nngeometry import (
    FIM,
    FMatDense,
    GramMatrix,
    Hessian,
    Jacobian,
    LayerCollection,
    PMatDense,
    PMatDiag,
    PMatImplicit,
    PMatKFAC,
    PVector,
    whole,
)


class Checkpoint(nn.Module):
    def __init__(self, *inner):
        super().__init__()
        self.inner = nn.Sequential(*inner)

    def forward(self, x):
        return checkpoint(self.inner, x, use_reentrant=False)


class Beside(nn.Module):
    """The checkpoint in the forward of the model."""

    def __init__(self, inner, head):
        super().__init__()
        self.inner, self.head = inner, head

    def forward(self, x):
        return self.head(x + checkpoint(self.inner, x, use_reentrant=False))


class Apply(nn.Module):
    def __init__(self, function):
        super().__init__()
        self.function = function

    def forward(self, x):
        return self.function(x)


class Attention(nn.Module):
    def __init__(self):
        super().__init__()
        self.attention = nn.MultiheadAttention(4, 2, batch_first=True)

    def forward(self, x):
        return self.attention(x, x, x, need_weights=False)[0]


def last(x):
    """As convolutions of one image have it: the stride of the examples says nothing."""
    if len(x) > 1:
        return x.contiguous(memory_format=torch.channels_last)
    _, channels, _, width = x.shape
    strides = (channels, 1, width * channels, channels)
    return torch.empty(2 * x.numel()).as_strided(x.shape, strides).copy_(x)


def image(*layers):
    return nn.Sequential(*layers, nn.Flatten(), nn.Linear(18, 2))


def conv():
    return nn.Conv2d(2, 2, 3, padding=1)


NETS = {
    "prelu": ((4,), lambda c, _: nn.Sequential(c(nn.PReLU()), nn.Linear(4, 2))),
    "prelu in forward": ((4,), lambda c, _: Beside(nn.PReLU(4), nn.Linear(4, 2))),
    "in place": ((4,), lambda c, _: nn.Sequential(c(nn.Linear(4, 3), nn.ReLU(inplace=True)), nn.Linear(3, 2))),
    "nested": ((4,), lambda c, _: nn.Sequential(c(nn.Linear(4, 3), c(nn.PReLU(3), nn.Tanh())), nn.Linear(3, 2))),
    "embedding": (None, lambda c, _: nn.Sequential(c(nn.Embedding(5, 3)), nn.Flatten(), nn.Linear(9, 2))),
    "attention": ((3, 4), lambda c, _: nn.Sequential(c(Attention()), nn.Flatten(), nn.Linear(12, 2))),
    "layer norm": ((4,), lambda c, _: nn.Sequential(c(nn.LayerNorm(4), nn.GELU()), nn.Linear(4, 2))),
    "group norm": ((2, 3, 3), lambda c, o: image(Apply(o), c(nn.GroupNorm(1, 2)))),
    "group norm, order inside": ((2, 3, 3), lambda c, o: image(c(Apply(o), nn.GroupNorm(2, 2), nn.SiLU()))),
    "batch norm": ((2, 3, 3), lambda c, o: image(conv(), Apply(o), c(nn.BatchNorm2d(2)))),
    "batch norm, order inside": ((2, 3, 3), lambda c, o: image(conv(), c(Apply(o), nn.BatchNorm2d(2), nn.PReLU(2)))),
    "instance norm": ((2, 3, 3), lambda c, o: image(conv(), Apply(o), c(nn.InstanceNorm2d(2, affine=True)))),
    "alone": ((2, 3, 3), lambda c, o: image(conv(), Apply(o), c(nn.InstanceNorm2d(2), conv()))),
}


def make(name, sizes, wanted, order=last):
    torch.manual_seed(0)
    shape, build = NETS[name]
    model = oracle.randomise(build(Checkpoint, order))
    if wanted != "all":
        for k, (key, p) in enumerate(model.named_parameters()):
            p.requires_grad_("weight" in key and (wanted == "weights" or k == 0))
    batches = [
        (torch.randint(5, (n, 3)) if shape is None else torch.randn(n, *shape), torch.arange(n) % 2) for n in sizes
    ]
    return model, batches


@pytest.mark.parametrize("wanted", ["all", "weights", "the first weight"])
@pytest.mark.parametrize("sizes", [(1,), (2,), (3, 1)], ids=str)
@pytest.mark.parametrize("name", NETS)
def test_modules_in_checkpoints(name, sizes, wanted):
    model, batches = make(name, sizes, wanted)
    plain, _ = make(name, sizes, wanted, torch.Tensor.contiguous)
    lc = LayerCollection.from_model(model)
    ps = LayerCollection.from_model(plain).parameters(plain)
    J = torch.cat([oracle.jacobian(plain, b) for b in batches], 1)
    M = torch.einsum("cnp,cnq->pq", J, J) / sum(sizes)
    v = torch.cos(torch.arange(1.0, len(M) + 1))
    for representation in (PMatDense, PMatImplicit):
        found = FIM(model, batches, representation, "regression", layer_collection=lc)
        assert oracle.relative(found.mv(PVector(lc, v)).to_torch(), M @ v) < 1e-9
    diagonal = FIM(model, batches, PMatDiag, "regression", layer_collection=lc).get_diag()
    assert oracle.relative(diagonal, M.diagonal()) < 1e-9
    kfac = [FIM(m, batches, PMatKFAC, "regression", layer_collection=lc).to_torch() for m in (model, plain)]
    assert oracle.relative(*kfac) < 1e-9
    assert oracle.relative(Jacobian(model, batches, layer_collection=lc).to_torch(), J) < 1e-9
    K = torch.einsum("cnp,dmp->cndm", J, J)
    assert (
        oracle.relative(GramMatrix(model, batches, layer_collection=lc, representation=FMatDense).to_torch(), K) < 1e-9
    )
    with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
        loss = sum(F.cross_entropy(plain(x), y, reduction="sum") for x, y in batches) / sum(sizes)
        g = torch.cat([d.flatten() for d in torch.autograd.grad(loss, ps, create_graph=True)])
        Hv = torch.autograd.grad(g @ v, ps, allow_unused=True, materialize_grads=True)
    found = Hessian(model, batches, PMatImplicit, layer_collection=lc).mv(PVector(lc, v)).to_torch()
    assert oracle.relative(found, torch.cat([d.flatten() for d in Hv])) < 1e-9


@pytest.mark.parametrize("sizes", [(1,), (3, 1)], ids=str)
@pytest.mark.parametrize("name", ["prelu", "nested", "group norm", "batch norm, order inside", "instance norm"])
@pytest.mark.filterwarnings("ignore:.*cannot be vectorised")
def test_checkpoints_in_modules_that_are_taken_whole(name, sizes):
    model, batches = make(name, sizes, "all")
    plain, _ = make(name, sizes, "all", torch.Tensor.contiguous)

    class Whole(nn.Module):
        def __init__(self):
            super().__init__()
            self.model = model

        def forward(self, x):
            return self.model(x)

    whole(Whole)
    outer = Whole()
    J = torch.cat([oracle.jacobian(plain, b) for b in batches], 1)
    M = torch.einsum("cnp,cnq->pq", J, J) / sum(sizes)
    assert oracle.relative(FIM(outer, batches, PMatDense, "regression").to_torch(), M) < 1e-9


def test_operations_without_a_second_derivative_are_named():
    model = nn.Sequential(Checkpoint(nn.EmbeddingBag(5, 3), nn.PReLU()), nn.Linear(3, 2))
    F = FIM(model, (torch.randint(5, (2, 3)),), PMatImplicit)
    with pytest.raises(NotImplementedError, match="operation embedding_bag has a backward that cannot"):
        F.mv(PVector.from_model(model))
