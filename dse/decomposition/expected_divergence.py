"""What each tensor's decomposition is expected to cost, at every rank, before anything is decomposed or measured."""

from __future__ import annotations

import hashlib
import logging
from pathlib import Path

import numpy as np
import safetensors
import safetensors.numpy
from numpy.typing import NDArray

from dse.decomposition.calibration_text import CalibrationWindows
from dse.decomposition.fisher_svd import fisher_divergence
from dse.decomposition.gradient_gram import GradientGrams
from dse.decomposition.gram import DEFAULT_GRAM_BUDGET_BYTES, iterate_grams
from dse.decomposition.low_rank import as_matrix
from dse.files import cache_dir, write_bytes
from dse.models import LoadedModel
from dse.progress import ProgressCallback, ignore_progress

__all__ = ["expected_divergence"]

logger = logging.getLogger("dse")

_VERSION = "expected-divergence-1"


def expected_divergence(
    loaded: LoadedModel,
    calibration: CalibrationWindows,
    *,
    folder: Path | None = None,
    gram_budget_bytes: int = DEFAULT_GRAM_BUDGET_BYTES,
    progress: ProgressCallback = ignore_progress,
) -> dict[str, NDArray[np.float64]]:
    """Curves of divergence of every tensor inside the layers under `fisher_svd`, cached on disk.

    A few thousand tokens forward and backward say of all tensors and all ranks what measuring says of one option at a
    time. The estimate is of second order and lets tensors be independent, so its level is rough; which tensor can spare
    ranks it tells well (docs/search.md).

    Args:
        loaded: The dense model.
        calibration: Windows of calibration text.
        folder: Where estimates are kept; the user's cache by default.
        gram_budget_bytes: Memory for Gram matrices.
        progress: Called as ("calibrate", tokens, tokens) and ("gradients", tokens, tokens).

    Returns:
        Tensor name to the expected divergence in nats per token at ranks 0, 1, ..., min(shape).

    Raises:
        CalibrationError: A tensor takes no part in a forward pass.
        NonFiniteError: Activations or gradients are not finite.
    """
    key = hashlib.sha256("|".join((_VERSION, loaded.fingerprint, calibration.fingerprint)).encode()).hexdigest()[:16]
    path = (folder or cache_dir() / "expected_divergence") / f"{key}.safetensors"
    names = tuple(tensor.name for tensor in loaded.topology.tensors if tensor.layer is not None)
    if (known := _read(path, names)) is not None:
        return known
    gradients = GradientGrams(
        loaded.model, loaded.topology, names, calibration, budget_bytes=gram_budget_bytes, progress=progress
    )
    grams = iterate_grams(
        loaded.model, loaded.topology, names, calibration, budget_bytes=gram_budget_bytes, progress=progress
    )
    curves = {}
    for sharing, gram in grams:
        for name in sharing:
            weight = as_matrix(loaded.model.get_submodule(loaded.topology[name].module)).detach()
            curves[name] = fisher_divergence(weight, gram, gradients.take(name)).cpu().numpy()
    write_bytes(path, safetensors.numpy.save(curves))
    return curves


def _read(path: Path, names: tuple[str, ...]) -> dict[str, NDArray[np.float64]] | None:
    """The curves on disk; None where they are absent or damaged."""
    try:
        found = safetensors.numpy.load(path.read_bytes())
        return {name: found[name] for name in names}
    except FileNotFoundError:
        return None
    except (OSError, KeyError, safetensors.SafetensorError) as error:
        logger.warning("expected divergence %s is damaged (%s); it will be computed again", path, error)
        return None
