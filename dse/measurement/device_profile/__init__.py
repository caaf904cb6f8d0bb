"""Device profile: timed matrix products of a model, and the latency predicted from them."""

from dse.measurement.device_profile.model_profile import ModelMatrix, ModelProfile, PassTime, Phase, profile_model
from dse.measurement.device_profile.product_timings import (
    ProductShape,
    ProductTimings,
    TimingConditions,
    timings_for,
)
from dse.measurement.device_profile.rank_multiple import find_rank_multiple, rank_multiple_shapes

__all__ = [
    "ModelMatrix",
    "ModelProfile",
    "PassTime",
    "Phase",
    "ProductShape",
    "ProductTimings",
    "TimingConditions",
    "find_rank_multiple",
    "profile_model",
    "rank_multiple_shapes",
    "timings_for",
]
