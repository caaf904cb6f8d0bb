"""Trials tied with the front: marking, tables and plots."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import pandas as pd
import pytest

from dse.pareto import Objective, objectives_named
from dse.report.front_figure import plot_front
from dse.report.front_page import front_html
from dse.report.front_panels import front_panels
from dse.report.front_png import front_png
from dse.report.text_tables import tied_rows, tied_text
from dse.report.tied_trials import mark_ties, tied_table
from dse.report.trials_table import mark_front

MakeTrials = Callable[..., pd.DataFrame]
TWO = objectives_named(["accuracy", "parameters"])
THREE = objectives_named(["accuracy", "decode_latency_s", "parameters"])


def row(accuracy: float, latency: float, parameters: float, noise: float = 0.02, **other: Any) -> dict[str, Any]:
    """One trial; dense has 1,000 parameters and 0.040 s, and latency intervals are ±5 %."""
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


def test_trial_dominated_within_noise_in_every_objective_is_tied(make_trials: MakeTrials) -> None:
    table = make_trials([DENSE, row(0.80, 0.030, 800.0), row(0.79, 0.031, 800.0)])
    assert ties(table, THREE, never) == {2: 1}
    assert ties(table, THREE, always) == {}
    # Without per-document outcomes, the intervals of two independent values decide: 1 pt < sqrt(2) x 2 pts.
    assert ties(table, THREE) == {2: 1}
    assert ties(make_trials([DENSE, row(0.80, 0.030, 800.0), row(0.77, 0.031, 800.0)]), THREE) == {}


def test_paired_test_is_called_last_with_both_trials(make_trials: MakeTrials) -> None:
    asked: list[tuple[str, int, int]] = []

    def differs(objective: str, first: int, second: int) -> bool:
        asked.append((objective, first, second))
        return False

    table = make_trials([DENSE, row(0.80, 0.030, 800.0), row(0.79, 0.031, 800.0), row(0.79, 0.039, 990.0)])
    assert ties(table, THREE, differs) == {2: 1}
    assert asked == [("accuracy", 1, 2)]


def test_slower_trial_beyond_noise_is_not_tied(make_trials: MakeTrials) -> None:
    # ±5 % each: the interval of the difference is ±7 %.
    assert ties(make_trials([DENSE, row(0.80, 0.030, 800.0), row(0.79, 0.0319, 800.0)]), THREE, never) == {2: 1}
    assert ties(make_trials([DENSE, row(0.80, 0.030, 800.0), row(0.79, 0.0330, 800.0)]), THREE, never) == {}


def test_ratios_to_dense_take_precedence_over_values(make_trials: MakeTrials) -> None:
    ratio = {"decode_latency_s_ratio": 0.75, "decode_latency_s_ratio_low": 0.74, "decode_latency_s_ratio_high": 0.76}
    other = {"decode_latency_s_ratio": 0.78, "decode_latency_s_ratio_low": 0.77, "decode_latency_s_ratio_high": 0.79}
    table = make_trials([DENSE, row(0.80, 0.030, 800.0, **ratio), row(0.79, 0.031, 800.0, **other)])
    assert ties(table, THREE, never) == {}


def test_exact_values_tie_below_one_percent_of_dense(make_trials: MakeTrials) -> None:
    assert ties(make_trials([DENSE, row(0.80, 0.03, 800.0), row(0.79, 0.03, 809.0)]), TWO, never) == {2: 1}
    assert ties(make_trials([DENSE, row(0.80, 0.03, 800.0), row(0.79, 0.03, 811.0)]), TWO, never) == {}


def test_one_clearly_better_front_trial_prevents_a_tie(make_trials: MakeTrials) -> None:
    table = make_trials([DENSE, row(0.80, 0.03, 800.0), row(0.81, 0.03, 805.0), row(0.79, 0.03, 806.0)])
    assert ties(table, TWO, never) == {3: 1}
    assert ties(table, TWO, lambda _, first, second: {first, second} == {2, 3}) == {}


def test_trials_that_may_not_be_on_the_front_are_not_tied(make_trials: MakeTrials) -> None:
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


def test_dense_model_may_be_tied(make_trials: MakeTrials) -> None:
    assert ties(make_trials([DENSE, row(0.90, 0.0399, 995.0)]), THREE, never) == {0: 1}


@pytest.fixture
def tied(make_trials: MakeTrials) -> pd.DataFrame:
    table = make_trials([DENSE, row(0.80, 0.030, 800.0), row(0.79, 0.031, 800.0), row(0.60, 0.039, 900.0)])
    return mark_ties(mark_front(table, THREE), THREE, never)


def test_tables_list_tied_trials_with_their_front_trial(tied: pd.DataFrame) -> None:
    (shown,) = tied_rows(tied, THREE)
    assert (shown.trial, shown.tied_with, shown.on_front) == (2, 1, False)
    head, columns, line = tied_text(tied, THREE).splitlines()
    assert head == "Tied with the front (dominated, but only by differences within noise in every objective):"
    assert columns.split()[:4] == ["trial", "tied", "with", "point"]
    assert line.split()[:3] == ["2", "1", "point0000002"]
    assert "0.790 ±0.020" in line
    assert tied_text(mark_front(tied.drop(columns="tied_with"), THREE), THREE) == ""
    assert tied_rows(tied.drop(columns="tied_with"), THREE) == []


def test_plots_and_page_show_tied_trials_separately(tied: pd.DataFrame) -> None:
    for panel in front_panels(tied, THREE):
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
