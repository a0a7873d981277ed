"""The prior by the evidence
=========================

How wide the prior of the weights should be, without any images held out: where the evidence is largest.

A net learns 300 images of digits, a fifth of them with wrong labels, with one prior precision d after another: weight
decay ``d / 2 |w|^2`` beside the log-likelihood of all images. The evidence ``log p(data)`` of its Laplace approximation
says how well the training data are explained by all weights that such a prior allows: too narrow a prior cannot explain
them, and too wide a one could have explained anything. Beside it stands what it stands in for, and does not look at:
the log-likelihood of 600 images with their right labels.

``fit_prior`` finds the precision of the largest evidence, one or one for each layer. A few rounds of it and of training
take a net to a good prior from any start, with no grid and no images held out.

::

    python examples/prior_by_evidence.py            a minute
    python examples/prior_by_evidence.py --small    the same code on less data
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from matplotlib.figure import Figure
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from nngeometry import FIM, PMatKFAC, Posterior

PICTURE = Path(__file__).parent / "output" / "prior_by_evidence.png"
WRONG = 0.2
#: A precision of all weights, or of those of each layer.
Prior = Any


# %%
# A small convolutional net learns digits, a fifth of which have wrong labels.
def digits(n: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Training images and labels, and those that are held out."""
    data = load_digits()
    order = torch.randperm(len(data.target))
    x = torch.tensor(data.images, dtype=torch.float64)[order].unsqueeze(1) / 16
    y = torch.tensor(data.target)[order]
    labels = y[:n].clone()
    wrong = torch.rand(n) < WRONG
    labels[wrong] = torch.randint(10, (int(wrong.sum()),))
    return x[:n], labels, x[-600:], y[-600:]


def net() -> nn.Module:
    torch.manual_seed(1)
    return nn.Sequential(
        *(nn.Conv2d(1, 8, 3), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten()),
        *(nn.Linear(72, 48), nn.ReLU(), nn.Linear(48, 10)),
    ).double()


def train(model: nn.Module, prior: Prior, x: Tensor, y: Tensor, steps: int) -> None:
    """To the largest ``log p(y | w) - d / 2 |w|^2``, d being of all layers or of each."""
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    layers = {name: list(m.parameters()) for name, m in model.named_modules() if isinstance(m, nn.Conv2d | nn.Linear)}
    each = prior if isinstance(prior, Mapping) else dict.fromkeys(layers, prior)
    for _ in range(steps):
        optimizer.zero_grad()
        decay = torch.stack([each[name] * w.square().sum() for name, ws in layers.items() for w in ws]).sum()
        (cross_entropy(model(x), y) + decay / (2 * len(x))).backward()
        optimizer.step()
        schedule.step()


# %%
# The posterior has the prior that the net was trained with. KFAC has all eigenvalues, so the evidence costs nothing.
def posterior_of(model: nn.Module, prior: Prior, x: Tensor, y: Tensor) -> Posterior:
    F = FIM(model, (x,), PMatKFAC)
    return Posterior(model, F, num_data=len(x), prior_precision=prior, data=(x, y))


def evidence_of(posterior: Posterior) -> float:
    """In nats for a training image."""
    return float(posterior.log_marginal_likelihood()) / posterior.num_data


def held_out(model: nn.Module, x: Tensor, y: Tensor) -> float:
    """The log-likelihood of an image, in nats."""
    with torch.no_grad():
        return -float(cross_entropy(model(x), y))


# %%
# Training with the prior that has the largest evidence, again and again.
def rounds(per_layer: bool, count: int, data: tuple[Tensor, ...], steps: int) -> tuple[list[Prior], nn.Module]:
    """The priors of each round, and the net of the last."""
    x, y = data[:2]
    priors: list[Prior] = [0.1]
    model = net()
    for _ in range(count):
        train(model, priors[-1], x, y, steps)
        priors.append(posterior_of(model, priors[-1], x, y).fit_prior(per_layer).prior_precision)
    return priors, model


# %%
# The picture shows the evidence beside the held-out images, and the rounds of ``fit_prior``.
def draw(grid: list[float], evidence: list[float], test: list[float], one: list[Prior], each: list[Prior]) -> None:
    figure = Figure(figsize=(11, 3.6), layout="constrained", dpi=150)
    axes = figure.subplots(1, 3, width_ratios=(1, 1, 0.9))
    for ax, values, color, where, title in (
        (axes[0], evidence, "C0", "upper left", "evidence, of the training images"),
        (axes[1], test, "C1", "lower left", "log-likelihood of held-out images"),
    ):
        ax.semilogx(grid, values, f"{color}o-", markersize=4)
        ax.axvline(one[-1], color="C2", linestyle="--", linewidth=1, label=f"fit_prior: {one[-1]:.2g}")
        ax.set(title=title, xlabel="prior precision", ylabel="nats for an image")
        ax.legend(frameon=False, fontsize=8, loc=where)
    ax = axes[2]
    ax.semilogy(range(len(one)), one, "C2o--", markersize=4, label="one precision")
    for k, name in enumerate(each[-1]):
        values = [d[name] if isinstance(d, Mapping) else d for d in each]
        ax.semilogy(range(len(each)), values, f"C{k + 3}.-", label=f"layer {name}")
    ax.set(title="rounds of training and fit_prior", xlabel="round", ylabel="prior precision", xticks=range(len(one)))
    ax.legend(frameon=False, fontsize=8)
    PICTURE.parent.mkdir(exist_ok=True)
    figure.savefig(PICTURE)


def main(small: bool) -> None:
    torch.set_num_threads(1)
    torch.manual_seed(0)
    data = digits(100 if small else 300)
    x, y, *others = data
    steps = 40 if small else 500
    grid = torch.logspace(-2, 2, 5 if small else 13).tolist()
    evidence, test = [], []
    print("prior precision   evidence   held-out log-likelihood")
    for d in grid:
        model = net()
        train(model, d, x, y, steps)
        evidence.append(evidence_of(posterior_of(model, d, x, y)))
        test.append(held_out(model, *others))
        print(f"{d:15.3g}   {evidence[-1]:8.3f}   {test[-1]:8.3f}")
    found = {}
    for name, per_layer in (("one", False), ("of each layer", True)):
        priors, model = rounds(per_layer, 2 if small else 5, data, steps)
        found[name] = priors
        last = priors[-1]
        shown = ", ".join(f"{d:.2g}" for d in (last.values() if isinstance(last, Mapping) else [last]))
        value = evidence_of(posterior_of(model, last, x, y))
        print(f"fit_prior, {name}: {shown}   evidence {value:.3f}   held out {held_out(model, *others):.3f}")
    draw(grid, evidence, test, found["one"], found["of each layer"])
    print(f"picture: {PICTURE}")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--small", action="store_true", help="less data")
    main(parser.parse_args().small)
