"""The replay meter: energy of a trace in closed form, and windows over it."""

from __future__ import annotations

import time
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from dse.errors import ConfigError
from dse.measurement import LatencySpec, PowerTrace, ReplayMeter, measure_energy, measure_idle_power, named_meter

CPU = torch.device("cpu")


def write_trace(folder: Path, text: str) -> Path:
    path = folder / "trace.csv"
    path.write_text(text)
    return path


def test_energy_of_a_trace_in_closed_form(tmp_path):
    # A triangle from 0 to 100 W and back within 2 s is 100 J; the trace starts at 5 s and repeats.
    trace = PowerTrace.read(write_trace(tmp_path, "time_s,package_w,dram_w\n5,0,8\n6,100,8\n7,0,8\n"))
    assert (trace.duration_s, trace.period_s, sorted(trace.power_w)) == (2, 1, ["dram", "package"])
    assert trace.power_at_w("package", 0.25) == pytest.approx(25)
    assert trace.power_at_w("package", 3.5) == pytest.approx(50)
    assert trace.energy_between_j("package", 0, 2) == pytest.approx(100)
    assert trace.energy_between_j("package", 0.5, 1.5) == pytest.approx(75)
    assert trace.energy_between_j("package", 1, 7) == pytest.approx(300)
    assert trace.energy_between_j("dram", 0.3, 9.3) == pytest.approx(72)


@given(st.lists(st.floats(0, 500), min_size=2, max_size=8), st.floats(0, 20), st.floats(0, 20), st.floats(0, 20))
def test_energy_is_additive_over_time(powers, first, second, third):
    trace = PowerTrace(tuple(0.5 * index for index in range(len(powers))), {"device": tuple(powers)})
    begin, middle, end = sorted((first, second, third))
    parts = trace.energy_between_j("device", begin, middle) + trace.energy_between_j("device", middle, end)
    assert trace.energy_between_j("device", begin, end) == pytest.approx(parts, rel=1e-9, abs=1e-6)


def steps(power_at_w, seconds=4.0, period_s=0.01):
    times = [index * period_s for index in range(int(seconds / period_s) + 1)]
    return "time_s,gpu_w\n" + "".join(f"{time_s:.4f},{power_at_w(time_s)}\n" for time_s in times)


def test_a_window_over_power_steps_agrees_with_their_integral(tmp_path):
    path = write_trace(tmp_path, steps(lambda t: 250 if 0.3 <= t % 1 < 0.8 else 60))
    for _ in range(3):  # a busy machine may stall the polling thread; a systematic error would remain
        meter = ReplayMeter(path)
        with meter.window() as window:
            time.sleep(0.9)
        begin, end = window.begin_s - meter.epoch_s, window.end_s - meter.epoch_s
        expected = meter.trace.energy_between_j("gpu", begin, end)
        if window.is_valid and window.energy_j == pytest.approx(expected, rel=0.03):
            break
    assert window.is_valid, window.reason
    assert window.energy_j == pytest.approx(expected, rel=0.03)


def test_a_whole_measurement_is_marked_as_replayed(tmp_path, llama):
    path = write_trace(tmp_path, steps(lambda t: 90))
    meter = named_meter(f"replay:{path}", CPU)
    idle = measure_idle_power(meter, min_duration_s=0.1)
    result = measure_energy(llama, LatencySpec(prompt_tokens=8, new_tokens=2), meter, idle=idle, min_window_s=0.1)
    assert (result.meter, result.is_replay, result.is_valid) == ("replay", True, True)
    assert "a recording, not a measurement" in result.source
    assert idle.power_w == pytest.approx(90, rel=1e-3)
    assert result.decode.gross_j == pytest.approx(90 * result.decode.duration_s, rel=1e-3)
    assert result.decode.net_per_token.mean_j == pytest.approx(0, abs=0.01 * result.decode.per_token.mean_j)


def test_windows_are_long_enough_for_the_precision(tmp_path, llama):
    meter = ReplayMeter(write_trace(tmp_path, steps(lambda t: 90)))
    spec = LatencySpec(prompt_tokens=8, new_tokens=2)
    result = measure_energy(llama, spec, meter, windows=1, precision=0.02, min_window_s=0.01)
    assert result.prefill.updates >= 50  # one refresh more or less is 2 %
    with pytest.raises(ConfigError, match="`0 < precision < 1`"):
        measure_energy(llama, spec, meter, precision=0.0)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("time_s,gpu_w\n0,1\n", "two or more full rows"),
        ("time_s,gpu_w\n0,1\n1,-3\n", "non-negative"),
        ("time_s,gpu_w\n0,1\n1,nan\n", "numbers"),
        ("time_s,gpu_w\n0,1\n0,2\n", "must increase"),
        ("time_s,gpu_w\n0,1\n1\n", "full rows"),
        ("time_s,gpu\n0,1\n1,2\n", "the header of a power trace"),
        ("seconds,gpu_w\n0,1\n1,2\n", "the header of a power trace"),
        ("time_s,gpu_w\n0,many\n1,2\n", "CSV file of numbers"),
        ("", "CSV file of numbers"),
    ],
)
def test_a_malformed_trace_is_refused(tmp_path, text, message):
    with pytest.raises(ConfigError, match=message):
        ReplayMeter(write_trace(tmp_path, text))


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("nvlm", "did you mean 'nvml'"),
        ("replay", "needs a trace to replay"),
        ("rapl:0", "takes nothing after a colon"),
        ("replay:/no/such/trace.csv", "CSV file of numbers, but /no/such/trace.csv"),
    ],
)
def test_unknown_meters_are_refused(name, message):
    with pytest.raises(ConfigError, match=message):
        named_meter(name, CPU)
