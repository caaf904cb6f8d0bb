"""Parts of the page that say how the study goes: state, tiles, workers, proposers and health."""

from __future__ import annotations

import datetime
import itertools
import statistics
from collections.abc import Sequence
from typing import Any

from dash import html

from dse.report.dashboard.health import Notice
from dse.report.dashboard.progress_plot import ProposerShare
from dse.report.dashboard.snapshot import StudySnapshot
from dse.report.dashboard.theme import THEMES, proposer_mark
from dse.report.worker_lanes import WorkerLane, is_alive

__all__ = ["duration", "health_part", "lanes_part", "proposers_part", "seconds_left", "status_part", "tiles_part"]

_RECENT = 20
_PAUSE = 10.0
"""A gap of more than this many typical gaps between two trials is a pause of the study, not a trial."""
_LEVELS = {"problem": "Problem", "warning": "Warning", "note": "Note"}


def status_part(snapshot: StudySnapshot, now_s: float) -> Any:
    """The state of the study in one word, with the time of the last change."""
    kind, word = _state(snapshot, now_s)
    return [html.Span(className=f"dot {kind}", **{"aria-hidden": "true"}), html.Span(word)]


def tiles_part(snapshot: StudySnapshot, notices: Sequence[Notice], now_s: float) -> list[Any]:
    """One tile per figure of the study's progress."""
    done = min(1.0, snapshot.evaluated / max(1, snapshot.budget))
    table = snapshot.trials
    on_front = 0 if table.empty else int(table["on_front"].sum())
    tied = 0 if table.empty else int(table["tied_with"].notna().sum())
    failed = 0 if table.empty else int((table["state"] == "failed").sum())
    running, queued = len(snapshot.running), len(snapshot.pending) - len(snapshot.running)
    left = seconds_left(snapshot, now_s)
    volume = snapshot.steps[-1].volume if snapshot.steps else None
    recent = sum(step.gained for step in snapshot.steps[-_RECENT:])
    serious = sum(notice.level != "note" for notice in notices)
    alive = _state(snapshot, now_s)[0] == "running"
    bar = html.Div(
        html.Div(style={"width": f"{100 * done:.1f}%"}),
        className="bar",
        role="progressbar",
        **{
            "aria-label": "Trials evaluated",
            "aria-valuemin": "0",
            "aria-valuemax": str(snapshot.budget),
            "aria-valuenow": str(snapshot.evaluated),
        },
    )
    return [
        _tile("Trials evaluated", f"{snapshot.evaluated:,}", f"of {snapshot.budget:,}", _count(failed, "failed"), bar),
        _tile("In flight", f"{running if alive else 0}", _count(queued, "queued")),
        _tile("Time left", "done" if snapshot.is_complete else duration(left) if alive else "-", _rate(snapshot)),
        _tile("On the front", f"{on_front:,}", _count(tied, "tied")),
        _tile(
            "Hypervolume",
            "-" if volume is None else f"{volume:.4f}",
            "" if volume is None else f"+{recent:.4f} in the last {min(_RECENT, len(snapshot.steps))} trials",
        ),
        html.A(
            _tile("Health", "good" if not serious else f"{serious}", "" if not serious else "to look at"),
            href="#health",
            className="tile-link" + (" alert" if any(n.level == "problem" for n in notices) else ""),
        ),
    ]


def _tile(label: str, value: str, note: str = "", more: str = "", extra: Any = None) -> Any:
    notes = ", ".join(part for part in (note, more) if part)
    parts = [html.Div(label, className="tile-label"), html.Div(value, className="tile-value")]
    parts += [html.Div(notes, className="tile-note")] if notes else []
    return html.Div([*parts, *([extra] if extra is not None else [])], className="tile")


def _count(count: int, word: str) -> str:
    return f"{count:,} {word}" if count else ""


def _state(snapshot: StudySnapshot, now_s: float) -> tuple[str, str]:
    """Kind and word of the study's state."""
    if any(is_alive(lane, now_s) for lane in snapshot.lanes):
        return "running", "running"
    if snapshot.is_complete:
        return "complete", "complete"
    if snapshot.lanes:
        return "stopped", "not running"
    return ("running", "running") if snapshot.running else ("stopped", "not running")


def seconds_left(snapshot: StudySnapshot, now_s: float) -> float | None:
    """Time to the end of the budget, by the pace of the last trials; None before two of them have started."""
    left = snapshot.budget - snapshot.evaluated
    pace = _pace_s(snapshot)
    return None if pace is None or left <= 0 else left * pace


def _pace_s(snapshot: StudySnapshot) -> float | None:
    """Seconds per evaluated trial: mean gap between the starts of the last trials, without pauses of the study."""
    starts = []
    for _, record in sorted(snapshot.records.items())[-2 * _RECENT :]:
        if record.started_at and record.state in ("complete", "failed", "stopped"):
            starts.append(datetime.datetime.fromisoformat(record.started_at).timestamp())
    starts = sorted(starts)[-_RECENT:]
    gaps = [after - before for before, after in itertools.pairwise(starts)]
    if not gaps:
        return None
    typical = statistics.median(gaps)
    kept = [gap for gap in gaps if gap <= _PAUSE * max(typical, 1.0)]
    mean = statistics.fmean(kept) if kept else typical
    return mean if mean > 0 else None


def _rate(snapshot: StudySnapshot) -> str:
    pace = _pace_s(snapshot)
    return "" if pace is None else f"{duration(pace)} per trial"


def duration(seconds: float | None) -> str:
    """`42 s`, `3 min`, `2 h 5 min`, `3 d 4 h`; `-` if unknown."""
    if seconds is None:
        return "-"
    if seconds < 100:
        return f"{seconds:.1f} s" if seconds < 10 else f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    if minutes < 60:
        return f"{minutes} min"
    hours, minutes = divmod(minutes, 60)
    if hours < 48:
        return f"{hours} h {minutes} min" if minutes else f"{hours} h"
    days, hours = divmod(hours, 24)
    return f"{days} d {hours} h"


def lanes_part(snapshot: StudySnapshot, now_s: float) -> Any:
    """One lane per worker; for a study whose workers do not tell, what its storage knows."""
    lanes = snapshot.lanes or _lanes_from_storage(snapshot)
    if not lanes:
        return html.P("No worker has started yet.", className="empty")
    return html.Div([_lane(lane, snapshot, now_s) for lane in lanes], className="lanes", role="list")


def _lanes_from_storage(snapshot: StudySnapshot) -> tuple[WorkerLane, ...]:
    failures = sum(record.state == "failed" for record in snapshot.records.values())
    return tuple(
        WorkerLane(
            f"worker {index + 1}",
            "working",
            trial=trial.trial,
            trial_started_s=trial.started_s,
            updated_s=snapshot.read_s,
            finished=snapshot.evaluated,
            failures=failures,
        )
        for index, trial in enumerate(snapshot.running)
    )


def _lane(lane: WorkerLane, snapshot: StudySnapshot, now_s: float) -> Any:
    alive = is_alive(lane, now_s)
    if lane.state == "ended":
        kind, word = "complete", "ended"
    elif not alive:
        kind, word = "failed", "not running"
    else:
        kind, word = ("running", lane.state) if lane.state == "working" else ("idle", "between trials")
    share = lane.done / lane.total if lane.total else 0.0
    working = alive and lane.state == "working"
    facts = [
        ("Device", lane.device or snapshot.device),
        ("Machine", lane.host),
        ("Phase", (lane.phase or "starting") if working else ""),
        ("Trial", f"{lane.trial}" + (f", {lane.origin}" if lane.origin else "") if working else ""),
        ("For", duration(now_s - lane.trial_started_s) if working and lane.trial_started_s else ""),
        ("Up", duration(now_s - lane.started_s) if alive and lane.started_s else ""),
        ("Finished", f"{lane.finished:,}"),
        ("Failed", f"{lane.failures:,}"),
        ("Temperature", "" if lane.temperature_celsius is None else f"{lane.temperature_celsius:.0f} °C"),
        ("Power", "" if lane.power_w is None else f"{lane.power_w:.0f} W"),
    ]
    pairs = [html.Div([html.Dt(name), html.Dd(text)]) for name, text in facts if text]
    bar = html.Div(
        html.Div(style={"width": f"{100 * share:.0f}%"}),
        className="bar",
        role="progressbar",
        **{
            "aria-label": f"{lane.worker}, {lane.phase or 'phase'}",
            "aria-valuemin": "0",
            "aria-valuemax": "100",
            "aria-valuenow": f"{100 * share:.0f}",
        },
    )
    head = [html.Strong(lane.worker), html.Span([html.Span(className=f"dot {kind}"), word], className="pill")]
    return html.Div(
        [html.Div(head, className="lane-head"), *([bar] if working else []), html.Dl(pairs)],
        className="lane",
        role="listitem",
    )


def proposers_part(shares: Sequence[ProposerShare], theme_name: str) -> Any:
    """What each proposer gave."""
    if not shares:
        return html.P("No proposer has been evaluated yet.", className="empty")
    most = max((share.gained for share in shares), default=0.0) or 1.0
    rows = []
    for index, share in enumerate(shares):
        colour, _ = proposer_mark(THEMES[theme_name], index)
        bar = html.Div(html.Div(style={"width": f"{100 * share.gained / most:.0f}%", "background": colour}), className="mini")
        rows.append(
            html.Tr(
                [
                    html.Th([html.Span(className="swatch", style={"background": colour}), share.origin], scope="row"),
                    html.Td(f"{share.evaluations:,}"),
                    html.Td(f"{share.on_front:,}"),
                    html.Td([f"{share.gained:.4f}", bar]),
                    html.Td(f"{share.gained_recently:.4f}"),
                ]
            )
        )
    heads = ("Proposer", "Evaluated", "On the front", "Hypervolume gained", "Last 20 trials")
    return html.Table(
        [
            html.Caption("What each proposer gave", className="hidden"),
            html.Thead(html.Tr([html.Th(head, scope="col") for head in heads])),
            html.Tbody(rows),
        ]
    )


def health_part(notices: Sequence[Notice]) -> Any:
    """Findings, each with its remedy."""
    if not notices:
        return html.P("Nothing to report: no failures, no throttling, and the noise suits the question.", className="empty")
    return html.Ul(
        [
            html.Li(
                [
                    html.Span(_LEVELS[notice.level], className=f"level {notice.level}"),
                    html.Div([html.P(notice.what), html.P(notice.remedy, className="remedy")]),
                ]
            )
            for notice in notices
        ],
        className="notices",
    )
