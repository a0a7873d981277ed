"""From what the user passes as data to minibatches on the right device, counted as they pass."""

from __future__ import annotations

import inspect
import operator
import random
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import combinations
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn.utils.rnn import PackedSequence
from torch.utils.data import DataLoader, Dataset, IterableDataset, default_collate

from . import batch as parts
from .batch import Path, map_tensors, tensors_of

__all__ = ["map_tensors", "tensors_of"]

Batch = Any


@dataclass(frozen=True)
class Minibatch:
    """What a loader yielded, with what cannot be told from it alone.

    content: the minibatch as it is. n: how many examples it has. one: whether functions receive it as one argument
    rather than by its elements. whole: where there are tensors as long as it that are none of examples. listed: whether
    it is a list of examples. undivided: whether it counts as one example, and is never taken apart. statistics: what
    was found of all of its examples together, if anything, also of those that were taken out of it. position: where
    it is among those of all processes, if it is of one of several.
    """

    content: Any
    n: int
    one: bool = False
    whole: frozenset[Path] = frozenset()
    listed: bool = False
    undivided: bool = False
    statistics: parts.Opaque | None = None
    position: int | None = None


class Minibatches(list[Batch]):
    """Minibatches that have been read, as a loader: a list of tensors would be one minibatch."""


def content(batch: Batch) -> Any:
    """A minibatch as the loader yielded it."""
    return batch.content if isinstance(batch, Minibatch) else batch


def is_minibatch(examples: Any) -> bool:
    """Whether ``examples`` is one minibatch rather than a loader: a tensor, a mapping, an object with tensors that
    cannot be iterated, or a tuple or list that starts with a tensor.
    """
    if isinstance(examples, Minibatches | Dataset):
        return False
    if isinstance(examples, Tensor | Mapping | Minibatch | PackedSequence) or hasattr(examples, "keys"):
        return True
    if not isinstance(examples, tuple | list):
        return not hasattr(examples, "__iter__") and not callable(examples) and parts.holds_tensors(examples)
    if hasattr(examples, "_fields"):
        return parts.holds_tensors(examples)
    if not any(isinstance(e, Tensor) for e in examples[:2]):
        return False
    if not isinstance(examples[0], Tensor):
        raise ValueError(
            "the data are a tuple or list of tensors and other things, so it is not clear whether that is one "
            "minibatch or several: pass a list of minibatches, [batch]"
        )
    lengths = {len(e) for e in examples if isinstance(e, Tensor) and e.ndim > 0}
    if len(lengths) > 1:
        raise ValueError(
            f"a tuple or list of tensors is one minibatch, but these have {', '.join(map(str, sorted(lengths)))} "
            "examples: pass minibatches as tuples, [(x,), ...]"
        )
    return True


def minibatches(
    examples: Any, device: torch.device | None = None, verbose: bool = False, what: str = ""
) -> Iterator[Batch]:
    """The minibatches of a loader (or the one that ``examples`` is), moved to ``device``, with a progress bar when
    asked.
    """
    loader: Iterable[Batch] = [examples] if is_minibatch(examples) else examples
    require_loader(loader)
    empty = True
    for batch in progress(drawn(loader), verbose, what):
        empty = False
        yield checked(batch, device)
    if empty:
        raise ValueError(
            "the loader yielded no minibatch: it is empty, or it is an iterator that was consumed before "
            "(pass a DataLoader or a list, which can be iterated again)"
        )


def checked(batch: Batch, device: torch.device | None) -> Batch:
    """A minibatch on a device. Raises ``TypeError`` if it is none."""
    if isinstance(batch, str | bytes | int | float | type(None)):
        raise TypeError(f"loader: a minibatch is a tensor, tuple, dict or object, and this one is {batch!r:.50}")
    return move(batch, device)


def drawn(loader: Iterable[Batch]) -> Iterable[Batch]:
    """What a loader yields, without a trace in the random state: what it draws from the global generators of torch,
    numpy and Python (the order of a shuffling one, augmentations) comes after their states, which are put back.

    Minibatches are held while others are read, and a loader may write the next one into the memory of the last: tensors
    are copied, unless the loader has them already or makes each anew.
    """
    if isinstance(loader, list | tuple):
        return loader
    makes_anew = isinstance(loader, DataLoader) and loader.collate_fn is default_collate
    return _draw(loader) if makes_anew else map(_own, _draw(loader))


def _own(batch: Batch) -> Batch:
    """A minibatch with the tensors in plain containers copied."""
    if isinstance(batch, Tensor):
        return batch.detach().clone().requires_grad_(batch.requires_grad)
    if type(batch) in (tuple, list):
        return type(batch)(map(_own, batch))
    return {key: _own(part) for key, part in batch.items()} if type(batch) is dict else batch


def _draw(loader: Iterable[Batch]) -> Iterator[Batch]:
    iterator: Iterator[Batch] | None = None
    sources = [_Source(*of) for of in _SOURCES]
    end = object()
    while True:
        for source in sources:
            source.enter()
        try:
            if iterator is None:
                iterator = iter(loader)
            batch = next(iterator, end)
        finally:
            for source in sources:
                source.leave()
        if batch is end:
            return
        yield batch


class _Source:
    """A global generator of random numbers, of which a loader has a state of its own as soon as it draws from it.

    To read and to write a state costs more than a small minibatch, so none is written that did not change.
    """

    def __init__(self, get: Callable[[], Any], put: Callable[[Any], Any], same: Callable[[Any, Any], bool]) -> None:
        self.get, self.put, self.same = get, put, same
        self.own: Any = None

    def enter(self) -> None:
        self.before = self.get()
        if self.own is not None:
            self.put(self.own)

    def leave(self) -> None:
        now = self.get()
        if self.own is not None or not self.same(now, self.before):
            self.own = now
            self.put(self.before)


def _same_numbers(a: Any, b: Any) -> bool:
    return a[0] == b[0] and a[2:] == b[2:] and bool(np.array_equal(a[1], b[1]))


_SOURCES: tuple[tuple[Callable[[], Any], Callable[[Any], Any], Callable[[Any, Any], bool]], ...] = (
    (torch.get_rng_state, torch.set_rng_state, torch.equal),
    (np.random.get_state, np.random.set_state, _same_numbers),
    (random.getstate, random.setstate, operator.eq),
)


def require_loader(examples: Any, name: str = "loader") -> None:
    """Raise ``TypeError`` unless minibatches can be read from ``examples``."""
    if is_minibatch(examples):
        return
    if isinstance(examples, Dataset) and not isinstance(examples, IterableDataset):
        raise TypeError(
            f"{name}: a {type(examples).__name__} yields single examples: pass DataLoader(dataset, batch_size=...) "
            "(batch_size=None if its items are minibatches)"
        )
    if isinstance(examples, type | str | bytes) or not hasattr(examples, "__iter__"):
        what = f"the class {examples.__name__}" if isinstance(examples, type) else f"{type(examples).__name__}"
        raise TypeError(
            f"{name}: expected a DataLoader, an iterable of minibatches, or one minibatch (a tensor, tuple or dict), "
            f"got {what}"
        )


def progress(
    items: Iterable[Any], verbose: bool, what: str = "", total: int | None = None, initial: int = 0
) -> Iterable[Any]:
    """The items, with a progress bar when asked. initial: how many went before."""
    if not verbose:
        return items
    try:
        from tqdm.auto import tqdm
    except ImportError as error:
        raise ImportError("verbose=True shows a progress bar with tqdm: pip install tqdm") from error
    return tqdm(items, desc=what or None, total=total, initial=initial)


def require_repeatable(examples: Any, why: str) -> None:
    """Raise unless ``examples`` can be iterated more than once."""
    if not is_minibatch(examples) and isinstance(examples, Iterator):
        raise ValueError(
            f"{why} reads the data more than once, but the loader is a one-pass iterator: pass a DataLoader or a list"
        )


def move(batch: Batch, device: torch.device | None) -> Batch:
    """The same minibatch with its tensors on ``device``, by its own ``to`` if it is an object that has one."""
    return batch if device is None else parts.move(batch, device)


# Counting


def _even(batch: Batch) -> bool:
    """Whether a minibatch is a tensor, or tensors in a plain container, all as long."""
    if isinstance(batch, Tensor):
        return batch.ndim > 0
    if type(batch) in (tuple, list):
        tensors = batch
    elif type(batch) is dict:
        tensors = batch.values()
    else:
        return False
    return all(isinstance(t, Tensor) and t.ndim > 0 for t in tensors) and len(set(map(len, tensors))) == 1


def count(batch: Batch) -> int:
    """How many examples a minibatch has: what :func:`read` found, or the length of its first tensor."""
    if isinstance(batch, Minibatch):
        return batch.n
    for tensor in tensors_of(batch):
        if tensor.ndim > 0:
            return tensor.shape[0]
    for _, length in parts.columns(batch):
        return length
    raise ValueError(f"a minibatch of type {type(batch).__name__} holds no tensor with an axis of examples")


def axes(batch: Batch) -> tuple[int, ...]:
    """How many axes each tensor of a minibatch has."""
    return tuple(t.ndim for t in tensors_of(batch))


def aligned(batch: Batch) -> bool:
    """Whether all tensors of a minibatch have a row for each example, so that it can be taken apart."""
    n = count(batch)
    if isinstance(batch, Minibatch) and (batch.whole or batch.listed or batch.undivided):
        return False
    return all(t.ndim > 0 and len(t) == n for t in tensors_of(batch))


class Reader:
    """How the minibatches for one function are read: how many examples they have, and how the function receives them.

    function: ``function(*elements)`` of a tuple or list, and ``function(minibatch)`` of everything else. Of a named
    tuple or a list of examples, ``function(minibatch)`` too if by its signature it takes one argument and not the
    elements. output: what the function returns for a minibatch, which is asked where tensors of different lengths leave
    open how many examples there are. hold: makes a minibatch one that remembers what is found of all of its examples.
    """

    def __init__(
        self,
        function: Callable[..., Any] | None,
        output: Callable[[Batch], Any],
        hold: Callable[[Minibatch], Minibatch] | None = None,
    ) -> None:
        self.function = function
        self.output = output
        self.hold = hold
        self._one: dict[tuple[type, int], bool] = {}
        self._where: frozenset[Path] = frozenset()
        self._listed: bool | None = None

    def __call__(self, batch: Batch) -> Batch:
        """The minibatch as it is, or a :class:`Minibatch` where that does not tell all."""
        found = self._found(batch)
        return found if self.hold is None else self.hold(known(found))

    def undivided(self, batch: Batch) -> Minibatch:
        """The minibatch as one example."""
        given = content(batch)
        one = self.function is not None and isinstance(given, tuple | list) and self._as_one(given)
        found = Minibatch(given, 1, one, undivided=True)
        return found if self.hold is None else self.hold(found)

    def _found(self, batch: Batch) -> Batch:
        if self.function is None or isinstance(batch, Minibatch):
            return batch
        one = isinstance(batch, tuple | list) and self._as_one(batch)
        if _even(batch) and not one:
            return batch
        found = Minibatch(batch, 0, one)
        found = found if self.hold is None else self.hold(found)
        if parts.is_list_of_alike(batch):
            listed = replace(found, n=len(batch), listed=True)
            if self._listed is None:
                self._listed = self._is_right(listed)
            if self._listed:
                return listed
        found = replace(found, n=self._count(found))
        return found if one or self.hold is not None or found.n != _of_the_front(batch) else batch

    def _is_right(self, batch: Minibatch) -> bool:
        f = self.output(batch)
        return isinstance(f, Tensor) and f.ndim > 0 and len(f) == batch.n and _problem(batch, f, self.output) is None

    def _as_one(self, batch: Sequence[Any]) -> bool:
        """Whether the function receives a tuple or list as one argument. Raises ``TypeError`` if it takes neither."""
        key = type(batch), len(batch)
        if key not in self._one:
            named = hasattr(type(batch), "_fields") or not any(isinstance(t, Tensor) for t in batch)
            elements, whole = (accepts(self.function, k) for k in (len(batch), 1))
            if not elements and not (named and whole):
                raise TypeError(
                    f"function: it receives the elements of a minibatch, {len(batch)} here, and cannot be called with "
                    "so many arguments: write e.g. function=lambda *batch: model(batch[0])"
                )
            of_examples = parts.is_list_of_alike(batch)
            before = of_examples and any(one for (of, _), one in self._one.items() if of is list)
            self._one[key] = not elements or before  # one example, in a list as those before
        return self._one[key] and not isinstance(batch, PackedSequence)

    def _count(self, batch: Minibatch) -> int:
        possible = parts.lengths(batch.content)
        if len(possible) > 1 and self._where:
            possible = {length for path, length in parts.columns(batch.content) if path in self._where} or possible
        if len(possible) == 1:
            return possible.pop()
        f = self.output(batch)
        n = len(f) if isinstance(f, Tensor) and f.ndim > 0 else count(batch.content)
        self._where = frozenset(path for path, length in parts.columns(batch.content) if length == n)
        return n


def _of_the_front(batch: Batch) -> int | None:
    """The length of the first thing in a plain container, if it is a tensor."""
    first = next(iter(batch.values() if type(batch) is dict else batch), None) if type(batch) in _PLAIN else None
    return len(first) if isinstance(first, Tensor) and first.ndim > 0 else None


_PLAIN = (tuple, list, dict)


def accepts(function: Any, k: int) -> bool:
    """Whether a function can be called with k positional arguments, as far as it tells."""
    try:
        signature = inspect.signature(function.forward if isinstance(function, torch.nn.Module) else function)
    except (TypeError, ValueError):
        return True
    try:
        signature.bind(*range(k))
    except TypeError:
        return False
    return True


# Taking apart and laying together


def take(batch: Batch, index: Tensor) -> Batch:
    """The examples ``index`` of a minibatch: every tensor, array and list as long as the minibatch is indexed, on a
    copy of the same type; the rest is left alone.

    Raises ``TypeError`` or ``ValueError`` for what cannot be taken apart.
    """
    n = count(batch)
    if isinstance(batch, Minibatch) and batch.undivided:
        return batch
    if isinstance(batch, Minibatch) and batch.listed:
        return replace(batch, content=type(batch.content)(batch.content[k] for k in index.tolist()), n=len(index))
    made, taken = parts.picked(content(batch), index, n, whole(batch))
    if not taken and index.tolist() != list(range(n)):
        raise ValueError(
            f"nothing in a minibatch of {n} examples has a row for each of them, so it cannot be taken apart (graphs, "
            'sets): pass unit="minibatch", by which it counts as one example, or use Hessian, which needs no single '
            "examples, or minibatches of one example and PMatImplicit"
        )
    return replace(batch, content=made, n=len(index)) if isinstance(batch, Minibatch) else made


def whole(batch: Batch) -> frozenset[Path]:
    """Where in a minibatch there are tensors as long as it that are none of examples, as far as it was found."""
    return batch.whole if isinstance(batch, Minibatch) else frozenset()


def reread(batch: Batch, whole: frozenset[Path]) -> Minibatch:
    """A minibatch with what was found of another one like it."""
    return replace(known(batch), whole=whole)


def known(batch: Batch) -> Minibatch:
    """A minibatch as one of which everything is known that can be told from it."""
    return batch if isinstance(batch, Minibatch) else Minibatch(batch, count(batch))


def settled(batch: Batch, output: Callable[[Batch], Any]) -> Minibatch | None:
    """The minibatch with those tensors found that are as long as it and none of examples (class weights, an adjacency):
    the fewest without which two and three examples taken out have the outputs that they have among all. None if it
    can be taken apart as it is, or if an example has other outputs without the others.

    output: from a minibatch to what the model returns for it. Raises ``ValueError`` if it cannot be taken apart, or if
    it is not clear how.
    """
    f = output(batch)
    if not isinstance(f, Tensor) or f.ndim == 0:
        return None
    if len(f) != count(batch) and aligned(batch):
        return None
    bare = replace(known(batch), n=len(f), whole=frozenset())
    where = list(parts.doubtful(bare.content, bare.n))
    take(bare, torch.tensor([0, 0]))  # or an error
    first = _problem(bare, f, output)
    if first is None:
        return None
    for size in range(1, len(where) if len(where) <= _MOST_COLUMNS else 2):
        tried = (replace(bare, whole=frozenset(whole)) for whole in combinations(where, size))
        found = [one for one in tried if _problem(one, f, output) is None]
        lists = len(found) == 1 and all(path[-1:] == (parts.AS_LIST,) for path in found[0].whole)
        if len(found) == 1 and (lists or not isinstance(first, _Differs)):
            return found[0]
        if found:
            raise ValueError(
                f"a minibatch of {bare.n} examples holds a tensor of that length which may be none of examples (class "
                "weights, an adjacency, a table), and it cannot be told: put it into function= by a closure"
            )
    if isinstance(first, _Differs):
        return None
    those, two = f"the {bare.n} examples", "two of them"
    use = 'unit="minibatch", or Hessian, or minibatches of one and PMatImplicit'
    if bare.n == 1:
        those, two, use = "the one example", "two copies of it", "PMatImplicit"
    raise ValueError(
        f"the model runs on {those} of a minibatch, but not on {two} ({type(first).__name__}: {first}): put what is "
        "not of examples (edges, class weights, a table) into function= by a closure; if rows depend on each other "
        f"(nodes of a graph) or cannot be taken apart (a batch of graphs), use {use}"
    ) from first


#: Of so many tensors as long as a minibatch, any may be none of examples; of more, only one.
_MOST_COLUMNS = 6


class _Differs(Exception):
    """Examples taken out have other outputs."""


def _problem(batch: Minibatch, f: Tensor, output: Callable[[Batch], Any]) -> Exception | None:
    """What is wrong with a minibatch taken apart: None if some of its examples have the same outputs as all."""
    problem = _problem_of(([1, 0], [0, 1, 2]), batch, f, output)
    if isinstance(problem, RuntimeError) and len(f) > 1:  # sequences may have to be in their order
        return None if _problem_of(([0, 1], [0, 0, 1]), batch, f, output) is None else problem
    return problem


def _problem_of(
    some: Sequence[Sequence[int]], batch: Minibatch, f: Tensor, output: Callable[[Batch], Any]
) -> Exception | None:
    tolerance = {torch.float64: 1e-8, torch.float32: 1e-3}.get(f.dtype, 0.1)
    for index in some:
        rows = torch.tensor([k % len(f) for k in index], device=f.device)
        try:
            g = output(take(batch, rows))
        except Exception as error:
            return error
        if not isinstance(g, Tensor) or g.shape != (len(rows), *f.shape[1:]):
            what = f"of shape {tuple(g.shape)}" if isinstance(g, Tensor) else f"a {type(g).__name__}"
            return ValueError(f"for {len(rows)} examples, the output is {what}")
        if not bool((g - f[rows]).abs().max() <= tolerance * f.abs().max()):
            return _Differs()
    return None


def grouped(
    batches: Iterable[Batch], most: Callable[[Batch], int], alike: Callable[[Batch], bool]
) -> Iterator[tuple[int, list[Batch]]]:
    """Neighbouring minibatches that can be laid end to end, each group with the position of its first.

    most: from the first minibatch to how many examples a group of several may have. None are laid together if the
    first two have a tensor in common, which is none of examples. alike: from a minibatch to whether a model computes
    the same for one of its examples alone; if not, minibatches of one are for themselves.
    """
    group: list[Batch] = []
    position = held = 0
    limit: int | None = None
    of_one: bool | None = None
    for batch in batches:
        n = count(batch)
        if group:
            if limit is None:
                limit = 0 if parts.shares(group[0], batch) else most(group[0])
            fits = held + n <= limit and aligned(batch) and parts.joinable(content(group[0]), content(batch))
            if fits and n == 1:
                of_one = alike(group[0]) if of_one is None else of_one
                fits = of_one
            if not fits:
                yield position, group
                position += len(group)
                group, held = [], 0
        if not group and isinstance(batch, Minibatch) and batch.position is not None:
            position = batch.position
        group.append(batch)
        held += n
    if group:
        yield position, group


def placed(batch: Batch, position: int) -> Minibatch:
    """A minibatch with its position among those of all processes."""
    return replace(known(batch), position=position)


def position_of(batch: Batch, otherwise: int) -> int:
    """The position of a minibatch among those of all processes, if it has one."""
    known = batch.position if isinstance(batch, Minibatch) else None
    return otherwise if known is None else known


def offsets(batches: Sequence[Batch]) -> Sequence[int]:
    """How far the positions of minibatches of one group are behind that of the first."""
    first = position_of(batches[0], -1)
    return range(len(batches)) if first < 0 else [position_of(batch, first) - first for batch in batches]


def join(batches: Sequence[Batch]) -> Batch:
    """Minibatches laid end to end."""
    one = batches[0]
    if len(batches) == 1 or not isinstance(one, Minibatch):
        return parts.join(batches)
    return replace(one, content=parts.join([batch.content for batch in batches]), n=sum(map(count, batches)))


def split(rows: Tensor, batches: Sequence[Batch]) -> tuple[Tensor, ...]:
    """What belongs to each of some minibatches that were laid end to end."""
    return rows.split([count(batch) for batch in batches])


def targets(batch: Batch) -> tuple[Any, ...]:
    """What a loss receives of a minibatch beside the output: the elements after the first where ``function`` receives
    its elements, otherwise the minibatch itself; all elements of a list of examples.
    """
    if isinstance(batch, Minibatch) and batch.listed:
        return arguments(batch)
    return arguments(batch)[1:] if _by_elements(batch) else (content(batch),)


def arguments(batch: Batch) -> tuple[Any, ...]:
    """What ``function`` receives of a minibatch: the elements of a tuple or list, otherwise the minibatch itself (see
    :class:`Reader` for named tuples and lists of examples).
    """
    return tuple(content(batch)) if _by_elements(batch) else (content(batch),)


def _by_elements(batch: Batch) -> bool:
    if isinstance(batch, Minibatch):
        return not batch.one and _by_elements(batch.content)
    return isinstance(batch, tuple | list) and not isinstance(batch, PackedSequence)
