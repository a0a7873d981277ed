"""The mean of the matrices of minibatches and their spread around it: exactly, or by products with random vectors."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from .linalg import Estimate
from .linalg.base import gaussian, orthonormal_rows, sphere, widening
from .model import data
from .object import PMat

#: The share of the random vectors that find the directions in which the curvature is computed exactly, and how often M
#: is applied to them. Once leaves out directions in which M is large: |M|^2 then has outliers that errors know not of.
_SKETCHED, POWER = 1 / 3, 2


class Moments:
    """Mean and summed squared distance from it, of tensors that come one after another."""

    def __init__(self) -> None:
        self.count = 0
        self.mean = self.spread = torch.zeros(())

    def add(self, x: Tensor) -> None:
        self.count += 1
        if self.count == 1:
            self.mean, self.spread = x.clone(), torch.zeros_like(x)
            return
        away = x - self.mean
        self.mean = self.mean + away / self.count
        self.spread = self.spread + away * (x - self.mean)


@dataclass(frozen=True)
class Samples:
    """Of a block: what is known exactly of trace, |M|^2 and variance ``(3,)``, and samples of the rest ``(m, 3)``."""

    known: Tensor
    samples: Tensor
    products: int


def exact(
    of: Callable[[data.Batch], PMat], minibatches: Callable[[], Iterator[data.Batch]], names: Sequence[str | None]
) -> dict[str | None, Samples]:
    """By the algebra of matrices, of which the entries are held."""
    mean: dict[str | None, PMat] = {}
    variance = dict.fromkeys(names, 0.0)
    count = 0
    for batch in minibatches():
        count += 1
        whole = of(batch)
        for name in names:
            m = whole if name is None else whole.block(name)
            if count == 1:
                mean[name] = m
                continue
            away = m - mean[name]
            variance[name] += float(away.norm()) ** 2 * (count - 1) / count
            mean[name] = mean[name] + (1 / count) * away
    out = {}
    for name in names:
        known = [float(mean[name].trace()), float(mean[name].norm()) ** 2, variance[name] / count]
        out[name] = Samples(torch.tensor(known, dtype=torch.float64), torch.zeros(0, 3, dtype=torch.float64), 0)
    return out


def estimated(
    of: Callable[[data.Batch], PMat],
    minibatches: Callable[[], Iterator[data.Batch]],
    names: Sequence[str | None],
    first: PMat,
    probes: int,
    generator: torch.Generator | None,
) -> dict[str | None, Samples]:
    """By products: exact in the directions of a basis, and sampled orthogonally to them."""
    products = 0
    like = first.like
    sizes = {name: first.size(0) if name is None else first.block(name).size(0) for name in names}
    count = round(_SKETCHED * probes)
    basis = {
        name: sphere(count, size, like=like, generator=generator)
        if size > probes
        else torch.eye(size, dtype=like.dtype, device=like.device)
        for name, size in sizes.items()
    }
    larger = [name for name in names if sizes[name] > probes]
    for _ in range(POWER if larger else 0):
        images = {name: Moments() for name in larger}
        for batch in minibatches():
            whole = of(batch)
            for name in larger:
                images[name].add((whole if name is None else whole.block(name)).matvec(basis[name]))
                products += len(basis[name])
        basis.update({name: orthonormal_rows(images[name].mean) for name in larger})
    rest = {name: like.new_zeros(0, size) for name, size in sizes.items()}
    for name in larger:
        q = basis[name]
        v = gaussian(probes - count, sizes[name], like=like, generator=generator)
        v = v - (v @ q.mT) @ q
        rest[name] = v * ((sizes[name] - len(q)) ** 0.5 / torch.linalg.vector_norm(v, dim=1, keepdim=True))
    moments = {name: Moments() for name in names}
    for batch in minibatches():
        whole = of(batch)
        for name in names:
            m = whole if name is None else whole.block(name)
            moments[name].add(m.matvec(torch.cat([basis[name], rest[name]])).double())
            products += len(basis[name]) + len(rest[name])
    out = {}
    for name in names:
        q, y = basis[name], moments[name]
        trace = (torch.cat([q, rest[name]]).double() * y.mean).sum(1)
        every = torch.stack([trace, y.mean.square().sum(1), y.spread.sum(1) / y.count], 1).cpu()
        out[name] = Samples(every[: len(q)].sum(0), every[len(q) :], products)
    return out


def block_statistics(of: Samples, size: int, count: int) -> dict[str, Estimate]:
    """The statistics of curvature, with errors by leaving out one sample after another."""

    def statistics(t: Tensor) -> dict[str, Tensor]:
        trace, norm2, variance = t.unbind(-1)
        mean = trace / size
        delta = norm2 / size - mean.square()
        return {
            "trace": trace,
            "norm2": norm2,
            "curvature_variance": variance,
            "spectral_mean": mean,
            "spectral_variance": delta,
            "shrinkage": 1 - variance / (count * size * delta),
        }

    m = len(of.samples)
    if m == 0:
        values = statistics(of.known)
        errors = {name: torch.zeros_like(value) for name, value in values.items()}
    else:
        values = statistics(of.known + of.samples.mean(0))
        left_out = statistics(of.known + (of.samples.sum(0) - of.samples) / (m - 1))
        errors = {name: ((m - 1) * each.var(correction=0)).sqrt() * widening(m) for name, each in left_out.items()}
    if not bool(values["spectral_variance"] > 1e-14 * values["norm2"] / size):
        values["shrinkage"] = torch.full_like(values["trace"], float("nan"))
    values["shrinkage"] = values["shrinkage"].clamp(min=0)
    return {name: Estimate(values[name], errors[name], of.products) for name in values}
