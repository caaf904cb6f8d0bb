"""`SharedPrefixLM` against `HFLM` on whole lm-eval tasks of every form."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml
from evaluation_support import TaskWriter, byte_tokenizer, tiny_llama, watched_inputs, word_tokenizer
from lm_eval.api.registry import get_model
from lm_eval.evaluator import simple_evaluate
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks import TaskManager
from tiny_models import tiny_model
from tiny_study import environment
from transformers import PreTrainedTokenizerFast

from dse.errors import ModelError
from dse.evaluation import SharedPrefixLM
from dse.models import LoadedModel

CHAT = "{% for message in messages %}<{{ message['role'] }}> {{ message['content'] }} </s> {% endfor %}<assistant>"


@pytest.fixture(scope="module")
def manager() -> TaskManager:
    return TaskManager(include_defaults=False)


@pytest.fixture(params=[byte_tokenizer, word_tokenizer])
def loaded(request: pytest.FixtureRequest) -> LoadedModel:
    tokenizer: PreTrainedTokenizerFast = request.param()
    tokenizer.chat_template = CHAT
    return tiny_llama(tokenizer, context=160)


def run(lm: Any, path: Path, manager: TaskManager, **keywords: Any) -> dict[str, Any]:
    config = yaml.safe_load(path.read_text())
    config["dataset_kwargs"]["data_files"]["test"] = str(path.parent / config["dataset_kwargs"]["data_files"]["test"])
    found: dict[str, Any] = simple_evaluate(
        lm, tasks=[config], task_manager=manager, bootstrap_iters=0, log_samples=True, verbosity="ERROR", **keywords
    )
    return found


FORMS: dict[str, tuple[str, dict[str, Any]]] = {
    "multiple choice": ("choice", {}),
    "choices of one token": ("choice", {"doc_to_choice": ["red", "blue", "cat", "dog"]}),
    "cloze": ("cloze", {}),
    "contexts differ, continuation shared": (
        "choice",
        # lm-eval's form of WinoGrande: the choices are contexts, and the same target follows each.
        {
            "doc_to_text": "{{gold}}",
            "doc_to_target": "{{' ' + question}}",
            "doc_to_choice": "{{choices}}",
            "metric_list": [{"metric": "acc", "aggregation": "mean", "higher_is_better": True}],
        },
    ),
    "minimal pairs": ("choice", {"doc_to_text": "", "doc_to_choice": "{{[text, text + ' moon']}}", "doc_to_target": 0}),
    "whole texts": ("rolling", {}),
    "generation": ("generate", {}),
}


@pytest.mark.parametrize("form", FORMS)
def test_tasks_agree_with_hflm(loaded: LoadedModel, write_task: TaskWriter, manager: TaskManager, form: str) -> None:
    kind, overrides = FORMS[form]
    path = write_task(kind, name=f"form_{form.replace(' ', '_').replace(',', '')}", **overrides)
    assert_same(loaded, path, manager)


@pytest.mark.parametrize(
    "keywords", [{"num_fewshot": 2}, {"apply_chat_template": True}, {"num_fewshot": 2, "apply_chat_template": True}]
)
def test_prompts_agree_with_hflm(
    loaded: LoadedModel, write_task: TaskWriter, manager: TaskManager, keywords: dict[str, Any]
) -> None:
    path = write_task("choice", name="prompts", fewshot_split="test")
    assert_same(loaded, path, manager, fewshot_as_multiturn=bool(keywords.get("apply_chat_template")), **keywords)


def assert_same(loaded: LoadedModel, path: Path, manager: TaskManager, **keywords: Any) -> None:
    """Compare every metric, log-likelihood and generated text."""
    settings: dict[str, Any] = {"tokenizer": loaded.tokenizer, "max_length": 150, "softmax_dtype": "float32"}
    theirs = run(HFLM(loaded.model, batch_size=3, **settings), path, manager, **keywords)
    ours = run(SharedPrefixLM(loaded.model, **settings), path, manager, **keywords)
    (task,) = ours["results"]
    for metric, value in theirs["results"][task].items():
        if isinstance(value, float):
            assert math.isclose(ours["results"][task][metric], value, rel_tol=1e-4), metric
    for mine, sample in zip(ours["samples"][task], theirs["samples"][task], strict=True):
        for answer, truth in zip(flat(mine["resps"]), flat(sample["resps"]), strict=True):
            if isinstance(truth, float):
                assert abs(answer - truth) <= 1e-3
            else:
                assert answer == truth


def flat(answers: Any) -> list[Any]:
    return [leaf for entry in answers for leaf in flat(entry)] if isinstance(answers, list | tuple) else [answers]


def test_equal_contexts_of_several_tasks_are_computed_once(write_task: TaskWriter, manager: TaskManager) -> None:
    loaded = tiny_llama(word_tokenizer(), context=160)
    path = write_task("choice", name="once")
    lm = SharedPrefixLM(loaded.model, tokenizer=loaded.tokenizer)
    run(lm, path, manager)
    shapes: list[tuple[int, int]] = []
    config = yaml.safe_load(path.read_text())
    config["dataset_kwargs"]["data_files"]["test"] = str(path.parent / "once.jsonl")
    with watched_inputs(loaded, shapes):
        simple_evaluate(lm, tasks=[config], task_manager=manager, bootstrap_iters=0, verbosity="ERROR")
        alone = sum(rows * tokens for rows, tokens in shapes)
        shapes.clear()
        both = [config, {**config, "task": "once_more"}]
        simple_evaluate(lm, tasks=both, task_manager=manager, bootstrap_iters=0, verbosity="ERROR")
    assert sum(rows * tokens for rows, tokens in shapes) == alone


def test_model_type_is_registered_with_lm_eval() -> None:
    assert get_model("dse") is SharedPrefixLM
    assert get_model("shared-prefix") is SharedPrefixLM


def test_encoder_decoder_is_refused() -> None:
    with pytest.raises(ModelError, match="encoder-decoder"):
        SharedPrefixLM(tiny_model("t5"), tokenizer=byte_tokenizer())


def test_lm_eval_command_line_runs_the_model_type(write_task: TaskWriter, tmp_path: Path) -> None:
    loaded = tiny_llama(word_tokenizer(), context=160)
    loaded.model.save_pretrained(tmp_path / "model")
    loaded.tokenizer.save_pretrained(tmp_path / "model")
    path = write_task("choice", name="by_command")
    config = yaml.safe_load(path.read_text())
    config["dataset_kwargs"]["data_files"]["test"] = str(path.parent / "by_command.jsonl")
    path.write_text(yaml.safe_dump(config))
    command = [sys.executable, "-m", "dse.evaluation.lm_eval", "--model", "dse", "--device", "cpu"]
    command += ["--model_args", f"pretrained={tmp_path / 'model'},dtype=float32", "--tasks", str(path)]
    command += ["--output_path", str(tmp_path / "out")]
    done = subprocess.run(command, env=environment(tmp_path), capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    (written,) = (tmp_path / "out").rglob("results_*.json")
    assert "acc,none" in json.loads(written.read_text())["results"]["by_command"]
