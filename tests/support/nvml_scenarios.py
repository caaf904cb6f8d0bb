"""Runs scenarios with the real `pynvml` on fake_nvml.c; test_nvml.py starts it as a separate process.

Prints one JSON object with the observations of each scenario. Arguments select scenarios; the default is all of them.
"""

from __future__ import annotations

import dataclasses
import json
import os
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from tiny_models import tiny_model
from transformers import PreTrainedModel

from dse.errors import InvalidMeasurementError, MeterUnavailableError
from dse.measurement import (
    EnergyMeter,
    EnergyWindow,
    LatencySpec,
    NvmlMeter,
    describe_environment,
    find_meters,
    measure_energy,
    measure_idle_power,
    measure_paired_energy,
    named_meter,
    open_meter,
)

# The driver reads this variable once: CUDA's GPUs stay hidden from torch, and scenarios may set it for NVML.
assert not torch.cuda.is_available()
del os.environ["CUDA_VISIBLE_DEVICES"]

STEPS = "0:100,0.5:300,0.8:50,1.1:200"
GPU = torch.device("cuda", 0)


@contextmanager
def script(**variables: str) -> Iterator[float]:
    """Set FAKE_NVML_* (and CUDA_VISIBLE_DEVICES) with the epoch now; yields the epoch on `time.perf_counter`."""
    named = {k if k.startswith("CUDA") else f"FAKE_NVML_{k}": value for k, value in variables.items()}
    epoch_ns = time.monotonic_ns()
    os.environ.update({"FAKE_NVML_EPOCH_NS": str(epoch_ns), "FAKE_NVML_POWER": STEPS, **named})
    try:
        yield epoch_ns * 1e-9
    finally:
        for name in named:
            del os.environ[name]


def window_of(meter: EnergyMeter, seconds: float) -> EnergyWindow:
    with meter.window() as window:
        time.sleep(seconds)
    return window


def seen(meter: EnergyMeter, window: EnergyWindow, epoch_s: float) -> dict[str, Any]:
    figures = {"per_device_j": window.per_device_j, "energy_j": window.energy_j} if window.is_valid else {}
    try:
        figures["read_j"] = window.energy_j
    except InvalidMeasurementError as error:
        figures |= {"error": str(error), "type": type(error).__name__}
    return {
        "begin_s": window.begin_s - epoch_s,
        "end_s": window.end_s - epoch_s,
        "source": meter.source,
        "details": dict(meter.details),
        "updates": window.updates,
        "is_valid": window.is_valid,
        "reason": window.reason,
        **figures,
    }


def play(seconds: float, devices: tuple[int | str, ...] = (0,), **variables: str) -> dict[str, Any]:
    with script(**{**variables, "POWER": "0:70,0.3:75"}):
        meter = NvmlMeter(devices)  # a meter without a counter probes its sensor for a second
    with script(**variables) as epoch_s:
        return seen(meter, window_of(meter, seconds), epoch_s)


def refusal(**variables: str) -> dict[str, Any]:
    with script(**variables):
        try:
            open_meter(GPU)
        except MeterUnavailableError as error:
            status = find_meters(GPU)[0]
            return {
                "message": str(error),
                "type": type(error).__name__,
                "available": status.available,
                "remedy": status.remedy,
            }
    return {"message": ""}


def name_of(**variables: str) -> str:
    with script(DEVICES="3", **variables):
        return ",".join(name for key, name in open_meter(GPU).details.items() if key.startswith("gpu "))


def tiny() -> PreTrainedModel:
    return tiny_model(num_hidden_layers=2)


SPEC = LatencySpec(prompt_tokens=8, new_tokens=4, batch_size=2)


def generation() -> dict[str, Any]:
    with script(POWER="0:50"):
        idle = measure_idle_power(open_meter(GPU), min_duration_s=0.2)
    with script(POWER="0:200"):
        result = measure_energy(tiny(), SPEC, open_meter(GPU), idle=idle)
        assert result.decode is not None
        return {
            "is_valid": result.is_valid,
            "meter": result.meter,
            "prefill_energy_j": result.prefill_energy_j,
            "energy_per_token_j": result.energy_per_token_j,
            "prefill_power_w": (result.prefill.gross_j or 0) / result.prefill.duration_s,
            "decode_power_w": (result.decode.gross_j or 0) / result.decode.duration_s,
            "prefill_s_per_prompt": result.prefill.duration_s / (result.prefill.repeats * 2),
            "decode_s_per_token": result.decode.duration_s / (result.decode.repeats * 2 * 4),
            "updates": [result.prefill.updates, result.decode.updates],
            "idle_w": idle.power_w,
            "net_per_token_j": [phase.net_per_token.mean_j for phase in (result.prefill, result.decode)],
            "per_token": [dataclasses.asdict(phase.per_token) for phase in (result.prefill, result.decode)],
            "windows": [len(phase.windows) for phase in (result.prefill, result.decode)],
            "before": dataclasses.asdict(result.prefill.conditions_before[0]),
            "after": dataclasses.asdict(result.decode.conditions_after[0]),
        }


def lost_at_once() -> dict[str, Any]:
    """The device is lost during a measurement, which ends soon; its energy cannot be read."""
    model = tiny_model(num_hidden_layers=1)
    with script(LOST_AT_S="0.3"):
        meter = open_meter(GPU)
        result = measure_energy(model, LatencySpec(prompt_tokens=4, new_tokens=2), meter, min_window_s=20.0)
    try:
        read = result.prefill_energy_j
    except InvalidMeasurementError as error:
        return {"is_valid": result.is_valid, "reason": result.reason, "error": str(error)}
    return {"read": read}


def conditions(**variables: str) -> dict[str, Any]:
    with script(POWER="0:200", **variables):
        meter = open_meter(GPU)
        result = measure_energy(tiny(), SPEC, meter, windows=1, min_window_s=0.1)
        idle = measure_idle_power(meter, min_duration_s=0.1)
    return {"is_valid": result.is_valid, "reason": result.reason, "idle": idle.reason, "figure": result.prefill.gross_j}


def used(**variables: str) -> dict[str, Any]:
    """A measurement while another process, 4000000, holds a context on the device."""
    return conditions(PROCESSES="SELF,4000000", **variables)


def used_before_the_window() -> dict[str, Any]:
    """The other process computed until 0.3 s, and the window starts at 0.5 s."""
    with script(POWER="0:200", PROCESSES="SELF,4000000", ACTIVE="4000000:80", ACTIVE_UNTIL_S="0.3"):
        meter = open_meter(GPU)
        time.sleep(0.5)
        idle = measure_idle_power(meter, min_duration_s=0.1)
    return {"is_valid": idle.is_valid, "contexts": [list(condition.other_contexts) for condition in idle.conditions]}


def busy_by_power(before_w: int) -> dict[str, Any]:
    """A GPU that tells no utilisation at all: its power before the window against its idle power of 50 W."""
    unknown = {"NO_PROCESS_UTILIZATION": "1", "PROCESSES": "SELF,4000000"}
    with script(POWER="0:50", **unknown):
        meter = open_meter(GPU)
        idle = measure_idle_power(meter, min_duration_s=0.1)
    with script(POWER=f"0:{before_w}", **unknown):
        result = measure_energy(tiny(), SPEC, meter, windows=1, min_window_s=0.1, idle=idle)
    return {"is_valid": result.is_valid, "reason": result.reason}


def drift() -> dict[str, Any]:
    """Power doubles and doubles again, while dense is measured beside dense, whose steps last a fixed time.

    Returns:
        The ratio of alternating windows, and that of two measurements one after the other.
    """
    model = tiny()
    model.register_forward_pre_hook(lambda *_: time.sleep(0.02))
    spec = LatencySpec(prompt_tokens=4, new_tokens=1)
    steps = ",".join(f"{0.25 * index:g}:{100 * 1.04**index:g}" for index in range(120))
    settings: dict[str, Any] = {"windows": 4, "min_window_s": 0.1}

    class Dense:
        def use_candidate(self) -> None:
            pass

        def use_baseline(self) -> None:
            pass

    with script(POWER=steps, PERIOD_MS="5"):
        meter = open_meter(GPU)
        first = measure_energy(model, spec, meter, **settings)
        found = measure_paired_energy(model, spec, meter, Dense(), **settings)
        last = measure_energy(model, spec, meter, **settings)
    assert found.decode_ratio is not None, found.reason
    return {
        "paired": found.decode_ratio.ratio,
        "one_after_the_other": (last.energy_per_token_j or 0.0) / (first.energy_per_token_j or 1.0),
    }


def restarted() -> dict[str, Any]:
    """A window that a driver restart invalidates, and the next window of the same meter."""
    with script(RESTART_AT_S="0.3", POWER="0:100") as epoch_s:
        meter = open_meter(GPU)
        invalid = seen(meter, window_of(meter, 0.5), epoch_s)
        return {"invalid": invalid, "after": seen(meter, window_of(meter, 0.6), epoch_s)}


def named() -> list[Any]:
    """Meters by name: CUDA index, UUID, start of a UUID, two devices, an unknown device and an ambiguous one."""
    found: list[Any] = []
    with script(DEVICES="2"):
        for name in (
            "nvml",
            "nvml:1",
            "nvml:GPU-0000000b-fake",
            "nvml:GPU-0000000a",
            "nvml:0,1",
            "nvml:GPU-ff",
            "nvml:GPU-",
        ):
            try:
                meter = named_meter(name, torch.device("cpu"))
                found.append([key for key in meter.details if key.startswith("gpu ")])
            except MeterUnavailableError as error:
                found.append(f"{type(error).__name__}: {error}")
    return found


def both() -> dict[str, Any]:
    """Counter and integrated power of one device at the same time, as gpu_check.py compares them."""
    with script(POWER="0:100,2:250"):
        counter, power = NvmlMeter([0]), NvmlMeter([0], force_power=True)
    with script(POWER="0:100,0.7:250"), counter.window() as one, power.window() as other:
        time.sleep(2.1)
    return {"counter_j": one.energy_j, "power_j": other.energy_j, "period_s": power.period_s}


def gpus() -> Any:
    with script(DEVICES="2"):
        return describe_environment()["gpus"]


SCENARIOS: dict[str, Callable[[], Any]] = {
    "counter": lambda: play(1.2, (0, 1), DEVICES="2"),
    "polled": lambda: play(2.1, NO_COUNTER="1"),
    "short": lambda: play(0.1),
    "lost": lambda: play(0.5, LOST_AT_S="0.3"),
    "reset": lambda: play(0.6, RESET_AT_S="0.3"),
    "instant": lambda: play(2.1, NO_COUNTER="1", INSTANT="1"),
    "failed_call": lambda: play(0.6, FAIL="nvmlDeviceGetTotalEnergyConsumption@20:999"),
    "restarted": restarted,
    "throttled": lambda: conditions(THROTTLE="64"),
    "power_capped": lambda: conditions(THROTTLE="4"),
    "idle_context": lambda: used(ACTIVE="SELF:95"),
    "shared": lambda: used(ACTIVE="SELF:60,4000000:35"),
    "used_before_the_window": used_before_the_window,
    "idle_by_utilisation": lambda: used(NO_PROCESS_UTILIZATION="1", UTILIZATION="2"),
    "busy_by_utilisation": lambda: used(NO_PROCESS_UTILIZATION="1", UTILIZATION="60"),
    "idle_by_power": lambda: busy_by_power(52),
    "busy_by_power": lambda: busy_by_power(120),
    "drift": drift,
    "alone": lambda: conditions(PROCESSES="SELF"),
    "named": named,
    "both": both,
    "generation": generation,
    "lost_at_once": lost_at_once,
    "mig": lambda: refusal(MIG="1"),
    "neither": lambda: refusal(NO_COUNTER="1", NO_POWER="1"),
    "driver_not_loaded": lambda: refusal(INIT_ERROR="9"),
    "no_permission": lambda: refusal(INIT_ERROR="4"),
    "mismatch": lambda: refusal(INIT_ERROR="18"),
    "hidden": lambda: refusal(CUDA_VISIBLE_DEVICES="-1"),
    "not_listed": lambda: refusal(CUDA_VISIBLE_DEVICES="5"),
    "mig_instance": lambda: refusal(CUDA_VISIBLE_DEVICES="MIG-1234"),
    "plain": name_of,
    "by_index": lambda: name_of(CUDA_VISIBLE_DEVICES="2,0"),
    "by_uuid": lambda: name_of(CUDA_VISIBLE_DEVICES="GPU-0000000b"),
    "gpus": gpus,
}

if __name__ == "__main__":
    print(json.dumps({name: SCENARIOS[name]() for name in sys.argv[1:] or SCENARIOS}))
