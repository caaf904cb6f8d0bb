"""Maps of points: cells, labels, escaping, keyboard access and size."""

from __future__ import annotations

import re
import xml.etree.ElementTree as ElementTree
from dataclasses import replace

import pytest

from dse.report.palette import colour_of
from dse.report.point_maps import MAX_MAPS, MapCell, PointMap, map_anchor, point_maps_html

EVIL = "</svg><script>alert('x')</script>"
HALF = MapCell("svd", 8, 0.5)
REMOVED = MapCell("removed", 0, 0.0)
STACK = MapCell("tucker", 4, 0.25, "layers.1.query_key_value")


def point_map(trial: int = 7, layers: int = 3) -> PointMap:
    """Query and key stacked in layer 1, the MLP removed in the last layer, no `down` in layer 0."""
    blank = [MapCell()] * layers
    query, key = [HALF, STACK, *blank[2:]], [MapCell(), STACK, *blank[2:]]
    down: list[MapCell | None] = [None, *blank[2:], REMOVED]
    labels = tuple(str(layer) for layer in range(layers))
    return PointMap(
        trial, f"Trial {trial}: 10.0 % of the parameters removed", ("Origin: refined.", "Why: a gap."), labels,
        ("query", "key", "down"), (tuple(query), tuple(key), tuple(down)), ("layer query", "0 8"),
    )  # fmt: skip


def pictures(page: str) -> list[ElementTree.Element]:
    return [ElementTree.fromstring(svg) for svg in re.findall(r"<svg.*?</svg>", page, re.DOTALL)]


def test_every_tensor_is_a_coloured_cell_with_a_title() -> None:
    (picture,) = pictures(point_maps_html([point_map()]))
    boxes = list(picture.iter("rect"))
    assert len(boxes) == 8, "three layers times three roles, minus the missing `down`"
    fills = [box.get("fill") for box in boxes]
    assert fills.count(colour_of(0.5)) == 1
    assert fills.count(colour_of(0.75)) == 2
    titles = [title.text for title in picture.iter("title")]
    assert titles == [
        "layer 0, query: rank 8 by svd, 50.0 % of its parameters",
        "layer 1, query: rank 4 by tucker as part of layers.1.query_key_value, 25.0 % of its parameters",
        "layer 1, key: rank 4 by tucker as part of layers.1.query_key_value, 25.0 % of its parameters",
        "layer 2, down: removed",
    ]
    assert len(list(picture.iter("path"))) == 1, "a removed block is crossed out"


def test_cells_are_placed_by_layer_and_role() -> None:
    entry = point_map()
    (picture,) = pictures(point_maps_html([entry]))
    corners = [(float(b.get("x", "")), float(b.get("y", ""))) for b in picture.iter("rect")]
    assert len(set(corners)) == 8
    columns, rows = sorted({x for x, _ in corners}), sorted({y for _, y in corners})
    assert (len(columns), len(rows)) == (3, 3)
    assert (columns[0], rows[2]) not in corners
    width, height = map(float, picture.get("viewBox", "").split()[2:])
    assert all(x + 14 <= width and y + 14 <= height for x, y in corners)
    tall = [b for b in picture.iter("rect") if b.get("height") == "15"]
    assert len(tall) == 1, "query and key of the stack are joined"


def test_letters_mark_methods_only_if_there_are_several() -> None:
    page = point_maps_html([point_map()])
    assert "a svd, b tucker" in page
    texts = [text.text for text in pictures(page)[0].iter("text")]
    assert (texts.count("a"), texts.count("b")) == (1, 2)
    one = replace(point_map(), cells=((HALF, HALF, HALF),) * 3)
    assert {text.text for text in pictures(point_maps_html([one]))[0].iter("text")}.isdisjoint({"a", "b"})


def test_all_text_is_escaped() -> None:
    entry = replace(
        point_map(), headline=EVIL, notes=(EVIL,), roles=(EVIL, EVIL, EVIL), layers=(EVIL,) * 3, ranks=(EVIL,),
        cells=((replace(STACK, stack=EVIL),) * 3,) * 3,
    )  # fmt: skip
    assert "<script" not in point_maps_html([entry])


def test_map_is_accessible_by_keyboard_and_screen_reader() -> None:
    page = point_maps_html([point_map()])
    assert f'<figure id="{map_anchor(7)}" tabindex="-1" aria-labelledby="map-7-title">' in page
    (picture,) = pictures(page)
    assert picture.get("role") == "img"
    assert "Origin: refined. Why: a gap." in picture.get("aria-label", "")
    assert "<details><summary>Ranks</summary><pre>layer query\n0 8</pre></details>" in page


@pytest.mark.parametrize("layers", [1, 2, 20, 21, 80, 126])
def test_layer_labels_do_not_overlap(layers: int) -> None:
    cells = tuple((HALF,) * layers for _ in range(7))
    labels = tuple(map(str, range(layers)))
    entry = PointMap(1, "x", (), labels, tuple(f"role{i}" for i in range(7)), cells)
    page = point_maps_html([entry])
    shown = [text.text for text in pictures(page)[0].iter("text") if (text.text or "").isdigit()]
    assert shown[0] == "0"
    assert len(shown) <= 20
    assert len(page) < 40_000 + 200 * 7 * layers


def test_number_of_maps_on_a_page_is_limited() -> None:
    page = point_maps_html([point_map(trial) for trial in range(3 * MAX_MAPS)])
    assert len(pictures(page)) == MAX_MAPS
    assert f"Only the first {MAX_MAPS} of {3 * MAX_MAPS} points" in page
    assert point_maps_html([]) == ""
