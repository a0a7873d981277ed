"""Variational inference: training that returns a distribution over weights, in any representation."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from .. import arguments
from ..accumulator import Accumulator
from ..changes import Borrowed
from ..layercollection import LayerCollection
from ..likelihood import Likelihood
from ..metrics import FIM_MonteCarlo
from ..object import PMat, PMatDiag, PMatEye, PVector, random_pvector
from ..posterior import Posterior
from ..team import Team
from .draws import Draw, Draws, Gradients, in_draws, valued
from .layered import LayeredOptimizer, options_for, own_generator, parameters_of
from .refresh import policy
from .running import Running


class VIOptimizer(LayeredOptimizer):
    """Natural-gradient variational inference: it trains a normal distribution from which the weights are drawn.

    With N = ``num_data`` examples, S the running curvature of the mean loss, gamma the damping, delta the precision of
    the prior, which has mean zero, and tau the temperature, the distribution is::

        q(w) = N(mu, (tau/N) (S + gamma + tau delta/N)^-1)

    and a step, with the gradient averaged over draws of w::

        g  = mean of grad + (tau delta/N) mu
        m  = momentum m + g
        mu = mu - lr (S + gamma + tau delta/N)^-1 m     # PMat.solve

    The parameters of the model hold mu, the mean, except inside of ``with opt.sampled():``. The loss is the mean over
    the minibatch of the negative log-likelihood, of which S is the curvature: for cross-entropy the default is the
    Fisher matrix of sampled labels. S is an average over minibatches, in which each counts ``decay`` times what the
    next one does. Every layer has a parameter group, with its ``group["name"]``, lr, momentum, damping and
    prior_precision. Trainable parameters outside of the layer collection are in a last group, whose name is None: these
    have no distribution and are stepped by their gradient alone.

    Schedulers, ``clip_grad_norm_``, hooks, ``zero_grad`` and ``torch.amp.GradScaler`` work as with other optimisers of
    torch.

    Args:
        model: The model, which is in the mode in which it is trained.
        representation: Of S, and so of the precision: a PMat class, a partial of one, or ``PMatMixed.of(...)``. It
            needs entries (not PMatImplicit) and must be positive (not PMatQuasiDiag).
        matrix: A constructor of matrices: FIM_MonteCarlo, FIM, GGN, EmpiricalFisher, a partial of one, ... The
            empirical Fisher is not the curvature of the loss, and its q is not the best one even where the model is
            linear.
        num_data: N, the number of examples in the training data.
        prior_precision: delta, one number or one for each layer by its name.
        temperature: tau; less than one makes q narrower than the posterior ("cold").
        lr, momentum, damping: As above.
        decay: The weight of the running average when a minibatch is observed, 0.95 by default; 0 takes the last alone.
        samples: How many draws there are for a step, which the loop makes, and :meth:`step` with a closure.
        observe_every: Minibatches are observed in every so many steps, by default in each.
        refresh: When S in use is replaced by the running average: every so many steps, by default in each, or a
            function of the number of steps so far.
        init_precision: The value of N S, in every coordinate, before the first observation; N by default.
        warmup: In how many steps tau rises to the temperature, linearly.
        generator: The source of the noise, and of the labels if the matrix draws some; by default one of its own,
            seeded by torch's global one. The same seed gives the same noise in every process.
        layer_collection: The layers that have a distribution, by default all.
        process_group: Of ``torch.distributed``: each rank observes its own part of a minibatch, and has the gradient of
            the whole as DistributedDataParallel leaves it. All have the draws and the steps of the first one. By
            default this process is alone.
        **options: Of the matrix and the representation.

    Raises:
        ValueError, TypeError: If an argument is not what it should be.

    Example:
        >>> from nngeometry import PMatKFAC
        >>> from nngeometry.optim import VIOptimizer
        >>> model = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3))
        >>> opt = VIOptimizer(model, PMatKFAC, num_data=20, lr=0.1, samples=2)
        >>> x, y = torch.randn(20, 4), torch.randint(3, (20,))
        >>> for _ in range(3):
        ...     for _ in range(opt.samples):
        ...         with opt.sampled():
        ...             nn.functional.cross_entropy(model(x), y).backward()
        ...             observed = opt.observe((x, y))
        ...     opt.step()
        >>> observed, opt.covariance.size()
        (True, (43, 43))

    Source: Khan et al. (2018), 1806.04854; Zhang et al. (2018), 1712.02390; Osawa et al. (2019), 1906.02506.
    """

    _PART = ("variational", 1)

    def __init__(
        self,
        model: nn.Module,
        representation: Any = PMatDiag,
        matrix: Callable[..., Any] = FIM_MonteCarlo,
        *,
        num_data: float,
        lr: float,
        prior_precision: float | Mapping[str, float] = 1.0,
        temperature: float = 1.0,
        momentum: float = 0.9,
        damping: float = 0.0,
        decay: float = 0.95,
        samples: int = 1,
        observe_every: int = 1,
        refresh: Any = 1,
        init_precision: float | None = None,
        warmup: int = 0,
        generator: torch.Generator | None = None,
        layer_collection: LayerCollection | None = None,
        process_group: Any = None,
        **options: Any,
    ) -> None:
        arguments.model(model)
        arguments.generator(generator)
        self.num_data = arguments.number("num_data", num_data, above=0.0)
        self.temperature = arguments.number("temperature", temperature, least=0.0)
        self.samples = arguments.integer("samples", samples, least=1)
        self.observe_every = arguments.integer("observe_every", observe_every, least=1)
        self.warmup = arguments.integer("warmup", warmup, least=0)
        self.init_precision = (
            self.num_data if init_precision is None else arguments.number("init_precision", init_precision, above=0.0)
        )
        if arguments.number("decay", decay, least=0.0) > 1:
            raise ValueError(f"decay: what the past counts is between 0 and 1, got {decay}")
        lc = LayerCollection.from_model(model) if layer_collection is None else layer_collection
        one, by_layer = _of_each(prior_precision, lc)
        self._draws = Draws(self._all, self._give_up)
        super().__init__(
            model,
            lc,
            {"lr": lr, "momentum": momentum, "damping": damping, "prior_precision": one},
            by_layer,
        )
        self._team = Team(process_group)
        self._generator = own_generator(self._parameters[0].device) if generator is None else generator
        chosen = options_for(matrix, model, options, self._generator)
        if process_group is not None:
            chosen["process_group"] = process_group
        self._running = Running(
            matrix,
            model,
            representation,
            decay=decay,
            refresh=policy(refresh),
            absolute=False,
            factored=False,
            layer_collection=lc,
            **chosen,
        )
        self._likelihood = _likelihood_of(matrix, chosen)
        self._steps = 0
        #: The covariance and its root, and of what they are.
        self._made: tuple[Any, PMat, PMat] | None = None

    # What people look at

    @property
    def mean(self) -> PVector:
        """mu, a copy."""
        self._draws.check_outside("mean")
        return PVector(self.layer_collection, self._flat([p.detach() for p in self._parameters]))

    @property
    def covariance(self) -> PMat:
        """``(tau/N) (S + gamma + tau delta/N)^-1``, from which weights are drawn now.

        Raises:
            ValueError: If that matrix is not positive.
        """
        return self._covariance_and_root()[0]

    @property
    def matrix(self) -> PMat | None:
        """S as it is in use, None before the first step."""
        return self._running.matrix

    @property
    def accumulator(self) -> Accumulator:
        """The running matrix, with all that was observed."""
        return self._running.accumulator

    @property
    def tau(self) -> float:
        """The temperature of the step to come, which the warm-up may not have brought to its height yet."""
        risen = 1.0 if self.warmup == 0 else min(1.0, (self._steps + 1) / self.warmup)
        return self.temperature * risen

    def posterior(self, likelihood: str | Likelihood | None = None) -> Posterior:
        """q as a :class:`~nngeometry.Posterior`, of the precision ``(N (S + gamma) + tau delta) / tau``.

        Args:
            likelihood: What the outputs mean, by default what the matrix is of: the ``variant=`` of FIM and
                FIM_MonteCarlo, or classes for the loss ``nn.CrossEntropyLoss()``.

        Raises:
            ValueError: If nothing was observed yet, or the likelihood of another loss was not given.
        """
        if self.matrix is None:
            raise ValueError("posterior: there was no step yet, so that there is no curvature: train first")
        of = self._likelihood if likelihood is None else likelihood
        if of is None:
            raise ValueError(
                "posterior: the matrix does not tell the likelihood that its loss is of: give it, posterior(Gaussian("
                "variance)) for a regression or posterior(Bernoulli()) for labels that are there or not"
            )
        tau, n = self.tau, self.num_data
        if tau == 0:
            raise ValueError("posterior: at temperature=0 the weights have one value and no distribution: give another")
        prior = self._by_layer(lambda group: n * group["damping"] + tau * group["prior_precision"])
        return Posterior(
            self.model,
            self.matrix,
            of,
            num_data=n,
            prior_precision=prior,
            temperature=tau,
            mean=self.mean,
        )

    # The loop

    def sampled(self) -> Borrowed:
        """A ``with`` block in which the parameters are drawn from q. They are mu again after it, however it ends.

        Gradients that arrive inside are those of one draw: ``.grad`` is the mean over the draws since the last step,
        and what it was before the first of them does not count. A block in which none arrive is no draw of the step,
        e.g. one that predicts under ``torch.no_grad()``. With an exception the step is given up, with all of its draws
        and what was observed for it.

        Raises:
            ValueError: On entering, if the covariance is not positive, or the model is not the one that it was.
            RuntimeError: On entering, inside of another one.
        """

        def make() -> tuple[list[Tensor], list[Tensor], Callable[[Gradients, bool], None]]:
            self._check_model("sampled")
            root = self._covariance_and_root()[1]
            noise = random_pvector(self.layer_collection, root.device, root.dtype, self._generator)
            w = self._flat([p.detach() for p in self._parameters]) + root.mv(noise).to_torch()
            w = self._team.share(w, 0, self._parameters[0].device)
            return self._parameters, valued(self._parameters, self._pieces(w)), lambda gradients, first: None

        return Draw(self._draws, make)

    def observe(self, minibatch: Any) -> bool:
        """Add a minibatch to the running average of the matrix, at the present weights, if the next step observes.

        With several draws, call it in each: the average is over all of them.

        Args:
            minibatch: The minibatch of the training, e.g. ``(x, y)``.

        Returns:
            Whether it was observed.

        Raises:
            ValueError: If the model does not take the minibatch, or is not the one that it was.
        """
        if self._steps % self.observe_every:
            return False
        self._check_model("observe")
        with torch.enable_grad(), torch.autocast(self._parameters[0].device.type, enabled=False):
            self._running.observe(minibatch)
        return True

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """One step, with the gradients of the draws since the last one.

        Args:
            closure: Computes the loss of the minibatch and its gradients, and observes it; it is called for
                ``samples`` draws.

        Returns:
            What closure returned, the mean over its draws.

        Raises:
            ValueError: If there was no draw, nothing was observed yet, the matrix plus what is added to it is not
                positive, a parameter has no gradient, or one that is not finite, or the model is not the one that it
                was.
            RuntimeError: Inside of ``sampled()``.
        """
        self._draws.check_outside("step")
        loss = None if closure is None else in_draws(self, closure)
        if self._skipped():
            return loss
        self._check_model("step")
        self._draws.check_some()
        g = self._gradient()
        self._running.commit()
        self._running.renew(self._steps)
        if self.matrix is None:
            raise ValueError("step: nothing was observed yet: call observe(minibatch) before step()")
        w = self._flat(self._parameters)
        m = g + (self.tau / self.num_data) * self._of_layers("prior_precision") * w
        if self._kept is not None:
            m = self._of_layers("momentum") * self._kept + m
        try:
            d = self.matrix.solve(PVector(self.layer_collection, m), self._regul()).to_torch()
        except ValueError as error:
            raise ValueError(f"step: {error}: {_REMEDY}") from error
        d = self._team.share(d, 0, self._parameters[0].device)  # they differ by rounding
        self._add(-self._of_layers("lr") * d)
        self._keep(m)
        self._step_plainly()
        self._steps += 1
        self._draws.restart()
        return loss

    def zero_grad(self, set_to_none: bool = True) -> None:
        """As of other optimisers. Draws whose gradients it takes away are no draws of the step any more."""
        self._draws.restart()
        super().zero_grad(set_to_none)

    def _give_up(self) -> None:
        self._running.drop()
        self._draws.restart()

    def _regul(self) -> float | dict[str, float]:
        """gamma + tau delta/N."""
        share = self.tau / self.num_data
        return self._by_layer(lambda group: group["damping"] + share * group["prior_precision"])

    def _covariance_and_root(self) -> tuple[PMat, PMat]:
        of = (self.matrix, self.tau, self._regul())
        if self._made is None or self._made[0][0] is not of[0] or self._made[0][1:] != of[1:]:
            matrix, tau, regul = of
            if matrix is None:
                scaling = self.init_precision / self.num_data
                device = self._parameters[0].device
                matrix = PMatEye(self.layer_collection, scaling=scaling, dtype=self._dtype, device=device)
            try:
                covariance = (tau / self.num_data) * matrix.inv(regul)
                root = covariance.pow(0.5)
            except ValueError as error:
                raise ValueError(f"the covariance of the weights is not positive: {error}: {_REMEDY}") from error
            self._made = (of, covariance, root)
        return self._made[1], self._made[2]

    # What is kept

    def state_dict(self) -> dict[str, Any]:
        """All of it, as tensors and plain values: torch's part, and under "variational" what was observed, the matrix
        in use, the number of steps and the place in the random draws. Draws whose step was not made are not kept.
        """
        return {
            **super().state_dict(),
            "variational": {
                "format": self._PART[1],
                "steps": self._steps,
                "running": self._running.state_dict(),
                "generator": self._generator.get_state(),
            },
        }

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Go on from what :meth:`state_dict` gave, to the bit. The model has a state dict of its own.

        Raises:
            ValueError: If it is of an optimiser of something else, or damaged; then nothing has changed.
            RuntimeError: Inside of ``sampled()``.
        """
        self._draws.check_outside("load_state_dict")
        super().load_state_dict(state_dict)
        self._give_up()

    def _load(self, saved: Mapping[str, Any]) -> None:
        self._running.load_state_dict(saved["running"])

    def _loaded(self, saved: Mapping[str, Any]) -> None:
        self._generator.set_state(saved["generator"].cpu())
        self._steps, self._made = saved["steps"], None


_REMEDY = "use more prior_precision or damping, or a representation and a matrix that are positive, e.g. GGN or FIM"


def _likelihood_of(matrix: Callable[..., Any], options: Mapping[str, Any]) -> Any:
    """The likelihood that a matrix is of, or its name; None if that is not known."""
    known, given = parameters_of(matrix), {**getattr(matrix, "keywords", {}), **options}
    if "variant" in known:
        return given.get("variant", "classif_logits")
    loss = given.get("loss")
    return "classif_logits" if "loss" in known and (loss is None or isinstance(loss, nn.CrossEntropyLoss)) else None


def _of_each(
    prior_precision: float | Mapping[str, float], layer_collection: LayerCollection
) -> tuple[float, dict[str, dict[str, float]]]:
    """The precision of the prior that groups have, and what those of some layers have instead."""
    if not isinstance(prior_precision, Mapping):
        return arguments.number("prior_precision", prior_precision, least=0.0), {}
    odd = set(prior_precision) ^ set(layer_collection)
    if odd:
        raise ValueError(
            f"prior_precision: give one value for each layer; {', '.join(sorted(map(str, odd)))} do not match the "
            "collection"
        )
    return 0.0, {
        name: {"prior_precision": arguments.number(f"prior_precision of layer {name!r}", value, least=0.0)}
        for name, value in prior_precision.items()
    }
