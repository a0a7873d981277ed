"""LSTMs step by step: the kernel that torch has for them on a CPU makes its backward step by step when that is to be
differentiated, with an array of all steps for each.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F


def lstm(input: Tensor, *args: Any) -> tuple[Tensor, Tensor, Tensor]:
    """``torch.lstm``, of batches that are not packed in what is below; otherwise torch's own."""
    if len(args) != 8 or isinstance(args[0], Tensor) or input.device.type != "cpu":
        return torch.lstm(input, *args)
    (h, c), weights, biased, layers, dropout, train, bidirectional, batch_first = args
    if h.shape != c.shape or (train and dropout) or torch.is_autocast_enabled("cpu"):
        return torch.lstm(input, *args)
    x, directions = input.transpose(0, 1) if batch_first else input, 1 + bidirectional
    each = len(weights) // (layers * directions)
    last_h, last_c = [], []
    for layer in range(layers):
        outputs = []
        for d in range(directions):
            k = layer * directions + d
            w_ih, w_hh, *biases = weights[k * each : (k + 1) * each]
            into = F.linear(x, w_ih, biases[0] + biases[1] if biased else None)
            ys, hk, ck = _over_time(into.flip(0) if d else into, w_hh.mT, h[k], c[k])
            outputs.append(torch.stack(ys[::-1] if d else ys))
            last_h.append(hk)
            last_c.append(ck)
        x = torch.cat(outputs, -1) if bidirectional else outputs[0]
    return x.transpose(0, 1) if batch_first else x, torch.stack(last_h), torch.stack(last_c)


def _over_time(into: Tensor, across: Tensor, h: Tensor, c: Tensor) -> tuple[list[Tensor], Tensor, Tensor]:
    """All states, the last one and the last cells, from what comes of inputs ``(T, B, 4 H)``."""
    ys = []
    for a in into.unbind(0):
        i, f, g, o = torch.addmm(a, h, across).chunk(4, -1)
        c = f.sigmoid() * c + i.sigmoid() * g.tanh()
        h = o.sigmoid() * c.tanh()
        ys.append(h)
    return ys, h, c
