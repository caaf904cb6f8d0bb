"""Cells of a grid: those that fit, and one that does not."""

from __future__ import annotations

import pytest
import torch

from dse.config import parse_study
from dse.errors import ConfigError
from dse.measurement import LatencySpec, grid_of, measure_cell

SPEC = LatencySpec(prompt_tokens=8, new_tokens=2, blocks=2, warmup_blocks=0, max_warmup_blocks=0)


def test_a_grid_is_the_product_and_keeps_the_rest():
    cells = grid_of(SPEC, [(1, 8, 2), (4, 16, 2)])
    assert [(c.batch_size, c.prompt_tokens, c.new_tokens) for c in cells] == [(1, 8, 2), (4, 16, 2)]
    assert all(cell.blocks == 2 for cell in cells)
    assert cells[1].cell == "batch 4, prompt 16, new 2"


def test_a_batch_that_does_not_fit_is_recorded_with_the_bytes_asked(llama):
    asked = 2**60

    def too_much(_module, given):
        if given[0].shape[0] > 2:  # a real refusal of torch's own allocator, for large batches only
            torch.empty(asked, dtype=torch.uint8)

    llama.model.layers[0].register_forward_pre_hook(too_much)
    in_use = []
    cells = [
        measure_cell(
            llama, cell, use_candidate=lambda: in_use.append("subject"), use_baseline=lambda: in_use.append("dense")
        )
        for cell in grid_of(SPEC, [(1, 8, 2), (4, 8, 2), (2, 8, 2)])
    ]
    assert [cell.is_valid for cell in cells] == [True, False, True]
    full = cells[1]
    assert (full.latency, full.bytes_asked, full.attempts) == (None, asked, 1)
    assert f"an allocation of {asked} bytes failed" in full.reason
    assert in_use[-1] == "subject"  # as after every measurement


def test_attempts_and_why_they_failed_are_in_the_cell(llama, monkeypatch):
    monkeypatch.setattr("dse.measurement.latency.MAX_INTERVAL_FACTOR", 0.0)  # nothing is ever precise enough
    cell = measure_cell(llama, SPEC, use_candidate=lambda: None, use_baseline=lambda: None, attempts=3)
    assert (cell.attempts, len(cell.discarded), cell.is_valid) == (3, 2, False)
    assert all("spans more than a factor" in reason for reason in (*cell.discarded, cell.reason))


def study(**measurement):
    return {
        "name": "s",
        "model": "m",
        "space": {"name": "sp", "ranks": {"absolute": [1]}},
        "objectives": ["decode_latency_s"],
        "measurement": measurement,
    }


def test_a_study_file_spans_the_grid_and_its_first_cell_is_the_objectives():
    settings = parse_study(study(batch_size=[1, 8], prompt_tokens=[128, 1024], new_tokens=64)).measurement
    assert settings.cells == [(1, 128, 64), (1, 1024, 64), (8, 128, 64), (8, 1024, 64)]
    assert parse_study(study()).measurement.cells == [(1, 128, 16)]
    again = parse_study(study(**settings.model_dump()))
    assert again.measurement == settings


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"batch_size": [1, 0]}, "greater than or equal to 1"),
        ({"prompt_tokens": []}, "at least 1 item"),
        ({"new_tokens": [4, 4]}, "listed once"),
        ({"mode": "fastest"}, "eager"),
        ({"min_duration_s": 30, "max_duration_s": 20}, "min_duration_s <= max_duration_s"),
        ({"precision": 2}, "less than 1"),
    ],
)
def test_a_grid_that_cannot_be_is_refused(wrong, message):
    with pytest.raises(ConfigError, match=message):
        parse_study(study(**wrong))
