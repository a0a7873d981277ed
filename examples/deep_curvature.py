"""The curvature of a deep net during training
===========================================

The curvature of a deep net while it is trained: from an architecture to a page that shows what it learnt.

VGG16 with BatchNorm, narrow unless it is asked for in full, on images of digits (or on CIFAR-100, where that is there),
is trained by SGD and by K-FAC. Then its curvature is looked at: the spectrum of the Hessian by Lanczos from a single
vector and from ten, statistics of loss, gradient and curvature over the checkpoints, the landscape along eigenvectors,
and a report, all in examples/output.

::

    python examples/deep_curvature.py                  two minutes
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

from nngeometry import FIM_MonteCarlo, Hessian, PMatImplicit, PMatKFAC, at
from nngeometry.calibration import calibration
from nngeometry.landscape import along_eigenvectors
from nngeometry.optim import SecondOrderOptimizer
from nngeometry.plot import (
    plot_calibration,
    plot_density,
    plot_history,
    plot_landscape,
    plot_spectra,
    plot_statistics,
)
from nngeometry.report import report
from nngeometry.spectrum import Spectrum, extreme_eigenpairs, spectral_density
from nngeometry.statistics import loss_trajectory
from nngeometry.training import SWA, checkpoints, evaluate, load_checkpoint, recompute_batch_norm, train, weights, zoo

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("--small", action="store_true", help="less data and fewer epochs")
parser.add_argument("--full", action="store_true", help="the published width")
parser.add_argument("--data", help="a folder with CIFAR-100")
given = parser.parse_args()
small: bool = given.small

began = time.perf_counter()
OUTPUT = Path(__file__).parent / "output"
OUTPUT.mkdir(exist_ok=True)
if not given.full:
    torch.set_num_threads(1)  # the net is so narrow that more threads mostly wait for each other
device = "cuda" if torch.cuda.is_available() else "cpu"


# %%
# Images come from scikit-learn, or from CIFAR-100 where it is there.
def digits(small: bool) -> tuple[TensorDataset, TensorDataset]:
    """Images for training and for testing."""
    of = load_digits()
    order = torch.randperm(len(of.target), generator=torch.Generator().manual_seed(0))
    x, y = torch.tensor(of.images, dtype=torch.float32)[order].unsqueeze(1) / 16, torch.tensor(of.target)[order]
    n = 512 if small else 1280
    return TensorDataset(x[:n], y[:n]), TensorDataset(x[n : n + 512], y[n : n + 512])


def cifar(folder: str) -> tuple[Any, Any]:
    """CIFAR-100, normalised."""
    from torchvision import datasets, transforms  # type: ignore[import-not-found]

    change = transforms.Compose(
        [transforms.ToTensor(), transforms.Normalize((0.507, 0.487, 0.441), (0.267, 0.256, 0.276))]
    )
    return tuple(datasets.CIFAR100(folder, train=t, transform=change) for t in (True, False))  # type: ignore[return-value]


training, testing = digits(small) if given.data is None else cifar(given.data)
few = [
    [part.to(device) for part in minibatch]
    for minibatch, _ in zip(DataLoader(training, 64 if small else 128), range(4), strict=False)
]
test_loader = DataLoader(testing, 256)


def net() -> nn.Module:
    """VGG16 for these images, from the same random numbers each time."""
    torch.manual_seed(0)
    of = {"channels": 1, "size": 8, "classes": 10} if given.data is None else {"size": 32, "classes": 100}
    return zoo.vgg(16, batch_norm=True, width=1.0 if given.full else 0.06, dropout=0.0, **of).to(device)


# %%
# Both optimisers are those of one loop. Steps of K-FAC are bounded by ``clip``, and it follows the curvature closely at
# first, when that changes fastest. Every second minibatch is observed.
epochs = 4 if small else 16


def sgd(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)


def kfac(model: nn.Module) -> torch.optim.Optimizer:
    return SecondOrderOptimizer(
        model,
        PMatKFAC,
        FIM_MonteCarlo,
        lr=0.03,
        damping=1e-2,
        clip=1e-3,
        observe_every=2,
        refresh=lambda step: 2 if step < 20 else 10,
    )


folders = {name: OUTPUT / f"deep_curvature_{name}" for name in ("SGD", "K-FAC")}
histories = {}
for name, optimiser_of in (("SGD", sgd), ("K-FAC", kfac)):
    model = net()
    optimiser = optimiser_of(model)
    loader = DataLoader(training, 32 if small else 64, shuffle=True, generator=torch.Generator().manual_seed(0))
    average = SWA(start=epochs - epochs // 4)
    shutil.rmtree(folders[name], ignore_errors=True)
    histories[name] = train(
        model,
        loader,
        optimiser,
        epochs=epochs,
        test_loader=test_loader,
        scheduler=torch.optim.lr_scheduler.CosineAnnealingLR(optimiser, epochs),
        average=average,
        checkpoints=folders[name],
        save_every=2 if small else 4,
        evaluate_every=2,
        verbose=False,
    )
    with at(model, average.mean()):
        recompute_batch_norm(model, loader)
        of_average = evaluate(model, test_loader)
    print(f"{name}: {sum(p.numel() for p in model.parameters())} parameters; {histories[name]}")
    print(f"  the average of the last {average.count} epochs: test accuracy {of_average.accuracy:.4f}", flush=True)

plot_history({name: of.columns() for name, of in histories.items()}, OUTPUT / "deep_curvature_history.png")

# %%
# The spectrum of the Hessian, from a single vector and from several. One vector is often enough for a picture of a
# large matrix, but it cannot say how large its error is. The weights of its nodes sum to one for each vector.
models = {}
for name, folder in folders.items():
    models[name] = net().eval()
    models[name].load_state_dict(load_checkpoint(checkpoints(folder)[epochs])["model"])
many = 4 if small else 10


def show(spectra: dict[str, Spectrum]) -> None:
    """A column for each spectrum, with standard errors."""
    print(f"\n{'':42}" + "".join(f"{title:>22}" for title in spectra))
    tables = {title: spectrum.table() for title, spectrum in spectra.items()}
    for row in next(iter(tables.values())):
        cells = []
        for e in (table.get(row) for table in tables.values()):
            error = "" if e is None or float(e.error) == 0 else f" ± {float(e.error):.1g}"
            cells.append("-" if e is None else f"{float(e.value):.4g}{error.replace('nan', '?')}")
        print(f"{row:42}" + "".join(f"{cell:>22}" for cell in cells))


spectra = {}
for name, model in models.items():
    H = Hessian(model, few[: 1 if small else 2], PMatImplicit)
    for probes in (1, many):
        spectrum = spectral_density(
            H, steps=15 if small else 30, probes=probes, generator=torch.Generator().manual_seed(probes)
        )
        spectra[f"{name}, {probes} vector{'s' * (probes > 1)}"] = spectrum
    pairs = extreme_eigenpairs(H, 3, "both", tol=1e-3)
    print(f"{name}: extreme eigenvalues", [round(value, 3) for value in pairs.values.tolist()], flush=True)
show(spectra)
plot_density(spectra, OUTPUT / "deep_curvature_density.png", log=True)

# %%
# How the spectrum came about: a column of colour for each checkpoint.
course = {}
for epoch, state in weights(folders["K-FAC"]).items():
    at_epoch = net().eval()
    at_epoch.load_state_dict(dict(state))
    H = Hessian(at_epoch, few[:1], PMatImplicit)
    course[epoch] = spectral_density(H, steps=15 if small else 30, probes=2, outliers=3)
plot_spectra(course, OUTPUT / "deep_curvature_spectra.png")

# %%
# Statistics of loss, gradient and curvature over minibatches, at each checkpoint of both trainings.
trajectories = {}
for name, folder in folders.items():
    trajectories[name] = loss_trajectory(models[name], weights(folder), few, probes=12)
    print(f"\n{name}, over {len(few)} minibatches\n{trajectories[name]}", flush=True)
plot_statistics(trajectories, OUTPUT / "deep_curvature_statistics.png")

# %%
# The loss along eigenvectors of length one, where the second derivative is the eigenvalue. BatchNorm stays as it is in
# the middle, so that this is the function whose Hessian was looked at.
ranks: tuple[Any, ...] = (0, 1, -1, (0, 1))
lines = along_eigenvectors(
    models["K-FAC"],
    few[: 1 if small else 2],
    ranks=ranks,
    distance=0.5,
    points=5 if small else 15,
    test_loader=test_loader,
    recompute_batch_norm=False,
    eigen={"tol": 1e-3},
)
surface = lines.pop((0, 1))
plot_landscape(lines, OUTPUT / "deep_curvature_lines.png")

# %%
# The plane of the top two, as contours and in space.
plot_landscape(surface, OUTPUT / "deep_curvature_contours.png")

# %%
plot_landscape(surface, OUTPUT / "deep_curvature_surface.png", surface=True)

# %%
# How sure the two nets are, and how often right.
calibrations = {}
for name, model in models.items():
    with torch.no_grad():
        found = [(model(x.to(device)).softmax(1).cpu(), y) for x, y in test_loader]
    p, y = (torch.cat(parts) for parts in zip(*found, strict=True))
    calibrations[name] = calibration(p, y)
plot_calibration(calibrations, OUTPUT / "deep_curvature_calibration.png")

# %%
# All of it for one net on a page that can be sent to somebody.
page = report(
    models["K-FAC"],
    few,
    path=OUTPUT / "deep_curvature.html",
    test_loader=test_loader,
    seconds=2.0 if small else 15.0,
    title="VGG16, trained by K-FAC",
    verbose=False,
)
print(f"\nPage and pictures in {page.parent}, {time.perf_counter() - began:.0f} s")
