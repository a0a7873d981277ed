"""The Gauss-Newton matrix of a classifier taken apart by class: class means, cross-class means, and the rest."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from .blocks import DirectSum, LowRank, Part
from .generator import Generator, Observation, fold, rowwise
from .hessian import GGN
from .kinds import Packing
from .layercollection import LayerCollection
from .likelihood import Cotangents
from .metrics import Representation
from .model import data
from .object import PMat, PMatImplicit, PMatLowRank


class ByClass(NamedTuple):
    """The parts of a Gauss-Newton matrix.

    Attributes:
        classes: Of rank C, spanned by one mean gradient for each class.
        cross: Of rank C (C - 1), by the means for each pair of a true and another class, less those of the true class.
        rest: GGN - classes - cross, which is positive semidefinite.
    """

    classes: PMat
    cross: PMat
    rest: PMat


def ggn_by_class(
    model: nn.Module,
    loader: Any,
    representation: Representation = PMatImplicit,
    *,
    function: Callable[..., Any] | None = None,
    layer_collection: LayerCollection | None = None,
    device: torch.device | str | None = None,
    verbose: bool = False,
) -> ByClass:
    """The hierarchical decomposition of the GGN of ``nn.CrossEntropyLoss()`` (mean), for outputs ``(n, C)``.

    The GGN is the sum over examples x and classes c of ``p_c(x) / n d d^T`` with d the gradient of the loss if c were
    the label. Those with c other than the label are grouped by (label, c): ``cross`` and ``classes`` are made of their
    weighted means. The eigenvalues of ``classes`` are the outliers of the spectrum.

    Args:
        model: The model, in eval mode.
        loader: Minibatches ``(x, labels)``.
        representation: That in which the GGN is held for ``rest``, by default PMatImplicit.
        function: As in :func:`~nngeometry.GGN`.
        layer_collection: The coordinates, by default all trainable parameters.
        device: Where minibatches go, by default to the model.
        verbose: Whether to show a progress bar.

    Returns:
        The three parts, which sum to the GGN.

    Raises:
        ValueError: For outputs of another shape.

    Example:
        >>> model = nn.Linear(4, 3)
        >>> batch = torch.randn(20, 4), torch.arange(20) % 3
        >>> parts = ggn_by_class(model, batch)
        >>> int(torch.linalg.matrix_rank(parts.classes.to_torch()))
        3

    Source:
        Papyan (2020), 2008.11865, section 4.
    """
    lc = LayerCollection.from_model(model) if layer_collection is None else layer_collection
    outputs: list[Tensor] = []
    labels: list[Tensor] = []

    def cotangents(f: Tensor, batch: data.Batch, position: int) -> Cotangents:
        if f.ndim != 2:
            raise ValueError(f"ggn_by_class: expected outputs (n, C), got {tuple(f.shape)}")
        p = f.softmax(1)
        # p_c (p - e_c), the weighted gradient if c were the label: one cotangent for each class c.
        s = p.T.unsqueeze(2) * (p - torch.eye(p.shape[1], dtype=p.dtype, device=p.device).unsqueeze(1))
        return Cotangents.of(s)

    generator = Generator(model, lc, rowwise(cotangents), function=function, device=device, verbose=verbose)
    sums: dict[tuple[int, str], Tensor] = {}
    first = 0

    def step(observation: Observation) -> None:
        nonlocal first
        first = 0 if observation.n else first
        own = data.targets(observation.batch)[0]
        if observation.n:
            outputs.append(observation.outputs.softmax(1))
            labels.append(own)
        for name, form in observation.forms.items():
            groups = nn.functional.one_hot(own, observation.outputs.shape[1]).T.to(form.dtype)  # (label, example)
            for k in range(form.cotangents):
                one = form.narrow(0, form.examples, k, k + 1)
                total = lc[name].packing.unpack(one.pull(groups.unsqueeze(1)))  # (label, p)
                key = (first + k, name)
                sums[key] = sums[key] + total if key in sums else total
        first += form.cotangents

    fold(generator.stream(loader), step)
    p, y = torch.cat(outputs), torch.cat(labels)
    n, c = p.shape
    totals = torch.stack([torch.cat([sums[k, name] for name in lc], 1) for k in range(c)], 1) / n  # (label, c, P)
    masses = nn.functional.one_hot(y, c).T.to(p.dtype) @ p / n  # (label, c)
    other = ~torch.eye(c, dtype=torch.bool, device=p.device)
    totals, masses = totals * other.unsqueeze(2), masses * other
    of_class = masses.sum(1)
    centres = totals.sum(1) / of_class.clamp(min=torch.finfo(p.dtype).tiny).unsqueeze(1)
    means = totals / masses.clamp(min=torch.finfo(p.dtype).tiny).unsqueeze(2)
    classes = _low_rank(lc, centres, of_class)
    cross = _low_rank(lc, (means - centres.unsqueeze(1))[other], masses[other])
    whole = GGN(model, loader, representation, function=function, layer_collection=lc, device=device, verbose=verbose)
    return ByClass(classes, cross, whole - classes - cross)


def _low_rank(lc: LayerCollection, rows: Tensor, weights: Tensor) -> PMatLowRank:
    p = rows.shape[1]
    return PMatLowRank(lc, data=DirectSum((Part(((0, p),), Packing.flat(p), LowRank(rows, weights)),)))
