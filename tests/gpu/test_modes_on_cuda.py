"""Every execution mode decodes the tokens of eager on a GPU, on whichever device the model is."""

from __future__ import annotations

import warnings

import pytest
import torch
from tiny_models import tiny_model
from transformers import PreTrainedModel

from dse.measurement import LatencySpec, ModelSwap, Workload, measure_latency
from dse.measurement.clock import CudaEventStopwatch, MonotonicStopwatch, stopwatch_for
from dse.measurement.execution import Variant

STEPS = 6
FAMILIES = ("llama", "qwen3", "gemma2", "gpt_neox", "gpt2", "opt", "mixtral")


def random_model(family: str, device: torch.device) -> PreTrainedModel:
    """In float32, so that no tie flips, and with weights large enough that tokens depend on every position."""
    torch.manual_seed(0)
    model = tiny_model(family, num_hidden_layers=2)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.copy_(0.3 * torch.randn(parameter.shape))
    return model.to(device)


def decoded_tokens(model: PreTrainedModel, mode: str, variants: tuple[Variant, ...] = ("baseline",)) -> list[list[int]]:
    """Tokens of each variant; the variants take steps in turn, as in a measurement."""
    workload = Workload(model, LatencySpec(prompt_tokens=16, new_tokens=STEPS, batch_size=2, mode=mode))
    generations = {}
    for variant in variants:
        generation = workload.begin(variant)
        workload.prefill(generation)
        workload.prepare(generation, variant)
        generations[variant] = generation
    tokens: dict[Variant, list[torch.Tensor]] = {
        variant: [generation.next_tokens.clone()]
        for variant, generation in generations.items()
        if generation.next_tokens is not None
    }
    for _ in range(STEPS):
        for variant, generation in generations.items():
            workload.step(generation, variant)
            assert generation.next_tokens is not None
            tokens[variant].append(generation.next_tokens.clone())
    return [torch.cat(found, dim=1).flatten().tolist() for found in tokens.values()]


@pytest.mark.parametrize("family", FAMILIES)
def test_cuda_graphs_decode_the_tokens_of_eager(gpu: torch.device, family: str) -> None:
    model = random_model(family, gpu)
    (expected,) = decoded_tokens(model, "eager")
    assert decoded_tokens(model, "cuda_graph", ("candidate", "baseline")) == [expected, expected]


def test_compiled_steps_decode_the_tokens_of_eager(gpu: torch.device) -> None:
    model = random_model("llama", gpu)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # from the compiler stack
        assert decoded_tokens(model, "compile") == decoded_tokens(model, "eager")


@pytest.mark.parametrize("mode", ["eager", "cuda_graph"])
def test_a_mode_runs_on_the_second_device_while_the_first_is_current(second_gpu: torch.device, mode: str) -> None:
    first = random_model("llama", torch.device("cuda:0"))
    expected = decoded_tokens(first, "cuda_graph")  # torch makes its own capture stream on the first device
    with torch.cuda.device(0):
        assert decoded_tokens(random_model("llama", second_gpu), mode) == expected


def test_a_graph_can_be_rewound(gpu: torch.device) -> None:
    model = random_model("llama", gpu)
    workload = Workload(model, LatencySpec(prompt_tokens=16, new_tokens=STEPS, mode="cuda_graph"))
    generation = workload.begin()
    workload.prefill(generation)
    workload.prepare(generation)
    runs = []
    for _ in range(3):
        assert generation.next_tokens is not None
        runs.append(generation.next_tokens.tolist())
        workload.decode_again(generation)
    assert runs[0] == runs[1] == runs[2]


def test_latency_is_measured_with_cuda_events(gpu: torch.device, dense_swap: ModelSwap) -> None:
    spec = LatencySpec(prompt_tokens=16, new_tokens=4, blocks=2, warmup_blocks=0, mode="cuda_graph")
    result = measure_latency(random_model("llama", gpu), spec, dense_swap)
    assert (result.clock, result.device, result.mode) == ("cuda_events", "cuda:0", "cuda_graph")
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
