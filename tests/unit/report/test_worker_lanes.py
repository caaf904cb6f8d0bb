from __future__ import annotations

import os
import socket
from pathlib import Path

import pytest

from dse.report.worker_lanes import SILENT_AFTER_S, WorkerLane, is_alive, read_lanes, write_lanes

LANES = (
    WorkerLane(
        "worker 1", "working", "cuda:0", "node", 12, "evaluate", 3, 9, 7, "sampler", "ab", {"reduction": 0.1}, 1.0
    ),
    WorkerLane("worker 2", failures=2, last_failure="out of memory", temperature_celsius=61.0, power_w=280.5),
)


def test_lanes_survive_writing_and_reading(tmp_path: Path) -> None:
    write_lanes(tmp_path / "workers.json", LANES)
    assert read_lanes(tmp_path / "workers.json") == LANES


@pytest.mark.parametrize("text", ["", "{", "[]", "null", '{"workers": 3}', '{"workers": [3, {"state": "idle"}]}'])
def test_a_damaged_file_has_no_lanes(tmp_path: Path, text: str) -> None:
    (tmp_path / "workers.json").write_text(text)
    assert read_lanes(tmp_path / "workers.json") == ()
    assert read_lanes(tmp_path / "missing.json") == ()


def test_keys_of_a_later_version_are_ignored(tmp_path: Path) -> None:
    (tmp_path / "workers.json").write_text('{"workers": [{"worker": "w", "mood": "good"}]}')
    assert read_lanes(tmp_path / "workers.json") == (WorkerLane("w"),)


def test_a_process_of_this_machine_decides_at_once() -> None:
    here = socket.gethostname()
    assert is_alive(WorkerLane("w", host=here, pid=os.getpid(), updated_s=0.0), 1e9)
    assert not is_alive(WorkerLane("w", host=here, pid=2**22 + 1, updated_s=1e9), 1e9)
    assert not is_alive(WorkerLane("w", "ended", host=here, pid=os.getpid(), updated_s=1e9), 1e9)


def test_a_worker_elsewhere_is_alive_while_it_writes() -> None:
    lane = WorkerLane("w", host="another machine", pid=1, updated_s=100.0)
    assert is_alive(lane, 100.0 + SILENT_AFTER_S - 1)
    assert not is_alive(lane, 100.0 + SILENT_AFTER_S + 1)
