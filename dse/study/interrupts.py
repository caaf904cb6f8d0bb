"""Notice Ctrl-C even where a compiled library turns its exception into another one."""

from __future__ import annotations

import contextlib
import signal
import threading
from collections.abc import Iterator
from types import FrameType

__all__ = ["Interrupts", "noticing_interrupts"]


class Interrupts:
    """Whether this process was asked to stop since it began to listen."""

    def __init__(self) -> None:
        self.requested = False


@contextlib.contextmanager
def noticing_interrupts() -> Iterator[Interrupts]:
    """Remember SIGINT and SIGTERM, then do what would have been done.

    Python raises `KeyboardInterrupt` wherever the main thread happens to be; inside an extension module it can be
    replaced by an error of that module's own, which would pass for a failed trial. Outside the main thread no signal
    arrives, and nothing is noticed.
    """
    interrupts = Interrupts()
    if threading.current_thread() is not threading.main_thread():
        yield interrupts
        return
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}

    def notice(number: int, frame: FrameType | None) -> None:
        interrupts.requested = True
        handler = before[signal.Signals(number)]
        if callable(handler):
            handler(number, frame)

    listened = [number for number, handler in before.items() if callable(handler)]
    for number in listened:
        signal.signal(number, notice)
    try:
        yield interrupts
    finally:
        for number in listened:
            signal.signal(number, before[number])
