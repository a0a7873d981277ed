"""How an old name says what it is called now, and how it gets to where it was."""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable
from typing import Any


@functools.cache
def warn(old: str, new: str) -> None:
    """Say once what an old name is called now, on behalf of the caller's caller."""
    warnings.warn(f"{old} is an old name of NNGeometry: write {new}", DeprecationWarning, stacklevel=3)


def renamed(old: str, new: str, function: Callable[..., Any]) -> Callable[..., Any]:
    """``function`` under an old name."""

    def under_the_old_name(*args: Any, **kwargs: Any) -> Any:
        warn(old, new)
        return function(*args, **kwargs)

    under_the_old_name.__doc__ = f"Old name of ``{new}``.\n\n:meta private:"
    return under_the_old_name


def attach(target: Any, **names: Any) -> None:
    """Set attributes of a class or module."""
    for name, value in names.items():
        setattr(target, name, value)
