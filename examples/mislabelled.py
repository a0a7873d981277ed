"""Finding wrong labels
====================

Finding wrong labels by self-influence: how much an example matters for the loss on itself.

We give a tenth of the digits a wrong label, train an MLP on them, and rank the examples by ``g^T (G + r)^-1 g`` with g
the gradient of the loss of the example and G the EKFAC of the generalised Gauss-Newton matrix (GGN). Two baselines cost
nothing: the loss itself, and the squared norm of g, which is self-influence with the identity for a metric.

While the network has not fitted the wrong labels, the loss is as good a score as any, and better in the first epochs.
When it learns them by heart, a wrong label has no large loss any more; all scores get worse, self-influence least.

::

    python examples/mislabelled.py            half a minute
    python examples/mislabelled.py --small    the same code on less data
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from matplotlib.figure import Figure
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from nngeometry import GGN, Influence, LayerCollection, PMatEKFAC, PMatEye

PICTURE = Path(__file__).parent / "output" / "mislabelled.png"
LOSS = nn.CrossEntropyLoss()
CLASSES = 10
WRONG = 0.1  # the share of wrong labels
RIDGE = 1e-4
REGUL = 1e-3
STYLES = {"self-influence": "C0.-", "gradient norm": "C1.--", "loss": "C2.--", "random": "C7:"}
SHOWN = 5  # images on a side


# %%
# A tenth of the labels are replaced by wrong ones.
def digits(n: int) -> tuple[Tensor, Tensor, Tensor]:
    """Images, labels, and which of these are wrong."""
    data, generator = load_digits(), torch.Generator().manual_seed(0)
    order = torch.randperm(len(data.target), generator=generator)[:n]
    x, y = torch.tensor(data.data)[order] / 16, torch.tensor(data.target)[order]
    n = len(x)
    wrong = torch.zeros(n, dtype=torch.bool)
    wrong[torch.randperm(n, generator=generator)[: int(WRONG * n)]] = True
    others = (y + torch.randint(1, CLASSES, (n,), generator=generator)) % CLASSES
    return x, torch.where(wrong, others, y), wrong


def train(model: nn.Module, x: Tensor, y: Tensor, epochs: int, optimizer: torch.optim.Optimizer) -> None:
    for _ in range(epochs):
        for index in torch.randperm(len(x)).split(64):
            optimizer.zero_grad()
            ridge = RIDGE / 2 * sum(p.square().sum() for p in model.parameters())
            (LOSS(model(x[index]), y[index]) + ridge).backward()
            optimizer.step()


# %%
# Three scores for each example. ``Influence.self_scores`` streams over the data.
def scores_of(model: nn.Module, x: Tensor, y: Tensor) -> dict[str, Tensor]:
    """One number for each example, the larger the more suspect."""
    G = GGN(model, (x, y), PMatEKFAC, LOSS)
    identity = PMatEye(LayerCollection.from_model(model))
    with torch.no_grad():
        loss = cross_entropy(model(x), y, reduction="none")
    return {
        "self-influence": Influence(model, G, LOSS, REGUL).self_scores((x, y)),
        "gradient norm": Influence(model, identity, LOSS, 0.0).self_scores((x, y)),
        "loss": loss,
        "random": torch.rand(len(x), generator=torch.Generator().manual_seed(1)),
    }


# %%
# Looking through the most suspect examples first should find the wrong labels early.
def found(score: Tensor, wrong: Tensor) -> Tensor:
    """How many of the k most suspect examples are wrong, for k = 1, 2, ..."""
    return wrong[score.argsort(descending=True)].double().cumsum(0)


def draw(
    epochs: list[int],
    precisions: dict[str, list[float]],
    fitted: list[float],
    curves: dict[str, Tensor],
    data: tuple[Tensor, Tensor, Tensor],
    suspects: Tensor,
) -> None:
    figure = Figure(figsize=(12, 4), layout="constrained", dpi=200)
    left, middle, right = figure.subfigures(1, 3, width_ratios=(1, 1, 0.8))
    ax = left.subplots()
    for name, style in STYLES.items():
        ax.semilogx(epochs, precisions[name], style, label=name)
    ax.semilogx(epochs, fitted, "k-", linewidth=0.8, label="wrong labels fitted")
    ax.set_xticks(epochs, [str(e) for e in epochs])
    ax.minorticks_off()
    ax.set(xlabel="epochs", ylabel="precision at 10 % (%)", ylim=(0, 100), title="over training")
    ax.legend(frameon=False, fontsize=8, loc="center left")
    ax = middle.subplots()
    wrong = data[2]
    for name, style in STYLES.items():
        ranks = torch.arange(1, len(wrong) + 1)
        ax.plot(100 * curves[name] / wrong.sum(), 100 * curves[name] / ranks, style.replace(".", "", 1), label=name)
    ax.set(
        xlabel="recall (%)", ylabel="precision (%)", xlim=(0, 100), ylim=(0, 102), title=f"after {epochs[-1]} epochs"
    )
    ax.legend(frameon=False, fontsize=8, loc="center left")
    right.suptitle("most suspect, with label (red: wrong)", fontsize=10)
    for ax, index in zip(right.subplots(SHOWN, SHOWN).flat, suspects.tolist(), strict=True):
        ax.imshow(data[0][index].view(8, 8), cmap="gray_r")
        ax.set_title(str(int(data[1][index])), fontsize=8, pad=2, color="C3" if wrong[index] else "k")
        ax.set(xticks=[], yticks=[])
    PICTURE.parent.mkdir(exist_ok=True)
    figure.savefig(PICTURE)


# %%
# Scores are compared while the net learns the wrong labels by heart.
def main(small: bool) -> None:
    torch.set_num_threads(1)  # the network is so small that more threads mostly wait for each other
    torch.manual_seed(0)
    torch.set_default_dtype(torch.float64)
    x, y, wrong = digits(400 if small else 1797)
    model = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, CLASSES))
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
    epochs = [5, 20, 40] if small else [5, 10, 20, 40, 80, 160]
    count = int(wrong.sum())
    print(f"{len(x)} images, {count} with a wrong label\n\nprecision among the {count} most suspect, in %")
    print("epochs  fitted", *(f"{name:>15}" for name in STYLES))
    precisions: dict[str, list[float]] = {name: [] for name in STYLES}
    fitted: list[float] = []
    for previous, epoch in zip([0, *epochs], epochs, strict=False):
        train(model, x, y, epoch - previous, optimizer)
        with torch.no_grad():
            fitted.append(100 * float((model(x).argmax(1) == y)[wrong].double().mean()))
        scores = scores_of(model, x, y)
        curves = {name: found(score, wrong) for name, score in scores.items()}
        for name, curve in curves.items():
            precisions[name].append(100 * float(curve[count - 1]) / count)
        print(f"{epoch:6d}{fitted[-1]:8.1f}", *(f"{values[-1]:15.1f}" for values in precisions.values()), flush=True)
    suspects = scores["self-influence"].topk(SHOWN**2).indices
    draw(epochs, precisions, fitted, curves, (x, y, wrong), suspects)
    print(f"\nfitted: the share of the wrong labels that the network predicts, in %\nPicture: {PICTURE}")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--small", action="store_true", help="less data and fewer epochs")
    main(parser.parse_args().small)
