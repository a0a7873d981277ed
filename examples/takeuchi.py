"""Takeuchi's criterion
====================

Takeuchi's criterion: the loss on new data, from the training data alone, compared with exact leave-one-out.

Leaving example i out moves the optimum w by H^-1 g_i / n, with g_i the gradient of its loss and H the Hessian of the
objective. To first order its loss then grows by g_i^T H^-1 g_i / n. In the mean over examples, with C the second moment
of the g_i, this gives the criterion (Takeuchi 1976; Stone 1977 for its relation to leave-one-out) ::

    training loss + tr(H^-1 C) / n.

The model is a logistic regression with a ridge on the breast cancer data of scikit-learn. With no ridge and a model
that is right, C is near H and the penalty near P / n, which is that of Akaike. To leave out exactly, all the models
without one example are trained at once, by steps that use the same H.

::

    python examples/takeuchi.py            some seconds
    python examples/takeuchi.py --small    the same code on less data
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from matplotlib.figure import Figure
from sklearn.datasets import load_breast_cancer
from torch import Tensor, nn
from torch.nn.functional import binary_cross_entropy_with_logits as bce

from nngeometry import EmpiricalFisher, Hessian, LayerCollection, PFMapDense, PMat, PMatDense, PVector

PICTURE = Path(__file__).parent / "output" / "takeuchi.png"
RIDGES = [0.3, 0.1, 0.03, 0.01, 0.003]
SHOWN = 0.01  # the ridge of the left panel


# %%
# The data are the tumours of scikit-learn. The objective has a ridge.
def tumours(n: int) -> tuple[Tensor, Tensor]:
    data = load_breast_cancer()
    order = torch.randperm(len(data.target), generator=torch.Generator().manual_seed(0))[:n]
    x, y = torch.tensor(data.data)[order], torch.tensor(data.target, dtype=torch.float64)[order]
    return (x - x.mean(0)) / x.std(0), y.unsqueeze(1)


def objective(model: nn.Module, x: Tensor, y: Tensor, ridge: float) -> Tensor:
    return bce(model(x), y) + ridge / 2 * PVector.from_model(model).norm() ** 2


# %%
# Training goes to the optimum, where the gradient vanishes.
def train(model: nn.Module, x: Tensor, y: Tensor, ridge: float) -> None:
    """To the optimum, by L-BFGS."""
    options = {"max_iter": 1000, "tolerance_grad": 1e-12, "tolerance_change": 0.0, "line_search_fn": "strong_wolfe"}
    optimizer = torch.optim.LBFGS(model.parameters(), **options)

    def closure() -> Tensor:
        optimizer.zero_grad()
        value = objective(model, x, y, ridge)
        value.backward()
        return value

    optimizer.step(closure)


# %%
# The truth: one model for each example that is left out, all trained at once.
def leave_one_out(H: PMat, w: Tensor, x: Tensor, y: Tensor, ridge: float) -> tuple[Tensor, float]:
    """The loss on each example of the model trained on all others, and the norm of the largest gradient that is left.

    Row i of W has the parameters (weight, then bias) of the model without example i. The sum over examples is divided
    by n as before, so the weight of the ridge stays.
    """
    n = len(x)
    ones = torch.cat([x, torch.ones(n, 1)], 1)
    W = w.repeat(n, 1)
    for _ in range(300):
        slopes = ((W @ ones.T).sigmoid() - y.T).fill_diagonal_(0.0)  # d loss / d logit: model i, example j
        gradients = slopes @ ones / n + ridge * W
        residual = float(gradients.norm(dim=1).max())
        if residual < 1e-13:
            break
        step = H.solve(PFMapDense(H.layer_collection, gradients.unsqueeze(0)), regul=ridge)
        W = W - step.to_torch().squeeze(0)
    return bce((W * ones).sum(1), y.squeeze(1), reduction="none"), residual


# %%
# The picture compares the prediction with the truth, example by example and in the mean.
def draw(points: tuple[Tensor, Tensor], curves: dict[str, list[float]]) -> None:
    figure = Figure(figsize=(8, 3.4), layout="constrained", dpi=200)
    left, right = figure.subplots(1, 2)
    predicted, exact = (p.numpy() for p in points)
    ends = 1e-9, 2 * float(max(predicted.max(), exact.max()))  # what grows less has no part in the mean
    left.loglog(predicted, exact, ".", markersize=4, alpha=0.6)
    left.loglog(ends, ends, color="grey", linewidth=0.6, zorder=0)
    left.set(xlabel=r"$g_i^\top H^{-1} g_i \,/\, n$", ylabel="growth of the loss when left out", xlim=ends, ylim=ends)
    left.set_title(f"each example, ridge {SHOWN:g}", fontsize=10)
    styles = {"training": "C7.-", "Akaike": "C1.--", "Takeuchi": "C0.-", "leave-one-out": "k+"}
    for name, style in styles.items():
        right.semilogx(RIDGES, curves[name], style, label=name, markersize=9 if name == "leave-one-out" else 5)
    right.set(xlabel="ridge", ylabel="loss")
    right.set_title("mean over examples", fontsize=10)
    right.legend(frameon=False, fontsize=8)
    PICTURE.parent.mkdir(exist_ok=True)
    figure.savefig(PICTURE)


# %%
# The criterion needs one solve for each example, and their trace.
def main(small: bool) -> None:
    torch.set_num_threads(1)  # the model is so small that more threads mostly wait for each other
    torch.manual_seed(0)
    torch.set_default_dtype(torch.float64)
    x, y = tumours(200 if small else 569)
    n, model = len(x), nn.Linear(x.shape[1], 1)
    lc = LayerCollection.from_model(model)
    print(f"{lc.numel()} parameters, {n} examples\n")
    print("  ridge  training    Akaike  Takeuchi  leave-one-out  difference  tr(H^-1 C)  gradients left")

    curves: dict[str, list[float]] = {name: [] for name in ("training", "Akaike", "Takeuchi", "leave-one-out")}
    for ridge in RIDGES:
        train(model, x, y, ridge)
        H = Hessian(model, (x, y), PMatDense, nn.BCEWithLogitsLoss())
        C = EmpiricalFisher(model, (x, y), PMatDense, nn.BCEWithLogitsLoss())
        penalty = float((H.inv(regul=ridge) @ C).trace())

        with torch.no_grad():
            losses = bce(model(x), y, reduction="none").squeeze(1)
            w = PVector.from_model(model).to_torch()
            slopes = model(x).sigmoid() - y
            left_out, residual = leave_one_out(H, w, x, y, ridge)
        J = PFMapDense(lc, torch.cat([slopes * x, slopes], 1).unsqueeze(0))  # rows g_i
        growth = (J.to_torch() * H.solve(J, regul=ridge).to_torch()).sum(-1).squeeze(0) / n
        if ridge == SHOWN:
            points = growth, left_out - losses

        training, exact = float(losses.mean()), float(left_out.mean())
        takeuchi, akaike = training + penalty / n, training + lc.numel() / n
        for name, value in zip(curves, (training, akaike, takeuchi, exact), strict=True):
            curves[name].append(value)
        print(f"{ridge:7g}{training:10.5f}{akaike:10.5f}{takeuchi:10.5f}{exact:15.5f}", end="")
        print(f"{takeuchi - exact:12.5f}{penalty:12.3f}{residual:16.0e}", flush=True)

    print("\nTakeuchi's criterion knows nothing of second order: where H^-1 g_i / n is no small step it is too low.")
    draw(points, curves)
    print(f"Picture: {PICTURE}")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--small", action="store_true", help="less data")
    main(parser.parse_args().small)
