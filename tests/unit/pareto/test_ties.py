"""Ties on tables made for it: what noise alone beats, and what more than noise does."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import pandas as pd
import pytest

from dse.pareto import Objective, mark_front, mark_ties, objectives_named, tied_table
from dse.report.front_png import front_png
from dse.report.front_table import tied_rows, tied_text
from dse.report.page import front_html
from dse.report.panels import panels
from dse.report.plots import plot_front

MakeTrials = Callable[..., pd.DataFrame]
TWO = objectives_named(["accuracy", "parameters"])
THREE = objectives_named(["accuracy", "decode_latency_s", "parameters"])


def row(accuracy: float, latency: float, parameters: float, noise: float = 0.02, **other: Any) -> dict[str, Any]:
    """Dense has 1,000 parameters and 0.040 s; intervals of the latency are +-5 %."""
    found = {
        "accuracy": accuracy,
        "accuracy_low": accuracy - noise,
        "accuracy_high": accuracy + noise,
        "decode_latency_s": latency,
        "decode_latency_s_low": latency * 0.95,
        "decode_latency_s_high": latency * 1.05,
        "parameters": parameters,
        "reduction": 1 - parameters / 1000,
    }
    return found | other


DENSE = row(0.9, 0.04, 1000.0)


def ties(
    table: pd.DataFrame, objectives: Sequence[Objective], differs: Callable[..., bool | None] | None = None
) -> dict[int, int]:
    marked = mark_ties(mark_front(table, objectives), objectives, differs)
    found = tied_table(marked)
    return dict(zip(found["trial"].tolist(), found["tied_with"].tolist(), strict=True))


def never(objective: str, first: int, second: int) -> bool:
    return False


def always(objective: str, first: int, second: int) -> bool:
    return True


def test_beaten_within_noise_in_every_objective_is_tied(make_trials: MakeTrials) -> None:
    table = make_trials([DENSE, row(0.80, 0.030, 800.0), row(0.79, 0.031, 800.0)])
    assert ties(table, THREE, never) == {2: 1}
    assert ties(table, THREE, always) == {}
    # Without outcomes, the intervals of two independent values: 1 pt lies within sqrt(2) x 2 pts.
    assert ties(table, THREE) == {2: 1}
    assert ties(make_trials([DENSE, row(0.80, 0.030, 800.0), row(0.77, 0.031, 800.0)]), THREE) == {}


def test_the_paired_test_is_asked_for_the_two_trials_and_last(make_trials: MakeTrials) -> None:
    asked: list[tuple[str, int, int]] = []

    def differs(objective: str, first: int, second: int) -> bool:
        asked.append((objective, first, second))
        return False

    table = make_trials([DENSE, row(0.80, 0.030, 800.0), row(0.79, 0.031, 800.0), row(0.79, 0.039, 990.0)])
    assert ties(table, THREE, differs) == {2: 1}
    assert asked == [("accuracy", 1, 2)]


def test_a_slower_point_is_beaten_by_more_than_noise(make_trials: MakeTrials) -> None:
    # +-5 % each: the difference reaches 7 %.
    assert ties(make_trials([DENSE, row(0.80, 0.030, 800.0), row(0.79, 0.0319, 800.0)]), THREE, never) == {2: 1}
    assert ties(make_trials([DENSE, row(0.80, 0.030, 800.0), row(0.79, 0.0330, 800.0)]), THREE, never) == {}


def test_ratios_beside_dense_come_before_values(make_trials: MakeTrials) -> None:
    ratio = {"decode_latency_s_ratio": 0.75, "decode_latency_s_ratio_low": 0.74, "decode_latency_s_ratio_high": 0.76}
    other = {"decode_latency_s_ratio": 0.78, "decode_latency_s_ratio_low": 0.77, "decode_latency_s_ratio_high": 0.79}
    table = make_trials([DENSE, row(0.80, 0.030, 800.0, **ratio), row(0.79, 0.031, 800.0, **other)])
    assert ties(table, THREE, never) == {}


def test_exact_figures_tie_below_one_percent_of_dense(make_trials: MakeTrials) -> None:
    assert ties(make_trials([DENSE, row(0.80, 0.03, 800.0), row(0.79, 0.03, 809.0)]), TWO, never) == {2: 1}
    assert ties(make_trials([DENSE, row(0.80, 0.03, 800.0), row(0.79, 0.03, 811.0)]), TWO, never) == {}


def test_one_front_trial_that_beats_it_clearly_is_enough(make_trials: MakeTrials) -> None:
    table = make_trials([DENSE, row(0.80, 0.03, 800.0), row(0.81, 0.03, 805.0), row(0.79, 0.03, 806.0)])
    assert ties(table, TWO, never) == {3: 1}
    assert ties(table, TWO, lambda _, first, second: {first, second} == {2, 3}) == {}


def test_what_cannot_stand_on_the_front_is_not_tied_with_it(make_trials: MakeTrials) -> None:
    table = make_trials(
        [
            DENSE,
            row(0.80, 0.03, 800.0),
            row(0.79, 0.03, 800.0, state="failed"),
            row(0.79, 0.03, 800.0, feasible=False),
            row(0.79, 0.03, 800.0, state="duplicate"),
            row(0.80, 0.03, 800.0),
            row(float("nan"), 0.03, 800.0),
        ]
    )
    assert ties(table, TWO, never) == {}


def test_the_dense_model_may_be_tied_too(make_trials: MakeTrials) -> None:
    assert ties(make_trials([DENSE, row(0.90, 0.0399, 995.0)]), THREE, never) == {0: 1}


@pytest.fixture
def tied(make_trials: MakeTrials) -> pd.DataFrame:
    table = make_trials([DENSE, row(0.80, 0.030, 800.0), row(0.79, 0.031, 800.0), row(0.60, 0.039, 900.0)])
    return mark_ties(mark_front(table, THREE), THREE, never)


def test_tables_show_what_is_tied_and_with_what(tied: pd.DataFrame) -> None:
    (shown,) = tied_rows(tied, THREE)
    assert (shown.trial, shown.tied_with, shown.on_front) == (2, 1, False)
    head, columns, line = tied_text(tied, THREE).splitlines()
    assert "within noise only" in head
    assert columns.split()[:4] == ["trial", "tied", "with", "point"]
    assert line.split()[:3] == ["2", "1", "point0000002"]
    assert "0.790 ±0.020" in line
    assert tied_text(mark_front(tied.drop(columns="tied_with"), THREE), THREE) == ""
    assert tied_rows(tied.drop(columns="tied_with"), THREE) == []


def test_plots_draw_tied_trials_apart(tied: pd.DataFrame) -> None:
    for panel in panels(tied, THREE):
        assert panel.tied.trials.tolist() == [2]
        assert panel.others.trials.tolist() == [3]
        assert panel.tied.y_error.tolist() == [pytest.approx([0.02]), pytest.approx([0.02])]
    figure = plot_front(tied, THREE)
    traces = [trace for trace in figure.data if trace.name == "Tied with the front"]
    assert len(traces) == 2
    assert traces[0].error_y.array.tolist() == pytest.approx([0.02])
    assert "tied with trial 1" in traces[0].hovertext[0]
    page = front_html(tied, THREE, title="t", study_facts={}, next_commands=[])
    assert "<h2>Tied with the front</h2>" in page
    assert "<td>2</td><td>1</td>" in page
    untied = tied.assign(tied_with=pd.array([None] * 4, dtype="Int64"))
    assert "<h2>Tied with the front</h2>" not in front_html(untied, THREE, title="t", study_facts={}, next_commands=[])
    assert "Tied with the front" not in [trace.name for trace in plot_front(untied, THREE).data]
    assert front_png(tied, THREE, dpi=40) != front_png(untied, THREE, dpi=40)
