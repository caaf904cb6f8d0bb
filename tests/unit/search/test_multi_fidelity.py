"""The arithmetic of multi-fidelity evaluation: predictions, decisions, and the sampler's values; without a model."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from dse.config import FidelityConfig
from dse.design_point import DesignPoint, TensorChoice
from dse.evaluation import EvaluationResult, TaskResult
from dse.evaluation.statistics.intervals import Interval
from dse.pareto import normalised_hypervolume, objectives_named
from dse.search.multi_fidelity.early_stopping import EarlyStopping
from dse.search.multi_fidelity.estimate import Estimate, estimate_objective, restricted
from dse.search.multi_fidelity.linear_prediction import FEWEST_POINTS, linear_prediction
from dse.search.multi_fidelity.session import MultiFidelitySession
from dse.trial_record import EvaluatedTrial, TrialRecord

OBJECTIVES = objectives_named(["accuracy", "parameters"])


# --- prediction ---


def test_a_noiseless_line_is_found_exactly() -> None:
    x = np.arange(10.0)[:, None]
    found = linear_prediction(x, 3.0 - 0.5 * x[:, 0], np.array([20.0]), 0.95)
    assert found is not None
    assert (found.value, found.low, found.high) == pytest.approx((-7.0, -7.0, -7.0), abs=1e-9)


def test_the_interval_is_the_textbook_one() -> None:
    generator = np.random.default_rng(3)
    x = generator.uniform(0.0, 2.0, 12)
    y = 0.5 - 0.1 * x + generator.normal(0.0, 0.02, 12)
    found = linear_prediction(x[:, None], y, np.array([1.5]), 0.95)
    # Draper and Smith, eq. 1.4.14, with t(0.975, 10) from their table.
    slope = ((x - x.mean()) * y).sum() / ((x - x.mean()) ** 2).sum()
    residual = y - y.mean() - slope * (x - x.mean())
    spread = math.sqrt((residual**2).sum() / 10)
    half = 2.228139 * spread * math.sqrt(1 + 1 / 12 + (1.5 - x.mean()) ** 2 / ((x - x.mean()) ** 2).sum())
    value = y.mean() + slope * (1.5 - x.mean())
    assert found is not None
    assert (found.value, found.low, found.high) == pytest.approx((value, value - half, value + half), rel=1e-5)


def test_the_prediction_interval_covers_new_values_at_its_confidence() -> None:
    generator = np.random.default_rng(0)
    hits, rounds = 0, 2000
    for _ in range(rounds):
        x = generator.uniform(0.0, 2.0, (FEWEST_POINTS + 1, 1))
        y = 0.5 - 0.1 * x[:, 0] + generator.normal(0.0, 0.03, len(x))
        found = linear_prediction(x[:-1], y[:-1], x[-1], 0.8, slope_sign=-1)
        assert found is not None
        hits += found.low <= y[-1] <= found.high
    assert hits / rounds == pytest.approx(0.8, abs=0.035)


def test_an_implausible_slope_is_ignored() -> None:
    x = np.arange(9.0)[:, None]
    y = np.tile([0.4, 0.5, 0.6], 3) + 0.01 * x[:, 0]
    far, near = (linear_prediction(x, y, np.array([at]), 0.9, slope_sign=-1) for at in (100.0, 0.0))
    assert far == near
    assert far is not None
    assert far.value == pytest.approx(y.mean())


@pytest.mark.parametrize("count", [0, 1, FEWEST_POINTS - 1])
def test_too_few_points_predict_nothing(count: int) -> None:
    x = np.arange(float(count))[:, None]
    assert linear_prediction(x, x[:, 0], np.array([0.5]), 0.9) is None


# --- decisions ---


def point_of(tensors: int) -> DesignPoint:
    return DesignPoint.of({f"t{i}": TensorChoice("svd", 1) for i in range(tensors)})


def record(
    trial: int, parameters: int, accuracy: float | None = None, divergence: float | None = None, **changes: Any
) -> TrialRecord:
    known = {"accuracy": accuracy, "kl_divergence": divergence}
    changes.setdefault("quantities", {name: Interval(v, v, v) for name, v in known.items() if v is not None})
    return TrialRecord(
        trial=trial,
        state="complete",
        origin="sampler",
        point=point_of(trial),
        cost={"parameters": parameters},
        **changes,
    )


def evaluation(outcomes: NDArray[np.float64]) -> EvaluationResult:
    mean = float(outcomes.mean())
    return EvaluationResult((TaskResult("t", "acc", mean, 0.1, len(outcomes), True, outcomes, kind="accuracy"),), 0.0)


def complete(trial: int, parameters: int, right: int, divergence: float | None = None) -> EvaluatedTrial:
    """Right on the first `right` of 100 documents."""
    outcomes = (np.arange(100) < right).astype(float)
    return EvaluatedTrial(record(trial, parameters, right / 100, divergence), evaluation(outcomes))


def rule_of(*entries: EvaluatedTrial, min_gain: float = 0.005) -> EarlyStopping:
    return EarlyStopping(OBJECTIVES, entries[0], entries, min_gain)


def line(noise: float = 0.0) -> list[EvaluatedTrial]:
    """Ten trials whose accuracy falls by 0.2 per nat, none of them small enough to lead the front."""
    steps = np.linspace(0.0, 1.8, 10)
    return [
        complete(i, 1000 - i, round(100 * (0.6 - 0.2 * kl + (noise if i % 2 else -noise))), float(kl))
        for i, kl in enumerate(steps)
    ]


def test_a_known_point_adds_its_own_hypervolume() -> None:
    front = [complete(0, 1000, 60, 0.0), complete(1, 500, 40, 0.5)]
    rule = rule_of(*front)

    def volume(*points: tuple[float, float]) -> float:
        return normalised_hypervolume(np.array(points), [0.0, 1100.0], [1.0, 0.0])

    before = volume((0.6, 1000.0), (0.4, 500.0))
    after = volume((0.6, 1000.0), (0.4, 500.0), (0.5, 600.0))
    assert rule.expected_gain([Estimate(0.5, 0.0), Estimate(600.0, 0.0)]) == pytest.approx(
        after / before - 1, rel=1e-12
    )
    assert rule.expected_gain([Estimate(0.3, 0.0), Estimate(600.0, 0.0)]) == 0.0


@pytest.mark.parametrize("mean", [0.35, 0.5, 0.65])
def test_the_expected_gain_equals_the_integral(mean: float) -> None:
    rule = rule_of(complete(0, 1000, 60, 0.0), complete(1, 500, 40, 0.5))
    spread = 0.08
    steps = np.linspace(mean - 6 * spread, mean + 6 * spread, 4001)
    density = np.exp(-0.5 * ((steps - mean) / spread) ** 2) / (spread * math.sqrt(2 * math.pi))
    gains = [rule.expected_gain([Estimate(float(a), 0.0), Estimate(600.0, 0.0)]) for a in steps]
    exact = float(np.trapezoid(np.array(gains) * density, steps))
    assert rule.expected_gain([Estimate(mean, spread), Estimate(600.0, 0.0)]) == pytest.approx(exact, abs=0.002)


def test_the_proxy_stops_a_point_predicted_behind_a_smaller_one() -> None:
    rule = rule_of(*line(), complete(20, 500, 45, 0.75))
    behind, ahead = record(21, 700, divergence=1.2), record(22, 700, divergence=0.3)  # 0.36 and 0.54 by the line
    stop = rule.decide(1, behind)
    assert stop is not None
    assert stop.rung == 1
    assert "less than 0.5 %" in stop.reason
    assert stop.estimates["accuracy"].value == pytest.approx(0.36, abs=0.01)
    assert stop.estimates["parameters"] == Interval(700.0, 700.0, 700.0)
    assert rule.decide(1, ahead) is None


def test_a_point_smaller_than_the_whole_front_continues() -> None:
    assert rule_of(*line(), complete(20, 500, 45, 0.75)).decide(1, record(21, 400, divergence=1.7)) is None


def test_a_noisy_line_stops_fewer_points() -> None:
    candidate = record(21, 700, divergence=0.9)  # 0.42 by the line, where 0.45 is on the front
    assert rule_of(*line(), complete(20, 500, 45, 0.75)).decide(1, candidate) is not None
    assert rule_of(*line(0.06), complete(20, 500, 45, 0.75)).decide(1, candidate) is None


def test_a_point_barely_ahead_of_its_neighbours_is_stopped() -> None:
    rule = rule_of(*line(), complete(20, 500, 45, 0.75))
    hair, gap = record(21, 499, divergence=0.75), record(22, 300, divergence=0.75)
    assert rule.decide(1, hair) is not None
    assert rule.decide(1, gap) is None


def test_promise_uses_all_trials_known_now() -> None:
    candidate = record(21, 700, divergence=0.9)
    early = rule_of(*line(), complete(20, 500, 45, 0.75), min_gain=0.9).decide(1, candidate)
    assert early is not None
    stopped = dataclasses.replace(candidate, rung=early.rung, estimates=early.estimates)
    noisy = rule_of(*line(0.06), complete(20, 500, 45, 0.75))
    estimates = [estimate_objective(objective, candidate, None, None, noisy._complete) for objective in OBJECTIVES]
    assert noisy.promise(stopped) == noisy.expected_gain([estimate for estimate in estimates if estimate is not None])
    # What documents said stands: it is read back from the estimates.
    seen = dataclasses.replace(
        stopped, rung=2, estimates={**early.estimates, "accuracy": Interval(0.5, 0.5 - 0.0196, 0.5 + 0.0196)}
    )
    expected = noisy.expected_gain([Estimate(0.5, 0.01), Estimate(700.0, 0.0)])
    assert noisy.promise(seen) == pytest.approx(expected, rel=1e-4)


def test_the_most_promising_stopped_trial_resumes_first_while_enough_is_promised() -> None:
    def session_of(trials: list[EvaluatedTrial]) -> MultiFidelitySession:
        def unread(trial: int) -> EvaluationResult:
            raise AssertionError(f"the evaluation of trial {trial} is given")

        session = MultiFidelitySession(FidelityConfig(resume_stopped=0.005), OBJECTIVES, unread)
        for trial in trials:
            session.add(trial.record, trial.evaluation)
        return session

    known = [*line(), complete(20, 500, 45, 0.75)]
    stopped = [record(30 + i, 700, divergence=kl) for i, kl in enumerate((1.2, 0.3, 0.5, 0.1))]
    stopped = [dataclasses.replace(entry, rung=1) for entry in stopped]
    resumed: list[int] = []
    session = session_of(known)

    def resume(entry: TrialRecord, rule: EarlyStopping) -> None:
        resumed.append(entry.trial)
        if entry.trial == 33:  # as good as predicted: the trials behind it promise nothing any more
            found = complete(33, 700, 58, 0.1)
            session.add(found.record, found.evaluation)

    session.resume_stopped_trials(stopped, known[0], resume)
    assert resumed == [33]
    session_of(known).resume_stopped_trials(stopped, known[0], lambda entry, rule: resumed.append(entry.trial))
    assert resumed[1:] == [33, 31, 32]


def test_with_too_few_trials_the_proxy_stops_nothing() -> None:
    rule = rule_of(complete(0, 1000, 60, 0.0), complete(1, 500, 59, 0.1))
    assert rule.decide(1, record(2, 700, divergence=9.0)) is None


def mask(share: float) -> dict[str, NDArray[np.bool_]]:
    """Every n-th document, so that right and wrong ones are in it."""
    return {"t": np.arange(100) % round(1 / share) == 0}


def test_a_share_stops_by_the_paired_difference_on_its_documents() -> None:
    rule = rule_of(complete(0, 1000, 70), complete(1, 500, 68))
    masks = mask(0.25)
    documents = np.arange(100)[masks["t"]]
    much_worse = rule.decide(2, record(2, 700), evaluation((documents < 30).astype(float)), masks)
    better = rule.decide(2, record(2, 700), evaluation((documents < 76).astype(float)), masks)
    assert much_worse is not None
    assert better is None
    # Dense is right on 18 of these 25 documents, the candidate on 8; Bonett and Price add one to either side of 27.
    assert much_worse.estimates["accuracy"].value == pytest.approx(0.70 - 10 / 27, abs=0.03)
    low, high = much_worse.estimates["accuracy"].low, much_worse.estimates["accuracy"].high
    assert low is not None
    assert high is not None
    assert low < 0.30 < high < 0.68


def test_proxy_and_documents_are_weighted_by_precision() -> None:
    entries = [*line(0.02), complete(20, 500, 45, 0.75)]
    masks = mask(0.25)
    documents = np.arange(100)[masks["t"]]
    candidate, seen = record(21, 700, divergence=1.2), evaluation((documents < 60).astype(float))
    bare = dataclasses.replace(candidate, quantities={})
    both = estimate_objective(OBJECTIVES[0], candidate, seen, masks, entries)
    proxy = estimate_objective(OBJECTIVES[0], candidate, None, None, entries)
    alone = estimate_objective(OBJECTIVES[0], bare, seen, masks, entries)
    assert both is not None
    assert proxy is not None
    assert alone is not None
    assert proxy.mean < both.mean < alone.mean
    assert both.deviation < min(proxy.deviation, alone.deviation)


@given(
    means=st.tuples(st.floats(-1, 1), st.floats(-1, 1)), deviations=st.tuples(st.floats(0.01, 1), st.floats(0.01, 1))
)
def test_combined_estimates_follow_bayes(means: tuple[float, float], deviations: tuple[float, float]) -> None:
    first, second = (Estimate(m, d) for m, d in zip(means, deviations, strict=True))
    both = first.combined(second)
    steps = np.linspace(-8, 8, 40001)
    logs = sum(-0.5 * ((steps - b.mean) / b.deviation) ** 2 for b in (first, second))
    density = np.exp(logs - np.max(logs))
    density /= density.sum()
    mean = float((steps * density).sum())
    assert both.mean == pytest.approx(mean, abs=2e-3)
    assert both.deviation == pytest.approx(math.sqrt(float(((steps - mean) ** 2 * density).sum())), rel=0.02, abs=1e-3)
    assert first.combined(None) == first
    assert first.combined(Estimate(0.3, 0.0)) == Estimate(0.3, 0.0)


def test_a_larger_share_has_a_smaller_deviation() -> None:
    entries = [complete(0, 1000, 60), complete(1, 500, 60)]
    deviations = []
    for share in (0.1, 0.5):
        masks = mask(share)
        documents = np.arange(100)[masks["t"]]
        seen = evaluation((documents < 45).astype(float))
        found = estimate_objective(OBJECTIVES[0], record(2, 700), seen, masks, entries)
        assert found is not None
        deviations.append(found.deviation)
    assert deviations[1] < 0.6 * deviations[0]


def test_a_cost_that_is_measured_last_is_predicted() -> None:
    objectives = objectives_named(["accuracy", "decode_latency_s"])

    def touching(tensors: int, parameters: int, **quantities: float) -> TrialRecord:
        known = {name: Interval(value, value, value) for name, value in quantities.items()}
        return record(tensors, parameters, quantities=known)

    entries = [
        EvaluatedTrial(
            touching(n % 3, 900 + 10 * n, accuracy=0.5, decode_latency_s=0.1 + 1e-4 * n + 0.01 * (n % 3)), None
        )
        for n in range(12)
    ]

    def decision(known: int, parameters: int) -> Any:
        return EarlyStopping(objectives, entries[0], entries[:known], 0.005).decide(
            1, touching(1, parameters, accuracy=0.4)
        )

    assert decision(3, 1200) is None  # too few latencies for a line
    assert decision(12, 1200) is not None  # larger than all, so slower by the line
    assert decision(12, -500) is None  # so small that it may be the fastest


def test_a_restricted_result_keeps_the_chosen_documents_only() -> None:
    outcomes = np.arange(6, dtype=np.float64)
    chosen = np.array([True, False, True, False, False, True])
    part = restricted(evaluation(outcomes), {"t": chosen}).tasks[0]
    assert part.outcomes.tolist() == [0.0, 2.0, 5.0]
    assert part.documents == 3
    assert math.isnan(part.value)  # the value of all documents must not pass for that of some


# --- the sampler's values ---


def test_the_sampler_receives_the_estimates_of_a_stopped_trial() -> None:
    stopped = record(3, 700, estimates={"accuracy": Interval(0.4, 0.3, 0.45), "parameters": Interval(700, 700, 700)})
    session = MultiFidelitySession(FidelityConfig(), OBJECTIVES, lambda trial: evaluation(np.zeros(1)))
    assert session.sampler_values(stopped) == [0.4, 700]
