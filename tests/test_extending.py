"""What a stranger adds is one short file of public imports, gets its laws by a line of a table, and is on the page that
says how.
"""

import ast
import importlib
import re
import sys
import textwrap
import types
from pathlib import Path

import laws
import models
import oracle
import pytest
import torch
from extensions.adapter import Adapter
from extensions.effective_dimension import effective_dimension
from extensions.half_diagonal import HalfDiagonal, PMatHalfDiagonal
from extensions.log_cosh import LogCosh
from extensions.margin import MarginMoment
from extensions.mean_output import MeanOutput
from extensions.minimal_residual import minimal_residual
from extensions.student_t import StudentT
from torch import nn

from nngeometry import (
    FIM,
    GGN,
    Accumulator,
    GradientCovariance,
    Hessian,
    LayerCollection,
    OutputLoss,
    PMatBlockDiag,
    PMatDense,
    PMatImplicit,
    PMatKFAC,
    PMatQuasiDiag,
    TokenCrossEntropy,
    blocks,
    linalg,
)
from nngeometry.estimation import ProductSource

TESTS = Path(__file__).parent
PAGE = (TESTS.parent / "docs" / "extending.rst").read_text()
FILES = sorted(set((TESTS / "extensions").glob("*.py")) - {TESTS / "extensions" / "__init__.py"})
PUBLIC = [
    "nngeometry",
    *(f"nngeometry.{m}" for m in ("blocks", "estimation", "forms", "kinds", "likelihood", "linalg")),
]


def blocks_of(page):
    """The blocks of code of a page."""
    found = re.findall(r"^\.\. code-block:: python\n\n((?:    .*\n|\n)+)", page, re.MULTILINE)
    return [textwrap.dedent(block).strip("\n") for block in found]


@pytest.mark.parametrize("path", FILES, ids=lambda p: p.stem)
def test_a_piece_is_a_short_file_of_public_imports(path):
    source = path.read_text()
    assert sum(1 for line in source.splitlines() if line.strip()) < 30
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            assert not any(alias.name.startswith("nngeometry") for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and not node.level and node.module.startswith("nngeometry"):
            assert node.module in PUBLIC
            assert {alias.name for alias in node.names} <= set(importlib.import_module(node.module).__all__)
        elif isinstance(node, ast.Attribute):
            assert not node.attr.startswith("_") or node.attr == "__init__"
            assert node.attr != "root"


@pytest.mark.parametrize("path", FILES, ids=lambda p: p.stem)
def test_a_piece_is_on_the_page(path):
    code = path.read_text().split('"""', 2)[2].strip("\n")
    assert code in blocks_of(PAGE)


def test_the_page_runs(monkeypatch):
    """From top to bottom, as one program; what a piece imports from its neighbour is above it."""
    torch.set_default_dtype(torch.float32)
    module = types.ModuleType("extending")
    monkeypatch.setitem(sys.modules, "extending", module)  # dataclasses look there
    for block in blocks_of(PAGE):
        code = re.sub(r"^from \.\w+ import .*$", "", block, flags=re.MULTILINE)
        exec(compile(code, "extending.rst", "exec"), vars(module))


def test_every_piece_has_its_line():
    """The classes and functions of the pieces are in the tables."""
    tables = (TESTS / "laws.py").read_text() + (TESTS / "models.py").read_text()
    for path in FILES:
        if path.stem not in ("effective_dimension", "tridiagonal"):  # of which there is a representation
            assert f"from extensions.{path.stem} import" in tables
    assert "adapter" in models.CASES
    assert {M for M, _ in laws.PAIRS} >= {MarginMoment, MeanOutput}


# What each piece is, beyond the laws of the tables.


def net():
    model = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), Adapter(4, 4, 2), nn.Tanh(), nn.Linear(4, 3))
    return oracle.randomise(model), [(torch.randn(5, 3),), (torch.randn(2, 3),)]


def test_the_kind_serves_the_adapter_alone():
    class Scaled(Adapter):
        def forward(self, x):
            return 2 * super().forward(x)

    model, _ = net()
    assert LayerCollection.from_model(model)["2"].served_by == "adapter"
    assert [name for name, _ in LayerCollection.from_model(model)["2"].params] == ["A", "B"]
    model[2] = oracle.randomise(Scaled(4, 4, 2))
    assert LayerCollection.from_model(model)["2"].served_by == "generic"
    batch = (torch.randn(5, 3),)
    M = oracle.fim(model, [batch], "regression")
    assert oracle.relative(FIM(model, batch, PMatDense, "regression").to_torch(), M) < 1e-12


def test_a_regression_with_heavy_tails():
    model, batches = net()
    fisher = laws.LIKELIHOODS["student-t"][2]
    total = 0
    for batch in batches:
        J = oracle.jacobian(model, batch)
        total = total + torch.einsum("cnp,ncd,dnq->pq", J, fisher(model(batch[0]).detach()), J) / 7
    for representation, project in laws.PROJECTIONS.items():
        F = FIM(model, batches, representation, StudentT(5.0, 0.7))
        assert oracle.relative(F.to_torch(), project(total, F.layer_collection)) < 1e-8, representation


#: Losses with closed forms, outputs and targets of theirs.
OUTPUT_LOSSES = {
    "log-cosh": (LogCosh(), lambda: (3 * torch.randn(4, 3), torch.randn(4, 3))),
    "tokens": (TokenCrossEntropy(), lambda: (torch.randn(4, 5, 3), torch.randint(3, (4, 5)))),
}


@pytest.mark.parametrize("name", OUTPUT_LOSSES)
def test_closed_forms_are_what_would_be_derived(name):
    loss, make = OUTPUT_LOSSES[name]
    f, *targets = make()
    u = torch.randn_like(f)
    torch.testing.assert_close(loss.gradient(f, *targets), OutputLoss.gradient(loss, f, *targets))
    torch.testing.assert_close(loss.hvp(f, u, *targets), OutputLoss.hvp(loss, f, u, *targets))
    roots = [c.take(0, c.count).flatten(2) for c in (loss.sqrt(f, *targets), OutputLoss.sqrt(loss, f, *targets))]
    one, other = (torch.einsum("cnp,cnq->npq", s, s) for s in roots)
    torch.testing.assert_close(one, other, atol=1e-7, rtol=1e-7)


def test_log_cosh_by_loops():
    model, batches = net()
    batches = [(x, torch.randn(len(x), 3)) for (x,) in batches]
    x, y = (torch.cat(column) for column in zip(*batches, strict=True))
    f = model(x)
    J = oracle.jacobian(model, (x,))
    H = torch.stack([oracle._hessian(lambda one, k=k: torch.log(torch.cosh(one - y[k])).sum(), f[k]) for k in range(7)])
    M = torch.einsum("cnp,ncd,dnq->pq", J, H, J) / 7
    for representation in (PMatDense, PMatImplicit):
        assert oracle.relative(GGN(model, batches, representation, LogCosh()).to_torch(), M) < 1e-10
    plain = Hessian(model, batches, PMatDense, lambda f, y: torch.log(torch.cosh(f - y)).sum(1))
    assert oracle.relative(Hessian(model, batches, PMatDense, LogCosh()).to_torch(), plain.to_torch()) < 1e-12


def test_half_diagonal_is_kfac_without_correlations():
    model, batches = net()
    K, F = (FIM(model, batches, representation) for representation in (PMatKFAC, PMatHalfDiagonal))
    assert [type(part.block) for part in F.root.parts] == [HalfDiagonal, blocks.Diag, HalfDiagonal]
    for name, outputs in (("0", 4), ("4", 3)):
        layer, kron = K.layer_collection[name], K.block(name).to_torch()
        row = layer.packing.pack(torch.arange(layer.numel()))[0]
        expected = torch.zeros_like(kron)
        for k in range(outputs):
            expected[row[k][:, None], row[k]] = kron[row[k][:, None], row[k]]
        assert oracle.relative(F.block(name).to_torch(), expected) < 1e-12


def test_what_cannot_be_centred_says_so():
    model, batches = net()
    batches = [(x, torch.randint(3, (len(x),))) for (x,) in batches]
    with pytest.raises(NotImplementedError, match="no Kronecker factors"):
        GradientCovariance(model, batches, PMatHalfDiagonal)


def test_the_moment_of_margins_by_loops():
    model, batches = net()
    total = 0
    for (x,) in batches:
        for k in range(len(x)):
            first, second = model(x[k : k + 1])[0].sort(descending=True).values[:2]
            params = LayerCollection.from_model(model).parameters(model)
            g = torch.cat([d.flatten() for d in torch.autograd.grad(first - second, params)])
            total = total + torch.outer(g, g) / 7
    for representation, project in laws.PROJECTIONS.items():
        M = MarginMoment(model, batches, representation)
        assert oracle.relative(M.to_torch(), project(total, M.layer_collection)) < 1e-10, representation


def test_the_matrix_of_mean_outputs_by_loops():
    model, batches = net()
    total = 0
    for (x,) in batches:
        mean = oracle.jacobian(model, (x,)).mean(1)
        total = total + len(x) / 7 * mean.T @ mean
    for representation in (PMatDense, PMatBlockDiag, PMatImplicit):
        M = MeanOutput(model, batches, representation)
        expected = laws.PROJECTIONS[representation](total, M.layer_collection)
        assert oracle.relative(M.to_torch(), expected) < 1e-12
    with pytest.raises(NotImplementedError, match="made of per-example Jacobians"):
        MeanOutput(model, batches, PMatQuasiDiag)


def test_products_that_do_not_say_what_they_count_have_no_average():
    model, batches = net()

    def constructor(model, loader, representation, **options):
        lc, like = LayerCollection.from_model(model), torch.empty(0)

        def operator(examples):
            return blocks.Operator(lambda V: 2 * V, lc.numel(), None, None, like, psd=True)

        source = ProductSource(lc, operator, like)
        return representation(layer_collection=lc, generator=source, examples=loader, **options)

    with pytest.raises(ValueError, match="give weight_of="):
        Accumulator(constructor, model, PMatDense).update(batches)


@pytest.mark.parametrize("name", ["dense", "kfac", "tridiagonal", "half-diagonal"])
def test_an_algorithm_takes_any_representation(name):
    model, batches = net()
    F = FIM(model, batches, laws.HELD[name])
    b = linalg.gaussian(3, F.size(0), like=F.like)
    x = minimal_residual(lambda v: F.matvec(v) + 0.5 * v, b, rtol=1e-10).x
    expected = torch.linalg.solve(F.to_torch() + 0.5 * torch.eye(F.size(0)), b.T).T
    assert oracle.relative(x, expected) < 1e-8


@pytest.mark.parametrize("name", [name for name in laws.HELD if name != "mixed"])
def test_a_consumer_takes_any_representation(name):
    model, batches = net()
    F = FIM(model, batches, laws.HELD[name])
    l = torch.linalg.eigvalsh(F.to_torch())
    assert effective_dimension(F, 10.0) == pytest.approx(float((l / (l + 10.0)).sum()), rel=1e-9)
    with pytest.raises(ValueError, match="must be positive"):
        effective_dimension(F, 0.0)
