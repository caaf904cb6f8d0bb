"""What the generating scripts share: an order that looks random and never changes, and writing or checking files."""

from __future__ import annotations

import argparse
import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TypeVar

T = TypeVar("T")

DATA_FOLDER = Path(__file__).parent
SOURCES_FOLDER = DATA_FOLDER / "sources"
TASKS_FOLDER = DATA_FOLDER / "tasks"
CALIBRATION_FOLDER = DATA_FOLDER / "calibration"


def scattered(items: Iterable[T], salt: str) -> list[T]:
    """Return `items` ordered by the SHA-256 of `salt` and their repr.

    Not `random.shuffle`, whose result is not promised to be the same in every Python version.
    """
    return sorted(items, key=lambda item: hashlib.sha256(f"{salt}|{item!r}".encode()).digest())


def json_lines(documents: Iterable[Mapping[str, object]]) -> str:
    """Return one JSON object per line, keys in their own order, with a newline at the end."""
    return "".join(json.dumps(document, ensure_ascii=False) + "\n" for document in documents)


def write_or_check(files: Mapping[Path, str], arguments: Sequence[str] | None, description: str) -> int:
    """Write the generated files, or with `--check` compare them with those on disk.

    Args:
        files: Generated text by the path it belongs to.
        arguments: Command line without the program's name; None reads `sys.argv`.
        description: First line of `--help`.

    Returns:
        Exit status: 0, or 1 when `--check` found a file that is missing or differs.
    """
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--check", action="store_true", help="write nothing; exit 1 if a file on disk differs")
    is_check = parser.parse_args(arguments).check
    stale = 0
    for path, text in files.items():
        content = text.encode()
        if not is_check:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(content)
            print(f"wrote {path} ({len(text.splitlines())} lines)")
        elif not path.is_file() or path.read_bytes() != content:
            print(f"differs from what the script generates: {path}; run it without --check")
            stale += 1
    return 1 if stale else 0
