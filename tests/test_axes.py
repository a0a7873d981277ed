"""Kronecker products over the axes of parameters whose exact block does not fit, against their definition."""

from __future__ import annotations

import oracle
import pytest
import torch
from torch import nn

from nngeometry import (
    FIM,
    Accumulator,
    EmpiricalFisher,
    FIM_MonteCarlo,
    LayerCollection,
    PMatBlockDiag,
    PMatDiag,
    PMatEKFAC,
    PMatKFAC,
    PVector,
    memory_budget,
)

#: Of 8-byte numbers: no exact block of Bare fits, and a factor of up to four columns does.
SMALL = 4 * 8 * 4**2


class Bare(nn.Module):
    """Parameters that are no layer of torch: of one, two, three and four axes."""

    def __init__(self):
        super().__init__()
        self.shift = nn.Parameter(torch.randn(6))
        self.positions = nn.Parameter(torch.randn(1, 3, 6))
        self.experts = nn.Parameter(torch.randn(2, 6, 4))
        self.mixing = nn.Parameter(torch.randn(2, 2, 3, 2))
        self.head = nn.Linear(4, 3)

    def forward(self, x):
        h = torch.tanh(x + self.positions + self.shift)
        h = torch.tanh(torch.einsum("btk,eko->bteo", h, self.experts)).sum(2)
        return self.head(h.mean(1) + torch.tanh(h).mean((1, 2))[:, None] * self.mixing.sum((1, 2)).flatten())


def bare():
    torch.manual_seed(0)
    return Bare(), [(torch.randn(4, 3, 6), torch.randint(3, (4,))), (torch.randn(2, 3, 6), torch.randint(3, (2,)))]


def written_out(model, loader, name, shape, dense_rows, dense_columns):
    """From all entries of the exact matrix: those of one parameter."""
    exact = oracle.fim(model, loader, "classif_logits")
    lc, start = LayerCollection.from_model(model), 0
    for full, p in lc.named_parameters(model):
        if full == name:
            M = exact[start : start + p.numel(), start : start + p.numel()].view(*shape, *shape)
        start += p.numel()
    blocks = []
    for g in range(shape[0]):
        m = M[g, :, :, g]
        rows, columns = torch.einsum("aibi->ab", m), torch.einsum("aiaj->ij", m)
        rows = rows if dense_rows else rows.diagonal().diag()
        columns = columns if dense_columns else columns.diagonal().diag()
        blocks.append(torch.kron(rows, columns / torch.einsum("aiai->", m)))
    return torch.block_diag(*blocks)


@pytest.mark.parametrize(
    ("make", "layer", "name", "where", "shape", "dense"),
    [
        (bare, "", "shift", slice(0, 6), (1, 6, 1), (False, True)),
        (bare, "", "positions", slice(6, 24), (1, 3, 6), (True, False)),
        (bare, "", "experts", slice(24, 72), (2, 6, 4), (False, False)),
        (bare, "", "mixing", slice(72, 96), (4, 3, 2), (False, True)),
    ],
)
@pytest.mark.parametrize("representation", [PMatKFAC, PMatEKFAC])
def test_definition(make, layer, name, where, shape, dense, representation):
    model, loader = make()
    with memory_budget(SMALL):
        F = FIM(model, loader, representation, "classif_logits")
    block = F.block(layer).to_torch()[where, where]
    assert oracle.relative(block, written_out(model, loader, name, shape, *dense)) < 1e-12
    assert "approximate: axes" in repr(F)
    exact = FIM(model, loader, PMatBlockDiag, "classif_logits")
    assert oracle.relative(F.block(layer).trace(), exact.block(layer).trace()) < 1e-12


@pytest.mark.parametrize("representation", [PMatKFAC, PMatEKFAC])
@pytest.mark.parametrize("matrix", [FIM, FIM_MonteCarlo, EmpiricalFisher])
def test_algebra(representation, matrix):
    model, loader = bare()
    options = {"generator": torch.Generator().manual_seed(0)} if matrix is FIM_MonteCarlo else {}
    loss = (nn.CrossEntropyLoss(),) if matrix is EmpiricalFisher else ("classif_logits",)
    with memory_budget(SMALL):
        F = matrix(model, loader, representation, *loss, **options)
    M, v = F.to_torch(), PVector.from_model(model).detach()
    eye = torch.eye(len(M))
    assert oracle.relative(F.mv(v).to_torch(), M @ v.to_torch()) < 1e-12
    assert oracle.relative(F.solve(v, 0.1).to_torch(), torch.linalg.solve(M + 0.1 * eye, v.to_torch())) < 1e-10
    assert oracle.relative(F.inv(0.1).to_torch(), torch.linalg.inv(M + 0.1 * eye)) < 1e-10
    assert oracle.relative(F.logdet(0.1), torch.logdet(M + 0.1 * eye)) < 1e-10
    l = F.eig(3)[0]
    assert oracle.relative(l, torch.linalg.eigvalsh(M).flip(0)[:3]) < 1e-10
    assert oracle.relative(F.get_diag(), M.diagonal()) < 1e-12
    assert oracle.relative((F + F).to_torch(), 2 * M) < 1e-12
    assert oracle.relative(F.pow(0.5).mv(F.pow(0.5).mv(v)).to_torch(), M @ v.to_torch()) < 1e-8
    assert F.sample(generator=torch.Generator().manual_seed(0)).to_torch().shape == v.to_torch().shape


def test_running_merged_and_saved(tmp_path):
    model, loader = bare()
    with memory_budget(SMALL):
        F = FIM(model, loader, PMatKFAC, "classif_logits")
        a, b = (Accumulator(FIM, model, PMatKFAC, variant="classif_logits").update(batch) for batch in loader)
        assert oracle.relative(b.merge(a).matrix().to_torch(), F.to_torch()) < 1e-12
        again = Accumulator(FIM, model, PMatKFAC, variant="classif_logits")
        again.load_state_dict(b.state_dict())
        assert torch.equal(again.matrix().to_torch(), b.matrix().to_torch())
    F.save(tmp_path / "F")
    assert torch.equal(PMatKFAC.load(tmp_path / "F").to_torch(), F.to_torch())
    exact = Accumulator(FIM, model, PMatKFAC, variant="classif_logits").update(loader[0])
    before = exact.matrix().to_torch()
    with pytest.raises(ValueError, match=r"the same nngeometry\.memory_budget"):
        exact.merge(b)
    with memory_budget(SMALL), pytest.raises(ValueError, match=r"the same nngeometry\.memory_budget"):
        exact.update(loader[1])
    assert torch.equal(exact.matrix().to_torch(), before), "nothing of it is kept"
    for budget in (SMALL // 2, SMALL // 8):  # other factors are dense
        with memory_budget(budget):
            other = Accumulator(FIM, model, PMatKFAC, variant="classif_logits").update(loader[0])
        held, seen = again.matrix().to_torch(), again.n
        with pytest.raises(ValueError, match=r"the same nngeometry\.memory_budget"):
            again.merge(other)
        assert torch.equal(again.matrix().to_torch(), held)
        assert again.n == seen


def test_what_fits_is_exact_and_what_must_be_says_so():
    model, loader = bare()
    F = FIM(model, loader, PMatKFAC, "classif_logits")
    G = FIM(model, loader, PMatBlockDiag, "classif_logits")
    assert "axes" not in repr(F)
    assert oracle.relative(F.block("").to_torch(), G.block("").to_torch()) < 1e-12
    with memory_budget(SMALL):
        for dense in (True, "", [Bare], lambda layer: layer.name == ""):
            with pytest.raises(MemoryError, match=r"layer '' .* has no Kronecker form"):
                FIM(model, loader, PMatKFAC, "classif_logits", dense=dense)
        with pytest.raises(KeyError, match="selects no layer"):
            FIM(model, loader, PMatKFAC, "classif_logits", dense=nn.Conv2d)
        FIM(model, loader, PMatDiag, "classif_logits")
