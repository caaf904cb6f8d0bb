"""An export is either complete and verified, or absent."""

from __future__ import annotations

import json
import os
import shutil
import stat
from collections import namedtuple
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import transformers as hf
from safetensors.torch import load_file, save_file

from dse.cost import point_cost
from dse.decomposition import FactorBank, LowRankLinear
from dse.design_point import DesignPoint, TensorChoice
from dse.errors import ExportError, PointError, RankError, StorageFullError
from dse.export import ExportRequest, ExportResult, export_point, export_points, stage, verify_folders
from dse.export.reload_check import tensor_digests
from dse.export.weights import write_weights
from dse.models import LoadedModel
from dse.models.transformers_patches import quiet_transformers

ALLOWED = {".safetensors", ".json", ".py", ".md"}


def digests(loaded: LoadedModel) -> dict[str, str]:
    return tensor_digests(loaded.model.state_dict().items())


@pytest.fixture
def factors(loaded: LoadedModel, make_factors: Callable) -> object:
    return make_factors(loaded)


@pytest.fixture
def point(loaded: LoadedModel, make_point: Callable) -> DesignPoint:
    return make_point(loaded)


# One verified call writes every kind of folder; the tests below inspect the result.
@pytest.fixture(scope="module")
def written(
    tmp_path_factory: pytest.TempPathFactory,
    make_loaded: Callable,
    make_llama: Callable,
    make_point: Callable,
) -> tuple[Path, LoadedModel, DesignPoint, dict[str, ExportResult], list[tuple[str, int, int]]]:
    root = tmp_path_factory.mktemp("in-place")
    loaded = make_loaded(make_llama(), ref="some-org/tiny-llama")
    point = make_point(loaded)
    bank = FactorBank.build(loaded, [point], folder=root / "bank")
    before, modules = digests(loaded), list(loaded.model.modules())
    (root / "exports" / "empty").mkdir(parents=True)
    calls: list[tuple[str, int, int]] = []
    requests = [
        ExportRequest(point, root / "exports" / "empty", card_details={"study": "quick", "trial": 7}),
        ExportRequest(point, root / "exports" / "deep" / "merged", format="dense"),
        ExportRequest(DesignPoint.dense(), root / "exports" / "whole"),
    ]
    results = export_points(loaded, requests, bank, progress=lambda *call: calls.append(call))

    assert digests(loaded) == before
    assert all(a is b for a, b in zip(loaded.model.modules(), modules, strict=True))
    return root / "exports", loaded, point, {r.folder.name: r for r in results}, calls


def test_no_temporary_files_remain(written: tuple) -> None:
    root = written[0]
    assert sorted(path.name for path in root.iterdir()) == ["deep", "empty", "whole"]
    assert [path.name for path in (root / "deep").iterdir()] == ["merged"]


def test_sizes_match_the_disk_and_the_cost_arithmetic(written: tuple) -> None:
    _, loaded, point, results, _ = written
    low_rank, merged, whole = results["empty"], results["merged"], results["whole"]
    for result in results.values():
        files = list(result.folder.iterdir())
        assert result.bytes_on_disk == sum(file.stat().st_size for file in files)
        assert result.files == tuple(sorted(file.name for file in files))
        assert result.dense_weight_bytes == 4 * loaded.topology.parameters_dense
        header = result.weight_file_bytes - 4 * result.parameters
        assert 0 < header < 10_000
        assert json.loads(json.dumps(result.to_json()))["folder"] == str(result.folder)
    assert low_rank.parameters == point_cost(loaded.topology, point).parameters
    assert low_rank.reduction == pytest.approx(point_cost(loaded.topology, point).reduction)
    assert low_rank.weight_file_bytes < 0.95 * whole.weight_file_bytes
    assert (merged.is_dense, merged.reduction, merged.parameters) == (True, 0.0, loaded.topology.parameters_dense)
    assert (whole.is_dense, low_rank.is_dense) == (True, False)


def test_the_reload_is_compared(written: tuple) -> None:
    results = written[3]
    for result in results.values():
        assert result.max_logit_difference is not None
        assert result.max_logit_difference <= 1e-4 <= result.tolerance
    assert written[4] == [
        ("write", 0, 3),
        ("write", 1, 3),
        ("write", 2, 3),
        ("write", 3, 3),
        ("verify", 0, 3),
        ("verify", 3, 3),
    ]


def test_folders_hold_only_safetensors_text_and_one_code_file(written: tuple) -> None:
    for result in written[3].values():
        assert {file.suffix for file in result.folder.iterdir()} <= ALLOWED
        code = [file.name for file in result.folder.glob("*.py")]
        assert code == ([] if result.is_dense else ["modeling_lowrank.py"])


@pytest.mark.skipif(os.name != "posix", reason="file modes are POSIX's")
def test_file_modes_follow_the_umask(written: tuple) -> None:
    mask = os.umask(0)
    os.umask(mask)
    for result in written[3].values():
        for path in (result.folder, *result.folder.iterdir()):
            wanted = 0o777 if path.is_dir() else 0o666
            assert stat.S_IMODE(path.stat().st_mode) == wanted & ~mask, path


def test_the_design_point_is_stored_beside_the_weights(written: tuple) -> None:
    _, loaded, point, results, _ = written
    text = (results["empty"].folder / "design_point.json").read_text(encoding="utf-8")
    assert DesignPoint.from_json(text, loaded.topology) == point


def test_the_tokenizer_is_the_same_with_and_without_remote_code(written: tuple) -> None:
    _, loaded, _, results, _ = written
    for trust in (True, False):
        tokenizer = hf.AutoTokenizer.from_pretrained(results["empty"].folder, trust_remote_code=trust)
        assert tokenizer("naïve\n\t42")["input_ids"] == loaded.tokenizer("naïve\n\t42")["input_ids"]


def test_the_card_states_the_form_and_the_savings(written: tuple) -> None:
    _, loaded, point, results, _ = written
    low_rank, merged, whole = (
        (results[name].folder / "README.md").read_text(encoding="utf-8") for name in ("empty", "merged", "whole")
    )
    assert "base_model: some-org/tiny-llama" in low_rank
    assert f"{results['empty'].parameters:,}" in low_rank
    assert f"{100 * results['empty'].reduction:.1f} %" in low_rank
    assert "trust_remote_code=True" in low_rank
    assert point.id in low_rank
    assert loaded.fingerprint in low_rank
    assert "quick, trial 7" in low_rank
    assert "saves nothing" in merged
    assert "trust_remote_code" not in merged + whole
    assert "nothing is decomposed" in whole


def corrupt(file: Path) -> None:
    tensors = load_file(file)
    name = next(name for name in tensors if name.endswith(".left.weight"))
    tensors[name][0, 0] += 0.5
    save_file(tensors, file, metadata={"format": "pt"})


def test_an_export_damaged_before_it_is_verified_is_refused_and_removed(
    loaded: LoadedModel, point: DesignPoint, factors: object, tmp_path: Path
) -> None:
    before = digests(loaded)
    seen: list[Path] = []

    def damage(phase: str, done: int, total: int) -> None:
        if (phase, done) == ("verify", 0):
            seen.extend(tmp_path.glob("new/.*/export/model.safetensors"))
            corrupt(seen[0])

    with pytest.raises(ExportError, match=r"must differ by at most 0\.0001, but differ by \d") as error:
        export_point(loaded, point, factors, tmp_path / "new" / "export", progress=damage)

    assert "weights that changed" in str(error.value)
    assert point.id in str(error.value)
    assert len(seen) == 1
    assert list(tmp_path.iterdir()) == []
    assert digests(loaded) == before


def edit_config(folder: Path, change: Callable[[dict], None]) -> None:
    file = folder / "config.json"
    config = json.loads(file.read_text(encoding="utf-8"))
    change(config)
    file.write_text(json.dumps(config), encoding="utf-8")


def drop_weight(folder: Path) -> None:
    tensors = load_file(folder / "model.safetensors")
    del tensors[next(name for name in tensors if name.endswith(".right.weight"))]
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def truncate(folder: Path) -> None:
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-1000])


def import_dse(folder: Path) -> None:
    file = folder / "modeling_lowrank.py"
    file.write_text(file.read_text(encoding="utf-8") + "\nimport dse.errors\n", encoding="utf-8")


def forget_a_module(config: dict) -> None:
    config["low_rank"].popitem()


def swap_tokens(folder: Path) -> None:
    file = folder / "tokenizer.json"
    tokenizer = json.loads(file.read_text(encoding="utf-8"))
    vocabulary = tokenizer["model"]["vocab"]
    vocabulary["a"], vocabulary["e"] = vocabulary["e"], vocabulary["a"]
    file.write_text(json.dumps(tokenizer), encoding="utf-8")


def put_nan(folder: Path) -> None:
    tensors = load_file(folder / "model.safetensors")
    tensors["model.norm.weight"][0] = float("nan")
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


DAMAGE: dict[str, tuple[Callable[[Path], None], str]] = {
    "none": (lambda folder: None, "^$"),
    "a weight": (
        lambda folder: corrupt(folder / "model.safetensors"),
        "differ by .*weights that changed, but there are 1 ",
    ),
    "a weight is missing": (drop_weight, "1 are missing"),
    "the file is cut off": (truncate, "must load on its own"),
    "the code imports dse": (import_dse, "without the package dse"),
    "a module is forgotten": (lambda folder: edit_config(folder, forget_a_module), "are missing"),
    "the tokenizer": (swap_tokens, "texts with other token ids"),
    "not a number": (put_nan, "differ by inf"),
    "the norm's epsilon": (
        lambda folder: edit_config(folder, lambda c: c.update(rms_norm_eps=0.1)),
        "^the reloaded outputs.* differ by",
    ),
}


@pytest.fixture(scope="module")
def damaged_reports(
    tmp_path_factory: pytest.TempPathFactory,
    make_loaded: Callable,
    make_llama: Callable,
    make_point: Callable,
    make_factors: Callable,
) -> dict[str, str]:
    root, loaded = tmp_path_factory.mktemp("damaged"), make_loaded(make_llama())
    checks = []
    for name, (damage, _) in DAMAGE.items():
        export = stage(loaded, ExportRequest(make_point(loaded), root / name), make_factors(loaded))
        damage(export.folder)
        checks.append((export.folder, export.expectation))
    return {name: report.problem for name, report in zip(DAMAGE, verify_folders(checks), strict=True)}


@pytest.mark.parametrize("name", DAMAGE)
def test_every_kind_of_damage_is_found_and_named(damaged_reports: dict[str, str], name: str) -> None:
    import re

    assert re.search(DAMAGE[name][1], damaged_reports[name])


def taken(folder: Path) -> Path:
    folder.mkdir()
    (folder / "precious.txt").write_text("mine")
    return folder


def a_file(path: Path) -> Path:
    path.write_text("mine")
    return path


def dangling(path: Path) -> Path:
    path.symlink_to(path.with_name("nowhere"))
    return path


@pytest.mark.parametrize(
    ("make", "rule"),
    [
        (lambda root: taken(root / "x"), "is taken"),
        (lambda root: a_file(root / "x"), "is taken"),
        (lambda root: dangling(root / "x"), "is taken"),
        (lambda root: a_file(root / "x") / "below", "is a file"),
        (lambda root: root / "a\0b", "cannot be one"),
        (lambda root: root / ("n" * 300), "cannot be one"),
    ],
)
def test_invalid_destinations_are_refused_and_unchanged(
    loaded: LoadedModel, point: DesignPoint, factors: object, tmp_path: Path, make: Callable[[Path], Path], rule: str
) -> None:
    folder = make(tmp_path)
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}

    with pytest.raises(ExportError, match=rule):
        export_point(loaded, point, factors, folder)

    assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == before


@pytest.mark.parametrize(("first", "second"), [("x", "x"), ("x", "x/y"), ("x/y", "x")])
def test_two_exports_cannot_share_a_folder(
    loaded: LoadedModel, point: DesignPoint, factors: object, tmp_path: Path, first: str, second: str
) -> None:
    requests = [ExportRequest(point, tmp_path / first), ExportRequest(point, tmp_path / second, format="dense")]
    with pytest.raises(ExportError, match="a folder of its own"):
        export_points(loaded, requests, factors)
    assert list(tmp_path.iterdir()) == []


def test_a_destination_created_meanwhile_is_not_overwritten(
    loaded: LoadedModel, point: DesignPoint, factors: object, tmp_path: Path
) -> None:
    def take(phase: str, done: int, total: int) -> None:
        if (phase, done) == ("write", 1):
            taken(tmp_path / "x")

    with pytest.raises(ExportError, match="is taken"):
        export_point(loaded, point, factors, tmp_path / "x", verify=False, progress=take)
    assert [path.name for path in tmp_path.rglob("*")] == ["x", "precious.txt"]


@pytest.mark.parametrize(
    ("choices", "kind"),
    [
        ({"layers.9.query": TensorChoice("svd", 2)}, PointError),
        ({"layers.0.query": TensorChoice("svd", 17)}, RankError),
    ],
)
def test_an_invalid_point_leaves_no_files(
    loaded: LoadedModel, factors: object, tmp_path: Path, choices: dict[str, TensorChoice], kind: type[Exception]
) -> None:
    with pytest.raises(kind):
        export_point(loaded, DesignPoint.of(choices), factors, tmp_path / "x")
    assert list(tmp_path.iterdir()) == []


def test_errors_while_writing_leave_no_files_and_undo_the_point(
    loaded: LoadedModel, point: DesignPoint, factors: object, tmp_path: Path
) -> None:
    class Unreadable:
        def save_pretrained(self, folder: Path) -> None:
            assert isinstance(loaded.model.get_submodule(loaded.topology[point.choices[0][0]].module), LowRankLinear)
            raise PermissionError(13, "Permission denied")

    before, tokenizer = digests(loaded), loaded.tokenizer
    loaded.tokenizer = Unreadable()
    with pytest.raises(StorageFullError, match=r"x must be writable"):
        export_point(loaded, point, factors, tmp_path / "x")
    loaded.tokenizer = tokenizer

    def interrupt(phase: str, done: int, total: int) -> None:
        if phase == "verify":
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        export_point(loaded, point, factors, tmp_path / "x", progress=interrupt)
    assert list(tmp_path.iterdir()) == []
    assert digests(loaded) == before


def test_a_full_disk_is_refused_before_writing(
    loaded: LoadedModel, point: DesignPoint, factors: object, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(10**9, 10**9 - 1, 1))
    with pytest.raises(StorageFullError, match="has 0 MB free; free some"):
        export_point(loaded, point, factors, tmp_path / "x")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="this system has no /dev/full")
def test_a_disk_that_fills_up_while_writing_is_reported(loaded: LoadedModel, tmp_path: Path) -> None:
    from dse.export.weights import writing_errors

    (tmp_path / "model.safetensors").symlink_to("/dev/full")
    with pytest.raises(StorageFullError, match="it is full"), writing_errors(tmp_path):
        (tmp_path / "model.safetensors").write_bytes(b"0")


def test_an_architecture_outside_transformers_is_refused(
    make_loaded: Callable, make_llama: Callable, make_point: Callable, make_factors: Callable, tmp_path: Path
) -> None:
    class OwnModel(hf.LlamaForCausalLM):
        pass

    loaded = make_loaded(OwnModel(make_llama().config))
    with pytest.raises(ExportError, match="OwnModel comes with code of its own"):
        export_point(loaded, make_point(loaded), make_factors(loaded), tmp_path / "x")
    assert list(tmp_path.iterdir()) == []


def test_models_with_non_finite_outputs_cannot_be_exported(
    loaded: LoadedModel, point: DesignPoint, factors: object, tmp_path: Path
) -> None:
    loaded.model.model.norm.weight.data[0] = float("nan")
    with pytest.raises(ExportError, match="NaN or infinite"):
        export_point(loaded, point, factors, tmp_path / "x")
    assert list(tmp_path.iterdir()) == []


def test_half_precision_heads_and_unusual_generation_settings_are_exported(
    make_loaded: Callable, make_llama: Callable, make_factors: Callable, tmp_path: Path
) -> None:
    model = make_llama(tie_word_embeddings=False)
    model.generation_config.temperature = 0.7  # with do_sample off, its own save_pretrained refuses this
    loaded = make_loaded(model, role_names={"lm_head": "head"}, dtype=torch.bfloat16)
    point = DesignPoint.of({"head": TensorChoice("svd", 4), "layers.1.up": TensorChoice("tucker", 3)})

    results = export_points(
        loaded,
        [ExportRequest(point, tmp_path / "low-rank"), ExportRequest(point, tmp_path / "merged", format="dense")],
        make_factors(loaded),
    )

    for result in results:
        assert 1e-4 < result.tolerance < 0.1
        assert result.max_logit_difference is not None
        assert result.max_logit_difference <= result.tolerance
        with quiet_transformers():
            model = hf.AutoModelForCausalLM.from_pretrained(result.folder, trust_remote_code=not result.is_dense)
        assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
        assert model.generation_config.temperature == 0.7
    assert "bfloat16" in (tmp_path / "low-rank" / "README.md").read_text(encoding="utf-8")


def test_large_weights_are_sharded_and_reload(loaded: LoadedModel, tmp_path: Path) -> None:
    loaded.model.config.save_pretrained(tmp_path)
    write_weights(loaded.model, tmp_path, max_shard_size=40_000)

    assert len(list(tmp_path.glob("model-*-of-*.safetensors"))) > 2
    with quiet_transformers():
        again, info = hf.AutoModelForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    assert not info["missing_keys"]
    assert tensor_digests(again.state_dict().items()) == digests(loaded)


def test_sharing_that_the_config_does_not_declare_is_stored_under_both_names(
    make_llama: Callable, make_loaded: Callable, tmp_path: Path
) -> None:
    model = make_llama(tie_word_embeddings=False)
    layers = model.model.layers
    layers[1].mlp.up_proj.weight = layers[0].mlp.up_proj.weight
    write_weights(make_loaded(model).model, tmp_path)

    stored = load_file(tmp_path / "model.safetensors")
    assert torch.equal(stored["model.layers.0.mlp.up_proj.weight"], stored["model.layers.1.mlp.up_proj.weight"])
    assert stored.keys() == model.state_dict().keys()


@pytest.mark.real_model
def test_the_demo_model_exports_smaller_and_generates_the_same(tmp_path: Path, make_factors: Callable) -> None:
    from dse.models import load_model

    loaded = load_model("demo:smollm2-135m-instruct")
    point = DesignPoint.uniform(loaded.topology, "svd", 8, layers=[20, 21, 22], roles=["gate", "up", "down"])
    factors = make_factors(loaded)
    result = export_point(loaded, point, factors, tmp_path / "export")

    assert result.max_logit_difference is not None
    assert result.max_logit_difference <= 1e-4
    assert result.weight_file_bytes < (1 - 0.95 * result.reduction) * result.dense_weight_bytes
    config = json.loads((tmp_path / "export" / "config.json").read_text(encoding="utf-8"))
    assert "quantization_config" not in config
    with quiet_transformers():
        model = hf.AutoModelForCausalLM.from_pretrained(tmp_path / "export", trust_remote_code=True)
        tokenizer = hf.AutoTokenizer.from_pretrained(tmp_path / "export", trust_remote_code=True)
        prompt = tokenizer("The capital of France is", return_tensors="pt")
        said = model.generate(**prompt, max_new_tokens=8, do_sample=False)
        from dse.decomposition import decompose

        with decompose(loaded, point, factors):
            resident = loaded.model.generate(**prompt, max_new_tokens=8, do_sample=False)
    assert said.tolist() == resident.tolist()
