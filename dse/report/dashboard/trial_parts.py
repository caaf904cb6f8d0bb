"""Parts of the page about trials: the table of those shown, and two of them side by side."""

from __future__ import annotations

import math
import shlex
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
from dash import dcc, html

from dse.evaluation.paired_comparison import MEAN, Comparison
from dse.evaluation.statistics.power import documents_to_settle
from dse.pareto.objective import OBJECTIVES
from dse.report.dashboard.axis_values import AxisChoice, axis_values
from dse.report.dashboard.snapshot import CostChange, PairedTrials, StudySnapshot
from dse.report.dashboard.trial_groups import GROUPS, groups_of
from dse.report.explanation import origin_text
from dse.report.text_tables import front_cell
from dse.report.trials_table import dense_row, numbers
from dse.report.units import percent, points, scale_for
from dse.trial_record import TrialRecord

__all__ = ["commands_of", "differences_part", "commands_part", "choice_text", "head_part", "trial_options", "trials_part"]

_MOST_ROWS = 60
_SIGNIFICANCE = 0.05
_EXACT = ("parameters", "weight_bytes")


def trial_options(snapshot: StudySnapshot) -> list[dict[str, Any]]:
    """The complete trials, the front first, as options of a dropdown."""
    table = snapshot.trials
    if table.empty:
        return []
    groups = groups_of(table)
    words = {"dense": "dense", "front": "front", "tied": "tied"}
    found = []
    for row, (trial, state, reduction) in enumerate(
        zip(table["trial"], table["state"], numbers(table, "reduction"), strict=True)
    ):
        if state == "complete":
            group = next((name for name in words if groups[name][row]), "")
            note = f", {words[group]}" if group else ""
            label = f"Trial {int(trial)}: {percent(float(reduction))} removed{note}"
            order = list(words).index(group) if group else len(words)
            found.append((order, int(trial), {"label": label, "value": int(trial)}))
    return [option for _, _, option in sorted(found, key=lambda entry: entry[:2])]


def trials_part(snapshot: StudySnapshot, kept: np.ndarray, show: str) -> Any:
    """A table of trials: the text alternative to the plot.

    Args:
        snapshot: The study.
        kept: Mask of the trials inside the chosen ranges.
        show: `front` (with ties and dense), `complete`, or `all`.
    """
    table = snapshot.trials
    if table.empty:
        return html.P("No trial is finished yet. The table fills by itself.", className="empty")
    groups = groups_of(table)
    wanted = groups["front"] | groups["tied"] | groups["dense"]
    if show == "complete":
        wanted = wanted | groups["dominated"]
    elif show == "all":
        wanted = np.ones(len(table), dtype=bool)
    rows = np.flatnonzero(wanted & kept)
    order = np.lexsort((table["trial"].to_numpy()[rows], numbers(table, "reduction")[rows]))
    rows = rows[order]
    dense = dense_row(table)
    scales = [scale_for(objective, numbers(table, objective.name)) for objective in snapshot.objectives]
    names = {row: name for name, mask in groups.items() for row in np.flatnonzero(mask)}
    lines = []
    for row in rows[:_MOST_ROWS]:
        entry = table.iloc[int(row)]
        cells = []
        for objective, scale in zip(snapshot.objectives, scales, strict=True):
            cell = front_cell(entry, dense, objective, scale)
            cells.append(html.Td([cell.measured, html.Small(cell.change_interval)]))
        state = GROUPS.get(names.get(int(row), ""), "Repetition")
        reason = entry["reason"] if isinstance(entry["reason"], str) and entry["state"] != "complete" else ""
        lines.append(
            html.Tr(
                [
                    html.Th(str(int(entry["trial"])), scope="row"),
                    html.Td([state, html.Small(reason[:120])] if reason else state, className="text"),
                    html.Td(percent(float(entry["reduction"]))),
                    *cells,
                ],
                className="dense" if names.get(int(row)) == "dense" else "",
            )
        )
    heads = ["Trial", "Group", "Removed", *(objective.label for objective in snapshot.objectives)]
    more = len(rows) - len(lines)
    note = "± and brackets are 95 % intervals; the second line of a cell is the change from dense."
    note += f" {more:,} more trials are not listed: narrow the ranges." if more > 0 else ""
    return html.Div(
        [
            html.Div(
                html.Table(
                    [
                        html.Caption("Trials inside the chosen ranges", className="hidden"),
                        html.Thead(html.Tr([html.Th(head, scope="col") for head in heads])),
                        html.Tbody(lines),
                    ]
                ),
                className="scroll",
                tabIndex="0",
                role="region",
                **{"aria-label": "Table of trials"},
            ),
            html.P(note, className="note"),
        ]
    )


def head_part(snapshot: StudySnapshot, letter: str, trial: int | None) -> Any:
    """One of the two chosen trials: what it is and where it comes from."""
    record = None if trial is None else snapshot.records.get(trial)
    if record is None:
        return html.P(f"Choose trial {letter}: click a point of the plot, or use the list.", className="empty")
    groups = groups_of(snapshot.trials)
    row = int(np.flatnonzero(snapshot.trials["trial"].to_numpy() == record.trial)[0])
    group = next((GROUPS[name] for name, mask in groups.items() if mask[row]), "Repetition")
    facts = [
        ("Trial", str(record.trial)),
        ("Group", group),
        ("Point", record.point_id),
        ("Parameters removed", percent(float(record.cost.get("reduction", math.nan)))),
        ("Proposer", origin_text(record.origin)),
        ("Why", record.why),
        ("Reason", record.reason),
    ]
    return html.Dl([part for name, text in facts if text for part in (html.Dt(name), html.Dd(text))])


def differences_part(snapshot: StudySnapshot, first: int, second: int, found: PairedTrials | str) -> Any:
    """Every quantity of two trials with the paired difference; a text says why they cannot be paired."""
    rows = []
    if isinstance(found, str):
        rows += list(_unpaired_rows(snapshot, first, second))
    else:
        rows += [_quality_row(row) for row in found.quality] + [_cost_row(cost) for cost in found.costs]
    heads = ["Quantity", "A", "B", "B against A", "95 % interval", "Settled?"]
    parts: list[Any] = []
    if isinstance(found, str):
        parts.append(html.P(found, className="note"))
    parts.append(
        html.Div(
            html.Table(
                [
                    html.Caption(f"Trial {first} (A) and trial {second} (B)", className="hidden"),
                    html.Thead(html.Tr([html.Th(head, scope="col") for head in heads])),
                    html.Tbody([html.Tr([html.Th(row[0], scope="row"), *map(html.Td, row[1:])]) for row in rows]),
                ]
            ),
            className="scroll",
            tabIndex="0",
            role="region",
            **{"aria-label": "Differences of the two trials"},
        )
    )
    return html.Div(parts)


def _unpaired_rows(snapshot: StudySnapshot, first: int, second: int) -> Iterator[list[str]]:
    a, b = snapshot.records[first], snapshot.records[second]
    for objective in snapshot.objectives:
        scale = scale_for(objective, (a.value(objective.name), b.value(objective.name)))
        yield [objective.label, scale.text(a.value(objective.name)), scale.text(b.value(objective.name)), "", "", ""]


def _quality_row(row: Comparison) -> list[str]:
    task = "All tasks" if row.task == MEAN else row.task
    values = [_value_text(value, row.metric) for value in (row.first, row.second)]
    if row.change is None:
        return [f"{task}: {row.metric}", *values, "not paired", "", ""]
    ends = ""
    if row.low is not None and row.high is not None:
        ends = f"{_change_text(row, row.low)} to {_change_text(row, row.high)}"
    return [f"{task}: {row.metric}", *values, _change_text(row, row.change), ends, _settled(row)]


def _settled(row: Comparison) -> str:
    """Whether the difference is more than noise; if not, how many more documents would show it."""
    if row.change is None or row.low is None or row.high is None:
        return ""
    neutral = 1.0 if row.scale == "ratio" else 0.0
    excludes = not row.low <= neutral <= row.high
    if row.p_value < _SIGNIFICANCE if row.p_value is not None else excludes:
        return "yes" if row.p_value is None else f"yes, p {_p_text(row.p_value)}"
    ends = [row.change, row.low, row.high]
    if row.scale == "ratio":
        ends = [math.log(end) if end > 0 else math.nan for end in ends]
    change, low, high = ends
    needed = documents_to_settle(change, low if change > 0 else high, 0.0, row.documents) if change == change else None
    if needed is None:
        return "no: the two are equal so far"
    if needed <= row.documents:
        return f"almost: p {_p_text(row.p_value)}" if row.p_value is not None else "almost"
    return f"no: about {needed - row.documents:,} more documents"


def _p_text(value: float) -> str:
    return "< 0.001" if value < 0.001 else f"= {value:.3f}"


def _value_text(value: float, metric: str) -> str:
    return percent(value) if _is_share(value, metric) else f"{value:.4g}"


def _is_share(value: float, metric: str) -> bool:
    return 0.0 <= value <= 1.0 and metric not in ("target_log_likelihood", "kl_divergence")


def _change_text(row: Comparison, change: float) -> str:
    if row.scale == "ratio":
        return f"x{change:.3f}"
    shares = _is_share(row.first, row.metric) and _is_share(row.second, row.metric)
    return points(change) if shares else f"{change:+.3f}"


def _cost_row(cost: CostChange) -> list[str]:
    objective = OBJECTIVES[cost.name]
    scale = scale_for(objective, (cost.first, cost.second))
    ends, settled = "", "unknown: measured once"
    if cost.is_predicted:
        settled = "predicted, not measured"
    elif cost.name in _EXACT:
        ends, settled = "exact", "yes" if cost.ratio != 1 else "equal"
    elif cost.low is not None and cost.high is not None:
        ends = f"x{cost.low:.3f} to x{cost.high:.3f}"
        settled = "yes" if not cost.low <= 1.0 <= cost.high else "no: measure more (`measurement.precision`)"
    return [objective.label, scale.text(cost.first), scale.text(cost.second), f"x{cost.ratio:.3f}", ends, settled]


def commands_of(snapshot: StudySnapshot, first: int, second: int) -> list[str]:
    """Commands that compare and export the two trials."""
    named = shlex.quote(snapshot.directory)
    found = [f"dse compare {named} --trials {first} {second}"]
    for trial in dict.fromkeys((first, second)):
        record: TrialRecord | None = snapshot.records.get(trial)
        if record is not None and record.state == "complete" and not record.is_dense:
            found.append(f"dse export {named} --trial {trial} --out exports/{snapshot.name}-{trial}")
    return found


def commands_part(commands: Sequence[str]) -> Any:
    """Commands, each with a button that copies it."""
    return [
        html.Div(
            [html.Code(command), dcc.Clipboard(content=command, title="Copy this command", className="copy")],
            className="command",
        )
        for command in commands
    ]


def choice_text(snapshot: StudySnapshot, choice: AxisChoice) -> str:
    """Range of an axis over all trials, for the text alternative of the plot."""
    values = axis_values(snapshot.trials, choice, relative=False)
    known = values.value[np.isfinite(values.value)]
    return "no value yet" if not known.size else f"{values.text(float(known.min()))} to {values.text(float(known.max()))}"
