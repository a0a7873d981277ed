"""SWATS: Adam that becomes SGD when it has found out with what learning rate."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.optim.sgd import sgd

from .. import arguments
from .accepted import check_dense, check_real

#: The version of what is added to the state dict of torch's optimisers.
FORMAT = 1


class SWATS(torch.optim.Optimizer):
    """Adam that switches to SGD with momentum, at a learning rate estimated from the steps of Adam.

    With p the step of Adam in its k-th iteration and g the gradient, over all parameters together::

        gamma  = p.p / (-p.g)
        lambda = beta2 lambda + (1 - beta2) gamma
        Lambda = lambda / (1 - beta2^k)

    where p.g is not zero: Lambda is the mean of the learning rates with which SGD would go as far along its gradient as
    Adam goes. When ``|Lambda - gamma| < max(tolerance, relative |gamma|)`` it has settled, and if it is positive the
    next steps are those of SGD with learning rate ``(1 - beta1) Lambda`` and momentum beta1, which begins at zero: to
    the bit those of ``torch.optim.SGD``. ``group["lr"]`` remains that of Adam; where a scheduler changes it after the
    switch, the learning rate of SGD changes by the same factor.

    The paper's ``tolerance=1e-9`` is hardly ever met by a net that trains on minibatches: the default is wider, and
    1e-3, or ``relative``, switches within some hundred steps.

    Args:
        params: Parameters, or groups of them with their own lr, betas, eps and weight_decay. beta2 is the same for all.
        lr: Of Adam.
        betas: Of Adam: the decay of the mean of gradients and that of their squares.
        eps: Added to the root of the mean of squares.
        weight_decay: The penalty ``weight_decay/2 |w|^2``, whose gradient is added.
        tolerance: As above.
        relative: As above.
        min_steps: The first step after which it may switch; never after the first.

    Raises:
        ValueError, TypeError: If an argument is not what it should be.

    Example:
        >>> from torch import nn
        >>> from nngeometry.optim import SWATS
        >>> model = nn.Linear(4, 1)
        >>> opt = SWATS(model.parameters(), lr=1e-2, relative=0.1)
        >>> x = torch.randn(20, 4)
        >>> for _ in range(20):
        ...     opt.zero_grad()
        ...     model(x).mean().backward()
        ...     opt.step()
        >>> opt.switched
        10

    Source: Keskar and Socher (2017), 1712.07628, algorithm 1.
    """

    def __init__(
        self,
        params: Any,
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-9,
        weight_decay: float = 0.0,
        tolerance: float = 1e-5,
        relative: float = 0.0,
        min_steps: int = 10,
    ) -> None:
        self.tolerance = arguments.number("tolerance", tolerance, least=0.0)
        self.relative = arguments.number("relative", relative, least=0.0)
        self.min_steps = arguments.integer("min_steps", min_steps, least=0)
        self._steps, self._lambda = 0, 0.0
        self._switched: int | None = None
        super().__init__(params, {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay})

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add parameters, with their own lr, betas, eps and weight_decay where these are given. After the switch they
        have the learning rate of SGD at once.
        """
        group = {**self.defaults, **param_group}
        for name in ("lr", "eps", "weight_decay"):
            arguments.number(name, group[name], least=0.0)
        betas = group["betas"]
        if not isinstance(betas, tuple | list) or len(betas) != 2:
            raise TypeError(f"betas: expected two numbers, got {arguments.described(betas)}")
        for k, beta in enumerate(betas):
            if arguments.number(f"betas[{k}]", beta, least=0.0) >= 1:
                raise ValueError(f"betas[{k}]: expected a number from 0 to below 1, got {beta}")
        if self.param_groups and self.param_groups[0]["betas"][1] != betas[1]:
            raise ValueError("betas: the second is that of the learning rate to find, and so the same for all groups")
        if self._switched is not None:
            param_group = {**param_group, "lr_at_switch": group["lr"]}
        super().add_param_group(param_group)
        check_real("SWATS", self.param_groups[-1]["params"])

    @property
    def switched(self) -> int | None:
        """After how many steps it became SGD, None if it has not."""
        return self._switched

    @property
    def estimate(self) -> float:
        """Lambda, 0 before the first step."""
        beta2 = self.param_groups[0]["betas"][1]
        k = self._steps if self._switched is None else self._switched
        return self._lambda / (1 - beta2**k) if k else 0.0

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """One step, with the gradients that the parameters have.

        Args:
            closure: Computes the loss and its gradients.

        Returns:
            What closure returned.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        check_dense("SWATS", [p for group in self.param_groups for p in group["params"]])
        if self._switched is not None:
            for group in self.param_groups:
                self._as_sgd(group)
            return loss
        self._steps += 1
        found = []
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is not None:
                    step, g = self._as_adam(p, group)
                    found.append(torch.stack([step.double().square().sum(), (step * g).sum(dtype=torch.float64)]))
                    p.add_(step)
        if found:
            squares, slope = sum(pair.to(found[0].device) for pair in found).tolist()  # type: ignore[union-attr]
            self._look(squares, slope)
        return loss

    def _look(self, squares: float, slope: float) -> None:
        """Have Lambda follow, and switch if it has settled. squares, slope: p.p and p.g."""
        beta2 = self.param_groups[0]["betas"][1]
        self._lambda *= 1.0 if slope == 0 else beta2
        if slope == 0:
            return
        gamma = squares / -slope
        self._lambda += (1 - beta2) * gamma
        settled = abs(self.estimate - gamma) < max(self.tolerance, self.relative * abs(gamma))
        if self._steps >= max(2, self.min_steps) and settled and self.estimate > 0:
            self._switched = self._steps
            for group in self.param_groups:
                group["lr_at_switch"] = float(group["lr"])
                for p in group["params"]:
                    self.state.pop(p, None)

    def _as_adam(self, p: Tensor, group: dict[str, Any]) -> tuple[Tensor, Tensor]:
        """The step of Adam, and the gradient."""
        assert p.grad is not None
        (b1, b2), state = group["betas"], self.state[p]
        g = p.grad.add(p, alpha=group["weight_decay"]) if group["weight_decay"] else p.grad
        if not state:
            state.update(step=0, exp_avg=torch.zeros_like(p), exp_avg_sq=torch.zeros_like(p))
        state["step"] += 1
        k = state["step"]
        state["exp_avg"] = b1 * state["exp_avg"] + (1 - b1) * g
        state["exp_avg_sq"] = b2 * state["exp_avg_sq"] + (1 - b2) * g.square()
        size = -group["lr"] * (1 - b2**k) ** 0.5 / (1 - b1**k)
        return size * state["exp_avg"] / (state["exp_avg_sq"].sqrt() + group["eps"]), g

    def _as_sgd(self, group: dict[str, Any]) -> None:
        used = [p for p in group["params"] if p.grad is not None]
        buffers = [self.state[p].get("momentum_buffer") for p in used]
        beta1 = group["betas"][0]
        before = group["lr_at_switch"]
        lr = (1 - beta1) * self.estimate
        if group["lr"] != before:
            lr = lr * group["lr"] / before if before else 0.0
        sgd(
            used,
            [p.grad for p in used],
            buffers,
            weight_decay=group["weight_decay"],
            momentum=beta1,
            lr=lr,
            dampening=0.0,
            nesterov=False,
            maximize=False,
            has_sparse_grad=False,
        )
        for p, buffer in zip(used, buffers, strict=True):
            self.state[p]["momentum_buffer"] = buffer

    def state_dict(self) -> dict[str, Any]:
        """All of it, as tensors and plain values: torch's part, and under "switching" the number of steps, lambda and
        when it has switched.
        """
        kept = {"format": FORMAT, "steps": self._steps, "lambda": self._lambda, "switched": self._switched}
        return {**super().state_dict(), "switching": kept}

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Go on from what :meth:`state_dict` gave, to the bit. The model has a state dict of its own.

        Raises:
            ValueError: If it is of another optimiser.
        """
        saved = state_dict.get("switching")
        if not isinstance(saved, Mapping) or saved.get("format") != FORMAT:
            raise ValueError("load_state_dict: expected what the state_dict() of a SWATS of this version gives")
        super().load_state_dict(dict(state_dict))
        for state in self.state.values():
            if state.get("momentum_buffer") is not None:  # which is written into
                state["momentum_buffer"] = state["momentum_buffer"].clone()
        self._steps, self._lambda, self._switched = saved["steps"], saved["lambda"], saved["switched"]
