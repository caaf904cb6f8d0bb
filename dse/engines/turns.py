"""One turn of an engine: it serves the requests once, or repeatedly until an energy window is long enough."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Iterable
from dataclasses import dataclass

from dse.engines.engine import EngineWindow, EngineWork
from dse.engines.server import Server
from dse.measurement.idle_power import IdlePower
from dse.measurement.meter import EnergyMeter

__all__ = ["Turn", "TurnTaker", "foreign_processes"]

_MIN_WINDOW_S = 0.5
_MAX_WINDOW_S = 60.0


@dataclass(frozen=True)
class Turn:
    """Timings and energy of one turn.

    Attributes:
        ttft_s: Time to first token of each request.
        tpot_s: Time per output token of each request.
        prefill_s: For each repeat, seconds until every one of the first `concurrency` requests has its first token.
        window_s: For each repeat, seconds from the first submission to the last token.
        energy_j: Gross joules of the whole turn; None without a valid window.
        net_energy_j: Joules net of idle power; None if either is unknown.
        energy_reason: Why the energy is invalid; "" if it is valid or was not asked for.
    """

    ttft_s: tuple[float, ...]
    tpot_s: tuple[float, ...]
    prefill_s: tuple[float, ...]
    window_s: tuple[float, ...]
    energy_j: float | None = None
    net_energy_j: float | None = None
    energy_reason: str = ""

    @classmethod
    def of(cls, windows: Iterable[EngineWindow], concurrency: int) -> Turn:
        """Join the windows of the repeats."""
        windows = tuple(windows)
        return cls(
            tuple(sample for window in windows for sample in window.ttft_s),
            tuple(sample for window in windows for sample in window.tpot_s),
            tuple(max(window.ttft_s[:concurrency]) for window in windows),
            tuple(window.duration_s for window in windows),
        )

    @property
    def repeats(self) -> int:
        """How often the work was served."""
        return len(self.window_s)

    @property
    def duration_s(self) -> float:
        """Timed work."""
        return sum(self.window_s)


class TurnTaker:
    """Takes turns with the same work, in energy windows if there is a meter.

    Args:
        work: The requests of a turn.
        meter: An open meter; None measures no energy.
        idle: Idle power, for net energy.

    Attributes:
        condition_problems: Why the condition of the devices invalidates the energy, each once.
    """

    def __init__(self, work: EngineWork, meter: EnergyMeter | None, idle: IdlePower | None) -> None:
        self._work = work
        self._meter = meter
        self._idle = idle
        self._own_processes: set[int] = set()
        self.condition_problems: dict[str, None] = {}

    def warm_up(self, server: Server) -> None:
        """Serve the requests once, uncounted."""
        process_id = getattr(server, "process_id", None)
        if process_id is not None:
            self._own_processes.add(process_id)
        server.run(self._work)

    def turn(self, server: Server) -> Turn:
        """Serve the requests, repeatedly until the energy window is long enough."""
        if self._meter is None:
            return Turn.of([server.run(self._work)], self._work.concurrency)
        windows = []
        with self._meter.window() as energy:
            while True:
                windows.append(server.run(self._work))
                is_long_enough = energy.elapsed_s >= _MIN_WINDOW_S and energy.updates >= self._meter.min_updates
                if is_long_enough or energy.is_faulty or energy.elapsed_s >= _MAX_WINDOW_S:
                    break
        self._check_conditions(self._meter, energy.duration_s)
        turn = Turn.of(windows, self._work.concurrency)
        if energy.problem is not None:
            return dataclasses.replace(turn, energy_reason=energy.reason)
        gross_j = energy.energy_j
        idle_w = None if self._idle is None else self._idle.power_w
        net_j = None if idle_w is None else gross_j - idle_w * energy.duration_s
        return dataclasses.replace(turn, energy_j=gross_j, net_energy_j=net_j)

    def _check_conditions(self, meter: EnergyMeter, window_s: float) -> None:
        for condition in meter.conditions(window_s):
            foreign = foreign_processes(condition.other_processes, self._own_processes)
            for problem in dataclasses.replace(condition, other_processes=foreign).problems:
                self.condition_problems[problem] = None


def foreign_processes(process_ids: Iterable[int], own_groups: Iterable[int]) -> tuple[int, ...]:
    """The processes that belong neither to our engines nor to processes that may be ours.

    In a container a driver lists process ids of the host, which mean nothing here. As many of those as there are
    engines without a listed process are taken for our engines.

    Args:
        process_ids: Processes that compute on the device.
        own_groups: Process groups of the engines.
    """
    groups = {process_id: _group(process_id) for process_id in process_ids}
    unlisted = len(set(own_groups) - set(groups.values()))
    others = [process_id for process_id, group in groups.items() if group not in set(own_groups)]
    unknown = [process_id for process_id in others if groups[process_id] is None][:unlisted]
    return tuple(process_id for process_id in others if process_id not in unknown)


def _group(process_id: int) -> int | None:
    try:
        return os.getpgid(process_id)
    except (ProcessLookupError, PermissionError):
        return None
