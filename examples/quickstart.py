"""Every representation of a Fisher matrix, and one use
====================================================

The first example: the Fisher matrix of a small convolutional network in every representation, and one use of it.

1. Train a network on the 8x8 digits of scikit-learn.
2. Compute its Fisher matrix F in each representation, with the same call, and compare what they cost and give.
3. Draw them side by side.
4. Learn a second task without forgetting the first. A penalty (w - w_A)^T F (w - w_A) holds the weights w near those of
   the first task, w_A, where that task needs them (elastic weight consolidation, Kirkpatrick et al. 2017, 1612.00796).

::

    python examples/quickstart.py            one or two minutes
    python examples/quickstart.py --small    the same code on less data
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections import OrderedDict
from collections.abc import Callable
from copy import deepcopy
from pathlib import Path
from typing import Any

import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader, TensorDataset

from nngeometry import (
    FIM,
    PMat,
    PMatBlockDiag,
    PMatDense,
    PMatDiag,
    PMatEKFAC,
    PMatEye,
    PMatImplicit,
    PMatKFAC,
    PMatLowRank,
    PMatMixed,
    PMatQuasiDiag,
    PVector,
    Relative,
    random_pvector,
)
from nngeometry.plot import plot_matrices

PICTURE = Path(__file__).parent / "output" / "quickstart.png"

REPRESENTATIONS: dict[str, Any] = {
    "Dense": PMatDense,
    "BlockDiag": PMatBlockDiag,
    "KFAC": PMatKFAC,
    "EKFAC": PMatEKFAC,
    "QuasiDiag": PMatQuasiDiag,
    "Diag": PMatDiag,
    "Eye": PMatEye,
    "LowRank": PMatLowRank,
    "Mixed": PMatMixed.of(PMatKFAC, {nn.Linear: PMatBlockDiag}),
    "Implicit": PMatImplicit,
}
# %%
# One damping for all solves, and the strengths of the penalty that are tried.
DAMPING = Relative(1.0)  # the mean eigenvalue; the largest one is some hundred times that
STRENGTHS = [1.0, 3.0, 10.0, 30.0, 100.0, 300.0]  # of the penalty: lam


# %%
# The data are the digits of scikit-learn. The second task has the same images, inverted.
def digits(small: bool) -> list[TensorDataset]:
    """Images and labels to train on, to choose hyperparameters on, and to test on."""
    data = load_digits()
    order = torch.randperm(len(data.target), generator=torch.Generator().manual_seed(0))
    x = torch.tensor(data.images, dtype=torch.float32)[order].unsqueeze(1) / 16
    y = torch.tensor(data.target)[order]
    train = 300 if small else 1200
    return [TensorDataset(x[s], y[s]) for s in (slice(train), slice(1200, 1500), slice(1500, None))]


def inverted(task: TensorDataset) -> TensorDataset:
    x, y = task.tensors
    return TensorDataset(1 - x, y)


# %%
# The network has two convolutions, two normalisations and a linear layer.
def network() -> nn.Sequential:
    layers = OrderedDict(
        conv1=nn.Conv2d(1, 8, 3, padding=1),
        norm1=nn.GroupNorm(4, 8),
        relu1=nn.ReLU(),
        pool1=nn.MaxPool2d(2),
        conv2=nn.Conv2d(8, 16, 3, padding=1),
        norm2=nn.GroupNorm(4, 16),
        relu2=nn.ReLU(),
        pool2=nn.MaxPool2d(2),
        flatten=nn.Flatten(),
        linear=nn.Linear(64, 10),
    )
    return nn.Sequential(layers)


def train(model: nn.Module, task: TensorDataset, epochs: int, penalty: Callable[[], Tensor] | None = None) -> None:
    """Adam on the cross-entropy, plus a penalty on the weights. Leaves the model in eval mode."""
    loader = DataLoader(task, batch_size=64, shuffle=True, generator=torch.Generator().manual_seed(0))
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda epoch: 1 - epoch / epochs)
    model.train()
    for _ in range(epochs):
        for x, y in loader:
            loss = cross_entropy(model(x), y)
            if penalty is not None:
                loss = loss + penalty()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        schedule.step()
    model.eval()


@torch.no_grad()
def accuracy(model: nn.Module, task: TensorDataset) -> float:
    x, y = task.tensors
    return 100 * (model(x).argmax(1) == y).float().mean().item()


# %%
# Costs are counted in gradients: one forward and one backward pass over the same data. This takes most of the speed of
# the machine out of the numbers.
def one_gradient(model: nn.Module, loader: DataLoader) -> None:
    """One pass over the data, forward and backward: the unit of cost."""
    for x, y in loader:
        model.zero_grad()
        cross_entropy(model(x), y).backward()


def seconds(runs: int, action: Callable[..., Any], *args: Any) -> float:
    """Median time of an action."""
    times = []
    for _ in range(runs):
        start = time.perf_counter()
        action(*args)
        times.append(time.perf_counter() - start)
    return statistics.median(times)


def residual(F: PMat, x: PVector, b: PVector) -> float:
    """||(F + r) x - b|| / ||b||"""
    r = DAMPING.factor * F.trace() / F.size(0)
    return float((F.mv(x) + r * x - b).norm() / b.norm())


# %%
# The same call makes each matrix; only the class changes. ``solve`` is exact in every representation, which the
# residual shows. ``distance`` says how far the representation is from the dense matrix.
def compare(model: nn.Module, task: TensorDataset, runs: int) -> dict[str, PMat]:
    """Print what each representation of the Fisher matrix costs and gives; return the matrices."""
    every = DataLoader(task, batch_size=256)
    few = DataLoader(TensorDataset(*task[:100]), batch_size=100)
    unit = seconds(10, one_gradient, model, every)
    print(f"\nThe Fisher matrix on {len(task)} images (LowRank: on 100), times in gradients of {1000 * unit:.0f} ms\n")
    print(f"{'':10}{'build':>8}{'bytes':>12}{'trace':>9}{'vTFv':>9}{'solve':>9}{'residual':>10}{'distance':>10}")

    matrices: dict[str, PMat] = {}
    for name, representation in REPRESENTATIONS.items():
        loader = few if representation is PMatLowRank else every
        F = matrices[name] = FIM(model, loader, representation, n_output=10)
        build = seconds(runs, FIM, model, loader, representation) / unit
        dense = matrices["Dense"]
        b = random_pvector(F.layer_collection, generator=torch.Generator().manual_seed(0))
        start = time.perf_counter()
        x = F.solve(b, regul=DAMPING)
        solve = (time.perf_counter() - start) / unit
        # The entries of an implicit matrix would cost as many passes over the data as there are parameters.
        distance = "-" if name == "Implicit" else f"{(F - dense).norm() / dense.norm():.3f}"
        print(f"{name:10}{build:8.1f}{F.nbytes():12,}{F.trace():9.2f}{F.vTMv(b):9.2f}", end="")
        print(f"{solve:9.2f}{residual(F, x, b):10.0e}{distance:>10}", flush=True)
    return matrices


# %%
# The penalty of elastic weight consolidation is a quadratic form of the matrix. It is differentiable in the weights.
def learn_second(model: nn.Module, F: PMat, lam: float, task: TensorDataset, epochs: int) -> nn.Module:
    """A copy of the model that learns a second task, with the penalty lam / 2 (w - w_A)^T F (w - w_A)."""
    model = deepcopy(model)
    w_A = PVector.from_model(model).clone().detach()
    train(model, task, epochs, lambda: lam / 2 * F.vTMv(PVector.from_model(model) - w_A))
    return model


def remember(model: nn.Module, splits: list[TensorDataset], epochs: int, strengths: list[float]) -> None:
    """Learn inverted digits after plain ones: with no penalty, and with two representations of the Fisher matrix."""
    (train_A, valid_A, test_A), (train_B, valid_B, test_B) = splits, [inverted(split) for split in splits]
    loader_A = DataLoader(train_A, batch_size=256)
    print("\nTask A: plain digits, then task B: inverted digits. Test accuracy:")
    print(f"\n{'':24}{'lam':>7}{'A':>8}{'B':>8}")

    def show(name: str, lam: str, learnt: nn.Module) -> None:
        print(f"{name:24}{lam:>7}{accuracy(learnt, test_A):8.1f}{accuracy(learnt, test_B):8.1f}", flush=True)

    show("after task A", "", model)
    forgetful = deepcopy(model)
    train(forgetful, train_B, epochs)
    show("after task B, no penalty", "", forgetful)
    for R in (PMatDiag, PMatKFAC):
        F = FIM(model, loader_A, R, n_output=10)
        learnt = {lam: learn_second(model, F, lam, train_B, epochs) for lam in strengths}
        best = max(strengths, key=lambda lam: accuracy(learnt[lam], valid_A) + accuracy(learnt[lam], valid_B))
        show(f"after task B, {R.__name__}", f"{best:g}", learnt[best])
    print(f"\nlam: of {', '.join(f'{lam:g}' for lam in strengths)}, chosen by the mean accuracy on validation images.")


# %%
# The run prints a table, draws the matrices on one colour scale, and learns the second task.
def main(small: bool) -> None:
    torch.set_num_threads(1)  # the network is so small that more threads mostly wait for each other
    torch.manual_seed(0)
    splits = digits(small)
    model = network()
    print(f"Training a network of {sum(p.numel() for p in model.parameters())} parameters on {len(splits[0])} images")
    train(model, splits[0], epochs=10 if small else 30)
    reached = accuracy(model, splits[2])
    print(f"Test accuracy {reached:.1f} %")
    assert small or reached >= 97

    matrices = compare(model, splits[0], runs=1 if small else 3)
    PICTURE.parent.mkdir(exist_ok=True)
    plot_matrices({name: F for name, F in matrices.items() if name != "Implicit"}, PICTURE)
    print(f"\nPicture: {PICTURE}")

    remember(model, splits, epochs=3 if small else 15, strengths=STRENGTHS[3:4] if small else STRENGTHS)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--small", action="store_true", help="less data and fewer epochs")
    main(parser.parse_args().small)
