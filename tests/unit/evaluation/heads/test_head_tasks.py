"""Dataset tasks against plain loops over transformers' own outputs, one unpadded document at a time."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats
from tiny_models import ENCODER_FAMILIES, ENCODER_WORDS, loaded_encoder
from torch.nn.functional import cosine_similarity

from dse.config import DatasetTaskConfig
from dse.errors import ConfigError, ModelError, NonFiniteError, TaskError
from dse.evaluation import HeadEvaluator
from dse.evaluation.answers import Answers
from dse.evaluation.heads.question_answering import LONGEST_ANSWER_TOKENS, best_span, exact_match, token_f1
from dse.models import LoadedModel


def write(folder: Path, rows: Sequence[Mapping[str, Any]], name: str = "rows.jsonl") -> str:
    path = folder / name
    frame = pd.DataFrame(list(rows))
    if path.suffix == ".parquet":
        frame.to_parquet(path)
    elif path.suffix in (".csv", ".tsv"):
        frame.to_csv(path, index=False, sep="\t" if path.suffix == ".tsv" else ",")
    else:
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def words(seed: int, length: int) -> str:
    return " ".join(ENCODER_WORDS[(seed * 5 + i * (seed % 3 + 1)) % len(ENCODER_WORDS)] for i in range(length))


def labelled(count: int = 20) -> list[dict[str, Any]]:
    return [{"sentence": words(i, 2 + i % 7), "other": words(i + 3, 3), "label": i % 3} for i in range(count)]


def task(dataset: str, head: str, **keywords: Any) -> DatasetTaskConfig:
    return DatasetTaskConfig(dataset=dataset, head=head, **keywords)  # type: ignore[arg-type]


@torch.inference_mode()
def outputs(loaded: LoadedModel, *texts: str, **keywords: Any) -> Any:
    inputs = loaded.tokenizer(*texts, return_tensors="pt", **keywords)
    names = ("input_ids", "attention_mask") if loaded.ref == "distilbert" else tuple(inputs)
    return loaded.model(**{name: inputs[name] for name in names if name != "offset_mapping"})


@pytest.mark.parametrize("family", ENCODER_FAMILIES)
@pytest.mark.parametrize("columns", [{"text": "sentence"}, {"text": "sentence", "text_pair": "other"}])
def test_classification_agrees_with_a_plain_loop(tmp_path: Path, family: str, columns: dict[str, str]) -> None:
    loaded = loaded_encoder(family, "classification")
    rows = labelled()
    evaluator = HeadEvaluator(loaded, [task(write(tmp_path, rows), "classification", columns=columns)], batch_size=1)
    done: list[tuple[int, int]] = []
    result = evaluator.evaluate(lambda *counts: done.append(counts)).tasks[0]
    right = [
        int(outputs(loaded, *(row[column] for column in columns.values())).logits.argmax()) == row["label"]
        for row in rows
    ]
    np.testing.assert_array_equal(result.outcomes, right)
    assert (result.task, result.metric, result.kind) == ("rows", "accuracy", "accuracy")
    assert result.value == pytest.approx(np.mean(right))
    assert result.stderr == pytest.approx(stats.sem(right))
    assert done[-1] == (20, 20)
    logits = [outputs(loaded, *(row[column] for column in columns.values())).logits[0].double() for row in rows]
    log_p = [float(scores.log_softmax(0)[row["label"]]) for scores, row in zip(logits, rows, strict=True)]
    np.testing.assert_allclose(result.graded["target_log_likelihood"], log_p, atol=1e-4)
    np.testing.assert_allclose(result.graded["choice_probability"], np.exp(log_p), atol=1e-4)
    assert evaluator.graded == {"rows": ("choice_probability", "target_log_likelihood")}


@pytest.mark.parametrize("name", ["rows.csv", "rows.tsv", "rows.parquet", "rows.json"])
def test_all_local_file_formats_give_the_same_outcomes(tmp_path: Path, name: str) -> None:
    loaded = loaded_encoder("bert", "classification")
    found = [
        HeadEvaluator(loaded, [task(write(tmp_path, labelled(), file), "classification", columns={"text": "sentence"})])
        for file in ("rows.jsonl", name)
    ]
    results = [evaluator.evaluate().tasks[0].outcomes for evaluator in found]
    np.testing.assert_array_equal(*results)
    assert found[0].fingerprint == found[1].fingerprint


def test_labels_map_by_name_by_number_and_by_the_users_mapping(tmp_path: Path) -> None:
    loaded = loaded_encoder("bert", "classification")
    rows = labelled()
    by_number = HeadEvaluator(loaded, [task(write(tmp_path, rows), "classification", columns={"text": "sentence"})])
    expected = by_number.evaluate().tasks[0].outcomes
    names = ["contradiction", "neutral", "entailment"]
    loaded.model.config.id2label = dict(enumerate(name.upper() for name in names))
    named = write(tmp_path, [{**row, "label": names[row["label"]]} for row in rows], "named.jsonl")
    in_short = write(tmp_path, [{**row, "label": names[row["label"]][:3]} for row in rows], "short.jsonl")
    mapping = {name[:3]: name for name in names}
    for entry in (
        task(named, "classification", columns={"text": "sentence"}),
        task(in_short, "classification", columns={"text": "sentence"}, labels=mapping),
        task(in_short, "classification", columns={"text": "sentence"}, labels={"con": 0, "neu": 1, "ent": 2}),
    ):
        np.testing.assert_array_equal(HeadEvaluator(loaded, [entry]).evaluate().tasks[0].outcomes, expected)
    with pytest.raises(TaskError, match=r"must be one of the model's .*but 'short' has 'con'; map it"):
        HeadEvaluator(loaded, [task(in_short, "classification", columns={"text": "sentence"})])
    with pytest.raises(TaskError, match="`labels` must name labels of the dataset, but 'named' has no 'neutrall'"):
        HeadEvaluator(loaded, [task(named, "classification", columns={"text": "sentence"}, labels={"neutrall": 1})])
    unlabelled = write(tmp_path, [{**row, "label": -1} for row in rows], "unlabelled.jsonl")
    with pytest.raises(TaskError, match="another split if this one has no labels"):
        HeadEvaluator(loaded, [task(unlabelled, "classification", columns={"text": "sentence"})])


def questions() -> list[dict[str, Any]]:
    contexts = ["the old cat sees a new dog in town.", words(2, 25), words(7, 140), "the sun, not the moon"]
    return [
        {
            "question": f"who {words(i, 2)}?",
            "context": contexts[i % 4],
            "answers": {"text": [" ".join(contexts[i % 4].split()[i % 3 : i % 3 + 2])], "answer_start": [0]},
        }
        for i in range(12)
    ]


def best_answer(loaded: LoadedModel, row: Mapping[str, Any], max_length: int, stride: int) -> tuple[float, str, float]:
    """Best answer over hand-made windows and all spans: (score, text, score of no answer)."""
    tokenizer = loaded.tokenizer
    question = tokenizer(row["question"], add_special_tokens=False)["input_ids"]
    encoded = tokenizer(row["context"], add_special_tokens=False, return_offsets_mapping=True)
    tokens, spans = encoded["input_ids"], encoded["offset_mapping"]
    frame = [tokenizer.cls_token_id, *question, *[tokenizer.sep_token_id] * (3 if loaded.ref == "roberta" else 2)]
    prefix, suffix = frame[: len(frame) - 1], frame[-1:]
    room = max_length - len(frame)
    best, refusal = (-math.inf, ""), math.inf
    for begin in range(0, len(tokens), room - stride):
        part = tokens[begin : begin + room]
        ids = torch.tensor([[*prefix, *part, *suffix]])
        keywords = {}
        if loaded.ref == "bert":
            keywords["token_type_ids"] = torch.tensor([[0] * (len(question) + 2) + [1] * (len(part) + 1)])
        with torch.inference_mode():
            output = loaded.model(input_ids=ids, **keywords)
        start, end = output.start_logits[0].tolist(), output.end_logits[0].tolist()
        refusal = min(refusal, start[0] + end[0])
        for i in range(len(part)):
            for j in range(i, min(i + LONGEST_ANSWER_TOKENS, len(part))):
                score = start[len(prefix) + i] + end[len(prefix) + j]
                if score > best[0] + 1e-6:
                    best = score, row["context"][spans[begin + i][0] : spans[begin + j][1]].strip()
        if begin + room >= len(tokens):
            break
    return *best, refusal


@pytest.mark.parametrize("family", ENCODER_FAMILIES)
def test_question_answering_agrees_with_a_plain_loop(tmp_path: Path, family: str) -> None:
    loaded = loaded_encoder(family, "question_answering", context=400)
    rows = questions()
    length, stride = (200, 20) if family == "roberta" else (40, 6)
    entry = task(write(tmp_path, rows), "question_answering", max_length=length, stride=stride, metric="exact_match")
    result = HeadEvaluator(loaded, [entry], batch_size=2).evaluate().tasks[0]
    found = [best_answer(loaded, row, length, stride)[1] for row in rows]
    np.testing.assert_array_equal(
        result.outcomes, [exact_match(a, r["answers"]["text"]) for a, r in zip(found, rows, strict=True)]
    )
    f1 = np.mean([token_f1(a, r["answers"]["text"]) for a, r in zip(found, rows, strict=True)])
    assert result.all_metrics["f1"][0] == pytest.approx(f1)
    assert 0 < f1 < 1


def test_questions_without_an_answer(tmp_path: Path) -> None:
    loaded = loaded_encoder("bert", "question_answering", context=400)
    # A one-word context has a single span, which the first token can beat; a longer context has a better span.
    rows = [{**row, "context": ENCODER_WORDS[i]} if i % 3 else row for i, row in enumerate(questions())]
    rows = [{**row, "answers": {"text": [], "answer_start": []}} if i % 2 else row for i, row in enumerate(rows)]
    answers = [best_answer(loaded, row, 384, 128) for row in rows]
    assert {refusal > score for score, _, refusal in answers} == {True, False}
    expected = [
        token_f1("" if refusal > score else text, row["answers"]["text"])
        for (score, text, refusal), row in zip(answers, rows, strict=True)
    ]
    result = HeadEvaluator(loaded, [task(write(tmp_path, rows), "question_answering")]).evaluate().tasks[0]
    np.testing.assert_allclose(result.outcomes, expected)


def test_all_formats_of_accepted_answers_are_read(tmp_path: Path) -> None:
    loaded = loaded_encoder("bert", "question_answering", context=400)
    found = []
    for index, wrap in enumerate((lambda a: a, lambda a: [a], lambda a: {"text": [a]}, lambda a: [{"text": a}])):
        rows = [{**row, "answers": wrap(row["answers"]["text"][0])} for row in questions()]
        data = write(tmp_path, rows, f"rows{index}.jsonl")
        found.append(HeadEvaluator(loaded, [task(data, "question_answering")]).evaluate().tasks[0].outcomes)
    for outcomes in found[1:]:
        np.testing.assert_array_equal(outcomes, found[0])


@pytest.mark.parametrize(
    ("answer", "accepted", "match", "f1"),
    [
        ("The Cat!", ["a cat"], 1.0, 1.0),
        ("the old cat", ["cat"], 0.0, 2 / 3),
        ("old old cat", ["old cat cat"], 0.0, 2 / 3),
        ("dog", ["cat", "the dog."], 1.0, 1.0),
        ("", [], 1.0, 1.0),
        ("dog", [], 0.0, 0.0),
        ("the", ["cat"], 0.0, 0.0),
    ],
)
def test_squad_scores(answer: str, accepted: list[str], match: float, f1: float) -> None:
    assert exact_match(answer, accepted) == match
    assert token_f1(answer, accepted) == pytest.approx(f1)


@given(st.lists(st.tuples(st.floats(-5, 5), st.floats(-5, 5), st.booleans()), min_size=2, max_size=50))
def test_best_span_is_the_maximum_over_all_spans(tokens: list[tuple[float, float, bool]]) -> None:
    start, end, flags = (torch.tensor(column) for column in zip(*tokens, strict=True))
    flags[0] = True
    score, first, last = best_span(start, end, flags)
    spans = [
        (i, j)
        for i in range(len(start))
        for j in range(i, min(len(start), i + LONGEST_ANSWER_TOKENS))
        if flags[i] and flags[j]
    ]
    assert (first, last) in spans
    assert score == max(float(start[i] + end[j]) for i, j in spans)


def pairs(count: int = 15) -> list[dict[str, Any]]:
    return [
        {"sentence1": words(i, 1 + i % 6), "sentence2": words(i * 7 + 1, 5), "score": (i * 7) % 11}
        for i in range(count)
    ]


POOLED = {
    "mean": lambda hidden: hidden.mean(dim=0),
    "cls": lambda hidden: hidden[0],
    "max": lambda hidden: hidden.max(dim=0).values,
    "last_token": lambda hidden: hidden[-1],
}


@pytest.mark.parametrize("family", ENCODER_FAMILIES)
@pytest.mark.parametrize("pooling", POOLED)
def test_embeddings_agree_with_a_plain_loop(tmp_path: Path, family: str, pooling: str) -> None:
    loaded = loaded_encoder(family, "embedding")
    rows = pairs()
    entry = task(write(tmp_path, rows), "embedding", pooling=pooling, metric="spearman")
    evaluator = HeadEvaluator(loaded, [entry], batch_size=1)

    def embedded() -> torch.Tensor:
        return torch.stack(
            [
                torch.stack(
                    [POOLED[pooling](outputs(loaded, row[c]).last_hidden_state[0]) for c in ("sentence1", "sentence2")]
                )
                for row in rows
            ]
        )

    dense = embedded()
    result = evaluator.evaluate().tasks[0]
    scores = [row["score"] for row in rows]
    assert result.value == pytest.approx(
        stats.spearmanr(cosine_similarity(dense[:, 0], dense[:, 1]), scores).statistic, abs=1e-6
    )
    assert result.all_metrics["fidelity_spearman"][0] == pytest.approx(1.0)
    assert result.all_metrics["fidelity_cosine"][0] == pytest.approx(1.0, abs=1e-6)
    layer = (
        loaded.model.transformer.layer[1].ffn.lin2
        if family == "distilbert"
        else loaded.model.encoder.layer[1].output.dense
    )
    layer.weight.mul_(-1.0)
    now, result = embedded(), evaluator.evaluate().tasks[0]
    cosines = [cosine_similarity(vectors[:, 0], vectors[:, 1]) for vectors in (now, dense)]
    assert result.all_metrics["fidelity_spearman"][0] == pytest.approx(stats.spearmanr(*cosines).statistic, abs=1e-6)
    assert result.all_metrics["fidelity_cosine"][0] == pytest.approx(
        float(cosine_similarity(now, dense, dim=2).mean()), abs=1e-5
    )
    assert result.value == pytest.approx(stats.spearmanr(cosines[0], scores).statistic, abs=1e-6)


def test_pooling_follows_the_files_of_the_checkpoint(tmp_path: Path) -> None:
    data = write(tmp_path, pairs())

    def fingerprint(files: dict[str, Any], **keywords: Any) -> str:
        loaded = loaded_encoder("bert", "embedding")
        loaded.sentence_files = {name: json.dumps(content) for name, content in files.items()}
        return HeadEvaluator(loaded, [task(data, "embedding", **keywords)]).fingerprint

    modes = {f"pooling_mode_{mode}": False for mode in ("mean_tokens", "cls_token", "max_tokens", "lasttoken")}
    saved = "1_Pooling/config.json"
    assert fingerprint({}) == fingerprint({}, pooling="mean")
    for key, name in (
        ("mean_tokens", "mean"),
        ("cls_token", "cls"),
        ("max_tokens", "max"),
        ("lasttoken", "last_token"),
    ):
        assert fingerprint({saved: {**modes, f"pooling_mode_{key}": True}}) == fingerprint({}, pooling=name)
    assert fingerprint({saved: {"pooling_mode": "cls"}}) == fingerprint({}, pooling="cls")
    short = {"max_seq_length": 4}
    assert fingerprint({"sentence_bert_config.json": short}) != fingerprint({})
    with pytest.raises(ModelError, match=r"must be one of mean, .*has mean, cls; set one in the task"):
        fingerprint({saved: {**modes, "pooling_mode_mean_tokens": True, "pooling_mode_cls_token": True}})
    with pytest.raises(ModelError, match="adds a layer of type Dense"):
        fingerprint({"modules.json": [{"type": "sentence_transformers.models.Dense"}]})


def test_documents_are_drawn_by_seed_and_shares_are_nested(tmp_path: Path) -> None:
    loaded = loaded_encoder("bert", "classification")
    entry = task(write(tmp_path, labelled(30)), "classification", columns={"text": "sentence"})

    def drawn(limit: int | None, seed: int) -> set[int]:
        return set(HeadEvaluator(loaded, [entry], limit=limit, seed=seed).documents["rows"])

    assert drawn(None, 0) == set(range(30))
    assert drawn(5, 0) < drawn(12, 0)
    assert drawn(5, 0) != drawn(5, 1)
    evaluator = HeadEvaluator(loaded, [entry], limit=12)
    whole = evaluator.evaluate().tasks[0].outcomes
    answers = Answers()
    part = evaluator.evaluate(share=0.4, answers=answers).tasks[0].outcomes
    assert (answers.scored, answers.reused) == (5, 0)
    np.testing.assert_array_equal(part, whole[evaluator.within_share(0.4)["rows"]])
    np.testing.assert_array_equal(evaluator.evaluate(answers=answers).tasks[0].outcomes, whole)
    assert (answers.scored, answers.reused) == (7, 5)
    with pytest.raises(ConfigError, match="`0 < share <= 1` must hold"):
        evaluator.evaluate(share=0.0)


QUESTION = {"question": "who", "context": "the cat", "answers": "a"}


@pytest.mark.parametrize(
    ("head", "rows", "keywords", "message"),
    [
        (
            "classification",
            labelled(3),
            {"columns": {"text": "sentance"}},
            r"needs the column 'sentance' \(text\).*did you mean 'sentence'",
        ),
        ("classification", [{"text": None, "label": 1}, {"text": "a", "label": 0}], {}, "row 0 of 'rows' has no text"),
        (
            "question_answering",
            [{"question": "who", "context": "", "answers": ["a"]}],
            {},
            "a context must not be empty",
        ),
        (
            "question_answering",
            [{"question": "who", "context": "the cat", "answers": 3}],
            {},
            "`answers` must be a string",
        ),
        (
            "question_answering",
            [{"question": "who " * 30, "context": "the cat", "answers": "a"}],
            {"max_length": 16},
            "must leave room for a context within 16 tokens",
        ),
        ("embedding", pairs(2), {}, "needs at least 3 pairs"),
        ("embedding", [{**row, "score": 1} for row in pairs()], {"metric": "spearman"}, "must be finite and differ"),
        (
            "embedding",
            [{"sentence1": "a", "sentence2": "the"}] * 4,
            {"metric": "spearman"},
            "needs a column of reference scores",
        ),
    ],
)
def test_unsuitable_data_is_refused(
    tmp_path: Path, head: str, rows: list[dict[str, Any]], keywords: dict[str, Any], message: str
) -> None:
    loaded = loaded_encoder("bert", head)
    with pytest.raises(TaskError, match=message) as caught:
        HeadEvaluator(loaded, [task(write(tmp_path, rows), head, **keywords)])
    assert "\n" not in str(caught.value)


def test_missing_or_unreadable_data_is_refused(tmp_path: Path) -> None:
    loaded = loaded_encoder("bert", "classification")
    (tmp_path / "empty.jsonl").write_text("")
    (tmp_path / "broken.jsonl").write_text('{"text": \n')
    (tmp_path / "none.csv").write_text("text,label\n")
    for dataset, message in {
        str(tmp_path / "missing.csv"): "a dataset must exist",
        str(tmp_path / "broken.jsonl"): "must be readable, but",
        str(tmp_path / "empty.jsonl"): "must have at least one document, but 'empty' has none",
        str(tmp_path / "none.csv"): "must have at least one document, but 'none' has none",
        "dse_nonsense": "a dataset of the package must be one of",
    }.items():
        with pytest.raises(TaskError, match=message) as caught:
            HeadEvaluator(loaded, [task(dataset, "classification")])
        assert "\n" not in str(caught.value)


@pytest.mark.usefixtures("no_hub")
def test_unreachable_hub_dataset_is_reported_in_one_line() -> None:
    loaded = loaded_encoder("bert", "classification")
    for dataset, config in (("nyu-mll/glue", "sst2"), ("nobody/has-this", None)):
        with pytest.raises(
            TaskError, match=r"needs the dataset '.*' from the Hugging Face hub, which cannot"
        ) as caught:
            HeadEvaluator(loaded, [task(dataset, "classification", config=config, split="validation")])
        assert "\n" not in str(caught.value)


def test_settings_of_another_head_or_source_are_refused() -> None:
    with pytest.raises(ValueError, match=r"the metric of embedding tasks must be one of fidelity_sp.*'pearson'"):
        task("pairs.csv", "embedding", metric="pearson")
    with pytest.raises(ValueError, match=r"the columns of classification tasks are text, .*did you mean 'label'"):
        task("rows.csv", "classification", columns={"labels": "target"})
    with pytest.raises(ValueError, match="`pooling` is for embedding tasks, but this one has `head: classification`"):
        task("rows.csv", "classification", pooling="cls")
    with pytest.raises(ValueError, match="needs a `split`"):
        task("nyu-mll/glue", "classification", config="sst2")
    with pytest.raises(ValueError, match="`split` is for hub datasets"):
        task("rows.csv", "classification", split="test")


def test_model_without_the_head_is_refused(tmp_path: Path) -> None:
    entry = task(write(tmp_path, pairs()), "embedding")
    with pytest.raises(ModelError, match="needs a model with no head, but 'bert' is loaded as BertForMaskedLM"):
        HeadEvaluator(loaded_encoder("bert", "masked_lm"), [entry])


@pytest.mark.parametrize("head", ["classification", "question_answering", "embedding"])
def test_overflow_makes_the_trial_invalid(tmp_path: Path, head: str) -> None:
    loaded = loaded_encoder("roberta", head, context=400)
    rows = {"classification": labelled(), "question_answering": questions(), "embedding": pairs()}[head]
    columns = {"text": "sentence"} if head == "classification" else {}
    evaluator = HeadEvaluator(loaded, [task(write(tmp_path, rows), head, columns=columns)])
    loaded.model.base_model.encoder.layer[0].output.dense.weight[0, 0] = math.nan
    with pytest.raises(
        NonFiniteError, match=r"outputs must be finite, but those of document \d+ of task 'rows' are not"
    ):
        evaluator.evaluate()


@pytest.mark.parametrize("head", ["classification", "question_answering", "embedding"])
def test_out_of_memory_halves_the_batch_and_goes_on(tmp_path: Path, head: str) -> None:
    """The fake device refuses passes of more tokens than two documents have; what was answered before is not answered again."""
    rows = {"classification": labelled(), "question_answering": questions(), "embedding": pairs()}[head]
    keywords: dict[str, Any] = {"columns": {"text": "sentence"}} if head == "classification" else {}
    entry = task(write(tmp_path, rows), head, **keywords)
    loaded = loaded_encoder("bert", head)
    evaluator = HeadEvaluator(loaded, [entry], batch_size="auto")
    expected = evaluator.evaluate()
    sizes: list[int] = []
    room = {"classification": 40, "question_answering": 160, "embedding": 40}[head]

    def check(_module: object, _arguments: object, keywords: dict[str, Any]) -> None:
        sizes.append(keywords["input_ids"].numel())
        if sizes[-1] > room:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")

    handle = loaded.model.register_forward_pre_hook(check, with_kwargs=True)
    found, refused = evaluator.evaluate(), sum(size > room for size in sizes)
    again = evaluator.evaluate()
    handle.remove()
    for result in (found, again):
        np.testing.assert_allclose(result.tasks[0].outcomes, expected.tasks[0].outcomes, atol=1e-5)
    assert (expected.batch_tokens, found.batch_tokens) == (2048, 2048 // 2**refused)
    assert refused == sum(size > room for size in sizes) > 0  # the reduced batch stays
