"""Variational training under label noise
======================================

Calibration under label noise: variational training against Adam.

A fifth of the 300 labels of digits that a small net is trained on are wrong. A net that has more parameters than
examples learns these too, in the end, and becomes sure of what it predicts: the probabilities that Adam's net gives are
further and further from how often it is right. (Before that, while it has not learned the wrong labels yet, it is less
sure than it is right, and on the way from the one to the other it is calibrated by chance.) The variational optimisers
find a distribution over weights, with a temperature of 0.1 that of a tempered posterior, and average the probabilities
of nets drawn from it. VIOptimizer has a diagonal covariance or one of Kronecker products, for which one word changes;
IVON has a diagonal one, estimated from the gradients.

::

    python examples/variational.py            a minute or two
    python examples/variational.py --small    the same code, stopped early
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from pathlib import Path

import torch
from matplotlib.figure import Figure
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from nngeometry import PMatDiag, PMatKFAC
from nngeometry.calibration import calibration
from nngeometry.optim import IVON, VIOptimizer
from nngeometry.plot import plot_calibration

PICTURE = Path(__file__).parent / "output" / "variational.png"
N, NOISE, TEMPERATURE, DRAWS = 300, 0.2, 0.1, 32

Data = tuple[Tensor, Tensor, Tensor, Tensor]


# %%
# A fifth of the training labels are drawn anew. The test labels are right.
def digits(seed: int) -> Data:
    """Training data, a fifth of whose labels are drawn anew, and clean test data."""
    generator = torch.Generator().manual_seed(seed)
    data = load_digits()
    order = torch.randperm(len(data.target), generator=generator)
    x, y = torch.tensor(data.data, dtype=torch.float32)[order] / 16, torch.tensor(data.target)[order]
    noisy = y[:N].clone()
    wrong = torch.rand(N, generator=generator) < NOISE
    noisy[wrong] = (noisy[wrong] + torch.randint(1, 10, (int(wrong.sum()),), generator=generator)) % 10
    return x[:N], noisy, x[N:], y[N:]


# %%
# The optimisers: one of first order, and three that train a distribution over weights.
def net(seed: int) -> nn.Module:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 10))


def adam(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.Adam(model.parameters(), lr=5e-3)


def ivon(model: nn.Module) -> torch.optim.Optimizer:
    options = {"hess_init": 0.03, "beta2": 0.999, "weight_decay": TEMPERATURE / N}
    return IVON(model.parameters(), lr=0.03, ess=N / TEMPERATURE, **options)


def vi(representation: type) -> Callable[[nn.Module], torch.optim.Optimizer]:
    options = {"temperature": TEMPERATURE, "damping": 0.01, "refresh": 5}
    return lambda model: VIOptimizer(model, representation, num_data=N, lr=2e-3, **options)


METHODS = {"Adam": adam, "IVON": ivon, "VI, diagonal": vi(PMatDiag), "VI, KFAC": vi(PMatKFAC)}


# %%
# A variational step takes gradients at drawn weights; a prediction averages over draws.
def step(opt: torch.optim.Optimizer, model: nn.Module, x: Tensor, y: Tensor) -> None:
    if isinstance(opt, torch.optim.Adam):
        opt.zero_grad()
        cross_entropy(model(x), y).backward()
    else:
        with opt.sampled():
            cross_entropy(model(x), y).backward()
            if isinstance(opt, VIOptimizer):
                opt.observe((x, y))
    opt.step()


@torch.no_grad()
def predicted(opt: torch.optim.Optimizer, model: nn.Module, x: Tensor) -> Tensor:
    """Probabilities; those of several draws are averaged."""
    if isinstance(opt, torch.optim.Adam):
        return model(x).softmax(1)
    total = torch.zeros(())
    for _ in range(DRAWS):
        with opt.sampled():
            total = total + model(x).softmax(1) / DRAWS
    return total


# %%
# The calibration error is measured ten times during the training.
def train(make: Callable[[nn.Module], torch.optim.Optimizer], seed: int, epochs: int) -> tuple[Tensor, list[float]]:
    """The predictions for the test data, and the calibration error after every tenth of the training."""
    x, y, x_test, y_test = digits(seed)
    model = net(seed)
    opt = make(model)
    generator, errors = torch.Generator().manual_seed(seed), []
    for epoch in range(1, epochs + 1):
        for i in torch.randperm(N, generator=generator).split(100):
            step(opt, model, x[i], y[i])
        if epoch % (epochs // 10) == 0:
            errors.append(calibration(predicted(opt, model, x_test), y_test).error)
    return predicted(opt, model, x_test), errors


# %%
# The picture shows calibration over time and at the end.
def draw(predictions: dict[str, tuple[Tensor, Tensor]], errors: dict[str, list[float]], epochs: int) -> None:
    PICTURE.parent.mkdir(exist_ok=True)
    diagram = PICTURE.with_stem(PICTURE.stem + "_calibration")
    plot_calibration({name: calibration(p, y, 10) for name, (p, y) in predictions.items()}, diagram)
    figure = Figure(figsize=(4.2, 3.6), layout="constrained", dpi=200)
    ax = figure.subplots()
    at = [epochs * (k + 1) / 10 for k in range(10)]
    for name, values in errors.items():
        ax.plot(at, values, ".-", linewidth=1, markersize=4, label=name)
    ax.set(xlabel="epochs", ylabel="expected calibration error", ylim=(0, None))
    ax.set_title("while training, mean over nets", fontsize=10)
    ax.legend(frameon=False, fontsize=8)
    figure.savefig(PICTURE)


# %%
# All methods train the same net on the same labels.
def main(small: bool) -> None:
    torch.set_num_threads(1)  # the model is so small that more threads mostly wait for each other
    epochs, seeds = (10, 1) if small else (300, 2)
    print(f"{N} digits, {NOISE:.0%} of the labels wrong; {epochs} epochs, mean over {seeds} nets\n")
    print("method           accuracy   error of calibration   log-loss   seconds")
    curves: dict[str, list[float]] = {}
    shown: dict[str, tuple[Tensor, Tensor]] = {}
    for name, make in METHODS.items():
        start, rows, errors = time.time(), [], []
        for seed in range(seeds):
            p, found = train(make, seed, epochs)
            y = digits(seed)[3]
            assert torch.allclose(p.sum(1), torch.ones(len(p)), atol=1e-5)
            right = (p.argmax(1) == y).double().mean()
            rows.append([right, calibration(p, y).error, -p.gather(1, y[:, None]).clamp(min=1e-12).log().mean()])
            errors.append(found)
            shown.setdefault(name, (p, y))
        accuracy, error, loss = torch.tensor(rows).mean(0).tolist()
        curves[name] = torch.tensor(errors).mean(0).tolist()
        print(f"{name:16} {accuracy:8.3f} {error:22.3f} {loss:10.3f} {time.time() - start:9.1f}", flush=True)
    draw(shown, curves, epochs)
    print(f"\nPicture: {PICTURE}")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--small", action="store_true", help="stop early")
    main(parser.parse_args().small)
