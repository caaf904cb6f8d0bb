"""Clocks, execution modes, memory and product timings on a CUDA device. Energy: benchmarks/gpu_check.py."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from tiny_models import tiny_model
from transformers import PreTrainedModel

from dse.errors import OutOfMemoryError
from dse.measurement import LatencySpec, ModelSwap, Workload, measure_latency, measure_peak_memory
from dse.measurement.clock import CudaEventStopwatch, MonotonicStopwatch, stopwatch_for
from dse.measurement.device_lock import lock_file
from dse.measurement.device_profile import ProductShape, ProductTimings
from dse.out_of_memory import out_of_memory_errors

SPEC = LatencySpec(prompt_tokens=16, new_tokens=4, blocks=2, warmup_blocks=0)


@pytest.fixture
def llama(gpu: torch.device) -> PreTrainedModel:
    return tiny_model("llama", num_hidden_layers=2).to(gpu)


def decoded_tokens(model: PreTrainedModel, mode: str) -> list[int]:
    workload = Workload(model, LatencySpec(prompt_tokens=16, new_tokens=4, mode=mode))
    generation = workload.begin()
    workload.prefill(generation)
    workload.prepare(generation)
    tokens = [generation.next_tokens.clone()]
    for _ in range(4):
        workload.step(generation)
        tokens.append(generation.next_tokens.clone())
    return torch.cat(tokens, dim=1).flatten().tolist()


@pytest.mark.filterwarnings("ignore")  # from the compiler stack
@pytest.mark.parametrize("mode", ["compile", "cuda_graph"])
def test_every_mode_decodes_the_tokens_of_eager(llama: PreTrainedModel, mode: str) -> None:
    assert decoded_tokens(llama, mode) == decoded_tokens(llama, "eager")


def test_latency_is_measured_with_cuda_events(llama: PreTrainedModel, dense_swap: ModelSwap) -> None:
    result = measure_latency(llama, SPEC, dense_swap)
    assert (result.clock, result.device) == ("cuda_events", "cuda:0")
    assert result.device_name == torch.cuda.get_device_name(0)
    assert result.decode is not None
    assert result.decode.baseline.minimum_s > 0


def test_cuda_events_agree_with_the_clock_of_the_host(gpu: torch.device) -> None:
    x = torch.randn(4096, 4096, device=gpu)
    assert isinstance(stopwatch_for([gpu]), CudaEventStopwatch)
    events_s, host_s = (
        min(clock.time(lambda: [x @ x for _ in range(8)])[1] for _ in range(10))
        for clock in (CudaEventStopwatch(gpu), MonotonicStopwatch([gpu]))
    )
    assert 0.7 < events_s / host_s <= 1.05


def test_peak_memory_includes_an_activation(llama: PreTrainedModel, gpu: torch.device) -> None:
    plain = measure_peak_memory(llama, SPEC)
    size = 64 * 2**20

    def activation(_module: object, _inputs: object) -> None:
        torch.empty(size, dtype=torch.uint8, device=gpu)

    llama.model.layers[1].register_forward_pre_hook(activation)
    result = measure_peak_memory(llama, SPEC)
    assert result.method == "CUDA allocator statistics"
    assert size <= result.prefill_rise_bytes <= plain.prefill_rise_bytes + size + 2**22


def test_out_of_memory_reports_the_requested_bytes(gpu: torch.device) -> None:
    with pytest.raises(OutOfMemoryError) as failure, out_of_memory_errors("allocating one pebibyte"):
        torch.empty(2**50, dtype=torch.uint8, device=gpu)
    assert failure.value.bytes_asked == 2**50


def test_a_gpu_is_locked_by_its_uuid(gpu: torch.device) -> None:
    assert lock_file(gpu) == lock_file(torch.device("cuda"))
    assert str(torch.cuda.get_device_properties(0).uuid) in lock_file(gpu).name


def test_products_are_timed(gpu: torch.device, tmp_path: Path) -> None:
    timings = ProductTimings(gpu, torch.float16, 2**26, tmp_path)
    assert torch.cuda.get_device_name(0) in timings.conditions.device
    assert timings.seconds(ProductShape(1, 4096, 4096)) > timings.seconds(ProductShape(1, 64, 64)) > 0
