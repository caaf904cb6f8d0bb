"""Callbacks of a running study, and the detection of Ctrl-C inside compiled libraries."""

from __future__ import annotations

import contextlib
import signal
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from types import FrameType

from dse.trial_record import TrialRecord

__all__ = ["Interrupts", "StudyListener", "StudyProgress", "watching_interrupts"]


@dataclass(frozen=True)
class StudyProgress:
    """The progress of a study.

    Attributes:
        finished: Evaluated trials, the baseline and failed ones included.
        total: The budget.
        front_size: Number of points on the front.
        hypervolume: Normalised to [0, 1]; None before the baseline is measured.
        seconds_left: Estimate from the trials so far; None before the first.
    """

    finished: int
    total: int
    front_size: int = 0
    hypervolume: float | None = None
    seconds_left: float | None = None


class StudyListener:
    """Callback base class: every method does nothing; override the ones you need."""

    def on_message(self, message: str) -> None:
        """Receive a sentence for the user, such as an objective that is left out or a model that is being loaded."""

    def on_phase(self, phase: str, done: int, total: int) -> None:
        """Receive progress within set-up or within a trial, such as `evaluate` 40 of 200."""

    def on_trial_start(self, progress: StudyProgress, record: TrialRecord) -> None:
        """A trial is about to be evaluated."""

    def on_trial_end(self, progress: StudyProgress, record: TrialRecord) -> None:
        """A trial is finished and stored."""


class Interrupts:
    """Whether the process has received SIGINT or SIGTERM."""

    def __init__(self) -> None:
        self.requested = False
        self._is_held = False

    def check(self) -> None:
        """Raise `KeyboardInterrupt` if the process was asked to stop."""
        if self.requested:
            raise KeyboardInterrupt

    @contextlib.contextmanager
    def held(self) -> Iterator[None]:
        """Let the block finish first, and raise `KeyboardInterrupt` after it."""
        if self.requested or self._is_held:
            yield
            return
        self._is_held = True
        try:
            yield
        finally:
            self._is_held = False
        self.check()

    def arrive(self) -> bool:
        """Note a signal; returns whether it takes effect at once. A second one during a held block does."""
        is_first, self.requested = not self.requested, True
        return not (self._is_held and is_first)


@contextlib.contextmanager
def watching_interrupts() -> Iterator[Interrupts]:
    """Record SIGINT and SIGTERM, and then call their usual handlers.

    Python raises `KeyboardInterrupt` wherever the main thread happens to be. An extension module can replace it by an
    error of its own, which would pass for a failed trial. Signals arrive in the main thread only.
    """
    interrupts = Interrupts()
    if threading.current_thread() is not threading.main_thread():
        yield interrupts
        return
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}

    def record(number: int, frame: FrameType | None) -> None:
        takes_effect = interrupts.arrive()
        handler = before[signal.Signals(number)]
        if callable(handler) and takes_effect:
            handler(number, frame)

    watched = [number for number, handler in before.items() if callable(handler)]
    for number in watched:
        signal.signal(number, record)
    try:
        yield interrupts
    finally:
        for number in watched:
            signal.signal(number, before[number])
