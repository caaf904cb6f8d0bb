"""The front as an interactive Plotly figure (the only importer of plotly)."""

from __future__ import annotations

import html
import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import pandas as pd
import plotly.graph_objects as go
from plotly.offline import get_plotlyjs

from dse.pareto.objective import Objective
from dse.report.front_panels import Axis, Panel, Points, front_panels
from dse.report.palette import Palette
from dse.report.text_tables import front_cell
from dse.report.trials_table import dense_row, number, numbers
from dse.report.units import percent, scale_for

__all__ = ["figure_json", "plot_front", "plotly_source"]

_FONT = "Inter, 'Segoe UI', Roboto, 'Helvetica Neue', Arial, 'DejaVu Sans', sans-serif"
_PANEL_HEIGHT = 470  # pixels


def plot_front(
    trials: pd.DataFrame, objectives: Sequence[Objective], *, x: str | None = None, y: str | None = None
) -> go.Figure:
    """Plot all trials, the front, the dense model and the knee, one panel per objective against accuracy.

    Bars are 95 % intervals, the staircase is the front of the two objectives shown, and colour is a third objective.
    Hovering over a point shows its trial number, point id, reduction and every objective.

    Args:
        x: Horizontal axis of a single panel: an objective or `reduction`.
        y: Vertical axis; by default accuracy or the first objective.

    Raises:
        ConfigError: There is no objective, a column is missing, or an axis is unknown.
    """
    panels = front_panels(trials, objectives, x=x, y=y)
    hover = _hover_texts(trials, objectives)
    figure = go.Figure()
    for index, panel in enumerate(panels):
        _draw(figure, panel, index, len(panels), hover)
    rows = math.ceil(len(panels) / 2)
    figure.update_layout(
        template="none",
        height=90 + rows * _PANEL_HEIGHT,
        margin={"l": 75, "r": 20, "t": 60, "b": 65},
        font={"family": _FONT, "size": 14, "color": Palette.TEXT},
        paper_bgcolor="white",
        plot_bgcolor="white",
        hoverlabel={"bgcolor": "white", "bordercolor": Palette.MUTED, "font": {"size": 13}, "align": "left"},
        legend={"orientation": "h", "x": 0, "xanchor": "left", "y": 0.995, "yanchor": "top", "yref": "container"},
    )
    return figure


def figure_json(figure: go.Figure) -> str:
    """The figure as JSON that is safe inside an HTML `<script>` element: plotly escapes `<`."""
    return str(figure.to_json(engine="json"))


def plotly_source() -> str:
    """Source of plotly.js, about 5 MB, for a page that works offline."""
    return str(get_plotlyjs())


def _draw(figure: go.Figure, panel: Panel, index: int, count: int, hover: list[str]) -> None:
    suffix = "" if index == 0 else str(index + 1)
    on = {"xaxis": f"x{suffix}", "yaxis": f"y{suffix}"}
    columns = domains(index, count, panel.colour is not None)
    across = {**_axis_style(panel.x), "domain": columns[0], "anchor": on["yaxis"]}
    upward = {**_axis_style(panel.y), "domain": columns[1], "anchor": on["xaxis"]}
    across["range"], upward["range"] = panel.limits()
    if index % 2 == 1:
        # The panel to the left has the same axis, and its colour bar is in this place.
        upward["title"] = {"text": ""}
    figure.update_layout({f"xaxis{suffix}": across, f"yaxis{suffix}": upward})
    for trace in _traces(panel, hover, columns, {"showlegend": index == 0, **on}):
        figure.add_trace(trace)


def domains(index: int, count: int, has_colour: bool) -> tuple[list[float], list[float]]:
    """Horizontal and vertical extent of panel `index` of `count`, as shares of the figure; two panels per row."""
    columns, rows = min(2, count), math.ceil(count / 2)
    width, gap = 1.0 / columns, 0.07 if columns == 2 else 0.0
    left = (index % columns) * (width + gap / 2)
    right = left + width - gap / 2 - 0.058 * has_colour
    row_gap = 0.22 / rows if rows > 1 else 0.0
    height = (1.0 - row_gap * (rows - 1)) / rows
    bottom = 1.0 - (index // columns) * (height + row_gap) - height
    return [left, right], [max(0.0, bottom), bottom + height]


def _traces(panel: Panel, hover: list[str], columns: tuple[list[float], list[float]], on: dict[str, Any]) -> list[Any]:
    hollow = {"color": "white", "size": 10, "line": {"color": Palette.FRONT, "width": 2}}
    tied = [_scatter(panel.tied, "Tied with the front", hover, on, hollow, Palette.FRONT_BARS)]
    filled = {"color": Palette.DENSE, "size": 14, "symbol": "diamond", "line": {"color": "white", "width": 1.5}}
    ring = {"color": "rgba(0,0,0,0)", "size": 21, "symbol": "circle", "line": {"color": Palette.TEXT, "width": 2}}
    return [
        _scatter(panel.others, "Other trials", hover, on, {"color": Palette.TRIALS, "size": 8}, Palette.TRIAL_BARS),
        go.Scatter(
            x=panel.staircase[:, 0],
            y=panel.staircase[:, 1],
            mode="lines",
            name="Two-objective front",
            line={"color": Palette.FRONT, "width": 2, "shape": "hv" if panel.steps_after else "vh"},
            hoverinfo="skip",
            **on,
        ),
        *(tied if len(panel.tied) else []),
        _front_trace(panel, hover, columns, on),
        _scatter(panel.dense, "Dense model", hover, on, filled, Palette.DENSE),
        _scatter(panel.knee, "Knee", hover, on, ring, error=None),
    ]


def _front_trace(panel: Panel, hover: list[str], columns: tuple[list[float], list[float]], on: dict[str, Any]) -> Any:
    marker: dict[str, Any] = {"size": 12, "line": {"color": "white", "width": 1.5}, "color": Palette.FRONT}
    if panel.colour is not None and panel.front.colour is not None and len(panel.front):
        steps = len(Palette.RAMP) - 1
        marker |= {
            "color": panel.front.colour,
            "colorscale": [[i / steps, colour] for i, colour in enumerate(Palette.RAMP)],
            "showscale": True,
            "colorbar": {
                "title": {"text": panel.colour.short_title, "side": "right", "font": {"size": 13}},
                "tickfont": {"size": 12},
                "x": columns[0][1] + 0.012,
                "xanchor": "left",
                "y": sum(columns[1]) / 2,
                "len": columns[1][1] - columns[1][0],
                "thickness": 11,
                "outlinewidth": 0,
            },
        }
    trace = _scatter(panel.front, "Pareto front", hover, on, marker, error=Palette.FRONT_BARS)
    trace.update(
        mode="markers+text",
        text=[str(trial) for trial in panel.front.trials],
        textposition=[f"{level} {side}" for side, level in panel.label_sides()],
        textfont={"size": 12, "color": Palette.TEXT},
    )
    return trace


def _scatter(
    points: Points, name: str, hover: list[str], on: dict[str, Any], marker: dict[str, Any], error: str | None
) -> Any:
    trace = go.Scatter(
        x=points.x,
        y=points.y,
        mode="markers",
        name=name,
        marker=marker,
        hovertext=[hover[row] for row in points.rows],
        customdata=points.trials.tolist(),
        hoverinfo="text" if error else "skip",
        **on,
    )
    if error:
        trace.update(error_x=_bars(points.x_error, error), error_y=_bars(points.y_error, error))
    return trace


def _bars(errors: np.ndarray, colour: str) -> dict[str, Any]:
    if not np.isfinite(errors).any():
        return {"visible": False}
    down, up = np.nan_to_num(errors)
    return {
        "type": "data", "symmetric": False, "array": up, "arrayminus": down, "color": colour, "thickness": 1, "width": 0
    }  # fmt: skip


def _axis_style(axis: Axis) -> dict[str, Any]:
    return {
        "title": {"text": axis.title, "font": {"size": 14}, "standoff": 10},
        "gridcolor": Palette.GRID,
        "zeroline": False,
        "showline": True,
        "linecolor": Palette.MUTED,
        "ticks": "outside",
        "tickcolor": Palette.MUTED,
        "tickfont": {"size": 13},
        "automargin": True,
    }


def _hover_texts(trials: pd.DataFrame, objectives: Sequence[Objective]) -> list[str]:
    """One text per trial, escaped, since Plotly interprets some HTML in hover labels."""
    complete = trials[(trials["state"] == "complete").to_numpy()]
    scales = [scale_for(objective, numbers(complete, objective.name)) for objective in objectives]
    dense = dense_row(trials)
    texts = []
    for _, row in trials.iterrows():
        head = f"<b>Trial {int(row['trial'])}</b>  {html.escape(str(row['point_id']))}"
        lines = [head, f"reduction {percent(number(row, 'reduction'))}"]
        if (tied_with := number(row, "tied_with")) is not None:
            lines.append(f"tied with trial {int(tied_with)} (dominated by it, but within noise)")
        for objective, scale in zip(objectives, scales, strict=True):
            cell = front_cell(row, dense, objective, scale)
            changed = "" if cell.change_interval == "n/a" else f"  ({cell.change_interval})"
            lines.append(f"{objective.label.lower()} {cell.measured}{changed}")
        if origin := str(row.get("origin") or ""):
            lines.append(f"origin: {html.escape(origin)}")
        texts.append("<br>".join(lines))
    return texts
