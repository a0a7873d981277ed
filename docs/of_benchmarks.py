"""The table of the first page, from the results of the benchmark."""

from __future__ import annotations

import json
from pathlib import Path

SETTING = "resnet18"
NAMES = {
    "ours": "nngeometry",
    "nng": "NNGeometry",
    "curvlinops": "curvlinops",
    "backpack": "BackPACK",
    "torchfunc": "torch.func",
}
JOBS = {
    "kfac": "exact KFAC",
    "kfac_mc": "KFAC of one sampled label",
    "ekfac": "exact EKFAC",
    "diag": "exact diagonal",
    "trace": "exact trace",
    "fim_product": "product with the Fisher matrix",
    "fim_product_again": "the next product",
    "hessian_product": "product with the Hessian",
    "kfac_solve_1": "solve with a KFAC",
}


def peers(results: Path) -> str:
    """The rows of :data:`JOBS`, as a list-table in which each number is a link to the code that was measured."""
    rows = {row["job"]: row for row in json.loads(results.read_text())["summary"] if row["setting"] == SETTING}
    lines = [".. list-table::", "   :header-rows: 1", "   :class: peers", ""]
    lines += _row(["", *NAMES.values()])
    for job, title in JOBS.items():
        found = rows[job]["contenders"]
        costs = {name: found[name]["gradients"] for name in NAMES if found.get(name)}
        cells = [f":ref:`{_number(costs[name])} <code-{name}>`" if name in costs else r"\-" for name in NAMES]
        lines += _row([title, *cells])
    return "\n".join(lines) + "\n"


def _row(cells: list[str]) -> list[str]:
    return [f"   {'* -' if k == 0 else '  -'} {cell}".rstrip() for k, cell in enumerate(cells)]


def _number(value: float) -> str:
    return f"{value:.3g}" if value < 100 else f"{value:.0f}"
