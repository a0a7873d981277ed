"""The pictures that are committed, of the README and of pages: ``make pictures``, in ten minutes."""

from __future__ import annotations

import subprocess
import sys
from collections import OrderedDict
from pathlib import Path
from typing import Any

import torch
from PIL import Image
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

ROOT = Path(__file__).parents[1]
PICTURES = ROOT / "docs" / "pictures"
#: Whose pictures, at full size, pages show.
EXAMPLES = ("continual", "merging", "pruning", "active_learning", "calibration_ood", "prior_by_evidence")
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


def small(path: Path, width: int, to: Path) -> None:
    """Write a picture with at most so many columns, and 128 colours."""
    with Image.open(path) as picture:
        shown = picture.convert("RGB")
    if shown.width > width:
        shown = shown.resize((width, round(shown.height * width / shown.width)), Image.Resampling.LANCZOS)
    shown.quantize(128, dither=Image.Dither.NONE).save(to, optimize=True)


if __name__ == "__main__":
    drawn = matrices()
    for name, columns in (("matrices", 4), ("matrices-narrow", 2)):
        plot_matrices(drawn, PICTURES / f"{name}.png", ncols=columns)
        small(PICTURES / f"{name}.png", 480 * columns, PICTURES / f"{name}.png")
    for name in EXAMPLES:
        subprocess.run([sys.executable, str(ROOT / "examples" / f"{name}.py")], check=True)
        small(ROOT / "examples" / "output" / f"{name}.png", 1000, PICTURES / f"{name}.png")
