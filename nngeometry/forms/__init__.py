"""Per-example Jacobians of one layer, kept in the algebraic form in which the layer produces them.

A form represents ``J[c, b]``, the derivative of the c-th cotangent product of example b with respect to the parameters
of one layer, arranged in the layer's *packed* shape (see :class:`nngeometry.kinds.Packing`). ``dense()`` is the one
obligation of a form; every other method is derived from it, in chunks of the memory budget, and a form overrides what
its structure makes cheaper.
"""

from .base import ColumnViews, Dense, LayerJacobian, Map, Places
from .beside import Beside, LinearMap, Routed, RoutedMap
from .combine import add, dense_rows, gram, rows, stack, write_rows
from .contraction import Contraction
from .gather import Gather
from .lazy import Lazy, Placed
from .moments import add_gram, copy_transposed, mirror, moment_with_one, second_moment, total_of
from .outer import Outer
from .uses import Sum, Transposed

__all__ = [
    "Beside",
    "ColumnViews",
    "Contraction",
    "Dense",
    "Gather",
    "LayerJacobian",
    "Lazy",
    "LinearMap",
    "Map",
    "Outer",
    "Placed",
    "Places",
    "Routed",
    "RoutedMap",
    "Sum",
    "Transposed",
    "add",
    "add_gram",
    "copy_transposed",
    "dense_rows",
    "gram",
    "mirror",
    "moment_with_one",
    "rows",
    "second_moment",
    "stack",
    "total_of",
    "write_rows",
]
