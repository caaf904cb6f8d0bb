"""Studies that are measured in a serving engine, as a user runs them; failures of an engine; servers and lm-eval."""

from __future__ import annotations

import contextlib
import json
import math
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from engine_environments import engine_python, needs_modules
from tiny_models import byte_tokenizer, save_tiny_model
from tiny_study import save_choice_task, tiny_study

from dse.errors import ConfigError, EngineUnavailableError
from dse.study import Study, StudyListener, open_study, run_study

SERVED = ("ttft_s", "tpot_s", "throughput_tokens_s", "prefill_latency_s", "decode_latency_s")
ONNX_MODULES = ("onnx", "onnxscript", "onnx_ir")


@pytest.fixture(scope="module", autouse=True)
def cache(cache_folder: Path) -> Iterator[None]:
    """The cache of the tests, for this process and those it starts."""
    import datasets.config

    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("DSE_CACHE", str(cache_folder / "dse"))
        patch.setattr(datasets.config, "HF_DATASETS_CACHE", cache_folder / "datasets")
        yield


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny model that every engine supports, and a small task."""
    folder = tmp_path_factory.mktemp("engine_study")
    save_tiny_model(
        folder / "model",
        tokenizer=byte_tokenizer(),
        hidden_size=64,
        num_attention_heads=2,
        head_dim=32,
        max_position_embeddings=256,
        initializer_range=0.1,
    )
    save_choice_task(folder)
    save_choice_task(folder, documents=20, name="twenty")
    return folder


def engine_study(root: Path, engine: str, objectives: list[str], trials: int = 3, **measurement: Any) -> dict[str, Any]:
    settings = {"engine": engine, "prompt_tokens": 8, "new_tokens": 3, "max_duration_s": 2.0, **measurement}
    return tiny_study(root, objectives=objectives, measurement=settings, budget={"trials": trials})


def children() -> list[int]:
    """Processes that this one started and that still run."""
    found = Path(f"/proc/{os.getpid()}/task").glob("*/children")
    return [int(child) for file in found for child in file.read_text(encoding="utf-8").split()]


def engine_workers() -> list[int]:
    found = []
    for child in children():
        with contextlib.suppress(FileNotFoundError):  # it may end meanwhile
            if b"worker.py" in Path(f"/proc/{child}/cmdline").read_bytes():
                found.append(child)
    return found


# --- transformers in the study's own process ------------------------------------------------------------------------


@pytest.fixture(scope="module")
def resident(root: Path, tmp_path_factory: pytest.TempPathFactory) -> Study:
    """A study of serving objectives in transformers, which needs no other environment."""
    objectives = ["ttft_s", "tpot_s", "throughput_tokens_s", "parameters"]
    config = engine_study(root, "transformers", objectives, batch_size=[2, 1], requests=4)
    return run_study(config, out=tmp_path_factory.mktemp("resident") / "run")


def test_serving_objectives_are_measured_in_transformers(resident: Study) -> None:
    table = resident.trials()
    assert list(table["state"]) == ["complete"] * 3
    assert (table[["ttft_s", "tpot_s", "throughput_tokens_s"]] > 0).all(axis=None)
    assert list(table.loc[0, ["ttft_s_ratio", "tpot_s_ratio", "throughput_tokens_s_ratio"]]) == [1.0] * 3
    for name in ("ttft_s", "tpot_s", "throughput_tokens_s"):  # value = ratio x dense value of trial 0
        assert list(table[name]) == pytest.approx(list(table[f"{name}_ratio"] * table.loc[0, name]))
        assert (table[f"{name}_low"] <= table[name]).all()
        assert (table[name] <= table[f"{name}_high"]).all()
    assert table["cell.b1_p8_n3.throughput_ratio"].notna().all()
    assert "ttft_s_engine" not in table
    serving = resident.record(1).serving
    assert serving is not None
    assert serving["work"] == {"prompt_tokens": 8, "new_tokens": 3, "concurrency": 2, "requests": 4, "seed": 0}
    assert serving["ttft"]["candidate"]["count"] == 4 * serving["ttft"]["blocks"] * 2


def test_throughput_is_maximised_within_the_reference(resident: Study) -> None:
    assert resident.hypervolume is not None
    assert 0 <= resident.hypervolume <= 1
    reference = resident.attributes["reference"]["throughput_tokens_s"]
    assert reference == pytest.approx(resident.trials().loc[0, "throughput_tokens_s"] / 1.5)


def test_energy_per_request_comes_from_the_same_windows(root: Path, tmp_path: Path) -> None:
    trace = tmp_path / "trace.csv"
    rows = "".join(f"{step / 20:g},5\n" for step in range(20 * 1200))  # a window ends soon after it sees new samples
    trace.write_text(f"time_s,cpu_w\n{rows}", encoding="utf-8")
    objectives = ["request_energy_j", "output_token_energy_j", "parameters"]
    config = engine_study(root, "transformers", objectives, trials=2, meter=f"replay:{trace}", new_tokens=4)
    table = run_study(config, out=tmp_path / "run").trials()
    assert list(table["state"]) == ["complete", "complete"], list(table["reason"])
    assert (table["request_energy_j"] > 0).all()
    assert list(table["output_token_energy_j"]) == pytest.approx(list(table["request_energy_j"] / 4))


def test_measure_in_a_worker_prints_every_cell(root: Path) -> None:
    point = '{"method": "svd", "rank": 4, "layers": [0]}'
    command = ["measure", "--model", root / "model", "--device", "cpu", "--engine", "transformers", "--point", point]
    command += [
        "--batch",
        "1,2",
        "--prompt",
        "8",
        "--new",
        "3",
        "--blocks",
        "2",
        "--max-seconds",
        "1",
        "--meter",
        "none",
    ]
    document = json.loads(dse(*command, "--json").stdout)
    assert [cell["work"]["concurrency"] for cell in document["cells"]] == [1, 2]
    for cell in document["cells"]:
        assert cell["is_valid"] or "too busy" in cell["reason"]
        assert cell["start_up_s"] > 0
        for quantity in ("ttft", "tpot", "prefill", "window"):
            assert 0 < cell[quantity]["ratio_low"] <= cell[quantity]["ratio"] <= cell[quantity]["ratio_high"]


# --- a study in each engine -----------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def onnx_study(root: Path, tmp_path_factory: pytest.TempPathFactory) -> Study:
    needs_modules(*ONNX_MODULES)
    python = engine_python("onnxruntime")
    config = engine_study(root, "onnxruntime", ["accuracy", "decode_latency_s", "parameters"], python=python)
    return run_study(config, out=tmp_path_factory.mktemp("onnx") / "run")


def check_served(study: Study, engine: str) -> None:
    table = study.trials()
    assert list(table["state"]) == ["complete"] * len(table), list(table["reason"])
    for name in SERVED:
        assert (table[name] > 0).all()
        assert list(table[f"{name}_engine"]) == [engine] * len(table)
        assert list(table[name]) == pytest.approx(list(table[f"{name}_ratio"] * table.loc[0, name]))
    assert list(table["decode_latency_s"]) == list(table["tpot_s"])
    assert (table.loc[1:, "seconds_engine_start_s"] > 0).all()
    assert math.isnan(table.loc[0, "seconds_engine_start_s"])  # the dense model's engine starts before its trial
    assert not engine_workers()


def test_a_study_in_onnx_runtime(onnx_study: Study) -> None:
    check_served(onnx_study, "onnxruntime")


@pytest.mark.real_model
def test_a_study_in_vllm(tmp_path: Path) -> None:
    config = {
        "name": "vllm",
        "model": {"ref": "demo:smollm2-135m-instruct", "device": "cpu"},
        "space": {
            "name": "small",
            "methods": ["svd"],
            "groups": {"layers": 10, "roles": {"mlp": ["gate", "up"]}},
            "ranks": {"absolute": [128]},
        },
        "objectives": ["throughput_tokens_s", "parameters"],
        "measurement": {
            "engine": "vllm",
            "python": engine_python("vllm"),
            "options": {"enforce_eager": True},
            "prompt_tokens": 32,
            "new_tokens": 4,
            "batch_size": 2,
            "blocks": 2,
            "max_duration_s": 10,
        },
        "sampler": {"name": "random", "seed": 1},
        "budget": {"trials": 3},
    }
    check_served(run_study(config, out=tmp_path / "run"), "vllm")


# --- the front in a serving engine ----------------------------------------------------------------------------------


class _Stop(StudyListener):
    """Interrupts the study when the front has been measured once."""

    def __init__(self) -> None:
        self.measured = 0

    def on_message(self, text: str) -> None:
        self.measured += text.startswith("measuring the front")

    def on_phase(self, phase: str, done: int, total: int) -> None:
        if self.measured and phase == "serving" and done > 0 and len(engine_workers()) > 1:
            raise KeyboardInterrupt


def test_the_front_is_measured_at_the_end_and_resumes(root: Path, tmp_path: Path) -> None:
    needs_modules(*ONNX_MODULES)
    python = engine_python("onnxruntime")
    objectives = ["accuracy", "decode_latency_s", "parameters"]
    config = engine_study(root, "onnxruntime", objectives, python=python, when="front")
    with pytest.raises(KeyboardInterrupt):
        run_study(config, out=tmp_path / "run", listener=_Stop())
    assert not engine_workers()
    before = open_study(tmp_path / "run")
    assert list(before.attributes["serving.onnxruntime"]) == ["0"]  # the dense model; the first point was interrupted
    study = run_study(config, out=tmp_path / "run")
    table = study.trials()
    front = table["on_front"] | table["tied_with"].notna()
    assert front.loc[1:].any()
    assert (table["onnxruntime.decode_latency_s"].notna() == (front | (table["trial"] == 0))).all()
    # The search keeps its own values: no axis mixes engines.
    searched = [record.value("decode_latency_s") for record in before.records]
    assert list(table["decode_latency_s"]) == searched
    assert "decode_latency_s_engine" not in table
    ratio = table["onnxruntime.decode_latency_s_ratio"] * table.loc[0, "onnxruntime.decode_latency_s"]
    measured = table["onnxruntime.decode_latency_s"].notna()
    assert list(table.loc[measured, "onnxruntime.decode_latency_s"]) == pytest.approx(list(ratio[measured]))
    assert not table.loc[~measured, "onnxruntime.on_front"].any()
    assert table.loc[measured, "onnxruntime.on_front"].any()
    again = run_study(config, out=tmp_path / "run")  # nothing is left to do
    assert again.attributes["serving.onnxruntime"] == study.attributes["serving.onnxruntime"]


def test_a_finished_study_is_measured_later(resident: Study) -> None:
    needs_modules(*ONNX_MODULES)
    python = engine_python("onnxruntime")
    command = ["measure", "--study", resident.folder.path, "--engine", "onnxruntime", "--python", python, "--json"]
    document = json.loads(dse(*command).stdout)
    assert document["trials"][0]["trial"] == 0
    assert all(row["onnxruntime.tpot_s"] > 0 for row in document["trials"])
    assert "onnxruntime.tpot_s" in (resident.folder.path / "trials.csv").read_text(encoding="utf-8")


# --- what goes wrong ------------------------------------------------------------------------------------------------


class _Killer(StudyListener):
    """Kills the candidate's engine of trial 1 while it serves."""

    def __init__(self) -> None:
        self.trial = 0
        self.killed = 0

    def on_trial_start(self, progress: Any, record: Any) -> None:
        self.trial = record.trial

    def on_phase(self, phase: str, done: int, total: int) -> None:
        if phase == "serving" and self.trial == 1 and not self.killed:
            self.killed = max(engine_workers())  # the youngest one
            os.kill(self.killed, signal.SIGKILL)


def test_an_engine_that_dies_fails_its_trial_only(root: Path, tmp_path: Path) -> None:
    needs_modules(*ONNX_MODULES)
    config = engine_study(root, "onnxruntime", ["tpot_s", "parameters"], python=engine_python("onnxruntime"))
    table = run_study(config, out=tmp_path / "run", listener=_Killer()).trials()
    assert list(table["state"]) == ["complete", "failed", "complete"]
    assert "engine 'onnxruntime' must answer `run`, but its process was killed by SIGKILL" in table.loc[1, "reason"]
    assert "\n" not in table.loc[1, "reason"]
    assert table.loc[1, "parameters"] < table.loc[0, "parameters"]
    assert not engine_workers()


def test_a_missing_engine_is_one_line_before_anything_is_loaded(root: Path, tmp_path: Path) -> None:
    config = engine_study(root, "vllm", ["tpot_s", "parameters"], python="/nowhere/python")
    with pytest.raises(EngineUnavailableError, match=r"/nowhere/python does not exist"):
        run_study(config, out=tmp_path / "run")
    (tmp_path / "study.yaml").write_text(json.dumps(config), encoding="utf-8")
    done = dse("run", tmp_path / "study.yaml", "--out", tmp_path / "cli", expect=2)
    assert done.stderr.count("error:") == 1


def test_energy_of_a_phase_is_refused_in_a_serving_engine(root: Path, tmp_path: Path) -> None:
    trace = tmp_path / "trace.csv"
    trace.write_text("time_s,cpu_w\n0,5\n1200,5\n", encoding="utf-8")
    config = engine_study(root, "vllm", ["prefill_energy_j"], python="/nowhere/python", meter=f"replay:{trace}")
    with pytest.raises(ConfigError, match=r"use request_energy_j or output_token_energy_j"):
        run_study(config, out=tmp_path / "run")


@pytest.mark.parametrize(
    ("measurement", "rule"),
    [
        ({"when": "front"}, "needs a serving engine"),
        ({"engine": "vlm"}, "'transformers', 'vllm', 'onnxruntime' or 'openvino'"),
        ({"requests": 0}, "greater than or equal to 1"),
        ({"engine": "vllm", "engine_time_limit_s": 0}, "greater than 0"),
    ],
)
def test_a_wrong_measurement_section_is_refused(root: Path, measurement: dict[str, Any], rule: str) -> None:
    from dse.config import parse_study

    with pytest.raises(ConfigError, match=rule):
        parse_study(tiny_study(root, measurement=measurement))


# --- servers and lm-eval --------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def export(resident: Study, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A low-rank export of a trial."""
    from dse.standalone import export_trials

    trial = next(record.trial for record in resident.records if not record.is_dense)
    folder = tmp_path_factory.mktemp("served") / "export"
    export_trials(resident, trial, folder)
    return folder


def test_a_vllm_server_answers_over_http(export: Path, tmp_path: Path) -> None:
    python = engine_python("vllm")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [Path(python).with_name("vllm"), "serve", export, "--trust-remote-code", "--enforce-eager"]
    command += ["--host", "127.0.0.1", "--port", str(port), "--max-model-len", "128", "--served-model-name", "low-rank"]
    environment = {**os.environ, "VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_NO_USAGE_STATS": "1"}
    environment.pop("PYTHONPATH", None)
    with (tmp_path / "log").open("wb") as log:
        server = subprocess.Popen(
            [*map(str, command)], stdout=log, stderr=subprocess.STDOUT, env=environment, start_new_session=True
        )
        try:
            answer = _asked(server, port, {"model": "low-rank", "prompt": "the cat", "max_tokens": 4, "temperature": 0})
        finally:
            os.killpg(server.pid, signal.SIGKILL)
            server.wait()
    assert answer["usage"]["completion_tokens"] <= 4
    assert answer["choices"][0]["finish_reason"] in ("length", "stop")


def _asked(server: subprocess.Popen[bytes], port: int, body: dict[str, Any]) -> dict[str, Any]:
    """The server's answer to a completion request, once it is up."""
    request = urllib.request.Request(
        f"http://127.0.0.1:{port}/v1/completions",
        data=json.dumps(body).encode(),
        headers={"Content-Type": "application/json"},
    )
    deadline = time.monotonic() + 300
    while True:
        try:
            with urllib.request.urlopen(request, timeout=60) as response:
                found: dict[str, Any] = json.load(response)
                return found
        except OSError:
            assert server.poll() is None, "the server has ended"
            assert time.monotonic() < deadline, "the server did not come up"
            time.sleep(1.0)


@pytest.mark.parametrize("model", ["hf", "vllm"])
def test_lm_eval_agrees_with_dse(export: Path, resident: Study, root: Path, tmp_path: Path, model: str) -> None:
    python = engine_python("vllm")
    has_lm_eval = subprocess.run([python, "-c", "import lm_eval"], capture_output=True, check=False).returncode == 0
    if not has_lm_eval:
        pytest.skip(f"{python} has no lm_eval")
    arguments = f"pretrained={export},trust_remote_code=True,dtype=float32"
    if model == "vllm":
        arguments += ",max_model_len=256,enforce_eager=True,gpu_memory_utilization=0.2"
    command = [python, "-m", "lm_eval", "--model", model, "--model_args", arguments, "--tasks", "twenty"]
    command += ["--include_path", root, "--output_path", tmp_path, "--trust_remote_code"]
    environment = {**os.environ, "VLLM_CPU_KVCACHE_SPACE": "1", "HF_DATASETS_TRUST_REMOTE_CODE": "1"}
    environment.pop("PYTHONPATH", None)
    done = subprocess.run(
        [*map(str, command)], capture_output=True, text=True, timeout=600, check=False, env=environment, cwd=root
    )
    assert done.returncode == 0, done.stderr[-2000:]
    results = json.loads(next(tmp_path.rglob("results_*.json")).read_text(encoding="utf-8"))
    theirs = results["results"]["twenty"]["acc,none"]
    point = next(record.point for record in resident.records if not record.is_dense)
    (tmp_path / "point.json").write_text(json.dumps(point.to_json()), encoding="utf-8")
    ours = json.loads(
        dse(
            *("evaluate", "--model", root / "model", "--tasks", root / "twenty.yaml"),
            *("--point", tmp_path / "point.json", "--device", "cpu", "--json"),
        ).stdout
    )
    assert theirs == pytest.approx(ours["accuracy"])


def dse(*arguments: object, expect: int = 0) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "dse.cli", *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=600, check=False)
    assert done.returncode == expect, done.stderr + done.stdout
    assert "Traceback" not in done.stderr
    return done
