"""Formulas as MathML, which browsers show by themselves: no script, nothing to load."""

from __future__ import annotations

from typing import Any

from docutils import nodes
from docutils.utils.math import latex2mathml
from sphinx.application import Sphinx


def _formula(self: Any, node: nodes.Element) -> None:
    self.body.append(f'<span class="math">{latex2mathml.tex2mathml(node.astext())}</span>')
    raise nodes.SkipNode


def _display(self: Any, node: nodes.Element) -> None:
    text = node.astext()
    code = rf"\begin{{align*}}{text}\end{{align*}}" if r"\\" in text else text
    self.body.append(f'<div class="math">{latex2mathml.tex2mathml(code, as_block=True)}</div>')
    raise nodes.SkipNode


def setup(app: Sphinx) -> dict[str, bool]:
    app.add_html_math_renderer("mathml", (_formula, None), (_display, None))
    return {"parallel_read_safe": True, "parallel_write_safe": True}
