"""Colours of the page's figures in a light and a dark theme, and the frame that all figures share.

Groups differ in symbol as well as in colour. The colours are those of `dse.report.palette` and of Okabe and Ito, which
colour-blind readers can distinguish.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from dse.report.palette import Palette

__all__ = ["FONT", "THEMES", "Theme", "axis", "colour_scale", "frame", "proposer_mark"]

FONT = "Inter, 'Segoe UI', Roboto, 'Helvetica Neue', Arial, 'DejaVu Sans', sans-serif"


@dataclass(frozen=True)
class Theme:
    """Colours of one theme, as CSS colours; `proposers` are given to proposers in order of appearance."""

    surface: str
    text: str
    muted: str
    grid: str
    line: str
    trials: str
    bars: str
    front: str
    front_bars: str
    dense: str
    failed: str
    pending: str
    proposers: tuple[str, ...]
    ramp: tuple[str, ...]
    diverging: tuple[str, str, str]


THEMES: Mapping[str, Theme] = {
    "light": Theme(
        surface="#ffffff",
        text=Palette.TEXT,
        muted=Palette.MUTED,
        grid=Palette.GRID,
        line="#9aa5b1",
        trials="#a7b0bb",
        bars=Palette.TRIAL_BARS,
        front=Palette.FRONT,
        front_bars=Palette.FRONT_BARS,
        dense=Palette.DENSE,
        failed="#a3336f",
        pending="#0072b2",
        proposers=("#0072b2", "#b84f00", "#00795b", "#a3336f", "#8a6d00", "#3d7ea6", "#5b4b9a"),
        ramp=Palette.RAMP,
        diverging=("#b35806", "#f4f5f7", "#2d5f9e"),
    ),
    "dark": Theme(
        surface="#171c22",
        text="#e6eaee",
        muted="#a4afba",
        grid="#29313a",
        line="#5a6673",
        trials="#6a7683",
        bars="#36404a",
        front="#4cb7cf",
        front_bars="#5c7d88",
        dense="#ff9248",
        failed="#e58fbf",
        pending="#6db6ec",
        proposers=("#6db6ec", "#ff9248", "#3fc79a", "#e58fbf", "#e6c542", "#9ad3f5", "#b3a5ee"),
        ramp=("#7a5cc4", "#5d86d6", "#3fb3c4", "#5fd08f", "#d5e35b"),
        diverging=("#f0964a", "#262e37", "#6fa8ea"),
    ),
}

_SYMBOLS = ("circle", "square", "diamond", "triangle-up", "cross", "x", "star")


def proposer_mark(theme: Theme, index: int) -> tuple[str, str]:
    """Colour and symbol of the proposer at this position."""
    return theme.proposers[index % len(theme.proposers)], _SYMBOLS[index % len(_SYMBOLS)]


def frame(theme: Theme, height: int, **changes: Any) -> dict[str, Any]:
    """The layout that all figures share; `changes` are further keys of a Plotly layout."""
    layout: dict[str, Any] = {
        "template": None,
        "height": height,
        "autosize": True,
        "margin": {"l": 64, "r": 16, "t": 12, "b": 52},
        "font": {"family": FONT, "size": 13, "color": theme.text},
        "paper_bgcolor": "rgba(0,0,0,0)",
        "plot_bgcolor": "rgba(0,0,0,0)",
        "hoverlabel": {
            "bgcolor": theme.surface,
            "bordercolor": theme.line,
            "font": {"size": 13, "color": theme.text, "family": FONT},
            "align": "left",
        },
        "hovermode": "closest",
        "modebar": {"bgcolor": "rgba(0,0,0,0)", "color": theme.line, "activecolor": theme.text},
    }
    return layout | changes


def axis(theme: Theme, title: str = "", **changes: Any) -> dict[str, Any]:
    """An axis in the style of the page."""
    style: dict[str, Any] = {
        "title": {"text": title, "font": {"size": 13, "color": theme.text}, "standoff": 10},
        "gridcolor": theme.grid,
        "zeroline": False,
        "showline": True,
        "linecolor": theme.line,
        "ticks": "outside",
        "tickcolor": theme.line,
        "tickfont": {"size": 12, "color": theme.muted},
        "automargin": True,
    }
    return style | changes


def colour_scale(colours: Sequence[str]) -> list[list[Any]]:
    """Colours as a Plotly colour scale."""
    return [[index / (len(colours) - 1), colour] for index, colour in enumerate(colours)]
