"""The small files by which sentence-transformers knows how to turn hidden states into one vector."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from transformers.utils.hub import cached_file

from dse.models.reference import ModelSource

__all__ = ["POOLING_FILE", "read_sentence_files"]

POOLING_FILE = "1_Pooling/config.json"
_FILES = ("modules.json", POOLING_FILE, "sentence_bert_config.json", "config_sentence_transformers.json")
_MOST_BYTES = 2**20


def read_sentence_files(source: ModelSource) -> Mapping[str, str]:
    """Texts of sentence-transformers' files beside the weights, by path; empty where there are none.

    Args:
        source: Where the model lies; of the hub, its cache is asked first.
    """
    found = {}
    for name in _FILES:
        path = Path(source.location) / name
        if not Path(source.location).is_dir():
            cached = cached_file(
                source.location,
                name,
                revision=source.revision,
                local_files_only=source.local_files_only,
                _raise_exceptions_for_gated_repo=False,
                _raise_exceptions_for_missing_entries=False,
                _raise_exceptions_for_connection_errors=False,
            )
            if cached is None:
                continue
            path = Path(cached)
        if path.is_file() and path.stat().st_size <= _MOST_BYTES:
            found[name] = path.read_text(encoding="utf-8", errors="replace")
    return found
