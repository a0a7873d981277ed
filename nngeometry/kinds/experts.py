"""Experts with batched weights ``(E, out, in)``, among which tokens are routed."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Set
from typing import Any

import torch
from torch import Tensor, nn

from ..changes import Changed, recording
from ..forms import Beside, LinearMap, Outer
from ..memory import budget
from .kind import built_in, when_imported


def gated_experts(module: Any, gy: Tensor, call: Mapping[str, Any], constant: Set[str]) -> Beside | None:
    """The linear maps of all experts, one group each; the derivative in the output of an expert is zero for tokens that
    are not routed to it. None where that of all experts and tokens does not fit the memory budget.
    """
    hidden, index, weights = (call[name] for name in ("hidden_states", "top_k_index", "top_k_weights"))
    if constant or hidden.ndim != 2 or gy.ndim != 3:
        return None
    into, out = (p.detach().to(hidden.dtype) for p in (module.gate_up_proj, module.down_proj))
    experts = len(into)
    every = len(gy) * len(hidden) * len(into) * (into.shape[1] + 2 * hidden.shape[1]) * hidden.dtype.itemsize
    if getattr(module, "_is_expert_parallel", False) or every > budget(hidden.device):
        return None
    # An index behind the last expert is that of none.
    share = hidden.new_zeros(len(hidden), experts + 1).scatter_add_(1, index, weights.to(hidden.dtype))[:, :-1]
    gate, up = torch.einsum("nh,eoh->neo", hidden, into).chunk(2, -1)
    with Changed(recording(True)):
        leaf = gate.detach().requires_grad_()
        act = module.act_fn(leaf)
        (slope,) = torch.autograd.grad(act.sum(), leaf)
    act = act.detach()
    of_out = gy.unsqueeze(2) * share.unsqueeze(-1)  # (C, N, E, H)
    of_inner = torch.einsum("cneh,ehi->cnei", of_out, out)
    of_into = torch.cat([of_inner * up * slope, of_inner * act], -1)
    tokens = hidden.unsqueeze(1).expand(-1, experts, -1)
    maps = [
        LinearMap(Outer(tokens.unsqueeze(1), of_into.unsqueeze(2)), 0, None),
        LinearMap(Outer((act * up).unsqueeze(1), of_out.unsqueeze(2)), into.numel(), None),
    ]
    return Beside(maps, into.numel() + out.numel())


def _register(model: str, name: str) -> None:
    @when_imported(f"transformers.models.{model}.modeling_{model}")
    def _huggingface() -> None:
        found = getattr(sys.modules[f"transformers.models.{model}.modeling_{model}"], name, None)
        if found is not None and not issubclass(found, nn.ModuleList):  # as older versions have them
            built_in(found, parameters=("gate_up_proj", "down_proj"), bound=True)(gated_experts)


for _model, _name in (
    ("mixtral", "MixtralExperts"),
    ("qwen2_moe", "Qwen2MoeExperts"),
    ("qwen3_moe", "Qwen3MoeExperts"),
):
    _register(_model, _name)
