"""An energy meter whose joules follow from the work, not from a clock: a fake at the edge of the hardware."""

from __future__ import annotations

from collections.abc import Callable
from types import TracebackType
from typing import Any, ClassVar

from torch import nn

from dse.measurement import DeviceCondition, EnergyMeter, EnergyWindow
from dse.measurement.meter_errors import EnergyWindowError
from dse.measurement.readings import Channel


class ScriptedMeter(EnergyMeter):
    """Every forward pass of a model costs joules: those of the side in use, times a factor that drifts.

    Args:
        model: Its forward passes are counted.
        drift: Growth of the power per forward pass, relative to the beginning: a device that warms up.
    """

    name: ClassVar[str] = "replay"
    min_updates: ClassVar[int] = 1
    source = "scripted joules"

    def __init__(self, model: nn.Module, drift: float) -> None:
        self.details: dict[str, str] = {}
        self.side_j = 1.0
        self.passes = 0
        self.total_j = 0.0
        self.disturbed_window: int | None = None
        self.windows = 0
        self._drift = drift
        model.register_forward_pre_hook(self._count)

    def _count(self, *_: object) -> None:
        self.passes += 1
        self.total_j += self.side_j * (1.0 + self._drift * self.passes)

    def channels(self) -> tuple[Channel, ...]:
        raise NotImplementedError("windows are scripted")

    def conditions(self, window_s: float | None = None) -> tuple[DeviceCondition, ...]:
        others = (17,) if window_s is not None and self.windows == self.disturbed_window else ()
        return (DeviceCondition("scripted", other_processes=others),)

    def window(self, min_updates: int | None = None) -> Any:
        self.windows += 1
        return _ScriptedWindow(lambda: self.total_j)


class _ScriptedWindow(EnergyWindow):
    """The joules between its two ends; it lasts one repeat."""

    def __init__(self, total_j: Callable[[], float]) -> None:
        self._total_j = total_j
        self.begin_s, self.end_s = 0.0, 1.0

    def __enter__(self) -> EnergyWindow:
        self._begin_j = self._total_j()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._joules = self._total_j() - self._begin_j

    @property
    def elapsed_s(self) -> float:
        return 1.0

    @property
    def updates(self) -> int:
        return 1

    @property
    def problem(self) -> EnergyWindowError | None:
        return None

    @property
    def is_faulty(self) -> bool:
        return False

    @property
    def per_device_j(self) -> dict[str, float]:
        return {"scripted": self._joules}
