"""What can be done where the Jacobian of a layer cannot be had: tried before it is said."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

from torch import nn

from ..changes import Borrowed, Change, warnings_ignored
from ..kinds import declared_whole
from ..layercollection import LayerCollection
from ..memory import nbytes_of
from ..wrappers import BareNames
from .refused import EXCLUDE, Refused

#: Raises unless Jacobians of the layers of a collection can be had.
Look = Callable[[LayerCollection], object]


def tried(model: nn.Module, collection: LayerCollection, refused: Refused, look: Look) -> Refused:
    """The refusal with those remedies that work, as a look at the model with each of them told.

    Tried are derivatives of zero for what is not called, modules above as one layer, the nearest first, and the
    collection without the layers. Products need no Jacobians.
    """
    own = [remedy for remedy in refused.remedies if remedy != EXCLUDE]
    without = _without(collection, refused, look)
    if not collection.ignore_uncalled:
        zero = LayerCollection(collection.layers, ignore_uncalled=True)
        if _failure(look, lambda: zero) is None:
            return Refused(refused.layers, refused.problem, *own, *without, _ZERO)
    found = [*_whole(model, collection, refused, look), *without]
    products = [PRODUCTS] if found or EXCLUDE in refused.remedies else []
    return Refused(refused.layers, refused.problem, *own, *found, *products)


_ZERO = "collect it with LayerCollection.from_model(model, ignore_uncalled=True) if its derivative is to be zero"
PRODUCTS = "use PMatImplicit, whose products need no Jacobians"


def _failure(look: Look, made: Callable[[], LayerCollection], *changes: Change) -> Exception | None:
    """What a look at a collection raises."""
    try:
        with Borrowed(warnings_ignored("layer "), *changes):
            look(made())
    except Exception as error:
        return error
    return None


def _whole(model: nn.Module, collection: LayerCollection, refused: Refused, look: Look) -> list[str]:
    wanted = {id(p): p for p in collection.parameters(model)}
    frozen = any(not p.requires_grad for p in wanted.values())

    def made() -> LayerCollection:
        every = LayerCollection.from_model(model, frozen=frozen, ignore_uncalled=collection.ignore_uncalled)
        names = {name for name, p in every.named_parameters(model) if id(p) in wanted}
        return every.select(lambda one: any(f"{one.name}.{k}".lstrip(".") in names for k, _ in one.params))

    for kind in _above(model, refused.layers[0]):
        if _failure(look, made, declared_whole(kind)) is None:
            return [f"call nngeometry.whole({kind.__name__}) first, by which each {kind.__name__} is one layer"]
    return []


def _above(model: nn.Module, name: str) -> Iterator[type[nn.Module]]:
    """The types of the modules that a layer is in, the nearest first, of those that may be one layer."""
    bare = BareNames(model)
    modules = {bare(k): module for k, module in model.named_modules()}
    while True:
        module = modules[name]
        if next(module.children(), None) is not None and type(module) not in _CONTAINERS:
            if nbytes_of(module.parameters()) > _MOST_BYTES:
                return
            yield type(module)
        if not name:
            return
        name = name.rpartition(".")[0]


#: They have no forward of their own, or are everywhere.
_CONTAINERS = (nn.ModuleList, nn.ModuleDict, nn.Sequential)
#: Of the parameters of a module up to which its Jacobian is tried, of three examples.
_MOST_BYTES = 2**30


def _without(collection: LayerCollection, refused: Refused, look: Look) -> list[str]:
    gone = list(refused.layers)
    for _ in range(_MOST_ROUNDS):
        rest = collection.exclude(*gone)
        error = _failure(look, lambda rest=rest: rest)  # type: ignore[misc]
        if error is None:
            names = _short(gone, rest)
            return [f"{EXCLUDE}({', '.join(map(repr, names))})"] if len(names) <= _MOST_NAMES else []
        if not isinstance(error, Refused):
            break
        gone += error.layers
    return []


#: How often further layers are left out, and how many are named in a sentence.
_MOST_ROUNDS = 8
_MOST_NAMES = 6


def _short(names: Sequence[str], rest: LayerCollection) -> list[str]:
    """The names of as few modules that have these layers and none of the rest."""
    found: dict[str, None] = {}
    for name in names:
        while (up := name.rpartition(".")[0]) and not any(o == up or o.startswith(up + ".") for o in rest):
            name = up
        found[name] = None
    return list(found)
