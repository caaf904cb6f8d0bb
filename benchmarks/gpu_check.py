"""Check a machine with a GPU: run every code path that needs CUDA or NVML on a small random Llama.

    python benchmarks/gpu_check.py [--out gpu_check.json] [--device cuda:0]

Takes less than five minutes. Compares NVML's energy counter with integrated power, CUDA events with the host's clock,
and the execution modes with each other; every mode must decode the same tokens as eager. Prints one line per check,
writes a JSON report, and exits with 1 if a check fails. Without a GPU it says so and exits with 3; `--rehearse` then
runs the checks that work on a CPU, to test the script itself, and still exits with 3.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from dse.decomposition import LowRankLinear, truncated_svd
from dse.errors import DseError, OutOfMemoryError
from dse.measurement import (
    LatencySpec,
    NvmlMeter,
    PairedLatency,
    describe_environment,
    device_lock,
    measure_energy,
    measure_idle_power,
    measure_latency,
    measure_peak_memory,
    open_meter,
    run_checks,
)
from dse.measurement.clock import MonotonicStopwatch, stopwatch_for
from dse.measurement.workload import Workload
from dse.out_of_memory import out_of_memory_errors

EXIT_NO_GPU = 3
MODES = ("eager", "compile", "cuda_graph")
SPEC = LatencySpec(prompt_tokens=256, new_tokens=16, blocks=4)


@dataclasses.dataclass
class Bench:
    """State shared by the checks."""

    device: torch.device
    model: Any
    latencies: dict[str, PairedLatency] = dataclasses.field(default_factory=dict)

    @property
    def has_gpu(self) -> bool:
        return self.device.type == "cuda"

    def spec(self, mode: str) -> LatencySpec:
        return dataclasses.replace(SPEC, mode=mode)


def small_llama(device: torch.device) -> Any:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=8192,
        hidden_size=1024,
        intermediate_size=2816,
        num_hidden_layers=4,
        num_attention_heads=16,
        num_key_value_heads=8,
        max_position_embeddings=2048,
    )
    dtype = torch.float16 if device.type == "cuda" else torch.float32
    return LlamaForCausalLM(config).eval().requires_grad_(False).to(device=device, dtype=dtype)


def doctor(bench: Bench) -> dict[str, Any]:
    found = [dataclasses.asdict(check) for check in run_checks()]
    require(not bench.has_gpu or all(c["status"] == "ok" for c in found if "GPU" in c["name"]), f"{found}")
    return {"checks": found}


def tokens_of(bench: Bench, mode: str) -> list[int]:
    workload = Workload(bench.model, bench.spec(mode))
    generation = workload.begin()
    workload.prefill(generation)
    workload.prepare(generation)
    tokens = [generation.next_tokens.clone()]
    for _ in range(SPEC.new_tokens):
        workload.step(generation)
        tokens.append(generation.next_tokens.clone())
    return [int(token) for token in torch.cat(tokens, dim=1)[0]]


def mode_check(mode: str) -> Callable[[Bench], dict[str, Any]]:
    """The mode must decode the same tokens as eager, and measure dense against dense as a ratio near 1."""

    def check(bench: Bench) -> dict[str, Any]:
        expected, got = tokens_of(bench, "eager"), tokens_of(bench, mode)
        # Rounding in half precision may flip a near tie late in the sequence; the first tokens must agree.
        require(got[:4] == expected[:4], f"{mode} decoded {got}, eager {expected}")
        found = measure_latency(bench.model, bench.spec(mode), NoSwap())
        bench.latencies[mode] = found
        decode = found.decode
        require(decode is not None and abs(decode.ratio - 1) < 0.1, f"dense against dense is {decode}")
        return {"same_tokens": got == expected, "latency": dataclasses.asdict(found)}

    return check


def modes_against_each_other(bench: Bench) -> dict[str, Any]:
    medians = {mode: found.decode.baseline.median_s for mode, found in bench.latencies.items() if found.decode}
    relative = {mode: seconds / medians["eager"] for mode, seconds in medians.items()}
    require(all(ratio < 1.25 for ratio in relative.values()), f"a mode is slower than eager: {relative}")
    return {"decode_s": medians, "relative_to_eager": relative}


def clocks(bench: Bench) -> dict[str, Any]:
    """Time the same prefill with CUDA events and with the host's clock."""
    workload = Workload(bench.model, SPEC)
    events, host = stopwatch_for([bench.device]), MonotonicStopwatch([bench.device])
    for _ in range(3):
        workload.prefill(workload.begin())
    both = {}
    for clock in (events, host):
        both[clock.source] = min(clock.time(lambda: workload.prefill(workload.begin()))[1] for _ in range(20))
    ratio = both[events.source] / both[host.source]
    require(0.7 < ratio <= 1.05, f"events and host disagree: {both}")
    return {**both, "ratio": ratio}


def counter_against_power(bench: Bench) -> dict[str, Any]:
    """Read the energy of the same four seconds of work from the counter and from integrated power."""
    counter, power = NvmlMeter([bench.device.index or 0]), NvmlMeter([bench.device.index or 0], force_power=True)
    workload = Workload(bench.model, SPEC)
    with counter.window() as one, power.window() as other:
        begin_s = time.monotonic()
        while time.monotonic() < begin_s + 4:
            workload.prefill(workload.begin())
        workload.synchronize()
    ratio = other.energy_j / one.energy_j
    require(abs(ratio - 1) < 0.1, f"integrated power is {ratio:.3f} of the counter")
    return {"counter": counter.source, "power": power.source, "ratio": ratio, "period_s": power.period_s}


def energy(bench: Bench) -> dict[str, Any]:
    meter = open_meter(bench.device)
    idle = measure_idle_power(meter)
    found = measure_energy(bench.model, SPEC, meter, idle=idle)
    require(found.is_valid, found.reason)
    net = found.decode.net_per_token if found.decode else None
    require(net is not None and net.mean_j > 0, f"decoding must draw more than idle power, but net energy is {net}")
    return {"energy": dataclasses.asdict(found)}


def memory(bench: Bench) -> dict[str, Any]:
    per_token = 2 * 4 * 8 * 64 * bench.model.dtype.itemsize
    found = measure_peak_memory(bench.model, SPEC, kv_cache_bytes_per_token=per_token)
    cached = found.kv_cache_bytes or 0
    rise = found.decode_rise_bytes or 0
    require(rise >= 0.9 * cached, f"decode rises by {rise} bytes, less than its cache of {cached}")
    return dataclasses.asdict(found)


def out_of_memory(bench: Bench) -> dict[str, Any]:
    try:
        with out_of_memory_errors("allocating one petabyte"):
            torch.empty(2**50, dtype=torch.uint8, device=bench.device)
    except OutOfMemoryError as error:
        require(error.bytes_asked is not None, f"the size of the failed allocation is unknown: {error}")
        return {"bytes_asked": error.bytes_asked, "message": str(error)}
    raise AssertionError("an allocation of one petabyte succeeded")


class NoSwap:
    """The dense model as both candidate and baseline."""

    def use_candidate(self) -> None:
        pass

    def use_baseline(self) -> None:
        pass


class LowRankUpProjections:
    """Swaps the up projections of a Llama between dense and rank 64."""

    def __init__(self, model: Any) -> None:
        self._layers = [layer.mlp for layer in model.model.layers]
        self._dense = [layer.up_proj for layer in self._layers]
        factors = [truncated_svd(module.weight.float(), 64) for module in self._dense]
        self._low_rank = [
            LowRankLinear(f.left.to(m.weight), f.right.to(m.weight), None, None).eval()
            for f, m in zip(factors, self._dense, strict=True)
        ]

    def use_candidate(self) -> None:
        self._use(self._low_rank)

    def use_baseline(self) -> None:
        self._use(self._dense)

    def _use(self, modules: list[Any]) -> None:
        for layer, module in zip(self._layers, modules, strict=True):
            layer.up_proj = module


def decomposed(bench: Bench) -> dict[str, Any]:
    """Measure a low-rank candidate against the dense baseline, as a study does."""
    swap = LowRankUpProjections(bench.model)
    try:
        found = measure_latency(bench.model, SPEC, swap)
    finally:
        swap.use_baseline()
    require(found.is_valid, found.reason)
    return {"latency": dataclasses.asdict(found)}


def lock(bench: Bench) -> dict[str, Any]:
    from dse.measurement.device_lock import lock_file

    with device_lock(bench.device):
        return {"lock": lock_file(bench.device).name}


CHECKS: dict[str, tuple[bool, Callable[[Bench], dict[str, Any]]]] = {
    "doctor": (True, doctor),
    "lock": (False, lock),
    "memory": (False, memory),
    "out_of_memory": (False, out_of_memory),
    "decomposed": (False, decomposed),
    "clocks": (True, clocks),
    "counter_against_power": (True, counter_against_power),
    "energy": (True, energy),
    **{f"mode_{mode}": (mode != "eager", mode_check(mode)) for mode in MODES},
    "modes_against_each_other": (True, modes_against_each_other),
}
"""Each check by name, and whether it needs a GPU."""


def require(holds: bool, otherwise: str) -> None:
    if not holds:
        raise AssertionError(otherwise)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("gpu_check.json"))
    parser.add_argument("--device", default="cuda:0")
    parser.add_argument("--rehearse", action="store_true", help="without a GPU: run the checks that work on a CPU")
    options = parser.parse_args()
    has_gpu = torch.cuda.is_available()
    if not has_gpu:
        print("no GPU: torch sees none on this machine, so neither CUDA nor NVML was checked", file=sys.stderr)
        if not options.rehearse:
            return EXIT_NO_GPU
    bench = Bench(torch.device(options.device if has_gpu else "cpu"), None)
    bench.model = small_llama(bench.device)
    begin_s = time.monotonic()
    report: dict[str, Any] = {"is_rehearsal": not has_gpu, "environment": describe_environment(), "checks": {}}
    for name, (needs_gpu, check) in CHECKS.items():
        started_s = time.monotonic()
        if needs_gpu and not has_gpu:
            entry: dict[str, Any] = {"status": "skipped", "reason": "no GPU"}
        else:
            try:
                entry = {"status": "ok", **check(bench)}
            except (AssertionError, DseError, RuntimeError, OSError) as error:
                entry = {"status": "failed", "reason": f"{type(error).__name__}: {error}"}
        entry["seconds"] = round(time.monotonic() - started_s, 1)
        report["checks"][name] = entry
        print(f"{entry['status']:<8} {name} ({entry['seconds']} s) {entry.get('reason', '')}", flush=True)
    report["seconds"] = round(time.monotonic() - begin_s, 1)
    options.out.write_text(json.dumps(report, indent=2, default=str) + "\n", encoding="utf-8")
    failed = [name for name, entry in report["checks"].items() if entry["status"] == "failed"]
    print(f"{len(failed)} of {len(CHECKS)} checks failed in {report['seconds']} s; report in {options.out}")
    if not has_gpu:
        return EXIT_NO_GPU
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
