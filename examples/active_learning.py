"""Which images to label next
==========================

Which images to label next: at random, the ones that the net is least sure of, or by the Fisher information.

A net learns the digits from few labels, asks for ten more, and so on. Entropy asks for what it is unsure of, ten times
nearly the same. BAIT asks for those that together make the posterior small for all images; the greedy choice by
the kernel, for those that say most about each other.

::

    python examples/active_learning.py            a minute
    python examples/active_learning.py --small    the same code on less data
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from matplotlib.figure import Figure
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from nngeometry import GramMatrix, LayerCollection
from nngeometry.selection import bait, fisher_embeddings, greedy

PICTURE = Path(__file__).parent / "output" / "active_learning.png"
ASKED = 10
METHODS = ("random", "entropy", "BAIT", "kernel")


# %%
# A net is trained from the same start on all labels that there are.
def trained(x: Tensor, y: Tensor, epochs: int) -> nn.Module:
    model = nn.Sequential(nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 10)).double()
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2, weight_decay=1e-4)
    for _ in range(epochs):
        optimizer.zero_grad()
        cross_entropy(model(x), y).backward()
        optimizer.step()
    return model


# %%
# Four ways of asking. ``bait`` and ``greedy`` choose a set; entropy judges each image for itself.
def asked(method: str, model: nn.Module, pool: Tensor, labelled: Tensor) -> Tensor:
    """Positions in the pool of the images to label next."""
    free = torch.ones(len(pool), dtype=torch.bool)
    free[labelled] = False
    if method == "random":
        rest = free.nonzero()[:, 0]
        return rest[torch.randperm(len(rest))[:ASKED]]
    with torch.no_grad():
        p = model(pool).softmax(1)
    if method == "entropy":
        entropy = -torch.special.xlogy(p, p).sum(1)
        return entropy.masked_fill(~free, -1.0).topk(ASKED).indices
    last = LayerCollection.from_model(model, "2")
    if method == "BAIT":
        return bait(fisher_embeddings(model, (pool,), layer_collection=last), ASKED, labelled=labelled, regul=1.0)
    K = GramMatrix(model, (pool,), layer_collection=last, output="trace")
    return greedy(K, ASKED, labelled=labelled)


# %%
# Each round asks for some labels and trains again.
def run(method: str, seed: int, rounds: int, pool: Tensor, labels: Tensor, x: Tensor, y: Tensor) -> list[float]:
    """The test accuracy after each round."""
    torch.manual_seed(seed)
    labelled = torch.randperm(len(pool))[:ASKED]
    curve = []
    for k in range(rounds):
        model = trained(pool[labelled], labels[labelled], 150)
        with torch.no_grad():
            curve.append(float((model(x).argmax(1) == y).double().mean()))
        if k < rounds - 1:
            labelled = torch.cat([labelled, asked(method, model, pool, labelled)])
    return curve


# %%
# The picture shows the accuracy against the number of labels.
def draw(curves: dict[str, Tensor]) -> None:
    figure = Figure(figsize=(6, 4), layout="constrained", dpi=150)
    ax = figure.subplots()
    for k, (name, values) in enumerate(curves.items()):
        labels = ASKED * torch.arange(1, values.shape[1] + 1)
        ax.plot(labels, values.mean(0), f"C{k}o-", markersize=3, label=name)
        ax.fill_between(labels, values.amin(0), values.amax(0), color=f"C{k}", alpha=0.15)
    ax.set(xlabel="labels", ylabel="test accuracy", title=f"mean and range of {len(values)} runs")
    ax.legend(frameon=False)
    PICTURE.parent.mkdir(exist_ok=True)
    figure.savefig(PICTURE)


# %%
# All methods start from the same first labels.
def main(small: bool) -> None:
    torch.set_num_threads(1)
    data = load_digits()
    order = torch.randperm(len(data.target), generator=torch.Generator().manual_seed(0))
    x, y = torch.tensor(data.data, dtype=torch.float64)[order] / 16, torch.tensor(data.target)[order]
    n, rounds, seeds = (100, 3, 1) if small else (300, 10, 5)
    curves = {}
    for method in METHODS:
        runs = [run(method, seed, rounds, x[:n], y[:n], x[800:], y[800:]) for seed in range(seeds)]
        curves[method] = torch.tensor(runs)
        mean = curves[method].mean(0)
        told = "  ".join(f"{ASKED * (k + 1)}: {float(mean[k]):.3f}" for k in range(1, rounds, 2))
        print(f"  {method:8} {told}")
    draw(curves)
    print(f"picture: {PICTURE}")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--small", action="store_true", help="less data")
    main(parser.parse_args().small)
