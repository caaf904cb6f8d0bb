from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dse.errors import PointError
from dse.model_parts import DecomposableTensor
from dse.topology import Topology

ROLES = ("query", "up", "down")


def topology(layers: int = 3, *, skip: tuple[str, ...] = ()) -> Topology:
    """`layers` layers of three tensors and a head; `skip` names tensors that the model lacks."""
    tensors = [
        DecomposableTensor(f"layers.{i}.{role}", f"model.layers.{i}.{role}_proj", i, role, 8, 4)
        for i in range(layers)
        for role in ROLES
    ]
    tensors.append(DecomposableTensor("head", "lm_head", None, "head", 16, 8))
    kept = tuple(t for t in tensors if t.name not in skip)
    return Topology("TinyForCausalLM", "tiny", layers, kept, parameters_dense=1000)


def test_shape_and_size_of_a_tensor() -> None:
    tensor = topology()["layers.1.up"]
    assert (tensor.layer, tensor.role, tensor.shape, tensor.parameters) == (1, "up", (8, 4), 32)
    assert topology()["head"].parameters == 128


def test_roles_are_those_inside_the_layers_in_order_of_appearance() -> None:
    assert topology().roles == ROLES
    assert topology(skip=("layers.0.query",)).roles == ("up", "down", "query")


@pytest.mark.parametrize(
    ("name", "hint"),
    [
        ("layers.1.upp", "did you mean 'layers.1.up'?"),
        ("layer.2.query", "did you mean 'layers.2.query'?"),
        ("", "dse space"),
    ],
)
def test_an_unknown_tensor_is_an_error_that_names_the_closest(name: str, hint: str) -> None:
    with pytest.raises(PointError) as caught:
        topology()[name]
    assert hint in str(caught.value)
    assert "10 decomposable tensors" in str(caught.value)


def test_all_selects_the_tensors_inside_the_layers() -> None:
    assert topology().select() == tuple(f"layers.{i}.{role}" for i in range(3) for role in ROLES)
    assert "head" not in topology().select("all", "all")


@settings(deadline=None)
@given(st.sets(st.integers(0, 2)), st.sets(st.sampled_from(ROLES)))
def test_selection_is_the_product_of_layers_and_roles(layers: set[int], roles: set[str]) -> None:
    selected = topology().select(sorted(layers, reverse=True), roles)
    assert set(selected) == {f"layers.{i}.{role}" for i in layers for role in roles}
    order = list(topology().by_name)
    assert list(selected) == sorted(selected, key=order.index)


def test_a_layer_without_the_role_is_skipped() -> None:
    assert topology(skip=("layers.1.up",)).select([0, 1], ["up"]) == ("layers.0.up",)


@pytest.mark.parametrize("layer", [-1, 3, 10**30])
def test_a_layer_that_does_not_exist_is_rejected(layer: int) -> None:
    with pytest.raises(PointError, match=rf"`0 <= layer < 3` .* got layer={layer}$"):
        topology().select([0, layer])


def test_a_role_that_does_not_exist_is_rejected() -> None:
    with pytest.raises(PointError, match=r"one of query, up, down .* got 'quer'; did you mean 'query'"):
        topology().select("all", ["quer"])
    with pytest.raises(PointError, match="got 'head'"):  # outside the layers, so only selectable by its name
        topology().select("all", ["head"])


@pytest.mark.parametrize(("layers", "roles"), [("none", "all"), ("0", "all"), ("all", "query"), ("all", "")])
def test_a_word_other_than_all_is_rejected(layers: str, roles: str) -> None:
    with pytest.raises(PointError, match="must be 'all' or a list"):
        topology().select(layers, roles)
