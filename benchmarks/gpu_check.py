"""Check a machine with a GPU, and measure what low-rank forms of a Llama-2-7B-shaped model gain there.

    python benchmarks/gpu_check.py [--out gpu_check.json] [--device cuda:0] [--minutes 8]
    python benchmarks/gpu_check.py --scale 0.1     # rehearsal, on a CPU if there is no GPU

Runs tests/gpu, and then measures a random model (no download): dense, the paper's 9 % point (three layers at rank 1),
and a point of 20 % fewer parameters in each form (two factors, factors with a core, stacked matrices, reduced widths,
removed blocks), in each execution mode, at batch 1 and 32. Prints latency, energy and memory relative to dense, and the
share of the ideal gain that is realised: 100 % if time falls as much as the weights that a token reads. The most
important rows come first; those that do not fit into the minutes are left out by name. The last line is one JSON
document, which is also written to `--out`. Exits with 1 if a test or a measurement fails, and with 3 without a GPU.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import subprocess
import sys
import time
import warnings
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from dse.cost import point_cost
from dse.decomposition import apply_point
from dse.decomposition.factors import LowRankFactors
from dse.decomposition.mlp_width import ChannelFactors
from dse.design_point import WIDTH, DesignPoint, TensorChoice
from dse.errors import DseError
from dse.measurement import (
    EnergyMeter,
    LatencySpec,
    describe_environment,
    device_lock,
    measure_cell,
    measure_idle_power,
    measure_paired_energy,
    measure_peak_memory,
    open_meter,
)
from dse.models import topology_of
from dse.topology import Topology

EXIT_NO_GPU = 3
REDUCTION = 0.2
PAPER_LAYERS = (2, 17, 31)
"""Of 32 layers; Moar et al. 2024, arXiv 2405.06626, at 9 % fewer parameters."""
ROOT = Path(__file__).resolve().parents[1]
SECONDS = {"eager": 12.0, "cuda_graph": 14.0, "compile": 90.0}
"""What the first measurement in a mode takes; none starts with less time left than the longest one so far."""


@dataclasses.dataclass(frozen=True)
class Sizes:
    """Sizes of the model and of the work."""

    hidden: int
    inner: int
    layers: int
    vocabulary: int
    batches: tuple[int, int]
    prompt_tokens: int
    new_tokens: int

    @classmethod
    def at(cls, scale: float, *, has_gpu: bool) -> Sizes:
        """Llama-2-7B's, every dimension times `scale`; a CPU also gets shorter prompts and smaller batches."""
        hidden = max(128, round(4096 * scale / 64) * 64)
        inner = max(128, round(11008 * scale / 64) * 64)
        layers, vocabulary = max(4, round(32 * scale)), max(512, round(32000 * scale))
        work: tuple[tuple[int, int], int, int] = ((1, 32), 128, 32) if has_gpu else ((1, 4), 16, 4)
        return cls(hidden, inner, layers, vocabulary, *work)


def random_llama(sizes: Sizes, device: torch.device) -> LlamaForCausalLM:
    """A model with random weights, made on the device."""
    config = LlamaConfig(
        vocab_size=sizes.vocabulary,
        hidden_size=sizes.hidden,
        intermediate_size=sizes.inner,
        num_hidden_layers=sizes.layers,
        num_attention_heads=sizes.hidden // (128 if sizes.hidden % 128 == 0 and sizes.hidden >= 1024 else 64),
        max_position_embeddings=4096,
    )
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float16 if device.type == "cuda" else torch.float32)
    torch.manual_seed(0)
    try:
        with torch.device(device):
            model = LlamaForCausalLM(config)
    finally:
        torch.set_default_dtype(before)
    return model.eval().requires_grad_(False)


class RandomChannels(ChannelFactors):
    """The first channels, with random columns of the output matrix."""

    def output_matrix(self, width: int) -> torch.Tensor:
        return self.outputs[:, :width].contiguous()


class RandomFactors:
    """Factors with random entries: their values do not change how long a product takes."""

    def __init__(self, topology: Topology, device: torch.device, dtype: torch.dtype) -> None:
        self._topology, self._device, self._dtype = topology, device, dtype

    def factors(self, name: str, choice: TensorChoice) -> LowRankFactors:
        rows, columns = self._topology.matrix(name).shape
        core = self._normal(choice.rank, choice.rank) if choice.method == "tucker" else None
        return LowRankFactors(self._normal(rows, choice.rank), self._normal(choice.rank, columns), core)

    def channels(self, name: str) -> RandomChannels:
        mlp = self._topology.mlp(name)
        nothing = torch.empty(0)
        order = torch.arange(mlp.channels, device=self._device)
        return RandomChannels(order, nothing, self._normal(mlp.output.out_features, mlp.channels), nothing)

    def _normal(self, *sizes: int) -> torch.Tensor:
        return torch.randn(*sizes, device=self._device, dtype=self._dtype) * 0.02


def points_of(topology: Topology) -> dict[str, DesignPoint]:
    """The paper's point, and the uniform point nearest to 20 % of each form."""
    layers = topology.layer_count
    count = max(1, round(len(PAPER_LAYERS) * layers / 32))
    chosen = [layer * (layers - 1) // 31 for layer in PAPER_LAYERS][:count]
    paper = {part.name: TensorChoice("tucker", 1) for part in topology.tensors if part.layer in chosen}
    singles = [tensor.name for tensor in topology.tensors]
    in_stacks = {member.name for stack in topology.stacks for member in stack.members}
    stacked = [stack.name for stack in topology.stacks] + [name for name in singles if name not in in_stacks]
    return {
        "paper 9 %: tucker, rank 1": DesignPoint.of(paper),
        "20 %: two factors": uniform(topology, singles, "svd"),
        "20 %: with a core": uniform(topology, singles, "tucker"),
        "20 %: stacks": uniform(topology, stacked, "svd"),
        "20 %: reduced widths": narrow(topology),
        "20 %: removed blocks": removed(topology),
    }


def uniform(topology: Topology, names: list[str], method: str) -> DesignPoint:
    """Every matrix at the same share of its break-even rank, such that the reduction is `REDUCTION`."""
    from dse.cost import break_even_rank

    low, high = 0.0, 1.0
    point = DesignPoint.dense()
    for _ in range(20):
        middle = (low + high) / 2
        ranks = {name: max(1, int(middle * break_even_rank(*topology.matrix(name).shape))) for name in names}
        point = DesignPoint.of({name: TensorChoice(method, rank) for name, rank in ranks.items()})
        if point_cost(topology, point).reduction > REDUCTION:
            low = middle
        else:
            high = middle
    return point


def narrow(topology: Topology) -> DesignPoint:
    """Every MLP at the same width, a multiple of 64, such that the reduction is nearest to `REDUCTION`."""

    def at(width: int) -> DesignPoint:
        return DesignPoint.of({mlp.name: TensorChoice(WIDTH, width) for mlp in topology.mlps})

    widths = range(64, topology.mlps[0].channels, 64)
    return at(min(widths, key=lambda width: abs(point_cost(topology, at(width)).reduction - REDUCTION)))


def removed(topology: Topology) -> DesignPoint:
    """Whole blocks from the last but one layer on, until the reduction is reached."""
    chosen: dict[str, TensorChoice] = {}
    for block in reversed(topology.blocks[:-2]):
        chosen[block.name] = TensorChoice("removed", 0)
        if point_cost(topology, DesignPoint.of(chosen)).reduction >= REDUCTION:
            break
    return DesignPoint.of(chosen)


@dataclasses.dataclass
class Check:
    """One run of the script: the model, the time that is left, and what was found."""

    model: LlamaForCausalLM
    topology: Topology
    sizes: Sizes
    device: torch.device
    meter: EnergyMeter | None
    idle: Any
    deadline_s: float
    rows: list[dict[str, Any]] = dataclasses.field(default_factory=list)
    left_out: list[str] = dataclasses.field(default_factory=list)
    failures: list[str] = dataclasses.field(default_factory=list)

    def works(self, points: Mapping[str, DesignPoint]) -> Iterator[tuple[str, DesignPoint, str, int]]:
        """Point, mode and batch size, the most important first; dense beside dense shows the error."""
        named = {"dense": DesignPoint.dense(), **points}
        modes = ("cuda_graph", "eager") if self.device.type == "cuda" else ("eager",)
        for mode in modes:
            for batch in self.sizes.batches:
                for name, point in named.items():
                    yield name, point, mode, batch
        for name in ("dense", "20 %: two factors", "20 %: stacks"):
            yield name, named[name], "compile", self.sizes.batches[0]

    def measure(self, name: str, point: DesignPoint, mode: str, batch: int) -> None:
        label = f"{name}, {mode}, batch {batch}"
        taken_s = [row["seconds"] for row in self.rows if row["mode"] == mode]
        if time.monotonic() + max(taken_s, default=SECONDS[mode]) > self.deadline_s:
            self.left_out.append(label)
            return
        began_s = time.monotonic()
        try:
            row = self._measured(point, mode, batch)
        except (DseError, RuntimeError) as error:
            self.failures.append(f"{label}: {type(error).__name__}: {' '.join(str(error).split())[:300]}")
            print(f"FAILED   {self.failures[-1]}", flush=True)
            return
        self.rows.append({"point": name, "mode": mode, "batch": batch, **row, "seconds": time.monotonic() - began_s})
        print(line_of(self.rows[-1]), flush=True)

    def _measured(self, point: DesignPoint, mode: str, batch: int) -> dict[str, Any]:
        spec = LatencySpec(
            prompt_tokens=self.sizes.prompt_tokens,
            new_tokens=self.sizes.new_tokens,
            batch_size=batch,
            mode=mode,
            blocks=3,
            max_warmup_blocks=2,
            max_duration_s=4.0,
            precision=0.02,
        )
        source = RandomFactors(self.topology, self.device, next(self.model.parameters()).dtype)
        cost = point_cost(self.topology, point)
        applied = apply_point(self.model, self.topology, point, source)
        try:
            cell = measure_cell(self.model, spec, applied, attempts=2)
            if cell.latency is None:
                raise RuntimeError(cell.reason)
            found: dict[str, Any] = {
                "reduction": cost.reduction,
                "prefill": phase_entry(cell.latency.prefill),
                "decode": phase_entry(cell.latency.decode),
                "ideal_ratio": self._ideal_ratio(cost.parameters),
                "is_valid": cell.is_valid,
                "reason": cell.reason,
            }
            found["realised_share"] = realised_share(found["decode"]["ratio"], found["ideal_ratio"])
            if mode != "compile":
                applied.use_candidate()
                memory = measure_peak_memory(self.model, spec, kv_cache_bytes_per_token=cost.kv_cache_bytes_per_token)
                found["memory"] = dataclasses.asdict(memory)
            if mode == "cuda_graph" and self.meter is not None:
                found["energy"] = self._energy(spec, self.meter, applied)
        finally:
            applied.undo()
        return found

    def _energy(self, spec: LatencySpec, meter: EnergyMeter, applied: Any) -> dict[str, Any]:
        energy = measure_paired_energy(self.model, spec, meter, applied, idle=self.idle, windows=2)
        if energy.decode_ratio is None or energy.prefill_ratio is None:
            return {"is_valid": False, "reason": energy.reason}
        return {
            "is_valid": True,
            "decode_ratio": energy.decode_ratio.ratio,
            "prefill_ratio": energy.prefill_ratio.ratio,
            "decode_j_per_token": energy.candidate.energy_per_token_j,
            "dense_decode_j_per_token": energy.baseline.energy_per_token_j,
        }

    def _ideal_ratio(self, parameters: int) -> float:
        """Weights that one token reads, relative to dense: all but the embedding, of which it reads one row."""
        embedding = self.model.get_input_embeddings().weight.numel()
        return (parameters - embedding) / (self.topology.parameters_dense - embedding)


def phase_entry(phase: Any) -> dict[str, Any]:
    return {
        "dense_s": phase.baseline.median_s,
        "ratio": phase.ratio,
        "low": phase.ratio_low,
        "high": phase.ratio_high,
    }


def realised_share(ratio: float, ideal_ratio: float) -> float | None:
    """The share of the ideal gain in decode that was measured; None for the dense model."""
    return (1 - ratio) / (1 - ideal_ratio) if ideal_ratio < 1 - 1e-9 else None


HEAD = (
    f"{'point':26} {'mode':11} {'batch':>5} {'decode':>8} {'ratio':>6} {'95 %':>13} {'ideal':>6} {'realised':>8}"
    f" {'prefill':>7} {'energy':>7} {'peak MB':>9}"
)


def line_of(row: Mapping[str, Any]) -> str:
    decode, share, energy = row["decode"], row["realised_share"], row.get("energy", {}).get("decode_ratio")
    peak = row.get("memory", {}).get("peak_bytes")
    cells = (
        f"{row['point']:26}",
        f"{row['mode']:11}",
        f"{row['batch']:>5}",
        f"{1e3 * decode['dense_s']:>6.2f}ms",
        f"{decode['ratio']:>6.3f}",
        f"{decode['low']:>6.3f}-{decode['high']:.3f}".rjust(13),
        f"{row['ideal_ratio']:>6.3f}",
        "-".rjust(8) if share is None else f"{100 * share:>6.0f} %",
        f"{row['prefill']['ratio']:>7.3f}",
        "-".rjust(7) if energy is None else f"{energy:>7.3f}",
        "-".rjust(9) if peak is None else f"{peak / 1e6:>9,.0f}",
    )
    return " ".join(cells)


def run_tests(limit_s: float) -> dict[str, Any]:
    """Run tests/gpu in a process of its own; it skips them without a GPU."""
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "tests/gpu"]
    try:
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=limit_s, env={**os.environ})
    except subprocess.TimeoutExpired:
        return {"passed": False, "summary": f"tests/gpu did not end within {limit_s:.0f} s", "output": ""}
    lines = done.stdout.strip().splitlines()
    return {
        "passed": done.returncode == 0,
        "summary": lines[-1].strip("= ") if lines else done.stderr[-300:],
        "output": "" if done.returncode == 0 else done.stdout[-6000:],
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("gpu_check.json"))
    parser.add_argument("--device", default="cuda:0")
    parser.add_argument("--scale", type=float, default=1.0, help="every dimension of the model; below 1 is a rehearsal")
    parser.add_argument("--minutes", type=float, default=8.0, help="time limit; less important work is left out (8)")
    parser.add_argument("--no-tests", action="store_true", help="leave tests/gpu out")
    options = parser.parse_args()
    began_s = time.monotonic()
    has_gpu = torch.cuda.is_available()
    if not has_gpu:
        print("no GPU: torch sees none on this machine, so neither CUDA nor NVML is checked", file=sys.stderr)
        if options.scale >= 1:
            return EXIT_NO_GPU
    warnings.simplefilter("ignore")  # from the compiler stack
    device = torch.device(options.device if has_gpu else "cpu")
    deadline_s = began_s + 60 * options.minutes - 10
    tests = (
        {"passed": True, "summary": "left out", "output": ""} if options.no_tests else run_tests(30 * options.minutes)
    )
    print(f"tests/gpu: {tests['summary']}\n{tests['output']}", flush=True)
    sizes = Sizes.at(options.scale, has_gpu=has_gpu)
    model = random_llama(sizes, device)
    topology = topology_of(model)
    print(
        f"{topology.parameters_dense / 1e9:.3f} B parameters on {device}, prompt {sizes.prompt_tokens}, new"
        f" {sizes.new_tokens}; loaded after {time.monotonic() - began_s:.0f} s\n{HEAD}",
        flush=True,
    )
    with device_lock(device):
        meter, no_meter = meter_of(device)
        idle = None if meter is None else measure_idle_power(meter)
        check = Check(model, topology, sizes, device, meter, idle, deadline_s)
        for work in check.works(points_of(topology)):
            check.measure(*work)
    report = {
        "is_rehearsal": options.scale < 1 or not has_gpu,
        "environment": describe_environment(),
        "scale": options.scale,
        "parameters": topology.parameters_dense,
        "tests": {key: tests[key] for key in ("passed", "summary")},
        "energy": no_meter or (meter.source if meter is not None else None),
        "rows": check.rows,
        "left_out": check.left_out,
        "failures": check.failures,
        "seconds": time.monotonic() - began_s,
    }
    options.out.write_text(json.dumps(report, indent=2) + "\n")
    if check.left_out:
        print(f"left out for lack of time: {'; '.join(check.left_out)}")
    print(json.dumps({key: value for key, value in report.items() if key != "environment"}))
    return 0 if tests["passed"] and not check.failures else 1


def meter_of(device: torch.device) -> tuple[EnergyMeter | None, str | None]:
    """The energy meter, or why there is none."""
    try:
        return open_meter(device), None
    except DseError as error:
        print(f"energy is not measured: {error}", file=sys.stderr)
        return None, str(error)


if __name__ == "__main__":
    raise SystemExit(main())
