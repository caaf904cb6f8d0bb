from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import pytest

from dse.errors import StudyError, TaskError
from dse.evaluation import EvaluationResult, TaskResult, read_graded, read_outcomes
from dse.evaluation.result import choose_metric, kind_of


def accuracy_task(name: str, outcomes: list[float], weight: float = 1.0) -> TaskResult:
    array = np.asarray(outcomes, dtype=np.float64)
    stderr = float(array.std(ddof=1) / math.sqrt(array.size))
    return TaskResult(
        name, "acc", float(array.mean()), stderr, array.size, True, array, {"acc": (0.5, None)}, weight, "accuracy"
    )


def perplexity_task(name: str, pairs: list[tuple[float, float]], weight: float = 1.0) -> TaskResult:
    array = np.asarray(pairs, dtype=np.float64)
    value = math.exp(-array[:, 0].sum() / array[:, 1].sum())
    return TaskResult(name, "word_perplexity", value, 0.1, len(pairs), False, array, {}, weight, "perplexity")


def test_means_are_weighted_and_separate_by_kind() -> None:
    other = TaskResult("o", "bits_per_byte", 3.0, None, 2, False, np.ones((2, 2)), {}, 5.0, "other")
    first, second = accuracy_task("a", [1, 1, 0, 0], 3.0), accuracy_task("b", [1, 0, 0, 0], 1.0)
    texts = [perplexity_task("p", [(-4.0, 2.0), (-2.0, 2.0)]), perplexity_task("q", [(-3.0, 1.0), (-3.0, 1.0)])]
    result = EvaluationResult((first, other, second, *texts), 1.5)
    assert result.accuracy == pytest.approx(0.75 * 0.5 + 0.25 * 0.25)
    assert first.stderr is not None
    assert second.stderr is not None
    assert result.accuracy_stderr == pytest.approx(math.hypot(0.75 * first.stderr, 0.25 * second.stderr))
    assert result.perplexity == pytest.approx(math.exp((1.5 + 3.0) / 2))
    nothing = EvaluationResult((other,), 0.0)
    assert (nothing.accuracy, nothing.accuracy_stderr, nothing.perplexity) == (None, None, None)
    assert (nothing.accuracy_interval(), nothing.perplexity_interval()) == (None, None)
    assert (nothing.accuracy_drop(nothing), nothing.perplexity_ratio(nothing)) == (None, None)


def test_paired_differences_are_relative_to_the_baseline() -> None:
    dense = EvaluationResult((accuracy_task("a", [1, 1, 1, 0]), perplexity_task("p", [(-2.0, 2.0), (-4.0, 4.0)])), 0)
    point = EvaluationResult((accuracy_task("a", [1, 0, 0, 0]), perplexity_task("p", [(-4.0, 2.0), (-8.1, 4.0)])), 0)
    drop, ratio = point.accuracy_drop(dense), point.perplexity_ratio(dense)
    assert drop is not None
    assert ratio is not None
    assert drop.value == pytest.approx(0.5)
    assert ratio.value == pytest.approx(math.exp(6.1 / 6))
    assert ratio.low is not None
    assert 1.0 < ratio.low < ratio.value


def test_different_tasks_or_documents_are_refused() -> None:
    dense = EvaluationResult((accuracy_task("a", [1, 1, 1, 0]),), 0)
    with pytest.raises(TaskError, match="same tasks"):
        EvaluationResult((accuracy_task("b", [1, 1, 1, 0]),), 0).accuracy_drop(dense)
    with pytest.raises(TaskError, match="same documents"):
        EvaluationResult((accuracy_task("a", [1, 1, 1, 0, 0]),), 0).accuracy_drop(dense)


def test_json_and_outcomes_round_trip(tmp_path: Path) -> None:
    result = EvaluationResult((accuracy_task("a/b c", [1, 0, math.nan]), perplexity_task("p", [(-4.0, 2.0)] * 2)), 2.5)
    text = json.dumps(result.to_json() | {"tasks": result.to_json()["tasks"]}, allow_nan=True)
    result.write_outcomes(tmp_path / "folder" / "trial.npz")
    back = EvaluationResult.from_json(json.loads(text), read_outcomes(tmp_path / "folder" / "trial.npz"))
    assert back.seconds == 2.5
    for before, after in zip(result.tasks, back.tasks, strict=True):
        np.testing.assert_array_equal(before.outcomes, after.outcomes)
        assert (before.task, before.metric, before.documents, before.weight, before.kind) == (
            after.task,
            after.metric,
            after.documents,
            after.weight,
            after.kind,
        )
        assert dict(before.all_metrics) == dict(after.all_metrics)
    assert back.perplexity == result.perplexity
    assert EvaluationResult.from_json(json.loads(text)).perplexity == result.perplexity
    assert [path.name for path in (tmp_path / "folder").iterdir()] == ["trial.npz"]


@pytest.mark.parametrize("content", [b"", b"PK\x03\x04 not really", b"\x93NUMPY"])
def test_damaged_outcomes_are_reported(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "trial.npz"
    with pytest.raises(StudyError, match="does not exist"):
        read_outcomes(path)
    path.write_bytes(content)
    with pytest.raises(StudyError, match="is damaged"):
        read_outcomes(path)
    EvaluationResult((accuracy_task("a", [1, 0]),), 0).write_outcomes(path)
    path.write_bytes(path.read_bytes()[:-40])
    with pytest.raises(StudyError, match="is damaged"):
        read_outcomes(path)


def test_old_names_of_graded_metrics_are_read(tmp_path: Path) -> None:
    path = tmp_path / "trial.npz"
    log_likelihoods = np.asarray([-1.0, -2.0])
    np.savez(path, tasks=np.asarray(["a"]), outcomes_0=np.asarray([1.0, 0.0]), gold_log_likelihood_0=log_likelihoods)
    graded = read_graded(path)["a"]
    assert list(graded) == ["target_log_likelihood"]
    np.testing.assert_array_equal(graded["target_log_likelihood"], log_likelihoods)


def test_pickled_outcomes_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "trial.npz"
    np.savez(path, tasks=np.asarray(["a"]), outcomes_0=np.asarray([{"a": 1}], dtype=object))
    with pytest.raises(StudyError, match="is damaged"):
        read_outcomes(path)


@pytest.mark.parametrize("change", [{"tasks": 3}, {"seconds": None}, {"tasks": [{}]}, {"tasks": [None]}])
def test_damaged_record_is_reported(change: dict[str, object]) -> None:
    good = EvaluationResult((accuracy_task("a", [1, 0]),), 0).to_json()
    with pytest.raises(StudyError, match="every field"):
        EvaluationResult.from_json({**good, **change})
    good["tasks"][0]["kind"] = "guess"
    with pytest.raises(StudyError, match="guess"):
        EvaluationResult.from_json(good)


@pytest.mark.parametrize(
    ("available", "asked", "chosen"),
    [
        (["acc_norm", "acc"], None, "acc"),
        (["perplexity", "acc_norm"], None, "acc_norm"),
        (["bits_per_byte", "byte_perplexity", "word_perplexity"], None, "word_perplexity"),
        (["exact_match,strict", "exact_match,flexible"], None, "exact_match,strict"),
        (["exact_match,strict", "exact_match,flexible"], "exact_match,flexible", "exact_match,flexible"),
        (["exact_match,strict", "exact_match,flexible"], "exact_match", "exact_match,strict"),
        (["mcc", "bleu"], None, "mcc"),
        (["acc", "acc_norm"], "acc_norm", "acc_norm"),
    ],
)
def test_main_metric_is_the_preferred_or_requested_one(available: list[str], asked: str | None, chosen: str) -> None:
    assert choose_metric("t", available, asked) == chosen


def test_unavailable_metric_is_refused_with_the_available_ones() -> None:
    with pytest.raises(TaskError, match="must be one of acc, acc_norm, but got 'f1'"):
        choose_metric("t", ["acc", "acc_norm"], "f1")
    with pytest.raises(TaskError, match="has none"):
        choose_metric("t", [])


def test_kind_of_metric() -> None:
    ones, pairs = np.ones(3), np.ones((3, 2))
    assert kind_of("acc", np.asarray([0.0, 1.0, math.nan]), is_mean=True, higher_is_better=True) == "accuracy"
    assert kind_of("mc2", np.asarray([0.3, 0.7]), is_mean=True, higher_is_better=True) == "accuracy"
    assert kind_of("rouge", np.asarray([30.0, 70.0]), is_mean=True, higher_is_better=True) == "other"
    assert kind_of("brier", ones, is_mean=True, higher_is_better=False) == "other"
    assert kind_of("median", ones, is_mean=False, higher_is_better=True) == "other"
    assert kind_of("word_perplexity", pairs, is_mean=False, higher_is_better=False) == "perplexity"
    assert kind_of("bits_per_byte", pairs, is_mean=False, higher_is_better=False) == "other"
    assert kind_of("f1", pairs, is_mean=False, higher_is_better=True) == "other"
