"""LSTMs step by step: the kernel that torch has for them on a CPU makes its backward step by step when that is to be
differentiated, with an array of all steps for each. The steps of a layer are one operation with derivatives of its own.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from .operations import Affine, Maybe, Operation, owned

#: From what comes of the inputs ``(T, B, 4 H)``, the weight of states ``(4 H, H)`` and the first state and cell
#: ``(B, H)`` to all states and all cells ``(2, T, B, H)``.
OverTime = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]
#: ``F.linear``.
Linear = Callable[[Tensor, Tensor, Maybe], Tensor]


def lstm(input: Tensor, *args: Any) -> tuple[Tensor, Tensor, Tensor]:
    """``torch.lstm``, of batches that are not packed by operations that torch can differentiate twice; otherwise
    torch's own.
    """
    return _of_parts(F.linear, over_time, input, *args)


def lstm_of_operations(value: Callable[..., Tensor], input: Tensor, *args: Any) -> tuple[Tensor, Tensor, Tensor]:
    """The same by operations that have derivatives of their own. value: how that of one is recorded, from it and its
    inputs.
    """
    return _of_parts(partial(value, Affine()), partial(value, Steps()), input, *args)


def _of_parts(linear: Linear, steps: OverTime, input: Tensor, *args: Any) -> tuple[Tensor, Tensor, Tensor]:
    """:func:`lstm` with its maps of inputs and its steps as they are given."""
    if len(args) != 8 or isinstance(args[0], Tensor) or input.device.type != "cpu":
        return torch.lstm(input, *args)
    (h, c), weights, biased, layers, dropout, train, bidirectional, batch_first = args
    x, directions = input.transpose(0, 1) if batch_first else input, 1 + bidirectional
    if len(x) == 0 or h.shape != c.shape or (train and dropout) or torch.is_autocast_enabled("cpu"):
        return torch.lstm(input, *args)
    each = len(weights) // (layers * directions)
    last = []
    for layer in range(layers):
        outputs = []
        for d in range(directions):
            k = layer * directions + d
            w_ih, w_hh, *biases = weights[k * each : (k + 1) * each]
            into = linear(x, w_ih, biases[0] + biases[1] if biased else None)
            made = steps(into.flip(0) if d else into, w_hh, h[k], c[k])
            outputs.append(made[0].flip(0) if d else made[0])
            last.append(made[:, -1].unbind(0))
        x = torch.cat(outputs, -1) if bidirectional else outputs[0]
    last_h, last_c = map(torch.stack, zip(*last, strict=True))  # each by itself, since users may write into it
    return x.transpose(0, 1) if batch_first else x, last_h, last_c


def over_time(into: Tensor, w: Tensor, h: Tensor, c: Tensor) -> Tensor:
    """The steps, one after the other."""
    hs, cs, *_ = _made(into, w, h, c)
    return _both(hs, cs)


def _made(into: Tensor, w: Tensor, h: Tensor, c: Tensor) -> list[tuple[Tensor, ...]]:
    """All states, all cells, all gates i, f, g and o, and the tanh of the cells."""
    across, made = w.mT, []
    for a in into.unbind(0):
        i, f, g, o = torch.addmm(a, h, across).chunk(4, -1)
        i, f, g, o = i.sigmoid(), f.sigmoid(), g.tanh(), o.sigmoid()
        c = (f * c).addcmul(i, g)
        t = c.tanh()
        h = o * t
        made.append((h, c, i, f, g, o, t))
    return list(zip(*made, strict=True))


def _both(hs: Sequence[Tensor], cs: Sequence[Tensor]) -> Tensor:
    return torch.stack([*hs, *cs]).view(2, len(hs), *hs[0].shape)


@dataclass(frozen=True)
class Steps(Operation):
    """:func:`over_time`. With a the sums before the gates, i, f, g, o these, c the cells and h the states,

    ``a = into + h_before W^T``, ``c = f c_before + i g``, ``h = o tanh c``,

    its derivative is the same recursion with the slopes of all of that, and its transpose runs backwards.
    """

    def value(self, into: Tensor, w: Tensor, h: Tensor, c: Tensor) -> Tensor:
        return over_time(into, w, h, c)

    def value_and_saved(self, inputs: Sequence[Any]) -> tuple[Tensor, Sequence[Any]]:
        """Beside its inputs it saves the states and cells before each step, the gates, and the tanh of the cells."""
        hs, cs, *gates = _made(*inputs)
        before = (torch.stack([first, *made[:-1]]) for first, made in zip(inputs[2:], (hs, cs), strict=True))
        return owned(_both(hs, cs)), (*inputs, *before, *map(torch.stack, gates))

    def push(self, tangents: Sequence[Maybe], saved: Sequence[Any], shape: torch.Size) -> Tensor:
        saved = self._now(saved)
        dhs, dcs, _ = self._pushed(tangents, saved, _Slopes(saved))
        return _both(dhs, dcs)

    def pull(self, cotangent: Tensor, saved: Sequence[Any], wanted: Sequence[bool]) -> Sequence[Maybe]:
        _, w, _, _, hs, *_ = saved = self._now(saved)
        gas, _, _, gh, gc = self._pulled(cotangent, w, _Slopes(saved))
        ga = torch.stack(gas)
        gw = _summed(ga, hs) if wanted[1] else None
        return ga if wanted[0] else None, gw, gh if wanted[2] else None, gc if wanted[3] else None

    def second_pull(
        self, tangents: Sequence[Maybe], cotangent: Tensor, saved: Sequence[Any], wanted: Sequence[bool]
    ) -> Sequence[Maybe]:
        return self.push_with_second_pull(tangents, cotangent, saved, True, wanted)[1]

    def push_with_second_pull(
        self, tangents: Sequence[Maybe], cotangent: Tensor, saved: Sequence[Any], upstream: bool, wanted: Sequence[bool]
    ) -> tuple[Maybe, Sequence[Maybe]]:
        """What the slopes change by goes back through the same recursion as a cotangent."""
        _, w, h, _, hs, *_ = saved = self._now(saved)
        _, dw, *first = tangents
        at = _Slopes(saved)
        dhs, dcs, das = self._pushed(tangents, saved, at)
        none = torch.zeros_like(h)
        dh_before, dc_before = (
            torch.stack([none if d0 is None else d0, *d[:-1]]) for d, d0 in zip((dhs, dcs), first, strict=True)
        )
        gas, ghs, gcs, *_ = self._pulled(cotangent, w, at)
        ga = torch.stack(gas)
        in_sums, in_cell, in_cell_before = at.bent(
            torch.stack(das), dc_before, torch.stack(dcs), torch.stack(ghs), torch.stack(gcs)
        )
        in_state_before = torch.zeros_like(hs) if dw is None else ga @ dw
        none = none.unsqueeze(0)
        again = torch.stack([torch.cat([in_state_before[1:], none]), in_cell + torch.cat([in_cell_before[1:], none])])
        las, _, _, lh, lc = self._pulled(again, w, at, in_sums)
        la = torch.stack(las)
        return _both(dhs, dcs) if upstream else None, (
            la if wanted[0] else None,
            _summed(la, hs) + _summed(ga, dh_before) if wanted[1] else None,
            lh + in_state_before[0] if wanted[2] else None,
            lc + in_cell_before[0] if wanted[3] else None,
        )

    def _now(self, saved: Sequence[Any]) -> Sequence[Any]:
        """What was saved, made again of the inputs where that is recorded: it depends on them."""
        return self.value_and_saved(saved[:4])[1] if torch.is_grad_enabled() else saved

    @staticmethod
    def _pushed(
        tangents: Sequence[Maybe], saved: Sequence[Any], at: _Slopes
    ) -> tuple[list[Tensor], list[Tensor], list[Tensor]]:
        """The derivatives of all states and cells, and of the sums before the gates."""
        d_into, dw, *first = tangents
        into, w, h, _, hs, *_ = saved
        along = torch.zeros_like(into) if d_into is None else d_into
        along = along if dw is None else along + hs @ dw.mT
        dh, dc = (torch.zeros_like(h) if d is None else d for d in first)
        across = w.mT
        dhs, dcs, das = [], [], []
        for da, f, by_i, by_f, by_g, by_o, by_c in zip(along.unbind(0), *at.each(), strict=True):
            da = torch.addmm(da, dh, across)
            d_i, d_f, d_g, d_o = da.chunk(4, -1)
            dc = (f * dc).addcmul(by_i, d_i).addcmul(by_f, d_f).addcmul(by_g, d_g)
            dh = (by_o * d_o).addcmul(by_c, dc)
            dhs.append(dh)
            dcs.append(dc)
            das.append(da)
        return dhs, dcs, das

    @staticmethod
    def _pulled(
        cotangent: Tensor, w: Tensor, at: _Slopes, of_sums: Tensor | None = None
    ) -> tuple[list[Tensor], list[Tensor], list[Tensor], Tensor, Tensor]:
        """What cotangents of states and cells, and of the sums before the gates, give for these sums, for all states
        and cells, and for the first ones.
        """
        gh, gc = torch.zeros_like(cotangent[0, 0]), torch.zeros_like(cotangent[0, 0])
        gas, ghs, gcs = [], [], []
        sums = [None] * len(at.f) if of_sums is None else of_sums.unbind(0)
        steps = list(zip(cotangent[0].unbind(0), cotangent[1].unbind(0), sums, *at.each(), strict=True))
        for of_h, of_c, of_a, f, by_i, by_f, by_g, by_o, by_c in reversed(steps):
            gh = gh + of_h
            gc = (gc + of_c).addcmul(by_c, gh)
            ga = torch.cat([by_i * gc, by_f * gc, by_g * gc, by_o * gh], -1)
            ga = ga if of_a is None else ga + of_a
            gas.append(ga)
            ghs.append(gh)
            gcs.append(gc)
            gh, gc = ga @ w, f * gc
        return gas[::-1], ghs[::-1], gcs[::-1], gh, gc


def _summed(ga: Tensor, hs: Tensor) -> Tensor:
    """The derivative in the weight, over all steps and examples."""
    return ga.reshape(-1, ga.shape[-1]).mT @ hs.reshape(-1, hs.shape[-1])


class _Slopes:
    """The slopes at all steps, ``(T, B, H)`` each: of the cell in the sums before i, f and g, of the state in that
    before o and in the cell c.
    """

    def __init__(self, saved: Sequence[Any]) -> None:
        *_, before, i, f, g, o, self.tanh = saved
        self.i, self.f, self.g, self.o, self.before = i, f, g, o, before
        self.by_i = g * i * (1 - i)
        self.by_f = before * f * (1 - f)
        self.by_g = i * (1 - g * g)
        self.by_o = o * (1 - o) * self.tanh
        self.by_c = o * (1 - self.tanh * self.tanh)

    def each(self) -> Iterator[Sequence[Tensor]]:
        """One after the other, those of each step."""
        return (t.unbind(0) for t in (self.f, self.by_i, self.by_f, self.by_g, self.by_o, self.by_c))

    def bent(self, das: Tensor, dc_before: Tensor, dc: Tensor, gh: Tensor, gc: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """The derivatives of ``gh . dh + gc . dc`` in the sums before the gates ``(T, B, 4 H)``, in the cell and in the
        one before, with all that is tangent held fixed.
        """
        i, f, g, o = self.i, self.f, self.g, self.o
        di, df, dg, do = das.chunk(4, -1)
        slope_i, slope_f, slope_g, slope_o = i * (1 - i), f * (1 - f), 1 - g * g, o * (1 - o)
        slope_c = 1 - self.tanh * self.tanh
        in_i = gc * slope_i * (g * (1 - 2 * i) * di + slope_g * dg)
        in_f = gc * slope_f * (dc_before + self.before * (1 - 2 * f) * df)
        in_g = gc * slope_g * (slope_i * di - 2 * i * g * dg)
        in_o = gh * slope_o * ((1 - 2 * o) * self.tanh * do + slope_c * dc)
        in_c = gh * slope_c * (slope_o * do - 2 * o * self.tanh * dc)
        return torch.cat([in_i, in_f, in_g, in_o], -1), in_c, gc * slope_f * df
