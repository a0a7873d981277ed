"""Hessian, Gauss-Newton and empirical Fisher, side by side
========================================================

A visual tour: three curvature matrices of a small convolutional network, side by side on one colour scale.

The generalised Gauss-Newton matrix (GGN), for the cross-entropy the Fisher matrix, is the Hessian less the second
derivatives of the outputs, weighted by how far these are from the labels. Before training that is a large part of the
Hessian, after it little. The empirical Fisher is the second moment of the gradients at the labels. Before training the
labels could just as well be drawn from the model, and it is near the GGN; later it is smaller, as the gradients vanish.

::

    python examples/visual_tour.py            less than a minute
    python examples/visual_tour.py --small    the same code on less data
"""

from __future__ import annotations

import argparse
from collections import OrderedDict
from pathlib import Path

import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from nngeometry import FIM, GGN, EmpiricalFisher, Hessian, PMat, PMatDense
from nngeometry.plot import plot_matrices

PICTURE = Path(__file__).parent / "output" / "visual_tour.png"


# %%
# The network is smooth, so that its Hessian exists everywhere, and small, so that its matrices can be drawn.
def digits(n: int) -> tuple[Tensor, Tensor]:
    data = load_digits()
    order = torch.randperm(len(data.target), generator=torch.Generator().manual_seed(0))[:n]
    return torch.tensor(data.images)[order].unsqueeze(1) / 16, torch.tensor(data.target)[order]


def network() -> nn.Sequential:
    """Smooth, so that the Hessian exists everywhere."""
    layers = OrderedDict(
        conv1=nn.Conv2d(1, 4, 3, padding=1),
        tanh1=nn.Tanh(),
        pool1=nn.AvgPool2d(2),
        conv2=nn.Conv2d(4, 8, 3, padding=1),
        tanh2=nn.Tanh(),
        pool2=nn.AvgPool2d(2),
        flatten=nn.Flatten(),
        linear=nn.Linear(32, 10),
    )
    return nn.Sequential(layers)


def train(model: nn.Module, x: Tensor, y: Tensor, epochs: int) -> None:
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    for _ in range(epochs):
        for index in torch.randperm(len(x)).split(64):
            optimizer.zero_grad()
            cross_entropy(model(x[index]), y[index]).backward()
            optimizer.step()


# %%
# The angle between two matrices takes three numbers: the trace of their product and their norms.
def cosine(A: PMat, B: PMat) -> float:
    """Of the angle between two dense matrices."""
    return float((A @ B).trace() / (A.norm() * B.norm()))


# %%
# The three matrices differ in the function that makes them. The representation is the same.
def compare(model: nn.Module, x: Tensor, y: Tensor) -> dict[str, PMat]:
    """The three matrices, and a line for each."""
    matrices: dict[str, PMat] = {
        "Hessian": Hessian(model, (x, y), PMatDense),
        "GGN": GGN(model, (x, y), PMatDense),
        "empirical Fisher": EmpiricalFisher(model, (x, y), PMatDense),
    }
    H, G = matrices["Hessian"], matrices["GGN"]
    print(f"{'':18}{'trace':>10}{'norm':>10}{'largest':>10}{'smallest':>10}   cosine with the Hessian")
    for name, M in matrices.items():
        l = M.eigenvalues()
        print(f"{name:18}{M.trace():10.3f}{M.norm():10.3f}{l[0]:10.3f}{l[-1]:10.3f}   {cosine(M, H):.3f}", flush=True)
    F = FIM(model, (x,), PMatDense)
    print(f"|Hessian - GGN| / |GGN| = {(H - G).norm() / G.norm():.3f}", end="")
    print(f", |Fisher - GGN| / |GGN| = {(F - G).norm() / G.norm():.0e}")
    return matrices


# %%
# The matrices are drawn before and after training, on one colour scale.
def main(small: bool) -> None:
    torch.set_num_threads(1)  # the network is so small that more threads mostly wait for each other
    torch.manual_seed(0)
    torch.set_default_dtype(torch.float64)
    x, y = digits(50 if small else 200)
    model = network()
    print(f"{sum(p.numel() for p in model.parameters())} parameters, {len(x)} images")

    panels: dict[str, PMat] = {}
    for when, epochs in (("before training", 0), ("after training", 20 if small else 150)):
        train(model, x, y, epochs)
        loss = cross_entropy(model(x), y)
        print(f"\n{when.capitalize()}, loss {loss:.3f}")
        panels |= {f"{name}, {when}": M for name, M in compare(model, x, y).items()}

    PICTURE.parent.mkdir(exist_ok=True)
    plot_matrices(panels, PICTURE, ncols=3)
    print(f"\nPicture: {PICTURE}")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--small", action="store_true", help="less data and fewer epochs")
    main(parser.parse_args().small)
