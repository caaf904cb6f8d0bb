"""The evaluator against lm-eval itself, and against an independent computation."""

from __future__ import annotations

import contextlib
import io
import json
import math
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import lm_eval
import numpy as np
import pytest
import torch
import yaml
from evaluation_support import TaskWriter, byte_tokenizer, tiny_llama, watched_inputs, word_tokenizer
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks import TaskManager
from torch import nn

from dse.decomposition import LowRankLinear
from dse.errors import ConfigError, ModelError, NonFiniteError, OutOfMemoryError, TaskError
from dse.evaluation import Evaluator, TaskSpec
from dse.models import LoadedModel


def specs(*paths: Path, **keywords: Any) -> list[TaskSpec]:
    return [TaskSpec(str(path), **keywords) for path in paths]


def lines(path: Path) -> list[str]:
    return path.with_suffix(".jsonl").read_text().splitlines()


def by_lm_eval(
    loaded: LoadedModel, paths: Sequence[Path], documents: dict[str, list[int]], **keywords: Any
) -> dict[str, Any]:
    """The same tasks by `lm_eval.simple_evaluate`, with absolute data paths."""
    configs = [yaml.safe_load(path.read_text()) for path in paths]
    for config, path in zip(configs, paths, strict=True):
        config["dataset_kwargs"]["data_files"]["test"] = str(path.with_suffix(".jsonl"))
    with warnings.catch_warnings(), contextlib.redirect_stderr(io.StringIO()):
        warnings.simplefilter("ignore")
        return lm_eval.simple_evaluate(
            HFLM(pretrained=loaded.model, tokenizer=byte_tokenizer(), batch_size=4),
            tasks=configs,
            samples=documents,
            bootstrap_iters=0,
            task_manager=TaskManager(include_defaults=False),
            **keywords,
        )


@contextlib.contextmanager
def replaced(model: nn.Module, name: str, module: nn.Module) -> Iterator[None]:
    parent, _, attribute = name.rpartition(".")
    before = model.get_submodule(name)
    setattr(model.get_submodule(parent), attribute, module)
    try:
        yield
    finally:
        setattr(model.get_submodule(parent), attribute, before)


def test_metrics_agree_with_lm_eval(loaded: LoadedModel, write_task: TaskWriter) -> None:
    paths = [write_task(kind) for kind in ("choice", "cloze", "rolling", "generate")]
    evaluator = Evaluator(loaded, specs(*paths, limit=7), seed=3, batch_size=5)
    expected = by_lm_eval(loaded, paths, evaluator.documents)
    for result in evaluator.evaluate().tasks:
        theirs, documents = expected["results"][result.task], evaluator.documents[result.task]
        names = {key.removesuffix(",none") for key in theirs if key.endswith(",none") and "_stderr" not in key}
        assert set(result.all_metrics) == names
        for name in names:
            assert result.all_metrics[name][0] == pytest.approx(theirs[f"{name},none"], rel=1e-5), name
        samples = expected["samples"][result.task]
        assert result.documents == len(documents) == 7
        assert [sample["doc_id"] for sample in samples] == documents
        if result.kind == "accuracy":
            assert result.outcomes.tolist() == [sample[result.metric] for sample in samples]


def test_few_shot_prompts_agree_with_lm_eval_at_every_call(loaded: LoadedModel, write_task: TaskWriter) -> None:
    path = write_task("choice", fewshot_split="test", num_fewshot=2)
    evaluator = Evaluator(loaded, specs(path, limit=5), seed=11)
    expected = by_lm_eval(loaded, [path], evaluator.documents, fewshot_random_seed=11)
    first, second = evaluator.evaluate().tasks[0], evaluator.evaluate().tasks[0]
    assert first.outcomes.tolist() == [sample["acc"] for sample in expected["samples"]["local_choice"]]
    assert second.outcomes.tolist() == first.outcomes.tolist()


def log_likelihood(model: nn.Module, tokenizer: Any, context: str, continuation: str) -> float:
    """Token by token, with one forward pass each and without padding or batches."""
    context_ids = tokenizer(context)["input_ids"] if context else [tokenizer.eos_token_id]
    whole = (
        (tokenizer(context + continuation)["input_ids"])
        if context
        else context_ids + tokenizer(continuation)["input_ids"]
    )
    total = 0.0
    for end in range(len(context_ids), len(whole)):
        logits = model(torch.tensor([whole[:end]])).logits[0, -1].double()
        total += float(logits[whole[end]] - torch.logsumexp(logits, 0))
    return total


@pytest.mark.parametrize("make_tokenizer", [byte_tokenizer, word_tokenizer])
def test_log_likelihoods_agree_with_a_token_by_token_computation(write_task: TaskWriter, make_tokenizer: Any) -> None:
    tokenizer = make_tokenizer()
    loaded = tiny_llama(tokenizer, context=256)
    cloze, rolling = write_task("cloze", rows=4), write_task("rolling", rows=4)
    tasks = [TaskSpec(str(cloze), metric="perplexity"), TaskSpec(str(rolling))]
    scored, texts = Evaluator(loaded, tasks, batch_size=3).evaluate().tasks
    for outcome, line in zip(scored.outcomes, lines(cloze), strict=True):
        document = json.loads(line)
        expected = log_likelihood(loaded.model, tokenizer, document["question"], " " + document["choices"][0])
        assert outcome == pytest.approx([expected, 1.0], abs=1e-4)
    for outcome, line in zip(texts.outcomes, lines(rolling), strict=True):
        text = json.loads(line)["text"]
        expected = log_likelihood(loaded.model, tokenizer, "", text)
        assert outcome == pytest.approx([expected, len(text.split(" "))], abs=1e-4)


def test_perplexity_and_its_standard_error_follow_from_the_outcomes(
    loaded: LoadedModel, write_task: TaskWriter
) -> None:
    (result,) = Evaluator(loaded, specs(write_task("rolling"))).evaluate().tasks
    score, words = result.outcomes.T
    assert result.value == pytest.approx(math.exp(-score.sum() / words.sum()))
    draws = np.random.default_rng(0).integers(0, 12, (4000, 12))
    bootstrap = (
        score[draws].sum(1) / words[draws].sum(1)
    ).std()  # of the logarithm, since the tiny model's spread is huge
    assert result.stderr / result.value == pytest.approx(bootstrap, rel=0.1)


def test_standard_error_of_an_accuracy_is_that_of_a_mean(loaded: LoadedModel, write_task: TaskWriter) -> None:
    (result,) = Evaluator(loaded, specs(write_task("choice"))).evaluate().tasks
    assert 0 < result.value < 1
    assert result.stderr == pytest.approx(result.outcomes.std(ddof=1) / math.sqrt(12))


def test_replacing_and_restoring_a_module_takes_effect(loaded: LoadedModel, write_task: TaskWriter) -> None:
    tasks = specs(write_task("rolling"), write_task("choice"))
    evaluator = Evaluator(loaded, tasks)
    dense = evaluator.evaluate()
    weight = loaded.model.get_submodule("model.layers.0.mlp.down_proj").weight
    left, values, right = torch.linalg.svd(weight, full_matrices=False)
    low_rank = LowRankLinear(left[:, :2] * values[:2], right[:2])
    with replaced(loaded.model, "model.layers.0.mlp.down_proj", low_rank):
        decomposed, fresh = evaluator.evaluate(), Evaluator(loaded, tasks).evaluate()
    restored = evaluator.evaluate()
    assert decomposed.perplexity == fresh.perplexity
    assert decomposed.perplexity != pytest.approx(dense.perplexity, rel=1e-3)
    for before, after in zip(dense.tasks, restored.tasks, strict=True):
        np.testing.assert_array_equal(before.outcomes, after.outcomes)


def test_documents_depend_only_on_seed_and_task(loaded: LoadedModel, write_task: TaskWriter) -> None:
    choice, cloze = write_task("choice", rows=40), write_task("cloze", rows=40)
    drawn = Evaluator(loaded, specs(choice, cloze), limit=10, seed=1).documents
    assert drawn == Evaluator(loaded, specs(cloze, choice), limit=10, seed=1).documents
    assert drawn["local_choice"] == sorted(set(drawn["local_choice"]))
    assert drawn["local_choice"] != drawn["local_cloze"]
    assert drawn["local_choice"] != Evaluator(loaded, specs(choice), limit=10, seed=2).documents["local_choice"]
    more = Evaluator(loaded, specs(choice, limit=20), limit=10, seed=1).documents["local_choice"]
    assert len(more) == 20
    assert set(drawn["local_choice"]) < set(more)
    assert Evaluator(loaded, specs(choice), limit=1000).documents["local_choice"] == list(range(40))


def test_fingerprint_changes_with_everything_that_scores_depend_on(loaded: LoadedModel, write_task: TaskWriter) -> None:
    path = write_task("choice")

    def fingerprint(*, spec: TaskSpec | None = None, **keywords: Any) -> str:
        return Evaluator(loaded, [spec or TaskSpec(str(path))], **keywords).fingerprint

    base = fingerprint()
    assert fingerprint(batch_size=2) == base
    others = [
        fingerprint(limit=5),
        fingerprint(limit=5, seed=4),
        fingerprint(max_length=32),
        fingerprint(spec=TaskSpec(str(path), metric="acc_norm")),
        fingerprint(spec=TaskSpec(str(path), num_fewshot=1)),
    ]
    data = path.parent / "local_choice.jsonl"
    moved = path.parent / "elsewhere"
    moved.mkdir()
    for file in (path, data):
        (moved / file.name).write_bytes(file.read_bytes())
    assert fingerprint(spec=TaskSpec(str(moved / path.name))) == base
    rows = [json.loads(line) for line in lines(path)]
    rows[0]["gold"] = (rows[0]["gold"] + 1) % 4
    (moved / data.name).write_text("".join(json.dumps(row) + "\n" for row in rows))
    others.append(fingerprint(spec=TaskSpec(str(moved / path.name))))
    write_task("choice", doc_to_text="{{question}}")
    others.append(fingerprint())
    assert len({base, *others}) == 1 + len(others)


def test_small_batches_give_the_same_scores(loaded: LoadedModel, write_task: TaskWriter) -> None:
    tasks = specs(write_task("choice"), write_task("rolling"))
    expected = Evaluator(loaded, tasks).evaluate()
    evaluator = Evaluator(loaded, tasks, batch_size=1)
    evaluator.evaluate()
    shapes: list[tuple[int, int]] = []
    with watched_inputs(loaded, shapes):
        found = evaluator.evaluate()
    assert all(rows * tokens <= 128 for rows, tokens in shapes)
    assert any(rows > 1 for rows, _ in shapes)
    for before, after in zip(expected.tasks, found.tasks, strict=True):
        np.testing.assert_allclose(before.outcomes, after.outcomes, atol=1e-4)


def test_single_token_choices_share_their_prompt(write_task: TaskWriter) -> None:
    loaded = tiny_llama(word_tokenizer())
    path = write_task("choice", rows=6, doc_to_choice=["red", "blue", "cat", "dog"])
    evaluator = Evaluator(loaded, specs(path))
    evaluator.evaluate()
    shapes: list[tuple[int, int]] = []
    with watched_inputs(loaded, shapes):
        evaluator.evaluate()
    # Prompts have 5 to 8 tokens (Q : ... A :); only the first two are common to all.
    assert sum(rows * tokens for rows, tokens in shapes) <= 6 * 10


def test_evaluator_changes_neither_weight_tying_nor_the_tokenizer(write_task: TaskWriter) -> None:
    loaded = tiny_llama(byte_tokenizer(), tied=True)
    # A checkpoint may store head and embedding separately although its config ties them; transformers then unties them.
    loaded.model.lm_head.weight = nn.Parameter(torch.randn_like(loaded.model.lm_head.weight), requires_grad=False)
    before = loaded.model.lm_head.weight.clone()
    Evaluator(loaded, specs(write_task("choice"))).evaluate()
    assert torch.equal(loaded.model.lm_head.weight, before)
    assert loaded.tokenizer.pad_token is None
    assert "tie_weights" not in vars(loaded.model)


@pytest.mark.parametrize("kind", ["choice", "cloze", "rolling", "generate"])
def test_nan_score_is_reported_with_task_and_document(loaded: LoadedModel, write_task: TaskWriter, kind: str) -> None:
    evaluator = Evaluator(loaded, specs(write_task(kind)))
    evaluator.evaluate()
    loaded.model.lm_head.weight[3, 0] = math.nan
    with pytest.raises(NonFiniteError, match=rf"document \d+ of task 'local_{kind}' got nan"):
        evaluator.evaluate()


class _SmallDevice(nn.Module):
    """A head on a device that has room for the logits of `most_states` positions."""

    def __init__(self, head: nn.Module, most_states: int, error: type[Exception], message: str) -> None:
        super().__init__()
        self.head, self.most_states, self.error, self.message = head, most_states, error, message

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        if hidden[..., 0].numel() > self.most_states:
            raise self.error(self.message)
        return self.head(hidden)


@contextlib.contextmanager
def limited_tokens(model: nn.Module, most_tokens: int) -> Iterator[list[int]]:
    """A device with room for `most_tokens` tokens in a forward pass, a key-value cache included; notes each pass."""
    seen: list[int] = []

    def check(_module: nn.Module, _arguments: object, keywords: dict[str, Any]) -> None:
        rows, tokens = keywords["input_ids"].shape
        cache = keywords.get("past_key_values")
        seen.append(rows * (tokens + (0 if cache is None else cache.get_seq_length())))
        if seen[-1] > most_tokens:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB.")

    handle = model.model.register_forward_pre_hook(check, with_kwargs=True)  # type: ignore[operator]
    try:
        yield seen
    finally:
        handle.remove()


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (torch.OutOfMemoryError, "CUDA out of memory. Tried to allocate 2.00 GiB."),
        (RuntimeError, "[enforce fail at alloc_cpu.cpp:121] . DefaultCPUAllocator: can't allocate memory"),
        (RuntimeError, "CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
        (MemoryError, "Unable to allocate 4.00 GiB for an array with shape (4, 268435456)"),
    ],
)
def test_a_device_without_room_for_one_batch_is_reported(
    loaded: LoadedModel, write_task: TaskWriter, error: type[Exception], message: str
) -> None:
    evaluator = Evaluator(loaded, specs(write_task("choice")), batch_size=16)
    expected = evaluator.evaluate()
    with replaced(loaded.model, "lm_head", _SmallDevice(loaded.model.lm_head, 300, error, message)):
        assert evaluator.evaluate().accuracy == expected.accuracy
    with (
        replaced(loaded.model, "lm_head", _SmallDevice(loaded.model.lm_head, 0, error, message)),
        pytest.raises(OutOfMemoryError, match="an evaluation batch of 16 tokens, but"),
    ):
        evaluator.evaluate()


@pytest.mark.parametrize("batch_size", ["auto", 16])
@pytest.mark.parametrize("kind", ["choice", "cloze", "rolling", "generate"])
def test_out_of_memory_halves_the_batch_and_goes_on(
    loaded: LoadedModel,
    write_task: TaskWriter,
    caplog: pytest.LogCaptureFixture,
    kind: str,
    batch_size: int | str,
) -> None:
    evaluator = Evaluator(loaded, specs(write_task(kind)), batch_size=batch_size)
    expected = evaluator.evaluate()
    assert expected.batch_tokens == 16 * 128
    done: list[int] = []
    with limited_tokens(loaded.model, 140) as seen:
        found = evaluator.evaluate(lambda finished, _: done.append(finished))
        refused = sum(tokens > 140 for tokens in seen)
        again = evaluator.evaluate()
        assert sum(tokens > 140 for tokens in seen) == refused  # the reduced batch stays
    (before,), (after,) = expected.tasks, found.tasks
    np.testing.assert_allclose(after.outcomes, before.outcomes, rtol=1e-5)
    np.testing.assert_allclose(again.tasks[0].outcomes, before.outcomes, rtol=1e-5)
    assert after.value == pytest.approx(before.value, rel=1e-6)
    assert refused >= 1
    assert found.batch_tokens == again.batch_tokens == 16 * 128 // 2**refused
    assert done == list(range(1, len(done) + 1))  # every request is finished once
    assert caplog.text.count("batches have at most") == refused


def test_other_model_errors_are_not_reported_as_out_of_memory(loaded: LoadedModel, write_task: TaskWriter) -> None:
    evaluator = Evaluator(loaded, specs(write_task("choice")))
    broken = _SmallDevice(loaded.model.lm_head, 0, RuntimeError, "mat1 and mat2 shapes cannot be multiplied")
    with replaced(loaded.model, "lm_head", broken), pytest.raises(RuntimeError, match="cannot be multiplied"):
        evaluator.evaluate()


def test_progress_reaches_the_total_and_nothing_is_printed(
    loaded: LoadedModel, write_task: TaskWriter, capfd: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    tasks = specs(*(write_task(kind) for kind in ("choice", "cloze", "rolling", "generate")))
    evaluator = Evaluator(loaded, tasks, batch_size=4)
    seen: list[tuple[int, int]] = []
    evaluator.evaluate(lambda done, total: seen.append((done, total)))
    assert {total for _, total in seen} == {12 * 4 + 12 + 12 + 12}
    done = [done for done, _ in seen]
    assert done == sorted(done)
    assert done[-1] == seen[-1][1]
    assert len(done) > 10
    assert capfd.readouterr() == ("", "")
    assert caplog.records == []


def test_truncated_requests_are_logged(
    loaded: LoadedModel, write_task: TaskWriter, caplog: pytest.LogCaptureFixture
) -> None:
    Evaluator(loaded, specs(write_task("choice")), max_length=24)
    assert [record.levelname for record in caplog.records] == ["WARNING"]
    assert "requests are longer than the context" in caplog.text


def test_chat_template_wraps_every_prompt(loaded: LoadedModel, write_task: TaskWriter) -> None:
    path = write_task("choice", rows=8)
    with pytest.raises(ModelError, match="has none; set it to false"):
        Evaluator(loaded, specs(path), apply_chat_template=True)
    template = "{% for m in messages %}<{{ m['role'] }}>{{ m['content'] }}{% endfor %}<assistant>"
    loaded.tokenizer.chat_template = template
    (result,) = Evaluator(loaded, specs(path), apply_chat_template=True).evaluate().tasks
    scores = []
    for line in lines(path):
        document = json.loads(line)
        prompt = f"<user>Q: {document['question']}\nA:<assistant>"
        answers = [log_likelihood(loaded.model, loaded.tokenizer, prompt, choice) for choice in document["choices"]]
        scores.append(float(np.argmax(answers) == document["gold"]))
    assert result.outcomes.tolist() == scores


@pytest.mark.parametrize(
    ("changes", "metric", "message"),
    [
        ({}, "f1", "metric of task 'local_choice' must be one of acc, acc_norm, but got 'f1'"),
        ({"metric_list": [{"metric": "acuracy"}]}, None, "has 'acuracy'"),
        ({"metric_list": [{"metric": "acc", "hf_evaluate": True}]}, None, "one of lm-eval's own"),
        ({"metric_list": [{"metric": "acc", "aggregation": "meen"}]}, None, "aggregation must be one"),
        ({"metric_list": []}, None, "must have a metric"),
        ({"doc_to_text": "{{nothing}}"}, None, "UndefinedError: 'nothing' is undefined"),
        ({"doc_to_text": "{{ ''.__class__.__mro__ }}"}, None, "SecurityError"),
        ({"doc_to_text": "{{ question"}, None, "TemplateSyntaxError"),
        ({"doc_to_choice": "{{choices + ['']}}", "target_delimiter": ""}, None, "IndexError"),
        ({"doc_to_choice": None}, None, "must be able to load and score"),
        ({"output_type": "guess"}, None, "invalid output_type 'guess'"),
        ({"test_split": "nowhere"}, None, "nowhere"),
        ({"test_split": None}, None, "must be able to load and score"),
        ({"doc_to_txt": "x"}, None, "did you mean 'doc_to_text'"),
        ({"unsafe_code": True}, None, "must not run code"),
        ({"num_fewshot": 500, "fewshot_split": "test"}, None, "larger than population"),
    ],
)
def test_invalid_task_is_refused_in_one_line(
    loaded: LoadedModel, write_task: TaskWriter, changes: dict[str, Any], metric: str | None, message: str
) -> None:
    path = write_task("choice", **changes)
    with pytest.raises(TaskError, match=message.replace("(", r"\(")) as error:
        Evaluator(loaded, [TaskSpec(str(path), metric=metric)])
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    "content", ["", '{"question": "a"', '{"question": "a", "choices": ["x"], "gold": 0}\n' * 2 + "[]\n"]
)
def test_invalid_data_is_refused_in_one_line(loaded: LoadedModel, write_task: TaskWriter, content: str) -> None:
    path = write_task("choice")
    (path.parent / "local_choice.jsonl").write_text(content)
    with pytest.raises(TaskError) as error:
        Evaluator(loaded, specs(path))
    assert "\n" not in str(error.value)


def test_document_that_cannot_be_scored_is_found_at_construction(loaded: LoadedModel, write_task: TaskWriter) -> None:
    path = write_task("choice", doc_to_choice="{{ choices if gold != 3 else choices[5] }}")
    with pytest.raises(TaskError, match="must be able to load and score"):
        Evaluator(loaded, specs(path))
    path = write_task("cloze", doc_to_target="{{ ' x' if gold != 1 else '' }}", rows=20)
    with pytest.raises(TaskError, match=r"document (3|7|11|15|19) of task 'local_cloze' has none"):
        Evaluator(loaded, specs(path, limit=18))


@pytest.mark.parametrize("keywords", [{"limit": 0}, {"batch_size": 0}, {"batch_size": "many"}, {"max_length": -1}])
def test_invalid_settings_are_refused(loaded: LoadedModel, write_task: TaskWriter, keywords: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match=rf"`{next(iter(keywords))} >= 1`"):
        Evaluator(loaded, specs(write_task("choice")), **keywords)


def test_no_task_or_a_duplicate_task_is_refused(loaded: LoadedModel, write_task: TaskWriter) -> None:
    with pytest.raises(TaskError, match="at least one task"):
        Evaluator(loaded, [])
    path = write_task("choice")
    with pytest.raises(TaskError, match="'local_choice' appears twice"):
        Evaluator(loaded, specs(path, path))


def test_tokenizer_without_an_end_of_text_token_is_refused(write_task: TaskWriter) -> None:
    loaded = tiny_llama(byte_tokenizer())
    loaded.tokenizer.eos_token = None
    with pytest.raises(ModelError, match="beginning- or end-of-text"):
        Evaluator(loaded, specs(write_task("choice")))
