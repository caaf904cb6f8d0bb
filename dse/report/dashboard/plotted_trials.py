"""The trials of a plot: the table with the pending trials, their groups, and their hover texts."""

from __future__ import annotations

import functools
import html
import math
from typing import Any

import numpy as np
import numpy.typing as npt
import pandas as pd

from dse.report.dashboard.axis_values import AxisChoice, axis_values
from dse.report.dashboard.snapshot import StudySnapshot
from dse.report.dashboard.trial_groups import groups_of
from dse.report.units import percent

__all__ = ["plotted_trials", "prepared_trials"]

Mask = npt.NDArray[np.bool_]


@functools.lru_cache(maxsize=4)
def prepared_trials(snapshot: StudySnapshot) -> tuple[pd.DataFrame, dict[str, Mask], list[str]]:
    """Table, groups and hover texts, which every view of a snapshot shares."""
    trials = plotted_trials(snapshot)
    groups = groups_of(trials)
    state = trials["state"].to_numpy() if len(trials) else np.zeros(0, dtype=object)
    groups["pending"] = np.isin(state, ("running", "queued"))
    return trials, groups, _hover_texts(snapshot, trials)


def plotted_trials(snapshot: StudySnapshot) -> pd.DataFrame:
    """The trials table with the pending trials at its end, of which only exact costs are known."""
    table, pending = snapshot.trials, snapshot.pending
    if not pending:
        return table
    names = ["trial", "state", "feasible", "point_id", "origin", "reason", "decomposed_tensors", "reduction"]
    names += [entry.name for entry in snapshot.objectives]
    if table.empty:
        table = pd.DataFrame({name: pd.Series(dtype=object) for name in [*names, "on_front", "tied_with"]})
    count = len(table)
    grown = table.reset_index(drop=True).reindex(range(count + len(pending)))
    for column in ("feasible", "on_front"):
        grown[column] = [*table[column].tolist(), *([column == "feasible"] * len(pending))]
    columns: dict[str, list[Any]] = {
        "trial": [entry.trial for entry in pending],
        "state": [entry.state for entry in pending],
        "point_id": [entry.point_id for entry in pending],
        "origin": [entry.origin for entry in pending],
    }
    for name in dict.fromkeys(name for entry in pending for name in entry.known):
        columns[name] = [entry.known.get(name, math.nan) for entry in pending]
    for name, values in columns.items():
        before = table[name].tolist() if name in table.columns else [math.nan] * count
        grown[name] = [*before, *values]
        if name in pending[0].known:
            grown[name] = pd.to_numeric(grown[name])
    return grown


def _hover_texts(snapshot: StudySnapshot, trials: pd.DataFrame) -> list[str]:
    """One text per trial, escaped, since Plotly interprets some HTML in hover labels."""
    if trials.empty:
        return []
    choices = [AxisChoice(entry.name, entry.label, entry, True) for entry in snapshot.objectives]
    plain = [axis_values(trials, choice, relative=False) for choice in choices]
    against = [axis_values(trials, choice, relative=True) for choice in choices]
    reduction = pd.to_numeric(trials["reduction"], errors="coerce").to_numpy(dtype=float)
    texts = []
    for row, (trial, state, point, origin, reason) in enumerate(
        zip(*(trials[name].tolist() for name in ("trial", "state", "point_id", "origin", "reason")), strict=True)
    ):
        lines = [f"<b>Trial {int(trial)}</b>  {html.escape(str(point))}", f"{state}, {percent(reduction[row])} removed"]
        for absolute, relative in zip(plain, against, strict=True):
            value = absolute.value[row]
            if math.isfinite(value):
                change = f"  ({relative.text(relative.value[row])})" if relative.is_relative else ""
                mark = "estimate " if absolute.is_estimate[row] else ""
                lines.append(f"{absolute.choice.label.lower()} {mark}{absolute.text(value)}{change}")
        lines.append(f"proposed by {html.escape(str(origin))}")
        if isinstance(reason, str) and reason and state != "complete":
            lines.append(html.escape(reason[:90]))
        texts.append("<br>".join(lines))
    return texts
