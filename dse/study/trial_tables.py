"""The tables of a running study, rewritten after trials, but never for a noticeable share of its time."""

from __future__ import annotations

import time
from collections.abc import Callable

from dse.study.study import Study

__all__ = ["TrialTables"]

_ALWAYS_S = 0.2
_PAUSES = 20.0


class TrialTables:
    """Writes `trials.csv` and `front.csv`, and keeps what progress reports say about the front.

    Tables of a few hundred trials take milliseconds and are written after every trial of a single worker. Longer ones,
    and those of several workers, which would wait meanwhile, are written at most for one twentieth of the time. The
    last ones are written when the run ends.

    Args:
        is_parallel: Whether there are several workers.

    Attributes:
        front_size: Number of points on the front in the last tables.
        hypervolume: Its hypervolume; None before the baseline is measured.
    """

    def __init__(self, *, is_parallel: bool) -> None:
        self._always_s = 0.0 if is_parallel else _ALWAYS_S
        self.front_size = 0
        self.hypervolume: float | None = None
        self._due_s = 0.0

    def refresh(self, study_of: Callable[[], Study]) -> None:
        """Write the tables of the study as it is now, if that is due."""
        begin_s = time.monotonic()
        if begin_s < self._due_s:
            return
        study = study_of()
        study.write_tables()
        self.front_size, self.hypervolume = study.front_size, study.hypervolume
        took_s = time.monotonic() - begin_s
        self._due_s = begin_s + (took_s * _PAUSES if took_s > self._always_s else 0.0)
