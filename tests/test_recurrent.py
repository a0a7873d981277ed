"""Recurrent layers: linear maps over time, against loops over examples."""

import oracle
import pytest
import torch
from torch import nn
from torch.nn import functional as F

from nngeometry import (
    FIM,
    EmpiricalFisher,
    GramMatrix,
    LayerCollection,
    PMatBlockDiag,
    PMatDense,
    PMatDiag,
    PMatImplicit,
    PMatKFAC,
    PVector,
)
from nngeometry.object import estimators

T, D = 3, 2


class Net(nn.Module):
    """A recurrent layer and a head, which reads what it returns: all states, the last ones, or both."""

    def __init__(self, layer, reads="outputs", start=False):
        super().__init__()
        self.layer, self.reads, self.start = layer, reads, start
        self.head = nn.LazyLinear(2)

    def states(self, x):
        m = self.layer
        count = m.num_layers * (1 + m.bidirectional)
        sizes = [m.proj_size or m.hidden_size, m.hidden_size] if isinstance(m, nn.LSTM) else [m.hidden_size]
        found = tuple(x.sum((0, 2)).view(-1, 1) * torch.linspace(-1, 1, count * k).view(count, 1, k) for k in sizes)
        return found if len(found) > 1 else found[0]

    def forward(self, x):
        first = self.layer.batch_first
        start = (self.states(x.transpose(0, 1)),) if self.start else ()
        y, last = self.layer(x if first else x.transpose(0, 1), *start)
        last = torch.cat(last if isinstance(last, tuple) else (last,), -1).transpose(0, 1).flatten(1)
        y = (y if first else y.transpose(0, 1)).tanh().flatten(1)
        return self.head({"outputs": y, "last": last, "both": torch.cat([y, last], 1)}[self.reads])


OPTIONS = {
    "rnn": lambda: Net(nn.RNN(D, 2)),
    "relu": lambda: Net(nn.RNN(D, 3, nonlinearity="relu", batch_first=True), "last"),
    "lstm": lambda: Net(nn.LSTM(D, 2, batch_first=True)),
    "lstm, both": lambda: Net(nn.LSTM(D, 2), "both"),
    "gru": lambda: Net(nn.GRU(D, 2), "last"),
    "gru, two layers": lambda: Net(nn.GRU(D, 2, num_layers=2, batch_first=True), "both"),
    "bidirectional": lambda: Net(nn.LSTM(D, 2, bidirectional=True, batch_first=True), "both"),
    "bidirectional, two layers": lambda: Net(nn.GRU(D, 2, num_layers=2, bidirectional=True)),
    "projection": lambda: Net(nn.LSTM(D, 3, proj_size=2, num_layers=2), "both"),
    "no bias": lambda: Net(nn.LSTM(D, 2, bias=False), "last"),
    "states": lambda: Net(nn.LSTM(D, 2, batch_first=True), "both", start=True),
    "states of gru": lambda: Net(nn.GRU(D, 2, batch_first=True), start=True),
}


def net(name):
    torch.manual_seed(0)
    model, batch = OPTIONS[name](), (torch.randn(4, T, D),)
    model(batch[0])
    return oracle.randomise(model), batch


@pytest.mark.parametrize("name", OPTIONS)
def test_exact_representations(name):
    model, batch = net(name)
    M = oracle.fim(model, [batch], "classif_logits")
    lc = LayerCollection.from_model(model)
    assert oracle.relative(FIM(model, batch, PMatDense).to_torch(), M) < 1e-10
    assert oracle.relative(FIM(model, batch, PMatDiag).get_diag(), M.diag()) < 1e-10
    assert oracle.relative(FIM(model, batch, PMatBlockDiag).to_torch(), oracle.blockdiag(M, lc)) < 1e-10


@pytest.mark.parametrize("name", ["lstm", "gru, two layers", "bidirectional", "projection"])
def test_kernels_and_products(name):
    model, batch = net(name)
    lc = LayerCollection.from_model(model)
    J = oracle.jacobian(model, batch)
    K = torch.einsum("cnp,dmp->cndm", J, J)
    assert oracle.relative(GramMatrix(model, batch).to_torch().reshape(K.shape), K) < 1e-10
    M = oracle.fim(model, [batch], "classif_logits")
    v = PVector(layer_collection=lc, vector_repr=torch.randn(lc.numel()))
    assert oracle.relative(FIM(model, batch, PMatImplicit).mv(v).to_torch(), M @ v.to_torch()) < 1e-10


@pytest.mark.parametrize("frozen", ["weight_hh_l0", "bias_ih_l0"])
def test_some_parameters(frozen):
    model, batch = net("lstm")
    getattr(model.layer, frozen).requires_grad_(False)
    M = oracle.fim(model, [batch], "classif_logits")
    assert oracle.relative(FIM(model, batch, PMatDense).to_torch(), M) < 1e-10
    assert oracle.relative(FIM(model, batch, PMatDiag).get_diag(), M.diag()) < 1e-10


def test_called_twice():
    class Twice(Net):
        def forward(self, x):
            y, _ = self.layer(x)
            return self.head(self.layer(y)[0].flatten(1))

    torch.manual_seed(0)
    model, batch = Twice(nn.LSTM(D, D, batch_first=True)), (torch.randn(4, T, D),)
    model(batch[0])
    M = oracle.fim(oracle.randomise(model), [batch], "classif_logits")
    assert oracle.relative(FIM(model, batch, PMatDiag).get_diag(), M.diag()) < 1e-10


def test_packed_sequences():
    class Packed(Net):
        def forward(self, x):
            packed = nn.utils.rnn.pack_padded_sequence(x, [T] * len(x), batch_first=True)
            return self.head(nn.utils.rnn.pad_packed_sequence(self.layer(packed)[0], batch_first=True)[0].flatten(1))

    model, batch = Packed(nn.GRU(D, 2, batch_first=True)), (torch.randn(4, T, D),)
    model(batch[0])
    with pytest.raises(NotImplementedError, match=r"layer 'layer' \(GRU\)"):
        FIM(model, batch, PMatDiag)


def _by_hand(model, x, shifts):
    """The output for one example, with something added to what is summed at each time; and the inputs of both maps."""
    m, h = model.layer, x.new_zeros(model.layer.hidden_size)
    c, into, states, ys = h, [], [], []
    for one, shift in zip(x, shifts, strict=True):
        into.append(one)
        states.append(h.detach())
        a = m.weight_ih_l0 @ one + m.bias_ih_l0 + m.weight_hh_l0 @ h + m.bias_hh_l0 + shift
        if isinstance(m, nn.LSTM):
            i, f, g, o = a.chunk(4)
            c = f.sigmoid() * c + i.sigmoid() * g.tanh()
            h = o.sigmoid() * c.tanh()
        else:
            h = a.tanh()
        ys.append(h)
    return model.head(torch.stack(ys).tanh().flatten()), torch.stack(into), torch.stack(states)


@pytest.mark.parametrize("name", ["rnn", "lstm"])
def test_kfac_where_the_exact_block_does_not_fit(name, monkeypatch):
    """The definition for each map: moments over examples and times."""
    model, (x,) = net(name)
    monkeypatch.setattr(estimators, "budget", lambda device: 100)
    y = torch.tensor([0, 1, 1, 0])
    K = EmpiricalFisher(model, (x, y), PMatKFAC, nn.CrossEntropyLoss())
    m, grads, inputs = model.layer, [], ([], [])
    for one, label in zip(x, y, strict=True):
        shifts = torch.zeros(T, len(m.weight_ih_l0), requires_grad=True)
        f, *seen = _by_hand(model, one, shifts)
        grads.append(torch.autograd.grad(F.cross_entropy(f, label), shifts)[0])
        for of, a in zip(inputs, seen, strict=True):
            of.append(F.pad(a, (0, 1), value=1.0))
    g, start, own = torch.cat(grads), 0, K.to_torch()[(K.layer_collection.slices()["layer"],) * 2]
    for w, a in zip((m.weight_ih_l0, m.weight_hh_l0), map(torch.cat, inputs), strict=True):
        truth = torch.einsum("op,ij->oipj", g.T @ g / len(x), a.T @ a / len(a))
        n = w.numel()
        assert oracle.relative(own[start : start + n, start : start + n], truth[:, :-1, :, :-1].reshape(n, n)) < 1e-10
        start += n


@pytest.mark.parametrize("name", ["bidirectional", "projection", "no bias"])
def test_solves_with_products_of_maps(name, monkeypatch):
    model, batch = net(name)
    monkeypatch.setattr(estimators, "budget", lambda device: 100)
    K = FIM(model, batch, PMatKFAC)
    M, p = K.to_torch(), K.layer_collection.numel()
    v = PVector(layer_collection=K.layer_collection, vector_repr=torch.randn(p))
    assert abs(K.trace() - M.trace()) < 1e-10 * M.trace()
    assert oracle.relative(K.mv(v).to_torch(), M @ v.to_torch()) < 1e-10
    solved = torch.linalg.solve(M + 0.5 * torch.eye(p), v.to_torch())
    assert oracle.relative(K.solve(v, regul=0.5).to_torch(), solved) < 1e-10
