"""Page of rank curves: time of factors relative to the dense matrix by rank, one small plot per matrix."""

from __future__ import annotations

import html
import math
from collections.abc import Sequence
from dataclasses import dataclass

from dse.report.palette import Palette

__all__ = ["RankCurve", "RankPanel", "rank_curves_html"]

_WIDTH, _HEIGHT = 400, 232  # pixels of a plot
_LEFT, _RIGHT, _TOP, _BOTTOM = 46, 12, 12, 36
_COLOURS = (*Palette.RAMP[1:4:2], Palette.RAMP[0], Palette.DENSE, Palette.RAMP[2], Palette.MUTED)
_LEAST_TOP = 1.2
_HIGHEST = 8.0  # clips the curves of factors more than eight times slower than dense


@dataclass(frozen=True)
class RankCurve:
    """One phase and batch size of one matrix.

    Attributes:
        label: Such as `decode, batch 1`.
        ranks: Ascending, at least one.
        ratios: Time of the factors / time of the dense matrix, one per rank.
        dense: Time of the dense matrix, as text with its unit.
    """

    label: str
    ranks: tuple[int, ...]
    ratios: tuple[float, ...]
    dense: str

    @property
    def summary(self) -> str:
        """`faster than dense at ranks 64, 128` or `faster than dense at no rank`."""
        faster = [str(rank) for rank, ratio in zip(self.ranks, self.ratios, strict=True) if ratio < 1]
        return f"faster than dense at {'ranks ' + ', '.join(faster) if faster else 'no rank'}"


@dataclass(frozen=True)
class RankPanel:
    """One matrix.

    Attributes:
        title: Its role and shape.
        break_even: Rank at which the factors have as many parameters as the matrix.
        curves: One per phase and batch size.
    """

    title: str
    break_even: int
    curves: tuple[RankCurve, ...]


def rank_curves_html(panels: Sequence[RankPanel], *, title: str, notes: Sequence[str] = ()) -> str:
    """A self-contained HTML page; all text is escaped."""
    labels = list(dict.fromkeys(curve.label for panel in panels for curve in panel.curves))
    colours = {label: _COLOURS[index % len(_COLOURS)] for index, label in enumerate(labels)}
    key = "".join(f'<span><i style="background:{c}"></i>{html.escape(label)}</span>' for label, c in colours.items())
    text = "".join(f"<p>{html.escape(note)}</p>\n" for note in (*notes, _HOW_TO_READ))
    figures = "\n".join(_figure(panel, colours) for panel in panels)
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        "<meta http-equiv=\"Content-Security-Policy\" content=\"default-src 'none'; style-src 'unsafe-inline'\">"
        f"<title>{html.escape(title)}</title>\n<style>{_STYLE}</style></head>\n<body>"
        f'<h1>{html.escape(title)}</h1>\n{text}<p class="key">{key}</p>\n<div class="panels">\n{figures}\n</div>'
        "</body></html>\n"
    )


def _figure(panel: RankPanel, colours: dict[str, str]) -> str:
    heads = "".join(f"<th>{html.escape(text)}</th>" for text in ("", "dense", "rank: time relative to dense"))
    rows = "".join(
        f"<tr><th>{html.escape(curve.label)}</th><td>{html.escape(curve.dense)}</td><td>"
        + ", ".join(f"{rank}: {ratio:.2f}" for rank, ratio in zip(curve.ranks, curve.ratios, strict=True))
        + "</td></tr>"
        for curve in panel.curves
    )
    words = "".join(f"<li>{html.escape(curve.label)}: {curve.summary}</li>" for curve in panel.curves)
    return (
        f"<figure><h2>{html.escape(panel.title)}</h2>{_plot(panel, colours)}<figcaption><ul>{words}</ul></figcaption>"
        f"<details><summary>Figures</summary><table><thead><tr>{heads}</tr></thead><tbody>{rows}</tbody></table>"
        "</details></figure>"
    )


def _plot(panel: RankPanel, colours: dict[str, str]) -> str:
    frame = _Frame.of(panel)
    parts = [
        f'<rect x="{_LEFT}" y="{_TOP}" width="{frame.width}" height="{frame.height}" fill="none" stroke="#cbd2d9"/>'
    ]
    for ratio in frame.ticks:
        y = frame.y(ratio)
        parts.append(f'<path class="grid" d="M{_LEFT} {y:.1f}h{frame.width}"/>')
        parts.append(f'<text x="{_LEFT - 6}" y="{y + 3.5:.1f}" text-anchor="end">{ratio:g}</text>')
    for rank in frame.shown_ranks:
        x, y = frame.x(rank), _HEIGHT - _BOTTOM + 14
        parts.append(f'<text x="{x:.1f}" y="{y}" text-anchor="middle">{rank}</text>')
    middle = _LEFT + frame.width / 2
    parts.append(f'<text x="{middle:.0f}" y="{_HEIGHT - 6}" text-anchor="middle">rank</text>')
    parts.append(
        f'<path class="even" d="M{_LEFT} {frame.y(1.0):.1f}h{frame.width}"><title>as fast as dense</title></path>'
    )
    parts.append(
        f'<path class="even dotted" d="M{frame.x(panel.break_even):.1f} {_TOP}v{frame.height}">'
        f"<title>break-even rank {panel.break_even}: as many parameters as dense</title></path>"
    )
    for curve in panel.curves:
        parts.append(_curve(curve, frame, colours[curve.label]))
    words = "; ".join(f"{curve.label}: {curve.summary}" for curve in panel.curves)
    label = html.escape(f"{panel.title}, break-even rank {panel.break_even}. {words}.", quote=True)
    return f'<svg role="img" aria-label="{label}" viewBox="0 0 {_WIDTH} {_HEIGHT}">{"".join(parts)}</svg>'


def _curve(curve: RankCurve, frame: _Frame, colour: str) -> str:
    places = [(frame.x(rank), frame.y(ratio)) for rank, ratio in zip(curve.ranks, curve.ratios, strict=True)]
    line = "M" + "L".join(f"{x:.1f} {y:.1f}" for x, y in places)
    dots = "".join(
        f'<circle cx="{x:.1f}" cy="{y:.1f}" r="3.5" fill="{colour}"><title>'
        f"{html.escape(curve.label)}, rank {rank}: x{ratio:.2f}</title></circle>"
        for (x, y), rank, ratio in zip(places, curve.ranks, curve.ratios, strict=True)
    )
    return f'<path d="{line}" fill="none" stroke="{colour}" stroke-width="2"/>{dots}'


@dataclass(frozen=True)
class _Frame:
    """Coordinates of a plot, both axes linear: ranks from 0 to just beyond the break-even rank, ratios from 0."""

    ranks: tuple[int, ...]
    last_rank: float
    top: float
    width: int = _WIDTH - _LEFT - _RIGHT
    height: int = _HEIGHT - _TOP - _BOTTOM

    @classmethod
    def of(cls, panel: RankPanel) -> _Frame:
        ranks = tuple(sorted({rank for curve in panel.curves for rank in curve.ranks}))
        highest = max((ratio for curve in panel.curves for ratio in curve.ratios if math.isfinite(ratio)), default=1.0)
        return cls(ranks, 1.05 * max(panel.break_even, *ranks), min(max(_LEAST_TOP, 1.08 * highest), _HIGHEST))

    def x(self, rank: float) -> float:
        return _LEFT + self.width * rank / self.last_rank

    def y(self, ratio: float) -> float:
        return _TOP + self.height * (1.0 - min(max(ratio, 0.0), self.top) / self.top)

    @property
    def ticks(self) -> tuple[float, ...]:
        step = next(s for s in (0.25, 0.5, 1.0, 2.0) if self.top / s <= 6)
        return tuple(step * index for index in range(int(self.top / step) + 1))

    @property
    def shown_ranks(self) -> tuple[int, ...]:
        """Ranks whose labels do not overlap, chosen from the largest downwards."""
        shown: list[int] = []
        for rank in reversed(self.ranks):
            if not shown or self.x(shown[-1]) - self.x(rank) >= 9 + 7 * len(str(shown[-1])):
                shown.append(rank)
        return tuple(reversed(shown))


_HOW_TO_READ = (
    "Each plot shows one matrix: the time of the factors relative to dense, by rank. Below the dashed line at 1 the"
    " factors are faster. The dotted line is the break-even rank, where the factors have as many parameters as the"
    " dense matrix."
)

_STYLE = (
    "body{font:15px Inter,'Segoe UI',Roboto,Arial,sans-serif;margin:2em;color:" + Palette.TEXT + "}"
    "h1{font-size:1.25em}h2{font-size:1em;margin:0 0 .3em}p{max-width:60em;color:" + Palette.MUTED + ";margin:.3em 0}"
    ".panels{display:grid;grid-template-columns:repeat(auto-fill,minmax(min(100%,380px),1fr));gap:26px 30px}"
    "figure{margin:0;min-width:0}svg{width:100%;max-width:520px;height:auto;display:block}"
    "svg text{font-size:11px;fill:" + Palette.MUTED + "}.grid{stroke:" + Palette.GRID + "}"
    ".even{stroke:" + Palette.TEXT + ";stroke-width:1.5;stroke-dasharray:6 4}.dotted{stroke-dasharray:1.5 3}"
    ".key{display:flex;flex-wrap:wrap;gap:4px 20px;margin:.8em 0 1.2em}"
    ".key i{display:inline-block;width:14px;height:14px;margin-right:6px;vertical-align:-2px}"
    "figcaption,details{font-size:13.5px;color:" + Palette.MUTED + "}ul{margin:.2em 0;padding-left:1.2em}"
    "td,th{padding:.1em .6em .1em 0;text-align:left;font-weight:normal;vertical-align:top}"
)
