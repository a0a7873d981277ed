"""What a matrix with a representation for each layer answers about them, and how it is put together of such."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from ..blocks import DirectSum, Part
from ..layercollection import LayerCollection


class Mixture:
    """The old names of PMatMixed. They have their place in its body, so they may not import it."""

    layer_collection: LayerCollection
    root: Any
    _layer_map: dict[str, Any] | None = None

    @property
    def layer_map(self) -> dict[str, Any]:
        """The representation of each layer.

        :meta private:
        """
        if self._layer_map is None:
            raise AttributeError(
                "PMatMixed: one that was loaded or derived does not know its representations: use block()"
            )
        return self._layer_map

    @property
    def layer_collection_each(self) -> dict[Any, LayerCollection]:
        """The layers of each representation.

        :meta private:
        """
        each: dict[Any, LayerCollection] = {}
        for name, kind in self.layer_map.items():
            each.setdefault(kind, LayerCollection()).add_layer(name, self.layer_collection[name])
        return each

    @property
    def sub_pmats(self) -> dict[Any, Any]:
        """The matrix of each representation, of its layers.

        :meta private:
        """
        return {
            kind: getattr(kind, "func", kind)._of_blocks(
                lc, DirectSum(tuple(_moved(self.root.parts, self.layer_collection, lc)))
            )
            for kind, lc in self.layer_collection_each.items()
        }


def joined(lc: LayerCollection, matrices: Any) -> DirectSum:
    """The matrices of some layers each, as one of all of them."""
    parts = []
    for matrix in matrices:
        parts += _moved(matrix.root.parts, matrix.layer_collection, lc)
    return DirectSum(tuple(parts))


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
