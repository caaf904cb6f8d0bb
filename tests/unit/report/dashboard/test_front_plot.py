from __future__ import annotations

import dataclasses
import json
from typing import Any

import numpy as np
import pytest

from dse.pareto import non_dominated
from dse.report.dashboard import StudySnapshot
from dse.report.dashboard.axis_values import AxisChoice, axis_choices, axis_values, default_axes
from dse.report.dashboard.front_plot import FrontView, front_plot
from dse.report.dashboard.plotted_trials import plotted_trials
from dse.report.dashboard.trial_groups import RangeFilter, groups_of, kept_by
from dse.report.trials_table import numbers


def _choices(snapshot: StudySnapshot) -> dict[str, AxisChoice]:
    return {choice.key: choice for choice in axis_choices(snapshot.trials, snapshot.objectives)}


def _traces(snapshot: StudySnapshot, x: str = "reduction", y: str = "accuracy", **changes: Any) -> dict[str, Any]:
    choices = _choices(snapshot)
    figure = front_plot(snapshot, FrontView(choices[x], choices[y], **changes))
    json.dumps(figure, allow_nan=False)  # what a browser receives
    return {trace["name"]: trace for trace in figure["data"]}


def test_every_trial_is_in_exactly_one_group(snapshot: StudySnapshot) -> None:
    groups = groups_of(snapshot.trials)
    membership = np.sum(list(groups.values()), axis=0)
    is_repetition = (snapshot.trials["state"] == "duplicate").to_numpy()
    assert (membership == np.where(is_repetition, 0, 1)).all()
    assert groups["failed"].sum() == groups["stopped"].sum() == groups["infeasible"].sum() == 1


def test_the_plot_shows_every_state_of_a_trial(snapshot: StudySnapshot) -> None:
    traces = _traces(snapshot)
    counts = {name: len(trace["x"]) for name, trace in traces.items()}
    assert counts["Failed"] == counts["Infeasible"] == counts["Stopped early (estimate)"] == 1
    assert counts["In flight or queued"] == len(snapshot.pending) == 2
    assert counts["Dense model"] == 1
    shown = {trial for trace in traces.values() for trial in trace.get("customdata", [])}
    repeated = set(snapshot.trials.loc[snapshot.trials["state"] == "duplicate", "trial"])
    assert shown == {*snapshot.trials["trial"], *(entry.trial for entry in snapshot.pending)} - repeated


def test_front_points_carry_the_intervals_of_the_table(snapshot: StudySnapshot) -> None:
    trace = _traces(snapshot, "decode_latency_s", "accuracy")["Pareto front"]
    table = snapshot.trials.set_index("trial")
    for place, trial in enumerate(trace["customdata"]):
        row = table.loc[trial]
        assert trace["y"][place] == pytest.approx(100 * row["accuracy"])
        assert trace["error_y"]["array"][place] == pytest.approx(100 * (row["accuracy_high"] - row["accuracy"]))
        assert trace["x"][place] == pytest.approx(1000 * row["decode_latency_s"])
        down = 1000 * (row["decode_latency_s"] - row["decode_latency_s_low"])
        assert trace["error_x"]["arrayminus"][place] == pytest.approx(down)


def test_relative_values_are_the_paired_changes(snapshot: StudySnapshot) -> None:
    choices = _choices(snapshot)
    drop = axis_values(snapshot.trials, choices["accuracy"], relative=True)
    paired = np.isfinite(numbers(snapshot.trials, "accuracy_drop"))
    assert paired.sum() > 5
    np.testing.assert_allclose(drop.value[paired], -100 * numbers(snapshot.trials, "accuracy_drop")[paired])
    np.testing.assert_allclose(drop.low[paired], -100 * numbers(snapshot.trials, "accuracy_drop_high")[paired])
    ratio = axis_values(snapshot.trials, choices["decode_latency_s"], relative=True)
    known = np.isfinite(numbers(snapshot.trials, "decode_latency_s_ratio"))
    np.testing.assert_allclose(ratio.value[known], 100 * numbers(snapshot.trials, "decode_latency_s_ratio")[known])
    parameters = axis_values(snapshot.trials, choices["parameters"], relative=True)
    np.testing.assert_allclose(parameters.value, 100 * (1 - numbers(snapshot.trials, "reduction")), atol=1e-9)


def test_trials_without_a_value_lie_below_the_others(snapshot: StudySnapshot) -> None:
    traces = _traces(snapshot)  # a failed and a pending trial have a reduction, but no accuracy
    measured = [y for name in ("Pareto front", "Dominated", "Dense model") for y in traces[name]["y"]]
    assert max(traces["Failed"]["y"] + traces["In flight or queued"]["y"]) < min(measured)


def test_pending_trials_are_at_their_exact_cost(snapshot: StudySnapshot) -> None:
    trace = _traces(snapshot, "parameters", "accuracy")["In flight or queued"]
    np.testing.assert_allclose(trace["x"], [entry.known["parameters"] / 1e6 for entry in snapshot.pending])


def test_ranges_fade_the_trials_outside(snapshot: StudySnapshot) -> None:
    choices = _choices(snapshot)
    values = axis_values(snapshot.trials, choices["task.arc_easy.acc"], relative=False).value
    limit = float(np.nanmedian(values))
    filters = [RangeFilter(choices["task.arc_easy.acc"], limit, np.inf)]
    kept = kept_by(snapshot.trials, filters)
    assert kept.tolist() == [bool(value >= limit) for value in values]
    traces = _traces(snapshot, filters=filters)
    outside = set(traces["Outside the ranges"]["customdata"])
    assert outside
    assert outside.isdisjoint(snapshot.trials.loc[kept, "trial"])
    assert all(
        set(traces[n]["customdata"]) <= set(snapshot.trials.loc[kept, "trial"]) for n in ("Pareto front", "Dominated")
    )


def test_the_staircase_is_the_front_of_the_two_axes(snapshot: StudySnapshot) -> None:
    steps = _traces(snapshot, "parameters", "accuracy")["Front of these two axes"]
    table = snapshot.trials[(snapshot.trials["state"] == "complete") & snapshot.trials["feasible"].astype(bool)]
    plane = np.column_stack([numbers(table, "parameters"), numbers(table, "accuracy")])
    best = plane[non_dominated(plane, ["minimize", "maximize"])] * [1e-6, 100]
    np.testing.assert_allclose(np.column_stack([steps["x"], steps["y"]]), np.unique(best, axis=0))


def test_text_from_outside_is_escaped(snapshot: StudySnapshot) -> None:
    table = snapshot.trials.copy()
    table["origin"] = "<script>alert(1)</script>"
    table["task.<img src=x onerror=alert(2)>.acc"] = 0.5
    evil = dataclasses.replace(snapshot, trials=table, pending=())
    texts = [text for trace in _traces(evil).values() for text in trace.get("hovertext", [])]
    assert texts
    assert not any("<script" in text for text in texts)
    choices = _choices(evil)
    name = "task.<img src=x onerror=alert(2)>.acc"
    layout = front_plot(evil, FrontView(choices[name], choices["accuracy"]))["layout"]
    assert "<img" not in layout["xaxis"]["title"]["text"]


def test_an_empty_study_has_a_figure_that_says_so(snapshot: StudySnapshot) -> None:
    empty = dataclasses.replace(snapshot, trials=snapshot.trials.iloc[:0], records={}, pending=(), steps=())
    choices = {choice.key: choice for choice in axis_choices(empty.trials, empty.objectives)}
    x, y = default_axes(empty.objectives)
    figure = front_plot(empty, FrontView(choices[x], choices[y]))
    assert all(len(trace["x"]) == 0 for trace in figure["data"])
    assert "No trial has a value" in figure["layout"]["annotations"][-1]["text"]


def test_the_plot_of_a_study_that_just_started_shows_the_trial_in_flight(snapshot: StudySnapshot) -> None:
    import pandas as pd

    begun = dataclasses.replace(snapshot, trials=pd.DataFrame(), records={}, steps=())
    assert plotted_trials(begun)["state"].tolist() == ["running", "queued"]
    choices = {choice.key: choice for choice in axis_choices(begun.trials, begun.objectives)}
    traces = front_plot(begun, FrontView(choices["parameters"], choices["accuracy"]))["data"]
    assert sum(len(trace["x"]) for trace in traces if trace["name"] == "In flight or queued") == 2
