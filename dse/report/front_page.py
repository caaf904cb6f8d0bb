"""The report of a study as one self-contained HTML page."""

from __future__ import annotations

import base64
import hashlib
import html
from collections.abc import Collection, Mapping, Sequence

import pandas as pd

from dse.pareto.objective import Objective
from dse.report.front_figure import figure_json, plot_front, plotly_source
from dse.report.page_assets import DRAW_SCRIPT, SORT_SCRIPT, STYLE
from dse.report.point_maps import MAX_MAPS, PointMap, map_anchor, point_maps_html
from dse.report.text_tables import FrontCell, FrontRow, front_rows, tied_rows
from dse.report.trials_table import front_table, require_columns

__all__ = ["front_html"]

_HOW_TO_READ = (
    "Each point is a trial; bars are 95 % intervals. Coloured points form the Pareto front over all objectives and"
    " carry their trial numbers. The line is the front of the plot's two objectives alone: a coloured point off the"
    " line is on the front because of another objective. Hollow points are tied with the front: they are dominated, but"
    " only by differences within noise. The orange diamond is the dense model. The ring marks the knee: beyond it, a"
    " small gain in one objective costs much of another. Hover over a point for its values, click a coloured point for"
    " its map, drag to zoom, double-click to reset."
)
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
    """The report page: plots, a sortable table of the front, maps of its points, study details and next commands.

    The page is self-contained (it includes plotly.js, about 5 MB) and works offline. All text from outside is escaped,
    and the page's Content-Security-Policy allows its three scripts, by their hash, and no network access.

    Args:
        study_facts: Label to text, in order: model, hypervolume, environment and so on.
        next_commands: Shell commands to show, one per line.

    Raises:
        ConfigError: There is no objective, or a column is missing.
    """
    front = front_table(trials, objectives)
    rows = front_rows(front, objectives)
    mapped = {entry.trial for entry in point_maps[:MAX_MAPS]}
    scripts = [_script_text(script) for script in (plotly_source(), DRAW_SCRIPT, SORT_SCRIPT)]
    parts = [
        f"<h1>{_escape(title)}</h1>",
        f'<p class="lead">{_escape(_summary(trials, rows))}</p>',
        f'<div class=scroll><div id="plot"{" class=wide" if len(objectives) > 2 else ""}></div></div>',
        f'<p class="note">{_HOW_TO_READ}</p>',
        "<h2>Pareto front</h2>",
        f"<div class=scroll>{_front_html_table(rows, objectives, mapped)}</div>",
        f'<p class="note">{_escape(_table_note(rows))}</p>',
        point_maps_html(point_maps),
        _tied(tied_rows(trials, objectives), objectives),
        _unfinished(trials),
        _facts(study_facts),
        f"<h2>Next steps</h2>\n<pre><code>{_escape(chr(10).join(next_commands))}</code></pre>" if next_commands else "",
    ]
    body = "\n".join(part for part in parts if part)
    data = f'<script type="application/json" id="figure">{figure_json(plot_front(trials, objectives))}</script>'
    code = "\n".join(f"<script>{script}</script>" for script in scripts)
    return (
        f'<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        f'<meta http-equiv="Content-Security-Policy" content="{_policy(scripts)}">\n'
        f'<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{_escape(title)}</title>\n<style>{STYLE}</style>\n</head>\n"
        f"<body>\n<main>\n{body}\n</main>\n{data}\n{code}\n</body>\n</html>\n"
    )


def _escape(text: object) -> str:
    return html.escape(str(text), quote=True)


def _script_text(script: str) -> str:
    """A script as the browser's parser sees it, so that its hash matches."""
    return script.replace("\r\n", "\n").replace("\r", "\n")


def _policy(scripts: Sequence[str]) -> str:
    hashes = [base64.b64encode(hashlib.sha256(script.encode()).digest()).decode() for script in scripts]
    allowed = " ".join(f"'sha256-{digest}'" for digest in hashes)
    # Plotly adds its styles at run time and saves images through data: and blob: URLs.
    return f"default-src 'none'; script-src {allowed}; style-src 'unsafe-inline'; img-src data: blob:; base-uri 'none'"


def _summary(trials: pd.DataFrame, rows: Sequence[FrontRow]) -> str:
    require_columns(trials, ("state",))
    counts = trials["state"].value_counts()
    states = [f"{int(counts[state])} {state}" for state in _STATES if state in counts.index]
    on_front = sum(row.on_front for row in rows)
    noun = "trial" if len(trials) == 1 else "trials"
    return f"{len(trials)} {noun}: {', '.join(states)}. {on_front} on the Pareto front."


def _table_note(rows: Sequence[FrontRow]) -> str:
    note = "± and brackets are 95 % intervals. The second line of a cell is the change from the dense model."
    if any(row.is_dense and not row.on_front for row in rows):
        note += " The dense model is listed for comparison and is not on the front."
    return note


def _tied(rows: Sequence[FrontRow], objectives: Sequence[Objective]) -> str:
    """Table of the trials that are tied with the front."""
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
        "A front trial dominates each of these, but the differences are within noise in every objective. They may be"
        " just as good; more documents or repeats would decide."
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
    """Table of failed and infeasible trials with their reasons."""
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
    return f"<h2>Study</h2>\n<dl>\n{entries}\n</dl>"
