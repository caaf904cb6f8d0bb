"""The sequential pass against passes of the whole model, on several families, devices and budgets."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from decomposition_support import some_windows, windows_of
from tiny_models import as_loaded, save_tiny_model, tiny_model, with_random_vectors

from dse.decomposition import CalibrationWindows, FactorBank, GramSettings, StoreBudget, iterate_layer_grams
from dse.decomposition.layer_calls import CallRecorder, NotSequentialError, check_layer_calls
from dse.design_point import DesignPoint
from dse.models import LoadedModel, load_model
from dse.models.layer_paths import layer_modules
from dse.models.tensor_store import TensorStore

FAMILIES = ("llama", "qwen3", "gemma3_text", "gpt2", "phi", "bloom", "olmo2", "gpt_neox", "qwen3_moe", "bert")
WHOLE = GramSettings(is_sequential=False)
Grams = tuple[dict[str, torch.Tensor], dict[str, torch.Tensor], set[tuple[str, ...]]]


def grams_of(loaded: LoadedModel, windows: CalibrationWindows, settings: GramSettings, gradients: bool = True) -> Grams:
    names = [t.name for t in loaded.topology.tensors if t.layer is not None] + [s.name for s in loaded.topology.stacks]
    grams: dict[str, torch.Tensor] = {}
    of_gradients: dict[str, torch.Tensor] = {}
    groups: set[tuple[str, ...]] = set()
    for found in iterate_layer_grams(loaded, names, windows, with_gradients=gradients, settings=settings):
        for sharing, gram in found.sharing.items():
            groups.add(sharing)
            grams |= dict.fromkeys(sharing, gram.clone())
        of_gradients |= {name: gram.clone() for name, gram in found.gradients.items()}
    return grams, of_gradients, groups


def assert_same(found: Grams, expected: Grams) -> None:
    assert found[2] == expected[2]
    for some, other in zip(found[:2], expected[:2], strict=True):
        assert some.keys() == other.keys()
        for name, gram in some.items():
            scale = float(other[name].norm())
            torch.testing.assert_close(gram, other[name], atol=1e-5 * scale, rtol=0)


@pytest.fixture
def never_by_groups(monkeypatch: pytest.MonkeyPatch) -> Callable[[], None]:
    """Makes a silent return to passes of the whole model an error."""

    def forbid() -> None:
        def fail(*_arguments: Any) -> None:
            raise AssertionError("the layers were not called one by one")

        monkeypatch.setattr("dse.decomposition.layer_grams._by_groups", fail)

    return forbid


@pytest.mark.parametrize("family", FAMILIES)
def test_the_sequential_pass_equals_passes_of_the_whole_model(family: str, never_by_groups: Callable[[], None]) -> None:
    loaded, windows = as_loaded(with_random_vectors(tiny_model(family))), some_windows(20)
    expected = grams_of(loaded, windows, WHOLE)
    without = grams_of(loaded, windows, WHOLE, gradients=False)
    never_by_groups()
    assert_same(grams_of(loaded, windows, GramSettings()), expected)
    assert_same(grams_of(loaded, windows, GramSettings(), gradients=False), without)


@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma2", "opt"])
def test_weights_on_disk_give_the_factors_of_a_resident_model(
    family: str, tmp_path: Path, never_by_groups: Callable[[], None]
) -> None:
    save_tiny_model(tmp_path / "model", family, vocab_size=64)
    resident, on_disk = load_model(str(tmp_path / "model")), load_model(str(tmp_path / "model"), weights_on_disk=True)
    assert on_disk.checkpoint is not None
    assert on_disk.fingerprint == resident.fingerprint
    points = [DesignPoint.uniform(resident.topology, m, 4) for m in ("svd", "whitened_svd", "fisher_svd")]
    expected = FactorBank.build(resident, points, some_windows(), folder=tmp_path / "a", settings=WHOLE)
    never_by_groups()
    found = FactorBank.build(on_disk, points, some_windows(), folder=tmp_path / "b")
    for name, choice in (entry for point in points for entry in point):
        product = expected.factors(name, choice).product()
        torch.testing.assert_close(found.factors(name, choice).product(), product, atol=1e-4, rtol=1e-3)
    assert all(parameter.is_meta for parameter in on_disk.model.parameters())


def test_devices_share_the_windows(llama: LoadedModel, never_by_groups: Callable[[], None]) -> None:
    windows = windows_of(torch.randint(64, (70, 64), generator=torch.Generator().manual_seed(3)))
    one = grams_of(llama, windows, GramSettings())
    never_by_groups()
    cpu = torch.device("cpu")
    assert_same(grams_of(llama, windows, GramSettings(devices=(cpu, cpu, cpu))), one)


def test_states_that_do_not_fit_go_to_disk(llama: LoadedModel, tmp_path: Path) -> None:
    expected = grams_of(llama, some_windows(), GramSettings())
    settings = GramSettings(states=StoreBudget(0, 0), folder=tmp_path / "states")
    assert_same(grams_of(llama, some_windows(), settings), expected)
    assert list((tmp_path / "states").iterdir()) == []  # the file has no name


def test_a_store_reuses_places_and_counts_bytes(tmp_path: Path) -> None:
    store = TensorStore(StoreBudget(4096, 0), tmp_path)
    parts = [torch.randn(32, 32, generator=torch.Generator().manual_seed(i)) for i in range(3)]
    for index, part in enumerate(parts):
        store.put(index, part)
    assert store.bytes_by_place == {"device": 4096, "host": 0, "disk": 8192}
    assert all(torch.equal(store.get(index, part.device), part) for index, part in enumerate(parts))
    store.put(1, parts[2].bfloat16())
    store.drop(2)
    store.put(3, parts[0])
    assert store.bytes_by_place["disk"] == 8192 + 2048
    assert torch.equal(store.get(1, parts[2].device), parts[2].bfloat16())
    store.drop(0)
    assert store.bytes_by_place["device"] == 0


@pytest.mark.parametrize("method", ["whitened_svd", "fisher_svd"])
def test_a_killed_build_continues_with_the_missing_tensors(
    llama: LoadedModel, tmp_path: Path, method: str, never_by_groups: Callable[[], None]
) -> None:
    never_by_groups()
    point = DesignPoint.uniform(llama.topology, method, 3)
    whole = FactorBank.build(llama, [point], some_windows(), folder=tmp_path / "whole")
    decomposed = []

    def die(phase: str, done: int, total: int) -> None:
        if phase == "decompose":
            decomposed.append((done, total))
            if done == 9 and len(decomposed) < 20:
                raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        FactorBank.build(llama, [point], some_windows(), folder=tmp_path / "bank", progress=die)
    again = FactorBank.build(llama, [point], some_windows(), folder=tmp_path / "bank", progress=die)
    assert decomposed[-1] == (len(llama.topology.tensors) - 9,) * 2
    for name, choice in point:
        torch.testing.assert_close(again.factors(name, choice).product(), whole.factors(name, choice).product())


def test_layers_that_pass_on_more_than_hidden_states_are_noticed(llama: LoadedModel) -> None:
    layers = layer_modules(llama.model, llama.topology)
    before = {"hidden": torch.zeros(())}

    def leave(_module: Any, _arguments: Any, output: torch.Tensor) -> torch.Tensor:
        before["hidden"], earlier = output.mean(), before["hidden"]
        return output + earlier

    handles = [layer.mlp.register_forward_hook(leave) for layer in layers]
    expected = grams_of(llama, some_windows(), WHOLE)
    before["hidden"] = torch.tensor(5.0)
    with pytest.raises(NotSequentialError, match="differs from the model's own pass"):
        check_layer_calls(CallRecorder(llama.model, layers), torch.arange(12)[None], len(layers))
    before["hidden"] = torch.zeros(())
    found = grams_of(llama, some_windows(), GramSettings())
    for handle in handles:
        handle.remove()
    assert found[2] == expected[2]


def test_no_hook_and_no_forward_remains(llama: LoadedModel) -> None:
    grams_of(llama, some_windows(), GramSettings())
    for module in llama.model.modules():
        assert not module._forward_pre_hooks
        assert not module._forward_hooks
        assert "forward" not in vars(module)


@pytest.mark.real_model
@pytest.mark.parametrize("method", ["whitened_svd", "fisher_svd"])
def test_smollm2_gets_the_factors_of_passes_of_the_whole_model(method: str, tmp_path: Path) -> None:
    loaded = load_model("demo:smollm2-135m-instruct")
    token_ids = loaded.tokenizer("The cat sat on the mat. " * 400)["input_ids"][:256]
    windows = windows_of(torch.tensor(token_ids).reshape(4, 64))
    point = DesignPoint.uniform(loaded.topology, method, 16, [0, 29], ["query", "down"])
    expected = FactorBank.build(loaded, [point], windows, folder=tmp_path / "whole", settings=WHOLE)
    found = FactorBank.build(loaded, [point], windows, folder=tmp_path / "sequential")
    for name, choice in point:
        a, b = found.factors(name, choice).product(), expected.factors(name, choice).product()
        assert float((a - b).norm() / b.norm()) < 1e-3
