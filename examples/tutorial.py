"""Ten minutes, from a trained net to its geometry
===============================================

A small net learns the digits of scikit-learn. Then this page computes its Fisher matrix, its spectrum, a penalty that
keeps a second task from overwriting the first, an optimiser that uses the same matrix, and a posterior of the weights.

::

    python examples/tutorial.py            half a minute
    python examples/tutorial.py --small    fewer epochs
"""

import copy
import sys
from pathlib import Path

import torch
from sklearn.datasets import load_digits
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from nngeometry import FIM, GGN, Hessian, PMatDense, PMatDiag, PMatEKFAC, PMatImplicit, PMatKFAC, Posterior, PVector
from nngeometry.plot import plot_density, plot_matrices

SMALL = "--small" in sys.argv
OUTPUT = Path(__file__).parent / "output"
OUTPUT.mkdir(exist_ok=True)

torch.manual_seed(0)
torch.set_num_threads(1)

# %%
# A trained net
# -------------
#
# Nothing here is special: a module, a loader, a loss. The library takes models as they are.

digits = load_digits()
x = torch.tensor(digits.data, dtype=torch.float32) / 16
y = torch.tensor(digits.target)
order = torch.randperm(len(x))
x, y = x[order], y[order]
train, test = TensorDataset(x[:1000], y[:1000]), (x[1000:], y[1000:])
loader = DataLoader(train, batch_size=100)

model = nn.Sequential(nn.Linear(64, 16), nn.Tanh(), nn.Linear(16, 10))
criterion = nn.CrossEntropyLoss()


def fit(model, optimizer, loader, epochs, penalty=lambda: 0.0):
    for _ in range(epochs):
        for a, b in loader:
            optimizer.zero_grad()
            (criterion(model(a), b) + penalty()).backward()
            if hasattr(optimizer, "observe"):
                optimizer.observe((a, b))
            optimizer.step()


@torch.no_grad()
def accuracy(model, x, y):
    return float((model(x).argmax(1) == y).float().mean())


fit(model, torch.optim.Adam(model.parameters(), lr=1e-2), loader, epochs=20)
print(f"{sum(p.numel() for p in model.parameters())} parameters, test accuracy {accuracy(model, *test):.3f}")

# %%
# The Fisher matrix
# -----------------
#
# ``FIM`` takes the model, the data and a representation. The labels are not needed: the expectation over them is exact.
# A matrix says what it is made of when it is printed.

F = FIM(model, loader, PMatKFAC)
print(F)

# %%
# To have it in another representation, change the class. Here is how near three of them are to the exact one. The dense
# matrix is affordable because the net is small.

representations = {"Dense": PMatDense, "KFAC": PMatKFAC, "EKFAC": PMatEKFAC, "Diag": PMatDiag}
matrices = {name: FIM(model, loader, R) for name, R in representations.items()}
exact = matrices["Dense"]
for name, M in matrices.items():
    print(f"{name:6} {M.nbytes():10,} bytes   trace {M.trace():.4f}   distance {(M - exact).norm() / exact.norm():.3f}")
plot_matrices(matrices, OUTPUT / "tutorial_matrices.png")

# %%
# All of them have the same algebra. A solve is exact for the matrix that is represented, with the damping given.

g = PVector.from_model(model).detach()
step = F.solve(g, regul=1e-3)
print(f"residual of the solve {float((F.mv(step) + 1e-3 * step - g).norm() / g.norm()):.0e}")

# %%
# The spectrum
# ------------
#
# ``PMatImplicit`` holds nothing and gives products. A spectrum needs no more, so it works for nets of any size.

from nngeometry.spectrum import extreme_eigenpairs, spectral_density  # noqa: E402

H = Hessian(model, loader, PMatImplicit)
pairs = extreme_eigenpairs(H, 5, "both")
print("the ends of the spectrum of the Hessian:", ", ".join(f"{v:.3f}" for v in pairs.values.tolist()))

generator = torch.Generator().manual_seed(0)
spectra = {
    name: spectral_density(M(model, loader, PMatImplicit), steps=40, probes=4, outliers=9, generator=generator)
    for name, M in {"Hessian": Hessian, "GGN": GGN}.items()
}
plot_density(spectra, OUTPUT / "tutorial_spectrum.png", log=True)
print("traces:", {name: f"{s.trace().value:.2f} +- {s.trace().error:.2f}" for name, s in spectra.items()})

# %%
# A second task without forgetting the first
# ------------------------------------------
#
# The second task has the same digits with their pixels in reverse order. Elastic weight consolidation adds a penalty:
# the weights may move where the Fisher matrix of the first task is small.

from nngeometry.continual import EWC  # noqa: E402

second = DataLoader(TensorDataset(x[:1000].flip(1), y[:1000]), batch_size=100)
epochs = 20 if SMALL else 40
for name, strength in {"without a penalty": 0.0, "with the penalty": 30.0}.items():
    learner = copy.deepcopy(model)
    ewc = EWC(learner, PMatKFAC, FIM, strength=strength).consolidate(loader)
    fit(learner, torch.optim.Adam(learner.parameters(), lr=3e-3), second, epochs, ewc.penalty)
    first, then = accuracy(learner, *test), accuracy(learner, test[0].flip(1), test[1])
    print(f"{name:18} first task {first:.3f}, second task {then:.3f}")

# %%
# An optimiser
# ------------
#
# The same matrices precondition gradient steps. ``observe`` adds a minibatch to a running average of the matrix, and
# the rest of the loop is that of any optimiser of torch.

from nngeometry.optim import SecondOrderOptimizer  # noqa: E402

epochs = 2 if SMALL else 5
for name, make in {
    "Adam": lambda m: torch.optim.Adam(m.parameters(), lr=1e-2),
    "K-FAC": lambda m: SecondOrderOptimizer(m, PMatKFAC, lr=0.1, damping=1e-1, clip=1e-2),
}.items():
    torch.manual_seed(0)
    fresh = nn.Sequential(nn.Linear(64, 16), nn.Tanh(), nn.Linear(16, 10))
    fit(fresh, make(fresh), loader, epochs)
    with torch.no_grad():
        print(f"{name:6} after {epochs} epochs: loss {criterion(fresh(x[:1000]), y[:1000]):.3f}")

# %%
# A posterior
# -----------
#
# The Fisher matrix and a prior make a normal distribution of the weights (Laplace). ``fit_prior`` takes the prior
# precision of the largest evidence. ``information`` is how much an observation would tell about the weights: more for
# noise than for a digit.

posterior = Posterior(model, F, num_data=len(train), data=loader).fit_prior()
print(
    f"prior precision {float(posterior.prior_precision):.3f}, evidence {float(posterior.log_marginal_likelihood()):.1f}"
)
print(f"information, digits {float(posterior.information(test[0]).mean()):.3f}", end="")
print(f", noise {float(posterior.information(3 * torch.rand(200, 64)).mean()):.3f}")
probabilities = posterior.predict(test[0])
print(f"mean confidence {float(probabilities.amax(1).mean()):.3f}, accuracy {accuracy(model, *test):.3f}")

# %%
# Where to go from here: the gallery has a program for each of these uses, and the guide says what the numbers mean.
