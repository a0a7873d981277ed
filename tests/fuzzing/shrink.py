"""From a case that fails to the smallest that fails the same way."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace

from .choices import Case


def shrink(case: Case, fails: Callable[[Case], bool], seconds: float = 8.0) -> Case:
    """The smallest case that is found in that time of the processor: fewer steps, and fewer and smaller decisions."""
    end = time.process_time() + seconds
    changed = True
    while changed and time.process_time() < end:
        changed = False
        for smaller in _smaller(case):
            if time.process_time() > end:
                break
            if smaller.size < case.size and fails(smaller):
                case, changed = smaller, True
                break
    return case


def _smaller(case: Case) -> Iterator[Case]:
    n = len(case.steps)
    for length in (4, 2, 1):
        for k in range(n - length + 1):
            yield replace(case, steps=case.steps[:k] + case.steps[k + length :])
    for k, step in enumerate(case.steps):
        for other in _plainer(step[1:]):
            yield replace(case, steps=(*case.steps[:k], (step[0], *other), *case.steps[k + 1 :]))
    for other in _plainer(case.problem):
        yield replace(case, problem=other)
    for other in _plainer(case.net):
        yield replace(case, net=other)
    for k, query in enumerate(case.queries):
        for other in _plainer(query):
            yield replace(case, queries=(*case.queries[:k], other, *case.queries[k + 1 :]))


def _plainer(numbers: Sequence[int]) -> Iterator[tuple[int, ...]]:
    """The same with some decisions zero, or one a smaller."""
    numbers = tuple(numbers)
    for k in range(len(numbers)):
        if any(numbers[k:]):
            yield (*numbers[:k], *[0] * (len(numbers) - k))
            break
    for k, number in enumerate(numbers):
        if number:
            yield (*numbers[:k], 0, *numbers[k + 1 :])
    for k, number in enumerate(numbers):
        for smaller in {number // 2, number - 1}:
            if 0 < smaller < number:
                yield (*numbers[:k], smaller, *numbers[k + 1 :])
