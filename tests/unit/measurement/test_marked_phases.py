"""Every forward pass of a study and of `dse evaluate` marks its device, so that no measurement is disturbed by it."""

from __future__ import annotations

import traceback
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from tiny_study import tiny_study
from torch.nn.modules.module import register_module_forward_pre_hook

from dse.config import EvaluationConfig
from dse.measurement import device_in_use, device_lock
from dse.measurement.device_lock import _HELD, lock_file, passing_measurements
from dse.standalone import ModelRequest, evaluate_model
from dse.study import run_study

CPU = torch.device("cpu")


@pytest.fixture
def unmarked() -> Iterator[set[str]]:
    """The callers of forward passes outside `device_in_use` and `device_lock`."""
    found: set[str] = set()
    path = lock_file(CPU)

    def check(_module: object, _inputs: object) -> None:
        if path not in _HELD.used and path not in _HELD.measured:
            frames = [frame for frame in traceback.extract_stack() if "/dse/" in frame.filename]
            found.add(" < ".join(f"{Path(frame.filename).stem}.{frame.name}" for frame in reversed(frames[-6:])))

    hook = register_module_forward_pre_hook(check)
    yield found
    hook.remove()


@pytest.mark.usefixtures("own_cache")
def test_every_phase_of_a_study_marks_its_device(tiny_folder: Path, tmp_path: Path, unmarked: set[str]) -> None:
    """Calibration, gradients, sensitivity, trials, the float32 comparison and the final documents."""
    config = tiny_study(
        tiny_folder,
        name="marked",
        model={"ref": str(tiny_folder / "model"), "dtype": "bfloat16"},
        objectives=["accuracy", "decode_latency_s", "peak_memory_bytes"],
        evaluation={"compare_float32": True, "limit": 4},
        measurement={"blocks": 2, "max_duration_s": 0.1},
        fidelity={"final_documents": 4},
        budget={"trials": 3},
    )
    run_study(config, out=tmp_path / "run")
    assert unmarked == set()


@pytest.mark.usefixtures("own_cache")
def test_evaluate_marks_its_device(tiny_folder: Path, unmarked: set[str]) -> None:
    model = ModelRequest(str(tiny_folder / "model"), device="cpu")
    point = '{"method": "svd", "rank": 2, "layers": "all", "roles": ["up"]}'
    evaluate_model(model, [str(tiny_folder / "tiny_choice.yaml")], EvaluationConfig(limit=4), point=point)
    assert unmarked == set()


def test_long_work_lets_a_measurement_pass(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import threading

    monkeypatch.setenv("DSE_CACHE", str(tmp_path))
    measured = threading.Event()

    def measure() -> None:
        with device_lock(CPU):
            measured.set()

    reports: list[tuple[str, int, int]] = []
    report = passing_measurements(lambda *step: reports.append(step), CPU)
    with device_in_use(CPU):
        thread = threading.Thread(target=measure, daemon=True)
        thread.start()
        assert not measured.wait(0.3)  # it waits for this thread
        report("calibrate", 1, 2)
        assert measured.wait(5)
        thread.join(5)
        report("calibrate", 2, 2)  # no other process is waiting
    assert reports == [("calibrate", 1, 2), ("calibrate", 2, 2)]
