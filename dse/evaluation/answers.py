"""Cached answers of a model, document by document, reused by a larger share of the documents or a later run.

Answers belong to one state of one model under one configuration: its identity. The key of a document is a digest of its
task's definition and version, its row, and all its requests, so a changed task file finds no answers.
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
"""The answer to a log-likelihood (value, is greedy), rolling log-likelihood or generation request."""

DocumentAnswers = list[list[Answer]]
"""One list per request, in their order, with one answer per repetition."""


@dataclass
class Answers:
    """Answers of one state of a model.

    Attributes:
        by_document: Digest of a document to its answers.
        reused: Documents of the last evaluation whose answers were known.
        scored: Documents of the last evaluation that the model had to answer.
    """

    by_document: dict[str, DocumentAnswers] = field(default_factory=dict)
    reused: int = 0
    scored: int = 0


class EvaluationCache:
    """Answers on disk, one file per state of a model; a damaged file counts as missing and is rewritten."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def read(self, identity: Mapping[str, str]) -> Answers:
        """The stored answers for a state of a model; empty if there is no file or it is damaged.

        Args:
            identity: Everything an answer depends on besides the document: model, point, factors, dtype, versions, ...
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
        """Store answers, merged with those that another process may have written in the meantime.

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
        """Delete the stored answers for a state of a model."""
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
    """Turn JSON lists back into tuples; floats survive JSON unchanged."""
    if isinstance(value, str) or (isinstance(value, float) and math.isfinite(value)):
        return value
    score, is_greedy = value
    if not (isinstance(score, float) and math.isfinite(score) and isinstance(is_greedy, bool)):
        raise ValueError("answer")
    return score, is_greedy


def _canonical(value: Any) -> bytes:
    return json.dumps(value, sort_keys=True, separators=(",", ":"), allow_nan=False).encode()
