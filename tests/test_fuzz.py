"""Random nets, data and questions, the same every time; ``make fuzz`` looks at others."""

from functools import cache

import pytest
import torch
from fuzz import case_of
from fuzzing.choices import Case
from fuzzing.judge import LEFT, RIGHT, judge
from fuzzing.scripts import check, script
from fuzzing.shrink import shrink
from fuzzing.steps import TAGS

#: Cases for each test, and the first of each.
CASES = 25
SEEDS = range(0, 300, CASES)


@cache
def verdicts(k):
    """Those of the k-th case, which two tests look at."""
    return [verdict for _, verdict, _ in judge(case_of(k))]


@pytest.mark.parametrize("seed", SEEDS)
def test_right_or_in_words_of_the_library(seed):
    found = [
        f"seed {k}: {verdict.kind}, {verdict.detail}"
        for k in range(seed, seed + CASES)
        for verdict in verdicts(k)
        if verdict.finding
    ]
    assert not found, "\n".join([*found, "python tests/fuzz.py --cases 1 --seed ... shows the smallest case of each"])


def test_most_cases_are_answered():
    kinds = [verdict.kind for k in range(20) for verdict in verdicts(k)]
    assert kinds.count(RIGHT) > len(kinds) / 2 > 20
    assert kinds.count(LEFT) < len(kinds) / 10


def test_a_case_is_the_same_again():
    case = case_of(3)
    assert case == case_of(3) == Case.from_json(case.to_json())
    assert [v.detail for _, v, _ in judge(case)] == [v.detail for _, v, _ in judge(case)]


@pytest.mark.parametrize("only", sorted(TAGS))
def test_steps_of_every_sort_are_taken(only):
    names = {one for tag, numbers in TAGS.items() for one in numbers if tag == only}
    assert any(numbers[0] in names for k in range(30) for numbers in case_of(k, only).steps)


def test_scripts_run_alone_and_small_cases_are_smaller():
    numbers, verdict, _ = next(found for k in range(50) for found in judge(case_of(k)) if found[1].kind == RIGHT)
    case = next(case_of(k).asking(numbers) for k in range(50) if numbers in case_of(k).queries)
    small = shrink(case, lambda one: any(v.kind == RIGHT for _, v, _ in judge(one)), seconds=3.0)
    assert small.size <= case.size
    source = script(verdict, small)
    check(source)
    env = {"print": lambda *values: said.append(values)}
    said = []
    exec(source, env)
    assert said[-1][0] == "relative error"
    assert float(said[-1][1]) <= 1e-4
    assert torch.get_default_dtype() == torch.float64
