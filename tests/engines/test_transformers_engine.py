"""transformers as an engine, and what the driver of all workers does when one hangs or its parent dies."""

from __future__ import annotations

import contextlib
import os
import pickle
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import ClassVar

import pytest
from engine_conformance import EngineConformance, engine_model

from dse.decomposition import FactorBank
from dse.design_point import DesignPoint
from dse.engines import ENGINES, EnginePair, EngineSettings, EngineWork, WorkerSession, engine_checks
from dse.engines.engine_timings import EngineTimings
from dse.errors import EngineError, EngineUnavailableError
from dse.export import write_engine_folder
from dse.measurement.device_profile import ProductShape, timings_for


class TestTransformersEngine(EngineConformance):
    engine: ClassVar[str] = "transformers"


@pytest.fixture(scope="module")
def dense_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    loaded, folder = engine_model(), tmp_path_factory.mktemp("dense")
    bank = FactorBank.build(loaded, [DesignPoint.dense()], folder=folder / "bank")
    write_engine_folder(loaded, DesignPoint.dense(), bank, folder / "model", "huggingface")
    return folder / "model"


def test_a_hang_ends_at_the_time_limit_and_leaves_nothing(dense_folder: Path) -> None:
    session = ENGINES["transformers"].start(dense_folder, EngineSettings(threads=1))
    assert isinstance(session, WorkerSession)
    session._time_limit_s = 1.0  # short only now: loading may take longer
    os.kill(session.process_id, signal.SIGSTOP)
    with pytest.raises(EngineError, match=r"must answer `run` within 1 s, but did not and was killed"):
        session.run(EngineWork(4, 2))
    with pytest.raises(ProcessLookupError):
        os.killpg(session.process_id, 0)


def test_the_engine_ends_with_a_parent_that_is_killed(dense_folder: Path) -> None:
    code = (
        "import sys, time; from pathlib import Path; from dse.engines import ENGINES, EngineSettings\n"
        "session = ENGINES['transformers'].start(Path(sys.argv[1]), EngineSettings(threads=1))\n"
        "print(session.process_id, flush=True); time.sleep(600)"
    )
    with subprocess.Popen([sys.executable, "-c", code, str(dense_folder)], stdout=subprocess.PIPE, text=True) as parent:
        assert parent.stdout is not None
        worker = int(parent.stdout.readline())
        parent.kill()
    deadline = time.monotonic() + 30
    while time.monotonic() < deadline and _is_running(worker):
        time.sleep(0.1)
    assert not _is_running(worker)


def test_product_timings_come_from_the_engine(tmp_path: Path) -> None:
    loaded = engine_model()
    shape = ProductShape(4, 96, 64)
    with contextlib.closing(
        EnginePair(ENGINES["transformers"], EngineSettings(threads=1), loaded, write_engine_folder)
    ) as pair:
        timings = EngineTimings(pair, timings_for(loaded.model), tmp_path)
        assert timings.conditions.torch_version.startswith("transformers: transformers ")
        seconds = timings.seconds(shape)
        assert seconds > 0
        copy = pickle.loads(pickle.dumps(timings))
        again = EngineTimings(pair, timings_for(loaded.model), tmp_path)
    assert timings.path.parent == tmp_path
    assert again.has_timing(shape)
    assert again.seconds(shape) == seconds  # read from the file of this engine's versions
    assert copy.seconds(ProductShape(2, 96, 64)) > 0  # without a session: measured with torch


def test_doctor_lists_every_engine() -> None:
    checks = {check.name: check for check in engine_checks()}
    assert list(checks) == [f"engine {name}" for name in ENGINES]
    assert checks["engine transformers"].status == "ok"
    assert all(check.status == "ok" or check.remedy for check in checks.values())


def _is_running(process: int) -> bool:
    """Whether a process runs; a zombie whose new parent has not noticed yet does not."""
    try:
        state = Path(f"/proc/{process}/stat").read_text(encoding="utf-8").rpartition(")")[2].split()[0]
    except FileNotFoundError:
        return False
    return state != "Z"


def test_a_missing_interpreter_names_the_remedy(dense_folder: Path) -> None:
    settings = EngineSettings(python="/nowhere/bin/python")
    with pytest.raises(EngineUnavailableError, match=r"/nowhere/bin/python does not exist; set DSE_VLLM_PYTHON"):
        ENGINES["vllm"].start(dense_folder, settings)


def test_an_interpreter_without_the_package_names_the_remedy() -> None:
    found = ENGINES["vllm"].availability(_interpreter_without_packages())
    assert "has no vllm" in found.problem
    assert "pip install vllm" in found.remedy
    assert not found.is_available


def test_a_file_that_is_no_interpreter_is_a_problem(tmp_path: Path) -> None:
    script = tmp_path / "python"
    script.write_text("#!/bin/sh\necho not a python >&2\nexit 3\n", encoding="utf-8")
    script.chmod(0o755)
    assert "is not a working Python interpreter (not a python)" in ENGINES["vllm"].availability(str(script)).problem


def test_the_environment_variable_names_the_interpreter(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DSE_VLLM_PYTHON", "/some/python")
    assert ENGINES["vllm"].interpreter(None) == "/some/python"
    assert ENGINES["vllm"].interpreter("/other/python") == "/other/python"
    monkeypatch.delenv("DSE_VLLM_PYTHON")
    assert ENGINES["vllm"].interpreter(None) == sys.executable


def _interpreter_without_packages() -> str:
    """The base interpreter of this environment, or this one: neither has vLLM unless a user installed it there."""
    base = str(getattr(sys, "_base_executable", sys.executable))
    if ENGINES["vllm"].availability(base).is_available:
        pytest.skip("the base interpreter has vLLM")
    return base
