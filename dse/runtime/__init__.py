"""How decomposed and dense models run fastest on this device: layouts, shared products, and the timings behind them."""

from dse.runtime.forms import Forms, build_forms
from dse.runtime.sides import FastRuntime, Sides, fast_runtime, layout_choice, optimise_for_inference
from dse.runtime.timings import ProductShape, ProductTimings

__all__ = [
    "FastRuntime",
    "Forms",
    "ProductShape",
    "ProductTimings",
    "Sides",
    "build_forms",
    "fast_runtime",
    "layout_choice",
    "optimise_for_inference",
]
