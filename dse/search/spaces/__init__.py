"""Search spaces: the points that a study may propose, their number, and their range of reductions."""

from collections.abc import Mapping

from dse.search.spaces.base import SearchSpace as SearchSpace
from dse.search.spaces.depth_profile import DepthProfileSpace as DepthProfileSpace
from dse.search.spaces.levels import LevelSpace as LevelSpace
from dse.search.spaces.scope import KNOWN_ROLES as KNOWN_ROLES
from dse.search.spaces.subset import SubsetSpace as SubsetSpace
from dse.search.spaces.table_space import TableSpace as TableSpace

SPACES: Mapping[str, type[SearchSpace]] = {
    "levels": LevelSpace,
    "subset": SubsetSpace,
    "depth_profile": DepthProfileSpace,
}
"""The `kind` of a search-space file to its class."""
