"""Continual learning: elastic weight consolidation, with any matrix."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from typing import Any, Self

from torch import Tensor, nn

from . import arguments
from .accumulator import Accumulator
from .metrics import FIM
from .object import PMat, PMatKFAC, PVector


class EWC:
    """Elastic weight consolidation: a penalty on leaving the weights w_t of each task t, weighted by its curvature F_t,
    ``penalty = strength / 2 sum_t decay^age (w - w_t)^T F_t (w - w_t)``.

    F_t is a mean over examples, as is the loss that the penalty is added to, whatever the size of minibatches. Layers
    that a task does not have in common with others (heads) are left out by ``layer_collection=``.

    Args:
        model: What is trained.
        representation: A PMat class, a partial of one, or ``PMatMixed.of(...)``.
        matrix: A constructor: FIM, FIM_MonteCarlo, EmpiricalFisher, GGN, or a partial of one.
        strength: The factor of the penalty.
        decay: By what the weight of older tasks is multiplied after each new one, between 0 and 1; by default 1.
        online: Whether to penalise distance from the weights after the last task alone, with one running matrix,
            ``sum_t decay^age F_t``, so that memory does not grow with the number of tasks; by default not.
        **options: Of the matrix and of the representation.

    Example:
        >>> import torch
        >>> model = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3))
        >>> ewc = EWC(model, strength=10.0)
        >>> ewc.consolidate([(torch.randn(20, 4),)]).tasks       # after training on a task
        1
        >>> loss = nn.functional.cross_entropy(model(torch.randn(8, 4)), torch.randint(3, (8,))) + ewc.penalty()
        >>> loss.backward()

    Source: Kirkpatrick et al. (2017), 1612.00796; Schwarz et al. (2018), 1805.06370, for online; Ritter, Botev, Barber
    (2018), 1805.07810, for Kronecker products.
    """

    @arguments.called_as
    def __init__(
        self,
        model: nn.Module,
        representation: Any = PMatKFAC,
        matrix: Callable[..., Any] = FIM,
        *,
        strength: float,
        decay: float = 1.0,
        online: bool = False,
        **options: Any,
    ) -> None:
        arguments.model(model)
        arguments.flag("online", online)
        self.model = model
        self.strength = arguments.number("strength", strength, least=0.0)
        self.decay = arguments.number("decay", decay, least=0.0)
        if self.decay > 1:
            raise ValueError(f"decay: what an older task counts for is between 0 and 1, got {decay}")
        self._make = lambda: Accumulator(matrix, model, representation, **options)
        self._running = self._make()  # looks at the arguments
        self._online = online
        self._weight = 0.0
        self._anchors: list[tuple[PMat, PVector]] = []
        self.tasks = 0

    def consolidate(self, loader: Any) -> Self:
        """Add a task: the present weights, and the curvature there on the examples of the task.

        Args:
            loader: As for the matrix.
        """
        for F, _ in self._anchors:
            self._now(F, "consolidate")
        running = self._with(loader) if self._online else self._make().update(loader)
        F = running.matrix()
        w = PVector.from_model(self.model, F.layer_collection).clone().detach()
        if not bool(w.to_torch().isfinite().all()):
            raise ValueError("consolidate: the weights are not finite: train the model with a smaller learning rate")
        if self._online:
            self._running = running
            self._weight = 1 + self.decay * self._weight
            self._anchors = [(F, w)]
        else:
            self._anchors.append((F, w))
        self.tasks += 1
        return self

    def _with(self, loader: Any) -> Accumulator:
        """The running matrix with one more task, in which tasks count alike, whatever the numbers of their examples."""
        running = copy.deepcopy(self._running)
        if running.n == 0 or self.decay == 0:
            return running.reset().update(loader)
        task = running.ahead().update(loader)
        old = self.decay * self._weight * task.n / running.n
        if old > 1:
            return running.take(task.decay(1 / old))
        return running.decay(old).take(task)

    def penalty(self) -> Tensor:
        """The penalty to add to the loss: a scalar, differentiable in the parameters; zero before the first task."""
        total: Any = next(self.model.parameters()).new_zeros(())
        for age, (F, w) in enumerate(reversed(self._anchors)):
            weight = self._weight if self._online else self.decay**age
            total = total + self.strength / 2 * weight * F.vTMv(self._now(F, "penalty") - w)
        found: Tensor = total
        return found

    def _now(self, F: PMat, where: str) -> PVector:
        try:
            return PVector.from_model(self.model, F.layer_collection)
        except ValueError as error:
            raise ValueError(f"{where}: {_OF_HEADS} ({error})") from error

    def state_dict(self) -> dict[str, Any]:
        """All tasks as tensors and plain values, for ``torch.save`` and ``torch.load(weights_only=True)``."""
        return {
            "tasks": self.tasks,
            "weight": self._weight,
            "online": self._online,
            "anchors": [{"matrix": F.state(), "weights": w.to_torch()} for F, w in self._anchors],
            "running": self._running.state_dict() if self._online and self.tasks else None,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> Self:
        """Replace the tasks by those of :meth:`state_dict`."""
        if not isinstance(state, Mapping) or set(state) != {"tasks", "weight", "online", "anchors", "running"}:
            raise ValueError("load_state_dict: expected what EWC.state_dict() gives")
        if bool(state["online"]) != self._online:
            raise ValueError(f"load_state_dict: the state is of online={state['online']}: make EWC with the same")
        matrices = [PMat.from_state(a["matrix"], "load_state_dict", "load_state_dict") for a in state["anchors"]]
        anchors = [
            (F, PVector(F.layer_collection, a["weights"])) for F, a in zip(matrices, state["anchors"], strict=True)
        ]
        for F, _ in anchors:
            self._now(F, "load_state_dict")
        running = self._make()
        if state["running"] is not None:
            running.load_state_dict(state["running"])
        self._running, self._anchors = running, anchors
        self.tasks, self._weight = state["tasks"], state["weight"]
        return self

    def __repr__(self) -> str:
        return f"EWC(strength={self.strength:g}, decay={self.decay:g}, tasks={self.tasks})"


_OF_HEADS = (
    "the model does not have the layers that it had in earlier tasks: leave layers that tasks do not share (heads) "
    "out, EWC(..., layer_collection=LayerCollection.from_model(model, *names))"
)

__test__ = {EWC.__name__: EWC.__doc__ or ""}
