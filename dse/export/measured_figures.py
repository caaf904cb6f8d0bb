"""What a study measured of a point, as tables for its model card."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import pandas as pd

from dse.export.markdown import code, table, text
from dse.pareto.objective import OBJECTIVES, Objective
from dse.report.columns import change, interval, is_predicted, number
from dse.report.units import change_text, scale_for

__all__ = ["measured_figures"]

_TASK = re.compile(r"task\.(?P<task>.+)\.(?P<metric>[^.]+)")
_NOT_METRICS = ("documents",)


def measured_figures(row: Mapping[str, Any], dense: Mapping[str, Any]) -> str:
    """Markdown tables of the objectives and of the tasks; "" where nothing was measured.

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
    if found is None or found["metric"] in _NOT_METRICS or found["metric"].endswith("_stderr"):
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
