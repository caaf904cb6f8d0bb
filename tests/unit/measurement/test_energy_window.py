"""Tracks and windows in closed form, then over real threads with meters made of functions of time."""

from __future__ import annotations

import math
import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dse.errors import InvalidMeasurementError
from dse.measurement.faults import DeviceLostError
from dse.measurement.meter import EnergyMeter
from dse.measurement.track import Channel, CounterTrack, PowerTrack


def fill(track, times_s, value_at):
    for time_s in times_s:
        track.add(time_s, value_at(time_s))
    return track


def ticks(begin_s, end_s, step_s):
    return [begin_s + step_s * index for index in range(math.ceil((end_s - begin_s) / step_s))]


def test_counter_interpolates_between_updates():
    # 50 W, refreshed every 0.1 s, polled every 1 ms: the stale figure at the bounds must not matter.
    track = fill(CounterTrack(), ticks(10, 15, 0.001), lambda now: 50 * math.floor(now * 10) / 10)
    assert track.energy_between_j(11.03, 13.97) == pytest.approx(50 * 2.94, rel=1e-3)
    assert track.updates_between(11.03, 13.97) == 29


def test_counter_polled_more_slowly_than_it_refreshes_is_exact():
    track = fill(CounterTrack(), ticks(0, 5, 0.01), lambda now: 80 * now)
    assert track.energy_between_j(1.004, 3.999) == pytest.approx(80 * 2.995, rel=1e-4)


def test_counter_that_stood_still_starts_where_power_starts():
    # Nothing is drawn until 3 s: the interpolation must not spread the first joules over the seconds before.
    track = fill(CounterTrack(), ticks(0, 6, 0.01), lambda now: 100 * max(0.0, now - 3))
    assert track.energy_between_j(2.5, 5) == pytest.approx(200, rel=0.01)
    assert track.energy_between_j(0.5, 2.5) == 0


@given(st.floats(1, 500), st.floats(10, 1000), st.floats(0, 1))
def test_wrap_around_is_added_back(power_w, range_j, offset):
    # A counter with the smallest range still wraps no more than once between two polls.
    poll_s = min(0.01, 0.4 * range_j / power_w)
    begin_j = offset * range_j
    track = fill(CounterTrack(range_j), ticks(0, 300 * poll_s, poll_s), lambda t: (begin_j + power_w * t) % range_j)
    assert track.problem is None
    assert track.energy_between_j(10 * poll_s, 290 * poll_s) == pytest.approx(power_w * 280 * poll_s, rel=1e-6)


def test_counter_that_goes_backwards_is_noted_once():
    track = fill(CounterTrack(), ticks(0, 2, 0.01), lambda now: 100 * now if now < 1 else 100 * (now - 1))
    assert "went backwards, from 99" in str(track.problem)


def test_reset_is_not_taken_for_a_wrap():
    # 262 kJ is the range of common packages; at 0.2 of it a fall to zero would mean 21 MW.
    track = fill(CounterTrack(262_143.0), ticks(0, 2, 0.01), lambda now: 50_000 + 100 * now if now < 1 else 0.0)
    assert "went backwards" in str(track.problem)


def test_power_is_integrated_by_trapezoids():
    ramp = fill(PowerTrack(), ticks(0, 4, 0.01), lambda now: 30 * now)
    assert ramp.energy_between_j(1, 3) == pytest.approx(15 * (9 - 1), rel=1e-6)
    assert ramp.updates_between(1, 3) == 20
    step = fill(PowerTrack(), ticks(0, 4, 0.01), lambda now: 100.0 if now < 1.505 else 300.0)
    assert step.energy_between_j(1, 3) == pytest.approx(100 * 0.505 + 300 * 1.495, rel=0.005)


def test_power_read_too_seldom_is_noted():
    track = fill(PowerTrack(), [0.0, 0.1, 0.9], lambda _: 100.0)
    assert "0.80 s apart" in str(track.problem)


class FormulaMeter(EnergyMeter):
    """A meter whose channels are functions of the time since it was made."""

    name = "formula"

    def __init__(self, *formulas, track=CounterTrack):
        self.epoch_s = time.perf_counter()
        self.waits = 0
        self._formulas = formulas
        self._track = track

    source = "formula"
    details = {}  # noqa: RUF012

    def channels(self):
        return tuple(
            Channel(f"device {index}", lambda f=formula: f(time.perf_counter() - self.epoch_s), self._track)
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
    # A stalled thread may cost 10 ms at an edge, no more than a few per cent here.
    assert window.per_device_j["device 0"] == pytest.approx(40 * window.duration_s, rel=0.05)
    assert window.energy_j == pytest.approx(47 * window.duration_s, rel=0.05)
    assert meter.waits == 2  # the device is waited for before the first reading and before the last


def test_a_window_too_short_raises_and_is_never_zero():
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
    assert time.perf_counter() - begin_s < 5  # it does not wait for ever for an update
    with pytest.raises(InvalidMeasurementError, match="refreshed 0 times"):
        _ = window.energy_j


def test_a_device_lost_in_the_window():
    def lost(t):
        if t > 0.1:
            raise DeviceLostError("the device fell off the bus")
        return 40 * t

    with FormulaMeter(lost).window() as window:
        time.sleep(0.2)
    assert window.is_faulty
    assert window.reason == "the device fell off the bus"


def test_work_that_raises_invalidates_the_window_and_passes_on():
    window = FormulaMeter(lambda t: 40 * t).window()

    def work():
        with window:
            time.sleep(0.3)
            raise KeyError("work")

    with pytest.raises(KeyError, match="work"):
        work()
    assert window.reason == "the work was interrupted by KeyError"


def test_power_window():
    meter = FormulaMeter(lambda t: 50.0, track=PowerTrack)
    with meter.window() as window:
        time.sleep(2.05)
    assert window.is_valid, window.reason
    assert window.energy_j == pytest.approx(50 * window.duration_s, rel=1e-6)
