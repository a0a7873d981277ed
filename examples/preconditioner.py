"""Which matrix preconditions which
================================

Which approximation of a matrix makes a good preconditioner for solves with that matrix?

Conjugate gradients on (G + damping) x = b, where G is the generalised Gauss-Newton matrix (GGN) of a classifier and
is known by its products alone. The preconditioner is another representation of G, solved with the same damping. We
count products with G until the residual is a millionth of b, before and after training:

1. for all parameters together: KFAC and the other block diagonal ones do harm, because they leave out what couples the
   layers, even with exact blocks, unless the damping is far below the mean eigenvalue; a low-rank approximation of G
   as a whole helps (its sketch takes 60 products more, but once, for all solves with any damping);
2. for the parameters of each layer alone, where only the block counts: KFAC needs fewer products than nothing.

::

    python examples/preconditioner.py            less than a minute
    python examples/preconditioner.py --small    the same code on less
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from matplotlib.figure import Figure
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from nngeometry import (
    GGN,
    LayerCollection,
    PFMapDense,
    PMat,
    PMatBlockDiag,
    PMatDiag,
    PMatEKFAC,
    PMatImplicit,
    PMatKFAC,
    PMatLowRank,
)
from nngeometry.linalg import cg

OUTPUT = Path(__file__).parent / "output"
DAMPINGS = (1e-1, 1e-2, 1e-3)
FAR_BELOW = 1e-5  # the mean eigenvalue, which is about 2e-3
BLOCKS = (PMatDiag, PMatKFAC, PMatEKFAC, PMatBlockDiag)
RANK = 50
STYLES = {
    "none": "k-",
    "Diag": "C7--",
    "KFAC": "C0o-",
    "EKFAC": "C1s--",
    "BlockDiag": "C2^-",
    f"LowRank ({RANK})": "C3D-",
}

Table = dict[str, list[int]]


# %%
# The classifier is a small MLP on the digits of scikit-learn.
def digits(n: int) -> tuple[Tensor, Tensor]:
    """Images and labels."""
    data = load_digits()
    order = torch.randperm(len(data.target), generator=torch.Generator().manual_seed(0))[:n]
    return torch.tensor(data.data)[order] / 16, torch.tensor(data.target)[order]


def train(model: nn.Module, x: Tensor, y: Tensor, epochs: int) -> None:
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
    for _ in range(epochs):
        for index in torch.randperm(len(x)).split(64):
            optimizer.zero_grad()
            cross_entropy(model(x[index]), y[index]).backward()
            optimizer.step()


def rows(F: PMat) -> Callable[[Tensor], Tensor]:
    """Products with a matrix as the function of rows that the algorithms take."""
    return lambda v: F.mv(PFMapDense(F.layer_collection, v.unsqueeze(0))).to_torch()[0]


# %%
# ``solve(..., preconditioner=F)`` runs conjugate gradients. Here its products are counted.
def count(G: PMat, preconditioner: PMat | None, damping: float) -> int:
    """The products with G in one solve: ``G.solve(b, damping, preconditioner=...)``, which does not tell."""
    b = torch.randn(1, G.size(0), generator=torch.Generator().manual_seed(1))
    product = rows(G)
    precondition = None if preconditioner is None else rows(preconditioner.inv(damping))
    return cg(lambda v: product(v) + damping * v, b, preconditioner=precondition).products


# %%
# Every representation is tried with every damping.
def compare(
    title: str,
    model: nn.Module,
    batch: tuple[Tensor, Tensor],
    *names: str,
    dampings: Sequence[float],
    representations: Sequence[Any] = BLOCKS,
) -> Table:
    """Print the products of preconditioners, for the GGN of some layers, by default all."""
    lc = LayerCollection.from_model(model, *names)
    G = GGN(model, batch, PMatImplicit, layer_collection=lc)
    made: dict[str, PMat | None] = {"none": None}
    for representation in representations:
        name = representation.__name__.removeprefix("PMat")
        made[name] = GGN(model, batch, representation, layer_collection=lc)
    made[f"LowRank ({RANK})"] = PMatLowRank.nystrom(G, RANK, generator=torch.Generator().manual_seed(0))
    table = {name: [count(G, F, damping) for damping in dampings] for name, F in made.items()}
    print(f"\n{title}, {G.size(0)} parameters: products at damping {', '.join(f'{d:g}' for d in dampings)}")
    for name, products in table.items():
        print(f"  {name:14}", *(f"{n:6d}" for n in products), flush=True)
    return table


# %%
# The picture shows products against the damping.
def draw(tables: dict[str, Table]) -> Path:
    columns = len(tables) // 2
    figure = Figure(figsize=(3 * columns, 6), layout="constrained", dpi=200)
    axes = figure.subplots(2, columns, sharex=True, sharey=True)
    for ax, (title, table) in zip(axes.flat, tables.items(), strict=True):
        for name, products in table.items():
            ax.loglog(DAMPINGS[: len(products)], products, STYLES[name], label=name, markersize=4)
        ax.set_title(title, fontsize=10)
    for ax in axes[-1]:
        ax.set_xlabel("damping")
    for ax in axes[:, 0]:
        ax.set_ylabel("products")
    axes[0, 0].legend(fontsize=8)
    path = OUTPUT / "preconditioner.png"
    figure.savefig(path)
    return path


# %%
# The comparison is made for all layers together, for each alone, before and after training.
def main(small: bool) -> None:
    torch.set_num_threads(1)  # the network is so small that more threads mostly wait for each other
    torch.manual_seed(0)
    torch.set_default_dtype(torch.float64)
    batch = digits(300 if small else 1000)
    hidden = 16 if small else 32
    model = nn.Sequential(nn.Linear(64, hidden), nn.ReLU(), nn.Linear(hidden, 10))
    dampings = DAMPINGS[:2] if small else DAMPINGS
    tables = {}
    for when, epochs in (("before training", 0), ("after training", 5 if small else 30)):
        train(model, *batch, epochs)
        title = f"all layers, {when}"
        tables[title] = compare(title.capitalize(), model, batch, dampings=dampings)
        for place, name in (("first", "0"), ("last", "2")):  # of a single layer, the exact block is G itself
            title = f"{place} layer, {when}"
            tables[title] = compare(
                title.capitalize(), model, batch, name, dampings=dampings, representations=BLOCKS[:-1]
            )
        if not epochs and not small:
            title = f"All layers, {when}, little damping"
            compare(title, model, batch, dampings=[FAR_BELOW], representations=(PMatKFAC, PMatBlockDiag))
    OUTPUT.mkdir(exist_ok=True)
    print(f"\nPicture: {draw(tables)}")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--small", action="store_true", help="less data, a smaller network and fewer epochs")
    main(parser.parse_args().small)
