"""Which low-rank form saves time in which engine: SmolLM2, 20 % smaller, prefill and decode relative to dense.

    python benchmarks/engines.py                                  # every engine that is installed
    python benchmarks/engines.py --engines vllm --batch 1,8 --max-seconds 60

Engines are taken from `DSE_<ENGINE>_PYTHON` or this environment; absent ones are skipped in one line. For each form:
the ratio of prefill and decode latency to dense, measured in alternation, and the share of the ideal gain. The ideal is
a latency that falls as much as the parameters do: a model 20 % smaller would take 20 % less time.
Prints a table per engine, then one JSON document as the last line.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import sys
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch

from dse import load_model
from dse.config import MeasurementConfig
from dse.cost import break_even_rank, point_cost
from dse.decomposition import FactorBank, decompose, named_calibration
from dse.design_point import PIVOTED, DesignPoint, TensorChoice
from dse.engines import ENGINES, PairedServing
from dse.errors import DseError
from dse.export import engine_pair
from dse.measurement import LatencySpec, PhaseLatency, grid_of
from dse.models import LoadedModel
from dse.progress import ignore_progress
from dse.topology import Topology
from dse.trial import EngineMeasurer, MeasurementPlan, first_cell

REDUCTION = 0.2


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="demo:smollm2-135m-instruct")
    parser.add_argument("--engines", default=",".join(ENGINES), help="comma-separated")
    parser.add_argument("--forms", default="", help="comma-separated; all by default")
    parser.add_argument("--batch", default="1,8")
    parser.add_argument("--prompt", type=int, default=128)
    parser.add_argument("--new", type=int, default=16)
    parser.add_argument("--blocks", type=int, default=4)
    parser.add_argument("--precision", type=float, default=0.02)
    parser.add_argument("--max-seconds", type=float, default=40.0, help="timed work per batch size and form")
    options = parser.parse_args()
    loaded = load_model(options.model)
    points = {name: point for name, point in forms(loaded) if not options.forms or name in options.forms.split(",")}
    # Timings do not depend on the values of weights, so little calibration text is enough.
    calibration = named_calibration(loaded.tokenizer, "general", tokens=2048)
    bank = FactorBank.build(loaded, list(points.values()), calibration)
    sizes = [(int(batch), options.prompt, options.new) for batch in options.batch.split(",")]
    spec = LatencySpec(blocks=options.blocks, precision=options.precision, max_duration_s=options.max_seconds)
    report: dict[str, Any] = {"model": options.model, "threads": torch.get_num_threads(), "engines": {}}
    for name in options.engines.split(","):
        found = ENGINES[name].availability()
        if not found.is_available:
            print(f"{name}: skipped, {found.problem}; {found.remedy}", flush=True)
            continue
        report["engines"][name] = measured(name, loaded, points, bank, grid_of(spec, sizes))
    print(json.dumps(report))
    return 0


def forms(loaded: LoadedModel) -> Iterator[tuple[str, DesignPoint]]:
    """Each structural form at a reduction of 20 % of all parameters, as close as whole ranks and blocks allow."""
    topology = loaded.topology
    matrices = [tensor.name for tensor in topology.tensors]
    stacked = [stack.name for stack in topology.stacks]
    members = {member for name in stacked for member in topology.tensors_of(name)}
    beside = [name for name in matrices if name not in members]
    yield "low rank", _uniform(loaded, _break_even(topology, matrices))
    yield "pivoted", _uniform(loaded, {t.name: min(t.shape) for t in topology.tensors}, form=PIVOTED)
    if stacked:
        yield "stacks", _uniform(loaded, _break_even(topology, [*stacked, *beside]))
    if topology.blocks:
        yield "removed blocks", _removed(loaded)
    if topology.mlps:
        widths = {mlp.name: mlp.channels for mlp in topology.mlps}
        yield "reduced MLP width", _uniform(loaded, widths, "width")


def _uniform(loaded: LoadedModel, limits: Mapping[str, int], method: str = "svd", form: str = "") -> DesignPoint:
    """The same share of each limit, in multiples of 8: the largest that reaches the reduction."""

    def at(share: float) -> DesignPoint:
        ranks = {name: max(1, int(share * limit) // 8 * 8) for name, limit in limits.items()}
        return DesignPoint.of({name: TensorChoice(method, rank, form=form) for name, rank in ranks.items()})

    low, high = 0.01, 1.0
    for _ in range(30):
        middle = (low + high) / 2
        low, high = (middle, high) if _reduction(loaded, at(middle)) >= REDUCTION else (low, middle)
    return at(low)


def _break_even(topology: Topology, names: Sequence[str]) -> dict[str, int]:
    return {name: break_even_rank(*topology.matrix(name).shape) for name in names}


def _removed(loaded: LoadedModel) -> DesignPoint:
    """Whole blocks from the last layer but one backwards, attention and MLP alternately, until the reduction is met."""
    chosen: dict[str, TensorChoice] = {}
    for block in reversed(loaded.topology.blocks[:-2]):
        if _reduction(loaded, DesignPoint.of(chosen)) >= REDUCTION:
            break
        chosen[block.name] = TensorChoice.removal()
    return DesignPoint.of(chosen)


def _reduction(loaded: LoadedModel, point: DesignPoint) -> float:
    return point_cost(loaded.topology, point).reduction


def measured(
    name: str, loaded: LoadedModel, points: dict[str, DesignPoint], bank: FactorBank, cells: tuple[LatencySpec, ...]
) -> dict[str, Any]:
    """Dense times and the ratios of every form in one engine."""
    config = MeasurementConfig(
        engine=name,
        batch_size=[cell.batch_size for cell in cells],
        prompt_tokens=cells[0].prompt_tokens,
        new_tokens=cells[0].new_tokens,
    )
    report: dict[str, Any] = {"forms": {}}
    with contextlib.closing(engine_pair(config, loaded, bank)) as pair:
        measurer = EngineMeasurer(loaded, MeasurementPlan(cells), pair, ignore_progress)
        for form, point in points.items():
            try:
                with decompose(loaded, point, bank) as applied:
                    served = measurer.cells(applied, is_dense=False, meter=None, idle=None)
            except DseError as error:
                print(f"{name:<12} {form:<15} {error}", flush=True)
                report["forms"][form] = {"problem": str(error)}
                continue
            first = first_cell(served)
            report.setdefault("versions", dict(first.versions))
            reduction = _reduction(loaded, point)
            entry = {"reduction": reduction, "start_up_s": first.start_up_s, "cells": {}}
            for cell in served:
                if not isinstance(cell, PairedServing):
                    print(f"{name:<12} {form:<15} batch {cell.work.concurrency:>2}: {cell.reason}", flush=True)
                    continue
                entry["cells"][f"batch {cell.work.concurrency}"] = _cell(cell, reduction)
                print(_line(name, form, cell, reduction), flush=True)
            report["forms"][form] = entry
    return report


def _cell(cell: PairedServing, reduction: float) -> dict[str, Any]:
    phases = {"prefill": cell.prefill, "decode": cell.tpot}
    return {
        phase: {
            "dense_s": times.baseline.median_s,
            "ratio": times.ratio,
            "low": times.ratio_low,
            "high": times.ratio_high,
            "share_of_ideal": _share(times, reduction),
        }
        for phase, times in phases.items()
        if times is not None
    }


def _share(times: PhaseLatency, reduction: float) -> float:
    """Saved time as a share of the ideal one; 1 if latency falls as much as the parameters, negative if it rises."""
    return (1 - times.ratio) / reduction


def _line(name: str, form: str, cell: PairedServing, reduction: float) -> str:
    parts = [f"{name:<12} {form:<15} batch {cell.work.concurrency:>2}, -{100 * reduction:.1f} %:"]
    for phase, times in (("prefill", cell.prefill), ("decode", cell.tpot)):
        if times is not None:
            interval = f"{times.ratio:.3f} [{times.ratio_low:.3f}, {times.ratio_high:.3f}]"
            share = f"{100 * _share(times, reduction):.0f} % of ideal"
            parts.append(f"{phase} {interval} of {1e3 * times.baseline.median_s:.1f} ms, {share};")
    return " ".join(parts).rstrip(";")


if __name__ == "__main__":
    sys.exit(main())
