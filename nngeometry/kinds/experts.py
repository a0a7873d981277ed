"""Experts with batched weights ``(E, out, in)``, among which tokens are routed."""

from __future__ import annotations

import importlib
import inspect
import sys
from collections.abc import Mapping, Set
from typing import Any

import torch
from torch import Tensor, nn

from ..changes import Changed, recording
from ..forms import Routed, RoutedMap
from ..memory import budget
from .kind import built_in, computing_alike, when_imported

_MIXTRAL = "transformers.models.mixtral.modeling_mixtral"


def gated_experts(module: Any, gy: Tensor, call: Mapping[str, Any], constant: Set[str]) -> Routed | None:
    """The two linear maps of each expert, with the tokens that are routed to it. None where these do not fit the memory
    budget.
    """
    hidden, index, weights = (call[name] for name in ("hidden_states", "top_k_index", "top_k_weights"))
    if constant or hidden.ndim != 2 or gy.ndim != 3:
        return None
    into, out = (p.detach().to(hidden.dtype) for p in (module.gate_up_proj, module.down_proj))
    experts, size = len(into), into.shape[1] + 2 * hidden.shape[1]
    if getattr(module, "_is_expert_parallel", False):
        return None
    if len(gy) * index.numel() * size * hidden.dtype.itemsize > budget(hidden.device):
        return None
    chosen = index.flatten()
    order = chosen.argsort(stable=True)  # tokens of an expert stay in their order
    counts = torch.bincount(chosen, minlength=experts)[:experts].tolist()  # an index behind the last is that of none
    order = order[: sum(counts)]
    tokens, share = order // index.shape[1], weights.flatten()[order].to(hidden.dtype).unsqueeze(-1)
    inputs, of_out = hidden[tokens], gy[:, tokens] * share
    each = list(zip(inputs.split(counts), of_out.split(counts, 1), into, out, strict=True))
    gate, up = torch.cat([x @ w.mT for x, _, w, _ in each]).chunk(2, -1)
    with Changed(recording(True)):
        leaf = gate.detach().requires_grad_()
        act = module.act_fn(leaf)
        (slope,) = torch.autograd.grad(act.sum(), leaf)
    act = act.detach()
    of_inner = torch.cat([g @ w for _, g, _, w in each], 1)
    of_into = torch.cat([of_inner * up * slope, of_inner * act], -1)
    maps = [
        RoutedMap(tokens.split(counts), inputs.split(counts), of_into.split(counts, 1), 0),
        RoutedMap(tokens.split(counts), (act * up).split(counts), of_out.split(counts, 1), into.numel()),
    ]
    return Routed(maps, len(hidden), into.numel() + out.numel())


@when_imported(_MIXTRAL)
def _huggingface() -> None:
    found = getattr(sys.modules[_MIXTRAL], "MixtralExperts", None)
    if found is not None and not issubclass(found, nn.ModuleList):  # as older versions have them
        built_in(found, parameters=("gate_up_proj", "down_proj"), bound=True)(gated_experts)


@computing_alike
def _as_in_mixtral(t: type[nn.Module]) -> type[nn.Module] | None:
    """Most experts of Hugging Face are copies of those of Mixtral: their forward has the same instructions."""
    if not t.__module__.startswith("transformers.models.") or not t.__name__.endswith("Experts"):
        return None
    mixtral: Any = getattr(importlib.import_module(_MIXTRAL), "MixtralExperts", None)
    if mixtral is None or _instructions(t) != _instructions(mixtral):
        return None
    return mixtral


def _instructions(t: type[nn.Module]) -> tuple[Any, ...]:
    """What the forward of a type consists of, below what decorators add."""
    code = inspect.unwrap(t.forward).__code__
    return code.co_code, code.co_names, code.co_consts, code.co_varnames
