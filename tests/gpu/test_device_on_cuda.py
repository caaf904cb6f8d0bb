"""Locks, product timings and defaults on a GPU."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from tiny_models import tiny_model

from dse.measurement import LatencySpec
from dse.measurement.device_lock import lock_file
from dse.measurement.device_profile import ProductShape, ProductTimings
from dse.models import load_model
from dse.workers.device_defaults import settled_mode


def test_a_gpu_is_locked_by_its_uuid(gpu: torch.device) -> None:
    assert lock_file(gpu) == lock_file(torch.device("cuda"))
    assert str(torch.cuda.get_device_properties(0).uuid) in lock_file(gpu).name


def test_products_are_timed_by_replay(gpu: torch.device, tmp_path: Path) -> None:
    """A small product takes less than a launch from Python, which lasts several microseconds."""
    timings = ProductTimings(gpu, torch.float16, 2**28, tmp_path)
    assert torch.cuda.get_device_name(0) in timings.conditions.device
    assert timings.conditions.launch == "cuda_graph"
    small_s, large_s = timings.seconds(ProductShape(1, 64, 64)), timings.seconds(ProductShape(1, 4096, 4096))
    assert 0 < small_s < 10e-6
    assert large_s > small_s


def test_cold_weights_are_read_from_memory(gpu: torch.device, tmp_path: Path) -> None:
    """A product with one row cannot be faster than the fastest memory of a GPU reads its weight."""
    timings = ProductTimings(gpu, torch.float16, 2**30, tmp_path)
    seconds = timings.seconds(ProductShape(1, 4096, 4096))
    assert 2 * 4096 * 4096 / seconds < 10e12  # bytes per second


def test_products_are_timed_on_the_second_device(second_gpu: torch.device, tmp_path: Path) -> None:
    with torch.cuda.device(0):
        timings = ProductTimings(second_gpu, torch.float16, 2**26, tmp_path)
        assert timings.seconds(ProductShape(1, 1024, 1024)) > 0


def test_the_defaults_of_a_gpu(gpu: torch.device, tiny_folder: Path, tmp_path: Path) -> None:
    from tiny_models import word_tokenizer

    tiny_model("llama").to(torch.bfloat16).save_pretrained(tmp_path)
    word_tokenizer().save_pretrained(tmp_path)
    loaded = load_model(str(tmp_path), dtype="auto", device="cuda:0")
    assert loaded.dtype == torch.bfloat16
    assert settled_mode(loaded, LatencySpec(prompt_tokens=8, new_tokens=4))[0] == "cuda_graph"
    refused = tiny_model("bloom").to(gpu)
    loaded.model = refused
    mode, reason = settled_mode(loaded, LatencySpec(prompt_tokens=8, new_tokens=4))
    assert mode == "eager"
    assert "static cache" in reason


def test_an_out_of_memory_kernel_leaves_the_device_usable(gpu: torch.device) -> None:
    with pytest.raises(torch.OutOfMemoryError):
        torch.empty(2**50, dtype=torch.uint8, device=gpu)
    assert float(torch.ones(1, device=gpu).add(1)) == 2.0
