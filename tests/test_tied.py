"""Weights that several modules or calls share, as they are and as their transpose: each use has its Kronecker product,
and the layer the nearest one to their sum.
"""

import oracle
import pytest
import torch
from torch import nn
from torch.nn import functional as F

from nngeometry import (
    FIM,
    GGN,
    Accumulator,
    EmpiricalFisher,
    GramMatrix,
    Influence,
    LayerCollection,
    PMatBlockDiag,
    PMatDense,
    PMatDiag,
    PMatEKFAC,
    PMatKFAC,
    PMatQuasiDiag,
    PVector,
)
from nngeometry.blocks import Dense, Diag, Kron, nearest_product

V, D, T = 7, 3, 2
LOSS = nn.CrossEntropyLoss()


class Net(nn.Module):
    """It notes what goes into each use of the shared weight and what comes out."""

    def __init__(self):
        super().__init__()
        self.noted = []
        self.build()

    def note(self, a, y):
        if self.noted is not None and y.requires_grad:
            self.noted.append((a, y))
        return y


class ModuleHead(Net):
    """Of a language model."""

    bias = False
    uses = 2

    def build(self):
        self.table, self.hidden = nn.Embedding(V, D), nn.Linear(D, D)
        self.head = nn.Linear(D, V, bias=self.bias)
        self.head.weight = self.table.weight

    def forward(self, ids):
        h = torch.tanh(self.hidden(self.note(ids, self.table(ids))))
        return self.note(h, self.head(h)).sum(1)


class HeadWithBias(ModuleHead):
    bias = True


class FunctionalHead(ModuleHead):
    def build(self):
        self.table, self.hidden = nn.Embedding(V, D), nn.Linear(D, D)

    def forward(self, ids):
        h = torch.tanh(self.hidden(self.note(ids, self.table(ids))))
        return self.note(h, F.linear(h, self.table.weight)).sum(1)


class MatmulHead(FunctionalHead):
    def forward(self, ids):
        h = torch.tanh(self.hidden(self.note(ids, self.table(ids))))
        return self.note(h, h @ self.table.weight.T).sum(1)


class SomeRows(FunctionalHead):
    """The head knows a part of the words."""

    def forward(self, ids):
        h = torch.tanh(self.hidden(self.note(ids, self.table(ids))))
        return F.pad(self.note(h, F.linear(h, self.table.weight[2:6])), (2, 1)).sum(1)


class HeadAlone(FunctionalHead):
    """The table is never looked up."""

    uses = 1

    def forward(self, ids):
        h = torch.tanh(self.hidden(F.one_hot(ids % D, D).to(self.hidden.weight.dtype)))
        return self.note(h, F.linear(h, self.table.weight)).sum(1)


class HeadFirst(ModuleHead):
    """The head is registered first, and owns the weight."""

    def build(self):
        self.head, self.table, self.hidden = nn.Linear(D, V, bias=False), nn.Embedding(V, D), nn.Linear(D, D)
        self.table.weight = self.head.weight


class TwoTables(ModuleHead):
    """Words of two languages, and a head."""

    def build(self):
        super().build()
        self.other = nn.Embedding(V, D)
        self.other.weight = self.table.weight

    def forward(self, ids):
        e = self.note(ids, self.table(ids)) - self.note(V - 1 - ids, self.other(V - 1 - ids)).flip(1)
        h = torch.tanh(self.hidden(e))
        return self.note(h, self.head(h)).sum(1)


class Square(ModuleHead):
    """As many words as features: only the packings tell the table from the head."""

    def build(self):
        self.table, self.hidden, self.head = nn.Embedding(V, V), nn.Linear(V, V), nn.Linear(V, V, bias=False)
        self.head.weight = self.table.weight


class SoftLookUp(FunctionalHead):
    """Words that are not certain are looked up by their probabilities, and the names of arguments are written out."""

    uses = 3

    def forward(self, ids):
        h = torch.tanh(self.hidden(self.note(ids, self.table(ids))))
        p = torch.softmax(self.note(h, torch.matmul(input=h, other=self.table.weight.T)), -1)
        e = self.note(p, torch.einsum("btv,vd->btd", [p, self.table.weight]))
        return self.note(e, e @ self.table.weight.T).sum(1)


class SoftLookUpAlone(FunctionalHead):
    uses = 1

    def forward(self, ids):
        p = F.one_hot(ids, V).to(self.hidden.weight.dtype) + 0.3
        return self.hidden(torch.tanh(self.note(p, p @ self.table.weight))).sum(1)


class Autoencoder(Net):
    def build(self):
        self.encoder = nn.Linear(D, 2)

    def forward(self, ids):
        x = F.one_hot(ids % D, D).to(self.encoder.weight.dtype) + 0.3
        h = torch.tanh(self.note(x, self.encoder(x)))
        return self.note(h, F.linear(h, self.encoder.weight.t())).sum(1)


class TwoLinears(Net):
    """With biases of their own."""

    def build(self):
        self.first, self.second = nn.Linear(D, D), nn.Linear(D, D)
        self.second.weight = self.first.weight

    def forward(self, ids):
        x = F.one_hot(ids % D, D).to(self.first.weight.dtype) + 0.3
        return self.second(torch.tanh(self.first(x))).sum(1)


NETS = [ModuleHead, HeadWithBias, FunctionalHead, MatmulHead, SomeRows, HeadAlone, HeadFirst, TwoTables, Square]
NETS += [SoftLookUp, SoftLookUpAlone]
OTHERS = [Autoencoder, TwoLinears]


def net(make):
    torch.manual_seed(0)
    model = make().double()
    oracle.randomise(model)
    ids = torch.randint(V, (6, T))
    return model, [(ids[:4], ids[:4, 0] % D), (ids[4:], ids[4:, 0] % D)]


def uses_written_out(model, loader, reduce=False):
    """``[L, R]`` of the look-ups and of the products, of the empirical Fisher matrix, features on the left: sums over
    examples and positions, that over inputs divided by how many they are. The right ones are diagonal.
    """
    sums, n = {}, 0
    for batch in loader:
        for x, label in zip(*batch, strict=True):
            n += 1
            model.noted = []
            loss = F.cross_entropy(model(x.unsqueeze(0)), label.unsqueeze(0))
            inputs, outputs = {}, {}
            for a, y in model.noted:
                (g,) = torch.autograd.grad(loss, y, retain_graph=True)
                table = not a.is_floating_point() or a.shape[-1] != D  # of V columns, or a head
                way = ("look up" if not a.is_floating_point() else "mix") if table else "head"
                way = "head" if model.hidden.weight.shape[0] == V and way == "mix" else way  # as many features as words
                a = a[0].detach() if a.is_floating_point() else F.one_hot(a[0], V).to(g)
                g = F.pad(g[0], (2, 1)) if way == "head" and g.shape[-1] != V else g[0]
                inputs.setdefault(way, []).append(a)
                outputs.setdefault(way, []).append(g)
            for way in inputs:
                a, g = torch.cat(inputs[way]), torch.cat(outputs[way])
                if reduce:
                    a, g = a.mean(0, keepdim=True), g.sum(0, keepdim=True)
                left, right = (a, g) if way == "head" else (g, a)
                before = sums.get(way, (0, 0, 0))
                sums[way] = before[0] + left.T @ left, before[1] + right.square().sum(0), before[2] + len(a)
    return [
        (left / count, right / n) if way == "head" else (left / n, right / count)
        for way, (left, right, count) in sums.items()
    ]


def nearest_written_out(uses):
    """By a singular value decomposition of the rearranged sum, with features on the left; diagonal right factors. In
    the order of the parameters.
    """
    rearranged = sum(torch.outer(left.flatten(), right) for left, right in uses)
    u, s, v = torch.linalg.svd(rearranged, full_matrices=False)
    side = round(u.shape[0] ** 0.5)
    return torch.kron(torch.diag(v[0]), s[0] * u[:, 0].view(side, side))


@pytest.mark.parametrize(
    ("make", "sharing"), [*((make, "expand") for make in NETS), (ModuleHead, "reduce"), (SoftLookUp, "reduce")]
)
def test_kfac_is_the_nearest_product_to_the_sum_of_the_uses(make, sharing):
    model, loader = net(make)
    F_ = EmpiricalFisher(model, loader, PMatKFAC, sharing=sharing)
    layer = next(iter(F_.layer_collection))
    block = F_.block(layer).to_torch()
    expected = nearest_written_out(uses_written_out(model, loader, sharing == "reduce"))
    assert oracle.relative(block, expected) < 1e-10
    assert "Kron(Dense, Diag)" in repr(F_)
    for one in (F_, 2 * F_):
        assert (f"approximate: nearest to the sum of {make.uses}" in repr(one)) == (make.uses > 1)
    b = PVector(F_.layer_collection, torch.randn(F_.size(0), dtype=torch.float64))
    x = F_.solve(b, 1e-2)
    assert oracle.relative(F_.mv(x).to_torch() + 1e-2 * x.to_torch(), b.to_torch()) < 1e-10


@pytest.mark.parametrize("make", NETS + OTHERS)
@pytest.mark.parametrize("representation", [PMatDiag, PMatBlockDiag, PMatDense, PMatQuasiDiag])
def test_exact_representations_keep_the_terms_between_the_uses(make, representation):
    model, loader = net(make)
    exact = oracle.fim(model, loader, "classif_logits")
    found = FIM(model, loader, representation, "classif_logits").to_torch()
    if representation is PMatBlockDiag:
        exact = oracle.blockdiag(exact, LayerCollection.from_model(model))
    elif representation is not PMatDense:
        exact = exact * (found != 0)  # the diagonal, and bias entries
        assert oracle.relative(found.diagonal(), exact.diagonal()) < 1e-10
    assert oracle.relative(found, exact) < 1e-10


@pytest.mark.parametrize("make", NETS + OTHERS)
def test_ekfac_has_the_exact_moments_in_its_basis(make):
    model, loader = net(make)
    F_ = FIM(model, loader, PMatEKFAC, "classif_logits")
    exact = FIM(model, loader, PMatBlockDiag, "classif_logits")
    for name in F_.layer_collection:
        one, other = F_.block(name).to_torch(), exact.block(name).to_torch()
        assert oracle.relative(one.trace(), other.trace()) < 1e-10
        values, vectors = torch.linalg.eigh(one)
        if values.diff().min() > 1e-8 * values.max():  # in its own eigenvectors
            assert oracle.relative(values, (vectors.T @ other @ vectors).diagonal()) < 1e-7


@pytest.mark.parametrize("make", NETS + OTHERS)
@pytest.mark.parametrize("representation", [PMatKFAC, PMatEKFAC])
def test_accumulated_is_whole(make, representation):
    model, loader = net(make)
    whole = GGN(model, loader, representation, LOSS).to_torch()
    if representation is PMatKFAC:
        running = Accumulator(GGN, model, representation, loss=LOSS)
        for batch in loader:
            running.update(batch)
        assert oracle.relative(running.matrix().to_torch(), whole) < 1e-12
    assert oracle.relative(whole, whole.T) < 1e-12
    assert torch.linalg.eigvalsh(whole).min() > -1e-10


@pytest.mark.parametrize("make", [*NETS, *OTHERS])
@pytest.mark.parametrize("representation", [PMatKFAC, PMatEKFAC, PMatDiag])
def test_kernels_and_influence(make, representation):
    model, loader = net(make)
    J = oracle.loss_gradients(model, loader, nn.CrossEntropyLoss(reduction="none"))
    F_ = EmpiricalFisher(model, loader, representation)
    M = F_.to_torch() + 0.1 * torch.eye(F_.size(0), dtype=torch.float64)
    scores = Influence(model, F_, LOSS, regul=0.1).scores(loader[0], loader)
    assert oracle.relative(scores, J[: len(loader[0][0])] @ torch.linalg.solve(M, J.T)) < 1e-9
    (x, _), *_ = loader
    jacobian = oracle.jacobian(model, (x,))
    kernel = GramMatrix(model, (x,)).to_torch()
    assert oracle.relative(kernel, torch.einsum("cnp,dmp->cndm", jacobian, jacobian)) < 1e-10


@pytest.mark.parametrize("make", [Autoencoder, TwoLinears])
def test_linear_layers_that_share_a_weight_have_kronecker_factors(make):
    model, loader = net(make)
    F_ = EmpiricalFisher(model, loader, PMatKFAC)
    assert "Dense, Dense" in repr(F_).splitlines()[2]
    for _, layer in F_.layer_collection.layers.items():
        assert layer.kronecker or layer.params[0][0] == "bias"


def test_the_bias_of_a_tied_head_is_exact():
    model, loader = net(HeadWithBias)
    found = FIM(model, loader, PMatKFAC, "classif_logits").block("head").to_torch()
    exact = FIM(model, loader, PMatBlockDiag, "classif_logits").block("head").to_torch()
    assert oracle.relative(found, exact) < 1e-10


@pytest.mark.parametrize("diagonal", [True, False])
@pytest.mark.parametrize("count", [2, 3])
def test_nearest_product(diagonal, count):
    g = torch.Generator().manual_seed(count)

    def factor(size):
        x = torch.randn(size, size + 1, generator=g, dtype=torch.float64)
        return x @ x.T

    lefts, rights = [factor(3) for _ in range(count)], [factor(4) for _ in range(count)]
    if diagonal:
        rights = [r.diagonal() for r in rights]
    products = [
        Kron(Dense(l.unsqueeze(0)), (Diag if diagonal else Dense)(r.unsqueeze(0)))
        for l, r in zip(lefts, rights, strict=True)
    ]
    found = nearest_product(products).to_dense()
    rearranged = sum(torch.outer(l.flatten(), r.flatten()) for l, r in zip(lefts, rights, strict=True))
    u, s, v = torch.linalg.svd(rearranged, full_matrices=False)
    right = torch.diag(v[0]) if diagonal else v[0].view(4, 4)
    assert oracle.relative(found, torch.kron(s[0] * u[:, 0].view(3, 3), right)) < 1e-10
    assert torch.linalg.eigvalsh(found).min() > -1e-12


def test_nearest_product_of_nothing_is_zero():
    zero = Kron(Dense(torch.zeros(1, 2, 2)), Diag(torch.zeros(1, 3)))
    assert nearest_product([zero, zero]).to_dense().equal(torch.zeros(6, 6))


def test_a_view_made_without_gradients_is_a_constant():
    class Constant(ModuleHead):
        def forward(self, ids):
            with torch.no_grad():
                turned = self.table.weight.T
            h = torch.tanh(self.hidden(self.table(ids)))
            return (h @ turned + self.head(h)).sum(1)

    model, loader = net(Constant)
    found = FIM(model, loader, PMatDense, "classif_logits").to_torch()
    assert oracle.relative(found, oracle.fim(model, loader, "classif_logits")) < 1e-10


@pytest.mark.parametrize(
    "use",
    [
        lambda h, w: torch.add(input=h, other=w[0]),
        lambda h, w: torch.mul(h, other=w[0]),
        lambda h, w: torch.mm(input=h.flatten(0, 1), mat2=w[:D]).view_as(h),
        lambda h, w: torch.addmm(input=torch.ones(D).to(h), mat1=h.flatten(0, 1), mat2=w[:D]).view_as(h),
    ],
)
def test_arguments_by_name(use):
    class Named(FunctionalHead):
        def forward(self, ids):
            return F.linear(use(self.table(ids), self.table.weight), self.hidden.weight).sum(1)

    model, loader = net(Named)
    found = FIM(model, loader, PMatDense, "classif_logits").to_torch()
    assert oracle.relative(found, oracle.fim(model, loader, "classif_logits")) < 1e-10
