"""Data attribution: how much training examples matter for the loss at queries."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from . import arguments
from .changes import unrecorded
from .generator import Generator
from .losses import Loss
from .losses.targets import Targets
from .metrics import gradient_source
from .object import PFMapFactored, PMat, Relative
from .object.kernel import BatchJacobian, batch_jacobians, dense_forms, left_of, through, tile
from .object.kernel_layouts import Traced


class Influence:
    """Influence functions ``I[q, t] = g_q^T (F + regul)^-1 g_t`` with g the gradients of the loss at single examples.

    To first order, leaving training example t out of n (and training again) changes the loss at q by ``I[q, t] / n``: a
    positive score means that t helps q. (Koh and Liang write the influence of up-weighting t, ``-I``.) F is the
    curvature of the mean loss over the training set; regul stands for weight decay and the curvature that F lacks.

    Args:
        model: The trained model, in eval mode.
        matrix: F in any representation, e.g. ``GGN(model, loader, PMatEKFAC, loss)``.
        loss: ``loss(outputs, *minibatch[1:])``, one value for each example, by default ``nn.CrossEntropyLoss()``; its
            ``reduction`` does not matter.
        regul: As in :meth:`PMat.solve`, by default 1e-3.
        targets: What the loss receives beside the outputs, as in :func:`~nngeometry.EmpiricalFisher`.
        query_loss: What is measured at queries, by default the same loss.
        query_targets: What that receives, by default the same targets.
        function: As in :func:`~nngeometry.FIM`.
        refine: The same matrix by its products (PMatImplicit), for which solves are refined by conjugate gradients,
            matrix being the preconditioner; by default they are not.
        rtol: The relative residual to which they are, by default 1e-5.
        batch_statistics: As in :func:`~nngeometry.EmpiricalFisher`, for queries and training examples.
        unit: As there; with "minibatch" scores are between minibatches.
        device: Where minibatches go, by default to the model.
        verbose: Whether to show a progress bar.

    Raises:
        ValueError: If the matrix is of another dtype or on another device than the gradients.

    Example:
        >>> from nngeometry import GGN, PMatEKFAC
        >>> model = nn.Linear(4, 3)
        >>> train = torch.randn(20, 4), torch.randint(3, (20,))
        >>> loss = nn.CrossEntropyLoss()
        >>> influence = Influence(model, GGN(model, train, PMatEKFAC, loss), loss, regul=1e-2)
        >>> influence.scores((torch.randn(2, 4), torch.tensor([0, 1])), train).shape
        torch.Size([2, 20])

    Source:
        Koh and Liang (2017), 1703.04730; Grosse et al. (2023), 2308.03296.
    """

    @arguments.called_as
    def __init__(
        self,
        model: nn.Module,
        matrix: PMat,
        loss: Loss | None = None,
        regul: float | Relative = 1e-3,
        *,
        targets: Targets = None,
        query_loss: Loss | None = None,
        query_targets: Targets = None,
        function: Callable[..., Any] | None = None,
        refine: PMat | None = None,
        rtol: float = 1e-5,
        batch_statistics: bool = False,
        unit: str = "example",
        device: torch.device | str | None = None,
        verbose: bool = False,
    ) -> None:
        arguments.call(model, [], function, None, PMat, device)
        arguments.instance("matrix", matrix, PMat, "pass e.g. GGN(model, loader, PMatEKFAC, loss)")
        if refine is not None:
            arguments.instance("refine", refine, PMat, "pass the same matrix as PMatImplicit")
        arguments.number("rtol", rtol, above=0.0)
        arguments.of_training(batch_statistics, unit)
        for name, given in (("loss", loss), ("query_loss", query_loss)):
            arguments.loss(given, name)

        def generator(of: Loss | None, chosen: Targets) -> Generator:
            return gradient_source(
                model,
                matrix.layer_collection,
                of,
                chosen,
                function=function,
                device=device,
                verbose=verbose,
                batch_statistics=batch_statistics,
                unit=unit,
            )

        self.matrix = matrix
        self.regul = regul
        self.refine = refine
        self.rtol = rtol
        self._train = generator(loss, targets)
        self._query = generator(
            loss if query_loss is None else query_loss, targets if query_targets is None else query_targets
        )
        if matrix.dtype != self._train.dtype or matrix.device.type != self._train.device.type:
            raise ValueError(
                f"matrix: it is {matrix.dtype} on {matrix.device}, the gradients {self._train.dtype} on "
                f"{self._train.device}: move it with .to(device, dtype)"
            )
        self._inverse = None if refine is not None else matrix.inv(regul)

    @unrecorded
    def scores(self, queries: Any, train: Any, per_layer: bool = False) -> Any:
        """The influence of every training example on every query.

        The training examples are streamed, one minibatch at a time.

        Args:
            queries: A loader, or one minibatch.
            train: A loader, or one minibatch.
            per_layer: Whether to return a dict of the shares of the layers, which sum to it; by default not.

        Returns:
            ``(q, t)``.
        """
        columns = [tiles for _, tiles in self._columns(queries, train)]
        names = list(self.matrix.layer_collection)
        shares = {name: torch.cat([tiles[name] for tiles in columns], 1) for name in names}
        return shares if per_layer else _sum(shares)

    @unrecorded
    def self_scores(self, train: Any, per_layer: bool = False) -> Any:
        """The influence of every training example on itself, large for atypical and mislabelled ones.

        Args:
            train: A loader, or one minibatch.
            per_layer: Whether to return a dict of the shares of the layers, which sum to it; by default not.

        Returns:
            ``(t,)``.
        """
        arguments.loader(train, "train")
        shares: list[dict[str, Tensor]] = []
        for slab in batch_jacobians(self._train, train):
            if self._inverse is None:
                left, right = slab, self._solved([slab])
            else:
                pair = through(self._inverse, slab.forms)
                left, right = (BatchJacobian(slab.examples, slab.outputs, found) for found in pair)
            shares.append({name: form.paired(right.forms[name])[0] for name, form in left.forms.items()})
        joined = {name: torch.cat([one[name] for one in shares]) for name in self.matrix.layer_collection}
        return joined if per_layer else _sum(joined)

    @unrecorded
    def top(self, queries: Any, train: Any, k: int, largest: bool = True) -> tuple[Tensor, Tensor]:
        """The k training examples with the largest (or smallest) scores for each query, in one pass over them.

        No more than ``(q, k + minibatch)`` scores are held.

        Args:
            queries: A loader, or one minibatch.
            train: A loader, or one minibatch.
            k: How many for each query.
            largest: Whether they are the largest, by default True.

        Returns:
            Scores and positions in the loader, ``(q, k)`` each.
        """
        arguments.integer("top: k", k, least=1)
        arguments.flag("top: largest", largest)
        best: tuple[Tensor, Tensor] | None = None
        for start, tiles in self._columns(queries, train):
            values = _sum(tiles)
            index = torch.arange(start, start + values.shape[1], device=values.device).expand_as(values)
            if best is not None:
                values, index = torch.cat([best[0], values], 1), torch.cat([best[1], index], 1)
            values, order = values.topk(min(k, values.shape[1]), 1, largest=largest)
            best = values, index.gather(1, order)
        assert best is not None
        return best

    def _columns(self, queries: Any, train: Any) -> Iterator[tuple[int, dict[str, Tensor]]]:
        """For each minibatch of training examples its first and its scores ``(q, b)``, layer by layer."""
        for name, examples in (("queries", queries), ("train", train)):
            arguments.loader(examples, name)
        lc = self.matrix.layer_collection
        found = list(batch_jacobians(self._query, queries))
        if self._inverse is None:
            asked = [self._solved(found)]
        else:
            asked = [BatchJacobian(s.examples, s.outputs, through(self._inverse, s.forms)[1]) for s in found]
        layout = Traced((1, 1), (0, 0))
        start = 0
        for slab in batch_jacobians(self._train, train):
            seen = slab.forms if self._inverse is None else left_of(self._inverse, slab.forms)
            one = BatchJacobian(slab.examples, slab.outputs, seen)
            yield start, {name: torch.cat([tile(q, one, layout, [name])[0] for q in asked]) for name in lc}
            start += slab.examples

    def _solved(self, found: list[BatchJacobian]) -> BatchJacobian:
        """``(F + regul)^-1`` of the gradients by refinement, dense."""
        assert self.refine is not None
        lc = self.matrix.layer_collection
        gradients = PFMapFactored(lc, found).to_dense()
        solved = self.refine.solve(gradients, self.regul, rtol=self.rtol, preconditioner=self.matrix)
        rows = solved.to_torch()
        return BatchJacobian(rows.shape[1], rows.shape[0], dense_forms(rows, lc.layers))


def _sum(shares: dict[str, Tensor]) -> Tensor:
    return torch.stack(list(shares.values())).sum(0)
