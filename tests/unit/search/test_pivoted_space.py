"""Pivoted factors in search spaces, profiles, allocations and proposals."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from decomposition_support import windows_of
from hypothesis import given
from hypothesis import strategies as st
from sensitivity_support import windows
from space_support import all_points, space_of
from tiny_models import loaded_tiny_model, tiny_model

from dse.config import RankConfig
from dse.cost import factor_parameters, point_cost, point_problems
from dse.design_point import DesignPoint, TensorChoice
from dse.errors import ConfigError, PointError
from dse.model_parts import DecomposableTensor
from dse.models import topology_of
from dse.search.refinement import FrontPoint, refine
from dse.search.refitted_sensitivities import RefittedSensitivities
from dse.search.spaces.depth_profile import DepthProfileSpace
from dse.search.spaces.levels import LevelSpace
from dse.search.spaces.prior_table import level_table
from dse.search.spaces.rank_levels import choice_at
from dse.search.warm_starts import warm_starts
from dse.sensitivity.allocation import allocate
from dse.sensitivity.measure_profile import measure_profile
from dse.sensitivity.profile_settings import ProfileSettings

TWO_LAYERS = topology_of(tiny_model("llama", num_hidden_layers=2))
GROUPS = {"roles": {"attention": ["query", "key", "value", "attention_output"], "mlp": ["gate", "up", "down"]}}
LEVELS = {"ranks": {"kept_fractions": [0.9, 0.5], "multiple": 1}, "groups": GROUPS}
DEPTH = {"kind": "depth_profile", "ranks": {"kept_fractions": [0.9, 0.7, 0.5], "multiple": 2}, "removal": True}


def level_space(*forms: str, **changes: Any) -> LevelSpace:
    space = space_of(TWO_LAYERS, forms=list(forms), **{**LEVELS, **changes})
    assert isinstance(space, LevelSpace)
    return space


def depth_space(*forms: str, **changes: Any) -> DepthProfileSpace:
    space = space_of(TWO_LAYERS, forms=list(forms), **{**DEPTH, **changes})
    assert isinstance(space, DepthProfileSpace)
    return space


@given(st.integers(2, 40), st.integers(2, 40), st.integers(1, 100))
def test_a_kept_fraction_yields_the_largest_rank_within_it(m: int, n: int, percent: int) -> None:
    tensor = DecomposableTensor("t", "t", 0, "up", m, n)
    grid = RankConfig(kept_fractions=[percent / 100])
    rank = choice_at(grid, 0, tensor, "svd", "pivoted").rank
    sizes = {r: factor_parameters(tensor, TensorChoice("svd", r, form="pivoted")) for r in range(1, min(m, n))}
    fitting = [r for r, size in sizes.items() if 100 * size <= percent * m * n]
    assert rank == max(fitting, default=1)


@pytest.mark.parametrize("forms", [("pivoted",), ("plain", "pivoted")])
def test_levels_with_pivoted_factors_against_brute_force(forms: tuple[str, ...]) -> None:
    space = level_space(*forms, removal=True)
    points = all_points(space)
    assert space.number_of_points() == len(points)
    for point in points.values():
        assert space.point(space.levels_of(point)) == point
        assert point_problems(TWO_LAYERS, point) == []
    found = {choice.form for point in points.values() for _, choice in point.decomposed}
    assert found == {"" if form == "plain" else form for form in forms}
    for group in space.groups:
        saved = [group.saved("svd", level) for level in group.levels("svd")]
        assert saved == sorted(saved)
    ranks = [c.rank for p in points.values() for n, c in p.decomposed if n == "layers.0.query"]
    assert space.largest_ranks()["svd"]["layers.0.query"] == max(ranks) > 16  # break-even of 32 x 32
    described = space.describe()
    assert described["forms"] == list(forms)
    assert max(described["ranks"]["query"]) == max(ranks)


def test_points_of_another_form_are_outside() -> None:
    name, choice = "layers.0.query", TensorChoice("svd", 8)
    for space in (level_space("pivoted"), depth_space("pivoted")):
        with pytest.raises(PointError, match="must be in search space"):
            space.levels_of(DesignPoint.of({name: choice}))
        nearest = space.point(space.nearest_levels(DesignPoint.of({name: choice})))
        assert all(other.is_pivoted for _, other in nearest.decomposed)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"methods": ["tucker"]}, "needs methods with two factors, but got 'tucker'.*use 'tucker_merged'"),
        ({"stacks": True}, "not for `stacks`"),
        ({"kind": "subset", "groups": {}}, "not for `stacks` or `kind: subset`"),
        ({"forms": ["pivoted", "pivoted"]}, "a form may be named once"),
        ({"forms": []}, "forms"),
        ({"forms": ["square"]}, "forms"),
    ],
)
def test_settings_that_contradict_each_other_are_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        space_of(TWO_LAYERS, **{**LEVELS, "forms": ["pivoted"], **changes})


def test_with_both_forms_an_allocation_takes_the_better_one() -> None:
    """At an equal divergence for each rank, pivoted factors have fewer parameters, unless they cost more time."""
    space = level_space("plain", "pivoted")
    divergence = {(g.name, level): 1.0 / (1 + level) for g in space.groups for level in g.levels("svd")}
    assert divergence
    table = level_table(space, "svd").scaled(
        lambda _unit, option: float(sum((32 - c.rank) ** 2 for _, c in option.choices)) / max(option.divergence, 1e-9)
    )
    point = allocate(table, reduction=0.1).point
    assert point.choices
    assert all(choice.is_pivoted for _, choice in point)
    slow = table.scaled(lambda _unit, option: 9.0 if any(c.is_pivoted for _, c in option.choices) else 1.0)
    assert not any(choice.is_pivoted for _, choice in allocate(slow, reduction=0.1).point)


def test_a_depth_profile_allocates_pivoted_factors() -> None:
    space = depth_space("pivoted")
    point = space.point({**space.dense_levels, "budget": 40})
    assert point.decomposed
    assert all(choice.is_pivoted for _, choice in point.decomposed)
    assert space.levels_of(point)["budget"] > 0
    assert space.largest_ranks()["svd"]["layers.0.query"] == 31
    assert not any(c.is_pivoted for u in depth_space("plain").table.units for o in u.options for _, c in o.choices)


def test_proposals_are_pivoted() -> None:
    """Warm starts, refinement and random draws."""
    space = level_space("pivoted", limits={"reduction": {"min": 0.02, "max": 0.6}})
    table = level_table(space, "svd")
    starts = [space.point(proposal.levels) for proposal in warm_starts(space, table, 8)]
    front = [FrontPoint(0, DesignPoint.dense(), 0.0, 0.0)]
    front += [FrontPoint(i, p, point_cost(TWO_LAYERS, p).reduction, 0.1 * i) for i, p in enumerate(starts[:3], 1)]
    generator, expected = random.Random(0), RefittedSensitivities.unfitted(table).expected
    refined = [refine(space, front, {point.id for point in starts}, generator, expected) for _ in range(5)]
    proposed = starts + [space.point(proposal.levels) for proposal in refined if proposal is not None]
    drawn = [levels for _ in range(5) if (levels := space.draw_feasible(generator)) is not None]
    proposed += [space.point(levels) for levels in drawn]
    assert len(proposed) > 10
    assert all(choice.is_pivoted for point in proposed for _, choice in point.decomposed)


def test_a_profile_with_both_forms_measures_once(tmp_path: Path) -> None:
    """At equal ranks both forms compute the same, so the second one costs no measurement."""
    loaded = loaded_tiny_model("llama", initializer_range=0.2, num_hidden_layers=2)
    text, calibration = windows(4), windows_of(windows(8, seed=2))

    def table_of(*forms: str) -> tuple[int, dict[str, list[tuple[int, float]]]]:
        counts: list[int] = []
        settings = ProfileSettings(methods=("svd",), multiple=1, forms=forms)
        found = measure_profile(
            loaded,
            text,
            calibration,
            settings,
            folder=tmp_path / "-".join(("p", *forms)),
            progress=lambda phase, _done, total: counts.append(total) if phase == "sensitivity" else None,
        )
        best: dict[str, list[tuple[int, float]]] = {}
        for unit in found.table.units:
            for option in unit.options:
                for form in {choice.form for _, choice in option.choices if choice.has_factors}:
                    best.setdefault(f"{unit.name} {form}", []).append((option.parameters, option.divergence))
        return max(counts), best

    count, plain = table_of("")
    both_count, both = table_of("", "pivoted")
    only_count, only = table_of("pivoted")
    assert count == both_count == only_count
    assert set(both) == {*plain, *only}
    for name, own in plain.items():
        assert both[name] == [(size, pytest.approx(divergence, rel=1e-5)) for size, divergence in own]
        sizes, divergences = zip(*sorted(both[f"{name}pivoted"]), strict=True)
        inside = own[1:-1]
        at_equal_size = np.interp([size for size, _ in inside], sizes, divergences)
        assert at_equal_size.sum() < 0.95 * sum(divergence for _, divergence in inside)
