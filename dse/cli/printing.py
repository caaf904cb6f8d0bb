"""Printing helpers that several commands share."""

from __future__ import annotations

import argparse
import dataclasses
import json
from collections.abc import Callable, Sequence
from typing import Any

from rich.console import Console
from rich.table import Table

from dse.cli.options import EXIT_OK

_PIPE_WIDTH = 160  # rich assumes 80 columns if stdout is not a terminal


def print_json(document: Any) -> None:
    """Print the JSON document of `--json`."""
    print(json.dumps(document, indent=2, allow_nan=False, default=str))


def print_result(
    options: argparse.Namespace, value: Any, show: Callable[[Any], None], to_json: Callable[[Any], Any] | None = None
) -> int:
    """Print the result of a command by `show`, or with `--json` the document that `to_json` makes of it."""
    if options.json:
        print_json(value if to_json is None else to_json(value))
    else:
        show(value)
    return EXIT_OK


def as_json(value: Any) -> Any:
    """A dataclass, or a sequence of them, as JSON values; paths become strings."""
    if isinstance(value, (list, tuple)):
        return [as_json(item) for item in value]
    return json.loads(json.dumps(dataclasses.asdict(value), default=str))


def console() -> Console:
    """A console for text, without automatic highlighting and line breaks."""
    return Console(highlight=False, soft_wrap=True)


def wide_console() -> Console:
    """A console for wide tables; in a pipe it does not wrap at 80 columns."""
    found = Console(highlight=False)
    return found if found.is_terminal else Console(highlight=False, width=_PIPE_WIDTH)


def plain_table(columns: Sequence[str], left: Sequence[str]) -> Table:
    """A table without borders.

    Args:
        columns: Headings.
        left: Headings of the left-aligned columns; the others are right-aligned.
    """
    table = Table(box=None, pad_edge=False, header_style="bold")
    for column in columns:
        table.add_column(column, justify="left" if column in left else "right")
    return table


_PREFIXES = ((1.0, ""), (1e-3, "m"), (1e-6, "µ"), (1e-9, "n"))


def quantity_text(value: float | None, unit: str) -> str:
    """Three significant digits with an SI prefix: `12.3 ms`."""
    if value is None:
        return "-"
    scale, prefix = next(((s, p) for s, p in _PREFIXES if abs(value) >= s), _PREFIXES[-1])
    return f"{value / scale:.3g} {prefix}{unit}"
