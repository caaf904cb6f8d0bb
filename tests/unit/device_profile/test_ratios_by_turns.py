"""What a drifting machine does to timings, and that their ratios to a reference withstand it."""

from __future__ import annotations

import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dse.measurement.device_profile.product_timings import _ratio_by_turns


class Machine:
    """Takes longer from call to call, and now and then much longer."""

    def __init__(self, drift, hiccup_every):
        self._calls = itertools.count(1)
        self._drift, self._hiccup_every = drift, hiccup_every

    def times(self, seconds):
        def measure():
            call = next(self._calls)
            return seconds * (1.0 + self._drift * call) * (5.0 if call % self._hiccup_every == 0 else 1.0)

        return measure


@given(st.floats(0.0, 0.2), st.floats(0.01, 100.0), st.floats(0.01, 100.0))
def test_a_steady_drift_cancels(drift, first, second):
    machine = Machine(drift, hiccup_every=10**9)
    found = _ratio_by_turns(machine.times(first), machine.times(second))
    assert found == pytest.approx(first / second)


@pytest.mark.parametrize("every", [7, 11, 13])
def test_a_hiccup_now_and_then_does_not_count(every):
    machine = Machine(0.0, hiccup_every=every)
    assert _ratio_by_turns(machine.times(3.0), machine.times(2.0)) == pytest.approx(1.5)
