"""How sensitive each part of a model is: damage measured by surgery, cheaply, and the damage table made of it."""

from dse.sensitivity.expected_table import expected_table as expected_table
from dse.sensitivity.heat_map import heat_map_of as heat_map_of
from dse.sensitivity.measure import measure_profile as measure_profile
from dse.sensitivity.measure import profile_origin as profile_origin
from dse.sensitivity.meter import Damage as Damage
from dse.sensitivity.meter import DamageMeter as DamageMeter
from dse.sensitivity.profile import MeasuredPart as MeasuredPart
from dse.sensitivity.profile import SensitivityProfile as SensitivityProfile
from dse.sensitivity.settings import DEFAULT_PROFILE_TOKENS as DEFAULT_PROFILE_TOKENS
from dse.sensitivity.settings import PROFILE_WINDOW as PROFILE_WINDOW
from dse.sensitivity.settings import ProfileSettings as ProfileSettings
