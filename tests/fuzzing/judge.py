"""A case is built and asked; each answer is judged against the loops."""

from __future__ import annotations

import linecache
import re
import traceback
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

import nngeometry

from . import loops
from .choices import Case
from .nets import LENGTHS, NAMES, Net, net_of
from .problems import Problem, problem_of
from .queries import Query, query_of
from .state import changed, state_of

LIBRARY = Path(nngeometry.__file__).resolve().parent
EVERYTHING: dict[str, Any] = {
    **NAMES,
    **{name: getattr(nngeometry, name) for name in nngeometry.__all__},
    **{k: v for k, v in vars(loops).items() if getattr(v, "__module__", "") == loops.__name__},
}
#: The kinds of verdicts, worst first. The last three are no findings.
WRONG, CHANGED, RAW, LEFT, REFUSED, RIGHT = "wrong", "changed", "raw", "left", "refused", "right"
FINDINGS = (WRONG, CHANGED, RAW)


@dataclass(frozen=True)
class Asked:
    """A question about a net on data, ready to be run or written down."""

    net: Net
    problem: Problem
    query: Query

    @property
    def setup(self) -> str:
        """The source of the net, the data and the loss."""
        loss = self.problem.loss
        lines = (f"loss = {loss.given}", f"whole = {loss.whole}", f"each = {loss.each}")
        return "\n\n".join((self.net.source, self.problem.data)) + "\n" + "\n".join(lines) + "\n"

    @property
    def library(self) -> str:
        return "\n".join(
            (
                "net, data = build(), batches()",
                "call = function(net)",
                f"lc = {self.problem.collection}",
                "v = PVector(lc, torch.cos(torch.arange(1, lc.numel() + 1, dtype=torch.float64)))",
                *self.query.got,
            )
        )

    @property
    def truth(self) -> str:
        """The Jacobian by loops, with which the answers to all questions about one net are made."""
        parts = [f"torch.cat([batch[{k}] for batch in batches()])" for k in self.problem.targets]
        return "\n".join(
            (
                "other = build()",
                "params = [p.requires_grad_() for p in lc.parameters(other)]",
                "run = lambda batch, call=function(other): call(batch) if isinstance(batch, dict) else call(*batch)",
                "slices = list(lc.slices().values())",
                "J, f = jacobian(run, params, batches())",
                f"targets = [{', '.join(parts)}]",
            )
        )


@dataclass(frozen=True)
class Verdict:
    """What became of a question. kind: one of the six above. detail: the error, the reason or the relative error.

    cause: the same without what differs from one case to the next.
    """

    kind: str
    detail: str
    asked: Asked | None = None

    @property
    def cause(self) -> tuple[str, str]:
        text = re.sub(r"'[^']*'|\d[\d.e+-]*|\([^()]*\)", "_", self.detail.split("\n")[0])
        if self.kind == WRONG and self.asked is not None:
            text = re.sub(r" of '.*?',| of \w+\(.*?\),|,? again", ",", self.asked.query.name)
        return self.kind, re.sub(r"(tensor _ of the data)(, tensor _ of the data)+", r"\1", text)[:160]

    @property
    def finding(self) -> bool:
        return self.kind in FINDINGS


class NoTruth(Exception):
    """The loops themselves have no answer."""


@dataclass
class Built:
    """A case with the truth that its questions share."""

    net: Net
    problem: Problem
    env: dict[str, Any]
    apart: bool


def build(case: Case) -> Built | None:
    """The net and the data of a case, and the Jacobian by loops; None if they make none."""
    with _as_in_a_script():
        net = net_of(case.net, case.steps)
        if net is None:
            return None
        problem = problem_of(case.problem, net, lambda function: _shape(net, function))
        asked = Asked(net, problem, Query("", (), ()))
        env = {**EVERYTHING, "source": net.source}
        try:
            exec(asked.setup, env)
            exec(asked.library, env)
            exec(asked.truth, env)
            f = env["f"]
            norm = float(env["J"].norm())
            fine = bool(env["J"].isfinite().all() & f.isfinite().all()) and float(f.abs().max()) < 15
            if not fine or tuple(f.shape[1:]) != problem.output or not 1e-6 < norm < 1e6:
                return None
            if not _well_conditioned(env):
                return None
            return Built(net, problem, env, _apart(env))
        except Exception:
            return None


@contextmanager
def _as_in_a_script() -> Iterator[None]:
    """Single precision by default, though all nets are in double; no warnings of torch."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float32)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        torch.set_default_dtype(before)


def judge(case: Case) -> Iterator[tuple[tuple[int, ...], Verdict, Built]]:
    """The verdicts on all questions of a case, with the numbers of each."""
    built = build(case)
    if built is None:
        return
    for numbers in case.queries:
        query = query_of(numbers, built.problem)
        if query is not None:
            with _as_in_a_script():
                verdict = _verdict(Asked(built.net, built.problem, query), built.env)
            yield numbers, verdict, built


def _verdict(asked: Asked, truth: dict[str, Any]) -> Verdict:
    env = dict(EVERYTHING)
    exec(asked.setup, env)
    start = "\n".join(asked.library.split("\n")[:4])
    exec(start, env)
    for k, p in enumerate(env["net"].parameters()):
        p.grad = torch.full_like(p, 0.5) if k % 2 and not p.is_sparse else None
    torch.manual_seed(7)
    before = state_of(env["net"], env["data"])
    try:
        exec("\n".join(asked.query.got), env)
    except Exception as error:
        after = changed(before, state_of(env["net"], env["data"]))
        if after and _own(error):
            return Verdict(CHANGED, f"after {type(error).__name__}: {', '.join(after)}", asked)
        return Verdict(REFUSED if _own(error) else RAW, f"{type(error).__name__}: {error}", asked)
    after = changed(before, state_of(env["net"], env["data"]))
    if after:
        return Verdict(CHANGED, ", ".join(after), asked)
    try:
        found = {**truth, **{k: env[k] for k in ("got", "v", "lc", "data")}}
        want, tolerance = _want(asked.query, found)
    except Exception as error:
        return Verdict(LEFT, f"loops: {type(error).__name__}: {error}", asked)
    if not bool(want.isfinite().all()):
        return Verdict(LEFT, "loops: not finite", asked)
    norm = float(truth["J"].norm())
    floor = 1e-6 * max(norm, norm**2)  # what cancels is right to rounding of what it is made of
    error = loops.relative(env["got"].detach(), want, max(floor, float(found.get("size", 0.0))))
    if "Hardsigmoid" in asked.setup:
        tolerance = max(tolerance, 1e-6)  # a sixth has single precision in torch
    if not error <= tolerance:
        return Verdict(WRONG, f"{asked.query.name}: relative error {error:.1e}", asked)
    return Verdict(RIGHT, f"{error:.1e}", asked)


def _want(query: Query, env: dict[str, Any]) -> tuple[torch.Tensor, float]:
    """The right value, and to what it is known."""
    try:
        exec("\n".join(query.want), env)
    except (RuntimeError, NotImplementedError) as error:
        if not query.hessian or "not implemented" not in str(error) or "padding_idx" in env["source"]:
            raise
        return _by_differences(query, env), max(query.tolerance, 1e-4)
    want: torch.Tensor = env["want"]
    if query.hessian:
        scale = 1e-6 + float(loops.loss_gradient(env["total"], env["params"]).norm())
        if not loops.relative(want, _by_differences(query, env), scale) < 1e-4:
            raise NoTruth("second derivatives and differences of first ones disagree")
    return want, query.tolerance


def _by_differences(query: Query, env: dict[str, Any]) -> torch.Tensor:
    v = env["v"].to_torch()
    found = loops.difference_product(env["total"], env["params"], v, 1e-6 / float(v.abs().max()))
    return v @ found if "vTMv" in query.name else found


def _own(error: BaseException) -> bool:
    """Whether an error was raised by a statement of the library, in its own words."""
    last = traceback.extract_tb(error.__traceback__)[-1]
    inside = LIBRARY in Path(last.filename).resolve().parents
    return inside and "raise" in linecache.getline(last.filename, last.lineno or 0)


def _well_conditioned(env: dict[str, Any]) -> bool:
    """Whether the kernels of torch lose no digits. Where they are wrong, formulas and kernels differ by much more."""
    J, _ = loops.jacobian(env["run"], env["params"], env["batches"](), nullcontext)
    most = 1e-7 if "Hardsigmoid" in env["source"] else 1e-10
    return not most < loops.relative(J, env["J"]) < 1e-5


def _apart(env: dict[str, Any]) -> bool:
    """Whether each example's output is what it is alone."""

    def one(batch: Any, k: int) -> Any:
        if isinstance(batch, dict):
            return {name: t[k : k + 1].clone() for name, t in batch.items()}
        return [t[k : k + 1].clone() for t in batch]

    again = torch.cat(
        [
            env["run"](one(batch, k)).detach()
            for batch in env["batches"]()
            for k in range(len(next(iter(batch.values())) if isinstance(batch, dict) else batch[0]))
        ]
    )
    f = env["f"]
    return again.shape == f.shape and bool(((again - f).abs() <= 1e-9 * (1 + f.abs().max())).all())


def _shape(net: Net, function: str) -> tuple[int, ...] | None:
    """That of the output of a function of the net for one example, None if it does not run."""
    env = dict(EVERYTHING)
    try:
        exec(net.source + "\n" + function, env)
        call = env["function"](env["build"]())
        shapes = []
        for n in LENGTHS:
            env["g"] = torch.Generator().manual_seed(1)
            given = {"x": eval(net.given.made(n), env), "z": torch.randn(n, 3, dtype=torch.float64)}
            f = call(given) if "lambda b:" in function else call(*list(given.values())[: 1 + net.given.second])
            f.sum()
            shapes.append(tuple(f.shape[1:]) if len(f) == n else None)
        return shapes[0] if shapes[0] == shapes[1] and f[0].numel() <= 8 else None
    except Exception:
        return None
