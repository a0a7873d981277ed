"""Training a deep autoencoder with K-FAC
======================================

A deep autoencoder: K-FAC with the damping of Levenberg and Marquardt, against Adam with the best of several rates.

The network 64-48-32-16-6-16-32-48-64 with tanh codes the 8 x 8 digits of scikit-learn in six numbers. Its loss is the
cross-entropy of the pixels, with an l2 penalty of 1e-5. Such nets are hard for gradient descent, and are where second
order methods began (Martens 2010; Martens and Grosse 2015, 1503.05671).

``lr="quadratic"`` takes the length of the step, and how much of the previous step is repeated, from the quadratic
model of the loss, whose exact matrix is at hand by products. ``LevenbergMarquardt`` compares the loss with that model
and sets the damping. So there is no rate to choose.

::

    python examples/autoencoder.py            a minute or two
    python examples/autoencoder.py --small    fewer images and iterations
"""

from __future__ import annotations

import argparse
import time
from itertools import pairwise
from pathlib import Path

import torch
from matplotlib.figure import Figure
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.nn.functional import binary_cross_entropy_with_logits as bce

from nngeometry import FIM_MonteCarlo, PMatKFAC
from nngeometry.optim import LevenbergMarquardt, SecondOrderOptimizer

PICTURE = Path(__file__).parent / "output" / "autoencoder.png"
SIZES = [64, 48, 32, 16, 6, 16, 32, 48, 64]
L2 = 1e-5
RATES = [3e-3, 1e-2]  # each falls to zero along a cosine


# %%
# What is kept of each training.
class Curve:
    """What a training has reached after each iteration."""

    def __init__(self) -> None:
        self.start = time.perf_counter()
        self.seconds: list[float] = []
        self.losses: list[float] = []
        self.dampings: list[float] = []

    def note(self, loss: Tensor, damping: float = 0.0) -> None:
        self.seconds.append(time.perf_counter() - self.start)
        self.losses.append(loss.item())
        self.dampings.append(damping)


# %%
# The network narrows to six numbers and widens again.
def network() -> nn.Sequential:
    torch.manual_seed(0)
    layers: list[nn.Module] = []
    for a, b in pairwise(SIZES):
        layers += [nn.Linear(a, b), nn.Tanh()]
        nn.init.xavier_normal_(layers[-2].weight)
        nn.init.zeros_(layers[-2].bias)
    return nn.Sequential(*layers[:-1])


def loss_of(model: nn.Module, x: Tensor) -> Tensor:
    return bce(model(x), x, reduction="sum") / len(x)


# %%
# K-FAC has no rate to choose: its step minimises the exact quadratic model, and its damping adapts.
def by_kfac(x: Tensor, iterations: int) -> tuple[nn.Module, Curve]:
    model, curve = network(), Curve()
    optimizer = SecondOrderOptimizer(
        model,
        PMatKFAC,
        FIM_MonteCarlo,
        variant="classif_binary_logits",
        lr="quadratic",
        damping=LevenbergMarquardt(10.0, every=5, omega=0.95),
        l2=L2,
        refresh=5,
    )

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = loss_of(model, x)
        loss.backward()
        return loss

    for _ in range(iterations):
        optimizer.observe((x,))
        curve.note(optimizer.step(closure), optimizer.param_groups[0]["damping"])
    return model, curve


# %%
# Adam is run at several rates.
def by_adam(x: Tensor, iterations: int, lr: float) -> tuple[nn.Module, Curve]:
    model, curve = network(), Curve()
    optimizer = torch.optim.Adam(model.parameters(), lr=lr, weight_decay=L2)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, iterations)
    for _ in range(iterations):
        optimizer.zero_grad()
        loss = loss_of(model, x)
        loss.backward()
        optimizer.step()
        schedule.step()
        curve.note(loss)
    return model, curve


# %%
# A table and a picture compare the two by steps and by seconds.
@torch.no_grad()
def row(name: str, model: nn.Module, x: Tensor, curve: Curve) -> None:
    error = (model(x).sigmoid() - x).square().sum(1).mean().item()
    loss = loss_of(model, x).item()
    print(f"{name:16}{len(curve.losses):11}{curve.seconds[-1]:9.1f}{loss:15.2f}{error:15.3f}", flush=True)


def draw(x: Tensor, models: dict[str, nn.Module], curves: dict[str, Curve]) -> None:
    figure = Figure(figsize=(12, 3.4), layout="constrained")
    left, right = figure.subfigures(1, 2, width_ratios=[2.4, 1])
    by_iteration, by_second, damping = left.subplots(1, 3)
    for name, curve in curves.items():
        by_iteration.semilogx(range(1, len(curve.losses) + 1), curve.losses, label=name)
        by_second.semilogx(curve.seconds, curve.losses)
    by_iteration.set(xlabel="iterations", ylabel="cross-entropy", ylim=(15, 30))
    by_iteration.legend()
    by_second.set(xlabel="seconds", ylim=(15, 30))
    damping.semilogy(curves["K-FAC"].dampings, color="C0")
    damping.set(xlabel="iterations", ylabel="damping of K-FAC")
    images = {"digits": x[:8], **{name: model(x[:8]).detach().sigmoid() for name, model in models.items()}}
    for ax, (name, rows) in zip(right.subplots(len(images), 1), images.items(), strict=True):
        ax.imshow(rows.view(8, 8, 8).movedim(0, 1).reshape(8, 64), cmap="gray_r", vmin=0, vmax=1)
        ax.set(title=name, xticks=[], yticks=[])
    PICTURE.parent.mkdir(exist_ok=True)
    figure.savefig(PICTURE, dpi=120)


# %%
# Both methods train the same initial network.
def main(small: bool) -> None:
    torch.set_num_threads(1)
    torch.set_default_dtype(torch.float64)
    x = torch.tensor(load_digits().data)[: 300 if small else None] / 16
    iterations, by_gradients = (20, 60) if small else (300, 3000)
    print(f"{'':16}{'iterations':>11}{'seconds':>9}{'cross-entropy':>15}{'squared error':>15}")
    models, curves = {}, {}
    models["K-FAC"], curves["K-FAC"] = by_kfac(x, iterations)
    row("K-FAC", models["K-FAC"], x, curves["K-FAC"])
    trained = {lr: by_adam(x, by_gradients, lr) for lr in (RATES[:1] if small else RATES)}
    for lr, (model, curve) in trained.items():
        row(f"Adam, lr {lr:g}", model, x, curve)
    best = min(trained, key=lambda lr: loss_of(trained[lr][0], x).item())
    models["Adam"], curves["Adam"] = trained[best]
    draw(x, models, curves)
    print(f"\nPicture: {PICTURE}")
    assert small or curves["K-FAC"].losses[-1] < curves["Adam"].losses[-1], "in a tenth of the iterations"


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--small", action="store_true", help="fewer images and iterations")
    main(parser.parse_args().small)
