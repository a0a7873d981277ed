"""What a minibatch is made of: tensors in containers and objects, which are copied as what they are."""

from __future__ import annotations

import copy
import dataclasses
from collections import UserDict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from types import ModuleType
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence
from torch.utils import _pytree as pytree

from . import entries
from .packed import sequences

#: Where something is in a minibatch: the position in its container, and so on inward.
Path = tuple[int, ...]

#: At the end of the path of a list: it has an element for each example.
AS_LIST = -1


class Opaque:
    """What may be part of a minibatch and is none of its data."""


#: What is not looked into.
_CLOSED = (
    Opaque,
    Tensor,
    np.ndarray,
    np.generic,
    str,
    bytes,
    int,
    float,
    complex,
    type(None),
    nn.Module,
    type,
    ModuleType,
    torch.Generator,
)
#: How deep objects are looked into: what refers to itself ends somewhere.
_DEPTH = 12


def is_array(tree: Any) -> bool:
    """Whether something is an array or a number of numpy."""
    return isinstance(tree, np.ndarray | np.generic)


class Opened(NamedTuple):
    """A container: what is in it, and how to make another of the same type with other things in these places."""

    parts: list[Any]
    close: Callable[[list[Any]], Any]


def opened(tree: Any, depth: int = _DEPTH) -> Opened | None:
    """A container or an object with tensors in it, taken apart; None for a tensor and for everything else.

    >>> from collections import OrderedDict
    >>> parts, close = opened(OrderedDict(x=1, y=2))
    >>> close([3, 4]) == OrderedDict(x=3, y=4)
    True
    """
    of = type(tree)
    if of in (tuple, list):
        return Opened(list(tree), of)
    if of is dict:
        return Opened(list(tree.values()), lambda new: dict(zip(tree, new, strict=True)))
    if isinstance(tree, _CLOSED) or depth == 0:
        return None
    if of in pytree.SUPPORTED_NODES:
        node = pytree.SUPPORTED_NODES[of]
        parts, context = node.flatten_fn(tree)
        return Opened(list(parts), lambda new: node.unflatten_fn(new, context))
    if isinstance(tree, tuple):
        return Opened(list(tree), lambda new: of(*new) if hasattr(of, "_fields") else of(new))
    if isinstance(tree, list):
        return Opened(list(tree), lambda new: _with_elements(tree, new))
    if isinstance(tree, dict) or _copies_items(of):
        return _opened_items(tree)
    return _opened_attributes(tree, depth)


def _with_elements(tree: list[Any], new: list[Any]) -> list[Any]:
    made = copy.copy(tree)
    made[:] = new
    return made


def _copies_items(of: type) -> bool:
    """Whether objects of a type are mappings whose copy has items of its own."""
    return all(hasattr(of, name) for name in ("__copy__", "__getitem__", "__setitem__", "keys"))


def _opened_items(tree: Any) -> Opened:
    """Items, and those attributes of a dict that are none of them (some keep all items as attributes too)."""
    keys = list(tree.keys())
    parts = [tree[key] for key in keys]
    known = set(map(id, parts))
    attributes = vars(tree) if isinstance(tree, dict) and hasattr(tree, "__dict__") else {}
    same = {name: k for name in attributes for k, part in enumerate(parts) if attributes[name] is part}
    names = [name for name, value in attributes.items() if id(value) not in known]

    def close(new: list[Any]) -> Any:
        made = copy.copy(tree)
        for key, value in zip(keys, new, strict=False):
            made[key] = value
        if names or same:
            vars(made).update(zip(names, new[len(keys) :], strict=True))
            vars(made).update({name: new[k] for name, k in same.items()})
        return made

    return Opened(parts + [attributes[name] for name in names], close)


def _opened_attributes(tree: Any, depth: int) -> Opened | None:
    """The attributes of an object, if there is a tensor somewhere in them."""
    if dataclasses.is_dataclass(tree):
        names = [f.name for f in dataclasses.fields(tree) if hasattr(tree, f.name)]
        names += [name for name in getattr(tree, "__dict__", {}) if name not in names]
    else:
        names = list(getattr(tree, "__dict__", {})) + [s for s in _slots(type(tree)) if hasattr(tree, s)]
    parts = [getattr(tree, name) if name in _slots(type(tree)) else vars(tree)[name] for name in names]
    if not any(_has_tensor(part, depth - 1) for part in parts):
        return None

    def close(new: list[Any]) -> Any:
        made = copy.copy(tree)
        for name, value in zip(names, new, strict=True):
            object.__setattr__(made, name, value)
        return made

    return Opened(parts, close)


def _slots(of: type) -> list[str]:
    return [s for base in of.__mro__ for s in _tuple(base.__dict__.get("__slots__", ())) if not s.startswith("__")]


def _tuple(names: Any) -> tuple[str, ...]:
    return (names,) if isinstance(names, str) else tuple(names)


def _has_tensor(tree: Any, depth: int) -> bool:
    if isinstance(tree, Tensor) or is_array(tree):
        return True
    found = opened(tree, depth) if depth > 0 else None
    return found is not None and any(_has_tensor(part, depth - 1) for part in found.parts)


def holds_tensors(tree: Any) -> bool:
    """Whether there is a tensor or an array in something, or it is one."""
    return _has_tensor(tree, _DEPTH)


def map_tensors(fn: Callable[[Tensor], Tensor], tree: Any) -> Any:
    """Apply ``fn`` to the tensors of a minibatch, in containers and objects of the same types."""
    if isinstance(tree, Tensor):
        return fn(tree)
    if type(tree) in (tuple, list):
        return type(tree)([map_tensors(fn, part) for part in tree])
    found = opened(tree)
    return tree if found is None else found.close([map_tensors(fn, part) for part in found.parts])


def tensors_of(tree: Any) -> list[Tensor]:
    """The tensors of a minibatch, in order."""
    if isinstance(tree, Tensor):
        return [tree]
    if type(tree) in (tuple, list) and all(isinstance(t, Tensor) for t in tree):
        return list(tree)
    found = opened(tree)
    return [] if found is None else [t for part in found.parts for t in tensors_of(part)]


def move(tree: Any, device: torch.device) -> Any:
    """The same minibatch with its tensors on a device: an object by its own ``to``, if it has one and if something has
    to move.
    """
    if isinstance(tree, Tensor):
        return tree.to(device) if not tree.is_inference() else tree.to(device).clone()  # those cannot be recorded
    if type(tree) in (tuple, list):
        return type(tree)([move(part, device) for part in tree])
    found = opened(tree)
    if found is None or all(t.device == device and not t.is_inference() for t in tensors_of(tree)):
        return tree
    if callable(getattr(tree, "to", None)):
        made = copy.copy(tree)  # some move themselves, and return nothing or themselves
        moved = made.to(device)
        return made if moved is None else moved
    return found.close([move(part, device) for part in found.parts])


def columns(tree: Any, path: Path = ()) -> Iterator[tuple[Path, int]]:
    """Where there are tensors and arrays with axes, and lists of things that are neither, and how long they are."""
    if isinstance(tree, Tensor) or is_array(tree):
        if tree.ndim > 0:
            yield path, len(tree)
        return
    found = opened(tree)
    if found is None:
        return
    if isinstance(tree, tuple | list) and not any(map(holds_tensors, tree)):
        if tree:
            yield path, len(tree)
        return
    for k, part in enumerate(found.parts):
        yield from columns(part, (*path, k))


def lengths(tree: Any) -> set[int]:
    """How many examples a minibatch may have: the lengths of its columns, and of lists that may be of examples."""
    found = {length for _, length in columns(tree)}
    return found | {len(t) for t in _lists(tree)}


def _lists(tree: Any) -> Iterator[Sequence[Any]]:
    """Tuples and lists of alike containers of tensors."""
    inside = opened(tree)
    if inside is None:
        return
    if is_list_of_alike(tree):
        yield tree
    for part in inside.parts:
        yield from _lists(part)


def is_list_of_alike(tree: Any) -> bool:
    """Whether a tuple or list holds containers of tensors which may be one example each."""
    return (
        isinstance(tree, tuple | list)
        and not isinstance(tree, PackedSequence)
        and not hasattr(type(tree), "_fields")
        and not any(isinstance(part, Tensor) or is_array(part) for part in tree)
        and any(map(holds_tensors, tree))
        and all(_alike(tree[0], part) for part in tree[1:])
    )


def is_list_of_examples(tree: Any, n: int) -> bool:
    """Whether a tuple or list inside of a minibatch has an element for each of n examples (n tensors that have n rows
    each are taken for tensors of all).
    """
    if not _may_be_of_examples(tree, n):
        return False
    return not any(map(holds_tensors, tree)) or not all(length == n for part in tree for _, length in columns(part))


def _may_be_of_examples(tree: Any, n: int) -> bool:
    of_parts = isinstance(tree, tuple | list) and not isinstance(tree, PackedSequence) and not hasattr(tree, "_fields")
    return of_parts and len(tree) == n and all(_alike(tree[0], part) for part in tree[1:])


def doubtful(tree: Any, n: int, path: Path = ()) -> Iterator[Path]:
    """What may have to be read otherwise than it looks: tensors that may be none of examples, and lists that may be of
    examples (with :data:`AS_LIST` at the end).
    """
    yield from (where for where, length in columns(tree, path) if length == n)
    yield from _doubtful_lists(tree, n, path)


def _doubtful_lists(tree: Any, n: int, path: Path) -> Iterator[Path]:
    found = opened(tree)
    if found is None:
        return
    if path and _may_be_of_examples(tree, n) and not is_list_of_examples(tree, n):
        yield (*path, AS_LIST)
    for k, part in enumerate(found.parts):
        yield from _doubtful_lists(part, n, (*path, k))


def _alike(a: Any, b: Any) -> bool:
    """Whether two things may be the same part of two examples."""
    if isinstance(a, Tensor) or is_array(a):
        return type(a) is type(b) and (a.ndim, a.dtype) == (b.ndim, b.dtype)
    if isinstance(a, Mapping) and isinstance(b, Mapping):
        return a.keys() == b.keys() and all(_alike(a[key], b[key]) for key in a)
    if isinstance(a, tuple) and isinstance(b, tuple):
        return len(a) == len(b) and all(map(_alike, a, b))
    if isinstance(a, list) and isinstance(b, list):
        return True
    return type(a) is type(b) or not (holds_tensors(a) or holds_tensors(b))


def picked(tree: Any, index: Tensor, n: int, whole: frozenset[Path], path: Path = ()) -> tuple[Any, bool]:
    """Some of n examples of a minibatch, and whether anything was taken. whole: what of :func:`doubtful` is otherwise.

    Raises ``TypeError`` for what holds examples but cannot be taken apart.
    """
    if not path and not whole and type(tree) in (tuple, list) and all(map(_is_plain, tree)):  # as nearly all
        rows = [t.ndim > 0 and len(t) == n for t in tree]
        return type(tree)([t[index.to(t.device)] if row else t for t, row in zip(tree, rows, strict=True)]), any(rows)
    if path in whole:
        return tree, False
    if isinstance(tree, Tensor):
        if tree.ndim == 0 or len(tree) != n:
            return tree, False
        if tree.is_nested:
            raise TypeError("a nested tensor cannot be taken apart by examples: pad it in the minibatch")
        return entries.picked(tree, index.to(tree.device)), True
    if is_array(tree):
        return (tree[index.cpu().numpy()], True) if tree.ndim > 0 and len(tree) == n else (tree, False)
    if isinstance(tree, PackedSequence):
        return (sequences(tree, index), True) if tree.batch_sizes[0] == n else (tree, False)
    if path and ((*path, AS_LIST) in whole or is_list_of_examples(tree, n)):
        return opened(tree).close([tree[k] for k in index.tolist()]), True  # type: ignore[union-attr]
    found = opened(tree)
    if found is None:
        return tree, False
    pairs = [picked(part, index, n, whole, (*path, k)) for k, part in enumerate(found.parts)]
    taken = any(took for _, took in pairs)
    return (found.close([part for part, _ in pairs]) if taken else tree), taken


def _is_plain(t: Any) -> bool:
    return type(t) is Tensor and t.layout == torch.strided and not t.is_nested


def joinable(one: Any, other: Any) -> bool:
    """Whether two minibatches are of tensors alone, in plain containers, which can be laid end to end."""
    if isinstance(one, Tensor):
        return (
            isinstance(other, Tensor)
            and one.ndim > 0
            and (one.shape[1:], one.dtype, one.device) == (other.shape[1:], other.dtype, other.device)
        )
    if type(one) is not type(other):
        return False
    if type(one) in (tuple, list):
        return len(one) == len(other) and all(map(joinable, one, other))
    if type(one) in (dict, UserDict):
        return one.keys() == other.keys() and all(joinable(one[key], other[key]) for key in one)
    return False


def join(several: Sequence[Any]) -> Any:
    """Minibatches laid end to end."""
    one = several[0]
    if len(several) == 1:
        return one
    if isinstance(one, Tensor):
        return torch.cat(list(several))
    if isinstance(one, Mapping):
        return opened(one).close([join([tree[key] for tree in several]) for key in one])  # type: ignore[union-attr]
    return type(one)(join(parts) for parts in zip(*several, strict=True))


def shares(one: Any, other: Any) -> bool:
    """Whether two minibatches have a tensor in common, which is then none of examples."""
    pairs: Iterable[tuple[Tensor, Tensor]] = zip(tensors_of(one), tensors_of(other), strict=False)
    return any(a is b or (a.shape == b.shape and a.ndim > 0 and entries.equal(a, b)) for a, b in pairs)
