"""Energy of both sides in alternating windows: drift cancels, and absolute joules stay."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats
from scripted_meter import ScriptedMeter
from tiny_models import tiny_model
from transformers import PreTrainedModel

from dse.errors import ConfigError
from dse.measurement import LatencySpec, PairedEnergy, measure_energy, measure_paired_energy
from dse.measurement.paired_energy import paired_ratio

SPEC = LatencySpec(prompt_tokens=8, new_tokens=4, batch_size=2)
TRUE_RATIO = 0.8
DRIFT = 0.02


class MeteredSwap:
    """The candidate costs `TRUE_RATIO` of the baseline's joules."""

    def __init__(self, meter: ScriptedMeter) -> None:
        self.meter = meter

    def use_candidate(self) -> None:
        self.meter.side_j = TRUE_RATIO

    def use_baseline(self) -> None:
        self.meter.side_j = 1.0


@pytest.fixture
def model() -> PreTrainedModel:
    return tiny_model(num_hidden_layers=1)


def measured(model: PreTrainedModel, drift: float, windows: int = 4) -> tuple[PairedEnergy, ScriptedMeter]:
    meter = ScriptedMeter(model, drift)
    return measure_paired_energy(model, SPEC, meter, MeteredSwap(meter), windows=windows), meter


def test_a_device_that_warms_up_does_not_change_the_ratio(model: PreTrainedModel) -> None:
    """Trial 0 and a later trial, as they were compared before, against both sides in the later trial."""
    meter = ScriptedMeter(model, DRIFT)
    swap = MeteredSwap(meter)
    swap.use_baseline()
    trial_0 = measure_energy(model, SPEC, meter, windows=4)
    swap.use_candidate()
    later = measure_energy(model, SPEC, meter, windows=4)
    before = (later.energy_per_token_j or 0) / (trial_0.energy_per_token_j or 1)
    assert before > 1.0  # the candidate seems to need more than the baseline
    found = measure_paired_energy(model, SPEC, meter, swap)
    for ratio in (found.decode_ratio, found.prefill_ratio):
        assert ratio is not None
        assert ratio.ratio == pytest.approx(TRUE_RATIO, rel=0.005)
        assert ratio.low is not None
        assert ratio.high is not None
        assert ratio.low <= TRUE_RATIO <= ratio.high
        assert ratio.high / ratio.low < 1.1
        assert ratio.pairs == 4


def test_without_drift_the_ratio_and_the_joules_are_exact(model: PreTrainedModel) -> None:
    found, _ = measured(model, drift=0.0)
    assert found.is_valid
    assert found.decode_ratio is not None
    assert found.decode_ratio.ratio == pytest.approx(TRUE_RATIO)
    assert (found.decode_ratio.low, found.decode_ratio.high) == (pytest.approx(TRUE_RATIO), pytest.approx(TRUE_RATIO))
    # A forward pass of the baseline costs one joule: one per prompt of the batch of two, one per step for two tokens.
    assert found.baseline.prefill_energy_j == pytest.approx(1 / 2)
    assert found.baseline.energy_per_token_j == pytest.approx(1 / 2)
    assert found.candidate.energy_per_token_j == pytest.approx(TRUE_RATIO / 2)
    assert found.decode_net_ratio is None  # idle power is not known


def test_an_odd_number_of_windows_is_made_even(model: PreTrainedModel) -> None:
    found, meter = measured(model, drift=0.0, windows=3)
    assert [len(side.decode.windows) for side in (found.candidate, found.baseline) if side.decode] == [4, 4]
    assert meter.windows == 2 * 2 * 4
    assert meter.side_j == TRUE_RATIO  # the candidate is in place on return
    with pytest.raises(ConfigError, match="windows >= 1"):
        measured(model, drift=0.0, windows=0)


def test_another_process_in_any_window_invalidates_the_phase(model: PreTrainedModel) -> None:
    meter = ScriptedMeter(model, 0.0)
    meter.disturbed_window = 2  # not the last one
    found = measure_paired_energy(model, SPEC, meter, MeteredSwap(meter))
    assert not found.is_valid
    assert "scripted was used by other processes (17)" in found.reason
    assert found.prefill_ratio is None
    assert found.decode_ratio is not None  # the windows of decode were not disturbed


@given(
    st.lists(st.floats(0.1, 10.0), min_size=2, max_size=6),
    st.floats(0.2, 5.0),
    st.floats(-0.2, 0.2),
)
def test_the_ratio_of_pairs(scales: list[float], ratio: float, drift: float) -> None:
    """A constant ratio under a drift of the second window of each pair: exact, with an interval of no width."""
    scales = scales[: len(scales) // 2 * 2]
    pairs = []
    for index, scale in enumerate(scales):
        first, second = (1.0, math.exp(drift)) if index % 2 == 0 else (math.exp(drift), 1.0)
        pairs.append((scale * ratio * first, scale * second))
    found = paired_ratio(pairs)
    assert found is not None
    assert found.ratio == pytest.approx(ratio)
    if len(pairs) > 2:
        assert (found.low, found.high) == (pytest.approx(ratio), pytest.approx(ratio))
    else:
        assert (found.low, found.high) == (None, None)


def test_the_interval_is_students_t_with_two_degrees_less() -> None:
    logs = [0.1, 0.2, -0.1, 0.4]
    found = paired_ratio([(math.exp(value), 1.0) for value in logs])
    mean, order = 0.15, (0.1 - 0.2 - 0.1 - 0.4) / 4
    residuals = [value - mean - sign * order for value, sign in zip(logs, (1, -1, 1, -1), strict=True)]
    reach = stats.t.ppf(0.975, 2) * math.sqrt(sum(r * r for r in residuals) / 2 / 4)
    assert found is not None
    assert (math.log(found.low or 0), math.log(found.high or 0)) == (
        pytest.approx(mean - reach),
        pytest.approx(mean + reach),
    )


def test_no_ratio_of_energies_that_are_not_positive() -> None:
    assert paired_ratio([(1.0, 1.0), (1.0, -0.1)]) is None
    assert paired_ratio([]) is None
