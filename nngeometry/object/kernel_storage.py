"""Where the entries of a kernel are: in memory, on disk, or nowhere."""

from __future__ import annotations

import errno
import json
import os
import shutil
from collections.abc import Iterable, Sequence
from contextlib import suppress
from functools import partial
from math import prod
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from .. import arguments
from ..forms import copy_transposed
from ..memory import chunk_length, require
from ..model import data
from ..reading import ALONE
from ..team import Team
from .fingerprint import differences, fingerprint, is_fingerprint
from .fspace import FMat, FMatDense, dense_root, root_of_products
from .kernel import Kernel
from .kernel_layouts import Layout


def in_memory(kernel: Kernel, verbose: bool = False, team: Team = ALONE) -> dict[str, FMatDense]:
    """Every matrix of a kernel with all entries. team: who shares its tiles out, and has all of them in the end."""
    layout = kernel.layout
    groups, r, c = layout.shape
    require(
        len(kernel.groups) * groups * r * c * kernel.left.dtype.itemsize,
        f"GramMatrix: the dense kernel {tuple(layout.seen)}",
        'use output="trace" or "diag", representation=FMatMemmap.at(path) or FMatImplicit',
        kernel.left.device,
    )
    entries = {name: layout.empty(kernel.left) for name in kernel.groups}
    if team.size > 1:
        for values in entries.values():
            values.zero_()
    others = kernel.of_others(team, lambda b, e: False)
    tiles = kernel.tiles(lambda name, rows, cols: entries[name][layout.where(rows, cols)], others)
    symmetric = kernel.right is None

    def make() -> None:
        for tile in data.progress(tiles, verbose, "GramMatrix", -(-kernel.count() // team.size)):
            if symmetric and tile.rows != tile.cols:
                g, rows, cols = layout.where(tile.rows, tile.cols)
                for name, value in tile.values.items():
                    copy_transposed(value, entries[name][g, cols, rows])

    team.attempt(make)
    for values in entries.values():
        team.add(values)
    return {name: FMatDense(dense_root(values, layout, symmetric), layout) for name, values in entries.items()}


def _new(kernel: Kernel, name: str, rows: slice, cols: slice) -> Tensor:
    """A tile of its own."""
    return kernel.layout.of_examples(rows.stop - rows.start, cols.stop - cols.start).empty(kernel.left)


class FMatMemmap(FMat):
    """All entries, on disk: for kernels larger than memory, ``GramMatrix(..., representation=FMatMemmap.at(folder))``.

    Tiles that were written are not computed again when a program that was interrupted runs again on the same folder,
    with the same layers, model, function, data and metric, which is looked at: tensors, and what the model returns.

    Products read the file; solve and eig(k) are matrix-free, and what needs all eigenvalues (logdet, eigenvalues)
    raises: ``FMatDense`` has them.

    Args:
        file: The entries.
        layout: How rows and columns are laid out.
        symmetric: Whether both sides are the same.
        definite: Whether no eigenvalue is negative.

    Raises:
        ValueError: If the folder holds another kernel, foreign or damaged files.
        OSError: Before anything is computed, if the disk has no room for the entries.
    """

    @classmethod
    def at(cls, path: str | Path) -> Any:
        """The representation with its files in a folder.

        Args:
            path: The folder, which is made if it is missing.

        Returns:
            What ``GramMatrix`` takes as ``representation``.
        """
        arguments.path("FMatMemmap.at: path", path, "the folder of the kernel's files")
        return partial(cls.fill, Path(path))

    @classmethod
    def fill(cls, path: Path, kernel: Kernel, verbose: bool = False, team: Team = ALONE) -> dict[str, FMatMemmap]:
        """Write every matrix of a kernel.

        Args:
            path: The folder.
            kernel: The kernel.
            verbose: Whether to show a progress bar; by default not.
            team: Who shares its tiles out, by default this process alone.

        Returns:
            The matrices, by name.
        """
        files = [File(path / f"{k}.npy", kernel.layout.shape, kernel.left.dtype) for k in range(len(kernel.groups))]
        by_name = dict(zip(kernel.groups, files, strict=True))

        def begun() -> tuple[Any, set[tuple[int, ...]]] | None:
            if team.rank > 0:
                return None
            log = _Log(path, kernel)
            _allocate(files, log)
            return log.mark, log.tiles

        known = team.attempt(begun, lambda found: found)[1][0]
        assert known is not None
        log = _Noted(path, team.rank, *known)
        tiles = kernel.tiles(partial(_new, kernel), kernel.of_others(team, log.done))

        def write() -> None:
            for tile in data.progress(tiles, verbose, "GramMatrix", -(-kernel.count() // team.size)):
                where = kernel.layout.where(tile.rows, tile.cols)
                for name, value in tile.values.items():
                    by_name[name].write(where, value)
                    if kernel.right is None and tile.rows != tile.cols:
                        by_name[name].write((where[0], where[2], where[1]), value.mT)
                log.note(tile.rows, tile.cols)

        team.attempt(write)
        metric = kernel.left.metric
        definite = metric is None or metric.definite
        return {name: cls(file, kernel.layout, kernel.right is None, definite) for name, file in by_name.items()}

    def __init__(self, file: File, layout: Layout, symmetric: bool, definite: bool) -> None:
        root = root_of_products(
            file.product,
            file.transposed_product,
            layout,
            torch.empty(0, dtype=file.dtype),
            symmetric=symmetric,
            definite=definite,
            trace=lambda: file.diagonal().sum(),
            diagonal=file.diagonal,
        )
        super().__init__(root, layout)
        self.file = file
        self._of = file, layout, symmetric, definite

    def to_torch(self) -> Tensor:
        """All entries, as :class:`FMat` says, mapped from the file: changes to them are not written."""
        return self.layout.view(self.file.open())

    def __reduce__(self) -> Any:
        return type(self), self._of  # the entries stay where they are


class File:
    """Entries ``(G, r, c)`` in a file in numpy's format."""

    def __init__(self, path: Path, shape: tuple[int, int, int], dtype: torch.dtype) -> None:
        self.path = path
        self.shape = shape
        self.dtype = dtype

    @property
    def nbytes(self) -> int:
        """Of the entries."""
        return prod(self.shape) * self.dtype.itemsize

    def create(self) -> None:
        """A new file of zeros that has all of its room on the disk. (Of a sparse file, a write into mapped memory ends
        the program when the disk is full.)
        """
        entries = {
            "descr": np.lib.format.dtype_to_descr(torch.empty(0, dtype=self.dtype).numpy().dtype),
            "fortran_order": False,
            "shape": self.shape,
        }
        with self.path.open("wb") as file:
            np.lib.format.write_array_header_1_0(file, entries)
            file.flush()
            reserve(file.fileno(), file.tell(), self.nbytes)

    def reserve(self) -> None:
        """Room on the disk for what there is, which a copy of the file may lack."""
        with self.path.open("r+b") as file:
            end = file.seek(0, os.SEEK_END)
            reserve(file.fileno(), end - self.nbytes, self.nbytes)

    def write(self, where: tuple[slice, slice, slice], value: Tensor) -> None:
        entries = self.mapped("r+")
        entries[where] = value.cpu().numpy()
        entries.flush()  # and unmapped at the end of this method, so that its pages do not stay resident

    def open(self) -> Tensor:
        return torch.from_numpy(self.mapped("c"))

    def read(self, rows: slice) -> Tensor:
        return torch.from_numpy(self.mapped("r")[:, rows].copy())

    def mapped(self, mode: Any) -> Any:
        """The entries as an array in mapped memory; ``ValueError`` if the file does not hold them."""
        wanted = torch.empty(0, dtype=self.dtype).numpy().dtype
        try:
            entries = np.load(self.path, mmap_mode=mode)
            problem = "" if (entries.shape, entries.dtype) == (self.shape, wanted) else "holds another array"
        except FileNotFoundError:
            problem = "is missing"
        except (ValueError, EOFError, OSError) as error:
            problem = f"is cut short, or no array of numpy's ({error})"
        if problem:
            raise ValueError(
                f"FMatMemmap: {self.path} {problem}, but {self.path.parent / 'tiles.json'} says that entries of shape "
                f"{self.shape} were written to it: delete the folder and build the kernel again"
            )
        return entries

    def product(self, V: Tensor) -> Tensor:
        """``(k, G c) -> (k, G r)``."""
        groups, _, c = self.shape
        columns = V.view(len(V), groups, c).permute(1, 2, 0)
        out = [torch.bmm(self.read(rows).to(V.device), columns) for rows in self._rows()]
        return torch.cat(out, 1).permute(2, 0, 1).reshape(len(V), -1)

    def transposed_product(self, V: Tensor) -> Tensor:
        """``(k, G r) -> (k, G c)``."""
        groups, r, _ = self.shape
        columns = V.view(len(V), groups, r).permute(1, 2, 0)
        out = sum(torch.bmm(self.read(rows).to(V.device).mT, columns[:, rows]) for rows in self._rows())
        return out.permute(2, 0, 1).reshape(len(V), -1)  # type: ignore[union-attr]

    def diagonal(self) -> Tensor:
        pieces = [self.read(rows)[:, :, rows].diagonal(dim1=1, dim2=2) for rows in self._rows()]
        return torch.cat(pieces, 1).flatten()

    def _rows(self) -> Iterable[slice]:
        groups, r, c = self.shape
        step = chunk_length(groups * c * self.dtype.itemsize, r, torch.device("cpu"))
        return [slice(a, min(a + step, r)) for a in range(0, r, step)]


def reserve(descriptor: int, start: int, length: int) -> None:
    """Have a file hold so many bytes from ``start`` on, those that are new being zero, or raise ``OSError``."""
    if hasattr(os, "posix_fallocate"):
        try:
            os.posix_fallocate(descriptor, start, max(length, 1))
            return
        except OSError as error:
            if error.errno not in (errno.EOPNOTSUPP, errno.EINVAL, errno.ENOSYS):
                raise
    end = os.fstat(descriptor).st_size
    for at in range(max(start, end), start + length, _ZEROS):
        os.pwrite(descriptor, bytes(min(_ZEROS, start + length - at)), at)
    os.fsync(descriptor)


#: Bytes of zeros that are written at a time where the system cannot reserve room.
_ZEROS = 2**20


def _allocate(files: Sequence[File], log: _Log) -> None:
    """All files of a kernel, those that hold tiles as they are."""
    for file in files:
        if log.tiles:
            file.mapped("r")
        elif not log.resumed and file.path.exists():
            raise ValueError(
                f"FMatMemmap: there is a file {file.path} that no kernel was written to: give another folder, or "
                "delete it"
            )
    log.begin()
    folder, made = files[0].path.parent, []
    new = [file for file in files if not log.tiles]
    for file in new:
        file.path.unlink(missing_ok=True)
    try:
        need, free = sum(file.nbytes for file in new), shutil.disk_usage(folder).free
        if need > free:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        for file in files:
            made += [file] if file in new else []
            file.create() if file in new else file.reserve()
    except OSError as error:
        for file in made:
            with suppress(OSError):
                file.path.unlink(missing_ok=True)
        total, free = sum(file.nbytes for file in files), shutil.disk_usage(folder).free
        raise OSError(
            error.errno,
            f"FMatMemmap: the kernel takes {total} bytes in {folder}, where {free} are free ({error.strerror}): give a "
            'folder on a larger disk, or use output="trace" or "diag"',
        ) from error


class _Log:
    """Which tiles are on disk, one line each, under the fingerprint of what they are of."""

    def __init__(self, path: Path, kernel: Kernel) -> None:
        if path.exists() and not path.is_dir():
            raise ValueError(f"FMatMemmap: {path} is a file, not a folder: give another path")
        path.mkdir(parents=True, exist_ok=True)
        self.file = path / "tiles.json"
        written = self.file.read_text(errors="replace") if self.file.exists() else ""
        complete = written[: written.rfind("\n") + 1]  # a line that was cut short is of a tile that is made again
        lines = complete.splitlines()
        self.resumed = bool(lines)
        if written and not lines:
            raise ValueError(f"FMatMemmap: {self.file} is damaged or foreign: give another folder, or delete it")
        self.mark = fingerprint(kernel)
        if lines:
            before = _parsed(self.file, lines[0])
            other = differences(before, self.mark)
            if other and (len(lines) > 1 or not is_fingerprint(before)):  # otherwise nothing is lost
                raise ValueError(
                    f"FMatMemmap: {path} holds the kernel of another model, data, output or metric (different: "
                    f"{', '.join(other)}): give another folder, or delete it"
                )
            if written != complete:
                os.truncate(self.file, len(complete.encode()))
        self.tiles = {_place(self.file, line, kernel.layout) for line in lines[1:]}
        for file in sorted(path.glob("tiles.*.json")) if lines else []:  # of other processes
            their_lines = file.read_text(errors="replace").split("\n")[:-1]
            if their_lines and not differences(_parsed(file, their_lines[0]), self.mark):
                self.tiles |= {_place(file, line, kernel.layout) for line in their_lines[1:]}

    def begin(self) -> None:
        """Say what the tiles will be of."""
        if not self.tiles:
            self.file.write_text(json.dumps(self.mark) + "\n")


class _Noted:
    """The log of one process, which notes its tiles. mark: what they are of. tiles: those that were on disk before."""

    def __init__(self, path: Path, rank: int, mark: Any, tiles: set[tuple[int, ...]]) -> None:
        self.file = path / (f"tiles.{rank}.json" if rank else "tiles.json")
        self.tiles = tiles
        if rank and not (tiles and self.file.exists() and self.file.read_text(errors="replace").endswith("\n")):
            self.file.write_text(json.dumps(mark) + "\n")

    def done(self, rows: slice, cols: slice) -> bool:
        return (rows.start, rows.stop, cols.start, cols.stop) in self.tiles

    def note(self, rows: slice, cols: slice) -> None:
        with self.file.open("a") as log:
            log.write(json.dumps([rows.start, rows.stop, cols.start, cols.stop]) + "\n")


def _parsed(file: Path, line: str) -> Any:
    try:
        return json.loads(line)
    except ValueError as error:
        raise ValueError(f"FMatMemmap: {file} is damaged or foreign: give another folder, or delete it") from error


def _place(file: Path, line: str, layout: Layout) -> tuple[int, ...]:
    """The examples of a tile."""
    found = _parsed(file, line)
    n, m = layout.examples
    if isinstance(found, list) and len(found) == 4 and all(isinstance(x, int) for x in found):
        a, b, c, d = found
        if 0 <= a < b <= n and 0 <= c < d <= m:
            return a, b, c, d
    raise ValueError(f"FMatMemmap: {file} is damaged or foreign: give another folder, or delete it")
