"""How much of the time that a point should save it saves: SmolLM2 at 10, 20 and 40 % fewer parameters.

    python benchmarks/realised_speed.py
    python benchmarks/realised_speed.py --kinds blocks --reductions 0.2 --batch 1 --pause
    python benchmarks/realised_speed.py --kinds --points points/reduction-0.2.json     # of `dse allocate`

Kinds: `ranks`, every matrix at the same fraction; `stacks`, the same with query-key-value and gate-up as one; `blocks`,
half by removed blocks; with a sensitivity profile `allocated`, least divergence for the parameters, and `timed`, least
divergence for the time that the device profile predicts, at the same reduction.

Each point is timed by turns with the best dense model (mode `fast`: shared products, layouts by timing, whole layers by
the kernel, or else both phases compiled), and in the plain form (two `nn.Linear` for a matrix, eager) by turns with the
plain dense model. The ideal is the ratio of FLOPs in prefill and of the bytes read in decode (weights and the cache).
`share` is the gain that was measured, 1 - ratio, over the ideal one. Factors are random: their values do not change the
time.
A table for people; one JSON document as the last line for machines. Exits 1 where a point is slower than dense by more
than its interval.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from realised_points import KINDS, point_of, table_in_time

from dse import load_model
from dse.cost import cost
from dse.decomposition import AppliedPoint, LowRankFactors, apply_point
from dse.design_point import DesignPoint, TensorChoice
from dse.files import write_json
from dse.kernel import kernel_name
from dse.measurement import LatencySpec, PairedLatency, Workload, measure_latency
from dse.models import LoadedModel
from dse.runtime import FastRuntime, GenerationShape, Sides, fast_runtime
from dse.sensitivity import SensitivityProfile
from dse.topology import Topology

PHASES = ("prefill", "decode")


class RandomFactors:
    """Factors of the right shapes."""

    def __init__(self, topology: Topology) -> None:
        self._topology = topology

    def factors(self, name: str, choice: TensorChoice) -> LowRankFactors:
        rows, columns = self._topology.matrix(name).shape
        scale = (columns * choice.rank) ** -0.5
        return LowRankFactors(torch.randn(rows, choice.rank) * scale, torch.randn(choice.rank, columns))


@dataclass
class Cell:
    """One point at one batch size, compiled and ready to be timed."""

    kind: str
    reduction: float
    applied: AppliedPoint
    sides: Sides
    spec: LatencySpec
    workload: Workload
    point: DesignPoint

    def ideal(self, topology: Topology) -> dict[str, float]:
        """Ratio of FLOPs in prefill and of bytes read in decode."""
        sides = [cost(topology, point, prompt_tokens=self.spec.prompt_tokens) for point in (self.point, DesignPoint())]
        flops = [side.flops_prefill_per_token for side in sides]
        seen = self.spec.batch_size * (self.spec.prompt_tokens + self.spec.new_tokens / 2)
        bytes_read = [side.weight_bytes + seen * (side.kv_cache_bytes_per_token or 0) for side in sides]
        return {"prefill": flops[0] / flops[1], "decode": bytes_read[0] / bytes_read[1]}


def compiled_cell(
    loaded: LoadedModel,
    kind: str,
    point: DesignPoint,
    spec: LatencySpec,
    runtime: FastRuntime,
    stack: Any,
    dense: Workload,
) -> Cell:
    applied = apply_point(loaded.model, loaded.topology, point, RandomFactors(loaded.topology))
    sides = stack.enter_context(runtime.sides(applied))
    workload = Workload(loaded.model, spec)
    workload.adopt(dense)
    for side, use in (("dense", sides.use_baseline), ("subject", sides.use_candidate)):
        use()
        generation = workload.begin(side)
        workload.prefill(generation)
        workload.get_ready(generation, side)
    dense.adopt(workload)
    sides.use_baseline()
    sides.remove()
    applied.use_baseline()
    return Cell(kind, cost(loaded.topology, point).reduction, applied, sides, spec, workload, point)


def timed(loaded: LoadedModel, cell: Cell, *, with_plain: bool) -> dict[str, Any]:
    fast = measure_latency(
        loaded.model,
        cell.spec,
        use_candidate=cell.sides.use_candidate,
        use_baseline=cell.sides.use_baseline,
        workload=cell.workload,
    )
    cell.sides.remove()
    plain = None
    if with_plain:
        plain = measure_latency(
            loaded.model,
            cell.spec.eager(),
            use_candidate=cell.applied.use_candidate,
            use_baseline=cell.applied.use_baseline,
        )
    cell.applied.use_baseline()
    return row(loaded, cell, fast, plain)


def row(loaded: LoadedModel, cell: Cell, fast: PairedLatency, plain: PairedLatency | None) -> dict[str, Any]:
    found: dict[str, Any] = {
        "kind": cell.kind,
        "reduction": round(cell.reduction, 4),
        "batch": cell.spec.batch_size,
        "point": cell.point.id,
    }
    for phase, ideal in cell.ideal(loaded.topology).items():
        ours = getattr(fast, phase)
        values = {
            "ratio": ours.ratio,
            "low": ours.ratio_low,
            "high": ours.ratio_high,
            "ideal": ideal,
            "share": (1 - ours.ratio) / (1 - ideal),
            "dense_s": ours.dense.median_s,
            "point_s": ours.subject.median_s,
        }
        if plain is not None:
            theirs = getattr(plain, phase)
            values |= {
                "plain_ratio": theirs.ratio,
                "plain_share": (1 - theirs.ratio) / (1 - ideal),
                "plain_dense_s": theirs.dense.median_s,
                "plain_point_s": theirs.subject.median_s,
                "speedup_over_plain_point": theirs.subject.median_s / ours.subject.median_s,
                "speedup_over_plain_dense": theirs.dense.median_s / ours.subject.median_s,
            }
        found[phase] = {name: round(value, 5) for name, value in values.items()}
    return found


def text(found: dict[str, Any]) -> str:
    lines = []
    for phase in PHASES:
        v = found[phase]
        line = (
            f"{found['kind']:<16} {100 * found['reduction']:5.1f} %  batch {found['batch']}  {phase:<8}"
            f" dense {1e3 * v['dense_s']:8.2f} ms  point {1e3 * v['point_s']:8.2f} ms"
            f"  x{v['ratio']:.3f} [{v['low']:.3f}, {v['high']:.3f}]  ideal x{v['ideal']:.3f}  share {v['share']:5.2f}"
        )
        if "plain_ratio" in v:
            line += (
                f"  | plain x{v['plain_ratio']:.3f} share {v['plain_share']:5.2f} of {1e3 * v['plain_dense_s']:.1f} ms"
            )
        lines.append(line)
    return "\n".join(lines)


def dense_latencies(loaded: LoadedModel, spec: LatencySpec, dense: Workload, runtime: FastRuntime) -> dict[str, float]:
    """Seconds of both phases of the dense model in its fast form, against itself."""
    with contextlib.ExitStack() as stack:
        cell = compiled_cell(loaded, "dense", DesignPoint(), spec, runtime, stack, dense)
        found = measure_latency(
            loaded.model,
            spec,
            use_candidate=cell.sides.use_candidate,
            use_baseline=cell.sides.use_baseline,
            workload=cell.workload,
        )
        cell.sides.remove()
        cell.applied.use_baseline()
    seconds = {phase: getattr(found, phase).dense.median_s for phase in PHASES}
    print({f"dense {phase}, ms": round(1e3 * value, 2) for phase, value in seconds.items()}, file=sys.stderr)
    return seconds


def points_of(
    options: argparse.Namespace, loaded: LoadedModel, spec: LatencySpec, dense: Workload, runtime: FastRuntime
) -> Iterator[tuple[str, DesignPoint]]:
    """The points of the kinds asked for, at each reduction, then those of files."""
    table = None if options.profile is None else SensitivityProfile.read(options.profile).table
    tables = {"allocated": table}
    if "timed" in options.kinds and table is not None:
        tables["timed"] = table_in_time(loaded, table, spec, dense_latencies(loaded, spec, dense, runtime))
    for reduction in options.reductions:
        for kind in options.kinds:
            yield kind, point_of(kind, loaded.topology, reduction, options.multiple, tables.get(kind))
    for path in options.points:
        yield path.stem, DesignPoint.from_json(json.loads(path.read_text("utf-8")), loaded.topology)


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="demo:smollm2-135m-instruct")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--points", nargs="+", type=Path, default=[], help="files of points, measured beside the kinds")
    parser.add_argument("--kinds", nargs="*", default=["stacks", "blocks"], choices=KINDS)
    parser.add_argument("--profile", type=Path, help="a profile.json of `dse sensitivity`, for `allocated` and `timed`")
    parser.add_argument("--keep", type=Path, help="a folder for the points, one file each")
    parser.add_argument("--reductions", nargs="+", type=float, default=[0.1, 0.2, 0.4])
    parser.add_argument("--batch", nargs="+", type=int, default=[1, 8])
    parser.add_argument("--prompt", type=int, default=256)
    parser.add_argument("--new", type=int, default=16)
    parser.add_argument("--multiple", type=int, default=32, help="ranks are multiples of this")
    parser.add_argument("--blocks", type=int, default=6)
    parser.add_argument("--max-seconds", type=float, default=12.0, help="timed work a measurement")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--pause", action="store_true", help="wait for Enter between compiling and timing")
    parser.add_argument("--no-plain", action="store_true", help="leave out the plain form")
    options = parser.parse_args()
    if options.profile is None and {"allocated", "timed"} & set(options.kinds):
        parser.error("kinds `allocated` and `timed` need --profile")
    return options


def main() -> int:
    options = arguments()
    torch.set_num_threads(options.threads)
    loaded = load_model(options.model, dtype=options.dtype)
    rows = []
    with contextlib.ExitStack() as stack:
        cells = []
        for batch in options.batch:
            spec = LatencySpec(
                prompt_tokens=options.prompt,
                new_tokens=options.new,
                batch_size=batch,
                blocks=options.blocks,
                precision=0.01,
                max_duration_s=options.max_seconds,
                mode="fast",
            )
            runtime = fast_runtime(loaded.model, GenerationShape(batch, options.prompt, options.new))
            dense = Workload(loaded.model, spec)  # what it compiles for the dense side serves every cell
            for kind, point in points_of(options, loaded, spec, dense, runtime):
                if options.keep is not None:
                    reduction = 100 * cost(loaded.topology, point).reduction
                    write_json(options.keep / f"{kind}-{reduction:.0f}-batch-{batch}.json", point.to_json())
                print(f"compiling {kind} {point.id}, batch {batch}", file=sys.stderr, flush=True)
                cells.append(compiled_cell(loaded, kind, point, spec, runtime, stack, dense))
        for cell in cells:
            if options.pause:
                print(f"ready for {cell.kind} {cell.reduction:.3f}, batch {cell.spec.batch_size}", flush=True)
                sys.stdin.readline()
            rows.append(timed(loaded, cell, with_plain=not options.no_plain))
            print(text(rows[-1]), flush=True)
    slower = [f"{r['kind']} {r['reduction']} batch {r['batch']} {p}" for r in rows for p in PHASES if r[p]["low"] > 1]
    first = next(loaded.model.parameters())
    machine = {"threads": torch.get_num_threads(), "kernel": kernel_name(first.device, first.dtype)}
    print(json.dumps({"model": options.model, **machine, "rows": rows, "slower": slower}))
    return 1 if slower else 0


if __name__ == "__main__":
    sys.exit(main())
