"""Training with any of the matrices, in any representation: an optimiser of torch."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from .. import arguments
from ..accumulator import Accumulator
from ..changes import Changed
from ..layercollection import LayerCollection
from ..metrics import FIM_MonteCarlo
from ..model import data
from ..model.evaluator import State
from ..object import PMat, PMatImplicit, PMatKFAC, PVector
from ..team import Team
from .damping import LevenbergMarquardt
from .last import Last
from .layered import LayeredOptimizer, options_for, parameters_of
from .quadratic import QuadraticModel
from .refresh import Every, policy
from .running import Running

#: By default: in each of the first steps, while curvature changes fast, and in every tenth then.
_REFRESH = Every(10, first=10)
_NUMBERS = ("lr", "damping", "momentum", "weight_decay", "l2")


class SecondOrderOptimizer(LayeredOptimizer):
    """Gradient steps that are preconditioned by a curvature matrix, in any representation.

    With F the running matrix, g the gradient and w the parameters, a step is::

        g = g + l2 w
        d = (F + damping + l2)^-1 g            # PMat.solve
        d = d min(1, sqrt(clip / (lr^2 g.d)))  # if clip is given
        m = momentum m + d
        w = w - lr (m + weight_decay w)

    F is a running average over minibatches, in which each counts ``decay`` times what the next one does. A step uses
    the blocks of it as they were at their last refresh. Every layer has a parameter group, with its
    ``group["name"]``, lr, damping, momentum, weight_decay and l2. Trainable parameters outside of the layer collection
    are in a last group, whose name is None, for which d = g.

    Schedulers, ``clip_grad_norm_``, hooks, ``zero_grad`` and ``torch.amp.GradScaler`` work as with other optimisers of
    torch. Curvature is computed outside of autocast. Where a step is skipped, what was observed for it is dropped.
    With several minibatches for a step, observe each of them: the matrix is that of all.

    Args:
        model: The model, which is in the mode in which it is trained.
        representation: A PMat class, a partial of one, or ``PMatMixed.of(...)``. PMatImplicit solves with the matrix of
            the last minibatch itself, by conjugate gradients, or MINRES where it may be indefinite.
        matrix: A constructor of matrices: FIM_MonteCarlo, FIM, EmpiricalFisher, GGN, Hessian, a partial of one, ...
        lr: The length of steps; or "quadratic": the step is ``a d + b (previous step)`` with the a and b for which the
            quadratic model of the minibatch is least, its exact matrix included, times ``group["lr"]``, which is 1.
        damping: Added to the diagonal, or :class:`LevenbergMarquardt`, which needs ``step(closure)``.
        momentum: As above, by default 0.9.
        weight_decay: As above, decoupled; by default 0.
        l2: The penalty ``l2/2 |w|^2``, which is part of the loss and of its curvature.
        decay: The weight of the running average when a minibatch is observed, 0.95 by default; 0 takes the last alone.
        observe_every: Minibatches are observed in every so many steps, by default in each.
        refresh: When the blocks in use are replaced by those of the running average, by default in each of the first
            ten steps and every ten steps then, ``Every(10, first=10)``: a number of steps, a function of the number of
            steps so far, :class:`Every`, :class:`Stale`, :class:`Rotated` or :class:`Turned`.
        clip: The bound on ``lr^2 g.d``, which is about twice the Kullback-Leibler divergence of a step.
        absolute: Whether to take the absolute values of the eigenvalues, for a Hessian, which is indefinite
            ("saddle-free Newton"); by default not.
        factored: Whether the damping is shared among the factors of Kronecker products, which are then inverted one by
            one, by Cholesky: cheaper and only approximately what damping is otherwise.
        preconditioner: For PMatImplicit: a representation whose running average preconditions the conjugate gradients.
        layer_collection: The layers that are preconditioned, by default all.
        process_group: Of ``torch.distributed``: each rank observes its own part of a minibatch, and has the gradient of
            the whole as DistributedDataParallel leaves it. The ranks share out the decompositions, and all take the
            step of the first one. By default this process is alone.
        **options: Of the matrix and the representation. Where the model has BatchNorm in training,
            ``batch_statistics=True`` is the default.

    Raises:
        ValueError: If an argument is not what it should be.

    Example:
        >>> from nngeometry.optim import SecondOrderOptimizer
        >>> model = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3))
        >>> opt = SecondOrderOptimizer(model, PMatKFAC, lr=0.1, damping=1e-2)
        >>> x, y = torch.randn(20, 4), torch.randint(3, (20,))
        >>> for _ in range(3):
        ...     loss = nn.functional.cross_entropy(model(x), y)
        ...     loss.backward()
        ...     observed = opt.observe((x, y))
        ...     opt.step()
        ...     opt.zero_grad()
        >>> observed, opt.matrix.size(), [group["name"] for group in opt.param_groups]
        (True, (43, 43), ['0', '2'])

    Source: Martens and Grosse (2015), 1503.05671; Martens (2014), 1412.1193; Dauphin et al. (2014), 1406.2572.
    """

    _PART = ("curvature", 1)

    def __init__(
        self,
        model: nn.Module,
        representation: Any = PMatKFAC,
        matrix: Callable[..., Any] = FIM_MonteCarlo,
        *,
        lr: float | str,
        damping: float | LevenbergMarquardt = 1e-3,
        momentum: float = 0.9,
        weight_decay: float = 0.0,
        l2: float = 0.0,
        decay: float = 0.95,
        observe_every: int = 1,
        refresh: Any = _REFRESH,
        clip: float | None = None,
        absolute: bool = False,
        factored: bool = False,
        preconditioner: Any = None,
        layer_collection: LayerCollection | None = None,
        process_group: Any = None,
        **options: Any,
    ) -> None:
        arguments.model(model)
        self.levenberg = damping if isinstance(damping, LevenbergMarquardt) else None
        self.quadratic = isinstance(lr, str)
        if self.quadratic:
            arguments.one_of("lr", lr, ["quadratic"])
        defaults: dict[str, Any] = {
            "lr": 1.0 if self.quadratic else lr,
            "damping": damping.initial if isinstance(damping, LevenbergMarquardt) else damping,
            "momentum": momentum,
            "weight_decay": weight_decay,
            "l2": l2,
        }
        if arguments.number("decay", decay, least=0.0) > 1:
            raise ValueError(f"decay: what the past counts is between 0 and 1, got {decay}")
        self.observe_every = arguments.integer("observe_every", observe_every, least=1)
        self.refresh = policy(refresh)
        self.clip = None if clip is None else arguments.number("clip", clip, above=0.0)
        arguments.flag("absolute", absolute)
        arguments.flag("factored", factored)
        self.absolute = absolute

        options = options_for(matrix, model, options)
        if process_group is not None:
            for name, given in (("lr='quadratic'", self.quadratic), ("LevenbergMarquardt", self.levenberg is not None)):
                if given:
                    raise NotImplementedError(
                        f"process_group: {name} compares losses, of which each rank has those of its own examples: use "
                        "a number"
                    )
            options["process_group"] = process_group
        self._team = Team(process_group)
        self._generator: torch.Generator | None = options.get("generator")
        implicit = representation is PMatImplicit
        for name, given in (("refresh=Rotated or Turned", self.refresh.spectral), ("PMatImplicit", implicit)):
            if factored and given:
                raise ValueError(f"factored=True inverts factors, which {name} has none of: leave one of them out")
        if preconditioner is not None and not implicit:
            raise ValueError("preconditioner: is of representation=PMatImplicit: the others are solved with exactly")
        lc = LayerCollection.from_model(model) if layer_collection is None else layer_collection
        held = preconditioner if implicit else representation
        self._running: Running | None = None
        if held is not None:
            self._running = Running(
                matrix,
                model,
                held,
                decay=decay,
                refresh=self.refresh,
                absolute=absolute,
                factored=factored,
                layer_collection=lc,
                **options,
            )
        self._last: Last | None = None
        if implicit or self.quadratic or self.levenberg is not None:
            of_matrix = parameters_of(matrix)
            own = {name: value for name, value in options.items() if name in of_matrix}
            self._last = Last(matrix, model, absolute, layer_collection=lc, **own)
        self._implicit = implicit
        self._steps = 0
        self._seen: list[tuple[int, ...]] | None = None
        super().__init__(model, lc, defaults, {})

    # What people look at

    @property
    def matrix(self) -> PMat | None:
        """The matrix in use, a PMat; None before the first step."""
        held = self._last if self._implicit else self._running
        return None if held is None else held.matrix

    @property
    def accumulator(self) -> Accumulator | None:
        """The running matrix, with all that was observed; None of PMatImplicit without a preconditioner."""
        return None if self._running is None else self._running.accumulator

    @property
    def refresh_fraction(self) -> float:
        """The share of steps in which a block was decomposed, the mean over blocks and their factors."""
        return 0.0 if self._running is None else self._running.decomposed / max(1, self._running.steps)

    @property
    def intervals(self) -> dict[str, tuple[int, ...]]:
        """Of :class:`Stale`: the present intervals of each layer, in steps, one for each of its statistics."""
        if self._running is None:
            return {}
        pairs = zip(self._running.groups, self._running.memories, strict=True)
        return {name: tuple(memory["d1"]) for names, memory in pairs if "d1" in memory for name in names}

    # The loop

    def observe(self, minibatch: Any) -> bool:
        """Add a minibatch to the running average of the matrix, if the next step is one that observes.

        Args:
            minibatch: The minibatch of the training, e.g. ``(x, y)``. With several in a step, each of them.

        Returns:
            Whether it was observed.

        Raises:
            ValueError: If the model does not take the minibatch, or is not the one that it was.
        """
        due = self._steps % self.observe_every == 0
        if not due and self._last is None:
            return False
        self._check_model("observe")
        if self._last is not None:
            self._last.observe(minibatch)
        if due and self._running is not None:
            shapes = [tuple(t.shape) for t in data.tensors_of(minibatch)]
            device = self._parameters[0].device.type
            try:
                with torch.enable_grad(), torch.autocast(device, enabled=False):
                    self._running.observe(minibatch)
            except RuntimeError as error:
                if self._seen is None or [s[1:] for s in shapes] == [s[1:] for s in self._seen]:
                    raise
                raise ValueError(
                    f"observe: the model does not take a minibatch of tensors of shapes {shapes}; those before had "
                    f"{self._seen}: {str(error).splitlines()[0]}"
                ) from error
            self._seen = shapes
        return due

    @property
    def needs_closure(self) -> bool:
        """Whether :meth:`step` needs a closure."""
        return self.levenberg is not None or self.quadratic

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """One step, with the gradients that the parameters have.

        Args:
            closure: Computes the loss of the minibatch, with or without its gradients.

        Returns:
            What closure returned, of the parameters before the step.

        Raises:
            ValueError: If nothing was observed yet, the matrix plus damping is not positive, a parameter has no
                gradient, or one that is not finite, or the model is not the one that it was.
        """
        if self.levenberg is not None and closure is None:
            raise ValueError("step: damping=LevenbergMarquardt compares losses: call step(closure), closure() -> loss")
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        if self._skipped():
            return loss
        self._check_model("step")
        g = self._gradient()
        fresh = self._take_observed()
        w = self._flat(self._parameters)
        g = self._penalised(g, w)
        d = self._team.share(self._solved(g), 0, self._parameters[0].device)  # they differ by rounding
        model = self._model(g, fresh)
        lr, previous = self._of_layers("lr"), self._kept
        if model is not None and self.quadratic:
            directions = [d] if previous is None else [d, previous]
            m = -(torch.tensor(model.best(directions), dtype=d.dtype, device=d.device) @ torch.stack(directions))
        else:
            m = self._with_momentum(self._clipped(d, g, lr))
        decay = self._of_layers("weight_decay")
        s = -lr * (m if isinstance(decay, float) and decay == 0 else m + decay * w)
        self._add(s)
        if model is None or closure is None or self.levenberg is None or self._look(closure, loss, w, s, model):
            self._keep(m)
        self._step_plainly()
        self._steps += 1
        return loss

    def _give_up(self) -> None:
        for held in (self._running, self._last):
            if held is not None:
                held.drop()

    def _take_observed(self) -> bool:
        """Have what was observed count, and take the blocks into use that are due; whether something was observed."""
        fresh = False
        if self._last is not None:
            with torch.enable_grad():
                fresh = self._last.commit()
        if self._running is not None:
            self._running.commit()
            self._running.renew(self._steps)
        if self.matrix is None:
            raise ValueError("step: nothing was observed yet: call observe(minibatch) before step()")
        return fresh

    def _penalised(self, g: Tensor, w: Tensor) -> Tensor:
        """The flat gradient with that of the penalty."""
        l2 = self._of_layers("l2")
        return g if isinstance(l2, float) and l2 == 0 else g + l2 * w

    def _solved(self, g: Tensor) -> Tensor:
        """``(F + damping + l2)^-1 g``."""
        regul = self._by_layer(lambda group: group["damping"] + group["l2"])
        if not self._implicit:
            assert self._running is not None
            return self._running.solve(g, regul)
        assert self._last is not None
        assert self._last.matrix is not None
        guide = None if self._running is None else self._running.matrix
        d: Tensor = self._last.matrix.solve(PVector(self.layer_collection, g), regul, preconditioner=guide).to_torch()
        if float(g @ d) < 0:
            raise ValueError(
                f"step: the matrix plus damping {regul} is indefinite, and the step would go up: use more damping, "
                "absolute=True, or a matrix that is positive, such as GGN"
            )
        return d

    def _clipped(self, d: Tensor, g: Tensor, lr: float | Tensor) -> Tensor:
        if self.clip is None:
            return d
        length = float((lr * g) @ (lr * d))
        return d * min(1.0, (self.clip / length) ** 0.5) if length > 0 else d

    def _model(self, g: Tensor, fresh: bool) -> QuadraticModel | None:
        """The quadratic model of the minibatch, if it is needed."""
        if not self.quadratic and self.levenberg is None:
            return None
        if not fresh:
            raise ValueError(
                "step: lr='quadratic' and LevenbergMarquardt model the loss of the minibatch: call observe(minibatch) "
                "before every step"
            )
        assert self._last is not None
        assert self._last.matrix is not None
        return QuadraticModel(self._last.matrix, g, self._of_layers("damping") + self._of_layers("l2"))

    def _look(self, closure: Callable[[], Any], loss: Any, w: Tensor, s: Tensor, model: QuadraticModel) -> bool:
        """Set the damping by what the step has done to the loss, and whether the step is kept."""
        lm = self.levenberg
        assert lm is not None
        due = lm.due(self._steps)
        if not due and not lm.reject:
            return True
        before = _number(loss) + self._penalty(w)
        after = self._loss_again(closure) + self._penalty(w + s)
        rejected = lm.reject and not after <= before
        if rejected:
            for p, value in zip(self._parameters, self._pieces(w), strict=True):
                p.copy_(value)
        if due or rejected:
            foretold = model.change(s)
            rho = (after - before) / foretold if foretold and not rejected else -1.0
            for group in self._layers():
                group["damping"] = lm.updated(group["damping"], rho)
        return not rejected

    def _penalty(self, w: Tensor) -> float:
        return 0.5 * float((self._of_layers("l2") * w) @ w)

    def _loss_again(self, closure: Callable[[], Any]) -> float:
        """The loss at the parameters as they are now; all else of the model stays, its gradients included."""
        kept = [(p, p.grad) for p in self._all()]
        try:
            with Changed(State(self.model)), torch.enable_grad():
                for p, _ in kept:
                    p.grad = None
                return _number(closure())
        finally:
            for p, grad in kept:
                p.grad = grad

    def _add(self, s: Tensor) -> None:
        torch._foreach_add_(self._parameters, self._pieces(s.to(self._parameters[0].dtype)))

    def _with_momentum(self, d: Tensor) -> Tensor:
        return d if self._kept is None else self._of_layers("momentum") * self._kept + d

    def _plain(self, p: Tensor, group: dict[str, Any]) -> None:
        assert p.grad is not None
        g = p.grad.to_dense() if p.grad.is_sparse else p.grad
        d = g + group["l2"] * p if group["l2"] else g
        m = self.state[p].get("momentum")
        m = d.clone() if m is None else m.mul_(group["momentum"]).add_(d)
        self.state[p]["momentum"] = m
        p.add_(m + group["weight_decay"] * p, alpha=-group["lr"])

    # What is kept

    def state_dict(self) -> dict[str, Any]:
        """All of it, as tensors and plain values: torch's part, and under "curvature" what was observed, the matrix in
        use, the intervals of refreshing and the place in the random draws.
        """
        return {
            **super().state_dict(),
            "curvature": {
                "format": self._PART[1],
                "steps": self._steps,
                "running": None if self._running is None else self._running.state_dict(),
                "generator": None if self._generator is None else self._generator.get_state(),
            },
        }

    def _load(self, saved: Mapping[str, Any]) -> None:
        if (saved["running"] is None) != (self._running is None):
            raise ValueError("load_state_dict: one of the two optimisers has PMatImplicit alone, the other has not")
        if self._running is not None:
            self._running.load_state_dict(saved["running"])

    def _loaded(self, saved: Mapping[str, Any]) -> None:
        if self._last is not None:
            self._last.restart()
        if self._generator is not None and saved["generator"] is not None:
            self._generator.set_state(saved["generator"].cpu())
        self._steps = saved["steps"]


def _number(loss: Any) -> float:
    return loss.detach().item() if isinstance(loss, Tensor) else float(loss)
