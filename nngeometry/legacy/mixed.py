"""Old names of matrices with a representation for each kind of layer."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from torch import nn

from .. import object as objects
from ..blocks import DirectSum, Part
from ..layercollection import Layer, LayerCollection
from ..object import PMat, PMatEKFAC, PMatMixed, pspace
from .coordinates import LayerKind
from .names import attach, warn


def rules_of(lc: Any, mapping: Mapping[Any, Any]) -> dict[Any, Any]:
    """``map_layers_to`` of NNGeometry, which may name kinds of layers that the model has none of."""
    rules = {functools.partial(_is_kind, kind): representation for kind, representation in mapping.items()}
    return {rule: representation for rule, representation in rules.items() if any(map(rule, lc.layers.values()))}


def _is_kind(kind: Any, layer: Layer) -> bool:
    return isinstance(layer, kind) if isinstance(kind, LayerKind) else layer.matches(kind)


def _from_mapping(
    cls: type[PMatMixed],
    layer_collection: LayerCollection,
    generator: Any,
    default_representation: Any,
    map_layers_to: Mapping[Any, Any],
    data: Any = None,
    examples: Any = None,
    **options: Any,
) -> PMatMixed:
    """A representation for each kind of layer.

    :meta private:
    """
    warn("PMatMixed.from_mapping(...)", "PMatMixed.of(default, {nn.Linear: ...})")
    if data is not None:
        raise NotImplementedError("PMatMixed.from_mapping: data= is not of one representation: give examples=")
    return PMatMixed(
        layer_collection,
        generator,
        examples=examples,
        default_representation=default_representation,
        map_layers_to=map_layers_to,
        **options,
    )


def _mixed_constructor(init: Callable[..., None]) -> Callable[..., None]:
    """``PMatMixed(layer_collection, generator, layer_collection_each, layer_map, sub_pmats)``; and remembers which
    layer has which representation.
    """

    @functools.wraps(init)
    def __init__(self: PMatMixed, *args: Any, **kwargs: Any) -> None:
        order = ("layer_collection", "generator", "layer_collection_each", "layer_map", "sub_pmats")
        if len(args) == len(order) or "sub_pmats" in kwargs:
            given = {**dict(zip(order, args, strict=False)), **kwargs}
            lc, subs = given["layer_collection"], given["sub_pmats"].values()
            init(self, layer_collection=lc, generator=given["generator"], data=_joined(lc, subs))
            vars(self)["_layer_map"] = dict(given["layer_map"])
            return
        init(self, *args, **kwargs)
        rules, default = kwargs.get("rules"), kwargs.get("default")
        if "map_layers_to" in kwargs:
            rules = rules_of(self.layer_collection, kwargs["map_layers_to"])
            default = kwargs["default_representation"]
        vars(self)["_layer_map"] = {
            name: next((r for rule, r in (rules or {}).items() if layer.matches(rule)), default)
            for name, layer in self.layer_collection.layers.items()
        }

    return __init__


def _moved(parts: Sequence[Part], mine: LayerCollection, other: LayerCollection) -> list[Part]:
    """The parts whose layers are in another collection, at their places there."""
    theirs = other.slices()
    moved = []
    for part in parts:
        names = [name for a, b in part.slices for name, s in mine.slices().items() if a <= s.start and s.stop <= b]
        if all(name in theirs for name in names):
            runs = tuple((theirs[name].start, theirs[name].stop) for name in names)
            moved.append(Part(runs, part.packing, part.block))
    return moved


def _joined(lc: LayerCollection, matrices: Any) -> DirectSum:
    """The matrices of some layers each, as one of all of them."""
    parts = []
    for matrix in matrices:
        parts += _moved(matrix.root.parts, matrix.layer_collection, lc)
    return DirectSum(tuple(parts))


def _layer_collection_each(self: PMatMixed) -> dict[Any, LayerCollection]:
    """The layers of each representation.

    :meta private:
    """
    each: dict[Any, LayerCollection] = {}
    for name, kind in _layer_map(self).items():
        each.setdefault(kind, LayerCollection()).add_layer(name, self.layer_collection[name])
    return each


def _layer_map(self: PMatMixed) -> dict[str, Any]:
    """The representation of each layer.

    :meta private:
    """
    found: dict[str, Any] | None = vars(self).get("_layer_map")
    if found is None:
        raise AttributeError("PMatMixed: one that was loaded or derived does not know its representations: use block()")
    return found


def sub_pmats(self: PMatMixed) -> dict[Any, PMat]:
    """The matrix of each representation, of its layers.

    :meta private:
    """
    parts = self.root.parts  # type: ignore[attr-defined]
    return {
        kind: getattr(kind, "func", kind)._of_blocks(lc, DirectSum(tuple(_moved(parts, self.layer_collection, lc))))
        for kind, lc in _layer_collection_each(self).items()
    }


class PMatEKFACBlockDiag(PMatEKFAC):
    """:class:`PMatEKFAC` of linear maps, convolutions in one and two dimensions and embeddings; the exact block of
    every other layer.
    """

    @classmethod
    def factored(cls, layer: Layer) -> bool:
        """Whether a layer is of one of these kinds."""
        return layer.kronecker and any(layer.matches(t) for t in (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Embedding))


def install() -> None:
    """Attach the old names of mixed matrices, once those of all matrices are."""
    attach(
        PMatMixed,
        __init__=_mixed_constructor(PMatMixed.__init__),
        from_mapping=classmethod(_from_mapping),
        layer_map=property(_layer_map),
        layer_collection_each=property(_layer_collection_each),
        sub_pmats=property(sub_pmats),
    )
    for module in (objects, pspace):
        attach(module, PMatEKFACBlockDiag=PMatEKFACBlockDiag)
