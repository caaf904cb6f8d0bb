"""Where weights are while points are evaluated: bytes, exact restoration, and the choice by what fits."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from tiny_models import loaded_tiny_model, save_tiny_model
from torch import nn

from dse.decomposition import FactorBank, apply_point, decompose
from dse.design_point import DesignPoint, TensorChoice
from dse.errors import ModelError, PointError
from dse.models import LoadedModel, load_model
from dse.models.residency import choose_residency, place_weights, required_bytes
from dse.models.waiting_weights import WaitingWeights

TOKENS = torch.arange(3, 15)[None]
GB = 10**9


@pytest.fixture
def loaded(tmp_path: Path) -> LoadedModel:
    model = loaded_tiny_model("llama", attention_bias=True)
    model.waiting = WaitingWeights(0, tmp_path / "waiting")
    return model


def bytes_held(model: nn.Module) -> int:
    """Bytes of the memory behind all parameters; shared memory counts once."""
    storages = {p.untyped_storage().data_ptr(): p.untyped_storage().nbytes() for p in model.parameters()}
    return sum(storages.values())


def dense_bytes_of(loaded: LoadedModel, point: DesignPoint) -> int:
    return sum(4 * loaded.topology.matrix(name).parameters for name, _ in point)


@pytest.mark.parametrize("stack", [False, True])
def test_only_the_side_in_use_is_held(loaded: LoadedModel, tmp_path: Path, stack: bool) -> None:
    point = DesignPoint.uniform(loaded.topology, "svd", 4)
    if stack:
        names = [stack.name for stack in loaded.topology.stacks]
        point = DesignPoint.of(dict.fromkeys(names, TensorChoice("svd", 4)))
    bank = FactorBank.build(loaded, [point], folder=tmp_path / "bank")
    dense = loaded.model(TOKENS).logits
    before = {name: parameter.clone() for name, parameter in loaded.model.named_parameters()}
    modules = [loaded.model.get_submodule(p) for name, _ in point for p in loaded.topology.matrix(name).modules]
    with decompose(loaded, point, FactorBank.build(loaded, [point], folder=tmp_path / "bank")):
        expected_held = bytes_held(loaded.model)
    plain = apply_point(loaded.model, loaded.topology, point, bank)  # without waiting weights
    candidate, expected = loaded.model(TOKENS).logits, bytes_held(loaded.model)
    plain.undo()
    assert expected_held == expected
    handle = apply_point(loaded.model, loaded.topology, point, bank, loaded.waiting)
    for _ in range(2):
        assert torch.equal(loaded.model(TOKENS).logits, candidate)
        assert sum(bytes_held(module) for module in modules) < 0.1 * dense_bytes_of(loaded, point)
        handle.use_baseline()
        assert torch.equal(loaded.model(TOKENS).logits, dense)
        handle.use_candidate()
    handle.undo()
    assert not handle.is_applied
    for name, parameter in loaded.model.named_parameters():
        assert torch.equal(parameter, before[name])
    assert torch.equal(loaded.model(TOKENS).logits, dense)


def test_a_failed_point_brings_the_weights_back(loaded: LoadedModel, tmp_path: Path) -> None:
    point = DesignPoint.uniform(loaded.topology, "svd", 4)
    names = [name for name, _ in point]
    bank = FactorBank.build(loaded, {"svd": dict.fromkeys(names[:-1], 4)}, folder=tmp_path / "bank")
    dense = loaded.model(TOKENS).logits
    with pytest.raises(PointError, match="build the bank"):
        apply_point(loaded.model, loaded.topology, point, bank, loaded.waiting)
    assert torch.equal(loaded.model(TOKENS).logits, dense)


def test_weights_that_wait_are_kept_once(loaded: LoadedModel, tmp_path: Path) -> None:
    assert isinstance(loaded.waiting, WaitingWeights)
    point = DesignPoint.uniform(loaded.topology, "svd", 4)
    bank = FactorBank.build(loaded, [point], folder=tmp_path / "bank")
    sizes = []
    for _ in range(4):
        with decompose(loaded, point, bank) as handle:
            handle.use_baseline()
            handle.use_candidate()
        sizes.append(loaded.waiting.bytes_by_place["disk"])
    assert sizes[0] >= dense_bytes_of(loaded, point)
    assert len(set(sizes)) == 1  # places of earlier candidates are used again


@pytest.mark.parametrize(
    ("devices", "expected"),
    [([80 * GB], "dense_and_candidate"), ([24 * GB], "candidate"), ([24 * GB] * 2, "candidate"),
     ([14 * GB] * 4, "sharded"), ([12 * GB, 12 * GB], None), ([8 * GB], None)],
)  # fmt: skip
def test_the_first_residency_that_fits_is_chosen(devices: list[int], expected: str | None) -> None:
    assert choose_residency(16 * GB, devices) == expected


def test_required_bytes_add_up() -> None:
    both, one = (required_bytes(residency, 10 * GB) for residency in ("dense_and_candidate", "candidate"))  # type: ignore[arg-type]
    assert both - one == 10 * GB
    assert required_bytes("dense_and_candidate", 10 * GB, 2 * GB) - one == 2 * GB


def test_weights_are_placed(tmp_path: Path) -> None:
    save_tiny_model(tmp_path / "model", "llama")
    cpu = torch.device("cpu")
    for residency in ("auto", "dense_and_candidate", "candidate"):
        loaded = load_model(str(tmp_path / "model"), weights_on_disk=True)
        chosen = place_weights(loaded, residency, [cpu], tmp_path / "waiting")  # type: ignore[arg-type]
        assert chosen == ("dense_and_candidate" if residency == "auto" else residency)
        assert not any(parameter.is_meta for parameter in loaded.model.parameters())
        assert (loaded.waiting is not None) == (residency == "candidate")
    with pytest.raises(ModelError, match="needs several GPUs"):
        place_weights(load_model(str(tmp_path / "model"), weights_on_disk=True), "sharded", [cpu])
