"""Search: which point to evaluate next.

A `SearchSpace` defines the points. A `SearchSession` proposes them: warm starts from a sensitivity table or start-up
points first, then by a bandit over the proposers (sampler, refinement, allocation). `dse.search.multi_fidelity` stops
unpromising trials early.
"""

from dse.search.origins import OriginShare as OriginShare
from dse.search.origins import credited_origins as credited_origins
from dse.search.origins import origin_shares as origin_shares
from dse.search.proposal import Proposal as Proposal
from dse.search.refinement import FrontPoint as FrontPoint
from dse.search.refinement import refine as refine
from dse.search.refitted_sensitivities import RefittedSensitivities as RefittedSensitivities
from dse.search.refitted_sensitivities import observed_divergence as observed_divergence
from dse.search.refitted_sensitivities import refit_sensitivities as refit_sensitivities
from dse.search.search_session import SearchSession as SearchSession
from dse.search.space_sensitivity import study_table as study_table
from dse.search.spaces import KNOWN_ROLES as KNOWN_ROLES
from dse.search.spaces import SPACES as SPACES
from dse.search.spaces import DepthProfileSpace as DepthProfileSpace
from dse.search.spaces import LevelSpace as LevelSpace
from dse.search.spaces import SearchSpace as SearchSpace
from dse.search.spaces import SubsetSpace as SubsetSpace
from dse.search.spaces import TableSpace as TableSpace
from dse.search.start_up_points import first_points as first_points
from dse.search.start_up_points import unseen_feasible_levels as unseen_feasible_levels
from dse.search.user_points import checked_user_points as checked_user_points
from dse.search.warm_starts import warm_starts as warm_starts
