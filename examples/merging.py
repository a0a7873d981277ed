"""Merging two nets
================

One net out of two that were trained apart: one has seen the digits 0 to 4, the other 5 to 9.

Both start from the same net, trained a little on all digits, and are trained further on theirs. The mean of their
weights forgets some of what each has learned; ``(F_1 + F_2)^-1 (F_1 w_1 + F_2 w_2)`` weighs each direction by how much
it matters to whom.

::

    python examples/merging.py            half a minute
    python examples/merging.py --small    the same code on less data
"""

from __future__ import annotations

import argparse
import copy
from pathlib import Path

import torch
from matplotlib.figure import Figure
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from nngeometry import FIM, PMatDiag, PMatEye, PMatKFAC, PMatLowRank, PVector, at
from nngeometry.merging import merge

PICTURE = Path(__file__).parent / "output" / "merging.png"
METHODS = {"mean": PMatEye, "Diag": PMatDiag, "KFAC": PMatKFAC, "LowRank (exact)": PMatLowRank}
REGULS = [1e-6, 1e-5, 1e-4, 1e-3, 1e-2, 1e-1]


# %%
# Two nets start from the same weights and see different digits.
def train(model: nn.Module, x: Tensor, y: Tensor, epochs: int, lr: float) -> None:
    optimizer = torch.optim.Adam(model.parameters(), lr=lr)
    for _ in range(epochs):
        for index in torch.randperm(len(x)).split(64):
            optimizer.zero_grad()
            cross_entropy(model(x[index]), y[index]).backward()
            optimizer.step()


def accuracy(model: nn.Module, x: Tensor, y: Tensor) -> float:
    with torch.no_grad():
        return float((model(x).argmax(1) == y).double().mean())


# %%
# The picture shows the accuracy of each merged net.
def draw(curves: dict[str, list[float]], experts: list[float]) -> None:
    figure = Figure(figsize=(6, 4), layout="constrained", dpi=150)
    ax = figure.subplots()
    for k, (name, values) in enumerate(curves.items()):
        ax.semilogx(REGULS, values, f"C{k}o-", label=name)
    alone = ", ".join(f"{value:.2f}" for value in experts)
    ax.set(xlabel="regul", ylabel="accuracy on all ten digits", title=f"merged; the experts alone: {alone}")
    ax.legend(frameon=False)
    PICTURE.parent.mkdir(exist_ok=True)
    figure.savefig(PICTURE)


# %%
# ``merge`` takes the weights and the matrices of all nets. The regularisation is chosen on other images.
def main(small: bool) -> None:
    torch.set_num_threads(1)
    torch.manual_seed(0)
    data = load_digits()
    order = torch.randperm(len(data.target))
    x, y = torch.tensor(data.data, dtype=torch.float64)[order] / 16, torch.tensor(data.target)[order]
    n = 500 if small else 1200
    test = x[1200:], y[1200:]
    start = nn.Sequential(nn.Linear(64, 32), nn.Tanh(), nn.Linear(32, 10)).double()
    train(start, x[:100], y[:100], 20, 1e-2)
    print(f"the common start: {accuracy(start, *test):.3f}")
    experts, parts = [], []
    for mine in (y[:n] < 5, y[:n] >= 5):
        expert = copy.deepcopy(start)
        train(expert, x[:n][mine], y[:n][mine], 30 if small else 60, 1e-3)
        experts.append(expert)
        parts.append(x[:n][mine])
    alone = [accuracy(expert, *test) for expert in experts]
    print(f"the experts alone: {alone[0]:.3f}, {alone[1]:.3f}")
    curves = {}
    for name, representation in METHODS.items():
        pairs = [
            (expert, len(part) * FIM(expert, (part[: 30 if small else 200],), representation))
            for expert, part in zip(experts, parts, strict=True)
        ]
        if name == "mean":
            both: PVector = sum(PVector.from_model(e).detach() for e in experts) / 2
            with at(experts[0], both):
                curves[name] = [accuracy(experts[0], *test)] * len(REGULS)
        else:
            curves[name] = []
            for regul in REGULS:
                with at(experts[0], merge(pairs, regul=regul * n)):
                    curves[name].append(accuracy(experts[0], *test))
        print(f"  {name:16} {max(curves[name]):.3f}")
    draw(curves, alone)
    print(f"picture: {PICTURE}")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--small", action="store_true", help="less data")
    main(parser.parse_args().small)
