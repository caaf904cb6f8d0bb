"""SmolLM2 scored by `SharedPrefixLM` and by lm-eval's `HFLM`: real weights, real tasks, every log-likelihood."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
from lm_eval.models.huggingface import HFLM

from dse.evaluation import SharedPrefixLM, TaskSpec
from dse.evaluation.lm_eval.logging_control import quiet_lm_eval
from dse.evaluation.lm_eval.task_loading import build_leaves, collect_outcomes
from dse.evaluation.task_spec import resolve_task
from dse.models import LoadedModel, load_model

pytestmark = pytest.mark.real_model

SHARED = Path(os.environ.get("DSE_SHARED", Path(__file__).resolve().parents[5] / "shared")) / "eval"
NEEDS_SHARED = pytest.mark.skipif(
    not SHARED.is_dir(), reason=f"the shared evaluation data are not at {SHARED} (set DSE_SHARED)"
)


@pytest.fixture(scope="module")
def smollm2() -> LoadedModel:
    return load_model("demo:smollm2-135m-instruct")


@pytest.mark.parametrize(
    ("task", "documents"),
    [
        ("dse_grammar", 12),
        ("dse_facts", 12),
        ("dse_text", 2),
        pytest.param(str(SHARED / "arc_easy.yaml"), 10, marks=NEEDS_SHARED),
        pytest.param(str(SHARED / "openbook_qa.yaml"), 8, marks=NEEDS_SHARED),
        pytest.param(str(SHARED / "lambada_openai.yaml"), 5, marks=NEEDS_SHARED),
    ],
)
def test_real_scores_agree_with_lm_eval(smollm2: LoadedModel, task: str, documents: int) -> None:
    spec = TaskSpec(task, limit=documents)
    (leaf,) = build_leaves(spec, resolve_task(spec), limit=documents, seed=0, chat_template=None)
    kind = leaf.task.instances[0].request_type
    settings: dict[str, Any] = {"tokenizer": smollm2.tokenizer, "softmax_dtype": "float32"}
    with quiet_lm_eval():
        expected = getattr(HFLM(smollm2.model, batch_size=4, **settings), kind)(leaf.task.instances, disable_tqdm=True)
        lm = SharedPrefixLM(smollm2.model, **settings)
        found = getattr(lm, kind)(leaf.task.instances, disable_tqdm=True)
    for ours, truth in zip(found, expected, strict=True):
        score, true_score = (ours[0], truth[0]) if isinstance(ours, tuple) else (ours, truth)
        assert abs(score - true_score) <= 1e-3 * (
            1 if kind == "loglikelihood" else 10
        )  # a whole text sums hundreds of tokens
        if isinstance(ours, tuple):
            assert ours[1] == truth[1]
    assert lm.strategies == {"packed"}
    assert metrics(leaf, found) == pytest.approx(metrics(leaf, expected), rel=1e-4)


def metrics(leaf: Any, answers: list[Any]) -> dict[str, float]:
    """Sum of each metric over the documents."""
    for instance, answer in zip(leaf.task.instances, answers, strict=True):
        instance.resps, instance.filtered_resps = [answer], {}
    return {
        name: sum(value[0] if isinstance(value, tuple) else float(value) for value in outcomes.values())
        for name, outcomes in collect_outcomes(leaf).items()
    }
