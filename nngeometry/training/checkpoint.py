"""Checkpoints: all that a training needs to go on, in files that are whole or not there."""

from __future__ import annotations

import os
import random
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from .. import arguments

#: The version of what is in a file.
FORMAT = 1
_NAME = re.compile(r"epoch-(\d+)\.pt")


def checkpoints(folder: str | Path) -> dict[int, Path]:
    """The checkpoints in a folder, by epoch, ascending.

    Raises:
        ValueError: If there is none.
    """
    arguments.path("checkpoints: folder", folder, "the one that was given to train(checkpoints=)")
    found = _in(Path(os.fsdecode(folder)))
    if not found:
        raise ValueError(
            f"checkpoints: there is none in {folder}: pass the folder that was given to train(checkpoints=)"
        )
    return found


def _in(folder: Path) -> dict[int, Path]:
    if not folder.is_dir():
        return {}
    named = {int(m[1]): path for path in folder.iterdir() if (m := _NAME.fullmatch(path.name))}
    return dict(sorted(named.items()))


class Weights(Mapping[int, Mapping[str, Tensor]]):
    """The weights in the checkpoints of a folder, from epoch to state dict, each read when it is asked for."""

    def __init__(self, folder: str | Path) -> None:
        self._paths = checkpoints(folder)

    def __getitem__(self, epoch: int) -> Mapping[str, Tensor]:
        if epoch not in self._paths:
            raise KeyError(f"there is no checkpoint of epoch {epoch}: there are {', '.join(map(str, self._paths))}")
        state: Mapping[str, Tensor] = load_checkpoint(self._paths[epoch])["model"]
        return state

    def __iter__(self) -> Iterator[int]:
        return iter(self._paths)

    def __len__(self) -> int:
        return len(self._paths)


def weights(folder: str | Path) -> Weights:
    """The weights in the checkpoints of a folder, from epoch to state dict, for
    :func:`~nngeometry.statistics.loss_trajectory` and the like.

    Args:
        folder: That was given to :func:`train`.

    Raises:
        ValueError: If there is no checkpoint.
    """
    return Weights(folder)


def load_checkpoint(path: str | Path, device: torch.device | str | None = "cpu") -> dict[str, Any]:
    """What :func:`train` wrote: epoch, model, optimizer, scheduler, average, random, history; tensors and plain values.

    Args:
        path: Of the file.
        device: Where its tensors go.

    Raises:
        ValueError: If it is no checkpoint, cut short, or of a newer version.
    """
    arguments.path("load_checkpoint: path", path, "of a file in the folder of checkpoints")
    try:
        state = torch.load(path, map_location=device, weights_only=True)
    except FileNotFoundError:
        raise
    except Exception as error:
        raise ValueError(f"{path} is no checkpoint, or it is damaged ({type(error).__name__})") from error
    if not isinstance(state, dict) or "format" not in state or "model" not in state:
        raise ValueError(f"{path} is no checkpoint of a training: it holds {arguments.described(state)}")
    if state["format"] > FORMAT:
        raise ValueError(f"{path} is a checkpoint of a newer version: update the package")
    return state


def save_checkpoint(folder: Path, epoch: int, state: Mapping[str, Any]) -> Path:
    """Write a checkpoint beside its place, and rename it when it is whole."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"epoch-{epoch:05d}.pt"
    beside = path.with_suffix(f".{os.getpid()}.part")
    try:
        with open(beside, "wb") as file:
            torch.save({"format": FORMAT, "epoch": epoch, **state}, file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(beside, path)
    finally:
        beside.unlink(missing_ok=True)
    return path


# Random states, as tensors and plain values


def random_states(loader: Any) -> dict[str, Any]:
    """Those of torch, numpy and Python, and of the generators of a loader."""
    kind, keys, *rest = np.random.get_state()  # noqa: NPY002 (datasets draw from the global one)
    version, numbers, gauss = random.getstate()
    state: dict[str, Any] = {
        "torch": torch.get_rng_state(),
        "numpy": [kind, torch.tensor(np.asarray(keys, dtype=np.int64)), *rest],
        "python": [version, list(numbers), gauss],
        "loader": [g.get_state() for g in _generators(loader)],
    }
    if torch.cuda.is_available():
        state["cuda"] = torch.cuda.get_rng_state_all()
    return state


def set_random_states(loader: Any, state: Mapping[str, Any]) -> None:
    """Put back what :func:`random_states` gave."""
    torch.set_rng_state(state["torch"].cpu())
    kind, keys, *rest = state["numpy"]
    np.random.set_state((kind, keys.cpu().numpy().astype(np.uint32), *rest))  # noqa: NPY002
    version, numbers, gauss = state["python"]
    random.setstate((version, tuple(numbers), gauss))
    found = _generators(loader)
    if len(found) != len(state["loader"]):
        raise ValueError(
            f"loader: the checkpoint is of one with {len(state['loader'])} generators of random numbers, this one has "
            f"{len(found)}: make the loader as it was made then, or train with resume=False"
        )
    for g, s in zip(found, state["loader"], strict=True):
        g.set_state(s.cpu())
    if "cuda" in state and torch.cuda.is_available():
        torch.cuda.set_rng_state_all([s.cpu() for s in state["cuda"]])


def _generators(loader: Any) -> list[torch.Generator]:
    """The generators that a loader and its samplers draw from, each once."""
    found: list[torch.Generator] = []
    queue, seen = [loader], set()
    while queue:
        of = queue.pop(0)
        if of is None or id(of) in seen or isinstance(of, list | tuple | dict):
            continue
        seen.add(id(of))
        generator = getattr(of, "generator", None)
        if isinstance(generator, torch.Generator) and not any(generator is g for g in found):
            found.append(generator)
        queue += [getattr(of, name, None) for name in ("batch_sampler", "sampler", "dataset")]
    return found
