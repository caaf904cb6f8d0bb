from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from dse.config import CalibrationConfig, CalibrationSource
from dse.cost import break_even_rank
from dse.decomposition import CalibrationWindows, FactorBank, calibration_windows, decompose, iterate_grams
from dse.design_point import DesignPoint, TensorChoice
from dse.errors import CalibrationError, PointError, StorageFullError
from dse.models import LoadedModel


@pytest.fixture
def windows(llama: LoadedModel) -> CalibrationWindows:
    config = CalibrationConfig(sources=[CalibrationSource(builtin="general")], tokens=2048, window=64)
    return calibration_windows(llama.tokenizer, config)


def everything(loaded: LoadedModel) -> dict[str, int]:
    return {tensor.name: break_even_rank(*tensor.shape) for tensor in loaded.topology.tensors}


class Counter:
    """Counts the tensors that a build decomposes."""

    def __init__(self) -> None:
        self.decomposed = 0

    def __call__(self, phase: str, done: int, total: int) -> None:
        if phase == "decompose":
            self.decomposed = done


def test_smaller_ranks_are_slices_of_the_bank(llama: LoadedModel, windows: CalibrationWindows, tmp_path: Path) -> None:
    bank = FactorBank.build(llama, {"whitened_svd": everything(llama)}, windows, folder=tmp_path)
    small = FactorBank.build(llama, {"whitened_svd": {"layers.1.down": 2}}, windows, folder=tmp_path / "small")
    choice = TensorChoice("whitened_svd", 2)
    torch.testing.assert_close(
        bank.factors("layers.1.down", choice).product(),
        small.factors("layers.1.down", choice).product(),
        atol=1e-5,
        rtol=1e-4,
    )


def test_reopening_decomposes_nothing_and_returns_the_same_factors(llama: LoadedModel, tmp_path: Path) -> None:
    first = FactorBank.build(llama, {"svd": everything(llama)}, folder=tmp_path)
    counter = Counter()
    again = FactorBank.build(llama, {"svd": everything(llama)}, folder=tmp_path, progress=counter)
    assert counter.decomposed == 0
    choice = TensorChoice("svd", 5)
    assert torch.equal(first.factors("layers.0.up", choice).left, again.factors("layers.0.up", choice).left)


def test_a_larger_rank_rebuilds_only_that_tensor(llama: LoadedModel, tmp_path: Path) -> None:
    FactorBank.build(llama, {"svd": {"layers.0.up": 2, "layers.1.up": 2}}, folder=tmp_path)
    counter = Counter()
    bank = FactorBank.build(llama, {"svd": {"layers.0.up": 9, "layers.1.up": 2}}, folder=tmp_path, progress=counter)
    assert counter.decomposed == 1
    assert bank.factors("layers.0.up", TensorChoice("svd", 9)).rank == 9


@pytest.mark.parametrize("damage", ["truncate", "flip", "delete", "manifest", "manifest_types"])
def test_damaged_files_are_detected_and_rebuilt(llama: LoadedModel, tmp_path: Path, damage: str) -> None:
    requests = {"svd": everything(llama)}
    intact = FactorBank.build(llama, requests, folder=tmp_path)
    choice = TensorChoice("svd", 4)
    expected = intact.factors("layers.2.gate", choice).product()
    folder = intact.folders["svd"]
    file = folder / "layers.2.gate.safetensors"
    content = bytearray(file.read_bytes())
    if damage == "truncate":
        file.write_bytes(content[:-10])
    elif damage == "flip":
        content[-1] ^= 1
        file.write_bytes(content)
    elif damage == "delete":
        file.unlink()
    elif damage == "manifest":
        (folder / "manifest.json").write_text("{half of a")
    else:
        (folder / "manifest.json").write_text(json.dumps({"schema": 1, "tensors": [1]}))
    counter = Counter()
    rebuilt = FactorBank.build(llama, requests, folder=tmp_path, progress=counter)
    assert counter.decomposed == (1 if damage in ("truncate", "flip", "delete") else len(llama.topology.tensors))
    torch.testing.assert_close(rebuilt.factors("layers.2.gate", choice).product(), expected)


def test_a_killed_build_continues_where_it_stopped(llama: LoadedModel, tmp_path: Path) -> None:
    def die(phase: str, done: int, total: int) -> None:
        if phase == "decompose" and done == 5:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        FactorBank.build(llama, {"svd": everything(llama)}, folder=tmp_path, progress=die)
    counter = Counter()
    FactorBank.build(llama, {"svd": everything(llama)}, folder=tmp_path, progress=counter)
    assert counter.decomposed == len(llama.topology.tensors) - 5


def test_banks_differ_by_model_and_calibration_text(
    llama: LoadedModel, gpt2: LoadedModel, windows: CalibrationWindows, tmp_path: Path
) -> None:
    other = calibration_windows(
        llama.tokenizer,
        CalibrationConfig(sources=[CalibrationSource(builtin="python_docs")], tokens=2048, window=64),
    )
    assert other.fingerprint != windows.fingerprint
    request = {"whitened_svd": {"layers.0.up": 2}}
    folders = {
        FactorBank.build(llama, request, windows, folder=tmp_path).folders["whitened_svd"],
        FactorBank.build(llama, request, other, folder=tmp_path).folders["whitened_svd"],
        FactorBank.build(gpt2, request, windows, folder=tmp_path).folders["whitened_svd"],
        FactorBank.build(llama, {"svd": {"layers.0.up": 2}}, windows, folder=tmp_path).folders["svd"],
    }
    assert len(folders) == 4
    # A method without calibration does not depend on the text.
    plain = FactorBank.build(llama, {"svd": {"layers.0.up": 2}}, other, folder=tmp_path).folders["svd"]
    assert plain in folders


def test_calibration_text_can_be_given_by_name(llama: LoadedModel, tmp_path: Path) -> None:
    request = {"whitened_svd": {"layers.0.up": 2}}
    (tmp_path / "mine.txt").write_text("the quick brown fox " * 2000)
    folders = {
        FactorBank.build(llama, request, text, folder=tmp_path / "banks").folders["whitened_svd"]
        for text in ("general", "python_docs", str(tmp_path / "mine.txt"))
    }
    assert len(folders) == 3


def test_banks_that_cannot_be_built_are_refused(
    llama: LoadedModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(CalibrationError, match="needs calibration text"):
        FactorBank.build(llama, {"whitened_svd": {"layers.0.up": 2}}, folder=tmp_path)
    bank = FactorBank.build(llama, {"svd": {"layers.0.up": 2}}, folder=tmp_path)
    with pytest.raises(PointError, match="build the bank"):
        bank.factors("layers.0.up", TensorChoice("tucker", 1))
    point = DesignPoint.of({"layers.0.up": TensorChoice("svd", 2)})
    with decompose(llama, point, bank), pytest.raises(PointError, match="must be dense"):
        FactorBank.build(llama, {"svd": {"layers.0.up": 3}}, folder=tmp_path)
    taken = tmp_path / "file"
    taken.write_text("no folder")
    with pytest.raises(StorageFullError, match="must be writable"):
        FactorBank.build(llama, {"svd": {"layers.0.up": 2}}, folder=taken)


@pytest.mark.parametrize("budget_bytes", [1, 12_000, 10**9])
def test_grams_equal_a_direct_sum_for_any_memory_budget(
    llama: LoadedModel, windows: CalibrationWindows, budget_bytes: int
) -> None:
    names = tuple(tensor.name for tensor in llama.topology.tensors)
    inputs: dict[str, list[torch.Tensor]] = {name: [] for name in names}
    handles = [
        llama.model.get_submodule(llama.topology[name].module).register_forward_pre_hook(
            lambda _module, arguments, name=name: inputs[name].append(arguments[0].reshape(-1, arguments[0].shape[-1]))
        )
        for name in names
    ]
    with torch.inference_mode():
        for row in windows.token_ids:
            llama.model(row[None])
    for handle in handles:
        handle.remove()
    seen = []
    for sharing, gram in iterate_grams(llama.model, llama.topology, names, windows, budget_bytes=budget_bytes):
        seen += sharing
        for name in sharing:
            x = torch.cat(inputs[name]).double()
            torch.testing.assert_close(gram.double(), x.T @ x / len(x), atol=1e-5, rtol=1e-3)
    assert sorted(seen) == sorted(names)


def test_tensors_with_the_same_input_share_a_gram_matrix(llama: LoadedModel, windows: CalibrationWindows) -> None:
    names = tuple(t.name for t in llama.topology.tensors if t.layer == 0)
    groups = [sharing for sharing, _ in iterate_grams(llama.model, llama.topology, names, windows)]
    roles = [tuple(name.rsplit(".", 1)[1] for name in group) for group in groups]
    assert roles == [("query", "key", "value"), ("attention_output",), ("gate", "up"), ("down",)]


def test_no_hook_remains_registered(llama: LoadedModel, windows: CalibrationWindows) -> None:
    names = tuple(t.name for t in llama.topology.tensors)
    list(iterate_grams(llama.model, llama.topology, names, windows))
    assert not any(module._forward_pre_hooks for module in llama.model.modules())


class TestCalibrationWindows:
    def test_sources_contribute_by_weight(self, llama: LoadedModel) -> None:
        sources = [CalibrationSource(builtin="general", weight=3), CalibrationSource(builtin="python_docs", weight=1)]
        windows = calibration_windows(llama.tokenizer, CalibrationConfig(sources=sources, tokens=4096, window=64))
        assert windows.token_ids.shape == (64, 64)
        assert "general (3072 tokens)" in windows.description
        assert "python_docs (1024 tokens)" in windows.description

    def test_a_short_source_contributes_all_it_has(self, llama: LoadedModel, tmp_path: Path) -> None:
        (tmp_path / "short.txt").write_text("abcdefgh" * 40)
        sources = [CalibrationSource(file=str(tmp_path / "short.txt")), CalibrationSource(builtin="general")]
        windows = calibration_windows(llama.tokenizer, CalibrationConfig(sources=sources, tokens=2048, window=64))
        assert windows.tokens == 2048
        assert "(320 tokens)" in windows.description

    def test_windows_depend_on_the_seed(self, llama: LoadedModel) -> None:
        def fingerprint(seed: int) -> str:
            config = CalibrationConfig(
                sources=[CalibrationSource(builtin="general")], tokens=1024, window=64, seed=seed
            )
            return calibration_windows(llama.tokenizer, config).fingerprint

        assert fingerprint(0) == fingerprint(0)
        assert fingerprint(0) != fingerprint(1)

    def test_errors_state_the_remedy(self, llama: LoadedModel, tmp_path: Path) -> None:
        def windows(source: CalibrationSource, tokens: int = 1024) -> CalibrationWindows:
            return calibration_windows(llama.tokenizer, CalibrationConfig(sources=[source], tokens=tokens, window=64))

        with pytest.raises(CalibrationError, match=r"general.*did you mean 'general'"):
            windows(CalibrationSource(builtin="genral"))
        with pytest.raises(CalibrationError, match="No such file"):
            windows(CalibrationSource(file=str(tmp_path / "none.txt")))
        (tmp_path / "latin.txt").write_bytes(b"caf\xe9" * 100)
        with pytest.raises(CalibrationError, match="UTF-8"):
            windows(CalibrationSource(file=str(tmp_path / "latin.txt")))
        (tmp_path / "short.txt").write_text("abc" * 50)
        with pytest.raises(CalibrationError, match=r"hold 128; lower `calibration\.tokens`"):
            windows(CalibrationSource(file=str(tmp_path / "short.txt")))
