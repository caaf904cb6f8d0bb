"""vLLM loads exports unmodified, through its Transformers backend, and computes what transformers computes."""

from __future__ import annotations

from pathlib import Path

import pytest
from engine_environments import engine_python
from served_exports import (
    TINY_FAMILIES,
    Served,
    documented_table,
    export_forms,
    family_table,
    in_vllm,
    run_families,
)

FORMS = (
    "low rank",
    "low rank with core",
    "stacks",
    "mixed ranks",
    "removed MLP",
    "removed attention",
    "passed layer",
    "everything",
)


@pytest.fixture(scope="module")
def python() -> str:
    return engine_python("vllm")


@pytest.fixture(scope="module")
def forms(python: str, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return export_forms(tmp_path_factory.mktemp("forms"))


@pytest.fixture(scope="module")
def served_forms(python: str, forms: dict[str, Path]) -> dict[str, Served]:
    return dict(zip(forms, in_vllm(python, list(forms.values())), strict=True))


@pytest.fixture(scope="module")
def served_families(python: str, tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[Served, Served | None]]:
    return run_families(python, tmp_path_factory.mktemp("families"))


@pytest.mark.real_model
@pytest.mark.parametrize("form", FORMS)
def test_every_structural_form_gives_the_outputs_of_transformers(served_forms: dict[str, Served], form: str) -> None:
    assert served_forms[form].error == ""
    assert served_forms[form].tokens_equal
    assert served_forms[form].difference <= 1e-4


@pytest.mark.real_model
def test_a_compiled_engine_gives_the_outputs_of_transformers(python: str, forms: dict[str, Path]) -> None:
    (served,) = in_vllm(python, [forms["everything"]], enforce_eager=False)
    assert served.error == ""
    assert served.is_equal


@pytest.mark.parametrize("family", TINY_FAMILIES)
def test_every_family_loads_wherever_its_dense_model_does(
    served_families: dict[str, tuple[Served, Served | None]], family: str
) -> None:
    served, dense = served_families[family]
    assert served.is_equal or (dense is not None and not dense.is_equal), f"export: {served}; dense: {dense}"


def test_the_documented_table_is_what_was_seen(served_families: dict[str, tuple[Served, Served | None]]) -> None:
    assert documented_table() == family_table(served_families)
