"""What a call of the library has to leave as it was: the net, the data, and what belongs to torch."""

from __future__ import annotations

import random
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules import module as hooks

_HOOKS = (
    "_forward_pre_hooks",
    "_forward_hooks",
    "_backward_hooks",
    "_backward_pre_hooks",
    "_forward_hooks_with_kwargs",
)


def state_of(net: nn.Module, data: Any) -> dict[str, Any]:
    """Everything by name, with copies of tensors."""
    found: dict[str, Any] = {}
    for name, p in net.named_parameters(remove_duplicate=False):
        found[f"parameter {name}"] = (id(p), _copy(p), p.requires_grad, p.stride())
        found[f"gradient of {name}"] = (id(p.grad), None if p.grad is None else _copy(p.grad))
    for name, b in net.named_buffers(remove_duplicate=False):
        found[f"buffer {name}"] = (id(b), _copy(b), b.requires_grad)
    for name, module in net.named_modules():
        found[f"mode of {name or 'the model'}"] = module.training
        found[f"class of {name or 'the model'}"] = type(module)
        found[f"attributes of {name or 'the model'}"] = sorted(vars(module))
        found[f"hooks of {name or 'the model'}"] = [
            [(k, id(h)) for k, h in (getattr(module, kind, None) or {}).items()] for kind in _HOOKS
        ]
    for k, t in enumerate(_tensors(data)):
        found[f"tensor {k} of the data"] = (id(t), _copy(t), t.requires_grad, t.stride())
    found["random state of torch"] = torch.get_rng_state()
    found["random state of python"] = random.getstate()
    found["flags of torch"] = {
        "grad": torch.is_grad_enabled(),
        "dtype": torch.get_default_dtype(),
        "threads": torch.get_num_threads(),
        "flash": torch.backends.cuda.flash_sdp_enabled(),
        "math": torch.backends.cuda.math_sdp_enabled(),
        "efficient": torch.backends.cuda.mem_efficient_sdp_enabled(),
        "fast path": torch.backends.mha.get_fastpath_enabled(),
        "cudnn": torch.backends.cudnn.enabled,
        "deterministic": torch.are_deterministic_algorithms_enabled(),
        "anomaly": torch.is_anomaly_enabled(),
        "autocast": torch.is_autocast_enabled("cpu"),
        "hooks": [
            len(getattr(hooks, name)) for name in vars(hooks) if name.startswith("_global_") and name.endswith("hooks")
        ],
    }
    return found


def changed(before: dict[str, Any], after: dict[str, Any]) -> list[str]:
    """The names of what differs."""
    return [name for name in {**before, **after} if not _same(before.get(name), after.get(name))]


def _copy(t: Tensor) -> Tensor:
    return (t.to_dense() if t.is_sparse else t).detach().clone()


def _same(a: Any, b: Any) -> bool:
    if isinstance(a, Tensor) and isinstance(b, Tensor):
        return a.shape == b.shape and a.dtype == b.dtype and torch.equal(a.nan_to_num(), b.nan_to_num())
    if isinstance(a, tuple | list) and isinstance(b, tuple | list):
        return len(a) == len(b) and all(map(_same, a, b))
    return bool(a == b)


def _tensors(data: Any) -> list[Tensor]:
    if isinstance(data, Tensor):
        return [data]
    if isinstance(data, dict):
        data = list(data.values())
    return [t for part in data for t in _tensors(part)] if isinstance(data, tuple | list) else []
