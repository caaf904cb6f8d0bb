"""Curves of time against rank: text, coordinates and escaping."""

from __future__ import annotations

import re
import xml.etree.ElementTree as ElementTree

from dse.report.rank_curves import RankCurve, RankPanel, rank_curves_html

CURVE = RankCurve("decode, batch 1", (8, 16, 32), (0.5, 0.9, 1.5), "40 us")


def circles(page: str) -> list[tuple[float, float]]:
    (picture,) = [ElementTree.fromstring(svg) for svg in re.findall(r"<svg.*?</svg>", page, re.DOTALL)]
    return [(float(dot.get("cx", "")), float(dot.get("cy", ""))) for dot in picture.iter("circle")]


def even(page: str) -> tuple[float, float]:
    """y of the line at a ratio of 1, and x of the break-even rank."""
    across = re.search(r'class="even" d="M46 ([\d.]+)h', page)
    upward = re.search(r'class="even dotted" d="M([\d.]+) 12v', page)
    assert across is not None
    assert upward is not None
    return float(across[1]), float(upward[1])


def test_points_are_on_the_right_side_of_the_reference_lines() -> None:
    page = rank_curves_html([RankPanel("query, 64 x 64", 32, (CURVE,))], title="t")
    one, break_even = even(page)
    dots = circles(page)
    assert [y > one for _, y in dots] == [True, True, False]  # below the line is faster
    assert [x < break_even for x, _ in dots] == [True, True, False]
    assert abs(dots[2][0] - break_even) < 0.1
    # Ranks and ratios are linear: rank 16 is twice as far as rank 8.
    assert abs((dots[1][0] - 46) - 2 * (dots[0][0] - 46)) < 0.2
    assert "faster than dense at ranks 8, 16" in page


def test_slow_curve_is_clipped_at_the_frame() -> None:
    slow = RankCurve("prefill, batch 1", (1,), (90.0,), "1 us")
    page = rank_curves_html([RankPanel("key, 4 x 4", 2, (slow,))], title="t")
    assert "faster than dense at no rank" in page
    assert circles(page)[0][1] == 12.0  # clipped at the top


def test_all_text_is_escaped() -> None:
    evil = "<script>alert(1)</script>"
    page = rank_curves_html([RankPanel(evil, 2, (RankCurve(evil, (1,), (1.0,), evil),))], title=evil, notes=(evil,))
    assert "<script" not in page
    assert "default-src 'none'" in page
