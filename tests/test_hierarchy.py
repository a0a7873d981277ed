"""The decomposition of the Gauss-Newton matrix by class, against loops over examples and classes."""

import oracle
import pytest
import torch
from models import CASES

from nngeometry import GGN, PMatDense, PMatImplicit, memory_budget
from nngeometry.hierarchy import ggn_by_class


@pytest.mark.parametrize("budget", [2**30, 1])
@pytest.mark.parametrize("representation", [PMatDense, PMatImplicit])
def test_by_loops(representation, budget):
    model, _, _ = CASES["mlp"].make(2)
    batches = [(torch.randn(n, 3), torch.arange(n) % 3) for n in (7, 4, 1)]
    x, y = (torch.cat(t) for t in zip(*batches, strict=True))
    J = oracle.jacobian(model, (x,))  # (C, n, P)
    p = model(x).softmax(1).detach()
    n, c = p.shape
    d = {(i, k): J[:, i].T @ (p[i] - torch.eye(c)[k]) for i in range(n) for k in range(c)}
    classes = torch.zeros(J.shape[2], J.shape[2])
    cross = torch.zeros_like(classes)
    for label in range(c):
        members = [i for i in range(n) if y[i] == label]
        mass = {k: sum(p[i, k] / n for i in members) for k in range(c) if k != label}
        mean = {k: sum(p[i, k] / n * d[i, k] for i in members) / mass[k] for k in mass}
        weight = sum(mass.values())
        centre = sum(mass[k] * mean[k] for k in mass) / weight
        classes += weight * torch.outer(centre, centre)
        for k in mass:
            cross += mass[k] * torch.outer(mean[k] - centre, mean[k] - centre)
    with memory_budget(budget):
        parts = ggn_by_class(model, batches, PMatImplicit)
        assert oracle.relative(parts.classes.to_torch(), classes) < 1e-10
        assert oracle.relative(parts.cross.to_torch(), cross) < 1e-10
    rest = ggn_by_class(model, batches, representation).rest.to_torch()
    whole = GGN(model, (x, y), PMatDense).to_torch()
    assert oracle.relative(rest, whole - classes - cross) < 1e-9
    assert float(torch.linalg.eigvalsh(rest)[0]) > -1e-12 * float(torch.linalg.eigvalsh(whole)[-1])
