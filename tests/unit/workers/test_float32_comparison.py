"""A study in half precision says what that changes."""

from __future__ import annotations

from pathlib import Path

import torch
from study_support import Watcher
from tiny_study import tiny_study

from dse.models import load_model
from dse.study import open_study, run_study
from dse.workers.float32_comparison import half_precision_notice


def test_a_study_in_bfloat16_reports_the_difference(tiny_folder: Path, tmp_path: Path, own_cache: Path) -> None:
    watcher = Watcher()
    model = {"ref": str(tiny_folder / "model"), "device": "cpu", "dtype": "bfloat16"}
    run_study(tiny_study(tiny_folder, model=model, budget={"trials": 2}), out=tmp_path / "half", listener=watcher)
    entry = open_study(tmp_path / "half").attributes["float32"]["tiny_choice"]
    full = run_study(tiny_study(tiny_folder, budget={"trials": 1}), out=tmp_path / "full")
    assert entry["float32"] == full.records[0].quantities["accuracy"].value
    assert entry["value"] == open_study(tmp_path / "half").records[0].quantities["accuracy"].value
    assert entry["documents"] == 24
    assert any("in bfloat16" in message and "in float32" in message for message in watcher.messages)
    assert "tiny_choice acc" in open_study(tmp_path / "half").facts()["In float32 instead"]


def test_a_study_may_do_without(tiny_folder: Path, tmp_path: Path, own_cache: Path) -> None:
    model = {"ref": str(tiny_folder / "model"), "device": "cpu", "dtype": "bfloat16"}
    config = tiny_study(tiny_folder, model=model, budget={"trials": 1}, evaluation={"compare_float32": False})
    assert "float32" not in run_study(config, out=tmp_path / "run").attributes


def test_float32_needs_no_notice(tiny_folder: Path) -> None:
    assert half_precision_notice(load_model(str(tiny_folder / "model"))) is None
    half = half_precision_notice(load_model(str(tiny_folder / "model"), dtype="bfloat16"))
    assert (half is None) == torch.ops.mkldnn._is_mkldnn_bf16_supported()
