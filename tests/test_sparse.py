"""Sparse tensors in minibatches and buffers: graphs by their adjacency, inputs with few entries."""

import oracle
import pytest
import torch
from torch import nn

from nngeometry import (
    FIM,
    GGN,
    Accumulator,
    EmpiricalFisher,
    GramMatrix,
    Hessian,
    Jacobian,
    LayerCollection,
    PMatDense,
    PMatDiag,
    PMatImplicit,
    PMatKFAC,
)

TOLERANCE = 1e-10
LAYOUTS = {
    "coo": lambda A: A.to_sparse(),
    "uncoalesced": lambda A: torch.sparse_coo_tensor(
        torch.cat([A.nonzero().T] * 2, 1),
        torch.cat([A[A != 0] / 4, 3 * A[A != 0] / 4]),
        A.shape,
        check_invariants=True,
    ),
    "csr": lambda A: A.to_sparse_csr(),
}
every_layout = pytest.mark.parametrize("layout", LAYOUTS)
pytestmark = pytest.mark.filterwarnings("ignore:Sparse CSR", "ignore:layer '' .Bag. cannot be vectorised")


class Nodes(nn.Module):
    """Two rounds over the edges, with a norm over all nodes, in train mode."""

    def __init__(self, adjacency=None):
        super().__init__()
        self.a, self.n, self.b = nn.Linear(4, 5), nn.BatchNorm1d(5), nn.Linear(5, 3)
        self.register_buffer("adjacency", adjacency)

    def forward(self, x, adjacency=None):
        A = self.adjacency if adjacency is None else adjacency
        return torch.sparse.mm(A, self.b(torch.tanh(self.n(torch.sparse.mm(A, self.a(x))))))


def graph(n, layout):
    g = torch.Generator().manual_seed(n)
    A = (torch.rand(n, n, generator=g).double() > 0.5) + torch.eye(n).double()
    x = torch.randn(n, 4, generator=g).double()
    return x, LAYOUTS[layout](A / A.sum(1, keepdim=True)), torch.randint(3, (n,), generator=g)


def flat(value, params, **options):
    grads = torch.autograd.grad(value, params, allow_unused=True, materialize_grads=True, **options)
    return torch.cat([d.flatten() for d in grads])


@every_layout
@pytest.mark.parametrize("where", ["minibatch", "buffer"])
def test_graphs(layout, where):
    torch.manual_seed(0)
    data = [graph(5, layout), graph(4, layout)] if where == "minibatch" else [graph(5, layout)]
    model = Nodes(data[0][1] if where == "buffer" else None).double()
    call = model if where == "minibatch" else lambda x, A: model(x)
    options = {"function": lambda x, A, y: call(x, A), "unit": "minibatch"}
    loss = nn.CrossEntropyLoss()
    before = model.n.running_mean.clone(), model.n.running_var.clone()
    H = Hessian(model, data, PMatDense, loss, targets=2, **options)
    diagonal = Accumulator(Hessian, model, PMatDiag, loss=loss, targets=2, **options)
    E = EmpiricalFisher(model, data, PMatDense, loss, targets=2, **options)
    G = GGN(model, data, PMatImplicit, loss, targets=2, **options)
    F = Accumulator(FIM, model, PMatDense, **options)
    for batch in data:
        diagonal.update(batch)
        F.update(batch)
    assert torch.equal(model.n.running_mean, before[0])
    assert torch.equal(model.n.running_var, before[1])
    params, hessian, outer, fisher, ggn = list(model.parameters()), 0, 0, 0, 0
    for x, A, y in data:
        f = call(x, A)
        J = torch.stack([flat(e, params, retain_graph=True) for e in f.flatten()])
        g = flat(loss(f, y), params, create_graph=True)
        hessian = hessian + torch.stack([flat(e, params, retain_graph=True) for e in g]) / len(data)
        outer = outer + torch.outer(g, g).detach() / len(data)
        p = f.detach().softmax(1)
        C = torch.block_diag(*[torch.diag(q) - torch.outer(q, q) for q in p])
        fisher = fisher + J.T @ C @ J / len(data)
        ggn = ggn + J.T @ C @ J / len(x) / len(data)
    assert oracle.relative(H.to_torch(), hessian) < TOLERANCE
    assert oracle.relative(diagonal.matrix().to_torch().diag(), hessian.diag()) < TOLERANCE
    assert oracle.relative(E.to_torch(), outer) < TOLERANCE
    assert oracle.relative(G.to_torch(), ggn) < TOLERANCE
    assert oracle.relative(F.matrix().to_torch(), fisher) < TOLERANCE
    # nodes are no examples
    with pytest.raises(ValueError, match='unit="minibatch"'):
        FIM(model.eval(), data, PMatKFAC, function=options["function"])


class Bag(nn.Module):
    """A bag of words."""

    def __init__(self):
        super().__init__()
        self.weight, self.head = nn.Parameter(torch.randn(4, 3)), nn.Linear(3, 3)

    def forward(self, x):
        return self.head(torch.tanh(torch.sparse.mm(x, self.weight) if x.is_sparse else x @ self.weight))


@pytest.mark.parametrize("unit", ["example", "minibatch"])
@pytest.mark.parametrize("representation", [PMatDense, PMatDiag, PMatImplicit, PMatKFAC])
def test_rows_of_sparse_inputs(representation, unit):
    if (representation, unit) == (PMatKFAC, "minibatch"):
        return  # no Kronecker factors
    torch.manual_seed(0)
    model = Bag().double()
    words = [(torch.rand(n, 4) > 0.5).double() for n in (5, 3, 1)]
    few = [(x.to_sparse(),) for x in words]
    F = FIM(model, few, representation, unit=unit)
    assert oracle.relative(F.trace(), FIM(model, [(x,) for x in words], representation, unit=unit).trace()) < TOLERANCE


def test_maps_of_sparse_inputs():
    torch.manual_seed(0)
    model, x = Bag().double(), (torch.rand(5, 4) > 0.5).double()
    expected = oracle.jacobian(model, (x,))
    assert oracle.relative(Jacobian(model, (x.to_sparse(),)).to_torch(), expected) < TOLERANCE
    K = GramMatrix(model, (x.to_sparse(),))
    assert oracle.relative(K.to_torch(), torch.einsum("cbp,dep->cbde", expected, expected)) < TOLERANCE
    assert len(LayerCollection.from_model(model)) == 2


class Writes(Bag):
    def forward(self, x):
        x._values().mul_(2)
        return super().forward(x)


def test_a_model_that_writes_into_a_sparse_input_is_refused():
    torch.manual_seed(0)
    x = (torch.rand(5, 4) > 0.5).double().to_sparse()
    before = x.to_dense()
    with pytest.raises(ValueError, match="modifies its inputs"):
        FIM(Writes().double(), (x,), PMatDense, unit="minibatch")
    assert torch.equal(x.to_dense(), before)


def test_a_minibatch_that_begins_with_no_tensor_says_what_to_pass():
    model = nn.Linear(4, 3)
    packed = nn.utils.rnn.pack_sequence([torch.randn(2, 4), torch.randn(1, 4)])
    with pytest.raises(TypeError, match=r"of type PackedSequence and more.*lambda \*batch: model\(batch\[0\]\)"):
        FIM(model, [(packed, torch.zeros(2))], PMatDense, unit="minibatch")
