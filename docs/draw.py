"""The pictures of the first page and of the README: ``make pictures``."""

from __future__ import annotations

from collections import OrderedDict
from pathlib import Path
from typing import Any

import torch
from sklearn.datasets import load_digits
from torch import nn

from nngeometry import (
    FIM,
    PMat,
    PMatBlockDiag,
    PMatDense,
    PMatDiag,
    PMatEKFAC,
    PMatKFAC,
    PMatLowRank,
    PMatMixed,
    PMatQuasiDiag,
)
from nngeometry.plot import plot_matrices

PICTURES = Path(__file__).parent / "pictures"
REPRESENTATIONS: dict[str, Any] = {
    "PMatDense": PMatDense,
    "PMatLowRank": PMatLowRank,
    "PMatBlockDiag": PMatBlockDiag,
    "PMatKFAC": PMatKFAC,
    "PMatEKFAC": PMatEKFAC,
    "PMatMixed": PMatMixed.of(PMatKFAC, {nn.Linear: PMatBlockDiag}),
    "PMatQuasiDiag": PMatQuasiDiag,
    "PMatDiag": PMatDiag,
}


def matrices() -> dict[str, PMat]:
    """The Fisher matrix of a convolutional network that was trained on digits, in many representations."""
    torch.manual_seed(0)
    torch.set_num_threads(1)
    data = load_digits()
    x = torch.tensor(data.images, dtype=torch.float32).unsqueeze(1)[:300] / 16
    y = torch.tensor(data.target)[:300]
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
    model = nn.Sequential(layers)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    for _ in range(60):
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(x), y).backward()
        optimizer.step()
    return {name: FIM(model, (x[:100],), R) for name, R in REPRESENTATIONS.items()}


if __name__ == "__main__":
    drawn = matrices()
    plot_matrices(drawn, PICTURES / "matrices.png", ncols=4)
    plot_matrices(drawn, PICTURES / "matrices-narrow.png", ncols=2)
