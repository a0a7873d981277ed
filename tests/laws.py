"""The tables of what has to obey laws. A line here, or of a layer kind in ``models.CASES``, and a new piece is held to
every test that is crossed with its table.
"""

import oracle
import torch
from extensions.half_diagonal import PMatHalfDiagonal
from extensions.log_cosh import LogCosh
from extensions.margin import MarginMoment
from extensions.mean_output import MeanOutput
from extensions.minimal_residual import minimal_residual
from extensions.neighbours import PMatTridiagonal
from extensions.pairs import PMatPairs
from extensions.student_t import StudentT
from torch import nn

from nngeometry import (
    FIM,
    GGN,
    Bernoulli,
    Categorical,
    EmpiricalFisher,
    FIM_MonteCarlo,
    Gaussian,
    GradientCovariance,
    Hessian,
    PMatBlockDiag,
    PMatDense,
    PMatDiag,
    PMatEKFAC,
    PMatEye,
    PMatImplicit,
    PMatKFAC,
    PMatLowRank,
    PMatMixed,
    PMatQuasiDiag,
    Poisson,
)
from nngeometry.linalg import cg, lsmr, minres, neumann

#: Representations that hold their entries: the algebra of each is that of its dense matrix (test_algebra).
MIXED = PMatMixed.of(PMatKFAC, {nn.GroupNorm: PMatDense, nn.BatchNorm2d: PMatDense, "7": PMatLowRank})
HELD = {
    "dense": PMatDense,
    "blockdiag": PMatBlockDiag,
    "diag": PMatDiag,
    "quasidiag": PMatQuasiDiag,
    "kfac": PMatKFAC,
    "ekfac": PMatEKFAC,
    "lowrank": PMatLowRank,
    "eye": PMatEye,
    "mixed": MIXED,
    "pairs": PMatPairs,
    "half-diagonal": PMatHalfDiagonal,
    "tridiagonal": PMatTridiagonal,
}
#: Those whose sums are of another structure: a sum of Kronecker products is none, and one block has no ``plus``.
OPEN = ["kfac", "ekfac", "mixed", "half-diagonal", "tridiagonal"]


def quasidiag(M, lc):
    """The diagonal and each row's products with its bias, where a layer packs a bias as last column."""
    out = torch.diag(M.diagonal())
    for name, s in lc.slices().items():
        packing = lc[name].packing
        if packing.bias:
            index = packing.pack(torch.arange(s.start, s.stop))
            body, tip = index[..., :-1], index[..., -1:].expand_as(index[..., :-1])
            out[body, tip] = M[body, tip]
            out[tip, body] = M[tip, body]
    return out


def between(kept):
    """The blocks of layers j and k for which ``kept(j, k)``."""

    def project(M, lc):
        out, slices = torch.zeros_like(M), list(lc.slices().values())
        for j, rows in enumerate(slices):
            for k, cols in enumerate(slices):
                if kept(j, k):
                    out[rows, cols] = M[rows, cols]
        return out

    return project


#: Representations that are projections of the exact matrix M: ``(M, layer collection) -> entries`` (test_fit).
PROJECTIONS = {
    PMatDense: lambda M, lc: M,
    PMatLowRank: lambda M, lc: M,
    PMatImplicit: lambda M, lc: M,
    PMatBlockDiag: oracle.blockdiag,
    PMatDiag: lambda M, lc: torch.diag(M.diagonal()),
    PMatQuasiDiag: quasidiag,
    PMatEye: lambda M, lc: M.trace() / len(M) * torch.eye(len(M)),
    PMatPairs: between(lambda j, k: j // 2 == k // 2),
    PMatTridiagonal: between(lambda j, k: abs(j - k) <= 1),
}

#: Matrices, and representations that have a running average of them (test_accumulator). FACTORED ones average their
#: factors, all others their entries.
EXACT = [PMatDense, PMatBlockDiag, PMatDiag, PMatQuasiDiag, PMatKFAC, PMatLowRank, PMatEye]
FACTORED = [PMatKFAC, PMatEKFAC, PMatHalfDiagonal]
MATRICES = [FIM, FIM_MonteCarlo, EmpiricalFisher, GradientCovariance, GGN]
PAIRS = [(M, R) for M in MATRICES for R in [*EXACT, PMatEKFAC] if (GradientCovariance, PMatKFAC) != (M, R)]
PAIRS += [(Hessian, R) for R in (PMatDense, PMatBlockDiag, PMatDiag)]
PAIRS += [(GGN, PMatMixed.of(PMatDiag, {"0": PMatEKFAC})), (FIM, PMatMixed.of(PMatKFAC, {"2": PMatDense}))]
PAIRS += [(M, R) for M in (FIM, GradientCovariance) for R in (PMatPairs, PMatTridiagonal)]
PAIRS += [(GGN, PMatHalfDiagonal)]
PAIRS += [(MarginMoment, R) for R in (PMatDense, PMatDiag, PMatKFAC)]
PAIRS += [(MeanOutput, R) for R in (PMatDense, PMatBlockDiag, PMatDiag)]


def of_loss(name):
    """The Fisher information of outputs ``(n, *out)`` where it is the Hessian of ``-log p(y | f)`` for every y."""
    return lambda f: oracle.output_hessians(f, name)


def by_quadrature(log_p):
    """The Fisher information by the integral of the squared score over y, for each element by itself."""

    def fisher(f):
        angles = (torch.arange(20001) + 0.5) / 20001 * torch.pi - torch.pi / 2
        leaf = f.flatten(1).unsqueeze(-1).expand(*f.flatten(1).shape, len(angles)).clone().requires_grad_()
        y = leaf.detach() + angles.tan()
        value = log_p(y, leaf)
        (score,) = torch.autograd.grad(value.sum(), leaf)
        density = value.detach().exp() / angles.cos().square() * (torch.pi / len(angles))
        return torch.diag_embed((density * score.square()).sum(-1))

    return fisher


#: Likelihoods, the shape of their output and their Fisher information by its definition (test_likelihood).
LIKELIHOODS = {
    "classif_logits": (Categorical(), (5,), of_loss("classif_logits")),
    "segmentation_logits": (Categorical(), (3, 2, 2), of_loss("segmentation_logits")),
    "classif_binary_logits": (Bernoulli(), (2,), of_loss("classif_binary_logits")),
    "regression": (Gaussian(), (2, 3), of_loss("regression")),
    "poisson": (Poisson(), (3,), of_loss("poisson")),
    "student-t": (
        StudentT(5.0, 0.7),
        (3,),
        by_quadrature(lambda y, f: torch.distributions.StudentT(torch.tensor(5.0), f, 0.7).log_prob(y)),
    ),
}

#: Losses, and targets for n examples with three outputs (test_fit).
LOSSES = {
    "cross_entropy": (lambda n: torch.randint(3, (n,)), nn.CrossEntropyLoss()),
    "cross_entropy-weighted": (
        lambda n: torch.randint(3, (n,)),
        nn.CrossEntropyLoss(weight=torch.tensor([0.2, 1.0, 3.0]).double(), label_smoothing=0.1, reduction="sum"),
    ),
    "cross_entropy-ignore": (lambda n: torch.arange(n) % 3, nn.CrossEntropyLoss(ignore_index=1)),
    "cross_entropy-probabilities": (lambda n: torch.rand(n, 3).double().softmax(1), nn.CrossEntropyLoss()),
    "bce": (
        lambda n: torch.rand(n, 3).double().round(),
        nn.BCEWithLogitsLoss(pos_weight=torch.tensor([2.0, 1.0, 0.5]).double()),
    ),
    "mse": (lambda n: torch.randn(n, 3).double(), nn.MSELoss()),
    "callable": (lambda n: torch.randn(n, 3).double(), lambda f, y: (f - y).abs().pow(3).sum(1)),
    "log-cosh": (lambda n: torch.randn(n, 3).double(), LogCosh()),
}


def least_squares(matvec, b, **options):
    return lsmr(matvec, matvec, b, **options)


def series(matvec, b, *, rtol, max_products=500):
    return neumann(matvec, b, terms=max_products, scale=1.0, rtol=rtol)


#: Solvers of positive definite systems, ``(matvec, b, rtol=, max_products=) -> Solution`` (test_linalg).
SOLVERS = {"cg": cg, "minres": minres, "lsmr": least_squares, "neumann": series, "residual": minimal_residual}
