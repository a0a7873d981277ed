"""What the output of a model means: likelihoods give the curvature of the output space and sample from it.

A likelihood never sees the model: it turns an output f into *cotangents* s_c with ``sum_c s_c s_c^T`` equal
to (or, for samples, an unbiased estimate of) the Fisher information of p(y | f) with respect to f. An example is
one row of f; whatever further axes f has (pixels, tokens) are independent given f, so that the log-likelihood of
an example is the sum over them.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NoReturn

import torch
from torch import Tensor, nn

from . import arguments
from .spelling import warn

__all__ = [
    "VARIANTS",
    "Bernoulli",
    "Categorical",
    "Cotangents",
    "Elementwise",
    "Gaussian",
    "Likelihood",
    "Poisson",
    "diagonal_cotangents",
    "each_output",
    "likelihood_of",
]


@dataclass(frozen=True)
class Cotangents:
    """``count`` vectors in output space for each example, made a slice at a time.

    Args:
        count: How many there are, C.
        take: From ``(start, stop)`` to these cotangents, ``(stop - start, B, *out)``.
        shared: Whether they are the same for all examples, and held once. By default not.

    Example:
        >>> Cotangents.of(torch.ones(3, 5, 2)).narrow(1, 4).take(0, 2).shape
        torch.Size([2, 3, 2])
    """

    count: int
    take: Callable[[int, int], Tensor]
    shared: bool = False

    @classmethod
    def of(cls, s: Tensor) -> Cotangents:
        """All of them at once.

        Args:
            s: The cotangents ``(C, B, *out)``.
        """
        return cls(s.shape[0], lambda start, stop: s[start:stop])

    @classmethod
    def joined(cls, several: Sequence[Cotangents]) -> Cotangents:
        """Those of several minibatches, as many for each, laid end to end.

        Args:
            several: The cotangents of each minibatch.
        """
        for one in several:
            as_cotangents(one)
        if len(several) == 1:
            return several[0]
        return cls(several[0].count, lambda start, stop: torch.cat([c.take(start, stop) for c in several], 1))

    def narrow(self, first: int, last: int) -> Cotangents:
        """Those of some examples, cut out of those of all.

        Args:
            first: The first of the examples.
            last: The end of them, which is not included.
        """
        return Cotangents(self.count, lambda start, stop: self.take(start, stop)[:, first:last], self.shared)


def as_cotangents(found: Any) -> Cotangents:
    """What a likelihood or the user's function gives as cotangents, checked to be some."""
    if not isinstance(found, Cotangents):
        raise TypeError(
            f"cotangents: expected Cotangents, got {arguments.described(found)}: the sqrt and sample of a Likelihood, "
            "and the function of a Generator, return Cotangents.of(s) with s of shape (C, *outputs)"
        )
    return found


def diagonal_cotangents(scale: Tensor) -> Cotangents:
    """Cotangents of a diagonal square root: for each element of an example's output, ``scale`` there and zero
    elsewhere.

    Args:
        scale: The diagonal of the square root, ``(B, *out)``.

    Returns:
        As many cotangents as an output has elements.

    Example:
        >>> diagonal_cotangents(torch.tensor([[2.0, 3.0]])).take(0, 2)[:, 0]
        tensor([[2., 0.],
                [0., 3.]])
    """
    flat = scale.reshape(len(scale), -1)

    def take(start: int, stop: int) -> Tensor:
        s = flat.new_zeros(stop - start, *flat.shape)
        c = torch.arange(stop - start, device=scale.device)
        s[c, :, start + c] = flat[:, start:stop].T
        return s.view(-1, *scale.shape)

    return Cotangents(flat.shape[1], take)


def each_output(f: Tensor) -> Cotangents:
    """One cotangent for each element of an output, one there and zero elsewhere: those of the Jacobian itself. They are
    the same for all examples, and held once.

    Args:
        f: Outputs ``(B, *out)``.

    Example:
        >>> each_output(torch.zeros(5, 2)).take(0, 2)[:, 4]
        tensor([[1., 0.],
                [0., 1.]])
    """
    count = f[0].numel()

    def take(start: int, stop: int) -> Tensor:
        s = f.new_zeros(stop - start, count)
        c = torch.arange(stop - start, device=f.device)
        s[c, start + c] = 1.0
        return s.view(-1, 1, *f.shape[1:]).expand(-1, *f.shape)

    return Cotangents(count, take, shared=True)


class Likelihood(ABC):
    """A family of distributions p(y | f) of the targets given the output f of a model.

    A subclass gives the three methods :meth:`sqrt`, :meth:`sample` and :meth:`hvp`, which are of one matrix, the Fisher
    information H of f; or is an :class:`Elementwise`, which takes two. An instance is passed as ``variant``.
    """

    @abstractmethod
    def sqrt(self, f: Tensor) -> Cotangents:
        """The columns of a square root S of the Fisher information of f: ``H = S S^T`` exactly.

        Args:
            f: Outputs ``(B, *out)``.

        Returns:
            The columns, each ``(B, *out)``.
        """

    @abstractmethod
    def sample(self, f: Tensor, trials: int, generator: torch.Generator | None = None) -> Cotangents:
        """Scores ``d log p(y | f) / df`` of draws of y from p(y | f), divided by the root of their number, so that
        ``E S S^T = H``.

        Args:
            f: Outputs ``(B, *out)``.
            trials: How many draws there are for each example.
            generator: The source of randomness, by default torch's global one.

        Returns:
            As many cotangents as there are trials.
        """

    def samples(self, several: Sequence[Tensor], trials: int, generators: Sequence[torch.Generator]) -> Cotangents:
        """:meth:`sample` of each of several outputs from a generator of its own, laid end to end.

        Args:
            several: Outputs ``(B_k, *out)``, one for each minibatch.
            trials: How many draws there are for each example.
            generators: One for each minibatch.
        """
        return Cotangents.joined([self.sample(f, trials, g) for f, g in zip(several, generators, strict=True)])

    @abstractmethod
    def hvp(self, f: Tensor, u: Tensor) -> Tensor:
        """The product ``H u`` for each example.

        Args:
            f: Outputs ``(B, *out)``.
            u: Vectors in their shape.

        Returns:
            A tensor in the shape of f.
        """

    # What curvature has no need of, and predictions and evidence have.

    def log_prob(self, f: Tensor, y: Tensor) -> Tensor:
        """``log p(y | f)`` of each example, normalised, summed over its positions.

        Args:
            f: Outputs ``(n, *out)``.
            y: Targets, one for each position.

        Returns:
            A tensor ``(n,)``.
        """
        self._lacks("log_prob(f, y)", "log p(y | f) of each example")

    def mean(self, f: Tensor) -> Tensor:
        """The mean of y given f: probabilities of classes, rates, or f itself.

        Args:
            f: Outputs ``(n, *out)``.

        Returns:
            A tensor in the shape of f.
        """
        self._lacks("mean(f)", "the mean of y given f")

    def averaged(self, f: Tensor, variance: Tensor) -> Tensor:
        """The mean of :meth:`mean` over normal outputs, in closed form, or as is usual where there is none.

        Args:
            f: The means of the outputs, ``(n, *out)``.
            variance: Their variances, in the same shape.

        Returns:
            A tensor in the shape of f.
        """
        self._lacks("averaged(f, variance)", "the mean of y for normal outputs")

    def _lacks(self, method: str, what: str) -> NoReturn:
        raise NotImplementedError(
            f"{type(self).__name__} does not say {what}: give the class a method {method}, see nngeometry.Poisson"
        )


class Elementwise(Likelihood):
    """A family in which the elements of f are independent, so that the Fisher information is diagonal.

    A subclass gives :meth:`scale` and :meth:`score`, which act entry by entry; the rest follows.

    Example:
        >>> class Laplace(Elementwise):
        ...     "Real targets f + e with density exp(-|e|) / 2: H = I."
        ...     def scale(self, f):
        ...         return torch.ones_like(f)
        ...     def score(self, f, generator):
        ...         return torch.randint(2, f.shape, generator=generator, device=f.device).to(f) * 2 - 1
        >>> Laplace().sample(torch.zeros(5, 2), trials=3).count
        3
    """

    @abstractmethod
    def scale(self, f: Tensor) -> Tensor:
        """The square root of the Fisher information of each element.

        Args:
            f: Outputs ``(B, *out)``.

        Returns:
            A tensor in the shape of f.
        """

    @abstractmethod
    def score(self, f: Tensor, generator: torch.Generator | None) -> Tensor:
        """The score ``d log p(y | f) / df`` of one draw of y for each element.

        Args:
            f: Outputs, of any shape: trials are a further axis in front.
            generator: The source of randomness; None is torch's global one.

        Returns:
            A tensor in the shape of f.
        """

    def sqrt(self, f: Tensor) -> Cotangents:
        return diagonal_cotangents(self.scale(f))

    def sample(self, f: Tensor, trials: int, generator: torch.Generator | None = None) -> Cotangents:
        draws = f.detach().expand(trials, *f.shape)
        return Cotangents.of(self.score(draws, generator) / trials**0.5)

    def hvp(self, f: Tensor, u: Tensor) -> Tensor:
        return self.scale(f).square() * u

    def log_density(self, f: Tensor, y: Tensor) -> Tensor:
        """``log p(y | f)`` of each element.

        Args:
            f: Outputs, of any shape.
            y: Targets in their shape.

        Returns:
            A tensor in the shape of f.
        """
        self._lacks("log_density(f, y)", "log p(y | f) of each element")

    def log_prob(self, f: Tensor, y: Tensor) -> Tensor:
        y = _like(y, f, type(self).__name__)
        self.check_targets(y)
        return self.log_density(f, y).reshape(len(f), -1).sum(1)

    def check_targets(self, y: Tensor) -> None:
        """Raise ``ValueError`` unless targets are of the family. By default all are.

        Args:
            y: Targets, in the dtype of the outputs.
        """


def _like(y: Any, f: Tensor, who: str) -> Tensor:
    """Targets in the shape and dtype of the outputs, (n,) and (n, 1) being the same."""
    arguments.instance("targets", y, Tensor, "pass minibatches (x, y)")
    if y.numel() != f.numel() or y.shape[:1] != f.shape[:1] or (y.shape != f.shape and f[0].numel() != 1):
        raise ValueError(
            f"{who}: targets of shape {tuple(y.shape)} for outputs {tuple(f.shape)}: it expects one for each output"
        )
    return y.reshape(f.shape).to(f.dtype)


#: Of the variance of a normal logit in its probit approximation (MacKay 1992).
_PROBIT = math.pi / 8


@dataclass(frozen=True)
class Gaussian(Elementwise):
    """Real targets with mean f: H = I / variance.

    Args:
        variance: The variance of a target about f, positive, by default 1.

    Raises:
        ValueError: If the variance is not positive.

    Example:
        >>> Gaussian().sqrt(torch.zeros(5, 2)).count
        2
    """

    variance: float = 1.0

    def __post_init__(self) -> None:
        if not arguments.number("Gaussian: variance", self.variance) > 0:
            raise ValueError(f"Gaussian: variance must be positive, got {self.variance}")

    def scale(self, f: Tensor) -> Tensor:
        return torch.full_like(f, self.variance**-0.5)

    def score(self, f: Tensor, generator: torch.Generator | None) -> Tensor:
        noise = torch.randn(f.shape, dtype=f.dtype, device=f.device, generator=generator)
        return noise * self.variance**-0.5

    def log_density(self, f: Tensor, y: Tensor) -> Tensor:
        return -(y - f).square() / (2 * self.variance) - math.log(2 * math.pi * self.variance) / 2

    def mean(self, f: Tensor) -> Tensor:
        return f

    def averaged(self, f: Tensor, variance: Tensor) -> Tensor:
        return f


@dataclass(frozen=True)
class Bernoulli(Elementwise):
    """Binary targets with logit f, one for each element of f: H = diag(p (1 - p)).

    Example:
        >>> float(Bernoulli().hvp(torch.zeros(1, 1), torch.ones(1, 1)))
        0.25
    """

    def scale(self, f: Tensor) -> Tensor:
        # In log space, because p (1 - p) loses all digits where p rounds to one.
        return torch.exp((nn.functional.logsigmoid(f) + nn.functional.logsigmoid(-f)) / 2)

    def score(self, f: Tensor, generator: torch.Generator | None) -> Tensor:
        p = f.sigmoid()
        return torch.bernoulli(p, generator=generator) - p

    def check_targets(self, y: Tensor) -> None:
        if not bool(((y >= 0) & (y <= 1)).all()):
            raise ValueError(
                f"Bernoulli: targets are 0 or 1 (or between, as probabilities), got {float(y.min()):g} to "
                f"{float(y.max()):g}: use Categorical for classes"
            )

    def log_density(self, f: Tensor, y: Tensor) -> Tensor:
        return -nn.functional.binary_cross_entropy_with_logits(f, y, reduction="none")

    def mean(self, f: Tensor) -> Tensor:
        return f.sigmoid()

    def averaged(self, f: Tensor, variance: Tensor) -> Tensor:
        return (f / (1 + _PROBIT * variance).sqrt()).sigmoid()


@dataclass(frozen=True)
class Poisson(Elementwise):
    """Counts with log-rate f, as in ``nn.PoissonNLLLoss(log_input=True)``: H = diag(exp f).

    Example:
        >>> float(Poisson().hvp(torch.zeros(1, 1), torch.ones(1, 1)))
        1.0
    """

    def scale(self, f: Tensor) -> Tensor:
        return torch.exp(f / 2)

    def score(self, f: Tensor, generator: torch.Generator | None) -> Tensor:
        rate = f.exp()
        return torch.poisson(rate, generator=generator) - rate

    def check_targets(self, y: Tensor) -> None:
        if not bool((y >= 0).all()):
            raise ValueError(f"Poisson: targets are counts, got {float(y.min()):g}: use Gaussian for real numbers")

    def log_density(self, f: Tensor, y: Tensor) -> Tensor:
        return y * f - f.exp() - torch.lgamma(y + 1)

    def mean(self, f: Tensor) -> Tensor:
        return f.exp()

    def averaged(self, f: Tensor, variance: Tensor) -> Tensor:
        return (f + variance / 2).exp()


@dataclass(frozen=True)
class Categorical(Likelihood):
    """One of K classes with logits f along one axis: H = diag(p) - p p^T. The other axes are independent positions.

    The square root is the triangular one with K - 1 columns of Tanabe and Sagae, computed in log space so that no p
    underflows: column i is ``sqrt(p_i P(j>i) / P(j>=i)) (e_i - softmax(f_j; j > i))``.

    Args:
        dim: The axis of the classes, by default 1, as in ``nn.CrossEntropyLoss``.
        positions: Whether there may be further axes, by default True; outputs that have some are refused otherwise.

    Raises:
        ValueError: For outputs without such an axis, or with fewer than two classes.

    Example:
        >>> Categorical().sqrt(torch.zeros(5, 10)).count
        9

    Source:
        Tanabe and Sagae (1992), J. R. Stat. Soc. B 54.
    """

    dim: int = 1
    positions: bool = True

    def __post_init__(self) -> None:
        arguments.integer("Categorical: dim", self.dim, least=-(2**62))
        arguments.flag("Categorical: positions", self.positions)

    def _rows(self, f: Tensor) -> Tensor:
        """``(B, positions, K)``."""
        if not self.positions and f.ndim != 2:
            raise ValueError(
                f'variant="classif_logits" expects outputs (n, K), got {tuple(f.shape)}: for several positions use '
                '"segmentation_logits" (n, K, ...) or Categorical(dim=-1) (n, ..., K)'
            )
        if f.ndim < 2:
            raise ValueError(
                f"Categorical: logits of shape {tuple(f.shape)} have no axis of classes; use Bernoulli for single "
                "logits"
            )
        if not -f.ndim < self.dim < f.ndim or self.dim == 0:
            raise ValueError(
                f"Categorical: there is no axis of classes dim={self.dim} in outputs of shape {tuple(f.shape)}, of "
                "which the first is that of examples: pass e.g. dim=1 or dim=-1"
            )
        rows = f.movedim(self.dim, -1)
        if rows.shape[-1] < 2:
            raise ValueError(
                f"Categorical: axis {self.dim} of the output has {rows.shape[-1]} class, it needs at least 2; "
                'use Bernoulli() or variant="classif_binary_logits" for a single logit'
            )
        return rows.reshape(f.shape[0], -1, rows.shape[-1])

    def _unrows(self, s: Tensor, f: Tensor) -> Tensor:
        """``(..., B, positions, K)`` back to ``(..., *f.shape)``."""
        shape = f.movedim(self.dim, -1).shape
        dim = self.dim if self.dim < 0 else self.dim - f.ndim
        return s.reshape(*s.shape[:-3], *shape).movedim(-1, dim)

    def sqrt(self, f: Tensor) -> Cotangents:
        rows = self._rows(f)
        rows = rows - rows.amax(-1, keepdim=True)  # large logits would cost digits in the differences below
        n, positions, k = rows.shape
        tail = rows.flip(-1).logcumsumexp(-1).flip(-1)  # log sum_{j >= i} exp f_j
        scale = ((rows - tail[..., :1])[..., :-1] + tail[..., 1:] - tail[..., :-1]).div(2).exp()
        classes = torch.arange(k, device=f.device)

        def take(start: int, stop: int) -> Tensor:
            c = torch.arange(start, stop, device=f.device)
            where, i = c // (k - 1), c % (k - 1)
            logits = rows.movedim(1, 0) if positions == 1 else rows[:, where].movedim(1, 0)  # (c or 1, B, K)
            rest = logits - tail[:, where, i + 1].T.contiguous().unsqueeze(-1)  # (c, B, K), of which few are made
            column = rest.masked_fill_(classes <= i.view(-1, 1, 1), -torch.inf).exp_().neg()
            del rest
            column[torch.arange(stop - start, device=f.device), :, i] = 1.0  # where rest had nothing
            column *= scale[:, where, i].T.unsqueeze(-1)
            if positions == 1:
                return self._unrows(column.unsqueeze(2), f)
            s = rows.new_zeros(stop - start, n, positions, k)
            s[torch.arange(stop - start, device=f.device), :, where] = column
            return self._unrows(s, f)

        return Cotangents(positions * (k - 1), take)

    def sample(self, f: Tensor, trials: int, generator: torch.Generator | None = None) -> Cotangents:
        return self.samples([f], trials, [generator])

    def samples(
        self, several: Sequence[Tensor], trials: int, generators: Sequence[torch.Generator | None]
    ) -> Cotangents:
        f = several[0] if len(several) == 1 else torch.cat(list(several))
        rows = self._rows(f)
        p = rows.softmax(-1)
        cdf = p.double().cumsum(-1)
        shapes = [(len(one), rows.shape[1], trials) for one in several]
        each = zip(shapes, generators, strict=True)
        u = torch.cat([torch.rand(s, dtype=cdf.dtype, device=f.device, generator=g) for s, g in each])
        y = torch.searchsorted(cdf, u * cdf[..., -1:], right=True).movedim(-1, 0)  # never a class of probability zero
        score = nn.functional.one_hot(y, rows.shape[-1]) - p
        return Cotangents.of(self._unrows(score / trials**0.5, f))

    def hvp(self, f: Tensor, u: Tensor) -> Tensor:
        p = f.softmax(self.dim)
        return p * u - p * (p * u).sum(self.dim, keepdim=True)

    def log_prob(self, f: Tensor, y: Tensor) -> Tensor:
        self._rows(f)  # that there is an axis of classes
        arguments.instance("targets", y, Tensor, "pass minibatches (x, y) with classes y")
        logits = f.movedim(self.dim, 1)
        arguments.labels(nn.CrossEntropyLoss(), logits, (y,))
        return -nn.functional.cross_entropy(logits, y, reduction="none").reshape(len(f), -1).sum(1)

    def mean(self, f: Tensor) -> Tensor:
        self._rows(f)
        return f.softmax(self.dim)

    def averaged(self, f: Tensor, variance: Tensor) -> Tensor:
        return self.mean(f / (1 + _PROBIT * variance).sqrt())


#: The names of NNGeometry for the likelihoods.
VARIANTS: dict[str, Likelihood] = {
    "classif_logits": Categorical(positions=False),
    "classif_logsoftmax": Categorical(positions=False),  # log-probabilities are logits
    "classif_binary_logits": Bernoulli(),
    "regression": Gaussian(),
    "segmentation_logits": Categorical(),
}


def of_covariance(variant: str | Likelihood, covariance: Any) -> Gaussian:
    """``FIM_MonteCarlo(variant="regression", covariance=c)``: c times the matrix, as of targets of variance 1 / c."""
    warn("covariance=c", "variant=Gaussian(1 / c)")
    if variant != "regression":
        raise ValueError(f"covariance= is for variant='regression', got variant={variant!r}: leave it out")
    values = torch.as_tensor(covariance)
    if values.numel() != 1 or float(values) <= 0:
        raise ValueError(f"covariance={covariance!r}: expected one positive number, the same for all outputs")
    return Gaussian(1 / float(values))


def likelihood_of(variant: str | Likelihood) -> Likelihood:
    """A :class:`Likelihood` as it is, or the one that a variant's name stands for.

    Args:
        variant: A likelihood, or one of the names in ``VARIANTS``.

    Raises:
        ValueError: For a name that is none of these.
    """
    if isinstance(variant, Likelihood):
        return variant
    if variant in VARIANTS:
        return VARIANTS[variant]
    raise ValueError(f"variant={variant!r} is unknown: use one of {', '.join(VARIANTS)}, or a Likelihood object")
