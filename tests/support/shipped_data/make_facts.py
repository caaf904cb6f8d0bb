"""Generate the four-choice questions of dse_facts and the sentences of calibration/facts.txt from sources/facts.yaml.

    python -m shipped_data.make_facts            # writes both files
    python -m shipped_data.make_facts --check    # exit 1 if a file is out of date

The test facts of a category are divided into groups of four, and the four answers of a group are the choices of each of
its questions. Every answer is therefore correct once and wrong three times among the same choices, so a scorer that
ignores the question, for example by word frequency, gets exactly one of the four questions right: 25 %.
"""

from __future__ import annotations

import itertools
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import yaml

from shipped_data.generation import (
    CALIBRATION_FOLDER,
    SOURCES_FOLDER,
    TASKS_FOLDER,
    json_lines,
    scattered,
    write_or_check,
)

CHOICES = 4
_ATTEMPTS = 2_000


@dataclass(frozen=True)
class Category:
    """Facts of one kind. `test` and `calibration` map a subject to its answer; `apart` lists answers never combined."""

    name: str
    question: str
    phrasings: Sequence[str]
    apart: Sequence[frozenset[str]]
    test: Mapping[str, str]
    calibration: Mapping[str, str]


def read_categories(path: Path = SOURCES_FOLDER / "facts.yaml") -> list[Category]:
    """Read the categories in file order."""
    return [
        Category(
            name=name,
            question=entry.get("question", "{X}"),
            phrasings=entry["phrasings"],
            apart=[frozenset(answers) for answers in entry.get("apart", [])],
            test=entry["test"],
            calibration=entry["calibration"],
        )
        for name, entry in yaml.safe_load(path.read_text(encoding="utf-8")).items()
    ]


def phrase(template: str, subject: str, answer: str = "") -> str:
    """Insert subject and answer into a template; {X} and {Y} are capitalised."""
    return template.format(x=subject, X=subject[0].upper() + subject[1:], y=answer, Y=answer[:1].upper() + answer[1:])


def _may_share_a_question(group: Sequence[tuple[str, str]], apart: Sequence[frozenset[str]]) -> bool:
    """Return whether the four answers differ and no two of them must be kept apart."""
    answers = {answer for _, answer in group}
    return len(answers) == CHOICES and all(len(answers & kept) < 2 for kept in apart)


def deal(category: Category) -> list[list[tuple[str, str]]]:
    """Divide the test facts of a category into groups of four (subject, answer).

    Facts are taken in a pseudo-random order. Each group starts with the first remaining fact and takes the next facts
    that may join it. If an order leads to a dead end, another order is tried.

    Raises:
        ValueError: The number of facts is not a multiple of four, or no tried order succeeds.
    """
    if len(category.test) % CHOICES:
        raise ValueError(
            f"the number of test facts of {category.name} must be a multiple of 4, got {len(category.test)}"
        )
    for attempt in range(_ATTEMPTS):
        left = scattered(category.test.items(), f"{category.name}|{attempt}")
        groups = []
        while left:
            group = next(
                (
                    [left[0], *rest]
                    for rest in itertools.combinations(left[1:], CHOICES - 1)
                    if _may_share_a_question([left[0], *rest], category.apart)
                ),
                None,
            )
            if group is None:
                break
            groups.append(group)
            left = [fact for fact in left if fact not in group]
        else:
            return groups
    raise ValueError(f"the answers of {category.name} cannot be divided into groups of four; keep fewer of them apart")


def _ask(category: Category, group: Sequence[tuple[str, str]], number: int) -> list[dict[str, object]]:
    """Return the four questions of a group; the correct answer is once at each of the four positions."""
    documents: list[dict[str, object]] = []
    golds = scattered(range(CHOICES), f"{category.name}|{number}|gold")
    for (subject, answer), gold in zip(group, golds, strict=True):
        others = scattered((word for _, word in group if word != answer), f"{subject}|{answer}")
        documents.append(
            {
                "category": category.name,
                "question": phrase(category.question, subject),
                "choices": [*others[:gold], answer, *others[gold:]],
                "gold": gold,
            }
        )
    return documents


def make_documents(categories: Sequence[Category]) -> list[dict[str, object]]:
    """Return the task's documents: the four questions of a group are adjacent, and the categories alternate."""
    by_category = [
        [_ask(category, group, number) for number, group in enumerate(deal(category))] for category in categories
    ]
    turns = itertools.zip_longest(*by_category, fillvalue=())
    return [document for turn in turns for group in turn for document in group]


def make_calibration(categories: Sequence[Category]) -> str:
    """Return each calibration fact in all phrasings except one, in rotation; one sentence per line."""
    sentences = [
        phrase(phrasing, subject, answer)
        for category in categories
        for fact, (subject, answer) in enumerate(category.calibration.items())
        for number, phrasing in enumerate(category.phrasings)
        if number != fact % len(category.phrasings)
    ]
    return "".join(sentence[0].upper() + sentence[1:] + "\n" for sentence in scattered(sentences, "facts"))


def make_files() -> dict[Path, str]:
    """Return path -> text of every generated file."""
    categories = read_categories()
    return {
        TASKS_FOLDER / "dse_facts.jsonl": json_lines(make_documents(categories)),
        CALIBRATION_FOLDER / "facts.txt": make_calibration(categories),
    }


if __name__ == "__main__":
    sys.exit(write_or_check(make_files(), None, "Generate dse_facts and its calibration split."))
