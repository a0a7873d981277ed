"""How an old name gets to where it was: it takes the place of nothing."""

from __future__ import annotations

from typing import Any

_OF_EVERY_CLASS = {*vars(type("Empty", (), {})), "__annotations__"}


def attach(target: Any, **names: Any) -> None:
    """Give a class or module names that it does not have."""
    for name, value in names.items():
        if hasattr(target, name):
            raise AttributeError(f"{target.__name__} has {name!r} already: an old name adds to it and replaces nothing")
        setattr(target, name, value)


def adopt(target: type, old: type) -> None:
    """Give a class what stands in the body of another, which holds its old names."""
    attach(target, **{name: value for name, value in vars(old).items() if name not in _OF_EVERY_CLASS})
