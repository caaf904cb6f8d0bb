"""Fronts and heat maps as PNG for files and READMEs (the only importer of matplotlib)."""

from __future__ import annotations

import io
import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import pandas as pd

from dse.pareto.objective import Objective
from dse.report.heat_map import HeatMap, colour_of
from dse.report.panels import Palette, Panel, Points, panels

__all__ = ["front_png", "heat_map_png"]


def front_png(
    trials: pd.DataFrame,
    objectives: Sequence[Objective],
    *,
    x: str | None = None,
    y: str | None = None,
    title: str | None = None,
    dpi: int = 150,
) -> bytes:
    """The picture that `plot_front` draws, still.

    Args:
        trials: The trials table.
        objectives: What was traded off.
        x: Horizontal axis of a single panel: an objective's name or `reduction`.
        y: Vertical axis.
        title: Line above the panels, shown as it is.
        dpi: Pixels an inch; a panel is about 6.4 x 5 inches.

    Returns:
        The content of a PNG file.

    Raises:
        ConfigError: There is no objective, a column is missing, or an axis is unknown.
    """
    # Imported here because matplotlib takes most of a second and only this function needs it. Figure and canvas are
    # used without pyplot, whose global state would leak into a notebook.
    from matplotlib import rc_context
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.layout_engine import ConstrainedLayoutEngine

    drawn = panels(trials, objectives, x=x, y=y)
    columns, rows = min(2, len(drawn)), math.ceil(len(drawn) / 2)
    style = {"text.parse_math": False, "font.family": "sans-serif", "font.size": 11, "text.color": Palette.TEXT}
    with rc_context(style):
        figure = Figure(
            figsize=(6.9 * columns if columns > 1 else 8.2, 4.9 * rows + 0.5),
            dpi=dpi,
            layout=ConstrainedLayoutEngine(w_pad=0.1, h_pad=0.1),
            facecolor="white",
        )
        canvas = FigureCanvasAgg(figure)
        for index, panel in enumerate(drawn):
            _draw(figure, figure.add_subplot(rows, columns, index + 1), panel)
        handles, labels = figure.axes[0].get_legend_handles_labels()
        figure.legend(
            handles, labels, loc="outside upper left", ncols=len(labels), frameon=False, fontsize=10.5,
            columnspacing=1.4, handletextpad=0.5, alignment="left", title=title,
            title_fontproperties={"size": 13, "weight": "bold"},
        )  # fmt: skip
        buffer = io.BytesIO()
        canvas.print_png(buffer, metadata={"Software": None})
    return buffer.getvalue()


def _draw(figure: Any, axes: Any, panel: Panel) -> None:
    _error_bars(axes, panel.others, Palette.TRIAL_BARS)
    axes.scatter(
        panel.others.x, panel.others.y, s=34, color=Palette.TRIALS, linewidths=0, label="Other trials", zorder=2
    )
    axes.step(
        panel.staircase[:, 0],
        panel.staircase[:, 1],
        where="post" if panel.steps_after else "pre",
        color=Palette.FRONT,
        linewidth=1.6,
        label="Best in this plane",
        zorder=1.5,
    )
    _error_bars(axes, panel.tied, Palette.FRONT_BARS)
    if len(panel.tied):
        axes.scatter(
            panel.tied.x, panel.tied.y, s=58, facecolors="white", edgecolors=Palette.FRONT, linewidths=1.6,
            label="Tied with the front", zorder=3,
        )  # fmt: skip
    _error_bars(axes, panel.front, Palette.FRONT_BARS)
    _front(figure, axes, panel)
    _error_bars(axes, panel.dense, Palette.DENSE)
    if len(panel.dense):
        axes.scatter(
            panel.dense.x, panel.dense.y, s=95, marker="D", color=Palette.DENSE, edgecolors="white", linewidths=1.2,
            label="Dense model", zorder=5,
        )  # fmt: skip
    if len(panel.knee):
        axes.scatter(
            panel.knee.x, panel.knee.y, s=230, facecolors="none", edgecolors=Palette.TEXT, linewidths=1.5, label="Knee",
            zorder=6,
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


def _front(figure: Any, axes: Any, panel: Panel) -> None:
    if not len(panel.front):
        return
    style = {"s": 85, "edgecolors": "white", "linewidths": 1.2, "label": "Pareto front", "zorder": 4}
    if panel.colour is None or panel.front.colour is None:
        axes.scatter(panel.front.x, panel.front.y, color=Palette.FRONT, **style)
    else:
        from matplotlib.colors import LinearSegmentedColormap

        ramp = LinearSegmentedColormap.from_list("front", Palette.RAMP)
        drawn = axes.scatter(panel.front.x, panel.front.y, c=panel.front.colour, cmap=ramp, **style)
        bar = figure.colorbar(drawn, ax=axes, pad=0.015, aspect=38)
        bar.outline.set_visible(False)
        bar.set_label(panel.colour.short_title, fontsize=11)
        bar.ax.tick_params(labelsize=10, length=3)
    labels = zip(panel.front.trials, panel.front.x, panel.front.y, panel.label_sides(), strict=True)
    for trial, x, y, (side, level) in labels:
        offset = (-5 if side == "left" else 5, 4 if level == "top" else -4)
        axes.annotate(
            str(trial), (x, y), xytext=offset, textcoords="offset points", fontsize=9.5, zorder=7,
            ha="right" if side == "left" else "left", va="bottom" if level == "top" else "top",
        )  # fmt: skip


def _error_bars(axes: Any, points: Points, colour: str) -> None:
    if not len(points):
        return
    errors = [np.nan_to_num(side) if np.isfinite(side).any() else None for side in (points.x_error, points.y_error)]
    axes.errorbar(
        points.x, points.y, xerr=errors[0], yerr=errors[1], fmt="none", ecolor=colour, elinewidth=0.9, zorder=1
    )  # fmt: skip


def heat_map_png(heat_map: HeatMap, *, dpi: int = 150) -> bytes:
    """The content of a PNG file: rows downwards, columns across, colours on a logarithmic scale."""
    from matplotlib import rc_context
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.colors import LinearSegmentedColormap, LogNorm
    from matplotlib.figure import Figure

    low, high = heat_map.limits
    values = np.array([[np.nan if v is None else max(v, low) for v in row] for row in heat_map.values], dtype=float)
    ramp = LinearSegmentedColormap.from_list("divergence", [colour_of(step / 10) for step in range(11)])
    style = {"text.parse_math": False, "font.family": "sans-serif", "font.size": 10, "text.color": Palette.TEXT}
    with rc_context(style):
        size = (2.6 + 1.05 * len(heat_map.columns), 1.9 + 0.24 * len(heat_map.rows))
        figure = Figure(figsize=size, dpi=dpi, layout="constrained", facecolor="white")
        canvas = FigureCanvasAgg(figure)
        axes = figure.add_subplot()
        drawn = axes.imshow(values, cmap=ramp, norm=LogNorm(low, high), aspect="auto")
        axes.set_xticks(range(len(heat_map.columns)), heat_map.columns, rotation=30, ha="left", rotation_mode="anchor")
        axes.xaxis.tick_top()
        axes.set_yticks(range(len(heat_map.rows)), heat_map.rows)
        axes.tick_params(length=0, colors=Palette.TEXT)
        axes.spines[:].set_visible(False)
        axes.set_ylabel("Layer", fontsize=11)
        bar = figure.colorbar(drawn, ax=axes, pad=0.015, aspect=38)
        bar.outline.set_visible(False)
        bar.set_label(heat_map.label, fontsize=10)
        figure.suptitle(heat_map.title, fontsize=11.5, x=0.01, ha="left")
        buffer = io.BytesIO()
        canvas.print_png(buffer, metadata={"Software": None})
    return buffer.getvalue()
