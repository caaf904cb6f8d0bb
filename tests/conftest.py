"""Fixtures that several folders use: a tiny model and task on disk, and a finished study of them."""

from __future__ import annotations

import importlib.util
import logging
import os
import signal
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest


def pytest_configure(config: pytest.Config) -> None:
    """Keep our order of files under pytest-xdist, which otherwise sorts them by number of tests."""
    if hasattr(config.option, "loadscopereorder"):
        config.option.loadscopereorder = False


def pytest_report_header() -> list[str]:
    """One line for each engine that is not installed, whose tests in `tests/engines` are skipped."""
    find_vllm = [str(Path(__file__).parents[1] / ".ci" / "engine_environment"), "--find", "vllm"]
    is_installed = {
        "ONNX Runtime": all(map(importlib.util.find_spec, ("onnx", "onnxscript", "onnxruntime"))),
        "OpenVINO": importlib.util.find_spec("openvino") is not None,
        "vLLM (build it with `.ci/engine_environment vllm`, or set DSE_VLLM_PYTHON)": "DSE_VLLM_PYTHON" in os.environ
        or subprocess.run(find_vllm, capture_output=True, check=False).returncode == 0,
    }
    return [
        f"tests/engines: skipped for {engine}: not installed" for engine, found in is_installed.items() if not found
    ]


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Run files with the real model first: each takes minutes, and the last one would leave other processes idle."""
    files = {item.path for item in items if item.get_closest_marker("real_model")}
    items.sort(key=lambda item: item.path not in files)  # stable


@pytest.fixture(scope="session", autouse=True)
def one_thread() -> None:
    """Tiny models gain nothing from threads, and waiting threads are very slow on a busy machine."""
    import torch

    torch.set_num_threads(1)


@pytest.fixture(scope="session", autouse=True)
def accept_noisy_latencies() -> None:
    """Tests of that rule set their own limit."""
    import preloaded_python

    preloaded_python.accept_noisy_latencies()


@pytest.fixture(scope="session", autouse=True)
def handle_ctrl_c() -> None:
    """Shells start background jobs with Ctrl-C ignored, which children inherit; some tests send it."""
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(scope="session")
def tiny_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`model/` and `tiny_choice.yaml`."""
    from tiny_models import save_tiny_model
    from tiny_study import save_choice_task

    folder = tmp_path_factory.mktemp("tiny")
    save_tiny_model(folder / "model")
    save_choice_task(folder)
    return folder


@pytest.fixture(scope="session")
def cache_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A cache for the tests, so that they leave the user's alone."""
    return tmp_path_factory.mktemp("cache")


@pytest.fixture
def own_cache(cache_folder: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Make dse and the datasets library use `cache_folder`."""
    import datasets.config

    monkeypatch.setenv("DSE_CACHE", str(cache_folder / "dse"))
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", cache_folder / "datasets")
    return cache_folder


@pytest.fixture
def own_process() -> Iterator[None]:
    """Undo the process-wide settings of `dse.cli.main` after the test: signal handlers and logging."""
    handler, logger = signal.getsignal(signal.SIGTERM), logging.getLogger("dse")
    handlers, propagate = list(logger.handlers), logger.propagate
    yield
    signal.signal(signal.SIGTERM, handler)
    logger.handlers[:], logger.propagate = handlers, propagate


@pytest.fixture(scope="session")
def finished_study(tiny_folder: Path, cache_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a finished study of accuracy, latency and size, on the CPU."""
    import datasets.config
    from tiny_study import tiny_study

    from dse.study import run_study

    out = tmp_path_factory.mktemp("finished") / "run"
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("DSE_CACHE", str(cache_folder / "dse"))
        patch.setattr(datasets.config, "HF_DATASETS_CACHE", cache_folder / "datasets")
        objectives = ["accuracy", "decode_latency_s", "parameters"]
        config = tiny_study(tiny_folder, objectives=objectives, measurement={"blocks": 4}, budget={"trials": 6})
        run_study(config, out=out)
    return out


class DenseSwap:
    """The dense model as both candidate and baseline of a measurement."""

    def use_candidate(self) -> None:
        pass

    def use_baseline(self) -> None:
        pass


@pytest.fixture
def dense_swap() -> DenseSwap:
    return DenseSwap()
