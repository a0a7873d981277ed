"""From decisions to the source of a net: one step after the other, each kept if the net still runs with it."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from . import (
    layers,  # noqa: F401  registers its steps
    parts,
)
from .choices import Choices
from .operations import REGIONS
from .steps import STEPS, TAGS, Lines, Now

#: The number of a step that begins a region.
REGION = len(STEPS)
#: Entries of one example between steps, and parameters of a net, beyond which loops would take long.
MOST_ENTRIES = 48
#: Of the minibatches that every net runs on: a single example, and a number that no other axis has.
LENGTHS = (7, 1)
MOST_PARAMETERS = 160

NAMES: dict[str, Any] = {
    "torch": torch,
    "nn": nn,
    "F": F,
    "checkpoint": checkpoint,
    **{k: v for k, v in vars(parts).items() if k[0] != "_" and getattr(v, "__module__", "") == parts.__name__},
}


@dataclass(frozen=True)
class Input:
    """shape: of one example. indices: whether entries are classes. second: whether there is another input z."""

    shape: tuple[int, ...]
    indices: bool
    second: bool

    def made(self, n: int) -> str:
        if self.indices:
            return f"torch.randint(5, {(n, *self.shape)}, generator=g)"
        return f"torch.randn({(n, *self.shape)}, generator=g, dtype=torch.float64)"


@dataclass(frozen=True)
class Net:
    """A net in source, and what it returns for one example. double: whether it is made in single precision and cast."""

    source: str
    given: Input
    output: tuple[int, ...]
    used: tuple[str, ...]


@dataclass(frozen=True)
class _Draft:
    """The lines so far. pieces: of each step; methods: bodies of regions by name."""

    given: Input
    row: bool
    pieces: tuple[Lines, ...] = ()
    methods: tuple[tuple[str, tuple[str, ...]], ...] = ()
    used: tuple[str, ...] = ()

    def with_step(self, lines: Lines, name: str) -> _Draft:
        return replace(self, pieces=(*self.pieces, lines), used=(*self.used, name))

    @property
    def source(self) -> str:
        if self.row:
            modules = [piece.init[0].partition(" = ")[2] for piece in self.pieces]
            made = f"nn.Sequential({', '.join(modules)})"
            return f"def build():\n    torch.manual_seed(0)\n    return randomise({made}.double())\n"
        z = ", z" if self.given.second else ""
        init = ["super().__init__()", *(line for piece in self.pieces for line in piece.init)]
        forward = [*(line for piece in self.pieces for line in piece.forward), "return x"]
        bodies = [
            ("__init__(self)", init),
            *((f"{name}(self, x{z})", [*lines, "return x"]) for name, lines in self.methods),
            (f"forward(self, x{z})", forward),
        ]
        methods = [f"    def {head}:\n" + "".join(f"        {line}\n" for line in body) for head, body in bodies]
        return (
            "class Net(nn.Module):\n"
            + "\n".join(methods)
            + "\n\ndef build():\n    torch.manual_seed(0)\n    return randomise(Net().double())\n"
        )

    def shape(self) -> tuple[int, ...] | None:
        """That of the output for one example; None if the net does not run, or not on one example."""
        try:
            f = [self._run(n) for n in LENGTHS]
        except (RuntimeError, ValueError, TypeError, IndexError, AttributeError, AssertionError, NotImplementedError):
            return None
        if any(len(y) != n or y.shape[1:] != f[0].shape[1:] for y, n in zip(f, LENGTHS, strict=True)):
            return None
        return tuple(f[0].shape[1:])

    def _run(self, n: int) -> torch.Tensor:
        env = dict(NAMES)
        exec(self.source, env)
        net = env["build"]()
        params = [p for p in net.parameters() if p.requires_grad]
        if sum(p.numel() for p in params) > MOST_PARAMETERS:
            raise ValueError("too many parameters")
        for module in net.modules():
            if isinstance(module, nn.GroupNorm):
                module.register_forward_pre_hook(_only_behind_parameters)
        env["g"] = torch.Generator().manual_seed(1)
        x = eval(self.given.made(n), env)
        y = net(x, torch.randn(n, 3, dtype=torch.float64)) if self.given.second else net(x)
        if not isinstance(y, torch.Tensor) or y.ndim == 0 or not 1 <= y[0].numel() <= MOST_ENTRIES:
            raise ValueError("no tensor of a fit size")
        if y.dtype.is_floating_point and not bool((y.isfinite() & (y.abs() < 1e4)).all()):
            raise ValueError("not finite")
        if y.requires_grad:
            torch.autograd.grad(y.sum(), params, allow_unused=True)
        return y

    def now(self, shape: tuple[int, ...]) -> Now:
        env = dict(NAMES)
        exec(self.source, env)
        net = env["build"]()
        named = tuple((name, tuple(p.shape)) for name, p in net.named_parameters())
        modules = tuple(n for n, m in net.named_children() if not isinstance(m, nn.ParameterList | nn.ParameterDict))
        indices = self.given.indices and not self.pieces
        return Now(shape, indices, named, modules, self.given.second)


def _only_behind_parameters(module: nn.Module, args: Any) -> None:
    """The backward of torch 2.13 ends the process where it is asked for the weight alone, channels last."""
    if args[0].ndim > 3 and not args[0].requires_grad:
        raise ValueError("a group norm of what has no gradient")


def draw(rng: random.Random, only: str | None = None) -> tuple[tuple[int, ...], tuple[tuple[int, ...], ...]]:
    """Random decisions for a net. only: the tag of a step that should come often."""
    net = [rng.randrange(64) for _ in range(12)]
    fit = set(TAGS["module"]) if net[0] % 3 == 1 else set(range(REGION + 1))
    steps: list[tuple[int, ...]] = []
    kind = None
    for _ in range(rng.choice((1, 2, 3, 4, 5, 6, 8))):
        after_layer = kind in TAGS["layer"]
        if only is not None and rng.random() < 0.4:
            wanted = TAGS[only]
        elif rng.random() < 0.25:
            wanted = TAGS["in-place"] if after_layer else TAGS["layer"]
        else:
            wanted = [*range(REGION), *[REGION] * 5]
        if not steps and rng.random() < 0.8:  # so that few change what they are given
            wanted = sorted(set(wanted) - set(TAGS["in-place"])) or wanted
        kind = rng.choice([k for k in wanted if k in fit] or sorted(fit))
        steps.append((kind, *(rng.randrange(64) for _ in range(10))))
    return tuple(net), tuple(steps)


def net_of(net: Sequence[int], steps: Sequence[Sequence[int]]) -> Net | None:
    """The net that these decisions make, None if there is none."""
    c = Choices(net)
    row = c.of(["class", "row", "class"]) == "row"
    draft = _Draft(_input(c, second=not row and c.once_in(5)), row)
    shape = draft.given.shape
    region: tuple[Choices, int, int] | None = None
    for k, numbers in enumerate(steps):
        if region is not None and region[2] == 0:
            (draft, shape), region = _close(draft, shape, *region[:2]), None
        if region is not None:
            region = (region[0], region[1], region[2] - 1)
        if numbers[0] % (REGION + 1) == REGION:
            if region is None and not row:
                inner = Choices(numbers[1:])
                region = (inner, len(draft.pieces), 1 + inner.below(3))
            continue
        taken = _take(draft, shape, numbers, f"m{k}")
        if taken is not None:
            draft, shape = taken
    if region is not None:
        draft, shape = _close(draft, shape, *region[:2])
    return _finish(c, draft, shape)


def _input(c: Choices, second: bool) -> Input:
    size = [3, 4, 2, 1]
    axes = c.of([1, 2, 3, 2, 1, 3, 4])
    indices = c.once_in(5) and axes <= 2
    shape = tuple(c.of(size if axes < 4 else [2, 3]) for _ in range(axes))
    return Input(shape, indices, second)


def _take(
    draft: _Draft, shape: tuple[int, ...], numbers: Sequence[int], name: str
) -> tuple[_Draft, tuple[int, ...]] | None:
    if not shape:  # one number for each example
        return None
    one = STEPS[numbers[0] % (REGION + 1)]
    found = one(Choices(numbers[1:]), draft.now(shape))
    if found is None or (draft.row and not (found.plain and len(found.init) == 1)):
        return None
    lines = Lines(*(tuple(line.replace("{m}", name) for line in part) for part in (found.init, found.forward)))
    grown = draft.with_step(lines, one.__name__)
    after = grown.shape()
    return None if after is None else (grown, after)


def _close(draft: _Draft, shape: tuple[int, ...], c: Choices, start: int) -> tuple[_Draft, tuple[int, ...]]:
    """With the steps from ``start`` on in a method of their own, if the net runs with that."""
    inside = draft.pieces[start:]
    form = c.of(REGIONS)
    name = f"part{len(draft.methods)}"
    call = form.replace("{r}", name).replace("{z}", ", z" if draft.given.second else "")
    made = tuple(line for piece in inside for line in piece.init)
    body = tuple(line for piece in inside for line in piece.forward)
    closed = replace(
        draft,
        pieces=(*draft.pieces[:start], Lines(made, (call,))),
        methods=(*draft.methods, (name, body)),
        used=(*draft.used, form.replace("{r}", "").replace("{z}", "")),
    )
    after = closed.shape() if body else None
    return (draft, shape) if after is None else (closed, after)


def _finish(c: Choices, draft: _Draft, shape: tuple[int, ...]) -> Net | None:
    """With a head that leaves few outputs."""
    k = c.of([3, 2, 1, 2, 4])
    entries = 1
    for length in shape:
        entries *= length
    flat = Lines(("self.head_flat = nn.Flatten()",), ("x = self.head_flat(x)",), plain=True)
    linear = Lines((f"self.head = nn.Linear({entries}, {k})",), ("x = self.head(x)",), plain=True)
    own = Lines((f"self.head = nn.Linear({(shape or (1,))[-1]}, {min(k, 2)})",), ("x = self.head(x)",), plain=True)
    heads: list[tuple[Lines, ...]] = [
        (linear,) if len(shape) == 1 else (flat, linear),
        (),
        (Lines((), ("x = x.flatten(1)[:, :4]",)),),
        (Lines((), ("x = x[..., :3]",)),),
        (own,),
    ]
    first = c.of([0, 0, 0, 1, 2, 3, 4])
    for head in (heads[first], *heads):
        if draft.row and not all(lines.plain for lines in head):
            continue
        grown = draft
        for lines in head:
            grown = grown.with_step(lines, "head")
        after = grown.shape()
        if after is not None and torch.Size(after).numel() <= 8:
            return _checked(grown, after)
    return None


def _checked(draft: _Draft, output: tuple[int, ...]) -> Net | None:
    if not draft.pieces or not any(shape for _, shape in draft.now(output).named):
        return None
    return Net(draft.source, draft.given, output, draft.used)
