"""Nodes that differ: without the driver's cache folder, with another device or version, or without memory."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from worker_support import RayNodes, outcome, worker_study

from dse.errors import StudyError
from dse.report.worker_lanes import read_lanes
from dse.study import Study, run_study
from dse.trial_record import EVALUATED_STATES

TRIALS = 10
OTHER_DEVICE = """
import platform
import dse.trial.measurements
def refuse(*_, **__): raise AssertionError("measured on the wrong device")
dse.trial.measurements.TrialMeasurer.measure = refuse
platform.processor = lambda: "another processor"
"""
OTHER_VERSION = "import dse; dse.__version__ = '0.0.9'"

pytestmark = pytest.mark.filterwarnings("default")  # Ray's own threads and sockets


@pytest.fixture
def other_node(nodes: RayNodes, request: pytest.FixtureRequest) -> Iterator[None]:
    """A node with the environment variables of the parameter in the place of a plain one."""
    with nodes.replaced(request.param):
        yield


@pytest.fixture(scope="module")
def unlike(
    nodes: RayNodes, cache_folder: Path, tiny_folder: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Path]:
    """A node of another device, whose cache folder is its own and empty."""
    own = tmp_path_factory.mktemp("own")
    with nodes.replaced({"DSE_CACHE": str(own), "PRELOADED_FIRST": OTHER_DEVICE}):
        yield own


def measured_study(folder: Path) -> dict[str, Any]:
    return worker_study(folder, TRIALS, objectives=["accuracy", "decode_latency_s", "parameters"])


@pytest.fixture(scope="module")
def mixed(
    nodes: RayNodes, unlike: Path, cache_folder: Path, tiny_folder: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Study]:
    """A study of latency on two kinds of devices, whose bank the driver's cache folder holds."""
    folder = tmp_path_factory.mktemp("mixed")
    shutil.rmtree(cache_folder / "dse" / "factor_banks", ignore_errors=True)  # banks of other tests
    run_study(worker_study(tiny_folder, 2), out=folder / "builds the bank")
    marker = _bank(cache_folder / "dse") / "marker.txt"
    marker.write_text("fetched, not built")
    yield run_study(
        measured_study(tiny_folder), out=folder / "run", use_cache=False, workers=nodes.keys(2, mixed="accuracy_only")
    )
    marker.unlink()


def test_a_machine_without_the_cache_folder_fetches_the_bank(mixed: Study, unlike: Path, cache_folder: Path) -> None:
    bank, fetched = _bank(cache_folder / "dse"), _bank(unlike)
    assert (fetched / "marker.txt").read_text() == "fetched, not built"
    names = sorted(path.name for path in bank.iterdir() if not path.name.startswith("."))
    assert sorted(path.name for path in fetched.iterdir() if not path.name.startswith(".")) == names
    assert all((fetched / name).read_bytes() == (bank / name).read_bytes() for name in names)


def test_another_device_evaluates_accuracy_only(mixed: Study, tiny_folder: Path, tmp_path: Path) -> None:
    """The other device would fail to measure."""
    evaluated = [record for record in mixed.records if record.state in EVALUATED_STATES]
    assert len({record.point_id for record in evaluated}) == len(evaluated) == TRIALS
    assert [record.reason for record in evaluated if record.state != "complete"] == []
    assert all(record.value("decode_latency_s") for record in evaluated)
    alone = run_study(worker_study(tiny_folder, TRIALS), out=tmp_path / "alone")
    assert outcome(mixed)[0] == outcome(alone)[0]
    lanes = read_lanes(mixed.folder.workers)
    assert {lane.device for lane in lanes} >= {"another processor"}
    assert all(lane.finished for lane in lanes)


def test_another_device_is_refused_by_name(nodes: RayNodes, unlike: Path, tiny_folder: Path, tmp_path: Path) -> None:
    with pytest.raises(StudyError, match=r"needs one kind of device, but \S+ has another processor and \S+ has"):
        run_study(measured_study(tiny_folder), out=tmp_path / "run", workers=nodes.keys(2))


@pytest.mark.parametrize("other_node", [{"PRELOADED_FIRST": OTHER_VERSION}], indirect=True)
def test_a_worker_with_another_version_is_refused(
    nodes: RayNodes, other_node: None, tiny_folder: Path, tmp_path: Path
) -> None:
    with pytest.raises(StudyError, match=r"all workers must run the same versions, but .* has dse"):
        run_study(worker_study(tiny_folder, TRIALS), out=tmp_path / "run", workers=nodes.keys(2))


@pytest.mark.parametrize("other_node", [{"RAY_memory_usage_threshold": "0.001"}], indirect=True)
def test_a_machine_without_memory_is_refused(
    nodes: RayNodes, other_node: None, tiny_folder: Path, tmp_path: Path
) -> None:
    """Ray ends every worker that starts there."""
    with pytest.raises(StudyError, match=r"a worker must start, but .* ended 5 times"):
        run_study(worker_study(tiny_folder, TRIALS), out=tmp_path / "run", workers=nodes.keys(2))


def _bank(cache: Path) -> Path:
    (bank,) = (path for path in (cache / "factor_banks").iterdir() if path.name.startswith("svd-"))
    return bank
