"""Search spaces: which points a study may propose, how many there are, and how far they reduce a model."""

from collections.abc import Mapping

from dse.study.space._base import KNOWN_ROLES as KNOWN_ROLES
from dse.study.space._base import SearchSpace as SearchSpace
from dse.study.space.depth_profile import DepthProfileSpace as DepthProfileSpace
from dse.study.space.levels import LevelSpace as LevelSpace
from dse.study.space.subset import SubsetSpace as SubsetSpace
from dse.study.space.table_space import TableSpace as TableSpace

SPACES: Mapping[str, type[SearchSpace]] = {
    "levels": LevelSpace,
    "subset": SubsetSpace,
    "depth_profile": DepthProfileSpace,
}
"""The `kind` of a search-space file to its class."""
