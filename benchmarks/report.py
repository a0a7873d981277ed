"""From the runs of all processes to medians, and to the tables that show them."""

from __future__ import annotations

from collections.abc import Callable
from math import inf
from statistics import median
from typing import Any

Run = dict[str, Any]
Row = dict[str, Any]

#: Contenders, in the order of columns.
NAMES = [
    "ours",
    "nng",
    "curvlinops",
    "backpack",
    "torchfunc",
    "asdl",
    "singd",
    "adam",
    "pyhessian",
    "eigenthings",
    "laplace",
    "plain",
    "kronfluence",
]
#: Of these one that does something else: the floor of what steps of training cost.
FLOOR = "adam"
#: What two contenders may differ by, relatively: they compute in single precision.
TOLERANCE = 1e-3
_COUNTED = ("gradients", "seconds", "gradient_seconds", "first_seconds", "memory")


def processor_of(contenders: dict[str, Any], machine: dict[str, Any]) -> str:
    """What numbers are of: an accelerator, if there was one."""
    return next(iter(contenders.values())).get("device") or machine["cpu"]


def merged(reports: list[dict[str, Any]]) -> dict[str, Any]:
    """One report of several: each job of each setting as the last of them has it that has it at all."""
    latest = {(run["setting"], run["job"]): k for k, report in enumerate(reports) for run in report["runs"]}
    runs = [run for row, k in latest.items() for run in reports[k]["runs"] if (run["setting"], run["job"]) == row]
    contenders = {name: about for report in reports for name, about in report["contenders"].items()}
    return {
        **reports[-1],
        "contenders": {name: contenders[name] for name in NAMES if name in contenders},
        "runs": runs,
        "summary": summarise(runs),
    }


def summarise(runs: list[Run]) -> list[Row]:
    """A row for each job of each setting: medians over the rounds, of ratios as well: each is of one round."""
    found: dict[tuple[str, str], dict[str, dict[int, Run]]] = {}
    for run in runs:
        rounds = found.setdefault((run["setting"], run["job"]), {}).setdefault(run["contender"], {})
        if "error" not in run:
            rounds[run["round"]] = run
    processors = {(run["setting"], run["job"]): run["processor"] for run in runs}
    return [
        {"setting": setting, "job": job, "processor": processors[setting, job], **_medians(of)}
        for (setting, job), of in found.items()
    ]


def _medians(of: dict[str, dict[int, Run]]) -> Row:
    ours = of.get("ours", {})
    ratios = {}
    for name, rounds in of.items():
        common = [k for k in rounds if k in ours and name != "ours"]
        if common:
            ratios[name] = median(ours[k]["gradients"] / rounds[k]["gradients"] for k in common)
    contenders = {
        name: {key: median(run[key] for run in rounds.values()) for key in _COUNTED} if rounds else None
        for name, rounds in of.items()
    }
    return {"contenders": contenders, "ratios": ratios}


def cost_table(rows: list[Row], contenders: list[str]) -> str:
    """Cost in gradients, ratios, peak memory."""
    peers = [name for name in contenders if name != "ours"] if "ours" in contenders else []
    head = ["setting", "job", *contenders, *(f"ours/{p}" for p in peers), *(f"MiB {c}" for c in contenders)]
    lines = [head]
    for row in rows:
        costs = [_cell(row, name, "gradients") for name in contenders]
        ratios = [_number(row["ratios"][name]) if name in row["ratios"] else "-" for name in peers]
        memory = [_cell(row, name, "memory", 2**20) for name in contenders]
        lines.append([row["setting"], row["job"], *costs, *ratios, *memory])
    return _aligned(lines)


def rst_tables(
    rows: list[Row], contenders: list[str], count: Callable[[str, str], float | None], marks: dict[str, str]
) -> str:
    """For each setting a table: cost in gradients, how many times cheaper ours is than the best peer, the count of its
    multiplications, and the memory of both. Contenders that have none of its jobs are left out. marks: what is put
    behind the job of a row, for each processor that it may be from.
    """
    settings = dict.fromkeys(row["setting"] for row in rows)
    tables = []
    for setting in settings:
        mine = [row for row in rows if row["setting"] == setting]
        there = [name for name in contenders if any(name in row["contenders"] for row in mine)]
        tables.append(f"**{setting}**\n\n{_rst_table(mine, there, count, marks)}")
    return "\n\n".join(tables)


def _rst_table(
    rows: list[Row], contenders: list[str], count: Callable[[str, str], float | None], marks: dict[str, str]
) -> str:
    peers = [name for name in contenders if name not in ("ours", FLOOR)]
    others = [name for name in contenders if name != "ours"]
    lines = [["job", "ours", "best/ours", *others, "count", "MiB ours", "MiB leanest peer"]]
    for row in rows:
        costs = [_cell(row, name, "gradients") for name in others]
        ratios = [ratio for name, ratio in row["ratios"].items() if name != FLOOR]
        best = _number(1 / max(ratios)) if ratios else "-"
        counted = count(row["setting"], row["job"])
        held = [found["memory"] for p in peers if (found := row["contenders"].get(p))]
        leanest = _number(min(held) / 2**20) if held else "-"
        lines.append(
            [
                row["job"] + marks[row["processor"]],
                _cell(row, "ours", "gradients"),
                best,
                *costs,
                "-" if counted is None else _number(counted),
                _cell(row, "ours", "memory", 2**20),
                leanest,
            ]
        )
    return in_rst(lines)


def in_rst(lines: list[list[str]]) -> str:
    """A table, of which the first line is the head."""
    lines = [[r"\-" if cell == "-" else cell for cell in line] for line in lines]  # which alone would be a list
    head, *body = _aligned(lines).splitlines()
    widths = [max(len(line[k]) for line in lines) for k in range(len(lines[0]))]
    rule = "  ".join("=" * width for width in widths)
    return "\n".join([rule, head, rule, *body, rule])


def check_table(runs: list[Run], notes: dict[str, dict[str, str]]) -> str:
    """The fingerprint of every result, and how far it is from ours."""
    lines = [["setting", "job", "contender", "fingerprint", "difference", ""]]
    places = list(dict.fromkeys((run["setting"], run["job"]) for run in runs))
    for run in sorted(runs, key=lambda run: places.index((run["setting"], run["job"]))):
        where = [run["setting"], run["job"], run["contender"]]
        if "error" in run:
            lines.append([*where, "failed", "-", run["error"]])
            continue
        far = _difference(run, runs)
        shown = "-" if far is None or run["contender"] == "ours" else f"{far:.0e}"
        lines.append([*where, f"{run['fingerprint']:.7g}", shown, _verdict(run, far, notes)])
    return _aligned(lines)


def disagreements(runs: list[Run], notes: dict[str, dict[str, str]]) -> list[Run]:
    """The runs that failed, or whose result should be ours and is not."""
    return [run for run in runs if "error" in run or _verdict(run, _difference(run, runs), notes) == "DIFFERS"]


def _difference(run: Run, runs: list[Run]) -> float | None:
    """How far a result is from ours, relatively; None if that is not there."""
    key = ("round", "setting", "job")
    for other in runs:
        if other["contender"] == "ours" and "error" not in other and all(other[k] == run[k] for k in key):
            apart = abs(run["fingerprint"] - other["fingerprint"])
            return apart / abs(other["fingerprint"]) if other["fingerprint"] else apart and inf
    return None


def _verdict(run: Run, far: float | None, notes: dict[str, dict[str, str]]) -> str:
    if far is None or run["contender"] == "ours":
        return ""
    if run["job"] in notes[run["contender"]]:
        return f"another number by definition: {notes[run['contender']][run['job']]}"
    return "agrees" if far <= TOLERANCE else "DIFFERS"


def _cell(row: Row, contender: str, key: str, unit: float = 1.0) -> str:
    if contender not in row["contenders"]:
        return "-"
    found = row["contenders"][contender]
    return "failed" if found is None else _number(found[key] / unit)


def _number(x: float) -> str:
    """About three digits, never an exponent."""
    return f"{x:.0f}" if x >= 100 else f"{x:.1f}" if x >= 10 else f"{x:.2f}"


def _aligned(lines: list[list[str]]) -> str:
    """Cells in columns, text to the left and numbers to the right."""
    widths = [max(len(line[k]) for line in lines) for k in range(len(lines[0]))]
    pads = [str.ljust if name in ("setting", "job", "contender", "") else str.rjust for name in lines[0]]
    padded = [[pad(c, w) for pad, c, w in zip(pads, line, widths, strict=True)] for line in lines]
    return "\n".join("  ".join(line).rstrip() for line in padded)
