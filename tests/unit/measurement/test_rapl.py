"""The RAPL meter on a folder like the kernel's, whose counters a thread advances at a known power."""

from __future__ import annotations

import contextlib
import os
import tempfile
import threading
import time
from pathlib import Path

import pytest
import torch

from dse.errors import InvalidMeasurementError, MeterUnavailableError
from dse.measurement import LatencySpec, RaplMeter, find_meters, measure_energy, open_meter

CPU = torch.device("cpu")
RANGE_UJ = 4_000_000_000  # large enough that a delayed thread does not wrap by chance
SOURCE = "RAPL counters of the packages and their DRAM"


def add_domain(root: Path, folder: str, name: str, energy_uj: int = 0, range_uj: int = RANGE_UJ) -> Path:
    path = root / folder
    path.mkdir(parents=True)
    (path / "name").write_text(name + "\n")
    (path / "energy_uj").write_text(f"{energy_uj}\n")
    (path / "max_energy_range_uj").write_text(f"{range_uj}\n")
    return path / "energy_uj"


@contextlib.contextmanager
def drawing(powers_w: dict[Path, float], begin_uj: int):
    """Advance each counter file at its power from `begin_uj` on, wrapping at RANGE_UJ, about every millisecond."""
    stop = threading.Event()

    def advance() -> None:
        begin_s = time.perf_counter()
        while not stop.is_set():
            for path, power_w in powers_w.items():
                total_uj = begin_uj + int(power_w * 1e6 * (time.perf_counter() - begin_s))
                new = path.with_suffix(".new")  # readers of the kernel's file never see half a number
                new.write_text(f"{total_uj % RANGE_UJ}\n")
                new.replace(path)
            time.sleep(0.001)

    thread = threading.Thread(target=advance)
    thread.start()
    try:
        yield
    finally:
        stop.set()
        thread.join()


@pytest.fixture
def powercap(tmp_path):
    """Two packages, one with a DRAM counter, and the parts and duplicates that must not count."""
    files = [add_domain(tmp_path, "intel-rapl:0", "package-0"), add_domain(tmp_path, "intel-rapl:1", "package-1")]
    files.append(add_domain(tmp_path, "intel-rapl:1:0", "dram", energy_uj=5))
    for folder, name, energy_uj in [("intel-rapl:0:1", "dram", 0), ("intel-rapl:1:1", "uncore", 3)]:
        add_domain(tmp_path, folder, name, energy_uj=energy_uj)
    for folder, name in [
        ("intel-rapl:0:0", "core"),
        ("intel-rapl:2", "psys"),
        ("intel-rapl-mmio:0", "package-0"),
    ]:
        add_domain(tmp_path, folder, name, energy_uj=777)
    (tmp_path / "intel-rapl").mkdir()
    return tmp_path, files


def test_two_packages_with_a_wrap_around(powercap):
    root, files = powercap
    meter = RaplMeter(root)
    assert sorted(meter.details) == ["dram-1", "package-0", "package-1"]
    # 60 W from 2 J below the end of the range: the first package wraps 33 ms after it starts.
    with drawing({files[0]: 60.0, files[1]: 25.0, files[2]: 5.0}, RANGE_UJ - 2_000_000), meter.window() as window:
        time.sleep(0.8)
    assert window.is_valid, window.reason
    assert window.per_device_j["package-0"] == pytest.approx(60 * window.duration_s, rel=0.04)
    assert window.per_device_j["package-1"] == pytest.approx(25 * window.duration_s, rel=0.04)
    assert window.per_device_j["dram-1"] == pytest.approx(5 * window.duration_s, rel=0.04)
    assert window.energy_j == pytest.approx(sum(window.per_device_j.values()))


def test_measure_energy_of_a_generation(powercap, llama):
    root, files = powercap
    spec = LatencySpec(prompt_tokens=8, new_tokens=4, batch_size=2)
    with drawing({files[0]: 60.0, files[1]: 30.0, files[2]: 10.0}, 6):
        result = measure_energy(llama, spec, open_meter(CPU, powercap_root=root), min_window_s=0.2)
    assert (result.meter, result.source, result.is_valid) == ("rapl", SOURCE, True)
    assert result.decode is not None
    for phase in (result.prefill, result.decode):
        assert phase.duration_s >= 0.4
        assert phase.updates >= 20
        assert phase.repeats >= 2
        assert phase.gross_j == pytest.approx(100 * phase.duration_s, rel=0.05)
    # Per prompt and per token of one sequence, so divided by the batch of two and the four steps.
    prompts, tokens = result.prefill.repeats * 2, result.decode.repeats * 2 * 4
    assert result.prefill_energy_j == pytest.approx(100 * result.prefill.duration_s / prompts, rel=0.05)
    assert result.energy_per_token_j == pytest.approx(100 * result.decode.duration_s / tokens, rel=0.05)


def test_measure_energy_of_an_encoder(powercap, bert):
    root, files = powercap
    with drawing({files[0]: 60.0, files[1]: 30.0, files[2]: 10.0}, 6):
        result = measure_energy(bert, LatencySpec(prompt_tokens=8), RaplMeter(root), min_window_s=0.1)
    assert result.decode is None
    assert result.energy_per_token_j is None
    assert result.prefill_energy_j > 0


def test_a_counter_that_stands_still_gives_no_energy(powercap, llama):
    root, _ = powercap
    spec = LatencySpec(prompt_tokens=4, new_tokens=1)
    result = measure_energy(llama, spec, RaplMeter(root), min_window_s=0.05, max_window_s=0.1)
    assert not result.is_valid
    assert "prefill: the window of" in result.reason
    assert "decode: the window of" in result.reason
    assert result.prefill.gross_j is None
    with pytest.raises(InvalidMeasurementError, match="refreshed 0 times"):
        _ = result.prefill_energy_j
    with pytest.raises(InvalidMeasurementError, match="refreshed 0 times"):
        _ = result.energy_per_token_j


def test_a_counter_removed_during_the_window(powercap):
    root, files = powercap
    with RaplMeter(root).window() as window:
        files[0].unlink()
        time.sleep(0.1)
    assert "energy_uj could not be read" in window.reason


@contextlib.contextmanager
def unprivileged():
    """Run as an ordinary user even if the tests run as root, who can read every file."""
    if os.geteuid() != 0:
        yield
        return
    os.seteuid(65534)
    try:
        yield
    finally:
        os.seteuid(0)


@pytest.mark.skipif(not hasattr(os, "seteuid"), reason="needs POSIX file modes")
def test_an_unreadable_counter_names_the_remedy():
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        root.chmod(0o755)
        energy_file = add_domain(root, "intel-rapl:0", "package-0")
        energy_file.chmod(0o000)
        with unprivileged():
            with pytest.raises(MeterUnavailableError) as refusal:
                open_meter(CPU, powercap_root=root)
            (status,) = find_meters(CPU, powercap_root=root)
    assert f"{energy_file} is not readable" in str(refusal.value)
    assert f"sudo chmod a+r {energy_file}" in str(refusal.value)
    assert (status.name, status.available) == ("rapl", False)
    assert status.remedy.startswith("run `sudo chmod a+r")


@pytest.mark.parametrize(
    ("prepare", "message"),
    [
        (lambda root: None, "does not exist: not Linux, or a virtual machine"),
        (lambda root: root.mkdir(), "has no package domain.*modprobe intel_rapl_msr"),
        (lambda root: add_domain(root, "intel-rapl:0", "psys"), "has no package domain"),
        (lambda root: add_domain(root, "intel-rapl:0", "package-0").write_text("many"), "cannot be read"),
    ],
)
def test_a_missing_meter_gives_reason_and_remedy(tmp_path, prepare, message):
    root = tmp_path / "powercap"
    prepare(root)
    with pytest.raises(MeterUnavailableError, match=rf"no energy meter rapl: 'cpu' must have a meter, but .*{message}"):
        open_meter(CPU, powercap_root=root)
    (status,) = find_meters(CPU, powercap_root=root)
    assert not status.available
    assert status.reason
    assert status.remedy


def test_an_available_meter_is_found(powercap):
    (status,) = find_meters(CPU, powercap_root=powercap[0])
    assert (status.name, status.available, status.source) == ("rapl", True, SOURCE)


def test_a_device_without_any_meter():
    assert find_meters(torch.device("mps")) == []
    with pytest.raises(MeterUnavailableError, match="got the device 'mps'"):
        open_meter(torch.device("mps"))
