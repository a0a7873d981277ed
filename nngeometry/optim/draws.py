"""Parameters at drawn values for a while, and the mean of the gradients that arrive there."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from ..changes import Borrowed, other_values

#: The gradients of a list of parameters, None where there is none.
Gradients = list[Tensor | None]


class Draws:
    """The draws since the last step.

    ``count`` is the number of those in which gradients arrived; their mean is then ``.grad``, which is why what
    ``.grad`` was before the first of them does not count.

    Args:
        parameters: All whose gradients are averaged.
        given_up: What is called when a block ends by an exception, with which the draws of the step are given up.
    """

    def __init__(self, parameters: Callable[[], Sequence[Tensor]], given_up: Callable[[], Any]) -> None:
        self._parameters, self._given_up = parameters, given_up
        self.count = 0
        self.inside = False

    def restart(self) -> None:
        """Forget the draws, unless in the middle of one."""
        if not self.inside:
            self.count = 0

    def check_outside(self, what: str) -> None:
        """Raise ``RuntimeError`` in the middle of a draw."""
        if self.inside:
            raise RuntimeError(f"{what}: the weights are drawn ones, which are put back later: do it after the block")

    def check_some(self) -> None:
        """Raise ``ValueError`` if there are no gradients of draws."""
        if self.count == 0:
            raise ValueError(
                "step: no gradients of drawn weights have come since the last step: compute the loss and call "
                "backward() inside of `with opt.sampled():`"
            )


class Draw(Borrowed):
    """One draw: inside of the block the parameters have drawn values, and it starts without gradients.

    Args:
        draws: Of the step.
        make: Draws: returns parameters, their values, and what is called with the gradients of the draw, as the draws
            of the step have their parameters, and with whether it is the first one.
    """

    def __init__(
        self,
        draws: Draws,
        make: Callable[[], tuple[Sequence[Tensor], Sequence[Tensor], Callable[[Gradients, bool], None]]],
    ) -> None:
        super().__init__(self._in_force)
        self._draws, self._make = draws, make

    def _in_force(self) -> Callable[[], Any]:
        draws = self._draws
        draws.check_outside("sampled")
        with torch.inference_mode(False), torch.no_grad():  # or they could not be the values of parameters
            moved, values, arrived = self._make()
        every = list(draws._parameters())
        before = [p.grad for p in every]
        first = draws.count == 0 or all(g is None for g in before)
        kept: Gradients = [None if g is None or first else g.clone() for g in before]
        put_back = other_values(moved, values)()
        draws.inside = True
        for p in every:
            p.grad = None

        def undo() -> None:
            put_back()
            draws.inside = False
            own: Gradients = [p.grad for p in every]
            for p, g in zip(every, before, strict=True):
                p.grad = g
            if self.failed:
                draws.count = 0
                draws._given_up()
            elif any(g is not None for g in own):
                with torch.no_grad():
                    count = 1 if first else draws.count + 1
                    mean = own if first else [_mean(*pair, count) for pair in zip(kept, own, strict=True)]
                    arrived(own, first)
                for p, g in zip(every, mean, strict=True):
                    p.grad = g
                draws.count = count

        return undo


def valued(parameters: Sequence[Tensor], pieces: Sequence[Tensor]) -> list[Tensor]:
    """Values in the dtype and with the strides of parameters."""
    return [torch.empty_like(p.detach()).copy_(v.view(p.shape)) for p, v in zip(parameters, pieces, strict=True)]


def _mean(before: Tensor | None, own: Tensor | None, count: int) -> Tensor | None:
    """The mean of ``count`` gradients, from that of those before and the last one."""
    if own is None:
        return None if before is None else before * ((count - 1) / count)
    return own / count if before is None else before + (own - before) / count


def in_draws(opt: Any, closure: Callable[[], Any]) -> Any:
    """The mean of what a closure returns in as many draws as the optimiser makes for a step."""
    losses = []
    for _ in range(opt.samples):
        with opt.sampled(), torch.enable_grad():
            losses.append(closure())
    return losses[0] if len(losses) == 1 or losses[0] is None else sum(losses) / len(losses)
