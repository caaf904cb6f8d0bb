"""PNG of fronts and heat maps, by matplotlib: Plotly's own PNG export (Kaleido) requires an installed Chrome."""

from __future__ import annotations

import io
import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd

from dse.pareto.objective import Objective
from dse.report.front_panels import Panel, Points, front_panels
from dse.report.palette import Palette, colour_of

if TYPE_CHECKING:
    from dse.report.sensitivity_heat_map import HeatMap

__all__ = ["front_png", "heat_map_png"]

_STYLE = {"text.parse_math": False, "font.family": "sans-serif", "text.color": Palette.TEXT}


def front_png(
    trials: pd.DataFrame,
    objectives: Sequence[Objective],
    *,
    x: str | None = None,
    y: str | None = None,
    title: str | None = None,
    dpi: int = 150,
) -> bytes:
    """The plot of `plot_front` as a static image.

    Args:
        x: Horizontal axis of a single panel: an objective or `reduction`.
        title: Line above the panels, shown verbatim.
        dpi: Pixels per inch; a panel is about 6.9 x 4.9 inches.

    Returns:
        The content of a PNG file.

    Raises:
        ConfigError: There is no objective, a column is missing, or an axis is unknown.
    """
    panels = front_panels(trials, objectives, x=x, y=y)
    columns, rows = min(2, len(panels)), math.ceil(len(panels) / 2)
    size = (6.9 * columns if columns > 1 else 8.2, 4.9 * rows + 0.5)

    def draw(figure: Any) -> None:
        for index, panel in enumerate(panels):
            _draw_panel(figure, figure.add_subplot(rows, columns, index + 1), panel)
        handles, labels = figure.axes[0].get_legend_handles_labels()
        figure.legend(
            handles, labels, loc="outside upper left", ncols=3 * columns, frameon=False, fontsize=10.5,
            columnspacing=1.4, handletextpad=0.5, alignment="left", title=title,
            title_fontproperties={"size": 13, "weight": "bold"},
        )  # fmt: skip

    return _png(size, dpi, 11, draw)


def heat_map_png(heat_map: HeatMap, *, dpi: int = 150) -> bytes:
    """The content of a PNG file: rows downwards, columns across, colours on a logarithmic scale."""
    from matplotlib.colors import LinearSegmentedColormap, LogNorm

    low, high = heat_map.limits
    values = np.array([[np.nan if v is None else max(v, low) for v in row] for row in heat_map.values], dtype=float)
    ramp = LinearSegmentedColormap.from_list("sensitivity", [colour_of(step / 10) for step in range(11)])

    def draw(figure: Any) -> None:
        axes = figure.add_subplot()
        drawn = axes.imshow(values, cmap=ramp, norm=LogNorm(low, high), aspect="auto")
        axes.set_xticks(range(len(heat_map.columns)), heat_map.columns, rotation=30, ha="left", rotation_mode="anchor")
        axes.xaxis.tick_top()
        axes.set_yticks(range(len(heat_map.rows)), heat_map.rows)
        axes.tick_params(length=0, colors=Palette.TEXT)
        axes.spines[:].set_visible(False)
        axes.set_ylabel("Layer", fontsize=11)
        _colour_bar(figure, axes, drawn, heat_map.label)
        figure.suptitle(heat_map.title, fontsize=11.5, x=0.01, ha="left")

    return _png((2.6 + 1.05 * len(heat_map.columns), 1.9 + 0.24 * len(heat_map.rows)), dpi, 10, draw)


def _png(size: tuple[float, float], dpi: int, font_size: float, draw: Any) -> bytes:
    # matplotlib is imported late because it takes most of a second. Figure and canvas are used without pyplot, whose
    # global state would affect a notebook.
    from matplotlib import rc_context
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.layout_engine import ConstrainedLayoutEngine

    with rc_context({**_STYLE, "font.size": font_size}):
        layout = ConstrainedLayoutEngine(w_pad=0.1, h_pad=0.1)
        figure = Figure(figsize=size, dpi=dpi, layout=layout, facecolor="white")
        canvas = FigureCanvasAgg(figure)
        draw(figure)
        buffer = io.BytesIO()
        canvas.print_png(buffer, metadata={"Software": None})
    return buffer.getvalue()


def _draw_panel(figure: Any, axes: Any, panel: Panel) -> None:
    groups: tuple[tuple[str, Points, str | None, Mapping[str, Any]], ...] = (
        ("Other trials", panel.others, Palette.TRIAL_BARS, {"s": 34, "color": Palette.TRIALS, "linewidths": 0}),
        ("Tied with the front", panel.tied, Palette.FRONT_BARS,
         {"s": 58, "facecolors": "white", "edgecolors": Palette.FRONT, "linewidths": 1.6}),
        ("Pareto front", panel.front, Palette.FRONT_BARS,
         {"s": 85, "edgecolors": "white", "linewidths": 1.2} | _front_colours(panel)),
        ("Dense model", panel.dense, Palette.DENSE,
         {"s": 95, "marker": "D", "color": Palette.DENSE, "edgecolors": "white", "linewidths": 1.2}),
        ("Knee", panel.knee, None, {"s": 230, "facecolors": "none", "edgecolors": Palette.TEXT, "linewidths": 1.5}),
    )  # fmt: skip
    for order, (label, points, bars, style) in enumerate(groups, start=2):
        if not len(points):
            continue
        if bars is not None:
            _error_bars(axes, points, bars)
        drawn = axes.scatter(points.x, points.y, label=label, zorder=order, **style)
        if "c" in style and panel.colour is not None:
            _colour_bar(figure, axes, drawn, panel.colour.short_title)
    axes.step(
        panel.staircase[:, 0], panel.staircase[:, 1], where="post" if panel.steps_after else "pre",
        color=Palette.FRONT, linewidth=1.6, label="Two-objective front", zorder=1.5,
    )  # fmt: skip
    labels = zip(panel.front.trials, panel.front.x, panel.front.y, panel.label_sides(), strict=True)
    for trial, x, y, (side, level) in labels:
        axes.annotate(
            str(trial), (x, y), xytext=(-5 if side == "left" else 5, 4 if level == "top" else -4),
            textcoords="offset points", fontsize=9.5, zorder=7, ha="right" if side == "left" else "left",
            va="bottom" if level == "top" else "top",
        )  # fmt: skip
    axes.set_xlabel(panel.x.title, fontsize=11.5)
    axes.set_ylabel(panel.y.title, fontsize=11.5)
    axes.grid(color=Palette.GRID, linewidth=0.8)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    axes.spines[["left", "bottom"]].set_color(Palette.MUTED)
    axes.tick_params(colors=Palette.TEXT, labelsize=10.5)
    across, upward = panel.limits()
    axes.set_xlim(across)
    axes.set_ylim(upward)


def _front_colours(panel: Panel) -> dict[str, Any]:
    from matplotlib.colors import LinearSegmentedColormap

    if panel.front.colour is None:
        return {"color": Palette.FRONT}
    return {"c": panel.front.colour, "cmap": LinearSegmentedColormap.from_list("front", Palette.RAMP)}


def _colour_bar(figure: Any, axes: Any, drawn: Any, label: str) -> None:
    bar = figure.colorbar(drawn, ax=axes, pad=0.015, aspect=38)
    bar.outline.set_visible(False)
    bar.set_label(label, fontsize=11)
    bar.ax.tick_params(labelsize=10, length=3)


def _error_bars(axes: Any, points: Points, colour: str) -> None:
    errors = [np.nan_to_num(side) if np.isfinite(side).any() else None for side in (points.x_error, points.y_error)]
    axes.errorbar(
        points.x, points.y, xerr=errors[0], yerr=errors[1], fmt="none", ecolor=colour, elinewidth=0.9, zorder=1
    )  # fmt: skip
