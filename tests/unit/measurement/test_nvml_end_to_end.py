"""`dse measure`, `dse doctor` and a whole study with an energy objective, on the scripted NVML library."""

from __future__ import annotations

import csv
import json
import subprocess
import sys
from pathlib import Path

import pytest
from nvml_library import with_library
from tiny_models import save_tiny_model
from tiny_study import environment as offline
from tiny_study import tiny_study, write_study

GPU_0, GPU_1 = "GPU-0000000a-fake", "GPU-0000000b-fake"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("energy")
    save_tiny_model(folder / "model")
    return folder


def dse(library: Path, folder: Path, *arguments: str, **script: str) -> subprocess.CompletedProcess[str]:
    environment = {**offline(folder / "cache"), **with_library(library, PERIOD_MS="5", **script)}
    command = [sys.executable, "-m", "dse.cli", *arguments]
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300, cwd=folder)


def test_measure_reports_the_scripted_energy(nvml_library: Path, folder: Path) -> None:
    point = '{"method": "svd", "rank": 2, "layers": "all", "roles": ["up"]}'
    arguments = ["measure", "--model", str(folder / "model"), "--point", point, "--meter", f"nvml:{GPU_1}"]
    sizes = ["--prompt", "8", "--new", "4", "--blocks", "2", "--precision", "0.9"]
    done = dse(nvml_library, folder, *arguments, *sizes, "--json", POWER="0:60", DEVICES="2")
    assert done.returncode == 0, done.stderr
    document = json.loads(done.stdout)
    assert document["meter"] == {"name": "nvml", "source": "NVML total-energy counter", "is_replay": False}
    assert document["idle_power"]["power_w"] == pytest.approx(120, rel=0.05)  # the second device draws twice as much
    (cell,) = document["cells"]
    for side in ("dense", "point"):
        energy = cell["energy"][side]
        assert energy["is_valid"], energy["reason"]
        for phase in ("prefill", "decode"):
            for window in energy[phase]["windows"]:
                assert list(window["per_device_j"]) == [GPU_1]
                assert window["gross_j"] == pytest.approx(120 * window["duration_s"], rel=0.05)
                assert abs(window["net_j"]) < 0.1 * window["gross_j"]  # the scripted power is idle power


def test_doctor_lists_every_gpu_and_tries_its_meter(nvml_library: Path, folder: Path) -> None:
    done = dse(nvml_library, folder, "doctor", "--json", POWER="0:60", DEVICES="2")
    assert done.returncode == 0, done.stderr
    checks = {check["name"]: check for check in json.loads(done.stdout)}
    for index, uuid, power in ((0, GPU_0, 60), (1, "GPU-0000000b-fake", 120)):
        check = checks[f"energy meter of GPU {index} (Fake GPU {index}, {uuid})"]
        assert check["status"] == "ok"
        head, _, tried = check["detail"].partition("; tried: ")
        source, _, period = head.partition(", refreshes every ")
        assert source == "nvml: NVML total-energy counter"
        assert float(period.split()[0]) == pytest.approx(5, rel=0.5)
        assert float(tried.split()[0]) == pytest.approx(power, rel=0.05)


def test_a_whole_study_with_the_energy_objective_and_one_trial_that_is_throttled(
    nvml_library: Path, folder: Path
) -> None:
    from dse import open_study

    # A trial reads the condition ten times (before each phase and after each of its four windows), idle power once:
    # this is trial 2.
    study = tiny_study(
        folder,
        name="metered",
        objectives=["parameters", "energy_per_token_j"],
        tasks=[],
        measurement={"meter": f"nvml:{GPU_0}", "energy_windows": 2},
        budget={"trials": 4},
    )
    path = write_study(folder / "metered.yaml", study)
    done = dse(nvml_library, folder, "run", str(path), "--json", POWER="0:80", THROTTLE="64", THROTTLE_CALL="25")
    assert done.returncode == 0, done.stderr
    finished = open_study(folder / "runs" / "metered")
    with (finished.folder.path / "front.csv").open(newline="") as stream:
        front = list(csv.DictReader(stream))
    with (finished.folder.path / "trials.csv").open(newline="") as stream:
        trials = list(csv.DictReader(stream))
    for row in front:
        record = finished.record(int(row["trial"]))
        window = record.energy["decode"]["windows"][0]
        assert window["gross_j"] == pytest.approx(80 * window["duration_s"], rel=0.05)
        sides = (record.energy["decode"], record.energy["baseline"]["decode"])
        assert [len(side["windows"]) for side in sides] == [2, 2]
        assert float(row["measured_energy_per_token_j"]) == pytest.approx(sides[0]["per_token"]["mean_j"])
        # The energy of a trial is its ratio to the baseline measured alongside, times the baseline's in trial 0.
        ratio = float(row["energy_per_token_j_ratio"])
        assert float(row["energy_per_token_j"]) == pytest.approx(ratio * float(trials[0]["energy_per_token_j"]))
        if int(row["trial"]):
            assert ratio == pytest.approx(record.energy["ratios"]["decode"]["ratio"])
        for column in ("prefill_energy_j", "prefill_energy_per_token_j", "net_energy_per_token_j"):
            assert row[column] != ""
        assert row["energy_is_valid"] == "True"
        assert record.energy["idle"]["power_w"] == pytest.approx(80, rel=0.05)
    for name in ("idle_power_before", "idle_power_after"):
        assert finished.attributes[name]["power_w"] == pytest.approx(80, rel=0.05)
    # An invalid measurement gives no value: the trial fails with the reason, and the study continues.
    (bad,) = [row for row in trials if row["state"] == "failed"]
    assert "throttled (hw_thermal_slowdown)" in bad["reason"]
    assert bad["energy_per_token_j"] == ""
    assert (bad["energy_is_valid"], bad["on_front"]) == ("False", "False")
    assert bad["trial"] not in [row["trial"] for row in front]
    assert sum(row["state"] == "complete" for row in trials) == 3
