"""How many multiplications a job needs by the best way we know, in those of a gradient."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from math import prod
from typing import Any

from settings import ALL, CYCLE, PROBES, STEPS
from torch import nn


@dataclass(frozen=True)
class Product:
    """What a layer multiplies for one example: output gradients of ``rows`` with inputs of ``cols``, at each position.

    offsets: between two pixels of a patch, up to sign, where patches overlap; otherwise zero. first: whether nothing
    that is differentiated comes before.
    """

    positions: int
    rows: int
    cols: int
    channels: int
    offsets: int
    first: bool

    @property
    def size(self) -> int:
        """Of a pass over the layer: forward, back to its inputs, or back to its parameters."""
        return self.positions * self.rows * self.cols

    @property
    def entries(self) -> int:
        """Of a Jacobian."""
        return self.rows * self.cols


@dataclass(frozen=True)
class Work:
    """The layers of a model, how many examples there are, and how many cotangents the exact Fisher matrix has."""

    layers: list[Product]
    examples: int
    cotangents: int

    @property
    def forward(self) -> int:
        return sum(p.size for p in self.layers)

    @property
    def back(self) -> int:
        """To the inputs of all layers."""
        return sum(p.size for p in self.layers if not p.first)

    @property
    def gradient(self) -> int:
        return 2 * self.forward + self.back

    def kfac(self, c: int) -> float:
        """Forward, back for each of c cotangents, second moments of output gradients and of inputs."""
        outputs = sum(c * p.positions * p.rows * (p.rows + 1) / 2 for p in self.layers)
        return self.forward + c * self.back + outputs + sum(map(self.inputs, self.layers))

    def inputs(self, p: Product) -> float:
        """Their second moment: none if they are so few that they are it, from patches, or from overlaps of these."""
        if 2 * self.examples * p.positions <= p.cols:
            return 0.0
        of_patches = p.positions * p.cols * (p.cols + 1) / 2
        return min(of_patches, p.positions * p.offsets * p.channels**2) if p.offsets else of_patches

    def diag(self, c: int) -> float:
        """Of layers with positions every entry is made; of others the squares of cotangents are summed first."""
        return self.forward + c * self.back + sum(c * p.size if p.positions > 1 else p.entries for p in self.layers)

    def trace(self, c: int) -> float:
        """With positions from the entries, or from products of all pairs of positions."""
        found = 0.0
        for p in self.layers:
            pairs = p.positions**2 / 2 * (c * p.rows + p.cols)
            found += min(c * p.size, pairs)
        return self.forward + c * self.back + found

    def ekfac(self, c: int) -> float:
        """KFAC, and another pass in its eigenbasis."""
        rotated = sum(p.positions * (c * p.rows**2 + p.cols**2) for p in self.layers)
        return self.kfac(c) + self.diag(c) + rotated

    def jacobian(self, c: int) -> float:
        return self.forward + c * self.back + c * self.forward

    @property
    def product(self) -> int:
        """``J v``, and ``J^T u``."""
        return 2 * (self.forward + self.back)

    @property
    def hessian(self) -> int:
        """Derivatives of what is passed forward, of what is passed back, and of the gradient."""
        return 2 * self.forward + 4 * self.back

    def steps(self, observed: int, solve: int, refresh: int) -> float:
        """Some steps of training, in so many of which there are statistics. solve: how often the two factors of a layer
        are multiplied with its gradient. refresh: what a decomposition takes, in cubes of its size.
        """
        solved = sum(solve * p.entries * (p.rows + p.cols) for p in self.layers) / self.examples
        refreshed = sum(refresh * (p.rows**3 + p.cols**3) for p in self.layers) / self.examples
        return CYCLE * (self.gradient + solved) + observed * self.kfac(1) + refreshed


#: For one example.
COUNTS: dict[str, Callable[[Work], float]] = {
    "kfac": lambda w: w.kfac(w.cotangents),
    "kfac_mc": lambda w: w.kfac(1),
    "kfac_ef": lambda w: w.kfac(1),
    "ekfac": lambda w: w.ekfac(w.cotangents),
    "diag": lambda w: w.diag(w.cotangents),
    "diag_mc": lambda w: w.diag(1),
    "diag_ef": lambda w: w.diag(1),
    "trace": lambda w: w.trace(w.cotangents),
    "trace_ef": lambda w: w.trace(1),
    "fim_product": lambda w: w.forward + w.product,
    "fim_product_again": lambda w: w.product,
    "ggn_product": lambda w: w.forward + w.product,
    "ggn_product_lanczos": lambda w: w.forward + STEPS * w.product,
    "hessian_product": lambda w: w.forward + w.back + w.hessian,
    "hessian_product_lanczos": lambda w: w.forward + w.back + STEPS * w.hessian,
    "spectral_density": lambda w: w.forward + PROBES * STEPS * w.product,
    "ten_steps": lambda w: w.steps(CYCLE, 2, 10),
    "ten_steps_factored": lambda w: w.steps(CYCLE, 1, 1),
    "ten_steps_turned": lambda w: w.steps(CYCLE, 2, 5),
    "ten_steps_seldom": lambda w: w.steps(1, 2, 10),
    "ten_steps_seldom_factored": lambda w: w.steps(1, 1, 1),
    "ten_steps_seldom_turned": lambda w: w.steps(1, 2, 5),
    "jacobian": lambda w: w.jacobian(w.cotangents + 1),
}


def count(setting: str, job: str) -> float | None:
    """The multiplications of a job over those of a gradient, of layers alone; symmetric products count half. None
    where there is no count: of jobs that have none, and where other parameters count than those of linear layers and
    convolutions.
    """
    if setting not in ALL or job not in COUNTS or ALL[setting].everything:
        return None
    work = _work(setting, job if job in ALL[setting].subsets else "")
    return COUNTS[job](work) / work.gradient


@cache
def _work(setting: str, job: str) -> Work:
    task = ALL[setting].load(job)
    found: list[Product] = []
    handles = [
        layer.register_forward_hook(lambda *call: found.append(_product(*call, not found)))
        for layer in task.layers.values()
    ]
    output = task.model(task.batches[0][0][:1])
    for handle in handles:
        handle.remove()
    return Work(found, task.examples, task.positions * (output.shape[1] - 1))


def _product(layer: nn.Module, inputs: tuple[Any, ...], output: Any, first: bool) -> Product:
    if isinstance(layer, nn.Linear):
        positions = inputs[0][0].numel() // layer.in_features
        return Product(positions, layer.out_features, layer.in_features, layer.in_features, 0, first)
    assert isinstance(layer, nn.Conv2d)
    positions = prod(output.shape[2:])
    overlap = set(layer.stride) == {1} and prod(layer.kernel_size) > 1
    offsets = (prod(2 * k - 1 for k in layer.kernel_size) + 1) // 2 if overlap else 0
    cols = layer.in_channels * prod(layer.kernel_size)
    return Product(positions, layer.out_channels, cols, layer.in_channels, offsets, first)
