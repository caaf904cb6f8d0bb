"""The front as text: rows of formatted cells, a Rich table, aligned plain text, and JSON records."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import pandas as pd
from rich import box
from rich.table import Table
from rich.text import Text

from dse.pareto.objective import Objective
from dse.report.tied_trials import tied_table
from dse.report.trials_table import change, front_table, interval, is_predicted, number, numbers, require_columns
from dse.report.units import Scale, change_text, percent, scale_for
from dse.trial_record import json_safe

__all__ = [
    "FrontCell",
    "FrontRow",
    "aligned",
    "format_front",
    "format_tied",
    "front_cell",
    "front_rows",
    "front_text",
    "tied_rows",
    "tied_text",
    "to_records",
]

_WIDE = 110
"""In narrower terminals the change from dense goes below its value."""

_TIED = "Tied with the front (dominated, but only by differences within noise in every objective):"


@dataclass(frozen=True)
class FrontCell:
    """One objective of one trial, formatted.

    Attributes:
        value: Number and unit: `41.2 ms`.
        uncertainty: `±1.1`; "predicted" if it was not measured; "" if unknown.
        change: Change from dense: `-3.1 pts`, `x0.93`; `reference` in the dense row.
        change_interval: The same with its 95 % interval if known.
        si: The value in the unit of the trials table; None if not measured.
    """

    value: str
    uncertainty: str
    change: str
    change_interval: str
    si: float | None

    @property
    def measured(self) -> str:
        """`41.2 ms ±1.1`."""
        return f"{self.value} {self.uncertainty}".rstrip()


@dataclass(frozen=True)
class FrontRow:
    """One trial on the front or tied with it, formatted; `tied_with` is the front trial, None on the front."""

    trial: int
    point_id: str
    reduction: str
    reduction_value: float | None
    is_dense: bool
    on_front: bool
    cells: tuple[FrontCell, ...]
    tied_with: int | None = None


def front_rows(front: pd.DataFrame, objectives: Sequence[Objective]) -> list[FrontRow]:
    """Format the rows of a front table, with one unit per column.

    Args:
        front: The result of `front_table`.
        objectives: Columns to show.

    Raises:
        ConfigError: A column is missing.
    """
    names = [objective.name for objective in objectives]
    require_columns(front, ("trial", "point_id", "reduction", "is_dense", "on_front", *names))
    scales = [scale_for(objective, numbers(front, objective.name)) for objective in objectives]
    dense = next((row for _, row in front.iterrows() if row["is_dense"]), None)
    rows = []
    for _, row in front.iterrows():
        cells = tuple(front_cell(row, dense, o, s) for o, s in zip(objectives, scales, strict=True))
        reduction, tied_with = number(row, "reduction"), number(row, "tied_with")
        rows.append(
            FrontRow(
                trial=int(row["trial"]),
                point_id="dense" if row["is_dense"] else str(row["point_id"]),
                reduction=percent(reduction),
                reduction_value=reduction,
                is_dense=bool(row["is_dense"]),
                on_front=bool(row["on_front"]),
                cells=cells,
                tied_with=None if tied_with is None else int(tied_with),
            )
        )
    return rows


def tied_rows(trials: pd.DataFrame, objectives: Sequence[Objective]) -> list[FrontRow]:
    """Format the trials that are tied with the front, in the units of the front's table.

    Args:
        trials: The trials table with `tied_with` (see `mark_ties`); without that column there are no ties.
        objectives: Columns to show.
    """
    tied, front = tied_table(trials.assign(is_dense=False)), front_table(trials, objectives)
    if tied.empty:
        return []
    both = pd.concat([front, tied[~tied["trial"].isin(front["trial"])]], ignore_index=True)
    return [row for row in front_rows(both, objectives) if row.tied_with is not None]


def front_cell(row: pd.Series, dense: pd.Series | None, objective: Objective, scale: Scale) -> FrontCell:
    """Format one objective of one trial; `dense` is the dense model's row, None if unknown."""
    value = number(row, objective.name)
    if dense is not None and row["trial"] == dense["trial"]:
        changed = with_interval = "reference"
    else:
        against = change(row, dense, objective)
        changed, with_interval = change_text(objective, against), change_text(objective, against, with_interval=True)
    uncertainty = (
        "predicted" if is_predicted(row, objective.name) else scale.uncertainty(value, interval(row, objective.name))
    )
    return FrontCell(scale.text(value), uncertainty, changed, with_interval, value)


def format_front(
    front: pd.DataFrame, objectives: Sequence[Objective], *, title: str | None = None, width: int | None = None
) -> Table:
    """The front as a table for the terminal.

    Args:
        front: The result of `front_table`.
        objectives: Columns to show, each with unit, uncertainty and change from dense.
        title: Line above the table; shown verbatim, without markup.
        width: Width of the terminal in characters; below 110 the change goes below its value.

    Raises:
        ConfigError: A column is missing.
    """
    rows = front_rows(front, objectives)
    stacked = width is not None and width < _WIDE
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, collapse_padding=stacked, title_justify="left")
    table.title = None if title is None else Text(title)
    table.add_column("trial", justify="right", no_wrap=True)
    table.add_column("point", no_wrap=True)
    table.add_column("reduction", justify="right", no_wrap=True)
    for objective in objectives:
        table.add_column(Text(objective.label.lower()), justify="right", no_wrap=not stacked, min_width=10)
        if not stacked:
            table.add_column("vs dense", justify="right", no_wrap=True)
    for row in rows:
        cells = [Text(str(row.trial)), Text(row.point_id), Text(row.reduction)]
        for cell in row.cells:
            under = "" if row.is_dense else f"\n{cell.change}"
            cells += [Text(f"{cell.measured}{under}")] if stacked else [Text(cell.measured), Text(cell.change)]
        table.add_row(*cells, style="bold" if row.is_dense else None)
    table.caption = Text(_caption(rows))
    table.caption_justify = "left"
    return table


def front_text(front: pd.DataFrame, objectives: Sequence[Objective]) -> str:
    """The front as aligned plain text for pipes and logs, one line per point, without a final line break.

    Raises:
        ConfigError: A column is missing.
    """
    rows = front_rows(front, objectives)
    lines = [["trial", "point", "reduction"]]
    for objective in objectives:
        lines[0] += [objective.label.lower(), "vs dense"]
    for row in rows:
        line = [str(row.trial), " ".join(row.point_id.split()), row.reduction]
        for cell in row.cells:
            line += [cell.measured, cell.change]
        lines.append(line)
    return "\n".join([*aligned(lines, left=(1,)), _caption(rows)])


def format_tied(trials: pd.DataFrame, objectives: Sequence[Objective]) -> Table | None:
    """The trials that are tied with the front as a table for the terminal; None if there are none."""
    lines = _tied_lines(trials, objectives)
    if not lines:
        return None
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, title=Text(_TIED), title_justify="left")
    for column, name in enumerate(lines[0]):
        table.add_column(Text(name), justify="left" if column == 2 else "right", overflow="fold")
    for line in lines[1:]:
        table.add_row(*map(Text, line))
    return table


def tied_text(trials: pd.DataFrame, objectives: Sequence[Objective]) -> str:
    """The trials that are tied with the front as aligned plain text; "" if there are none."""
    lines = _tied_lines(trials, objectives)
    return "\n".join([_TIED, *aligned(lines, left=(2,))]) if lines else ""


def _tied_lines(trials: pd.DataFrame, objectives: Sequence[Objective]) -> list[list[str]]:
    rows = tied_rows(trials, objectives)
    if not rows:
        return []
    lines = [["trial", "tied with", "point", "reduction", *(objective.label.lower() for objective in objectives)]]
    for row in rows:
        measured = (cell.measured for cell in row.cells)
        lines.append([str(row.trial), str(row.tied_with), " ".join(row.point_id.split()), row.reduction, *measured])
    return lines


def aligned(lines: Sequence[Sequence[str]], left: Sequence[int] = ()) -> list[str]:
    """Align the cells of a table, with two spaces between columns.

    Args:
        lines: One sequence of cells per line, all of equal length.
        left: Left-aligned columns; the others are right-aligned.
    """
    widths = [max(len(line[column]) for line in lines) for column in range(len(lines[0]))]
    return [
        "  ".join(
            text.ljust(size) if column in left else text.rjust(size)
            for column, (text, size) in enumerate(zip(line, widths, strict=True))
        ).rstrip()
        for line in lines
    ]


def _caption(rows: Sequence[FrontRow]) -> str:
    count = sum(row.on_front for row in rows)
    text = f"{count} {'point' if count == 1 else 'points'} on the front"
    if any(row.is_dense and not row.on_front for row in rows):
        text += "; the dense model is listed for comparison and is not on the front"
    return f"{text}. ± is a 95 % interval."


def to_records(front: pd.DataFrame) -> list[dict[str, Any]]:
    """The table as JSON-safe records: SI values, not rounded; NaN, NA and infinities become None."""
    rows = front.to_dict(orient="records")
    return [{str(k): None if v is pd.NA or v is pd.NaT else json_safe(v) for k, v in row.items()} for row in rows]
