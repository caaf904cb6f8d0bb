"""Warm starts and allocations under a limit on predicted latency; the timings of products are scripted."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from tiny_study import tiny_study

from dse.config import LimitsConfig, Range, SearchParts, parse_search_space
from dse.design_point import DesignPoint
from dse.evaluation.statistics.intervals import Interval
from dse.measurement import LatencySpec
from dse.measurement.device_profile import ModelProfile, ProductShape, ProductTimings, profile_model
from dse.models import LoadedModel, load_model
from dse.pareto import Objective, objectives_named
from dse.search.latency_forecast import LatencyForecast
from dse.search.proposal import Proposal
from dse.search.search_session import SearchSession
from dse.search.spaces.base import SearchSpace
from dse.search.spaces.levels import LevelSpace
from dse.search.spaces.prior_table import level_table
from dse.search.spaces.table_space import constraints_of
from dse.sensitivity.allocation import allocate
from dse.trial.measurement_plan import MeasurementPlan
from dse.trial.trial_evaluator import new_record
from dse.trial_record import TrialRecord

DENSE_S = 1e-3


class ScriptedTimings(ProductTimings):
    """A start of 3 us, and 10 ns for each entry and row."""

    def seconds(self, shape: ProductShape) -> float:
        return 3e-6 + 1e-8 * shape.weight_entries * shape.rows


@pytest.fixture(scope="module")
def loaded(tiny_folder: Path) -> LoadedModel:
    return load_model(str(tiny_folder / "model"))


@pytest.fixture
def plan(loaded: LoadedModel, tmp_path: Path, own_cache: Path) -> MeasurementPlan:
    timings = ScriptedTimings(torch.device("cpu"), torch.float32, 2**20, tmp_path)
    cells = (LatencySpec(prompt_tokens=8),)
    return MeasurementPlan(cells, profile=profile_model(loaded, timings), predicts_latency=True)


def forecast_of(plan: MeasurementPlan, limits: LimitsConfig, objectives: Sequence[Objective]) -> LatencyForecast | None:
    return LatencyForecast.of(plan.profile, plan.phases(), limits, objectives)


def space_of(loaded: LoadedModel) -> LevelSpace:
    config = {**tiny_study(Path())["space"], "limits": {"reduction": {"min": 0.02}}}
    space = SearchSpace.from_config(parse_search_space(config), loaded.topology)
    assert isinstance(space, LevelSpace)
    return space


def dense_record(loaded: LoadedModel) -> TrialRecord:
    blank = new_record(Proposal({}, "dense", trial=0), DesignPoint.dense(), loaded.topology)
    return replace(blank, state="complete", quantities={"decode_latency_s": Interval(DENSE_S)})


def session_of(
    loaded: LoadedModel, plan: MeasurementPlan, max_s: float | None, latencies: Sequence[str] = ("decode_latency_s",)
) -> SearchSession:
    space = space_of(loaded)
    limits = LimitsConfig(decode_latency_s=Range(max=max_s))
    parts = SearchParts(warm_starts=True, start_up=True, refinement=True, refit=True)
    return SearchSession(
        space,
        objectives_named(["accuracy", *latencies, "parameters"]),
        parts,
        seed=0,
        trials=24,
        table=level_table(space, "svd"),
        forecast=forecast_of(plan, limits, objectives_named(["accuracy", *latencies])),
    )


def predicted(profile: ModelProfile | None, plan: MeasurementPlan, point: DesignPoint) -> float:
    assert profile is not None
    return profile.predicted_seconds(point, plan.phases()["decode_latency_s"], DENSE_S)


def test_allocations_satisfy_a_limit_that_they_would_otherwise_violate(
    loaded: LoadedModel, plan: MeasurementPlan
) -> None:
    free = session_of(loaded, plan, None, latencies=())
    assert free.forecast is None
    free.begin({}, dense_record(loaded))
    assert not any("latency" in candidate.why for candidate in free.first())
    points = [free.space.point(c.levels) for c in free.first() if c.origin == "allocation"]
    latencies = sorted(predicted(plan.profile, plan, point) for point in points)
    assert latencies[0] < latencies[-1]
    max_s = latencies[len(latencies) // 2]
    limited = session_of(loaded, plan, max_s)
    limited.begin({}, dense_record(loaded))
    found = [candidate for candidate in limited.first() if candidate.origin == "allocation"]
    assert found
    for candidate in found:
        point = limited.space.point(candidate.levels)
        assert predicted(plan.profile, plan, point) <= max_s * (1 + 1e-9)
        assert "within the limit on predicted latency" in candidate.why
    # A new session, as in a resumed study, proposes the same points.
    again = session_of(loaded, plan, max_s)
    again.begin({}, dense_record(loaded))
    assert [candidate.levels for candidate in again.first()] == [candidate.levels for candidate in limited.first()]


def test_the_table_predicts_the_latency_of_its_points(loaded: LoadedModel, plan: MeasurementPlan) -> None:
    session = session_of(loaded, plan, 1.0)
    session.begin({}, dense_record(loaded))
    table = session.table
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


def test_every_other_allocation_saves_latency_if_latency_is_an_objective(
    loaded: LoadedModel, plan: MeasurementPlan
) -> None:
    session = session_of(loaded, plan, None)
    session.begin({}, dense_record(loaded))
    assert session.forecast is not None
    assert session.forecast.max_s is None
    found = [candidate for candidate in session.first() if candidate.origin == "allocation"]
    timed = [candidate for candidate in found if "of the dense model's latency" in candidate.why]
    assert 0 < len(timed) < len(found)
    for candidate in timed:
        share = float(candidate.why.split(" of the dense")[0].split()[-1])
        point = session.space.point(candidate.levels)
        assert predicted(plan.profile, plan, point) <= (share + 0.0005) * DENSE_S
        # `why` names the budget; no point within it has less divergence.
        assert session.table is not None
        budget_s = (share - 0.0005) * DENSE_S
        least = allocate(session.table, latency_s=budget_s, constraints=constraints_of(session.space))
        chosen = sum(option.divergence for option in session.table.options_of(point).values())
        assert chosen <= least.divergence * (1 + 1e-4)


def test_a_limited_latency_takes_precedence(loaded: LoadedModel, plan: MeasurementPlan) -> None:
    limits = LimitsConfig(decode_latency_s=Range(max=1.0))
    both = objectives_named(["accuracy", "prefill_latency_s", "decode_latency_s"])
    found = forecast_of(plan, limits, both)
    assert found is not None
    assert (found.quantity, found.max_s) == ("decode_latency_s", 1.0)
    found = forecast_of(plan, LimitsConfig(), both)
    assert found is not None
    assert (found.quantity, found.max_s) == ("prefill_latency_s", None)


def test_without_a_predicted_objective_there_is_no_forecast(loaded: LoadedModel, plan: MeasurementPlan) -> None:
    limits = LimitsConfig(decode_latency_s=Range(max=1.0))
    timed, untimed = (objectives_named(["accuracy", name]) for name in ("decode_latency_s", "parameters"))
    assert LatencyForecast.of(None, plan.phases(), limits, timed) is None
    assert forecast_of(plan, LimitsConfig(peak_memory_bytes=Range(max=1.0)), untimed) is None


def test_without_a_baseline_latency_allocations_do_not_claim_to_satisfy_a_limit(
    loaded: LoadedModel, plan: MeasurementPlan
) -> None:
    session = session_of(loaded, plan, 1e-12)
    session.begin({}, None)
    found = session.first()
    assert [candidate.origin for candidate in found].count("allocation") > 0
    assert not any("latency" in candidate.why for candidate in found)
