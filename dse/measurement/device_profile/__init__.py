"""Device profile: timed matrix products of a model, and the latency predicted from them."""

from dse.measurement.device_profile.model_profile import ModelMatrix as ModelMatrix
from dse.measurement.device_profile.model_profile import ModelProfile as ModelProfile
from dse.measurement.device_profile.model_profile import PassTime as PassTime
from dse.measurement.device_profile.model_profile import Phase as Phase
from dse.measurement.device_profile.model_profile import profile_model as profile_model
from dse.measurement.device_profile.product_timings import ProductShape as ProductShape
from dse.measurement.device_profile.product_timings import ProductTimings as ProductTimings
from dse.measurement.device_profile.product_timings import TimingConditions as TimingConditions
from dse.measurement.device_profile.product_timings import timings_for as timings_for
from dse.measurement.device_profile.rank_multiple import find_rank_multiple as find_rank_multiple
from dse.measurement.device_profile.rank_multiple import rank_multiple_shapes as rank_multiple_shapes
