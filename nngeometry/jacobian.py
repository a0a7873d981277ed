"""The Jacobian of a model: outputs of examples with respect to parameters."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from . import arguments
from .changes import uncast
from .generator import Generator, rowwise
from .layercollection import LayerCollection
from .likelihood import Cotangents, each_output
from .model import data
from .object.map import PFMap, PFMapDense
from .reading import Reading
from .team import Team
from .undivided import Undivided

MapRepresentation = type[PFMapDense] | Any


@uncast
@arguments.called_as
def Jacobian(
    model: nn.Module,
    loader: Any,
    function: Callable[..., Any] | None = None,
    representation: MapRepresentation = PFMapDense,
    layer_collection: LayerCollection | None = None,
    centering: bool = False,
    *,
    n_output: int | None = None,
    batch_statistics: bool = False,
    unit: str = "example",
    device: torch.device | str | None = None,
    verbose: bool = False,
    process_group: Any = None,
) -> Any:
    """The derivative of every output of every example with respect to every parameter, ``J[c, x, p]``.

    Args:
        model: As in :func:`~nngeometry.FIM`.
        loader: As in :func:`~nngeometry.FIM`.
        function: ``function(*minibatch)``, any function of the model with a row for each example; further axes of its
            result are flattened into outputs. By default ``model(minibatch[0])``.
        representation: PFMapDense (the default), ``(C, n, P)`` in memory; PFMapFactored, inputs and output gradients of
            layers; or PFMapImplicit, products by automatic differentiation.
        layer_collection: As in :func:`~nngeometry.FIM`.
        centering: Whether it is less the mean over examples, output by output; by default not.
        n_output: How many outputs there should be, if that is to be checked.
        batch_statistics: As in :func:`~nngeometry.FIM`.
        unit: As in :func:`~nngeometry.FIM`; with "minibatch" all entries of what ``function`` returns for a minibatch,
            of any shape, are outputs of one example.
        device: As in :func:`~nngeometry.FIM`.
        verbose: As in :func:`~nngeometry.FIM`.
        process_group: Of ``torch.distributed``: its ranks call this together, each with its own minibatches
            (:func:`nngeometry.distributed.shard`): the rows of a rank are those of its own examples, in their order.

    Returns:
        The map, of the representation.

    Raises:
        ValueError: As :func:`~nngeometry.FIM`, and for minibatches with different numbers of outputs.

    Example:
        >>> from nngeometry import Jacobian, PFMapFactored, PVector
        >>> model = nn.Linear(4, 3)
        >>> J = Jacobian(model, (torch.randn(20, 4),), representation=PFMapFactored)
        >>> J.shape, (J @ PVector.from_model(model).detach()).size()
        ((3, 20, 15), torch.Size([3, 20]))
    """
    arguments.call(
        model, [] if process_group is not None else loader, function, layer_collection, LayerCollection, device
    )
    arguments.of_training(batch_statistics, unit)
    if not (isinstance(representation, type) and issubclass(representation, PFMap)):
        raise TypeError(
            "representation: expected PFMapDense, PFMapFactored or PFMapImplicit, got "
            f"{arguments.described(representation)}"
        )
    generator = of_outputs(
        model,
        function,
        layer_collection,
        n_output=n_output,
        batch_statistics=batch_statistics,
        unit=unit,
        device=device,
        verbose=verbose,
    )
    if process_group is not None:
        if centering:
            raise NotImplementedError(
                "process_group: rows stay on their rank, so none has the mean over all examples: leave centering out"
            )
        reading = Reading(loader, Team(process_group), None, ("Jacobian", representation.__name__))
        loader = list(reading.begin(generator).read(0))
        loader = data.Minibatches(batch for _, batch in loader)
        if not loader:
            raise ValueError(
                "Jacobian: this rank has no minibatch, so it has no rows: use smaller minibatches, or fewer ranks"
            )
    found: PFMap = representation.of(generator, loader)  # type: ignore[attr-defined]
    return found.centred() if centering else found


def of_outputs(
    model: nn.Module,
    function: Callable[..., Any] | None,
    layer_collection: LayerCollection | None,
    *,
    n_output: int | None = None,
    batch_statistics: bool = False,
    unit: str = "example",
    device: torch.device | str | None = None,
    verbose: bool = False,
) -> Generator:
    """A generator of the Jacobian itself: one cotangent for each output."""

    if n_output is not None:
        arguments.integer("n_output", n_output, least=1)

    def cotangents(f: Tensor, batch: data.Batch, position: int) -> Cotangents:
        if n_output is not None and f[0].numel() != n_output:
            raise ValueError(
                f"n_output={n_output}, but there are {f[0].numel()} outputs for each example: leave it out"
            )
        return each_output(f)

    lc = LayerCollection.from_model(model) if layer_collection is None else layer_collection
    return (Undivided if unit == "minibatch" else Generator)(
        model,
        lc,
        rowwise(cotangents),
        function=function,
        device=device,
        verbose=verbose,
        batch_statistics=batch_statistics,
        unit=unit,
    )


__test__ = {f.__name__: f.__doc__ or "" for f in (Jacobian,)}
