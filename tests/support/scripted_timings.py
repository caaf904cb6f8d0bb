"""Timings of products by a formula, so that no clock decides."""

from __future__ import annotations

from dse.measurement.device_profile.product_timings import ProductTimings

START_S = 1000.0
"""What every product costs beside its multiplications, which cost a second each."""


class ScriptedTimings(ProductTimings):
    """Column-major products take a second more."""

    def seconds(self, shape, layout):
        return START_S + shape.flops / 2 + (0.0 if layout == "row_major" else 1.0)
