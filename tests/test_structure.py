"""The house: a file imports only from lower floors, nothing is imported in a circle, and the import is light."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import nngeometry

ROOT = Path(nngeometry.__file__).parent
#: From the ground up; a file may import from its own line's left and from lines above it.
FLOORS = [
    [
        "spelling",
        "changes",
        "memory",
        "autograd",
        "autocorrelation",
        "composites",
        "operations",
        "derivatives",
        "forms",
        "apart",
        "batch",
        "data",
        "batch",
        "data",
        "arguments",
        "likelihood",
        "targets",
        "convex",
        "outputloss",
        "torchlosses",
        "losses",
        "layers",
        "linalg",
        "recurrent",
        "weights",
    ],
    ["kinds", "blocks"],
    ["layercollection"],
    ["evaluator", "recording"],
    ["generator", "minibatchloss"],
    ["object"],
    ["metrics"],
    ["hessian", "jacobian"],
    ["gram", "influence"],
    ["spectrum", "hierarchy"],
    ["plot"],
    ["legacy"],
    ["maths", "utils", "backend", "solve"],
    ["__init__"],
]
ORDER = {name: k for k, name in enumerate(n for floor in FLOORS for n in floor)}
FILES = sorted(ROOT.rglob("*.py"))


def imported(path):
    """The rooms of the house that a file imports, with whether the import is at the top level."""
    package = ("nngeometry", *path.relative_to(ROOT).parent.parts)
    tree = ast.parse(path.read_text())
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and node.level:
            base = package[: len(package) - node.level + 1]
            full = (*base, *(node.module or "").split(".")) if node.module else base
            names = [full] if len(full) > 1 else [(*full, alias.name) for alias in node.names]
            for name in names:
                yield name[1], node in tree.body


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(ROOT)))
def test_imports_go_down(path):
    room = path.relative_to(ROOT).parts[0].removesuffix(".py")
    assert room in ORDER, f"{room} has no floor: add it to FLOORS"
    for target, top in imported(path):
        assert target == room or ORDER[target] < ORDER[room], f"{path.name} imports {target}, which is above it"
        assert top, f"{path.name} imports {target} inside a function"


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(ROOT)))
def test_every_file_says_what_it_is(path):
    docstring = ast.get_docstring(ast.parse(path.read_text()))
    assert docstring, path


def test_public_names_are_documented_with_an_example_or_a_sentence():
    for name in nngeometry.__all__:
        assert getattr(nngeometry, name).__doc__, name
    assert nngeometry.__all__ == sorted(nngeometry.__all__, key=lambda n: (not n.isupper(), not n[0].isupper(), n))


def test_the_import_takes_no_optional_dependency():
    code = (
        "import sys, nngeometry; print([m for m in ('matplotlib', 'tqdm', 'transformers', 'sklearn', 'curvlinops', "
        "'scipy') if m in sys.modules])"
    )
    without = (
        "import sys\nfor m in ('matplotlib','tqdm','transformers','sklearn'): sys.modules[m] = None\n"
        + code.replace(" if m in", " if sys.modules.get(m) and m in")
    )
    run = subprocess.run([sys.executable, "-c", without], capture_output=True, text=True, check=True, cwd=ROOT.parent)
    assert run.stdout.strip() == "[]"
