"""Quantities of a trial's energy: absolute joules, and the ratio to the baseline measured alongside."""

from __future__ import annotations

import dataclasses
from typing import Any

from dse.evaluation.statistics.intervals import Interval
from dse.measurement import EnergyRatio, EnergyResult, EnergySpread, PairedEnergy
from dse.trial.trial_run import TrialRun
from dse.trial_record import EvaluatedTrial, json_safe

__all__ = ["paired_energy_entry", "set_paired_energy"]


def paired_energy_entry(energy: PairedEnergy) -> dict[str, Any]:
    """The measurement in full as a JSON mapping: the candidate's, with the baseline's phases and the ratios."""
    entry: dict[str, Any] = json_safe(dataclasses.asdict(energy.candidate))
    baseline: dict[str, Any] = json_safe(
        {"prefill": dataclasses.asdict(energy.baseline.prefill)}
        | ({} if energy.baseline.decode is None else {"decode": dataclasses.asdict(energy.baseline.decode)})
    )
    ratios = {
        name: None if ratio is None else dataclasses.asdict(ratio)
        for name, ratio in (
            ("prefill", energy.prefill_ratio),
            ("decode", energy.decode_ratio),
            ("prefill_net", energy.prefill_net_ratio),
            ("decode_net", energy.decode_net_ratio),
        )
    }
    return {**entry, "baseline": baseline, "ratios": ratios, "is_valid": energy.is_valid, "reason": energy.reason}


def set_paired_energy(run: TrialRun, energy: PairedEnergy, baseline: EvaluatedTrial | None) -> None:
    """Store each energy so that trials measured at different times and temperatures compare.

    An energy is the ratio to the baseline, measured in the same minute, times the baseline's energy in trial 0. The
    joules that this trial measured are in `measured_<quantity>`, for both sides in the record's `energy`.

    Args:
        run: The trial.
        energy: Its measurement.
        baseline: The dense model's trial; None while it is itself measured.
    """
    candidate, dense = _spreads(energy.candidate), _spreads(energy.baseline)
    for name, ratio in _ratios(energy).items():
        if name not in candidate or name not in dense:
            continue
        spread = candidate[name]
        measured = Interval(spread.mean_j, spread.low_j, spread.high_j)
        run.set_quantity(f"measured_{name}", measured)
        if baseline is None:
            own = dense[name]
            run.set_quantity(name, Interval(own.mean_j, own.low_j, own.high_j), Interval(1.0, 1.0, 1.0))
            continue
        reference = baseline.record.value(name)
        if ratio is None or reference is None:  # net energy within the noise of the meter has no ratio
            run.set_quantity(name, measured)
            continue
        low, high = (None if end is None else end * reference for end in (ratio.low, ratio.high))
        run.set_quantity(
            name, Interval(ratio.ratio * reference, low, high), Interval(ratio.ratio, ratio.low, ratio.high)
        )


def _ratios(energy: PairedEnergy) -> dict[str, EnergyRatio | None]:
    return {
        "prefill_energy_j": energy.prefill_ratio,
        "prefill_energy_per_token_j": energy.prefill_ratio,
        "prefill_net_energy_per_token_j": energy.prefill_net_ratio,
        "energy_per_token_j": energy.decode_ratio,
        "net_energy_per_token_j": energy.decode_net_ratio,
    }


def _spreads(energy: EnergyResult) -> dict[str, EnergySpread]:
    """Quantity to its spread; invalid phases have none."""
    spreads = {
        "prefill_energy_j": energy.prefill.per_sequence,
        "prefill_energy_per_token_j": energy.prefill.per_token,
        "prefill_net_energy_per_token_j": energy.prefill.net_per_token,
    }
    if energy.decode is not None:
        spreads |= {
            "energy_per_token_j": energy.decode.per_token,
            "net_energy_per_token_j": energy.decode.net_per_token,
        }
    return {name: spread for name, spread in spreads.items() if spread is not None}
