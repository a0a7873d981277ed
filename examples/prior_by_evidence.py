"""The prior by the evidence
=========================

How wide the prior of the weights should be, without any images held out: where the evidence is largest.

A net learns 300 images of digits, a fifth of them with wrong labels. The evidence ``log p(data)`` of the Laplace
approximation is how well the training data are explained by a prior of this width, all weights averaged over: a narrow
prior cannot explain them, and a wide one could have explained anything. It is computed from the eigenvalues of the
Fisher matrix, once; every further prior is free. Beside it stands what it is a stand-in for: the log-likelihood of
images that were held out, which is not asked. ``fit_prior`` finds the largest evidence for one precision, and for one of
each layer.

::

    python examples/prior_by_evidence.py            half a minute
    python examples/prior_by_evidence.py --small    the same code on less data
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from pathlib import Path

import torch
from matplotlib.figure import Figure
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, nll_loss

from nngeometry import FIM, PMatKFAC, Posterior

PICTURE = Path(__file__).parent / "output" / "prior_by_evidence.png"
WRONG = 0.2


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


def train(model: nn.Module, x: Tensor, y: Tensor, epochs: int) -> None:
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
    for _ in range(epochs):
        for index in torch.randperm(len(x)).split(50):
            optimizer.zero_grad()
            cross_entropy(model(x[index]), y[index]).backward()
            optimizer.step()


# %%
# The evidence is of a prior precision; the log-likelihood of images that were held out is of the posterior with it.
def held_out(posterior: Posterior, x: Tensor, y: Tensor) -> float:
    """The log-likelihood of an image."""
    return -float(nll_loss(posterior.predict(x).log(), y))


def curves(
    posterior: Posterior, grid: Tensor, x: Tensor, y: Tensor, make: dict[str, object]
) -> tuple[list[float], list[float]]:
    """Evidence for a training image, and log-likelihood of a held-out one, by prior precision."""
    n = posterior.num_data
    evidence = [float(posterior.log_marginal_likelihood(d)) / n for d in grid]
    test = [held_out(Posterior(posterior.model, posterior.matrix, prior_precision=float(d), **make), x, y) for d in grid]
    return evidence, test


# %%
# The picture shows both, and the precisions that ``fit_prior`` finds.
def draw(grid: Tensor, evidence: list[float], test: list[float], found: dict[str, Posterior], softmax: float) -> None:
    figure = Figure(figsize=(11, 3.8), layout="constrained", dpi=150)
    left, middle, right = figure.subplots(1, 3, width_ratios=(1, 1, 0.8))
    one = found["one precision"].prior_precision
    left.semilogx(grid, evidence, "C0")
    left.set(title="evidence", ylabel="nats for a training image", xlabel="prior precision")
    middle.semilogx(grid, test, "C1")
    middle.axhline(softmax, color="k", linestyle=":", linewidth=0.8, label="softmax of the net")
    middle.set(title="held-out images", ylabel="log-likelihood, nats for an image", xlabel="prior precision")
    for ax in (left, middle):
        ax.axvline(one, color="C2", linestyle="--", linewidth=1, label=f"fit_prior: {one:.2g}")
        ax.legend(frameon=False, fontsize=8, loc="lower center")
    each = found["one for each layer"].prior_precision
    names = [f"layer {name}" for name in each]
    right.barh(names, list(each.values()), color="C2")
    right.axvline(one, color="C2", linestyle="--", linewidth=1)
    right.invert_yaxis()
    right.set(title="fit_prior(per_layer=True)", xlabel="prior precision", xscale="log")
    PICTURE.parent.mkdir(exist_ok=True)
    figure.savefig(PICTURE)


# %%
# The eigenvalues are computed once, whatever the number of precisions that are tried.
def main(small: bool) -> None:
    torch.set_num_threads(1)
    torch.manual_seed(0)
    n = 150 if small else 300
    x, y, x_test, y_test = digits(n)
    model = nn.Sequential(
        *(nn.Conv2d(1, 8, 3), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten()),
        *(nn.Linear(72, 48), nn.ReLU(), nn.Linear(48, 10)),
    ).double()
    train(model, x, y, 20 if small else 60)
    make: dict[str, object] = {"num_data": n, "data": (x, y)}
    posterior = Posterior(model, FIM(model, (x,), PMatKFAC), num_data=n, data=(x, y))
    grid = torch.logspace(-2, 4, 13 if small else 49, dtype=torch.float64)
    evidence, test = curves(posterior, grid, x_test, y_test, make)
    with torch.no_grad():
        softmax = -float(cross_entropy(model(x_test), y_test))
    found = {"one precision": posterior.fit_prior(), "one for each layer": posterior.fit_prior(per_layer=True)}
    print(f"softmax of the net       held-out log-likelihood {softmax:.3f}")
    for name, fitted in found.items():
        prior = fitted.prior_precision
        each = ", ".join(f"{d:.2g}" for d in (prior.values() if isinstance(prior, Mapping) else [prior]))
        print(
            f"{name:20} {each:>18}   evidence {float(fitted.log_marginal_likelihood()) / n:.3f}"
            f"   held-out log-likelihood {held_out(fitted, x_test, y_test):.3f}"
        )
    best = max(range(len(grid)), key=test.__getitem__)
    print(f"largest of the grid on held-out images: {test[best]:.3f} at {float(grid[best]):.2g}")
    draw(grid, evidence, test, found, softmax)
    print(f"picture: {PICTURE}")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--small", action="store_true", help="less data")
    main(parser.parse_args().small)
