"""The tangent kernel turns towards the labels
===========================================

The tangent kernel turns towards the labels while a network trains.

Alignment is the cosine between a kernel and that of the labels, ``y y^T``; centred (CKA) when both are centred first.
The tangent kernel of a small convolutional network is aligned with the labels before it is trained, because images of a
digit look alike. When the network learns, the alignment grows (Baratin et al. 2021, 2008.00938; Fort et al. 2020,
2010.15110), on images that it has not seen as well. The kernel is the sum of those of the layers, each of which has an
alignment of its own; the trace says which layers the sum is mostly of.

::

    python examples/alignment.py            a minute
    python examples/alignment.py --small    the same code on less data
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from matplotlib.figure import Figure
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from nngeometry import FMat, GramMatrix

PICTURE = Path(__file__).parent / "output" / "alignment.png"
NAMES = {"0": "conv 1", "2": "conv 2", "5": "linear 1", "7": "linear 2"}
Curves = dict[str, list[float]]


# %%
# A small convolutional network is trained on the digits of scikit-learn.
def digits(n: int, n_test: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Images and labels, for training and for testing."""
    data = load_digits()
    order = torch.randperm(len(data.target), generator=torch.Generator().manual_seed(0))[: n + n_test]
    x, y = torch.tensor(data.images)[order].unsqueeze(1) / 16, torch.tensor(data.target)[order]
    return x[:n], y[:n], x[n:], y[n:]


def train(model: nn.Module, x: Tensor, y: Tensor, epochs: int) -> None:
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for _ in range(epochs):
        for index in torch.randperm(len(x)).split(32):
            optimizer.zero_grad()
            cross_entropy(model(x[index]), y[index]).backward()
            optimizer.step()


# %%
# The picture shows the alignment of each layer, and which layers the trace comes from.
def draw(epochs: list[int], whole: Curves, layers: dict[str, Curves]) -> None:
    figure = Figure(figsize=(11, 3.4), layout="constrained", dpi=200)
    left, middle, right = figure.subplots(1, 3)
    styles = {"CKA, training": "C0.-", "CKA, test": "C0.--", "align, training": "C1.-", "align, test": "C1.--"}
    places = range(len(epochs))  # at equal distances
    for name, style in styles.items():
        left.plot(places, whole[name], style, label=name)
    for k, (name, curves) in enumerate(layers.items()):
        middle.plot(places, curves["CKA"], f"C{k + 2}.-", label=name)
        right.plot(places, curves["share"], f"C{k + 2}.-", label=name)
    left.set(ylabel="alignment with the labels", title="whole kernel")
    middle.set(ylabel="CKA with the labels, test", title="kernels of the layers")
    right.set(ylabel="share of the trace", title="what the sum is made of", ylim=(0, None))
    for ax in (left, middle, right):
        ax.set_xticks(places, [str(e) for e in epochs])
        ax.set_xlabel("epochs")
    left.legend(frameon=False, fontsize=8)
    middle.legend(frameon=False, fontsize=8)  # and of the right panel
    PICTURE.parent.mkdir(exist_ok=True)
    figure.savefig(PICTURE)


# %%
# ``GramMatrix(..., per_layer=True)`` is the kernel of each layer. Their sum is the tangent kernel.
def main(small: bool) -> None:
    torch.set_num_threads(1)  # the network is so small that more threads mostly wait for each other
    torch.manual_seed(0)
    torch.set_default_dtype(torch.float64)
    x, y, x_test, y_test = digits(200, 100) if small else digits(1000, 500)
    model = nn.Sequential(
        *(nn.Conv2d(1, 8, 3, padding=1), nn.ReLU(), nn.Conv2d(8, 16, 3, stride=2, padding=1), nn.ReLU(), nn.Flatten()),
        *(nn.Linear(256, 32), nn.ReLU(), nn.Linear(32, 10)),
    )
    seen = slice(0, len(x_test))  # as many as are tested on: alignment depends on the number
    epochs = [0, 1, 2, 4] if small else [0, 1, 2, 4, 8, 16, 32]

    print(f"{sum(p.numel() for p in model.parameters())} parameters, {len(x)} images to train on; kernels of", end=" ")
    print(f"{len(x_test)} images\n\n{'':29}whole, CKA{'':13}CKA of layers, test\nepochs  accuracy  distance", end="")
    print("  training    test", *(f"{name:>9}" for name in NAMES.values()))
    whole: Curves = {f"{name}, {side}": [] for name in ("CKA", "align") for side in ("training", "test")}
    layers: dict[str, Curves] = {name: {"CKA": [], "share": []} for name in NAMES.values()}
    first: FMat | None = None
    done = 0
    for epoch in epochs:
        train(model, x, y, epoch - done)
        done = epoch
        with torch.no_grad():
            accuracy = 100 * float((model(x_test).argmax(1) == y_test).double().mean())
        parts = GramMatrix(model, (x_test,), output="trace", per_layer=True)
        test = sum(parts.values())
        training = GramMatrix(model, (x[seen],), output="trace")
        first = test if first is None else first
        for side, K, labels in (("training", training, y[seen]), ("test", test, y_test)):
            whole[f"CKA, {side}"].append(float(K.cka(labels)))
            whole[f"align, {side}"].append(float(K.align(labels)))
        for key, name in NAMES.items():
            layers[name]["CKA"].append(float(parts[key].cka(y_test)))
            layers[name]["share"].append(float(parts[key].trace() / test.trace()))
        print(f"{epoch:6d}{accuracy:10.1f}{abs(float(first.distance(test))):10.3f}", end="")
        print(f"{whole['CKA, training'][-1]:10.3f}{whole['CKA, test'][-1]:8.3f} ", end="")
        print(*(f"{layers[name]['CKA'][-1]:9.3f}" for name in NAMES.values()), flush=True)
    draw(epochs, whole, layers)
    print(f"\nPicture: {PICTURE}")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--small", action="store_true", help="less data and fewer epochs")
    main(parser.parse_args().small)
