from __future__ import annotations

import io
import json
import math
from collections.abc import Callable

import pandas as pd
import pytest
from rich.console import Console

from dse.pareto import OBJECTIVES, Objective, objectives_named
from dse.report.text_tables import format_front, front_rows, front_text, to_records
from dse.report.trials_table import front_table
from dse.report.units import Scale, change_text, number_ranges, percent, points, scale_for

MakeTrials = Callable[..., pd.DataFrame]


@pytest.mark.parametrize(
    ("name", "values", "first"),
    [
        ("decode_latency_s", [0.0412, 0.0391], "41.2 ms"),
        ("decode_latency_s", [3.2e-4, 2.9e-4], "320.0 µs"),
        ("prefill_latency_s", [1.5, 0.9], "1.50 s"),
        ("prefill_latency_s", [0.9996], "1.00 s"),
        ("energy_per_token_j", [0.0021], "2.10 mJ"),
        ("prefill_energy_j", [2100.0], "2.10 kJ"),
        ("parameters", [134_515_008, 120e6], "134.5 M"),
        ("parameters", [6.738e9], "6.74 B"),
        ("weight_bytes", [538_060_032], "538.1 MB"),
        ("weight_bytes", [13.476e9], "13.5 GB"),
        ("accuracy", [0.6123], "0.612"),
        ("perplexity", [26.04], "26.0"),
        ("perplexity", [8.11], "8.11"),
    ],
)
def test_values_are_shown_with_a_suitable_prefix(name: str, values: list[float], first: str) -> None:
    assert scale_for(OBJECTIVES[name], values).text(values[0]) == first


def test_column_has_one_unit_chosen_by_its_median() -> None:
    scale = scale_for(OBJECTIVES["decode_latency_s"], [0.5, 0.9, 1.1, 1.4, math.nan, None])
    assert [scale.text(value) for value in (0.5, 1.4)] == ["0.50 s", "1.40 s"]


def test_unmeasured_values_are_shown_as_not_available() -> None:
    scale = scale_for(OBJECTIVES["decode_latency_s"], [math.nan])
    assert (scale.text(math.nan), scale.text(None), scale.symbol) == ("n/a", "n/a", "s")
    assert (percent(None), points(math.nan), change_text(OBJECTIVES["accuracy"], None)) == ("n/a", "n/a", "n/a")


@pytest.mark.parametrize(
    ("low", "high", "text"),
    [
        (0.0401, 0.0423, "±1.1"),
        (0.0402, 0.0423, "±1.1"),  # nearly symmetric: the larger side is shown
        (0.0408, 0.0431, "-0.4/+1.9"),
        (0.04119, 0.04121, "±0.01"),  # below the last digit, but not zero
        (0.0412, 0.0412, "±0.0"),
    ],
)
def test_uncertainty_is_shown_relative_to_the_value(low: float, high: float, text: str) -> None:
    assert Scale("ms", 1000.0, 1).uncertainty(0.0412, (low, high)) == text


def test_unknown_uncertainty_is_empty() -> None:
    assert Scale("ms", 1000.0, 1).uncertainty(0.0412, None) == ""


def test_change_from_dense() -> None:
    accuracy, latency = OBJECTIVES["accuracy"], OBJECTIVES["decode_latency_s"]
    assert change_text(accuracy, (-0.031, None)) == "-3.1 pts"
    assert change_text(accuracy, (0.012, (-0.001, 0.025)), with_interval=True) == "+1.2 pts [-0.1, +2.5]"
    assert change_text(accuracy, (-0.0001, None)) == "0.0 pts"
    assert change_text(latency, (0.934, (0.91, 0.958)), with_interval=True) == "x0.93 [0.91, 0.96]"
    assert change_text(latency, (0.934, (0.91, 0.958))) == "x0.93"
    log_likelihood = OBJECTIVES["target_log_likelihood"]
    assert change_text(log_likelihood, (-0.214, (-0.3, 0.004)), with_interval=True) == "-0.21 nats [-0.30, 0.00]"
    assert change_text(OBJECTIVES["choice_probability"], (-0.031, None)) == "-3.1 pts"


def test_consecutive_numbers_are_shown_as_ranges() -> None:
    assert number_ranges([0, 1, 2, 3, 7]) == "0-3, 7"
    assert number_ranges([5]) == "5"
    assert number_ranges([]) == ""


@pytest.fixture
def front(make_trials: MakeTrials, three: tuple[Objective, ...]) -> pd.DataFrame:
    dense = {"accuracy": 0.7, "decode_latency_s": 0.04, "parameters": 100e6}
    interval = {
        "accuracy_low": 0.63,
        "accuracy_high": 0.69,
        "decode_latency_s_low": 0.0362,
        "decode_latency_s_high": 0.0382,
    }
    other = {
        "accuracy": 0.66,
        "accuracy_drop": 0.04,
        "accuracy_drop_low": 0.01,
        "accuracy_drop_high": 0.06,
        "decode_latency_s": 0.0372,
        "parameters": 80e6,
        "reduction": 0.2,
    }
    return front_table(make_trials([dense, interval | other]), three)


def test_interval_of_a_change_is_the_negated_interval_of_the_drop(
    front: pd.DataFrame, three: tuple[Objective, ...]
) -> None:
    cell = front_rows(front, three)[1].cells[0]
    assert (cell.change, cell.change_interval, cell.si) == ("-4.0 pts", "-4.0 pts [-6.0, -1.0]", 0.66)


def test_plain_text_is_aligned(front: pd.DataFrame, three: tuple[Objective, ...]) -> None:
    assert front_text(front, three).splitlines() == [
        "trial  point         reduction      accuracy   vs dense  decode latency   vs dense  parameters   vs dense",
        "    0  dense             0.0 %         0.700  reference         40.0 ms  reference     100.0 M  reference",
        "    1  point0000001     20.0 %  0.660 ±0.030   -4.0 pts    37.2 ms ±1.0      x0.93      80.0 M      x0.80",
        "2 points on the front. ± is a 95 % interval.",
    ]


@pytest.mark.parametrize("width", [72, 80, 140])
def test_terminal_table_has_the_same_content_at_any_width(
    front: pd.DataFrame, three: tuple[Objective, ...], width: int
) -> None:
    console = Console(file=io.StringIO(), width=width)
    console.print(format_front(front, three, title="a [bold]study", width=width))
    output = console.file.getvalue()  # type: ignore[attr-defined]
    for text in ("a [bold]study", "point0000001", "20.0 %", "±0.030", "-4.0 pts", "x0.93", "80.0 M", "±1.0"):
        assert text in output
    assert max(len(line) for line in output.splitlines()) <= width


def test_caption_mentions_a_dominated_dense_model(make_trials: MakeTrials) -> None:
    two = objectives_named(["accuracy", "parameters"])
    front = front_table(make_trials([{"accuracy": 0.7, "parameters": 9.0}, {"accuracy": 0.8, "parameters": 8.0}]), two)
    assert front_text(front, two).endswith(
        "1 point on the front; the dense model is listed for comparison and is not on the front. ± is a 95 % interval."
    )


def test_records_are_json_safe_and_in_si_units(front: pd.DataFrame) -> None:
    records = to_records(front.assign(duplicate_of=pd.array([pd.NA, 3], dtype="Int64"), nothing=[math.inf, 1.0]))
    again = json.loads(json.dumps(records, allow_nan=False))
    assert again == records
    assert again[0]["accuracy_low"] is None
    assert again[0]["duplicate_of"] is None
    assert again[0]["nothing"] is None
    assert again[1]["duplicate_of"] == 3
    assert again[1]["decode_latency_s"] == 0.0372
    assert again[1]["trial"] == 1
    assert again[0]["is_dense"] is True


def test_empty_study_has_an_empty_front(study_trials: pd.DataFrame, three: tuple[Objective, ...]) -> None:
    front = front_table(study_trials[:0], three)
    assert to_records(front) == []
    assert front_text(front, three).splitlines()[-1] == "0 points on the front. ± is a 95 % interval."
