"""Generate the sentence pairs of dse_sentence_pairs from the lexicon of dse_grammar.

    python -m shipped_data.make_sentence_pairs            # writes the file
    python -m shipped_data.make_sentence_pairs --check    # exit 1 if the file is out of date

The pairs have no labels: the task compares a decomposed sentence encoder with the dense one. Three degrees spread the
similarities: the two sides of a minimal pair, which differ in one or two words; two sentences of one phenomenon, which
have the same form but different words; and two sentences of different phenomena.
"""

from __future__ import annotations

import sys
from pathlib import Path

from shipped_data.generation import TASKS_FOLDER, json_lines, scattered, write_or_check
from shipped_data.make_grammar import Lexicon, Sentence, make_sentences, read_lexicon

__all__ = ["PAIRS_PER_PHENOMENON", "make_files", "make_pairs"]

PAIRS_PER_PHENOMENON = 5
"""Number of pairs per degree whose first sentence is of a given phenomenon."""


def make_pairs(lexicon: Lexicon) -> list[dict[str, str]]:
    """Return the pairs in a fixed pseudo-random order of degrees and phenomena."""
    by_phenomenon: dict[str, list[Sentence]] = {}
    for sentence in make_sentences("test", lexicon):
        by_phenomenon.setdefault(sentence.phenomenon, []).append(sentence)
    names = list(by_phenomenon)
    pairs = []
    for position, name in enumerate(names):
        own, other = by_phenomenon[name], by_phenomenon[names[(position + 1) % len(names)]]
        for index in range(PAIRS_PER_PHENOMENON):
            first = own[2 * index]  # the two sides of a minimal pair are adjacent
            for degree, second in (
                ("minimal_pair", own[2 * index + 1]),
                ("same_phenomenon", own[2 * index + 2]),
                ("different_phenomena", other[2 * index]),
            ):
                pairs.append({"degree": degree, "sentence1": _whole(first), "sentence2": _whole(second)})
    return scattered(pairs, "sentence_pairs")


def make_files() -> dict[Path, str]:
    """Return path -> text of every generated file."""
    return {TASKS_FOLDER / "dse_sentence_pairs.jsonl": json_lines(make_pairs(read_lexicon()))}


def _whole(sentence: Sentence) -> str:
    return " ".join(filter(None, (sentence.prefix, sentence.good, sentence.ending))) + "."


if __name__ == "__main__":
    sys.exit(write_or_check(make_files(), None, "Generate dse_sentence_pairs."))
