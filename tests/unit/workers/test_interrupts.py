from __future__ import annotations

import os
import signal
import threading

import pytest

from dse.workers.listener import watching_interrupts


def test_an_interrupt_that_a_library_swallowed_is_noticed() -> None:
    before = signal.getsignal(signal.SIGINT)
    with watching_interrupts() as interrupts:
        try:
            os.kill(os.getpid(), signal.SIGINT)
            for _ in range(1000):
                pass
        except KeyboardInterrupt:
            pass  # as an extension module does that raises an error of its own instead
        assert interrupts.requested
    assert signal.getsignal(signal.SIGINT) is before


def test_the_exception_is_raised_as_ever() -> None:
    with pytest.raises(KeyboardInterrupt), watching_interrupts():
        signal.raise_signal(signal.SIGINT)


def test_other_threads_are_left_alone() -> None:
    seen: list[bool] = []

    def work() -> None:
        with watching_interrupts() as interrupts:
            seen.append(interrupts.requested)

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert seen == [False]
