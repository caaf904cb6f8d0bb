from __future__ import annotations

import itertools

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from dse.errors import ConfigError
from dse.pareto import non_dominated

# Few distinct values, including NaN, so that ties and repeats are common.
CELLS = st.sampled_from([0.0, -0.0, 1.0, 2.0, 3.0, np.inf, np.nan])


@st.composite
def tables(draw: st.DrawFn) -> tuple[np.ndarray, list[str]]:
    columns = draw(st.integers(1, 4))
    values = draw(hnp.arrays(np.float64, (draw(st.integers(0, 12)), columns), elements=CELLS))
    directions = draw(st.lists(st.sampled_from(["minimize", "maximize"]), min_size=columns, max_size=columns))
    return values, directions


def _beats(a: np.ndarray, b: np.ndarray, directions: list[str]) -> bool:
    """Dominance by its definition, cell by cell."""
    better = [x < y if d == "minimize" else x > y for x, y, d in zip(a, b, directions, strict=True)]
    worse = [x > y if d == "minimize" else x < y for x, y, d in zip(a, b, directions, strict=True)]
    return any(better) and not any(worse)


@given(tables())
def test_front_matches_the_definition(table: tuple[np.ndarray, list[str]]) -> None:
    values, directions = table
    measured = ~np.isnan(values).any(axis=1)
    expected = [
        bool(measured[i]) and not any(_beats(values[j], values[i], directions) for j in np.flatnonzero(measured))
        for i in range(len(values))
    ]
    assert non_dominated(values, directions).tolist() == expected


@given(tables())
def test_pairwise_dominance_matches_the_definition(table: tuple[np.ndarray, list[str]]) -> None:
    values, directions = table
    rows = values[~np.isnan(values).any(axis=1)]
    for a, b in itertools.permutations(rows, 2):
        assert non_dominated([a, b], directions)[1] != _beats(a, b, directions)


def _ranks(values: npt.ArrayLike, directions: list[str]) -> np.ndarray:
    """Number of fronts to remove before a row is on the front; -1 for rows with a NaN."""
    rest = np.array(values, dtype=np.float64)
    ranks = np.full(len(rest), -1)
    for rank in range(len(rest)):
        front = non_dominated(rest, directions)
        ranks[front] = rank
        rest[front] = np.nan
    return ranks


@given(tables())
@settings(max_examples=50)
def test_ranks_are_successive_fronts(table: tuple[np.ndarray, list[str]]) -> None:
    values, directions = table
    ranks = _ranks(values, directions)
    assert ((ranks == -1) == np.isnan(values).any(axis=1)).all()
    assert ((ranks == 0) == non_dominated(values, directions)).all()
    for index, rank in enumerate(ranks):
        # The rank is the length of the longest chain of points that dominate one another and end at this one.
        above = [r for r, row in zip(ranks, values, strict=True) if r >= 0 and _beats(row, values[index], directions)]
        assert rank == (-1 if rank < 0 else max(above, default=-1) + 1)


def test_worked_example() -> None:
    values = [[0.7, 10], [0.6, 8], [0.6, 9], [0.7, 10], [0.5, 8], [np.nan, 1]]
    assert non_dominated(values, ["maximize", "minimize"]).tolist() == [True, True, False, True, False, False]
    assert _ranks(values, ["maximize", "minimize"]).tolist() == [0, 0, 1, 0, 1, -1]


def test_point_dominates_neither_itself_nor_unmeasured_points() -> None:
    for other, on_front in (([1.0, 2.0], [True, True]), ([1.0, 3.0], [True, False]), ([1.0, np.nan], [True, False])):
        assert non_dominated([[1.0, 2.0], other], ["minimize", "minimize"]).tolist() == on_front
    assert _ranks([[1.0, 2.0], [1.0, np.nan]], ["minimize", "minimize"]).tolist() == [0, -1]


def test_shape_mismatch_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"shape \(n, 2\)"):
        non_dominated([[1.0, 2.0, 3.0]], ["minimize", "minimize"])
