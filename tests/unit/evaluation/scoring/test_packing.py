"""Packing is exact for any sequences: each query can be read back from its row, and no prefix is stored twice."""

from __future__ import annotations

import math
import sys

import numpy as np
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from dse.evaluation.scoring import Query, Row, pack
from dse.evaluation.scoring.packing import balanced


@st.composite
def queries(draw: st.DrawFn) -> list[Query]:
    """Sequences over a tiny alphabet, so that they share prefixes of every length."""
    found = []
    for tokens in draw(st.lists(st.lists(st.integers(0, 2), min_size=2, max_size=9), max_size=12)):
        found.append(Query(tuple(tokens), draw(st.integers(1, len(tokens) - 1))))
    return found


def attends(row: Row) -> NDArray[np.bool_]:
    """The attention mask that `Row.last` describes, shape (nodes, nodes)."""
    index, last = np.arange(len(row)), np.asarray(row.last)
    return (index[None, :] <= index[:, None]) & (index[:, None] <= last[None, :])


def parents(row: Row) -> list[int | None]:
    """Parent of each node, from the depths alone: the nearest earlier node one level up."""
    return [
        next((j for j in range(i - 1, -1, -1) if row.depths[j] == depth - 1), None)
        for i, depth in enumerate(row.depths)
    ]


def ancestors(row: Row, node: int) -> list[int]:
    above, chain = parents(row), [node]
    while above[chain[-1]] is not None:
        chain.append(above[chain[-1]])  # type: ignore[arg-type]
    return chain[::-1]


@given(queries(), st.floats(0, 0.1), st.integers(4, 40))
def test_every_query_can_be_read_back(asked: list[Query], pair_cost: float, most_nodes: int) -> None:
    rows = pack(asked, pair_cost=pair_cost, most_nodes=most_nodes)
    seen = [index for row in rows for index, _ in row.queries]
    assert sorted(seen) == list(range(len(asked)))
    assert [len(row) for row in rows] == sorted((len(row) for row in rows), reverse=True)
    for row in rows:
        for index, nodes in row.queries:
            chain = ancestors(row, nodes[-1])
            assert tuple(row.tokens[node] for node in chain) == asked[index].inputs
            assert chain[-asked[index].scored :] == nodes
        assert len(row) <= max(most_nodes, *(len(asked[index].inputs) for index, _ in row.queries))


@given(queries(), st.floats(0, 0.1))
def test_node_attends_to_its_ancestors_and_itself(asked: list[Query], pair_cost: float) -> None:
    for row in pack(asked, pair_cost=pair_cost, least_saved=-math.inf):
        expected = np.zeros((len(row), len(row)), dtype=bool)
        for node in range(len(row)):
            expected[node, ancestors(row, node)] = True
        np.testing.assert_array_equal(attends(row), expected)
        assert row.is_chain == bool(np.array_equal(expected, np.tri(len(row), dtype=bool)))


@given(queries())
def test_without_limits_every_prefix_is_stored_once(asked: list[Query]) -> None:
    rows = pack(asked, pair_cost=0.0, most_nodes=sys.maxsize, least_saved=-math.inf)
    prefixes = {query.inputs[:end] for query in asked for end in range(1, len(query.inputs) + 1)}
    assert sum(map(len, rows)) == len(prefixes)
    assert len(rows) == len({query.inputs[0] for query in asked})


def test_sequences_join_only_if_sharing_saves_more_than_pairs_cost() -> None:
    asked = [Query((*range(40), 50 + i), 1) for i in range(2)]  # equal up to the last input
    other = [Query((0, *range(100 + 50 * i, 140 + 50 * i)), 1) for i in range(2)]  # equal in the first token only
    assert [len(row) for row in pack(asked, pair_cost=1e-4)] == [40]
    assert [len(row) for row in pack(other, pair_cost=1e-4)] == [40, 40]
    half = [Query((*range(20), *range(100 + 50 * i, 121 + 50 * i)), 1) for i in range(2)]
    assert [len(row) for row in pack(half, pair_cost=1e-4)] == [60]
    assert [len(row) for row in pack(half, pair_cost=1.0)] == [40, 40]


@given(queries().filter(bool), st.integers(1, 60))
def test_joining_preserves_trees(asked: list[Query], nodes: int) -> None:
    rows = pack(asked, pair_cost=0.0, most_nodes=12)
    joined = balanced(rows, nodes)
    assert sum(map(len, joined)) == sum(map(len, rows))
    assert len(joined[0]) <= max(nodes, len(rows[0]))
    assert len(joined) <= len(rows)
    for row in joined:
        np.testing.assert_array_equal(attends(row).sum(axis=1), np.asarray(row.depths) + 1)
        for index, predicting in row.queries:
            seen = np.flatnonzero(attends(row)[predicting[-1]])
            assert tuple(row.tokens[node] for node in seen) == asked[index].inputs
