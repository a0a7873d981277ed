"""Cases that random nets have found."""

import oracle
import pytest
import torch
from oracle import randomise
from torch import nn
from torch.nn import functional as F

from nngeometry import (
    FIM,
    GGN,
    FMatImplicit,
    GramMatrix,
    Hessian,
    Jacobian,
    LayerCollection,
    PFMapImplicit,
    PMatDense,
    PMatDiag,
    PMatImplicit,
    PVector,
    random_pvector,
)


def test_the_probe_sees_all_of_its_examples():
    """Of which one, dead behind a ReLU, has no derivative at all."""

    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Linear(2, 2, bias=False), nn.Linear(2, 2, bias=False)

        def forward(self, x):
            return torch.relu(self.a(x) + x @ torch.linalg.inv(torch.linalg.inv(self.b.weight)).T + 0 * self.b(x))

    model = Net()
    with torch.no_grad():
        model.a.weight.copy_(torch.eye(2))
        model.b.weight.copy_(torch.eye(2))
    x = torch.tensor([[1.0, 2.0], [-1.0, -2.0], [2.0, 1.0]])
    with pytest.raises(ValueError, match="do not add up"):
        FIM(model, (x,), PMatDense, "regression")


def test_minibatches_of_a_model_that_mixes_stay_apart_in_a_hessian():
    net = randomise(nn.Sequential(nn.Linear(3, 3)))
    batches = [(torch.randn(n, 3), torch.randint(3, (n,))) for n in (3, 2)]

    def mixing(x, y):
        h = net(x)
        return torch.tanh(h - h.mean(0))

    ps = list(net.parameters())
    total = sum(F.cross_entropy(mixing(x, y), y, reduction="sum") for x, y in batches) / 5
    g = torch.cat([d.flatten() for d in torch.autograd.grad(total, ps, create_graph=True)])
    v = random_pvector(LayerCollection.from_model(net))
    Hv = torch.cat([d.flatten() for d in torch.autograd.grad(g @ v.to_torch(), ps)])
    assert oracle.relative(Hessian(net, batches, PMatImplicit, function=mixing).mv(v).to_torch(), Hv) < 1e-10


@pytest.mark.parametrize("option", [{"scale_grad_by_freq": True}, {"max_norm": 0.5}])
@pytest.mark.parametrize("layer", [nn.Embedding, nn.EmbeddingBag])
def test_embeddings_without_a_derivative(layer, option):
    model = nn.Sequential(layer(5, 3, **option), nn.Flatten(), nn.Linear(3 if layer is nn.EmbeddingBag else 9, 2))
    before = model[0].weight.clone()
    ids = torch.randint(5, (4, 3))
    calls = [
        lambda: FIM(model, (ids,), PMatDense),
        lambda: FIM(model, (ids,), PMatImplicit).mv(PVector.from_model(model)),
        lambda: GramMatrix(model, (ids,), representation=FMatImplicit).trace(),
        lambda: Hessian(model, (ids, ids[:, 0] % 2), PMatImplicit).mv(PVector.from_model(model)),
        lambda: Hessian(model, (ids, ids[:, 0] % 2), PMatImplicit, function=lambda x, y: model(x)).mv(
            PVector.from_model(model)
        ),
    ]
    for call in calls:
        with pytest.raises((NotImplementedError, ValueError)):
            call()
        assert torch.equal(model[0].weight, before)


class OtherForOne(nn.Module):
    """What it writes into is a copy for several examples and the input of the head for one."""

    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(3, 3), nn.Linear(3, 2)

    def forward(self, x):
        y = self.a(x)
        z = y.T.reshape(-1) if len(x) == 1 else y.T.reshape(-1).clone()
        z.mul_(2.0)
        return self.b(torch.tanh(y))


def test_a_minibatch_of_one_is_not_joined():
    model = randomise(OtherForOne())
    batches = [(torch.randn(n, 3),) for n in (3, 1)]
    M = 0
    for (x,) in batches:
        J = oracle.jacobian(model, (x,))
        M = M + torch.einsum("cnp,cnq->pq", J, J) / 4
    v = random_pvector(LayerCollection.from_model(model))
    for representation in (PMatDense, PMatImplicit):
        found = FIM(model, batches, representation, "regression").mv(v).to_torch()
        assert oracle.relative(found, M @ v.to_torch()) < 1e-10


@pytest.mark.parametrize("matrix", [GGN, Hessian])
def test_a_mean_over_nothing(matrix):
    model = nn.Linear(3, 2)
    batch = torch.randn(4, 3), torch.full((4,), -100)
    with pytest.raises(ValueError, match="every target of the data is ignored"):
        matrix(model, batch, PMatDiag)
    with pytest.raises(ValueError, match="every target of the data is ignored"):
        matrix(model, batch, PMatImplicit).mv(PVector.from_model(model))


class Scaled(nn.Module):
    def __init__(self, inner):
        super().__init__()
        self.scale, self.inner, self.head = nn.Parameter(torch.ones(3)), inner, nn.Linear(3, 2)

    def forward(self, x):
        return self.head(self.inner(x * self.scale))


INNER = {
    "prelu": lambda: nn.PReLU(),
    "prelu of channels": lambda: nn.PReLU(3),
    "group norm": lambda: nn.GroupNorm(1, 3),
    "two": lambda: nn.Sequential(nn.Linear(3, 3), nn.PReLU()),
}


@pytest.mark.parametrize("inner", INNER)
def test_parameters_beside_others(inner):
    model, x = randomise(Scaled(INNER[inner]())), torch.randn(4, 3)
    J = oracle.jacobian(model, (x,))
    M = torch.einsum("cnp,cnq->pq", J, J) / 4
    assert oracle.relative(FIM(model, (x,), PMatDense, "regression").to_torch(), M) < 1e-9


def test_group_norms_of_images_in_another_order():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.norm, self.head = nn.GroupNorm(2, 4), nn.Linear(4, 2)

        def forward(self, x):
            return self.head(self.norm(x).mean((2, 3)))

    model, x = randomise(Net()), torch.randn(3, 4, 5, 5).to(memory_format=torch.channels_last)
    J = oracle.jacobian(model, (x.contiguous(),))
    assert oracle.relative(FIM(model, (x,), PMatDiag, "regression").get_diag(), J.square().sum((0, 1)) / 3) < 1e-9


def test_one_number_for_each_example():
    model, x = nn.Linear(3, 1), torch.randn(4, 3)
    function = lambda x: model(x)[:, 0]  # noqa: E731
    J = oracle.jacobian(model, (x,))
    v = random_pvector(LayerCollection.from_model(model))
    assert Jacobian(model, (x,), function, PFMapImplicit).shape == (1, 4, 4)
    assert oracle.relative((Jacobian(model, (x,), function, PFMapImplicit) @ v).to_torch(), J @ v.to_torch()) < 1e-10
    K = torch.einsum("cnp,dmp->cndm", J, J)
    for representation in (FMatImplicit,):
        found = GramMatrix(model, (x,), function=function, representation=representation).to_torch()
        assert oracle.relative(found, K) < 1e-10


class Flipped(nn.Module):
    """Adds to every example another one, which a minibatch of one does not show."""

    def __init__(self):
        super().__init__()
        self.first, self.head = nn.Linear(3, 3), nn.Linear(3, 2)

    def forward(self, x):
        h = self.first(x)
        return self.head(h + h.flip(0))


def test_mixing_is_seen_when_the_first_minibatch_has_one_example():
    torch.manual_seed(0)
    model, x = Flipped().double(), torch.randn(3, 3, dtype=torch.float64)
    with pytest.raises(ValueError, match="depends on the others"):
        FIM(model, [(x[:1],), (x[1:],)], PMatDense, "regression")


@pytest.mark.parametrize("size", [1, 3])
@pytest.mark.parametrize("order", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("matrix", [GGN, Hessian])
def test_vectors_that_are_columns(matrix, order, size):
    """Torch's kernel of batch normalisation reads beside weights whose entries do not lie side by side, and so it did
    with tangents of them: products with columns of a matrix, as eigenvectors are, were wrong by some per cent.
    """
    model = nn.Sequential(
        nn.Conv2d(2, 4, 1), nn.BatchNorm2d(4), nn.Tanh(), nn.Conv2d(4, 3, 1), nn.BatchNorm2d(3), nn.Flatten()
    )
    model = randomise(nn.Sequential(model, nn.Linear(3 * size * size, 3))).eval()
    x = torch.randn(5, 2, size, size).contiguous(memory_format=order), torch.randint(3, (5,))
    F = matrix(model, [x], PMatImplicit)
    columns = torch.randn(F.size(0), 2)
    rows = columns.mT.contiguous()
    assert oracle.relative(F.matvec(columns.mT), F.matvec(rows)) < 1e-12
    column = PVector(F.layer_collection, columns[:, 1])
    assert oracle.relative(F.mv(column).to_torch(), F.matvec(rows)[1]) < 1e-12
    J = Jacobian(model, [x], representation=PFMapImplicit)
    assert oracle.relative((J @ column).to_torch(), (J @ PVector(F.layer_collection, rows[1])).to_torch()) < 1e-12
    if matrix is Hessian:  # against plain loops
        ps = list(model.parameters())
        loss = nn.functional.cross_entropy(model(x[0].contiguous()), x[1])
        g = torch.cat([d.flatten() for d in torch.autograd.grad(loss, ps, create_graph=True)])
        Hv = torch.cat([d.flatten() for d in torch.autograd.grad(g @ rows[1], ps)])
        assert oracle.relative(F.mv(column).to_torch(), Hv) < 1e-10
