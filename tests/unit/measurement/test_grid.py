"""Measurement grid: cells that fit into memory, one that does not, and grids that are refused."""

from __future__ import annotations

import pytest
import torch

from dse.config import parse_study
from dse.errors import ConfigError
from dse.measurement import LatencySpec, grid_of, measure_cell

SPEC = LatencySpec(prompt_tokens=8, new_tokens=2, blocks=2, warmup_blocks=0, max_warmup_blocks=0)


def test_a_grid_varies_the_sizes_and_keeps_the_other_settings():
    cells = grid_of(SPEC, [(1, 8, 2), (4, 16, 2)])
    assert [(c.batch_size, c.prompt_tokens, c.new_tokens) for c in cells] == [(1, 8, 2), (4, 16, 2)]
    assert all(cell.blocks == 2 for cell in cells)
    assert cells[1].cell == "batch 4, prompt 16, new 2"


class RecordingSwap:
    """Records which weights are in place."""

    in_use = ""

    def use_candidate(self):
        self.in_use = "candidate"

    def use_baseline(self):
        self.in_use = "baseline"


def test_a_batch_that_does_not_fit_is_recorded_with_the_requested_bytes(llama):
    asked = 2**60

    def too_much(_module, given):
        if given[0].shape[0] > 2:  # a real failure of torch's own allocator, for large batches only
            torch.empty(asked, dtype=torch.uint8)

    llama.model.layers[0].register_forward_pre_hook(too_much)
    swap = RecordingSwap()
    cells = [measure_cell(llama, cell, swap) for cell in grid_of(SPEC, [(1, 8, 2), (4, 8, 2), (2, 8, 2)])]
    assert [cell.is_valid for cell in cells] == [True, False, True]
    full = cells[1]
    assert (full.latency, full.bytes_asked, full.attempts) == (None, asked, 1)
    assert f"an allocation of {asked} bytes failed" in full.reason
    assert swap.in_use == "candidate"  # as after every measurement


def test_a_cell_records_its_attempts_and_why_they_were_invalid(llama, dense_swap, monkeypatch):
    monkeypatch.setattr("dse.measurement.latency.MAX_INTERVAL_FACTOR", 0.0)  # nothing is ever precise enough
    cell = measure_cell(llama, SPEC, dense_swap, attempts=3)
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


def test_lists_in_a_study_file_span_a_grid():
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
        ({"new_tokens": [4, 4]}, "listed only once"),
        ({"mode": "fastest"}, "eager"),
        ({"mode": "fast"}, "use `mode: eager` or `mode: compile`"),
        ({"min_duration_s": 30, "max_duration_s": 20}, "min_duration_s <= max_duration_s"),
        ({"precision": 2}, "less than 1"),
    ],
)
def test_invalid_measurement_settings_are_refused(wrong, message):
    with pytest.raises(ConfigError, match=message):
        parse_study(study(**wrong))
