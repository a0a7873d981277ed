"""A running estimate as a value: whatever is seen in pieces, merged, forgotten, moved, saved and resumed."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any, NoReturn, Self

import torch
from torch import Tensor, nn

from . import arguments
from .blocks import Block
from .changes import uncast
from .estimation import Estimation, Source
from .identity import short, told, told_of_options
from .layercollection import LayerCollection
from .object.pmat import PMat
from .passes import reduce, update
from .reading import reading
from .team import Team

#: The version of what :meth:`Accumulator.state_dict` gives.
FORMAT = 1


class Accumulator:
    """The running estimate of one matrix in one representation.

    What was seen is held as sums, so that the matrix is that of all examples together, in whatever pieces they come:
    ``FIM(model, loader, R)`` is ``Accumulator(FIM, model, R).update(loader).matrix()``, and two halves of the data give
    the same, on one accumulator or merged from two. :meth:`decay` makes it a running average, which has no bias towards
    where it began.

    PMatEKFAC takes its basis from the first update, for which it reads the data twice; later updates add to the second
    moments in that basis, which are exact, until :meth:`rebase` takes another one. PMatLowRank keeps all rows of the
    Jacobian, or ``rows=``. Of a Hessian the entries add, in the representations that have some. PMatImplicit has no
    average. FIM_MonteCarlo draws other labels for each minibatch that comes.

    The model is looked at in the first update, and again when it is not the same any more: when its modules, their
    plain attributes, those of their types and of the objects that they hold (a configuration), hooks or modes are other
    ones, or minibatches have other axes. What else a model may consult (the variables of a closure, a file) is not seen
    to change.

    Args:
        matrix: A constructor of matrices: FIM, FIM_MonteCarlo, EmpiricalFisher, GradientCovariance, GGN, Hessian, a
            partial of one, or one of your own that hands its source to the representation.
        model: The model, which is used at the parameters that it has when an update comes.
        representation: A PMat class, a partial of one, or ``PMatMixed.of(...)``.
        process_group: Of ``torch.distributed``: its ranks make an accumulator each and update them together, each with
            its own minibatches, by which all have seen all. Without one, :meth:`reduce` adds up what ranks have seen.
        **options: The keywords of the matrix and of the representation.

    Raises:
        NotImplementedError: For a representation that has no average.

    Example:
        >>> from nngeometry import FIM, Accumulator, PMatKFAC
        >>> model = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3))
        >>> running = Accumulator(FIM, model, PMatKFAC)
        >>> for x in torch.randn(3, 20, 4):
        ...     _ = running.decay(0.95).update((x,))
        >>> running.matrix().size(), round(running.n, 2)
        ((43, 43), 57.05)
    """

    def __init__(
        self,
        matrix: Callable[..., Any],
        model: nn.Module,
        representation: Any,
        *,
        process_group: Any = None,
        **options: Any,
    ) -> None:
        if not callable(matrix) or isinstance(matrix, type | nn.Module):
            raise TypeError(
                f"matrix: expected a constructor such as FIM or GGN, got {arguments.described(matrix)}: "
                "Accumulator(FIM, model, PMatKFAC)"
            )
        kind: Any = representation.func if isinstance(representation, partial) else representation
        constructor = matrix.func if isinstance(matrix, partial) else matrix

        def begin(layer_collection: LayerCollection, generator: Source, examples: Any, **left: Any) -> Estimation:
            method = "plan" if generator.jacobians else "project"
            arguments.representation(representation, PMat, left, constructor, method)
            if not isinstance(kind, type):
                raise TypeError(f"representation: expected a PMat class, got {arguments.described(representation)}")
            fixed = representation.keywords if isinstance(representation, partial) else {}
            begun: Estimation = kind.estimation(  # type: ignore[attr-defined]
                generator, **{**fixed, **left}
            )
            return begun

        found = matrix(model, [], begin, **options)
        if not isinstance(found, Estimation):
            raise TypeError(
                f"matrix: {arguments.described(matrix)} hands no source to the representation that it is given: call "
                "representation(layer_collection=..., generator=source, examples=loader, **options) in it"
            )
        self.model = model
        self.process_group = process_group
        self._kind = kind
        self._estimation = found
        chosen = {**getattr(matrix, "keywords", {}), **options}
        self._options_held = told_of_options(chosen)
        self._what = (
            told(constructor, chosen),
            told(self._kind, getattr(representation, "keywords", {})),
        )

    @property
    def layer_collection(self) -> LayerCollection:
        """The coordinates of the matrix."""
        return self._estimation.source.layer_collection

    @property
    def n(self) -> float:
        """How many examples were seen, those of the past for less where they were decayed; of a Hessian, what they
        count in the mean.
        """
        return self._estimation.seen

    @uncast
    def update(
        self,
        examples: Any,
        *,
        checkpoint: str | Path | None = None,
        every: int | None = None,
        keep_checkpoint: bool = False,
    ) -> Self:
        """Fold in a loader or one minibatch, at the parameters as they are now. After an exception nothing of it is
        kept.

        Args:
            examples: As ``loader`` of :func:`~nngeometry.FIM`. The first time PMatEKFAC reads it twice.
            checkpoint: A file from which the same update goes on when the program was stopped, as in
                :func:`~nngeometry.FIM`, of an accumulator that has seen the same before.
            every: After how many minibatches of a rank it is written, by default 100.
            keep_checkpoint: Whether it stays when the update is done.

        Returns:
            The accumulator.
        """
        if self.process_group is not None or checkpoint is not None or every is not None or keep_checkpoint:
            what = (*map(str, self._what), self._options_held)
            examples = reading(examples, self.process_group, checkpoint, every, keep_checkpoint, what)
        update(self._estimation, examples)
        return self

    def reduce(self, process_group: Any) -> Self:
        """Have seen what the accumulators of all ranks have seen, each of which was updated alone: all ranks call this
        together, and all have the same then. One collective for each block.

        Args:
            process_group: Of ``torch.distributed``.

        Returns:
            The accumulator.

        Raises:
            ValueError: If the ranks have accumulators of different things; or of PMatEKFAC, in different bases.
        """
        team = Team(process_group)
        identities = team.exchange(self._identity())
        self._check("reduce", identities[0])
        for other in identities:
            self._check("reduce", other)
        reduce(self._estimation, team)
        return self

    def decay(self, weight: float) -> Self:
        """What was seen counts ``weight`` as much from now on; nothing seen, nothing changes.

        Args:
            weight: Of the old, between 0 and 1: 0.95 keeps 95 % of it.

        Returns:
            The accumulator.

        Raises:
            ValueError: For another weight.
        """
        value = arguments.number("decay: weight", weight, least=0.0)
        if value > 1:
            raise ValueError(f"decay: weight is that of the old, between 0 and 1, got {value}")
        if value == 0:
            return self.reset()
        self._estimation.decay(value)
        return self

    @uncast
    def matrix(self) -> PMat:
        """The matrix of what was seen. The accumulator goes on as if it had not been asked.

        Raises:
            ValueError: If nothing was seen.
        """
        if self.n == 0:
            raise ValueError("matrix: nothing was seen yet: call update(loader) first")
        return self.made_of(self._estimation.root())

    def made_of(self, root: Block) -> PMat:
        """A matrix of the same representation and layers with other blocks.

        Args:
            root: These, as :attr:`estimation` makes them.

        Returns:
            The matrix.
        """
        made: PMat = self._kind._of_blocks(self.layer_collection, root)
        made.generator = self._estimation.source
        return made

    @property
    def estimation(self) -> Estimation:
        """What was seen, block by block."""
        return self._estimation

    def ahead(self) -> Accumulator:
        """One that has seen nothing and goes on where this one is, with its bases and its place in the random draws.
        What it sees can be added by :meth:`take`, or dropped, and then nothing has happened.

        Example:
            >>> from nngeometry import FIM, Accumulator, PMatDiag
            >>> running = Accumulator(FIM, nn.Linear(4, 3), PMatDiag).update((torch.randn(20, 4),))
            >>> ahead = running.ahead().update((torch.randn(10, 4),))
            >>> running.n, running.decay(0.5).take(ahead).n
            (20.0, 20.0)
        """
        made = object.__new__(Accumulator)
        made.__dict__.update(vars(self))
        made._estimation = self._estimation.ahead()
        return made

    def take(self, ahead: Accumulator) -> Self:
        """Add what one that went :meth:`ahead` of this one has seen. It is used up: it has seen nothing then, and is
        ahead of this one anew.

        Args:
            ahead: The other one.

        Returns:
            The accumulator.

        Raises:
            ValueError: If it is of another accumulator; or of PMatEKFAC, in another basis.
        """
        if ahead is self or ahead._estimation.source is not self._estimation.source:
            raise ValueError("take: the other accumulator did not go ahead of this one: use merge")
        self._estimation.take(ahead._estimation)
        ahead._estimation = self._estimation.ahead()
        return self

    def merge(self, other: Accumulator) -> Self:
        """Add what another accumulator of the same matrix has seen, which is left as it is.

        Args:
            other: Of the same matrix, representation and layers.

        Returns:
            The accumulator.

        Raises:
            ValueError: If it is of something else; or of PMatEKFAC, in another basis.
        """
        if not isinstance(other, Accumulator):
            raise TypeError(f"merge: expected an Accumulator, got {arguments.described(other)}")
        self._check("merge", other._identity())
        self._estimation.absorb(other._estimation)
        return self

    def __add__(self, other: Accumulator) -> Accumulator:
        """What both have seen, as a new accumulator."""
        return self._moved(Tensor.clone).merge(other) if isinstance(other, Accumulator) else NotImplemented

    def rebase(self, other: Accumulator | None = None) -> Self:
        """Take the eigenbasis of all that was seen, for PMatEKFAC.

        The second moments are carried over as the diagonal, in the new basis, of the approximation in the old one: that
        is not exact, but what is added later is.

        Args:
            other: Whose basis to take instead, so that the two can be merged.

        Returns:
            The accumulator.

        Raises:
            ValueError: If the representation has no basis of its own.
        """
        if other is not None:
            self._check("rebase", other._identity())
        rebase = getattr(self._estimation, "rebase", None)
        if rebase is None:
            raise ValueError("rebase: this representation has no basis of its own: only PMatEKFAC and mixtures with it")
        rebase(None if other is None else other._estimation)
        return self

    def reset(self) -> Self:
        """Forget all that was seen, bases included.

        Returns:
            The accumulator.
        """
        self._estimation = self._estimation.fresh()
        return self

    def to(self, device: torch.device | str | None = None, dtype: torch.dtype | None = None) -> Accumulator:
        """A new accumulator that has seen the same, with its sums on another device or in another dtype, where those of
        later updates are brought. The model stays where it is.

        Args:
            device: Where, by default where they are.
            dtype: Of floating point, by default as it is.

        Returns:
            The other accumulator.
        """
        arguments.device(device)
        if dtype is not None and not dtype.is_floating_point:
            raise ValueError(f"to: dtype={dtype}: the sums are real numbers: pass torch.float32 or torch.float64")
        return self._moved(lambda t: t.to(device, dtype if t.is_floating_point() else None, copy=True))

    def state_dict(self) -> dict[str, Any]:
        """What was seen, bases and the place in the random draws included, as tensors and plain values, for
        ``torch.save`` and ``torch.load(weights_only=True)``.
        """
        return {"format": FORMAT, **self._identity(), "seen": self._estimation.plain()}

    def load_state_dict(self, state: Mapping[str, Any]) -> Self:
        """Have seen what :meth:`state_dict` says, instead of what was seen, and go on as that accumulator would.

        Args:
            state: Of an accumulator of the same matrix, representation, options and layers.

        Returns:
            The accumulator.

        Raises:
            ValueError: If it is of something else, and of what.
        """
        if not isinstance(state, Mapping) or "format" not in state or "seen" not in state:
            raise ValueError("load_state_dict: expected what Accumulator.state_dict() gives")
        if state["format"] != FORMAT:
            raise ValueError(
                f"load_state_dict: the state is of format {state['format']!r}, this version of the library reads "
                f"{FORMAT}: use the version that wrote it"
            )
        self._check("load_state_dict", state)
        fresh = self._estimation.fresh()
        try:
            fresh.load(state["seen"])
        except (AssertionError, AttributeError, IndexError, KeyError, RuntimeError, TypeError, ValueError) as error:
            raise ValueError(f"load_state_dict: the state is damaged ({type(error).__name__}: {error})") from error
        self._estimation = fresh
        return self

    def _identity(self) -> dict[str, Any]:
        """What two accumulators must have in common."""
        layers = self.layer_collection.layers.values()
        return {
            "matrix": self._what[0],
            "representation": self._what[1],
            "layers": [[layer.name, [[name, list(shape)] for name, shape in layer.params]] for layer in layers],
            "dtype": str(self._estimation.source.dtype),
        }

    def _check(self, what: str, other: Mapping[str, Any]) -> None:
        mine = self._identity()
        differ = [
            f"{name} ({short(other.get(name))}, here {short(mine[name])})"
            for name in mine
            if other.get(name) != mine[name]
        ]
        if differ:
            raise ValueError(f"{what}: the other accumulator is of something else: {'; '.join(differ)}")

    def _moved(self, fn: Callable[[Tensor], Tensor]) -> Accumulator:
        made = object.__new__(Accumulator)
        made.__dict__.update(vars(self))
        made._estimation = self._estimation.map(fn)
        return made

    def __deepcopy__(self, memo: dict[int, Any]) -> Accumulator:
        return self._moved(Tensor.clone)  # of the same model

    def __reduce__(self) -> NoReturn:
        raise TypeError(
            "an Accumulator cannot be pickled, since it holds the model and functions of yours: keep its state_dict() "
            "and give that to the load_state_dict of one that is made in the same way"
        )

    def __repr__(self) -> str:
        p = self.layer_collection.numel()
        return f"Accumulator({self._what[0]}, {self._what[1]}) of {p} parameters, n = {self.n:g}"
