"""A model's answers, document by document: scored once, then reused by a larger share of the documents or a later run.

Answers belong to one state of one model, run in one way: its identity. A document is known by a digest of its task's
definition and version, its row, and every request made of it, so that a task file that was changed finds nothing.
"""

from __future__ import annotations

import gzip
import hashlib
import json
import logging
import math
import zlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import filelock

from dse.files import disk_errors, write_bytes

__all__ = ["Answers", "EvaluationCache"]

logger = logging.getLogger("dse")

_SCHEMA_VERSION = 1

Answer = tuple[float, bool] | float | str
"""Of a log-likelihood, of a rolling log-likelihood, of a generation."""

DocumentAnswers = list[list[Answer]]
"""One list a request, in the order of the requests, of one answer a repetition."""


@dataclass
class Answers:
    """Answers of one state of a model.

    Attributes:
        by_document: Digest of the document to its answers.
        reused: Documents of the last evaluation whose answers were here before it.
        scored: Documents of the last evaluation that the model was asked.
    """

    by_document: dict[str, DocumentAnswers] = field(default_factory=dict)
    reused: int = 0
    scored: int = 0


class EvaluationCache:
    """Answers on the disk, one file for each state of a model; a damaged file counts as none and is written anew."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def read(self, identity: Mapping[str, str]) -> Answers:
        """The answers kept for a state of a model; none where nothing was kept, or it is damaged.

        Args:
            identity: Everything an answer depends on beside the document: model, point, factors, dtype, versions, ...
        """
        path = self._path(identity)
        try:
            content = path.read_bytes()
        except FileNotFoundError:
            return Answers()
        except OSError as error:
            logger.warning("%s cannot be read (%s); its documents are evaluated again", path, error.strerror)
            return Answers()
        try:
            return Answers(_decoded(content, identity))
        except (ValueError, KeyError, TypeError, AttributeError, EOFError, OSError, zlib.error) as error:
            logger.warning("%s is damaged (%s); its documents are evaluated again", path, type(error).__name__)
            return Answers()

    def write(self, identity: Mapping[str, str], answers: Answers) -> None:
        """Keep answers, beside those that another process may have written meanwhile.

        Raises:
            StorageFullError: The disk is full or the folder cannot be written.
        """
        path = self._path(identity)
        with disk_errors(path):
            path.parent.mkdir(parents=True, exist_ok=True)
            with filelock.FileLock(path.with_suffix(".lock")):
                merged = {**self.read(identity).by_document, **answers.by_document}
                write_bytes(path, _encoded(identity, merged))

    def discard(self, identity: Mapping[str, str]) -> None:
        """Forget what was kept for a state of a model."""
        for path in (self._path(identity), self._path(identity).with_suffix(".lock")):
            path.unlink(missing_ok=True)

    def _path(self, identity: Mapping[str, str]) -> Path:
        digest = hashlib.sha256(_canonical({"schema": _SCHEMA_VERSION, **identity})).hexdigest()
        return self.folder / digest[:2] / f"{digest[:32]}.json.gz"


def _encoded(identity: Mapping[str, str], documents: Mapping[str, DocumentAnswers]) -> bytes:
    body = _canonical({"identity": dict(identity), "documents": documents})
    return gzip.compress(hashlib.sha256(body).hexdigest().encode() + b"\n" + body, compresslevel=6, mtime=0)


def _decoded(content: bytes, identity: Mapping[str, str]) -> dict[str, DocumentAnswers]:
    checksum, _, body = gzip.decompress(content).partition(b"\n")
    if hashlib.sha256(body).hexdigest().encode() != checksum:
        raise ValueError("checksum")
    data = json.loads(body)
    if data["identity"] != dict(identity):
        raise ValueError("identity")
    return {
        str(key): [[_answer(a) for a in repeats] for repeats in requests] for key, requests in data["documents"].items()
    }


def _answer(value: Any) -> Answer:
    """JSON has no tuples; a float comes back as the very same float."""
    if isinstance(value, str):
        return value
    if isinstance(value, float) and math.isfinite(value):
        return value
    score, is_greedy = value
    if not (isinstance(score, float) and math.isfinite(score) and isinstance(is_greedy, bool)):
        raise ValueError("answer")
    return score, is_greedy


def _canonical(value: Any) -> bytes:
    return json.dumps(value, sort_keys=True, separators=(",", ":"), allow_nan=False).encode()
