"""Every architecture family exports in both forms, and what is read back is what was written."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
import transformers as hf
from safetensors import safe_open

from dse.cost import cost
from dse.decomposition import decompose
from dse.export import ExportRequest, ReloadReport, StagedExport, stage, verify_folders
from dse.models import LoadedModel
from dse.models.quiet import quiet_transformers

COMMON = {
    "vocab_size": 320,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "max_position_embeddings": 64,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
GROUPED = {**COMMON, "num_key_value_heads": 2}
WIDE = {**GROUPED, "head_dim": 16}
GPT2 = {"vocab_size": 320, "n_embd": 32, "n_inner": 48, "n_layer": 3, "n_head": 4, "n_positions": 64}
OPT = {**COMMON, "ffn_dim": 48, "word_embed_proj_dim": 24}
DISTILBERT = {"vocab_size": 320, "dim": 32, "hidden_dim": 48, "n_layers": 3, "n_heads": 4}

FAMILIES: dict[str, tuple[type[hf.PreTrainedModel], hf.PreTrainedConfig]] = {
    "Llama": (hf.LlamaForCausalLM, hf.LlamaConfig(**GROUPED, tie_word_embeddings=True)),
    "LlamaUntiedBiased": (hf.LlamaForCausalLM, hf.LlamaConfig(**GROUPED, attention_bias=True, mlp_bias=True)),
    "LlamaClassifier": (hf.LlamaForSequenceClassification, hf.LlamaConfig(**GROUPED, num_labels=3)),
    "Mistral": (hf.MistralForCausalLM, hf.MistralConfig(**GROUPED)),
    "Mixtral": (hf.MixtralForCausalLM, hf.MixtralConfig(**GROUPED, num_local_experts=3)),
    "Qwen2": (hf.Qwen2ForCausalLM, hf.Qwen2Config(**GROUPED)),
    "Qwen3": (hf.Qwen3ForCausalLM, hf.Qwen3Config(**WIDE)),
    "SmolLM3": (hf.SmolLM3ForCausalLM, hf.SmolLM3Config(**GROUPED)),
    "Gemma2": (hf.Gemma2ForCausalLM, hf.Gemma2Config(**WIDE)),
    "Gemma3": (hf.Gemma3ForCausalLM, hf.Gemma3TextConfig(**WIDE)),
    "Olmo2": (hf.Olmo2ForCausalLM, hf.Olmo2Config(**GROUPED)),
    "Phi3": (hf.Phi3ForCausalLM, hf.Phi3Config(**GROUPED)),
    "GPTNeoX": (hf.GPTNeoXForCausalLM, hf.GPTNeoXConfig(**COMMON)),
    "GPT2": (hf.GPT2LMHeadModel, hf.GPT2Config(**GPT2, bos_token_id=1, eos_token_id=2)),
    "GPT2Classifier": (hf.GPT2ForSequenceClassification, hf.GPT2Config(**GPT2)),
    "OPT": (hf.OPTForCausalLM, hf.OPTConfig(**OPT)),
    "BertMaskedLM": (hf.BertForMaskedLM, hf.BertConfig(**COMMON)),
    "BertClassifier": (hf.BertForSequenceClassification, hf.BertConfig(**COMMON, num_labels=4)),
    "BertAnswers": (hf.BertForQuestionAnswering, hf.BertConfig(**COMMON)),
    "BertBody": (hf.BertModel, hf.BertConfig(**COMMON)),
    "Roberta": (hf.RobertaForMaskedLM, hf.RobertaConfig(**COMMON)),
    "RobertaClassifier": (hf.RobertaForSequenceClassification, hf.RobertaConfig(**COMMON)),
    "RobertaAnswers": (hf.RobertaForQuestionAnswering, hf.RobertaConfig(**COMMON)),
    "RobertaBody": (hf.RobertaModel, hf.RobertaConfig(**COMMON)),
    "DistilBert": (hf.DistilBertForMaskedLM, hf.DistilBertConfig(**DISTILBERT)),
    "DistilBertClassifier": (hf.DistilBertForSequenceClassification, hf.DistilBertConfig(**DISTILBERT)),
    "DistilBertAnswers": (hf.DistilBertForQuestionAnswering, hf.DistilBertConfig(**DISTILBERT)),
    "DistilBertBody": (hf.DistilBertModel, hf.DistilBertConfig(**DISTILBERT)),
}
FORMS = ("low_rank", "dense")


@dataclass(frozen=True, eq=False)
class Case:
    """A family's model with both forms of its export, not yet in place, and how the fresh process found them."""

    loaded: LoadedModel
    staged: dict[str, StagedExport]
    reports: dict[str, ReloadReport]


@pytest.fixture(scope="module")
def cases(
    tmp_path_factory: pytest.TempPathFactory, make_loaded: Callable, make_point: Callable, make_factors: Callable
) -> dict[str, Case]:
    root = tmp_path_factory.mktemp("exports")
    built = {}
    for family, (model_class, config) in FAMILIES.items():
        torch.manual_seed(0)
        loaded = make_loaded(model_class(copy.deepcopy(config)))
        for name, parameter in loaded.model.named_parameters():
            if name.endswith("bias"):
                parameter.data.normal_(std=0.1)  # zeros would hide a bias that is lost
        point = make_point(loaded)
        staged = {
            form: stage(loaded, ExportRequest(point, root / f"{family}-{form}", form == "dense"), make_factors(loaded))
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
def test_a_fresh_process_without_dse_reads_back_the_decomposed_model(
    cases: dict[str, Case], family: str, form: str
) -> None:
    report = cases[family].reports[form]

    assert report.problem == ""
    assert report.max_difference is not None
    assert report.max_difference <= 1e-4 <= report.tolerance


@pytest.mark.parametrize("family", FAMILIES)
def test_every_weight_of_the_low_rank_form_is_the_resident_one(
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
    assert sum(p.numel() for p in reloaded.parameters()) == cost(case.loaded.topology, point).parameters
    assert len({id(p) for p in reloaded.parameters()}) == len(set(tied.values()))
    assert set(reloaded.config.low_rank) == {case.loaded.topology[name].module for name, _ in point}


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


@pytest.mark.parametrize("family", [name for name, (kind, _) in FAMILIES.items() if hasattr(kind, "generate")])
def test_generation_with_a_cache_continues_as_without_one(
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
def test_without_leave_to_run_its_code_the_folder_refuses(cases: dict[str, Case], family: str) -> None:
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
