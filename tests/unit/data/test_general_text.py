"""The shipped texts: size, encoding, no repetition, and no overlap of held-out and calibration text."""

from __future__ import annotations

import re
import unicodedata
from collections import Counter
from pathlib import Path

import pytest

DATA = Path(__file__).resolve().parents[3] / "dse" / "data"
CALIBRATION = DATA / "calibration" / "general.txt"
HELD_OUT = DATA / "general_heldout.txt"
BOTH = pytest.mark.parametrize("path", [CALIBRATION, HELD_OUT], ids=lambda path: path.stem)

# Sentences of up to five words ("It was raining.") may recur by chance; a longer one is a leak.
LONGEST_CHANCE_SENTENCE_WORDS = 5
# Texts on different topics share idioms, but almost never eight consecutive words.
LEAK_WINDOW_WORDS = 8


def words(text: str) -> list[str]:
    return re.findall(r"\w+(?:['’]\w+)*", text.lower())


def passages(path: Path) -> list[str]:
    return [block.strip() for block in path.read_text(encoding="utf-8").split("\n\n")]


def sentences(text: str) -> list[tuple[str, ...]]:
    """Sentences as word tuples, so that case, spacing and quotation marks do not hide a repetition."""
    pieces = (tuple(words(piece)) for piece in re.split(r"[.!?;:]+[\s\"”’)]+|\n", text))
    return [piece for piece in pieces if len(piece) > LONGEST_CHANCE_SENTENCE_WORDS]


def windows(text: str, size: int) -> set[tuple[str, ...]]:
    tokens = words(text)
    return {tuple(tokens[i : i + size]) for i in range(len(tokens) - size + 1)}


@pytest.mark.parametrize(
    ("path", "least_words", "most_words"),
    [(CALIBRATION, 10_500, 13_000), (HELD_OUT, 3_800, 5_500)],
    ids=["calibration", "held-out"],
)
def test_size(path: Path, least_words: int, most_words: int) -> None:
    assert least_words <= len(path.read_text(encoding="utf-8").split()) <= most_words


@BOTH
def test_is_utf8_without_control_characters(path: Path) -> None:
    text = path.read_bytes().decode("utf-8", errors="strict")
    # Cc: control, Cf: invisible (byte-order mark, zero-width), Co/Cn: private or unassigned.
    unwanted = {c for c in text if c != "\n" and unicodedata.category(c) in {"Cc", "Cf", "Co", "Cn", "Cs"}}
    assert unwanted == set()
    assert "\ufffd" not in text
    assert text == unicodedata.normalize("NFC", text)


@BOTH
def test_layout(path: Path) -> None:
    text = path.read_bytes().decode("utf-8")
    assert text.endswith("\n")
    assert "\n\n\n" not in text
    assert not re.search(r"[ \t]+$", text, flags=re.MULTILINE)


@BOTH
def test_no_passage_or_sentence_repeats(path: Path) -> None:
    blocks = passages(path)
    assert all(blocks)
    assert [block for block, count in Counter(blocks).items() if count > 1] == []
    assert [s for s, count in Counter(sentences("\n".join(blocks))).items() if count > 1] == []


def test_held_out_shares_no_sentence_with_calibration() -> None:
    calibration, held_out = (path.read_text(encoding="utf-8") for path in (CALIBRATION, HELD_OUT))
    assert len(sentences(held_out)) > 200  # the splitter works
    assert set(sentences(calibration)) & set(sentences(held_out)) == set()
    # An independent criterion that does not depend on sentence boundaries.
    assert windows(calibration, LEAK_WINDOW_WORDS) & windows(held_out, LEAK_WINDOW_WORDS) == set()


@BOTH
def test_is_diverse(path: Path) -> None:
    """No template text: all passages start differently, and the vocabulary is large for the length."""
    blocks = passages(path)
    openings = {tuple(words(block)[:3]) for block in blocks}
    assert len(openings) == len(blocks)
    tokens = words(path.read_text(encoding="utf-8"))
    # A thousand words of ordinary mixed text have well over 400 distinct words.
    stretches = [tokens[i : i + 1000] for i in range(0, len(tokens) - 999, 1000)]
    assert min(len(set(stretch)) for stretch in stretches) > 400
