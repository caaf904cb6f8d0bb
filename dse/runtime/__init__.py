"""How decomposed and dense models run fastest on this device: layouts, shared products, and the timings behind them."""

from dse.runtime.forms import FormChoice, Forms, build_forms
from dse.runtime.sides import (
    FastRuntime,
    GenerationShape,
    Sides,
    fast_runtime,
    form_choice,
    optimise_for_inference,
    timings_for,
)

__all__ = [
    "FastRuntime",
    "FormChoice",
    "Forms",
    "GenerationShape",
    "Sides",
    "build_forms",
    "fast_runtime",
    "form_choice",
    "optimise_for_inference",
    "timings_for",
]
