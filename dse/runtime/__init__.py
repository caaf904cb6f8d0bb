"""How decomposed and dense models run fastest on this device: layouts, shared products, and the timings behind them."""

from dse.runtime.forms import FormChoice, Forms, build_forms
from dse.runtime.model_profile import ModelProfile, Phase, model_profile
from dse.runtime.rank_multiple import RANK_MULTIPLES, rank_multiple, rank_multiple_shapes
from dse.runtime.sides import (
    FastRuntime,
    GenerationShape,
    Sides,
    fast_runtime,
    form_choice,
    optimise_for_inference,
    timings_for,
)
from dse.runtime.table_latency import option_shapes, with_latencies
from dse.runtime.timings import ProductShape, ProductTimings

__all__ = [
    "RANK_MULTIPLES",
    "FastRuntime",
    "FormChoice",
    "Forms",
    "GenerationShape",
    "ModelProfile",
    "Phase",
    "ProductShape",
    "ProductTimings",
    "Sides",
    "build_forms",
    "fast_runtime",
    "form_choice",
    "model_profile",
    "optimise_for_inference",
    "option_shapes",
    "rank_multiple",
    "rank_multiple_shapes",
    "timings_for",
    "with_latencies",
]
