"""Studies that are measured in a serving engine, as a user runs them, and what becomes of an engine's failures."""

from __future__ import annotations

import contextlib
import json
import math
import os
import signal
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
from engine_environments import Run, engine_python, needs_modules
from tiny_models import byte_tokenizer, save_tiny_model
from tiny_study import save_choice_task, tiny_study

from dse.errors import ConfigError, EngineUnavailableError
from dse.study import Study, StudyListener, open_study, run_study

SERVED = ("ttft_s", "tpot_s", "throughput_tokens_s", "prefill_latency_s", "decode_latency_s")
ONNX_MODULES = ("onnx", "onnxscript", "onnx_ir")


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
        num_hidden_layers=2,
        max_position_embeddings=256,
        initializer_range=0.1,
    )
    save_choice_task(folder)
    return folder


def engine_study(
    root: Path,
    engine: str,
    objectives: list[str],
    trials: int = 3,
    enqueue: Sequence[dict[str, Any]] = (),
    **measurement: Any,
) -> dict[str, Any]:
    settings = {"engine": engine, "prompt_tokens": 8, "new_tokens": 3, "max_duration_s": 2.0, **measurement}
    return tiny_study(
        root, objectives=objectives, measurement=settings, budget={"trials": trials}, enqueue=list(enqueue)
    )


def low_rank(rank: int, layer: int) -> dict[str, Any]:
    return {"method": "svd", "rank": rank, "layers": [layer], "roles": ["query", "attention_output", "up"]}


def engine_workers() -> list[int]:
    """Processes of engines that this process started and that still run."""
    found = []
    for file in Path(f"/proc/{os.getpid()}/task").glob("*/children"):
        for child in file.read_text(encoding="utf-8").split():
            with contextlib.suppress(FileNotFoundError):  # it may end meanwhile
                if b"worker.py" in Path(f"/proc/{child}/cmdline").read_bytes():
                    found.append(int(child))
    return found


def check_served(table: pd.DataFrame, engine: str) -> None:
    """The first row is the dense model's, and all trials were measured in the engine."""
    assert list(table["state"]) == ["complete"] * len(table), list(table["reason"])
    for name in SERVED:
        assert (table[name] > 0).all()
        assert list(table[f"{name}_engine"]) == [engine] * len(table)
        assert list(table[name]) == pytest.approx(list(table[f"{name}_ratio"] * table.loc[0, name]))
    assert list(table["decode_latency_s"]) == list(table["tpot_s"])
    assert (table["seconds_engine_start_s"].iloc[1:] > 0).all()
    assert math.isnan(table.loc[0, "seconds_engine_start_s"])  # the dense model's engine starts before its trial
    assert not engine_workers()


# --- transformers in the study's own process ------------------------------------------------------------------------


@pytest.fixture(scope="module")
def resident(root: Path, tmp_path_factory: pytest.TempPathFactory) -> Study:
    """A study of serving objectives in transformers, which needs no other environment."""
    objectives = ["ttft_s", "tpot_s", "throughput_tokens_s", "parameters"]
    enqueue = [low_rank(4, 0)]
    config = engine_study(root, "transformers", objectives, 2, enqueue, batch_size=[2, 1], requests=4)
    return run_study(config, out=tmp_path_factory.mktemp("resident") / "run")


def test_serving_objectives_are_measured_in_transformers(resident: Study) -> None:
    table = resident.trials()
    assert list(table["state"]) == ["complete"] * 2
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
    rows = "".join(f"{step / 20:g},5\n" for step in range(20 * 600))  # a window ends soon after it sees new samples
    trace.write_text(f"time_s,cpu_w\n{rows}", encoding="utf-8")
    objectives = ["request_energy_j", "output_token_energy_j", "parameters"]
    config = engine_study(root, "transformers", objectives, trials=2, meter=f"replay:{trace}", new_tokens=4)
    table = run_study(config, out=tmp_path / "run").trials()
    assert list(table["state"]) == ["complete", "complete"], list(table["reason"])
    assert (table["request_energy_j"] > 0).all()
    assert list(table["output_token_energy_j"]) == pytest.approx(list(table["request_energy_j"] / 4))


def test_measure_in_a_worker_prints_every_cell(root: Path, run: Run) -> None:
    command = ["measure", "--model", root / "model", "--device", "cpu", "--engine", "transformers"]
    command += ["--batch", "1,2", "--prompt", 8, "--new", 3, "--blocks", 2, "--max-seconds", 1, "--meter", "none"]
    document = json.loads(run(*command, "--point", json.dumps(low_rank(4, 0)), "--json")[0])
    assert [cell["work"]["concurrency"] for cell in document["cells"]] == [1, 2]
    for cell in document["cells"]:
        assert cell["is_valid"] or "too busy" in cell["reason"]
        assert cell["start_up_s"] > 0
        for quantity in ("ttft", "tpot", "prefill", "window"):
            assert 0 < cell[quantity]["ratio_low"] <= cell[quantity]["ratio"] <= cell[quantity]["ratio_high"]


# --- a study in an engine of its own process, with every failure ----------------------------------------------------


class _Faults(StudyListener):
    """Kills the candidate's engine of trial 1 while it serves, and stops that of trial 2."""

    def __init__(self) -> None:
        self.trial = 0
        self.signals = {1: signal.SIGKILL, 2: signal.SIGSTOP}

    def on_trial_start(self, progress: Any, record: Any) -> None:
        self.trial = record.trial

    def on_phase(self, phase: str, done: int, total: int) -> None:
        if phase == "serving" and self.trial in self.signals:
            os.kill(max(engine_workers()), self.signals.pop(self.trial))  # the youngest one


def test_a_study_in_onnx_runtime_survives_every_failure(root: Path, tmp_path: Path) -> None:
    needs_modules(*ONNX_MODULES)
    enqueue = [low_rank(4, 0), low_rank(4, 1), low_rank(6, 0), low_rank(6, 1)]
    objectives = ["tpot_s", "throughput_tokens_s", "parameters"]
    settings = {"python": engine_python("onnxruntime"), "engine_time_limit_s": 20.0}
    config = engine_study(root, "onnxruntime", objectives, trials=4, enqueue=enqueue, **settings)
    table = run_study(config, out=tmp_path / "run", listener=_Faults()).trials()
    assert list(table["state"]) == ["complete", "failed", "failed", "complete"], list(table["reason"])
    killed, hung = table.loc[1:2, "reason"]
    assert "engine 'onnxruntime' must answer `run`, but its process was killed by SIGKILL" in killed
    assert "engine 'onnxruntime' must answer `run` within 20 s, but did not and was killed" in hung
    assert not any("\n" in reason for reason in (killed, hung))
    assert (table.loc[1:2, "parameters"] < table.loc[0, "parameters"]).all()  # what is known stays
    check_served(table.loc[[0, 3]], "onnxruntime")
    longer = {**config, "budget": {**config["budget"], "trials": 5}}
    resumed = run_study(longer, out=tmp_path / "run").trials()
    assert resumed.loc[4, "state"] == "complete"
    assert list(resumed.loc[:3, "state"]) == list(table["state"])
    assert list(resumed.loc[[0, 3], "tpot_s"]) == list(table.loc[[0, 3], "tpot_s"])


def test_a_model_that_the_engine_cannot_take_is_one_line(root: Path, tmp_path: Path, run: Run) -> None:
    needs_modules(*ONNX_MODULES)
    config = engine_study(root, "onnxruntime", ["tpot_s", "parameters"], python=engine_python("onnxruntime"))
    config["model"] = {**config["model"], "dtype": "bfloat16"}
    (tmp_path / "study.yaml").write_text(json.dumps(config), encoding="utf-8")
    _, errors = run("run", tmp_path / "study.yaml", "--out", tmp_path / "run", expect=2)
    (line,) = [line for line in errors.splitlines() if "error:" in line]
    assert "the dense model must run in the engine, but engine 'onnxruntime' cannot take" in line
    assert "an export to ONNX must be float32 or float16" in line


def test_a_study_in_vllm(root: Path, tmp_path: Path) -> None:
    settings = {"python": engine_python("vllm"), "options": {"enforce_eager": True}, "batch_size": 2}
    config = engine_study(root, "vllm", ["throughput_tokens_s", "parameters"], **settings)
    check_served(run_study(config, out=tmp_path / "run").trials(), "vllm")


# --- the front in a serving engine ----------------------------------------------------------------------------------


class _Stop(StudyListener):
    """Interrupts the study while the engine measures the first point of the front."""

    def __init__(self) -> None:
        self.is_measuring = False

    def on_message(self, text: str) -> None:
        self.is_measuring |= text.startswith("measuring the front")

    def on_phase(self, phase: str, done: int, total: int) -> None:
        if self.is_measuring and phase == "serving" and done > 0 and len(engine_workers()) > 1:
            raise KeyboardInterrupt


def test_the_front_is_measured_at_the_end_and_resumes(root: Path, tmp_path: Path) -> None:
    needs_modules("openvino")
    python = engine_python("openvino")
    objectives = ["accuracy", "decode_latency_s", "parameters"]
    config = engine_study(root, "openvino", objectives, 2, [low_rank(4, 0)], python=python, when="front")
    with pytest.raises(KeyboardInterrupt):
        run_study(config, out=tmp_path / "run", listener=_Stop())
    assert not engine_workers()
    before = open_study(tmp_path / "run")
    kept = before.attributes["serving.openvino"]
    assert list(kept) == ["0"]  # the dense model; the first point was interrupted
    study = run_study(config, out=tmp_path / "run")
    assert study.attributes["serving.openvino"]["0"] == kept["0"]
    table = study.trials()
    front = table["on_front"] | table["tied_with"].notna()
    assert front.loc[1:].any()
    assert (table["openvino.decode_latency_s"].notna() == (front | (table["trial"] == 0))).all()
    # The search keeps its own values: no axis mixes engines.
    searched = [record.value("decode_latency_s") for record in before.records]
    assert list(table["decode_latency_s"]) == searched
    assert "decode_latency_s_engine" not in table
    ratio = table["openvino.decode_latency_s_ratio"] * table.loc[0, "openvino.decode_latency_s"]
    measured = table["openvino.decode_latency_s"].notna()
    assert list(table.loc[measured, "openvino.decode_latency_s"]) == pytest.approx(list(ratio[measured]))
    assert not table.loc[~measured, "openvino.on_front"].any()
    assert table.loc[measured, "openvino.on_front"].any()
    again = run_study(config, out=tmp_path / "run")  # nothing is left to do
    assert again.attributes["serving.openvino"] == study.attributes["serving.openvino"]


def test_a_finished_study_is_measured_later(resident: Study, run: Run) -> None:
    needs_modules(*ONNX_MODULES)
    python = engine_python("onnxruntime")
    command = ["measure", "--study", resident.folder.path, "--engine", "onnxruntime", "--python", python, "--json"]
    document = json.loads(run(*command)[0])
    assert document["trials"][0]["trial"] == 0
    assert all(row["onnxruntime.tpot_s"] > 0 for row in document["trials"])
    assert "onnxruntime.tpot_s" in (resident.folder.path / "trials.csv").read_text(encoding="utf-8")


# --- what is refused before anything is loaded ----------------------------------------------------------------------


def test_a_missing_engine_is_one_line(root: Path, tmp_path: Path, run: Run) -> None:
    config = engine_study(root, "vllm", ["tpot_s", "parameters"], python="/nowhere/python")
    with pytest.raises(EngineUnavailableError, match=r"/nowhere/python does not exist"):
        run_study(config, out=tmp_path / "run")
    (tmp_path / "study.yaml").write_text(json.dumps(config), encoding="utf-8")
    _, errors = run("run", tmp_path / "study.yaml", "--out", tmp_path / "cli", expect=2)
    assert errors.count("error:") == 1
    assert "Traceback" not in errors


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
