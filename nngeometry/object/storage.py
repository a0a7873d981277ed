"""Where the entries of a kernel are: in memory, on disk, or nowhere."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from .. import data
from ..forms import copy_transposed
from ..memory import chunk_length, require
from .fspace import FMat, FMatDense, dense_root, root_of_products
from .kernel import Kernel, Tape
from .layouts import Layout


def in_memory(kernel: Kernel, verbose: bool = False) -> dict[str, FMatDense]:
    """Every matrix of a kernel with all entries."""
    layout = kernel.layout
    groups, r, c = layout.shape
    require(
        len(kernel.groups) * groups * r * c * kernel.left.dtype.itemsize,
        f"GramMatrix: the dense kernel {tuple(layout.seen)}",
        'use output="trace" or "diag", representation=FMatMemmap.at(path) or FMatImplicit',
        kernel.left.device,
    )
    entries = {name: layout.empty(kernel.left) for name in kernel.groups}
    tiles = kernel.tiles(lambda name, rows, cols: entries[name][layout.where(rows, cols)])
    symmetric = kernel.right is None
    for tile in data.progress(tiles, verbose, "GramMatrix", kernel.count()):
        if symmetric and tile.rows != tile.cols:
            g, rows, cols = layout.where(tile.rows, tile.cols)
            for name, value in tile.values.items():
                copy_transposed(value, entries[name][g, cols, rows])
    return {name: FMatDense(dense_root(values, layout, symmetric), layout) for name, values in entries.items()}


def _new(kernel: Kernel, name: str, rows: slice, cols: slice) -> Tensor:
    """A tile of its own."""
    return kernel.layout.of_examples(rows.stop - rows.start, cols.stop - cols.start).empty(kernel.left)


class FMatMemmap(FMat):
    """All entries, on disk: for kernels larger than memory, ``GramMatrix(..., representation=FMatMemmap.at(folder))``.

    Tiles that were written are not computed again when a program that was interrupted runs again on the same folder,
    model and data. Products read the file; solve and eig(k) are matrix-free, and what needs all
    eigenvalues (logdet, eigenvalues) raises: ``FMatDense`` has them.
    """

    @classmethod
    def at(cls, path: str | Path) -> Any:
        """The representation with its files in a folder, which is made if it is missing."""
        return partial(cls.fill, Path(path))

    @classmethod
    def fill(cls, path: Path, kernel: Kernel, verbose: bool = False) -> dict[str, FMatMemmap]:
        """Write every matrix of a kernel."""
        files = [File(path / f"{k}.npy", kernel.layout, kernel.left.dtype) for k in range(len(kernel.groups))]
        by_name = dict(zip(kernel.groups, files, strict=True))
        log = _Log(path, _fingerprint(kernel))
        for file in files:
            file.create(keep=log.resumed)
        tiles = kernel.tiles(partial(_new, kernel), log.done)
        for tile in data.progress(tiles, verbose, "GramMatrix", kernel.count()):
            where = kernel.layout.where(tile.rows, tile.cols)
            for name, value in tile.values.items():
                by_name[name].write(where, value)
                if kernel.right is None and tile.rows != tile.cols:
                    by_name[name].write((where[0], where[2], where[1]), value.mT)
            log.note(tile.rows, tile.cols)
        return {name: cls(file, kernel) for name, file in by_name.items()}

    def __init__(self, file: File, kernel: Kernel) -> None:
        metric = kernel.left.metric
        root = root_of_products(
            file.product,
            file.transposed_product,
            kernel.layout,
            torch.empty(0, dtype=file.dtype),
            symmetric=kernel.right is None,
            definite=metric is None or metric.definite,
            trace=lambda: file.diagonal().sum(),
            diagonal=file.diagonal,
        )
        super().__init__(root, kernel.layout)
        self.file = file

    def to_torch(self) -> Tensor:
        """All entries, as :class:`FMat` says, mapped from the file: changes to them are not written."""
        return self.layout.view(self.file.open())


class File:
    """Entries ``(G, r, c)`` in a file in numpy's format."""

    def __init__(self, path: Path, layout: Layout, dtype: torch.dtype) -> None:
        self.path = path
        self.shape = layout.shape
        self.dtype = dtype

    def create(self, keep: bool) -> None:
        if keep and self.path.exists():
            return
        dtype = torch.empty(0, dtype=self.dtype).numpy().dtype
        np.lib.format.open_memmap(self.path, mode="w+", dtype=dtype, shape=self.shape).flush()

    def write(self, where: tuple[slice, slice, slice], value: Tensor) -> None:
        entries = np.load(self.path, mmap_mode="r+")
        entries[where] = value.cpu().numpy()
        entries.flush()  # and unmapped at the end of this method, so that its pages do not stay resident

    def open(self) -> Tensor:
        return torch.from_numpy(np.load(self.path, mmap_mode="c"))

    def read(self, rows: slice) -> Tensor:
        return torch.from_numpy(np.load(self.path, mmap_mode="r")[:, rows].copy())

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


class _Log:
    """Which tiles are on disk, one line each, under the fingerprint of what they are of."""

    def __init__(self, path: Path, fingerprint: str) -> None:
        path.mkdir(parents=True, exist_ok=True)
        self.file = path / "tiles.json"
        lines = self.file.read_text().splitlines() if self.file.exists() else []
        self.resumed = bool(lines)
        if lines and json.loads(lines[0]) != fingerprint:
            raise ValueError(
                f"FMatMemmap: {path} holds the kernel of another model, data, output or metric: give another folder, "
                "or delete it"
            )
        if not lines:
            self.file.write_text(json.dumps(fingerprint) + "\n")
        self.tiles = {tuple(json.loads(line)) for line in lines[1:]}

    def done(self, rows: slice, cols: slice) -> bool:
        return (rows.start, rows.stop, cols.start, cols.stop) in self.tiles

    def note(self, rows: slice, cols: slice) -> None:
        with self.file.open("a") as log:
            log.write(json.dumps([rows.start, rows.stop, cols.start, cols.stop]) + "\n")


def _fingerprint(kernel: Kernel) -> str:
    """A hash of the parameters, data and layout of a kernel (functions cannot be told apart)."""
    digest = hashlib.sha256(repr((kernel.layout, list(kernel.groups), kernel.scale)).encode())

    def add(t: Tensor) -> None:
        digest.update(repr((tuple(t.shape), t.dtype)).encode())
        digest.update(t.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())

    def side(tape: Tape) -> None:
        for p in (*tape.generator.model.parameters(), *tape.generator.model.buffers()):
            add(p)
        for batch in tape.batches:
            for t in data.tensors_of(batch):
                add(t)
        for t in () if tape.metric is None else tape.metric.tensors():
            add(t)

    side(kernel.left)
    if kernel.right is not None:
        side(kernel.right)
    return digest.hexdigest()
