"""The difference of two points' rank maps: a Plotly figure, and the same in words."""

from __future__ import annotations

import html
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from dse.design_point import DesignPoint
from dse.report.dashboard.theme import THEMES, axis, frame
from dse.report.rank_map import OUTSIDE_LAYERS, ModelShape, PlacedChoice, placed_choices, rank_map_of

__all__ = ["RankDifference", "difference_plot", "rank_difference"]

_DENSE = "dense"


@dataclass(frozen=True)
class RankDifference:
    """Two points, layer by layer and role by role.

    Attributes:
        layers: Labels of the layers.
        roles: Roles.
        kept: One row per role, one entry per layer: share of the parameters that the second point keeps, minus that of
            the first; None if a layer has no such role or a size is unknown.
        words: The same as text: `rank 64 (svd) to dense`.
        compressed: Number of places where the second point keeps fewer parameters.
        relaxed: Number of places where it keeps more.
        changed: Number of places where the two differ, in method or rank.
    """

    layers: tuple[str, ...]
    roles: tuple[str, ...]
    kept: tuple[tuple[float | None, ...], ...]
    words: tuple[tuple[str, ...], ...]
    compressed: int
    relaxed: int
    changed: int

    @property
    def sentence(self) -> str:
        """The difference in one sentence."""
        if not self.changed:
            return "The two points have the same ranks."
        return (
            f"B keeps fewer parameters than A in {self.compressed} places and more in {self.relaxed};"
            f" {self.changed} of {sum(word != '' for row in self.words for word in row)} places differ."
        )


def rank_difference(first: DesignPoint, second: DesignPoint, shape: ModelShape) -> RankDifference:
    """Compare two points of one model."""
    before, after = placed_choices(first, shape), placed_choices(second, shape)
    rows = {**rank_map_of(first, shape), **dict(rank_map_of(second, shape).items())}
    layers = sorted(rows, key=lambda layer: (layer == OUTSIDE_LAYERS, layer))
    roles = list(dict.fromkeys([*shape["roles"], *(role for row in rows.values() for role in row)]))
    kept: list[tuple[float | None, ...]] = []
    words: list[tuple[str, ...]] = []
    for role in roles:
        inside = [layer != OUTSIDE_LAYERS or (layer, role) in before or (layer, role) in after for layer in layers]
        pairs = [(before.get((layer, role)), after.get((layer, role))) for layer in layers]
        kept.append(tuple(_change(a, b) if here else None for (a, b), here in zip(pairs, inside, strict=True)))
        words.append(
            tuple(f"{_text(a)} to {_text(b)}" if here else "" for (a, b), here in zip(pairs, inside, strict=True))
        )
    values = [value for row in kept for value in row if value is not None]
    differs = [_differs(before, after, layer, role) for role in roles for layer in layers]
    return RankDifference(
        tuple("other" if layer == OUTSIDE_LAYERS else str(layer) for layer in layers),
        tuple(roles),
        tuple(kept),
        tuple(words),
        sum(value < 0 for value in values),
        sum(value > 0 for value in values),
        sum(differs),
    )


def difference_plot(difference: RankDifference, theme_name: str) -> dict[str, Any]:
    """The difference as a heat map: layers across, roles down."""
    theme = THEMES[theme_name]
    texts = [
        [
            f"layer {html.escape(layer)}, {html.escape(role)}<br>{html.escape(word)}"
            for layer, word in zip(difference.layers, row, strict=True)
        ]
        for role, row in zip(difference.roles, difference.words, strict=True)
    ]
    low, middle, high = theme.diverging
    trace = {
        "type": "heatmap",
        "x": [html.escape(layer) for layer in difference.layers],
        "y": [html.escape(role) for role in difference.roles],
        "z": [[None if value is None else 100 * value for value in row] for row in difference.kept],
        "hovertext": texts,
        "hoverinfo": "text",
        "xgap": 2,
        "ygap": 2,
        "zmin": -100,
        "zmax": 100,
        "colorscale": [[0, low], [0.5, middle], [1, high]],
        "colorbar": {
            "title": {"text": "points kept, B - A", "side": "right", "font": {"size": 12}},
            "tickfont": {"size": 11, "color": theme.muted},
            "tickvals": [-100, -50, 0, 50, 100],
            "ticktext": ["-100", "-50", "0", "+50", "+100"],
            "thickness": 10,
            "outlinewidth": 0,
        },
    }
    height = 92 + 24 * max(len(difference.roles), 4)
    layout = frame(
        theme,
        height,
        margin={"l": 110, "r": 16, "t": 8, "b": 44},
        xaxis=axis(theme, "Layer", type="category", showgrid=False, showline=False, ticks="", nticks=32),
        yaxis=axis(theme, type="category", autorange="reversed", showgrid=False, showline=False, ticks=""),
        uirevision="difference",
    )
    return {"data": [trace], "layout": layout}


def _change(before: PlacedChoice | None, after: PlacedChoice | None) -> float | None:
    kept = [1.0 if placed is None else placed.parameter_ratio for placed in (before, after)]
    return None if kept[0] is None or kept[1] is None else kept[1] - kept[0]


def _text(placed: PlacedChoice | None) -> str:
    if placed is None:
        return _DENSE
    choice = placed.choice
    if choice.is_removal:
        return "removed"
    return f"width {choice.rank}" if choice.is_width else f"rank {choice.rank} ({choice.title})"


def _differs(
    before: Mapping[tuple[int, str], PlacedChoice], after: Mapping[tuple[int, str], PlacedChoice], layer: int, role: str
) -> bool:
    a, b = before.get((layer, role)), after.get((layer, role))
    return (None if a is None else a.choice) != (None if b is None else b.choice)
