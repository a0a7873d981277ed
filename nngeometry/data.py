"""From what the user passes as data to minibatches on the right device, counted as they pass."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

Batch = Any


def is_minibatch(examples: Any) -> bool:
    """Whether ``examples`` is one minibatch rather than a loader: a tensor, a mapping, or a tuple or list that
    starts with a tensor.
    """
    if isinstance(examples, Tensor | Mapping) or hasattr(examples, "keys"):
        return True
    if not isinstance(examples, tuple | list) or not any(isinstance(e, Tensor) for e in examples[:2]):
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
    empty = True
    for batch in progress(loader, verbose, what):
        empty = False
        yield move(batch, device)
    if empty:
        raise ValueError(
            "the loader yielded no minibatch: it is empty, or it is an iterator that was consumed before "
            "(pass a DataLoader or a list, which can be iterated again)"
        )


def progress(items: Iterable[Any], verbose: bool, what: str = "", total: int | None = None) -> Iterable[Any]:
    """The items, with a progress bar when asked."""
    if not verbose:
        return items
    try:
        from tqdm.auto import tqdm
    except ImportError as error:
        raise ImportError("verbose=True shows a progress bar with tqdm: pip install tqdm") from error
    return tqdm(items, desc=what or None, total=total)


def require_repeatable(examples: Any, why: str) -> None:
    """Raise unless ``examples`` can be iterated more than once."""
    if not is_minibatch(examples) and isinstance(examples, Iterator):
        raise ValueError(
            f"{why} reads the data more than once, but the loader is a one-pass iterator: pass a DataLoader or a list"
        )


def move(batch: Batch, device: torch.device | None) -> Batch:
    """The same minibatch with its tensors on ``device``."""
    if device is None:
        return batch
    return map_tensors(lambda t: t.to(device), batch)


def map_tensors(fn: Callable[[Tensor], Tensor], tree: Any) -> Any:
    """Apply ``fn`` to the tensors of a minibatch; mappings that torch does not know become plain dicts."""
    if isinstance(tree, Tensor):
        return fn(tree)
    if type(tree) in (tuple, list):
        return type(tree)(map_tensors(fn, t) for t in tree)
    if isinstance(tree, Mapping) or hasattr(tree, "keys"):
        return {key: map_tensors(fn, tree[key]) for key in tree.keys()}  # noqa: SIM118
    return pytree.tree_map_only(Tensor, fn, tree)


def tensors_of(batch: Batch) -> list[Tensor]:
    """The tensors of a minibatch, in order."""
    if type(batch) in (tuple, list) and all(isinstance(t, Tensor) for t in batch):
        return list(batch)
    found: list[Tensor] = []

    def note(t: Tensor) -> Tensor:
        found.append(t)
        return t

    map_tensors(note, batch)
    return found


def count(batch: Batch) -> int:
    """How many examples a minibatch has: the length of its first tensor."""
    for tensor in tensors_of(batch):
        if tensor.ndim > 0:
            return tensor.shape[0]
    raise ValueError(f"a minibatch of type {type(batch).__name__} holds no tensor with an axis of examples")


def axes(batch: Batch) -> tuple[int, ...]:
    """How many axes each tensor of a minibatch has."""
    return tuple(t.ndim for t in tensors_of(batch))


def aligned(batch: Batch) -> bool:
    """Whether all tensors of a minibatch have a row for each example, so that it can be taken apart."""
    n = count(batch)
    return all(t.ndim > 0 and len(t) == n for t in tensors_of(batch))


def take(batch: Batch, index: Tensor) -> Batch:
    """The examples ``index`` of a minibatch: every tensor as long as the batch is indexed, the rest is left alone."""
    n = count(batch)

    def one(t: Tensor) -> Tensor:
        return t[index.to(t.device)] if t.ndim > 0 and t.shape[0] == n else t

    return map_tensors(one, batch)


def joinable(one: Batch, other: Batch) -> bool:
    """Whether two minibatches are of tensors alone, which can be laid end to end."""
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
    if isinstance(one, Mapping):
        return one.keys() == other.keys() and all(joinable(one[key], other[key]) for key in one)
    return False


def join(batches: Sequence[Batch]) -> Batch:
    """Minibatches laid end to end."""
    one = batches[0]
    if len(batches) == 1:
        return one
    if isinstance(one, Tensor):
        return torch.cat(list(batches))
    if isinstance(one, Mapping):
        return {key: join([batch[key] for batch in batches]) for key in one}
    return type(one)(join(parts) for parts in zip(*batches, strict=True))


def grouped(batches: Iterable[Batch], most: Callable[[Batch], int]) -> Iterator[tuple[int, list[Batch]]]:
    """Neighbouring minibatches that can be laid end to end, each group with the position of its first.

    most: from the first minibatch to how many examples a group of several may have.
    """
    group: list[Batch] = []
    position = held = 0
    limit: int | None = None
    for batch in batches:
        n = count(batch)
        if group:
            limit = most(group[0]) if limit is None else limit
            if held + n > limit or not (aligned(batch) and joinable(group[0], batch)):
                yield position, group
                position += len(group)
                group, held = [], 0
        group.append(batch)
        held += n
    yield position, group


def split(rows: Tensor, batches: Sequence[Batch]) -> tuple[Tensor, ...]:
    """What belongs to each of some minibatches that were laid end to end."""
    return rows.split([count(batch) for batch in batches])


def targets(batch: Batch) -> tuple[Any, ...]:
    """What a loss receives of a minibatch beside the output: the elements after the first, or the whole mapping."""
    return tuple(batch[1:]) if isinstance(batch, tuple | list) else (batch,)


def arguments(batch: Batch) -> tuple[Any, ...]:
    """What ``function`` receives of a minibatch: the elements of a tuple or list, otherwise the minibatch itself."""
    return tuple(batch) if isinstance(batch, tuple | list) else (batch,)
