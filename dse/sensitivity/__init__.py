"""How sensitive each part of a model is: divergence measured by surgery, cheaply, and the divergence table made of it."""

from dse.sensitivity.divergence_meter import Damage as Damage
from dse.sensitivity.divergence_meter import DivergenceMeter as DivergenceMeter
from dse.sensitivity.expected_table import expected_table as expected_table
from dse.sensitivity.measure_profile import measure_profile as measure_profile
from dse.sensitivity.measure_profile import profile_origin as profile_origin
from dse.sensitivity.profile import MeasuredPart as MeasuredPart
from dse.sensitivity.profile import SensitivityProfile as SensitivityProfile
from dse.sensitivity.profile_settings import DEFAULT_PROFILE_TOKENS as DEFAULT_PROFILE_TOKENS
from dse.sensitivity.profile_settings import PROFILE_WINDOW as PROFILE_WINDOW
from dse.sensitivity.profile_settings import ProfileSettings as ProfileSettings
