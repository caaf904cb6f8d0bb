"""Timings of products: cached on disk, keyed by their conditions, and robust against a machine that changes speed."""

from __future__ import annotations

import itertools
import json

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.nn import functional

from dse.measurement.device_profile import ProductShape, ProductTimings
from dse.measurement.device_profile.product_timings import _alternating_ratio

CPU = torch.device("cpu")


def test_timings_are_measured_once_and_keyed_by_their_conditions(tmp_path):
    shape = ProductShape(2, 24, 16)
    timings = ProductTimings(CPU, torch.float32, 2**20, tmp_path)
    assert not timings.has_timing(shape)
    seconds = timings.seconds(shape)
    assert seconds > 0
    again = ProductTimings(CPU, torch.float32, 2**20, tmp_path)
    assert again.has_timing(shape)
    assert again.seconds(shape) == seconds
    assert not ProductTimings(CPU, torch.bfloat16, 2**20, tmp_path).has_timing(shape)
    assert not ProductTimings(CPU, torch.float32, 2**22, tmp_path).has_timing(shape)


def test_a_transposed_weight_has_a_timing_of_its_own(tmp_path):
    timings = ProductTimings(CPU, torch.float32, 2**20, tmp_path)
    plain, transposed = ProductShape(2, 24, 16), ProductShape(2, 24, 16, is_transposed=True)
    assert timings.seconds(transposed) > 0
    assert not timings.has_timing(plain)
    assert [tuple(weight.shape) for weight in timings._weights(transposed)[:2]] == [(16, 24)] * 2
    assert [tuple(weight.shape) for weight in timings._weights(plain)[:2]] == [(24, 16)] * 2


def test_reordered_features_have_a_timing_of_their_own(tmp_path):
    timings = ProductTimings(CPU, torch.float32, 2**20, tmp_path)
    plain, reordered = ProductShape(2, 24, 16), ProductShape(2, 24, 16, reordered=40)
    assert timings.seconds(reordered) > 0
    assert not timings.has_timing(plain)
    x, weight = torch.randn(2, 16), torch.randn(24, 16)
    multiply = timings._with_reordering(functional.linear, reordered)
    assert torch.equal(multiply(x, weight), functional.linear(x, weight))


def test_a_malformed_file_is_measured_again(tmp_path):
    timings = ProductTimings(CPU, torch.float32, 2**20, tmp_path)
    timings.path.write_text('{"seconds": [1, 2]}')
    again = ProductTimings(CPU, torch.float32, 2**20, tmp_path)
    assert again.seconds(ProductShape(1, 8, 8)) > 0


def test_timings_of_earlier_versions_are_not_read(tmp_path, monkeypatch):
    """They were taken per memory layout, in another folder."""
    monkeypatch.setenv("DSE_CACHE", str(tmp_path))
    name = ProductTimings(CPU, torch.float32, 2**20).path.name
    old = tmp_path / "device_profiles" / name
    old.parent.mkdir()
    old.write_text(json.dumps({"seconds": {"1 x 8 x 8 row_major": 5.0, "1 x 8 x 8": 5.0}}))
    assert not ProductTimings(CPU, torch.float32, 2**20).has_timing(ProductShape(1, 8, 8))


class Machine:
    """A machine that slows down from call to call, and now and then stalls."""

    def __init__(self, drift, stall_every):
        self._calls = itertools.count(1)
        self._drift, self._stall_every = drift, stall_every

    def times(self, seconds):
        def measure():
            call = next(self._calls)
            return seconds * (1.0 + self._drift * call) * (5.0 if call % self._stall_every == 0 else 1.0)

        return measure


@given(st.floats(0.0, 0.2), st.floats(0.01, 100.0), st.floats(0.01, 100.0))
def test_a_steady_drift_cancels(drift, first, second):
    machine = Machine(drift, stall_every=10**9)
    found = _alternating_ratio(machine.times(first), machine.times(second))
    assert found == pytest.approx(first / second)


@pytest.mark.parametrize("every", [7, 11, 13])
def test_an_occasional_stall_does_not_change_the_ratio(every):
    machine = Machine(0.0, stall_every=every)
    assert _alternating_ratio(machine.times(3.0), machine.times(2.0)) == pytest.approx(1.5)
