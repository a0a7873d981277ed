"""Influence against training again
================================

Influence against the truth: predict what leaving examples out does, then leave them out and train again.

Leaving a group of training examples out moves the optimum, and with it the loss at queries, to first order by the sum
of ``g_q^T (G + r)^-1 g_t / n`` over the group, with G the generalised Gauss-Newton matrix (GGN) and r the weight decay.
We compare this with the loss after training again, for groups drawn at random and for groups of similar images, which
are hard: to leave out most of what is alike is no small step (Koh et al. 2019, 1905.13289).

The model is a softmax regression, for which the optimum is unique and the GGN is the Hessian, with much and with little
weight decay. Training again starts from the optimum for all examples. The sum over examples stays divided by n, so that
the weight of the decay stays.

::

    python examples/influence.py            a minute
    python examples/influence.py --small    the same code on less
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from matplotlib.figure import Figure
from scipy.stats import spearmanr
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from nngeometry import (
    GGN,
    Influence,
    PMat,
    PMatDense,
    PMatDiag,
    PMatEKFAC,
    PMatEye,
    PMatImplicit,
    PMatKFAC,
    PVector,
)

PICTURE = Path(__file__).parent / "output" / "influence.png"
LOSS = nn.CrossEntropyLoss()
DECAYS = (1e-2, 1e-3)
TOLERANCE = 1e-7  # of every entry of the gradient
REPRESENTATIONS = {"identity": PMatEye, "Diag": PMatDiag, "KFAC": PMatKFAC, "EKFAC": PMatEKFAC}
REFINED = "EKFAC + CG"
Data = tuple[Tensor, Tensor]
Comparison = tuple[dict[str, Tensor], Tensor, tuple[slice, slice]]


# %%
# The model is a softmax regression with weight decay, whose optimum is unique.
def digits(n: int, n_queries: int) -> tuple[Data, Data]:
    """Images and labels, to train on and to ask about."""
    data = load_digits()
    order = torch.randperm(len(data.target), generator=torch.Generator().manual_seed(0))[: n + n_queries]
    x, y = torch.tensor(data.data)[order] / 16, torch.tensor(data.target)[order]
    return (x[:n], y[:n]), (x[n:], y[n:])


def losses(model: nn.Module, data: Data) -> Tensor:
    return cross_entropy(model(data[0]), data[1], reduction="none")


def objective(model: nn.Module, data: Data, kept: Tensor, decay: float) -> Tensor:
    penalty = decay / 2 * PVector.from_model(model).norm() ** 2
    return losses(model, data)[kept].sum() / len(kept) + penalty


# %%
# Training goes to the optimum, so that what leaving out does can be told from what stopping early does.
def fit(model: nn.Module, data: Data, decay: float) -> None:
    """To the optimum for all examples, by L-BFGS."""
    options = {"max_iter": 4000, "max_eval": 8000, "tolerance_change": 0.0, "line_search_fn": "strong_wolfe"}
    optimizer = torch.optim.LBFGS(model.parameters(), history_size=50, tolerance_grad=TOLERANCE, **options)
    everything = torch.ones(len(data[0]), dtype=torch.bool)

    def closure() -> Tensor:
        optimizer.zero_grad()
        value = objective(model, data, everything, decay)
        value.backward()
        return value

    optimizer.step(closure)


def fit_again(model: nn.Module, data: Data, kept: Tensor, decay: float, inverse: PMat) -> float:
    """From one optimum to a near one, by Newton's steps with one matrix. Returns the largest entry of the gradient.

    Without some examples the curvature is less than with all, so that these steps are rather too short than too long.
    """
    for _ in range(1000):
        model.zero_grad()
        objective(model, data, kept, decay).backward()
        gradient = PVector.from_model_grad(model)
        if gradient.norm(torch.inf) < TOLERANCE:
            break
        (-(inverse @ gradient)).add_to_model(model)
    return float(gradient.norm(torch.inf))


# %%
# Groups are drawn at random, or consist of an image and its nearest neighbours.
def groups_of(x: Tensor, count: int, size: int) -> dict[str, list[Tensor]]:
    """Positions of examples drawn at random, and of examples drawn with their nearest neighbours."""
    generator = torch.Generator().manual_seed(1)
    at_random = [torch.randperm(len(x), generator=generator)[:size] for _ in range(count)]
    centres = torch.randperm(len(x), generator=generator)[:count]
    return {"random": at_random, "similar": [(x - x[c]).norm(dim=1).topk(size, largest=False).indices for c in centres]}


# %%
# The truth: leave the group out, train again, and look at the loss of the queries.
def retrained(model: nn.Module, train: Data, queries: Data, groups: list[Tensor], decay: float) -> tuple[Tensor, float]:
    """``(q, groups)``: by how much the loss at queries grows without each group; and the largest gradient left."""
    optimum = {name: value.clone() for name, value in model.state_dict().items()}
    with torch.no_grad():
        before = losses(model, queries)
    inverse = GGN(model, train, PMatDense, LOSS).inv(decay)
    changes, left = [], 0.0
    for group in groups:
        kept = torch.ones(len(train[0]), dtype=torch.bool)
        kept[group] = False
        left = max(left, fit_again(model, train, kept, decay, inverse))
        with torch.no_grad():
            changes.append(losses(model, queries) - before)
        model.load_state_dict(optimum)
    return torch.stack(changes, 1), left


# %%
# The prediction: one solve for each query, and an inner product with each training gradient.
def predicted(model: nn.Module, train: Data, queries: Data, groups: list[Tensor], decay: float) -> dict[str, Tensor]:
    """The same, by influence."""
    G = {name: GGN(model, train, representation, LOSS) for name, representation in REPRESENTATIONS.items()}
    influences = {name: Influence(model, matrix, LOSS, decay) for name, matrix in G.items()}
    exact = GGN(model, train, PMatImplicit, LOSS)
    influences[REFINED] = Influence(model, G["EKFAC"], LOSS, decay, refine=exact)
    found = {}
    for name, influence in influences.items():
        scores = influence.scores(queries, train) / len(train[0])
        found[name] = torch.stack([scores[:, group].sum(1) for group in groups], 1)
    return found


def rank_correlation(a: Tensor, b: Tensor) -> float:
    return float(spearmanr(a, b).statistic)


# %%
# Ranks of predictions are correlated with ranks of the truth, for each representation of the matrix.
def compare(decay: float, train: Data, queries: Data, groups: dict[str, list[Tensor]]) -> Comparison:
    """Train, predict, leave out, and print how well the ranks agree."""
    model = nn.Linear(64, 10)
    fit(model, train, decay)
    with torch.no_grad():
        accuracy = 100 * float((model(queries[0]).argmax(1) == queries[1]).double().mean())
    print(f"\ndecay {decay:g}: {accuracy:.1f} % of the queries right", end="")
    everything = groups["random"] + groups["similar"]
    prediction = predicted(model, train, queries, everything, decay)
    change, left = retrained(model, train, queries, everything, decay)
    print(f", gradients left up to {left:.0e}")
    half = len(groups["random"])
    parts = slice(0, half), slice(half, None)
    print(f"  {'':12}   mean loss          one query          predicted / actual")
    print(f"  {'':12}   random  similar    random  similar    random  similar")
    for name, guess in prediction.items():
        mean = [rank_correlation(guess[:, s].mean(0), change[:, s].mean(0)) for s in parts]
        each = [
            sum(rank_correlation(a[s], b[s]) for a, b in zip(guess, change, strict=True)) / len(change) for s in parts
        ]
        slope = [float((guess[:, s] * change[:, s]).sum() / change[:, s].square().sum()) for s in parts]
        print(f"  {name:12}", *(f"{a:9.2f}{b:9.2f}" for a, b in (mean, each, slope)), flush=True)
    return prediction, change, parts


def draw(found: dict[float, Comparison]) -> None:
    shown = ("Diag", "EKFAC", REFINED)
    figure = Figure(figsize=(3.2 * len(shown), 3.1 * len(found)), layout="constrained", dpi=200)
    axes = figure.subplots(len(found), len(shown), squeeze=False)
    for row, (decay, (prediction, change, parts)) in zip(axes, found.items(), strict=True):
        for ax, name in zip(row, shown, strict=True):
            for label, s, marker in zip(("random", "similar"), parts, ("C0o", "C3^"), strict=True):
                ax.plot(
                    1000 * prediction[name][:, s].mean(0),
                    1000 * change[:, s].mean(0),
                    marker,
                    markersize=4,
                    label=label,
                )
            ends = [1000 * float(f(change.mean(0))) for f in (torch.min, torch.max)]
            ax.plot(ends, ends, color="grey", linewidth=0.6, zorder=0, label="equal")
            ax.set_title(f"decay {decay:g}, {name}", fontsize=10)
            ax.set_xlabel("predicted change of loss (1e-3)")
        row[0].set_ylabel("actual change of loss (1e-3)")
    axes[0, 0].legend(frameon=False, fontsize=8)
    PICTURE.parent.mkdir(exist_ok=True)
    figure.savefig(PICTURE)


# %%
# The comparison is made with much and with little weight decay.
def main(small: bool) -> None:
    torch.set_num_threads(1)  # the model is so small that more threads mostly wait for each other
    torch.manual_seed(0)
    torch.set_default_dtype(torch.float64)
    train, queries = digits(150, 50) if small else digits(500, 200)
    groups = groups_of(train[0], 6 if small else 20, 10 if small else 25)
    print(f"{len(train[0])} examples to train on, groups of {len(groups['random'][0])}, {len(queries[0])} queries")
    print("Rank correlation of predicted with actual change of the mean loss, and of the loss at a query (mean over")
    print("queries); predicted over actual change, by least squares.")
    draw({decay: compare(decay, train, queries, groups) for decay in DECAYS})
    print(f"\nPicture: {PICTURE}")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--small", action="store_true", help="less data and fewer groups")
    main(parser.parse_args().small)
