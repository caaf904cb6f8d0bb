"""Split general_heldout.txt into the documents of dse_text, a perplexity task on varied text.

python -m shipped_data.make_text            # writes the file
python -m shipped_data.make_text --check    # exit 1 if the file is out of date
"""

from __future__ import annotations

import re
import sys
from collections.abc import Iterator
from pathlib import Path

from shipped_data.generation import DATA_FOLDER, TASKS_FOLDER, json_lines, write_or_check

MAX_WORDS = 350


def _pieces(passage: str) -> Iterator[str]:
    """Yield the lines of a passage; split a line of more than MAX_WORDS words into parts of at most MAX_WORDS."""
    for line in passage.splitlines(keepends=True):
        words = re.findall(r"\s*\S+\s*", line)
        for start in range(0, len(words), MAX_WORDS):
            yield "".join(words[start : start + MAX_WORDS])


def make_documents(text: str) -> list[dict[str, str]]:
    """Return the passages of a text as documents of at most MAX_WORDS words.

    Blank lines separate passages. Passages are unrelated, so a document holds text of one passage only. A passage that
    is too long is split at the end of a line if possible.
    """
    documents: list[str] = []
    for passage in re.split(r"\n\s*\n", text.strip()):
        document = ""
        for piece in _pieces(passage):
            if document and len((document + piece).split()) > MAX_WORDS:
                documents.append(document)
                document = ""
            document += piece
        documents.append(document)
    return [{"text": document.strip()} for document in documents]


def make_files() -> dict[Path, str]:
    """Return path -> text of the generated file."""
    text = (DATA_FOLDER / "general_heldout.txt").read_text(encoding="utf-8")
    return {TASKS_FOLDER / "dse_text.jsonl": json_lines(make_documents(text))}


if __name__ == "__main__":
    sys.exit(write_or_check(make_files(), None, "Generate dse_text."))
