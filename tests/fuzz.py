"""Random nets, data and questions: every answer of the library is right to rounding, or an error in its own words.

    python tests/fuzz.py --minutes 10 --seed 0 --only in-place --out folder

prints what was found, and writes for each cause the smallest case as a script of its own.
"""

from __future__ import annotations

import argparse
import random
import sys
import time
from collections import Counter
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent))

import torch
from fuzzing.choices import Case
from fuzzing.judge import LEFT, REFUSED, Verdict, judge
from fuzzing.nets import draw
from fuzzing.scripts import script
from fuzzing.shrink import shrink
from fuzzing.steps import TAGS

#: Questions about each net.
QUERIES = 5


def case_of(seed: int, only: str | None = None) -> Case:
    """A random case, the same for the same seed."""
    rng = random.Random(seed)
    net, steps = draw(rng, only)
    problem = tuple(rng.randrange(64) for _ in range(14))
    return Case(net, steps, problem, tuple(tuple(rng.randrange(64) for _ in range(6)) for _ in range(QUERIES)))


def smallest(case: Case, verdict: Verdict, seconds: float = 8.0) -> tuple[Case, Verdict]:
    """The smallest case with the same cause."""

    def again(one: Case) -> Verdict | None:
        return next((v for _, v, _ in judge(one) if v.cause[0] == verdict.cause[0] and _alike(v, verdict)), None)

    found = shrink(case, lambda one: again(one) is not None, seconds)
    return found, again(found) or verdict


def _alike(one: Verdict, other: Verdict) -> bool:
    return one.kind == "wrong" or one.cause == other.cause


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=1.0)
    parser.add_argument("--seed", type=int, default=0, help="of the first case; the others follow")
    parser.add_argument("--cases", type=int, help="how many, instead of minutes")
    parser.add_argument("--only", choices=sorted(TAGS), help="a sort of step that should come often")
    parser.add_argument("--out", type=Path, help="a folder for scripts")
    parser.add_argument("--each", type=int, default=2, help="how many of one cause are made small and kept")
    args = parser.parse_args()
    torch.set_num_threads(1)
    start = time.monotonic()
    verdicts: Counter[str] = Counter()
    refusals: Counter[str] = Counter()
    examples: dict[str, int] = {}
    causes: Counter[tuple[str, str]] = Counter()
    small: Counter[tuple[str, str]] = Counter()
    seed, empty = args.seed, 0
    while (seed - args.seed < args.cases) if args.cases else (time.monotonic() - start < 60 * args.minutes):
        case = case_of(seed, args.only)
        answered = 0
        for numbers, verdict, built in judge(case):
            answered += 1
            verdicts[verdict.kind] += 1
            if verdict.kind in (REFUSED, LEFT):
                reason = f"{verdict.kind}{'' if built.apart else ', examples are not apart'}: {verdict.cause[1]}"
                refusals[reason] += 1
                examples.setdefault(reason, seed)
            if not verdict.finding:
                continue
            causes[verdict.cause] += 1
            if causes[verdict.cause] > args.each:
                continue
            found, shown = smallest(case.asking(numbers), verdict)
            assert shown.asked is not None
            key = (shown.kind, f"{shown.cause[1]} | {', '.join(sorted(set(shown.asked.net.used)))}")
            small[key] += 1
            if small[key] > 1:
                continue
            print(f"[{time.monotonic() - start:.0f} s, seed {seed}] {shown.kind}: {shown.detail[:200]}", flush=True)
            print(f"    steps: {', '.join((*shown.asked.net.used, *shown.asked.problem.used))}", flush=True)
            source = script(shown, found)
            if args.out is None:
                print(source, flush=True)
            else:
                args.out.mkdir(parents=True, exist_ok=True)
                (args.out / f"{shown.kind}_{seed}_{len(small)}.py").write_text(source)
        empty += not answered
        seed += 1
    print(f"{seed - args.seed} cases in {time.monotonic() - start:.0f} s, {empty} of which made no net")
    print(", ".join(f"{kind} {n}" for kind, n in verdicts.most_common()))
    for cause, n in causes.most_common():
        print(f"{n:6d} {cause[0]}: {cause[1]}")
    for reason, n in refusals.most_common():
        print(f"{n:6d} {reason}  [seed {examples[reason]}]")
    return 1 if causes else 0


if __name__ == "__main__":
    sys.exit(main())
