"""A real sentence encoder, all-MiniLM-L6-v2 from the package index: decomposed, searched, exported and reloaded."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch.nn.functional import cosine_similarity

import dse
from dse.config import EvaluationConfig, load_study
from dse.design_point import DesignPoint
from dse.evaluation import evaluator_for
from dse.models import LoadedModel

pytestmark = pytest.mark.real_model

ROOT = Path(__file__).resolve().parents[2]
STUDY = ROOT / "studies" / "minilm_embedding.yaml"


@pytest.fixture(scope="module")
def minilm() -> LoadedModel:
    return dse.load_model("demo:all-minilm-l6-v2")


@torch.inference_mode()
def embeddings(loaded: LoadedModel, *sentences: str) -> torch.Tensor:
    vectors = []
    for sentence in sentences:
        inputs = loaded.tokenizer(sentence, return_tensors="pt")
        vectors.append(loaded.model(**inputs).last_hidden_state[0].mean(dim=0))
    return torch.stack(vectors)


def test_the_model_is_all_minilm_l6_v2(minilm: LoadedModel) -> None:
    assert minilm.topology.parameters_dense == 22_713_216
    assert (minilm.topology.architecture, minilm.topology.layer_count) == ("BertModel", 6)
    assert len(minilm.topology.tensors) == 36
    assert "pooling_mode_mean_tokens" in minilm.sentence_files["1_Pooling/config.json"]
    rain, wet, bank = embeddings(
        minilm, "It is raining heavily outside.", "There is a downpour.", "The bank raised its interest rates."
    )
    assert cosine_similarity(rain, wet, dim=0) > 0.5
    assert cosine_similarity(rain, bank, dim=0) < 0.2


def test_fidelity_decreases_with_the_rank(minilm: LoadedModel, tmp_path: Path) -> None:
    tasks = load_study(STUDY).tasks
    evaluator = evaluator_for(minilm, tasks, EvaluationConfig(limit=120))
    assert evaluator.evaluate().accuracy == pytest.approx(1.0, abs=1e-9)
    points = [DesignPoint.uniform(minilm.topology, "svd", rank, roles=["query", "key"]) for rank in (128, 32, 1)]
    bank = dse.FactorBank.build(minilm, points, folder=tmp_path)
    found = []
    for point in points:
        with dse.decompose(minilm, point, bank):
            found.append(evaluator.evaluate().tasks[0])
    spearman, cosine = ([task.all_metrics[f"fidelity_{name}"][0] for task in found] for name in ("spearman", "cosine"))
    assert spearman[0] > 0.95
    assert sorted(spearman, reverse=True) == spearman
    assert sorted(cosine, reverse=True) == cosine


def test_the_example_study_and_its_export(tmp_path: Path) -> None:
    out, exported = tmp_path / "run", tmp_path / "exported"
    study = dse.run_study(STUDY, out=out, trials=3)
    table = study.trials()
    assert (table["state"] == "complete").sum() == 3
    assert table.loc[0, "accuracy"] == pytest.approx(1.0, abs=1e-9)
    assert (table["prefill_latency_s"].dropna() > 0).all()
    trial = int(table[(table["state"] == "complete") & (table["decomposed_tensors"] > 0)]["trial"].iloc[0])
    result = dse.export_trials(study, trials=[trial], out=exported)[0]
    assert result.max_logit_difference is not None
    assert result.max_logit_difference <= 1e-4
    assert {"1_Pooling", "modules.json", "sentence_bert_config.json"} <= set(result.files)
    code = (
        "import sys; sys.modules['dse'] = None\n"
        "from transformers import AutoModel, AutoTokenizer\n"
        f"model = AutoModel.from_pretrained({str(exported)!r}, trust_remote_code=True)\n"
        f"tokenizer = AutoTokenizer.from_pretrained({str(exported)!r}, trust_remote_code=True)\n"
        "vectors = model(**tokenizer(['a cat', 'a kitten', 'a tax'], return_tensors='pt')).last_hidden_state.mean(1)\n"
        "vectors = vectors / vectors.norm(dim=1, keepdim=True)\n"
        "print([round(v, 4) for v in (vectors[0] @ vectors.T).tolist()], sum(p.numel() for p in model.parameters()))\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=300, check=True)
    cosines, parameters = done.stdout.rsplit(maxsplit=1)
    _, kitten, tax = json.loads(cosines)
    assert kitten > tax
    assert int(parameters) == result.parameters
