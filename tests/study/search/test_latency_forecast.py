"""Warm starts and allocations under a predicted latency limit; the seconds of products are scripted."""

from __future__ import annotations

import random
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_study import tiny_study

from dse.config import LimitsConfig, Range, SearchParts, parse_search_space
from dse.design_point import DesignPoint
from dse.measurement import LatencySpec
from dse.models import LoadedModel, load_model
from dse.pareto import objectives_named
from dse.runtime import ModelProfile, ProductShape, ProductTimings, model_profile
from dse.study import SearchSpace
from dse.study.evaluate_point import blank_record
from dse.study.measurement_plan import MeasurementPlan
from dse.study.record import Interval, TrialRecord
from dse.study.search import LatencyForecast, SearchSession
from dse.study.space import LevelSpace
from dse.study.space.prior_table import level_table

DENSE_S = 1e-3


class ScriptedTimings(ProductTimings):
    """A start of 3 us, and 10 ns for each entry and row."""

    def seconds(self, shape: ProductShape, layout: Any) -> float:
        return 3e-6 + 1e-8 * shape.weight_entries * shape.rows


@pytest.fixture(scope="module")
def loaded(tiny_folder: Path) -> LoadedModel:
    return load_model(str(tiny_folder / "model"))


@pytest.fixture
def plan(loaded: LoadedModel, tmp_path: Path, own_cache: Path) -> MeasurementPlan:
    timings = ScriptedTimings(torch.device("cpu"), torch.float32, 2**20, tmp_path)
    made = MeasurementPlan((LatencySpec(mode="fast", prompt_tokens=8),), predicts_latency=True)
    made.profile = model_profile(loaded, timings)
    return made


def space_of(loaded: LoadedModel) -> LevelSpace:
    config = {**tiny_study(Path())["space"], "limits": {"reduction": {"min": 0.02}}}
    space = SearchSpace.from_config(parse_search_space(config), loaded.topology)
    assert isinstance(space, LevelSpace)
    return space


def dense_record(loaded: LoadedModel) -> TrialRecord:
    blank = blank_record(0, DesignPoint.dense(), loaded.topology, "dense")
    return replace(blank, state="complete", quantities={"decode_latency_s": Interval(DENSE_S)})


def session_of(loaded: LoadedModel, plan: MeasurementPlan, most_s: float | None) -> SearchSession:
    space = space_of(loaded)
    limits = LimitsConfig(decode_latency_s=Range(max=most_s))
    parts = SearchParts(warm_starts=True, start_up=True, refinement=True, refit=True)
    return SearchSession(
        space,
        objectives_named(["accuracy", "decode_latency_s"]),
        parts,
        seed=0,
        trials=24,
        damages=level_table(space, "svd"),
        forecast=LatencyForecast.of(plan, limits),
    )


def predicted(profile: ModelProfile | None, plan: MeasurementPlan, point: DesignPoint) -> float:
    assert profile is not None
    return profile.predicted_seconds(point, plan.phases()["decode_latency_s"], DENSE_S)


def test_allocations_keep_the_limit_that_they_would_break(loaded: LoadedModel, plan: MeasurementPlan) -> None:
    free = session_of(loaded, plan, None)
    assert free.forecast is None
    free.begin({}, dense_record(loaded))
    points = [free.space.point(c.levels) for c in free.first() if c.origin == "allocation"]
    latencies = sorted(predicted(plan.profile, plan, point) for point in points)
    assert latencies[0] < latencies[-1]
    most_s = latencies[len(latencies) // 2]
    limited = session_of(loaded, plan, most_s)
    limited.begin({}, dense_record(loaded))
    found = [candidate for candidate in limited.first() if candidate.origin == "allocation"]
    assert found
    for candidate in found:
        point = limited.space.point(candidate.levels)
        assert predicted(plan.profile, plan, point) <= most_s * (1 + 1e-9)
        assert "within the latency limit as predicted" in candidate.why
    # The same session made anew, as for a resumed study, proposes the same.
    again = session_of(loaded, plan, most_s)
    again.begin({}, dense_record(loaded))
    assert [candidate.levels for candidate in again.first()] == [candidate.levels for candidate in limited.first()]


def test_the_table_tells_the_latency_of_its_points(loaded: LoadedModel, plan: MeasurementPlan) -> None:
    session = session_of(loaded, plan, 1.0)
    session.begin({}, dense_record(loaded))
    table = session.damages
    assert table is not None
    assert table.latency_dense_s == DENSE_S
    generator = random.Random(0)
    for _ in range(20):
        levels = session.space.draw_feasible(generator)
        assert levels is not None
        point = session.space.point(levels)
        base = DENSE_S - sum(unit.dense.latency_s or 0.0 for unit in table.units)
        total = base + sum(option.latency_s or 0.0 for option in table.options_of(point).values())
        assert total == pytest.approx(predicted(plan.profile, plan, point), rel=1e-9)


def test_without_a_forecast_nothing_changes(loaded: LoadedModel, plan: MeasurementPlan) -> None:
    limits = LimitsConfig(decode_latency_s=Range(max=1.0))
    assert LatencyForecast.of(replace(plan, predicts_latency=False), limits) is None
    assert LatencyForecast.of(plan, LimitsConfig()) is None
    assert LatencyForecast.of(plan, LimitsConfig(peak_memory_bytes=Range(max=1.0))) is None


def test_where_the_dense_latency_is_not_known_allocations_do_not_claim_to_keep_a_limit(
    loaded: LoadedModel, plan: MeasurementPlan
) -> None:
    session = session_of(loaded, plan, 1e-12)
    session.begin({}, None)
    found = session.first()
    assert [candidate.origin for candidate in found].count("allocation") > 0
    assert not any("latency" in candidate.why for candidate in found)
