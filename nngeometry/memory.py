"""The one memory knob: how many bytes an object that nobody asked for by name may take."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

_BUDGET: ContextVar[int | None] = ContextVar("nngeometry_memory_budget", default=None)
_DEFAULT = 2**30
#: By default the budget of a CUDA device is its memory divided by that.
_SHARE = 8


@dataclass(frozen=True)
class Tuning:
    """The size of the pieces in which a sort of device works fastest.

    Args:
        work_fraction: Work arrays take at most the budget divided by that.
        busy: A work array divided by that keeps the device busy, so that no more is made at once where nothing is made
            twice.
        panel_bytes: What is only read once is made in pieces of at most that many bytes, where there is a cache in
            which they stay; None where there is none.
        columns: Symmetric products are made as many columns at a time, up to the diagonal.
        large_product: The number of multiplications from which many small products are faster than one of copies.
        few_operations: Whether to start an operation takes so long that few large ones are faster than many small ones,
            also where they multiply more or copy.
    """

    work_fraction: int
    busy: int
    panel_bytes: int | None
    columns: int
    large_product: int
    few_operations: bool

    @property
    def has_cache(self) -> bool:
        """Whether what is made in pieces stays in a cache until it is read."""
        return self.panel_bytes is not None


#: Each number found by measuring the alternatives: docs/benchmarks.rst.
CPU = Tuning(work_fraction=32, busy=1, panel_bytes=2**22, columns=96, large_product=10**9, few_operations=False)
#: To start an operation takes some ten microseconds, in which billions of multiplications are made.
ACCELERATOR = Tuning(
    work_fraction=4, busy=4, panel_bytes=None, columns=2048, large_product=2 * 10**10, few_operations=True
)
_GRAINS = {"cpu": CPU}


def tuning(device: torch.device) -> Tuning:
    """How to cut work on a device into pieces."""
    return _GRAINS.get(device.type, ACCELERATOR)


@contextmanager
def memory_budget(nbytes: int) -> Iterator[None]:
    """Set the memory budget inside a ``with`` block.

    A dense object that a representation needs but the user did not ask for by name (the exact block of a layer without
    Kronecker form, a densified sum of unlike matrices, ...) must fit the budget, otherwise the operation raises.
    Temporaries are chunked to a thirty-second of it on a CPU, to a quarter of it on an accelerator, where small ones
    are slow.

    Args:
        nbytes: The budget in bytes. Outside of any block it is 1 GiB; on a CUDA device it is an eighth of its memory.

    Raises:
        TypeError: For what is not a number.
        ValueError: For a number that is not positive.

    Example:
        >>> with memory_budget(2**28):
        ...     budget(torch.device("cpu"))
        268435456
    """
    if isinstance(nbytes, bool) or not isinstance(nbytes, int | float) or nbytes != nbytes:
        raise TypeError(f"memory_budget: expected a number of bytes, e.g. 2**30, got {nbytes!r}")
    if nbytes <= 0:
        raise ValueError(f"memory_budget: expected a positive number of bytes, got {nbytes}")
    token = _BUDGET.set(int(nbytes))
    try:
        yield
    finally:
        _BUDGET.reset(token)


def budget(device: torch.device) -> int:
    """The current budget in bytes, for what is on a device."""
    chosen = _BUDGET.get()
    if chosen is not None:
        return chosen
    if device.type == "cuda":
        return _cuda_memory(torch.cuda.current_device() if device.index is None else device.index) // _SHARE
    return _DEFAULT


@cache
def _cuda_memory(index: int) -> int:
    total: int = torch.cuda.get_device_properties(index).total_memory
    return total


def work_array(device: torch.device) -> int:
    """How many bytes a temporary should have at most."""
    return budget(device) // tuning(device).work_fraction


def panel_bytes(device: torch.device) -> int:
    """How many bytes to make at a time of what is only read once."""
    panel, most = tuning(device).panel_bytes, work_array(device) // tuning(device).busy
    return most if panel is None else min(panel, most)


def chunk_length(bytes_per_item: int, items: int, device: torch.device) -> int:
    """How many things to process at once: at least one.

    Args:
        bytes_per_item: The size of each in bytes.
        items: How many there are.
        device: Where they are.
    """
    return _fitting(work_array(device), bytes_per_item, items)


def panel_length(bytes_per_item: int, items: int, device: torch.device) -> int:
    """:func:`chunk_length` of what is only read once."""
    return _fitting(panel_bytes(device), bytes_per_item, items)


def _fitting(nbytes: int, bytes_per_item: int, items: int) -> int:
    return max(1, min(items, nbytes // max(1, bytes_per_item)))


def slices(items: int, length: int) -> Iterator[slice]:
    """Cover ``0:items`` by slices of that length, the last of which may be shorter."""
    return (slice(start, min(start + length, items)) for start in range(0, items, length))


def keep_freed(device: torch.device) -> None:
    """Have the allocator of a process keep what is freed for what is made next, up to two work arrays of it.

    By default glibc gives it back to the system when a few arrays of a minibatch are freed, and the page faults of
    having it again are a third of a job on a small net. It learns, for as long as the process lives, from the largest
    array that has been freed, which this is; nothing is written to it. See M_MMAP_THRESHOLD in mallopt(3): 32 MiB is
    the most that counts.
    """
    if device.type == "cpu":
        torch.empty(max(0, min(work_array(device), 2**25) - 2**12), dtype=torch.uint8, device=device)


def nbytes_of(tensors: Iterable[Tensor]) -> int:
    """The bytes of the entries of some tensors."""
    return sum(t.numel() * t.element_size() for t in tensors)


def require(nbytes: int, what: str, remedy: str, device: torch.device) -> None:
    """Check that something would fit the budget.

    Args:
        nbytes: Its size in bytes.
        what: What it is.
        remedy: What to do instead.
        device: Where it would be.

    Raises:
        MemoryError: If it would not, with one sentence that has these.
    """
    if nbytes > budget(device):
        raise MemoryError(
            f"{what} would take {nbytes / 2**20:.0f} MiB, more than the memory budget of "
            f"{budget(device) / 2**20:.0f} MiB: {remedy}, or raise it with nngeometry.memory_budget(bytes)."
        )


class BytesMade(TorchDispatchMode):
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
