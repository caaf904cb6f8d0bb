"""Text of others, put into Markdown so that it stays text."""

from __future__ import annotations

import html
import re
from collections.abc import Iterable, Sequence

__all__ = ["code", "table", "text"]

_SPECIAL = re.compile(r"([\\`*_\[\]|~$])")


def text(value: object) -> str:
    """One line of plain text: no markup, no HTML, no table cell ends in it."""
    return _SPECIAL.sub(r"\\\1", html.escape(" ".join(str(value).split()), quote=False))


def code(value: object) -> str:
    """A code span; its fence is longer than any run of backticks inside."""
    line = " ".join(str(value).split()).replace("|", "\\|")
    fence = "`" * (1 + max((len(run) for run in re.findall("`+", line)), default=0))
    padding = " " if line.startswith("`") or line.endswith("`") or not line else ""
    return f"{fence}{padding}{line}{padding}{fence}"


def table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A table, first column left and the others right; cells are Markdown already."""
    lines = [head, [":--"] + ["--:"] * (len(head) - 1), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)
