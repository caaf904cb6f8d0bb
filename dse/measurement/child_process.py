"""Run a function in a forked child, which shares the resident model copy-on-write and has a peak memory of its own."""

from __future__ import annotations

import contextlib
import json
import multiprocessing
import os
import signal
import warnings
from collections.abc import Callable
from multiprocessing.connection import Connection
from typing import Any

import torch

from dse.errors import InvalidMeasurementError, OutOfMemoryError

__all__ = ["in_child_process"]


def in_child_process(work: Callable[[], Any], doing: str, *, time_limit_s: float = 1800.0) -> Any:
    """Run `work` in a forked child of this process with one thread.

    The child starts with this process's memory, shared until written, and has a peak memory of its own. It uses one
    thread because the thread pools of libraries do not survive a fork; the memory of a forward pass hardly depends on
    the number of threads.

    Args:
        work: Function to run; returns a JSON value.
        doing: What it does, for messages, such as "measuring memory".
        time_limit_s: The child is killed after this time.

    Returns:
        The value that `work` returned.

    Raises:
        InvalidMeasurementError: This system cannot fork, or the child failed or exceeded its time limit.
        OutOfMemoryError: The child ran out of memory, or the kernel killed it.
    """
    if not hasattr(os, "fork"):
        raise InvalidMeasurementError(f"{doing} needs a system that can fork a process (Linux), but this one cannot")
    reader, writer = multiprocessing.Pipe(duplex=False)
    child = multiprocessing.get_context("fork").Process(target=_run_child, args=(work, writer))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # about forking with threads: the child uses none of them
        child.start()
    writer.close()
    answer: list[Any] = ["InvalidMeasurementError", "its process ended without an answer"]
    try:
        if not reader.poll(time_limit_s):
            child.kill()
            raise InvalidMeasurementError(f"{doing} must end within {time_limit_s:g} s, but its process did not")
        with contextlib.suppress(EOFError):  # the child ended without an answer
            answer = json.loads(reader.recv_bytes())
    finally:
        child.join()
        reader.close()
    if child.exitcode is not None and child.exitcode < 0:
        ended_by = signal.Signals(-child.exitcode).name
        if ended_by == "SIGKILL":
            raise OutOfMemoryError(
                f"the machine must have enough memory for {doing}, but the kernel killed its process (SIGKILL)"
            )
        raise InvalidMeasurementError(f"{doing} must run to its end, but its process was killed by {ended_by}")
    if answer[0] == "result":
        return answer[1]
    if answer[0] == "OutOfMemoryError":
        raise OutOfMemoryError(answer[1], answer[2])
    raise InvalidMeasurementError(f"{doing} must run to its end, but: {answer[1]}")


def _run_child(work: Callable[[], Any], writer: Connection) -> None:
    """Run, answer through the connection, and exit without the clean-up handlers, which belong to the parent."""
    try:
        torch.set_num_threads(1)
        answer: list[Any] = ["result", work()]
    except BaseException as error:  # noqa: BLE001 - every error is reported to the parent
        answer = [type(error).__name__, " ".join(str(error).split()) or type(error).__name__]
        answer.append(getattr(error, "bytes_asked", None))
    try:
        writer.send_bytes(json.dumps(answer).encode())
    finally:
        os._exit(0)
