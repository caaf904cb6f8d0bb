"""Paired serving measurements against closed-form truths, with servers of known speed in place of the hardware."""

from __future__ import annotations

import os
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from dse.engines import EngineWindow, EngineWork, PairedServing, measure_serving, work_of
from dse.engines.turns import foreign_processes
from dse.errors import ConfigError, InvalidMeasurementError
from dse.measurement import LatencySpec, named_meter
from dse.trial.engine_measurements import serving_quantities

SPEC = LatencySpec(prompt_tokens=8, new_tokens=5, batch_size=2, blocks=4, warmup_blocks=0, precision=None)


@dataclass
class SteadyServer:
    """Serves every token in `token_s` and every prompt in `prompt_s`; slows down by `drift` after each turn."""

    prompt_s: float
    token_s: float
    drift: float = 1.0
    turns: int = 0
    engine: str = "steady"
    start_up_s: float = 0.0
    versions: Mapping[str, str] = field(default_factory=dict)

    def run(self, work: EngineWork) -> EngineWindow:
        self.turns += 1
        slow = self.drift**self.turns
        rounds = work.requests // work.concurrency
        one_s = slow * (self.prompt_s + (work.new_tokens - 1) * self.token_s)
        ttft_s = (slow * self.prompt_s,) * work.requests
        tpot_s = (slow * self.token_s,) * (work.requests if work.new_tokens > 1 else 0)
        return EngineWindow(ttft_s, tpot_s, rounds * one_s, work.output_tokens)


def measured(candidate: SteadyServer | None, spec: LatencySpec = SPEC, **changes: object) -> PairedServing:
    return measure_serving(SteadyServer(0.2, 0.05), candidate, spec, **changes)  # type: ignore[arg-type]


def test_ratios_are_those_of_the_servers() -> None:
    found = measured(SteadyServer(0.1, 0.04))
    assert found.ttft.ratio == pytest.approx(0.5)
    assert found.prefill.ratio == pytest.approx(0.5)
    assert found.tpot is not None
    assert found.tpot.ratio == pytest.approx(0.8)
    assert found.window.ratio == pytest.approx((0.1 + 4 * 0.04) / (0.2 + 4 * 0.05))
    assert found.window.ratio_low == pytest.approx(found.window.ratio_high)
    assert (found.ttft.blocks, found.ttft.candidate.count, found.ttft.baseline.count) == (4, 16, 16)
    assert found.is_valid


def test_values_are_ratios_times_the_dense_values_of_trial_0() -> None:
    dense = {name: value.value for name, (value, _) in serving_quantities(measured(None), None, latencies=True).items()}
    assert dense["ttft_s"] == pytest.approx(0.2)
    assert dense["decode_latency_s"] == dense["tpot_s"] == pytest.approx(0.05)
    assert dense["throughput_tokens_s"] == pytest.approx(10 / 0.4)
    found = serving_quantities(measured(SteadyServer(0.1, 0.05)), dense, latencies=True)
    assert found["prefill_latency_s"][0].value == pytest.approx(0.1)
    value, ratio = found["throughput_tokens_s"]
    assert value.value == pytest.approx(10 / 0.3)
    assert ratio.value == pytest.approx(0.4 / 0.3)
    assert ratio.low is not None
    assert ratio.high is not None
    assert ratio.low <= ratio.value <= ratio.high
    with pytest.raises(InvalidMeasurementError, match="of the dense model must be known"):
        serving_quantities(measured(SteadyServer(0.1, 0.05)), {}, latencies=False)


def test_the_dense_model_alone_has_ratios_of_1() -> None:
    found = measured(None)
    assert (found.ttft.ratio, found.ttft.ratio_low, found.ttft.ratio_high) == (1.0, 1.0, 1.0)
    assert found.ttft.baseline.count == 2 * 4 * 4


def test_drift_that_both_share_cancels() -> None:
    """In ABBA order a steady slow-down adds the same to both sides."""
    clock = SteadyServer(0.2, 0.05, drift=1.01)

    class Half(SteadyServer):
        def run(self, work: EngineWork) -> EngineWindow:
            window = clock.run(work)
            half = tuple(0.5 * sample for sample in window.ttft_s)
            return EngineWindow(half, window.tpot_s, window.duration_s, window.output_tokens)

    found = measure_serving(clock, Half(0, 0), SPEC)
    assert found.ttft.ratio == pytest.approx(0.5)
    assert found.ttft.ratio_high - found.ttft.ratio_low < 1e-9


def test_a_request_of_one_token_has_no_time_per_output_token() -> None:
    spec = LatencySpec(prompt_tokens=8, new_tokens=1, blocks=2)
    found = measured(SteadyServer(0.1, 0.05), spec)
    assert found.tpot is None
    assert set(serving_quantities(measured(None, spec), None, latencies=True)) == {
        "ttft_s", "prefill_latency_s", "throughput_tokens_s",
    }  # fmt: skip


def test_blocks_end_at_the_time_limit() -> None:
    spec = LatencySpec(prompt_tokens=8, new_tokens=5, blocks=2, precision=0.001, max_duration_s=4.0)
    clock = SteadyServer(0.2, 0.05)

    class Noisy(SteadyServer):
        def run(self, work: EngineWork) -> EngineWindow:
            self.turns += 1
            self.token_s = 0.05 * (1 + self.turns % 3)
            return super().run(work)

    found = measure_serving(clock, Noisy(0.2, 0.05), spec)
    assert 4.0 <= found.duration_s < 8.0


def test_a_clock_that_stands_still_is_refused() -> None:
    with pytest.raises(InvalidMeasurementError, match="must be positive"):
        measured(SteadyServer(0.0, 0.05))


class SleepingServer(SteadyServer):
    """Takes real time, as long as an energy window needs to see it."""

    def run(self, work: EngineWork) -> EngineWindow:
        time.sleep(0.05)
        return super().run(work)


def test_energy_of_a_turn_is_that_of_its_window(tmp_path: Path) -> None:
    trace = tmp_path / "trace.csv"
    rows = "".join(f"{step / 1000:g},5\n" for step in range(1000 * 120))  # a window must see many new samples
    trace.write_text(f"time_s,cpu_w\n{rows}", encoding="utf-8")
    meter = named_meter(f"replay:{trace}")
    spec = LatencySpec(prompt_tokens=8, new_tokens=5, batch_size=2, blocks=2)
    found = measure_serving(SleepingServer(0.2, 0.05), SleepingServer(0.1, 0.05), spec, meter=meter).energy
    assert found is not None
    assert found.is_valid, found.reason
    assert found.is_replay
    assert found.ratio is not None
    assert found.ratio.low <= found.ratio.ratio <= found.ratio.high
    assert found.candidate_request is not None
    assert found.candidate_request.mean_j > 0
    assert found.candidate_net_request is None  # idle power is unknown


@pytest.mark.parametrize(("requests", "total"), [(None, 4), (1, 4), (4, 4), (5, 8), (12, 12)])
def test_requests_fill_every_place(requests: int | None, total: int) -> None:
    work = work_of(LatencySpec(prompt_tokens=8, new_tokens=2, batch_size=4), requests)
    assert (work.concurrency, work.requests, work.output_tokens) == (4, total, 2 * total)


@pytest.mark.parametrize(("sizes", "rule"), [((8, 0, 1, 1), "at least 1"), ((8, 1, 2, 3), "use 4")])
def test_work_is_checked(sizes: tuple[int, int, int, int], rule: str) -> None:
    with pytest.raises(ConfigError, match=rule):
        EngineWork(*sizes)


def test_processes_of_engines_are_not_foreign() -> None:
    own = os.getpgid(0)
    assert foreign_processes([os.getpid()], [own]) == ()
    assert foreign_processes([1], [own, os.getpid()]) == (1,)
    # Ids of the host, which mean nothing in a container: as many as there are engines may be theirs.
    assert foreign_processes([2**22 - 1, 2**22 - 2], [999_999_998]) == (2**22 - 2,)
