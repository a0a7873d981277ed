"""The posterior of the parameters: a normal distribution around a trained model, of any of the matrices."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from . import arguments
from .accumulator import Accumulator
from .changes import no_grad
from .evidence import Evidence, Prior, checked_prior, plain_prior
from .generator import Generator
from .gram import joined, linearised
from .jacobian import of_outputs
from .likelihood import VARIANTS, Bernoulli, Categorical, Gaussian, Likelihood, Poisson, likelihood_of
from .linalg import gaussian
from .losses.targets import Targets, selected
from .memory import chunk_length
from .model import data as examples
from .object import PMat, PVector, at
from .objective import in_eval_mode

#: How the mean of y is computed.
HOW = ("probit", "mc", "samples", "bridge")
#: How many covariances of outputs are held at a time for one example while something is made of them.
_HELD = 4
#: The version of what :meth:`Posterior.save` writes.
FORMAT = 1


class Posterior:
    """The normal distribution of the parameters with mean w and precision ``(N F + prior_precision) / temperature``.

    F is the curvature of the mean loss over the N examples, in any representation, so that of the Laplace approximation
    with a prior ``N(0, 1 / prior_precision)``. Outputs are those of the model linearised at w, whose covariance for an
    example is ``J (precision)^-1 J^T``. Layers that F does not have are fixed: F of a part of the layers
    (``layer_collection=``) is the posterior of that part.

    A posterior is a value: :meth:`fit_prior` and :meth:`update` return another one.

    Args:
        model: The trained model. Predictions and the evidence are of it in eval mode, whatever mode it is in.
        matrix: F, a PMat; or an Accumulator of it, which :meth:`update` goes on with. It must be that of the likelihood
            (``variant=``), of the mean over examples, as the constructors make it.
        likelihood: What the outputs mean, a name as in :func:`~nngeometry.FIM` or a Likelihood. For regression
            ``Gaussian(variance)`` has the variance of the observation noise, 1 by default, in F and here. One that F is
            known not to be of is refused.
        num_data: N, the number of training examples. Of an Accumulator by default those that it has seen.
        prior_precision: Of the normal prior with mean zero, in units of the parameters: one number, or a dict of one
            for each layer.
        temperature: The posterior is colder below 1; the evidence is of the model and does not change.
        mean: w, by default the parameters of the model as they are now.
        data: The training data, which :meth:`log_marginal_likelihood` reads once for the likelihood at w.
        targets: What the likelihood receives beside the outputs, as in :func:`~nngeometry.EmpiricalFisher`.
        function: As in :func:`~nngeometry.FIM`.

    Raises:
        ValueError: If the precision is not positive definite, the accumulator has seen nothing, F is of another
            likelihood, or ``num_data`` is not the number of examples of the data.

    Example:
        >>> from nngeometry import FIM, PMatKFAC
        >>> model = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3))
        >>> train = torch.randn(20, 4), torch.randint(3, (20,))
        >>> posterior = Posterior(model, FIM(model, train, PMatKFAC), num_data=20, data=train)
        >>> posterior = posterior.fit_prior()
        >>> x = torch.randn(6, 4)
        >>> posterior.variance(x).shape, posterior.predict(x).shape
        (torch.Size([6, 3]), torch.Size([6, 3]))
        >>> with posterior.sampled(torch.Generator().manual_seed(0)):
        ...     f = model(x)

    Source: MacKay (1992), Neural Computation 4; Immer, Korzepa, Bauer (2021), 2008.08400, for the linearised model;
    Daxberger et al. (2021), 2106.14806.
    """

    @arguments.called_as
    def __init__(
        self,
        model: nn.Module,
        matrix: PMat | Accumulator,
        likelihood: str | Likelihood = "classif_logits",
        *,
        num_data: float | None = None,
        prior_precision: Prior = 1.0,
        temperature: float = 1.0,
        mean: PVector | None = None,
        data: Any = None,
        targets: Targets = None,
        function: Callable[..., Any] | None = None,
    ) -> None:
        arguments.model(model)
        arguments.function(function)
        if not isinstance(matrix, PMat | Accumulator):
            raise TypeError(
                f"matrix: expected a PMat or an Accumulator, got {arguments.described(matrix)}: make one, "
                "FIM(model, loader, PMatKFAC)"
            )
        running = matrix if isinstance(matrix, Accumulator) else None
        if running is not None and running.n == 0:
            raise ValueError("Posterior: the accumulator has seen nothing yet: call its update(loader) first")
        if num_data is None:
            if running is None:
                raise TypeError("num_data: a matrix is a mean, so say how many training examples there are")
            num_data = running.n
        arguments.variant(likelihood, Likelihood, list(VARIANTS))
        self.model = model
        self.accumulator = running
        self.matrix: PMat = matrix.matrix() if isinstance(matrix, Accumulator) else matrix
        self.likelihood = likelihood_of(likelihood)
        _check_same(self.matrix, self.likelihood)
        self._named = likelihood if isinstance(likelihood, str) else None
        self.num_data = arguments.number("num_data", num_data, above=0.0)
        self.temperature = arguments.number("temperature", temperature, above=0.0)
        self.function = function
        self._targets = targets
        self._data = data
        lc = self.matrix.layer_collection
        own = PVector.from_model(model, lc)  # raises for another model
        mean = own.clone() if mean is None else mean
        arguments.instance("mean", mean, PVector, "make one with PVector.from_model(model)")
        self.mean = mean.on(lc).detach().to(self.matrix.device, self.matrix.dtype)
        if not bool(self.mean.to_torch().isfinite().all()):
            raise ValueError("mean: the parameters are not finite: train the model with a smaller learning rate")
        self.prior_precision = checked_prior(prior_precision, self.matrix)
        self._evidence = Evidence(self.matrix, self.mean)
        self._evidence.check_definite(plain_prior(self.prior_precision), self.num_data)

    @property
    def layer_collection(self) -> Any:
        """The coordinates: the layers whose parameters are random."""
        return self.matrix.layer_collection

    @property
    def precision(self) -> PMat:
        """``(N F + prior_precision) / temperature``, the inverse of :attr:`covariance`."""
        return self.covariance.inv(0.0)

    @cached_property
    def covariance(self) -> PMat:
        """``temperature (N F + prior_precision)^-1``, in the structure of the representation."""
        prior, n = plain_prior(self.prior_precision), self.num_data
        regul = {name: d / n for name, d in prior.items()} if isinstance(prior, Mapping) else prior / n
        return self.matrix.inv(regul) * (self.temperature / self.num_data)

    # Draws

    def sample(self, k: int = 1, generator: torch.Generator | None = None) -> list[PVector]:
        """Draws of the parameters.

        Args:
            k: How many.
            generator: The source of randomness, by default torch's global one.
        """
        k = arguments.integer("k", k, least=0)
        with no_grad(), self._solving():
            return [self.mean + draw for draw in self.covariance.sample(generator, k)]

    @contextmanager
    def sampled(self, generator: torch.Generator | None = None) -> Iterator[PVector]:
        """Hold the model at one draw inside of a ``with`` block, see :func:`~nngeometry.at`.

        Args:
            generator: The source of randomness, by default torch's global one.

        Yields:
            The draw.
        """
        (draw,) = self.sample(1, generator)
        with at(self.model, self._cast(draw)):
            yield draw

    # Predictions

    def variance(self, x: Any, output: str = "diag") -> Tensor:
        """The variance of the linearised outputs, that of observation noise not included.

        Nothing of the size of Jacobians of all examples is made, and of linear layers none at all.

        Args:
            x: A tensor of inputs, a minibatch or a loader.
            output: "diag", of each output, in the shape of the outputs; or "full", the covariances of the C outputs of
                each example ``(n, C, C)``.
        """
        return self._linearised(x, output)[1]

    def information(self, x: Any) -> Tensor:
        """The information that an observation of y at x gives on the parameters, in nats: ``1/2 log det(1 + S^T V S)``
        with V the covariance of the linearised outputs and ``S S^T`` the curvature of the likelihood.

        Large for inputs unlike the training data: a score for detecting them, and for choosing what to label.

        Args:
            x: As in :meth:`variance`.

        Returns:
            ``(n,)``.

        Source: MacKay (1992), Neural Computation 4, 590-604; Houlsby et al. (2011), 1112.5745.
        """
        return self._of_covariances(x, self._information)

    def _information(self, f: Tensor, v: Tensor) -> Tensor:
        cotangents = self.likelihood.sqrt(f)
        s = cotangents.take(0, cotangents.count).reshape(cotangents.count, len(f), -1)
        inner = torch.einsum("rnc,ncd,snd->nrs", s, v, s)
        eye = torch.eye(inner.shape[1], dtype=f.dtype, device=f.device)
        return torch.linalg.slogdet(eye + inner)[1] / 2

    def predict(
        self, x: Any, how: str = "probit", samples: int = 100, generator: torch.Generator | None = None
    ) -> Tensor:
        """The mean of y given x: probabilities of classes, rates, or of regression the mean.

        (The variance of y in a regression is :meth:`variance` plus that of the noise.)

        Args:
            x: As in :meth:`variance`.
            how: "probit": of the linearised outputs, ``f / sqrt(1 + pi v / 8)`` for logits with variance v; exact for
                Gaussian and Poisson. "mc": the mean over draws of the linearised outputs, with their covariance.
                "samples": over draws of the parameters, of the model itself. "bridge": the Dirichlet distribution of
                the Laplace bridge, for classes; the farther off, the less alike the variances of logits are, and not
                the softmax where they vanish.
            samples: How many draws.
            generator: Of these.

        Returns:
            A tensor in the shape of the outputs.

        Source: MacKay (1992), Neural Computation 4; Hobbhahn, Kristiadi, Hennig (2022), 2003.01227, for the bridge.
        """
        arguments.one_of("how", how, HOW)
        samples = arguments.integer("samples", samples, least=1)
        arguments.generator(generator)
        if how == "samples":
            return self._averaged(x, samples, generator)
        if how == "bridge" and not isinstance(self.likelihood, Categorical):
            raise ValueError(
                f'how="bridge" is for classes, and the likelihood is {self.likelihood}: use how="probit" or "mc"'
            )
        if how == "probit":
            return self.likelihood.averaged(*self._linearised(x, "diag"))
        if how == "bridge":
            return self._of_covariances(x, _bridge)
        return self._of_covariances(x, lambda f, v: self._drawn(f, v, samples, generator))

    def _drawn(self, f: Tensor, v: Tensor, samples: int, generator: torch.Generator | None) -> Tensor:
        """The mean of y over draws of outputs."""
        l, q = torch.linalg.eigh(v)
        # The symmetric root: of equal eigenvalues, rounding alone tells which vectors are found.
        root = (q * l.clamp(min=0).sqrt().unsqueeze(1)) @ q.mT
        total = torch.zeros_like(f)
        for noise in gaussian(samples, f.numel(), like=f, generator=generator):
            draw = f + torch.einsum("ncd,nd->nc", root, noise.view(len(f), -1)).view(f.shape)
            total += self.likelihood.mean(draw)
        return total / samples

    def _outputs_of(self) -> Generator:
        return of_outputs(self.model, self.function, self.layer_collection)

    def _outputs(self, source: Generator, batches: list[examples.Batch]) -> Tensor:
        with no_grad():
            f = torch.cat([source.outputs(batch) for batch in batches])
        self._check_outputs(f)
        return f

    def _check_outputs(self, f: Tensor) -> None:
        """Raise unless the outputs are what the name of the likelihood says."""
        if self._named == "classif_binary_logits" and f.ndim == 2 and f.shape[1] > 1:
            raise ValueError(
                f'likelihood="classif_binary_logits" is of one logit for each example, and the model returns '
                f'{f.shape[1]}: pass "classif_logits" for one of {f.shape[1]} classes, or Bernoulli() for that many '
                "labels which are each there or not"
            )

    def _batches(self, x: Any, source: Generator, name: str = "x") -> list[examples.Batch]:
        arguments.loader(x, name)
        batches = examples.Minibatches(source.minibatches(x))
        if any(examples.count(batch) == 0 for batch in batches):
            raise ValueError(f"{name}: a minibatch of it has no example: pass at least one")
        return batches

    def _linearised(self, x: Any, output: str) -> tuple[Tensor, Tensor]:
        """Means and variances of the outputs."""
        arguments.one_of("output", output, ["diag", "full"])
        f, v = joined(self._each(x, output, lambda *pair: pair))
        return f, v.view(f.shape) if output == "diag" else v

    def _of_covariances(self, x: Any, of: Callable[[Tensor, Tensor], Tensor]) -> Tensor:
        """A function of the means and covariances ``(n, C, C)`` of the outputs, of so many examples at a time as these
        let; which go together does not depend on the minibatches.
        """
        return torch.cat(self._each(x, "full", of))

    def _each(self, x: Any, output: str, of: Callable[[Tensor, Tensor], Any]) -> list[Any]:
        """A function of means and variances of the outputs, for a few examples at a time."""
        source = self._outputs_of()
        batches = self._batches(x, source)
        n = sum(map(examples.count, batches))
        metric = self.covariance.to(source.device, source.dtype)

        def checked() -> Iterator[tuple[Tensor, Tensor]]:
            for f, v in linearised(source, batches, metric, output):
                self._check_outputs(f)
                yield f, v

        def together(v: Tensor) -> int:
            return chunk_length(_HELD * v[0].numel() * v.element_size(), n, v.device)

        with self._at_mean(), self._solving():
            return [of(f, v) for f, v in _regrouped(checked(), together)]

    @contextmanager
    def _solving(self) -> Iterator[None]:
        """Speak of the prior where the precision, known by its products alone, cannot be inverted."""
        try:
            yield
        except RuntimeError as error:
            if not self.matrix.matrix_free or not any(w in str(error) for w in ("positive definite", "residual")):
                raise
            prior = plain_prior(self.prior_precision)
            least = min(prior.values()) if isinstance(prior, Mapping) else prior
            raise ValueError(
                f"prior_precision: with {least:g} the precision is singular to working precision, as far as its "
                f"products tell: give a larger one ({error})"
            ) from error

    def _averaged(self, x: Any, samples: int, generator: torch.Generator | None) -> Tensor:
        source = self._outputs_of()
        batches = self._batches(x, source)
        total: Any = 0.0
        draws = self.sample(samples, generator)
        with in_eval_mode(self.model):
            for draw in draws:
                with at(self.model, self._cast(draw)):
                    total = total + self.likelihood.mean(self._outputs(source, batches))
        return total / samples

    @contextmanager
    def _at_mean(self) -> Iterator[None]:
        """Hold the model at the mean, in eval mode, whatever mode it is in."""
        with at(self.model, self._cast(self.mean)), in_eval_mode(self.model):
            yield

    def _cast(self, vector: PVector) -> PVector:
        """A vector in the dtype and on the device of the model."""
        own = PVector.from_model(self.model, self.layer_collection)
        return vector.to(own.device, own.dtype)

    # Evidence

    def log_likelihood(self, noise: float | Tensor | None = None) -> Tensor:
        """``log p(data | w)``, summed over the training data, which are read once.

        Args:
            noise: Another variance of the observations than that of the likelihood, for regression.
        """
        value, count = self._fit
        if noise is None:
            return value
        s, own = self._noise(noise), self._own_noise()
        squares = -2 * own * (value + count / 2 * math.log(2 * math.pi * own))
        return -squares / (2 * s) - count / 2 * (2 * math.pi * s).log()

    def log_marginal_likelihood(
        self, prior_precision: Prior | None = None, noise: float | Tensor | None = None
    ) -> Tensor:
        """The evidence ``log p(data)`` of the Laplace approximation, differentiable in the prior and in the noise:
        ``log p(data | w) - 1/2 (w . d w + log det(N F + d) - log det d)`` with d the prior precision.

        It is exact for a linear model with Gaussian noise and F in an exact representation. Eigenvalues are computed
        once, so that more values cost next to nothing; for a prior for each layer with a matrix that couples layers it
        is a decomposition each.

        Args:
            prior_precision: Another one than that of the posterior, to be differentiated with respect to.
            noise: Another variance of the observations, for regression.

        Returns:
            A scalar.

        Raises:
            ValueError: Without ``data``, for a prior of zero, or if ``N F + d`` is not positive definite.

        Source: Immer et al. (2021), 2104.04975.
        """
        prior = self.prior_precision if prior_precision is None else checked_prior(prior_precision, self.matrix)
        scale = self.num_data if noise is None else self.num_data * self._own_noise() / self._noise(noise)
        return self.log_likelihood(noise) - self._evidence.complexity(prior, scale) / 2

    def fit_prior(self, per_layer: bool = False) -> Posterior:
        """The posterior with the prior precision that has the largest evidence.

        For one precision d that is the only root of ``sum_i l_i / (l_i + d) = d |w|^2``, with l the eigenvalues of
        N F.

        Args:
            per_layer: A precision for each layer.

        Returns:
            Another posterior.

        Raises:
            ValueError: If there is no such precision: parameters of zero, or a layer without curvature.

        Source: MacKay (1992), Neural Computation 4, 415-447.
        """
        arguments.flag("fit_prior: per_layer", per_layer)
        return self._with(prior_precision=self._evidence.best(self.num_data, per_layer))

    @cached_property
    def _fit(self) -> tuple[Tensor, int]:
        """The log-likelihood of the training data and how many targets there are."""
        if self._data is None:
            raise ValueError("log_marginal_likelihood: pass the training data, Posterior(..., data=loader)")
        return self._likelihood_of(self._data, self.num_data)

    def _likelihood_of(self, loader: Any, expected: float) -> tuple[Tensor, int]:
        source, given = self._outputs_of(), selected(self._targets)
        values: list[Tensor] = []
        seen = count = 0
        with self._at_mean(), no_grad():
            for batch in source.minibatches(loader):
                y = given(batch)
                if len(y) != 1:
                    raise ValueError(
                        f"data: minibatches have {len(y)} targets, expected one: pass (x, y), or say which with "
                        "targets="
                    )
                f = source.outputs(batch)
                self._check_outputs(f)
                values.append(self.likelihood.log_prob(f, y[0]).sum())
                seen, count = seen + len(f), count + f.numel()
        if abs(seen - expected) > 1e-6 * expected:
            raise ValueError(f"data: there are {seen} examples, and num_data is {expected:g}: give the same number")
        return torch.stack(values).sum().to(self.matrix.device, self.matrix.dtype), count

    # New data, files

    def update(self, loader: Any) -> Posterior:
        """The posterior after more data: their curvature at w is added, and their number. The mean stays w.

        Args:
            loader: The new examples, as for the matrix.

        Returns:
            Another posterior; this one and its accumulator stay as they are.

        Raises:
            TypeError: Unless the posterior is of an Accumulator.
        """
        if self.accumulator is None:
            raise TypeError(
                "update: a matrix does not say how it is made of more data: make the posterior of an Accumulator, "
                "Posterior(model, Accumulator(FIM, model, PMatKFAC).update(loader))"
            )
        theirs, lc = self.accumulator.model, self.layer_collection
        if any(a is not b for a, b in zip(lc.parameters(theirs), lc.parameters(self.model), strict=True)):
            raise ValueError(
                "update: the accumulator runs another model than that of the posterior: make both of the same one"
            )
        batches = self._batches(loader, self._outputs_of(), "loader")
        running = copy.deepcopy(self.accumulator)
        with at(self.model, self._cast(self.mean)):
            running.update(batches)
        added, matrix = running.n - self.accumulator.n, running.matrix()
        made = self._with(
            accumulator=running,
            matrix=matrix,
            num_data=self.num_data + added,
            _evidence=Evidence(matrix, self.mean),
            _data=None,
        )
        vars(made).pop("_fit", None)
        if self._data is not None or "_fit" in vars(self):
            value, count = self._likelihood_of(batches, added)
            vars(made)["_fit"] = self._fit[0] + value, self._fit[1] + count
        made._evidence.check_definite(plain_prior(made.prior_precision), made.num_data)
        return made

    def save(self, path: str | Path) -> None:
        """Write all but the model, the accumulator and functions of yours to a file that :meth:`load` reads.

        Args:
            path: Where to write the file.
        """
        arguments.path("save: path", path, "where to write the file")
        fit = None if self._data is None and "_fit" not in vars(self) else [self._fit[0], self._fit[1]]
        known = type(self.likelihood).__name__ if type(self.likelihood) in _OURS.values() else None
        saved = {
            "format": FORMAT,
            "posterior": self.matrix.state(),
            "mean": self.mean.to_torch(),
            "likelihood": known and [known, vars(self.likelihood)],
            "prior_precision": plain_prior(self.prior_precision),
            "num_data": self.num_data,
            "temperature": self.temperature,
            "fit": fit,
        }
        with open(path, "wb") as file:
            torch.save(saved, file)

    @staticmethod
    def load(
        path: str | Path,
        model: nn.Module,
        likelihood: str | Likelihood | None = None,
        *,
        function: Callable[..., Any] | None = None,
        device: torch.device | str | None = None,
    ) -> Posterior:
        """Read what :meth:`save` wrote. Only tensors and plain values are read, no code is run.

        Args:
            path: Of the file.
            model: The model, whose parameters may have any values.
            likelihood: If it is of a class of yours, which files do not hold.
            function: If there was one.
            device: Where to put it.
        """
        arguments.path("Posterior.load: path", path, "of a file that save(path) wrote")
        arguments.device(device)
        with open(path, "rb") as file:
            try:
                saved = torch.load(file, map_location=device, weights_only=True)
            except Exception as error:
                raise ValueError(f"Posterior.load: {path} is not a file that Posterior.save wrote") from error
        if not isinstance(saved, dict) or "posterior" not in saved or saved.get("format") != FORMAT:
            raise ValueError(
                f"Posterior.load: {path} does not hold a posterior of format {FORMAT}, the one that this version reads"
            )
        matrix = PMat.from_state(saved["posterior"], f"Posterior.load: {path}", f"Posterior.load: {path} is damaged")
        if likelihood is None:
            if saved["likelihood"] is None:
                raise ValueError("Posterior.load: the likelihood is a class of yours, which files do not hold: pass it")
            name, values = saved["likelihood"]
            likelihood = _OURS[name](**values)
        made = Posterior(
            model,
            matrix,
            likelihood,
            num_data=saved["num_data"],
            prior_precision=saved["prior_precision"],
            temperature=saved["temperature"],
            mean=PVector(matrix.layer_collection, saved["mean"]),
            function=function,
        )
        if saved["fit"] is not None:
            vars(made)["_fit"] = (saved["fit"][0], saved["fit"][1])
        return made

    def __repr__(self) -> str:
        prior = self.prior_precision
        shown = "of each layer" if isinstance(prior, Mapping) else f"{float(prior):.4g}"
        return (
            f"Posterior({type(self.matrix).__name__} of {self.matrix.size(0)} parameters, {self.likelihood}, "
            f"num_data={self.num_data:g}, prior_precision={shown}, temperature={self.temperature:g})"
        )

    # Helpers

    def _with(self, **changes: Any) -> Posterior:
        """The same with other values; what depends on the prior is made anew."""
        made = object.__new__(Posterior)
        made.__dict__.update(vars(self))
        vars(made).pop("covariance", None)
        made.__dict__.update(changes)
        return made

    def _tensor(self, value: Any) -> Tensor:
        return torch.as_tensor(value, dtype=self.matrix.dtype, device=self.matrix.device).reshape(())

    def _own_noise(self) -> float:
        if not isinstance(self.likelihood, Gaussian):
            raise ValueError(f"noise: is that of a regression, and the likelihood is {self.likelihood}: leave it out")
        return self.likelihood.variance

    def _noise(self, noise: Any) -> Tensor:
        self._own_noise()
        arguments.number("noise", noise.detach() if isinstance(noise, Tensor) else noise, above=0.0)
        return self._tensor(noise)


def _check_same(matrix: PMat, likelihood: Likelihood) -> None:
    """Raise if a matrix is known to be that of another likelihood."""
    of = getattr(matrix.generator, "likelihood", None)
    noises = [one.variance for one in (of, likelihood) if isinstance(one, Gaussian)]
    if of is not None and (type(of) is not type(likelihood) or len(set(noises)) > 1):
        raise ValueError(
            f"likelihood: the matrix is that of {of}, and the posterior of {likelihood}: give both the same, "
            "FIM(..., variant=likelihood) and Posterior(..., likelihood)"
        )


_OURS: dict[str, Any] = {of.__name__: of for of in (Bernoulli, Categorical, Gaussian, Poisson)}


def _regrouped(
    pieces: Iterable[tuple[Tensor, Tensor]], together: Callable[[Tensor], int]
) -> Iterator[tuple[Tensor, Tensor]]:
    """Pairs of tensors of the same examples, ``together(second)`` of them at a time."""
    held: list[tuple[Tensor, Tensor]] = []
    for pair in pieces:
        held.append(pair)
        few = together(pair[1])
        if sum(len(f) for f, _ in held) < few:
            continue
        f, v = joined(held)
        whole = len(f) // few * few
        yield from zip(f[:whole].split(few), v[:whole].split(few), strict=True)
        held = [(f[whole:], v[whole:])]
    f, v = joined(held)
    if len(f):
        yield f, v


def _bridge(f: Tensor, v: Tensor) -> Tensor:
    """The mean of the Dirichlet distribution whose softmax basis has normal logits f ``(n, K)`` with covariances v
    ``(n, K, K)``, both first conditioned on logits that sum to zero.
    """
    if f.ndim != 2:
        raise ValueError(f'how="bridge" is for outputs (n, K), got {tuple(f.shape)}: use how="mc"')
    k = f.shape[1]
    total = v.sum((1, 2)).clamp(min=torch.finfo(f.dtype).tiny)
    f = f - v.sum(2) * (f.sum(1) / total).unsqueeze(1)
    v = v - torch.einsum("ni,nj->nij", v.sum(2), v.sum(1)) / total.view(-1, 1, 1)
    # alpha_i = (1 - 2 / K + exp(f_i) / K^2 sum_j exp(-f_j)) / v_ii, in log space
    log = f + (-f).logsumexp(1, keepdim=True) - 2 * math.log(k)
    constant = torch.full_like(log, 1 - 2 / k).log()
    tiny = torch.finfo(f.dtype).eps * v.diagonal(dim1=1, dim2=2).amax(1, keepdim=True) + torch.finfo(f.dtype).tiny
    alpha = torch.logaddexp(log, constant) - v.diagonal(dim1=1, dim2=2).clamp(min=tiny).log()
    return alpha.softmax(1)


__test__ = {Posterior.__name__: Posterior.__doc__ or ""}
