"""Runs the benchmarks: each job of each contender in its own process and environment, in turn, several rounds."""

# It imports no torch: a process starts with the peak memory of its parent, which would hide what a job needs.

from __future__ import annotations

import argparse
import json
import os
import platform
import subprocess
import sys
from collections.abc import Collection, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

from report import NAMES, Run, check_table, cost_table, disagreements, processor_of, summarise

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent
PINS = HERE / "peers.txt"
PEER_VENV = ROOT / ".bench" / "venv"
#: Those that need nothing but torch and ours.
AT_HOME = ["ours", "torchfunc", "adam", "plain"]
SMALL_SETTINGS = ["digits-mlp-small", "convnet", "transformer", "vit", "lstm", "experts"]


def main() -> None:
    args = arguments()
    workers = {name: Worker(name, args) for name in args.contenders}
    described = {name: worker.describe() for name, worker in workers.items()}
    if len({about["torch"] for about in described.values()}) > 1:
        print("Warning: the contenders have different versions of torch, which will show.", file=sys.stderr)
    notes = {name: about["notes"] for name, about in described.items()}
    runs: list[Run] = []
    with suppress(KeyboardInterrupt):  # what there is by then is reported
        runs.extend(rounds(args, workers, described))
    summary = summarise(runs)
    if args.check:
        print(check_table(runs, notes))
    else:
        title = "Cost in gradients, ratio of costs, peak memory"
        print(f"{title} (a trial run: they tell nothing)" if args.small else title)
        print(cost_table(summary, args.contenders))
    if args.output:
        about = {"machine": machine(), "contenders": described, "small": args.small, "budget": args.budget}
        report = {**about, "summary": summary, "runs": runs}
        args.output.parent.mkdir(parents=True, exist_ok=True)
        args.output.write_text(json.dumps(report, indent=1) + "\n")
    if (args.check and disagreements(runs, notes)) or any("error" in r for r in runs if r["contender"] == "ours"):
        sys.exit(1)


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--small", action="store_true", help="a trial run: little data, one round, only ours")
    parser.add_argument("--check", action="store_true", help="compare results instead of costs, on little data")
    parser.add_argument("--rounds", type=int, help="how often everything is repeated, by default 3")
    parser.add_argument("--jobs", nargs="+", help="by default all")
    parser.add_argument("--settings", nargs="+", help="by default all, with --small or --check small ones")
    parser.add_argument("--sweep", action="store_true", help="settings of growing size instead, for plots.py")
    parser.add_argument("--contenders", nargs="+", choices=NAMES, help="by default all, with --small only ours")
    parser.add_argument("--threads", type=int, help="by default what torch chooses, 1 with --small or --check")
    parser.add_argument("--device", default="cpu", help="e.g. cuda: settings may be those of accelerators, too")
    parser.add_argument("--seconds", type=float, default=1.0, help="how long a job is repeated in one process")
    parser.add_argument("--peer-python", type=Path, help="an interpreter with the peers, by default one is set up")
    parser.add_argument("--budget", type=int, help="nngeometry.memory_budget of ours, in MiB, by default its own")
    parser.add_argument("--output", type=Path, help="where to write everything as JSON")
    args = parser.parse_args()
    args.contenders = args.contenders or (["ours"] if args.small and not args.check else NAMES)
    args.small = args.small or args.check
    args.rounds = args.rounds or (1 if args.small else 3)
    args.threads = args.threads or (1 if args.small else None)
    args.settings = args.settings or (SMALL_SETTINGS if args.small and not args.sweep else None)
    if args.check and "ours" not in args.contenders:
        parser.error("--check compares with ours: add it to --contenders")
    return args


def rounds(args: argparse.Namespace, workers: dict[str, Worker], described: dict[str, Any]) -> Iterator[Run]:
    """Everything once in each round, the contenders taking turns at each job."""
    known, processor = known_settings(args, described), processor_of(described, machine())
    wanted = chosen(args.jobs, dict.fromkeys(job for jobs in known.values() for job in jobs), "job")
    for count in range(args.rounds):
        for setting in chosen(args.settings, known, "setting"):
            for name in workers:
                if count == 0 and setting in described[name]["missing"]:
                    print(f"{setting} {name}: {described[name]['missing'][setting]}", file=sys.stderr, flush=True)
            jobs = [job for job in known[setting] if job in wanted]
            # A trial run has all jobs in one process, because most of its time would go into starting processes. So has
            # an accelerator, whose memory is that of its tensors and not that of a process.
            together = args.small or args.device != "cpu"
            for group in [jobs] if together else [[job] for job in jobs]:
                for name, worker in workers.items():
                    able = [job for job in group if job in described[name]["able"][setting]]
                    yield from ({"round": count, "processor": processor, **run} for run in worker.run(setting, able))


def known_settings(args: argparse.Namespace, described: dict[str, Any]) -> dict[str, list[str]]:
    """The jobs of each setting that may be chosen; those for accelerators only by name."""
    about = next(iter(described.values()))
    if args.sweep:
        return about["sweeps"]
    return about["settings"] | (about["large"] if args.settings else {})


def chosen(wanted: list[str] | None, known: Collection[str], what: str) -> list[str]:
    """What is wanted, by default everything; ends the program if there is no such thing."""
    for name in wanted or []:
        if name not in known:
            sys.exit(f"there is no {what} {name!r}, but {', '.join(known)}")
    return list(wanted or known)


class Worker:
    """Has jobs of one contender measured in that contender's environment."""

    def __init__(self, contender: str, args: argparse.Namespace) -> None:
        self.contender = contender
        self.options = ["--small", "--seconds", "0"] if args.small else ["--seconds", str(args.seconds)]
        self.options += ["--device", args.device]
        self.environment = {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "NNGEOMETRY_BUDGET")}
        if contender in AT_HOME:
            self.python = Path(sys.executable)
            self.environment["PYTHONPATH"] = str(ROOT)
        else:
            self.python = args.peer_python or peer_python()
        if args.budget:
            self.environment["NNGEOMETRY_BUDGET"] = str(args.budget)
        if args.threads:
            names = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS")
            self.environment |= dict.fromkeys(names, str(args.threads))

    def describe(self) -> dict[str, Any]:
        """Versions, and what it can do."""
        lines, error = self._start([])
        if not lines:
            sys.exit(f"{self.contender} does not start: {error}")
        return lines[0]

    def run(self, setting: str, jobs: list[str]) -> Iterator[Run]:
        """Measure jobs in one process."""
        if not jobs:
            return
        lines, error = self._start(["--setting", setting, "--jobs", *jobs])
        found = {line["job"]: line for line in lines}
        for job in jobs:
            run = {"contender": self.contender, "setting": setting, **found.get(job, {"job": job, "error": error})}
            outcome = f"failed: {run['error']}" if "error" in run else f"{run['gradients']:.3g} gradients"
            print(f"{setting} {job} {self.contender}: {outcome}", file=sys.stderr, flush=True)
            yield run

    def _start(self, options: list[str]) -> tuple[list[dict[str, Any]], str]:
        """The lines of JSON that a process printed, and how it ended."""
        command = [str(self.python), str(HERE / "worker.py"), self.contender, *self.options, *options]
        done = subprocess.run(command, env=self.environment, capture_output=True, text=True, check=False)
        lines = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]
        complaint = done.stderr.strip().splitlines()[-1:] or ["no message"]
        return lines, f"exit code {done.returncode}, {complaint[0]}"


def peer_python() -> Path:
    """The interpreter of the peers' virtual environment, which is set up if it is missing or not that of the pins."""
    python, stamp = PEER_VENV / "bin" / "python", PEER_VENV / PINS.name
    if not stamp.exists() or stamp.read_text() != PINS.read_text():
        print(f"Setting up the peers in {PEER_VENV}", file=sys.stderr, flush=True)
        subprocess.run([sys.executable, "-m", "venv", "--clear", PEER_VENV], check=True)
        subprocess.run([python, "-m", "pip", "install", "--quiet", "-r", PINS], check=True)
        stamp.write_text(PINS.read_text())
    return python


def machine() -> dict[str, Any]:
    """What the numbers were measured on."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    models = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    cpu = models[0] if models else platform.processor()
    return {"cpu": cpu, "cores": os.cpu_count(), "system": f"{platform.system()} {platform.machine()}"}


if __name__ == "__main__":
    main()
