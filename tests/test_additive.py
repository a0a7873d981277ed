"""Old names add to the library and replace nothing in it."""

import inspect
import subprocess
import sys

import pytest

import nngeometry
from nngeometry.legacy.names import attach

COMPARED = '''
import importlib, pkgutil, sys, types

stub = types.ModuleType("nngeometry.legacy")
stub.install = lambda: None
stub.__path__ = []
sys.modules["nngeometry.legacy"] = stub
import nngeometry

OLD = ("legacy", "maths", "utils", "backend", "solve", "plot", "integrations")
modules = [nngeometry]
for info in pkgutil.walk_packages(nngeometry.__path__, "nngeometry."):
    if info.name.split(".")[1] not in OLD:
        modules.append(importlib.import_module(info.name))


def names_of(thing):
    """What a module or class holds itself; of an import into a module, what it names there."""
    return {n: v for n, v in vars(thing).items() if n != "__doc__" and not n.startswith("__cached")}


def classes():
    return {v for m in modules for v in vars(m).values() if isinstance(v, type) and v.__module__.startswith("nngeom")}


before = {t: names_of(t) for t in [*modules, *classes()]}
registries = {"__warningregistry__", "_abc_impl"}

import torch
from torch import nn
from nngeometry import FIM, Hessian, LayerCollection, PMatDense, PMatEKFAC, PMatKFAC, PVector

# Nothing of the library needs the old names.
model, batch = nn.Sequential(nn.Linear(3, 2), nn.Tanh(), nn.Linear(2, 2)), (torch.randn(5, 3), torch.randint(2, (5,)))
for representation in (PMatDense, PMatKFAC, PMatEKFAC):
    F = FIM(model, batch, representation)
    v = PVector.from_model(model).detach()
    assert F.solve(v, 1e-2).to_torch().isfinite().all() and F.pow(2).trace() > 0
assert Hessian(model, batch, PMatDense).to_torch().isfinite().all()

del sys.modules["nngeometry.legacy"]
importlib.import_module("nngeometry.legacy").install()
replaced, added = [], 0
for thing, names in before.items():
    now = names_of(thing)
    added += len(now.keys() - names.keys())
    replaced += [f"{thing.__name__}.{n}" for n in names if n not in registries and now.get(n, now) is not names[n]]
replaced = [name for name in replaced if not name.endswith((".legacy", "._install"))]
assert added > 50, added
print(replaced)
'''


def test_no_name_is_another_thing_once_the_old_names_are_there():
    run = subprocess.run([sys.executable, "-W", "ignore", "-c", COMPARED], capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr
    assert run.stdout.strip() == "[]"


PUBLIC = {name: thing for name in nngeometry.__all__ if not inspect.ismodule(thing := getattr(nngeometry, name))}


@pytest.mark.parametrize("thing", PUBLIC.values(), ids=PUBLIC)
def test_the_source_of_a_public_name_is_its_own(thing):
    """That of a function and of each method, at the place of the class or a base in whose body it stands."""
    assert not thing.__module__.startswith("nngeometry.legacy")
    functions = [(thing.__module__, thing.__name__, thing)]
    if inspect.isclass(thing):
        functions = [
            (owner.__module__, name, value)
            for owner in thing.__mro__
            if owner.__module__.startswith("nngeometry")
            for name, raw in vars(owner).items()
            for value in [getattr(raw, "fget", None) or getattr(raw, "__func__", raw)]
            if inspect.isfunction(value) and (name.startswith("__") or not name.startswith("_"))
        ]
    for module, name, function in functions:
        if "nngeometry" not in inspect.unwrap(function).__code__.co_filename:  # of a dataclass
            continue
        assert function.__module__ == module or function.__module__.startswith("nngeometry.legacy.")
        source = inspect.getsource(function)
        aliases = {"__pow__", "__rmul__", "__or__", "__and__"}  # of pow, ...
        assert f"def {name}(" in source or name in aliases, (thing, name)


def test_a_trace_begins_in_the_class():
    with pytest.raises(TypeError) as error:
        nngeometry.PMat.solve(object.__new__(nngeometry.PMatDense), "b")
    assert error.traceback[1].frame.code.name == "solve"
    assert error.traceback[1].path.name == "pmat.py"


def test_a_name_that_is_there_is_not_replaced():
    with pytest.raises(AttributeError, match="PMat has 'solve' already"):
        attach(nngeometry.PMat, solve=None)
