"""The smallest nets: one example or two, one output, layers of one input or output, one position. Every operation of
every representation equals the same on the dense matrix.
"""

import copy
import pickle

import oracle
import pytest
import torch
from torch import nn

from nngeometry import (
    FIM,
    GGN,
    EmpiricalFisher,
    FMatImplicit,
    FMatMemmap,
    FVector,
    GradientCovariance,
    GramMatrix,
    Hessian,
    Influence,
    Jacobian,
    LayerCollection,
    PFMapDense,
    PFMapFactored,
    PFMapImplicit,
    PMat,
    PMatBlockDiag,
    PMatDense,
    PMatDiag,
    PMatEKFAC,
    PMatEye,
    PMatImplicit,
    PMatKFAC,
    PMatLowRank,
    PMatMixed,
    PMatQuasiDiag,
    PVector,
    Relative,
)

REPRESENTATIONS = {
    "dense": PMatDense,
    "blockdiag": PMatBlockDiag,
    "diag": PMatDiag,
    "quasidiag": PMatQuasiDiag,
    "kfac": PMatKFAC,
    "ekfac": PMatEKFAC,
    "lowrank": PMatLowRank,
    "eye": PMatEye,
    "mixed": PMatMixed.of(PMatKFAC, {"0": PMatLowRank}),
    "implicit": PMatImplicit,
}


class Token(nn.Module):
    """A parameter beside children, read by the module itself."""

    def __init__(self, d, out):
        super().__init__()
        self.token = nn.Parameter(torch.randn(1, 1, d))
        self.one = nn.Linear(d, d)
        self.two = nn.Linear(d, out)

    def forward(self, x):
        x = torch.cat([self.token.expand(len(x), -1, -1), x.unsqueeze(1)], 1)
        return self.two(torch.tanh(self.one(x)).mean(1))


#: (model, shape of an example, outputs)
NETS = {
    "mlp": (lambda: nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2)), (3,), 2),
    "one-output": (lambda: nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 1)), (3,), 1),
    "one-input": (lambda: nn.Sequential(nn.Linear(1, 3), nn.Tanh(), nn.Linear(3, 2)), (1,), 2),
    "bottleneck": (lambda: nn.Sequential(nn.Linear(3, 1), nn.Tanh(), nn.Linear(1, 2)), (3,), 2),
    "one-of-all": (lambda: nn.Sequential(nn.Linear(1, 1), nn.Tanh(), nn.Linear(1, 1)), (1,), 1),
    "one-parameter": (lambda: nn.Sequential(nn.Linear(1, 1, bias=False)), (1,), 1),
    "no-bias": (lambda: nn.Sequential(nn.Linear(3, 2, bias=False), nn.Tanh(), nn.Linear(2, 1, bias=False)), (3,), 1),
    "conv1x1": (
        lambda: nn.Sequential(nn.Conv2d(1, 2, 1), nn.Tanh(), nn.Conv2d(2, 1, 2), nn.Flatten(), nn.Linear(1, 1)),
        (1, 2, 2),
        1,
    ),
    "depthwise": (
        lambda: nn.Sequential(nn.Conv1d(2, 2, 1, groups=2), nn.Tanh(), nn.Flatten(), nn.Linear(2, 2)),
        (2, 1),
        2,
    ),
    "one-position": (lambda: nn.Sequential(nn.Linear(2, 3), nn.Tanh(), nn.Flatten(), nn.Linear(3, 2)), (1, 2), 2),
    "norm": (lambda: nn.Sequential(nn.Linear(2, 3), nn.LayerNorm(3), nn.Tanh(), nn.Linear(3, 2)), (2,), 2),
    "token": (lambda: Token(2, 2), (2,), 2),
}


def problem(net, n):
    torch.manual_seed(0)
    make, shape, outputs = NETS[net]
    model = make().eval()
    for p in model.parameters():
        nn.init.normal_(p, std=0.7)
    return model, torch.randn(n, *shape), torch.randn(n, outputs)


def squares(f, y):
    return (f - y).square().sum(1) / 2


def same(a, b, tolerance=1e-9):
    a, b = (x.to_torch() if hasattr(x, "to_torch") else x for x in (a, b))
    assert a.shape == b.shape
    size = max(float(b.norm()), 1e-12)
    assert float((a - b).norm()) <= tolerance * size, (a, b)


def matrix(net, n, name):
    representation = REPRESENTATIONS[name]
    model, x, y = problem(net, n)
    if name == "mixed" and net == "token":
        representation = PMatMixed.of(PMatKFAC, {"two": PMatLowRank})
    return model, x, y, FIM(model, (x,), representation, "regression")


def power(M, exponent):
    l, Q = torch.linalg.eigh(M)
    return (Q * l.clamp(min=0) ** exponent) @ Q.T


@pytest.mark.parametrize("n", [1, 2, 5])
@pytest.mark.parametrize("name", REPRESENTATIONS)
@pytest.mark.parametrize("net", NETS)
def test_algebra(net, name, n, tmp_path):
    model, x, _, F = matrix(net, n, name)
    implicit = name == "implicit"
    M = oracle.fim(model, [(x,)], "regression") if implicit else F.to_torch()
    loose = 1e-5 if implicit else 1e-9
    p = len(M)
    eye = torch.eye(p)
    lc = F.layer_collection
    v = PVector(lc, torch.randn(p))
    w = v.to_torch()
    J = PFMapDense(lc, torch.randn(1, 2, p))
    same(F @ v, M @ w)
    same(F.mv(J), J.to_torch() @ M)
    same(F.vTMv(v), w @ M @ w)
    same(F.mapTMmap(J, "diag"), torch.einsum("cnp,pq,cnq->cn", J.to_torch(), M, J.to_torch()))
    same(F.trace(), M.trace())
    same(F.get_diag(), M.diagonal())
    same(sum(F.trace(per_layer=True).values()), M.trace())
    shifted = M + 10 * eye  # a quasi-diagonal matrix may be indefinite
    same(F.solve(v, 10.0), torch.linalg.solve(shifted, w), loose)
    same(F.solve(J, 10.0), torch.linalg.solve(shifted, J.to_torch()[0].T).T.unsqueeze(0), loose)
    same(F.inv(10.0) @ v, torch.linalg.solve(shifted, w), loose)
    regul = {layer: 10.0 + k for k, layer in enumerate(lc)}
    each = torch.cat([torch.full((layer.numel(),), regul[k]) for k, layer in lc.layers.items()])
    same(F.solve(v, regul), torch.linalg.solve(M + torch.diag(each), w), loose)
    same(F.solve(v, Relative(100.0)), torch.linalg.solve(M + 100 * M.trace() / p * eye, w), loose)
    same(F.pow(2) @ v, M @ M @ w)
    same(F.pinv(rtol=1e-8) @ v, torch.linalg.pinv(M, rtol=1e-8, hermitian=True) @ w, 1e-6)
    same((F + F) @ v, 2 * M @ w)
    same((F - 0.5 * F) @ v, M @ w / 2)
    same((F @ F) @ v, M @ M @ w)
    same(F.norm(2), torch.linalg.matrix_norm(M, 2))
    first = next(iter(lc))
    s = lc.slices()[first]
    same(F.block(first) @ PVector(F.block(first).layer_collection, w[s]), M[s, s] @ w[s])
    if name != "quasidiag":
        same(F.pow(0.5) @ v, power(M, 0.5) @ w, 1e-6)
        noise = torch.randn(p, generator=torch.Generator().manual_seed(3))
        same(F.sample(torch.Generator().manual_seed(3)), power(M, 0.5) @ noise, 1e-6)
    l, vectors = F.eig(1)
    same(l, torch.linalg.eigvalsh(M)[-1:])
    same(F @ vectors[0], l[0] * vectors[0].to_torch(), 1e-6)
    if implicit:
        with pytest.raises(TypeError, match="cannot be pickled"):
            pickle.dumps(F)
        with pytest.raises(TypeError, match="cannot be saved"):
            F.save(tmp_path / "F.pt")
        return
    same(F.logdet(10.0), torch.linalg.slogdet(shifted).logabsdet)
    same(F.norm(), M.norm())
    same(F.norm("nuc"), torch.linalg.eigvalsh(M).abs().sum())
    same(F.eigenvalues(), torch.linalg.eigvalsh(M).flip(0))
    F.save(tmp_path / "F.pt")
    for G in (PMat.load(tmp_path / "F.pt"), pickle.loads(pickle.dumps(F)), copy.deepcopy(F), F.to(dtype=M.dtype)):
        same(G, M)
        same(G.solve(v, 10.0), F.solve(v, 10.0))


@pytest.mark.parametrize("n", [1, 2])
@pytest.mark.parametrize("net", NETS)
def test_values(net, n):
    """What is kept of the matrix is right, not only what is done with it."""
    model, x, y = problem(net, n)
    M = oracle.fim(model, [(x,)], "regression")
    blocks = torch.block_diag(*(M[s, s] for s in LayerCollection.from_model(model).slices().values()))
    for representation in (PMatDense, PMatLowRank):
        same(FIM(model, (x,), representation, "regression"), M)
    same(FIM(model, (x,), PMatBlockDiag, "regression"), blocks)
    for representation in (PMatDiag, PMatQuasiDiag):
        same(FIM(model, (x,), representation, "regression").get_diag(), M.diagonal())
    for representation in (PMatEKFAC, PMatEye):
        same(FIM(model, (x,), representation, "regression").trace(), M.trace())
    if n == 1 and net in ("mlp", "one-output", "one-input", "bottleneck", "one-of-all", "no-bias", "one-position"):
        same(FIM(model, (x,), PMatKFAC, "regression"), blocks)
    g = oracle.loss_gradients(model, [(x, y)], squares)
    same(EmpiricalFisher(model, (x, y), PMatDense, squares), g.T @ g / n)
    centred = g - g.mean(0)
    v = PVector(LayerCollection.from_model(model), torch.randn(g.shape[1]))
    for representation in (PMatDense, PMatLowRank, PMatImplicit):
        C = GradientCovariance(model, (x, y), representation, squares)
        assert float((C @ v - PVector(v.layer_collection, centred.T @ centred @ v.to_torch() / n)).norm()) < 1e-12
    H = Hessian(model, (x, y), PMatDense, nn.MSELoss())
    same(Hessian(model, (x, y), PMatImplicit, nn.MSELoss()) @ v, H.to_torch() @ v.to_torch())
    same(GGN(model, (x, y), PMatImplicit, nn.MSELoss()) @ v, GGN(model, (x, y), PMatDense, nn.MSELoss()) @ v)


@pytest.mark.parametrize("n", [1, 2])
@pytest.mark.parametrize("net", NETS)
def test_kernels(net, n, tmp_path):
    model, x, _ = problem(net, n)
    J = oracle.jacobian(model, (x,))
    c, _, p = J.shape
    rows = J.transpose(0, 1).reshape(n * c, p)
    u = FVector(torch.randn(c, n))
    flat = u.to_torch().T.reshape(-1)
    lc = LayerCollection.from_model(model)
    v = PVector(lc, torch.randn(p))
    for representation in (PFMapDense, PFMapFactored, PFMapImplicit):
        mine = Jacobian(model, (x,), representation=representation)
        same(mine.to_dense(), J)
        same(mine @ v, J @ v.to_torch())
        same(mine.T @ u, rows.T @ flat)
        same(mine[0].to_dense(), J[:, :1])
        same(sum(mine.layer(k).to_dense().to_torch().square().sum() for k in lc), J.square().sum())
        same((mine @ mine.T).to_torch(), torch.einsum("cnp,dmp->cndm", J, J))
    K = torch.einsum("cnp,dmp->cndm", J, J)
    full = rows @ rows.T
    for k, representation in enumerate((None, FMatImplicit, FMatMemmap.at(tmp_path / "k"))):
        found = GramMatrix(model, (x,), **({} if representation is None else {"representation": representation}))
        same(found.to_torch(), K)
        same(found @ u, (full @ flat).view(n, c).T)
        expected = torch.linalg.solve(full + 0.5 * torch.eye(n * c), flat).view(n, c).T
        same(found.solve(u, 0.5), expected, 1e-9 if k == 0 else 1e-5)
        same(found.eig(1)[0], torch.linalg.eigvalsh(full)[-1:])
        same(found.trace(), full.trace())
        same(found.T @ u, (full @ flat).view(n, c).T)
        same(
            found.regress(u, regul=0.5),
            (full @ torch.linalg.solve(full + 0.5 * torch.eye(n * c), flat)).view(n, c).T,
            1e-9 if k == 0 else 1e-5,
        )
    for output, expected in {
        "diag": torch.einsum("cnp,cmp->cnm", J, J),
        "trace": torch.einsum("cnp,cmp->nm", J, J),
        "mean_trace": torch.einsum("cnp,cmp->nm", J, J) / c,
        "sum": torch.einsum("np,mp->nm", J.sum(0), J.sum(0)),
    }.items():
        same(GramMatrix(model, (x,), output=output).to_torch(), expected)


@pytest.mark.parametrize("n", [1, 2])
@pytest.mark.parametrize("name", REPRESENTATIONS)
@pytest.mark.parametrize("net", NETS)
def test_kernels_through_a_metric_and_influence(net, name, n):
    model, x, y, F = matrix(net, n, name)
    M = oracle.fim(model, [(x,)], "regression") if name == "implicit" else F.to_torch()
    inverse = torch.linalg.inv(M + 10 * torch.eye(len(M)))
    loose = 1e-5 if name == "implicit" else 1e-9
    J = oracle.jacobian(model, (x,))
    expected = torch.einsum("cnp,pq,dmq->cndm", J, inverse, J)
    same(GramMatrix(model, (x,), metric=F.inv(10.0)).to_torch(), expected, loose)
    same(
        GramMatrix(model, (x,), metric=F.inv(10.0), output="diag").get_diag(), torch.einsum("cncn->cn", expected), loose
    )
    g = oracle.loss_gradients(model, [(x, y)], squares)
    scores = Influence(model, F, squares, regul=10.0)
    same(scores.scores((x, y), (x, y)), g @ inverse @ g.T, loose)
    same(scores.self_scores((x, y)), torch.einsum("tp,pq,tq->t", g, inverse, g), loose)
    best, index = scores.top((x, y), [(x[:1], y[:1]), *([(x[1:], y[1:])] if n > 1 else [])], 1)
    same(best, (g @ inverse @ g.T).max(1, keepdim=True).values, loose)
    assert index.shape == (n, 1)
    assert torch.is_grad_enabled()
