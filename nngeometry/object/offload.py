"""Blocks that are decomposed one at a time and stay on disk, of which memory has what is in use."""

from __future__ import annotations

from pathlib import Path

from .. import arguments, checkpoint
from ..blocks import Block, DirectSum, Part
from ..changes import no_grad
from ..identity import checksum


def offloaded(root: Block, folder: str | Path) -> DirectSum:
    """The blocks of a matrix, decomposed, each in a file of its own that is mapped into memory."""
    arguments.path("offload: folder", folder, "of a folder, which is made if there is none")
    if root.matrix_free or not isinstance(root, DirectSum):
        raise NotImplementedError(
            "offload: a matrix that is known by its products alone, or is in one piece, has no blocks to write: use a "
            "representation by layers, such as PMatKFAC"
        )
    if root.device.type != "cpu":
        raise NotImplementedError(
            f"offload: files are mapped into the memory of the CPU, but the matrix is on {root.device}: use "
            ".to('cpu').offload(folder)"
        )
    place = Path(folder)
    place.mkdir(parents=True, exist_ok=True)
    return DirectSum(tuple(_on_disk(part, place / f"{k}.block") for k, part in enumerate(root.parts)))


def _on_disk(part: Part, path: Path) -> Part:
    """The same part, its block decomposed and in a file; decomposed already if the file is of this block."""
    identity = {"block": part.block.describe(), "values": " ".join(str(checksum([t])) for t in part.block.tensors())}
    if checkpoint.read(path, identity) is None:
        fresh = part.block.map(lambda t: t)  # what it keeps of its decomposition goes with it
        with no_grad():
            checkpoint.write(path, identity, fresh.decomposed().state())
    return part.with_block(Block.from_state(checkpoint.mapped(path)))
