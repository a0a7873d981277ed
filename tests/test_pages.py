"""Every block of Python on a page of the documentation runs, from top to bottom, as its reader would run it.

``>>>`` is a doctest. Other blocks are executed. What a page takes for granted (a model, data) is in blocks called
testsetup, which are run in their place and are not shown.
"""

import doctest
import importlib
import re
from pathlib import Path
from textwrap import dedent

import pytest
import torch
import torch.distributed as dist

DOCS = Path(__file__).parents[1] / "docs"
GENERATED = {"_build", "gallery", "extending.rst"}  # the code of the last is held to by test_extending.py
PAGES = sorted(p for e in ("rst", "md") for p in DOCS.rglob(f"*.{e}") if p.relative_to(DOCS).parts[0] not in GENERATED)
FLAGS = doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE
_RST = re.compile(
    r"^(?P<i> *)\.\. (?:code-block:: python|testsetup::) *\n(?:(?P=i) +:.*\n)*\s*\n(?P<b>(?:(?P=i) +\S.*\n|\s*\n)+)",
    re.M,
)
_MD = re.compile(r"^(?:```python|<!-- testsetup) *\n(?P<b>.*?)^(?:```|-->) *$", re.M | re.S)
_PROMPTS = re.compile(r"^>>> .*\n(?:.*\S.*\n)*", re.M)


def blocks_of(page):
    """Line and text of each block."""
    text = page.read_text() + "\n"
    found = [(m.start("b"), dedent(m["b"])) for m in (_RST if page.suffix == ".rst" else _MD).finditer(text)]
    found += [(m.start(), m[0]) for m in _PROMPTS.finditer(text) if page.suffix == ".rst"]
    return [(text[:k].count("\n") + 1, block) for k, block in sorted(found)]


def run(block, names, page, line):
    if ">>>" in block:
        test = doctest.DocTestParser().get_doctest(block, names, page.name, str(page), line - 1)
        said = []
        runner = doctest.DocTestRunner(optionflags=FLAGS)
        runner.run(test, out=said.append, clear_globs=False)
        assert not runner.failures, "".join(said)
        names.update(test.globs)
    else:
        exec(compile("\n" * (line - 1) + block, str(page), "exec"), names)


@pytest.mark.parametrize("page", [p for p in PAGES if blocks_of(p)], ids=lambda p: str(p.relative_to(DOCS)))
def test_the_code_of_a_page_runs(page, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    dtype = torch.get_default_dtype()
    names = {"__name__": page.stem}
    try:
        for line, block in blocks_of(page):
            run(block, names, page, line)
    finally:
        torch.set_default_dtype(dtype)
        if dist.is_initialized():
            dist.destroy_process_group()


def test_pages_are_found():
    assert {"concepts.rst", "functionspace.rst"} <= {p.name for p in PAGES if blocks_of(p)}


_ENTRY = re.compile(r"^\.\. auto(?P<kind>module|class|function):: (?P<name>[\w.]+)\n(?P<options>(?:   .*\n)*)", re.M)
_ROLE = re.compile(r":(?:class|func|meth|attr|mod):`~?(nngeometry[\w.]*)`")


def documented():
    """What the pages of the reference have an entry for."""
    found = set()
    for page in (DOCS / "reference").glob("*.rst"):
        for match in _ENTRY.finditer(page.read_text() + "\n"):
            name, members = match["name"], re.search(r":members: (.+)", match["options"])
            found.add(name)
            if match["kind"] == "module":
                module = importlib.import_module(name)
                own = [n for n, o in vars(module).items() if getattr(o, "__module__", None) == name]
                names = members[1].split(", ") if members else getattr(module, "__all__", own)
                found |= {f"{name}.{n}" for n in names}
    return found


def test_what_pages_refer_to_is_in_the_reference():
    known = documented()
    for page in (p for p in PAGES if p.suffix == ".rst"):
        for name in _ROLE.findall(page.read_text()):
            assert name in known or name.rpartition(".")[0] in known, f"{page.name}: no entry for {name}"
