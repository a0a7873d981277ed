"""A case as a script that needs nothing but the library and torch."""

from __future__ import annotations

import ast
import inspect
import re
import types
from collections.abc import Callable

import nngeometry

from . import loops, parts
from .choices import Case
from .judge import Asked, Verdict


def script(verdict: Verdict, case: Case | None = None) -> str:
    """The source of the net, of the question and of the loops, which prints the relative error."""
    asked = verdict.asked
    assert asked is not None
    body = "\n".join((asked.setup, asked.library, "", asked.truth, *asked.query.want))
    helpers = _helpers(body)
    everything = "\n".join((helpers, body))
    public = [name for name in nngeometry.__all__ if re.search(rf"\b{name}\b", body)]
    size = asked.query.size
    lines = [
        f'"""{verdict.kind}: {_words(verdict.detail)}"""',
        *(f"import {m}" if m == "torch" else f"from {m}" for m in _imports(everything)),
        f"from nngeometry import {', '.join(public)}",
        "",
        "",
        helpers,
        "",
        asked.setup,
        asked.library,
        "print('data and parameters are as before:', same())" if verdict.kind == "changed" else "",
        f"# {asked.query.name}, by loops on a fresh copy",
        asked.truth,
        *asked.query.want,
        f"print('relative error', relative(got, want, {size}))",
    ]
    if verdict.kind == "changed":
        lines[lines.index(asked.library)] = _watched(asked)
    if case is not None:
        lines.append(f"# {case.to_json()}")
    return re.sub(r"\n{4,}", "\n\n\n", "\n".join(lines)) + "\n"


def _watched(asked: Asked) -> str:
    start, rest = asked.library.split("\n")[:4], asked.library.split("\n")[4:]
    watch = (
        "rows = [list(batch.values() if isinstance(batch, dict) else batch) for batch in data]",
        "tensors = [*net.parameters(), *net.buffers(), *sum(rows, [])]",
        "held = [t.detach().clone() for t in tensors]",
        "same = lambda: [torch.equal(a, b) for a, b in zip(tensors, held)]",
    )
    body = [f"    {line}" for line in rest]
    return "\n".join((*start, *watch, "try:", *body, "finally:", "    print('as before:', same())"))


def _helpers(text: str) -> str:
    """The functions and classes of ours that a source uses, and those that these use."""
    known: dict[str, Callable[..., object] | type] = {
        name: value
        for place in (parts, loops)
        for name, value in vars(place).items()
        if isinstance(value, types.FunctionType | type) and value.__module__ == place.__name__
    }
    found: dict[str, str] = {"relative": inspect.getsource(known["relative"])}
    pending = [text]
    while pending:
        text = pending.pop()
        for name, value in known.items():
            if name not in found and re.search(rf"\b{name}\b", text):
                found[name] = inspect.getsource(value)
                pending.append(found[name])
    return "\n\n".join(found[name] for name in known if name in found)


def _imports(text: str) -> list[str]:
    wanted = {
        "collections.abc import Callable, Iterator, Sequence": r"\b(Callable|Iterator|Sequence)\b",
        "contextlib import contextmanager": r"\bcontextmanager\b",
        "typing import Any": r"\bAny\b",
        "unittest import mock": r"\bmock\b",
        "torch": "",
        "torch import Tensor, nn": r"\b(Tensor|nn)\b",
        "torch.nn import functional as F": r"\bF\.|\bF,",
        "torch.nn.attention import SDPBackend, sdpa_kernel": r"\bSDPBackend\b",
        "torch.utils.checkpoint import checkpoint": r"\bcheckpoint\(",
    }
    return [name for name, pattern in wanted.items() if re.search(pattern, text)]


def _words(text: str) -> str:
    return text.replace("\\", "/").replace('"""', "'''")[:300]


def check(source: str) -> None:
    """Raise if a script is no valid source."""
    ast.parse(source)
