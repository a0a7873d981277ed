"""The one memory knob: how many bytes an object that nobody asked for by name may take."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

_BUDGET: ContextVar[int] = ContextVar("nngeometry_memory_budget", default=2**30)

#: Work arrays are kept to this fraction of the budget. At the default budget that is 32 MiB: on the
#: CPUs we measured, larger chunks were not faster, and smaller ones of diagonals were slower.
_WORK_FRACTION = 32


@contextmanager
def memory_budget(nbytes: int) -> Iterator[None]:
    """Set the memory budget, in bytes, inside a ``with`` block. The default is 1 GiB.

    A dense object that a representation needs but the user did not ask for by name (the exact block of
    a layer without Kronecker form, a densified sum of unlike matrices, ...) must fit the budget, otherwise
    the operation raises. Temporaries are chunked to a thirty-second of it.

    >>> with memory_budget(2**28):
    ...     budget()
    268435456
    """
    if nbytes <= 0:
        raise ValueError(f"memory_budget: expected a positive number of bytes, got {nbytes}")
    token = _BUDGET.set(int(nbytes))
    try:
        yield
    finally:
        _BUDGET.reset(token)


def budget() -> int:
    """The current budget in bytes."""
    return _BUDGET.get()


def work_array() -> int:
    """How many bytes a temporary should have at most."""
    return budget() // _WORK_FRACTION


def chunk_length(bytes_per_item: int, items: int) -> int:
    """How many of ``items`` things of ``bytes_per_item`` bytes to process at once: at least one."""
    fits = work_array() // max(1, bytes_per_item)
    return max(1, min(items, fits))


def slices(items: int, length: int) -> Iterator[slice]:
    """Cover ``0:items`` by slices of that length, the last of which may be shorter."""
    return (slice(start, min(start + length, items)) for start in range(0, items, length))


def nbytes_of(tensors: Iterable[Tensor]) -> int:
    """The bytes of the entries of some tensors."""
    return sum(t.numel() * t.element_size() for t in tensors)


def require(nbytes: int, what: str, remedy: str) -> None:
    """Raise ``MemoryError`` with one clear sentence if ``what`` would not fit the budget."""
    if nbytes > budget():
        raise MemoryError(
            f"{what} would take {nbytes / 2**20:.0f} MiB, more than the memory budget of "
            f"{budget() / 2**20:.0f} MiB: {remedy}, or raise it with nngeometry.memory_budget(bytes)."
        )


class Made(TorchDispatchMode):
    """Counts the bytes of all tensors that operations make inside of a ``with`` block, views of others not included."""

    def __init__(self) -> None:
        super().__init__()
        self.nbytes = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        values = out if isinstance(out, tuple | list) else (out,)
        made = [v for v, returned in zip(values, func._schema.returns, strict=False) if returned.alias_info is None]
        self.nbytes += nbytes_of(t for t in made if isinstance(t, Tensor))
        return out
