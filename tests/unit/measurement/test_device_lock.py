from __future__ import annotations

import contextlib
import logging
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

from dse.errors import StorageFullError
from dse.measurement import device_in_use, device_lock
from dse.measurement.device_lock import lock_file

CPU = torch.device("cpu")

HOLDER = """
import sys
from filelock import FileLock
with FileLock(sys.argv[1]):
    print("held", flush=True)
    sys.stdin.readline()
"""

SHARER = """
import fcntl, sys
with open(sys.argv[1], "ab") as stream:
    fcntl.flock(stream, fcntl.LOCK_SH)
    print("held", flush=True)
    sys.stdin.readline()
"""


@contextlib.contextmanager
def held(program: str, path: Path) -> Iterator[Callable[[], None]]:
    """Another process that holds a lock until the yielded function is called."""
    path.parent.mkdir()
    command = [sys.executable, "-c", program, str(path)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as holder:
        stdin, stdout = holder.stdin, holder.stdout
        assert stdin is not None
        assert stdout is not None
        assert stdout.readline() == "held\n"

        def release_lock() -> None:
            stdin.write("\n")
            stdin.flush()

        yield release_lock


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("DSE_CACHE", str(tmp_path))
    return tmp_path


def test_waits_for_another_process_and_logs_it_once(caplog):
    path = lock_file(CPU)
    with held(HOLDER, path) as release_lock:
        released_s: list[float] = []

        def release() -> None:
            time.sleep(0.4)
            released_s.append(time.perf_counter())
            release_lock()

        thread = threading.Thread(target=release)
        thread.start()
        with caplog.at_level(logging.INFO, "dse"), device_lock(CPU):
            entered_s = time.perf_counter()
        thread.join()
    assert entered_s > released_s[0]
    assert [record.message for record in caplog.records if record.name.startswith("dse")] == [
        f"waiting for cpu: another measurement holds {path}"
    ]


def test_the_same_thread_may_enter_again_and_others_wait():
    inside = threading.Event()
    with device_lock(CPU):
        with device_lock(torch.device("cpu", 0)):
            pass

        def other() -> None:
            with device_lock(CPU):
                inside.set()

        thread = threading.Thread(target=other)
        thread.start()
        assert not inside.wait(0.3)  # still held, although the inner block has ended
    assert inside.wait(5)
    thread.join()


def test_the_lock_of_a_cpu_names_its_host(monkeypatch):
    """The machines of a cluster share the home folder, but not their processors."""
    mine = lock_file(CPU)
    monkeypatch.setattr("platform.node", lambda: "another-node")
    assert lock_file(CPU) != mine
    assert "another-node" in lock_file(CPU).name


def in_time(work: Callable[[], None]) -> bool:
    """Whether `work` ends soon; a thread that waits for itself never does."""
    thread = threading.Thread(target=work, daemon=True)
    thread.start()
    thread.join(10)
    return not thread.is_alive()


def test_use_may_be_nested_even_while_a_measurement_waits():
    started, waiting = threading.Event(), threading.Event()

    def measure() -> None:
        started.wait(10)
        waiting.set()
        with device_lock(CPU):
            pass

    def use() -> None:
        with device_in_use(CPU):
            started.set()
            waiting.wait(10)
            time.sleep(0.3)  # the measurement now holds the first lock and waits for the second
            with device_in_use(CPU):
                pass

    measurer = threading.Thread(target=measure, daemon=True)
    measurer.start()
    assert in_time(use)
    measurer.join(10)
    assert not measurer.is_alive()


def test_a_measurement_within_a_use_and_a_use_within_a_measurement():
    other = threading.Event()

    def work() -> None:
        with device_in_use(CPU):
            with device_lock(CPU), device_in_use(CPU):
                pass
            # The device is in use again: a measurement of another thread waits.
            thread = threading.Thread(target=measure, daemon=True)
            thread.start()
            assert not other.wait(0.3)
        thread.join(10)

    def measure() -> None:
        with device_lock(CPU):
            other.set()

    assert in_time(work)
    assert other.wait(5)


def test_the_lock_is_released_after_an_error():
    with pytest.raises(KeyError), device_lock(CPU):
        raise KeyError
    with device_lock(CPU):
        pass


def test_each_device_has_its_own_lock(cache):
    names = {lock_file(torch.device(name)).name for name in ("cpu", "mps", "cuda:0", "cuda:1")}
    assert len(names) == 4
    assert all(lock_file(torch.device(name)).parent == cache / "locks" for name in ("cpu", "cuda:0"))


def test_a_cache_folder_that_is_not_writable(cache, monkeypatch):
    blocked = cache / "file"
    blocked.write_text("")
    monkeypatch.setenv("DSE_CACHE", str(Path(blocked)))
    with pytest.raises(StorageFullError, match="must be writable"), device_lock(CPU):
        pass


def test_users_share_a_device_and_a_measurement_excludes_them():
    inside = [threading.Event(), threading.Event()]
    leave = threading.Event()

    def use(index: int) -> None:
        with device_in_use(CPU):
            inside[index].set()
            leave.wait(10)

    users = [threading.Thread(target=use, args=(index,)) for index in range(2)]
    for user in users:
        user.start()
    assert all(event.wait(5) for event in inside)  # both at the same time

    measuring, late = threading.Event(), threading.Event()

    def measure() -> None:
        with device_lock(CPU), device_lock(CPU):
            measuring.set()
            time.sleep(0.2)
            assert not late.is_set()

    def use_later() -> None:
        with device_in_use(CPU):
            late.set()

    measurer, latecomer = threading.Thread(target=measure), threading.Thread(target=use_later)
    measurer.start()
    assert not measuring.wait(0.3)  # the users still hold it
    latecomer.start()
    assert not late.wait(0.3)  # a measurement is waiting: new users wait behind it
    leave.set()
    assert measuring.wait(5)
    for thread in (*users, measurer, latecomer):
        thread.join(5)
    assert late.is_set()


@pytest.mark.parametrize("program", [HOLDER, SHARER])
def test_a_long_wait_gives_a_warning_and_continues(program, caplog, monkeypatch):
    module = sys.modules[device_lock.__module__]  # the package has a function of this name
    monkeypatch.setattr(module, "_PATIENCE_S", 0.1)  # normally two minutes
    path = lock_file(CPU) if program == HOLDER else lock_file(CPU).with_suffix(".users")
    with held(program, path) as release_lock:
        entered = threading.Event()

        def measure() -> None:
            with device_lock(CPU):
                entered.set()

        thread = threading.Thread(target=measure)
        thread.start()
        while not caplog.records:
            time.sleep(0.02)
        assert not entered.is_set()
        release_lock()
        thread.join()
    assert entered.is_set()
    (warning,) = [record.message for record in caplog.records if record.levelno == logging.WARNING]
    assert warning == (
        "still waiting for cpu after 0 s, because another process of dse uses it; if none should, one may be suspended:"
        f" `fuser {path}` names it"
    )
