"""The skeleton of the page: headings, controls and empty parts that the callbacks fill."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from dash import dcc, html

from dse.report.dashboard.axis_values import AxisChoice
from dse.report.dashboard.snapshot import StudySnapshot
from dse.report.dashboard.trial_groups import range_of

__all__ = ["NO_COLOUR", "axis_options", "page_layout", "range_sliders", "slider_bounds"]

NO_COLOUR = "none"
_POLL_MS = 2000
_GRAPH = {
    "displaylogo": False,
    "responsive": True,
    "modeBarButtons": [["toImage"], ["zoom2d", "pan2d", "resetScale2d"]],
    "toImageButtonOptions": {"filename": "front", "scale": 2},
}


def page_layout(snapshot: StudySnapshot) -> Any:
    """The page of a study; its parts are filled by callbacks."""
    return html.Div(
        [
            html.A("Skip to the front", href="#front", className="skip"),
            *[dcc.Store(id=name) for name in ("version", "theme", "front-drawn", "progress-drawn", "compared", "choices")],
            dcc.Interval(id="poll", interval=_POLL_MS),
            _header(snapshot),
            html.Main(
                [
                    html.Section(id="tiles", className="tiles", **{"aria-label": "Progress in figures"}),
                    _front(),
                    _comparison(),
                    html.Div(
                        [
                            _progress(),
                            html.Div(
                                [_workers(), _card("health", "Health", [html.Div(id="health-list")])], className="stack"
                            ),
                        ],
                        className="columns",
                    ),
                    _trials(),
                ],
                id="main",
            ),
        ]
    )


def _header(snapshot: StudySnapshot) -> Any:
    return html.Header(
        [
            html.Div(
                [
                    html.H1(snapshot.name),
                    html.Div(id="status", className="pill", role="status", **{"aria-live": "polite"}),
                ],
                className="title",
            ),
            html.Div(
                [
                    html.Span(snapshot.model, className="model"),
                    html.Span(snapshot.device),
                    html.Span(id="updated"),
                ],
                className="facts",
            ),
            html.Button("Dark", id="theme-button", type="button", className="plain"),
        ]
    )


def _card(name: str, title: str, children: Sequence[Any], className: str = "") -> Any:  # noqa: N803 - dash's name
    heading = html.H2(title, id=f"{name}-title")
    return html.Section(
        [heading, *children], id=name, className=f"card {className}".strip(), **{"aria-labelledby": f"{name}-title"}
    )


def _labelled(label: str, control: Any, name: str) -> Any:
    return html.Div([html.Label(label, htmlFor=name, id=f"{name}-label"), control], className="control")


def _front() -> Any:
    controls = html.Div(
        [
            _labelled("Horizontal axis", dcc.Dropdown(id="x", clearable=False, searchable=False), "x"),
            _labelled("Vertical axis", dcc.Dropdown(id="y", clearable=False, searchable=False), "y"),
            _labelled("Colour of the front", dcc.Dropdown(id="colour", clearable=False, searchable=False), "colour"),
            html.Fieldset(
                [
                    html.Legend("Values"),
                    dcc.RadioItems(
                        id="relative",
                        options=[{"label": "absolute", "value": "absolute"}, {"label": "relative to dense", "value": "relative"}],
                        value="absolute",
                        inline=True,
                    ),
                ]
            ),
            html.Fieldset(
                [
                    html.Legend("A click on a point chooses"),
                    dcc.RadioItems(
                        id="slot",
                        options=[{"label": "A", "value": "A"}, {"label": "B", "value": "B"}],
                        value="B",
                        inline=True,
                    ),
                ]
            ),
        ],
        className="controls",
    )
    plot = html.Div(
        [
            html.Div(
                dcc.Graph(id="front-plot", config=_GRAPH, figure=_empty(560), responsive=True, style={"height": "560px"}),
                id="front-picture",
                role="img",
                **{"aria-label": "The front of the study", "aria-describedby": "front-words"},
            ),
            html.P(id="front-words", className="note"),
        ],
        className="plot",
    )
    ranges = html.Div(
        [
            html.Div(
                [
                    html.H3("Ranges"),
                    html.Button("Reset", id="reset-ranges", type="button", className="plain"),
                ],
                className="row",
            ),
            html.P("Trials outside are drawn pale and left out of the table.", className="note"),
            html.Div(id="ranges"),
        ],
        className="ranges",
        role="group",
        **{"aria-label": "Ranges of the objectives and tasks"},
    )
    return _card("front", "Front", [controls, html.Div([plot, ranges], className="front-grid")])


def _comparison() -> Any:
    choosers = html.Div(
        [
            html.Div(
                [
                    _labelled(f"Trial {letter}", dcc.Dropdown(id=name, placeholder="Choose a trial"), name),
                    html.Div(id=f"{name}-head"),
                ],
                className="chosen",
            )
            for letter, name in (("A", "first"), ("B", "second"))
        ],
        className="columns",
    )
    maps = html.Div(
        [
            html.H3("Difference of the rank maps"),
            html.P(id="difference-words", className="note"),
            html.Div(
                dcc.Graph(id="difference-plot", config={**_GRAPH, "displayModeBar": False}, figure=_empty(260)),
                role="img",
                **{"aria-label": "Difference of the two rank maps", "aria-describedby": "difference-words"},
            ),
        ],
        id="difference",
    )
    return _card(
        "compare",
        "Two trials",
        [
            choosers,
            html.Div(
                [html.H3("Differences, paired by document"), html.Div(id="differences"), maps, html.H3("Commands"), html.Div(id="commands")],
                id="comparison",
            ),
        ],
    )


def _progress() -> Any:
    return _card(
        "progress",
        "Progress",
        [
            html.Div(
                dcc.Graph(id="progress-plot", config={**_GRAPH, "displayModeBar": False}, figure=_empty(320)),
                role="img",
                **{"aria-label": "Hypervolume against evaluated trials", "aria-describedby": "proposers"},
            ),
            html.Div(id="proposers", className="scroll", tabIndex="0", role="region", **{"aria-label": "Proposers"}),
        ],
    )


def _workers() -> Any:
    return _card("workers", "Workers", [html.Div(id="lanes")])


def _trials() -> Any:
    show = html.Fieldset(
        [
            html.Legend("Show"),
            dcc.RadioItems(
                id="show",
                options=[
                    {"label": "the front and ties", "value": "front"},
                    {"label": "complete trials", "value": "complete"},
                    {"label": "every trial", "value": "all"},
                ],
                value="front",
                inline=True,
            ),
        ]
    )
    return _card("trials", "Trials", [show, html.Div(id="table")])


def _empty(height: int) -> dict[str, Any]:
    """A figure without axes, until the first one is drawn."""
    hidden = {"visible": False}
    clear = "rgba(0,0,0,0)"
    layout = {"height": height, "xaxis": hidden, "yaxis": hidden, "paper_bgcolor": clear, "plot_bgcolor": clear}
    return {"data": [], "layout": layout}


def axis_options(choices: Sequence[AxisChoice]) -> list[dict[str, str]]:
    """Options of an axis dropdown."""
    return [{"label": choice.label, "value": choice.key} for choice in choices]


def range_sliders(snapshot: StudySnapshot, choices: Sequence[AxisChoice]) -> list[Any]:
    """One slider per objective, for the reduction, and per task."""
    found = []
    for choice in choices:
        bounds = slider_bounds(snapshot, choice)
        if bounds is None:
            continue
        low, high, step, symbol = bounds
        name = f"{choice.label} ({symbol})" if symbol else choice.label
        found.append(
            html.Div(
                [
                    html.Div(name, className="slider-label", id=f"label-{choice.key.replace('.', '-')}"),
                    dcc.RangeSlider(
                        id={"type": "range", "key": choice.key},
                        min=low,
                        max=high,
                        step=step,
                        value=[low, high],
                        marks=None,
                        allowCross=False,
                        tooltip=None,
                    ),
                ],
                className="slider",
                role="group",
                **{"aria-label": f"Range of {name}"},
            )
        )
    return found or [html.P("Ranges appear with the first finished trial.", className="empty")]


def slider_bounds(snapshot: StudySnapshot, choice: AxisChoice) -> tuple[float, float, float, str] | None:
    """Smallest value, largest value, step and unit of a slider, on round numbers; None without two values."""
    if snapshot.trials.empty:
        return None
    found = range_of(snapshot.trials, choice)
    if found is None or found[0] == found[1]:
        return None
    low, high, symbol = found
    step = 10.0 ** math.floor(math.log10((high - low) / 50))
    digits = max(0, -math.floor(math.log10(step)))
    return round(math.floor(low / step) * step, digits), round(math.ceil(high / step) * step, digits), step, symbol
