"""Comparison of two evaluations: every row against the statistical tests behind it."""

from __future__ import annotations

import math

import numpy as np
import pytest

from dse.errors import TaskError
from dse.evaluation import EvaluationResult, TaskResult
from dse.evaluation.paired_comparison import MEAN, Comparison, compare_evaluations
from dse.evaluation.statistics.paired_tests import mcnemar, stratified_mcnemar
from dse.evaluation.statistics.power import smallest_detectable_drop


def choice(name: str, right: list[float], seed: int) -> TaskResult:
    outcomes = np.asarray(right)
    graded = {
        "choice_probability": np.random.default_rng(seed).uniform(size=outcomes.size),
        "target_log_likelihood": -np.random.default_rng(seed).exponential(size=outcomes.size),
    }
    error = float(outcomes.std(ddof=1) / math.sqrt(outcomes.size))
    return TaskResult(
        name, "acc", float(outcomes.mean()), error, outcomes.size, True, outcomes, {}, 1.0, "accuracy", graded
    )


def text(name: str, losses: list[float]) -> TaskResult:
    pairs = np.asarray([(-loss, 10.0) for loss in losses])
    value = math.exp(sum(losses) / (10 * len(losses)))
    return TaskResult(name, "word_perplexity", value, 0.1, len(losses), False, pairs, {}, 1.0, "perplexity")


def other(name: str, values: list[float], value: float) -> TaskResult:
    return TaskResult(name, "bleu", value, None, len(values), True, np.asarray(values), {}, 1.0, "other")


FIRST = EvaluationResult(
    (choice("a", [1.0] * 12 + [0.0] * 8, 1), choice("b", [1.0] * 10 + [0.0] * 20, 2), text("t", [20.0, 25.0, 30.0])), 0
)
SECOND = EvaluationResult(
    (
        choice("a", [1.0] * 3 + [0.0] * 7 + [1.0] * 10, 3),
        choice("b", [0.0] * 9 + [1.0] * 5 + [0.0] * 16, 4),
        text("t", [21.0, 25.5, 33.0]),
    ),
    0,
)


def rows(first: EvaluationResult, second: EvaluationResult) -> dict[tuple[str, str], Comparison]:
    return {(row.task, row.metric): row for row in compare_evaluations(first, second)}


def test_every_task_and_every_mean_has_a_row() -> None:
    graded = ["choice_probability", "target_log_likelihood"]
    tasks = [(task, metric) for task in ("a", "b") for metric in ("acc", *graded)]
    means = [(MEAN, metric) for metric in ("accuracy", *graded)]
    assert list(rows(FIRST, SECOND)) == [*tasks, ("t", "word_perplexity"), *means]
    alone = EvaluationResult(FIRST.tasks[:1], 0)
    assert [task for task, _ in rows(alone, EvaluationResult(SECOND.tasks[:1], 0))] == ["a"] * 3


def test_row_of_an_accuracy() -> None:
    row = rows(FIRST, SECOND)["a", "acc"]
    drop = EvaluationResult(SECOND.tasks[:1], 0).accuracy_drop(EvaluationResult(FIRST.tasks[:1], 0))
    assert drop is not None
    assert (row.losses, row.gains, row.documents, row.test) == (7, 8, 20, "exact McNemar")
    assert row.p_value == mcnemar(7, 8)
    assert row.change == pytest.approx(0.05)
    assert (row.low, row.high) == (-(drop.high or 0), -(drop.low or 0))
    assert row.detectable == smallest_detectable_drop(15, 20)
    assert (row.first_stderr, row.second_stderr) == (FIRST.tasks[0].stderr, SECOND.tasks[0].stderr)


def test_mean_over_tasks_has_a_stratified_test() -> None:
    row = rows(FIRST, SECOND)[MEAN, "accuracy"]
    assert row.p_value == stratified_mcnemar([7, 9], [8, 4], [1 / 40, 1 / 60])
    assert row.documents == 50
    assert row.change == pytest.approx((0.05 - 5 / 30) / 2)


def test_row_of_a_perplexity_is_a_ratio() -> None:
    row = rows(FIRST, SECOND)["t", "word_perplexity"]
    assert row.scale == "ratio"
    assert row.change == pytest.approx(math.exp(4.5 / 30))
    assert row.test == "paired bootstrap"


def test_swapping_the_evaluations_mirrors_every_row() -> None:
    forward, swapped = rows(FIRST, SECOND), rows(SECOND, FIRST)
    for key, row in forward.items():
        assert row.change is not None
        other_change = swapped[key].change
        assert other_change is not None
        expected = 1 / other_change if row.scale == "ratio" else -other_change
        assert row.change == pytest.approx(expected)
        assert row.p_value == pytest.approx(swapped[key].p_value)


def test_corpus_metric_has_no_test() -> None:
    values = [1.0, 5.0, 9.0]
    mean, corpus = other("m", values, 5.0), other("m", values, 4.2)
    assert rows(EvaluationResult((mean,), 0), EvaluationResult((mean,), 0))["m", "bleu"].test == "paired bootstrap"
    row = rows(EvaluationResult((corpus,), 0), EvaluationResult((mean,), 0))["m", "bleu"]
    assert (row.change, row.p_value, row.test, row.first, row.second) == (None, None, "", 4.2, 5.0)


def test_different_tasks_or_documents_are_refused() -> None:
    with pytest.raises(TaskError, match="only on the same tasks"):
        compare_evaluations(FIRST, EvaluationResult(SECOND.tasks[:2], 0))
    with pytest.raises(TaskError, match="same documents"):
        compare_evaluations(
            EvaluationResult((choice("a", [1.0, 0.0], 1),), 0), EvaluationResult((choice("a", [1.0, 0.0, 1.0], 1),), 0)
        )
