"""Minibatches of every kind: they reach functions as what they are, are counted right, and are taken apart or not."""

import collections
import dataclasses
from typing import NamedTuple

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.nn.utils.rnn import pack_sequence

import nngeometry.model.batch
from nngeometry import (
    FIM,
    GGN,
    EmpiricalFisher,
    FMatDense,
    FMatImplicit,
    GramMatrix,
    Hessian,
    Jacobian,
    PFMapDense,
    PFMapFactored,
    PMatDense,
    PMatDiag,
    PMatImplicit,
)
from nngeometry.model import data

N, D, C = 7, 4, 3


@pytest.fixture
def net():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(D, 5), nn.Tanh(), nn.Linear(5, C))


@pytest.fixture
def xy(net):
    return torch.randn(N, D), torch.randint(C, (N,))


def flat(grads):
    return torch.cat([g.flatten() for g in grads])


def rows(f, net):
    parameters = list(net.parameters())
    return torch.stack([flat(torch.autograd.grad(e, parameters, retain_graph=True)) for e in f.reshape(-1)])


def fisher(f, net):
    J = rows(f, net).view(*f.shape, -1)
    p = f.softmax(-1)
    H = torch.diag_embed(p) - p.unsqueeze(-1) * p.unsqueeze(-2)
    return torch.einsum("nkp,nkl,nlq->pq", J, H, J) / len(f)


def moment(losses, net):
    g = rows(losses, net)
    return g.T @ g / len(g)


def close(a, b):
    assert torch.allclose(a, b, rtol=1e-9, atol=1e-11), (a - b).abs().max()


@dataclasses.dataclass
class Data:
    x: torch.Tensor
    y: torch.Tensor


@dataclasses.dataclass(frozen=True)
class Frozen:
    x: torch.Tensor
    y: torch.Tensor
    name: str = "a"


@dataclasses.dataclass(slots=True)
class Slotted:
    x: torch.Tensor
    y: torch.Tensor


class Named(NamedTuple):
    x: torch.Tensor
    y: torch.Tensor


class Plain:
    def __init__(self, x, y):
        self.x, self.inner, self.note = x, {"y": y}, None

    @property
    def y(self):
        return self.inner["y"]


class WithSlots:
    __slots__ = ("x", "y")

    def __init__(self, x, y):
        self.x, self.y = x, y


class Attributed(dict):
    def __init__(self, **items):
        super().__init__(**items)
        self.__dict__ = self


class Graph:
    """Attributes, keys and items, as graph libraries have them."""

    def __init__(self, **items):
        self.__dict__.update(items)

    def keys(self):
        return list(self.__dict__)

    def __getitem__(self, key):
        return self.__dict__[key]


class OfMine(collections.abc.MutableMapping):
    """A mapping whose shallow copy has the same items."""

    def __init__(self, **items):
        self.items_of_mine = items

    def __getitem__(self, key):
        return self.items_of_mine[key]

    def __setitem__(self, key, value):
        self.items_of_mine[key] = value

    def __delitem__(self, key):
        del self.items_of_mine[key]

    def __iter__(self):
        return iter(self.items_of_mine)

    def __len__(self):
        return len(self.items_of_mine)


def encoding(x, y):
    return pytest.importorskip("transformers").BatchEncoding({"x": x, "y": y})


BY_ATTRIBUTE = lambda b: b.x, lambda b: b.y
BY_ITEM = lambda b: b["x"], lambda b: b["y"]
KINDS = {
    "dataclass": (Data, *BY_ATTRIBUTE),
    "frozen": (Frozen, *BY_ATTRIBUTE),
    "dataclass with slots": (Slotted, *BY_ATTRIBUTE),
    "named tuple": (Named, *BY_ATTRIBUTE),
    "object": (Plain, *BY_ATTRIBUTE),
    "slots": (WithSlots, *BY_ATTRIBUTE),
    "object with keys": (lambda x, y: Graph(x=x, y=y), *BY_ATTRIBUTE),
    "dict of attributes": (lambda x, y: Attributed(x=x, y=y), *BY_ATTRIBUTE),
    "own mapping": (lambda x, y: OfMine(x=x, y=y), *BY_ITEM),
    "encoding": (encoding, *BY_ATTRIBUTE),
    "UserDict": (lambda x, y: collections.UserDict(x=x, y=y), *BY_ITEM),
    "OrderedDict": (lambda x, y: collections.OrderedDict(x=x, y=y), *BY_ITEM),
    "defaultdict": (lambda x, y: collections.defaultdict(list, x=x, y=y), *BY_ITEM),
    "scalar first": (lambda x, y: {"t": torch.tensor(3.0), "x": x, "y": y}, *BY_ITEM),
    "position ids first": (lambda x, y: {"pos": torch.arange(5)[None], "x": x, "y": y}, *BY_ITEM),
    "long ids first": (lambda x, y: {"pos": torch.arange(50), "x": x, "y": y}, *BY_ITEM),
    "strings and None": (lambda x, y: {"s": ["a"] * len(y), "q": None, "t": "b", "x": x, "y": y}, *BY_ITEM),
    "names of classes": (lambda x, y: {"names": ["a", "b"], "x": x, "y": y}, *BY_ITEM),
    "numpy": (lambda x, y: {"x": x, "y": y.cpu().numpy()}, lambda b: b["x"], lambda b: torch.as_tensor(b["y"])),
    "nested": (lambda x, y: {"in": {"x": x}, "y": [Data(x, y)]}, lambda b: b["in"]["x"], lambda b: b["y"][0].y),
    "ragged": (
        lambda x, y: {"x": [row.tolist()[: 2 + int(row[0] > 0)] for row in x], "y": y},
        lambda b: torch.stack([F.pad(torch.tensor(row), (0, D - len(row))) for row in b["x"]]),
        lambda b: b["y"],
    ),
    "ragged tensors": (
        lambda x, y: {"x": [row[: 2 + int(row[0] > 0)] for row in x], "y": y},
        lambda b: torch.stack([F.pad(row, (0, D - len(row))) for row in b["x"]]),
        lambda b: b["y"],
    ),
    "list of examples": (
        lambda x, y: [{"x": a, "y": b} for a, b in zip(x, y, strict=True)],
        lambda b: torch.stack([e["x"] for e in b]),
        lambda b: torch.stack([e["y"] for e in b]),
    ),
}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("sizes", [(N,), (4, 3), (3, 3, 1), (2, 5)])
def test_objects_reach_functions_as_what_they_are(net, xy, kind, sizes):
    make, x_of, y_of = KINDS[kind]
    loader = [make(x, y) for x, y in zip(*(t.split(sizes) for t in xy), strict=True)]
    kinds = []

    def function(batch):
        kinds.append(type(batch))
        return net(x_of(batch))

    def loss(f, batch):
        kinds.append(type(batch))
        return F.cross_entropy(f, y_of(batch), reduction="none")

    x = x_of(make(*xy))
    f = net(x)
    close(FIM(net, loader, PMatDense, function=function).to_torch(), fisher(f, net))
    close(GGN(net, loader, PMatImplicit, loss, function=function).to_torch(), fisher(f, net))
    losses = F.cross_entropy(f, xy[1], reduction="none")
    close(EmpiricalFisher(net, loader, PMatDense, loss, function=function).to_torch(), moment(losses, net))
    assert set(kinds) == {type(loader[0])}


def test_named_tuples_by_their_elements_stay(net, xy):
    loader = [Named(*(t[k : k + 4] for t in xy)) for k in (0, 4)]
    loss = lambda f, y: F.cross_entropy(f, y, reduction="none")  # noqa: E731
    for function in (lambda x, y: net(x), lambda *batch: net(batch[0]), None):
        found = EmpiricalFisher(net, loader, PMatDense, loss, function=function).to_torch()
        close(found, moment(F.cross_entropy(net(xy[0]), xy[1], reduction="none"), net))
    close(FIM(net, Named(*xy), PMatDense, function=lambda b: net(b.x)).to_torch(), fisher(net(xy[0]), net))


def test_lists_of_examples_by_their_elements(net, xy):
    loader = [[(x, y) for x, y in zip(*(t[s] for t in xy), strict=True)] for s in (slice(0, 4), slice(4, 7))]
    stack = lambda b, k: torch.stack([e[k] for e in b])  # noqa: E731
    loss = lambda f, *b: F.cross_entropy(f, stack(b, 1), reduction="none")  # noqa: E731
    found = EmpiricalFisher(net, loader, PMatDense, loss, function=lambda *b: net(stack(b, 0))).to_torch()
    close(found, moment(F.cross_entropy(net(xy[0]), xy[1], reduction="none"), net))


def test_two_alike_parts_are_no_list_of_examples(net, xy):
    other = torch.randn(N, D)
    loader = [[{"x": xy[0][k : k + 2]}, {"x": other[k : k + 2]}] for k in (0, 2, 4)]
    F2 = FIM(net, loader, PMatDense, function=lambda a, b: net(a["x"] - b["x"])).to_torch()
    close(F2, fisher(net((xy[0] - other)[:6]), net))


@pytest.mark.parametrize("summed", [False, True])
@pytest.mark.parametrize("n", [1, 2, 3, 4, 5])
@pytest.mark.parametrize("representation", [PMatDense, PMatImplicit])
def test_a_constant_as_long_as_the_minibatch(net, summed, n, representation):
    x, w = torch.randn(2 * n, D), torch.rand(C)
    function = lambda x, w: net(x) * (w.sum() if summed else w)  # noqa: E731
    for loader in ([(x, w)], [(x[:n], w), (x[n:], w)]):
        if summed and len(loader[0][0]) == C:  # as if examples mixed
            with pytest.raises(ValueError, match="closure"):
                FIM(net, loader, representation, function=function).to_torch()
        else:
            close(FIM(net, loader, representation, function=function).to_torch(), fisher(function(x, w), net))


def test_an_adjacency_as_long_as_the_minibatch(net):
    a = torch.rand(4, 4)
    x = torch.randn(4, D)
    function = lambda x, a: net(x) @ a[:C, :C]  # noqa: E731
    close(FIM(net, (x, a), PMatDense, function=function).to_torch(), fisher(function(x, a), net))
    K = GramMatrix(net, [(x, a)], function=function).to_torch()
    J = rows(function(x, a), net).view(4, C, -1)
    close(K, torch.einsum("icp,jdp->cidj", J, J))


@pytest.mark.parametrize("matrix", [EmpiricalFisher, GGN, Hessian])
@pytest.mark.parametrize("representation", [PMatDense, PMatImplicit])
@pytest.mark.parametrize("n", [2, 3, 4])
def test_class_weights_for_the_loss(net, matrix, representation, n):
    w = torch.rand(C)
    x, y = torch.randn(2 * n, D), torch.randint(C, (2 * n,))
    loss = lambda f, y, w: F.cross_entropy(f, y, reduction="none") * w[y] * w.sum()  # noqa: E731
    found = [
        matrix(net, b, representation, loss).to_torch() for b in ([(x, y, w)], [(x[:n], y[:n], w), (x[n:], y[n:], w)])
    ]
    close(*found)
    if matrix is EmpiricalFisher:
        close(found[0], moment(loss(net(x), y, w), net))


class GCN(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(3, 4), nn.Linear(4, C)

    def forward(self, x, edges, batch):
        h = torch.tanh(self.a(x))
        h = self.b(h + torch.zeros_like(h).index_add(0, edges[1], h[edges[0]]))
        return torch.zeros(int(batch.max()) + 1, C).index_add(0, batch, h)


@pytest.fixture
def graphs():
    torch.manual_seed(1)
    x, batch = torch.randn(9, 3), torch.arange(3).repeat_interleave(3)
    edges = torch.tensor([[0, 1, 2, 3, 4, 5, 6, 7, 8, 3], [1, 0, 1, 4, 3, 4, 7, 6, 6, 5]])
    return Graph(x=x, edge_index=edges, batch=batch, y=torch.randint(C, (3,)))


def test_batches_of_graphs(graphs):
    model = GCN()
    run = lambda d: model(d.x, d.edge_index, d.batch)  # noqa: E731
    f = run(graphs)
    p = list(model.parameters())
    g = flat(torch.autograd.grad(F.cross_entropy(f, graphs.y), p, create_graph=True))
    truth = torch.stack([flat(torch.autograd.grad(e, p, retain_graph=True, materialize_grads=True)) for e in g])
    loss = lambda f, d: F.cross_entropy(f, d.y, reduction="none")  # noqa: E731
    for loader in (graphs, [graphs]):
        close(Hessian(model, loader, PMatImplicit, loss, function=run).to_torch(), truth)
        for representation in (PMatDense, PMatImplicit, PMatDiag):
            with pytest.raises(ValueError, match="the 3 examples of a minibatch, but not on two of them"):
                FIM(model, loader, representation, function=run).to_torch()
    elements = [(graphs.x, graphs.edge_index, graphs.batch)]
    with pytest.raises(ValueError, match="nothing in a minibatch of 3 examples has a row for each"):
        FIM(model, elements, PMatDense, function=model)
    one = []
    for k in range(3):
        mine = graphs.batch[graphs.edge_index[0]] == k
        one.append(
            Graph(x=graphs.x[3 * k : 3 * k + 3], edge_index=graphs.edge_index[:, mine] - 3 * k, batch=graphs.batch[:3])
        )
    close(FIM(model, one, PMatImplicit, function=run).to_torch(), fisher(f, model))


def test_packed_sequences_are_taken_apart(net):
    packed = pack_sequence([torch.randn(k, D) for k in (3, 2, 2)])
    run = lambda p: nn.utils.rnn.pad_packed_sequence(p, batch_first=True)[0].sum(1)  # noqa: E731
    function = lambda p: net(run(p))  # noqa: E731
    assert data.arguments(packed) == (packed,)
    for loader in (packed, [packed]):
        M = FIM(net, loader, PMatDense, function=function).to_torch()
        close(M, FIM(net, run(packed), PMatDense).to_torch())
        H = Hessian(net, loader, PMatImplicit, lambda f, p: f.square().sum(1), function=function).to_torch()
        close(H, Hessian(net, run(packed), PMatImplicit, lambda f, p: f.square().sum(1)).to_torch())


@pytest.mark.parametrize("representation", [FMatDense, FMatImplicit])
def test_a_loader_of_tensors(net, xy, representation):
    loader = torch.utils.data.DataLoader(xy[0][:6], batch_size=2)
    J = rows(net(xy[0][:6]), net).view(6, C, -1)
    close(GramMatrix(net, loader, representation=representation).to_torch(), torch.einsum("icp,jdp->cidj", J, J))
    for kept in (PFMapDense, PFMapFactored):
        close(Jacobian(net, loader, representation=kept).to_torch(), J.movedim(1, 0))


class Movable:
    """Counts how often it is moved, in place and without returning itself."""

    def __init__(self, x, log):
        self.x, self.log = x, log

    def to(self, device):
        self.log.append(device)
        self.x = self.x.to(device)


def test_objects_are_moved_by_themselves_and_as_copies():
    log, meta = [], torch.device("meta")
    batch = Movable(torch.randn(3), log)
    here = batch.x.device
    moved = data.move({"a": [batch], "b": "c"}, meta)
    assert moved["a"][0].x.is_meta
    assert moved["b"] == "c"
    assert batch.x.device == here, "the user's object stays"
    assert data.move(batch, here) is batch
    assert log == [meta], "nothing has to move the second time"
    packed = data.move(pack_sequence([torch.randn(2, 1)]), meta)
    assert packed.data.is_meta
    assert type(packed) is nn.utils.rnn.PackedSequence


@pytest.mark.parametrize("kind", KINDS)
def test_taking_leaves_the_minibatch_as_it_is(xy, kind):
    make, x_of, y_of = KINDS[kind]
    batch = make(*xy)
    before = make(*(t.clone() for t in xy))
    read = data.Minibatch(batch, N, listed=isinstance(batch, list))
    taken = data.content(data.take(read, torch.tensor([3, 1])))
    assert type(taken) is type(batch)
    close(x_of(taken), x_of(before)[[3, 1]])
    assert torch.equal(torch.as_tensor(y_of(taken)), torch.as_tensor(y_of(before))[[3, 1]])
    close(x_of(batch), x_of(before))
    assert torch.equal(torch.as_tensor(y_of(batch)), torch.as_tensor(y_of(before)))


def test_what_is_not_of_tensors_is_not_looked_into():
    for thing in ("a", None, 3, nn.Linear(2, 2), np, object(), {1, 2}, torch.Generator(), type):
        assert nngeometry.model.batch.map_tensors(torch.clone, thing) is thing
        assert nngeometry.model.batch.tensors_of(thing) == []


def test_functions_that_cannot_be_called(net, xy):
    with pytest.raises(TypeError, match="function: it receives the elements of a minibatch, 2 here"):
        FIM(net, [xy], PMatDense, function=lambda batch: net(batch[0]))


class Refilled:
    """A loader that writes its minibatches into the same memory, of one or several in turn."""

    def __init__(self, minibatches, buffers, by_numpy):
        self.minibatches, self.buffers, self.by_numpy = minibatches, buffers, by_numpy

    def __iter__(self):
        memory = [[np.empty_like(t.numpy()) for t in self.minibatches[0]] for _ in range(self.buffers)]
        held = [tuple(map(torch.from_numpy, arrays)) for arrays in memory]
        for k, batch in enumerate(self.minibatches):
            place = k % self.buffers
            for array, tensor, t in zip(memory[place], held[place], batch, strict=True):
                if self.by_numpy:  # which torch does not see
                    array[:] = t.numpy()
                else:
                    tensor.copy_(t)
            yield tuple(map(torch.from_numpy, memory[place])) if self.by_numpy else held[place]


@pytest.mark.parametrize("by_numpy", [True, False])
@pytest.mark.parametrize("buffers", [1, 2])
def test_a_loader_may_write_into_what_it_gave_before(buffers, by_numpy, net):
    net = net.double()
    given = [(torch.randn(N, D).double(), torch.randint(C, (N,))) for _ in range(5)]
    loader = Refilled(given, buffers, by_numpy)
    for call in (FIM, GGN, EmpiricalFisher, Hessian):
        for R in (PMatDense, PMatDiag, PMatImplicit):
            assert torch.allclose(call(net, loader, R).to_torch(), call(net, given, R).to_torch(), rtol=0, atol=1e-12)
    for R in (PFMapDense, PFMapFactored):
        found = Jacobian(net, loader, representation=R).to_dense().to_torch()
        assert torch.equal(found, Jacobian(net, given, representation=R).to_dense().to_torch())
    for R in (FMatDense, FMatImplicit):
        found = GramMatrix(net, loader, representation=R).to_torch()
        assert torch.allclose(found, GramMatrix(net, given).to_torch(), rtol=0, atol=1e-12)
