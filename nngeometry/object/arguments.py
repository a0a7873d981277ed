"""What operations ask of their arguments, said in one sentence where it is not so."""

from __future__ import annotations

from math import inf, isnan
from numbers import Integral, Real
from typing import Any

import torch
from torch import Tensor

from ..layercollection import Layer, LayerCollection


def number(what: str, value: Any, low: float = -inf) -> float:
    """A finite real number of at least ``low``, given as a number or as a tensor of one entry.

    >>> number("regul", torch.tensor(0.5))
    0.5
    """
    if isinstance(value, Tensor) and value.numel() == 1 and not value.is_complex():
        value = float(value)
    if not isinstance(value, Real):
        raise TypeError(f"{what}: expected a number, got {shown(value)}")
    value = float(value)
    if isnan(value) or value in (inf, -inf) or value < low:
        bound = "" if low == -inf else f" of at least {low:g}"
        raise ValueError(f"{what}: expected a finite number{bound}, got {value}")
    return value


def how_many(what: str, k: Any, most: int) -> int | None:
    """None, or a number of things of which there are ``most``.

    >>> how_many("eig", 2, most=3)
    2
    """
    if k is None:
        return None
    if isinstance(k, bool) or not isinstance(k, Integral):
        raise TypeError(f"{what}: expected how many as an integer, got {shown(k)}")
    if not 0 <= int(k) <= most:
        raise ValueError(f"{what}: k={int(k)} is not between 0 and {most}, which is all there are")
    return int(k)


def layer_of(layer_collection: LayerCollection, name: Any, operation: str) -> Layer:
    """The layer of that name; ``KeyError`` with the names that there are if there is none."""
    if not isinstance(name, str) or name not in layer_collection:
        raise KeyError(f"{operation}: no layer {name!r}, the collection has {', '.join(layer_collection)}")
    return layer_collection[name]


def check_flag(what: str, value: Any) -> None:
    """Raise ``TypeError`` unless it is True or False."""
    if not isinstance(value, bool):
        raise TypeError(f"{what}: expected True or False, got {shown(value)}")


def check_generator(what: str, generator: Any) -> None:
    """Raise ``TypeError`` unless it is a source of random numbers or None."""
    if generator is not None and not isinstance(generator, torch.Generator):
        raise TypeError(f"{what}: generator must be a torch.Generator or None, got {shown(generator)}")


def shown(value: Any) -> str:
    """A value as it is named in a sentence."""
    if isinstance(value, Tensor):
        return f"a tensor of shape {tuple(value.shape)}"
    if value is None or isinstance(value, str | int | float | complex | bool):
        return repr(value)
    return f"the class {value.__name__}" if isinstance(value, type) else f"a {type(value).__name__}"
