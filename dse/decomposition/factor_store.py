"""Factors of one method on disk: one safetensors file per tensor, and a manifest with the digest of each.

For method `width` a file holds the ordered channels of one MLP and its Cholesky factor, which serve all widths.

Left factors are stored transposed, so that the leading r columns of both factors are one contiguous slice of a
memory-mapped file: reading rank 8 of a factor built to rank 256 touches 8 rows. Tucker factors of fused expert tensors
are stored whole, one file per choice of ranks.
"""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import safetensors.torch
from safetensors import safe_open
from torch import Tensor

from dse.decomposition.factors import LowRankFactors, TuckerFactors
from dse.decomposition.mlp_width import ChannelFactors
from dse.files import write_bytes

__all__ = ["SCHEMA_VERSION", "FactorStore"]

logger = logging.getLogger("dse")

SCHEMA_VERSION = 1


class FactorStore:
    """The factors of one (model, method, calibration text) in one folder.

    A file is valid only if the manifest lists it with its size and SHA-256. The manifest is written after the file, and
    both are replaced atomically, so the store stays consistent if the process is killed at any moment. After a loss of
    power, a file that did not reach the disk is noticed by its digest and built again.
    """

    def __init__(self, folder: Path, identity: dict[str, str]) -> None:
        self.folder = folder
        self.identity = identity
        self._manifest = folder / "manifest.json"
        self._entries: dict[str, dict[str, Any]] = {}
        self._verified: set[str] = set()

    def open(self, names: Iterable[str]) -> None:
        """Read the manifest and verify the files of `names`. Damaged or absent files are dropped, to be built again."""
        self._entries = self._read_manifest()
        known = [name for name in names if name in self._entries]
        with ThreadPoolExecutor() as pool:  # hashlib releases the GIL, so files are hashed in parallel
            intact = list(pool.map(self._is_intact, known))
        for name, good in zip(known, intact, strict=True):
            if not good:
                logger.warning("factor bank: %s of %s is damaged; it will be built again", name, self.folder)
                del self._entries[name]

    def rank(self, name: str) -> int:
        """Largest stored rank of this tensor; 0 if it is not stored."""
        return int(self._entries[name]["rank"]) if name in self._entries else 0

    def put(self, name: str, factors: LowRankFactors) -> None:
        """Write the factors of one tensor, then the manifest.

        Raises:
            StorageFullError: The disk is full or the folder cannot be written.
        """
        tensors = {"left_transposed": factors.left.T.cpu().contiguous(), "right": factors.right.cpu().contiguous()}
        if factors.core is not None:
            tensors["core"] = factors.core.cpu().contiguous()
        self._write(name, tensors, factors.rank)

    def put_experts(self, name: str, factors: TuckerFactors) -> None:
        """Write the factors of one fused expert tensor at its ranks, then the manifest.

        Raises:
            StorageFullError: The disk is full or the folder cannot be written.
        """
        tensors = {key: factor.cpu().contiguous() for key, factor in vars(factors).items() if factor is not None}
        self._write(_at_ranks(name, factors.ranks), tensors, max(factors.ranks[1:]))

    def get_experts(self, name: str, ranks: Sequence[int]) -> TuckerFactors | None:
        """Factors of a fused expert tensor at exactly these ranks; None if absent or damaged."""
        key = _at_ranks(name, ranks)
        if key not in self._verified:  # once per process, since the files are large
            if key not in self._entries:
                return None
            if not self._is_intact(key):
                logger.warning("factor bank: %s of %s is damaged; it will be built again", key, self.folder)
                return None
            self._verified.add(key)
        return TuckerFactors(**safetensors.torch.load_file(self._path(key)))

    def put_channels(self, name: str, factors: ChannelFactors) -> None:
        """Write what every width of one MLP is computed from, then the manifest.

        Raises:
            StorageFullError: The disk is full or the folder cannot be written.
        """
        self._write(name, {key: tensor.contiguous() for key, tensor in vars(factors).items()}, len(factors.channels))

    def get_channels(self, name: str) -> ChannelFactors:
        """What every width of one MLP is computed from; the tensors are memory-mapped."""
        return ChannelFactors(**safetensors.torch.load_file(self._path(name)))

    def _write(self, key: str, tensors: dict[str, Tensor], rank: int) -> None:
        content = safetensors.torch.save(tensors)
        write_bytes(self._path(key), content, is_durable=False)
        self._entries[key] = {"rank": rank, "bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}
        manifest = {"schema": SCHEMA_VERSION, **self.identity, "tensors": self._entries}
        write_bytes(self._manifest, json.dumps(manifest, indent=1).encode(), is_durable=False)

    def get(self, name: str, rank: int) -> LowRankFactors:
        """The leading `rank` columns of this tensor's factors, float32 on the CPU."""
        with safe_open(self._path(name), framework="pt") as file:
            left = file.get_slice("left_transposed")[:rank].T.contiguous()
            right = file.get_slice("right")[:rank]
            core = file.get_slice("core")[:rank, :rank] if "core" in file.keys() else None  # noqa: SIM118 - not a mapping
        return LowRankFactors(left, right, core)

    def _path(self, name: str) -> Path:
        return self.folder / f"{name}.safetensors"

    def _read_manifest(self) -> dict[str, dict[str, Any]]:
        try:
            manifest = json.loads(self._manifest.read_text(encoding="utf-8"))
            expected = {"schema": SCHEMA_VERSION, **self.identity}
            if any(manifest[key] != value for key, value in expected.items()):
                return {}
            return {
                str(name): {"rank": int(e["rank"]), "bytes": int(e["bytes"]), "sha256": str(e["sha256"])}
                for name, e in manifest["tensors"].items()
            }
        except FileNotFoundError:
            return {}
        except (OSError, ValueError, KeyError, TypeError, AttributeError):
            logger.warning("factor bank: %s is damaged; the bank will be built again", self._manifest)
            return {}

    def _is_intact(self, name: str) -> bool:
        entry, path = self._entries[name], self._path(name)
        try:
            if path.stat().st_size != entry["bytes"]:
                return False
            with path.open("rb") as stream:
                return hashlib.file_digest(stream, "sha256").hexdigest() == str(entry["sha256"])
        except OSError:
            return False


def _at_ranks(name: str, ranks: Sequence[int]) -> str:
    """Key of a fused expert tensor at these ranks."""
    return f"{name}@{'x'.join(map(str, ranks))}"
