"""Resolve a model reference to files, and read the small files of sentence-transformers beside them."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers.utils.hub import cached_file

from dse.errors import ModelError, did_you_mean
from dse.models.demo import DEMO_MODELS, demo_model_folder
from dse.models.hub import ask_hub, short

__all__ = ["POOLING_FILE", "ModelSource", "read_sentence_files", "resolve"]

POOLING_FILE = "1_Pooling/config.json"

_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9_][\w.-]*)?", re.ASCII)
_PICKLES = (".bin", ".pt", ".pth", ".ckpt")
_SENTENCE_FILES = ("modules.json", POOLING_FILE, "sentence_bert_config.json", "config_sentence_transformers.json")
_MAX_SENTENCE_FILE_BYTES = 2**20
_FORMS = "a hub id like 'HuggingFaceTB/SmolLM2-135M', a local folder, a .gguf file, or 'demo:smollm2-135m-instruct'"


@dataclass(frozen=True)
class ModelSource:
    """The files of a model, as `from_pretrained` finds them.

    Attributes:
        location: Local folder or hub id.
        gguf_file: Name of a GGUF file in that folder; None for safetensors.
        revision: Branch, tag or commit on the hub.
        local_files_only: Whether the hub cannot be reached, so that only its cache is used.
        has_weights: Whether there are safetensors (or a GGUF file); False for a folder with only a config.
        has_pickles: Whether there are PyTorch files, which are never opened.
    """

    location: str
    gguf_file: str | None = None
    revision: str | None = None
    local_files_only: bool = False
    has_weights: bool = True
    has_pickles: bool = False

    def keywords(self, trust_remote_code: bool) -> dict[str, Any]:
        """Keyword arguments of `from_pretrained` that read these files."""
        found: dict[str, Any] = {"trust_remote_code": trust_remote_code, "local_files_only": self.local_files_only}
        if self.revision is not None:
            found["revision"] = self.revision
        if self.gguf_file is not None:
            found["gguf_file"] = self.gguf_file
        return found

    def file(self, name: str) -> Path | None:
        """Path of one of the files, in the folder or in the hub's cache; None if it is not there."""
        path = Path(self.location) / name
        if Path(self.location).is_dir():
            return path if path.is_file() else None
        cached = cached_file(
            self.location,
            name,
            revision=self.revision,
            local_files_only=self.local_files_only,
            _raise_exceptions_for_gated_repo=False,
            _raise_exceptions_for_missing_entries=False,
            _raise_exceptions_for_connection_errors=False,
        )
        return None if cached is None else Path(cached)


def resolve(ref: str, revision: str | None = None) -> ModelSource:
    """Find the files of `ref`.

    Args:
        ref: A hub id, a local folder, a `.gguf` file, or `demo:<name>` (fetched if not in the cache).
        revision: Branch, tag or commit; only for hub ids.

    Raises:
        ModelError: `ref` is none of these, nothing is there, or the hub does not know the model.
    """
    text = ref.strip() if isinstance(ref, str) else ""
    if not text:
        raise ModelError(f"a model must be {_FORMS}, but got {ref!r}")
    if text.startswith("demo:"):
        _refuse_revision(text, revision)
        name = text.removeprefix("demo:")
        return ModelSource(str(demo_model_folder(name)), gguf_file=DEMO_MODELS[name].gguf_file)
    path = Path(text).expanduser()
    if _exists(path):
        _refuse_revision(text, revision)
        return _local_source(path)
    if _HUB_ID.fullmatch(text) and not text.endswith(".gguf") and ".." not in text and "--" not in text:
        return _hub_source(text, revision)
    demos = [f"demo:{name}" for name in DEMO_MODELS]
    hint = did_you_mean(text, demos) or did_you_mean(path.name, _siblings(path))
    raise ModelError(f"a model must be {_FORMS}, but nothing is at '{short(text)}'{hint}")


def read_sentence_files(source: ModelSource) -> Mapping[str, str]:
    """Contents of sentence-transformers' files beside the weights, by path; empty if there are none.

    Args:
        source: Location of the model; for a hub model, the cache is tried first.
    """
    found = {}
    for name in _SENTENCE_FILES:
        path = source.file(name)
        if path is not None and path.stat().st_size <= _MAX_SENTENCE_FILE_BYTES:
            found[name] = path.read_text(encoding="utf-8", errors="replace")
    return found


def _local_source(path: Path) -> ModelSource:
    if path.is_file():
        if path.suffix.lower() != ".gguf":
            raise ModelError(
                f"a model file must be a .gguf file, but got '{path}'; for safetensors name the folder that holds it"
            )
        return ModelSource(str(path.parent), gguf_file=path.name)
    if (path / "adapter_config.json").is_file():
        raise ModelError(
            f"a model must hold its own weights, but '{path}' is an adapter; merge it into its base model first, for"
            f" example with peft's `merge_and_unload()`"
        )
    safetensors = sorted(path.glob("*.safetensors"))
    gguf = sorted(path.glob("*.gguf"))
    has_config = (path / "config.json").is_file()
    if gguf and not (has_config and safetensors):
        if len(gguf) > 1:
            names = ", ".join(file.name for file in gguf[:5])
            raise ModelError(f"a folder must hold one GGUF file, but '{path}' holds {names}; name the file itself")
        return ModelSource(str(path), gguf_file=gguf[0].name)
    if not has_config:
        raise ModelError(f"a model folder must hold a config.json or one .gguf file, but '{path}' has neither")
    has_pickles = any(file.name.endswith(_PICKLES) for file in path.iterdir())
    return ModelSource(str(path), has_weights=bool(safetensors), has_pickles=has_pickles)


def _hub_source(model_id: str, revision: str | None) -> ModelSource:
    files = ask_hub(model_id, revision)
    return ModelSource(
        model_id,
        revision=revision,
        local_files_only=files is None,
        has_weights=not files or any(name.endswith(".safetensors") for name in files),
        has_pickles=any(name.endswith(_PICKLES) for name in files or ()),
    )


def _refuse_revision(ref: str, revision: str | None) -> None:
    if revision is not None:
        raise ModelError(f"a revision is for hub models only, but '{ref}' is local; leave out revision='{revision}'")


def _exists(path: Path) -> bool:
    try:
        return path.exists()
    except (OSError, ValueError):  # too long, or contains a null byte
        return False


def _siblings(path: Path) -> list[str]:
    try:
        return [entry.name for entry in path.parent.iterdir()]
    except (OSError, ValueError):
        return []
