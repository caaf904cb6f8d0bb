"""Shared by the generating scripts: a fixed pseudo-random order, and writing or checking the files."""

from __future__ import annotations

import argparse
import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TypeVar

T = TypeVar("T")

DATA_FOLDER = Path(__file__).resolve().parents[3] / "dse" / "data"
SOURCES_FOLDER = Path(__file__).parent / "sources"
TASKS_FOLDER = DATA_FOLDER / "tasks"
CALIBRATION_FOLDER = DATA_FOLDER / "calibration"


def scattered(items: Iterable[T], salt: str) -> list[T]:
    """Return `items` in a fixed pseudo-random order: by the SHA-256 of `salt` and their repr.

    `random.shuffle` does not guarantee the same result in every Python version.
    """
    return sorted(items, key=lambda item: hashlib.sha256(f"{salt}|{item!r}".encode()).digest())


def json_lines(documents: Iterable[Mapping[str, object]]) -> str:
    """Return one JSON object per line, with keys in their given order and a final newline."""
    return "".join(json.dumps(document, ensure_ascii=False) + "\n" for document in documents)


def write_or_check(files: Mapping[Path, str], arguments: Sequence[str] | None, description: str) -> int:
    """Write the generated files, or with `--check` compare them with the files on disk.

    Args:
        files: Path -> generated text.
        arguments: Command line without the program name; None means `sys.argv`.
        description: First line of `--help`.

    Returns:
        Exit status: 1 if `--check` found a missing or different file, else 0.
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
            print(f"{path} must be what the script generates, but differs; run it without --check")
            stale += 1
    return 1 if stale else 0
