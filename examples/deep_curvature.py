"""The curvature of a deep net during training
===========================================

The curvature of a deep net while it is trained: from an architecture to a page that shows what it learnt.

VGG16, narrow by default, on images of digits (or CIFAR-100, if torchvision and the data are there) is trained by SGD
and, where it is there, by a second-order optimiser. Then its curvature is looked at: the spectrum of the Hessian by
Lanczos from two random vectors and from ten, statistics of loss, gradient and curvature over the checkpoints, the
landscape along eigenvectors, and a report, all in examples/output.

::

    python examples/deep_curvature.py                  minutes
    python examples/deep_curvature.py --small          the same code on less data, in seconds
    python examples/deep_curvature.py --full           the published width; for an accelerator
    python examples/deep_curvature.py --data FOLDER    CIFAR-100, in a folder where torchvision finds it
"""

from __future__ import annotations

import argparse
import shutil
import time
from pathlib import Path
from typing import Any

import torch
from sklearn.datasets import load_digits
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from nngeometry import GGN, Hessian, PMatImplicit
from nngeometry.calibration import calibration
from nngeometry.landscape import along_eigenvectors
from nngeometry.plot import plot_calibration, plot_density, plot_landscape, plot_spectra, plot_statistics
from nngeometry.report import report
from nngeometry.spectrum import Spectrum, extreme_eigenpairs, spectral_density
from nngeometry.statistics import loss_trajectory
from nngeometry.training import SWA, checkpoints, load_checkpoint, train, weights, zoo

OUTPUT = Path(__file__).parent / "output"


# %%
# Images come from scikit-learn, or from CIFAR-100 where it is there.
def digits(small: bool) -> tuple[TensorDataset, TensorDataset]:
    """Images for training and for testing."""
    of = load_digits()
    order = torch.randperm(len(of.target), generator=torch.Generator().manual_seed(0))
    x, y = torch.tensor(of.images, dtype=torch.float32)[order].unsqueeze(1) / 16, torch.tensor(of.target)[order]
    n = 256 if small else 1280
    return TensorDataset(x[:n], y[:n]), TensorDataset(x[n : n + 512], y[n : n + 512])


def cifar(folder: str) -> tuple[Any, Any]:
    """CIFAR-100, normalised."""
    from torchvision import datasets, transforms  # type: ignore[import-not-found]

    change = transforms.Compose(
        [transforms.ToTensor(), transforms.Normalize((0.507, 0.487, 0.441), (0.267, 0.256, 0.276))]
    )
    return tuple(datasets.CIFAR100(folder, train=t, transform=change) for t in (True, False))  # type: ignore[return-value]


# %%
# Optimisers are built by name. One of second order takes the place of SGD without another loop.
def optimisers(model: nn.Module) -> dict[str, torch.optim.Optimizer]:
    """By name."""
    return {
        "SGD": torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9),
        "AdamW": torch.optim.AdamW(model.parameters(), lr=1e-3),
    }


# %%
# The run trains, then looks at the checkpoints: spectrum, statistics, landscape, report.
def show(title: str, spectrum: Spectrum) -> None:
    print(f"\n{title}: {spectrum}")
    for name, e in spectrum.table().items():
        print(f"  {name:44}{float(e.value):12.4g}" + (f" +- {float(e.error):.1g}" if float(e.error) else ""))


def main(small: bool, full: bool, data: str | None) -> None:
    began = time.perf_counter()
    OUTPUT.mkdir(exist_ok=True)
    if not full:
        torch.set_num_threads(1)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    training, testing = digits(small) if data is None else cifar(data)
    images = {"channels": 1, "size": 8, "classes": 10} if data is None else {"channels": 3, "size": 32, "classes": 100}
    width = 1.0 if full else 0.03 if small else 0.06
    epochs = 12 if small else 24
    few = [[b.to(device) for b in batch] for batch, _ in zip(DataLoader(training, 128), range(4), strict=False)]

    for name in optimisers(zoo.mlp()):
        torch.manual_seed(0)
        model = zoo.vgg(16, True, width=width, dropout=0.0, **images).to(device)
        optimiser = optimisers(model)[name]
        loader = DataLoader(training, 64, shuffle=True, generator=torch.Generator().manual_seed(0))
        folder = OUTPUT / f"deep_curvature_{name}"
        shutil.rmtree(folder, ignore_errors=True)
        history = train(
            model,
            loader,
            optimiser,
            epochs=epochs,
            test_loader=DataLoader(testing, 256),
            scheduler=torch.optim.lr_scheduler.CosineAnnealingLR(optimiser, epochs),
            average=SWA(start=epochs // 2),
            checkpoints=folder,
            save_every=max(1, epochs // 4),
            evaluate_every=2,
            verbose=False,
        )
        print(f"{name}: {sum(p.numel() for p in model.parameters())} parameters; {history}", flush=True)
        history.plot(OUTPUT / f"deep_curvature_{name}_history.png")

    # What SGD learnt.
    folder = OUTPUT / "deep_curvature_SGD"
    model = zoo.vgg(16, True, width=width, dropout=0.0, **images).to(device)
    model.load_state_dict(load_checkpoint(checkpoints(folder)[epochs])["model"])
    model.eval()
    H = Hessian(model, few, PMatImplicit)
    steps = 20 if small else 60
    spectra = {f"{n} vectors": spectral_density(H, steps=steps, probes=n) for n in (2, 4 if small else 10)}
    for title, spectrum in spectra.items():
        show(title, spectrum)
    plot_density(spectra, OUTPUT / "deep_curvature_density.png", log=True)
    pairs = extreme_eigenpairs(H, 3, "both", tol=1e-3)
    print("\nextreme eigenvalues", [round(value, 3) for value in pairs.values.tolist()])

    course = {}
    for epoch, state in weights(folder).items():
        model.load_state_dict(dict(state))
        course[epoch] = spectral_density(GGN(model, few[:2], PMatImplicit), steps=steps // 2, probes=2, outliers=3)
    plot_spectra(course, OUTPUT / "deep_curvature_spectra.png")
    trajectory = loss_trajectory(model, weights(folder), few, matrix=GGN, probes=6 if small else 15)
    print(f"\n{trajectory}", flush=True)
    plot_statistics(trajectory, OUTPUT / "deep_curvature_statistics.png")

    ranks = (0, 1, -1, (0, 1))
    lines = along_eigenvectors(
        model,
        few[:2],
        ranks=ranks,
        points=5 if small else 15,
        test_loader=DataLoader(testing, 256),
        recompute_batch_norm=False,
        eigen={"tol": 1e-2},
    )
    surface = lines.pop((0, 1))
    plot_landscape(lines, OUTPUT / "deep_curvature_lines.png")
    plot_landscape(surface, OUTPUT / "deep_curvature_contours.png")
    plot_landscape(surface, OUTPUT / "deep_curvature_surface.png", surface=True)
    with torch.no_grad():
        pairs_of = [(model(x.to(device)).softmax(1).cpu(), y) for x, y in DataLoader(testing, 256)]
    p, y = (torch.cat(parts) for parts in zip(*pairs_of, strict=True))
    plot_calibration(calibration(p, y), OUTPUT / "deep_curvature_calibration.png")
    page = report(
        model,
        few,
        path=OUTPUT / "deep_curvature.html",
        test_loader=DataLoader(testing, 256),
        seconds=5.0 if small else 60.0,
        title="VGG16",
        verbose=False,
    )
    print(f"\nPage and pictures in {page.parent}, {time.perf_counter() - began:.0f} s")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--small", action="store_true", help="less data and fewer epochs")
    parser.add_argument("--full", action="store_true", help="the published width")
    parser.add_argument("--data", help="a folder with CIFAR-100")
    given = parser.parse_args()
    main(given.small, given.full, given.data)
