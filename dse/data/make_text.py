"""Cut general_heldout.txt into the documents of dse_text, a perplexity task over text of many kinds.

python -m dse.data.make_text            # writes the file
python -m dse.data.make_text --check    # exit 1 if it differs from what would be written
"""

from __future__ import annotations

import re
import sys
from collections.abc import Iterator
from pathlib import Path

from dse.data.generation import DATA_FOLDER, TASKS_FOLDER, json_lines, write_or_check

MAX_WORDS = 350


def _pieces(passage: str) -> Iterator[str]:
    """Yield a passage in lines, and a line of more than MAX_WORDS words in parts of at most that many."""
    for line in passage.splitlines(keepends=True):
        words = re.findall(r"\s*\S+\s*", line)
        for start in range(0, len(words), MAX_WORDS):
            yield "".join(words[start : start + MAX_WORDS])


def make_documents(text: str) -> list[dict[str, str]]:
    """Return the passages of a text as documents of at most MAX_WORDS words.

    Passages are parted by blank lines, and two never share a document, because they have nothing to do with each other.
    One that is too long is cut at the end of a line where that is possible.
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
    """Return the text of the one file of this script by its path."""
    text = (DATA_FOLDER / "general_heldout.txt").read_text(encoding="utf-8")
    return {TASKS_FOLDER / "dse_text.jsonl": json_lines(make_documents(text))}


if __name__ == "__main__":
    sys.exit(write_or_check(make_files(), None, "Generate dse_text."))
