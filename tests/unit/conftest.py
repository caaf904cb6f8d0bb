from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd
import pytest

from dse.pareto import Objective, objectives_named

MakeTrials = Callable[[Sequence[Mapping[str, Any]]], pd.DataFrame]


def _make_trials(rows: Sequence[Mapping[str, Any]]) -> pd.DataFrame:
    """A trials table from the columns that a test needs; the first row is the dense model."""
    full = []
    for index, row in enumerate(rows):
        base: dict[str, Any] = {
            "trial": index,
            "state": "complete",
            "reason": "",
            "feasible": True,
            "on_front": False,
            "point_id": f"point{index:07d}",
            "decomposed_tensors": 0 if index == 0 else 3,
            "reduction": 0.0 if index == 0 else 0.1,
        }
        full.append(base | dict(row))
    return pd.DataFrame(full)


@pytest.fixture(scope="session")
def make_trials() -> MakeTrials:
    return _make_trials


@pytest.fixture(scope="session")
def three() -> tuple[Objective, ...]:
    return objectives_named(["accuracy", "decode_latency_s", "parameters"])


@pytest.fixture(scope="session")
def study_trials() -> pd.DataFrame:
    """24 realistic trials with intervals and ratios, among them a failed, an infeasible and a duplicate one."""
    random = np.random.default_rng(3)
    rows: list[dict[str, Any]] = []
    for trial in range(24):
        reduction = 0.0 if trial == 0 else float(random.uniform(0.02, 0.38))
        drop = 0.0 if trial == 0 else float(0.28 * reduction**1.1 * np.exp(random.normal(0, 0.5)))
        latency = 0.0412 * (1 - 0.75 * reduction) * (1.0 if trial == 0 else float(np.exp(random.normal(0, 0.05))))
        half = 0.6 * latency * 0.03
        accuracy = 0.712 - drop
        rows.append(
            {
                "reduction": reduction,
                "parameters": round(134_515_008 * (1 - reduction)),
                "parameters_ratio": 1 - reduction,
                "accuracy": accuracy,
                "accuracy_low": accuracy - 0.031,
                "accuracy_high": accuracy + 0.031,
                "accuracy_drop": drop,
                "accuracy_drop_low": drop - 0.012 if trial else 0.0,
                "accuracy_drop_high": drop + 0.012 if trial else 0.0,
                "decode_latency_s": latency,
                "decode_latency_s_low": latency - half,
                "decode_latency_s_high": latency + half,
                "decode_latency_s_ratio": latency / 0.0412,
                "decode_latency_s_ratio_low": (latency - half) / 0.0412,
                "decode_latency_s_ratio_high": (latency + half) / 0.0412,
            }
        )
    measured = [name for name in rows[0] if name.startswith(("accuracy", "decode"))]
    rows[9] |= dict.fromkeys(measured, np.nan) | {"state": "failed", "reason": "out of <memory>"}
    rows[13] |= dict.fromkeys(measured, np.nan) | {"state": "infeasible", "feasible": False, "reason": "too small"}
    rows[17] = rows[5] | {"state": "duplicate"}
    return _make_trials(rows)
