"""Writes what was measured into docs/benchmarks.rst: a table, and pictures of cost against size and against memory."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from counts import count
from report import NAMES, Row, Run, merged, processor_of, rst_tables

PAGE = Path(__file__).resolve().parent.parent / "docs" / "benchmarks.rst"
PICTURE = "benchmarks/sweeps.svg"
BUDGETS = "benchmarks/budgets.svg"
MARKS = ".. begin {0}", ".. end {0}"
Report = dict[str, Any]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "--results", type=Path, nargs="+", help="JSON of run.py, for the table; later ones replace rows"
    )
    parser.add_argument("--accelerator", type=Path, nargs="+", help="JSON of run.py --device, for another table")
    parser.add_argument("--steps", type=Path, nargs="+", help="JSON of run.py --jobs ten_steps ..., the same")
    parser.add_argument("--nets", type=Path, nargs="+", help="JSON of run.py --settings vit lstm experts, the same")
    parser.add_argument("--spectra", type=Path, nargs="+", help="JSON of run.py --jobs hessian_trace ..., the same")
    parser.add_argument("--uses", type=Path, nargs="+", help="JSON of run.py --jobs posterior_fit_kron ..., the same")
    parser.add_argument("--sweep", type=Path, help="JSON of run.py --sweep, for the pictures")
    parser.add_argument("--budgets", type=Path, nargs="+", help="JSON of run.py --budget, for cost against memory")
    parser.add_argument("--page", type=Path, default=PAGE)
    args = parser.parse_args()
    tables = {
        "table": args.results,
        "accelerator": args.accelerator,
        "nets": args.nets,
        "steps": args.steps,
        "spectra": args.spectra,
        "uses": args.uses,
    }
    for name, paths in tables.items():
        if paths:
            report = merged([json.loads(path.read_text()) for path in paths])
            table = rst_tables(report["summary"], list(report["contenders"]), count, marks_of(report))
            write(args.page, name, f"{origin(report)}\n\n{table}")
    if args.sweep:
        report = json.loads(args.sweep.read_text())
        draw(report, args.page.parent / PICTURE)
        write(args.page, "pictures", f".. image:: {PICTURE}\n   :alt: Cost in gradients against size")
    if args.budgets:
        draw_budgets([json.loads(path.read_text()) for path in args.budgets], args.page.parent / BUDGETS)
        write(args.page, "budgets", f".. image:: {BUDGETS}\n   :alt: Cost in gradients against memory")


def write(page: Path, name: str, text: str) -> None:
    """Put text between two marks of the page."""
    begin, end = (mark.format(name) for mark in MARKS)
    before, rest = page.read_text().split(begin)
    page.write_text(f"{before}{begin}\n\n{text}\n\n{end}{rest.split(end)[1]}")


def origin(report: Report) -> str:
    """What the numbers were measured on, and with which versions."""
    machine, contenders = report["machine"], report["contenders"]
    first, processor = contenders["ours"], processor_of(contenders, machine)
    threads = f"{first['threads']} threads, " if processor == machine["cpu"] else ""
    versions = ", ".join(f"{name} {about['version']}" for name, about in contenders.items())
    rounds = rounds_of(report["runs"])
    marked = [f"{mark.strip()} on {name}" for name, mark in marks_of(report).items() if mark]
    elsewhere = f" Rows with {', '.join(marked)}.".replace("*", r"\*") if marked else ""
    trial = " A trial run: the numbers tell nothing." if report["small"] or report.get("budget") else ""
    return f"{processor}, {machine['system']}, {threads}torch {first['torch']}, {rounds}; {versions}.{elsewhere}{trial}"


def marks_of(report: Report) -> dict[str, str]:
    """What is put behind jobs that were measured on another processor than the last, for each processor."""
    last = processor_of(report["contenders"], report["machine"])
    others = sorted({run["processor"] for run in report["runs"]} - {last})
    return {last: "", **{name: " " + "*" * k for k, name in enumerate(others, 1)}}


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


def pyplot() -> Any:
    """matplotlib, drawing into files that are the same every time."""
    import matplotlib

    matplotlib.use("Agg")
    matplotlib.rcParams["svg.hashsalt"] = "nngeometry"
    from matplotlib import pyplot as plt

    return plt


def sizes_across(ax: Any) -> None:
    """Sizes in powers of two, as plain numbers."""
    from matplotlib import ticker

    ax.set_xscale("log", base=2)
    ax.xaxis.set_major_formatter(ticker.ScalarFormatter())


def costs_up(ax: Any) -> None:
    """Costs on a logarithmic axis in steps of 1, 2, 5, as plain numbers."""
    from matplotlib import ticker

    ax.yaxis.set_major_locator(ticker.LogLocator(subs=(1, 2, 5)))
    ax.yaxis.set_minor_locator(ticker.NullLocator())
    ax.yaxis.set_major_formatter(ticker.ScalarFormatter())


def save(figure: Any, handles: Any, path: Path) -> None:
    """handles: lines and their names, for a legend above all pictures."""
    figure.legend(*handles, loc="outside upper center", ncols=9)
    figure.set_layout_engine("constrained")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, metadata={"Date": None})


def draw(report: Report, path: Path) -> None:
    """A row of pictures for each size that grows, a column for each job, a line for each contender."""
    plt = pyplot()
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
            sizes_across(ax)
            costs_up(ax)
        axes[0].set_ylabel("gradients")
    save(figure, grid[0, 0].get_legend_handles_labels(), path)


def draw_budgets(reports: list[Report], path: Path) -> None:
    """Cost against memory: ours with several budgets, written beside, and the others."""
    plt = pyplot()
    found: dict[tuple[str, str], dict[str, list[tuple[float, float, int]]]] = {}
    for report in reports:
        for row in report["summary"]:
            for name, one in row["contenders"].items():
                if one:
                    point = one["memory"] / 2**20, one["gradients"], report["budget"]
                    found.setdefault((row["setting"], row["job"]), {}).setdefault(name, []).append(point)
    columns = min(4, len(found))
    lines = -(-len(found) // columns)
    figure, grid = plt.subplots(lines, columns, figsize=(3 * columns, 2.6 * lines), squeeze=False)
    for ax in grid.flat[len(found) :]:
        ax.set_axis_off()
    handles: dict[str, Any] = {}
    for ax, ((setting, job), contenders) in zip(grid.flat, found.items(), strict=False):
        for name, points in contenders.items():
            memory, cost, budgets = zip(*sorted(points, key=lambda point: -point[2]), strict=True)
            ours = name == "ours"
            (handles[name],) = ax.plot(memory, cost, "o-" if ours else "s", color=f"C{NAMES.index(name)}", label=name)
            for x, y, budget in zip(memory, cost, budgets, strict=True) if ours else ():
                ax.annotate(str(budget), (x, y), xytext=(4, 4), textcoords="offset points", fontsize=7)
        ax.set(title=f"{setting}\n{job}", xlabel="MiB")
        ax.margins(0.15, 0.2)
        ax.set_ylim(bottom=0)
        sizes_across(ax)
    for axes in grid:
        axes[0].set_ylabel("gradients")
    save(figure, (list(handles.values()), list(handles)), path)


if __name__ == "__main__":
    main()
