"""The house: a file imports only from lower floors, nothing is imported in a circle, and the import is light."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import nngeometry

ROOT = Path(nngeometry.__file__).parent
#: From the ground up; a file may import from its own line's left and from lines above it. A folder is named as a whole,
#: or file by file where its files are on several floors.
FLOORS = [
    ["tables", "spelling", "wrappers", "changes", "memory", "registry", "derivatives", "forms", "layers"],
    ["model.entries", "model.packed"],
    [
        "model.batch",
        "model.data",
        "model.independence",
        "model.operations_apart",
        "model.structure",
        "model.recurrent",
        "model.weights",
    ],
    ["model.batch_statistics"],
    ["identity", "team", "owners", "distributed", "model.refused", "arguments", "reading", "checkpoint"],
    ["linalg", "likelihood", "losses"],
    ["kinds", "blocks"],
    ["layercollection"],
    ["model.evaluator", "model.recording", "model.remedies"],
    ["linearisation"],
    ["model.parts"],
    ["model.pullback", "model.mixing", "model.functional"],
    ["model.layer_jacobians"],
    ["model.probing"],
    ["generator", "minibatchloss"],
    ["sums"],
    ["estimation"],
    ["pooling", "passes"],
    ["object"],
    ["accumulator"],
    ["undivided"],
    ["metrics"],
    ["hessian", "jacobian"],
    ["gram", "influence"],
    ["objective", "minibatches"],
    ["statistics", "spectrum", "hierarchy", "calibration"],
    ["landscape"],
    ["evidence"],
    ["posterior"],
    ["optim"],
    ["continual", "merging", "pruning", "selection", "integrations"],
    ["plot"],
    ["training"],
    ["report"],
    ["legacy"],
    ["maths", "utils", "backend", "solve"],
]
ORDER = {name: k for k, name in enumerate(n for floor in FLOORS for n in floor)}
FILES = sorted(ROOT.rglob("*.py"))


def module_of(path):
    """``a.b`` for a/b.py, ``a`` for a/__init__.py."""
    return ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix("__init__").rstrip(".")


MODULES = {module_of(path): path for path in FILES}


def floor_of(module):
    return next((ORDER[name] for name in (module, module.split(".")[0]) if name in ORDER), None)


def imported(path):
    """The modules of the house that a file imports, with whether the import is at the top level."""
    package = path.relative_to(ROOT).parent.parts
    tree = ast.parse(path.read_text())
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and node.level:
            base = ".".join((*package[: len(package) - node.level + 1], *(node.module or "").split("."))).strip(".")
            for alias in node.names:
                inner = f"{base}.{alias.name}".strip(".")
                yield inner if inner in MODULES else base, node in tree.body


def is_a_list(path):
    """Whether a file only says what a folder, or all, offers."""
    return path.name == "__init__.py" and path.parent.name != "legacy"


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(ROOT)))
def test_imports_go_down(path):
    module = module_of(path)
    if not is_a_list(path):
        assert floor_of(module) is not None, f"{module} has no floor: add it to FLOORS"
    for target, top in imported(path):
        own = target.split(".")[0] == module.split(".")[0]
        if not (own or is_a_list(path)):
            assert floor_of(target) < floor_of(module), f"{module} imports {target}, which is above it"
        elif own and floor_of(target) is not None and not is_a_list(path):
            assert floor_of(target) <= floor_of(module), f"{module} imports {target}, which is above it"
        assert top, f"{path.name} imports {target} inside a function"


def test_nothing_is_imported_in_a_circle():
    """Inside of folders too."""
    below = {m: {t for t, _ in imported(p)} - {m} for m, p in MODULES.items() if not is_a_list(p)}
    below = {m: {t for t in targets if t in below} for m, targets in below.items()}
    while below:
        ground = {m for m, targets in below.items() if not targets}
        assert ground, f"a circle among {', '.join(sorted(below))}"
        below = {m: targets - ground for m, targets in below.items() if m not in ground}


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
