"""Matrices whose decompositions are on disk: the same numbers, and what is done already is not done again."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn

from nngeometry import (
    FIM,
    Influence,
    PMatBlockDiag,
    PMatDense,
    PMatDiag,
    PMatEKFAC,
    PMatImplicit,
    PMatKFAC,
    PMatLowRank,
    PMatQuasiDiag,
    PVector,
)
from nngeometry.blocks import dense

F64 = torch.float64
REPRESENTATIONS = [PMatBlockDiag, PMatDense, PMatDiag, PMatEKFAC, PMatKFAC, PMatLowRank, PMatQuasiDiag]


@pytest.fixture
def model() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(1, 2, 3), nn.Tanh(), nn.Flatten(), nn.Linear(8, 4), nn.Tanh(), nn.Linear(4, 3)).to(
        F64
    )


@pytest.fixture
def x() -> torch.Tensor:
    torch.manual_seed(1)
    return torch.randn(30, 1, 4, 4, dtype=F64)


@pytest.mark.parametrize("representation", REPRESENTATIONS)
def test_the_same_numbers(model: nn.Module, x: torch.Tensor, representation: type, tmp_path: Path) -> None:
    matrix = FIM(model, (x,), representation)
    found = matrix.offload(tmp_path / "a" / "b")
    assert type(found) is type(matrix)
    v = PVector.from_model(model).detach()
    for do in (
        lambda m: m.mv(v).to_torch(),
        lambda m: m.solve(v, 0.1).to_torch(),
        lambda m: m.solve(v, {"0": 0.1, "3": 0.2, "5": 0.3}).to_torch(),
        lambda m: m.trace(),
        lambda m: m.logdet(0.1) if representation is not PMatQuasiDiag else m.trace(),
        lambda m: m.get_diag(),
        lambda m: m.to_torch(),
    ):
        torch.testing.assert_close(do(found), do(matrix), rtol=1e-10, atol=1e-12)


def test_what_is_decomposed_is_not_decomposed_again(
    model: nn.Module, x: torch.Tensor, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    matrix = FIM(model, (x,), PMatKFAC)
    calls: list[torch.Size] = []
    eigh = dense.eigh

    def counted(m: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        calls.append(m.shape)
        return eigh(m)

    monkeypatch.setattr(dense, "eigh", counted)
    matrix.offload(tmp_path)
    assert len(calls) == 6
    (tmp_path / "1.block").unlink()
    found = matrix.offload(tmp_path)
    assert len(calls) == 8
    found.solve(PVector.from_model(model).detach(), 0.1)
    assert len(calls) == 8


def test_the_matrix_that_it_is_made_of_keeps_no_decomposition(
    model: nn.Module, x: torch.Tensor, tmp_path: Path
) -> None:
    matrix = FIM(model, (x,), PMatKFAC)
    held = matrix.nbytes()
    matrix.offload(tmp_path)
    assert all("_eig" not in vars(f) for part in matrix.root.parts for f in (part.block, part.block.left))
    assert matrix.nbytes() == held


def test_influence_takes_one(model: nn.Module, x: torch.Tensor, tmp_path: Path) -> None:
    y = torch.randint(3, (30,))
    F = FIM(model, (x,), PMatEKFAC)
    ours, theirs = (Influence(model, m, regul=0.1).scores((x, y), (x[:4], y[:4])) for m in (F.offload(tmp_path), F))
    torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-12)


def test_what_cannot_be(model: nn.Module, x: torch.Tensor, tmp_path: Path) -> None:
    FIM(model, (x,), PMatKFAC).offload(tmp_path)
    with pytest.raises(ValueError, match="another work"):
        FIM(model, (2 * x,), PMatKFAC).offload(tmp_path)
    with pytest.raises(NotImplementedError, match="products alone"):
        FIM(model, (x,), PMatImplicit).offload(tmp_path / "c")
    with pytest.raises(TypeError, match="folder"):
        FIM(model, (x,), PMatKFAC).offload(3)  # type: ignore[arg-type]
    (tmp_path / "d").mkdir()
    (tmp_path / "d" / "0.block").write_bytes(b"nothing")
    with pytest.raises(ValueError, match="damaged"):
        FIM(model, (x,), PMatKFAC).offload(tmp_path / "d")
