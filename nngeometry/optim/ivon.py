"""IVON: variational inference with a diagonal covariance, at the cost of Adam."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from .. import arguments
from ..changes import Borrowed
from .accepted import check_dense, check_real
from .draws import Draw, Draws, Gradients, in_draws, valued
from .layered import own_generator

#: The version of what is added to the state dict of torch's optimisers.
FORMAT = 1


class IVON(torch.optim.Optimizer):
    """Improved variational online Newton: a normal distribution with a diagonal covariance over all weights, whose
    curvature h is estimated from the gradients alone.

    With N = ``ess``, d = ``weight_decay``, and gradients g at weights ``w + eps``::

        eps ~ N(0, 1 / (N (h + d)))
        f = N (h + d) mean(eps g)
        h = beta2 h + (1 - beta2) f + (1 - beta2)^2 (h - f)^2 / (2 (h + d))      # stays positive
        m = beta1 m + (1 - beta1) mean(g)
        w = w - lr (m / (1 - beta1^t) + d w) / (h + d)

    It is the posterior of N examples under a prior of precision N d, if the loss is their mean negative log-likelihood.
    The parameters hold the mean, except inside of ``with opt.sampled():``. Parameters to which no gradient came in a
    step stay as they are.

    Args:
        params: Parameters, or groups of them with their own lr, ess, hess_init, beta1, beta2 and weight_decay.
        lr: The length of steps.
        ess: The effective sample size N: the number of examples, or less for a wider distribution ("warm") and more for
            a narrower one ("cold"): N / tau.
        hess_init: h at first.
        beta1, beta2, weight_decay: As above.
        samples: How many draws there are for a step, which the loop makes, and :meth:`step` with a closure.
        generator: The source of the noise; by default one of its own, seeded by torch's global one. The same
            seed gives the same noise in every process.

    Raises:
        ValueError, TypeError: If an argument is not what it should be.

    Example:
        >>> from torch import nn
        >>> from nngeometry.optim import IVON
        >>> model = nn.Linear(4, 3)
        >>> opt = IVON(model.parameters(), lr=0.1, ess=20)
        >>> x, y = torch.randn(20, 4), torch.randint(3, (20,))
        >>> for _ in range(3):
        ...     with opt.sampled():
        ...         nn.functional.cross_entropy(model(x), y).backward()
        ...     opt.step()

    Source: Shen et al. (2024), 2402.17641, algorithm 1.
    """

    #: A GradScaler tells :meth:`step` its scale.
    _step_supports_amp_scaling = True

    def __init__(
        self,
        params: Any,
        lr: float,
        ess: float,
        hess_init: float = 1.0,
        beta1: float = 0.9,
        beta2: float = 0.99999,
        weight_decay: float = 1e-4,
        *,
        samples: int = 1,
        generator: torch.Generator | None = None,
    ) -> None:
        arguments.generator(generator)
        self.samples = arguments.integer("samples", samples, least=1)
        self._draws = Draws(self._all, self._give_up)
        #: The sum over the draws of the step of eps g, for each parameter.
        self._products: dict[Tensor, Tensor] = {}
        super().__init__(
            params,
            {
                "lr": lr,
                "ess": ess,
                "hess_init": hess_init,
                "beta1": beta1,
                "beta2": beta2,
                "weight_decay": weight_decay,
            },
        )
        self._generator = own_generator(self._all()[0].device) if generator is None else generator

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add parameters, with their own lr, ess, hess_init, beta1, beta2 and weight_decay where these are given."""
        self._draws.check_outside("add_param_group")
        group = {**self.defaults, **param_group}
        for name in ("lr", "weight_decay"):
            arguments.number(name, group[name], least=0.0)
        for name in ("ess", "hess_init"):
            arguments.number(name, group[name], above=0.0)
        for name in ("beta1", "beta2"):
            if arguments.number(name, group[name], least=0.0) >= 1:
                raise ValueError(f"{name}: expected a number from 0 to below 1, got {group[name]}")
        super().add_param_group(param_group)
        check_real("IVON", self.param_groups[-1]["params"])

    def sampled(self) -> Borrowed:
        """A ``with`` block in which the parameters are drawn. They are the mean again after it, however it ends.

        Gradients that arrive inside are those of one draw: ``.grad`` is the mean over the draws since the last step,
        and what it was before the first of them does not count. A block in which none arrive is no draw of the step,
        e.g. one that predicts under ``torch.no_grad()``. With an exception the step is given up, with all of its draws.

        Raises:
            RuntimeError: On entering, inside of another one.
        """

        def make() -> tuple[list[Tensor], list[Tensor], Callable[[Gradients, bool], None]]:
            every = self._all()
            noise = [
                torch.randn(p.shape, dtype=h.dtype, device=self._generator.device, generator=self._generator).to(h)
                / (group["ess"] * (h + group["weight_decay"])).sqrt()
                for group in self.param_groups
                for p in group["params"]
                for h in [self._hessian(p, group)]
            ]
            values = valued(every, [p.detach().to(e.dtype) + e for p, e in zip(every, noise, strict=True)])

            def arrived(gradients: Gradients, first: bool) -> None:
                if first:
                    self._products = {}
                for p, e, g in zip(every, noise, gradients, strict=True):
                    if g is not None:
                        product = e * g.to(e.dtype)
                        self._products[p] = self._products[p] + product if p in self._products else product

            return every, values, arrived

        return Draw(self._draws, make)

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """One step, with the gradients of the draws since the last one.

        Args:
            closure: Computes the loss and its gradients; it is called for ``samples`` draws.

        Returns:
            What closure returned, the mean over its draws.

        Raises:
            ValueError: If there was no draw.
            RuntimeError: Inside of ``sampled()``.
        """
        self._draws.check_outside("step")
        loss = None if closure is None else in_draws(self, closure)
        found, scale = getattr(self, "found_inf", None), getattr(self, "grad_scale", None)
        if found is not None and bool(found):
            self._draws.restart()
            return loss
        if found is not None and scale is None:
            raise ValueError(
                "step: the gradients were unscaled before, but what IVON has kept of the draws was not: leave out "
                "scaler.unscale_(opt) and clip the gradients inside of sampled(), or train in bfloat16 without a scaler"
            )
        self._draws.check_some()
        check_dense("IVON", self._all())
        unscaled = 1.0 if scale is None else float(scale.double().reciprocal())
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is not None and p in self._products:
                    if unscaled != 1:
                        p.grad.mul_(unscaled)
                    self._update(p, self._products[p] * (unscaled / self._draws.count), group)
        self._draws.restart()
        self._products = {}
        return loss

    def _update(self, p: Tensor, product: Tensor, group: dict[str, Any]) -> None:
        state, d, b1, b2 = self.state[p], group["weight_decay"], group["beta1"], group["beta2"]
        h = self._hessian(p, group)
        f = group["ess"] * (h + d) * product
        new = b2 * h + (1 - b2) * f + (1 - b2) ** 2 * (h - f).square() / (2 * (h + d))
        assert p.grad is not None
        m = (1 - b1) * p.grad.to(h.dtype) + b1 * state.get("momentum", torch.zeros_like(h))
        t = state.get("step", 0) + 1
        state.update(hessian=new, momentum=m, step=t)
        p.add_(((m / (1 - b1**t) + d * p) / (new + d)).to(p.dtype), alpha=-group["lr"])

    def _hessian(self, p: Tensor, group: dict[str, Any]) -> Tensor:
        held: Tensor | None = self.state[p].get("hessian") if p in self.state else None
        if held is not None:
            return held
        half = p.dtype in (torch.float16, torch.bfloat16)
        return torch.full_like(p, group["hess_init"], dtype=torch.float32 if half else p.dtype, requires_grad=False)

    def zero_grad(self, set_to_none: bool = True) -> None:
        """As of other optimisers. Draws whose gradients it takes away are no draws of the step any more."""
        self._draws.restart()
        super().zero_grad(set_to_none)

    def _all(self) -> list[Tensor]:
        return [p for group in self.param_groups for p in group["params"]]

    def _give_up(self) -> None:
        self._products = {}

    def state_dict(self) -> dict[str, Any]:
        """All of it, as tensors and plain values: torch's part, and under "variational" the place in the random draws.
        Draws whose step was not made are not kept.
        """
        kept = {"format": FORMAT, "generator": self._generator.get_state()}
        return {**super().state_dict(), "variational": kept}

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Go on from what :meth:`state_dict` gave, to the bit. The model has a state dict of its own.

        Raises:
            ValueError: If it is of another optimiser.
        """
        self._draws.check_outside("load_state_dict")
        saved = state_dict.get("variational")
        if not isinstance(saved, Mapping) or saved.get("format") != FORMAT or "running" in saved:
            raise ValueError("load_state_dict: expected what the state_dict() of an IVON of this version gives")
        super().load_state_dict(dict(state_dict))
        index = [k for group in state_dict["param_groups"] for k in group["params"]]
        for p, k in zip(self._all(), index, strict=True):  # as saved: torch casts to the dtype of the parameters
            for name in ("hessian", "momentum"):
                if name in state_dict["state"].get(k, {}):
                    self.state[p][name] = state_dict["state"][k][name].to(p.device, copy=True)
        self._draws.restart()
        self._products = {}
        self._generator.set_state(saved["generator"].cpu())
