"""Data attribution: how much training examples matter for the loss at queries."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from . import arguments
from .changes import unrecorded
from .distributed import everything, require_same
from .generator import Generator
from .identity import checksum
from .losses import Loss
from .losses.targets import Targets
from .metrics import gradient_source
from .model import data
from .object import PFMapFactored, PMat, Relative
from .object.kernel import BatchJacobian, batch_jacobians, dense_forms, images, through, tile
from .object.kernel_layouts import Traced
from .reading import Placing, Reading, positions_of
from .registry import name_in_files
from .team import Team


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
        process_group: Of ``torch.distributed``, whose ranks ask together, each with its own training examples
            (:func:`nngeometry.distributed.shard`) and all with the same queries, and get the scores of all.

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
        process_group: Any = None,
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

        self.team = Team(process_group)
        self.matrix = matrix
        self.regul = regul
        self.refine = refine
        self.rtol = rtol
        self._train = generator(loss, targets)
        self._query = self._train  # one of its own would look at the model for itself
        if query_loss is not None or query_targets is not None:
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
        train = self._begun(train)
        queries = self._same(queries)
        names = list(self.matrix.layer_collection)

        def own() -> list[Tensor]:
            found = [tiles for _, tiles in self._columns(queries, train)]
            if per_layer:
                return [torch.stack([tiles[name] for name in names]) for tiles in found]
            return [_sum(tiles).unsqueeze(0) for tiles in found]

        found = self._gathered(train, own)
        return dict(zip(names, found, strict=True)) if per_layer else found[0]

    @unrecorded
    def self_scores(self, train: Any, per_layer: bool = False) -> Any:
        """The influence of every training example on itself, large for atypical and mislabelled ones.

        Args:
            train: A loader, or one minibatch.
            per_layer: Whether to return a dict of the shares of the layers, which sum to it; by default not.

        Returns:
            ``(t,)``.
        """
        names = list(self.matrix.layer_collection)
        if self.team.size > 1 and (self._inverse is None or self._inverse.root.matrix_free):
            raise NotImplementedError(
                "process_group: self_scores by products (refine=, PMatImplicit) are solves for every minibatch of a "
                "rank, for which the others would not wait: use a matrix that holds entries, without refine"
            )
        train = self._begun(train)

        def own() -> list[Tensor]:
            shares: list[Tensor] = []
            for slab in batch_jacobians(self._train, train):
                if self._inverse is None:
                    left, right = slab.forms, self._solved([slab]).forms
                else:
                    left, right = through(self._inverse, slab.forms)
                one = {name: form.paired(right[name])[0] for name, form in left.items()}
                shares.append(torch.stack([one[name] for name in names]) if per_layer else _sum(one).unsqueeze(0))
                del slab, left, right  # before the next ones are made
            return shares

        found = self._gathered(train, own)
        return dict(zip(names, found, strict=True)) if per_layer else found[0]

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
        train = self._begun(train)
        queries = self._same(queries)
        sizes: list[int] = []

        def best() -> tuple[Tensor, Tensor] | None:
            found: tuple[Tensor, Tensor] | None = None
            for start, tiles in self._columns(queries, train):
                values = _sum(tiles)
                sizes.append(values.shape[1])
                index = torch.arange(start, start + values.shape[1], device=values.device).expand_as(values)
                found = _best([(values, index)] if found is None else [found, (values, index)], k, largest)
            return found

        mine, told = self.team.attempt(best, lambda found: (positions_of(train), sizes, _on_cpu(found)))
        if self.team.size == 1:
            assert mine is not None
            return mine
        where = _starts(told)
        several = []
        for positions, counts, theirs in told:
            if theirs is not None:
                starts = torch.tensor([where[p] for p in positions])
                own = torch.repeat_interleave(starts - _before(counts), torch.tensor(counts))
                several.append((theirs[0], theirs[1] + own[theirs[1]]))
        values, index = _best(several, k, largest)
        return values.to(self._train.device), index.to(self._train.device)

    def _columns(self, queries: Any, train: Any) -> Iterator[tuple[int, dict[str, Tensor]]]:
        """For each minibatch of training examples its first and its scores ``(q, b)``, layer by layer."""
        arguments.loader(queries, "queries")
        lc = self.matrix.layer_collection
        found = batch_jacobians(self._query, queries)
        if self._inverse is None:
            asked = [self._solved(list(found))]
        else:
            asked = [BatchJacobian(s.examples, s.outputs, images(self._inverse, s.forms)) for s in found]
        layout = Traced((1, 1), (0, 0))
        start = 0
        for slab in batch_jacobians(self._train, train):
            yield start, {name: torch.cat([tile(q, slab, layout, [name])[0] for q in asked]) for name in lc}
            start += slab.examples
            del slab  # before the next one is made

    def _begun(self, train: Any) -> Any:
        """The training examples of this rank, or the loader as it is."""
        if self.team.group is None:
            arguments.loader(train, "train")
            return train
        what: tuple[str, ...] = (
            "Influence",
            name_in_files(type(self.matrix)),
            f"matrix {checksum(self.matrix.root.tensors())}",
        )
        what += (f"regul={self.regul}", f"refine={self.refine is not None}", f"rtol={self.rtol}")
        return Placing(Reading(train, self.team, None, what).begin(self._train))

    def _same(self, queries: Any) -> Any:
        """The queries, which all ranks have: a list of them where they are compared."""
        if self.team.size == 1:
            return queries
        self.team.attempt(lambda: arguments.loader(queries, "queries"))
        whole = everything(queries, self.team, "queries")
        batches = self.team.attempt(lambda: [whole] if data.is_minibatch(whole) else list(data.drawn(whole)))[0]
        require_same(self.team, batches, "queries")
        return batches

    def _gathered(self, train: Any, own: Callable[[], list[Tensor]]) -> Tensor:
        """Columns of all training examples ``(..., t)``: those of this rank, one tensor for each minibatch, at their
        places among those of the others.
        """
        mine, told = self.team.attempt(
            own,
            lambda found: (positions_of(train), [t.shape[-1] for t in found], found[0].shape[:-1] if found else None),
        )
        if self.team.size == 1:
            return torch.cat(mine, -1)
        where = _starts([(positions, counts, None) for positions, counts, _ in told])
        lead = next(shape for *_, shape in told if shape is not None)
        total = sum(sum(counts) for _, counts, _ in told)
        out = torch.zeros(*lead, total, dtype=self._train.dtype, device=self._train.device)
        for position, piece in zip(positions_of(train), mine, strict=True):
            out[..., where[position] : where[position] + piece.shape[-1]] = piece
        return self.team.add(out)

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


def _best(several: Sequence[tuple[Tensor, Tensor]], k: int, largest: bool) -> tuple[Tensor, Tensor]:
    """The k best of several scores with their indices."""
    values, index = (torch.cat([pair[at] for pair in several], 1) for at in (0, 1))
    values, order = values.topk(min(k, values.shape[1]), 1, largest=largest)
    return values, index.gather(1, order)


def _on_cpu(found: tuple[Tensor, Tensor] | None) -> tuple[Tensor, Tensor] | None:
    return None if found is None else (found[0].cpu(), found[1].cpu())


def _before(counts: Sequence[int]) -> Tensor:
    """How many examples are before each minibatch."""
    sizes = torch.tensor(counts, dtype=torch.int64)
    return sizes.cumsum(0) - sizes


def _starts(told: Sequence[tuple[Sequence[int], Sequence[int], Any]]) -> dict[int, int]:
    """From the position of each minibatch of all ranks to that of its first example."""
    sizes = sorted((p, n) for positions, counts, _ in told for p, n in zip(positions, counts, strict=True))
    if not sizes:
        raise ValueError("train: the loader yielded no minibatch on any rank: it is empty")
    return dict(zip([p for p, _ in sizes], _before([n for _, n in sizes]).tolist(), strict=True))
