"""Damping that follows how well the quadratic model foretells the loss."""

from __future__ import annotations

import math
from dataclasses import dataclass

from .. import arguments


@dataclass(frozen=True)
class LevenbergMarquardt:
    """Damping that decreases where the quadratic model predicts the loss well, and increases where it does not.

    In every ``every``-th step, with ``rho = (L(w + s) - L(w)) / (q(s) - q(0))`` and q the quadratic model of the
    minibatch, damping included: where rho > 3/4 it is multiplied by ``omega^every``, where rho < 1/4 divided by that.
    It is ``group["damping"]`` of all layers, which keep their ratios.

    Args:
        initial: The damping to begin with.
        every: In steps.
        omega: The factor for one step.
        least, most: The bounds of the damping.
        reject: Whether a step that raises the loss is taken back, and the damping raised; then the loss is compared in
            every step.

    Example:
        >>> LevenbergMarquardt(1.0, every=1, omega=0.5).updated(1.0, rho=0.9)
        0.5

    Source: Martens and Grosse (2015), 1503.05671, section 6.5.
    """

    initial: float
    every: int = 5
    omega: float = 0.95
    least: float = 0.0
    most: float = math.inf
    reject: bool = False

    def __post_init__(self) -> None:
        arguments.number("LevenbergMarquardt: initial", self.initial, above=0.0)
        arguments.integer("LevenbergMarquardt: every", self.every, least=1)
        omega = arguments.number("LevenbergMarquardt: omega", self.omega, above=0.0)
        if omega >= 1:
            raise ValueError(f"LevenbergMarquardt: omega is a factor below 1, got {omega}")

    def due(self, step: int) -> bool:
        """Whether the damping is adapted in a step. step: the number of steps so far."""
        return (step + 1) % self.every == 0

    def updated(self, damping: float, rho: float) -> float:
        """The damping after a step in which the loss changed by rho times what the model predicted."""
        if rho > 0.75:
            damping *= self.omega**self.every
        elif not rho >= 0.25:  # NaN too
            damping /= self.omega**self.every
        return min(max(damping, self.least), self.most)
