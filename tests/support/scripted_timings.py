"""Product timings from a formula, so that no test depends on a clock."""

from __future__ import annotations

from dse.measurement.device_profile import ProductShape, ProductTimings

START_S = 1000.0
"""Fixed time of every product, besides one second per multiplication."""


class ScriptedTimings(ProductTimings):
    """A product takes `START_S`, and one second per multiplication."""

    def seconds(self, shape: ProductShape) -> float:
        return START_S + shape.flops / 2
