"""Pseudo-log-likelihoods against a loop that masks one token at a time, and against a closed form."""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from evaluation_support import TaskWriter
from hypothesis import given
from hypothesis import strategies as st
from lm_eval.api.instance import Instance
from tiny_models import ENCODER_FAMILIES, ENCODER_WORDS, encoder_tokenizer, loaded_encoder

from dse.errors import ModelError, NonFiniteError, TaskError
from dse.evaluation import Evaluator, TaskSpec
from dse.evaluation.evaluator_settings import BatchSize
from dse.evaluation.lm_eval.masked_language_model import MaskedScoringLM
from dse.evaluation.scoring.masked_text import MaskedScoring, encode_masked, masked_positions, windows_of
from dse.models import LoadedModel

PAIRS = [
    ("the cat", " sees a dog."),
    ("the cat who looked in", " unlikely towns"),
    ("", "walking cats looks unlikely, the old dog."),
    ("is the sun not", " new?"),
    ("the", " moon"),
]
SCORINGS: tuple[MaskedScoring, ...] = ("original", "within_word")


def request(context: str, continuation: str, kind: str = "loglikelihood") -> Instance:
    arguments = (context, continuation) if kind == "loglikelihood" else (continuation,)
    return Instance(kind, {}, arguments, 0, metadata=("pairs", 0, 1))


@torch.inference_mode()
def one_at_a_time(loaded: LoadedModel, context: str, continuation: str, scoring: MaskedScoring) -> tuple[float, bool]:
    """Context and continuation tokenised separately, words counted from the text, one forward pass per token."""
    tokenizer = loaded.tokenizer
    before = tokenizer(context, add_special_tokens=False)["input_ids"]
    after = tokenizer(continuation, add_special_tokens=False)["input_ids"]
    texts = tokenizer.convert_ids_to_tokens(after)
    if loaded.ref == "roberta":  # bytes: a word begins at a space or at a change between letters and punctuation
        is_letter = [text.isalpha() and text != "Ġ" for text in texts]
        begins = [
            i == 0 or texts[i] == "Ġ" or (texts[i - 1] != "Ġ" and is_letter[i] != is_letter[i - 1])
            for i in range(len(texts))
        ]
    else:
        begins = [not text.startswith("##") for text in texts]
    ids = [tokenizer.cls_token_id, *before, *after, tokenizer.sep_token_id]
    total, greedy = 0.0, True
    for index, token in enumerate(after):
        hidden = [index]
        if scoring == "within_word":
            while hidden[-1] + 1 < len(after) and not begins[hidden[-1] + 1]:
                hidden.append(hidden[-1] + 1)
        masked = list(ids)
        for position in hidden:
            masked[1 + len(before) + position] = tokenizer.mask_token_id
        logits = loaded.model(torch.tensor([masked])).logits[0, 1 + len(before) + index].double()
        total += float(logits.log_softmax(0)[token])
        greedy &= int(logits.argmax()) == token
    return total, greedy


@pytest.mark.parametrize("scoring", SCORINGS)
@pytest.mark.parametrize("family", ENCODER_FAMILIES)
def test_scores_agree_with_a_loop_over_single_tokens(family: str, scoring: MaskedScoring) -> None:
    loaded = loaded_encoder(family, "masked_lm")
    lm = MaskedScoringLM(loaded, max_length=None, scoring=scoring)
    finished: list[int] = []
    found = lm.answer("loglikelihood", [request(*pair) for pair in PAIRS], BatchSize(1, "cpu"), finished.append)
    for pair, (score, greedy) in zip(PAIRS, found, strict=True):
        expected, expected_greedy = one_at_a_time(loaded, *pair, scoring)
        assert score == pytest.approx(expected, abs=1e-3)
        assert greedy == expected_greedy
    assert sum(finished) == len(PAIRS)
    assert not loaded.model.base_model._forward_hooks


@pytest.mark.parametrize("family", ENCODER_FAMILIES)
def test_only_the_most_likely_token_is_greedy(family: str) -> None:
    loaded = loaded_encoder(family, "masked_lm")
    tokenizer = loaded.tokenizer
    context = "the cat sees"
    ids = tokenizer(context + " dog")["input_ids"]
    place = len(ids) - 2
    ids[place] = tokenizer.mask_token_id
    with torch.inference_mode():
        ranked = loaded.model(torch.tensor([ids])).logits[0, place].argsort(descending=True).tolist()
    words = [t for t in ranked if tokenizer.decode([t]).strip().isalpha() and tokenizer.decode([t]).isascii()]
    blank = "" if family == "roberta" else " "
    text = context + " do" if family == "roberta" else context
    lm = MaskedScoringLM(loaded, max_length=None)
    found = [lm.loglikelihood([request(text, blank + tokenizer.decode([word]))])[0] for word in (words[0], words[-1])]
    assert found[0][0] > found[1][0]
    assert found[0][1] == (words[0] == ranked[0])
    assert not found[1][1]


@pytest.mark.parametrize("scoring", SCORINGS)
def test_model_that_ignores_its_input_has_a_closed_form(scoring: MaskedScoring) -> None:
    """With zero head weights, logits equal the head's bias, and the score is a sum of its log-softmax."""
    loaded = loaded_encoder("bert", "masked_lm")
    head = loaded.model.cls.predictions.decoder
    head.weight.zero_()
    head.bias.copy_(torch.linspace(-2, 3, len(head.bias)))
    log_p = head.bias.double().log_softmax(0)
    lm = MaskedScoringLM(loaded, max_length=None, scoring=scoring)
    for pair, (score, _) in zip(PAIRS, lm.loglikelihood([request(*pair) for pair in PAIRS]), strict=True):
        tokens = loaded.tokenizer(pair[1], add_special_tokens=False)["input_ids"]
        assert score == pytest.approx(float(log_p[tokens].sum()), abs=1e-4)
    text = " ".join(ENCODER_WORDS * 8)
    rolling = lm.loglikelihood_rolling([request("", text, "loglikelihood_rolling")])
    assert rolling[0] == pytest.approx(
        float(log_p[loaded.tokenizer(text, add_special_tokens=False)["input_ids"]].sum()), abs=1e-3
    )


def test_within_word_scoring_masks_the_rest_of_the_word() -> None:
    tokenizer = encoder_tokenizer("bert")
    text = encode_masked(tokenizer, "the cat", " looked unlikely.")
    tokens = tokenizer.convert_ids_to_tokens(text.token_ids)
    assert tokens == ["[CLS]", "the", "cat", "look", "##ed", "un", "##likely", ".", "[SEP]"]
    assert text.targets == (3, 4, 5, 6, 7)
    assert [masked_positions(text, target, "within_word") for target in text.targets] == [
        (3, 4),
        (4,),
        (5, 6),
        (6,),
        (7,),
    ]
    assert [masked_positions(text, target, "original") for target in text.targets] == [(3,), (4,), (5,), (6,), (7,)]
    # A token across the boundary has characters of the continuation, so it is scored.
    assert encode_masked(tokenizer, "the ca", "t runs").targets == (2, 3)
    assert encode_masked(tokenizer, "the look", "ing").targets == (3,)
    assert (
        encode_masked(encoder_tokenizer("roberta"), "", "  a").token_ids
        == encode_masked(encoder_tokenizer("roberta"), "", "a").token_ids
    )


@given(
    st.lists(st.sampled_from([*ENCODER_WORDS, "unlikely", "walkings", "looked"]), min_size=1, max_size=40),
    st.integers(4, 12),
)
def test_windows_have_every_token_once_and_split_no_word(words: list[str], most: int) -> None:
    tokenizer = encoder_tokenizer("bert")
    text = encode_masked(tokenizer, "", " ".join(words))
    windows = list(windows_of(text, most))
    inside = [window.token_ids[1:-1] for window in windows]
    assert tuple(token for part in inside for token in part) == text.token_ids[1:-1]
    for window in windows:
        assert len(window) <= most
        assert (window.token_ids[0], window.token_ids[-1]) == (2, 3)
        assert window.targets == tuple(range(1, len(window) - 1))
    if most >= 5:  # the longest word has three tokens
        assert not any(tokenizer.convert_ids_to_tokens(part[0]).startswith("##") for part in inside)


def test_long_text_loses_its_beginning_and_keeps_special_tokens() -> None:
    tokenizer = encoder_tokenizer("bert")
    text = encode_masked(tokenizer, " ".join(ENCODER_WORDS), " dog runs")
    cut = text.cut_to(6)
    assert tokenizer.convert_ids_to_tokens(cut.token_ids) == ["[CLS]", "is", "not", "dog", "runs", "[SEP]"]
    assert cut.targets == (3, 4)
    assert text.cut_to(len(text)) is text


def minimal_pairs(folder: Path) -> Path:
    """A task like BLiMP: which of two sentences is better, without context."""
    rows = [
        {"sentence_good": f"the {a} sees a {b}.", "sentence_bad": f"the {b} sees {a} a."}
        for a, b in zip(ENCODER_WORDS[:8], ENCODER_WORDS[8:], strict=True)
    ]
    (folder / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    task = {
        "task": "pairs",
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": "pairs.jsonl"}},
        "test_split": "test",
        "output_type": "multiple_choice",
        "doc_to_text": "",
        "doc_to_target": 0,
        "doc_to_choice": "{{[sentence_good, sentence_bad]}}",
        "metric_list": [{"metric": "acc"}],
    }
    path = folder / "pairs.yaml"
    path.write_text(yaml.safe_dump(task))
    return path


@pytest.mark.parametrize("scoring", SCORINGS)
def test_minimal_pairs_agree_with_the_loop(tmp_path: Path, scoring: MaskedScoring) -> None:
    loaded = loaded_encoder("bert", "masked_lm")
    path = minimal_pairs(tmp_path)
    evaluator = Evaluator(loaded, [TaskSpec(str(path))], masked_scoring=scoring)
    result = evaluator.evaluate()
    rows = [json.loads(line) for line in (tmp_path / "pairs.jsonl").read_text().splitlines()]
    expected = [
        one_at_a_time(loaded, "", row["sentence_good"], scoring)[0]
        > one_at_a_time(loaded, "", row["sentence_bad"], scoring)[0]
        for row in rows
    ]
    np.testing.assert_array_equal(result.tasks[0].outcomes, expected)
    assert result.accuracy == pytest.approx(np.mean(expected))


def test_multiple_choice_and_pseudo_perplexity_agree_with_the_loop(write_task: TaskWriter) -> None:
    loaded = loaded_encoder("distilbert", "masked_lm")
    paths = [write_task("choice"), write_task("rolling")]
    evaluator = Evaluator(loaded, [TaskSpec(str(path)) for path in paths], batch_size=2)
    done: list[tuple[int, int]] = []
    result = evaluator.evaluate(lambda *counts: done.append(counts))
    assert done[-1] == (60, 60)
    choice, rolling = result.tasks
    documents = [json.loads(line) for line in paths[0].with_suffix(".jsonl").read_text().splitlines()]
    for document, outcome in zip(documents, choice.outcomes, strict=True):
        context = f"Q: {document['question']}\nA:"
        scores = [one_at_a_time(loaded, context, f" {option}", "within_word")[0] for option in document["choices"]]
        assert outcome == (int(np.argmax(scores)) == document["gold"])
    log_likelihoods = [one_at_a_time(loaded, "", document["text"], "within_word")[0] for document in documents]
    words = sum(len(document["text"].split()) for document in documents)
    assert math.log(rolling.value) == pytest.approx(-sum(log_likelihoods) / words, abs=1e-3)


def test_masked_scoring_is_part_of_the_fingerprint(tmp_path: Path) -> None:
    loaded, path = loaded_encoder("bert", "masked_lm"), minimal_pairs(tmp_path)
    prints = {Evaluator(loaded, [TaskSpec(str(path))], masked_scoring=scoring).fingerprint for scoring in SCORINGS}
    assert len(prints) == 2


def test_unsupported_tasks_and_settings_are_refused(write_task: TaskWriter, tmp_path: Path) -> None:
    loaded = loaded_encoder("bert", "masked_lm", context=16)
    with pytest.raises(TaskError, match="asks for generated text, but 'bert' is a masked language model"):
        Evaluator(loaded, [TaskSpec(str(write_task("generate")))])
    with pytest.raises(ModelError, match="`apply_chat_template` is for models that generate"):
        Evaluator(loaded, [TaskSpec(str(write_task("choice")))], apply_chat_template=True)
    with pytest.raises(TaskError, match=r"must have 1 to 14 tokens, but document 0 of task 'pairs' has 15"):
        MaskedScoringLM(loaded, max_length=None).prepare([request("the", " cat" * 15)])
    with pytest.raises(ModelError, match="need a decoder or a masked language model, but 'bert' is BertForSequence"):
        Evaluator(loaded_encoder("bert", "classification"), [TaskSpec(str(write_task("choice")))])
    loaded.tokenizer.mask_token = None
    with pytest.raises(ModelError, match="need a tokenizer with a mask token"):
        MaskedScoringLM(loaded, max_length=None)


def test_overflow_makes_the_trial_invalid(tmp_path: Path) -> None:
    loaded = loaded_encoder("bert", "masked_lm")
    evaluator = Evaluator(loaded, [TaskSpec(str(minimal_pairs(tmp_path)))])
    loaded.model.bert.encoder.layer[0].output.dense.weight[0, 0] = math.nan
    with pytest.raises(NonFiniteError, match=r"document \d of task 'pairs'"):
        evaluator.evaluate()
