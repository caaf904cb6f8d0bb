"""Damage of points on a text: surgery on the resident model, and passes from the changed layer on."""

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
from dse.sensitivity.head_divergence import WindowDamage, head_divergence
from dse.sensitivity.stored_states import StoredStates, blocks_of, full_pass

__all__ = ["DivergenceMeter", "OptionDivergence"]

logger = logging.getLogger("dse")

_BATCH_TOKENS = 1024
_PROBE_TOKENS = 16
"""On which passes from stored states are verified, in front of every layer."""


@dataclass(frozen=True)
class OptionDivergence:
    """What a point does to the model on the meter's text.

    Attributes:
        kl_divergence: KL(dense || point), nats per token.
        kl_standard_error: Of that mean, over windows; 0 with a single window.
        log_likelihood_drop: Mean log-likelihood of the text's tokens, dense minus point, nats per token.
    """

    kl_divergence: float
    kl_standard_error: float
    log_likelihood_drop: float


class DivergenceMeter:
    """Measures points against the dense model on windows of text, each from the first layer it changes.

    Attributes:
        batches: Token ids of the text, each of shape (windows, tokens).
        tokens: Positions compared.
        uses_stored_states: Whether layers in front of a change are left out; False where the architecture refuses.
    """

    def __init__(self, loaded: LoadedModel, windows: Tensor, source: FactorSource) -> None:
        """Run the dense model over the text.

        Args:
            loaded: Dense now.
            windows: Token ids, shape (windows, tokens).
            source: Where factors come from.

        Raises:
            ModelError: The model has no output head of its own.
        """
        self._loaded = loaded
        self._source = source
        self.batches = torch.split(windows, max(1, _BATCH_TOKENS // windows.shape[1]))
        dense = [full_pass(loaded.model, batch).clone() for batch in self.batches]
        self._heads = head_divergence(loaded.model, dense, self.batches)
        probe = windows[:1, :_PROBE_TOKENS]
        self._probe = full_pass(loaded.model, probe).clone()
        blocks = blocks_of(loaded.model, loaded.topology)
        self._states = StoredStates(loaded.model, blocks, (*self.batches, probe))
        self.tokens = windows.numel()
        self.uses_stored_states = True

    def measure(self, point: DesignPoint, layer: int | None = None) -> OptionDivergence:
        """The divergence of a point.

        Args:
            point: What is changed.
            layer: The first layer it changes; measurements in the order of layers are the cheap ones. None for a pass
                of the whole model.

        Raises:
            NonFiniteError: An activation of the point is NaN or infinite.
        """
        from_layer = layer is not None and self._prepare(layer)
        with decompose(self._loaded, point, self._source):
            parts = [
                head.measure(self._states.hidden(i) if from_layer else full_pass(self._loaded.model, batch))
                for i, (batch, head) in enumerate(zip(self.batches, self._heads, strict=True))
            ]
        return _divergence_of(parts, point)

    def _prepare(self, layer: int) -> bool:
        """Whether the stored states stand in front of `layer` and serve."""
        if not self.uses_stored_states or layer < self._states.layer:
            return False
        if layer > self._states.layer:
            self._states.advance_to(layer)
            if not self._states.agrees(len(self.batches), self._probe):
                logger.warning(
                    "the layers of %s hand on more than their output: every option is measured by a pass of the whole"
                    " model, which takes about twice as long",
                    type(self._loaded.model).__name__,
                )
                self.uses_stored_states = False
        return self.uses_stored_states


def _divergence_of(parts: Sequence[WindowDamage], point: DesignPoint) -> OptionDivergence:
    divergences = np.concatenate([part.kl_divergence for part in parts])
    drops = np.concatenate([part.log_likelihood_drop for part in parts])
    if not (np.isfinite(divergences).all() and np.isfinite(drops).all()):
        raise NonFiniteError(f"the divergence of a point must be finite, but that of {point.id} is not")
    count = divergences.size
    error = float(divergences.std(ddof=1)) / math.sqrt(count) if count > 1 else 0.0
    return OptionDivergence(float(divergences.mean()), error, float(drops.mean()))
