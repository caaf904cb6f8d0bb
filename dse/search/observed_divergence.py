"""What a trial lost against the dense model, in one number that the divergence model can learn from."""

from __future__ import annotations

import math

from dse.trial_record import TrialRecord

__all__ = ["observed_divergence"]

_DROPS = ("target_log_likelihood", "choice_probability", "accuracy")


def observed_divergence(record: TrialRecord, dense: TrialRecord | None) -> float | None:
    """The loss of a trial, by the quantity that tells points apart best; None where none was measured.

    KL divergence to dense, else the logarithm of the perplexity's ratio, else the drop of the log-likelihood of the
    right answer, of its probability, or of accuracy. All are 0 for the dense model; all trials have the same.
    """
    divergence = _value(record, "kl_divergence")
    if divergence is not None:
        return divergence
    if dense is None:
        return None
    before, after = _value(dense, "perplexity"), _value(record, "perplexity")
    if before and after:
        return math.log(after / before)
    for name in _DROPS:
        before, after = _value(dense, name), _value(record, name)
        if before is not None and after is not None:
            return before - after
    return None


def _value(record: TrialRecord, name: str) -> float | None:
    entry = record.quantities.get(name)
    return None if entry is None else entry.value
