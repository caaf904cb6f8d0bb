"""Explanations and rank maps of hand-made points."""

from __future__ import annotations

from typing import Any

import pytest

from dse.design_point import DesignPoint, TensorChoice
from dse.pareto import objectives_named
from dse.report.explanation import TrialContext, changes_text, explain_trial, origin_text
from dse.report.point_maps import MapCell, point_map_of
from dse.report.rank_map import placed_choices, rank_map_of, rank_map_text, reduction_of, shape_of
from dse.trial_record import TrialRecord

SHAPE: dict[str, Any] = {
    "layers": 3,
    "roles": ["query", "key", "up"],
    "blocks": {"mlp": ["up"]},
    "stacks": {"query_key": ["query", "key"]},
    "sizes": {"query": [8, 8], "key": [4, 8], "up": [16, 8]},
}
POINT = DesignPoint.of(
    {
        "layers.0.query": TensorChoice("svd", 2),
        "layers.1.query_key": TensorChoice("svd", 3),
        "layers.0.mlp": TensorChoice.removal(),
    }
)


def record(trial: int, point: DesignPoint, **quantities: float) -> TrialRecord:
    return TrialRecord(
        trial,
        "complete",
        "refined" if trial else "dense",
        point,
        why="trial 3 has room",
        cost={"reduction": 0.25, **quantities},
    )


@pytest.fixture
def context() -> TrialContext:
    records = [record(0, DesignPoint.dense(), parameters=1000), record(1, POINT, parameters=750)]
    return TrialContext.of(records, objectives_named(["accuracy", "parameters"]), {"shape": SHAPE}, [1])


def test_changes_are_listed_by_method_and_role() -> None:
    assert changes_text(POINT, SHAPE) == [
        "1 block is removed: layers.0.mlp",
        "2 matrices are each replaced by two factors (svd, rank 2-3): query 2 in 1 layer, query_key 3 in 1 layer",
        "layer 2 stays dense",
    ]
    assert changes_text(DesignPoint.dense(), SHAPE) == ["nothing is decomposed"]


def test_explanation_states_origin_reason_and_result(context: TrialContext) -> None:
    found = explain_trial(record(1, POINT, parameters=750), context)
    assert found.origin == "refined"
    assert found.lines[:3] == (
        f"trial 1, point {POINT.id}: 25.0 % of the parameters removed, on the front",
        "origin: refined (a front point with rank moved from one group of tensors to another)",
        "why: trial 3 has room",
    )
    assert found.lines[-1] == "result: parameters 750 (dense 1000)"
    assert origin_text("newer") == "newer (unknown)"


def test_rank_map_spreads_stacks_and_blocks_over_their_roles() -> None:
    ranks = rank_map_of(POINT, SHAPE)
    assert ranks[0] == {"query": "2", "key": ".", "up": "removed"}
    assert ranks[1] == {"query": "3", "key": "3", "up": "."}
    assert rank_map_text(ranks) == [
        "layer   query     key      up",
        "    0       2       . removed",
        "    1       3       3       .",
        "    2       .       .       .",
    ]


def test_parameter_ratios_are_those_of_the_replaced_tensors() -> None:
    placed = placed_choices(POINT, SHAPE)
    assert placed[0, "query"].parameter_ratio == 2 * (8 + 8) / 64
    assert placed[1, "key"].parameter_ratio == 3 * (12 + 8) / 96
    assert placed[1, "key"].is_stack
    assert placed[0, "up"].parameter_ratio == 0.0


def test_map_has_a_cell_for_every_role_of_every_layer(context: TrialContext) -> None:
    entry = point_map_of(record(1, POINT, parameters=750), context)
    assert (entry.layers, entry.roles) == (("0", "1", "2"), ("query", "key", "up"))
    assert entry.cells[0] == (
        MapCell("svd", 2, 0.5),
        MapCell("svd", 3, 0.625, "layers.1.query_key"),
        MapCell(),
    )
    assert entry.cells[2][0] == MapCell("removed", 0, 0.0)
    assert entry.notes[0].startswith("Origin: refined (")


def test_shape_of_an_old_study_follows_from_its_points() -> None:
    shape = shape_of({}, [POINT])
    assert (shape["layers"], shape["roles"]) == (2, ["mlp", "query", "query_key"])
    assert rank_map_of(POINT, shape)[0]["mlp"] == "removed"
    assert placed_choices(POINT, shape)[0, "query"].parameter_ratio is None


def test_widths_are_shown_at_all_tensors_of_their_mlp() -> None:
    shape = {**SHAPE, "roles": ["query", "up", "down"], "mlp": ["up", "down"]}
    shape |= {"sizes": {"query": [8, 8], "up": [16, 8], "down": [8, 16]}}
    point = DesignPoint.of(
        {
            "layers.0.mlp": TensorChoice("width", 12),
            "layers.1.mlp": TensorChoice("width", 4),
            "layers.1.query": TensorChoice("svd", 2),
            "layers.2.mlp": TensorChoice.removal(),
        }
    )
    assert rank_map_of(point, shape) == {
        0: {"query": ".", "up": "w12", "down": "w12"},
        1: {"query": "2", "up": "w4", "down": "w4"},
        2: {"query": ".", "up": "removed", "down": "."},  # the block's roles are those of `SHAPE`
    }
    placed = placed_choices(point, shape)
    assert [placed[layer, "down"].parameter_ratio for layer in (0, 1)] == [0.75, 0.25]
    assert reduction_of(point, {**shape, "blocks": {"mlp": ["up", "down"]}}, 1000) == pytest.approx(
        (256 * 0.25 + 256 * 0.75 + 256 + 64 * 0.5) / 1000
    )
    assert changes_text(point, shape)[:3] == [
        "1 block is removed: layers.2.mlp",
        "2 MLPs each keep 4-12 channels: layers.0.mlp, layers.1.mlp",
        "1 matrix is replaced by two factors (svd, rank 2): query 2 in 1 layer",
    ]
    assert MapCell.of(placed[0, "up"]).text == "MLP of 12 channels, 75.0 % of its parameters"
    # A study of an earlier version did not store which roles an MLP has.
    assert rank_map_of(DesignPoint.of({"layers.0.mlp": TensorChoice("width", 12)}), SHAPE)[0]["mlp"] == "w12"
