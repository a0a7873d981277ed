"""The spectrum before and after training
======================================

The spectrum of a network before and after training, from products of its Hessian with vectors.

1. At initialisation the generalised Gauss-Newton matrix (GGN) of a classifier with C classes has C - 1 eigenvalues far
   above all others: one for each direction between the means of the classes (Papyan 2018, 1811.07062). We compute the
   top 12 and look for the gap.
2. The density of all eigenvalues, by stochastic Lanczos quadrature, of the GGN and of the Hessian, before and after
   training. Both have a bulk near zero; the Hessian has negative eigenvalues too, mostly before training.

::

    python examples/spectrum.py            less than a minute
    python examples/spectrum.py --small    the same code on less data
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from nngeometry import GGN, Hessian, PMat, PMatImplicit
from nngeometry.plot import plot_density
from nngeometry.spectrum import Spectrum, extreme_eigenpairs, spectral_density

OUTPUT = Path(__file__).parent / "output"
CLASSES = 10
TOP = 12
ZERO = 0.1  # what is nearer to zero, relative to the lowest eigenvalue, does not count as negative


# %%
# A small MLP is trained on the digits of scikit-learn.
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


# %%
# ``extreme_eigenpairs`` needs products with the matrix and nothing else, so ``PMatImplicit`` will do.
def outliers(G: PMat) -> None:
    """Print the top eigenvalues, and the ratios between neighbours: the largest is the gap."""
    pairs = extreme_eigenpairs(G, TOP)
    l = pairs.values
    ratios = l[:-1] / l[1:]
    print(f"\nGGN at initialisation: the top {TOP} eigenvalues, {pairs.products} products")
    print("  eigenvalue    ", *(f"{value:8.4f}" for value in l.tolist()))
    print("  over the next ", *(f"{ratio:8.2f}" for ratio in ratios.tolist()))
    gap = CLASSES - 1
    print(f"  after C - 1 = {gap} eigenvalues: {l[gap - 1]:.4f} to {l[gap]:.4f}, a factor {ratios[gap - 1]:.2f}")


# %%
# Each number that comes from random vectors carries its standard error.
def show(name: str, spectrum: Spectrum) -> None:
    trace = spectrum.trace()
    print(f"  {name:26} top {spectrum.outliers[0]:7.3f}   trace {trace.value:7.3f} +- {trace.error:.3f}", end="")
    if name.startswith("Hessian"):  # the GGN has no negative part
        number, total = spectrum.negative(ZERO * -spectrum.range()[0])
        print(f"   negative {number.value:6.1f} +- {number.error:5.1f}", end="")
        print(f", their sum {total.value:8.3f} +- {total.error:.3f}", end="")
    print(flush=True)


# %%
# Densities are computed for two matrices at two moments, and drawn on a linear and on a logarithmic axis.
def main(small: bool) -> None:
    torch.set_num_threads(1)  # the network is so small that more threads mostly wait for each other
    torch.manual_seed(0)
    torch.set_default_dtype(torch.float64)
    x, y = digits(300 if small else 1000)
    model = nn.Sequential(nn.Linear(64, 48), nn.ReLU(), nn.Linear(48, 48), nn.ReLU(), nn.Linear(48, CLASSES))
    print(f"{sum(p.numel() for p in model.parameters())} parameters, {len(x)} images")
    outliers(GGN(model, (x, y), PMatImplicit))

    print(f"\nSpectra, with errors; negative: below {ZERO} times the lowest eigenvalue")
    spectra = {}
    for when, epochs in (("before training", 0), ("after training", 10 if small else 30)):
        train(model, x, y, epochs)
        for name, matrix in (("GGN", GGN), ("Hessian", Hessian)):
            F = matrix(model, (x, y), PMatImplicit)
            spectrum = spectral_density(
                F,
                steps=30 if small else 80,
                probes=3 if small else 8,
                outliers=CLASSES - 1,
                generator=torch.Generator().manual_seed(0),
            )
            title = f"{name} {when}"
            show(title, spectrum)
            spectra[title] = spectrum

    OUTPUT.mkdir(exist_ok=True)
    plot_density(spectra, OUTPUT / "spectrum.png", ncols=2)
    plot_density(spectra, OUTPUT / "spectrum_log.png", log=True, stems=True, ncols=2)
    print(f"\nPictures: {OUTPUT / 'spectrum.png'}, {OUTPUT / 'spectrum_log.png'}")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--small", action="store_true", help="less data and fewer epochs")
    main(parser.parse_args().small)
