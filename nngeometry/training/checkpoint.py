"""Checkpoints: all that a training needs to go on, in files that are whole or not there."""

from __future__ import annotations

import os
import random
import re
import zipfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from .. import arguments

#: The version of what is in a file.
FORMAT = 1
#: What each has.
_PARTS = {"epoch", "model", "optimizer", "scheduler", "average", "random", "history"}
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
    remedy = "move it away, and train(checkpoints=) goes on from the one before"
    try:
        with zipfile.ZipFile(path) as whole:
            damaged = whole.testzip()  # torch does not compare checksums
        state = torch.load(path, map_location=device, weights_only=True) if damaged is None else None
    except FileNotFoundError:
        raise
    except Exception as error:
        raise ValueError(f"{path} is no checkpoint, or it is damaged ({type(error).__name__}): {remedy}") from error
    if damaged is not None:
        raise ValueError(f"{path} is damaged (its entry {damaged}): {remedy}")
    if not isinstance(state, dict) or not isinstance(state.get("format"), int) or not state.keys() >= _PARTS:
        raise ValueError(
            f"{path} is no checkpoint of train(checkpoints=): it holds {arguments.described(state)}: load it with "
            "torch.load"
        )
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
        "loader": [_state_of(g) for g in generators(loader)],
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
    found = generators(loader)
    if len(found) != len(state["loader"]):
        raise ValueError(
            f"loader: the checkpoint is of one with {len(state['loader'])} generators of random numbers, this one has "
            f"{len(found)}: make the loader as it was made then, or train into another folder"
        )
    for g, s in zip(found, state["loader"], strict=True):
        if isinstance(g, torch.Generator) != isinstance(s, Tensor):
            raise ValueError(
                "loader: the checkpoint is of one with other kinds of generators of random numbers: make the loader as "
                "it was made then, or train into another folder"
            )
        _set_state(g, s)
    if "cuda" in state and torch.cuda.is_available():
        for k, s in enumerate(state["cuda"][: torch.cuda.device_count()]):
            torch.cuda.set_rng_state(s.cpu(), k)


#: What draws random numbers.
Generator = torch.Generator | np.random.Generator


def generators(loader: Any) -> list[Generator]:
    """The generators that a loader, its samplers and its datasets draw from and hold as attributes, each once."""
    found: list[Generator] = []
    queue, seen = [loader], set()
    while queue:
        of = queue.pop(0)
        if of is None or id(of) in seen or isinstance(of, list | tuple | dict):
            continue
        seen.add(id(of))
        held = [getattr(of, "generator", None), *getattr(of, "__dict__", {}).values()]
        for g in held:
            if isinstance(g, Generator) and not any(g is other for other in found):
                found.append(g)
        queue += [getattr(of, name, None) for name in ("batch_sampler", "sampler", "dataset")]
        several = getattr(of, "datasets", None)  # of torch.utils.data.ConcatDataset, ChainDataset, StackDataset
        queue += several.values() if isinstance(several, dict) else several if isinstance(several, list | tuple) else ()
    return found


def _state_of(g: Generator) -> Any:
    """As a tensor, or plain values."""
    return g.get_state() if isinstance(g, torch.Generator) else _plain(g.bit_generator.state)


def _set_state(g: Generator, state: Any) -> None:
    if isinstance(g, torch.Generator):
        g.set_state(state.cpu())
    else:
        g.bit_generator.state = _of_numpy(state)


def _plain(state: Any) -> Any:
    """What is of numpy in a dict of states as (type, numbers), whose numbers may be larger than torch's."""
    if isinstance(state, dict):
        return {name: _plain(value) for name, value in state.items()}
    return (str(state.dtype), state.tolist()) if isinstance(state, np.ndarray) else state


def _of_numpy(state: Any) -> Any:
    if isinstance(state, dict):
        return {name: _of_numpy(value) for name, value in state.items()}
    return np.array(state[1], dtype=state[0]) if isinstance(state, tuple) else state
