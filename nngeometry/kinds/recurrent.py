"""Recurrent layers: their maps of inputs and of states are linear maps over time.

The arithmetic of the module is run once more on what the hook saw, step by step, so that the derivatives in the outputs
of each of its linear maps are known. The probe compares what comes of it with autograd's derivative of the module.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..changes import Changed, recording
from ..forms import Beside, LinearMap, Outer

_EXACT = (nn.RNN, nn.LSTM, nn.GRU)


@dataclass
class _Used:
    """A linear map as it was used: its parameters by name, its inputs and its outputs, ``(B, features)`` of each step
    or ``(T, B, features)`` of all at once.
    """

    weight: str
    bias: str | None
    inputs: list[Tensor]
    outputs: list[Tensor]
    backwards: bool


class _Run:
    """The arithmetic of a recurrent module, with all uses of its linear maps.

    within: which sequences are not at their end yet, ``(T, B, 1)``, None if all are of one length.
    """

    def __init__(
        self, module: Any, params: Mapping[str, Tensor], dtype: torch.dtype, within: Tensor | None = None
    ) -> None:
        self.module = module
        self.within = within
        self.params = {name: p.detach().to(dtype) for name, p in params.items()}
        self.used: list[_Used] = []

    def _map(self, weight: str, bias: str | None) -> _Used:
        backwards = weight.endswith("_reverse")
        self.used.append(_Used(weight, bias if bias in self.params else None, [], [], backwards))
        return self.used[-1]

    def _apply(self, of: _Used, x: Tensor) -> Tensor:
        y = F.linear(x, self.params[of.weight], None if of.bias is None else self.params[of.bias])
        y = y if y.requires_grad else y.requires_grad_()
        of.inputs.append(x.detach())
        of.outputs.append(y)
        return y

    def outputs(self, x: Tensor, h: Tensor, c: Tensor | None) -> tuple[Tensor, ...]:
        """From inputs ``(T, B, I)`` and initial states ``(layers, B, H)`` to what the module returns, time
        first.
        """
        directions = 1 + self.module.bidirectional
        last_h, last_c = [], []
        for layer in range(self.module.num_layers):
            of_directions = []
            for d in range(directions):
                k = layer * directions + d
                order = x.flip(0) if d else x
                ys, hk, ck = self._direction(order, h[k], None if c is None else c[k], f"l{layer}" + "_reverse" * d)
                of_directions.append(torch.stack(ys[::-1] if d else ys))
                last_h.append(hk)
                last_c.append(ck)
            x = torch.cat(of_directions, -1)
        found = x, torch.stack(last_h)
        return found if c is None else (*found, torch.stack(last_c))  # type: ignore[arg-type]

    def _direction(self, x: Tensor, h: Tensor, c: Tensor | None, of: str) -> tuple[list[Tensor], Tensor, Tensor | None]:
        into = self._map(f"weight_ih_{of}", f"bias_ih_{of}")
        state = self._map(f"weight_hh_{of}", f"bias_hh_{of}")
        project = self._map(f"weight_hr_{of}", None) if f"weight_hr_{of}" in self.params else None
        ys = []
        every, added = self._apply(into, x), type(self.module) is not nn.GRU
        if added:  # what comes of states is added to what comes of inputs: the derivatives in both are the same
            state.outputs = into.outputs
            every = every if state.bias is None else every + self.params[state.bias]
        for a, within in zip(every.unbind(0), self._steps(into.backwards, len(x)), strict=True):
            before, c_before = h, c
            if added:
                state.inputs.append(h.detach())
                a = torch.addmm(a, h, self.params[state.weight].mT)
            if c is not None:
                i, f, g, o = a.chunk(4, -1)
                c = f.sigmoid() * c + i.sigmoid() * g.tanh()
                h = o.sigmoid() * c.tanh()
                h = h if project is None else self._apply(project, h)
            elif not added:
                (ar, az, an), (br, bz, bn) = a.chunk(3, -1), self._apply(state, h).chunk(3, -1)
                z, n = (az + bz).sigmoid(), (an + (ar + br).sigmoid() * bn).tanh()
                h = (1 - z) * n + z * h
            else:
                h = a.tanh() if self.module.nonlinearity == "tanh" else a.relu()
            if within is not None:  # behind its end, and backwards in front of it, a sequence stays where it is
                h = torch.where(within, h, before)
                c = None if c is None or c_before is None else torch.where(within, c, c_before)
            ys.append(h)
        return ys, h, c

    def _steps(self, backwards: bool, count: int) -> Sequence[Tensor | None]:
        if self.within is None:
            return [None] * count
        return list(self.within.flip(0) if backwards else self.within)


def recurrent(
    module: Any,
    params: Mapping[str, Tensor],
    inputs: Sequence[Any],
    axes: Sequence[int | None],
    gys: Sequence[tuple[int, Tensor]],
    dtype: torch.dtype,
    lengths: Tensor | None = None,
) -> Beside | None:
    """The Jacobian of a recurrent module in its flat parameters; None if it, or how it is called, is not known here.

    Arguments as of :func:`nngeometry.kinds.generic.generic`, inputs as leaves. lengths: of sequences that were packed;
    examples are then along the first axis of what is given and returned over time.
    """
    time_axis = 1 if lengths is not None or getattr(module, "batch_first", False) else 0
    tensors, where = (
        [x for x in inputs if x is not None],
        [a for x, a in zip(inputs, axes, strict=True) if x is not None],
    )
    if type(module) not in _EXACT or not all(isinstance(x, Tensor) and x.ndim == 3 for x in tensors):
        return None
    if where[0] != 1 - time_axis or not {1, None}.issuperset(where[1:]):
        return None
    if any(name.removesuffix("_reverse").rpartition("_l")[0] not in _NAMES for name in params):
        return None  # old normalisations of weights
    x = tensors[0].to(dtype).movedim(time_axis, 0)
    n, count = x.shape[1], module.num_layers * (1 + module.bidirectional)
    sizes = [module.proj_size or module.hidden_size, module.hidden_size] if type(module) is nn.LSTM else None
    given = [t.to(dtype).expand(count, n, -1) for t in tensors[1:]]
    states = given or [x.new_zeros(count, n, size) for size in sizes or [module.hidden_size]]
    if len(states) != len(sizes or [0]):
        return None
    within = None
    if lengths is not None and int(lengths.min()) < len(x):
        within = (torch.arange(len(x)).unsqueeze(1) < lengths.cpu()).to(x.device).unsqueeze(2)
    run = _Run(module, params, dtype, within)
    with Changed(recording(True)):
        found = run.outputs(x, states[0], states[1] if sizes else None)
        ys, gs = [], []
        for leaf, g in gys:
            ys.append(found[leaf])
            gs.append(g.to(dtype).transpose(1, 2))  # time, or layers, in front of examples
        outputs = {id(used.outputs): used.outputs for used in run.used}
        flat = [y for each in outputs.values() for y in each]
        several = len(gs[0]) > 1
        grads = torch.autograd.grad(
            ys,
            flat,
            gs if several else [g[0] for g in gs],
            is_grads_batched=several,  # a detour for a single one
            allow_unused=True,
            materialize_grads=True,
        )
    remaining = iter(grads if several else [g.unsqueeze(0) for g in grads])
    cotangents = {key: _over_time([next(remaining) for _ in each], 1) for key, each in outputs.items()}
    starts = dict(zip(params, accumulate((p.numel() for p in params.values()), initial=0), strict=False))
    maps = []
    for used in run.used:
        a, g = _over_time(used.inputs, 0).unsqueeze(2), cotangents[id(used.outputs)].unsqueeze(3)
        a = a if used.bias is None else F.pad(a, (0, 1), value=1.0)
        bias, filled = None if used.bias is None else starts[used.bias], None
        if within is not None:
            of_steps = within.flip(0) if used.backwards else within
            a = a * of_steps.transpose(0, 1).unsqueeze(3)
            filled = (int(within.sum()) / within.numel(),)
        maps.append(LinearMap(Outer(a, g, filled=filled), starts[used.weight], bias))
    return Beside(maps, sum(p.numel() for p in params.values()))


def _over_time(parts: Sequence[Tensor], axis: int) -> Tensor:
    """Of all steps, from one tensor or one of each: examples at ``axis``, steps after them."""
    if parts[0].ndim == axis + 3:
        return parts[0].transpose(axis, axis + 1).contiguous()
    return torch.stack(list(parts), axis + 1)


_NAMES = ("weight_ih", "weight_hh", "weight_hr", "bias_ih", "bias_hh")
