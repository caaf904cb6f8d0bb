"""Readings and energy windows in closed form, then with real threads and meters that are functions of time."""

from __future__ import annotations

import math
import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dse.errors import InvalidMeasurementError
from dse.measurement.meter import EnergyMeter
from dse.measurement.meter_errors import DeviceLostError
from dse.measurement.readings import Channel, CounterReadings, PowerReadings


def fill(readings, times_s, value_at):
    for time_s in times_s:
        readings.add(time_s, value_at(time_s))
    return readings


def ticks(begin_s, end_s, step_s):
    return [begin_s + step_s * index for index in range(math.ceil((end_s - begin_s) / step_s))]


def test_counter_interpolates_between_updates():
    # 50 W, refreshed every 0.1 s, polled every 1 ms: the stale value at the bounds must not matter.
    readings = fill(CounterReadings(), ticks(10, 15, 0.001), lambda now: 50 * math.floor(now * 10) / 10)
    assert readings.energy_between_j(11.03, 13.97) == pytest.approx(50 * 2.94, rel=1e-3)
    assert readings.updates_between(11.03, 13.97) == 29


def test_counter_polled_less_often_than_it_refreshes_is_exact():
    readings = fill(CounterReadings(), ticks(0, 5, 0.01), lambda now: 80 * now)
    assert readings.energy_between_j(1.004, 3.999) == pytest.approx(80 * 2.995, rel=1e-4)


def test_energy_of_a_counter_that_stood_still_begins_when_power_is_drawn():
    # No power until 3 s: the interpolation must not spread the first joules over the seconds before.
    readings = fill(CounterReadings(), ticks(0, 6, 0.01), lambda now: 100 * max(0.0, now - 3))
    assert readings.energy_between_j(2.5, 5) == pytest.approx(200, rel=0.01)
    assert readings.energy_between_j(0.5, 2.5) == 0


@given(st.floats(1, 500), st.floats(10, 1000), st.floats(0, 1))
def test_a_wrap_around_is_added_back(power_w, range_j, offset):
    # Even the smallest range wraps at most once between two polls.
    poll_s = min(0.01, 0.4 * range_j / power_w)
    begin_j = offset * range_j
    readings = fill(
        CounterReadings(range_j), ticks(0, 300 * poll_s, poll_s), lambda t: (begin_j + power_w * t) % range_j
    )
    assert readings.problem is None
    assert readings.energy_between_j(10 * poll_s, 290 * poll_s) == pytest.approx(power_w * 280 * poll_s, rel=1e-6)


def test_a_counter_that_goes_backwards_is_a_problem():
    readings = fill(CounterReadings(), ticks(0, 2, 0.01), lambda now: 100 * now if now < 1 else 100 * (now - 1))
    assert "went backwards, from 99" in str(readings.problem)


def test_a_reset_is_not_mistaken_for_a_wrap_around():
    # 262 kJ is the range of common packages; a wrap-around from 0.2 of it would mean 21 MW.
    readings = fill(CounterReadings(262_143.0), ticks(0, 2, 0.01), lambda now: 50_000 + 100 * now if now < 1 else 0.0)
    assert "went backwards" in str(readings.problem)


def test_power_is_integrated_by_the_trapezoidal_rule():
    ramp = fill(PowerReadings(), ticks(0, 4, 0.01), lambda now: 30 * now)
    assert ramp.energy_between_j(1, 3) == pytest.approx(15 * (9 - 1), rel=1e-6)
    assert ramp.updates_between(1, 3) == 20
    step = fill(PowerReadings(), ticks(0, 4, 0.01), lambda now: 100.0 if now < 1.505 else 300.0)
    assert step.energy_between_j(1, 3) == pytest.approx(100 * 0.505 + 300 * 1.495, rel=0.005)


def test_power_sampled_too_rarely_is_a_problem():
    readings = fill(PowerReadings(), [0.0, 0.1, 0.9], lambda _: 100.0)
    assert "0.80 s apart" in str(readings.problem)


class FormulaMeter(EnergyMeter):
    """A meter whose channels are functions of the time since it was created."""

    name = "formula"

    def __init__(self, *formulas, readings=CounterReadings):
        self.epoch_s = time.perf_counter()
        self.waits = 0
        self._formulas = formulas
        self._new_readings = readings

    source = "formula"
    details = {}  # noqa: RUF012

    def channels(self):
        return tuple(
            Channel(f"device {index}", lambda f=formula: f(time.perf_counter() - self.epoch_s), self._new_readings)
            for index, formula in enumerate(self._formulas)
        )

    def synchronize(self):
        self.waits += 1


def test_window_of_a_steady_counter():
    meter = FormulaMeter(lambda t: 40 * (t // 0.01) * 0.01, lambda t: 7 * t)
    with meter.window() as window:
        time.sleep(0.3)
        assert "still open" in window.reason
        with pytest.raises(InvalidMeasurementError, match="still open"):
            _ = window.energy_j
    assert window.is_valid, window.reason
    assert window.duration_s >= 0.3
    # A stalled thread may cost 10 ms at an edge: a few per cent here.
    assert window.per_device_j["device 0"] == pytest.approx(40 * window.duration_s, rel=0.05)
    assert window.energy_j == pytest.approx(47 * window.duration_s, rel=0.05)
    assert meter.waits == 2  # synchronised before the first reading and before the last


def test_a_window_that_is_too_short_raises_instead_of_giving_zero():
    with FormulaMeter(lambda t: 40 * (t // 0.05) * 0.05).window() as window:
        time.sleep(0.1)
    assert not window.is_valid
    with pytest.raises(
        InvalidMeasurementError, match=r"too short: the meter refreshed [0-9] times in it, fewer than 20"
    ):
        _ = window.energy_j


def test_a_dead_counter_raises():
    begin_s = time.perf_counter()
    with FormulaMeter(lambda _: 5.0).window() as window:
        time.sleep(0.05)
    assert time.perf_counter() - begin_s < 5  # it does not wait forever for an update
    with pytest.raises(InvalidMeasurementError, match="refreshed 0 times"):
        _ = window.energy_j


def test_a_device_lost_during_the_window():
    def lost(t):
        if t > 0.1:
            raise DeviceLostError("the device fell off the bus")
        return 40 * t

    with FormulaMeter(lost).window() as window:
        time.sleep(0.2)
    assert window.is_faulty
    assert window.reason == "the device fell off the bus"


def test_work_that_raises_invalidates_the_window_and_the_error_propagates():
    window = FormulaMeter(lambda t: 40 * t).window()

    def work():
        with window:
            time.sleep(0.3)
            raise KeyError("work")

    with pytest.raises(KeyError, match="work"):
        work()
    assert window.reason == "the work was interrupted by KeyError"


def test_power_window():
    meter = FormulaMeter(lambda t: 50.0, readings=PowerReadings)
    with meter.window() as window:
        time.sleep(2.05)
    assert window.is_valid, window.reason
    assert window.energy_j == pytest.approx(50 * window.duration_s, rel=1e-6)
