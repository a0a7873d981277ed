"""Continual learning with elastic weight consolidation
====================================================

Five tasks one after the other: what elastic weight consolidation keeps, by the matrix that it holds weights with.

Each task is the digits with their pixels in another order. An MLP learns one after the other; after each task the
penalty ``strength / 2 (w - w_t)^T F_t (w - w_t)`` is added to the loss. F is the identity (L2), the diagonal of the
Fisher matrix, or its Kronecker-factored form: one word changes.

::

    python examples/continual.py            a minute
    python examples/continual.py --small    the same code on less data
"""

from __future__ import annotations

import argparse
from functools import partial
from pathlib import Path

import torch
from matplotlib.figure import Figure
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from nngeometry import FIM, PMatDiag, PMatEye, PMatKFAC
from nngeometry.continual import EWC

PICTURE = Path(__file__).parent / "output" / "continual.png"
#: Each with the strength that is best for it, of those on a grid of powers of ten and their thirds.
METHODS = {
    "none": (PMatDiag, 0.0),
    "L2": (PMatEye, 1.0),
    "Diag": (PMatDiag, 10.0),
    "KFAC": (PMatKFAC, 30.0),
}


# %%
# Each task is the digits with their pixels in an order of its own.
def tasks(n: int, count: int) -> list[tuple[Tensor, ...]]:
    """Training inputs and labels, and test inputs and labels, of each."""
    data, generator = load_digits(), torch.Generator().manual_seed(0)
    order = torch.randperm(len(data.target), generator=generator)
    x, y = torch.tensor(data.data, dtype=torch.float32)[order] / 16, torch.tensor(data.target)[order]
    found = []
    for k in range(count):
        pixels = torch.randperm(64, generator=generator) if k else torch.arange(64)
        found.append((x[:n, pixels], y[:n], x[1300:, pixels], y[1300:]))
    return found


def accuracy(model: nn.Module, x: Tensor, y: Tensor) -> float:
    with torch.no_grad():
        return float((model(x).argmax(1) == y).double().mean())


# %%
# ``ewc.penalty()`` is added to the loss. It is zero until the first task has been consolidated.
def learn(model: nn.Module, ewc: EWC, x: Tensor, y: Tensor, epochs: int) -> None:
    optimizer = torch.optim.SGD(model.parameters(), lr=5e-3, momentum=0.9)
    for _ in range(epochs):
        for index in torch.randperm(len(x)).split(64):
            optimizer.zero_grad()
            (cross_entropy(model(x[index]), y[index]) + ewc.penalty()).backward()
            optimizer.step()


# %%
# After a task, ``ewc.consolidate`` computes the matrix of the task and keeps the weights that it ended with.
def run(method: str, data: list[tuple[Tensor, ...]], epochs: int, seed: int) -> Tensor:
    """``(tasks, tasks)``: after each task, the accuracy on each."""
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(64, 100), nn.ReLU(), nn.Linear(100, 10))
    representation, strength = METHODS[method]
    ewc = EWC(model, representation, FIM, strength=strength)
    table = []
    for x, y, _, _ in data:
        learn(model, ewc, x, y, epochs)
        if strength:
            ewc.consolidate([(x, y)])
        table.append([accuracy(model, u, v) for _, _, u, v in data])
    return torch.tensor(table)


# %%
# The picture shows the accuracy on all tasks seen so far, and on the first one.
def draw(tables: dict[str, Tensor]) -> None:
    figure = Figure(figsize=(11, 3.6), layout="constrained", dpi=150)
    left, right = figure.subplots(1, 2, width_ratios=(1.2, 1))
    count = len(next(iter(tables.values())))
    for k, (name, table) in enumerate(tables.items()):
        seen = [float(table[t, : t + 1].mean()) for t in range(count)]
        left.plot(range(1, count + 1), seen, f"C{k}o-", label=name)
        right.plot(range(1, count + 1), table[:, 0], f"C{k}o-")
    left.set(xlabel="tasks learned", ylabel="accuracy", title="mean over the tasks seen so far", ylim=(0, 1.02))
    right.set(xlabel="tasks learned", title="on the first task", ylim=(0, 1.02))
    left.set_xticks(range(1, count + 1))
    right.set_xticks(range(1, count + 1))
    left.legend(frameon=False)
    PICTURE.parent.mkdir(exist_ok=True)
    figure.savefig(PICTURE)


# %%
# Every penalty learns the same tasks in the same order.
def main(small: bool) -> None:
    torch.set_num_threads(1)
    data = tasks(300 if small else 1300, 3 if small else 5)
    one = partial(run, data=data, epochs=5 if small else 20)
    tables = {method: one(method, seed=0) for method in METHODS}
    print(f"accuracy after {len(data)} tasks")
    for name, table in tables.items():
        print(f"  {name:5} mean {float(table[-1].mean()):.3f}   first task {float(table[-1, 0]):.3f}")
    draw(tables)
    print(f"picture: {PICTURE}")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--small", action="store_true", help="less data")
    main(parser.parse_args().small)
