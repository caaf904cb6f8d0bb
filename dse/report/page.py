"""The study's result as one HTML page that needs nothing but itself."""

from __future__ import annotations

import base64
import hashlib
import html
from collections.abc import Collection, Mapping, Sequence

import pandas as pd

from dse.pareto.front import front_table
from dse.pareto.objective import Objective
from dse.report.columns import require_columns
from dse.report.front_table import FrontCell, FrontRow, front_rows, tied_rows
from dse.report.page_assets import DRAW_SCRIPT, SORT_SCRIPT, STYLE
from dse.report.plots import figure_json, plot_front, plotly_source
from dse.report.point_map import MAP_STYLE, MOST_MAPS, PointMap, map_anchor, point_maps_html

__all__ = ["front_html"]

_STATES = ("complete", "stopped", "duplicate", "infeasible", "failed")


def front_html(
    trials: pd.DataFrame,
    objectives: Sequence[Objective],
    *,
    title: str,
    study_facts: Mapping[str, str],
    next_commands: Sequence[str],
    point_maps: Sequence[PointMap] = (),
) -> str:
    """The report page: the plots, the front as a table that sorts, the dense reference, facts and what to type next.

    The page is self-contained (plotly.js is inside, about 5 MB) and works from a disk without a network. Everything
    that comes from outside is escaped, and the page's own Content-Security-Policy admits only its three scripts, by
    their hash, and no connection at all.

    Args:
        trials: The trials table.
        objectives: What was traded off.
        title: Name of the study.
        study_facts: What to say about the study, in order: environment, hypervolume and its reference, and so on.
        next_commands: Shell commands to offer, one a line.
        point_maps: Pictures of front points, in order.

    Raises:
        ConfigError: There is no objective, or a column is missing.
    """
    front = front_table(trials, objectives)
    rows = front_rows(front, objectives)
    mapped = {entry.trial for entry in point_maps[:MOST_MAPS]}
    scripts = [_script_text(script) for script in (plotly_source(), DRAW_SCRIPT, SORT_SCRIPT)]
    parts = [
        f"<h1>{_escape(title)}</h1>",
        f'<p class="lead">{_escape(_summary(trials, rows))}</p>',
        f'<div class=scroll><div id="plot"{" class=wide" if len(objectives) > 2 else ""}></div></div>',
        f'<p class="note">{_how_to_read()}</p>',
        "<h2>The front</h2>",
        f"<div class=scroll>{_front_html_table(rows, objectives, mapped)}</div>",
        f'<p class="note">{_escape(_table_note(rows))}</p>',
        point_maps_html(point_maps),
        _tied(tied_rows(trials, objectives), objectives),
        _unfinished(trials),
        _facts(study_facts),
        _commands(next_commands),
    ]
    body = "\n".join(part for part in parts if part)
    data = f'<script type="application/json" id="figure">{figure_json(plot_front(trials, objectives))}</script>'
    code = "\n".join(f"<script>{script}</script>" for script in scripts)
    return (
        f'<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        f'<meta http-equiv="Content-Security-Policy" content="{_policy(scripts)}">\n'
        f'<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{_escape(title)}</title>\n<style>{STYLE}{MAP_STYLE}</style>\n</head>\n"
        f"<body>\n<main>\n{body}\n</main>\n{data}\n{code}\n</body>\n</html>\n"
    )


def _escape(text: object) -> str:
    return html.escape(str(text), quote=True)


def _script_text(script: str) -> str:
    """A script as the browser's parser will see it, so that its hash agrees."""
    return script.replace("\r\n", "\n").replace("\r", "\n")


def _policy(scripts: Sequence[str]) -> str:
    hashes = [base64.b64encode(hashlib.sha256(script.encode()).digest()).decode() for script in scripts]
    allowed = " ".join(f"'sha256-{digest}'" for digest in hashes)
    # Plotly writes its styles at run time and saves pictures through data: and blob: addresses.
    return f"default-src 'none'; script-src {allowed}; style-src 'unsafe-inline'; img-src data: blob:; base-uri 'none'"


def _summary(trials: pd.DataFrame, rows: Sequence[FrontRow]) -> str:
    require_columns(trials, ("state",))
    counts = trials["state"].value_counts()
    states = [f"{int(counts[state])} {state}" for state in _STATES if state in counts.index]
    on_front = sum(row.on_front for row in rows)
    noun = "trial" if len(trials) == 1 else "trials"
    return f"{len(trials)} {noun}: {', '.join(states)}. {on_front} on the Pareto front."


def _how_to_read() -> str:
    return (
        "Each point is a trial; bars are 95 % intervals. No trial beats a coloured point in all objectives at once. The"
        " line joins the points that are best in the two objectives of its plot; coloured points beside it owe their"
        " place to another objective. Hollow points are tied with the front: it beats them within noise only. Numbers"
        " are trials: hover over a point for its figures, click on a coloured one for its map, drag to zoom,"
        " double-click to return. Vermilion is the dense"
        " model; the ring is the knee, where the front bulges most."
    )


def _table_note(rows: Sequence[FrontRow]) -> str:
    note = "± and brackets are 95 % intervals. The second line of a cell is the change against the dense model."
    if any(row.is_dense and not row.on_front for row in rows):
        note += " The dense model is not on the front; it is shown as the reference."
    return note


def _tied(rows: Sequence[FrontRow], objectives: Sequence[Objective]) -> str:
    """Trials that a front trial beats, but in every objective within noise only."""
    if not rows:
        return ""
    heads = ["Trial", "Tied with", "Point", "Reduction", *(objective.label for objective in objectives)]
    head = "".join(f'<th scope="col">{_escape(text)}</th>' for text in heads)
    lines = []
    for row in rows:
        shown = (str(row.trial), str(row.tied_with), row.point_id, row.reduction)
        cells = [f"<td>{_escape(text)}</td>" for text in shown] + [_objective_cell(cell) for cell in row.cells]
        lines.append(f"<tr>{''.join(cells)}</tr>")
    note = (
        "A front trial beats each of these, but in every objective within noise only: they may be as good, and more"
        " documents or repeats would tell."
    )
    return (
        f'<h2>Tied with the front</h2>\n<p class="note">{note}</p>\n<div class=scroll><table id="tied">'
        f"<thead><tr>{head}</tr></thead>\n<tbody>{''.join(lines)}</tbody></table></div>"
    )


def _front_html_table(rows: Sequence[FrontRow], objectives: Sequence[Objective], mapped: Collection[int]) -> str:
    heads = ["Trial", "Point", "Reduction", *(objective.label for objective in objectives)]
    head = "".join(f'<th scope="col"><button type="button">{_escape(text)}</button></th>' for text in heads)
    body = "\n".join(_row(row, row.trial in mapped) for row in rows)
    return f'<table id="front"><thead><tr>{head}</tr></thead>\n<tbody>\n{body}\n</tbody></table>'


def _row(row: FrontRow, has_map: bool) -> str:
    trial = f'<a href="#{map_anchor(row.trial)}">{row.trial}</a>' if has_map else str(row.trial)
    cells = [
        f'<td data-value="{row.trial}">{trial}</td>',
        f'<td data-value="{_escape(row.point_id)}"><code>{_escape(row.point_id)}</code></td>',
        f'<td data-value="{_sort_key(row.reduction_value)}">{_escape(row.reduction)}</td>',
        *(_objective_cell(cell) for cell in row.cells),
    ]
    return f"<tr{' class=dense' if row.is_dense else ''}>{''.join(cells)}</tr>"


def _objective_cell(cell: FrontCell) -> str:
    changed = _escape(cell.change_interval)
    return f'<td data-value="{_sort_key(cell.si)}">{_escape(cell.measured)}<small>{changed}</small></td>'


def _sort_key(value: float | None) -> str:
    return "" if value is None else repr(float(value))


def _unfinished(trials: pd.DataFrame) -> str:
    """Failed and infeasible trials with their reasons: what the study could not measure is part of its result."""
    rows = []
    for _, row in trials[trials["state"].isin(["failed", "infeasible"]).to_numpy()].iterrows():
        reason = "" if "reason" not in row.index or pd.isna(row["reason"]) else row["reason"]
        cells = f"<td>{int(row['trial'])}</td><td>{_escape(row['state'])}</td><td class=text>{_escape(reason)}</td>"
        rows.append(f"<tr>{cells}</tr>")
    if not rows:
        return ""
    head = "<tr><th>Trial</th><th>State</th><th class=text>Reason</th></tr>"
    return (
        f"<h2>Trials without a result</h2>\n<div class=scroll><table><thead>{head}</thead>"
        f"<tbody>{''.join(rows)}</tbody></table></div>"
    )


def _facts(study_facts: Mapping[str, str]) -> str:
    if not study_facts:
        return ""
    entries = "\n".join(f"<dt>{_escape(key)}</dt><dd>{_escape(value)}</dd>" for key, value in study_facts.items())
    return f"<h2>The study</h2>\n<dl>\n{entries}\n</dl>"


def _commands(next_commands: Sequence[str]) -> str:
    if not next_commands:
        return ""
    return f"<h2>Next</h2>\n<pre><code>{_escape(chr(10).join(next_commands))}</code></pre>"
