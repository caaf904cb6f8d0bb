"""vLLM loads exports unmodified, through its Transformers backend, and computes what transformers computes.

One vLLM process loads all folders, because importing vLLM takes longer than loading a small model.
"""

from __future__ import annotations

from pathlib import Path

import pytest
from engine_environments import engine_python
from served_exports import (
    FORMS,
    TINY_FAMILIES,
    Job,
    Served,
    dense_verdicts,
    documented_table,
    export_families,
    export_forms,
    export_to_split,
    family_table,
    form_table,
    in_vllm,
)

pytestmark = pytest.mark.real_model


@pytest.fixture(scope="module")
def python() -> str:
    return engine_python("vllm")


@pytest.fixture(scope="module")
def families(python: str, tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[Path, Path]]:
    return export_families(tmp_path_factory.mktemp("families"))


@pytest.fixture(scope="module")
def served(
    python: str, families: dict[str, tuple[Path, Path]], tmp_path_factory: pytest.TempPathFactory
) -> dict[str, Served]:
    folders = export_forms(tmp_path_factory.mktemp("forms")) | {name: export for name, (export, _) in families.items()}
    jobs = {name: Job(folder) for name, folder in folders.items()}
    jobs["compiled"] = Job(families["Llama"][0], {"enforce_eager": False})
    jobs["tensor parallel"] = Job(export_to_split(tmp_path_factory.mktemp("split")), {"tensor_parallel_size": 3})
    return dict(zip(jobs, in_vllm(python, list(jobs.values())), strict=True))


@pytest.fixture(scope="module")
def dense(python: str, families: dict[str, tuple[Path, Path]], served: dict[str, Served]) -> dict[str, Served]:
    return dense_verdicts(python, families, served)


@pytest.mark.parametrize("name", [*FORMS, "compiled", "tensor parallel"])
def test_every_structural_form_gives_the_outputs_of_transformers(served: dict[str, Served], name: str) -> None:
    assert served[name].error == ""
    assert served[name].tokens_equal
    assert served[name].difference <= 1e-4


@pytest.mark.parametrize("family", TINY_FAMILIES)
def test_every_family_loads_wherever_its_dense_model_does(
    served: dict[str, Served], dense: dict[str, Served], family: str
) -> None:
    refused = family in dense and not dense[family].is_equal
    assert served[family].is_equal or refused, f"export: {served[family]}; dense: {dense[family]}"


def test_the_documented_tables_are_what_was_seen(served: dict[str, Served], dense: dict[str, Served]) -> None:
    assert documented_table("forms") == form_table({name: served[name] for name in FORMS})
    assert documented_table("families") == family_table({name: served[name] for name in TINY_FAMILIES}, dense)
