"""Exports of every architecture family in both forms reload as they were written."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as hf
from safetensors import safe_open
from tiny_models import ENCODER_FAMILIES, tiny_model, with_random_vectors

from dse.cost import point_cost
from dse.decomposition import decompose
from dse.export import ExportRequest, ReloadReport, StagedExport, stage, verify_folders
from dse.models import LoadedModel
from dse.models.transformers_patches import quiet_transformers

CLASSIFIER, ANSWERS, BODY = ({"head": head} for head in ("classification", "question_answering", "embedding"))
FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "Llama": ("llama", {"tie_word_embeddings": True}),
    "LlamaUntiedBiased": ("llama", {"attention_bias": True, "mlp_bias": True}),
    "LlamaClassifier": ("llama", {**CLASSIFIER, "num_labels": 3}),
    "Mistral": ("mistral", {}),
    "Mixtral": ("mixtral", {"num_local_experts": 3}),
    "Qwen2": ("qwen2", {}),
    "Qwen3": ("qwen3", {}),
    "SmolLM3": ("smollm3", {}),
    "Gemma2": ("gemma2", {}),
    "Gemma3": ("gemma3_text", {}),
    "Olmo2": ("olmo2", {}),
    "Phi3": ("phi3", {}),
    "GPTNeoX": ("gpt_neox", {}),
    "GPT2": ("gpt2", {}),
    "GPT2Classifier": ("gpt2", CLASSIFIER),
    "OPT": ("opt", {}),
    "BertMaskedLM": ("bert", {}),
    "BertClassifier": ("bert", {**CLASSIFIER, "num_labels": 4}),
    "BertAnswers": ("bert", ANSWERS),
    "BertBody": ("bert", BODY),
    "Roberta": ("roberta", {}),
    "RobertaClassifier": ("roberta", CLASSIFIER),
    "RobertaAnswers": ("roberta", ANSWERS),
    "RobertaBody": ("roberta", BODY),
    "DistilBert": ("distilbert", {}),
    "DistilBertClassifier": ("distilbert", CLASSIFIER),
    "DistilBertAnswers": ("distilbert", ANSWERS),
    "DistilBertBody": ("distilbert", BODY),
}
GENERATING = [n for n, (family, own) in FAMILIES.items() if "head" not in own and family not in ENCODER_FAMILIES]
FORMS = ("low_rank", "dense")
FORMATS = {"low_rank": "transformers", "dense": "dense"}


@dataclass(frozen=True, eq=False)
class Case:
    """A family's model with the staged exports of both forms, and their verification reports."""

    loaded: LoadedModel
    staged: dict[str, StagedExport]
    reports: dict[str, ReloadReport]


@pytest.fixture(scope="module")
def cases(
    tmp_path_factory: pytest.TempPathFactory, make_loaded: Callable, make_point: Callable, make_factors: Callable
) -> dict[str, Case]:
    root = tmp_path_factory.mktemp("exports")
    built = {}
    for family, (model_type, changes) in FAMILIES.items():
        loaded = make_loaded(with_random_vectors(tiny_model(model_type, **{"pad_token_id": 0, **changes})))
        point = make_point(loaded)
        staged = {
            form: stage(loaded, ExportRequest(point, root / f"{family}-{form}", FORMATS[form]), make_factors(loaded))
            for form in FORMS
        }
        built[family] = (loaded, staged)
    every = [export for _, staged in built.values() for export in staged.values()]
    reports = iter(verify_folders([(export.folder, export.expectation) for export in every]))
    return {
        family: Case(loaded, staged, {form: next(reports) for form in staged})
        for family, (loaded, staged) in built.items()
    }


def reload(export: StagedExport, **keywords: object) -> hf.PreTrainedModel:
    with quiet_transformers():
        auto = getattr(hf, export.auto_class)
        model, info = auto.from_pretrained(export.folder, trust_remote_code=True, output_loading_info=True, **keywords)
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    assert not info["mismatched_keys"]
    return model.eval()


def outputs(model: hf.PreTrainedModel) -> torch.Tensor:
    token_ids = torch.randint(4, 320, (1, 11), generator=torch.Generator().manual_seed(1))
    with torch.inference_mode():
        return model(input_ids=token_ids)[0]


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("family", FAMILIES)
def test_a_new_process_without_dse_reloads_the_decomposed_model(cases: dict[str, Case], family: str, form: str) -> None:
    report = cases[family].reports[form]

    assert report.problem == ""
    assert report.max_difference is not None
    assert report.max_difference <= 1e-4 <= report.tolerance


@pytest.mark.parametrize("family", FAMILIES)
def test_the_low_rank_form_holds_the_resident_weights(
    cases: dict[str, Case], family: str, make_factors: Callable
) -> None:
    case = cases[family]
    point = case.staged["low_rank"].request.point
    reloaded = reload(case.staged["low_rank"])

    with decompose(case.loaded, point, make_factors(case.loaded)):
        expected = {name: tensor.clone() for name, tensor in case.loaded.model.state_dict().items()}
        tied = {name: id(p) for name, p in case.loaded.model.named_parameters(remove_duplicate=False)}
        torch.testing.assert_close(outputs(reloaded), outputs(case.loaded.model), atol=1e-4, rtol=0)

    state = reloaded.state_dict()
    assert state.keys() == expected.keys()
    assert all(torch.equal(state[name], expected[name]) for name in expected)
    assert sum(p.numel() for p in reloaded.parameters()) == point_cost(case.loaded.topology, point).parameters
    assert len({id(p) for p in reloaded.parameters()}) == len(set(tied.values()))
    body = f"{reloaded.base_model_prefix}." if hasattr(reloaded, reloaded.base_model_prefix) else ""
    assert set(reloaded.config.low_rank) == {case.loaded.topology[name].module.removeprefix(body) for name, _ in point}


@pytest.mark.parametrize("family", FAMILIES)
def test_the_dense_form_is_a_plain_folder_of_the_same_shapes(cases: dict[str, Case], family: str) -> None:
    case = cases[family]
    folder = case.staged["dense"].folder
    with quiet_transformers():
        reloaded = getattr(hf, case.staged["dense"].auto_class).from_pretrained(folder)

    assert type(reloaded) is type(case.loaded.model)
    assert not list(folder.glob("*.py"))
    dense = case.loaded.model.state_dict()
    assert {n: t.shape for n, t in reloaded.state_dict().items()} == {n: t.shape for n, t in dense.items()}
    for name, choice in case.staged["dense"].request.point:
        path = case.loaded.topology[name].module + ".weight"
        assert torch.linalg.matrix_rank(reloaded.state_dict()[path], rtol=1e-4) == choice.rank
        assert not torch.allclose(reloaded.state_dict()[path], dense[path], atol=1e-3)


@pytest.mark.parametrize("family", GENERATING)
def test_exports_generate_the_same_with_and_without_a_cache(
    cases: dict[str, Case], family: str, make_factors: Callable
) -> None:
    case = cases[family]
    reloaded = reload(case.staged["low_rank"])
    prompt = torch.tensor([[5, 9, 120, 33, 7]])
    rules = {"max_new_tokens": 8, "do_sample": False, "pad_token_id": 0, "attention_mask": torch.ones_like(prompt)}

    with quiet_transformers():
        cached = reloaded.generate(prompt, use_cache=True, **rules)
        uncached = reloaded.generate(prompt, use_cache=False, **rules)
        with decompose(case.loaded, case.staged["low_rank"].request.point, make_factors(case.loaded)):
            resident = case.loaded.model.generate(prompt, **rules)

    assert cached.shape[1] > prompt.shape[1]
    assert cached.tolist() == uncached.tolist() == resident.tolist()


@pytest.mark.parametrize("family", FAMILIES)
def test_a_reloaded_export_can_be_saved_and_loaded_again(cases: dict[str, Case], family: str, tmp_path: Path) -> None:
    export = cases[family].staged["low_rank"]
    first = reload(export)

    with quiet_transformers():
        first.save_pretrained(tmp_path / "again")
        second = getattr(hf, export.auto_class).from_pretrained(tmp_path / "again", trust_remote_code=True)

    assert second.config.low_rank == first.config.low_rank
    assert torch.equal(outputs(second.eval()), outputs(first))
    with safe_open(next((tmp_path / "again").glob("*.safetensors")), "pt") as file:
        again = set(file.keys())
    with safe_open(next(export.folder.glob("*.safetensors")), "pt") as file:
        assert again == set(file.keys())


@pytest.mark.parametrize("family", FAMILIES)
def test_the_folder_refuses_to_load_without_trust_remote_code(cases: dict[str, Case], family: str) -> None:
    export = cases[family].staged["low_rank"]
    for auto in (hf.AutoConfig, getattr(hf, export.auto_class)):
        with pytest.raises(ValueError, match="trust_remote_code=True"):
            auto.from_pretrained(export.folder, trust_remote_code=False)

    config = hf.AutoConfig.from_pretrained(export.folder, trust_remote_code=True)
    assert config.model_type == "lowrank-" + type(cases[family].loaded.model.config).model_type


@pytest.mark.parametrize("keywords", [{"dtype": torch.bfloat16}, {"device_map": "cpu"}, {"low_cpu_mem_usage": True}])
@pytest.mark.parametrize("family", ["Llama", "GPT2", "BertMaskedLM"])
def test_other_ways_of_loading(cases: dict[str, Case], family: str, keywords: dict[str, object]) -> None:
    export = cases[family].staged["low_rank"]
    plain, reloaded = reload(export), reload(export, **keywords)

    dtype = keywords.get("dtype", torch.float32)
    assert {p.dtype for p in reloaded.parameters()} == {dtype}
    state = reloaded.state_dict()
    assert all(torch.equal(state[name], tensor.to(dtype)) for name, tensor in plain.state_dict().items())
