"""Times of matrix products in an engine's own kernels, for rank multiples, `only_if_faster` and predicted latencies."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from torch import nn

from dse.engines.engine_pair import EnginePair
from dse.errors import EngineError
from dse.measurement.device_profile.product_timings import REFERENCE, ProductShape, ProductTimings, timings_for

__all__ = ["EngineTimings", "engine_timings"]


class EngineTimings(ProductTimings):
    """Product timings that the dense model's session of an engine takes; kept in a file of that engine's version.

    A copy in another process, which has no session, measures with torch.

    Args:
        pair: The engine.
        base: Timings of the same model in this process: device, dtype and footprint.
        folder: Folder of the file; the user's cache by default.
    """

    def __init__(self, pair: EnginePair, base: ProductTimings, folder: Path | None = None) -> None:
        vars(self).update(vars(base))
        self._pair: EnginePair | None = pair
        versions = ", ".join(f"{name} {version}" for name, version in pair.baseline().versions.items())
        self.conditions = dataclasses.replace(base.conditions, torch_version=f"{pair.engine.name}: {versions}")
        digest = hashlib.sha256(json.dumps(dataclasses.asdict(self.conditions), sort_keys=True).encode()).hexdigest()
        self.path = (folder or base.path.parent) / f"{digest[:16]}.json"
        self._seconds = self._read()

    def __getstate__(self) -> Mapping[str, Any]:
        """Without the session, which stays in its process."""
        return {**vars(self), "_pair": None}

    def _measure(self, shape: ProductShape) -> dict[str, float]:
        """Seconds by key: the ratio to the reference product timed right before and after, times its first timing.

        The workers of engines time plain products, so the reordering of pivoted factors is left out.
        """
        if self._pair is None:
            return super()._measure(shape)
        reference = ProductShape(shape.rows, *REFERENCE)
        sizes = [(one.rows, one.in_features, one.out_features) for one in (reference, shape, reference)]
        before, seconds, after = self._pair.baseline().time_products(sizes, self.conditions.footprint_bytes)
        found = {} if reference.key in self._seconds else {reference.key: (before + after) / 2}
        reference_s = {**self._seconds, **found}[reference.key]
        return {shape.key: seconds / ((before + after) / 2) * reference_s, **found}


def engine_timings(pair: EnginePair, model: nn.Module, notify: Callable[[str], None]) -> ProductTimings:
    """Product timings of a running engine, or of torch in this process where the engine cannot time products.

    Args:
        pair: The engine, whose dense session is started if necessary.
        model: The dense model.
        notify: Receives the reason for the fallback.
    """
    base = timings_for(model)
    try:
        timings = EngineTimings(pair, base)
        timings.seconds(ProductShape(1, *REFERENCE))
    except EngineError as error:
        notify(f"matrix products are timed with torch, because {error}")
        return base
    return timings
