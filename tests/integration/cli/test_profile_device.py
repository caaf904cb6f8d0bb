"""`dse profile-device`: every matrix is timed once at every rank."""

from __future__ import annotations

import json
import re
import xml.etree.ElementTree as ElementTree
from pathlib import Path

import pytest

from dse.cli import main


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DSE_CACHE", str(tmp_path))


def run(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, str, str]:
    code = main(["profile-device", *arguments])
    captured = capsys.readouterr()
    return code, captured.out, captured.err


def test_matrices_are_timed_once_and_then_read_from_the_cache(
    tiny_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["--model", str(tiny_folder / "model"), "--ranks", "2,9", "--batch", "1,2", "--prompt", "8"]
    code, out, err = run(capsys, *arguments, "--json")
    assert code == 0, err
    document = json.loads(out)
    rows = document["matrices"]
    # Rank 9 is below the break-even rank of every matrix (10 for key and value); two ranks, batch sizes and phases.
    roles = {"query", "key", "value", "attention_output", "gate", "up", "down", "query_key_value", "gate_up"}
    assert {row["role"] for row in rows} == roles
    assert len(rows) == len(roles) * 2 * 2 * 2
    for row in rows:
        assert row["ratio"] == row["decomposed_s"] / row["dense_s"]
        assert row["is_faster"] == (row["ratio"] < 1)
    assert document["timed_now"] > 0
    again = json.loads(run(capsys, *arguments, "--json")[1])
    assert again["timed_now"] == 0
    assert again["matrices"] == rows
    code, out, _ = run(capsys, *arguments)
    assert code == 0
    assert "96 x 32" in out
    assert "0 products timed now" in out


def test_the_profile_is_plotted(tiny_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model, page = ["--model", str(tiny_folder / "model")], tmp_path / "profile.html"
    code, out, err = run(capsys, *model, "--ranks", "2,5,9", "--prompt", "8", "--plot", str(page), "--json")
    assert code == 0, err
    assert f"plot written to {page}" in err
    rows, drawn = json.loads(out)["matrices"], page.read_text()
    pictures = [ElementTree.fromstring(svg) for svg in re.findall(r"<svg.*?</svg>", drawn, re.DOTALL)]
    assert len(pictures) == len({row["role"] for row in rows}) == 9
    titles = [title.text or "" for picture in pictures for title in picture.iter("title")]
    for row in rows:
        assert titles.count(f"{row['phase']}, batch 1, rank {row['rank']}: x{row['ratio']:.2f}") >= 1
    assert sum(title.startswith("break-even rank 16:") for title in titles) == 2  # query and output, 32 x 32
    assert "<script" not in drawn
    for picture in pictures:
        dots = [(float(dot.get("cx", "")), float(dot.get("cy", ""))) for dot in picture.iter("circle")]
        assert len(dots) == 3 * 2
        assert all(46 <= x <= 388 and 12 <= y <= 196 for x, y in dots), "inside the frame"
    with pytest.raises(SystemExit):
        main(["profile-device", *model, "--ranks", "2", "--plot", "profile.pdf"])
    assert "must be a file that ends in .html" in capsys.readouterr().err


def test_ranks_of_a_space_and_a_rank_above_every_break_even_rank(
    tiny_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    space = tiny_folder / "profiled_space.yaml"
    space.write_text("{name: s, methods: [svd], roles: [up], ranks: {absolute: [3, 5]}}")
    model = ["--model", str(tiny_folder / "model")]
    code, out, err = run(capsys, *model, "--space", str(space), "--prompt", "8", "--json")
    assert code == 0, err
    rows = json.loads(out)["matrices"]
    assert {(row["role"], row["rank"]) for row in rows} == {("up", 3), ("up", 5)}
    code, _, err = run(capsys, *model, "--ranks", "999")
    assert code == 2
    assert "a rank must lie within the break-even of some matrix" in err
