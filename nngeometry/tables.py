"""Tables, for terminals and for notebooks."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape


def as_html(title: str, header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table, whose first column is of words and whose others are of numbers, with a title above.

    >>> as_html("", ["layer", "size"], [["a<b", "3"]]).count("<td")
    2
    """
    above = f"<p><b>{escape(title)}</b></p>" if title else ""
    left, right = (f' style="text-align:{side}"' for side in ("left", "right"))

    def line(cells: Sequence[str], tag: str) -> str:
        of = (f"<{tag}{left if k == 0 else right}>{escape(cell)}</{tag}>" for k, cell in enumerate(cells))
        return f"<tr>{''.join(of)}</tr>"

    body = "".join(line(row, "td") for row in rows)
    return f"{above}<table><thead>{line(header, 'th')}</thead><tbody>{body}</tbody></table>"


def number(value: float, error: float = 0.0) -> str:
    """Four digits, with the standard error if there is one; what is not a number is said to be unknown.

    >>> number(3.14159), number(3.14159, 0.02), number(314.159, 23.0), number(314159.0, 23.0), number(float("nan"))
    ('3.142', '3.142 ± 0.02', '314.2 ± 20', '3.142e+05 ± 2e+01', 'unknown')
    """
    if value != value:
        return "unknown"
    if error != error:
        return f"{value:.4g} ± unknown"
    shown, of = f"{value:.4g}", f"{error:.1g}"
    if "e" not in shown:
        of = f"{float(of):g}"
    return f"{shown} ± {of}" if error else shown
