"""Markdown tables of a model card: escaping of foreign text, and the measured figures of a trial."""

from __future__ import annotations

import html
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import pandas as pd

from dse.pareto.objective import OBJECTIVES, Objective
from dse.report.trials_table import change, interval, is_predicted, number
from dse.report.units import change_text, scale_for

__all__ = ["code", "measured_figures", "table", "text"]

_SPECIAL = re.compile(r"([\\`*_\[\]|~$])")
_TASK = re.compile(r"task\.(?P<task>.+)\.(?P<metric>[^.]+)")


def text(value: object) -> str:
    """One line of plain text, escaped: no markup, no HTML, and no end of a table cell."""
    return _SPECIAL.sub(r"\\\1", html.escape(" ".join(str(value).split()), quote=False))


def code(value: object) -> str:
    """A code span whose fence is longer than any run of backticks inside."""
    line = " ".join(str(value).split()).replace("|", "\\|")
    fence = "`" * (1 + max((len(run) for run in re.findall("`+", line)), default=0))
    padding = " " if line.startswith("`") or line.endswith("`") or not line else ""
    return f"{fence}{padding}{line}{padding}{fence}"


def table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A table with the first column left-aligned and the others right-aligned; cells are Markdown."""
    lines = [head, [":--"] + ["--:"] * (len(head) - 1), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def measured_figures(row: Mapping[str, Any], dense: Mapping[str, Any]) -> str:
    """Markdown tables of the objectives and the tasks; "" if nothing was measured.

    Args:
        row: The trial's row of the trials table.
        dense: The dense model's row; may be empty.
    """
    of_point, of_dense = pd.Series(dict(row), dtype=object), pd.Series(dict(dense), dtype=object)
    objectives = [
        _objective_cells(objective, of_point, of_dense)
        for objective in OBJECTIVES.values()
        if number(of_point, objective.name) is not None
    ]
    tasks = [cells for name in of_point.index if (cells := _task_cells(str(name), of_point, of_dense)) is not None]
    tables = []
    if objectives:
        tables.append(table(("", "dense", "this model", "change [95 % interval]"), objectives))
    if tasks:
        tables.append(table(("task and metric", "dense", "this model", "documents"), tasks))
    return "\n\n".join(tables)


def _objective_cells(objective: Objective, row: pd.Series, dense: pd.Series) -> tuple[str, str, str, str]:
    value, base = number(row, objective.name), number(dense, objective.name)
    scale = scale_for(objective, (value, base))
    is_measured = not is_predicted(row, objective.name)
    spread = scale.uncertainty(value, interval(row, objective.name)) if is_measured else "(predicted)"
    of_dense = scale.uncertainty(base, interval(dense, objective.name))
    return (
        objective.label,
        f"{scale.text(base)} {of_dense}".strip(),
        f"{scale.text(value)} {spread}".strip(),
        change_text(objective, change(row, dense, objective), with_interval=True),
    )


def _task_cells(column: str, row: pd.Series, dense: pd.Series) -> tuple[str, str, str, str] | None:
    found = _TASK.fullmatch(column)
    if found is None or found["metric"] == "documents" or found["metric"].endswith("_stderr"):
        return None
    value = number(row, column)
    if value is None:
        return None
    documents = number(row, f"task.{found['task']}.documents")
    count = "n/a" if documents is None else f"{documents:.0f}"
    metric = f"{code(found['task'])} {text(found['metric'])}"
    return metric, _with_error(dense, column), _with_error(row, column), count


def _with_error(row: pd.Series, column: str) -> str:
    value, error = number(row, column), number(row, f"{column}_stderr")
    if value is None:
        return "n/a"
    return f"{value:.4g}" if error is None else f"{value:.4g} ± {error:.2g} (standard error)"
