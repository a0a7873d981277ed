"""What a call and the values in it are, in words and in a number, so that two of them can be compared."""

from __future__ import annotations

import zlib
from collections.abc import Iterable, Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from .model.batch import map_tensors, tensors_of

#: Options that say where and how, not what is computed.
NOT_WHAT = (
    "function",
    "layer_collection",
    "device",
    "verbose",
    "generator",
    "process_group",
    "checkpoint",
    "every",
    "keep_checkpoint",
)


def told(made: Any, options: Mapping[str, Any]) -> str:
    """A call in words, with the options that say what is computed.

    >>> told(nn.Linear, {"bias": False, "device": "cpu"})
    'Linear(bias=False)'
    """
    of = ", ".join(f"{name}={_value(value)}" for name, value in sorted(options.items()) if name not in NOT_WHAT)
    name = getattr(made, "__name__", type(made).__name__)
    return f"{name}({of})" if of else name


def _value(value: Any) -> str:
    if isinstance(value, partial):
        return told(value.func, value.keywords)
    if callable(value) and not isinstance(value, nn.Module):
        return str(getattr(value, "__qualname__", type(value).__qualname__))
    if isinstance(value, Mapping):
        return "{" + ", ".join(f"{_value(k)}: {_value(v)}" for k, v in value.items()) + "}"
    return repr(value)


def checksum(items: Iterable[Any], start: int = 0) -> int:
    """A number that stands for tensors to the bit, and for other values by their words.

    >>> checksum([torch.zeros(3)]) == checksum([torch.zeros(3)]) != checksum([torch.ones(3)])
    True
    """
    total = start
    for item in items:
        if isinstance(item, Tensor):
            t = item.detach().to_dense() if item.layout != torch.strided else item.detach()
            total = zlib.crc32(repr((tuple(t.shape), t.dtype)).encode(), total)
            total = zlib.crc32(t.resolve_conj().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data, total)
        else:
            total = zlib.crc32(repr(item).encode(), total)
    return total


def of_model(model: nn.Module) -> int:
    """The checksum of all parameters and buffers, by name."""
    return checksum(
        item for named in (model.named_parameters(), model.named_buffers()) for pair in named for item in pair
    )


def of_batch(batch: Any, start: int = 0) -> int:
    """The checksum of the tensors and plain values of a minibatch."""
    rest = pytree.tree_leaves(map_tensors(lambda t: t, batch))
    return checksum([*tensors_of(batch), *(x for x in rest if isinstance(x, str | int | float | bool))], start)


def of_options(options: Mapping[str, Any]) -> int:
    """The checksum of the tensors among options and in the modules among them, as the class weights of a loss."""
    found: list[Any] = []
    for name, value in sorted(options.items()):
        if name in NOT_WHAT:
            continue
        if isinstance(value, nn.Module):
            found += [name, *value.parameters(), *value.buffers()]
        elif isinstance(value, Tensor):
            found += [name, value]
    return checksum(found)


def short(value: Any) -> str:
    """In 80 characters at most."""
    text = str(value)
    return text if len(text) <= 80 else text[:77] + "..."
