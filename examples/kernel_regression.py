"""A net against its linearisation
===============================

A trained network against its linearisation: regression with the neural tangent kernel (NTK).

Gradient descent on the squared error moves the outputs of a network by its tangent kernel K. If K stayed as it is at
initialisation, the outputs at time t (steps times learning rate) would be those of the linearised model, ::

    f_t(x) = f_0(x) + K_xX K^-1 (1 - exp(-K t)) (y - f_0(X)),

and in the end those of kernel regression. We train MLPs of growing width by gradient descent on all examples, and
compare the outputs on test examples over time. They come together slowly as the width grows (Jacot et al. 2018,
1806.07572; Lee et al. 2019, 1902.06720), for the same time t; the longer the training, the wider it takes.
The narrowest has few more parameters than there are outputs to fit, and its kernel regression is poor.

::

    python examples/kernel_regression.py            a minute
    python examples/kernel_regression.py --small    the same code on less
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from matplotlib.figure import Figure
from sklearn.datasets import load_digits
from torch import Tensor, nn

from nngeometry import FVector, GramMatrix

PICTURE = Path(__file__).parent / "output" / "kernel_regression.png"
CLASSES = 10
RATE = 0.5  # the learning rate, in units of 1 / (largest eigenvalue of K)
Curves = dict[str, list[float]]


# %%
# The data are digits, and the targets their labels as vectors.
def digits(n: int, n_test: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Images and labels, for training and for testing."""
    data = load_digits()
    order = torch.randperm(len(data.target), generator=torch.Generator().manual_seed(0))[: n + n_test]
    x, y = torch.tensor(data.data)[order] / 16, torch.tensor(data.target)[order]
    return x[:n], y[:n], x[n:], y[n:]


def outputs(model: nn.Module, x: Tensor) -> FVector:
    with torch.no_grad():
        return FVector(model(x).T)


def accuracy(f: FVector, y: Tensor) -> float:
    return 100 * float((f.to_torch().argmax(0) == y).double().mean())


def rms(f: FVector) -> float:
    return float(f.norm()) / f.to_torch().numel() ** 0.5


# %%
# Gradient descent on the squared error, for all examples at once.
def descend(model: nn.Module, x: Tensor, targets: FVector, steps: int, rate: float) -> None:
    """Gradient descent on ``sum (f - y)^2 / 2``."""
    optimizer = torch.optim.SGD(model.parameters(), lr=rate)
    for _ in range(steps):
        optimizer.zero_grad()
        ((model(x) - targets.to_torch().T).square().sum() / 2).backward()
        optimizer.step()


# %%
# ``K.regress(..., time=t)`` is the linearised network after gradient flow for a time t.
def compare(width: int, batches: tuple[Tensor, Tensor, Tensor, Tensor], times: list[int]) -> Curves:
    """Train one network, and print how far it is from its linearisation."""
    x, y, x_test, y_test = batches
    torch.manual_seed(0)
    layers = nn.Linear(64, width), nn.ReLU(), nn.Linear(width, width), nn.ReLU(), nn.Linear(width, CLASSES)
    model = nn.Sequential(*layers)
    targets = FVector(nn.functional.one_hot(y, CLASSES).T - 1 / CLASSES)

    K = GramMatrix(model, (x,))
    cross = GramMatrix(model, (x_test,), (x,))
    start, start_test = outputs(model, x), outputs(model, x_test)
    rate = RATE / float(K.eigenvalues()[0])

    print(f"\nwidth {width}, {sum(p.numel() for p in model.parameters())} parameters")
    print("  steps  accuracy: network  linearised   distance  of outputs that moved by")
    curves: Curves = {"steps": [], "network": [], "linearised": [], "distance": []}
    done = 0
    for steps in times:
        descend(model, x, targets, steps - done, rate)
        done = steps
        network = outputs(model, x_test)
        linear = K.regress(targets, cross, start=start, cross_start=start_test, time=steps * rate)
        row = [steps, accuracy(network, y_test), accuracy(linear, y_test), rms(network - linear)]
        for name, value in zip(curves, row, strict=True):
            curves[name].append(value)
        print(f"{row[0]:7d}{row[1]:18.1f}{row[2]:12.1f}{row[3]:11.4f}{rms(network - start_test):15.3f}", flush=True)
    final = K.regress(targets, cross, start=start, cross_start=start_test)
    kernel = K.regress(targets, cross)
    print(f"  in the limit of time: linearised {accuracy(final, y_test):.1f}", end="")
    print(f", kernel regression, which starts from zero, {accuracy(kernel, y_test):.1f}")
    moved = K.distance(GramMatrix(model, (x,)))
    print(f"  from the kernel at initialisation to that after training: {moved:.4f}")
    return curves


# %%
# The picture shows accuracy and distance over time, for each width.
def draw(found: dict[int, Curves]) -> None:
    figure = Figure(figsize=(9, 3.4), layout="constrained", dpi=200)
    left, right = figure.subplots(1, 2)
    for k, (width, curves) in enumerate(found.items()):
        left.semilogx(curves["steps"], curves["network"], f"C{k}-", label=f"width {width}, network")
        left.semilogx(curves["steps"], curves["linearised"], f"C{k}--", label=f"width {width}, linearised")
        right.loglog(curves["steps"], curves["distance"], f"C{k}.-", label=f"width {width}")
    left.set(xlabel="steps of gradient descent", ylabel="test accuracy (%)", title="accuracy")
    left.legend(frameon=False, fontsize=8)
    right.set(xlabel="steps of gradient descent", ylabel="RMS distance of outputs", title="network to linearisation")
    right.legend(frameon=False, fontsize=8)
    PICTURE.parent.mkdir(exist_ok=True)
    figure.savefig(PICTURE)


# %%
# Networks of growing width come nearer to their linearisation.
def main(small: bool) -> None:
    torch.set_num_threads(1)  # with networks so small more threads mostly wait for each other
    torch.set_default_dtype(torch.float64)
    batches = digits(50, 200) if small else digits(100, 500)
    times = [4**k for k in range(1, 4)] if small else [4 * 2**k for k in range(8)]
    widths = (32, 64) if small else (32, 128, 512)
    print(f"{len(batches[0])} examples to train on, {len(batches[2])} to test on")
    found = {width: compare(width, batches, times) for width in widths}
    draw(found)
    print(f"\nPicture: {PICTURE}")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--small", action="store_true", help="less data, smaller networks and fewer steps")
    main(parser.parse_args().small)
