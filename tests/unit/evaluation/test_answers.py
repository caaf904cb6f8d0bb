"""Cached answers: shares of the documents, reuse by later evaluations, and what invalidates the cache."""

from __future__ import annotations

import dataclasses
import itertools
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from evaluation_support import TaskWriter, byte_tokenizer, tiny_llama

from dse.errors import ConfigError
from dse.evaluation import Answers, EvaluationCache, EvaluationResult, Evaluator, TaskSpec
from dse.models import LoadedModel

KINDS = ("choice", "cloze", "rolling", "generate")


class Asked:
    """Counts the requests that reach the model."""

    def __init__(self) -> None:
        self.requests = 0

    def __call__(self, done: int, total: int) -> None:
        self.requests = total


def figures(result: EvaluationResult) -> list[Any]:
    return [(t.task, t.value, t.stderr, t.documents, t.outcomes.tolist(), dict(t.all_metrics)) for t in result.tasks]


def evaluator_of(loaded: LoadedModel, *paths: Path, **keywords: Any) -> Evaluator:
    return Evaluator(loaded, [TaskSpec(str(path)) for path in paths], **keywords)


def test_evaluating_a_share_and_then_the_rest_equals_a_full_evaluation(
    loaded: LoadedModel, write_task: TaskWriter
) -> None:
    evaluator = evaluator_of(loaded, *(write_task(kind) for kind in KINDS))
    whole, answers = evaluator.evaluate(), Answers()
    part = evaluator.evaluate(share=0.25, answers=answers)
    assert [task.documents for task in part.tasks] == [3] * len(KINDS)
    assert (answers.reused, answers.scored) == (0, 3 * len(KINDS))
    joined = evaluator.evaluate(answers=answers)
    assert (answers.reused, answers.scored) == (3 * len(KINDS), 9 * len(KINDS))
    for ours, theirs in zip(joined.tasks, whole.tasks, strict=True):
        assert ours.value == pytest.approx(theirs.value, rel=1e-5)
        np.testing.assert_allclose(ours.outcomes, theirs.outcomes, rtol=1e-4)
    masks = evaluator.within_share(0.25)
    for small, large in zip(part.tasks, joined.tasks, strict=True):
        np.testing.assert_array_equal(large.outcomes[masks[large.task]], small.outcomes)


def test_shares_are_nested_and_equal_to_the_draw_of_a_limit(loaded: LoadedModel, write_task: TaskWriter) -> None:
    path = write_task("choice")
    whole = evaluator_of(loaded, path, seed=4)
    masks = [whole.within_share(share)["local_choice"] for share in (0.1, 0.3, 0.5, 1.0)]
    assert [int(mask.sum()) for mask in masks] == [2, 4, 6, 12]
    assert all(bool((small <= large).all()) for small, large in itertools.pairwise(masks))
    limited = evaluator_of(loaded, path, seed=4, limit=4).documents["local_choice"]
    assert np.flatnonzero(masks[1]).tolist() == limited
    assert evaluator_of(loaded, path, seed=4, limit=6).within_share(0.5)["local_choice"].sum() == 3


@pytest.mark.parametrize("share", [0.0, -0.5, 1.5])
def test_share_outside_its_interval_is_refused(loaded: LoadedModel, write_task: TaskWriter, share: float) -> None:
    with pytest.raises(ConfigError, match=r"0 < share <= 1"):
        evaluator_of(loaded, write_task("choice")).evaluate(share=share)


def test_cache_hit_is_bit_identical_and_scores_nothing(
    loaded: LoadedModel, write_task: TaskWriter, tmp_path: Path
) -> None:
    evaluator = evaluator_of(loaded, *(write_task(kind) for kind in KINDS))
    cache, answers, asked = EvaluationCache(tmp_path / "cache"), Answers(), Asked()
    first = evaluator.evaluate(answers=answers)
    cache.write(evaluator.identity("dense", ""), answers)
    again = EvaluationCache(tmp_path / "cache").read(evaluator.identity("dense", ""))
    assert again.by_document == answers.by_document
    assert figures(evaluator.evaluate(asked, answers=again)) == figures(first)
    assert (again.reused, again.scored, asked.requests) == (12 * len(KINDS), 0, 1)


def test_larger_limit_reuses_answers_of_a_smaller_one(loaded: LoadedModel, write_task: TaskWriter) -> None:
    path, answers = write_task("choice"), Answers()
    evaluator_of(loaded, path, limit=5).evaluate(answers=answers)
    evaluator_of(loaded, path, limit=9).evaluate(answers=answers)
    assert (answers.reused, answers.scored) == (5, 4)


def test_edited_document_is_the_only_miss(loaded: LoadedModel, write_task: TaskWriter) -> None:
    path, answers = write_task("choice"), Answers()
    evaluator_of(loaded, path).evaluate(answers=answers)
    data = path.with_suffix(".jsonl")
    rows = [json.loads(line) for line in data.read_text().splitlines()]
    rows[3]["choices"][1] = "a moon"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    edited = evaluator_of(loaded, path).evaluate(answers=answers)
    assert (answers.reused, answers.scored) == (11, 1)
    np.testing.assert_allclose(edited.tasks[0].outcomes, evaluator_of(loaded, path).evaluate().tasks[0].outcomes)


@pytest.mark.parametrize(
    "change",
    [
        {"doc_to_text": "Question: {{question}}"},
        {"metadata": {"version": 2.0}},
        {"target_delimiter": " = "},
    ],
    ids=["prompt", "version", "delimiter"],
)
def test_edited_task_file_misses_all_documents(
    loaded: LoadedModel, write_task: TaskWriter, change: dict[str, Any]
) -> None:
    answers = Answers()
    evaluator_of(loaded, write_task("choice")).evaluate(answers=answers)
    evaluator_of(loaded, write_task("choice", **change)).evaluate(answers=answers)
    assert (answers.reused, answers.scored) == (0, 12)


def test_other_models_points_factors_and_settings_miss(
    loaded: LoadedModel, write_task: TaskWriter, tmp_path: Path
) -> None:
    path, cache = write_task("choice"), EvaluationCache(tmp_path / "cache")
    evaluator, answers = evaluator_of(loaded, path), Answers()
    evaluator.evaluate(answers=answers)
    cache.write(evaluator.identity("point", "svd-1"), answers)
    assert cache.read(evaluator.identity("point", "svd-1")).by_document

    other_weights = tiny_llama(byte_tokenizer())
    with torch.no_grad():
        other_weights.model.lm_head.weight[0, 0] += 1.0
    other_weights = dataclasses.replace(other_weights)
    bfloat = dataclasses.replace(tiny_llama(byte_tokenizer()), dtype=torch.bfloat16)
    identities = [
        evaluator.identity("other", "svd-1"),
        evaluator.identity("point", "svd-2"),  # another calibration text or model gives other factors
        evaluator_of(other_weights, path).identity("point", "svd-1"),
        evaluator_of(bfloat, path).identity("point", "svd-1"),
        evaluator_of(loaded, path, max_length=48).identity("point", "svd-1"),
    ]
    assert [cache.read(identity).by_document for identity in identities] == [{}] * len(identities)


@pytest.mark.parametrize("damage", ["truncated", "bit flip", "text", "empty"])
def test_damaged_file_counts_as_missing_and_is_rewritten(tmp_path: Path, damage: str) -> None:
    cache, identity = EvaluationCache(tmp_path), {"model": "m"}
    kept = Answers({"a": [[(-1.25, True)], [-0.1]], "b": [["a text"]]})
    cache.write(identity, kept)
    (path,) = tmp_path.rglob("*.json.gz")
    content = path.read_bytes()
    path.write_bytes(
        {
            "truncated": content[:-9],
            "bit flip": content[:40] + bytes([content[40] ^ 1]) + content[41:],
            "text": b"no archive",
            "empty": b"",
        }[damage]
    )
    assert cache.read(identity).by_document == {}
    cache.write(identity, kept)
    assert cache.read(identity).by_document == kept.by_document


def test_answers_of_two_writers_are_merged(tmp_path: Path) -> None:
    identity = {"model": "m"}
    EvaluationCache(tmp_path).write(identity, Answers({"a": [[-1.0]]}))
    EvaluationCache(tmp_path).write(identity, Answers({"b": [[-2.0]]}))
    assert set(EvaluationCache(tmp_path).read(identity).by_document) == {"a", "b"}
    EvaluationCache(tmp_path).discard(identity)
    assert EvaluationCache(tmp_path).read(identity).by_document == {}
