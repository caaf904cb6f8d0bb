"""Divergence of points on a text: the loaded model is decomposed and run from the first changed layer on."""

from __future__ import annotations

import logging
import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from dse.decomposition import decompose
from dse.decomposition.surgery import FactorSource
from dse.design_point import DesignPoint
from dse.errors import NonFiniteError
from dse.models import LoadedModel
from dse.sensitivity.head_divergence import WindowDivergence, head_divergences
from dse.sensitivity.stored_states import StoredStates, full_pass, layer_modules

__all__ = ["DivergenceMeter", "OptionDivergence"]

logger = logging.getLogger("dse")

_BATCH_TOKENS = 1024
_PROBE_TOKENS = 16
"""Length of the text on which passes from stored states are verified, before every layer."""


@dataclass(frozen=True)
class OptionDivergence:
    """Divergence of a point from the dense model on the meter's text.

    Attributes:
        kl_divergence: KL(dense || point), nats per token.
        kl_standard_error: Standard error of that mean over windows; 0 with a single window.
        log_likelihood_drop: Mean log-likelihood of the text's tokens, dense minus point, nats per token.
    """

    kl_divergence: float
    kl_standard_error: float
    log_likelihood_drop: float


class DivergenceMeter:
    """Measures the divergence of points on windows of text, starting each pass at the first changed layer.

    Attributes:
        batches: Token ids of the text, each of shape (windows, tokens).
        tokens: Number of positions compared.
        uses_stored_states: Whether passes skip the layers before a change; False if the architecture does not allow it.
    """

    def __init__(self, loaded: LoadedModel, windows: Tensor, source: FactorSource) -> None:
        """Run the dense model over the text.

        Args:
            windows: Token ids, shape (windows, tokens).

        Raises:
            ModelError: The model has no output head, or its logits differ from those of its head.
        """
        self._loaded = loaded
        self._source = source
        self.batches = torch.split(windows, max(1, _BATCH_TOKENS // windows.shape[1]))
        dense = [full_pass(loaded.model, batch).clone() for batch in self.batches]
        self._heads = head_divergences(loaded.model, dense, self.batches)
        probe = windows[:1, :_PROBE_TOKENS]
        self._probe = full_pass(loaded.model, probe).clone()
        layers = layer_modules(loaded.model, loaded.topology)
        self._states = StoredStates(loaded.model, layers, (*self.batches, probe))
        self.tokens = windows.numel()
        self.uses_stored_states = True

    def measure(self, point: DesignPoint, layer: int | None = None) -> OptionDivergence:
        """The divergence of a point.

        Args:
            layer: The first layer that the point changes; None for a full pass. Measuring in layer order is fastest.

        Raises:
            NonFiniteError: An activation is NaN or infinite.
        """
        from_layer = layer is not None and self._prepare(layer)
        with decompose(self._loaded, point, self._source):
            parts = [
                head.measure(self._states.hidden(i) if from_layer else full_pass(self._loaded.model, batch))
                for i, (batch, head) in enumerate(zip(self.batches, self._heads, strict=True))
            ]
        return _divergence_of(parts, point)

    def _prepare(self, layer: int) -> bool:
        """Move the stored states to `layer`; returns whether they can be used."""
        if not self.uses_stored_states or layer < self._states.layer:
            return False
        if layer > self._states.layer:
            self._states.advance_to(layer)
            if not self._states.agrees(len(self.batches), self._probe):
                logger.warning(
                    "the layers of %s pass on more than their output: every option is measured by a full pass of the"
                    " model, which takes about twice as long",
                    type(self._loaded.model).__name__,
                )
                self.uses_stored_states = False
        return self.uses_stored_states


def _divergence_of(parts: Sequence[WindowDivergence], point: DesignPoint) -> OptionDivergence:
    divergences = np.concatenate([part.kl_divergence for part in parts])
    drops = np.concatenate([part.log_likelihood_drop for part in parts])
    if not (np.isfinite(divergences).all() and np.isfinite(drops).all()):
        raise NonFiniteError(f"a point's divergence must be finite, but that of {point.id} is not; use higher ranks")
    count = divergences.size
    error = float(divergences.std(ddof=1)) / math.sqrt(count) if count > 1 else 0.0
    return OptionDivergence(float(divergences.mean()), error, float(drops.mean()))
