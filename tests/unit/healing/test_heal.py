"""Healing: the loss against all logits at once, exact restoring, resuming, and what is trained."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch
from decomposition_support import windows_of
from tiny_models import loaded_tiny_model

from dse.decomposition import FactorBank, apply_point, pivoted_factors
from dse.design_point import DesignPoint, TensorChoice
from dse.errors import NonFiniteError, StudyError
from dse.evaluation.divergence import DenseDivergence, kl_divergence_of_logits
from dse.healing import HealedPoint, HealingSettings, Teacher, apply_healed, heal, read_healed, write_healed
from dse.healing.checkpointed_layers import checkpointed_layers
from dse.healing.trained_weights import TrainedWeights, balance, trained_modules
from dse.models import LoadedModel

SETTINGS = HealingSettings(tokens=640, batch_tokens=64, learning_rate=3e-3)
POINT = {
    "layers.0.up": TensorChoice("svd", 4),
    "layers.0.query_key_value": TensorChoice("svd", 6),
    "layers.1.gate": TensorChoice("tucker", 5),
    "layers.1.key": TensorChoice("svd", 3),
    "layers.2.down": TensorChoice("svd", 4),
}
WITH_PIVOTED = {
    **POINT,
    "layers.2.query": TensorChoice("svd", 5, form="pivoted"),
    "layers.2.attention_output": TensorChoice("svd", 5, form="pivoted"),
}


@pytest.fixture(scope="module")
def loaded() -> LoadedModel:
    return loaded_tiny_model("llama", initializer_range=0.2)


def text(count: int, seed: int) -> torch.Tensor:
    return torch.randint(3, 320, (count, 32), generator=torch.Generator().manual_seed(seed))


@pytest.fixture(scope="module")
def teacher(loaded: LoadedModel, tmp_path_factory: pytest.TempPathFactory) -> Teacher:
    return Teacher(loaded.model, windows_of(text(12, 0)), tmp_path_factory.mktemp("teacher"))


@pytest.fixture(scope="module")
def other(loaded: LoadedModel) -> DenseDivergence:
    return DenseDivergence(loaded.model, text(4, 1))


@pytest.fixture(scope="module")
def bank(loaded: LoadedModel, tmp_path_factory: pytest.TempPathFactory) -> FactorBank:
    return FactorBank.build(loaded, [DesignPoint.of(WITH_PIVOTED)], None, folder=tmp_path_factory.mktemp("bank"))


def healed(
    loaded: LoadedModel,
    bank: FactorBank,
    teacher: Teacher,
    other: DenseDivergence,
    settings: HealingSettings = SETTINGS,
    choices: dict[str, TensorChoice] = POINT,
    **options: Any,
) -> HealedPoint:
    applied = apply_point(loaded.model, loaded.topology, DesignPoint.of(choices), bank)
    try:
        return heal(loaded, applied, teacher, other, settings, **options)
    finally:
        applied.undo()


def test_the_loss_and_its_gradient_agree_with_all_logits_at_once(
    loaded: LoadedModel, bank: FactorBank, teacher: Teacher, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("dse.healing.teacher._CHUNK_BYTES", 4 * 320 * 5)
    rows = [0, 3, 7]
    with torch.no_grad():
        dense = loaded.model(input_ids=text(12, 0)[rows]).logits
    applied = apply_point(loaded.model, loaded.topology, DesignPoint.of(POINT), bank)
    weights = TrainedWeights(trained_modules(loaded.model, loaded.topology, applied.point))
    try:
        loss = teacher.backward(rows)
        found = {name: master.grad.clone() for name, master in weights.masters.items()}
        logits = loaded.model(input_ids=text(12, 0)[rows]).logits
        log_dense, log_point = dense.log_softmax(-1), logits.log_softmax(-1)
        direct = (log_dense.exp() * (log_dense - log_point)).sum(-1).mean()
        expected = torch.autograd.grad(direct, list(weights.masters.values()))
        assert loss == pytest.approx(float(direct.detach()), rel=1e-5)
        assert float(kl_divergence_of_logits(dense[0], logits[0].detach()).mean()) > 0.01
        for name, gradient in zip(found, expected, strict=True):
            torch.testing.assert_close(found[name], gradient, rtol=1e-3, atol=1e-6)
    finally:
        weights.restore()
        applied.undo()


def test_layers_computed_again_give_the_same_gradients(loaded: LoadedModel, bank: FactorBank, teacher: Teacher) -> None:
    applied = apply_point(loaded.model, loaded.topology, DesignPoint.of(POINT), bank)
    weights = TrainedWeights(trained_modules(loaded.model, loaded.topology, applied.point))
    try:
        gradients = []
        for is_on in (False, True):
            with checkpointed_layers(loaded, is_on=is_on):
                teacher.backward([1, 2])
            gradients.append({name: master.grad.clone() for name, master in weights.masters.items()})
            for master in weights.masters.values():
                master.grad = None
        for name, gradient in gradients[0].items():
            torch.testing.assert_close(gradients[1][name], gradient)
    finally:
        weights.restore()
        applied.undo()


def test_only_factors_and_norms_are_trained(loaded: LoadedModel, bank: FactorBank) -> None:
    applied = apply_point(loaded.model, loaded.topology, DesignPoint.of(WITH_PIVOTED), bank)
    try:
        names = set(trained_modules(loaded.model, loaded.topology, applied.point))
    finally:
        applied.undo()
    layer = "model.layers"
    expected = {
        f"{layer}.0.mlp.up_proj.left.weight",
        f"{layer}.0.mlp.up_proj.right.weight",
        f"{layer}.0.input_layernorm.right.weight",
        f"{layer}.0.input_layernorm.norm.weight",
        *(f"{layer}.0.self_attn.{role}_proj.weight" for role in "qkv"),
        *(f"{layer}.1.mlp.gate_proj.{part}.weight" for part in ("left", "core", "right")),
        *(f"{layer}.1.self_attn.k_proj.{part}.weight" for part in ("left", "right")),
        *(f"{layer}.2.mlp.down_proj.{part}.weight" for part in ("left", "right")),
        *(f"{layer}.2.self_attn.{role}_proj.{part}.weight" for role in "qo" for part in ("pivots", "combinations")),
        *(f"{layer}.{i}.{place}_layernorm.weight" for i in (1, 2) for place in ("input", "post_attention")),
        f"{layer}.0.post_attention_layernorm.weight",
        "model.norm.weight",
    }
    assert names == expected


def test_balanced_factors_have_equal_norms_and_the_same_product(loaded: LoadedModel, bank: FactorBank) -> None:
    applied = apply_point(loaded.model, loaded.topology, DesignPoint.of(POINT), bank)
    model = loaded.model
    weights = TrainedWeights(trained_modules(model, loaded.topology, applied.point))
    try:
        with torch.no_grad():
            before = model(input_ids=text(2, 5)).logits
            balance(model, loaded.topology, applied.point, weights.masters)
            torch.testing.assert_close(model(input_ids=text(2, 5)).logits, before, rtol=1e-4, atol=1e-5)
        up = model.model.layers[0].mlp.up_proj
        torch.testing.assert_close(up.left.weight.norm(dim=0), up.right.weight.norm(dim=1))
        attention, norm = model.model.layers[0].self_attn, model.model.layers[0].input_layernorm
        stacked = torch.cat([attention.q_proj.weight, attention.k_proj.weight, attention.v_proj.weight])
        torch.testing.assert_close(stacked.norm(dim=0), norm.right.weight.norm(dim=1))
    finally:
        weights.restore()
        applied.undo()


def test_healing_lowers_the_divergence_and_leaves_the_model_as_it_was(
    loaded: LoadedModel, bank: FactorBank, teacher: Teacher, other: DenseDivergence
) -> None:
    before = {name: tensor.clone() for name, tensor in loaded.model.state_dict().items()}
    # The training text itself decides when to stop: random tokens of another draw have nothing in common with it.
    same = DenseDivergence(loaded.model, text(12, 0))
    found = healed(loaded, bank, teacher, same)
    assert found.report.kl_after < 0.9 * found.report.kl_before
    assert found.report.tokens == 640
    assert min(kl for _, kl in found.report.history) == found.report.kl_after
    after = loaded.model.state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)
    applied = apply_point(loaded.model, loaded.topology, DesignPoint.of(POINT), bank)
    apply_healed(applied, loaded.model, found.weights)
    assert same.measure().interval.value == pytest.approx(found.report.kl_after, rel=1e-5)
    applied.undo()
    assert same.measure().interval.value == 0.0


def test_text_of_another_source_that_does_not_gain_stops_the_training(
    loaded: LoadedModel, bank: FactorBank, teacher: Teacher, other: DenseDivergence
) -> None:
    settings = dataclasses.replace(SETTINGS, tokens=64_000, learning_rate=0.3)
    found = healed(loaded, bank, teacher, other, settings)
    assert found.report.tokens < 64_000
    assert found.report.kl_after <= found.report.kl_before
    assert found.report.best_tokens <= found.report.tokens


def test_the_search_takes_the_best_of_the_rates_that_it_tried(
    loaded: LoadedModel, bank: FactorBank, teacher: Teacher
) -> None:
    same = DenseDivergence(loaded.model, text(12, 0))
    report = healed(loaded, bank, teacher, same, dataclasses.replace(SETTINGS, learning_rate=None)).report
    best = min(report.rates_tried, key=report.rates_tried.__getitem__)
    assert float(best) == pytest.approx(report.learning_rate, rel=0.05)
    assert len(report.rates_tried) >= 3


def test_a_limit_that_leaves_no_time_keeps_the_points_own_weights(
    loaded: LoadedModel, bank: FactorBank, teacher: Teacher, other: DenseDivergence
) -> None:
    settings = dataclasses.replace(SETTINGS, minutes=1e-9, learning_rate=None)
    report = healed(loaded, bank, teacher, other, settings).report
    assert (report.tokens, report.best_tokens, report.history, report.rates_tried) == (0, 0, (), {})
    assert report.kl_after == report.kl_before


class KilledError(Exception):
    pass


def test_a_killed_healing_continues_to_the_same_weights(
    loaded: LoadedModel,
    bank: FactorBank,
    teacher: Teacher,
    other: DenseDivergence,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    undisturbed = healed(loaded, bank, teacher, other)
    monkeypatch.setattr("dse.healing.training._SAVE_EVERY_S", 0.0)

    def kill(_phase: str, done: int, _total: int) -> None:
        if done >= 320:
            raise KilledError

    with pytest.raises(KilledError):
        healed(loaded, bank, teacher, other, folder=tmp_path, progress=kill)
    seen: list[int] = []
    resumed = healed(loaded, bank, teacher, other, folder=tmp_path, progress=lambda _p, done, _t: seen.append(done))
    assert min(seen) >= 320
    assert resumed.report.history == undisturbed.report.history
    for name, weight in undisturbed.weights.items():
        assert torch.equal(resumed.weights[name], weight)


def test_a_state_of_other_settings_is_not_continued(
    loaded: LoadedModel,
    bank: FactorBank,
    teacher: Teacher,
    other: DenseDivergence,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("dse.healing.training._SAVE_EVERY_S", 0.0)
    healed(loaded, bank, teacher, other, folder=tmp_path)
    seen: list[int] = []
    settings = dataclasses.replace(SETTINGS, seed=1)
    healed(loaded, bank, teacher, other, settings, folder=tmp_path, progress=lambda _p, done, _t: seen.append(done))
    assert min(seen) == 64


def test_a_loss_that_is_not_finite_is_an_error(
    loaded: LoadedModel, bank: FactorBank, teacher: Teacher, other: DenseDivergence
) -> None:
    with pytest.raises(NonFiniteError, match="finite"):
        healed(loaded, bank, teacher, other, dataclasses.replace(SETTINGS, learning_rate=float("inf")))
    assert other.measure().interval.value == 0.0


def test_masters_of_a_half_precision_model_are_float32(tmp_path: Path) -> None:
    half = loaded_tiny_model("llama", initializer_range=0.2)
    half.model.to(torch.bfloat16)
    point = DesignPoint.of({"layers.0.up": TensorChoice("svd", 4)})
    bank = FactorBank.build(half, [point], None, folder=tmp_path / "bank")
    teacher = Teacher(half.model, windows_of(text(12, 0)), tmp_path)
    same = DenseDivergence(half.model, text(12, 0))
    applied = apply_point(half.model, half.topology, point, bank)
    weights = TrainedWeights(trained_modules(half.model, half.topology, point))
    assert {master.dtype for master in weights.masters.values()} == {torch.float32}
    weights.restore()
    found = heal(half, applied, teacher, same, dataclasses.replace(SETTINGS, learning_rate=1e-3))
    assert found.report.kl_after < found.report.kl_before
    assert {weight.dtype for weight in found.weights.values() if weight.is_floating_point()} == {torch.bfloat16}


def test_trained_weights_keep_the_indices_that_they_belong_to(
    loaded: LoadedModel, bank: FactorBank, teacher: Teacher, other: DenseDivergence, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Another device may choose other independent rows when it applies the point."""
    found = healed(loaded, bank, teacher, other, choices=WITH_PIVOTED)
    assert found.report.kl_after < found.report.kl_before
    point = DesignPoint.of(WITH_PIVOTED)

    def outputs() -> torch.Tensor:
        with torch.inference_mode():
            return loaded.model(input_ids=text(2, 7)).logits

    applied = apply_point(loaded.model, loaded.topology, point, bank)
    apply_healed(applied, loaded.model, found.weights)
    expected = outputs()
    applied.undo()
    last = pivoted_factors._independent_rows
    monkeypatch.setattr(pivoted_factors, "_independent_rows", lambda tall: last(tall.flip(1)))  # C is that of `tall`
    monkeypatch.setattr(pivoted_factors, "_LARGEST_COEFFICIENT", 1e9)
    applied = apply_point(loaded.model, loaded.topology, point, bank)
    query = loaded.model.get_submodule("model.layers.2.self_attn.q_proj")
    before = query.chosen
    apply_healed(applied, loaded.model, found.weights)
    assert query.chosen != before
    assert torch.equal(outputs(), expected)
    applied.use_baseline()
    assert query.chosen == before
    applied.undo()
    wrong = {name: t[:-1] if name.endswith("chosen") else t for name, t in found.weights.items()}
    applied = apply_point(loaded.model, loaded.topology, point, bank)
    with pytest.raises(StudyError, match="must belong to pivoted factors of rank 4"):
        apply_healed(applied, loaded.model, wrong)
    applied.undo()


def test_files_come_back_and_refuse_another_point(
    loaded: LoadedModel, bank: FactorBank, teacher: Teacher, other: DenseDivergence, tmp_path: Path
) -> None:
    found = healed(loaded, bank, teacher, other)
    point = DesignPoint.of(POINT)
    assert read_healed(tmp_path / "absent", point) is None
    write_healed(tmp_path, point, found.weights, found.report.to_json())
    weights, report = read_healed(tmp_path, point)
    assert all(torch.equal(weights[name], weight) for name, weight in found.weights.items())
    assert report["kl_after"] == found.report.kl_after
    with pytest.raises(StudyError, match="must belong to point"):
        read_healed(tmp_path, DesignPoint.of({"layers.0.up": TensorChoice("svd", 4)}))
    (tmp_path / "weights.safetensors").write_bytes(b"damaged")
    with pytest.raises(StudyError, match="must be readable"):
        read_healed(tmp_path, point)
