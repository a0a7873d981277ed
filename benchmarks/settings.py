"""The models and data that are measured, the same for every contender."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache, cached_property
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

#: Every job, in the order of the table. A contender has those that it can do.
JOBS = {
    "kfac": "KFAC of the exact Fisher matrix",
    "kfac_mc": "KFAC with one sampled label for each example",
    "ekfac": "EKFAC of the exact Fisher matrix, both passes",
    "diag": "the exact diagonal",
    "blockdiag": "a dense block for each layer",
    "dense": "all entries",
    "trace": "the exact trace, without the matrix",
    "fim_product": "one product with the Fisher matrix, without the matrix",
    "fim_product_again": "a later product with the same one",
    "ggn_product": "one product with the Gauss-Newton matrix of the cross-entropy, without the matrix",
    "ggn_product_lanczos": "20 steps of Lanczos with that matrix: its making, 20 products, orthogonalisation",
    "hessian_product": "one product with the Hessian of the cross-entropy, without the matrix",
    "hessian_product_lanczos": "20 steps of Lanczos with that matrix: its making, 20 products, orthogonalisation",
    "kfac_first_solve": "the first solve with a KFAC that is built: its decomposition included",
    "kfac_solve_1": "a later solve with that KFAC, one right-hand side",
    "kfac_solve_320": "a later solve with that KFAC, 320 right-hand sides",
}

#: What is added to a matrix before it is inverted.
REGUL = 1e-3

#: Of Lanczos. The cost of such a job is that of all of them.
STEPS = 20

Batch = tuple[Tensor, Tensor]


@dataclass(frozen=True)
class Task:
    """A model, its minibatches, and the layers whose parameters count: those that all contenders know."""

    model: nn.Module
    batches: list[Batch]

    @cached_property
    def layers(self) -> dict[str, nn.Module]:
        return {name: m for name, m in self.model.named_modules() if isinstance(m, nn.Linear | nn.Conv2d)}

    @cached_property
    def parameters(self) -> list[nn.Parameter]:
        return [p for layer in self.layers.values() for p in layer.parameters()]

    @property
    def examples(self) -> int:
        return sum(len(x) for x, _ in self.batches)

    def vectors(self, *shape: int) -> Tensor:
        """Fixed standard normal vectors in parameter space: ``(*shape, P)``."""
        size = sum(p.numel() for p in self.parameters)
        return torch.randn(*shape, size, generator=torch.Generator().manual_seed(1))

    def gradient(self, examples: int | None = None) -> None:
        """The unit of cost: one forward and one backward pass over the minibatches (or some ``examples`` of each)."""
        for x, y in self.batches:
            loss = F.cross_entropy(self.model(x[:examples]), y[:examples])
            torch.autograd.grad(loss, self.parameters)


@dataclass(frozen=True)
class Setting:
    """A model and its data.

    examples: how many, in minibatches of ``batch``; small: how many in a trial run; left_out: jobs that are too large.
    """

    model: Callable[[], nn.Module]
    data: Callable[[int], Batch]
    examples: int
    batch: int
    small: int
    left_out: frozenset[str] = frozenset()

    @property
    def jobs(self) -> list[str]:
        return [job for job in JOBS if job not in self.left_out]

    def load(self, small: bool = False) -> Task:
        torch.manual_seed(0)
        model = self.model().eval()
        x, y = self.data(self.small if small else self.examples)
        return Task(model, list(zip(x.split(self.batch), y.split(self.batch), strict=True)))


@cache
def _all_digits() -> Any:
    from sklearn.datasets import load_digits

    return load_digits(return_X_y=True)


def _digits(examples: int) -> Batch:
    """Images of 8 x 8 pixels, as rows."""
    x, y = _all_digits()
    return torch.from_numpy(x[:examples]).float() / 16, torch.from_numpy(y[:examples]).long()


def _digit_images(examples: int) -> Batch:
    x, y = _digits(examples)
    return x.view(-1, 1, 8, 8), y


def _noise_images(examples: int) -> Batch:
    """Random images of 32 x 32 pixels."""
    generator = torch.Generator().manual_seed(2)
    x = torch.randn(examples, 3, 32, 32, generator=generator)
    return x, torch.randint(10, (examples,), generator=generator)


def _mlp(hidden: int) -> nn.Module:
    hiddens = [nn.Linear(64, hidden), nn.ReLU(), nn.Linear(hidden, hidden), nn.ReLU()]
    return nn.Sequential(*hiddens, nn.Linear(hidden, 10))


def _convnet() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(1, 16, 3, padding=1),
        nn.ReLU(),
        nn.Conv2d(16, 24, 3, padding=1),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Conv2d(24, 24, 3, padding=1),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(384, 10),
    )


class _Residual(nn.Module):
    """Two convolutions and a short cut."""

    def __init__(self, cin: int, cout: int, stride: int) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(cin, cout, 3, stride, 1, bias=False),
            nn.BatchNorm2d(cout),
            nn.ReLU(),
            nn.Conv2d(cout, cout, 3, 1, 1, bias=False),
            nn.BatchNorm2d(cout),
        )
        self.short = nn.Sequential()
        if stride != 1 or cin != cout:
            self.short = nn.Sequential(nn.Conv2d(cin, cout, 1, stride, bias=False), nn.BatchNorm2d(cout))

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.body(x) + self.short(x))


def _resnet18() -> nn.Module:
    """ResNet-18 as it is used for images of 32 x 32 pixels: a 3 x 3 stem without pooling; 11.2 million parameters."""
    blocks: list[nn.Module] = []
    cin = 64
    for cout in (64, 128, 256, 512):
        blocks += [_Residual(cin, cout, 1 if cin == cout else 2), _Residual(cout, cout, 1)]
        cin = cout
    stem = [nn.Conv2d(3, 64, 3, 1, 1, bias=False), nn.BatchNorm2d(64), nn.ReLU()]
    return nn.Sequential(*stem, *blocks, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(512, 10))


_DENSE = frozenset({"dense", "blockdiag"})

SETTINGS = {
    "digits-mlp-small": Setting(lambda: _mlp(32), _digits, 1797, 256, small=100),
    "digits-mlp": Setting(lambda: _mlp(256), _digits, 1797, 256, small=100, left_out=_DENSE),
    "convnet": Setting(_convnet, _digit_images, 1797, 256, small=50, left_out=frozenset({"dense"})),
    "resnet18": Setting(_resnet18, _noise_images, 32, 32, small=4, left_out=_DENSE | {"kfac_solve_320"}),
}
