"""Generate the minimal pairs of dse_grammar and the sentences of calibration/grammar.txt from the lexicon.

    python -m dse.data.make_grammar            # writes both files
    python -m dse.data.make_grammar --check    # exit 1 if they differ from what would be written

A frame such as ``the [{animal.one}|{animal.many}] {place.it} the tree => is|are => very old`` gives, for each filling
of its slots, a pair of documents: "The cat near the tree" with the answer "is", "The cats near the tree" with "are".
Each document offers both answers, so whatever prefers one answer regardless of the prefix gets exactly one document of
each pair right: knowing how frequent words are is worth 50 %, not more. Where a frame allows it, the last word before
the answer is the same in both sentences, so that knowing which word follows which is worth no more either.
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

from dse.data.generation import CALIBRATION_FOLDER, SOURCES_FOLDER, TASKS_FOLDER, json_lines, scattered, write_or_check

Split = Literal["test", "calibration"]
Row = Mapping[str, str]

PAIRS_PER_PHENOMENON: Mapping[Split, int] = {"test": 16, "calibration": 11}

_SLOT = re.compile(r"\{(\w+?)(\d?)\.(\w+)\}")
_DIFFERENCE = re.compile(r"\[([^|\]]*)\|([^|\]]*)\]")


@dataclass(frozen=True)
class Lexicon:
    """Slots by split and name, each a list of rows (column -> words), and the frames of each phenomenon."""

    rows: Mapping[Split, Mapping[str, Sequence[Row]]]
    frames: Mapping[str, Sequence[str]]


@dataclass(frozen=True)
class Sentence:
    """One side of a pair: `prefix good` is grammatical, `prefix bad` is not; `ending` completes it after `good`."""

    phenomenon: str
    prefix: str
    good: str
    bad: str
    ending: str


def read_lexicon(path: Path = SOURCES_FOLDER / "grammar_lexicon.yaml") -> Lexicon:
    """Read slots and frames; rows marked `both` serve either split."""
    source = yaml.safe_load(path.read_text(encoding="utf-8"))
    rows: dict[Split, dict[str, list[Row]]] = {"test": {}, "calibration": {}}
    for name, slot in source["slots"].items():
        columns = slot["columns"].split("/")
        for split, by_name in rows.items():
            cells = [row.strip().split("/") for row in slot.get("both", slot.get(split)).split(",")]
            by_name[name] = [dict(zip(columns, row, strict=True)) for row in cells]
    return Lexicon(rows, source["phenomena"])


def _fillings(frame: str, split: Split, lexicon: Lexicon, salt: str) -> Iterator[dict[str, Row]]:
    """Yield fillings of a frame's slots, using every row before any comes again; keys are such as 'person', 'person2'.

    Each slot steps through its rows in an order of its own, and slot number i slips i rows further after each round, so
    that the same rows do not meet again and again.
    """
    slots = {base + number: base for base, number, _ in _SLOT.findall(frame)}
    orders = {
        # 'person' and 'person2' share one order, and their distance in it keeps them different rows.
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
    """Fill a frame and split it into its two sentences."""
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

    Pairs stand together, and the phenomena take turns, so that the first n sentences of the list are a fair sample.
    """
    by_phenomenon = []
    for phenomenon, frames in lexicon.frames.items():
        sources = [(frame, _fillings(frame, split, lexicon, phenomenon)) for frame in frames]
        pairs: list[tuple[Sentence, Sentence]] = []
        prefixes: set[str] = set()
        # A slot's rows can come round to the same sentence again; the bound turns too small a lexicon into an error.
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

    The two choices stand in alphabetical order, so that each position is right once per pair: a model that gives the
    same score to everything, NaN for example, is credited with 50 %.
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
    """Return grammatical sentences, one per line."""
    sentences = make_sentences("calibration", lexicon)
    lines = [" ".join(filter(None, (sentence.prefix, sentence.good, sentence.ending))) for sentence in sentences]
    return "".join(line + ".\n" for line in scattered(lines, "grammar"))


def make_files() -> dict[Path, str]:
    """Return the text of every file of this script by its path."""
    lexicon = read_lexicon()
    return {
        TASKS_FOLDER / "dse_grammar.jsonl": json_lines(make_documents(lexicon)),
        CALIBRATION_FOLDER / "grammar.txt": make_calibration(lexicon),
    }


if __name__ == "__main__":
    sys.exit(write_or_check(make_files(), None, "Generate dse_grammar and its calibration split."))
