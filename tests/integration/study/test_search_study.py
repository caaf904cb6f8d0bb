"""Whole studies with the search on: origins, what they are reported as, and the same proposals after a stop."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from study_support import Watcher, evaluated, interrupt, points_and_accuracies
from tiny_study import tiny_study

from dse.cli import main
from dse.config import parse_study
from dse.errors import ConfigError
from dse.study import Study, open_study, run_study


@pytest.fixture(scope="module")
def searched(tiny_folder: Path, tmp_path_factory: pytest.TempPathFactory, cache_folder: Path) -> Iterator[Study]:
    """A study whose sampler and refinements compete."""
    config = tiny_study(tiny_folder, sampler={"name": "tpe"}, budget={"trials": 24})
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("DSE_CACHE", str(cache_folder / "dse"))
        yield run_study(config, out=tmp_path_factory.mktemp("searched") / "run")


def test_refinements_compete_with_the_sampler(searched: Study) -> None:
    records = evaluated(searched)
    refined = [record for record in records if record.origin == "refined"]
    assert refined
    assert any(record.origin in ("sampler", "repaired") for record in records)
    for record in refined:
        assert "trial" in record.why
        assert record.state == "complete"
        assert 0.02 <= record.cost["reduction"] <= 0.5
    shares = searched.origin_shares
    assert sum(share.evaluations for share in shares) == len(records) - 1
    on_front = sum(not record.is_dense for record in searched.front_records)
    assert sum(share.front_points for share in shares) == on_front
    # What all origins gained, and the dense model's own box, are the hypervolume.
    assert 0 < sum(share.hypervolume_gained for share in shares) <= (searched.hypervolume or 0) + 1e-12


def test_shares_are_told(searched: Study, capsys: pytest.CaptureFixture[str]) -> None:
    directory = str(searched.folder.path)
    assert main(["front", directory]) == 0
    line = next(line for line in capsys.readouterr().out.splitlines() if line.startswith("origins: "))
    assert main(["front", directory, "--json"]) == 0
    document = json.loads(capsys.readouterr().out)
    assert document["origins"] == [dataclasses.asdict(share) for share in searched.origin_shares]
    page = searched.folder.front_html.read_text()
    for share in searched.origin_shares:
        count = f"{share.origin}: {share.evaluations} evaluation{'' if share.evaluations == 1 else 's'},"
        words = f"{count} {share.front_points} on the front"
        assert words in line
        assert words in page
    assert {"origin", "why"} <= set(searched.trials().columns)


def test_a_stopped_study_proposes_what_an_undisturbed_one_would_have(
    tiny_folder: Path, tmp_path: Path, searched: Study
) -> None:
    config = tiny_study(tiny_folder, sampler={"name": "tpe"}, budget={"trials": 24})
    refined = next(i for i, record in enumerate(evaluated(searched)) if record.origin == "refined")
    for finished, when in ((4, "before"), (refined, "during"), (refined + 1, "before"), (20, "during")):
        watcher = Watcher(**{when: {finished: interrupt}})  # type: ignore[arg-type]
        with pytest.raises(KeyboardInterrupt):
            run_study(config, out=tmp_path / "run", listener=watcher)
        assert open_study(tmp_path / "run").evaluated_trials == finished
    resumed = run_study(config, out=tmp_path / "run")
    assert points_and_accuracies(resumed) == points_and_accuracies(searched)
    assert resumed.origin_shares == searched.origin_shares


def test_parts_are_switched_off(tiny_folder: Path, tmp_path: Path) -> None:
    def origins(name: str, search: Any, sampler: str = "tpe") -> set[str]:
        config = tiny_study(tiny_folder, search=search, sampler={"name": sampler}, budget={"trials": 14})
        study = run_study(config, out=tmp_path / name)
        return {record.origin for record in study.records} - {"dense", "repaired"}

    assert origins("off", "off") == {"sampler"}
    plain = {"refinement": False, "warm_starts": False, "refit": False}
    assert origins("start_up", plain) == {"ladder", "spread", "sampler"}
    assert "refined" in origins("random_refined", {"refinement": True}, "random")


@pytest.mark.parametrize(
    ("sampler", "start_up", "refinement"),
    [("tpe", True, True), ("gp", True, True), ("nsga2", True, False), ("random", False, False), ("qmc", False, False)],
)
def test_auto_depends_on_the_sampler(tiny_folder: Path, sampler: str, start_up: bool, refinement: bool) -> None:
    for search in ("auto", True, {}):
        parts = parse_study(tiny_study(tiny_folder, search=search, sampler={"name": sampler})).search_parts
        assert (parts.start_up, parts.refinement) == (start_up, refinement)
    for search in ("off", False):
        parts = parse_study(tiny_study(tiny_folder, search=search, sampler={"name": sampler})).search_parts
        assert not any(dataclasses.astuple(parts))
    with pytest.raises(ConfigError, match="must be auto, off, or parts"):
        parse_study(tiny_study(tiny_folder, search="atuo"))
    with pytest.raises(ConfigError, match="did you mean 'refinement'"):
        parse_study(tiny_study(tiny_folder, search={"refinment": False}))
