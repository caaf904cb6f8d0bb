"""A study proposes the same points and finds the same accuracies wherever its weights are."""

from __future__ import annotations

from pathlib import Path

import pytest
from study_support import evaluated, points_and_accuracies
from tiny_study import tiny_study

from dse.config import parse_study
from dse.errors import ConfigError, ModelError
from dse.study import run_study


def test_results_do_not_depend_on_the_residency(tiny_folder: Path, tmp_path: Path) -> None:
    changes = {"objectives": ["accuracy", "parameters", "decode_latency_s"], "budget": {"trials": 3}}
    studies = {
        residency: run_study(tiny_study(tiny_folder, residency=residency, **changes), out=tmp_path / residency)
        for residency in ("dense_and_candidate", "candidate")
    }
    both, one = studies["dense_and_candidate"], studies["candidate"]
    assert points_and_accuracies(one) == points_and_accuracies(both)
    for record in evaluated(one):
        assert record.state == "complete"
        # Candidate and baseline alternate in the same measurement, as without waiting weights.
        assert {"candidate", "baseline", "ratio"} <= record.latency["decode"].keys()


def test_impossible_residencies_are_refused(tiny_folder: Path, tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="needs several GPUs"):
        run_study(tiny_study(tiny_folder, residency="sharded"), out=tmp_path / "sharded")
    with pytest.raises(ConfigError, match="a CUDA graph needs them in one place"):
        parse_study(tiny_study(tiny_folder, residency="candidate", measurement={"mode": "cuda_graph"}))
