"""Refitted factors of whole points, with the most recent ones cached on disk.

A refit takes some seconds, and a point is requested more than once: by its trial, by the final documents, by an export.
The left factors are as large as the point, so only the most recent ones are kept.
"""

from __future__ import annotations

import hashlib
import logging
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import safetensors
import safetensors.torch

from dse.decomposition.calibration_text import CalibrationWindows
from dse.decomposition.factors import LowRankFactors
from dse.decomposition.methods import METHODS
from dse.decomposition.mlp_width import ChannelFactors
from dse.decomposition.refit import refit_factors
from dse.design_point import DesignPoint, TensorChoice
from dse.errors import CalibrationError
from dse.files import disk_errors, write_bytes
from dse.models import LoadedModel
from dse.progress import ProgressCallback

__all__ = ["REFIT_TOKENS", "REFIT_VERSION", "PointRefitter", "RefittedFactors", "is_refitted", "is_refitting"]

logger = logging.getLogger("dse")

REFIT_TOKENS = 4096
"""Calibration tokens of a refit. It must stay a small part of a trial."""

REFIT_VERSION = "refit-1"
"""Part of the identity of refitted factors. Increase it when refits change."""

_MAX_BYTES = 2**30
_REFITTING = frozenset(name for name, method in METHODS.items() if method.refit_of)


def is_refitting(choice: TensorChoice) -> bool:
    """Whether this choice's method refits factors to the whole point."""
    return choice.method in _REFITTING


def is_refitted(point: DesignPoint) -> bool:
    """Whether a tensor of the point uses a method that refits."""
    return any(is_refitting(choice) for _, choice in point)


@dataclass(frozen=True, eq=False)
class RefittedFactors:
    """The factors of one point: a `FactorSource` for that point only."""

    by_name: Mapping[str, LowRankFactors]
    channels_of: Callable[[str], ChannelFactors]

    def channels(self, name: str) -> ChannelFactors:
        """The ordered channels of an MLP; a refit does not change them."""
        return self.channels_of(name)

    def factors(self, name: str, choice: TensorChoice) -> LowRankFactors:
        """Factors of one of the point's tensors."""
        return self.by_name[name]


@dataclass(frozen=True, eq=False)
class PointRefitter:
    """Refits points on the resident dense model.

    Attributes:
        loaded: The model, which must be dense during a refit.
        windows: Calibration text; None if no method is calibrated.
        progress: Called as ("refit", tensors, tensors).
    """

    loaded: LoadedModel
    windows: CalibrationWindows | None
    progress: ProgressCallback

    def refit(
        self,
        point: DesignPoint,
        stored: Callable[[str, TensorChoice], LowRankFactors],
        channels: Callable[[str], ChannelFactors],
        folder: Path,
    ) -> RefittedFactors:
        """The refitted factors of a point, read from disk if cached.

        Args:
            point: Uses a refitting method for at least one tensor.
            stored: Returns the bank's factors of a tensor.
            channels: Returns the ordered channels of an MLP.
            folder: Where refits are cached.

        Raises:
            CalibrationError: There is no calibration text.
            NonFiniteError: The decomposed model's activations are not finite.
            StorageFullError: The folder cannot be written.
        """
        factors = {name: stored(name, choice) for name, choice in point.decomposed}
        refitted = frozenset(name for name, choice in point if is_refitting(choice))
        if (known := _read(folder, point, factors, refitted)) is not None:
            return RefittedFactors(known, channels)
        if self.windows is None:
            raise CalibrationError("refitting a point needs calibration text, but none was given")
        found = refit_factors(
            self.loaded.model,
            self.loaded.topology,
            factors,
            refitted,
            point.removed,
            {name: (channels(name), width) for name, width in point.widths.items()},
            self.windows.spread(REFIT_TOKENS),
            progress=self.progress,
        )
        _write(folder, point, {name: found[name] for name in refitted})
        return RefittedFactors(found, channels)


def _read(
    folder: Path, point: DesignPoint, factors: Mapping[str, LowRankFactors], refitted: frozenset[str]
) -> dict[str, LowRankFactors] | None:
    """The point's factors with refitted left factors from disk; None if there is no intact file."""
    for path in sorted(folder.glob(f"{point.id}-*.safetensors")):
        try:
            content = path.read_bytes()
            if not path.stem.endswith(_digest(content)):
                raise ValueError("its digest differs")
            lefts = safetensors.torch.load(content)
            os.utime(path)  # marks it as recently used
            return {**factors, **{name: LowRankFactors(lefts[name], factors[name].right) for name in refitted}}
        except (OSError, ValueError, KeyError, safetensors.SafetensorError) as error:
            logger.warning("the cached refit %s is damaged (%s); the point will be refitted", path, error)
            path.unlink(missing_ok=True)
    return None


def _write(folder: Path, point: DesignPoint, found: Mapping[str, LowRankFactors]) -> None:
    content = safetensors.torch.save({name: factors.left.contiguous() for name, factors in found.items()})
    write_bytes(folder / f"{point.id}-{_digest(content)}.safetensors", content)
    with disk_errors(folder):
        _drop_oldest(folder)


def _drop_oldest(folder: Path) -> None:
    """Keep the most recent files within the size limit, at least one."""
    used = 0
    files = [(path, path.stat()) for path in folder.glob("*.safetensors")]
    for index, (path, status) in enumerate(sorted(files, key=lambda file: file[1].st_mtime_ns, reverse=True)):
        used += status.st_size
        if index and used > _MAX_BYTES:
            path.unlink(missing_ok=True)


def _digest(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()[:16]
