"""Recurrent layers: linear maps over time, against loops over examples."""

import warnings

import oracle
import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence

from nngeometry import (
    FIM,
    EmpiricalFisher,
    GramMatrix,
    Hessian,
    LayerCollection,
    PMatBlockDiag,
    PMatDense,
    PMatDiag,
    PMatEKFAC,
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


@pytest.mark.parametrize("name", OPTIONS)
def test_product_with_the_hessian(name):
    model, (x,) = net(name)
    y, lc = torch.arange(len(x)) % 2, LayerCollection.from_model(model)
    v, params = torch.randn(lc.numel()), list(model.parameters())
    g = torch.autograd.grad(nn.functional.cross_entropy(model(x), y), params, create_graph=True)
    g = nn.utils.parameters_to_vector(g)
    expected = nn.utils.parameters_to_vector(torch.autograd.grad(g @ v, params))
    H = Hessian(model, [(x[:3], y[:3]), (x[3:], y[3:])], PMatImplicit, nn.CrossEntropyLoss())
    assert oracle.relative(H.mv(PVector(layer_collection=lc, vector_repr=v)).to_torch(), expected) < 1e-10


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


class Packing(Net):
    """The same of sequences of several lengths, each token of which has an output that is averaged."""

    def __init__(self, layer, reads="outputs", start=False, longest_first=False):
        super().__init__(layer, reads, start)
        self.token, self.longest_first = nn.LazyLinear(2), longest_first

    def forward(self, x, lengths):
        m = self.layer
        start = (self.states(x[:, :1].transpose(0, 1)),) if self.start else ()
        x = x if m.batch_first else x.transpose(0, 1)
        packed = pack_padded_sequence(x, lengths, batch_first=m.batch_first, enforce_sorted=self.longest_first)
        y, last = m(packed, *start)
        last = torch.cat(last if isinstance(last, tuple) else (last,), -1).transpose(0, 1).flatten(1)
        y = pad_packed_sequence(y, batch_first=True)[0]
        there = torch.arange(y.shape[1]) < lengths.unsqueeze(1)
        y = (self.token(y).tanh() * there.unsqueeze(2)).sum(1) / lengths.unsqueeze(1)
        return self.head({"outputs": y, "last": last, "both": torch.cat([y, last], 1)}[self.reads])


class Own(nn.GRU):
    """A subclass may do something else."""


PACKED = {
    "rnn": lambda: Packing(nn.RNN(D, 3, nonlinearity="relu", batch_first=True), "both"),
    "lstm": lambda: Packing(nn.LSTM(D, 2, batch_first=True), "both", start=True),
    "longest first": lambda: Packing(nn.LSTM(D, 2, bias=False), longest_first=True),
    "gru": lambda: Packing(nn.GRU(D, 2, num_layers=2, bidirectional=True, batch_first=True), "both"),
    "projection": lambda: Packing(nn.LSTM(D, 3, 2, proj_size=2, bidirectional=True), "both", longest_first=True),
    "subclass": lambda: Packing(Own(D, 2, batch_first=True), "both"),
}


def packed(name):
    torch.manual_seed(0)
    model = PACKED[name]()
    x, lengths = torch.randn(5, T + 1, D), torch.tensor([4, 3, 3, 2, 1])
    if not model.longest_first:
        order = torch.tensor([4, 1, 0, 3, 2])
        x, lengths = x[order], lengths[order]
    model.token(torch.zeros(1, (model.layer.proj_size or model.layer.hidden_size) * (1 + model.layer.bidirectional)))
    model(x, lengths)
    oracle.randomise(model)
    return model, (x, lengths)


def _jacobian(model, batch):
    """Of each example alone."""
    rows, w = [], [*model.parameters()]
    for x, length in zip(*batch, strict=True):
        f = model(x[None, :length], length[None])[0]
        grads = [torch.autograd.grad(one, w, retain_graph=True, materialize_grads=True) for one in f]
        rows.append(torch.stack([torch.cat([g.flatten() for g in of_one]) for of_one in grads]))
    return torch.stack(rows, 1)


def _fim(model, batch, J):
    p = model(*batch).softmax(1)
    H = torch.diag_embed(p) - p.unsqueeze(2) * p.unsqueeze(1)
    return torch.einsum("cnp,ncd,dnq->pq", J, H, J) / len(p)


@pytest.mark.parametrize("name", PACKED)
def test_packed_sequences(name):
    model, (x, lengths) = packed(name)
    J = _jacobian(model, (x, lengths))
    M = _fim(model, (x, lengths), J)
    given = {"function": lambda *batch: model(*batch)}
    data = [(x[:2], lengths[:2]), (x[2:4], lengths[2:4]), (x[4:], lengths[4:])]
    lc = LayerCollection.from_model(model)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert oracle.relative(FIM(model, (x, lengths), PMatDense, **given).to_torch(), M) < 1e-10
        assert oracle.relative(FIM(model, data, PMatDiag, **given).get_diag(), M.diag()) < 1e-10
        assert oracle.relative(FIM(model, data, PMatBlockDiag, **given).to_torch(), oracle.blockdiag(M, lc)) < 1e-10
        assert abs(FIM(model, data, PMatEKFAC, **given).trace() - M.trace()) < 1e-10 * M.trace()
        v = torch.randn(lc.numel())
        implicit = FIM(model, data, PMatImplicit, **given)
        Mv = implicit.mv(PVector(layer_collection=lc, vector_repr=v)).to_torch()
        assert oracle.relative(Mv, M @ v) < 1e-10
        K = torch.einsum("cnp,dmp->cndm", J, J)
        assert oracle.relative(GramMatrix(model, data, **given).to_torch().reshape(K.shape), K) < 1e-10


@pytest.mark.parametrize("longest_first", [False, True])
def test_minibatches_of_packed_sequences(longest_first):
    model, (x, lengths) = packed("longest first" if longest_first else "gru")
    data = pack_padded_sequence(x, lengths, batch_first=True, enforce_sorted=longest_first)
    F1 = FIM(model, (x, lengths), PMatDiag, function=lambda *batch: model(*batch))
    F2 = FIM(model, data, PMatDiag, function=lambda p: model(*pad_packed_sequence(p, batch_first=True)))
    assert oracle.relative(F2.get_diag(), F1.get_diag()) < 1e-10


def test_products_with_the_hessian_of_packed_sequences():
    model, (x, lengths) = packed("lstm")
    y = torch.tensor([0, 1, 1, 0, 1])

    def gradient():
        loss = sum(F.cross_entropy(model(a[None, :n], n[None]), b[None]) for a, n, b in zip(x, lengths, y, strict=True))
        return torch.cat([g.flatten() for g in torch.autograd.grad(loss / len(x), [*model.parameters()])])

    H = Hessian(
        model,
        [(x[:2], lengths[:2], y[:2]), (x[2:], lengths[2:], y[2:])],
        PMatImplicit,
        nn.CrossEntropyLoss(),
        targets=2,
        function=lambda *batch: model(*batch[:2]),
    )
    lc = LayerCollection.from_model(model)
    v, w, eps = torch.randn(lc.numel()), nn.utils.parameters_to_vector(model.parameters()).detach(), 1e-5
    moved = []
    for sign in (1, -1):
        nn.utils.vector_to_parameters(w + sign * eps * v, model.parameters())
        moved.append(gradient())
    nn.utils.vector_to_parameters(w, model.parameters())
    found = H.mv(PVector(layer_collection=lc, vector_repr=v)).to_torch()
    assert oracle.relative(found, (moved[0] - moved[1]) / (2 * eps)) < 1e-7


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


def test_kfac_of_packed_sequences(monkeypatch):
    """Moments over the steps that there are, as for each sequence alone."""
    torch.manual_seed(0)
    model, lengths = Packing(nn.RNN(D, 2, batch_first=True)), torch.tensor([2, 4, 1])
    x, y = torch.randn(3, 4, D), torch.tensor([0, 1, 1])
    model(x, lengths)
    m = oracle.randomise(model).layer
    monkeypatch.setattr(estimators, "budget", lambda device: 100)
    loss = nn.CrossEntropyLoss()
    K = EmpiricalFisher(model, (x, lengths, y), PMatKFAC, loss, function=lambda *b: model(*b[:2]), targets=2)
    grads, inputs = [], ([], [])
    for one, n, label in zip(x, lengths, y, strict=True):
        h, ys, shifts = torch.zeros(2), [], torch.zeros(n, 2, requires_grad=True)
        for t in range(n):
            for of, a in zip(inputs, (one[t], h.detach()), strict=True):
                of.append(F.pad(a, (0, 1), value=1.0))
            h = (m.weight_ih_l0 @ one[t] + m.bias_ih_l0 + m.weight_hh_l0 @ h + m.bias_hh_l0 + shifts[t]).tanh()
            ys.append(h)
        f = model.head(model.token(torch.stack(ys)).tanh().sum(0) / n)
        grads.append(torch.autograd.grad(F.cross_entropy(f, label), shifts)[0])
    g, start, own = torch.cat(grads), 0, K.to_torch()[(K.layer_collection.slices()["layer"],) * 2]
    for w, a in zip((m.weight_ih_l0, m.weight_hh_l0), map(torch.stack, inputs), strict=True):
        truth = torch.einsum("op,ij->oipj", g.T @ g / len(x), a.T @ a / len(a))
        k = w.numel()
        assert oracle.relative(own[start : start + k, start : start + k], truth[:, :-1, :, :-1].reshape(k, k)) < 1e-10
        start += k


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
