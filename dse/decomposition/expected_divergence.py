"""The expected KL divergence of each tensor at every rank, and of each MLP at every width, without a measurement."""

from __future__ import annotations

import hashlib
import logging
from pathlib import Path

import numpy as np
import safetensors
import safetensors.numpy
from numpy.typing import NDArray

from dse.decomposition.bank_build import dense_weight
from dse.decomposition.calibration_text import CalibrationWindows
from dse.decomposition.fisher_svd import fisher_divergence
from dse.decomposition.layer_grams import GramSettings, iterate_layer_grams
from dse.decomposition.mlp_width import channel_factors
from dse.files import cache_dir, write_bytes
from dse.models import LoadedModel
from dse.progress import ProgressCallback, ignore_progress

__all__ = ["expected_divergence"]

logger = logging.getLogger("dse")

_VERSION = "expected-damage-1"  # part of the cache key, so the name of the first release stays
_WIDTH_VERSION = "widths-1"


def expected_divergence(
    loaded: LoadedModel,
    calibration: CalibrationWindows,
    *,
    with_widths: bool = False,
    folder: Path | None = None,
    settings: GramSettings | None = None,
    progress: ProgressCallback = ignore_progress,
) -> dict[str, NDArray[np.float64]]:
    """Expected divergence of `fisher_svd` for every tensor inside the layers, as a curve over ranks, cached on disk.

    One forward and backward pass over a few thousand tokens covers all tensors and ranks, while a measurement covers
    one option at a time. The estimate is of second order and treats tensors as independent, so its level is rough. It
    ranks tensors well by how much rank they can lose (docs/figures.md).

    Args:
        loaded: The dense model.
        calibration: Windows of calibration text.
        with_widths: Whether to add the curves of MLPs over their widths.
        folder: Where estimates are cached; by default in the user's cache.
        settings: Devices that share the windows, and memory for hidden states and Gram matrices.
        progress: Called as ("calibrate", tokens, tokens) and ("gradients", tokens, tokens).

    Returns:
        Tensor name to the expected divergence in nats per token at ranks 0, 1, ..., min(shape); with widths also the
        name of each MLP to that of keeping 0, 1, ... all of its channels.

    Raises:
        CalibrationError: A tensor takes no part in a forward pass.
        NonFiniteError: Activations or gradients are not finite.
    """
    mlps = {mlp.output.name: mlp.name for mlp in loaded.topology.mlps} if with_widths else {}
    parts = (_VERSION, loaded.fingerprint, calibration.fingerprint, *([_WIDTH_VERSION] if mlps else []))
    key = hashlib.sha256("|".join(parts).encode()).hexdigest()[:16]
    path = (folder or cache_dir() / "expected_damage") / f"{key}.safetensors"
    names = tuple(tensor.name for tensor in loaded.topology.tensors if tensor.layer is not None)
    if (known := _read(path, (*names, *mlps.values()))) is not None:
        return known
    curves = {}
    for of_layer in iterate_layer_grams(
        loaded, names, calibration, with_gradients=True, settings=settings, progress=progress
    ):
        for sharing, gram in of_layer.sharing.items():
            for name in sharing:
                weight = dense_weight(loaded, name)
                gradients = of_layer.gradients[name]
                curves[name] = fisher_divergence(weight, gram, gradients).cpu().numpy()
                if name in mlps:
                    curves[mlps[name]] = channel_factors(weight, gram, gradients).divergence.numpy()
            del gram
        del of_layer  # not kept while the next layer runs
    write_bytes(path, safetensors.numpy.save(curves))
    return curves


def _read(path: Path, names: tuple[str, ...]) -> dict[str, NDArray[np.float64]] | None:
    """The cached curves; None if they are absent or damaged."""
    try:
        found = safetensors.numpy.load(path.read_bytes())
        return {name: found[name] for name in names}
    except FileNotFoundError:
        return None
    except (OSError, KeyError, safetensors.SafetensorError) as error:
        logger.warning("expected divergence %s is damaged (%s); it will be computed again", path, error)
        return None
