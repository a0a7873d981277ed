"""Pruning by curvature
====================

How many weights of a trained net can go: by magnitude, by optimal brain damage, by optimal brain surgery.

Magnitude removes the smallest weights. Optimal brain damage (OBD) removes those that matter least to the loss, by the
diagonal of its curvature. Optimal brain surgery (OBS) has the others make up for what is removed: the inverse of the
curvature says how. Nothing is trained again. OBS goes in steps, with the curvature made anew for each.

::

    python examples/pruning.py            half a minute
    python examples/pruning.py --small    the same code on less data
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

from nngeometry import FIM, PMatDiag, PMatKFAC, PMatLowRank, PVector
from nngeometry.pruning import keep, prune, saliency

PICTURE = Path(__file__).parent / "output" / "pruning.png"
REGUL = 1e-4
FRACTIONS = [0.8, 0.6, 0.5, 0.4, 0.3, 0.25, 0.2, 0.15, 0.1, 0.07, 0.05]


# %%
# A small MLP is trained on the digits of scikit-learn.
def train(model: nn.Module, x: Tensor, y: Tensor, epochs: int) -> None:
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
    for _ in range(epochs):
        for index in torch.randperm(len(x)).split(64):
            optimizer.zero_grad()
            cross_entropy(model(x[index]), y[index]).backward()
            optimizer.step()


def accuracy(model: nn.Module, x: Tensor, y: Tensor) -> float:
    with torch.no_grad():
        return float((model(x).argmax(1) == y).double().mean())


# %%
# ``saliency`` says how much the loss would rise. ``keep`` chooses what stays, and ``prune`` moves it.
def pruned(method: str, model: nn.Module, x: Tensor, fraction: float) -> PVector:
    """The weights that are left of those that the model has."""
    w = PVector.from_model(model).clone().detach()
    if method == "magnitude":
        return keep(w**2, fraction) * w
    if method == "OBD":
        F = FIM(model, (x,), PMatDiag)
        return keep(saliency(F, w, method="obd"), fraction) * w
    F = FIM(model, (x,), PMatKFAC if method == "OBS, KFAC" else PMatLowRank)
    scores = saliency(F, w, REGUL)
    return prune(F, w, keep(scores, fraction), REGUL)


# %%
# The picture shows accuracy against the share of weights that are left.
def draw(curves: dict[str, list[float]], whole: float) -> None:
    figure = Figure(figsize=(6, 4), layout="constrained", dpi=150)
    ax = figure.subplots()
    ax.axhline(whole, color="k", linestyle=":", linewidth=0.8)
    for k, (name, values) in enumerate(curves.items()):
        ax.semilogx([100 * f for f in FRACTIONS], values, f"C{k}o-", label=name)
    ax.set_xticks([5, 10, 20, 40, 80], ["5", "10", "20", "40", "80"])
    ax.minorticks_off()
    ax.invert_xaxis()
    ax.set(xlabel="weights left (%)", ylabel="test accuracy", ylim=(0, 1.02), title="without training again")
    ax.legend(frameon=False)
    PICTURE.parent.mkdir(exist_ok=True)
    figure.savefig(PICTURE)


# %%
# Four methods prune the same trained net, without training it again.
def main(small: bool) -> None:
    torch.set_num_threads(1)
    torch.manual_seed(0)
    data = load_digits()
    order = torch.randperm(len(data.target))
    x, y = torch.tensor(data.data, dtype=torch.float64)[order] / 16, torch.tensor(data.target)[order]
    test = x[1200:], y[1200:]
    x, y = (x[:300], y[:300]) if small else (x[:1200], y[:1200])
    model = nn.Sequential(nn.Linear(64, 24), nn.ReLU(), nn.Linear(24, 16), nn.ReLU(), nn.Linear(16, 10)).double()
    train(model, x, y, 15 if small else 40)
    whole = accuracy(model, *test)
    print(f"{sum(p.numel() for p in model.parameters())} weights, test accuracy {whole:.3f}")
    few = x[: 40 if small else 150]
    curves: dict[str, list[float]] = {}
    for method in ("magnitude", "OBD", "OBS, KFAC", "OBS, exact"):
        net, curves[method] = copy.deepcopy(model), []
        for fraction in FRACTIONS:
            pruned(method, net, few, fraction).copy_to_model(net)
            curves[method].append(accuracy(net, *test))
        told = "  ".join(f"{f:.0%} {a:.3f}" for f, a in zip(FRACTIONS, curves[method], strict=True) if f <= 0.3)
        print(f"  {method:10} {told}")
    draw(curves, whole)
    print(f"picture: {PICTURE}")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--small", action="store_true", help="less data")
    main(parser.parse_args().small)
