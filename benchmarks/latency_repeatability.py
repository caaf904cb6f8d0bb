"""Repeatability of the latency ratio of one design point, and coverage of its confidence interval.

    python benchmarks/latency_repeatability.py --point point     # one point, measured ten times
    python benchmarks/latency_repeatability.py --point dense     # dense against dense: the true ratio is 1

Expected: every ratio is within 3 % of the median of ten runs, and dense against dense has 1 inside the interval in nine
of ten runs. Prints a table, then one JSON document as the last line. Exits with 1 if an expectation does not hold.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from typing import Any

import torch

from dse import load_model
from dse.decomposition import FactorBank, apply_point
from dse.design_point import DesignPoint
from dse.measurement import LatencySpec, PhaseLatency, measure_latency

POINTS = {
    "dense": "dense",
    "point": '{"method": "svd", "rank": 64, "layers": "all", "roles": ["query", "attention_output"]}',
}
TOLERANCE = 0.03
PHASES = ("prefill", "decode")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="demo:smollm2-135m-instruct")
    parser.add_argument("--point", default="point", help="point, dense, or a design point as JSON")
    parser.add_argument("--runs", type=int, default=10)
    parser.add_argument("--prompt", type=int, default=128)
    parser.add_argument("--new", type=int, default=16)
    parser.add_argument("--blocks", type=int, default=4)
    parser.add_argument("--precision", type=float, default=0.02)
    parser.add_argument("--max-seconds", type=float, default=20.0, help="timed work per run")
    options = parser.parse_args()
    loaded = load_model(options.model)
    point = DesignPoint.read(POINTS.get(options.point, options.point), loaded.topology)
    applied = apply_point(loaded.model, loaded.topology, point, FactorBank.build(loaded, [point], None))
    spec = LatencySpec(
        prompt_tokens=options.prompt,
        new_tokens=options.new,
        blocks=options.blocks,
        precision=options.precision,
        max_duration_s=options.max_seconds,
    )
    print(f"{options.model}, point {point.id}, {spec.cell}, {torch.get_num_threads()} threads, {options.runs} runs")
    runs = []
    for run in range(options.runs):
        found = measure_latency(loaded.model, spec, applied)
        phases = {name: phase for name in PHASES if (phase := getattr(found, name)) is not None}
        runs.append(phases)
        shown = "  ".join(f"{name} {_text(phase)}" for name, phase in phases.items())
        warm = "" if found.is_warm else ", not warm"
        print(f"run {run + 1:>2}: {shown}  ({found.duration_s:.1f} s timed{warm})", flush=True)
    report: dict[str, Any] = {"point": point.id, "is_dense": point.is_dense, "runs": options.runs, "spec": spec.cell}
    measured = list(runs[0])
    report |= {phase: _summary([run[phase] for run in runs], is_dense=point.is_dense) for phase in measured}
    for phase in measured:
        print(f"{phase}: {report[phase]}")
    print(json.dumps(report))
    return 0 if all(report[phase]["holds"] for phase in measured) else 1


def _text(phase: PhaseLatency) -> str:
    interval = f"{phase.ratio:.4f} [{phase.ratio_low:.4f}, {phase.ratio_high:.4f}]"
    return f"{interval} of {1e3 * phase.baseline.median_s:.1f} ms"


def _summary(phases: list[PhaseLatency], *, is_dense: bool) -> dict[str, Any]:
    median = statistics.median(phase.ratio for phase in phases)
    deviation = max(abs(phase.ratio / median - 1) for phase in phases)
    covered = sum(phase.ratio_low <= 1 <= phase.ratio_high for phase in phases)
    holds = deviation <= TOLERANCE and (not is_dense or covered >= 0.9 * len(phases))
    return {
        "ratios": [round(phase.ratio, 4) for phase in phases],
        "median": round(median, 4),
        "largest_deviation_from_median": round(deviation, 4),
        "intervals_with_1": covered,
        "median_half_width": round(
            statistics.median((phase.ratio_high - phase.ratio_low) / (2 * phase.ratio) for phase in phases), 4
        ),
        "holds": holds,
    }


if __name__ == "__main__":
    sys.exit(main())
