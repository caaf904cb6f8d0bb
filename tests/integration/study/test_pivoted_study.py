"""A study of points with pivoted factors: its trials, its texts, and exports of one of its points."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
from study_support import evaluated
from tiny_study import tiny_study

from dse.cli import main
from dse.study import Study, run_study

SPACE = {
    "name": "forms",
    "kind": "depth_profile",
    "methods": ["svd"],
    "forms": ["pivoted"],
    "ranks": {"kept_fractions": [0.9, 0.7, 0.5, 0.3], "multiple": 2},
    "limits": {"reduction": {"min": 0.02, "max": 0.5}},
}


@pytest.fixture(scope="module")
def pivoted(tiny_folder: Path, tmp_path_factory: pytest.TempPathFactory, cache_folder: Path) -> Iterator[Study]:
    config = tiny_study(tiny_folder, space=SPACE, sampler={"name": "tpe"}, budget={"trials": 12})
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("DSE_CACHE", str(cache_folder / "dse"))
        yield run_study(config, out=tmp_path_factory.mktemp("pivoted") / "run")


def test_a_study_evaluates_and_shows_pivoted_factors(pivoted: Study, capsys: pytest.CaptureFixture[str]) -> None:
    records = [record for record in evaluated(pivoted) if record.point.decomposed]
    assert len(records) > 5
    assert all(record.state == "complete" for record in records)
    assert all(choice.is_pivoted for record in records for _, choice in record.point)
    assert {record.origin for record in records} >= {"allocation"}
    assert main(["front", str(pivoted.folder.path), "--explain", str(records[0].trial)]) == 0
    shown = capsys.readouterr().out
    assert "replaced by independent rows or columns and combinations of them (pivoted svd" in " ".join(shown.split())
    assert f" p{records[0].point.choices[0][1].rank}" in shown
    assert "by pivoted svd" in pivoted.folder.front_html.read_text()


def test_a_pivoted_trial_is_exported_in_both_forms(pivoted: Study, tmp_path: Path) -> None:
    record = next(record for record in evaluated(pivoted) if record.point.decomposed)
    for name, more in (("thin", []), ("dense", ["--format", "dense"])):
        arguments = ["--trial", str(record.trial), "--out", str(tmp_path / name), *more]
        assert main(["export", str(pivoted.folder.path), *arguments]) == 0
        config = json.loads((tmp_path / name / "config.json").read_text())
        pivoted_parts = [part for part in config.get("low_rank", {}).values() if "rows" in part or "columns" in part]
        assert len(pivoted_parts) == (len(record.point.choices) if name == "thin" else 0)
