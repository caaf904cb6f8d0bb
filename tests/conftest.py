"""Fixtures of more than one folder: a tiny model and task on disk, and a study of them that has been run."""

from __future__ import annotations

import logging
import math
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest


def pytest_configure(config: pytest.Config) -> None:
    """Keep the order of files when they go to several processes: the plugin's own is by number of tests."""
    if hasattr(config.option, "loadscopereorder"):
        config.option.loadscopereorder = False


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Files of the real model first: they take minutes each, and one that came last would leave the others idle."""
    files = {item.path for item in items if item.get_closest_marker("real_model")}
    items.sort(key=lambda item: item.path not in files)  # stable


@pytest.fixture(scope="session", autouse=True)
def one_thread() -> None:
    """Tiny models gain nothing from threads, and on a busy machine threads that wait for each other are very slow."""
    import torch

    torch.set_num_threads(1)


@pytest.fixture(scope="session", autouse=True)
def a_busy_machine_fails_no_trial() -> None:
    """Latencies of microseconds beside other work say nothing and would be refused; no clock decides a test.

    Tests of that rule set their own limit.
    """
    from dse.measurement import latency

    latency.MAX_INTERVAL_FACTOR = math.inf


@pytest.fixture(scope="session", autouse=True)
def ctrl_c_is_heard() -> None:
    """A shell starts background jobs deaf to Ctrl-C, and their children inherit that: tests that send it need it."""
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(scope="session")
def tiny_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`model/` and `tiny_choice.yaml`."""
    from tiny_study import save_choice_task, save_tiny_model

    folder = tmp_path_factory.mktemp("tiny")
    save_tiny_model(folder / "model")
    save_choice_task(folder)
    return folder


@pytest.fixture(scope="session")
def cache_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Factor banks and datasets of these tests, away from the user's cache."""
    return tmp_path_factory.mktemp("cache")


@pytest.fixture
def own_cache(cache_folder: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The environment and the datasets library pointed at `cache_folder`."""
    import datasets.config

    monkeypatch.setenv("DSE_CACHE", str(cache_folder / "dse"))
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", cache_folder / "datasets")
    return cache_folder


@pytest.fixture
def own_process() -> Iterator[None]:
    """What `dse.cli.main` sets for a process of its own is put back for the tests that follow."""
    handler, logger = signal.getsignal(signal.SIGTERM), logging.getLogger("dse")
    handlers, propagate = list(logger.handlers), logger.propagate
    yield
    signal.signal(signal.SIGTERM, handler)
    logger.handlers[:], logger.propagate = handlers, propagate


@pytest.fixture(scope="session")
def finished_study(tiny_folder: Path, cache_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a study that has been run: accuracy, latency and size, on the CPU."""
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
