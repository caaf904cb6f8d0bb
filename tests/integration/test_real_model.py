"""The first steps of a new user on the real model, and figures about it that the documentation states."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from pathlib import Path

import pandas as pd
import pytest
import torch

import dse
from dse.config import CalibrationConfig, CalibrationSource
from dse.decomposition import calibration_windows
from dse.evaluation import Evaluator, TaskSpec
from dse.models import LoadedModel

pytestmark = pytest.mark.real_model

ROOT = Path(__file__).resolve().parents[2]
MODEL = "demo:smollm2-135m-instruct"


@pytest.fixture(scope="module")
def smollm2() -> LoadedModel:
    return dse.load_model(MODEL)


def run(*arguments: str, expect: int = 0) -> subprocess.CompletedProcess[str]:
    done = subprocess.run(
        [sys.executable, "-m", "dse.cli", *arguments],
        capture_output=True,
        text=True,
        timeout=1500,
        check=False,
        cwd=ROOT,
    )
    assert done.returncode == expect, done.stderr
    assert "Traceback" not in done.stderr
    return done


@torch.inference_mode()
def perplexity(loaded: LoadedModel, windows: int = 3) -> float:
    text = (ROOT / "dse/data/general_heldout.txt").read_text(encoding="utf-8")
    token_ids = torch.tensor(loaded.tokenizer(text)["input_ids"])[: windows * 512].reshape(windows, 512)
    logits = loaded.model(token_ids).logits[:, :-1]
    return math.exp(torch.nn.functional.cross_entropy(logits.flatten(0, 1), token_ids[:, 1:].flatten()).item())


def test_topology_and_parameters(smollm2: LoadedModel) -> None:
    assert smollm2.topology.parameters_dense == 134_515_008
    assert len(smollm2.topology.tensors) == 30 * 7
    point = dse.DesignPoint.uniform(smollm2.topology, "tucker", 1, [2, 15, 28])
    assert dse.point_cost(smollm2.topology, point).reduction == pytest.approx(0.0787, abs=1e-4)


def test_whitened_svd_is_far_better_than_plain_svd(smollm2: LoadedModel, tmp_path: Path) -> None:
    """Rank 1 on layers 2, 15 and 28, a point as in the paper, badly degrades the model without whitening."""
    config = CalibrationConfig(sources=[CalibrationSource(builtin="general")], tokens=4096, window=256)
    windows = calibration_windows(smollm2.tokenizer, config)
    plain, whitened = (
        dse.DesignPoint.uniform(smollm2.topology, method, 1, [2, 15, 28]) for method in ("svd", "whitened_svd")
    )
    bank = dse.FactorBank.build(smollm2, [plain, whitened], windows, folder=tmp_path)
    found = {}
    for name, point in (("plain", plain), ("whitened", whitened)):
        with dse.decompose(smollm2, point, bank):
            found[name] = perplexity(smollm2)
    dense = perplexity(smollm2)
    assert dense < 60
    assert found["whitened"] < 0.6 * found["plain"]
    assert found["whitened"] < 6 * dense


def test_offline_tasks_separate_the_dense_model_from_a_degraded_one(smollm2: LoadedModel, tmp_path: Path) -> None:
    evaluator = Evaluator(smollm2, [TaskSpec("dse_grammar"), TaskSpec("dse_facts")], limit=100, batch_size=32)
    dense = {task.task: task.value for task in evaluator.evaluate().tasks}
    degraded_point = dse.DesignPoint.uniform(smollm2.topology, "svd", 1)
    with dse.decompose(smollm2, degraded_point, dse.FactorBank.build(smollm2, [degraded_point], folder=tmp_path)):
        degraded = {task.task: task.value for task in evaluator.evaluate().tasks}
    assert dense["dse_grammar"] > 0.8
    assert dense["dse_facts"] > 0.6
    # Three standard errors of 100 documents around chance.
    assert abs(degraded["dse_grammar"] - 0.5) < 0.15
    assert abs(degraded["dse_facts"] - 0.25) < 0.13


def test_run_front_export_evaluate(tmp_path: Path) -> None:
    out = tmp_path / "quickstart"
    study = json.loads(run("run", "studies/quickstart.yaml", "--trials", "3", "--out", str(out), "--json").stdout)
    assert study["is_complete"]
    assert study["trials_evaluated"] == 3
    for name in ("study.yaml", "study.db", "trials.csv", "front.csv", "front.html", "front.png", "run.log"):
        assert (out / name).stat().st_size > 0, name
    trials = pd.read_csv(out / "trials.csv")
    assert trials.loc[0, "decomposed_tensors"] == 0
    complete = trials[trials["state"] == "complete"]
    assert len(complete) == 3
    assert complete["accuracy"].notna().all()
    assert (complete["decode_latency_s"] > 0).all()
    again = run("run", "studies/quickstart.yaml", "--trials", "3", "--out", str(out))
    assert "complete" in again.stderr
    assert "next:" in again.stdout
    front = json.loads(run("front", str(out), "--json").stdout)
    assert {row["trial"] for row in front["front"]} <= set(trials["trial"])
    trial = str(complete["trial"].iloc[-1])
    exported = tmp_path / "exported"
    result = json.loads(run("export", str(out), "--trial", trial, "--out", str(exported), "--json").stdout)[0]
    assert result["max_logit_difference"] <= 1e-4
    assert result["weight_file_bytes"] < 538_060_288
    evaluated = json.loads(
        run(
            *("evaluate", "--model", str(exported), "--trust-remote-code"),
            *("--task", "dse_facts", "--limit", "20", "--json"),
        ).stdout
    )
    assert evaluated["tasks"][0]["documents"] == 20
    code = (
        "import sys; sys.modules['dse'] = None\n"
        "from transformers import AutoModelForCausalLM, AutoTokenizer\n"
        f"model = AutoModelForCausalLM.from_pretrained({str(exported)!r}, trust_remote_code=True)\n"
        f"tokenizer = AutoTokenizer.from_pretrained({str(exported)!r}, trust_remote_code=True)\n"
        "out = model.generate(**tokenizer('The capital of France is', return_tensors='pt'), max_new_tokens=3)\n"
        "print(out.shape[1], sum(p.numel() for p in model.parameters()))\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=300, check=True)
    _, parameters = done.stdout.split()
    assert int(parameters) == result["parameters"]
