"""Energy on a GPU whose driver answers NVML: a known load, candidate against baseline, and a whole study."""

from __future__ import annotations

import csv
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from tiny_models import tiny_model
from tiny_study import tiny_study

from dse.errors import MeterUnavailableError
from dse.measurement import (
    EnergyMeter,
    LatencySpec,
    ModelSwap,
    NvmlMeter,
    measure_idle_power,
    measure_paired_energy,
    open_meter,
)
from dse.study import run_study


@pytest.fixture
def meter(gpu: torch.device) -> EnergyMeter:
    try:
        return open_meter(gpu)
    except MeterUnavailableError as error:
        pytest.skip(f"needs an energy meter: {error}")


def joules_of(meter: EnergyMeter, work: Callable[[], object], seconds: float) -> tuple[float, float]:
    """Joules and seconds of repeated work."""
    with meter.window() as window:
        end_s = time.monotonic() + seconds
        while time.monotonic() < end_s:
            work()
            meter.synchronize()
    assert window.is_valid, window.reason
    return window.energy_j, window.duration_s


def test_a_known_load_draws_more_than_idle_and_its_energy_grows_with_its_length(
    gpu: torch.device, meter: EnergyMeter
) -> None:
    x = torch.randn(4096, 4096, device=gpu, dtype=torch.float16)

    def products() -> None:
        for _ in range(50):
            x @ x

    products()
    idle = measure_idle_power(meter)
    assert idle.power_w is not None, idle.reason
    short_j, short_s = joules_of(meter, products, 2.0)
    long_j, long_s = joules_of(meter, products, 4.0)
    assert short_j / short_s > 1.3 * idle.power_w
    assert long_j / long_s == pytest.approx(short_j / short_s, rel=0.15)
    limit_w = max(idle.power_w, long_j / long_s)
    assert 1 < limit_w < 2000  # watts, not milliwatts


def test_the_counter_agrees_with_integrated_power(gpu: torch.device, meter: EnergyMeter) -> None:
    if meter.source != "NVML total-energy counter":
        pytest.skip("needs an energy counter")
    power = NvmlMeter([0], force_power=True)
    x = torch.randn(4096, 4096, device=gpu, dtype=torch.float16)
    with meter.window() as one, power.window() as other:
        end_s = time.monotonic() + 4
        while time.monotonic() < end_s:
            for _ in range(50):
                x @ x
            torch.cuda.synchronize(gpu)
    assert other.energy_j == pytest.approx(one.energy_j, rel=0.1)


def test_this_process_alone_does_not_invalidate_its_own_windows(
    gpu: torch.device, meter: EnergyMeter, dense_swap: ModelSwap
) -> None:
    """Dense against dense: the ratio is one within its interval, or within two percent."""
    sizes = {"hidden_size": 512, "intermediate_size": 1408, "num_attention_heads": 8, "num_key_value_heads": 8}
    model = tiny_model("llama", num_hidden_layers=4, **sizes).to(gpu, torch.float16)
    spec = LatencySpec(prompt_tokens=32, new_tokens=16, mode="cuda_graph")
    found = measure_paired_energy(model, spec, meter, dense_swap, idle=measure_idle_power(meter))
    assert found.is_valid, found.reason
    for ratio in (found.prefill_ratio, found.decode_ratio):
        assert ratio is not None
        assert ratio.low is not None
        assert ratio.high is not None
        assert ratio.low - 0.02 <= 1.0 <= ratio.high + 0.02


@pytest.mark.usefixtures("own_cache", "meter")
def test_a_small_study_with_energy_as_an_objective(tiny_folder: Path, tmp_path: Path) -> None:
    config = tiny_study(
        tiny_folder,
        name="on_gpu",
        model={"ref": str(tiny_folder / "model"), "device": "cuda"},
        objectives=["accuracy", "decode_latency_s", "energy_per_token_j", "peak_memory_bytes", "parameters"],
        measurement={"energy_windows": 2, "blocks": 2, "max_duration_s": 1.0},
        budget={"trials": 4},
    )
    study = run_study(config, out=tmp_path / "run")
    assert study.config.model.dtype == "float32"  # the checkpoint's
    assert study.config.measurement.mode == "cuda_graph"
    with (tmp_path / "run" / "trials.csv").open(newline="") as stream:
        rows = list(csv.DictReader(stream))
    complete = [row for row in rows if row["state"] == "complete"]
    assert len(complete) >= 3, [row["reason"] for row in rows]
    for row in complete:
        assert float(row["energy_per_token_j"]) > 0
        assert float(row["measured_energy_per_token_j"]) > 0
        assert float(row["energy_per_token_j_ratio"]) > 0
        assert row["energy_is_valid"] == "True"
