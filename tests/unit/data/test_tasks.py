"""The shipped tasks match their generating scripts, and their chance levels match the documentation."""

from __future__ import annotations

import collections
import json
import re
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st
from shipped_data import generation, make_facts, make_grammar, make_sentence_pairs, make_text

SUPPORT = Path(generation.__file__).parents[1]

Documents = list[dict[str, Any]]

SCATTERED = ["f", "d", "b", "e", "a", "c"]


def read_documents(name: str) -> Documents:
    lines = (generation.TASKS_FOLDER / f"{name}.jsonl").read_text(encoding="utf-8").splitlines()
    return [json.loads(line) for line in lines]


def read_calibration(name: str) -> list[str]:
    return (generation.CALIBRATION_FOLDER / f"{name}.txt").read_text(encoding="utf-8").splitlines()


@pytest.fixture(scope="module")
def grammar() -> Documents:
    return read_documents("dse_grammar")


@pytest.fixture(scope="module")
def facts() -> Documents:
    return read_documents("dse_facts")


def sentences(documents: Documents, stem: str) -> set[str]:
    """Every document with each of its choices, including the wrong ones."""
    return {f"{document[stem]} {choice}" for document in documents for choice in document["choices"]}


@pytest.mark.parametrize("module", [make_grammar, make_facts, make_text, make_sentence_pairs])
def test_committed_files_match_the_generating_script(module: ModuleType) -> None:
    for path, text in module.make_files().items():
        assert path.read_text(encoding="utf-8") == text, f"run python -m {module.__name__}"


def test_check_detects_an_outdated_file(tmp_path: Path) -> None:
    path = tmp_path / "new" / "file.txt"
    assert generation.write_or_check({path: "a\n"}, ["--check"], "") == 1
    assert not path.exists()
    assert generation.write_or_check({path: "a\n"}, [], "") == 0
    assert path.read_bytes() == b"a\n"
    assert generation.write_or_check({path: "a\n"}, ["--check"], "") == 0
    assert generation.write_or_check({path: "b\n"}, ["--check"], "") == 1
    assert path.read_bytes() == b"a\n"


def test_the_check_commands_accept_the_committed_files() -> None:
    for script in ("make_grammar", "make_facts", "make_text", "make_sentence_pairs"):
        command = [sys.executable, "-m", f"shipped_data.{script}", "--check"]
        subprocess.run(command, check=True, timeout=600, cwd=SUPPORT)


def test_sentence_pairs_have_three_degrees_and_no_overlap_with_the_calibration_text() -> None:
    pairs = read_documents("dse_sentence_pairs")
    degrees = collections.Counter(pair["degree"] for pair in pairs)
    assert degrees == dict.fromkeys(("minimal_pair", "same_phenomenon", "different_phenomena"), 110)
    assert len({(pair["sentence1"], pair["sentence2"]) for pair in pairs}) == len(pairs)
    overlap = {
        degree: sum(
            len(set(p["sentence1"].split()) & set(p["sentence2"].split())) / len(set(p["sentence1"].split()))
            for p in pairs
            if p["degree"] == degree
        )
        for degree in degrees
    }
    assert overlap["minimal_pair"] > overlap["same_phenomenon"] > overlap["different_phenomena"]
    everything = {pair[column] for pair in pairs for column in ("sentence1", "sentence2")}
    assert not everything & set(read_calibration("grammar"))


def test_grammar_has_enough_pairs_of_enough_phenomena(grammar: Documents) -> None:
    counts = collections.Counter(document["phenomenon"] for document in grammar)
    assert len(grammar) >= 600
    assert len(counts) >= 10
    assert set(counts.values()) == {2 * make_grammar.PAIRS_PER_PHENOMENON["test"]}


def test_grammar_pairs_swap_their_answers(grammar: Documents) -> None:
    for left, right in zip(grammar[::2], grammar[1::2], strict=True):
        assert left["phenomenon"] == right["phenomenon"]
        assert (left["good"], left["bad"]) == (right["bad"], right["good"])
        assert left["good"] != left["bad"]
        assert left["prefix"] != right["prefix"]
        assert left["choices"] == right["choices"]
        assert {left["gold"], right["gold"]} == {0, 1}


def test_grammar_choices_agree_with_good_and_bad(grammar: Documents) -> None:
    for document in grammar:
        choices = document["choices"]
        assert isinstance(choices, list)
        assert choices[document["gold"]] == document["good"]
        assert choices[1 - document["gold"]] == document["bad"]


def test_facts_are_enough_questions_of_enough_categories(facts: Documents) -> None:
    assert len(facts) >= 240
    assert len({document["category"] for document in facts}) >= 10


def test_the_choices_of_a_fact_group_are_each_correct_once(facts: Documents) -> None:
    for start in range(0, len(facts), 4):
        group = facts[start : start + 4]
        assert len({document["category"] for document in group}) == 1
        assert len({frozenset(document["choices"]) for document in group}) == 1
        answers = [document["choices"][document["gold"]] for document in group]
        assert set(answers) == set(group[0]["choices"])
        assert sorted(document["gold"] for document in group) == [0, 1, 2, 3]


def test_fact_choices_are_distinct_and_answers_match_the_source(facts: Documents) -> None:
    known = {
        (category.name, make_facts.phrase(category.question, subject)): answer
        for category in make_facts.read_categories()
        for subject, answer in category.test.items()
    }
    assert len(known) == len(facts)
    for document in facts:
        choices = document["choices"]
        assert isinstance(choices, list)
        assert len(set(choices)) == len(choices) == 4
        assert choices[document["gold"]] == known[(document["category"], document["question"])]


def test_fact_answers_kept_apart_are_never_combined(facts: Documents) -> None:
    apart = {category.name: category.apart for category in make_facts.read_categories()}
    for document in facts:
        for kept in apart[str(document["category"])]:
            assert len(kept & set(document["choices"])) < 2


@pytest.mark.parametrize(
    ("name", "stem", "chance"), [("dse_grammar", "prefix", 1 / 2), ("dse_facts", "question", 1 / 4)]
)
@pytest.mark.parametrize("seed", range(5))
def test_a_scorer_that_ignores_the_prefix_scores_exactly_chance(name: str, stem: str, chance: float, seed: int) -> None:
    documents = read_documents(name)
    words = sorted({word for document in documents for word in document["choices"]})
    rank = {word: position for position, word in enumerate(generation.scattered(words, str(seed)))}
    right = [
        max(document["choices"], key=rank.__getitem__) == document["choices"][document["gold"]]
        for document in documents
    ]
    assert sum(right) == chance * len(documents)


@pytest.mark.parametrize(("name", "chance"), [("dse_grammar", 1 / 2), ("dse_facts", 1 / 4)])
def test_a_fixed_position_scores_exactly_chance(name: str, chance: float) -> None:
    documents = read_documents(name)
    golds = collections.Counter(document["gold"] for document in documents)
    assert set(golds.values()) == {chance * len(documents)}


@pytest.mark.parametrize(("name", "stem"), [("dse_grammar", "prefix"), ("dse_facts", "question")])
def test_documents_are_clean_single_lines_without_duplicates(name: str, stem: str) -> None:
    documents = read_documents(name)
    assert len({document[stem] for document in documents}) == len(documents)
    for document in documents:
        for text in (document[stem], *document["choices"]):
            assert re.fullmatch(r"[A-Za-z0-9,]+( [A-Za-z0-9,]+)*", text), text
        assert str(document[stem])[0].isupper()


@pytest.mark.parametrize("name", ["grammar", "facts"])
def test_calibration_lines_are_clean_sentences_without_duplicates(name: str) -> None:
    lines = read_calibration(name)
    assert len(set(lines)) == len(lines)
    for line in lines:
        assert re.fullmatch(r"[A-Z][A-Za-z0-9,:]*( [A-Za-z0-9,:]+)*\.", line), line
    # 4,000 to 6,000 tokens, at four tokens per three words.
    assert 3000 < sum(len(line.split()) for line in lines) < 5500


@pytest.mark.parametrize(("task", "stem"), [("dse_grammar", "prefix"), ("dse_facts", "question")])
@pytest.mark.parametrize("calibration", ["grammar", "facts"])
def test_no_test_sentence_occurs_in_the_calibration_text(task: str, stem: str, calibration: str) -> None:
    text = " ".join(line.lower() for line in read_calibration(calibration))
    found = [sentence for sentence in sentences(read_documents(task), stem) if sentence.lower() in text]
    assert not found


def test_no_test_fact_occurs_in_the_calibration_facts_in_either_direction() -> None:
    test, calibration = set(), set()
    for category in make_facts.read_categories():
        test |= {frozenset((subject.lower(), answer.lower())) for subject, answer in category.test.items()}
        calibration |= {
            frozenset((subject.lower(), answer.lower())) for subject, answer in category.calibration.items()
        }
    assert len(calibration) >= 150
    assert not test & calibration


def test_no_calibration_phrasing_states_a_test_fact() -> None:
    lines = set(read_calibration("facts"))
    for category in make_facts.read_categories():
        for subject, answer in category.test.items():
            for phrasing in category.phrasings:
                sentence = make_facts.phrase(phrasing, subject, answer)
                assert sentence[0].upper() + sentence[1:] not in lines


def test_grammar_splits_share_no_row_of_an_open_class() -> None:
    lexicon = make_grammar.read_lexicon()
    for slot, rows in lexicon.rows["test"].items():
        others = lexicon.rows["calibration"][slot]
        if rows is not others and rows != others:
            shared = {tuple(row.items()) for row in rows} & {tuple(row.items()) for row in others}
            assert not shared, slot


def test_every_grammar_frame_has_one_difference_and_two_answers() -> None:
    for phenomenon, frames in make_grammar.read_lexicon().frames.items():
        for frame in frames:
            prefix, answers = frame.split("=>")[:2]
            assert len(re.findall(r"\[[^\]]*\|[^\]]*\]", prefix)) in (1, 2), phenomenon
            assert answers.count("|") == 1, phenomenon


def test_text_documents_contain_the_whole_text_in_bounded_pieces() -> None:
    documents = [str(document["text"]) for document in read_documents("dse_text")]
    source = (generation.DATA_FOLDER / "general_heldout.txt").read_text(encoding="utf-8")
    assert " ".join(documents).split() == source.split()
    assert max(len(document.split()) for document in documents) <= make_text.MAX_WORDS


@given(st.lists(st.lists(st.integers(1, 800), min_size=1, max_size=4), min_size=1, max_size=4))
def test_text_is_split_without_loss(lengths: list[list[int]]) -> None:
    text = "\n\n".join("\n".join(" ".join(f"w{i}" for i in range(count)) for count in passage) for passage in lengths)
    documents = [document["text"] for document in make_text.make_documents(text)]
    assert " ".join(documents).split() == text.split()
    assert all(0 < len(document.split()) <= make_text.MAX_WORDS for document in documents)
    assert len(documents) >= len(lengths)


def test_scattered_is_a_fixed_permutation() -> None:
    # Explicit, because a different order would change every task.
    assert generation.scattered("abcdef", "salt") == SCATTERED
    assert generation.scattered("fedcba", "salt") == SCATTERED
    assert generation.scattered("abcdef", "other") != SCATTERED


@pytest.mark.parametrize("name", ["dse_grammar", "dse_facts", "dse_text"])
def test_task_files_name_their_own_documents(name: str) -> None:
    config = yaml.safe_load((generation.TASKS_FOLDER / f"{name}.yaml").read_text(encoding="utf-8"))
    assert config["task"] == name
    assert config["dataset_kwargs"]["data_files"] == {"test": f"{name}.jsonl"}
    assert config["metadata"]["version"] == 1.0


def category(answers: list[str], apart: list[set[str]]) -> make_facts.Category:
    facts = {f"subject {number}": answer for number, answer in enumerate(answers)}
    return make_facts.Category("name", "{X}", ["{x} {y}."], [frozenset(kept) for kept in apart], facts, {})


@pytest.mark.parametrize(
    ("answers", "apart", "message"),
    [
        (list("abc"), [], "multiple of 4"),
        (list("aabc"), [], "cannot be divided"),
        (list("abcd"), [{"a", "b"}], "cannot be divided"),
    ],
)
def test_facts_that_cannot_be_grouped_are_rejected(answers: list[str], apart: list[set[str]], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make_facts.deal(category(answers, apart))


def test_grouping_keeps_answers_apart() -> None:
    groups = make_facts.deal(category(list("abcdefgh"), [{"a", "b"}, {"a", "c"}, {"a", "d"}, {"a", "e"}]))
    assert [{answer for _, answer in group} for group in groups if "a" in {a for _, a in group}] == [set("afgh")]


def test_a_lexicon_that_is_too_small_is_rejected() -> None:
    rows = {"noun": [{"one": "cat", "many": "cats"}]}
    lexicon = make_grammar.Lexicon(
        {"test": rows, "calibration": rows}, {"p": ["the [{noun.one}|{noun.many}] => is|are"]}
    )
    with pytest.raises(ValueError, match="only 1 pairs of p for test"):
        make_grammar.make_sentences("test", lexicon)
