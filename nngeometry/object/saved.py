"""Files of matrices: that a file is one, whole and as it was written."""

from __future__ import annotations

import zipfile
from math import prod
from pathlib import Path
from typing import Any

import torch

from ..blocks import Block, DirectSum
from ..layercollection import LayerCollection

#: The version of what is written.
FORMAT = 1


def read(path: str | Path, device: torch.device | str | None) -> dict[str, Any]:
    """What ``PMat.save`` wrote, checked to be that."""
    with open(path, "rb"):
        pass  # or the error of a missing file, a folder or a lack of permission, which names the path
    try:
        saved = torch.load(path, map_location=device, weights_only=True)
    except Exception as error:
        if zipfile.is_zipfile(path):
            _readable(path, error)
            raise  # it was the device
        raise ValueError(
            f"PMat.load: {path} is not a file that PMat.save wrote, or is cut short ({_size(path)})"
        ) from error
    if not isinstance(saved, dict) or "format" not in saved or "root" not in saved:
        held = f"an object of type {type(saved).__name__}"
        if isinstance(saved, dict):
            held += f" with {', '.join(map(repr, list(saved)[:5]))}{', ...' if len(saved) > 5 else ''}"
        raise ValueError(f"PMat.load: {path} holds {held}, not a matrix that PMat.save wrote")
    if saved["format"] != FORMAT:
        raise ValueError(
            f"PMat.load: {path} is of format {saved['format']!r}, this version of the library reads format {FORMAT}: "
            "use the version that wrote it"
        )
    return saved


def _readable(path: str | Path, cause: Exception) -> None:
    """Raise ``ValueError`` unless the file can be read at all, onto the CPU."""
    try:
        torch.load(path, map_location="cpu", weights_only=True)
    except Exception:
        raise ValueError(
            f"PMat.load: {path} ({_size(path)}) cannot be read: it holds other things than tensors and plain values, "
            "or is damaged"
        ) from cause


def _size(path: str | Path) -> str:
    return f"{Path(path).stat().st_size} bytes"


def check_whole(root: Block, layer_collection: LayerCollection) -> None:
    """Raise ``ValueError`` unless the blocks cover the parameters once, fit them and are of one dtype."""
    p = layer_collection.numel()
    for layer in layer_collection.layers.values():
        if prod(layer.packing.shape) != layer.numel():
            raise ValueError(f"layer {layer.name!r} is packed as {layer.packing.shape}, of {layer.numel()} parameters")
    covered = torch.zeros(p, dtype=torch.int64)
    for part in root.parts if isinstance(root, DirectSum) else ():
        for a, b in part.slices:
            if not 0 <= a < b <= p:
                raise ValueError(f"a block is of the coordinates {a}:{b} of {p}")
            covered[a:b] += 1
        if sum(b - a for a, b in part.slices) != part.block.numel or prod(part.packing.shape) != part.block.numel:
            raise ValueError(f"a block of shape {part.block.shape} for the coordinates {part.slices}")
    if isinstance(root, DirectSum) and not bool((covered == 1).all()):
        raise ValueError("its blocks do not cover the parameters once")
    if len({(t.dtype, t.device) for t in root.tensors() if t.is_floating_point()}) != 1:
        raise ValueError("its tensors are of more than one dtype or device")
    if root.mv(torch.zeros(1, p, dtype=root.dtype, device=root.device)).shape != (1, p):
        raise ValueError("its tensors do not fit together")
