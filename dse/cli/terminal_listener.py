"""Progress of a study: bars on a terminal, plain lines otherwise."""

from __future__ import annotations

import time
from types import TracebackType
from typing import Self

from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeElapsedColumn

from dse.report.units import percent, points
from dse.study import StudyListener, StudyProgress
from dse.trial_record import TrialRecord

_LINE_PERIOD_S = 15.0  # between two lines of one phase if stderr is not a terminal
_RATIOS = (
    *("perplexity", "decode_latency_s", "prefill_latency_s", "energy_per_token_j", "prefill_energy_j"),
    *("ttft_s", "tpot_s", "throughput_tokens_s", "request_energy_j"),
)


class TerminalListener(StudyListener):
    """Prints to stderr, which leaves stdout to results: one bar for the trials, one for the phase of a trial."""

    def __init__(self) -> None:
        self.console = Console(stderr=True, highlight=False)
        self._progress = Progress(
            TextColumn("{task.description}"),
            BarColumn(bar_width=24),
            TextColumn("{task.completed:.0f}/{task.total:.0f}"),
            TimeElapsedColumn(),
            TextColumn("{task.fields[note]}"),
            console=self.console,
            transient=True,
        )
        self._trials: TaskID | None = None
        self._phase: TaskID | None = None
        self._phase_name = ""
        self._last_line_s = 0.0

    def __enter__(self) -> Self:
        if self.console.is_terminal:
            self._progress.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if self.console.is_terminal:
            self._progress.stop()

    def on_message(self, message: str) -> None:
        """Print a sentence above the bars."""
        self.console.print(escape(message), soft_wrap=True)

    def on_phase(self, phase: str, done: int, total: int) -> None:
        """Update the lower bar, or print a line every 15 seconds if stderr is not a terminal."""
        if not self.console.is_terminal:
            self._print_phase(phase, done, total)
            return
        if self._phase is None or phase != self._phase_name:
            if self._phase is not None:
                self._progress.remove_task(self._phase)
            self._phase_name = phase
            self._phase = self._progress.add_task(f"  {phase}", total=max(total, 1), note="")
        self._progress.update(self._phase, completed=done, total=max(total, 1))

    def _print_phase(self, phase: str, done: int, total: int) -> None:
        now = time.monotonic()
        if phase != self._phase_name:
            self._phase_name, self._last_line_s = phase, now
        elif now - self._last_line_s >= _LINE_PERIOD_S:
            self._last_line_s = now
            self.console.print(f"  {escape(phase)} {done}/{total}")

    def on_trial_start(self, progress: StudyProgress, record: TrialRecord) -> None:
        """Show the number of the current trial."""
        if not self.console.is_terminal:
            return
        if self._trials is None:
            self._trials = self._progress.add_task("trials", total=progress.total, note="")
        self._progress.update(
            self._trials,
            completed=progress.finished,
            total=progress.total,
            description=f"trial {progress.finished + 1} of {progress.total}",
        )

    def on_trial_end(self, progress: StudyProgress, record: TrialRecord) -> None:
        """Print one line for the trial and update the upper bar."""
        note = _progress_text(progress)
        self.console.print(
            f"[{progress.finished:>3}/{progress.total}] "
            + escape(_trial_text(record))
            + ("" if self.console.is_terminal else f" | {note}"),
            soft_wrap=True,
        )
        if self._trials is not None:
            self._progress.update(self._trials, completed=progress.finished, note=note)


def _trial_text(record: TrialRecord) -> str:
    """One line with the reduction and the results of a trial."""
    head = f"trial {record.trial:<4}"
    if record.state == "failed":
        return f"{head} failed: {record.reason}"
    if record.state == "stopped":
        return f"{head} stopped at rung {record.rung}: {record.reason}"
    parts = ["dense" if record.is_dense else f"-{percent(record.cost['reduction'])} parameters"]
    accuracy = record.quantities.get("accuracy")
    if accuracy is not None and accuracy.value is not None:
        drop = record.accuracy_drop.value if record.accuracy_drop and not record.is_dense else None
        parts.append(f"accuracy {percent(accuracy.value)}" + (f" ({points(-drop)})" if drop is not None else ""))
    for name in _RATIOS:
        value, ratio = record.quantities.get(name), record.ratios.get(name)
        if ratio is not None and ratio.value is not None and not record.is_dense:
            parts.append(f"{name} x{ratio.value:.3f}" + (" (predicted)" if name in record.predicted else ""))
        elif value is not None and value.value is not None:
            parts.append(f"{name} {value.value:.4g}")
    return f"{head} " + ", ".join(parts)


def _progress_text(progress: StudyProgress) -> str:
    parts = [f"front {progress.front_size}"]
    if progress.hypervolume is not None:
        parts.append(f"hypervolume {progress.hypervolume:.4f}")
    if progress.seconds_left is not None:
        parts.append(f"{_duration(progress.seconds_left)} left")
    return ", ".join(parts)


def _duration(seconds: float) -> str:
    """`3:07` or `1:02:03`."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"
