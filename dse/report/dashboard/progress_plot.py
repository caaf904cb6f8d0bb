"""Hypervolume against trials as a Plotly figure, and what each proposer gave."""

from __future__ import annotations

import html
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from dse.report.dashboard.snapshot import StudySnapshot, VolumeStep
from dse.report.dashboard.theme import THEMES, axis, frame, proposer_mark

__all__ = ["ProposerShare", "progress_plot", "proposer_shares"]

_HEIGHT = 320
_RECENT = 20


@dataclass(frozen=True)
class ProposerShare:
    """The contribution of one proposer.

    Attributes:
        origin: Its name.
        evaluations: Evaluated trials.
        on_front: Of these, on the front.
        gained: Normalised hypervolume that they added.
        gained_recently: The same over the last 20 evaluated trials of the study.
        since_gain: Its evaluations since the last one that added hypervolume.
    """

    origin: str
    evaluations: int
    on_front: int
    gained: float
    gained_recently: float
    since_gain: int


def proposer_shares(snapshot: StudySnapshot) -> list[ProposerShare]:
    """The proposers in order of appearance, without the dense model."""
    table = snapshot.trials
    front = set() if table.empty else set(table.loc[table["on_front"].to_numpy(dtype=bool), "trial"].tolist())
    recent = {step.trial for step in snapshot.steps[-_RECENT:]}
    shares = []
    for origin in _origins(snapshot.steps):
        own = [step for step in snapshot.steps if step.origin == origin]
        since = next((index for index, step in enumerate(reversed(own)) if step.gained > 0), len(own))
        shares.append(
            ProposerShare(
                origin,
                len(own),
                sum(step.trial in front for step in own),
                sum(step.gained for step in own),
                sum(step.gained for step in own if step.trial in recent),
                since,
            )
        )
    return shares


def progress_plot(snapshot: StudySnapshot, theme_name: str) -> dict[str, Any]:
    """The hypervolume as a staircase, with a mark on each trial that added to it, by proposer."""
    theme, steps = THEMES[theme_name], snapshot.steps
    line = {
        "type": "scatter",
        "mode": "lines",
        "name": "Hypervolume",
        "x": list(range(1, len(steps) + 1)),
        "y": [step.volume for step in steps],
        "line": {"color": theme.line, "width": 2, "shape": "hv"},
        "hoverinfo": "skip",
        "showlegend": False,
    }
    traces = [line]
    for index, origin in enumerate(_origins(steps)):
        colour, symbol = proposer_mark(theme, index)
        gains = [(i + 1, step) for i, step in enumerate(steps) if step.origin == origin and step.gained > 0]
        traces.append(
            {
                "type": "scatter",
                "mode": "markers",
                "name": html.escape(origin),
                "x": [place for place, _ in gains],
                "y": [step.volume for _, step in gains],
                "marker": {"color": colour, "symbol": symbol, "size": 9, "line": {"color": theme.surface, "width": 1}},
                "hovertext": [
                    f"<b>Trial {step.trial}</b><br>{html.escape(origin)}: +{step.gained:.5f}<br>hypervolume"
                    f" {step.volume:.4f}"
                    for _, step in gains
                ],
                "hoverinfo": "text",
                "showlegend": True,
            }
        )
    notes = []
    if not steps:
        text = "The hypervolume starts with the dense model's trial."
        font = {"size": 14, "color": theme.muted}
        notes = [{"text": text, "showarrow": False, "xref": "paper", "yref": "paper", "x": 0.5, "y": 0.5, "font": font}]
    layout = frame(
        theme,
        _HEIGHT,
        margin={"l": 64, "r": 16, "t": 40, "b": 48},
        xaxis=axis(theme, "Evaluated trials", rangemode="tozero", **({} if steps else {"range": [0, snapshot.budget]})),
        yaxis=axis(
            theme, "Hypervolume", rangemode="tozero", **({} if steps else {"range": [0, 1], "showticklabels": False})
        ),
        legend={"orientation": "h", "x": 0, "y": 1.0, "yref": "container", "yanchor": "top", "font": {"size": 12}},
        annotations=notes,
        uirevision="progress",
    )
    return {"data": traces, "layout": layout}


def _origins(steps: Sequence[VolumeStep]) -> list[str]:
    return [origin for origin in dict.fromkeys(step.origin for step in steps) if origin != "dense"]
