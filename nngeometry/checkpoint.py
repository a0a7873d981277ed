"""A file that holds how far a work has come: either the state before or the one after, never half of one."""

from __future__ import annotations

import os
import zipfile
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch

from .reading import differences

#: The version of what is written.
FORMAT = 1


def write(path: Path, identity: Mapping[str, Any], state: Mapping[str, Any]) -> None:
    """Write what a work is and how far it is, beside the file, and rename that.

    Raises:
        OSError: If that cannot be written: the file is as it was.
    """
    beside = _beside(path)
    try:
        with beside.open("wb") as file:
            torch.save({"nngeometry checkpoint": FORMAT, "identity": dict(identity), "state": dict(state)}, file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(beside, path)
    except (OSError, RuntimeError) as error:  # torch raises the latter on a full disk
        raise OSError(_unwritable(path, error)) from error
    with suppress(OSError):  # where folders cannot be opened
        folder = os.open(path.parent, os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)


def remove(path: Path) -> None:
    """Remove the file, and what was being written beside it."""
    for file in (path, _beside(path)):
        file.unlink(missing_ok=True)


def read(path: Path, identity: Mapping[str, Any]) -> dict[str, Any] | None:
    """How far the work was that a file is of; None if there is no file.

    Raises:
        ValueError: If the file is damaged, none of these, or of another work: it is left as it is.
        OSError: If it could not be written.
    """
    if path.is_dir() or not path.absolute().parent.is_dir():
        what = "is a folder" if path.is_dir() else f"is in {path.absolute().parent}, which is no folder"
        raise ValueError(f"checkpoint: {path} {what}: give the path of a file, which will be written")
    beside = _beside(path)
    try:
        there = beside.exists()
        with beside.open("ab"):  # rather now than after long work
            pass
        if not there:
            beside.unlink()
    except OSError as error:
        raise OSError(_unwritable(path, error)) from error
    if not path.exists():
        return None
    remedy = "give another path, or delete the file to begin anew"
    try:
        with zipfile.ZipFile(path) as whole:
            damaged = whole.testzip()
        saved = torch.load(path, map_location="cpu", weights_only=True) if damaged is None else None
    except Exception as error:
        raise ValueError(
            f"checkpoint: {path} ({path.stat().st_size} bytes) is cut short, damaged or not a checkpoint: {remedy}"
        ) from error
    if damaged is not None:
        raise ValueError(f"checkpoint: {path} is damaged (its entry {damaged}): {remedy}")
    if not isinstance(saved, dict) or "nngeometry checkpoint" not in saved:
        raise ValueError(f"checkpoint: {path} holds something else than a checkpoint of nngeometry: {remedy}")
    if saved["nngeometry checkpoint"] != FORMAT:
        raise ValueError(
            f"checkpoint: {path} is of format {saved['nngeometry checkpoint']!r}, this version of the library reads "
            f"{FORMAT}: {remedy}"
        )
    differ = differences(saved["identity"], dict(identity))
    if differ:
        raise ValueError(f"checkpoint: {path} is of another work, there and here: {differ}: {remedy}")
    state: dict[str, Any] = saved["state"]
    return state


def mapped(path: Path) -> dict[str, Any]:
    """The state in a file that :func:`read` has looked at, whose tensors are read from disk where they are used."""
    state: dict[str, Any] = torch.load(path, map_location="cpu", weights_only=True, mmap=True)["state"]
    return state


def _beside(path: Path) -> Path:
    return path.with_name(path.name + ".new")


def _unwritable(path: Path, error: Exception) -> str:
    return (
        f"checkpoint: {path} cannot be written ({error}); what was there before is as it was: give a path on a disk "
        "with room, in a folder that this process may write to"
    )
