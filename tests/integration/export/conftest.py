from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
import transformers as hf
from tiny_models import as_loaded, tiny_model
from transformers import dynamic_module_utils

from dse.cost import break_even_rank, has_core
from dse.decomposition import LowRankFactors, factorise
from dse.decomposition.factors import as_matrix
from dse.design_point import DesignPoint, TensorChoice
from dse.models import LoadedModel


class ExactFactors:
    """Decomposes the model's own weights on request."""

    def __init__(self, loaded: LoadedModel) -> None:
        self.loaded = loaded

    def factors(self, name: str, choice: TensorChoice) -> LowRankFactors:
        modules = [self.loaded.model.get_submodule(path) for path in self.loaded.topology.matrix(name).modules]
        weight = torch.cat([as_matrix(module).detach().float() for module in modules])
        return factorise(weight, choice.method, choice.rank)


def mixed_point(loaded: LoadedModel) -> DesignPoint:
    """Every tensor outside the first layer, by methods with and without a core, at different ranks."""
    choices = {}
    for i, tensor in enumerate(loaded.topology.tensors):
        if tensor.layer != 0:
            method = ("tucker", "svd")[i % 2]
            limit = break_even_rank(*tensor.shape, core=has_core(method))
            choices[tensor.name] = TensorChoice(method, min(1 + i % 5, limit))
    return DesignPoint.of(choices)


def llama(**changes: object) -> hf.PreTrainedModel:
    return tiny_model("llama", **{"tie_word_embeddings": True, **changes})


@pytest.fixture(scope="session")
def make_loaded() -> Callable[..., LoadedModel]:
    return as_loaded


@pytest.fixture(scope="session")
def make_llama() -> Callable[..., hf.PreTrainedModel]:
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
    """Keeps modelling files that tests load out of the user's cache."""
    folder = tmp_path_factory.mktemp("modules")
    patch = pytest.MonkeyPatch()
    patch.setattr(dynamic_module_utils, "HF_MODULES_CACHE", str(folder))
    yield folder
    patch.undo()
