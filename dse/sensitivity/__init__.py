"""Sensitivity of each part of a model to decomposition, and the allocation of ranks under a budget.

The sensitivity of a part is the KL divergence from the dense model if only this part is changed. `measure_profile`
measures it, `expected_table` estimates it; both yield a `SensitivityTable`. `allocate` finds the combination of options
with the least total divergence within a budget of parameters, latency or energy.
"""

from dse.sensitivity.allocation import Allocation as Allocation
from dse.sensitivity.allocation import allocate as allocate
from dse.sensitivity.allocation import allocate_reductions as allocate_reductions
from dse.sensitivity.allocation_constraints import AllocationConstraints as AllocationConstraints
from dse.sensitivity.allocation_curves import CurveAllocation as CurveAllocation
from dse.sensitivity.allocation_curves import allocate_curves as allocate_curves
from dse.sensitivity.divergence_meter import DivergenceMeter as DivergenceMeter
from dse.sensitivity.divergence_meter import OptionDivergence as OptionDivergence
from dse.sensitivity.expected_table import expected_table as expected_table
from dse.sensitivity.measure_profile import measure_profile as measure_profile
from dse.sensitivity.measure_profile import profile_origin as profile_origin
from dse.sensitivity.option import Option as Option
from dse.sensitivity.option import Unit as Unit
from dse.sensitivity.option_latency import option_shapes as option_shapes
from dse.sensitivity.option_latency import with_latencies as with_latencies
from dse.sensitivity.profile_settings import DEFAULT_PROFILE_TOKENS as DEFAULT_PROFILE_TOKENS
from dse.sensitivity.profile_settings import PROFILE_WINDOW as PROFILE_WINDOW
from dse.sensitivity.profile_settings import ProfileSettings as ProfileSettings
from dse.sensitivity.sensitivity_profile import MeasuredPart as MeasuredPart
from dse.sensitivity.sensitivity_profile import SensitivityProfile as SensitivityProfile
from dse.sensitivity.sensitivity_table import SensitivityTable as SensitivityTable
from dse.sensitivity.sensitivity_table import TableOrigin as TableOrigin
