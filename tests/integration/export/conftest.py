from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
import transformers as hf
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import dynamic_module_utils

from dse.cost import break_even_rank, has_core
from dse.decomposition import LowRankFactors, factorise
from dse.decomposition.low_rank import as_matrix
from dse.design_point import DesignPoint, TensorChoice
from dse.models import LoadedModel, topology_of

VOCABULARY = 320


def byte_tokenizer() -> hf.PreTrainedTokenizerFast:
    """Every byte is a token: reads any text, and its ids fit the tiny models."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    special = ["<pad>", "<s>", "</s>", "<mask>"]
    core = Tokenizer(models.BPE({token: i for i, token in enumerate(special + alphabet)}, []))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    return hf.PreTrainedTokenizerFast(
        tokenizer_object=core, pad_token="<pad>", bos_token="<s>", eos_token="</s>", mask_token="<mask>"
    )


class ExactFactors:
    """Decomposes the model's own weights when asked, as a bank would have before."""

    def __init__(self, loaded: LoadedModel) -> None:
        self.loaded = loaded

    def factors(self, name: str, choice: TensorChoice) -> LowRankFactors:
        modules = [self.loaded.model.get_submodule(path) for path in self.loaded.topology.matrix(name).modules]
        weight = torch.cat([as_matrix(module).detach().float() for module in modules])
        return factorise(weight, choice.method, choice.rank)


def as_loaded(
    model: hf.PreTrainedModel,
    ref: str = "tiny",
    role_names: dict[str, str] | None = None,
    dtype: torch.dtype = torch.float32,
) -> LoadedModel:
    model.eval().requires_grad_(False).to(dtype)
    topology = topology_of(model, role_names)
    return LoadedModel(ref, None, model, byte_tokenizer(), topology, torch.device("cpu"), dtype)


def mixed_point(loaded: LoadedModel) -> DesignPoint:
    """Every tensor outside the first layer, by methods with and without a core, at ranks that differ."""
    choices = {}
    for i, tensor in enumerate(loaded.topology.tensors):
        if tensor.layer != 0:
            method = ("tucker", "svd")[i % 2]
            limit = break_even_rank(*tensor.shape, core=has_core(method))
            choices[tensor.name] = TensorChoice(method, min(1 + i % 5, limit))
    return DesignPoint.of(choices)


def llama(**changes: object) -> hf.LlamaForCausalLM:
    torch.manual_seed(0)
    config = {
        "vocab_size": VOCABULARY,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 64,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "tie_word_embeddings": True,
    }
    return hf.LlamaForCausalLM(hf.LlamaConfig(**(config | changes)))


@pytest.fixture(scope="session")
def make_loaded() -> Callable[..., LoadedModel]:
    return as_loaded


@pytest.fixture(scope="session")
def make_llama() -> Callable[..., hf.LlamaForCausalLM]:
    return llama


@pytest.fixture(scope="session")
def make_point() -> Callable[[LoadedModel], DesignPoint]:
    return mixed_point


@pytest.fixture(scope="session")
def make_factors() -> Callable[[LoadedModel], ExactFactors]:
    return ExactFactors


@pytest.fixture
def loaded() -> LoadedModel:
    return as_loaded(llama())


@pytest.fixture(scope="session", autouse=True)
def modules_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Keeps the modelling files that tests load out of the user's cache."""
    folder = tmp_path_factory.mktemp("modules")
    patch = pytest.MonkeyPatch()
    patch.setattr(dynamic_module_utils, "HF_MODULES_CACHE", str(folder))
    yield folder
    patch.undo()
