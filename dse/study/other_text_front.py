"""The front's divergence on text of another source than the calibration's, and what it says about the calibration."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from dse.evaluation.statistics.intervals import Interval
from dse.trial.other_text import other_text_ratio
from dse.trial_record import TrialRecord

__all__ = ["OTHER_TEXT", "other_text_words", "with_other_text"]

OTHER_TEXT = "other_text"
"""Attribute of a study that holds the divergences on both texts by trial number."""

_LARGE_RATIO = 1.5


def with_other_text(record: TrialRecord, found: Mapping[str, Any]) -> TrialRecord:
    """The record with `kl_divergence_other`, and with `kl_divergence` if the study did not measure that itself."""
    entry = found.get(str(record.trial))
    if entry is None or "own" not in entry:
        return record
    own, other = (Interval(**entry[name]) for name in ("own", "other"))
    return dataclasses.replace(
        record, quantities={"kl_divergence": own, **record.quantities, "kl_divergence_other": other}
    )


def other_text_words(found: Mapping[str, Any]) -> str:
    """How far points diverge on the other text, relative to the study's own, and what to do; "" without figures."""
    ratio = other_text_ratio(found)
    if ratio is None:
        return ""
    words = f"points on the front diverge {ratio:.1f} times as far on text of another source as on the study's own"
    if ratio <= _LARGE_RATIO:
        return words
    return f"{words}; calibrate on more text and more sources (`calibration.tokens`, `calibration.sources`)"
