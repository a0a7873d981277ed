"""How an old name says what it is called now."""

from __future__ import annotations

import functools
import sys
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

#: The positional options of a matrix in NNGeometry 0.4, behind the variant.
ORDER = ("device", "function", "layer_collection", "verbose")
_PACKAGE = str(Path(__file__).parent)


@functools.cache
def warn(old: str, new: str) -> None:
    """Say once what an old name is called now, on behalf of the line that is not of this package."""
    level, frame = 1, sys._getframe(0)
    while frame.f_back is not None and frame.f_code.co_filename.startswith(_PACKAGE):
        level, frame = level + 1, frame.f_back
    warnings.warn(f"{old} is an old name of NNGeometry: write {new}", DeprecationWarning, stacklevel=level)


def positions(name: str, order: Sequence[str], values: Sequence[Any], keywords: dict[str, Any]) -> dict[str, Any]:
    """Positional options of a matrix in NNGeometry's order, and the keywords, all as keywords; in 0.2 and 0.3 n_output
    came first.
    """
    order = ("n_output", *order) if isinstance(values[0], int) else order
    if len(values) > len(order):
        raise TypeError(f"{name}: {len(values)} positional options, there are {', '.join(order)}: name them")
    warn(f"{name} with positional options", ", ".join(f"{option}=" for option in order))
    return {**keywords, **dict(zip(order, values, strict=False))}
