"""Generate the minimal pairs of dse_grammar and the sentences of calibration/grammar.txt from the lexicon.

    python -m shipped_data.make_grammar            # writes both files
    python -m shipped_data.make_grammar --check    # exit 1 if a file is out of date

A frame such as ``the [{animal.one}|{animal.many}] {place.it} the tree => is|are => very old`` yields one pair of
documents per filling of its slots: "The cat near the tree" with the answer "is", and "The cats near the tree" with
"are". Each document offers both answers, so a scorer that ignores the prefix gets exactly one document of each pair
right: word frequencies alone score 50 %. If the frame allows it, the last word before the answer is the same in both
sentences, so that word bigrams alone score 50 % too.
"""

from __future__ import annotations

import itertools
import re
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import yaml

from shipped_data.generation import (
    CALIBRATION_FOLDER,
    SOURCES_FOLDER,
    TASKS_FOLDER,
    json_lines,
    scattered,
    write_or_check,
)

Split = Literal["test", "calibration"]
Row = Mapping[str, str]

PAIRS_PER_PHENOMENON: Mapping[Split, int] = {"test": 16, "calibration": 11}

_SLOT = re.compile(r"\{(\w+?)(\d?)\.(\w+)\}")
_DIFFERENCE = re.compile(r"\[([^|\]]*)\|([^|\]]*)\]")


@dataclass(frozen=True)
class Lexicon:
    """The rows (column -> words) of each slot by split and slot name, and the frames of each phenomenon."""

    rows: Mapping[Split, Mapping[str, Sequence[Row]]]
    frames: Mapping[str, Sequence[str]]


@dataclass(frozen=True)
class Sentence:
    """One side of a pair: `prefix good` is grammatical, `prefix bad` is not. `ending` follows `good`."""

    phenomenon: str
    prefix: str
    good: str
    bad: str
    ending: str


def read_lexicon(path: Path = SOURCES_FOLDER / "grammar_lexicon.yaml") -> Lexicon:
    """Read slots and frames. Rows marked `both` belong to both splits."""
    source = yaml.safe_load(path.read_text(encoding="utf-8"))
    rows: dict[Split, dict[str, list[Row]]] = {"test": {}, "calibration": {}}
    for name, slot in source["slots"].items():
        columns = slot["columns"].split("/")
        for split, by_name in rows.items():
            cells = [row.strip().split("/") for row in slot.get("both", slot.get(split)).split(",")]
            by_name[name] = [dict(zip(columns, row, strict=True)) for row in cells]
    return Lexicon(rows, source["phenomena"])


def _fillings(frame: str, split: Split, lexicon: Lexicon, salt: str) -> Iterator[dict[str, Row]]:
    """Yield fillings of a frame's slots, each slot using all its rows before it repeats one.

    Keys are slot names such as 'person' and 'person2'. Each slot has its own order of rows, and slot number i is
    shifted by i rows after each round, so that the combinations of rows vary.
    """
    slots = {base + number: base for base, number, _ in _SLOT.findall(frame)}
    orders = {
        # 'person' and 'person2' share one order, at an offset that keeps their rows different.
        slot: scattered(lexicon.rows[split][base], f"{salt}|{frame}|{base}")
        for slot, base in slots.items()
    }
    for step in itertools.count():
        filling = {}
        for position, (slot, order) in enumerate(orders.items()):
            shift = position * (step // len(order)) + (3 if slot[-1].isdigit() else 0)
            filling[slot] = order[(step + shift) % len(order)]
        if all(filling[slot] != filling[base] for slot, base in slots.items() if slot != base):
            yield filling


def _pair(phenomenon: str, frame: str, filling: Mapping[str, Row]) -> tuple[Sentence, Sentence]:
    """Fill a frame and return its two sentences."""
    text = _SLOT.sub(lambda match: filling[match[1] + match[2]][match[3]], frame)
    prefix, answers, *rest = (part.strip() for part in text.split("=>"))
    ending = rest[0] if rest else ""
    first, second = answers.split("|")
    sentences = []
    for side, good, bad in ((1, first, second), (2, second, first)):
        begin, end = (_DIFFERENCE.sub(rf"\{side}", part).strip() for part in (prefix, ending))
        sentences.append(Sentence(phenomenon, begin[0].upper() + begin[1:], good, bad, end))
    return sentences[0], sentences[1]


def make_sentences(split: Split, lexicon: Lexicon) -> list[Sentence]:
    """Return both sentences of every pair of a split.

    The sentences of a pair are adjacent and the phenomena alternate, so the first n sentences are a balanced sample.
    """
    by_phenomenon = []
    for phenomenon, frames in lexicon.frames.items():
        sources = [(frame, _fillings(frame, split, lexicon, phenomenon)) for frame in frames]
        pairs: list[tuple[Sentence, Sentence]] = []
        prefixes: set[str] = set()
        # Fillings can repeat a sentence; the bound makes a lexicon that is too small an error.
        for frame, source in itertools.islice(itertools.cycle(sources), 1000):
            pair = _pair(phenomenon, frame, next(source))
            if prefixes.isdisjoint(sentence.prefix for sentence in pair):
                pairs.append(pair)
                prefixes.update(sentence.prefix for sentence in pair)
            if len(pairs) == PAIRS_PER_PHENOMENON[split]:
                break
        else:
            raise ValueError(f"the lexicon gives only {len(pairs)} pairs of {phenomenon} for {split}; add rows")
        by_phenomenon.append(pairs)
    return [sentence for turn in zip(*by_phenomenon, strict=True) for pair in turn for sentence in pair]


def make_documents(lexicon: Lexicon) -> list[dict[str, object]]:
    """Return the task's documents.

    The two choices are in alphabetical order, so that each position is correct once per pair: a model whose scores are
    all equal, or NaN, gets 50 %.
    """
    documents = []
    for sentence in make_sentences("test", lexicon):
        choices = sorted([sentence.good, sentence.bad])
        documents.append(
            {
                "phenomenon": sentence.phenomenon,
                "prefix": sentence.prefix,
                "good": sentence.good,
                "bad": sentence.bad,
                "choices": choices,
                "gold": choices.index(sentence.good),
            }
        )
    return documents


def make_calibration(lexicon: Lexicon) -> str:
    """Return the grammatical sentences, one per line."""
    sentences = make_sentences("calibration", lexicon)
    lines = [" ".join(filter(None, (sentence.prefix, sentence.good, sentence.ending))) for sentence in sentences]
    return "".join(line + ".\n" for line in scattered(lines, "grammar"))


def make_files() -> dict[Path, str]:
    """Return path -> text of every generated file."""
    lexicon = read_lexicon()
    return {
        TASKS_FOLDER / "dse_grammar.jsonl": json_lines(make_documents(lexicon)),
        CALIBRATION_FOLDER / "grammar.txt": make_calibration(lexicon),
    }


if __name__ == "__main__":
    sys.exit(write_or_check(make_files(), None, "Generate dse_grammar and its calibration split."))
