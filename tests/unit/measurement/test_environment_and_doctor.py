from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import dse.measurement
from dse.measurement import describe_environment, find_meters, run_checks

ROOT = Path(dse.measurement.__file__).parents[2]


def test_the_environment_is_json_and_correct():
    environment = describe_environment()
    assert json.loads(json.dumps(environment, allow_nan=False)) == environment
    assert environment["packages"]["torch"] == torch.__version__
    assert environment["torch"]["threads"] == torch.get_num_threads()
    assert environment["cpu"]["logical_cores"] == os.cpu_count()
    assert environment["cpu"]["memory_bytes"] > 2**28
    assert environment["cpu"]["model"]
    for name in ("transformers", "tensorly", "optuna", "lm_eval", "pandas", "nvidia-ml-py", "dse"):
        assert name in environment["packages"]


def test_the_environment_has_the_commit_of_a_checkout():
    head = subprocess.run(["git", "-C", str(ROOT), "rev-parse", "HEAD"], capture_output=True, text=True)
    if not (ROOT / ".git").exists() or head.returncode:
        pytest.skip("not a checkout with a commit")
    assert describe_environment()["git"]["commit"] == head.stdout.strip()


@pytest.fixture
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("DSE_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def by_name(checks):
    assert len({check.name for check in checks}) == len(checks)
    return {check.name: check for check in checks}


def test_doctor_reports_this_machine(cache):
    checks = by_name(run_checks())
    assert checks["torch"].status == "ok"
    assert str(torch.__version__) in checks["torch"].detail
    assert checks["cache folder"].status in ("ok", "note")
    assert str(cache) in checks["cache folder"].detail
    assert "bytes) free" in checks["cache folder"].detail
    assert list(cache.iterdir()) == []  # the trial file is gone
    (meter,) = find_meters(torch.device("cpu"))
    assert (checks["energy meter of cpu"].status == "ok") == meter.available
    assert checks["transformers"].status == "ok"
    for check in checks.values():
        assert check.detail
        assert check.remedy or check.status != "missing"


def test_doctor_reports_a_cache_folder_that_is_not_writable(cache):
    cache.write_text("a file where the folder should be")
    check = by_name(run_checks())["cache folder"]
    assert check.status == "missing"
    assert "DSE_CACHE" in check.remedy


def test_public_names_are_listed_and_exist():
    names = dse.measurement.__all__
    assert names == sorted(names)
    assert all(hasattr(dse.measurement, name) for name in names)


def test_gpu_check_without_a_gpu_reports_it_and_exits_3(tmp_path):
    if torch.cuda.is_available():
        pytest.skip("this machine has a GPU: run benchmarks/gpu_check.py directly")
    command = [sys.executable, str(ROOT / "benchmarks" / "gpu_check.py"), "--out", str(tmp_path / "report.json")]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "DSE_CACHE": str(tmp_path)}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=600)
    assert done.returncode == 3, done.stderr
    assert "no GPU: torch sees none on this machine" in done.stderr
    assert not (tmp_path / "report.json").exists()
