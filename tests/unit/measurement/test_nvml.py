"""The NVML meter: without a driver, and with the real pynvml on a scripted NVML library compiled for the test."""

from __future__ import annotations

import itertools
import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from nvml_library import build_library, with_library

from dse.measurement import NoMeterError
from dse.measurement.nvml import visible_device
from dse.measurement.nvml_condition import other_pids

HERE = Path(__file__).parent
GPU_0, GPU_1 = "GPU-0000000a-fake", "GPU-0000000b-fake"
STEPS = ((0.0, 100.0), (0.5, 300.0), (0.8, 50.0), (1.1, 200.0), (1e9, 0.0))  # as in nvml_scenarios.py


def test_without_a_driver_the_error_names_the_remedy(tmp_path):
    """A file that is no library takes the place of an installed driver's."""
    (tmp_path / "libnvidia-ml.so.1").write_text("not a library")
    source = """
import json, torch
from dse.errors import MeterUnavailableError
from dse.measurement import find_meters, open_meter
(status,) = find_meters(torch.device("cuda"))
try:
    open_meter(torch.device("cuda", 0))
except MeterUnavailableError as error:
    print(json.dumps([str(error), status.name, status.available, status.reason, status.remedy]))
"""
    done = subprocess.run(
        [sys.executable, "-c", source], env=with_library(tmp_path), capture_output=True, text=True, timeout=600
    )
    assert done.returncode == 0, done.stderr
    message, name, available, reason, remedy = json.loads(done.stdout)
    assert re.search(r"no NVIDIA driver.*install the NVIDIA driver", message)
    assert (name, available) == ("nvml", False)
    assert reason.startswith("no NVIDIA driver")
    assert "install the NVIDIA driver" in remedy


def test_the_scripted_library_is_used_on_a_machine_with_cuda_and_a_driver(tmp_path, monkeypatch):
    """It must take the place of an installed driver's library: a folder later in the path stands for the system's."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    folder = build_library(tmp_path)
    system = tmp_path / "system"
    system.mkdir()
    (system / "libnvidia-ml.so.1").write_text("stands for the driver's library")
    monkeypatch.setenv("LD_LIBRARY_PATH", str(system))
    source = "import pynvml; pynvml.nvmlInit(); print(pynvml.nvmlSystemGetDriverVersion())"
    done = subprocess.run(
        [sys.executable, "-c", source], env=with_library(folder), capture_output=True, text=True, timeout=600
    )
    assert done.stdout.strip() == "555.42.fake", done.stderr


@pytest.mark.parametrize(
    ("index", "visible", "expected"),
    [(3, None, 3), (0, "2,0", 2), (1, "2,0", 0), (1, "0, GPU-ab", "GPU-ab"), (0, "MIG-12", "MIG-12")],
)
def test_a_visible_device(index, visible, expected):
    assert visible_device(index, visible) == expected


@pytest.mark.parametrize(("index", "visible"), [(0, ""), (0, "-1"), (1, "0"), (1, "0,-1,1"), (0, "none")])
def test_a_hidden_device(index, visible):
    with pytest.raises(NoMeterError, match=f"cuda:{index} does not exist"):
        visible_device(index, visible)


def play(nvml_library: Path, *scenarios: str) -> dict:
    environment = with_library(nvml_library)
    command = [sys.executable, "-W", "error", str(HERE.parents[1] / "support" / "nvml_scenarios.py"), *scenarios]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@pytest.fixture(scope="module")
def seen(nvml_library):
    return play(nvml_library)


def integral_j(begin_s: float, end_s: float) -> float:
    """Energy of device 0 according to the scripted power steps."""
    total = 0.0
    for (from_s, power_w), (to_s, _) in itertools.pairwise(STEPS):
        total += power_w * max(0.0, min(end_s, to_s) - max(begin_s, from_s))
    return total


def relative_error(played: dict, device: str) -> float:
    scale = {GPU_0: 1, GPU_1: 2}[device]
    return played["per_device_j"][device] / (scale * integral_j(played["begin_s"], played["end_s"])) - 1


@pytest.mark.parametrize(("name", "tolerance"), [("counter", 0.01), ("polled", 0.03), ("instant", 0.03)])
def test_a_window_agrees_with_the_scripted_energy(nvml_library, seen, name, tolerance):
    played = seen[name]
    for _ in range(2):
        # A busy machine may stall the polling thread at an edge; a systematic error would remain.
        if played["is_valid"] and abs(relative_error(played, GPU_0)) <= tolerance:
            break
        played = play(nvml_library, name)[name]
    assert played["is_valid"], played["reason"]
    for device in played["per_device_j"]:
        assert abs(relative_error(played, device)) <= tolerance
    assert played["updates"] >= 20
    assert played["energy_j"] == pytest.approx(sum(played["per_device_j"].values()))


def test_the_record_names_source_devices_and_driver(seen):
    assert seen["counter"]["source"] == "NVML total-energy counter"
    assert seen["polled"]["source"] == "NVML power, integrated"
    assert list(seen["counter"]["per_device_j"]) == [GPU_0, GPU_1]
    assert seen["counter"]["details"]["driver_version"] == "555.42.fake"
    assert seen["gpus"][1] == {"name": "Fake GPU 1", "uuid": GPU_1, "driver_version": "555.42.fake"}


@pytest.mark.parametrize(
    ("name", "error", "reason"),
    [
        ("short", "WindowTooShortError", "is too short: the meter refreshed"),
        ("lost", "DeviceLostError", "could not be read: GPU is lost; see `dmesg"),
        ("reset", "CounterBackwardsError", "the counter went backwards"),
        ("failed_call", "ReadingFailedError", "could not be read: Unknown Error"),
        ("restarted", "DriverRestartedError", "could not be read: Uninitialized; the driver was restarted"),
    ],
)
def test_each_window_error_has_its_own_type_and_gives_no_energy(seen, name, error, reason):
    played = seen[name] if name != "restarted" else seen[name]["invalid"]
    assert played["type"] == error
    assert not played["is_valid"]
    assert reason in played["reason"]
    assert "read_j" not in played
    assert played["reason"] in played["error"]


def test_the_same_meter_works_again_after_a_restart_of_the_driver(seen):
    after = seen["restarted"]["after"]
    assert after["is_valid"], after["reason"]
    assert after["energy_j"] == pytest.approx(100 * (after["end_s"] - after["begin_s"]), rel=0.05)


def test_throttling_and_other_processes_invalidate_energy_but_a_power_limit_does_not(seen):
    throttled, shared = seen["throttled"], seen["shared"]
    assert (throttled["is_valid"], throttled["figure"]) == (False, None)
    assert f"{GPU_0} was throttled (hw_thermal_slowdown)" in throttled["reason"]
    assert throttled["idle"] == ""  # nothing runs: throttled clocks do not invalidate idle power
    assert (shared["is_valid"], shared["figure"]) == (False, None)
    assert f"{GPU_0} was used by other processes (4000000)" in shared["reason"]
    assert "4000000" in shared["idle"]
    for name in ("power_capped", "alone", "idle_context"):
        assert seen[name]["is_valid"], seen[name]["reason"]


def test_a_process_that_computed_before_the_window_does_not_invalidate_it(seen):
    assert seen["used_before_the_window"] == {"is_valid": True, "contexts": [[4000000]]}


@pytest.mark.parametrize("how", ["utilisation", "power"])
def test_without_utilisation_per_process_the_device_before_the_window_tells(seen, how):
    idle, busy = seen[f"idle_by_{how}"], seen[f"busy_by_{how}"]
    assert idle["is_valid"], idle["reason"]
    assert not busy["is_valid"]
    assert "4000000" in busy["reason"]
    if how == "power":
        # Idle power is a mean over time, so it varies a little on a busy machine.
        assert re.search(r"drew 1\d\d W before the window and \d+(\.\d+)? W when idle", busy["reason"])


def test_in_a_container_the_busiest_process_is_this_one(monkeypatch):
    """The driver lists process ids of the host there."""
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    assert other_pids({11: 90, 12: 5}, contexts=[11, 12, 13]) == (12,)
    assert other_pids({11: 90}, contexts=[11, 12]) == ()
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: False)
    assert other_pids({11: 90}, contexts=[11]) == (11,)


def test_drift_cancels_in_alternating_windows(seen):
    """Dense beside dense needs the same energy, whatever the temperature; measured apart it does not."""
    assert seen["drift"]["one_after_the_other"] > 1.25
    assert seen["drift"]["paired"] == pytest.approx(1.0, abs=0.08)


def test_meters_are_selected_by_name(seen):
    plain, index, uuid, beginning, two, unknown, ambiguous = seen["named"]
    assert (plain, index, uuid, beginning) == ([f"gpu {GPU_0}"], [f"gpu {GPU_1}"], [f"gpu {GPU_1}"], [f"gpu {GPU_0}"])
    assert two == [f"gpu {GPU_0}", f"gpu {GPU_1}"]
    assert unknown.startswith("DeviceNotListedError:")
    assert "GPU GPU-ff, but the driver lists 2 GPUs without it" in unknown
    assert "2 of them with that name" in ambiguous


def test_counter_and_integrated_power_of_one_device_agree(seen):
    both = seen["both"]
    assert both["power_j"] == pytest.approx(both["counter_j"], rel=0.03)
    assert both["period_s"] == 0.1  # steady power shows no refresh while it is probed


def test_energy_of_a_generation(seen):
    played = seen["generation"]
    assert played["is_valid"]
    assert min(played["updates"]) >= 20
    # Constant 200 W: energy is power times time.
    assert played["prefill_power_w"] == pytest.approx(200, rel=0.05)
    assert played["prefill_energy_j"] == pytest.approx(200 * played["prefill_s_per_prompt"], rel=0.05)
    assert played["energy_per_token_j"] == pytest.approx(200 * played["decode_s_per_token"], rel=0.05)
    # 50 W idle: net energy is three quarters of gross energy.
    assert played["idle_w"] == pytest.approx(50, rel=0.05)
    for net_j, gross in zip(played["net_per_token_j"], played["per_token"], strict=True):
        assert net_j == pytest.approx(0.75 * gross["mean_j"], rel=0.05)
        assert gross["low_j"] <= gross["mean_j"] <= gross["high_j"]
        assert gross["deviation_j"] >= 0
    # Prefill of eight tokens is reported per prompt and per prompt token.
    assert played["prefill_energy_j"] == pytest.approx(8 * played["per_token"][0]["mean_j"])
    assert played["windows"] == [3, 3]
    for name in ("before", "after"):
        condition = played[name]
        assert (condition["device"], condition["temperature_celsius"]) == (GPU_0, 40)
        assert (condition["core_clock_mhz"], condition["memory_clock_mhz"]) == (1410, 1215)


def test_a_lost_device_ends_the_measurement_with_the_reason(seen):
    played = seen["lost_at_once"]
    assert "read" not in played
    assert not played["is_valid"]
    assert "prefill: " in played["reason"]
    assert "GPU is lost" in played["error"]


@pytest.mark.parametrize(
    ("name", "error", "message", "remedy"),
    [
        ("mig", "MigDeviceError", "split by MIG", "nvidia-smi -mig 0"),
        (
            "neither",
            "EnergyNotSupportedError",
            "has no energy counter, and its power cannot be read: Not Supported",
            "another GPU",
        ),
        ("driver_not_loaded", "NoDriverError", "driver is not loaded", "modprobe nvidia"),
        ("no_permission", "MeterPermissionError", "may not be queried", "/dev/nvidia"),
        ("mismatch", "NoDriverError", "different versions", "reboot"),
        ("hidden", "DeviceNotListedError", "shows 0 GPUs", "CUDA_VISIBLE_DEVICES"),
        ("not_listed", "DeviceNotListedError", "is GPU 5, but the driver lists 1 GPUs", "CUDA_VISIBLE_DEVICES"),
        ("mig_instance", "MigDeviceError", "MIG instance MIG-1234", "another GPU"),
    ],
)
def test_each_unavailable_meter_has_its_own_error_type_reason_and_remedy(seen, name, error, message, remedy):
    assert seen[name]["type"] == error
    assert message in seen[name]["message"]
    assert remedy in seen[name]["message"]
    assert remedy in seen[name]["remedy"]
    assert seen[name]["available"] is False


def test_a_device_is_chosen_as_in_cuda(seen):
    assert (seen["plain"], seen["by_index"], seen["by_uuid"]) == ("Fake GPU 0", "Fake GPU 2", "Fake GPU 1")
