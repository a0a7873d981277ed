"""How the gallery runs an example: at small size, in a clean torch, with the pictures that it has written."""

from __future__ import annotations

import shutil
import tempfile
import time
from pathlib import Path
from typing import Any

import nbformat
import torch
from nbclient import NotebookClient
from sphinx_gallery.scrapers import figure_rst

#: What a notebook lacks that a program has.
FIRST_CELL = """%matplotlib inline
import sys

__file__ = "example.py"  # a notebook has none; pictures are saved in the folder "output" beside it
sys.argv = [__file__, "--small"]  # without "--small" the whole of it, in a minute or two"""
_STARTED = time.time()
_SHOWN: set[tuple[Path, int]] = set()


def arguments(gallery_conf: dict[str, Any], script_vars: dict[str, Any]) -> list[str]:
    """What an example finds in ``sys.argv``; and it may ask where it is."""
    script_vars["example_globals"]["__file__"] = Path(script_vars["src_file"]).name  # it runs in its folder
    return ["--small"]


def clean(gallery_conf: dict[str, Any], name: str) -> None:
    """Undo what the example before has set."""
    torch.set_default_dtype(torch.float32)
    torch.set_num_threads(1)
    torch.manual_seed(0)


def pictures(block: Any, block_vars: dict[str, Any], gallery_conf: dict[str, Any], **options: Any) -> str:
    """The pictures in ``examples/output`` that are new since the last look."""
    shown = []
    folder = Path(block_vars["src_file"]).parent / "output"
    for path in sorted(folder.glob("*.png"), key=lambda p: (p.stat().st_mtime_ns, p)):
        written = path.stat().st_mtime_ns
        if written / 1e9 < _STARTED or (path, written) in _SHOWN:
            continue
        _SHOWN.add((path, written))
        shown.append(next(block_vars["image_path_iterator"]))
        shutil.copy(path, shown[-1])
    alt = f"drawn by {Path(block_vars['src_file']).name}"
    return "".join(figure_rst([path], gallery_conf["src_dir"], alt) for path in shown)


def executed(notebook: Path) -> None:
    """Run a notebook of the gallery, unless it has been, and leave it with what its cells print and draw."""
    read = nbformat.read(notebook, as_version=4)
    if any(cell.get("outputs") for cell in read.cells):
        return
    with tempfile.TemporaryDirectory() as folder:
        NotebookClient(read, timeout=600, resources={"metadata": {"path": folder}}).execute()
    nbformat.write(read, notebook)
