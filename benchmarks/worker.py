"""Measures jobs of one contender in the environment of that contender, and prints a line of JSON for each."""

from __future__ import annotations

import argparse
import ctypes
import gc
import json
import platform
import resource
import sys
from collections.abc import Callable
from contextlib import suppress
from importlib import import_module
from pathlib import Path
from statistics import median
from time import perf_counter
from typing import Any

import torch
from settings import ALL, LARGE, SETTINGS, SWEEPS, Setting, Task

_MOST_REPEATS = 100
#: How often a gradient is timed before and after each run of a job.
_GRADIENTS = 3


def describe(contender: Any) -> dict[str, Any]:
    """What the orchestrator, which imports no torch, has to know."""
    return {
        "version": contender.VERSION,
        "torch": torch.__version__,
        "python": platform.python_version(),
        "threads": torch.get_num_threads(),
        "notes": contender.NOTES,
        "settings": jobs_of(SETTINGS),
        "large": jobs_of(LARGE),
        "sweeps": jobs_of(SWEEPS),
        "missing": {name: setting.missing for name, setting in ALL.items() if setting.missing},
        "able": {name: able(contender, name, jobs) for name, jobs in jobs_of(ALL).items()},
    }


def device_name(device: str) -> str | None:
    """Of an accelerator."""
    return None if device == "cpu" else torch.cuda.get_device_name(device)


def jobs_of(settings: dict[str, Setting]) -> dict[str, list[str]]:
    return {name: list(setting.jobs) for name, setting in settings.items()}


def able(contender: Any, setting: str, jobs: list[str]) -> list[str]:
    """What a contender can do in a setting."""
    if ALL[setting].missing:
        return []
    lacks = contender.LACKS.get(setting, ())
    return [job for job in jobs if job in contender.JOBS and job not in lacks]


def measure(contender: Any, job: str, task: Task, seconds: float) -> dict[str, Any]:
    """Memory of the first run, then the job and a gradient in turn until the job has taken ``seconds``.

    Before, the job is run on a few examples: the code that a library loads when it is first used takes some MiB, which
    are not what the job needs.
    """
    make = contender.JOBS[job]
    memory_of = Accelerator(task.device) if task.device.type != "cpu" else Process()
    set_up_torch(task)
    make(task.few())()
    run = make(task)
    memory_of.forget_peak()
    before = memory_of.peak()
    first, result = timed(run)
    memory = memory_of.peak() - before
    fingerprint = contender.fingerprint(task, result)
    del result
    times: list[float] = []
    gradients = gradient_seconds(task)
    while not times or (sum(times) < seconds and len(times) < _MOST_REPEATS):
        times.append(timed(run)[0])
        gradients += gradient_seconds(task)
    return {
        "gradients": median(times) / median(gradients),
        "seconds": median(times),
        "gradient_seconds": median(gradients),
        "first_seconds": first,
        "repeats": len(times),
        "memory": memory,
        "fingerprint": fingerprint,
    }


def gradient_seconds(task: Task) -> list[float]:
    """A few times of a gradient, less the first: what a job leaves in the cache is not to count."""
    return [timed(task.gradient)[0] for _ in range(1 + _GRADIENTS)][1:]


def set_up_torch(task: Task) -> None:
    """Have torch load what it loads at the first derivative of each sort, which is not to count as a job's memory."""
    task.gradient(examples=2)
    x = torch.ones(2, requires_grad=True)
    torch.autograd.grad(x.sin(), x, torch.ones(2, 2), is_grads_batched=True)
    torch.func.jvp(torch.sin, (x,), (x,))
    torch.func.vjp(torch.sin, x)[1](x)


def timed(run: Callable[[], Any]) -> tuple[float, Any]:
    """Until an accelerator, if there is one, has done its part."""
    _finish()
    start = perf_counter()
    result = run()
    _finish()
    return perf_counter() - start, result


def _finish() -> None:
    if torch.cuda.is_initialized():
        torch.cuda.synchronize()


class Process:
    """The resident memory of this process."""

    def peak(self) -> int:
        """The most bytes so far."""
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        return peak if sys.platform == "darwin" else 1024 * peak

    def forget_peak(self) -> None:
        """Give back what is free and let the peak be what is resident now, where the system can; elsewhere, what was
        before hides small jobs.
        """
        gc.collect()
        with suppress(OSError, AttributeError):
            ctypes.CDLL(None).malloc_trim(0)
        with suppress(OSError):
            Path("/proc/self/clear_refs").write_text("5")


class Accelerator:
    """The memory of a CUDA device that is taken by tensors."""

    def __init__(self, device: torch.device) -> None:
        self.device = device

    def peak(self) -> int:
        return torch.cuda.max_memory_allocated(self.device)

    def forget_peak(self) -> None:
        gc.collect()
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(self.device)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("contender")
    parser.add_argument("--setting", help="without one, describe the contender")
    parser.add_argument("--jobs", nargs="+", default=[])
    parser.add_argument("--seconds", type=float, default=1.0)
    parser.add_argument("--small", action="store_true")
    parser.add_argument("--device", default="cpu")
    args = parser.parse_args()
    contender = import_module(f"contenders.{args.contender}")
    if args.setting is None:
        print(json.dumps(describe(contender) | {"device": device_name(args.device)}))
        return
    setting = ALL[args.setting]
    for job in args.jobs:
        try:
            found = measure(contender, job, setting.load(job, args.small, args.device), args.seconds)
        except Exception as error:  # the other jobs still count
            found = {"error": f"{type(error).__name__}: {error}"}
        print(json.dumps({"job": job, **found}), flush=True)


if __name__ == "__main__":
    main()
