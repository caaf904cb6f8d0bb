"""Plays scripts through the real `pynvml` against fake_nvml.c; run by test_nvml.py in a process of its own.

Prints one JSON object: scenario -> what was seen. Arguments choose scenarios; without any all are played.
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from dse.errors import InvalidMeasurementError, MeterUnavailableError
from dse.measurement import (
    EnergyMeter,
    EnergyWindow,
    LatencySpec,
    NvmlMeter,
    describe_environment,
    find_meters,
    measure_energy,
    open_meter,
)

STEPS = "0:100,0.5:300,0.8:50,1.1:200"
GPU = torch.device("cuda", 0)


@contextmanager
def script(**variables: str) -> Iterator[float]:
    """Set FAKE_NVML_* (and CUDA_VISIBLE_DEVICES) with the epoch now; gives the epoch on `time.perf_counter`."""
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
        figures["error"] = str(error)
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


def play(seconds: float, indices: tuple[int, ...] = (0,), **variables: str) -> dict[str, Any]:
    with script(**variables) as epoch_s:
        meter = NvmlMeter(indices)
        return seen(meter, window_of(meter, seconds), epoch_s)


def refusal(**variables: str) -> dict[str, Any]:
    with script(**variables):
        try:
            open_meter(GPU)
        except MeterUnavailableError as error:
            status = find_meters(GPU)[0]
            return {"message": str(error), "available": status.available, "remedy": status.remedy}
    return {"message": ""}


def name_of(**variables: str) -> str:
    with script(DEVICES="3", **variables):
        return ",".join(name for key, name in open_meter(GPU).details.items() if key.startswith("gpu "))


def generation() -> dict[str, Any]:
    config = LlamaConfig(
        vocab_size=128, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4
    )
    torch.manual_seed(0)
    model = LlamaForCausalLM(config).eval()
    with script(POWER="0:200"):
        result = measure_energy(model, LatencySpec(prompt_tokens=8, new_tokens=4, batch_size=2), open_meter(GPU))
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
        }


def lost_at_once() -> dict[str, Any]:
    """The device goes while a whole measurement runs: it ends soon, and its figures cannot be read."""
    model = LlamaForCausalLM(
        LlamaConfig(vocab_size=64, hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2)
    ).eval()
    with script(LOST_AT_S="0.3"):
        meter = open_meter(GPU)
        result = measure_energy(model, LatencySpec(prompt_tokens=4, new_tokens=2), meter, min_window_s=20.0)
    try:
        read = result.prefill_energy_j
    except InvalidMeasurementError as error:
        return {"is_valid": result.is_valid, "reason": result.reason, "error": str(error)}
    return {"read": read}


def gpus() -> Any:
    with script(DEVICES="2"):
        return describe_environment()["gpus"]


SCENARIOS: dict[str, Callable[[], Any]] = {
    "counter": lambda: play(1.2, (0, 1), DEVICES="2"),
    "polled": lambda: play(2.1, NO_COUNTER="1"),
    "short": lambda: play(0.1),
    "lost": lambda: play(0.5, LOST_AT_S="0.3"),
    "reset": lambda: play(0.6, RESET_AT_S="0.3"),
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
