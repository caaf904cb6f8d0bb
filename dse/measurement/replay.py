"""A meter that replays a recorded power trace, for tests and demonstrations. It measures nothing."""

from __future__ import annotations

import csv
import itertools
import math
import time
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import ClassVar

import numpy as np

from dse.errors import ConfigError
from dse.measurement.meter import EnergyMeter
from dse.measurement.readings import Channel, PowerReadings

__all__ = ["PowerTrace", "ReplayMeter"]


@dataclass(frozen=True)
class PowerTrace:
    """Power of some devices over time, linear between samples.

    Attributes:
        times_s: Strictly increasing times from 0, at least two.
        power_w: Power of each device at each time.
    """

    times_s: tuple[float, ...]
    power_w: Mapping[str, tuple[float, ...]]

    @classmethod
    def read(cls, path: Path) -> PowerTrace:
        """Read a CSV file with the header `time_s,<device>_w,...` and one sample per row.

        Raises:
            ConfigError: The file cannot be read or does not have this format.
        """
        try:
            with path.open(newline="", encoding="utf-8") as stream:
                head, *rows = [row for row in csv.reader(stream) if row]
            table = [[float(cell) for cell in row] for row in rows]
        except (OSError, ValueError) as error:
            raise ConfigError(f"a power trace must be a CSV file of numbers, but {path}: {error}") from error
        devices = head[1:]
        is_headed = head[0] == "time_s" and devices and all(name.endswith("_w") for name in devices)
        if not is_headed or len(set(devices)) != len(devices):
            raise ConfigError(f"the header of a power trace must be `time_s,<device>_w,...`, but {path} has {head}")
        is_whole = len(table) > 1 and all(len(row) == len(head) for row in table)
        if not is_whole or not all(math.isfinite(cell) and cell >= 0 for row in table for cell in row):
            raise ConfigError(
                f"a power trace must have two or more full rows of non-negative numbers, but {path} does not"
            )
        columns = list(zip(*table, strict=True))
        if any(later <= earlier for earlier, later in itertools.pairwise(columns[0])):
            raise ConfigError(f"`time_s` must increase from row to row, but in {path} it does not")
        begin_s = columns[0][0]
        return cls(
            tuple(time_s - begin_s for time_s in columns[0]),
            {name.removesuffix("_w"): column for name, column in zip(devices, columns[1:], strict=True)},
        )

    @property
    def duration_s(self) -> float:
        """Length of the trace."""
        return self.times_s[-1]

    @property
    def period_s(self) -> float:
        """The median step between samples."""
        return float(np.median(np.diff(self.times_s)))

    def power_at_w(self, device: str, time_s: float) -> float:
        """Power of `device` at `time_s`; the trace repeats endlessly."""
        return float(np.interp(time_s % self.duration_s, self.times_s, self.power_w[device]))

    def energy_between_j(self, device: str, begin_s: float, end_s: float) -> float:
        """Exact joules between two instants of the repeating trace, as a perfect meter would report."""
        return self._energy_until_j(device, end_s) - self._energy_until_j(device, begin_s)

    def _energy_until_j(self, device: str, time_s: float) -> float:
        times, power = np.asarray(self.times_s), np.asarray(self.power_w[device])
        sums = np.concatenate([[0.0], np.cumsum(np.diff(times) * (power[1:] + power[:-1]) / 2)])
        rounds, rest_s = divmod(time_s, self.duration_s)
        index = int(np.searchsorted(times, rest_s, side="right")) - 1
        partial_j = (rest_s - times[index]) * (power[index] + self.power_at_w(device, rest_s)) / 2
        return float(rounds * sums[-1] + sums[index] + partial_j)


class ReplayMeter(EnergyMeter):
    """Replays a power trace endlessly from the moment it is opened.

    Args:
        path: The trace; see `PowerTrace.read`.

    Raises:
        ConfigError: The trace cannot be read.
    """

    name = "replay"
    is_replay: ClassVar[bool] = True

    def __init__(self, path: Path) -> None:
        self.trace = PowerTrace.read(path)
        self.epoch_s = time.perf_counter()
        self.source = f"replay of {path.name}: a recording, not a measurement"
        self.details = {"trace": str(path), "repeats_every_s": f"{self.trace.duration_s:g}"}
        self.period_s = self.trace.period_s

    def channels(self) -> tuple[Channel, ...]:
        """See `EnergyMeter.channels`."""
        new_readings = partial(PowerReadings, self.trace.period_s)
        return tuple(Channel(device, partial(self._read_w, device), new_readings) for device in self.trace.power_w)

    def _read_w(self, device: str) -> float:
        return self.trace.power_at_w(device, time.perf_counter() - self.epoch_s)
