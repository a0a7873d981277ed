"""What a call and the values in it are, in words and in a number, so that two of them can be compared."""

from __future__ import annotations

import inspect
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


def of_model(model: nn.Module, running: bool = True) -> int:
    """The checksum of all parameters and buffers, by name. running: also of the running statistics of batch norms."""
    norms = (name for name, module in model.named_modules() if isinstance(module, nn.modules.batchnorm._BatchNorm))
    without = () if running else tuple(f"{name}." if name else "" for name in norms)
    buffers = (pair for pair in model.named_buffers() if not without or not pair[0].startswith(without))
    return checksum(item for named in (model.named_parameters(), buffers) for pair in named for item in pair)


def in_training(model: nn.Module) -> list[str]:
    """The modules that are in training mode, by name."""
    return [name for name, module in model.named_modules() if module.training]


def of_batch(batch: Any, start: int = 0) -> int:
    """The checksum of the tensors and plain values of a minibatch."""
    rest = pytree.tree_leaves(map_tensors(lambda t: t, batch))
    return checksum([*tensors_of(batch), *(x for x in rest if isinstance(x, str | int | float | bool))], start)


def of_options(options: Mapping[str, Any]) -> int:
    """The checksum of the tensors among options, and of what the modules among them hold and were made with, as the
    class weights and the label smoothing of a loss.
    """
    found: list[Any] = []
    for name, value in sorted(options.items()):
        if name in NOT_WHAT:
            continue
        if isinstance(value, nn.Module):
            found += [name, *value.parameters(), *value.buffers(), *map(_made_with, value.modules())]
        elif isinstance(value, Tensor):
            found += [name, value]
    return checksum(found)


def told_of_options(options: Mapping[str, Any]) -> str:
    """:func:`of_options` in words."""
    return f"tensors and numbers in the options, of checksum {of_options(options)}"


def _made_with(module: nn.Module) -> list[tuple[str, Any]]:
    """The plain arguments of its constructor, as far as it has kept them by their names."""
    kept = vars(module)
    names = [name for name in inspect.signature(type(module).__init__).parameters if name in kept]
    return [(name, kept[name]) for name in names if isinstance(kept[name], str | int | float | bool | None)]


def short(value: Any) -> str:
    """In 80 characters at most."""
    text = str(value)
    return text if len(text) <= 80 else text[:77] + "..."
