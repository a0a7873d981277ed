"""Public docstrings name every argument, each on a line of its own."""

import inspect
import re

import pytest

import nngeometry

#: Accepted from programs that were written for NNGeometry; warnings tell what to write instead.
OLD = {"layerid_to_module", "ignore_unsupported_layers", "layer_collection_each"}
#: ``name: what it is``, or several names that are one thing, in a section of arguments.
_ENTRY = re.compile(r"    (\*{0,2}\w+(?:, \*{0,2}\w+)*): \S")


def public():
    """Every public callable and the public methods that its class defines, with the class."""
    for name in nngeometry.__all__:
        found = getattr(nngeometry, name)
        if inspect.isclass(found) and not issubclass(found, BaseException):
            yield pytest.param(found, None, id=name)
            for key, held in vars(found).items():
                method = held.__func__ if isinstance(held, classmethod | staticmethod) else held
                ours = inspect.isfunction(method) and method.__module__.startswith("nngeometry")
                if not key.startswith("_") and ours and not method.__module__.startswith("nngeometry.legacy"):
                    yield pytest.param(method, found, id=f"{name}.{key}")
        elif inspect.isfunction(found):
            yield pytest.param(found, None, id=name)


def documented(doc):
    """The names in the section ``Args:`` of a docstring."""
    section = re.search(r"^Args:\n((?:    .*\n|\n)*)", inspect.cleandoc(doc or "") + "\n", re.MULTILINE)
    lines = section.group(1).splitlines() if section else []
    found = [match.group(1) for match in map(_ENTRY.match, lines) if match]
    return {one.lstrip("*") for names in found for one in names.split(", ")}


def texts(found, owner):
    """The docstrings that tell about a callable: its own, that of its class and those of what it overrides."""
    if inspect.isclass(found):
        return [text.__doc__ for base in found.__mro__[:-1] for text in (base, vars(base).get("__init__"))]
    if owner is None:
        return [found.__doc__]
    overridden = (getattr(base, found.__name__, None) for base in owner.__mro__)
    return [found.__doc__, owner.__doc__, *(one.__doc__ for one in overridden if one is not None)]


@pytest.mark.parametrize(("found", "owner"), list(public()))
def test_every_argument_is_named(found, owner):
    try:
        parameters = inspect.signature(found).parameters
    except ValueError:  # of torch
        return
    named = set().union(*(documented(text) for text in texts(found, owner)))
    lacking = [name for name in parameters if name not in {"self", "cls", *OLD, *named} and not name.startswith("_")]
    assert not lacking, f"no line in Args: for {', '.join(lacking)}"
