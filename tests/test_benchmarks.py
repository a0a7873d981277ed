"""The verdicts of ``benchmarks/run.py --check``."""

import importlib.util
from pathlib import Path

import pytest

SPEC = importlib.util.spec_from_file_location("report", Path(__file__).parents[1] / "benchmarks" / "report.py")
report = importlib.util.module_from_spec(SPEC)
SPEC.loader.exec_module(report)


@pytest.mark.parametrize(
    ("ours", "theirs", "agree"),
    [
        (2.0, 2.001, True),
        (2.0, 2.1, False),
        (0.0, 0.0, True),
        (0.0, 1e-9, False),
        (1e-9, 0.0, False),
        (float("nan"), 1.0, False),
        (1.0, float("nan"), False),
    ],
)
def test_results_are_compared_relatively(ours, theirs, agree):
    runs = [
        {"setting": "mlp", "job": "trace", "contender": name, "round": 0, "fingerprint": value}
        for name, value in (("ours", ours), ("peer", theirs))
    ]
    notes = {"ours": {}, "peer": {}}
    assert (not report.disagreements(runs, notes)) is agree
    assert report.check_table(runs, notes).splitlines()[-1].endswith("agrees" if agree else "DIFFERS")
