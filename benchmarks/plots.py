"""Writes what was measured into docs/benchmarks.rst: a table, and pictures of cost against size."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from counts import count
from report import Row, Run, merged, rst_table

PAGE = Path(__file__).resolve().parent.parent / "docs" / "benchmarks.rst"
PICTURE = "benchmarks/sweeps.svg"
MARKS = ".. begin {0}", ".. end {0}"
Report = dict[str, Any]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "--results", type=Path, nargs="+", help="JSON of run.py, for the table; later ones replace rows"
    )
    parser.add_argument("--sweep", type=Path, help="JSON of run.py --sweep, for the pictures")
    parser.add_argument("--page", type=Path, default=PAGE)
    args = parser.parse_args()
    if args.results:
        report = merged([json.loads(path.read_text()) for path in args.results])
        table = rst_table(report["summary"], list(report["contenders"]), count, marks_of(report))
        write(args.page, "table", f"{origin(report)}\n\n{table}")
    if args.sweep:
        report = json.loads(args.sweep.read_text())
        draw(report, args.page.parent / PICTURE)
        write(args.page, "pictures", f".. image:: {PICTURE}\n   :alt: Cost in gradients against size")


def write(page: Path, name: str, text: str) -> None:
    """Put text between two marks of the page."""
    begin, end = (mark.format(name) for mark in MARKS)
    before, rest = page.read_text().split(begin)
    page.write_text(f"{before}{begin}\n\n{text}\n\n{end}{rest.split(end)[1]}")


def origin(report: Report) -> str:
    """What the numbers were measured on, and with which versions."""
    machine, contenders = report["machine"], report["contenders"]
    first = contenders["ours"]
    versions = ", ".join(f"{name} {about['version']}" for name, about in contenders.items())
    rounds = rounds_of(report["runs"])
    marked = [f"{mark.strip()} on {cpu}" for cpu, mark in marks_of(report).items() if mark]
    elsewhere = f" Rows with {', '.join(marked)}.".replace("*", r"\*") if marked else ""
    trial = " A trial run: the numbers tell nothing." if report["small"] or report.get("budget") else ""
    return (
        f"{machine['cpu']}, {machine['system']}, {first['threads']} threads, torch {first['torch']}, "
        f"{rounds}; {versions}.{elsewhere}{trial}"
    )


def marks_of(report: Report) -> dict[str, str]:
    """What is put behind jobs that were measured on another processor than the last, for each processor."""
    others = sorted({run["cpu"] for run in report["runs"]} - {report["machine"]["cpu"]})
    return {report["machine"]["cpu"]: "", **{cpu: " " + "*" * k for k, cpu in enumerate(others, 1)}}


def rounds_of(runs: list[Run]) -> str:
    """How often the jobs were measured."""
    last: dict[tuple[str, str], int] = {}
    for run in runs:
        key = run["setting"], run["job"]
        last[key] = max(last.get(key, 0), run["round"])
    few, many = 1 + min(last.values()), 1 + max(last.values())
    if many == 1:
        return "one round"
    return f"medians of {many} rounds" if few == many else f"medians of {few} to {many} rounds"


def draw(report: Report, path: Path) -> None:
    """A row of pictures for each size that grows, a column for each job, a line for each contender."""
    import matplotlib

    matplotlib.use("Agg")
    matplotlib.rcParams["svg.hashsalt"] = "nngeometry"
    from matplotlib import pyplot as plt
    from matplotlib import ticker

    rows: list[Row] = report["summary"]
    names = list(dict.fromkeys(row["setting"].split("=")[0] for row in rows))
    jobs = list(dict.fromkeys(row["job"] for row in rows))
    figure, grid = plt.subplots(len(names), len(jobs), figsize=(3 * len(jobs), 2.4 * len(names)), squeeze=False)
    for axes, name in zip(grid, names, strict=True):
        for ax, job in zip(axes, jobs, strict=True):
            for contender in report["contenders"]:
                points = sorted(
                    (int(row["setting"].split("=")[1]), row["contenders"][contender]["gradients"])
                    for row in rows
                    if row["job"] == job and row["setting"].startswith(f"{name}=") and row["contenders"].get(contender)
                )
                ours = contender == "ours"
                ax.loglog(*zip(*points, strict=True) if points else ((), ()), "o-" if ours else ".--", label=contender)
            ax.set(title=job, xlabel=name)
            ax.set_xscale("log", base=2)
            ax.yaxis.set_major_locator(ticker.LogLocator(subs=(1, 2, 5)))
            ax.yaxis.set_minor_locator(ticker.NullLocator())
            for axis in (ax.xaxis, ax.yaxis):
                axis.set_major_formatter(ticker.ScalarFormatter())
        axes[0].set_ylabel("gradients")
    figure.legend(*grid[0, 0].get_legend_handles_labels(), loc="outside upper center", ncols=9)
    figure.set_layout_engine("constrained")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, metadata={"Date": None})


if __name__ == "__main__":
    main()
