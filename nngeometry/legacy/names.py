"""How an old name gets to where it was: it takes the place of nothing."""

from __future__ import annotations

from typing import Any


def attach(target: Any, **names: Any) -> None:
    """Give a class or module names that it does not have."""
    for name, value in names.items():
        if hasattr(target, name):
            raise AttributeError(f"{target.__name__} has {name!r} already: an old name adds to it and replaces nothing")
        setattr(target, name, value)
