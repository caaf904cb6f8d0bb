from __future__ import annotations

import contextlib
import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from dse.design_point import METHOD_NAMES, DesignPoint, TensorChoice
from dse.errors import PointError
from dse.model_parts import DecomposableTensor, RemovableBlock
from dse.topology import Topology

ROLES = ("query", "key", "up", "down")
TOPOLOGY = Topology(
    "TinyForCausalLM",
    "tiny",
    4,
    (
        *(
            DecomposableTensor(f"layers.{i}.{role}", f"model.layers.{i}.{role}", i, role, 64, 48)
            for i in range(4)
            for role in ROLES
        ),
        DecomposableTensor("head", "lm_head", None, "head", 96, 64),
    ),
    parameters_dense=10**6,
)
choices = st.builds(TensorChoice, st.sampled_from(METHOD_NAMES), st.integers(1, 2000))
points = st.dictionaries(st.sampled_from(sorted(TOPOLOGY.by_name)), choices).map(DesignPoint.of)
json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8) | st.sampled_from(METHOD_NAMES),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(
            st.sampled_from(["method", "rank", "layers", "roles", "tensors", "layers.0.query", "head"])
            | st.text(max_size=4),
            inner,
            max_size=4,
        )
    ),
    max_leaves=12,
)


@pytest.mark.parametrize(("method", "rank"), [("removed", 1), ("removed", -1), ("removed", False), ("svd", 0)])
def test_rank_0_is_for_removal_only(method: str, rank: int) -> None:
    with pytest.raises(PointError, match=r"`rank (= 0|>= 1)` must hold"):
        TensorChoice(method, rank)
    assert TensorChoice("removed", 0) == TensorChoice.removal()


def test_removed_blocks_round_trip_in_both_forms() -> None:
    block = RemovableBlock("layers.2.mlp", "model.layers.2.mlp", 2, "mlp", "model.layers.2", (), (), 7, 7)
    reasons = {"layers.1.mlp": "it is not alone"}
    topology = dataclasses.replace(TOPOLOGY, blocks=(block,), blocks_refused=reasons)
    point = DesignPoint.of({"layers.2.mlp": TensorChoice.removal(), "layers.1.up": TensorChoice("svd", 3)})
    assert DesignPoint.read(point.canonical_json, topology) == point
    assert point.removed == ("layers.2.mlp",)
    assert point.compact(topology) is None
    alone = DesignPoint.of({"layers.2.mlp": TensorChoice.removal()})
    assert alone.compact(topology) == {"method": "removed", "rank": 0, "layers": [2], "roles": ["mlp"]}
    assert DesignPoint.from_json(alone.compact(topology) or {}, topology) == alone
    with pytest.raises(
        PointError, match=r"'layers.1.mlp' must be a block that the model can skip exactly, but it is not alone"
    ):
        DesignPoint.from_json({"tensors": {"layers.1.mlp": {"method": "removed", "rank": 0}}}, topology)
    assert topology.tensors_of("layers.1.up") == ("layers.1.up",)


@settings(deadline=None)
@given(points)
def test_the_expanded_form_round_trips(point: DesignPoint) -> None:
    assert DesignPoint.from_json(point.to_json(), TOPOLOGY) == point
    assert DesignPoint.from_json(json.dumps(point.to_json()), TOPOLOGY) == point
    assert DesignPoint.read(point.canonical_json, TOPOLOGY) == point
    assert "\n" not in point.canonical_json


@settings(deadline=None)
@given(choices, st.sets(st.integers(0, 3), min_size=1), st.sets(st.sampled_from(ROLES), min_size=1))
def test_the_compact_form_round_trips(choice: TensorChoice, layers: set[int], roles: set[str]) -> None:
    point = DesignPoint.uniform(TOPOLOGY, choice.method, choice.rank, sorted(layers), sorted(roles))
    compact = point.compact(TOPOLOGY)
    assert compact is not None
    assert DesignPoint.from_json(json.dumps(compact), TOPOLOGY) == point
    assert compact["layers"] == sorted(layers)
    assert compact["roles"] == ("all" if len(roles) == len(ROLES) else [r for r in ROLES if r in roles])


@settings(deadline=None)
@given(points)
def test_compact_is_exact_or_none(point: DesignPoint) -> None:
    compact = point.compact(TOPOLOGY)
    if compact is not None:
        assert DesignPoint.from_json(compact, TOPOLOGY) == point
        return
    # Independent check: the point is not one choice over a full grid of layers x roles.
    tensors = [TOPOLOGY[name] for name, _ in point]
    layers, roles = {t.layer for t in tensors}, {t.role for t in tensors}
    is_grid = len(tensors) == len(layers) * len(roles) and None not in layers
    assert not (is_grid and tensors and len({choice for _, choice in point}) == 1)


def test_the_documented_forms() -> None:
    compact = '{"method": "tucker", "rank": 1, "layers": [2, 3], "roles": "all"}'
    point = DesignPoint.from_json(compact, TOPOLOGY)
    assert len(point) == 2 * len(ROLES)
    assert point.by_name["layers.2.query"] == TensorChoice("tucker", 1)
    assert DesignPoint.from_json('{"method": "tucker", "rank": 1, "layers": [3, 2]}', TOPOLOGY) == point
    expanded = {"tensors": {"layers.2.query": {"method": "svd", "rank": 64}}}
    assert DesignPoint.from_json(expanded, TOPOLOGY).by_name == {"layers.2.query": TensorChoice("svd", 64)}
    outside = {"tensors": {"head": {"method": "svd", "rank": 2}}}
    assert DesignPoint.from_json(outside, TOPOLOGY).compact(TOPOLOGY) is None
    for dense in ("{}", "dense", " dense\n", '{"tensors": {}}', '{"method": "svd", "rank": 3, "layers": []}'):
        assert DesignPoint.read(dense, TOPOLOGY) == DesignPoint.dense()
    assert DesignPoint.dense().is_dense
    assert not point.is_dense


@settings(deadline=None)
@given(st.dictionaries(st.sampled_from(sorted(TOPOLOGY.by_name)), choices, min_size=2), st.randoms())
def test_order_does_not_matter(chosen: dict[str, TensorChoice], random: Any) -> None:
    shuffled = list(chosen.items())
    random.shuffle(shuffled)
    first, second = DesignPoint.of(chosen), DesignPoint(tuple(shuffled))
    assert first == second
    assert hash(first) == hash(second)
    assert first.id == second.id
    assert len(first.id) == 12


@settings(deadline=None)
@given(points, points)
def test_ids_are_unique(first: DesignPoint, second: DesignPoint) -> None:
    assert (first.id == second.id) == (first == second)


def test_ids_stay_the_same_between_versions() -> None:
    # Studies and exports store ids: a change here would orphan every stored point.
    point = DesignPoint.of({"layers.0.up": TensorChoice("svd", 8), "layers.0.down": TensorChoice("tucker", 1)})
    assert point.canonical_json == (
        '{"tensors":{"layers.0.down":{"method":"tucker","rank":1},"layers.0.up":{"method":"svd","rank":8}}}'
    )
    assert point.id == "b7f05280ef05"


@pytest.mark.parametrize("rank", [0, -3, 1.0, 2.5, "8", None, True, [1]])
def test_a_rank_is_a_positive_integer(rank: Any) -> None:
    with pytest.raises(PointError, match="`rank >= 1` must hold and be an integer, but got rank="):
        TensorChoice("svd", rank)
    with pytest.raises(PointError, match="`rank >= 1`"):
        DesignPoint.from_json({"method": "svd", "rank": rank}, TOPOLOGY)


def test_a_tensor_is_named_once() -> None:
    with pytest.raises(PointError, match="named once"):
        DesignPoint((("layers.0.up", TensorChoice("svd", 1)), ("layers.0.up", TensorChoice("svd", 2))))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"method": "svdd", "rank": 1}', "got 'svdd'; did you mean 'svd'"),
        ('{"method": "svd"}', "needs 'rank'"),
        ('{"rank": 2}', "needs 'method'"),
        ('{"method": ["svd"], "rank": 1}', "`method` must be a name"),
        ('{"method": "svd", "rank": 1, "layer": [2]}', "got 'layer'; did you mean 'layers'"),
        ('{"method": "svd", "rank": 1, "layers": 2}', "`layers` must be"),
        ('{"method": "svd", "rank": 1, "layers": [true]}', "`layers` must be"),
        ('{"method": "svd", "rank": 1, "layers": [4]}', "`0 <= layer < 4`"),
        ('{"method": "svd", "rank": 1, "layers": "some"}', "`layers` must be 'all'"),
        ('{"method": "svd", "rank": 1, "roles": "query"}', r"write \[query\]"),
        ('{"method": "svd", "rank": 1, "roles": ["queri"]}', "did you mean 'query'"),
        ('{"method": "svd", "rank": NaN}', "`rank >= 1`"),
        ('{"method": "svd", "rank": ' + "9" * 5000 + "}", "valid JSON"),
        ('{"tensors": []}', "`tensors` must map"),
        ('{"tensors": {"layers.0.query": 3}}', "must be like"),
        ('{"tensors": {"layers.9.query": {"method": "svd", "rank": 1}}}', "got 'layers.9.query'; did you mean"),
        ('{"tensors": {"layers.0.query": {"method": "svd", "rank": 1, "core": 1}}}', "got 'core'"),
        ('{"tensors": {}, "method": "svd"}', "the keys of a point are tensors"),
        ("[1, 2]", "must be a JSON object"),
        ('"dense"', "must be a JSON object"),
        ("{", "valid JSON"),
        ('{"a":' * 100_000, "valid JSON"),
        ("", "readable JSON file"),
        ("no/such/file.json", "No such file"),
        ("a\0b", "readable JSON file"),
        ("x" * 100_000, "readable JSON file"),
        ("\ud800", "readable JSON file"),
    ],
)
def test_invalid_points_are_one_error_line(text: str, message: str) -> None:
    with pytest.raises(PointError, match=message) as caught:
        DesignPoint.read(text, TOPOLOGY)
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 600


def test_files_are_read_and_folders_and_binary_files_rejected(tmp_path: Path) -> None:
    file = tmp_path / "point.json"
    file.write_text('{"method": "svd", "rank": 4, "layers": [0], "roles": ["up"]}\n')
    assert DesignPoint.read(str(file), TOPOLOGY).by_name == {"layers.0.up": TensorChoice("svd", 4)}
    file.write_bytes(b"\xff\xfe\x00")
    for bad in (file, tmp_path):
        with pytest.raises(PointError):
            DesignPoint.read(str(bad), TOPOLOGY)


@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(json_values)
def test_any_json_is_a_point_or_a_point_error(value: Any) -> None:
    for content in (value, json.dumps(value)):
        try:
            point = DesignPoint.from_json(content, TOPOLOGY)
        except PointError:
            continue
        assert DesignPoint.from_json(point.to_json(), TOPOLOGY) == point


@settings(deadline=None)
@given(st.text(max_size=60))
def test_any_text_is_a_point_or_a_point_error(text: str) -> None:
    for read in (DesignPoint.from_json, DesignPoint.read):
        with contextlib.suppress(PointError):
            assert isinstance(read(text, TOPOLOGY), DesignPoint)
