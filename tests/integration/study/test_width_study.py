"""A study whose MLPs may have fewer channels: its trials, its texts, and an export of one of its points."""

from __future__ import annotations

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
    "widths": True,
    "removal": True,
    "ranks": {"kept_fractions": [0.9, 0.7, 0.5, 0.3], "multiple": 4},
    "limits": {"reduction": {"min": 0.02, "max": 0.5}},
}


@pytest.fixture(scope="module")
def narrow(tiny_folder: Path, tmp_path_factory: pytest.TempPathFactory, cache_folder: Path) -> Iterator[Study]:
    config = tiny_study(tiny_folder, space=SPACE, sampler={"name": "tpe"}, budget={"trials": 12})
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("DSE_CACHE", str(cache_folder / "dse"))
        yield run_study(config, out=tmp_path_factory.mktemp("narrow") / "run")


def test_a_study_finds_and_shows_widths(narrow: Study, capsys: pytest.CaptureFixture[str]) -> None:
    records = [record for record in evaluated(narrow) if record.point.widths]
    assert records
    assert all(record.state == "complete" for record in records)
    assert {record.origin for record in records} >= {"allocation"}
    trial = records[0].trial
    assert main(["front", str(narrow.folder.path), "--explain", str(trial)]) == 0
    shown = capsys.readouterr().out
    kept = next(iter(records[0].point.widths.values()))
    assert f"w{kept}" in shown
    assert "channels: layers." in shown
    assert "channels" in narrow.folder.front_html.read_text()


def test_a_trial_of_reduced_width_is_exported(narrow: Study, tmp_path: Path) -> None:
    record = next(record for record in evaluated(narrow) if record.point.widths)
    out = tmp_path / "thin"
    assert main(["export", str(narrow.folder.path), "--trial", str(record.trial), "--out", str(out)]) == 0
    card = next(out.rglob("README.md")).read_text()
    assert "MLPs reduced to" in card
