"""Models inside of what torch wraps around them: their modules and parameters have the names that they have without."""

from __future__ import annotations

import sys
from typing import Any

from torch import nn
from torch.nn.parallel import DistributedDataParallel


def unwrapped(model: nn.Module) -> nn.Module:
    """The model in DistributedDataParallel, and in what torch.compile made of that: its own forward has no part in
    communication. Any other model as it is.

    >>> unwrapped(nn.Linear(2, 3))
    Linear(in_features=2, out_features=3, bias=True)
    """
    inside, found = model, model
    while (name := _inside(inside)) is not None:
        found = getattr(inside, name) if isinstance(inside, DistributedDataParallel) else found
        inside = getattr(inside, name)
    return inside if found is not model else model


def _inside(module: nn.Module) -> str | None:
    """Under which name a wrapper has what it wraps, None for other modules."""
    if isinstance(module, DistributedDataParallel):
        return "module"
    compiled: Any = getattr(sys.modules.get("torch._dynamo.eval_frame"), "OptimizedModule", ())
    return "_orig_mod" if isinstance(module, compiled) else None


class BareNames:
    """From names of modules and parameters to those that they have without wrappers.

    >>> BareNames(nn.Sequential(nn.Linear(2, 3)))("0.weight")
    '0.weight'
    """

    def __init__(self, model: nn.Module) -> None:
        self._inner = []
        for name, module in model.named_modules(remove_duplicate=False):
            if (inside := _inside(module)) is not None:
                self._inner.append((name, f"{name}.{inside}" if name else inside))
        self._inner.sort(key=lambda pair: -len(pair[1]))  # what is inside of others first

    def __call__(self, name: str) -> str:
        for outer, inner in self._inner:
            if name == inner or name.startswith(inner + "."):
                name = (outer + name[len(inner) :]).removeprefix(".")
        return name


def require_whole_parameters(model: nn.Module) -> None:
    """Raise ``NotImplementedError`` for a model whose parameters are in pieces on several processes."""
    tensor: Any = getattr(sys.modules.get("torch.distributed.tensor"), "DTensor", ())
    sharded: Any = getattr(sys.modules.get("torch.distributed.fsdp"), "FullyShardedDataParallel", ())
    in_pieces = tensor != () and any(type(p) is not nn.Parameter and isinstance(p, tensor) for p in model.parameters())
    if in_pieces or (sharded != () and any(isinstance(m, sharded) for m in model.modules())):
        raise NotImplementedError(
            "model: its parameters are in pieces on several processes (FSDP, tensor parallelism), of which each has "
            "its own alone: use the model before fully_shard, with the whole parameters (a full state_dict), or in "
            "DistributedDataParallel"
        )
