"""Models that keep examples apart for the few that the library looks at first, and not for those of the data."""

import oracle
import pytest
import torch
from torch import nn
from torch.nn import functional as F

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
)

#: What may become of a hidden layer of several tokens of each example.
WAYS = {
    "transposed": lambda layer, h: layer(h.transpose(0, 1)).transpose(0, 1),
    "centred": lambda layer, h: layer(h - h.mean(0)),
    "flipped": lambda layer, h: layer(h + h.flip(0)),
    "rolled": lambda layer, h: (lambda y: y + y.roll(2, 0))(layer(h)),
    "one pair": lambda layer, h: layer(torch.cat([h[:-1], h[-1:] + h[:1]])),
    "sorted": lambda layer, h: layer(h.sort(0).values),
    "in another order for a while": lambda layer, h: layer(h[torch.arange(len(h)).roll(1)]).roll(-1, 0),
    "attention": lambda layer, h: layer(torch.einsum("nm,mtk->ntk", torch.einsum("ntk,mtk->nm", h, h).softmax(1), h)),
}
WHEN = {
    "more than four": lambda x: len(x) > 4,
    "the data": lambda x: bool(x.sum() > 0) and len(x) > 3,
}
#: Of which the output for an example is that of it alone.
APART = {"transposed", "in another order for a while"}


class Sometimes(nn.Module):
    def __init__(self, way, when):
        super().__init__()
        self.first, self.second, self.head = nn.Linear(3, 4), nn.Linear(4, 4), nn.Linear(4, 2)
        self.way, self.when = way, when

    def forward(self, x):
        h = torch.tanh(self.first(x))
        h = self.way(self.second, h) if self.when(x) else self.second(h)
        return self.head(torch.tanh(h)).mean(1)


def make(way, when="more than four", tokens=5):
    torch.manual_seed(0)
    model = oracle.randomise(Sometimes(WAYS[way], WHEN[when]))
    return model, torch.randn(5, tokens, 3).add_(0.5)


ASKED = {
    "dense": lambda model, x: FIM(model, (x,), PMatDense, "regression"),
    "kfac": lambda model, x: FIM(model, (x,), PMatKFAC, "regression"),
    "diag": lambda model, x: FIM(model, (x,), PMatDiag, "regression"),
    "jacobian": lambda model, x: Jacobian(model, (x,)),
    "gram": lambda model, x: GramMatrix(model, (x,), representation=FMatDense),
    "second minibatch": lambda model, x: FIM(model, [(x[:2],), (x,)], PMatDense, "regression"),
    "joined": lambda model, x: FIM(model, [(x[:2],), (x[2:4],), (x[4:],), (x[:2],)], PMatDense, "regression"),
}


@pytest.mark.parametrize("asked", ASKED)
@pytest.mark.parametrize("when", WHEN)
@pytest.mark.parametrize("way", WAYS)
def test_what_mixes_more_examples_only_is_named(way, when, asked):
    model, x = make(way, when)
    with pytest.raises(
        ValueError, match=r"layer '(first|second)' .Linear.: the output for one example depends on the others"
    ):
        ASKED[asked](model, x)


@pytest.mark.parametrize("asked", ASKED)
@pytest.mark.parametrize("tokens", [4, 7, 10])
def test_another_axis_of_any_length(tokens, asked):
    model, x = make("transposed", tokens=tokens)
    with pytest.raises((ValueError, NotImplementedError), match="layer 'second'"):
        ASKED[asked](model, x)


@pytest.mark.parametrize("way", sorted(APART))
def test_products_know_no_axes(way):
    model, x = make(way)
    J = oracle.jacobian(model, (x,))
    M = torch.einsum("cnp,cnq->pq", J, J) / 5
    v = torch.cos(torch.arange(1.0, len(M) + 1))
    found = FIM(model, (x,), PMatImplicit, "regression").mv(PVector(LayerCollection.from_model(model), v))
    assert oracle.relative(found.to_torch(), M @ v) < 1e-9


@pytest.mark.parametrize("sizes", [(5,), (2, 2, 1), (2, 1, 2), (4, 1)], ids=str)
@pytest.mark.parametrize("when", WHEN)
@pytest.mark.parametrize("way", WAYS)
def test_a_hessian_is_that_of_the_minibatches(way, when, sizes):
    model, x = make(way, when)
    batches = [(part, torch.arange(len(part)) % 2) for part in x.split(sizes)]
    ps = list(model.parameters())
    loss = sum(F.cross_entropy(model(x), y, reduction="sum") for x, y in batches) / 5
    g = torch.cat([d.flatten() for d in torch.autograd.grad(loss, ps, create_graph=True)])
    v = torch.cos(torch.arange(1.0, len(g) + 1))
    Hv = torch.cat([d.flatten() for d in torch.autograd.grad(g @ v, ps)])
    found = Hessian(model, batches, PMatImplicit).mv(PVector(LayerCollection.from_model(model), v))
    assert oracle.relative(found.to_torch(), Hv) < 1e-9


def test_an_output_that_is_used_for_more_examples_only():
    class Two(nn.Module):
        def __init__(self):
            super().__init__()
            self.rnn, self.head = nn.LSTM(3, 4, batch_first=True), nn.Linear(4, 2)

        def forward(self, x):
            y, (_, c) = self.rnn(x)
            return self.head(y[:, -1] + c[0] if len(x) > 3 else y[:, -1])

    with pytest.raises(ValueError, match=r"layer 'rnn' .* reaches the output of the model for some minibatches only"):
        FIM(Two(), (torch.randn(5, 2, 3),), PMatDense, "regression")


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("size", [4, 9, 40])
def test_examples_that_are_apart(size, dtype):
    """In any precision, and with gradients of very different sizes."""
    torch.manual_seed(0)
    model = oracle.randomise(Sometimes(lambda layer, h: torch.relu(layer(h)), lambda x: True)).to(dtype)
    x = torch.randn(size, 5, 3).mul(torch.logspace(-3, 2, size).view(-1, 1, 1)).to(dtype)
    FIM(model, (x,), PMatDense, "regression")
