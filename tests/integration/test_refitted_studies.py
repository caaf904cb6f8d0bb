"""A study with a method that refits the whole point: the export is the evaluated model."""

from __future__ import annotations

from pathlib import Path

import pytest
from tiny_study import tiny_study

import dse
from dse.config import EvaluationConfig, parse_study
from dse.evaluation import evaluator_for
from dse.models import load_model
from dse.search.spaces.base import SearchSpace
from dse.study import StudyListener, load_study_model, run_study, study_bank

CALIBRATION = {"sources": [{"builtin": "grammar"}], "tokens": 2048, "window": 32}


@pytest.mark.usefixtures("own_cache")
def test_the_export_of_a_refitted_trial_scores_like_the_trial(tiny_folder: Path, tmp_path: Path) -> None:
    space = {
        "name": "refitted",
        "methods": ["fisher_svd_refit"],
        "layers": [1, 2],
        "groups": {"layers": 1, "roles": "together"},
        "ranks": {"absolute": [4, 9]},
    }
    objectives = ["choice_probability", "parameters"]
    config = parse_study(
        tiny_study(tiny_folder, space=space, calibration=CALIBRATION, objectives=objectives, budget={"trials": 3})
    )
    study = run_study(config, out=tmp_path / "run")
    table = study.trials().query("state == 'complete'")
    assert len(table) == 3
    trial = int(table["trial"].iloc[-1])
    refitted = study.record(trial).point
    dse.export_trials(study, trial, tmp_path / "export")
    exported = load_model(str(tmp_path / "export"), trust_remote_code=True)
    found = evaluator_for(exported, config.tasks, EvaluationConfig()).evaluate()
    row = table.set_index("trial").loc[trial]
    interval = found.graded_interval("choice_probability")
    assert interval is not None
    assert interval.value == pytest.approx(row["choice_probability"], abs=1e-5)

    # The same ranks without the refit give another model, with other keys in the cache.
    loaded = load_study_model(config)
    bank, _ = study_bank(config, loaded, SearchSpace.from_config(config.space, loaded.topology), StudyListener())
    name = "layers.1.down"  # after other decomposed tensors, whose errors it receives
    choice = refitted.by_name[name]
    assert bank.of_point(refitted).factors(name, choice).left.sub(bank.factors(name, choice).left).abs().max() > 1e-4
