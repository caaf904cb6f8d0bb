"""Studies that heal their front, and `dse heal` on a finished one: values beside the old ones, kills, exports."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import pandas as pd
import pytest
import torch
from tiny_study import tiny_study
from transformers import AutoModelForCausalLM

from dse.cli.main import main
from dse.healing import read_healed
from dse.standalone import export_trials, heal_study
from dse.study import open_study, run_study
from dse.study.healed_front import healed_folder

HEALING = {"tokens": 256, "batch_tokens": 64, "learning_rate": 1e-3, "minutes": None, "other_tokens": 128}


@pytest.fixture
def study_copy(finished_study: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(finished_study, tmp_path / "run"))


def test_a_study_heals_its_front_and_keeps_both_values(tiny_folder: Path, tmp_path: Path) -> None:
    study = run_study(tiny_study(tiny_folder, healing=HEALING, budget={"trials": 4}), out=tmp_path / "run")
    table = study.trials()
    front = table[table["on_front"] & (table["decomposed_tensors"] > 0)]
    healed = table[table["healed.kl_divergence_other"].notna()]
    assert set(front["trial"]) == set(healed["trial"])
    assert len(healed) >= 1
    assert (healed["healed.kl_divergence_other"] <= healed["kl_divergence_other"]).all()
    assert healed["healed.accuracy"].between(0, 1).all()
    written = pd.read_csv(tmp_path / "run" / "trials.csv")
    assert written["healed.on_front"].sum() >= 1
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "run" / "healed").rglob("*")}
    assert before
    run_study(tiny_study(tiny_folder, healing=HEALING, budget={"trials": 4}), out=tmp_path / "run")
    assert before == {path: path.stat().st_mtime_ns for path in (tmp_path / "run" / "healed").rglob("*")}


def test_the_command_prints_both_values_and_leaves_the_search_alone(
    study_copy: Path, capsys: pytest.CaptureFixture[str], own_process: None
) -> None:
    old = open_study(study_copy).trials()
    trial = int(old.loc[(old["state"] == "complete") & (old["decomposed_tensors"] > 0), "trial"].iloc[0])
    command = ["heal", str(study_copy), "--trial", str(trial), "--tokens", "256", "--learning-rate", "1e-3", "--json"]
    assert main(command) == 0
    document = json.loads(capsys.readouterr().out)
    [row] = document["trials"]
    assert row["trial"] == trial
    assert row["healed.kl_divergence_other"] <= row["kl_divergence_other"]
    new = open_study(study_copy).trials()
    pd.testing.assert_frame_equal(new[old.columns], old)
    assert main(command) == 0
    assert json.loads(capsys.readouterr().out) == document


def test_an_export_of_a_healed_trial_computes_with_the_trained_weights(study_copy: Path, tmp_path: Path) -> None:
    study = open_study(study_copy)
    record = next(r for r in study.records if r.state == "complete" and not r.is_dense)
    from dse.config import HealingConfig
    from dse.errors import StudyError

    with pytest.raises(StudyError, match="must be healed"):
        export_trials(study_copy, record.trial, tmp_path / "early", healed=True)
    settings = HealingConfig.model_validate({**HEALING, "learning_rate": 3e-3})
    heal_study(study_copy, [record.trial], settings=settings)
    export_trials(study_copy, record.trial, tmp_path / "healed", healed=True)
    export_trials(study_copy, record.trial, tmp_path / "plain")
    found = read_healed(healed_folder(study_copy, record.trial), record.point)
    assert found is not None
    exported = AutoModelForCausalLM.from_pretrained(tmp_path / "healed", trust_remote_code=True).state_dict()
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "plain", trust_remote_code=True).state_dict()
    same = [name for name, weight in found[0].items() if torch.equal(exported[name], weight)]
    assert len(same) == len(found[0])
    assert any(not torch.equal(plain[name], exported[name]) for name in same)


def test_trials_that_cannot_be_healed_are_named(
    study_copy: Path, capsys: pytest.CaptureFixture[str], own_process: None
) -> None:
    assert main(["heal", str(study_copy), "--trial", "0"]) == 2
    assert "trial 0 is the dense model" in capsys.readouterr().err
    assert main(["heal", str(study_copy), "--trial", "99"]) == 2
    assert "must be one of this study's" in capsys.readouterr().err
    assert main(["heal", str(study_copy), "--text", os.fspath(study_copy / "absent.txt")]) == 2
    assert "must be readable" in capsys.readouterr().err
