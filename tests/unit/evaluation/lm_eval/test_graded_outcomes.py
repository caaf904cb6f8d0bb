"""Graded metrics against log-likelihoods computed token by token, for every form of task."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from evaluation_support import TaskWriter
from hypothesis import given
from hypothesis import strategies as st

from dse.evaluation import EvaluationResult, Evaluator, TaskSpec, read_graded, read_outcomes
from dse.evaluation.graded_metrics import choice_probability
from dse.models import LoadedModel

DOCUMENTS = 5


def log_likelihood(loaded: LoadedModel, context: str, continuation: str) -> float:
    """Token by token, with one forward pass each."""
    tokenizer = loaded.tokenizer
    context_ids = tokenizer(context)["input_ids"] or [tokenizer.eos_token_id]
    whole = context_ids + tokenizer(continuation)["input_ids"]
    total = 0.0
    for end in range(len(context_ids), len(whole)):
        logits = loaded.model(torch.tensor([whole[:end]])).logits[0, -1].double()
        total += float(logits[whole[end]] - torch.logsumexp(logits, 0))
    return total


def rows_of(evaluator: Evaluator) -> list[dict[str, Any]]:
    return [row for task in evaluator._tasks for leaf in task.leaves for row in leaf.rows]


def evaluated(loaded: LoadedModel, path: Path) -> tuple[Evaluator, EvaluationResult]:
    evaluator = Evaluator(loaded, [TaskSpec(str(path), limit=DOCUMENTS)], seed=2)
    return evaluator, evaluator.evaluate()


def by_hand(choices: list[float], right: list[int]) -> tuple[float, float]:
    """(probability of the right choices, their log-likelihood)."""
    weights = [math.exp(value) for value in choices]
    chosen = sum(weights[index] for index in right)
    return chosen / sum(weights), math.log(chosen)


def check(result: EvaluationResult, expected: list[tuple[float, float]]) -> None:
    graded = result.tasks[0].graded
    assert graded["choice_probability"].tolist() == pytest.approx([pair[0] for pair in expected], rel=1e-4)
    assert graded["target_log_likelihood"].tolist() == pytest.approx([pair[1] for pair in expected], rel=1e-4)


@pytest.mark.parametrize("metric", ["acc", "acc_mutual_info"])
def test_multiple_choice_has_both_metrics(loaded: LoadedModel, write_task: TaskWriter, metric: str) -> None:
    metrics = [{"metric": metric, "aggregation": "mean", "higher_is_better": True}]
    evaluator, result = evaluated(loaded, write_task("choice", metric_list=metrics))
    expected = []
    for row in rows_of(evaluator):
        values = [log_likelihood(loaded, f"Q: {row['question']}\nA:", f" {choice}") for choice in row["choices"]]
        expected.append(by_hand(values, [row["gold"]]))
    check(result, expected)
    assert evaluator.graded == {"local_choice": ("choice_probability", "target_log_likelihood")}


def test_several_contexts_with_one_continuation_have_both_metrics(loaded: LoadedModel, write_task: TaskWriter) -> None:
    path = write_task(
        "choice",
        doc_to_text="gold",
        doc_to_choice="{{choices}}",
        doc_to_target="{{question}}",
        metric_list=[{"metric": "acc", "aggregation": "mean", "higher_is_better": True}],
    )
    evaluator, result = evaluated(loaded, path)
    expected = []
    for row in rows_of(evaluator):
        values = [log_likelihood(loaded, choice, f" {row['question']}") for choice in row["choices"]]
        expected.append(by_hand(values, [row["gold"]]))
    check(result, expected)


def test_several_right_answers_are_summed(loaded: LoadedModel, write_task: TaskWriter) -> None:
    path = write_task("choice", doc_to_target="{{[gold, (gold + 1) % 4]}}")
    evaluator, result = evaluated(loaded, path)
    expected = []
    for row in rows_of(evaluator):
        values = [log_likelihood(loaded, f"Q: {row['question']}\nA:", f" {choice}") for choice in row["choices"]]
        expected.append(by_hand(values, [row["gold"], (row["gold"] + 1) % 4]))
    check(result, expected)


def test_cloze_has_only_the_log_likelihood_of_its_target(loaded: LoadedModel, write_task: TaskWriter) -> None:
    evaluator, result = evaluated(loaded, write_task("cloze"))
    expected = [log_likelihood(loaded, row["question"], f" {row['choices'][0]}") for row in rows_of(evaluator)]
    assert set(result.tasks[0].graded) == {"target_log_likelihood"}
    assert result.tasks[0].graded["target_log_likelihood"].tolist() == pytest.approx(expected, rel=1e-4)


@pytest.mark.parametrize("kind", ["rolling", "generate"])
def test_whole_texts_and_generation_have_no_graded_metrics(
    loaded: LoadedModel, write_task: TaskWriter, kind: str
) -> None:
    evaluator, result = evaluated(loaded, write_task(kind))
    assert result.tasks[0].graded == {}
    assert evaluator.graded == {f"local_{kind}": ()}
    assert result.graded_metrics == ()
    assert result.graded_interval("choice_probability") is None
    assert result.graded_drop("choice_probability", result) is None


def test_intervals_and_drops_cover_the_tasks_that_have_the_metric(
    loaded: LoadedModel, write_task: TaskWriter, tmp_path: Path
) -> None:
    paths = [write_task(kind) for kind in ("choice", "cloze", "rolling")]
    evaluator = Evaluator(loaded, [TaskSpec(str(path)) for path in paths])
    dense = evaluator.evaluate()
    with torch.no_grad():
        loaded.model.model.layers[0].mlp.down_proj.weight.mul_(0.2)
    point = evaluator.evaluate()
    choice, cloze, _ = (task.graded for task in point.tasks)
    probability, target = point.graded_interval("choice_probability"), point.graded_interval("target_log_likelihood")
    assert probability is not None
    assert target is not None
    assert probability.value == pytest.approx(choice["choice_probability"].mean())
    means = [part["target_log_likelihood"].mean() for part in (choice, cloze)]
    assert target.value == pytest.approx(sum(means) / 2)
    drop = point.graded_drop("target_log_likelihood", dense)
    before = dense.graded_interval("target_log_likelihood")
    assert drop is not None
    assert before is not None
    assert drop.value == pytest.approx(before.value - target.value)
    assert drop.test == "paired bootstrap"
    assert drop.p_value is not None

    point.write_outcomes(tmp_path / "trial.npz")
    stored = tmp_path / "trial.npz"
    back = EvaluationResult.from_json(point.to_json(), read_outcomes(stored), read_graded(stored))
    for ours, theirs in zip(back.tasks, point.tasks, strict=True):
        assert set(ours.graded) == set(theirs.graded)
        for name, outcomes in theirs.graded.items():
            np.testing.assert_array_equal(ours.graded[name], outcomes)
    assert back.graded_drop("target_log_likelihood", dense) == drop


@given(st.lists(st.floats(-3000, 0), min_size=2, max_size=6))
def test_probabilities_of_all_choices_sum_to_one(values: list[float]) -> None:
    total = sum(choice_probability(values, [index]) for index in range(len(values)))
    assert total == pytest.approx(1.0)
    assert choice_probability(values, range(len(values))) == pytest.approx(1.0)
    best = choice_probability(values, [int(np.argmax(values))])
    assert all(choice_probability(values, [index]) <= best for index in range(len(values)))
