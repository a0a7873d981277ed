"""What all examples have in common, and what cannot get an axis of examples: biases of relative positions."""

from __future__ import annotations

import oracle
import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from nngeometry import (
    FIM,
    EmpiricalFisher,
    GramMatrix,
    Jacobian,
    PMatBlockDiag,
    PMatDense,
    PMatDiag,
    PMatEKFAC,
    PMatKFAC,
    memory_budget,
)
from nngeometry.model import pullback

T, HEADS, D = 4, 2, 6


class Relative(nn.Module):
    """Attention with a bias for each distance of positions, which is permuted before it is added to the scores."""

    def __init__(self, table):
        super().__init__()
        self.first, self.head = nn.Linear(3, D), nn.Linear(D, 3)
        self.table = table
        if table == "embedding":
            self.bias = nn.Embedding(2 * T - 1, HEADS)
        elif table == "net":
            self.bias = nn.Sequential(nn.Linear(1, 5), nn.Tanh(), nn.Linear(5, HEADS))
        else:
            self.bias = Table()

    def forward(self, x):
        h = torch.tanh(self.first(x))
        q = h.unflatten(-1, (HEADS, -1)).transpose(1, 2)
        where = torch.arange(T, device=x.device)
        distance = where - where[:, None] + T - 1
        of = self.bias(distance if self.table != "net" else distance[..., None].to(x.dtype))
        scores = q @ q.mT + of.permute(2, 0, 1).unsqueeze(0)
        return self.head((scores.softmax(-1) @ q).transpose(1, 2).flatten(2)).mean(1)


class Table(nn.Module):
    def __init__(self):
        super().__init__()
        self.values = nn.Parameter(torch.randn(2 * T - 1, HEADS))

    def forward(self, distance):
        return self.values[distance.flatten()].view(T, T, -1)


@pytest.mark.parametrize("table", ["embedding", "net", "bare"])
def test_exact(table):
    model = oracle.randomise(Relative(table))
    batches = [(torch.randn(4, T, 3),), (torch.randn(2, T, 3),)]
    M = oracle.fim(model, batches, "classif_logits")
    F = FIM(model, batches, PMatDense)
    assert oracle.relative(F.to_torch(), M) < 1e-10
    with memory_budget(2**15):
        assert oracle.relative(FIM(model, batches, PMatDiag).get_diag(), M.diagonal()) < 1e-10
    blocks = oracle.blockdiag(M, F.layer_collection)
    assert oracle.relative(FIM(model, batches, PMatBlockDiag).to_torch(), blocks) < 1e-10
    assert oracle.relative(FIM(model, batches, PMatEKFAC).trace(), M.trace()) < 1e-10
    assert FIM(model, batches, PMatKFAC).trace() > 0
    J = oracle.jacobian(model, batches[0])
    K = GramMatrix(model, batches[0]).to_torch()
    assert oracle.relative(K, torch.einsum("cbp,dep->cbde", J, J)) < 1e-10


class Met(nn.Module):
    """What layers compute of no example meets what is of each, permuted first, so that none can have a copy."""

    def __init__(self, how):
        super().__init__()
        self.first, self.head, self.how = nn.Linear(3, D), nn.Linear(D, 3), how
        self.bias, self.other = nn.Linear(2, T), nn.Embedding(D, T)
        self.register_buffer("where", torch.randn(D, 2))

    def forward(self, x):
        h, c = self.first(x), self.bias(self.where).permute(1, 0)  # (B, T, D) and (T, D)
        h = checkpoint(self.meet, h, use_reentrant=False) if self.how == "checkpoint" else self.meet(h, c)
        return self.head(h.tanh()).mean(1)

    def meet(self, h, c=None):
        c = self.bias(self.where).permute(1, 0) if c is None else c
        d = self.other(torch.arange(D, device=h.device)).permute(1, 0)
        match self.how:
            case "alpha":
                return torch.sub(torch.add(c, h, alpha=2), d, alpha=0.5)
            case "product":
                return h * c + d * h.detach().cos() + (c * d) * h
            case "expanded":
                return torch.cat([h, c.expand(len(h), -1, -1), d.unsqueeze(0).expand(len(h), -1, -1)], 1)
            case "windows":  # two of each example, and the rows of one way before the other way round
                w = h.view(-1, 2, 2, D).flatten(0, 1) * c[:2] + d[:2]
                return (w.view(h.shape).transpose(0, 1).reshape(-1, D) + c[0]).view(T, -1, D).transpose(0, 1)
            case "in place":
                h = h.clone()
                h += c
                h *= d
                return h
            case "spectrum":
                return h + (torch.fft.fft(h.detach(), dim=1) * torch.complex(c, d)).abs() * c
            case "spectrum of real ones":
                return h + (torch.fft.fft(h.detach(), dim=1) * c).abs() * d
        return h * c + c + d


@pytest.mark.parametrize(
    "how",
    ["alpha", "product", "expanded", "windows", "in place", "spectrum", "spectrum of real ones", "checkpoint"],
)
@pytest.mark.parametrize("sizes", [[3], [1, 4, 2]], ids=str)  # T and D are among multiples of these
def test_where_it_comes_in(how, sizes, monkeypatch):
    found = []
    monkeypatch.setattr(pullback, "junctions", lambda *a, of=pullback.junctions: found.append(of(*a)) or found[-1])
    model = oracle.randomise(Met(how))
    batches = [(torch.randn(n, T, 3), torch.randint(3, (n,))) for n in sizes]
    truth = torch.cat([oracle.jacobian(model, (x[b : b + 1],)) for x, _ in batches for b in range(len(x))], 1)
    J = Jacobian(model, batches).to_torch()
    assert oracle.relative(J, truth) < 1e-10
    assert not J.requires_grad
    g = oracle.loss_gradients(model, batches, nn.functional.cross_entropy)
    assert oracle.relative(EmpiricalFisher(model, batches, PMatDiag).get_diag(), g.square().mean(0)) < 1e-10
    assert found[-1]


def test_pulls_do_not_grow_with_examples(monkeypatch):
    model, pulls = oracle.randomise(Relative("net")), []

    def grad(outputs, *args, of=torch.autograd.grad, **options):
        of_model = (
            [f for f in outputs if isinstance(f, torch.Tensor)] if isinstance(outputs, list | tuple) else [outputs]
        )
        pulls.extend(f for f in of_model if f.ndim == 2 and f.shape[1] == 3)
        return of(outputs, *args, **options)

    monkeypatch.setattr(torch.autograd, "grad", grad)

    def of(n):
        pulls.clear()
        EmpiricalFisher(model, (torch.randn(n, T, 3), torch.randint(3, (n,))), PMatDiag)
        return len(pulls)

    assert of(3) == of(9) <= 3


def test_left_alone_after_an_exception(monkeypatch):
    def broken(*args):
        raise KeyError("in the middle")

    monkeypatch.setattr(pullback, "_met", broken)
    model = oracle.randomise(Met("product"))
    model.other.weight.requires_grad_(False)
    x = torch.randn(3, T, 3)
    before, state = torch.get_rng_state(), {k: v.clone() for k, v in model.state_dict().items()}
    with pytest.raises(KeyError):
        FIM(model, (x,), PMatDiag)
    assert torch.equal(before, torch.get_rng_state())
    assert all(torch.equal(v, state[k]) for k, v in model.state_dict().items())
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())
    assert [n for n, p in model.named_parameters() if not p.requires_grad] == ["other.weight"]


class Hooked(nn.Module):
    def __init__(self, hook):
        super().__init__()
        self.first, self.head, self.hook = nn.Linear(3, D), nn.Linear(D, 3), hook

    def forward(self, x):
        h = self.first(x).tanh()
        h.register_hook(self.hook)
        return self.head(h)


def test_hooks_that_mix_examples_are_refused():
    model = oracle.randomise(Hooked(lambda g: g - g.mean(0)))
    with pytest.raises(RuntimeError, match="depends on the others"):
        FIM(model, (torch.randn(4, 3),), PMatDiag)
    model.hook = lambda g: 2 * g
    batch = (torch.randn(4, 3),)
    truth = oracle.fim(model, [batch], "classif_logits").diagonal()
    assert oracle.relative(FIM(model, batch, PMatDiag).get_diag(), truth) < 1e-10
