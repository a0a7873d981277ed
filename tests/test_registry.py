"""Blocks and representations of a user's: ours stay what they are, and files tell them apart."""

import importlib
import subprocess
import sys
import textwrap
from dataclasses import dataclass

import oracle
import pytest
import torch
from torch import Tensor, nn

from nngeometry import FIM, LayerCollection, PMat, PMatBlockDiag, PMatDiag, PMatKFAC, PVector, blocks
from nngeometry.blocks import Block, DirectSum, Part
from nngeometry.kinds import Packing
from nngeometry.registry import Registry

MODULE = """
    from dataclasses import dataclass
    from torch import Tensor
    from nngeometry import PMat
    from nngeometry.blocks import Block, Dense as Theirs

    @dataclass(frozen=True, eq=False)
    class Dense(Block):
        "A diagonal one, of another name, with its weight."
        entries: Tensor
        weight: float = 1.0

        @property
        def shape(self):
            return tuple(self.entries.shape)

        def mv(self, V):
            return self.weight * self.entries * V

    class Outer:
        @dataclass(frozen=True, eq=False)
        class Eye(Theirs):
            pass

    class PMatDiag(PMat):
        pass
"""


@pytest.fixture
def theirs(tmp_path, monkeypatch):
    """A module of a user's, with names of ours."""
    (tmp_path / "their_blocks.py").write_text(textwrap.dedent(MODULE))
    monkeypatch.syspath_prepend(tmp_path)
    yield importlib.import_module("their_blocks")
    del sys.modules["their_blocks"]


def problem():
    torch.manual_seed(0)
    model = oracle.randomise(nn.Sequential(nn.Linear(3, 2), nn.Tanh(), nn.Linear(2, 2)).double())
    return model, torch.randn(5, 3).double()


def matrix_of(theirs, kind=PMat):
    lc = LayerCollection.from_model(problem()[0])
    p, d = lc.numel(), torch.arange(1.0, lc.numel() + 1).double()
    ours = blocks.Diag(d[:4])
    parts = [
        Part(((0, 4),), Packing.flat(4), ours),
        Part(((4, 8),), Packing.flat(4), theirs.Dense(d[4:8], 2.0)),
        Part(((8, p),), Packing.flat(p - 8), theirs.Outer.Eye(torch.diag(d[8:]))),
    ]
    return kind(lc, data=DirectSum(tuple(parts)))


@pytest.mark.parametrize("representation", [PMatBlockDiag, PMatDiag, PMatKFAC])
def test_names_of_a_user_change_nothing(theirs, tmp_path, representation):
    model, x = problem()
    F = FIM(model, (x,), representation, "regression")
    v = PVector.from_model(model).detach()
    F.save(tmp_path / "F.pt")
    G = PMat.load(tmp_path / "F.pt")
    assert type(G) is representation
    assert [type(p.block) for p in G.root.parts] == [type(p.block) for p in F.root.parts]
    assert torch.equal(G.solve(v, 0.1).to_torch(), F.solve(v, 0.1).to_torch())
    # What is derived from a block of a user's goes through ours as well.
    M = matrix_of(theirs)
    dense = M.to_torch()
    assert oracle.relative(M.inv(1.0).to_torch(), torch.linalg.inv(dense + torch.eye(len(dense)))) < 1e-12
    assert oracle.relative((M + 2 * M).to_torch(), 3 * dense) < 1e-12


def test_files_name_ours_shortly_and_theirs_by_module(theirs, tmp_path):
    M = matrix_of(theirs, theirs.PMatDiag)
    M.save(tmp_path / "M.pt")
    saved = torch.load(tmp_path / "M.pt", weights_only=True)
    assert saved["class"] == "their_blocks.PMatDiag"
    assert saved["root"]["block"] == "DirectSum"
    names = [part["block"]["block"] for part in saved["root"]["parts"]]
    assert names == ["Diag", "their_blocks.Dense", "their_blocks.Outer.Eye"]
    G = PMat.load(tmp_path / "M.pt")
    assert type(G) is theirs.PMatDiag
    assert [type(p.block) for p in G.root.parts] == [blocks.Diag, theirs.Dense, theirs.Outer.Eye]
    assert torch.equal(G.to_torch(), M.to_torch())


@pytest.mark.parametrize("kind", ["block", "representation"])
def test_a_file_says_what_to_import(theirs, tmp_path, kind):
    M = matrix_of(theirs, theirs.PMatDiag if kind == "representation" else PMat)
    M.save(tmp_path / "M.pt")
    code = """
        import sys
        from nngeometry import PMat
        try:
            PMat.load("M.pt")
        except ValueError as error:
            print(error)
        import their_blocks
        print(float(PMat.load("M.pt").trace()))
    """
    path = {"PYTHONPATH": ":".join(sys.path), "PATH": ""}
    run = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code)], capture_output=True, text=True, cwd=tmp_path, env=path
    )
    said, trace = run.stdout.strip().splitlines()
    assert said.startswith("PMat.load: M.pt cannot be read: it has a " + kind)
    assert said.endswith("import their_blocks before loading")
    assert float(trace) == float(M.trace())


def test_a_class_that_is_defined_again_takes_the_place_of_itself_alone(tmp_path):
    def define(factor):
        @dataclass(frozen=True, eq=False)
        class Diag(Block):
            d: Tensor

            @property
            def shape(self):
                return tuple(self.d.shape)

            def mv(self, V):
                return factor * self.d * V

        return Diag

    lc = LayerCollection.from_model(nn.Linear(2, 1))

    def matrix(kind):
        return PMat(lc, data=DirectSum((Part(((0, 3),), Packing.flat(3), kind(torch.ones(3))),)))

    once = matrix(define(2.0))
    once.save(tmp_path / "M.pt")
    assert PMat.load(tmp_path / "M.pt").trace() == 6
    again = matrix(define(3.0))
    with pytest.raises(TypeError, match="defined again"):
        once.save(tmp_path / "M.pt")  # it would be read as the other
    again.save(tmp_path / "M.pt")
    assert PMat.load(tmp_path / "M.pt").trace() == 9
    ours = PMatDiag(lc, data=DirectSum((Part(((0, 3),), Packing.flat(3), blocks.Diag(torch.ones(3))),)))
    ours.save(tmp_path / "M.pt")
    assert PMat.load(tmp_path / "M.pt").trace() == 3


def test_two_of_the_library_of_one_name_are_refused():
    known = Registry("block")
    one = type("Dense", (), {"__module__": "nngeometry.blocks.dense"})
    other = type("Dense", (), {"__module__": "nngeometry.forms"})
    known.add(one)
    known.add(one)
    with pytest.raises(TypeError, match=r"two block classes.*nngeometry\.blocks\.dense.*nngeometry\.forms"):
        known.add(other)
    assert known.find("Dense") is one


def test_what_files_do_not_hold_is_told_when_they_are_written(tmp_path):
    @dataclass(frozen=True, eq=False)
    class Named(blocks.Diag):
        names: dict

    lc = LayerCollection.from_model(nn.Linear(2, 1))
    M = PMat(lc, data=DirectSum((Part(((0, 3),), Packing.flat(3), Named(torch.ones(3), {})),)))
    with pytest.raises(TypeError, match=r"Named\.names is of type dict"):
        M.save(tmp_path / "M.pt")
